"""Measure, print ratios, and write RESULTS.md: `make bench` or `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.support.postgres import PostgresServer, servers

from . import exactness, in_sql, over_http, reports
from .in_sql import Row

RESULTS = Path(__file__).with_name("RESULTS.md")
EXACTNESS = f"""
## Who is right

{exactness.THREADS} threads, each with a connection of its own, call at once: first with room for all, then for half.

| limiter | calls | room | admitted | denied though there was room | admitted though there was none | speed |
|---|---|---|---|---|---|---|
"""
SETTINGS = ("shared_buffers=1GB", "max_wal_size=8GB", "checkpoint_timeout=60min")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--postgres", choices=list(servers()), default=next(iter(servers())), help="major version")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of history (default: 10 million)")
    parser.add_argument("--rounds", type=int, default=6, help="of every comparison, in turns")
    parser.add_argument("--seconds", type=float, default=5, help="of every measurement")
    parser.add_argument("--pgledger", type=Path, help="a pgledger.sql to compare with (it is not part of this project)")
    return parser.parse_args()


def _measure(server: PostgresServer, programs: Path, options: argparse.Namespace) -> Iterator[Row]:
    turns = {"rounds": options.rounds, "seconds": options.seconds}
    yield from in_sql.hot_group(server, programs, **turns)
    yield from in_sql.batches(server, programs, **turns)
    yield from in_sql.count_then_insert(server, programs, **turns)
    if options.pgledger:
        yield from in_sql.ledger(server, programs, options.pgledger, **turns)
    yield from over_http.single_call(server, rounds=options.rounds, calls=200)
    yield from over_http.together(server, rounds=options.rounds, seconds=options.seconds)
    yield from in_sql.history(server, programs, rows=options.rows, **turns)
    yield from reports.export(server)
    yield from reports.dashboard(server, rows=options.rows, rounds=options.rounds)


def _machine() -> str:
    cpu = "an unnamed processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return (
        f"{os.cpu_count()} cores of {cpu}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def _line(row: Row) -> str:
    return (
        f"| {row.what} | {row.ours} | {row.theirs} | {row.ratio:.2f} | {row.bar} | {'yes' if row.met else '**no**'} |"
    )


def main() -> int:
    """Run all, and say whether every bar is met."""
    options = _arguments()
    programs = servers()[options.postgres]
    rows: list[Row] = []
    with PostgresServer(programs, durable=True, settings=SETTINGS) as server:
        with server.connect() as connection:
            found = connection.execute("show server_version").fetchone()
        for row in _measure(server, programs, options):
            rows.append(row)
            print(_line(row), flush=True)
        verdicts = [verdict.line for verdict in exactness.compare(server)]
        print("\n".join(verdicts), flush=True)
    head = f"""# Results

Measured {datetime.now(UTC):%Y-%m-%d} by `make bench` on {_machine()},
PostgreSQL {found[0] if found else "?"} with fsync on and {", ".join(SETTINGS)}.
Both sides of a line ran in the same run, in turns of {options.seconds:g} s, {options.rounds} rounds; the ratio is the
median over rounds of ours to theirs.

| what | ours | theirs | ratio | bar | met |
|---|---|---|---|---|---|
"""
    RESULTS.write_text(head + "".join(f"{_line(row)}\n" for row in rows) + EXACTNESS + "\n".join([*verdicts, ""]))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
