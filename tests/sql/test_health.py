"""The health check: a real call that leaves nothing, and who holds what it waits for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from tests.sql.api import ACTORS, GROUP_ID, Connection, request_by, seed
from tests.support.postgres import PostgresServer, create_hosted_database, servers

from tokenlimits.sql_files import one_paste

pytestmark = pytest.mark.slow

TABLES = ("public.generation_usage", "tokenlimits.counters", "tokenlimits.usage_rollup", "tokenlimits.holds",
          "public.group_limits", "public.user_groups", "public.group_memberships")  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(servers()["18"]) as server:
        create_hosted_database(server, "app")
        with server.connect("app", "postgres") as owner:
            owner.execute(one_paste().encode())
        with server.connect("app") as superuser:
            seed(superuser)
        yield server


@pytest.fixture
def superuser(server: PostgresServer) -> Iterator[Connection]:
    with server.connect("app") as connection:
        yield connection


@pytest.fixture
def other(server: PostgresServer) -> Iterator[Connection]:
    """A session of the owner's role, which its functions may look at."""
    with server.connect("app", "postgres") as connection:
        yield connection


def health(connection: Connection) -> dict[str, Any]:
    with request_by(connection, ACTORS["service"]):
        (answer,) = connection.execute("select public.tokenlimits_health()").fetchone() or ()
    return answer


def everything(connection: Connection) -> list[Any]:
    return [connection.execute(f"select t::text from {table} as t order by 1".encode()).fetchall() for table in TABLES]


@contextmanager
def kept(connection: Connection, statement: str) -> Iterator[int]:
    """Let a session hold what a statement takes, for longer than a call takes."""
    with connection.transaction(force_rollback=True):
        connection.execute(statement.encode())
        connection.execute("select pg_sleep(1.1)")
        yield connection.info.backend_pid


def test_a_call_is_made_and_leaves_nothing(superuser: Connection) -> None:
    before = everything(superuser)
    found = health(superuser)
    assert found["trial"] == {"outcome": "allowed", "reason": None}
    assert (found["standby"], found["read_only"], found["read_only_by_default"]) == (False, False, False)
    assert found["holders"] == []
    assert 1 <= found["connections"] <= found["most_connections"] <= 1000
    assert found["bytes"] > 1_000_000
    assert everything(superuser) == before


def test_the_call_is_denied_where_nothing_has_room(superuser: Connection) -> None:
    with superuser.transaction(force_rollback=True):
        superuser.execute("delete from public.limit_overrides where true")
        superuser.execute("update public.group_limits set max = 0 where true")
        assert health(superuser)["trial"] == {"outcome": "denied", "reason": "limit_exceeded"}


def test_there_may_be_nobody_to_call(superuser: Connection) -> None:
    with superuser.transaction(force_rollback=True):
        superuser.execute("truncate public.generation_usage, public.group_memberships")
        assert health(superuser)["trial"] == {"outcome": "untried", "reason": None}


@pytest.mark.parametrize(
    "statement",
    [
        "select 'hush', * from tokenlimits.counters for update",
        "lock table public.generation_usage",
        "lock table public.group_memberships in access exclusive mode -- hush",
        f"select pg_advisory_xact_lock(1953459052, hashtext(null)), pg_advisory_xact_lock(1953459052, n) "
        f"from generate_series(0, 255) as n where 'hush' <> '{GROUP_ID}'",
    ],
)
def test_whoever_holds_what_a_call_needs_is_named(superuser: Connection, other: Connection, statement: str) -> None:
    with kept(other, statement) as pid:
        found = health(superuser)
    assert found["trial"] == {
        "outcome": "failed", "code": "55P03", "reason": "canceling statement due to lock timeout",
    }  # fmt: skip
    (holder,) = found["holders"]
    assert (holder["pid"], holder["role"], holder["state"]) == (pid, other.info.user, "idle in transaction")
    assert holder["seconds"] >= 1


def test_of_sessions_of_others_it_is_told_who_they_are(superuser: Connection, server: PostgresServer) -> None:
    with server.connect("app") as stranger:
        role = stranger.info.user
        with kept(stranger, "lock table public.group_limits") as pid:
            found = health(superuser)["holders"]
    assert found == [{"pid": pid, "role": role, "state": None, "seconds": None, "query": None, "blocks": 0}]


def test_of_a_query_nothing_secret_is_told(superuser: Connection, other: Connection) -> None:
    other.execute("begin")
    for statement, told in {
        "lock table tokenlimits.holds; set local a.b = 'hush'": "lock table tokenlimits.holds; set local a.b = …",
        "set local a.b = E'it\\'s hush'": "set local a.b = E…",
        "set local a.b =\n  U&'hush'": "set local a.b = U&…",
        "do $x$ begin perform 'hush'; end $x$": "do …",
        "select 1 /* hush */": "select 1 …",
        "select 1 -- hush": "select 1 …",
        f"select {', '.join(['1'] * 100)}": f"select {', '.join(['1'] * 100)}"[:120],
    }.items():
        other.execute(statement.encode())
        superuser.execute("select pg_sleep(1.1)")
        (holder,) = health(superuser)["holders"]
        assert holder["query"] == told
    other.execute("rollback")


def test_those_in_between_are_named(superuser: Connection, other: Connection, server: PostgresServer) -> None:
    """A reader is harmless, until somebody waits for it whom all others wait for."""
    with (
        kept(other, "select count(*) from public.group_limits") as reader,
        server.connect("app", "postgres") as editor,
    ):
        assert health(superuser)["holders"] == []
        waiter, pipe = editor.info.backend_pid, editor.pgconn
        pipe.send_query(b"lock table public.group_limits; select 1")
        superuser.execute("select pg_sleep(1.2)")
        found = health(superuser)
        editor.cancel()
        while pipe.get_result():
            pass
    assert found["trial"]["code"] == "55P03"
    assert {(each["pid"], each["blocks"]) for each in found["holders"]} == {
        (reader, 1), (waiter, 0),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["transaction_read_only", "default_transaction_read_only"])
def test_a_database_that_takes_no_writes(superuser: Connection, mode: str) -> None:
    superuser.execute("set default_transaction_read_only = on")
    if mode == "default_transaction_read_only":
        superuser.execute("begin read write")
        found = health(superuser)
        assert (found["read_only"], found["trial"]["outcome"]) == (False, "allowed")
        superuser.execute("rollback")
    else:
        found = health(superuser)
        assert (found["read_only"], found["trial"]["code"]) == (True, "25006")
    assert found["read_only_by_default"]


def test_the_diagnosis_waits_no_longer_either(superuser: Connection, other: Connection) -> None:
    with (
        kept(other, "lock table public.user_groups"),
        pytest.raises(psycopg.errors.LockNotAvailable),
        request_by(superuser, ACTORS["service"]),
    ):
        superuser.execute("select public.tokenlimits_diagnosis()")


def test_an_answer_is_json_of_known_facts(superuser: Connection) -> None:
    assert re.fullmatch(r"[\w., :/{}\[\]\"-]*", json.dumps(health(superuser)))
