"""Databases with a clock that can be turned, on each PostgreSQL at hand; nothing may have drifted after a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.support import clock, invariants
from tests.support.postgres import PostgresServer, create_hosted_database

TEMPLATE = "semantics"


class Database:
    """A database with tokenlimits and a clock to turn."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self._server = server
        self._connections: list[psycopg.Connection[Any]] = []
        self.name = name
        self.owner = self.connect()

    def connect(self, role: str | None = None) -> psycopg.Connection[Any]:
        connection = self._server.connect(self.name, "postgres")
        self._connections.append(connection)
        if role is not None:
            connection.execute(f"set role {role}")
        return connection

    def url(self) -> str:
        return self._server.url(self.name, "postgres")

    def drop(self) -> None:
        for connection in self._connections:
            connection.close()
        self._server.drop_database(self.name)


@pytest.fixture(scope="session")
def databases(postgres_server: PostgresServer, install_sql: str) -> Callable[[], Database]:
    """Make databases of their own, with tokenlimits and a clock to turn."""
    numbers = count(1)
    create_hosted_database(postgres_server, TEMPLATE)
    with postgres_server.connect(TEMPLATE, "postgres") as owner:
        owner.execute(install_sql)  # pyright: ignore[reportArgumentType, reportCallIssue]
        clock.install(owner)

    def make() -> Database:
        name = f"{TEMPLATE}_{next(numbers)}"
        postgres_server.create_database(name, TEMPLATE)
        return Database(postgres_server, name)

    return make


@pytest.fixture
def database(databases: Callable[[], Database]) -> Iterator[Database]:
    """A database of the test's own, checked afterwards."""
    made = databases()
    try:
        yield made
        assert invariants.drift(made.owner) == []
    finally:
        made.drop()


@pytest.fixture
def api(database: Database) -> Api:
    """The functions, called by the service key."""
    return Api(database.connect("service_role"))


@pytest.fixture(scope="session")
def zones(postgres_server: PostgresServer) -> Callable[[str], ZoneInfo]:
    """Python's view of the time zones, by the same rules as the server: PostgreSQL may bring its own."""
    return _zones(postgres_server)


def _zones(server: PostgresServer) -> Callable[[str], ZoneInfo]:
    own = server._bin.parent / "share" / "timezone"
    made: dict[str, ZoneInfo] = {}

    def zone(name: str) -> ZoneInfo:
        if not own.is_dir():
            return ZoneInfo(name)
        if name not in made:
            with (own / name).open("rb") as file:
                made[name] = ZoneInfo.from_file(file, name)
        return made[name]

    return zone
