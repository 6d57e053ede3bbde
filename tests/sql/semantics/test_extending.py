"""Holds that are extended (DESIGN 3.7): as small examples, and in races with expiry, sweeps and settlements."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import CONNECTIONS, Call, Crowd, Hammer, Settle, assert_right
from tests.sql.semantics.test_contract import refused
from tests.sql.semantics.test_holds import NOON, SETTLEMENTS, hold, later
from tests.sql.semantics.test_overtaken import LOCK_USAGE, Begin, begin, blocker
from tests.sql.semantics.test_races import assert_sound, run_fast, shuffled, sweeping
from tests.sql.semantics.world import World, limit
from tests.support.waiting import PATIENCE

__all__ = ["begin", "blocker"]

DAY = 86_400


def extend(usage: UUID, ttl: int) -> Settle:
    return Settle("extend_generation", usage, ttl=ttl)


@pytest.fixture
def user(world: World) -> UUID:
    """A member of a group that allows 10, at noon."""
    world.at(NOON)
    return world.user(world.group(limit(10), limit(10, period="day", scope="member")))


def test_it_expires_that_much_after_now(world: World, user: UUID) -> None:
    usage = hold(world, user)
    later(world, 30)
    answer = world.api.extend(usage, 60)
    assert (answer["usage_id"], answer["status"], answer["cost"]) == (usage, "reserved", 4)
    assert answer["expires_at"] == world.at(NOON) + timedelta(seconds=90)
    later(world, 89.999999)
    assert world.used(user) == 4
    assert world.owner.tidy() == 0, "it would have been swept at its old expiry"
    later(world, 0.000001)
    assert world.used(user) == 0
    assert world.owner.tidy() == 1


@pytest.mark.parametrize("times", [1, 3])
def test_it_moves_no_counter(world: World, user: UUID, times: int) -> None:
    usage = hold(world, user)
    for _ in range(times):
        assert world.api.extend(usage, 120)["remaining"] == 6
    assert (world.used(user), world.used(user, "day", "member")) == (4, 4)


def test_it_never_shortens_a_hold(world: World, user: UUID) -> None:
    usage = hold(world, user, ttl=600)
    assert world.api.extend(usage, 60)["expires_at"] == world.at(NOON) + timedelta(seconds=600)


def test_a_hold_lasts_30_days_at_most_in_all(world: World, user: UUID) -> None:
    usage = hold(world, user, ttl=20 * DAY)
    later(world, 15 * DAY)
    for ttl in (20 * DAY, 30 * DAY):
        assert world.api.extend(usage, ttl)["expires_at"] == world.at(NOON) + timedelta(days=30)
    later(world, 30 * DAY)
    with refused("TL007", str(usage)):
        world.api.extend(usage, 60)


@pytest.mark.parametrize("ttl", [-1, 0, 30 * DAY + 1])
def test_for_no_time_or_for_ever_is_refused(world: World, user: UUID, ttl: int) -> None:
    usage = hold(world, user)
    with refused("TL001", "ttl"):
        world.api.extend(usage, ttl)


@pytest.mark.parametrize("swept", [False, True])
def test_an_expired_hold_is_not_revived(world: World, user: UUID, swept: bool) -> None:
    usage = hold(world, user)
    later(world, 60)
    if swept:
        world.owner.tidy()
    with refused("TL007", str(usage)):
        world.api.extend(usage, 60)
    assert world.used(user) == 0


def test_a_swept_hold_is_not_revived_by_a_clock_that_is_set_back(world: World, user: UUID) -> None:
    usage = hold(world, user)
    later(world, 60)
    world.owner.tidy()
    later(world, -30)
    with refused("TL007", str(usage)):
        world.api.extend(usage, 60)
    assert world.used(user) == 0


@pytest.mark.parametrize("how", ["commit", "release"])
def test_a_settled_hold_is_not_extended(world: World, user: UUID, how: str) -> None:
    usage = hold(world, user)
    SETTLEMENTS[how](world, usage)
    with refused("TL006"):
        world.api.extend(usage, 60)


def test_neither_is_what_was_tracked_or_never_there(world: World, user: UUID) -> None:
    with refused("TL006", "committed"):
        world.api.extend(world.api.track(user, "image")["usage_id"], 60)
    with refused("TL005"):
        world.api.extend(uuid4(), 60)


@pytest.mark.parametrize("gone", ["group", "limit", "member"])
def test_it_needs_nothing_but_the_id(world: World, user: UUID, gone: str) -> None:
    group = world.group(limit(4))
    user = world.user(group)
    usage = hold(world, user)
    {
        "group": lambda: world.api.delete_group(group),
        "limit": lambda: world.api.remove_limit(group, "image", "lifetime", "group"),
        "member": lambda: world.api.remove_member(group, user),
    }[gone]()
    assert world.api.extend(usage, 600)["status"] == "reserved"


def test_its_key_still_answers_it_after_its_old_expiry(world: World, user: UUID) -> None:
    usage = hold(world, user, key="job")
    extended = world.api.extend(usage, 600)
    later(world, 60)
    again = world.api.reserve(user, "image", 4, 60, "job")
    assert (again["usage_id"], again["replayed"], again["expires_at"]) == (usage, True, extended["expires_at"])


class TestRaces:
    def test_one_that_expires_while_it_waits_is_too_late(self, world: World, blocker: Api, begin: Begin) -> None:
        """Its row is locked, and meanwhile another call takes its room."""
        world.at(NOON)
        group = world.group(limit(4))
        holder, other = world.user(group), world.user(group)
        usage = hold(world, holder)
        with blocker.connection.transaction():
            blocker.execute(LOCK_USAGE, [usage])
            extension = begin(lambda slow: slow.extend(usage, 600))
            later(world, 60)
            assert world.api.track(other, "image", 4)["allowed"]
        with refused("TL007", str(usage)):
            extension.result(PATIENCE)
        assert world.used(other) == 4

    def test_one_whose_room_is_being_taken_is_too_late(self, world: World, blocker: Api, begin: Begin) -> None:
        """It has read the clock in time, and waits for a counter that another call has moved after the expiry."""
        world.at(NOON)
        group = world.group(limit(4))
        holder, other = world.user(group), world.user(group)
        usage = hold(world, holder)
        with blocker.connection.transaction():
            blocker.execute("select from tokenlimits.counters for update")
            extension = begin(lambda slow: slow.extend(usage, 600))
            later(world, 60)
            assert blocker.track(other, "image", 4)["allowed"]
        with refused("TL007", str(usage)):
            extension.result(PATIENCE)
        assert world.used(other) == 4
        assert_sound(world, group)

    def test_a_call_that_wants_its_room_waits_for_it(self, world: World, database: Database, begin: Begin) -> None:
        world.at(NOON)
        group = world.group(limit(4))
        holder, other = world.user(group), world.user(group)
        usage = hold(world, holder)
        later(world, 59)
        extender = Api(database.connect("postgres"))
        with extender.connection.transaction():
            assert extender.extend(usage, 600)["status"] == "reserved"
            later(world, 2)
            call = begin(lambda slow: slow.track(other, "image", 4))
        assert not call.result(PATIENCE)["allowed"]
        assert world.used(holder) == 4
        assert world.recorded() == [(holder, "image", 4, "reserved")]

    @pytest.mark.parametrize("function", ["commit_generation", "release_generation"])
    def test_from_all_sides_with_settlements(self, world: World, hammer: Hammer, function: str) -> None:
        world.at(NOON)
        group = world.group(limit(1000), limit(1000, scope="member"))
        user = world.user(group)
        usages = [hold(world, user) for _ in range(25)]
        scripts = shuffled([step for usage in usages for step in (Settle(function, usage), extend(usage, 600))], 1)
        answers = hammer(scripts)
        assert_right(answers, "TL006")
        assert world.used(user) == (100 if function == "commit_generation" else 0)
        assert_sound(world, group)

    def test_no_hold_is_extended_after_it_expired_nor_swept_before(
        self, world: World, crowd: Crowd, database: Database
    ) -> None:
        """In fast time: holds are extended, swept, committed and expire, and others take all room that there is."""
        world.at(NOON)
        group = world.group(limit(40), limit(30, scope="member"))
        users = [world.user(group) for _ in range(3)]
        keeper, *others = users
        kept = [hold(world, keeper, 1, ttl=20) for _ in range(10)]
        lives = [Call(user, ttl=1) for user in others] + [
            Call(user, ttl=2, then=then) for user in others for then in ("commit_generation", "extend_generation")
        ]
        keeping = [[extend(usage, 20) for usage in kept]] * 4
        begun = world.owner.one("select tokenlimits.clock()")
        over = f"select tokenlimits.clock() > '{(begun + timedelta(minutes=4)).isoformat()}'"
        scripts = [*keeping, *shuffled(lives, times=1)[: CONNECTIONS - len(keeping)]]
        with sweeping(database), crowd.calling(database.url, scripts) as answers:
            run_fast(world, lambda: world.owner.one(over))
        assert_right(answers, "TL006", "TL007")
        lost = [a for a in answers if isinstance(a.call, Settle) and a.call.ttl and a.error]
        # whoever was not lost was kept all the time, far beyond its first ttl
        statuses = dict(
            world.owner.connection.execute(
                "select id, status from public.generation_usage where id = any(%s)", [kept]
            ).fetchall()
        )
        gone = {a.call.usage_id for a in lost}
        assert {usage for usage, status in statuses.items() if status != "reserved"} <= gone
        assert_sound(world, group)
