"""What a call costs the server: CPU of its backend and bytes of WAL, ours and those of other SQL in turns.

A connection of its own makes prepared calls one after the other, so nothing waits for another call, and what the client
and the network take isn't in it. Linux says what a process has used.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from . import databases
from .run import Row, Run, judge, median_ratio

CALL = "select public.track_generation(%s, 'image', 1, %s)"
BATCH = "select public.track_generations(%s)"
TICKS = os.sysconf("SC_CLK_TCK")
SLICE = 100

Connection = psycopg.Connection[tuple[Any, ...]]
Step = Callable[[Connection], int]


@dataclass(frozen=True)
class Cost:
    """CPU time and WAL bytes of one generation."""

    milliseconds: float
    wal: float


def _key() -> str:
    """Make a time-ordered key, as the client does."""
    random = uuid.uuid4().int & ~(0xFFFF_FFFF_FFFF_F << 76)
    return str(uuid.UUID(int=(time.time_ns() // 1_000_000) << 80 | 7 << 76 | random))


def _one(users: Iterator[int]) -> Step:
    def step(connection: Connection) -> int:
        connection.execute(CALL, [databases.user_id(1 + next(users) % databases.USERS), _key()], prepare=True)
        return 1

    return step


def _many(users: Iterator[int], size: int) -> Step:
    def step(connection: Connection) -> int:
        requests = [
            {
                "user_id": databases.user_id(1 + next(users) % databases.USERS),
                "kind": "image",
                "idempotency_key": _key(),
            }
            for _ in range(size)
        ]
        connection.execute(BATCH, [Jsonb(requests)], prepare=True)
        return size

    return step


def _cpu_seconds(connection: Connection) -> float:
    # user and system time are the 14th and 15th field; the 2nd, a name in parentheses, may have spaces
    fields = Path(f"/proc/{connection.info.backend_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _wal_bytes(connection: Connection) -> int:
    row = connection.execute("select pg_current_wal_insert_lsn() - '0/0'").fetchone()
    assert row is not None
    return int(row[0])


def _turn(places: dict[str, Connection], watcher: Connection, step: Step, seconds: float) -> dict[str, Cost]:
    """Call both sides alternately, a hundred calls each, so that disturbances affect both equally."""
    cpu = {side: _cpu_seconds(place) for side, place in places.items()}
    wal, calls = dict.fromkeys(places, 0), dict.fromkeys(places, 0)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for side, place in places.items():
            begun, done = _wal_bytes(watcher), 0
            while done < SLICE:
                done += step(place)
            wal[side] += _wal_bytes(watcher) - begun
            calls[side] += done
    return {
        side: Cost((_cpu_seconds(place) - cpu[side]) * 1000 / calls[side], wal[side] / calls[side])
        for side, place in places.items()
    }


def calls(run: Run) -> Iterator[Row]:
    """Compare CPU and WAL of a call, admitted, denied and in batches, with those of other SQL."""
    if run.against is None or not Path("/proc/self/stat").exists():
        return
    steps = {
        "admitted": _one(count()),
        "denied": _one(count()),
        "of 100": _many(count(), 100),
        "of 1,000": _many(count(), 1_000),
    }
    taken = _in_turns(run, steps)
    for name, what, most in (
        ("admitted", "CPU of a single `track_generation`, its backend's own", 0.75),
        ("of 100", "the same of one in a batch of 100", 1),
        ("of 1,000", "the same of one in a batch of 1,000", 1),
        ("denied", "the same of one that is denied", None),
    ):
        ours, theirs = ([turn[side].milliseconds for turn in taken[name]] for side in ("ours", "against"))
        yield judge(
            f"{what}, against `{run.against.name}`",
            f"{median(ours):.3f} ms",
            f"{median(theirs):.3f} ms",
            median_ratio(ours, theirs),
            most=most,
        )
    ours, theirs = ([turn[side].wal for turn in taken["admitted"]] for side in ("ours", "against"))
    yield judge(
        f"WAL of a single `track_generation`, against `{run.against.name}`",
        f"{median(ours):,.0f} B",
        f"{median(theirs):,.0f} B",
        median_ratio(ours, theirs),
        most=1.05,
    )


def _in_turns(run: Run, steps: dict[str, Step]) -> dict[str, list[dict[str, Cost]]]:
    """Measure each step on both sides, round by round."""
    taken: dict[str, list[dict[str, Cost]]] = {name: [] for name in steps}
    with ExitStack() as stack:
        watcher = stack.enter_context(run.server.connect())
        places: dict[str, dict[str, Connection]] = {name: {} for name in steps}
        for side, sql in run.sides.items():
            names = {"admitted": f"cost_{side}", "denied": f"cost_{side}_full"}
            stack.enter_context(databases.made(run.server, sql, *names.values()))
            databases.one_group(run.server, names["admitted"], databases.LIMITS)
            databases.one_group(run.server, names["denied"], databases.FULL)
            databases.settle(run.server, *names.values())
            for step in steps:
                name = names["denied" if step == "denied" else "admitted"]
                places[step][side] = stack.enter_context(run.server.connect(name, "postgres"))
        for number in range(run.rounds + 1):
            for name, step in steps.items():
                found = _turn(places[name], watcher, step, run.seconds * (2 if name == "admitted" else 1))
                # the first turn fills caches and writes full pages to the WAL
                if number:
                    taken[name].append(found)
    return taken
