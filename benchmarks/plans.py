"""Plans: a thousand customers beneath one group, each with its own pool, and a pool that all of them share."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from time import perf_counter

from tests.support.postgres import PostgresServer

from . import databases
from .in_sql import TRACK
from .pgbench import Load, in_turns
from .run import Row, Run, judge, median_ratio, per_second

CUSTOMERS = databases.USERS
# a statement of Supabase's API ends after this
MOST_SECONDS = 8

CREDITS = '{"kind": "credits", "period": "month", "max": 1000000000, "counts": {"image": 1, "video": 8}, "scope": "%s"}'
OWN_POOLS = f"[{CREDITS % 'group'}]"
A_POOL_EACH = f"[{CREDITS % 'child'}]"
ONE_POOL_TOO = f'[{CREDITS % "child"}, {{"kind": "image", "period": "month", "scope": "group", "max": 1000000000}}]'

ALONE = f"""
select public.save_group(p_name => 'customer ' || i, p_limits => '{OWN_POOLS}')
from generate_series(1, {CUSTOMERS}) as i;
"""
MEMBERS = """
insert into public.group_memberships (group_id, user_id)
select g.id, ('00000000-0000-4000-8000-' || lpad(substr(g.name, 10), 12, '0'))::uuid
from public.user_groups as g
where g.name like 'customer %';
select public.track_generation(m.user_id, 'image') from public.group_memberships as m;
"""
PLAN = "(select g.id from public.user_groups as g where g.name = 'plan')"
ONE_STATEMENT = {
    "edit the max of each customer's pool": (
        f"select public.set_group_limit({PLAN}, jsonb_set('{CREDITS % 'child'}', '{{max}}', to_jsonb(%s::bigint)))"
    ),
    "edit the weights of each customer's pool": (
        f"select public.set_group_limit({PLAN}, jsonb_set('{CREDITS % 'child'}', '{{counts, video}}', to_jsonb(%s)))"
    ),
    "move a customer with its usage": "select public.save_group(p_group_id => (select g.id from public.user_groups as g"
    f" where g.name = 'customer ' || %s), p_parent_id => {PLAN})",
    "usage of all customers": "select %s, json_array_length(public.group_usage())",
}


def plans(run: Run) -> Iterator[Row]:
    """Compare calls beneath a plan with calls of groups that each have the same limits, and time what admins do."""
    with databases.made(run.server, run.ours, "alone", "pools", "shared"):
        _fill(run.server, "alone", ALONE)
        for name, limits in (("pools", A_POOL_EACH), ("shared", ONE_POOL_TOO)):
            _fill(run.server, name, _plan(limits))
        databases.settle(run.server, "alone", "pools", "shared")
        loads = {
            name: Load(run.server.url(name, "postgres"), TRACK, seconds=run.seconds)
            for name in ("alone", "pools", "shared")
        }
        rates = in_turns(run.programs, loads, run.rounds)
        for name, what in (("pools", "each with its own pool"), ("shared", "with one more pool that all share")):
            yield judge(
                f"`track_generation` of {CUSTOMERS:,} customers beneath a plan, {what}, 16 clients,"
                f" against {CUSTOMERS:,} groups with a pool of their own",
                per_second(rates[name]),
                per_second(rates["alone"]),
                median_ratio(rates[name], rates["alone"]),
            )
        for what, statement in ONE_STATEMENT.items():
            seconds = _time(run, statement)
            yield judge(
                f"with {CUSTOMERS:,} customers beneath a plan: {what}, against {MOST_SECONDS} s",
                f"{seconds * 1000:,.0f} ms",
                f"{MOST_SECONDS} s",
                seconds / MOST_SECONDS,
                most=1,
            )


def _plan(limits: str) -> str:
    return f"""
    select public.save_group(p_name => 'plan', p_limits => '{limits}');
    select public.save_group(p_name => 'old plan', p_limits => '{limits}');
    select public.save_group(p_name => 'customer ' || i, p_parent_id => {PLAN})
    from generate_series(1, {CUSTOMERS}) as i;
    """


def _fill(server: PostgresServer, name: str, groups: str) -> None:
    with server.connect(name, "postgres") as connection:
        connection.execute(f"{groups} {MEMBERS}".encode())


def _time(run: Run, statement: str) -> float:
    """Take the median of several, each of another number."""
    taken: list[float] = []
    with run.server.connect("shared", "postgres") as connection:
        for number in range(1, run.rounds + 1):
            # for a move, it first goes where it comes from
            if "save_group" in statement:
                connection.execute(statement.replace("'plan'", "'old plan'").encode(), [str(number)])
            begun = perf_counter()
            connection.execute(statement.encode(), [str(number) if "save_group" in statement else number])
            taken.append(perf_counter() - begun)
    return median(taken)
