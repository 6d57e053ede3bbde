"""`migrate`: apply the migrations over a connection to PostgreSQL, as `supabase db push` would."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from typing import Annotated

import typer
from psycopg import errors

from tokenlimits.sql_files import migrations

from ._database import Connection, connect
from ._options import AsJson, DatabaseUrl
from ._terminal import Problem, print_json, say

# as the Supabase CLI makes it
_HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text not null primary key);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
"""
# 'tokm' in ASCII: two of us at once would apply everything twice
_LOCK = "select pg_advisory_xact_lock(1953459053)"
_RECORD = "insert into supabase_migrations.schema_migrations (version, name, statements) values (%s, %s, %s)"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("migrate")(migrate)


def migrate(
    *,
    db_url: DatabaseUrl = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; the exit status is 1 when something is pending.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Apply the pending migrations.

    Each in a transaction of its own. They are recorded in Supabase's own history, so `supabase db push` agrees. What
    the SQL editor has applied is not in it, and is applied again, without harm.
    """
    with connect(db_url) as connection:
        todo = pending(connection)
        for migration in todo:
            if not check:
                _apply(connection, migration)
            if not as_json:
                say(f"{'pending' if check else 'applied'}  {migration.name}")
    if as_json:
        print_json({"pending" if check else "applied": [migration.name for migration in todo]})
    elif not todo:
        say("Nothing is pending.", style="green")
    if todo and check:
        raise typer.Exit(1)


def pending(connection: Connection) -> list[Traversable]:
    """List the migrations that are not in the database's history."""
    applied = _applied(connection)
    return [migration for migration in migrations() if _version(migration) not in applied]


def _version(migration: Traversable) -> str:
    return migration.name.partition("_")[0]


def _applied(connection: Connection) -> set[object]:
    if connection.execute("select to_regclass('supabase_migrations.schema_migrations')").fetchone() == (None,):
        return set()
    return {version for (version,) in connection.execute("select version from supabase_migrations.schema_migrations")}


def _apply(connection: Connection, migration: Traversable) -> None:
    text = migration.read_bytes()
    try:
        with connection.transaction():
            # who waits for a lock on a table in use makes everybody else wait behind it
            connection.execute("set local lock_timeout = '10s'")
            connection.execute(_LOCK)
            connection.execute(_HISTORY)
            if _version(migration) not in _applied(connection):
                connection.execute(text)
                name = migration.name.removesuffix(".sql").partition("_")[2]
                connection.execute(_RECORD, [_version(migration), name, [text.decode()]])
    except errors.LockNotAvailable:
        name = migration.name
        raise Problem(f"{name} waited 10 s for a lock, and was taken back. Try again at a quieter time.") from None
