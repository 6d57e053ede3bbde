"""One local stack for all pages; each finds it without groups, and with users of its own."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from tests.docs.pages import ROOT
from tests.support.postgres import PostgresServer, servers

from tokenlimits import GroupManager, Limit
from tokenlimits.local import LocalStack
from tokenlimits.sql_files import one_paste

PROGRAMS = Path(__file__).parent / "programs"


class Docs:
    """The stack, and what a page finds there."""

    def __init__(self, server: PostgresServer, database: str, stack: LocalStack) -> None:
        self.stack = stack
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SUPABASE_", "TOKENLIMITS_"))},
            **stack.environment(),
            "DATABASE_URL": server.url(database),
            "TOKENLIMITS_WEB_SECRET": secrets.token_urlsafe(32),
            "PROJECT": str(ROOT),
            "PATH": os.pathsep.join(
                map(str, [PROGRAMS, Path(sys.executable).parent, next(iter(servers().values())), os.environ["PATH"]])
            ),
            "COLUMNS": "110",
            "no_proxy": "127.0.0.1",
        }

    def rules(self) -> list[str]:
        """Whom the database takes for an admin and for a user, which a project may replace."""
        functions = ("is_admin()", "known_users(uuid[])")
        query = "select pg_get_functiondef(to_regprocedure('tokenlimits.' || $1)) as text"
        return [self.stack.sql(query, function)[0]["text"] for function in functions]

    def restore(self, rules: list[str]) -> None:
        """Undo what a page has shown of rules of its own."""
        if self.rules() == rules:
            return
        with psycopg.connect(self.environment["DATABASE_URL"], autocommit=True) as connection:
            connection.execute("delete from public.user_groups")  # whose members may be users no more
            for rule in rules:
                connection.execute(rule.encode())
            connection.execute(one_paste().encode())

    def begin(self) -> list[str]:
        """Remove all groups and users; make a default group that allows much, and three users. Return their ids."""
        self.stack.sql("delete from public.user_groups")
        self.stack.sql("delete from auth.users")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            with GroupManager.from_env() as groups:
                groups.create(
                    "Everybody",
                    limits=[Limit(kind=kind, max=max_) for kind, max_ in (("image", 100), ("video", 600))],
                    is_default=True,
                )
        ann = self.stack.create_user("ann@example.com")
        return [str(ann.id), *map(str, self.stack.create_users(2, "user"))]


@pytest.fixture(scope="session")
def docs() -> Iterator[Docs]:
    with PostgresServer(next(iter(servers().values()))) as server:
        server.create_database("docs")
        with server.connect("docs") as connection:
            # the page about moving has this table; Lite sees only what is there when it starts
            connection.execute(
                "create table public.generations (id bigint generated always as identity primary key,"
                " user_id uuid not null, kind text not null, created_at timestamptz not null default now())"
            )
        with LocalStack(server.url("docs")) as stack:
            yield Docs(server, "docs", stack)
