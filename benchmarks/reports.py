"""What those who run it wait for: a dashboard of a thousand groups, and an export of a million rows.

`python -m benchmarks.reports` measures these alone, and prints their lines.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import psycopg
from tests.support.postgres import PostgresServer, create_hosted_database, servers

from tokenlimits.local import LocalStack
from tokenlimits.sql_files import one_paste

from .databases import settle
from .in_sql import Row

GROUPS = 1_000
USERS = 10_000
EXPORTED = 1_000_000
LIMITS = """[
    {"kind": "image", "period": "month", "scope": "group", "max": 100000},
    {"kind": "image", "period": "day", "scope": "member", "max": 100},
    {"kind": "video", "period": "lifetime", "scope": "group", "max": 1000}
]"""
_GROUPS_AND_MEMBERS = f"""
insert into auth.users (id, email) select gen_random_uuid(), 'user' || i || '@example.com'
from generate_series(1, {USERS}) as i;
select public.save_group(p_name => 'group ' || i, p_limits => '{LIMITS}') from generate_series(1, {GROUPS}) as i;
insert into public.group_memberships (group_id, user_id)
select g.id, u.id
from (select id, row_number() over (order by id) as n from public.user_groups) as g
inner join (select id, row_number() over (order by id) as n from auth.users) as u on u.n % {GROUPS} = g.n - 1;
select public.track_generation(id, 'image') from auth.users;
"""
_HISTORY = """
insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
select g.id, 'image', tokenlimits.rollup_bucket(now() - interval '365 days' * (i::float8 / {rows})), 0, 1, 1
from generate_series(1, {rows}) as i
inner join (select id, row_number() over (order by id) as n from public.user_groups) as g
  on g.n = 1 + (i * 7919::bigint) % {groups}
on conflict do nothing
"""
_LEDGER = """
insert into public.generation_usage (id, group_id, user_id, kind, cost, status, metadata, created_at)
select tokenlimits.uuid_v7(), '{group}', '{user}', 'image', 1, 'committed', '{{"model": "x"}}',
  now() - make_interval(secs => i)
from generate_series(1, {rows}) as i
"""
_EXPORT = """
import resource, sys
from tokenlimits.cli import main
status = main(["export", "--output", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(status)
"""


def _execute(connection: psycopg.Connection[Any], sql: str) -> None:
    connection.execute(sql.encode())


def dashboard(server: PostgresServer, *, rows: int, rounds: int) -> Iterator[Row]:
    """Time the usage of all groups, of which it reads counters and the day's history, never the ledger."""
    create_hosted_database(server, "dashboard")
    with server.connect("dashboard", "postgres") as connection:
        _execute(connection, one_paste())
        _execute(connection, _GROUPS_AND_MEMBERS)
    with server.connect("dashboard") as connection:
        _execute(connection, _HISTORY.format(rows=rows, groups=GROUPS))
    settle(server, "dashboard")
    with server.connect("dashboard", "postgres") as connection:
        taken = [_milliseconds(connection) for _ in range(3 + 10 * rounds)][3:]
    what = f"usage of {GROUPS:,} groups with {3 * GROUPS:,} limits in one call, {rows:,} rows of history, against 50 ms"
    ours = median(taken)
    yield Row(what, f"{ours:.0f} ms", "50 ms", ours / 50, "≤ 1", met=ours <= 50)


def _milliseconds(connection: psycopg.Connection[Any]) -> float:
    started = perf_counter()
    connection.execute("select public.group_usage() is null")
    return (perf_counter() - started) * 1000


def export(server: PostgresServer) -> Iterator[Row]:
    """Watch the memory of an export of many rows."""
    server.create_database("export")
    with LocalStack(server.url("export")) as stack, server.connect("export") as connection:
        _execute(connection, "insert into public.user_groups (name) values ('Pro')")
        (user,) = stack.create_users(1)
        group = connection.execute("select id from public.user_groups").fetchone()
        assert group is not None
        _execute(connection, _LEDGER.format(group=group[0], user=user, rows=EXPORTED))
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
    ours = int(done.stdout)
    what = f"memory of `tokenlimits export` of {EXPORTED:,} rows ({rate:,.0f} rows/s), against 200 MB"
    yield Row(what, f"{ours} MB", "200 MB", ours / 200, "≤ 1", met=ours <= 200)


def main() -> None:
    """Measure these alone, with 10 million rows."""
    newest = next(iter(servers().values()))
    with PostgresServer(newest, settings=("shared_buffers=1GB", "max_wal_size=8GB")) as server:
        for row in (*export(server), *dashboard(server, rows=10_000_000, rounds=6)):
            met = "yes" if row.met else "**no**"
            print(f"| {row.what} | {row.ours} | {row.theirs} | {row.ratio:.2f} | {row.bar} | {met} |", flush=True)


if __name__ == "__main__":
    main()
