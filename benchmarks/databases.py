"""Databases to measure: tokenlimits installed, 1,000 users in one group or in 100, and any amount of history."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import psycopg
from tests.support.postgres import PostgresServer, create_hosted_database

from .run import Sql

USERS = 1_000
GROUPS = 100

LIMITS = """[
    {"kind": "image", "period": "month", "scope": "group", "max": 1000000000000},
    {"kind": "image", "period": "day", "scope": "member", "max": 1000000000000}
]"""
FULL = """[
    {"kind": "image", "period": "month", "scope": "group", "max": 0},
    {"kind": "image", "period": "day", "scope": "member", "max": 1000000000000}
]"""

USER = "('00000000-0000-4000-8000-' || lpad((:user)::text, 12, '0'))::uuid"


def user_id(number: int) -> str:
    """Return the id of the n-th user, from 1."""
    return f"00000000-0000-4000-8000-{number:012d}"


def bucket(at: str) -> str:
    """Return the SQL for the beginning of the rollup bucket that contains a moment."""
    return f"date_bin('15 minutes', {at}, '2000-01-01 00:00:00+00')"


def uuid_v7(at: str = "clock_timestamp()", home: str | None = None) -> str:
    """Return the SQL for a UUIDv7 of a moment; its last four hex digits are those of its home."""
    moment = f"lpad(to_hex((date_part('epoch', {at}) * 1000)::bigint), 12, '0')"
    if home is None:
        return f"({moment} || '7' || substr(gen_random_uuid()::text, 16))::uuid"
    return f"({moment} || '7' || substr(gen_random_uuid()::text, 16, 17) || right({home}::text, 4))::uuid"


@contextmanager
def made(server: PostgresServer, sql: Sql, *names: str) -> Generator[None]:
    """Create databases with users in no group; drop them afterwards, so that they don't disturb later measurements."""
    for name in names:
        make(server, sql, name)
    try:
        yield
    finally:
        for name in names:
            server.drop_database(name)


def make(server: PostgresServer, sql: Sql, name: str) -> None:
    """Create a database with one user per id, in no group."""
    create_hosted_database(server, name)
    with server.connect(name, "postgres") as connection:
        connection.execute(sql.text.encode())
        connection.execute(
            "insert into auth.users (id, email) select "
            "('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid, 'user' || i || '@example.com' "
            "from generate_series(1, %s) as i",
            [USERS],
        )


def one_group(server: PostgresServer, name: str, limits: str) -> None:
    """Put all users into one group with these limits, and open the members' counters."""
    with server.connect(name, "postgres") as connection:
        connection.execute("select public.save_group(p_name => 'all', p_limits => %s)", [limits])
        connection.execute(
            "insert into public.group_memberships (group_id, user_id) "
            "select g.id, u.id from public.user_groups as g cross join auth.users as u"
        )
        connection.execute("select public.track_generation(u.id, 'image') from auth.users as u")


def many_groups(server: PostgresServer, name: str) -> None:
    """Spread the users over the groups, and open all counters."""
    with server.connect(name, "postgres") as connection:
        connection.execute(
            "select public.save_group(p_name => 'group ' || i, p_limits => %s) from generate_series(1, %s) as i",
            [LIMITS, GROUPS],
        )
        connection.execute(
            "insert into public.group_memberships (group_id, user_id) "
            "select g.id, u.id from "
            "(select id, row_number() over (order by id) as n from public.user_groups) as g "
            "inner join (select id, row_number() over (order by id) as n from auth.users) as u "
            "on u.n %% %s = g.n - 1",
            [GROUPS],
        )
        connection.execute("select public.track_generation(u.id, 'image') from auth.users as u")


def add_history(server: PostgresServer, name: str, rows: int) -> None:
    """Fill the ledger with a year of the members' usage, under our own keys, and the rollup with its sums."""
    with server.connect(name, "supabase_admin") as connection:
        connection.execute(
            f"""
            insert into public.generation_usage
              (id, group_id, user_id, kind, cost, status, idempotency_key, created_at, settled_at)
            select
              {uuid_v7("t.at", "m.group_id")}, m.group_id, m.user_id, 'image', 1, 'committed',
              {uuid_v7("t.at")}::text, t.at, t.at
            from (
              select
                i, date_trunc('month', now()) - interval '365 days' + interval '365 days' * (i::float8 / {rows}) as at
              from generate_series(1::bigint, {rows}) as i
            ) as t
            inner join (
              select group_id, user_id, row_number() over (order by user_id) as n from public.group_memberships
            ) as m on m.n = 1 + (t.i * 7919) % {USERS}
            """.encode()  # only our own numbers and expressions
        )
        connection.execute("truncate tokenlimits.usage_rollup")
        connection.execute(
            f"""
            insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
            select group_id, kind, {bucket("created_at")} as bucket, 0, sum(cost), count(*)
            from public.generation_usage
            where status = 'committed'
            group by group_id, kind, bucket
            """.encode()
        )


def settle(server: PostgresServer, *names: str) -> None:
    """Do now what autovacuum and the checkpointer would otherwise do during a measurement."""
    for name in names:
        with psycopg.connect(server.url(name), autocommit=True) as connection:
            connection.execute("vacuum analyze")
            connection.execute("checkpoint")
