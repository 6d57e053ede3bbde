"""A database of a hosted project, for tests to fill and to clean."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import psycopg
from tests.sql.semantics.elsewhere import at_home
from tests.support import clock
from tests.support.postgres import PostgresServer


class Database:
    """A database with tokenlimits and a clock to turn."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self._server = server
        self._connections: list[psycopg.Connection[Any]] = []
        self.name = name
        self.owner = at_home(server.connect(name, "postgres"))
        self.owner.execute("set statement_timeout = '60s'")

    @property
    def url(self) -> str:
        return self._server.url(self.name, "postgres")

    def connect(self, role: str = "service_role") -> psycopg.Connection[Any]:
        """Open another connection, as workers do."""
        connection = at_home(self._server.connect(self.name, "postgres"))
        connection.execute(f"set role {role}")
        connection.execute("set statement_timeout = '60s'")
        self._connections.append(connection)
        return connection

    def clean(self) -> None:
        """Forget all data, and let the clock run, from today's afternoon: no period ends in a test by chance."""
        self.owner.execute(FORGET_EVERYTHING)
        afternoon = clock.real_time(self.owner).astimezone(UTC).replace(hour=15, minute=9, second=26)
        clock.run_from(self.owner, afternoon)

    def close_others(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def drop(self) -> None:
        self.close_others()
        self.owner.close()
        self._server.drop_database(self.name)


FORGET_EVERYTHING = """
delete from public.user_groups;
delete from tokenlimits.group_tree;
delete from auth.users;
delete from public.generation_usage;
delete from tokenlimits.usage_rollup;
delete from tokenlimits.usage_resets;
delete from tokenlimits.counters;
delete from tokenlimits.holds;
"""
