"""The first call after 100,000 holds of one group and kind have expired together, all unswept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import psycopg
from tests.support.invariants import drift
from tests.support.postgres import PostgresServer

from . import databases
from .run import Row, Run, judge

HOLDS = 100_000
EACH = HOLDS // databases.USERS
SECONDS = 0.4
# A hundred expired holds per member, with the counters and the rollup as these holds moved them. Each member also has a
# usage that stays.
TOGETHER = f"""
with copies as (
  insert into public.generation_usage (
    id, group_id, user_id, kind, cost, reserved_cost, status, metadata, created_at, expires_at
  )
  select
    {databases.uuid_v7("u.created_at", "u.group_id")},
    u.group_id, u.user_id, u.kind, u.cost, u.reserved_cost, u.status, u.metadata, u.created_at, u.expires_at
  from public.generation_usage as u
  cross join generate_series(2, {EACH})
  where u.status = 'reserved'
  returning *
)
insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
select id, group_id, group_id, user_id, kind, cost, created_at, expires_at from copies;
update tokenlimits.counters
set used = used + {EACH - 1} * case when subject in (select id from public.user_groups) then {databases.USERS} else 1
end;
insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
select u.group_id, u.kind, {databases.bucket("u.created_at")} as bucket, 0, sum(u.cost), count(*)
from public.generation_usage as u
where u.status = 'reserved' and u.idempotency_key is null
group by u.group_id, u.kind, bucket
on conflict on constraint usage_rollup_pkey do update
set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;
update public.generation_usage set expires_at = '{{at}}' where status = 'reserved';
update tokenlimits.holds set expires_at = '{{at}}';
"""
# another user in another group: compiles the functions, but sweeps nothing
ELSEWHERE = f"""
insert into auth.users (id, email) values ('{databases.user_id(0)}', 'elsewhere@example.com');
select public.save_group(p_name => 'elsewhere', p_limits => '{databases.LIMITS}');
insert into public.group_memberships (group_id, user_id)
select g.id, '{databases.user_id(0)}' from public.user_groups as g where g.name = 'elsewhere';
"""
WARM = f"select public.track_generation('{databases.user_id(0)}', 'image')"
CALL = f"select public.track_generation('{databases.user_id(1)}', 'image') -> 'allowed' = %s"
EVERYBODY = """
select bool_and(a -> 'allowed' = %s)
from jsonb_array_elements(public.track_generations((
  select jsonb_agg(jsonb_build_object('user_id', m.user_id, 'kind', 'image'))
  from public.group_memberships as m
  inner join public.user_groups as g on g.id = m.group_id and g.name = 'all'
))) as a
"""


@dataclass(frozen=True)
class Case:
    """A call, the room that there is without expired holds, and whether it is admitted."""

    what: str
    sql: str
    room: int | None
    allowed: bool = True


CASES = (
    Case("the next call", CALL, None),
    Case("the next call where its limits are full but for them", CALL, databases.USERS),
    Case("the next call that is denied", CALL, 0, allowed=False),
    Case("the next batch of 1,000 users", EVERYBODY, None),
    Case("the next batch of 1,000 users where their limits are full but for them", EVERYBODY, databases.USERS),
)


def expired_together(run: Run) -> Iterator[Row]:
    """Time the first calls of all kinds, each on a fresh copy of that state."""
    server = run.server
    taken: dict[str, list[float]] = {case.what: [] for case in CASES}
    with databases.made(server, run.ours, "expired"):
        _expire(server, "expired")
        for _ in range(run.rounds):
            for case in CASES:
                taken[case.what].append(_first(server, case))
    for what, seconds in taken.items():
        yield judge(
            f"after {HOLDS:,} holds have expired together: {what}, against {SECONDS * 1000:.0f} ms",
            f"{median(seconds) * 1000:,.0f} ms",
            f"{SECONDS * 1000:.0f} ms",
            median(seconds) / SECONDS,
            most=1,
        )


def _expire(server: PostgresServer, name: str) -> None:
    databases.one_group(server, name, databases.LIMITS)
    with server.connect(name, "postgres") as connection:
        connection.execute("select public.reserve_generation(u.id, 'image', 1, 3600, 'a') from auth.users as u")
    with server.connect(name) as connection, connection.transaction():
        connection.execute(TOGETHER.format(at=_now(connection)).encode())
    with server.connect(name, "postgres") as connection:
        connection.execute(ELSEWHERE.encode())
    with server.connect(name) as connection:
        if found := drift(connection):
            raise RuntimeError("\n".join(found[:5]))
    databases.settle(server, name)


def _now(connection: psycopg.Connection[Any]) -> str:
    row = connection.execute("select clock_timestamp()::text").fetchone()
    assert row is not None
    return row[0]


def _first(server: PostgresServer, case: Case) -> float:
    """Restore the state, and time one call."""
    server.create_database("expired_once", "expired")
    try:
        if case.room is not None:
            _leave_room(server, case.room)
        with server.connect("expired_once", "postgres") as connection:
            connection.execute(WARM.encode())
            begun = perf_counter()
            row = connection.execute(case.sql.encode(), [str(case.allowed).lower()]).fetchone()
            seconds = perf_counter() - begun
        if row != (True,):
            raise RuntimeError(f"{case.what} was to be answered otherwise")
        return seconds
    finally:
        server.drop_database("expired_once")


def _leave_room(server: PostgresServer, room: int) -> None:
    """Lower the limits to what is used without the holds, plus some room; each member has an equal share of it."""
    with server.connect("expired_once") as connection:
        # the triggers would recount, and so warm the caches that the call should find cold
        connection.execute("set session_replication_role = replica")
        connection.execute(
            "update public.group_limits set max = case scope when 'group' then %s else %s end "
            "where group_id = (select id from public.user_groups where name = 'all')",
            [databases.USERS + room, 1 + room // databases.USERS],
        )
