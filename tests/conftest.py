"""PostgreSQL servers, and databases on them that have tokenlimits installed.

A test that asks for one of these runs on the newest and the oldest version at hand, some on those between too; none is
skipped for want of one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from tests.support.postgres import PostgresServer, create_hosted_database, servers

from tokenlimits.sql_files import migrations, without_transaction

ROOT = Path(__file__).resolve().parent.parent

DefaultGrants = Literal["old", "new"]
Connect = Callable[[str], psycopg.Connection[tuple[Any, ...]]]
"""Connects to one database as a role of its server."""


ON_ALL_VERSIONS = {"test_contract", "test_dumps", "test_install", "test_neighbours", "test_security"}
"""What runs on those between the newest and the oldest, too; all else would take longer than it tells."""
IN_PUBLIC_ALONE = {"test_model", "test_races"}
"""What takes its time, and is about nothing that a schema's name changes."""


def pytest_configure() -> None:
    """Let Ctrl-C end what tests start: a shell that runs them in the background lets all of them ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On which PostgreSQL, and in which schema, a test runs."""
    newest, *between, oldest = servers()
    module = metafunc.module.__name__.rpartition(".")[2]
    places = [(version, "public") for version in (newest, *(between if module in ON_ALL_VERSIONS else ()), oldest)]
    if "schema" in metafunc.fixturenames and module not in IN_PUBLIC_ALONE:
        places.append((newest, "limits"))
    names = [name for name in ("postgres_server", "schema") if name in metafunc.fixturenames]
    if names:
        metafunc.parametrize(
            names,
            [
                pytest.param(
                    *place[: len(names)],
                    id=f"postgres-{place[0]}" + ("" if place[1] == "public" else f"-in-{place[1]}"),
                    marks=[] if place == places[0] else [pytest.mark.full],
                )
                for place in places
            ],
            indirect=True,
            scope="session",
        )


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    with PostgresServer(servers()[request.param]) as server:
        yield server


@pytest.fixture(scope="session")
def schema(request: pytest.FixtureRequest) -> str:
    """Where tokenlimits has its public part."""
    return request.param


@pytest.fixture(scope="session", params=["old", "new"], ids="{}-grants".format)
def default_grants(request: pytest.FixtureRequest) -> DefaultGrants:
    """Both kinds of hosted project: everything in public is granted to the API's roles, or nothing is."""
    return request.param


@pytest.fixture(scope="session")
def install_sql() -> str:
    """The SQL without its begin and commit, for tests that take back what they do."""
    return "\n".join(without_transaction(migration.text) for migration in migrations())


@pytest.fixture(scope="session")
def new_database(postgres_server: PostgresServer, install_sql: str) -> Callable[..., Connect]:
    """Make a hosted database, with tokenlimits installed or bare; it goes with its server."""
    templates: dict[tuple[DefaultGrants, bool], str] = {}
    numbers = count(1)

    def template(grants: DefaultGrants, installed: bool) -> str:
        name = f"{'installed' if installed else 'bare'}_{grants}"
        create_hosted_database(postgres_server, name, grants)
        if installed:
            with postgres_server.connect(name, "postgres") as connection:
                connection.execute(install_sql)
        return name

    def make(grants: DefaultGrants = "new", installed: bool = True) -> Connect:
        kind = (grants, installed)
        if kind not in templates:
            templates[kind] = template(grants, installed)
        name = f"database_{next(numbers)}"
        postgres_server.create_database(name, templates[kind])
        with postgres_server.connect() as connection:  # a copy doesn't have what was granted on the database
            connection.execute(f"grant all on database {name} to postgres")
        return lambda user: postgres_server.connect(name, user)

    return make
