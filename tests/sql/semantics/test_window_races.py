"""Pools, rolling windows, first uses, anchors and places in flight in one group, from all sides at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import pytest
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import CONNECTIONS, Batch, Call, Crowd, Hammer, Script, Settle, allowed, assert_right
from tests.sql.semantics.test_holds import NOON
from tests.sql.semantics.test_races import lives_of_a_usage, run_fast, shuffled, sweeping
from tests.sql.semantics.world import World, limit

WEIGHTS = {"image": 1, "video": 3}
NOTHING: dict[str, object] = {"counters": [], "rollup": [], "holds": 0}

WINDOWS = (
    limit(90, "credits", "hour", counts=WEIGHTS, starts="rolling"),
    limit(70, "tries", "minute", counts=WEIGHTS, starts="first_use"),
    limit(40, "image", "5 hours", starts="first_use"),
    limit(30, "image", "90 minutes", "member", starts="rolling"),
    limit(25, "video", "30 days", "member", starts="anchor"),
    limit(200, "credits", counts=WEIGHTS),
    limit(1, "image", "day", mode="observe"),
    limit(6, "image", "in_flight"),
)


def with_batches(users: Sequence[UUID], scripts: list[Script]) -> list[Script]:
    """Let every fourth connection send batches that mix users and kinds, in an order of its own."""
    mixed = [
        Batch(tuple(Call(users[(n + i) % len(users)], ["image", "video"][i % 2], 1 + i % 3) for i in range(5)))
        for n in range(len(users))
    ]
    return [[*script, *mixed[n % 4 :], *mixed[: n % 4]] if n % 4 == 0 else script for n, script in enumerate(scripts)]


def assert_settled(world: World, group: UUID) -> None:
    """Nothing has drifted, and what each limit counts is what the ledger has in its window."""
    drift = world.owner.one("select public.usage_drift(%s)", [group])
    assert not any(drift.values()), drift
    assert world.api.reconcile(group) == NOTHING


class TestWindows:
    def test_no_limit_is_passed_and_nobody_is_denied_for_nothing(self, world: World, hammer: Hammer) -> None:
        world.at(NOON)
        group = world.group(*WINDOWS[:3], WINDOWS[5], limit(8, "video", "30 days", "member", starts="anchor"))
        users = [world.user(group) for _ in range(6)]
        calls = [Call(user, kind, cost) for user in users for kind, cost in (("image", 1), ("video", 1), ("image", 2))]
        answers = hammer(with_batches(users, shuffled(calls, times=1)))
        assert_right(answers)
        spent = sum(a.call.cost * WEIGHTS[a.call.kind] for a in answers if a.allowed)
        used = {(x["kind"], x["period"]): x["used"] for x in world.api.group_usage(group)["limits"]}
        assert (used["tries", "minute"], used["credits", "hour"], used["credits", "lifetime"]) == (spent,) * 3
        # what costs least fits until the very end
        assert spent == 70 or used["image", "5 hours"] == 40
        assert_settled(world, group)

    def test_whatever_becomes_of_holds(self, world: World, crowd: Crowd, database: Database) -> None:
        world.at(NOON)
        group = world.group(*WINDOWS)
        users = [world.user(group) for _ in range(4)]
        lives = [call for user in users for call in lives_of_a_usage(user)]
        lives += [Call(user, ttl=20, then="extend_generation") for user in users]
        over = world.owner.one("select tokenlimits.clock()") + timedelta(minutes=6)
        with sweeping(database), crowd.calling(database.url, with_batches(users, shuffled(lives, times=1))) as answers:
            run_fast(world, lambda: world.owner.one("select tokenlimits.clock() > %s", [over]))
        assert_right(answers, "TL008")
        settled = [a.settled for a in answers if a.settled]
        assert {a.error for a in settled} <= {None, "TL006", "TL007"}
        assert {a.status for a in settled} >= {"committed", "refunded", "reserved"}
        assert_settled(world, group)

    @pytest.mark.parametrize("starts", ["rolling", "first_use", "anchor"])
    def test_late_commits_get_the_last_room_and_no_more(self, world: World, hammer: Hammer, starts: str) -> None:
        """32 holds of one expire in a window with room for 10, and are committed together: some as an overage."""
        world.at(NOON)
        group = world.group(limit(CONNECTIONS * 3, "credits", "hour", counts=WEIGHTS, starts=starts))
        users = [world.user(group) for _ in range(4)]
        usages = [world.api.reserve(users[n % 4], "video", 1, 60)["usage_id"] for n in range(CONNECTIONS)]
        world.at("2026-11-23 12:02Z")
        assert world.api.track(users[0], "image", CONNECTIONS * 3 - 30)["allowed"]
        answers = hammer([[Settle("commit_generation", usage)] for usage in usages])
        assert_right(answers, "TL007")
        assert Counter(a.error for a in answers) == {None: 10, "TL007": CONNECTIONS - 10}
        charged = hammer([[Settle("commit_generation", usage, overage="charge", cost=1)] for usage in usages])
        assert {a.error for a in charged} == {None}
        assert_settled(world, group)

    @pytest.mark.parametrize("scope", ["group", "member"])
    def test_one_window_is_opened_by_all_that_come_first(self, world: World, hammer: Hammer, scope: str) -> None:
        """Also where the last one has just ended; each finds the same window."""
        group = world.group(limit(20, period="hour", starts="first_use", scope=scope))
        user = world.user(group)
        for hour in (12, 13, 14):
            world.at(f"2026-11-23 {hour}:00Z")
            answers = hammer([[Call(user)]] * CONNECTIONS)
            assert_right(answers)
            assert allowed(answers) == 20
            assert_settled(world, group)
