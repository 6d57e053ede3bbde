"""Supabase's own command line and ours agree on what is there; every version is clean, and can be upgraded."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest
from psycopg.types.json import Jsonb
from tests.sql.api import GROUP_ID, USER_ID, seed
from tests.support.invariants import drift
from tests.support.node import supabase
from tests.support.postgres import servers

from tokenlimits.sql_files import migrations, one_paste

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.postgres import PostgresServer

    from .conftest import Newer, Program

MIGRATIONS: Final = migrations()
NAMES: Final = [migration.name for migration in MIGRATIONS]
HOMES: Final = pytest.mark.parametrize("home", ["public", pytest.param("limits", marks=pytest.mark.full)])


def remote(url: str) -> str:
    return f"--remote={url}?sslmode=disable"


def push(directory: Path, url: str) -> str:
    """Push what isn't there yet; return what it says of that."""
    done = supabase(directory, "db", "push", remote(url), "--yes")
    assert complaints(done.stdout + done.stderr) == []
    return done.stdout + done.stderr


def complaints(said: str) -> list[str]:
    return [line for line in said.splitlines() if "WARN" in line or "ERROR" in line]


def difference(directory: Path, before: str, after: str) -> str:
    """The SQL that would make a database like another; nothing where they are equal. It needs no Docker so."""
    ends = ("--from", f"{before}?sslmode=disable", "--to", f"{after}?sslmode=disable")
    return supabase(directory, "db", "diff", "--strict-coverage", *ends).stdout.strip()


def make_project(directory: Path) -> None:
    directory.joinpath("supabase").mkdir()
    directory.joinpath("supabase", "config.toml").write_text('project_id = "here"\n')


def use(url: str, home: str) -> None:
    """One user has used 3 of the 10 of their group."""
    with psycopg.connect(url, autocommit=True) as connection:
        statements = f"""
            insert into auth.users (id, email) values ('{USER_ID}', 'user@example.com');
            insert into {home}.user_groups (id, name) values ('{GROUP_ID}', 'Pro');
            insert into {home}.group_limits (group_id, kind, period, scope, max)
            values ('{GROUP_ID}', 'image', 'month', 'group', 10);
            insert into {home}.group_memberships (group_id, user_id) values ('{GROUP_ID}', '{USER_ID}');
            select {home}.track_generation('{USER_ID}', 'image', 3);
        """
        connection.execute(statements.encode())


def ask(url: str, expression: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(f"select {expression}".encode()).fetchone()
    assert row is not None
    return row[0]


@HOMES
def test_what_init_writes_is_pushed_and_ours_agrees(nowhere: Program, hosted: str, home: str) -> None:
    nowhere("init", "--schema", home)
    push(nowhere.directory, hosted)
    assert "Nothing is pending" in nowhere("migrate", "--check", "--schema", home, "--db-url", hosted).stdout
    assert ask(hosted, f"{home}.tokenlimits_version() ->> 'version'") == "1"


@pytest.mark.slow
@HOMES
def test_what_migrate_applied_is_as_if_it_had_been_pushed(
    nowhere: Program, new_hosted: Callable[[], str], home: str
) -> None:
    migrated, pushed = new_hosted(), new_hosted()
    make_project(nowhere.directory)
    nowhere("migrate", "--schema", home, "--db-url", migrated)
    assert "up to date" in push(nowhere.directory, migrated)
    assert "Applying migration" in push(nowhere.directory, pushed)
    assert f"{home}.track_generation" in difference(nowhere.directory, new_hosted(), migrated).replace('"', "")
    assert difference(nowhere.directory, pushed, migrated) == ""


@pytest.mark.slow
def test_what_migrate_applied_elsewhere_needs_its_files(nowhere: Program, hosted: str) -> None:
    assert "tokenlimits init" in nowhere("migrate", "--db-url", hosted).stderr
    make_project(nowhere.directory)
    refused = supabase(nowhere.directory, "db", "push", remote(hosted), "--yes", status=1)
    assert "Remote migration versions not found in local migrations directory" in refused.stderr
    nowhere("init")
    assert "up to date" in push(nowhere.directory, hosted)


@pytest.mark.slow
@HOMES
def test_a_reset_makes_it_again(nowhere: Program, new_hosted: Callable[[], str], home: str) -> None:
    used, fresh = new_hosted(), new_hosted()
    make_project(nowhere.directory)
    for url in (used, fresh):
        nowhere("migrate", "--schema", home, "--db-url", url)
    use(used, home)
    said = supabase(nowhere.directory, "db", "reset", "--no-seed", remote(used), "--yes").stderr
    assert complaints(said) == []
    assert ask(used, f"count(*) from {home}.user_groups") == 0
    assert difference(nowhere.directory, fresh, used) == ""
    assert nowhere("migrate", "--schema", home, "--db-url", used).stdout == "Nothing is pending.\n"
    assert "up to date" in push(nowhere.directory, used)
    use(used, home)


@pytest.mark.slow
@HOMES
def test_a_dump_restores_the_same(
    nowhere: Program, server: PostgresServer, new_hosted: Callable[[], str], home: str
) -> None:
    """By the script that `supabase db dump` would run in a container."""
    dumped, restored = new_hosted(), new_hosted()
    name = restored.rpartition("/")[2]
    with server.connect() as connection:  # as on the platform: whose the schema public is, too
        connection.execute(f"alter database {name} owner to postgres".encode())
    nowhere("migrate", "--schema", home, "--db-url", dumped)
    use(dumped, home)
    # triggers are off while data are restored, which takes a superuser here
    for options, url in (([], restored), (["--data-only"], server.url(name))):
        script = supabase(nowhere.directory, "db", "dump", "--dry-run", *options, remote(dumped)).stdout
        restore(run_program("bash", "-c", script), url)
        assert difference(nowhere.directory, dumped, restored) == ""
    usage = f"{home}.user_generation_usage('{USER_ID}')"
    assert ask(restored, usage) == ask(dumped, usage)
    assert not ask(restored, f"{home}.track_generation('{USER_ID}', 'image', 8) -> 'allowed'")
    assert ask(restored, f"{home}.track_generation('{USER_ID}', 'image', 7) -> 'allowed'")
    # what the history of the new database doesn't have
    assert "applied" in nowhere("migrate", "--schema", home, "--db-url", restored).stdout
    nowhere("migrate", "--reapply", "--schema", home, "--db-url", restored)
    assert difference(nowhere.directory, dumped, restored) == ""


# what pg_dump says of every table that refers to itself; Supabase's dumps restore data past triggers
GROUPS_NEST = """\
pg_dump: warning: there are circular foreign-key constraints on this table:
pg_dump: detail: user_groups
pg_dump: hint: You might not be able to restore the dump without using --disable-triggers or temporarily dropping the \
constraints.
pg_dump: hint: Consider using a full dump instead of a --data-only dump to avoid this problem.
"""


def restore(dump: str, url: str) -> None:
    run_program("psql", url, "--quiet", "--set=ON_ERROR_STOP=1", "--file=-", stdin=dump)


def run_program(*command: str, stdin: str = "") -> str:
    """Run one of PostgreSQL's programs, or a script that does, which must have nothing to complain of."""
    path = f"{servers()['18']}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, check=False, input=stdin, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert (done.returncode, done.stderr.replace(GROUPS_NEST, "")) == (0, "")
    return done.stdout


def apply(url: str, count: int) -> None:
    """Apply the first migrations, as `supabase db push` did when there were no more."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create schema supabase_migrations")
        connection.execute("create table supabase_migrations.schema_migrations (version text primary key)")
        for migration in MIGRATIONS[:count]:
            connection.execute(migration.text.encode())
            version = migration.name.partition("_")[0]
            connection.execute("insert into supabase_migrations.schema_migrations values (%s)", [version])


@pytest.mark.parametrize("count", range(1, len(NAMES) + 1), ids=lambda count: NAMES[count - 1])
def test_supabases_advisors_are_silent_after_every_version(nowhere: Program, hosted: str, count: int) -> None:
    apply(hosted, count)
    answer = supabase(
        nowhere.directory,
        *("db", "advisors", remote(hosted)),
        *("--level=info", "--fail-on=none", "--output-format=json"),
    ).stdout
    found: list[Any] = json.JSONDecoder().raw_decode(answer[answer.index("{") :])[0]["results"]
    # nothing has used an index yet
    assert [each for each in found if each["name"] != "unused_index"] == []


@pytest.mark.parametrize("count", range(1, len(NAMES) + 1), ids=lambda count: NAMES[count - 1])
def test_every_version_is_upgraded_with_its_data(newer: Newer, hosted: str, count: int) -> None:
    """By what it lacks, and by the one paste of today."""
    apply(hosted, count)
    with psycopg.connect(hosted, autocommit=True) as connection:
        seed(connection)
        connection.execute("select public.track_generation(%s, 'image', 1)", [USER_ID])
        before = state(connection)
    done = newer("migrate", "--db-url", hosted)
    assert done.stdout.splitlines() == [f"applied  {name}" for name in [*NAMES[count:], newer.MIGRATION]]
    with psycopg.connect(hosted, autocommit=True) as connection:
        connection.execute(one_paste().encode())
        assert state(connection) == before
        assert drift(connection) == []
        connection.execute(
            "select public.track_generations(%s)", [Jsonb([{"user_id": USER_ID, "kind": "image", "cost": 1}])]
        )
        assert drift(connection) == []
        assert connection.execute("select public.usage_drift(%s)", [GROUP_ID]).fetchone() == (
            {"counters": [], "rollup": [], "holds": 0},
        )


def state(connection: psycopg.Connection[tuple[Any, ...]]) -> list[object]:
    """The data of an installation, as its functions show it."""
    queries = ("group_usage()", "generation_history()", "find_groups()", f"user_generation_usage('{USER_ID}')")
    tables = ("public.generation_usage", "public.group_memberships", "tokenlimits.counters", "tokenlimits.holds")
    shown: list[object] = [connection.execute(f"select public.{query}".encode()).fetchall() for query in queries]
    shown += [
        connection.execute(f"select to_jsonb(t) from {table} as t order by to_jsonb(t)::text".encode()).fetchall()
        for table in tables
    ]
    return shown
