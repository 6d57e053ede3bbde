"""`sql` and `init`: the SQL as text and as migrations of a Supabase project."""

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
"""Where the Supabase CLI looks for them, relative to the project's directory."""

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
        bool, typer.Option("--uninstall", help="Print the SQL that uninstalls it from any schema; the ledger stays.")
    ] = False,
) -> None:
    """Print the SQL.

    Paste it into Supabase's SQL editor or pipe it into psql. Applying it again does no harm.
    """
    sys.stdout.write(uninstall() if uninstalling else one_paste(find_schema(schema)))
    sys.stdout.flush()


def init(
    *,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="The directory of your project's migrations. "
            "Default: supabase/migrations of the current project, or of this directory.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    schema: Schema = None,
) -> None:
    """Copy the missing migrations into your project.

    They go to supabase/migrations, where `supabase db push` finds them.
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
    """Find the migrations directory of the current project, in this directory or above; None without a project."""
    here = Path.cwd()
    above = list(_within_repository(here))
    # like the Supabase CLI, which takes the nearest directory with a configuration, however far up
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
    """Check the files of our migrations that already exist.

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
    """Write a migration to a directory, unless its version exists there; return what was found, and the file."""
    content = migration.text.encode()
    found = _present(directory).get(version_of(migration.name))
    if found is not None:
        return "present" if found.read_bytes() == content else "differs", found
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / migration.name
    path.write_bytes(content)
    return "new", path


def _warn_of_difference(path: Path) -> None:
    """Warn that a file differs from what this package would write."""
    note(
        f"{path} differs from this package's migration and was kept. Move it away to have it written again.",
        style="yellow",
    )


def version_of(name: str) -> str:
    """Return the version of a migration, as in Supabase's history, from its file name."""
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
        ("Some of your migrations are newer than these. " if younger else "")
        + f"Apply them with: {command} (version 3 and later: add --remote for a hosted project)"
    )
