"""`sql` and `init`: the SQL as text, and as migrations of a Supabase project."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokenlimits.sql_files import SqlFile, migrations, one_paste, uninstall

from ._options import Schema, find_schema
from ._terminal import Problem, note, say

MIGRATIONS = Path("supabase", "migrations")
"""Where Supabase's own command line looks for them, in the project's directory."""

_CONFIGS = ("toml", "json")
_HEADER = "-- tokenlimits:"
_OF_SCHEMA = re.compile(r'^create or replace function "?(?!tokenlimits\b)(\w+)"?\.\w+\(', re.MULTILINE)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("sql")(sql)
    app.command("init")(init)


def sql(
    *,
    schema: Schema = None,
    uninstalling: Annotated[
        bool, typer.Option("--uninstall", help="Print what removes it, in whichever schema it is; the ledger stays.")
    ] = False,
) -> None:
    """Print the SQL.

    Paste it into Supabase's SQL editor, or pipe it into psql. It can be applied again without harm.
    """
    sys.stdout.write(uninstall() if uninstalling else one_paste(find_schema(schema)))
    sys.stdout.flush()


def init(
    *,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Where your project's migrations are. Without it, supabase/migrations of the project that you are in, "
            "or here.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    schema: Schema = None,
) -> None:
    """Copy the missing migrations into your project.

    They go into supabase/migrations, where `supabase db push` finds them.
    """
    where = find_schema(schema)
    ours = migrations(where)
    folder = directory or find_migrations() or MIGRATIONS
    compare(folder, where)
    earlier = set(_present(folder))
    for migration in ours:
        state, path = copy(migration, folder)
        say(f"{state:<7}  {path}", style="yellow" if state == "differs" else "")
    _explain_order(earlier, {version_of(migration.name) for migration in ours})


def find_migrations() -> Path | None:
    """Find where the migrations of the project go that we are in, here or above; None where there is no project."""
    here = Path.cwd()
    above = list(_within_repository(here))
    # as Supabase's command line does, which takes the directory of a configuration however far above it is
    configured = (each for each in above if any((each / "supabase" / f"config.{kind}").is_file() for kind in _CONFIGS))
    used = (each for each in above if (each / MIGRATIONS).is_dir())
    project = next(configured, None) or next(used, None)
    return None if project is None else Path(os.path.relpath(project / MIGRATIONS, here))


def _within_repository(here: Path) -> Iterator[Path]:
    for each in (here, *here.parents):
        yield each
        if (each / ".git").exists():
            return


def compare(folder: Path, schema: str) -> None:
    """Look at the files of our migrations that are there already.

    Raises:
        Problem: One is for another schema.
    """
    present = _present(folder)
    for migration in migrations(schema):
        path = present.get(version_of(migration.name))
        if path is None or path.read_bytes() == migration.text.encode():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        other = _OF_SCHEMA.search(text) if text.startswith(_HEADER) else None
        if other and other[1] != schema:
            raise Problem(f"{path} is for schema {other[1]}; pass --schema {other[1]}. Nothing was changed.")
        _warn_of_difference(path)


def copy(migration: SqlFile, directory: Path) -> tuple[Literal["new", "present", "differs"], Path]:
    """Write a migration into a directory, unless there is one of its version; return what was found, and the file."""
    content = migration.text.encode()
    found = _present(directory).get(version_of(migration.name))
    if found is not None:
        return "present" if found.read_bytes() == content else "differs", found
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / migration.name
    path.write_bytes(content)
    return "new", path


def _warn_of_difference(path: Path) -> None:
    """Say that a file is not what this package would write."""
    note(
        f"{path} is not the migration of this package; it is left alone. Move it away to have it written.",
        style="yellow",
    )


def version_of(name: str) -> str:
    """Read the version of a migration, as Supabase's history has it, from the name of its file."""
    digits = re.match(r"\d+", name)
    return digits[0] if digits else name


def _present(directory: Path) -> dict[str, Path]:
    return {version_of(path.name): path for path in directory.glob("*.sql")}


def _explain_order(earlier: set[str], ours: set[str]) -> None:
    new = ours - earlier
    if not new:
        return
    younger = any(version > min(new) for version in earlier - ours)
    command = "supabase db push --include-all" if younger else "supabase db push"
    note(
        ("Some of your migrations are younger than these. " if younger else "")
        + f"Apply them with: {command} (from its version 3 on, with --remote for a hosted project)"
    )
