"""The tests say `public.`; where tokenlimits is installed in another schema, statements say its name instead.

connection = at_home(psycopg.connect(url))
connection.execute("select count(*) from public.user_groups")  # reads limits.user_groups, when that is where it is
"""

from __future__ import annotations

import re
from typing import Any, Self, TypeVar

import psycopg
from psycopg import sql

Connection = TypeVar("Connection", bound=psycopg.Connection[Any])

_HOME = """
select pronamespace::regnamespace::text
from pg_catalog.pg_proc
where proname = 'tokenlimits_version' and pronamespace::regnamespace::text <> 'tokenlimits'
"""


class Elsewhere(psycopg.Cursor[Any]):
    """A cursor that says `limits.` for `public.`, in all statements that the tests send."""

    home = "public"

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        text = query.as_string(self) if isinstance(query, sql.Composable) else query
        return super().execute(re.sub(r"\bpublic\b(?=[.'])", self.home, text), params, **options)


def at_home(connection: Connection) -> Connection:
    """Let it speak of the schema in which the database has tokenlimits."""
    row = connection.execute(_HOME).fetchone()
    assert row is not None
    if row[0] != "public":
        connection.cursor_factory = type("Elsewhere", (Elsewhere,), {"home": row[0]})
    return connection
