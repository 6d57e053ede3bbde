"""Databases with a clock that can be turned, on each PostgreSQL at hand; nothing may have drifted after a test."""

from __future__ import annotations

import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import Crowd, Hammer
from tests.sql.semantics.world import World
from tests.support import clock, invariants
from tests.support.postgres import PostgresServer, create_hosted_database

from tokenlimits.sql_files import one_paste
from tokenlimits.testing import _periods


@pytest.fixture(scope="session")
def databases(postgres_server: PostgresServer, schema: str) -> Callable[[], Database]:
    """Make databases of their own, with tokenlimits and a clock to turn."""
    numbers = count(1)
    template = f"semantics_in_{schema}"
    create_hosted_database(postgres_server, template)
    with postgres_server.connect(template, "postgres") as owner:
        owner.execute(one_paste(schema))  # pyright: ignore[reportArgumentType, reportCallIssue]
        clock.install(owner)

    def make() -> Database:
        name = f"{template}_{next(numbers)}"
        postgres_server.create_database(name, template)
        return Database(postgres_server, name)

    return make


@pytest.fixture(scope="session")
def shared_database(databases: Callable[[], Database]) -> Iterator[Database]:
    made = databases()
    yield made
    made.drop()


@pytest.fixture
def database(shared_database: Database) -> Iterator[Database]:
    """An empty database, in which nothing may have drifted afterwards."""
    shared_database.clean()
    yield shared_database
    shared_database.close_others()
    assert invariants.drift(shared_database.owner) == []


@pytest.fixture
def api(database: Database) -> Api:
    """The functions, called with the service key."""
    return Api(database.connect())


@pytest.fixture
def owner(database: Database) -> Api:
    """The functions and tables, as the owner at the SQL editor."""
    return Api(database.owner)


@pytest.fixture
def world(owner: Api, api: Api) -> World:
    return World(owner, api)


@pytest.fixture(scope="session")
def crowd() -> Iterator[Crowd]:
    with Crowd() as made:
        yield made


@pytest.fixture
def hammer(crowd: Crowd, database: Database) -> Hammer:
    return lambda scripts: crowd.call(database.url, scripts)


@pytest.fixture(scope="module")
def time_zones(postgres_server: PostgresServer) -> Iterator[None]:
    """Let Python know time zones by the same rules as the server: PostgreSQL may bring its own."""
    share = postgres_server._bin.parent / "share"
    own = next(filter(Path.is_dir, (share / "timezone", share / "postgresql" / "timezone")), None)
    path = zoneinfo.TZPATH
    _know_zones(path if own is None else [str(own.resolve())])
    yield
    _know_zones(path)


def _know_zones(path: Sequence[str]) -> None:
    zoneinfo.reset_tzpath(path)
    zoneinfo.ZoneInfo.clear_cache()
    _periods.zone.cache_clear()
    _periods._names.cache_clear()
