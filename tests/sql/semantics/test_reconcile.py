"""Somebody wrote the private tables past the functions: it is found, mended, and no more than asked for is read."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from tests.sql.semantics.world import World, limit

NOON = "2026-11-23 12:00Z"
NOTHING: dict[str, Any] = {"counters": [], "rollup": [], "holds": 0}

FAULTS = {
    "a counter is ahead": "update tokenlimits.counters set used = used + 5 where until = 'infinity'",
    "a member's counter is behind": "update tokenlimits.counters set used = 0 where until <> 'infinity'",
    "a bucket is ahead": "update tokenlimits.usage_rollup set cost = cost + 5",
    "a bucket counts other generations": "update tokenlimits.usage_rollup set generations = generations + 1",
    "a bucket is missing": "delete from tokenlimits.usage_rollup",
    "a bucket is of nothing": """
        insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
        select group_id, 'audio', bucket, slot, 7, 1 from tokenlimits.usage_rollup
    """,
    "the ledger has another row": """
        insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at)
        select gen_random_uuid(), group_id, user_id, kind, 3, 'committed', created_at
        from public.generation_usage limit 1
    """,
    "the ledger has lost one": "delete from public.generation_usage where cost = 2",
    "a hold would never expire": """
        update public.generation_usage set status = 'reserved', expires_at = created_at + interval '1 hour'
        where cost = 2
    """,
}


@pytest.fixture
def group(world: World) -> UUID:
    """A group that has used 1 and 2 of image at noon, on counters of both scopes."""
    world.at(NOON)
    made = world.group(limit(10), limit(10, period="day", scope="member"))
    user = world.user(made)
    for cost in (1, 2):
        assert world.api.track(user, "image", cost)["allowed"]
    return made


def drift(world: World, group: UUID, since: datetime | None = None) -> Any:
    return world.api.call("usage_drift", group_id=group, since=since)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_found_is_what_is_mended(world: World, group: UUID, fault: str) -> None:
    assert drift(world, group) == NOTHING
    world.owner.execute(FAULTS[fault])
    found = drift(world, group)
    assert found != NOTHING
    mended = world.api.reconcile(group)
    assert (mended["rollup"], mended["holds"]) == (found["rollup"], found["holds"])
    assert drift(world, group) == NOTHING == world.api.reconcile(group)


def test_it_says_how_it_was_and_how_it_is(world: World, group: UUID) -> None:
    world.owner.execute(FAULTS["a counter is ahead"])
    world.owner.execute(FAULTS["a bucket is ahead"])
    expected = {
        "counters": [
            {
                "subject": str(group),
                "kind": "image",
                "period": "lifetime",
                "starts": "calendar",
                "scope": "group",
                "was": 8,
                "used": 3,
            }
        ],
        "rollup": [{"group_id": group, "kind": "image", "bucket": datetime.fromisoformat(NOON), "was": 8, "used": 3}],
        "holds": 0,
    }
    assert world.api.reconcile(group) == expected


def test_what_is_older_than_asked_for_is_not_looked_at(world: World, group: UUID) -> None:
    at = world.at("2026-11-25 12:10Z")
    world.owner.execute(FAULTS["a bucket is ahead"])
    world.owner.execute("update tokenlimits.counters set used = used + 5 where until = 'infinity'")
    assert drift(world, group) == NOTHING == world.api.reconcile(group, at)
    assert drift(world, group, at - timedelta(days=3)) != NOTHING
    assert world.api.reconcile(group, at - timedelta(days=3)) != NOTHING
    assert drift(world, group, at - timedelta(days=3)) == NOTHING


def test_a_bucket_that_the_moment_lies_in_is_counted_whole(world: World, group: UUID) -> None:
    since = datetime.fromisoformat(NOON) + timedelta(minutes=14)
    assert drift(world, group, since) == NOTHING == world.api.reconcile(group, since)


def test_with_a_moment_a_lifetime_limit_does_not_read_a_lifetime(world: World, group: UUID) -> None:
    world.owner.execute(
        """
        insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at)
        select gen_random_uuid(), %s, gen_random_uuid(), 'image', 0, 'committed', '2026-01-01'
        from generate_series(1, 3000)
        """,
        [group],
    )
    world.owner.execute("analyze public.generation_usage")
    read = "select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'generation_usage'"
    with world.api.connection.transaction():
        assert world.api.reconcile(group, datetime.fromisoformat(NOON)) == NOTHING
        assert world.api.one(read) < 100
    world.owner.execute("delete from public.generation_usage where cost = 0")


WINDOWS = [
    limit(50, "credits", counts={"image": 2, "video": 8}),
    limit(50, period="hour", starts="rolling"),
    limit(50, period="5 hours", starts="first_use", scope="member"),
    limit(50, "pool", period="3 days", starts="anchor", counts={"image": 3}),
]
SHIFT_A_PART = "update tokenlimits.counter_parts set part = part - interval '1 minute' where used = 1"
WINDOW_FAULTS = {
    "counters are ahead": ("update tokenlimits.counters set used = used + 1", 4),
    "a part has moved": (SHIFT_A_PART, 1),
    "a part has grown": ("update tokenlimits.counter_parts set used = used + 1 where used = 1", 1),
    "the parts are missing": ("delete from tokenlimits.counter_parts", 1),
    "parts and counter agree, and are wrong": (
        "update tokenlimits.counters set used = 0; delete from tokenlimits.counter_parts",
        4,
    ),
}


@pytest.mark.parametrize("fault", WINDOW_FAULTS)
def test_counters_of_pools_and_windows_are_found_and_mended(world: World, fault: str) -> None:
    world.at(NOON)
    group = world.group(*WINDOWS)
    user = world.user(group)
    assert world.api.track(user, "image", 1)["allowed"]
    world.at("2026-11-23 12:10Z")
    assert world.api.track(user, "image", 2)["allowed"]
    before = world.api.user_usage(user)
    assert drift(world, group) == NOTHING
    statement, differing = WINDOW_FAULTS[fault]
    world.owner.execute(statement)
    found = drift(world, group)
    assert len(found["counters"]) == differing
    assert world.api.reconcile(group) == found
    assert drift(world, group) == NOTHING == world.api.reconcile(group)
    assert world.api.user_usage(user) == before
