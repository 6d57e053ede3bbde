"""On a standby, such as a read replica: what only reads works, and nobody is denied from usage that is out of date."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest
from tests.sql.api import ACTORS, CALLS, OTHER_ID, argument_types, call_sql, request_by, seed
from tests.support.postgres import PostgresServer, create_hosted_database, servers

from tokenlimits.sql_files import one_paste

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.sql.api import Connection

READ_ONLY = "25006"
# neither the group nor the room is known for certain there
BLOCKED = {"p_user_id": OTHER_ID, "p_kind": "image", "p_cost": 1_000_000}
DENIALS = {
    "track_generation": BLOCKED,
    "reserve_generation": BLOCKED,
    "check_generation": BLOCKED,
    "track_generations": {"p_requests": [{"user_id": OTHER_ID, "kind": "image", "cost": 1_000_000}]},
}


@pytest.fixture(scope="module")
def standby() -> Iterator[Connection]:
    with PostgresServer(next(iter(servers().values()))) as server:
        create_hosted_database(server, "app")
        with server.connect("app", "postgres") as owner:
            owner.execute(one_paste())  # pyright: ignore[reportArgumentType, reportCallIssue]
        with server.connect("app") as superuser:
            seed(superuser)
        server.demote()
        with server.connect("app") as connection:
            yield connection


def call(connection: Connection, function: str, arguments: dict[str, object]) -> None:
    actor = ACTORS["user" if function.startswith("my_") else "service"]
    with request_by(connection, actor):
        connection.execute(call_sql(function, argument_types(connection)[function], arguments), [json.dumps(arguments)])  # pyright: ignore[reportArgumentType, reportCallIssue]


def is_stable(connection: Connection, function: str) -> bool:
    [(volatility,)] = connection.execute(
        "select provolatile from pg_proc where proname = %s and pronamespace = 'public'::regnamespace", [function]
    )
    return volatility in ("s", "i")


@pytest.mark.parametrize("function", sorted(CALLS))
def test_reading_works_and_writing_says_why_not(standby: Connection, function: str) -> None:
    # the first calls a project's own is_admin(), the second reports that nothing can be written
    reads = is_stable(standby, function) or function in ("tokenlimits_diagnosis", "tokenlimits_health")
    if reads and function not in DENIALS:
        call(standby, function, CALLS[function])
        return
    with pytest.raises(psycopg.Error) as caught:
        call(standby, function, CALLS[function])
    assert caught.value.sqlstate == READ_ONLY


@pytest.mark.parametrize("function", DENIALS)
def test_nobody_is_denied(standby: Connection, function: str) -> None:
    with pytest.raises(psycopg.Error, match=r"standby.*out of date \(25006\)") as caught:
        call(standby, function, DENIALS[function])
    assert caught.value.sqlstate == READ_ONLY
    assert "primary" in str(caught.value.diag.message_hint)
