"""The rows that are measured in SQL alone, without HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.support.postgres import PostgresServer

from . import databases
from .pgbench import Load, in_turns, median_ratio

BARE = "update public.bare set used = used + 1 where id = 1;"
ORDERED_KEY = "tokenlimits.uuid_v7()::text"
RANDOM_KEY = "gen_random_uuid()::text"
COUNT_THEN_INSERT = f"""\\set user random(1, {databases.USERS})
with room as (
  select count(*) < 1000000000 as yes from public.counted
  where group_id = 1 and kind = 'image' and created_at >= date_trunc('month', now())
)
insert into public.counted (group_id, user_id, kind) select 1, :user, 'image' from room where yes;
"""


BATCH_SIZE = 1_000
BATCH = f"""select jsonb_array_length(public.track_generations((
  select jsonb_agg(jsonb_build_object(
    'user_id', '00000000-0000-4000-8000-' || lpad((1 + i * 7919 % {databases.USERS})::text, 12, '0'),
    'kind', 'image', 'idempotency_key', {ORDERED_KEY}
  ))
  from generate_series(1, {BATCH_SIZE}) as i
)));
"""


@dataclass(frozen=True)
class Row:
    """One line of the results: what was measured, the rates per second, the ratio, and the bar for it."""

    what: str
    ours: str
    theirs: str
    ratio: float
    bar: str
    met: bool


def track(key: str) -> str:
    """Write a script that tracks one image for a user by chance."""
    return (
        f"\\set user random(1, {databases.USERS})\nselect public.track_generation({databases.USER}, 'image', 1, {key});"
    )


def _per_second(rates: list[float]) -> str:
    return f"{median(rates):,.0f} /s"


def hot_group(server: PostgresServer, programs: Path, *, rounds: int, seconds: float) -> Iterator[Row]:
    """Compare calls on one group, which all its members share, with a bare update of one row, and with denials."""
    databases.make(server, "hot")
    databases.make(server, "full")
    databases.one_group(server, "hot", databases.LIMITS)
    databases.one_group(server, "full", databases.FULL)
    with server.connect("hot", "postgres") as connection:
        connection.execute("create table public.bare (id int primary key, used bigint not null) with (fillfactor = 50)")
        connection.execute("insert into public.bare values (1, 0)")
    for name in ("hot", "full"):
        databases.settle(server, name)
    rates = in_turns(
        programs,
        {
            "bare": Load(server.url("hot", "postgres"), BARE, seconds=seconds),
            "track": Load(server.url("hot", "postgres"), track(ORDERED_KEY), seconds=seconds),
            "denied": Load(server.url("full", "postgres"), track(ORDERED_KEY), seconds=seconds),
        },
        rounds,
    )
    ratio = median_ratio(rates["track"], rates["bare"])
    yield Row(
        "`track_generation` on one hot group with two limits, against a bare `update` of one row, 16 clients",
        _per_second(rates["track"]),
        _per_second(rates["bare"]),
        ratio,
        "≥ 0.5",
        ratio >= 0.5,
    )
    ratio = median_ratio(rates["denied"], rates["track"])
    yield Row(
        "the same denied, against admitted",
        _per_second(rates["denied"]),
        _per_second(rates["track"]),
        ratio,
        "≥ 3",
        ratio >= 3,
    )


def batches(server: PostgresServer, programs: Path, *, rounds: int, seconds: float) -> Iterator[Row]:
    """Compare batches of 1,000 for one group with single calls, in admitted generations."""
    databases.make(server, "batches")
    databases.one_group(server, "batches", databases.LIMITS)
    databases.settle(server, "batches")
    url = server.url("batches", "postgres")
    rates = in_turns(
        programs,
        {
            "single": Load(url, track(ORDERED_KEY), seconds=seconds),
            "batch": Load(url, BATCH, clients=4, seconds=seconds),
        },
        rounds,
    )
    together = [rate * BATCH_SIZE for rate in rates["batch"]]
    ratio, rate = median_ratio(together, rates["single"]), median(together)
    yield Row(
        "`track_generations` with 1,000 each on one hot group, 4 clients, against `track_generation`, 16 clients",
        _per_second(together),
        _per_second(rates["single"]),
        ratio,
        "≥ 8, or 20,000 /s",
        ratio >= 8 or rate >= 20_000,
    )


def history(server: PostgresServer, programs: Path, *, rows: int, rounds: int, seconds: float) -> Iterator[Row]:
    """Compare an empty ledger with a full one, with our keys and with random ones."""
    for keys, expression, allowed in (("our keys", ORDERED_KEY, 0.95), ("random keys", RANDOM_KEY, 0.85)):
        for name, size in (("empty", 0), ("long", rows)):
            databases.make(server, name)
            databases.many_groups(server, name)
            if size:
                databases.add_history(server, name, size, ordered_keys=expression == ORDERED_KEY)
            databases.settle(server, name)
        loads = {
            name: Load(server.url(name, "postgres"), track(expression), clients=4, seconds=seconds)
            for name in ("empty", "long")
        }
        rates = in_turns(programs, loads, rounds)
        ratio = median_ratio(rates["long"], rates["empty"])
        yield Row(
            f"`track_generation` with {rows:,} rows of history, against none ({keys}), 4 clients",
            _per_second(rates["long"]),
            _per_second(rates["empty"]),
            ratio,
            f"≥ {allowed}",
            ratio >= allowed,
        )
        for name in ("empty", "long"):
            server.drop_database(name)


def count_then_insert(server: PostgresServer, programs: Path, *, rounds: int, seconds: float) -> Iterator[Row]:
    """Compare with the way that it is mostly done: count the month's million rows, then insert."""
    databases.make(server, "counting")
    databases.one_group(server, "counting", databases.LIMITS)
    with server.connect("counting", "postgres") as connection:
        connection.execute(
            """
            create table public.counted (
              id bigint generated always as identity primary key,
              group_id bigint not null, user_id bigint not null, kind text not null,
              created_at timestamptz not null default now()
            )
            """
        )
        connection.execute("create index on public.counted (group_id, kind, created_at)")
        connection.execute(
            "insert into public.counted (group_id, user_id, kind) "
            "select 1, i, 'image' from generate_series(1, 1000000) as i"
        )
    databases.settle(server, "counting")
    url = server.url("counting", "postgres")
    rates = in_turns(
        programs,
        {
            "count": Load(url, COUNT_THEN_INSERT, clients=4, seconds=seconds),
            "track": Load(url, track(ORDERED_KEY), clients=4, seconds=seconds),
        },
        rounds,
    )
    ratio = median_ratio(rates["track"], rates["count"])
    yield Row(
        "`track_generation`, against `count(*)`-then-insert with 1,000,000 rows this month, 4 clients",
        _per_second(rates["track"]),
        _per_second(rates["count"]),
        ratio,
        "> 1",
        ratio > 1,
    )


def ledger(server: PostgresServer, programs: Path, source: Path, *, rounds: int, seconds: float) -> Iterator[Row]:
    """Compare with pgledger's transfer between two hot accounts; `source` is its pgledger.sql."""
    databases.make(server, "ledger")
    databases.one_group(server, "ledger", databases.LIMITS)
    with server.connect("ledger", "supabase_admin") as connection:
        connection.execute(source.read_text())
        made = [
            connection.execute("select id from pgledger_create_account(%s, 'USD')", [name]).fetchone()
            for name in ("a", "b")
        ]
    ids = [str(row[0]) for row in made if row]
    if not all(re.fullmatch(r"\w+", id_) for id_ in ids):
        raise ValueError(ids)
    databases.settle(server, "ledger")
    transfer = f"select * from pgledger_create_transfer('{ids[0]}', '{ids[1]}', 1::numeric);"
    rates = in_turns(
        programs,
        {
            "transfer": Load(server.url("ledger"), transfer, seconds=seconds),
            "track": Load(server.url("ledger", "postgres"), track(ORDERED_KEY), seconds=seconds),
        },
        rounds,
    )
    ratio = median_ratio(rates["track"], rates["transfer"])
    yield Row(
        "`track_generation` on one hot group, against a pgledger transfer between two hot accounts, 16 clients",
        _per_second(rates["track"]),
        _per_second(rates["transfer"]),
        ratio,
        "≥ 3",
        ratio >= 3,
    )
