"""Benchmarks over HTTP with the real Supabase client: one call at a time, and many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from uuid import UUID

import httpx
from supabase import AsyncClient, AsyncClientOptions, Client, ClientOptions

from tokenlimits import AsyncTokenLimits, GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack

from .run import Row, Run, judge, median_ratio, per_second

CALLS = 200
RIVALS = """
create table public.noted (id uuid primary key default gen_random_uuid(), at timestamptz not null default now());
alter table public.noted enable row level security;
create function public.note() returns jsonb language plpgsql volatile security definer set search_path = '' as $$
declare v_id uuid;
begin
  insert into public.noted default values returning id into v_id;
  return jsonb_build_object('id', v_id);
end $$;
create function public.nothing() returns jsonb language plpgsql volatile set search_path = '' as $$
begin return '{}'::jsonb; end $$;
"""


def _milliseconds(call: Callable[[], object], times: int) -> list[float]:
    taken: list[float] = []
    for _ in range(times):
        start = perf_counter()
        call()
        taken.append((perf_counter() - start) * 1000)
    return taken


def _set_up(stack: LocalStack) -> tuple[GroupManager, UUID]:
    manager = GroupManager(Client(stack.url, stack.secret_key))
    limits = [
        Limit(kind="image", max=10**12, period="month"),
        Limit(kind="image", max=10**12, period="day", scope="member"),
    ]
    group = manager.create("Measured", limits=limits)
    (user_id,) = stack.create_users(1)
    manager.add_member(group.id, user_id)
    return manager, user_id


def single_call(run: Run) -> Iterator[Row]:
    """Compare a lone `track` with an RPC that writes one row, and with one that does nothing."""
    run.server.create_database("http")
    with run.server.connect("http") as connection:
        connection.execute(RIVALS)
    with LocalStack(database_url=run.server.url("http")) as stack, httpx.Client(http2=False) as http:
        _, user_id = _set_up(stack)
        client = Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        limits, coalescing = TokenLimits(client), TokenLimits(client, coalesce=True)
        rivals: dict[str, Callable[[], object]] = {
            "nothing": lambda: client.rpc("nothing", {}).execute(),
            "note": lambda: client.rpc("note", {}).execute(),
            "track": lambda: limits.track(user_id, "image"),
            "coalescing": lambda: coalescing.track(user_id, "image"),
        }
        taken: dict[str, list[float]] = {name: [] for name in rivals}
        for call in rivals.values():
            _milliseconds(call, 50)
        for _ in range(run.rounds):
            for name, call in rivals.items():
                taken[name].append(median(_milliseconds(call, CALLS)))
    run.server.drop_database("http")
    for name, rival, what, most in (
        ("track", "note", "p50 of `track` through supabase-py, against an RPC that writes one row", 1.2),
        ("track", "nothing", "p50 of `track` through supabase-py, against an RPC that does nothing", None),
        ("coalescing", "track", "p50 of a lone `track` with `coalesce=True`, against one without", 1.05),
    ):
        ours, theirs = (f"{median(taken[side]):.2f} ms" for side in (name, rival))
        yield judge(what, ours, theirs, median_ratio(taken[name], taken[rival]), most=most)


async def _rate(limits: AsyncTokenLimits, user_id: UUID, callers: int, seconds: float) -> float:
    """Run some tasks, each of which calls again and again, and count the calls per second."""
    ends = perf_counter() + seconds

    async def call() -> int:
        done = 0
        while perf_counter() < ends:
            await limits.track(user_id, "image")
            done += 1
        return done

    begun = perf_counter()
    done = sum(await asyncio.gather(*[call() for _ in range(callers)]))
    return done / (perf_counter() - begun)


async def _rates(stack: LocalStack, user_id: UUID, callers: int, rounds: int, seconds: float) -> list[list[float]]:
    async with httpx.AsyncClient(http2=False) as http:
        options = AsyncClientOptions(httpx_client=http)
        client = await AsyncClient.create(stack.url, stack.secret_key, options)
        alone = AsyncTokenLimits(client, timeout=60)
        together = AsyncTokenLimits(client, timeout=60, coalesce=True)
        return [[await _rate(limits, user_id, callers, seconds) for limits in (together, alone)] for _ in range(rounds)]


def together(run: Run) -> Iterator[Row]:
    """Compare coalesced calls of many tasks with the same calls one by one."""
    run.server.create_database("together")
    with LocalStack(database_url=run.server.url("together")) as stack:
        _, user_id = _set_up(stack)
        for callers, least in ((1, None), (32, None), (256, 10)):
            rates = asyncio.run(_rates(stack, user_id, callers, run.rounds, run.seconds))
            ours, theirs = [ours for ours, _ in rates], [theirs for _, theirs in rates]
            what = f"`track` with `coalesce=True`, {callers} asyncio caller(s), through HTTP, against without"
            yield judge(what, per_second(ours), per_second(theirs), median_ratio(ours, theirs), least=least)
    run.server.drop_database("together")
