"""Databases to measure: tokenlimits installed, 1,000 users in 100 groups, and as much history as is asked for."""

from __future__ import annotations

from pathlib import Path

import psycopg
from tests.support.postgres import PostgresServer, create_hosted_database

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


def make(server: PostgresServer, name: str) -> None:
    """Make a database with one user per id, in nobody's group."""
    create_hosted_database(server, name)
    sql = Path(__file__).parent.parent / "sql" / "tokenlimits.sql"
    with server.connect(name, "postgres") as connection:
        connection.execute(sql.read_text())
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


def add_history(server: PostgresServer, name: str, rows: int, *, ordered_keys: bool) -> None:
    """Fill the ledger with a year of usage of the members, and the rollup with its sums."""
    key = "tokenlimits.uuid_v7()::text" if ordered_keys else "gen_random_uuid()::text"
    with server.connect(name, "supabase_admin") as connection:
        connection.execute(
            f"""
            insert into public.generation_usage
              (id, group_id, user_id, kind, cost, status, idempotency_key, created_at, settled_at)
            select tokenlimits.uuid_v7(), m.group_id, m.user_id, 'image', 1, 'committed', {key}, t.at, t.at
            from (
              select
                i, date_trunc('month', now()) - interval '365 days' + interval '365 days' * (i::float8 / {rows}) as at
              from generate_series(1::bigint, {rows}) as i
            ) as t
            inner join (
              select group_id, user_id, row_number() over (order by user_id) as n from public.group_memberships
            ) as m on m.n = 1 + (t.i * 7919) % {USERS}
            """  # numbers and expressions of our own
        )
        connection.execute("truncate tokenlimits.usage_rollup")
        connection.execute(
            """
            insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
            select group_id, kind, tokenlimits.rollup_bucket(created_at) as bucket, 0, sum(cost), count(*)
            from public.generation_usage
            group by group_id, kind, bucket
            """
        )


def settle(server: PostgresServer, name: str) -> None:
    """Do what autovacuum and the checkpointer would otherwise do in the middle of a measurement."""
    with psycopg.connect(server.url(name), autocommit=True) as connection:
        connection.execute("vacuum analyze")
        connection.execute("checkpoint")
