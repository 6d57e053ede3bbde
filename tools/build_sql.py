"""Build sql/tokenlimits.sql and the newest migration from sql/schema/; with --check, fail if they are stale.

The files of the schema are Jinja templates: a rule that several functions have in place is a macro in
sql/schema/macros/, which sqlfluff reads too. The newest migration has those statements of the schema that no earlier
one has in the same words. The one paste has all of them, and is applied over older versions too, so every statement
must work both ways: `create or replace`, `add column if not exists`. After a release, begin the next migration with an
empty file, sql/migrations/YYYYMMDDHHMMSS_topic.sql; the released ones are never built again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SQL = Path(__file__).resolve().parent.parent / "sql"
ONE_PASTE_HEADER = """\
-- tokenlimits: exact limits on generations. Apply it in Supabase's SQL editor, or as a migration.
-- It can be applied again without harm: data, and your own tokenlimits.is_admin() and known_users(), stay.
-- Generated from sql/schema/ by `make sql`; edit it there.

"""
# squawk assumes that the migration tool begins a transaction; psql doesn't
BEGIN = """\
-- All or nothing, also where statements come one by one, as from psql.
-- squawk-ignore transaction-nesting
begin;
-- Who waits for a lock on a table in use makes everybody else wait behind it.
set local lock_timeout = '10s';

"""
COMMIT = "\n-- squawk-ignore transaction-nesting\ncommit;\n"
MIGRATION_HEADER = """\
-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

"""
NAMES = (
    "table_names",
    "type_names",
    "function_names",
    "index_names",
    "private_table_names",
    "private_function_names",
)
# PostgREST must reload the schema after each
RELOAD = "notify pgrst, 'reload schema';"


def schema() -> tuple[str, str]:
    """Fill in the templates of the schema, and of its uninstallation."""
    templates = Environment(
        loader=FileSystemLoader(SQL / "schema"),
        extensions=["jinja2.ext.do"],
        undefined=StrictUndefined,
        autoescape=False,  # the output is SQL, not HTML
        keep_trailing_newline=True,
    )
    for path in sorted((SQL / "schema" / "macros").glob("*.sql")):
        macros = templates.from_string(path.read_text()).module
        templates.globals |= {name: value for name, value in vars(macros).items() if not name.startswith("_")}
    paths = sorted((SQL / "schema").glob("*.sql"))

    def render(path: Path, context: dict[str, str]) -> str:
        built = templates.get_template(path.relative_to(SQL / "schema").as_posix()).render(context)
        return re.sub(r"[ \t]+$", "", built, flags=re.MULTILINE)

    # some statements use the names of all objects
    names = made_names("".join(render(path, dict.fromkeys(NAMES, "")) for path in paths))
    built = "\n".join(f"-- {path.name}\n\n{render(path, names)}" for path in paths)
    return built, render(SQL / "schema" / "uninstall" / "uninstall.sql", names)


def made_names(sql: str) -> dict[str, str]:
    """List the names that the SQL creates, for the checks whether a name is taken, or is ours."""
    tables = re.findall(r"^create table if not exists public\.(\w+)", sql, re.MULTILINE)
    functions = re.findall(r"^create or replace function public\.(\w+)", sql, re.MULTILINE)
    # keys are indexes too, and their names begin with the table's; a sequence is named in its revoke
    indexes = re.findall(
        r"^(?:  constraint|create (?:unique )?index if not exists) (\w+_(?:pkey|key|idx))", sql, re.MULTILINE
    )
    sequences = re.findall(r"on sequence public\.(\w+)", sql)
    named = sorted(name for name in (*indexes, *sequences) if name.startswith(tuple(tables)))
    types = re.findall(r"^ +create type tokenlimits\.(\w+)", sql, re.MULTILINE)
    private = set(re.findall(r"^create or replace function tokenlimits\.(\w+)", sql, re.MULTILINE))
    separators = {"table_names": ", ", "type_names": ", ", "private_table_names": ", "}
    made = {
        "table_names": tables,
        "type_names": types,
        "function_names": sorted(set(functions)),
        "index_names": named,
        "private_table_names": re.findall(r"^create table if not exists tokenlimits\.(\w+)", sql, re.MULTILINE),
        "private_function_names": sorted(private),
    }
    return {key: separators.get(key, ",\n").join(f"'{name}'" for name in made[key]) for key in NAMES}


def statements(sql: str) -> Iterator[str]:
    """Split formatted SQL into statements, each with the comments before it."""
    lines: list[str] = []
    body: str | None = None
    for line in sql.splitlines():
        if not lines and not line:
            continue
        lines.append(line)
        for quote in re.findall(r"\$\w*\$", line):
            body = quote if body is None else None if body == quote else body
        if body is None and line.endswith(";"):
            yield "\n".join(lines)
            lines = []


def code(statement: str) -> str:
    """Strip the comments before a statement."""
    return re.sub(r"\A(--.*\n|\n)+", "", statement)


def migration(schema: str, earlier: list[str]) -> str:
    """Build what the schema has beyond its earlier migrations."""
    known = {code(statement) for text in earlier for statement in statements(text)} - {RELOAD}
    new = [statement for statement in statements(schema) if code(statement) not in known]
    return MIGRATION_HEADER + BEGIN + "\n\n".join(new) + "\n" + COMMIT


def main() -> int:
    """Write the generated files, or say which are stale."""
    built_schema, uninstallation = schema()
    *released, newest = sorted((SQL / "migrations").glob("*.sql"))
    built = {
        SQL / "tokenlimits.sql": ONE_PASTE_HEADER + BEGIN + built_schema + COMMIT,
        SQL / "uninstall.sql": uninstallation,
        newest: migration(built_schema, [path.read_text() for path in released]),
    }
    stale = [path for path, content in built.items() if not path.exists() or path.read_text() != content]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(SQL.parent)} is stale: run `make sql`", file=sys.stderr)
        return bool(stale)
    for path in stale:
        path.write_text(built[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
