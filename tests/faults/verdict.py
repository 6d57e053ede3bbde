"""What must be true after a run, whatever went wrong in it: compares what workers were told with the ledger."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import class_row
from tests.faults.journal import Account, Called

EXPECTED_ERRORS = ("ServiceUnavailable", "LimitExceeded", "BodyFailed")
GIVEN_BACK = {"release": ("released",), "refund": ("refunded",)}


class Usage(NamedTuple):
    """A row of the ledger; `live` at the moment of reading."""

    id: UUID
    group_id: UUID
    user_id: UUID
    kind: str
    cost: int
    status: str
    job: str
    live: bool


class Room(NamedTuple):
    """What a limit says, and what the ledger does, of one subject."""

    group_id: UUID
    kind: str
    period: str
    scope: str
    subject: UUID
    max: int
    weight: int
    live: int

    @property
    def left(self) -> int:
        """How many units of the kind fit."""
        return (self.max - self.live) // self.weight


def ledger(connection: psycopg.Connection[Any], jobs: Iterable[str]) -> list[Usage]:
    return (
        connection.cursor(row_factory=class_row(Usage))
        .execute(
            """
            select
              u.id, u.group_id, u.user_id, u.kind, u.cost, u.status, u.metadata ->> 'job' as job,
              u.status = 'committed' or u.status = 'reserved' and u.expires_at > tokenlimits.clock() as live
            from public.generation_usage as u
            where u.metadata ->> 'job' = any(%s)
            """,
            [list(jobs)],
        )
        .fetchall()
    )


def rooms(connection: psycopg.Connection[Any], group_id: UUID, kind: str) -> list[Room]:
    """Count the live usages of each limit that has a max, of the group and of all above it, by the ledger alone.

    No period ends in a run, so all of them count.
    """
    return (
        connection.cursor(row_factory=class_row(Room))
        .execute(
            """
            select
              l.group_id, l.kind, l.period, l.scope, s.id as subject, coalesce(o.max, l.max) as max,
              coalesce((l.counts ->> %(kind)s)::bigint, 1) as weight,
              coalesce((
                select sum(u.cost * coalesce((l.counts ->> u.kind)::bigint, 1))
                from public.generation_usage as u
                where
                  u.group_id in (
                    select b.group_id
                    from tokenlimits.group_tree as b
                    where b.above_id = case l.scope when 'child' then s.id else l.group_id end
                  )
                  and (l.counts is null and u.kind = l.kind or l.counts ? u.kind)
                  and (l.scope <> 'member' or u.user_id = s.id)
                  and (u.status = 'committed' or u.status = 'reserved' and u.expires_at > tokenlimits.clock())
              ), 0)::bigint as live
            from tokenlimits.group_tree as t
            inner join public.group_limits as l
              on l.group_id = t.above_id and l.period <> 'in_flight' and l.mode = 'enforce'
            cross join lateral (
              select l.group_id as id where l.scope = 'group'
              union all
              select t.child_id where l.scope = 'child' and t.child_id is not null
              union all
              select m.user_id from public.group_memberships as m where m.group_id = t.group_id and l.scope = 'member'
            ) as s
            left join public.limit_overrides as o
              on
                (o.group_id, o.kind, o.period, o.starts, o.scope, o.subject)
                = (l.group_id, l.kind, l.period, l.starts, l.scope, s.id)
            where
              l.max is not null and t.group_id = %(group)s
              and (l.counts is null and l.kind = %(kind)s or l.counts ? %(kind)s)
            """,
            {"group": group_id, "kind": kind},
        )
        .fetchall()
    )


def problems(account: Account, usages: Iterable[Usage]) -> list[str]:
    """Tell what the ledger has that it shouldn't, or lacks; nothing should be."""
    calls: defaultdict[str, list[Called]] = defaultdict(list)
    rows: defaultdict[str, list[Usage]] = defaultdict(list)
    for called in account.calls:
        calls[called.job].append(called)
    for usage in usages:
        rows[usage.job].append(usage)
    found = [f"{job}: {problem}" for job in calls for problem in _of_job(calls[job], rows[job])]
    return found + [f"{job}: nobody asked for it" for job in rows.keys() - calls.keys()]


def _of_job(calls: list[Called], rows: list[Usage]) -> Iterable[str]:
    by_id = {usage.id: usage for usage in rows}
    told = {
        called.answer.usage_id: called
        for called in calls
        if called.answer and called.answer.usage_id and called.usage_id is None
    }
    live = [usage for usage in rows if usage.live]
    untold = [usage for usage in rows if usage.id not in told]
    doubts = sum(called.in_doubt and called.usage_id is None for called in calls)

    if len(live) > 1:
        yield f"charged {len(live)} times: {live}"
    if len(untold) > doubts:
        yield f"{untold} were recorded, and {doubts} calls were in doubt"
    for usage in rows:
        if (str(usage.user_id), usage.kind) != calls[0].asked[:2]:
            yield f"{usage} was recorded, and {calls[0].asked} asked for"
    for called in calls:
        yield from _of_call(called)
    for id_, called in told.items():
        if id_ not in by_id:
            yield f"told of {id_}, which isn't there"
        elif (outcome := (by_id[id_].status, by_id[id_].cost)) not in (expected := _expected(called, calls)):
            yield f"{id_} is {outcome}, not one of {expected}"


def _of_call(called: Called) -> Iterable[str]:
    if called.error and not called.error.startswith(EXPECTED_ERRORS):
        yield f"{called.call} failed: {called.error}"
    if called.answer is None:
        return
    if not called.answer.allowed and (called.answer.usage_id or called.answer.reason != "limit_exceeded"):
        yield f"denied: {called.answer}"
    for limit in called.answer.limits:
        if limit.mode == "enforce" and limit.max is not None and limit.used > limit.max:
            yield f"a limit was passed: {limit}"


def _expected(recorded: Called, calls: list[Called]) -> set[tuple[str, int]]:
    """Say what may have become of a usage that somebody was told of: status and cost."""
    assert recorded.answer is not None
    settling = [called for called in calls if called.usage_id == str(recorded.answer.usage_id)]
    answers = {(called.answer.status or "", called.answer.cost) for called in settling if called.answer}
    if answers:
        return answers
    cost = recorded.asked[2]
    expected = {("committed", cost)} if recorded.call == "track" else {("reserved", cost), ("expired", cost)}
    for called in settling:
        expected |= {("committed", less) for less in range(cost + 1)} if called.call == "commit" else set()
        expected |= {(status, cost) for status in GIVEN_BACK.get(called.call, ())}
    return expected


def spread(account: Account) -> Counter[str]:
    """Count calls by how they ended."""
    return Counter(
        "in doubt" if called.in_doubt else "allowed" if called.answer else "denied" for called in account.calls
    )
