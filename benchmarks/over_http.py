"""The row that is measured through HTTP: one call at a time, with the real Supabase client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from uuid import UUID

import httpx
from supabase import Client, ClientOptions
from tests.support.postgres import PostgresServer

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack

from .in_sql import Row

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


def single_call(server: PostgresServer, *, rounds: int, calls: int) -> Iterator[Row]:
    """Compare a lone `track` with an RPC that writes one row, and with one that does nothing."""
    server.create_database("http")
    with server.connect("http") as connection:
        connection.execute(RIVALS)
    with LocalStack(database_url=server.url("http")) as stack, httpx.Client(http2=False) as http:
        _, user_id = _set_up(stack)
        client = Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        limits = TokenLimits(client)
        rivals: dict[str, Callable[[], object]] = {
            "nothing": lambda: client.rpc("nothing", {}).execute(),
            "note": lambda: client.rpc("note", {}).execute(),
            "track": lambda: limits.track(user_id, "image"),
        }
        taken: dict[str, list[float]] = {name: [] for name in rivals}
        for call in rivals.values():
            _milliseconds(call, 50)
        for _ in range(rounds):
            for name, call in rivals.items():
                taken[name].append(median(_milliseconds(call, calls)))
    for name, bar in (("note", 1.3), ("nothing", None)):
        ratio = median(a / b for a, b in zip(taken["track"], taken[name], strict=True))
        yield Row(
            f"p50 of `track` through supabase-py, against an RPC that {'writes one row' if bar else 'does nothing'}",
            f"{median(taken['track']):.2f} ms",
            f"{median(taken[name]):.2f} ms",
            ratio,
            f"≤ {bar}" if bar else "—",
            bar is None or ratio <= bar,
        )
