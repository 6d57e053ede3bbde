"""Two groups, four users, thirty-two workers at once: who gets how much, and what a denied user sees.

It starts a local Supabase and needs no account:

    pip install 'tokenlimits[local]' rich
    python examples/quickstart.py
    python examples/quickstart.py --database-url postgresql://postgres@localhost/scratch

It exits with 0 only if exactly as many generations passed as the limits allow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from tokenlimits import GroupManager, Limit, LimitExceeded, TokenLimitsError, atrack_generation, track_generation
from tokenlimits.local import LocalStack, LocalStackError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from tokenlimits import TrackResult
    from tokenlimits.models import Group, GroupLimitUsage

COSTS = {"image": 1, "video": 5}  # one unit per second of video
WORKERS_PER_USER = 4
MANY = 500  # more than any limit here, so that a worker ends even if nothing stops it


# What an admin does


def create_groups(groups: GroupManager) -> list[Group]:
    """Make two groups. For a user in both, Studio pays first: it has the higher priority."""
    studio = groups.create(
        "Studio",
        priority=10,
        timezone="Europe/Paris",
        limits=[
            Limit(kind="image", max=100, period="month"),  # shared by all members
            Limit(kind="image", max=40, period="day", scope="member"),  # and a limit for each of them
            Limit(kind="video", max=60, period="month"),
        ],
    )
    free = groups.create(
        "Free",
        timezone="America/New_York",
        limits=[
            Limit(kind="image", max=10, period="day", scope="member"),
            Limit(kind="image", max=50),
            Limit(kind="video", max=30, period="week"),
        ],
    )
    return [studio, free]


# What workers do


def make_images(user_id: UUID) -> list[TrackResult]:
    """Make images until blocked, in a thread."""
    results: list[TrackResult] = []
    while len(results) < MANY:
        results.append(track_generation(user_id, "image", COSTS["image"]))
        if not results[-1]:
            break
        # here a worker would make the image
    return results


async def make_videos(user_id: UUID) -> list[TrackResult]:
    """Make videos until blocked, in an asyncio task."""
    results: list[TrackResult] = []
    while len(results) < MANY:
        results.append(await atrack_generation(user_id, "video", COSTS["video"]))
        if not results[-1]:
            break
        # here a worker would make the video
    return results


def run_threads(users: Sequence[UUID]) -> list[TrackResult]:
    workers = [*users] * WORKERS_PER_USER
    with ThreadPoolExecutor(len(workers)) as pool:
        return [result for results in pool.map(make_images, workers) for result in results]


async def run_tasks(users: Sequence[UUID]) -> list[TrackResult]:
    workers = [*users] * WORKERS_PER_USER
    return [result for results in await asyncio.gather(*map(make_videos, workers)) for result in results]


def http_answer(result: TrackResult) -> str:
    """Return a web app's answer to a denied request: 429 and when to retry, or 403."""
    if result.reason != "limit_exceeded":
        return "403 Forbidden"
    if result.retry_after is None:  # waiting won't help
        return "429 Too Many Requests"
    return f"429 Too Many Requests, Retry-After: {result.retry_after:.0f}"


# Was it exact?


class Count(NamedTuple):
    """For one kind in one group: how many fit, how many were allowed, how many are in the database."""

    group: str
    kind: str
    fit: int
    passed: int
    recorded: int


def count(groups: GroupManager, group: Group, kind: str, results: Sequence[TrackResult]) -> Count:
    members = groups.usage(group.id).member_count
    fit = min(
        limit.max // COSTS[kind] * (members if limit.scope == "member" else 1)
        for limit in group.limits
        if limit.kind == kind and limit.max is not None
    )
    passed = sum(1 for r in results if r.allowed and r.kind == kind and r.group and r.group.id == group.id)
    recorded = sum(point.generations for point in groups.history(group.id, kind=kind))
    return Count(group.name, kind, fit, passed, recorded)


def verify(counts: Sequence[Count]) -> list[str]:
    """List what is wrong: nothing, if exactly what fits was allowed and recorded."""
    return [
        f"{c.group} {c.kind}: {c.fit} fit, but {c.passed} passed and {c.recorded} were recorded"
        for c in counts
        if not c.fit == c.passed == c.recorded
    ]


# What you see


def colour(fraction: float) -> str:
    return "green" if fraction < 0.7 else "yellow" if fraction < 0.9 else "red"


def countdown(until: datetime | None) -> str:
    if until is None:
        return "never"
    minutes = max(0, round((until - datetime.now(UTC)).total_seconds() / 60))
    days, hours = divmod(minutes // 60, 24)
    return f"in {days}d {hours}h" if days else f"in {hours}h {minutes % 60}m"


def limit_row(limit: GroupLimitUsage) -> list[str | ProgressBar]:
    """Show one limit; for a member limit, the sum of all members."""
    per = "in total" if limit.period == "lifetime" else f"a {limit.period}"
    style = colour(limit.fraction or 0)
    return [
        limit.kind,
        f"{limit.max} {per}{' each' if limit.scope == 'member' else ''}",
        ProgressBar(limit.capacity, limit.used, complete_style=style, finished_style=style),
        f"[{style}]{limit.used}/{limit.capacity}",
        f"{limit.remaining}",
        f"{limit.reset_at.astimezone(UTC):%b %d %H:%M}" if limit.reset_at else "",
        countdown(limit.reset_at),
    ]


def show_usage(console: Console, groups: GroupManager, group: Group) -> None:
    usage = groups.usage(group.id)
    table = Table(box=None, expand=True, header_style="dim", pad_edge=False)
    table.add_column("", width=5)
    table.add_column("limit", width=13)
    table.add_column("", ratio=1)
    table.add_column("used", width=7, justify="right")
    table.add_column("left", width=4, justify="right")
    table.add_column("resets (UTC)", width=12)
    table.add_column("", width=10, justify="right")
    for limit in usage.limits:
        table.add_row(*limit_row(limit))
    title = f"[bold]{group.name}[/]: {usage.member_count} members, priority {group.priority}, {group.timezone}"
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def show_blocked(console: Console, result: TrackResult) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_row("result.allowed", f"{result.allowed}")
    table.add_row("result.error", result.error)
    table.add_row("result.reason", result.reason)
    table.add_row("result.reset_at", f"{result.reset_at}")
    table.add_row("result.retry_after", f"{result.retry_after}")
    try:
        result.raise_if_denied()
    except LimitExceeded as error:
        table.add_row("raise_if_denied()", f"raises {type(error).__name__}")
    table.add_row("a web app answers", http_answer(result))
    console.print(table)


def show_counts(console: Console, counts: Sequence[Count], problems: Sequence[str]) -> None:
    for c in counts:
        console.print(f"{c.group:<6} {c.kind}: {c.fit:>3} fit, {c.passed:>3} passed, {c.recorded:>3} recorded")
    for problem in problems:
        console.print(f"[red]Wrong![/] {problem}")
    if not problems:
        console.print("[green]Exact, in every group and kind.[/]")


# All together


def wait_for_reset(groups: GroupManager, ours: Sequence[Group]) -> None:
    """Wait for a period that is about to end: in the next one, there is room again, and the count would look wrong."""
    limits = [limit for group in ours for limit in groups.usage(group.id).limits]
    first = min(limit.reset_at for limit in limits if limit.reset_at)
    seconds = (first - datetime.now(UTC)).total_seconds()
    if seconds < 30:
        time.sleep(seconds + 0.1)


def demo(console: Console, groups: GroupManager, ours: Sequence[Group], users: Sequence[UUID]) -> int:
    studio, free = ours
    groups.add_members(studio.id, users[:3])
    groups.add_members(free.id, users[2:])  # so the third user is in both
    wait_for_reset(groups, ours)

    started = time.monotonic()
    results = run_threads(users) + asyncio.run(run_tasks(users))
    seconds = time.monotonic() - started
    console.print(f"16 threads and 16 asyncio tasks asked for {len(results)} generations, in {seconds:.1f} s.\n")

    for group in ours:
        show_usage(console, groups, group)
    console.print("\nA user who is only in Free asks for one more image:")
    show_blocked(console, track_generation(users[3], "image"))

    console.print()
    counts = [count(groups, group, kind, results) for group in ours for kind in COSTS]
    problems = verify(counts)
    show_counts(console, counts, problems)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--database-url",
        default=os.environ.get("DEMO_DATABASE_URL"),
        help="a PostgreSQL to use and to leave tokenlimits in (or DEMO_DATABASE_URL); default: one in memory",
    )
    options = parser.parse_args()
    console = Console(highlight=False)
    stack = LocalStack(options.database_url, timeout=120)
    try:
        with console.status("Starting a local Supabase (the first start downloads it)"):
            stack.start()
        # it is on this machine, so a proxy from the environment must not be used
        os.environ.update(stack.environment(), no_proxy="127.0.0.1")
        with GroupManager.from_env() as groups:
            ours = create_groups(groups)
            try:
                return demo(console, groups, ours, stack.create_users(4))
            finally:
                for group in ours:
                    groups.delete(group.id)
    except (LocalStackError, TokenLimitsError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stack.stop()


if __name__ == "__main__":
    sys.exit(main())
