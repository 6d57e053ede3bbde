"""`sql` and `init`: the SQL as text, and as migrations of a Supabase project."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokenlimits.sql_files import SqlFile, migrations, one_paste, uninstall

from ._options import Schema, find_schema
from ._terminal import note, say

MIGRATIONS = Path("supabase", "migrations")
"""Where Supabase's own command line looks for them."""


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
        Path, typer.Option("--dir", help="Where your project's migrations are.", file_okay=False)
    ] = MIGRATIONS,
    schema: Schema = None,
) -> None:
    """Copy the missing migrations into your project.

    They go into supabase/migrations, where `supabase db push` finds them.
    """
    ours = migrations(find_schema(schema))
    earlier = set(_present(directory))
    for migration in ours:
        state, path = copy(migration, directory)
        say(f"{state:<7}  {path}", style="yellow" if state == "differs" else "")
        if state == "differs":
            warn_of_difference(path)
    _explain_order(earlier, {version_of(migration.name) for migration in ours})


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


def warn_of_difference(path: Path) -> None:
    """Say that a file is not what this package would write."""
    note(
        f"{path} is not the migration of this package and schema; it was left alone. Move it away to have it written.",
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
