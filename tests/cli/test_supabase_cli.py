"""Supabase's own command line and ours agree on what is applied; every version is clean, and can be upgraded."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest
from psycopg.types.json import Jsonb
from tests.sql.api import GROUP_ID, USER_ID, seed
from tests.sql.test_lints import SUPABASE_CLI
from tests.support.invariants import drift

from tokenlimits.local._node import find_node
from tokenlimits.sql_files import migrations, one_paste

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Newer, Program

MIGRATIONS: Final = migrations()
NAMES: Final = [migration.name for migration in MIGRATIONS]


def supabase(directory: Path, *arguments: str) -> str:
    npm = find_node()
    done = subprocess.run(
        [*npm.npm, "exec", "--yes", "--prefer-offline", f"--package={SUPABASE_CLI}", "--", "supabase", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
        env={
            **os.environ,
            "PATH": f"{npm.executable.parent}{os.pathsep}{os.environ['PATH']}",
            "SUPABASE_HOME": str(directory),
            "SUPABASE_NO_UPDATE_NOTIFIER": "1",
            "SUPABASE_TELEMETRY_DISABLED": "1",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def push(directory: Path, url: str, *options: str) -> str:
    return supabase(directory, "db", "push", f"--remote={url}?sslmode=disable", "--yes", *options)


def test_what_init_writes_is_pushed_and_ours_agrees(nowhere: Program, hosted: str) -> None:
    nowhere("init")
    push(nowhere.directory, hosted)
    assert "Nothing is pending" in nowhere("migrate", "--check", "--db-url", hosted).stdout
    with psycopg.connect(hosted) as connection:
        assert connection.execute("select public.tokenlimits_version() ->> 'version'").fetchone() == ("1",)


def test_what_migrate_applied_is_not_pushed_again(nowhere: Program, hosted: str) -> None:
    nowhere("init")
    nowhere("migrate", "--db-url", hosted)
    pushed = push(nowhere.directory, hosted, "--dry-run")
    assert not any(name in pushed for name in NAMES), pushed
    assert "up to date" in pushed.lower()


def apply(url: str, count: int) -> None:
    """Apply the first migrations, as `supabase db push` did when there were no more."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create schema supabase_migrations")
        connection.execute("create table supabase_migrations.schema_migrations (version text primary key)")
        for migration in MIGRATIONS[:count]:
            connection.execute(migration.read_bytes())
            version = migration.name.partition("_")[0]
            connection.execute("insert into supabase_migrations.schema_migrations values (%s)", [version])


@pytest.mark.parametrize("count", range(1, len(NAMES) + 1), ids=lambda count: NAMES[count - 1])
def test_supabases_advisors_are_silent_after_every_version(nowhere: Program, hosted: str, count: int) -> None:
    apply(hosted, count)
    answer = supabase(
        nowhere.directory,
        *("db", "advisors", f"--remote={hosted}?sslmode=disable"),
        *("--level=info", "--fail-on=none", "--output-format=json"),
    )
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
            {"counters": [], "rollup": []},
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
