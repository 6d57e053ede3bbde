"""Reports: a dashboard of thousands of groups, and an export of a million rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from statistics import median
from time import perf_counter
from typing import Any
from uuid import UUID

import psycopg
from tests.support.postgres import create_hosted_database

from tokenlimits.local import LocalStack

from .databases import bucket, settle, uuid_v7
from .run import Row, Run, judge

GROUPS = 1_000
USERS = 10_000
EXPORTED = 1_000_000
SIZES = (1_000, 4_000, 20_000)
PAGE = 100
MICROSECONDS = 25
ALL = "select json_array_length(public.group_usage())"
A_PAGE = f"select json_array_length(public.group_usage(p_after => 'group 5', p_page_size => {PAGE}))"
LIMITS = """[
    {"kind": "image", "period": "month", "scope": "group", "max": 100000},
    {"kind": "image", "period": "day", "scope": "member", "max": 100},
    {"kind": "video", "period": "lifetime", "scope": "group", "max": 1000}
]"""


def _zone() -> str:
    """Name the time zone whose day is 22 hours old: what is added up is the day so far, so the hour must not matter."""
    ahead = (22 - datetime.now(UTC).hour + 11) % 24 - 11
    return f"Etc/GMT{-ahead:+d}"  # POSIX counts westwards


def _groups_and_members() -> str:
    return f"""
insert into auth.users (id, email) select gen_random_uuid(), 'user' || i || '@example.com'
from generate_series(1, {USERS}) as i;
select public.save_group(p_name => 'group ' || i, p_limits => '{LIMITS}', p_timezone => '{_zone()}')
from generate_series(1, {GROUPS}) as i;
insert into public.group_memberships (group_id, user_id)
select g.id, u.id
from (select id, row_number() over (order by id) as n from public.user_groups) as g
inner join (select id, row_number() over (order by id) as n from auth.users) as u on u.n % {GROUPS} = g.n - 1;
select public.track_generation(id, 'image') from auth.users;
"""


_EXPORT = """
import resource, sys
from tokenlimits.cli import main
status = main(["export", "--output", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(status)
"""


def _history(rows: int) -> str:
    return f"""
    insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
    select g.id, 'image', {bucket(f"now() - interval '365 days' * (i::float8 / {rows})")}, 0, 1, 1
    from generate_series(1, {rows}) as i
    inner join (select id, row_number() over (order by id) as n from public.user_groups) as g
      on g.n = 1 + (i * 7919::bigint) % {GROUPS}
    on conflict do nothing
    """


def _more_groups(since: int, until: int) -> str:
    """Add groups of one member each, with as much of the present day as those of the dashboard have.

    A thousandth of 10 million rows in a year is 27 a day.
    """
    zone = _zone()
    at = f"date_trunc('day', now(), '{zone}') + interval '1 day' * (i / 27.0)"
    return f"""
    with users as (
      insert into auth.users (id, email)
      select gen_random_uuid(), 'user' || i || '@example.com' from generate_series({since}, {until}) as i
      returning id
    ),
    groups as (
      insert into public.user_groups (name, timezone)
      select 'group ' || i, '{zone}' from generate_series({since}, {until}) as i
      returning id
    ),
    limits as (
      insert into public.group_limits (group_id, kind, period, scope, max)
      select g.id, l.kind, l.period, l.scope, l.max
      from groups as g
      cross join jsonb_to_recordset('{LIMITS}') as l (kind text, period text, scope text, max bigint)
    )
    insert into public.group_memberships (group_id, user_id)
    select g.id, u.id
    from (select id, row_number() over (order by id) as n from groups) as g
    inner join (select id, row_number() over (order by id) as n from users) as u on u.n = g.n;
    insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
    select g.id, 'image', {bucket(at)}, 0, 1, 1
    from public.user_groups as g
    cross join generate_series(0, 26) as i
    where {at} < now()
    on conflict do nothing;
    """


def _ledger(group_id: UUID, user_id: UUID) -> str:
    at = "now() - make_interval(secs => i)"
    return f"""
    insert into public.generation_usage (id, group_id, user_id, kind, cost, status, metadata, created_at)
    select {uuid_v7(at, "g.id")}, g.id, '{user_id}', 'image', 1, 'committed', '{{"model": "x"}}', {at}
    from generate_series(1, {EXPORTED}) as i
    cross join (select '{group_id}'::uuid as id) as g
    """


def _execute(connection: psycopg.Connection[Any], sql: str) -> None:
    connection.execute(sql.encode())


def _milliseconds(connection: psycopg.Connection[Any], sql: str, groups: int, times: int) -> float:
    """Time a query several times, after three warm-up runs, and check the number of groups in its answer."""
    taken: list[float] = []
    for _ in range(3 + times):
        started = perf_counter()
        row = connection.execute(sql.encode()).fetchone()
        taken.append((perf_counter() - started) * 1000)
        if row != (groups,):
            raise RuntimeError(f"{sql}: {row}, not {groups}")
    return median(taken[3:])


def dashboard(run: Run) -> Iterator[Row]:
    """Time the usage of all groups, which reads counters and the day's history, never the ledger."""
    server = run.server
    create_hosted_database(server, "dashboard")
    with server.connect("dashboard", "postgres") as connection:
        _execute(connection, run.ours.text)
        _execute(connection, _groups_and_members())
    with server.connect("dashboard") as connection:
        _execute(connection, _history(run.rows))
    settle(server, "dashboard")
    with server.connect("dashboard", "postgres") as connection:
        ours = _milliseconds(connection, ALL, GROUPS, 10 * run.rounds)
    server.drop_database("dashboard")
    what = f"usage of {GROUPS:,} groups with {3 * GROUPS:,} limits in one call, {run.rows:,} rows of history"
    yield judge(f"{what}, against 25 ms", f"{ours:.1f} ms", "25 ms", ours / 25, most=1)


def many_groups(run: Run) -> Iterator[Row]:
    """Time the usage of growing numbers of groups, which takes the same time per group, and of a page of them."""
    server = run.server
    create_hosted_database(server, "groups")
    with server.connect("groups", "postgres") as connection:
        _execute(connection, run.ours.text)
    there = 0
    for size in SIZES:
        with server.connect("groups") as connection:
            _execute(connection, _more_groups(there + 1, size))
        there = size
        settle(server, "groups")
        with server.connect("groups", "postgres") as connection:
            ours = _milliseconds(connection, ALL, size, 3 * run.rounds) * 1000 / size
        what = f"usage of {size:,} groups in one call, each against {MICROSECONDS} µs"
        yield judge(what, f"{ours:.1f} µs", f"{MICROSECONDS} µs", ours / MICROSECONDS, most=1)
    with server.connect("groups", "postgres") as connection:
        ours = _milliseconds(connection, A_PAGE, PAGE, 10 * run.rounds)
    server.drop_database("groups")
    # a page costs as much as its groups, plus a call
    allowed = PAGE * MICROSECONDS / 1000 + 1
    what = f"a page of {PAGE} of {there:,} groups, against {allowed:g} ms"
    yield judge(what, f"{ours:.1f} ms", f"{allowed:g} ms", ours / allowed, most=1)


def export(run: Run) -> Iterator[Row]:
    """Watch the memory of an export of many rows."""
    server = run.server
    server.create_database("export")
    with LocalStack(server.url("export")) as stack, server.connect("export") as connection:
        _execute(connection, "insert into public.user_groups (name) values ('Pro')")
        (user,) = stack.create_users(1)
        group = connection.execute("select id from public.user_groups").fetchone()
        assert group is not None
        _execute(connection, _ledger(group[0], user))
        settle(server, "export")
        started = perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, os.devnull],
            env={**os.environ, **stack.environment(), "no_proxy": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=True,
        )
        rate = EXPORTED / (perf_counter() - started)
    server.drop_database("export")
    ours = int(done.stdout)
    what = f"memory of `tokenlimits export` of {EXPORTED:,} rows ({rate:,.0f} rows/s), against 200 MB"
    yield judge(what, f"{ours} MB", "200 MB", ours / 200, most=1)
