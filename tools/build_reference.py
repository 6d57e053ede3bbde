"""Write the pages of the docs that repeat what code says: SQL functions, the command line, errors, results.

They are made anew whenever the docs are built, and are not in git.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenlimits import errors
from tokenlimits._refusals import BY_CODE

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MARK = "tokenlimits: "  # the beginning of the comments of our objects

SQL_PAGE = """\
# SQL functions and tables

Call the functions through the API as RPCs (`POST /rest/v1/rpc/…`, `supabase.rpc(…)`), or in SQL. Each answers one JSON
value. Later versions may add fields, and arguments with defaults; they take nothing away. Errors carry a
[SQLSTATE](errors.md#sqlstates).
"""
ERRORS_PAGE = """\
# Errors

All errors are `TokenLimitsError`s. Their messages say what to do next; `code` is the server's SQLSTATE or PostgREST
code, if the server refused. A `Limit` or a `GenerationRequest` that can't be right is pydantic's `ValidationError`,
raised where it is made.

## Classes

| class | meaning | codes |
|---|---|---|"""
RESULTS_PAGE = """\
# Results

This is `benchmarks/RESULTS.md` of the checkout, as `make bench` wrote it. Look at the ratios, not at the times.
"""


class Function(NamedTuple):
    """A public SQL function: its comment, its arguments and its grants."""

    name: str
    arguments: str
    returns: str
    comment: str
    roles: frozenset[str]

    @property
    def who(self) -> str:
        """The readers of its section."""
        if self.roles == {"service_role"}:
            return "workers"
        return "users" if self.roles == {"authenticated"} or self.name == "tokenlimits_version" else "admins"


SECTIONS = {
    "workers": ("For workers", "They take the project's secret key."),
    "admins": ("For admins", "They take the session of an admin, or the secret key."),
    "users": ("For signed-in users", "They take any user's session. `tokenlimits_version` takes the secret key too."),
}


def functions(sql: str) -> Iterator[Function]:
    """Find the public functions."""
    for name, arguments, returns in re.findall(
        r"^create or replace function public\.(\w+)\((.*?)\)\nreturns (.+?)\n", sql, re.MULTILINE | re.DOTALL
    ):
        if returns == "trigger":
            continue
        grants = re.findall(rf"^grant execute on function public\.{name}\([^)]*\)\s+to ([\w, ]+);", sql, re.MULTILINE)
        roles = frozenset(role for granted in grants for role in granted.split(", "))
        yield Function(name, arguments.strip(), returns, comment_on(rf"function public\.{name}\([^)]*\)", sql), roles)


def comment_on(what: str, sql: str) -> str:
    """Read a comment, without our mark; a long one is written as several literals."""
    found = re.search(rf"^comment on {what}\s+is\s+((?:'(?:[^']|'')*'\s*)+);", sql, re.MULTILINE)
    if found is None:
        raise LookupError(f"there is no comment on {what}")
    literals = re.findall(r"'((?:[^']|'')*)'", found[1])
    return "".join(literals).replace("''", "'").removeprefix(MARK)


def sql_page(sql: str) -> str:
    """Write the page of SQL functions and tables."""
    found = sorted(functions(sql))
    lines = [SQL_PAGE]
    for who, (title, note) in SECTIONS.items():
        lines += [f"## {title}", "", note, ""]
        for function in found:
            if function.who == who:
                lines += [
                    f"### {function.name}",
                    "",
                    function.comment,
                    "",
                    "```sql",
                    *signature(function),
                    "```",
                    "",
                ]
    lines += ["## Tables", "", "Row-level security is on for all. Nobody writes the ledger but the functions.", ""]
    for name in re.findall(r"^create table if not exists public\.(\w+)", sql, re.MULTILINE):
        lines += [f"### {name}", "", comment_on(rf"table public\.{name}", sql), "", *columns(name, sql), ""]
    return "\n".join(lines)


def signature(function: Function) -> list[str]:
    """Write the signature of a function, one argument per line."""
    arguments = [argument.strip() for argument in function.arguments.split(",\n")] if function.arguments else []
    if not arguments:
        return [f"{function.name}() returns {function.returns}"]
    return [
        f"{function.name}(",
        *[f"  {each}," for each in arguments[:-1]],
        f"  {arguments[-1]}",
        f") returns {function.returns}",
    ]


def columns(table: str, sql: str) -> list[str]:
    """Write a table of a table's columns."""
    body = re.search(rf"^create table if not exists public\.{table} \(\n(.*?)^\)", sql, re.MULTILINE | re.DOTALL)
    if body is None:
        raise LookupError(f"there is no table {table}")
    rows = ["| column | type | meaning |", "|---|---|---|"]
    for name, type_ in re.findall(r"^  (?!constraint)(\w+) (\w+)", body[1], re.MULTILINE):
        try:
            meaning = comment_on(rf"column public\.{table}\.{name}", sql)
        except LookupError:
            meaning = ""
        rows.append(f"| `{name}` | {type_} | {meaning} |")
    return rows


def command_line_page() -> str:
    """Write the page of commands, by Typer's own tool."""
    command = [sys.executable, "-m", "typer", "tokenlimits.cli._app", "utils", "docs", "--name", "tokenlimits"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"^```console\n\$ ", "```text\n", text, flags=re.MULTILINE)
    # brackets in a help text aren't links
    text = re.sub(
        r"^(?![*`]|tokenlimits ).*\]\[.*$", lambda line: line[0].replace("[", r"\["), text, flags=re.MULTILINE
    )
    return text.replace("# `tokenlimits`\n", "# Command line reference\n", 1)


def errors_page(schema: str) -> str:
    """Write the page of errors: classes from their docstrings, SQLSTATEs from the list in the schema."""
    lines = [ERRORS_PAGE]
    for cls in sorted(subclasses(errors.TokenLimitsError), key=lambda cls: cls.__name__):
        codes = ", ".join(f"`{code}`" for code, of in BY_CODE.items() if of is cls)
        meaning = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        lines.append(f"| [`{cls.__name__}`][tokenlimits.errors.{cls.__name__}] | {meaning} | {codes} |")
    lines += [
        "",
        "## SQLSTATEs",
        "",
        "PostgREST passes them on as `code`, with status 400.",
        "",
        "| SQLSTATE | meaning |",
        "|---|---|",
    ]
    for code, meaning in re.findall(r"^--   (TL\d{3}|42501)  (.+)$", schema, re.MULTILINE):
        if "caught internally" not in meaning:
            lines.append(f"| `{code}` | {meaning} |")
    return "\n".join([*lines, ""])


def subclasses(cls: type) -> set[type]:
    """Find a class and all its subclasses in its module."""
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__() if each.__module__ == cls.__module__))


def results_page(results: str) -> str:
    """Write the page of results, with links to the benchmarks."""
    _, _, text = results.partition("\n")
    return RESULTS_PAGE + text


def pages() -> dict[Path, str]:
    """Build all pages: the path and the text of each."""
    return {
        DOCS / "reference" / "sql.md": sql_page((ROOT / "sql" / "tokenlimits.sql").read_text()),
        DOCS / "reference" / "command-line.md": command_line_page(),
        DOCS / "reference" / "errors.md": errors_page((ROOT / "sql" / "schema" / "10_schema.sql").read_text()),
        DOCS / "design" / "results.md": results_page((ROOT / "benchmarks" / "RESULTS.md").read_text()),
    }


def main() -> None:
    """Write the pages that have changed."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()
