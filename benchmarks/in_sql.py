"""Benchmarks in SQL alone, without HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from . import databases
from .pgbench import Load, in_turns
from .run import Row, Run, judge, median_ratio, per_second

BARE = "update public.bare set used = used + 1 where id = 1;"
KEY = f"{databases.uuid_v7()}::text"
TRACK = f"""\\set user random(1, {databases.USERS})
select public.track_generation({databases.USER}, 'image', 1, {KEY});
"""
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
    'kind', 'image', 'idempotency_key', {KEY}
  ))
  from generate_series(1, {BATCH_SIZE}) as i
)));
"""

# makes a commit wait for a millisecond, as it does for cloud disks
SLOW_COMMITS = ("commit_delay = 1000", "commit_siblings = 0")
# of the update, what the schema of 11202f6 reached, and what a special path for the common call does
HOT = {"fast": (0.42, 0.56), "slow": (0.72, 0.85)}
ONE_HOT_GROUP = "`track_generation` on one hot group with two limits, 16 clients,"


def hot_group(run: Run) -> Iterator[Row]:
    """Compare calls on one group, which all its members share, with a bare update of one row, and with denials."""
    server = run.server
    names = {side: f"hot_{side}" for side in run.sides}
    with databases.made(server, run.ours, "full"):
        for side, sql in run.sides.items():
            databases.make(server, sql, names[side])
            databases.one_group(server, names[side], databases.LIMITS)
        databases.one_group(server, "full", databases.FULL)
        _make_bare(run, names["ours"])
        databases.settle(server, "full", *names.values())
        rates = in_turns(run.programs, _loads_of_a_hot_group(run, names), run.rounds)
        for name in names.values():
            server.drop_database(name)
    for disk, (bar, special) in HOT.items():
        slow = "" if disk == "fast" else f" with {', '.join(f'`{setting}`' for setting in SLOW_COMMITS)},"
        track, bare = rates[f"ours, {disk}"], rates[f"bare, {disk}"]
        yield judge(
            f"{ONE_HOT_GROUP}{slow} against a bare `update` of one row",
            per_second(track),
            per_second(bare),
            median_ratio(track, bare),
            least=bar,
            note=f"({special} by a special path)",
        )
        if run.against:
            theirs = rates[f"against, {disk}"]
            what = f"{ONE_HOT_GROUP}{slow} against that of `{run.against.name}`"
            yield judge(what, per_second(track), per_second(theirs), median_ratio(track, theirs), least=1)
    denied, track = rates["denied"], rates["ours, fast"]
    what = f"{ONE_HOT_GROUP} denied, against admitted"
    yield judge(what, per_second(denied), per_second(track), median_ratio(denied, track), least=2)


def _make_bare(run: Run, name: str) -> None:
    with run.server.connect(name, "postgres") as connection:
        connection.execute("create table public.bare (id int primary key, used bigint not null) with (fillfactor = 50)")
        connection.execute("insert into public.bare values (1, 0)")
    with run.server.connect(name) as connection:
        connection.execute("grant set on parameter commit_delay, commit_siblings to postgres")


def _loads_of_a_hot_group(run: Run, names: dict[str, str]) -> dict[str, Load]:
    settings = quote(" ".join(f"-c {setting.replace(' ', '')}" for setting in SLOW_COMMITS))
    loads: dict[str, Load] = {}
    for disk, options in (("fast", ""), ("slow", f"?options={settings}")):
        url = f"{run.server.url(names['ours'], 'postgres')}{options}"
        loads[f"bare, {disk}"] = Load(url, BARE, seconds=run.seconds)
        for side, name in names.items():
            url = f"{run.server.url(name, 'postgres')}{options}"
            loads[f"{side}, {disk}"] = Load(url, TRACK, seconds=run.seconds)
    loads["denied"] = Load(run.server.url("full", "postgres"), TRACK, seconds=run.seconds)
    return loads


def batches(run: Run) -> Iterator[Row]:
    """Compare batches of 1,000 for one group with single calls, in admitted generations."""
    with databases.made(run.server, run.ours, "batches"):
        databases.one_group(run.server, "batches", databases.LIMITS)
        databases.settle(run.server, "batches")
        url = run.server.url("batches", "postgres")
        loads = {
            "single": Load(url, TRACK, seconds=run.seconds),
            "batch": Load(url, BATCH, clients=4, seconds=run.seconds),
        }
        rates = in_turns(run.programs, loads, run.rounds)
    together = [rate * BATCH_SIZE for rate in rates["batch"]]
    yield judge(
        "`track_generations` with 1,000 each on one hot group, 4 clients, against `track_generation`, 16 clients",
        per_second(together),
        per_second(rates["single"]),
        median_ratio(together, rates["single"]),
        least=8,
    )


def history(run: Run) -> Iterator[Row]:
    """Compare an empty ledger with one of a fifth of the rows, and with one of all rows."""
    sizes = {"empty": 0, "long": run.rows // 5, "longest": run.rows}
    with databases.made(run.server, run.ours, *sizes):
        for name, rows in sizes.items():
            databases.many_groups(run.server, name)
            if rows:
                databases.add_history(run.server, name, rows)
        databases.settle(run.server, *sizes)
        loads = {name: Load(run.server.url(name, "postgres"), TRACK, clients=4, seconds=run.seconds) for name in sizes}
        # the first turn after a checkpoint writes each page whole into the WAL: a long history has many more of them
        rates = {name: turns[1:] for name, turns in in_turns(run.programs, loads, run.rounds + 1).items()}
    for name in ("long", "longest"):
        yield judge(
            f"`track_generation` with {sizes[name]:,} rows of history, against none, 4 clients",
            per_second(rates[name]),
            per_second(rates["empty"]),
            median_ratio(rates[name], rates["empty"]),
            least=0.95,
        )


def count_then_insert(run: Run) -> Iterator[Row]:
    """Compare with the usual way: count the month's million rows, then insert."""
    with databases.made(run.server, run.ours, "counting"):
        databases.one_group(run.server, "counting", databases.LIMITS)
        with run.server.connect("counting", "postgres") as connection:
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
        databases.settle(run.server, "counting")
        url = run.server.url("counting", "postgres")
        loads = {
            "count": Load(url, COUNT_THEN_INSERT, clients=4, seconds=run.seconds),
            "track": Load(url, TRACK, clients=4, seconds=run.seconds),
        }
        rates = in_turns(run.programs, loads, run.rounds)
    ratio = median_ratio(rates["track"], rates["count"])
    yield Row(
        "`track_generation`, against `count(*)`-then-insert with 1,000,000 rows this month, 4 clients",
        per_second(rates["track"]),
        per_second(rates["count"]),
        ratio,
        "> 1",
        ratio > 1,
    )


def ledger(run: Run) -> Iterator[Row]:
    """Compare with pgledger's transfer between two hot accounts, if there is a pgledger.sql."""
    if run.pgledger is None:
        return
    with databases.made(run.server, run.ours, "ledger"):
        databases.one_group(run.server, "ledger", databases.LIMITS)
        with run.server.connect("ledger", "supabase_admin") as connection:
            connection.execute(run.pgledger.read_bytes())
            made = [
                connection.execute("select id from pgledger_create_account(%s, 'USD')", [name]).fetchone()
                for name in ("a", "b")
            ]
        ids = [str(row[0]) for row in made if row]
        if not all(re.fullmatch(r"\w+", id_) for id_ in ids):
            raise ValueError(ids)
        databases.settle(run.server, "ledger")
        transfer = f"select * from pgledger_create_transfer('{ids[0]}', '{ids[1]}', 1::numeric);"
        loads = {
            "transfer": Load(run.server.url("ledger"), transfer, seconds=run.seconds),
            "track": Load(run.server.url("ledger", "postgres"), TRACK, seconds=run.seconds),
        }
        rates = in_turns(run.programs, loads, run.rounds)
    yield judge(
        "`track_generation` on one hot group, against a pgledger transfer between two hot accounts, 16 clients",
        per_second(rates["track"]),
        per_second(rates["transfer"]),
        median_ratio(rates["track"], rates["transfer"]),
        least=3,
    )
