"""PostgreSQL servers, and databases on them that have tokenlimits installed.

A test that asks for one of these runs on every version that is at hand; none is skipped for want of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from tests.support.postgres import PostgresServer, create_hosted_database, servers

ROOT = Path(__file__).resolve().parent.parent

DefaultGrants = Literal["old", "new"]
Connect = Callable[[str], psycopg.Connection[tuple[Any, ...]]]
"""Connects to one database as a role of its server."""


@pytest.fixture(scope="session", params=list(servers()), ids="postgres-{}".format)
def postgres_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    with PostgresServer(servers()[request.param]) as server:
        yield server


@pytest.fixture(scope="session", params=["old", "new"], ids="{}-grants".format)
def default_grants(request: pytest.FixtureRequest) -> DefaultGrants:
    """Both kinds of hosted project: everything in public is granted to the API's roles, or nothing is."""
    return request.param


@pytest.fixture(scope="session")
def install_sql() -> str:
    return (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8")


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
