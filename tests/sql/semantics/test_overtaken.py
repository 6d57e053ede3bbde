"""Calls that are overtaken: by a new period, by counters ahead of the clock, by whoever had the lock before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import Batch, Call, Hammer, Script, assert_right
from tests.sql.semantics.test_races import is_blocked
from tests.sql.semantics.world import World, limit
from tests.support.waiting import PATIENCE, eventually

Begin = Callable[[Callable[[Api], Any]], "Future[Any]"]
"""Begins a call on a connection of its own, and comes back when it waits for a lock."""

TAKE_KEY = """
insert into public.generation_usage (id, group_id, user_id, kind, cost, status, idempotency_key, created_at)
values (gen_random_uuid(), %s, %s, 'image', 1, 'committed', 'job', tokenlimits.clock())
"""
LOCK_USAGE = "select from public.generation_usage where id = %s for update"


@pytest.fixture
def begin(world: World, database: Database) -> Iterator[Begin]:
    with ThreadPoolExecutor() as pool:

        def begin(call: Callable[[Api], Any]) -> Future[Any]:
            slow = Api(database.connect())
            answer = pool.submit(call, slow)
            eventually(lambda: answer.done() or is_blocked(world, slow))
            assert not answer.done(), "it waited for nobody"
            return answer

        yield begin


@pytest.fixture
def blocker(database: Database) -> Api:
    """Somebody who holds a lock in an open transaction."""
    return Api(database.connect("postgres"))


class TestABatchWithACounterAheadOfTheClock:
    """One item belongs to a later period than the others, which are counted in their own all the same."""

    def test_after_the_clock_was_set_back(self, world: World) -> None:
        world.at("2026-11-23 12:00Z")
        ahead, other = world.group(limit(100, period="day")), world.group(limit(2, period="day"))
        first, second = world.user(ahead), world.user(other)
        world.at("2026-11-25 12:00Z")
        assert world.api.track(first, "image")["allowed"]
        world.at("2026-11-23 12:00Z")
        assert world.api.track(second, "image")["allowed"]
        answers = world.api.track_many([(first, "image"), (second, "image"), (second, "image")])
        assert [a["allowed"] for a in answers] == [True, True, False]
        assert not world.api.track(second, "image")["allowed"]
        assert (world.used(first, "day"), world.used(second, "day")) == (2, 2)

    def test_after_somebody_began_the_new_day(self, world: World, blocker: Api, begin: Begin) -> None:
        late = "2026-11-23 23:59:59.999999Z"
        world.at(late)
        ahead, other = world.group(limit(100, period="day")), world.group(limit(2, period="day"))
        first, second = world.user(ahead), world.user(other)
        assert all(a["allowed"] for a in world.api.track_many([(first, "image"), (second, "image")]))
        with blocker.connection.transaction():
            # it looks at the clock, and then for its keys
            blocker.execute("lock table public.generation_usage in access exclusive mode")
            batch = begin(lambda slow: slow.track_many([(first, "image", 1, "a"), (second, "image", 1, "b")]))
            world.at("2026-11-24 00:00Z")
            assert blocker.track(first, "image")["allowed"]
        assert [a["allowed"] for a in batch.result(PATIENCE)] == [True, True]
        assert world.used(first, "day") == 2
        world.at(late)
        assert world.used(second, "day") == 2
        assert not world.api.track(second, "image")["allowed"]


class TestAPeriodThatEndsWhileACallWaits:
    @pytest.mark.parametrize("way", ["single", "swept", "batch"])
    def test_its_usage_is_judged_by_the_new_one(self, world: World, blocker: Api, begin: Begin, way: str) -> None:
        world.at("2026-11-23 23:00Z")
        group = world.group(limit(1, period="day"))
        waits, other = world.user(group), world.user(group)
        if way == "swept":
            assert world.api.reserve(other, "image", 1, 60)["allowed"]
        world.at("2026-11-23 23:59:59Z")
        with blocker.connection.transaction(force_rollback=True):
            blocker.execute(TAKE_KEY, [group, waits])
            if way == "batch":
                call = begin(lambda slow: slow.track_many([(waits, "image", 1, "job")])[0])
            else:
                call = begin(lambda slow: slow.track(waits, "image", 1, "job"))
            assert world.api.track(other, "image")["allowed"], "the last of the old day"
            world.at("2026-11-24 00:00:01Z")
            assert world.api.track(other, "image")["allowed"], "the last of the new one"
        assert call.result(PATIENCE)["reason"] == "limit_exceeded"
        charged = [row for row in world.recorded() if row[-1] == "committed"]
        assert charged == [(other, "image", 1, "committed")] * 2


class TestHoldsExpireByTheClock:
    @pytest.mark.parametrize("way", ["single", "batch"])
    def test_not_by_a_counter_ahead_of_it(self, world: World, way: str) -> None:
        world.at("2026-11-25 12:00Z")
        group = world.group(limit(10, period="hour", scope="member"), limit(3))
        ahead, holder = world.user(group), world.user(group)
        assert world.api.track(ahead, "image")["allowed"]
        world.at("2026-11-25 10:00Z")
        usage = world.api.reserve(holder, "image", 1, 1800)["usage_id"]
        if way == "batch":
            answers = world.api.track_many([(ahead, "image")] * 2)
        else:
            answers = [world.api.track(ahead, "image") for _ in range(2)]
        assert [a["allowed"] for a in answers] == [True, False]
        assert world.owner.one("select status from public.generation_usage where id = %s", [usage]) == "reserved"
        world.at("2026-11-25 10:29Z")
        assert world.api.commit(usage)["status"] == "committed"
        assert world.used(holder) == 3

    def test_a_commit_that_waited_looks_at_the_clock_again(
        self, world: World, database: Database, blocker: Api, begin: Begin
    ) -> None:
        """Both holds expire while it waits: one of them is its own, and the room of the other is for it."""
        world.at("2026-11-23 12:00Z")
        group = world.group(limit(2))
        holder, other = world.user(group), world.user(group)
        usage, unswept = (world.api.reserve(holder, "image", 1, 60)["usage_id"] for _ in range(2))
        keeper = Api(database.connect("postgres"))
        with keeper.connection.transaction():
            keeper.execute(LOCK_USAGE, [unswept])
            with blocker.connection.transaction():
                blocker.execute(LOCK_USAGE, [usage])
                world.at("2026-11-23 12:00:59Z")
                commit = begin(lambda slow: slow.commit(usage))
                world.at("2026-11-23 12:01:01Z")
                assert blocker.tidy() == 1
                assert blocker.track(other, "image")["allowed"]
            assert commit.result(PATIENCE)["status"] == "committed"
        assert not world.api.track(other, "image")["allowed"]
        assert world.used(other) == 2


class TestCountersOfLimitsThatAreGone:
    """Whoever opens a member's counter drops them, many at the beginning of a day."""

    KINDS = ("image", "video", *(f"kind_{n}" for n in range(6)))

    @pytest.fixture
    def users(self, world: World) -> list[UUID]:
        """Members whose counters are all of the day before, and one each of no limit."""
        world.at("2026-11-23 12:00Z")
        kinds = ("audio", *self.KINDS)
        group = world.group(*(limit(None, kind, "day", "member") for kind in kinds))
        users = [world.user(group) for _ in range(40)]
        world.api.track_many([(user, kind) for user in users for kind in kinds])
        world.api.remove_limit(group, "audio", "day", "member")
        world.at("2026-11-24 12:00Z")
        return users

    @pytest.mark.parametrize("way", ["single", "batch"])
    def test_nobody_waits_for_who_drops_them(self, world: World, blocker: Api, users: list[UUID], way: str) -> None:
        stale = (
            "select from tokenlimits.counters where subject = %s"
            " and counter_id not in (select counter_id from public.group_limits) for update"
        )
        world.api.execute("set statement_timeout = '60s'")
        with blocker.connection.transaction():
            assert blocker.execute(stale, users[:1]) == 1
            if way == "batch":
                answers = world.api.track_many([(users[0], "image"), (users[0], "video")])
            else:
                answers = [world.api.track(users[0], "image")]
        assert all(a["allowed"] for a in answers)

    def test_batches_and_single_calls_at_once(self, world: World, hammer: Hammer, users: list[UUID]) -> None:
        # each begins with another counter of a member, and goes on to those that the others began with
        batches: list[Script] = [
            [Batch(tuple(Call(user, kind) for kind in self.KINDS[n:])) for user in users] for n in range(6)
        ]
        singles: Script = [Call(user, kind) for user in users for kind in reversed(self.KINDS)]
        answers = hammer([*batches, singles, singles])
        assert_right(answers)
        assert all(a.allowed for a in answers)
        assert world.owner.one("select count(*) from tokenlimits.counters") == len(self.KINDS) * len(users)


class TestUsageOfAllGroups:
    def test_is_answered_whole_or_by_pages(self, world: World) -> None:
        names = ["Alpha", "beta", "Gamma"]
        for name in reversed(names):
            world.group(limit(1), name=name)

        def page(**arguments: Any) -> list[str]:
            return [usage["group"]["name"] for usage in world.api.call("group_usage", **arguments)]

        assert page() == names
        assert page(page_size=2) == names[:2]
        assert page(page_size=2, after=names[1]) == names[2:]
