"""`sql` and `init`: the SQL as text, and as migrations of a Supabase project."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokenlimits.sql_files import migrations, one_paste

from ._terminal import note, say


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("sql")(sql)
    app.command("init")(init)


def sql() -> None:
    """Print the SQL.

    Paste it into Supabase's SQL editor, or pipe it into psql. It can be applied again without harm.
    """
    sys.stdout.write(one_paste())
    sys.stdout.flush()


def init(
    directory: Annotated[
        Path, typer.Option("--dir", help="Where your project's migrations are.", file_okay=False)
    ] = Path("supabase/migrations"),
) -> None:
    """Copy the missing migrations into your project.

    They go into supabase/migrations, where `supabase db push` finds them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    present = {_version(path.name): path for path in directory.glob("*.sql")}
    for migration in migrations():
        content = migration.read_bytes()
        found = present.get(_version(migration.name))
        if found is None:
            directory.joinpath(migration.name).write_bytes(content)
            say(f"new      {directory / migration.name}")
        elif found.read_bytes() == content:
            say(f"present  {found}")
        else:
            say(f"differs  {found}", style="yellow")
            note(f"{found} is not the migration of this package; it was left alone.", style="yellow")
    _explain_order(present)


def _version(name: str) -> str:
    digits = re.match(r"\d+", name)
    return digits[0] if digits else name


def _explain_order(present: dict[str, Path]) -> None:
    ours = {_version(migration.name) for migration in migrations()}
    new = ours - present.keys()
    if new and any(version > min(new) for version in present.keys() - ours):
        note("Some of your migrations are younger than these. Apply them with: supabase db push --include-all")
    elif new:
        note("Apply them with: supabase db push")
