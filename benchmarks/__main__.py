"""Measure on the newest and the oldest PostgreSQL, print ratios, and write RESULTS.md: `make bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

from tests.support.postgres import PostgresServer, servers

from . import cost, exactness, expiry, in_sql, over_http, plans, reports, results
from .run import Row, Run, Sql

OURS = Path(__file__).parent.parent / "sql" / "tokenlimits.sql"
SETTINGS = ("shared_buffers=1GB", "max_wal_size=8GB", "checkpoint_timeout=60min")
EXACTNESS = "exactness"
SECTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "hot group": in_sql.hot_group,
    "cost of a call": cost.calls,
    "batches": in_sql.batches,
    "count-then-insert": in_sql.count_then_insert,
    "pgledger": in_sql.ledger,
    "http": over_http.single_call,
    "coalesce": over_http.together,
    "history": in_sql.history,
    "expired holds": expiry.expired_together,
    "plans": plans.plans,
    "export": reports.export,
    "dashboard": reports.dashboard,
    "many groups": reports.many_groups,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--postgres", choices=list(servers()), help="instead of the newest and the oldest")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of history (default: 10 million)")
    parser.add_argument("--rounds", type=int, default=6, help="of every comparison, in turns")
    parser.add_argument("--seconds", type=float, default=2, help="of every measurement")
    parser.add_argument("--against", type=Path, help="another tokenlimits.sql, to compare ours with")
    parser.add_argument("--pgledger", type=Path, help="a pgledger.sql to compare with (it is not part of this project)")
    names = ", ".join([*SECTIONS, EXACTNESS])
    parser.add_argument("--only", default="", metavar="NAME", help=f"part of the name of what to measure: {names}")
    parser.add_argument("--add", action="store_true", help="add a partial run to RESULTS.md, below the whole one")
    options = parser.parse_args()
    if not any(options.only in name for name in (*SECTIONS, EXACTNESS)):
        parser.error(f"--only: none of {names}")
    return options


def _measure(run: Run, only: str) -> results.Section:
    with run.server.connect() as connection:
        found = connection.execute("show server_version").fetchone()
    section = results.Section(found[0] if found else "?")
    print(f"\nPostgreSQL {section.postgres}", flush=True)
    for name, measure in SECTIONS.items():
        begun = perf_counter()
        for row in measure(run) if only in name else ():
            section.rows.append(row)
            print(row.line, flush=True)
        if only in name:
            print(f"({name}: {perf_counter() - begun:.0f} s)", file=sys.stderr, flush=True)
    for verdict in exactness.compare(run) if only in EXACTNESS else ():
        section.verdicts.append(verdict)
        print(verdict.line, flush=True)
    return section


def main() -> int:
    """Run all benchmarks, and return whether every target is met."""
    options = _arguments()
    ours, against = Sql.of(OURS), Sql.of(options.against) if options.against else None
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    beginning = results.head(command, SETTINGS, options.rounds, options.seconds, against)
    newest, *_, oldest = servers()
    chosen = [options.postgres] if options.postgres else [newest, oldest]
    sections: list[results.Section] = []
    for programs in (servers()[version] for version in chosen):
        with PostgresServer(programs, durable=True, settings=SETTINGS) as server:
            run = Run(
                server=server,
                programs=programs,
                ours=ours,
                against=against,
                pgledger=options.pgledger,
                rounds=options.rounds,
                seconds=options.seconds,
                rows=options.rows,
            )
            sections.append(_measure(run, options.only))
    # a partial run must not replace the whole results
    if not (options.only or options.postgres):
        results.write(beginning, sections)
    elif options.add:
        results.add(beginning, sections)
    return 0 if all(row.met for section in sections for row in section.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
