"""Another max for one subject (DESIGN 4.5), and resets of one member (4.7)."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from tests.sql.semantics.hammer import Call, Hammer, allowed, assert_right
from tests.sql.semantics.world import World, limit

MONTHLY = limit(10, period="month", scope="member")


def override(world: World, group: UUID, maximum: int | None, user: UUID | None = None, **more: Any) -> dict[str, Any]:
    # null is a max here, so it can't be left out
    query = "select public.set_limit_override(%s, %s, %s, %s, %s, %s, %s)"
    given = {"kind": "image", "period": None, "starts": None, "until": None} | more
    return world.api.one(query, [group, given["kind"], maximum, user, given["period"], given["starts"], given["until"]])


def remove(world: World, group: UUID, user: UUID | None = None, **more: Any) -> bool:
    return world.api.call("remove_limit_override", group_id=group, kind="image", user_id=user, **more)["removed"]


def maxima(world: World, user: UUID) -> list[int | None]:
    return [x["max"] for x in world.api.user_usage(user)]


class TestOneMember:
    """A member limit."""

    @pytest.mark.parametrize("used", [0, 4])
    def test_it_replaces_the_max_for_them_alone(self, world: World, used: int) -> None:
        group = world.group(MONTHLY)
        user, other = world.user(group), world.user(group)
        if used:
            world.api.track(user, "image", used)
        made = override(world, group, 12, user)
        assert (made["max"], made["user_id"], made["status"], made["scope"]) == (12, str(user), "active", "member")
        assert made["email"] == f"{user}@example.com"
        assert maxima(world, user) == [12]
        assert maxima(world, other) == [10]
        assert world.api.track(user, "image", 12 - used)["remaining"] == 0
        assert not world.api.track(user, "image")["allowed"]
        assert not world.api.track(other, "image", 11)["allowed"]

    def test_null_is_unlimited_and_zero_blocks(self, world: World) -> None:
        group = world.group(MONTHLY)
        user, blocked = world.user(group), world.user(group)
        world.api.track(user, "image")
        override(world, group, None, user)
        override(world, group, 0, blocked)
        assert (world.api.track(user, "image", 1000)["remaining"], world.api.check(user, "image")["allowed"]) == (
            None,
            True,
        )
        denied = world.api.track(blocked, "image")
        assert (denied["allowed"], denied["reset_at"]) == (False, None)

    def test_a_second_one_replaces_the_first_and_removing_restores(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.api.track(user, "image", 8)
        first = override(world, group, 5, user)
        assert override(world, group, 20, user)["id"] == first["id"]
        assert world.api.track(user, "image", 8)["remaining"] == 4
        assert remove(world, group, user)
        assert not remove(world, group, user)
        denied = world.api.track(user, "image")
        assert (denied["denied_by"]["max"], denied["denied_by"]["used"]) == (10, 16)

    def test_it_ends_by_itself(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.at("2026-11-10 12:00Z")
        world.api.track(user, "image", 10)
        override(world, group, 15, user, until="2026-11-20 00:00Z")
        assert world.api.track(user, "image", 2)["remaining"] == 3
        world.at("2026-11-20 00:00Z")
        assert maxima(world, user) == [10]
        assert not world.api.track(user, "image")["allowed"]
        assert [x["status"] for x in world.api.call("find_limit_overrides", group_id=group)] == ["ended"]
        # a past override is not found by a counter that is opened later
        world.at("2026-12-01 00:00Z")
        assert maxima(world, user) == [10]

    def test_the_first_call_after_it_has_ended_finds_none(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.at("2026-11-10 12:00Z")
        override(world, group, 15, user, until="2026-11-20 00:00Z")
        world.at("2026-11-20 00:00Z")
        assert not world.api.track(user, "image", 11)["allowed"]

    def test_it_holds_in_the_next_period(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.at("2026-11-10 12:00Z")
        world.api.track(user, "image")
        override(world, group, 15, user)
        world.at("2026-12-10 12:00Z")
        assert world.api.track(user, "image", 15)["allowed"]

    def test_editing_the_limit_leaves_it_alone(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        override(world, group, 15, user)
        world.api.save_group(group_id=group, limits=[MONTHLY | {"max": 3}], timezone="Asia/Tokyo")
        assert maxima(world, user) == [15]
        remove(world, group, user)
        assert maxima(world, user) == [3]

    def test_it_sleeps_while_there_is_no_such_limit(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.api.track(user, "image")
        override(world, group, 15, user)
        world.api.save_group(group_id=group, limits=[MONTHLY | {"period": "day"}])
        assert maxima(world, user) == [10]
        assert [x["status"] for x in world.api.call("find_limit_overrides", group_id=group)] == ["sleeping"]
        world.api.save_group(group_id=group, limits=[MONTHLY])
        assert maxima(world, user) == [15]

    def test_batches_holds_and_late_commits_know_it(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.at("2026-11-10 12:00Z")
        override(world, group, 2, user)
        assert [x["allowed"] for x in world.api.track_many([(user, "image")] * 3)] == [True, True, False]
        override(world, group, 3, user)
        hold = world.api.reserve(user, "image", 1, 60)["usage_id"]
        assert not world.api.reserve(user, "image")["allowed"]
        world.at("2026-11-10 12:02Z")
        override(world, group, 2, user)
        with pytest.raises(psycopg.errors.DatabaseError, match="no longer fits"):
            world.api.commit(hold)

    @pytest.mark.parametrize("starts", ["first_use", "rolling"])
    def test_in_windows_of_all_kinds(self, world: World, starts: str) -> None:
        group = world.group(limit(2, period="3 hours", scope="member", starts=starts))
        user = world.user(group)
        override(world, group, 3, user)
        assert [world.api.track(user, "image")["allowed"] for _ in range(4)] == [True, True, True, False]

    def test_what_runs_at_once(self, world: World) -> None:
        group = world.group(limit(1, period="in_flight", scope="member"))
        user = world.user(group)
        override(world, group, 2, user)
        assert [world.api.reserve(user, "image")["allowed"] for _ in range(3)] == [True, True, False]


class TestWhenThereIsRoom:
    """`reset_at` of a denial."""

    @pytest.mark.parametrize(
        ("used", "maximum", "until", "cost", "reset_at"),
        [
            # the override ends first, and the limit itself has room
            (4, 0, "2026-11-20 00:00Z", 1, "2026-11-20 00:00Z"),
            # it ends first, but the limit itself has no room until the period ends
            (9, 5, "2026-11-20 00:00Z", 2, "2026-12-01 00:00Z"),
            # the period ends first, and a new one has room under it
            (4, 4, "2026-12-20 00:00Z", 1, "2026-12-01 00:00Z"),
            # it blocks for longer than the period
            (4, 0, "2026-12-20 00:00Z", 1, "2026-12-20 00:00Z"),
            # a cost that never fits the limit itself
            (4, 12, "2026-11-20 00:00Z", 11, None),
            # a cost that fits no more once the override has ended
            (4, 12, "2026-12-20 00:00Z", 11, "2026-12-01 00:00Z"),
            (4, 4, None, 1, "2026-12-01 00:00Z"),
        ],
    )
    def test_it_knows_when_the_override_ends(
        self, world: World, used: int, maximum: int, until: str | None, cost: int, reset_at: str | None
    ) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.at("2026-11-10 12:00Z")
        world.api.track(user, "image", used)
        override(world, group, maximum, user, until=until)
        expected = datetime.fromisoformat(reset_at) if reset_at else None
        denied = world.api.track(user, "image", cost)
        assert (denied["allowed"], denied["reset_at"]) == (False, expected)
        assert world.api.check(user, "image", cost)["reset_at"] == expected
        assert world.api.track_many([(user, "image", cost)])[0]["reset_at"] == expected


class TestTheGroup:
    """A group limit."""

    def test_it_replaces_the_max_of_all(self, world: World) -> None:
        group = world.group(limit(10, period="month"), MONTHLY | {"max": 100})
        user = world.user(group)
        made = override(world, group, 15)
        assert (made["user_id"], made["scope"]) == (None, "group")
        assert world.api.track(user, "image", 15)["allowed"]
        assert not world.api.track(user, "image")["allowed"]
        assert [(x["scope"], x["max"], x["capacity"]) for x in world.api.group_usage(group)["limits"]] == [
            ("member", 100, 100),
            ("group", 15, 15),
        ]

    def test_capacity_is_what_all_members_may_use(self, world: World) -> None:
        group = world.group(MONTHLY)
        user, other, left = world.user(group), world.user(group), world.user(group)
        override(world, group, 25, user)
        override(world, group, 99, left)
        world.api.remove_member(group, left)
        [shown] = world.api.group_usage(group)["limits"]
        assert (shown["max"], shown["capacity"]) == (10, 35)
        override(world, group, None, other)
        assert world.api.group_usage(group)["limits"][0]["capacity"] is None
        override(world, group, 5, other)
        world.api.save_group(group_id=group, limits=[MONTHLY | {"max": None}])
        assert world.api.group_usage(group)["limits"][0]["capacity"] == 30

    def test_who_is_near_their_own_max_is_told(self, world: World) -> None:
        group = world.group(MONTHLY)
        user, other = world.user(group), world.user(group)
        override(world, group, 4, user)
        override(world, group, 100, other)
        world.api.track(user, "image", 4)
        world.api.track(other, "image", 50)
        [found] = world.api.call("limit_pressure", group_id=group)
        assert (found["full"], [x["user_id"] for x in found["members"]]) == (1, [user])


class TestRefusals:
    """What makes no sense."""

    def test_each_says_what_is_wrong(self, world: World) -> None:
        group = world.group(MONTHLY, MONTHLY | {"period": "day"}, limit(5, "video"))
        user = world.user(group)
        for code, words, call in [
            ("TL001", "several limits on image: day calendar, month calendar", lambda: override(world, group, 1, user)),
            ("TL001", "no such group limit on image", lambda: override(world, group, 1)),
            ("TL001", "no such member limit on video", lambda: override(world, group, 1, user, kind="video")),
            ("TL001", "max: must be", lambda: override(world, group, -1, user, period="day")),
            ("TL001", "until: must be", lambda: override(world, group, 1, user, period="day", until="2001-01-01Z")),
            ("TL001", "until: must be", lambda: override(world, group, 1, user, period="day", until="infinity")),
            ("TL004", "there is no user", lambda: override(world, group, 1, uuid4(), period="day")),
            ("TL002", "there is no group", lambda: override(world, uuid4(), 1, user)),
        ]:  # fmt: skip
            with pytest.raises(psycopg.errors.DatabaseError, match=words) as refused:
                call()
            assert refused.value.sqlstate == code
        override(world, group, 1, user, period="day")
        override(world, group, 1, user, period="month")
        with pytest.raises(psycopg.errors.DatabaseError, match="several limits"):
            remove(world, group, user)
        assert remove(world, group, user, period="day")
        assert [x["period"] for x in world.api.call("find_limit_overrides", group_id=group)] == ["month"]

    def test_edits_of_the_table_count_too(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.api.track(user, "image")
        world.owner.execute(
            "insert into public.limit_overrides (group_id, kind, period, scope, subject, max)"
            " values (%s, 'image', 'month', 'member', %s, 3)",
            [group, user],
        )
        assert maxima(world, user) == [3]
        other = world.user(group)
        world.api.track(other, "image")
        world.owner.execute("update public.limit_overrides set subject = %s", [other])
        assert (maxima(world, user), maxima(world, other)) == ([10], [3])
        world.owner.execute("delete from public.limit_overrides")
        assert maxima(world, other) == [10]

    def test_pages(self, world: World) -> None:
        group = world.group(MONTHLY)
        for user in [world.user(group) for _ in range(5)]:
            override(world, group, 1, user)
        seen: list[UUID] = []
        while page := world.api.call(
            "find_limit_overrides", group_id=group, after=seen[-1] if seen else None, page_size=2
        ):
            seen += [x["id"] for x in page]
        assert len(seen) == 5 == len(set(seen))


class TestResetOfAMember:
    """4.7"""

    def test_theirs_is_counted_afresh_and_nothing_else(self, world: World) -> None:
        group = world.group(MONTHLY, limit(100, period="month"))
        user, other = world.user(group), world.user(group)
        for each in (user, other):
            world.api.track(each, "image", 7)
        world.api.reset(group, user_id=user)
        assert [[x["used"] for x in world.api.user_usage(each)] for each in (user, other)] == [[0, 14], [7, 14]]
        answer = world.api.track(user, "image", 10)
        assert [x["used"] for x in answer["limits"]] == [10, 24]
        [shown, _] = world.api.group_usage(group)["limits"]
        assert (shown["scope"], shown["used"]) == ("member", 17)

    def test_of_one_kind(self, world: World) -> None:
        group = world.group(MONTHLY, MONTHLY | {"kind": "credits", "counts": {"image": 2}})
        user = world.user(group)
        world.api.track(user, "image", 3)
        world.api.reset(group, "credits", user)
        assert {x["kind"]: x["used"] for x in world.api.user_usage(user)} == {"image": 3, "credits": 0}

    def test_it_closes_their_first_use_window(self, world: World) -> None:
        group = world.group(limit(2, period="day", scope="member", starts="first_use"))
        user = world.user(group)
        world.at("2026-11-23 12:00Z")
        world.api.track(user, "image", 2)
        world.at("2026-11-23 13:00Z")
        world.api.reset(group, user_id=user)
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [(0, None)]

    def test_a_hold_from_before_gives_nothing_back_to_it(self, world: World) -> None:
        group = world.group(MONTHLY)
        user = world.user(group)
        world.at("2026-11-23 12:00Z")
        hold = world.api.reserve(user, "image", 4, 60)["usage_id"]
        world.api.reserve(user, "image", 4, 60)
        world.api.reset(group, user_id=user)
        world.api.track(user, "image", 3)
        world.api.release(hold)
        assert world.used(user, "month", "member") == 3
        world.api.reserve(user, "image", 2, 60)
        world.at("2026-11-23 12:05Z")
        assert world.used(user, "month", "member") == 3
        assert world.api.group_usage(group)["limits"][0]["used"] == 3

    def test_an_unknown_user_is_refused(self, world: World) -> None:
        with pytest.raises(psycopg.errors.DatabaseError, match="there is no user"):
            world.api.reset(world.group(MONTHLY), user_id=uuid4())


def test_calls_and_edits_at_once_keep_to_what_is_in_force(world: World, hammer: Hammer) -> None:
    """An override is set while 32 call: never more than the larger max in all, and just as many as it allows."""
    group = world.group(limit(40, scope="member"))
    user = world.user(group)
    call = Call(user, "image")
    assert allowed(hammer([[call] * 3] * 32)) == 40
    override(world, group, 90, user)
    answers = hammer([[call] * 3] * 32)
    assert_right(answers)
    assert allowed(answers) == 50
