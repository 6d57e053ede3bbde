"""`migrate`: apply the migrations over a connection to PostgreSQL, as `supabase db push` would."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from psycopg import errors

from tokenlimits.sql_files import SqlFile, migrations, one_paste, without_transaction

from ._database import Connection, connect, refusal
from ._options import AsJson, DatabaseUrl, Schema, find_schema, schema_option
from ._setup import compare, copy, find_migrations, version_of
from ._terminal import Misunderstood, Problem, note, print_json, say

# as the Supabase CLI creates it
_HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text not null primary key);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
"""
# 'tokm' in ASCII; without the lock, two runs at once would both apply everything
_LOCK = "select pg_advisory_xact_lock(1953459053)"
_RECORD = "insert into supabase_migrations.schema_migrations (version, name, statements) values (%s, %s, %s)"
_INSTALLED = """
select n.nspname
from pg_catalog.pg_proc as p
inner join pg_catalog.pg_namespace as n on n.oid = p.pronamespace
where
  p.proname = 'tokenlimits_version' and n.nspname <> 'tokenlimits'
  -- a project may have a function of that name; ours says so in its comment
  and pg_catalog.obj_description(p.oid, 'pg_proc') like 'tokenlimits:%'
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("migrate")(migrate)


def migrate(
    *,
    db_url: DatabaseUrl = None,
    schema: Schema = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="The directory of your project's migrations. Default: supabase/migrations of the current project.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a migration is pending.")
    ] = False,
    reapply: Annotated[
        bool,
        typer.Option(
            "--reapply",
            help="Apply everything again in one transaction, keeping all data. Restores row-level security, triggers "
            "and grants that were lost or changed.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Apply the pending migrations.

    Each migration runs in its own transaction. It is recorded in Supabase's own history and copied into your project's
    supabase/migrations, so that `supabase db push` agrees. SQL that was applied in the SQL editor is not in the
    history; applying it again does no harm.
    """
    if check and reapply:
        raise Misunderstood("--check and --reapply exclude each other; pass one of them.")
    where = find_schema(schema)
    with connect(db_url) as connection:
        todo = pending(connection, where)
        folder = directory or find_migrations()
        _require_installed(connection, where, recorded=len(todo) < len(migrations(where)), reapply=reapply)
        if folder is not None:
            compare(folder, where)
        states = ["pending"] if check else ["applied", "reapplied"] if reapply else ["applied"]
        done: dict[str, list[str]] = {state: [] for state in states}
        for state, migration in _steps(connection, where, todo, folder, check=check, reapply=reapply):
            done[state].append(migration.name)
            if not as_json:
                say(f"{state}  {migration.name}")
    if as_json:
        print_json(done)
    elif not any(done.values()):
        say("Nothing is pending.", style="green")
    if todo and check:
        raise typer.Exit(1)


def pending(connection: Connection, schema: str = "public") -> list[SqlFile]:
    """List the migrations that are not in the database's history."""
    applied = _applied(connection)
    return [migration for migration in migrations(schema) if version_of(migration.name) not in applied]


def _applied(connection: Connection) -> set[object]:
    if connection.execute("select to_regclass('supabase_migrations.schema_migrations')").fetchone() == (None,):
        return set()
    return {version for (version,) in connection.execute("select version from supabase_migrations.schema_migrations")}


def _require_installed(connection: Connection, schema: str, *, recorded: bool, reapply: bool) -> None:
    """Compare with what is installed: the history records neither schemas nor an uninstallation."""
    found = sorted(str(name) for (name,) in connection.execute(_INSTALLED))
    if found and schema not in found:
        raise Problem(
            f"tokenlimits is installed in schema {', '.join(found)}, not in {schema}. "
            f"Pass --schema {found[0]} (or set TOKENLIMITS_SCHEMA), or uninstall it first: tokenlimits sql --uninstall"
        )
    if recorded and not found and not reapply:
        raise Problem(
            "The history has migrations of tokenlimits, but it is not installed. It may have been uninstalled, or "
            "restored from a dump without comments. Apply the migrations again: tokenlimits migrate --reapply"
        )


def _steps(
    connection: Connection,
    schema: str,
    todo: list[SqlFile],
    folder: Path | None,
    *,
    check: bool,
    reapply: bool,
) -> Iterator[tuple[str, SqlFile]]:
    if check:
        yield from (("pending", migration) for migration in todo)
        return
    if folder is None and (todo or reapply):
        _explain_files(schema)
    if reapply:
        yield from _reapply(connection, schema, folder)
        return
    for migration in migrations(schema):
        if migration not in todo:
            _keep(migration, folder)
        else:
            with _transaction(connection, migration.name):
                _apply(connection, migration, folder)
            yield "applied", migration


def _reapply(connection: Connection, schema: str, folder: Path | None) -> Iterator[tuple[str, SqlFile]]:
    """Apply the single file, which upgrades from any version, and then the migrations that the history lacks."""
    with _transaction(connection, "the SQL"):
        lacking = pending(connection, schema)
        _execute(connection, one_paste(schema))
        for migration in migrations(schema):
            _apply(connection, migration, folder)
    for migration in migrations(schema):
        yield "applied" if migration in lacking else "reapplied", migration


@contextmanager
def _transaction(connection: Connection, what: str) -> Generator[None]:
    try:
        with connection.transaction():
            # while this waits for a lock on a table in use, every later query on the table queues behind it
            connection.execute("set local lock_timeout = '10s'")
            connection.execute(_LOCK)
            connection.execute(_HISTORY)
            yield
    except errors.LockNotAvailable:
        problem = (
            f"Timed out after waiting 10 s for a lock; nothing of {what} was applied. Try again at a quieter time."
        )
    except psycopg.Error as error:
        if error.sqlstate is None:  # the connection is lost, so whether the commit went through is unknown
            raise
        # the messages of our own SQL say so themselves
        kept = "" if error.sqlstate.startswith("TL") else f" Nothing of {what} was applied."
        problem = f"{refusal(error)}{kept}"
    else:
        return
    raise Problem(problem)


def _apply(connection: Connection, migration: SqlFile, folder: Path | None) -> None:
    """Apply and record a migration unless the history has it; write its file before the transaction commits."""
    version = version_of(migration.name)
    if version not in _applied(connection):
        _execute(connection, migration.text)
        name = migration.name.removesuffix(".sql").partition("_")[2]
        connection.execute(_RECORD, [version, name, [migration.text]])
    _keep(migration, folder)


def _execute(connection: Connection, sql: str) -> None:
    # its own commit would end the transaction before the history is written
    connection.execute(without_transaction(sql).encode())


def _keep(migration: SqlFile, folder: Path | None) -> None:
    """Write the file; without it, the next `supabase db push` would find an unknown version in the history."""
    if folder is None:
        return
    state, path = copy(migration, folder)
    if state == "new":
        note(f"Wrote {path}: your next `supabase db push` needs it.")


def _explain_files(schema: str) -> None:
    note(
        "There is no Supabase project here. The next `supabase db push` of your project also needs the migrations as "
        f"files; in its directory, run: tokenlimits init{schema_option(schema)}",
        style="yellow",
    )
