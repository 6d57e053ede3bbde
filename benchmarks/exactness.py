"""Which limiters are exact under load: calls denied although there was room, and admitted although there was none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

from psycopg_pool import ConnectionPool
from pyrate_limiter import PostgresBucket, Rate, RateItem

from . import databases
from .run import Run

THREADS = 16
CALLS = 4_000
A_DAY = 86_400_000

COUNT = "select count(*) < %s from public.counted where created_at >= date_trunc('month', now())"
INSERT = "insert into public.counted default values"

Ask = Callable[[int], bool]


@dataclass(frozen=True)
class Verdict:
    """How many of some concurrent calls a limiter admitted, and for how many there was room."""

    limiter: str
    calls: int
    room: int
    admitted: int
    seconds: float

    @property
    def line(self) -> str:
        """A row of the table."""
        right = min(self.calls, self.room)
        denied, over = max(right - self.admitted, 0), max(self.admitted - right, 0)
        return (
            f"| {self.limiter} | {self.calls:,} | {self.room:,} | {self.admitted:,} | {denied:,} | {over:,} "
            f"| {self.calls / self.seconds:,.0f} /s |"
        )


def compare(run: Run) -> Iterator[Verdict]:
    """Let 16 threads call at once: with room for all calls, and with room for half."""
    for room in (CALLS * 2, CALLS // 2):
        for limiter, make in (
            ("**tokenlimits** (`track_generation`)", _tokenlimits),
            ("`count(*)`, then insert", _count_then_insert),
            ("PyrateLimiter 4.5, PostgreSQL bucket", _pyrate),
        ):
            name = f"exact_{room}_{make.__name__.strip('_')}"
            with databases.made(run.server, run.ours, name), ExitStack() as stack:
                pool = stack.enter_context(
                    ConnectionPool(run.server.url(name, "postgres"), min_size=THREADS, max_size=THREADS, open=True)
                )
                ask = make(pool, room)
                pool.wait()
                with ThreadPoolExecutor(THREADS) as threads:
                    begun = perf_counter()
                    admitted = sum(threads.map(ask, range(CALLS)))
                    seconds = perf_counter() - begun
            yield Verdict(limiter, CALLS, room, admitted, seconds)


def _tokenlimits(pool: ConnectionPool, room: int) -> Ask:
    limits = f'[{{"kind": "image", "period": "month", "scope": "group", "max": {room}}}]'
    with pool.connection() as connection:
        connection.execute("select public.save_group(p_name => 'all', p_is_default => true, p_limits => %s)", [limits])

    def ask(call: int) -> bool:
        user = f"00000000-0000-4000-8000-{call % databases.USERS + 1:012d}"
        with pool.connection() as connection:
            row = connection.execute(
                "select (public.track_generation(%s, 'image') ->> 'allowed')::boolean", [user]
            ).fetchone()
        return bool(row and row[0])

    return ask


def _count_then_insert(pool: ConnectionPool, room: int) -> Ask:
    with pool.connection() as connection:
        connection.execute("create table public.counted (created_at timestamptz not null default now())")
        connection.execute("create index on public.counted (created_at)")

    def ask(_: int) -> bool:
        with pool.connection() as connection:
            row = connection.execute(COUNT, [room]).fetchone()
            if row and row[0]:
                connection.execute(INSERT)
                return True
        return False

    return ask


def _pyrate(pool: ConnectionPool, room: int) -> Ask:
    # the bucket itself, as it is shared by workers in separate processes
    bucket = PostgresBucket(pool, "images", [Rate(room, A_DAY)])
    return lambda call: bool(bucket.put(RateItem(str(call), bucket.now())))
