"""Limits that fit plans (DESIGN 4.1, 4.2, 4.6): pools, windows that begin elsewhere, limits that only observe."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.world import World, limit

POOL = limit(20, "credits", counts={"image": 1, "video": 8})


def credits_left(world: World, user: UUID) -> int:
    [found] = [x for x in world.api.user_usage(user) if x["kind"] == "credits"]
    return found["remaining"]


class TestPools:
    """4.1"""

    def test_a_usage_takes_its_weight_from_the_pool_and_its_cost_from_its_own_limit(self, world: World) -> None:
        user = world.user(world.group(POOL, limit(3, "video")))
        answer = world.api.track(user, "video", 2)
        assert [(x["kind"], x["used"], x["remaining"], x["weight"]) for x in answer["limits"]] == [
            ("credits", 16, 0, 8),
            ("video", 2, 1, 1),
        ]
        assert (answer["remaining"], len(world.recorded())) == (0, 1)
        assert credits_left(world, user) == 4

    def test_all_or_nothing(self, world: World) -> None:
        user = world.user(world.group(POOL, limit(1, "video")))
        assert world.api.track(user, "video", 2)["denied_by"]["kind"] == "video"
        assert credits_left(world, user) == 20
        assert world.api.track(user, "image", 13)["allowed"]
        denied = world.api.track(user, "video")
        assert (denied["denied_by"]["kind"], denied["denied_by"]["remaining"]) == ("credits", 0)
        assert denied["error"] == "Video generation limit exceeded: 13 of 20 credits used in total, 8 more asked for"
        assert [x["used"] for x in world.api.user_usage(user)] == [13, 0]

    def test_it_entitles_to_what_it_counts_and_to_nothing_else(self, world: World) -> None:
        user = world.user(world.group(POOL))
        assert world.api.track(user, "image")["allowed"]
        assert world.api.track(user, "credits")["reason"] == "no_limit_for_kind"

    def test_a_pool_that_is_added_counts_what_was_used_before(self, world: World) -> None:
        group = world.group(limit(None, "image"), limit(None, "video"))
        user = world.user(group)
        world.api.track(user, "image", 3)
        world.api.track(user, "video", 2)
        world.api.save_group(group_id=group, limits=[limit(None, "image"), limit(None, "video"), POOL])
        assert credits_left(world, user) == 1
        world.api.save_group(group_id=group, limits=[POOL | {"counts": {"image": 2, "video": 5}}])
        assert credits_left(world, user) == 4

    def test_a_batch_that_mixes_kinds_shares_the_pool(self, world: World) -> None:
        user, other = world.user(), world.user()
        group = world.group(POOL, limit(1, "video", scope="member"))
        for member in (user, other):
            world.api.add_member(group, member)
        answers = world.api.track_many(
            [(user, "video"), (user, "image", 4), (other, "video"), (user, "image"), (other, "video"), (user, "video")]
        )
        assert [x["allowed"] for x in answers] == [True, True, True, False, False, False]
        assert [x["used"] for a in answers[:3] for x in a["limits"] if x["kind"] == "credits"] == [8, 12, 20]
        assert [a["denied_by"]["kind"] for a in answers[3:]] == ["credits", "credits", "credits"]
        assert credits_left(world, user) == 0

    def test_give_backs_move_it_by_the_weight(self, world: World) -> None:
        user = world.user(world.group(POOL))
        hold = world.api.reserve(user, "video", 2)["usage_id"]
        assert credits_left(world, user) == 4
        world.api.commit(hold, 1)
        assert credits_left(world, user) == 12
        world.api.refund(hold)
        assert credits_left(world, user) == 20

    def test_expired_holds_of_another_kind_leave_room_in_it(self, world: World) -> None:
        user = world.user(world.group(POOL))
        world.at("2026-11-23 12:00Z")
        assert world.api.reserve(user, "video", 2, 60)["allowed"]
        world.at("2026-11-23 12:02Z")
        assert credits_left(world, user) == 20
        assert world.api.track(user, "image", 20)["allowed"]
        assert not world.api.track(user, "image")["allowed"]


class TestObserving:
    """4.6"""

    def test_it_counts_and_says_what_it_would_deny(self, world: World) -> None:
        user = world.user(world.group(limit(1, mode="observe"), limit(3, period="month")))
        assert world.api.track(user, "image")["would_deny"] == []
        answer = world.api.track(user, "image")
        assert (answer["allowed"], answer["remaining"]) == (True, 1)
        assert [(x["period"], x["mode"], x["used"]) for x in answer["would_deny"]] == [("lifetime", "observe", 2)]
        denied = world.api.track(user, "image", 2)
        assert (denied["denied_by"]["period"], [x["used"] for x in denied["would_deny"]]) == ("month", [2])

    def test_it_entitles(self, world: World) -> None:
        user = world.user(world.group(limit(0, mode="observe")))
        assert world.api.track(user, "image")["allowed"]
        [one, other] = world.api.track_many([(user, "image"), (user, "image")])
        assert ([x["used"] for x in one["would_deny"]], [x["used"] for x in other["would_deny"]]) == ([2], [3])

    def test_enforcing_it_later_keeps_what_was_counted(self, world: World) -> None:
        group = world.group(limit(1, mode="observe"))
        user = world.user(group)
        for _ in range(3):
            assert world.api.track(user, "image")["allowed"]
        world.api.save_group(group_id=group, limits=[limit(5)])
        assert world.used(user) == 3


def anchored(world: World, period: str, anchor: str, timezone: str = "UTC", maximum: int = 9) -> UUID:
    group = world.group(limit(maximum, period=period, starts="anchor"), timezone=timezone)
    world.owner.execute("update public.user_groups set anchor_at = %s where id = %s", [anchor, group])
    return world.user(group)


class TestAnchors:
    """4.2"""

    @pytest.mark.parametrize(
        ("period", "timezone", "anchor", "at", "reset_at"),
        [
            # by the day of the original, not of the month before
            ("month", "UTC", "2026-01-31 10:00Z", "2026-02-10 00:00Z", "2026-02-28 10:00Z"),
            ("month", "UTC", "2026-01-31 10:00Z", "2026-02-28 10:00Z", "2026-03-31 10:00Z"),
            ("month", "UTC", "2026-01-31 10:00Z", "2026-04-29 10:00Z", "2026-04-30 10:00Z"),
            ("year", "UTC", "2024-02-29 00:00Z", "2026-06-01 00:00Z", "2027-02-28 00:00Z"),
            ("year", "UTC", "2024-02-29 00:00Z", "2027-03-01 00:00Z", "2028-02-29 00:00Z"),
            ("3 months", "UTC", "2026-01-15 00:00Z", "2026-11-14 23:59Z", "2027-01-15 00:00Z"),
            ("30 days", "UTC", "2026-11-01 08:00Z", "2026-12-01 07:59Z", "2026-12-01 08:00Z"),
            ("30 days", "UTC", "2026-11-01 08:00Z", "2026-12-01 08:00Z", "2026-12-31 08:00Z"),
            ("2 weeks", "UTC", "2026-11-02 00:00Z", "2026-11-28 00:00Z", "2026-11-30 00:00Z"),
            ("5 hours", "UTC", "2026-11-01 01:00Z", "2026-11-02 00:30Z", "2026-11-02 02:00Z"),
            # before the anchor, periods are counted backwards
            ("month", "UTC", "2026-11-15 00:00Z", "2026-09-20 00:00Z", "2026-10-15 00:00Z"),
            # the local time stays through a change of the clock
            ("month", "Europe/Paris", "2026-09-28 22:00Z", "2026-10-20 00:00Z", "2026-10-28 23:00Z"),
            # 02:30 is skipped on 29 March in Paris
            ("day", "Europe/Paris", "2026-03-27 01:30Z", "2026-03-28 12:00Z", "2026-03-29 01:30Z"),
            ("day", "Europe/Paris", "2026-03-27 01:30Z", "2026-03-29 12:00Z", "2026-03-30 00:30Z"),
        ],
    )
    def test_where_the_next_period_begins(
        self, world: World, period: str, timezone: str, anchor: str, at: str, reset_at: str
    ) -> None:
        world.at(at)
        user = anchored(world, period, anchor, timezone)
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat(reset_at)

    def test_who_loses_a_membership_to_another_user_has_the_groups_periods(self, world: World) -> None:
        world.at("2026-11-10 12:00Z")
        group = world.group(limit(5, period="month", scope="member", starts="anchor"), is_default=True)
        world.at("2026-11-20 12:00Z")
        user, other = world.user(group), world.user()
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-12-20 12:00Z")
        world.owner.execute("update public.group_memberships set user_id = %s where user_id = %s", [other, user])
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-12-10 12:00Z")
        assert world.api.track(other, "image")["reset_at"] == datetime.fromisoformat("2026-12-20 12:00Z")

    def test_each_member_has_their_own(self, world: World) -> None:
        world.at("2026-11-05 12:00Z")
        group = world.group(limit(5, period="month", scope="member", starts="anchor"))
        early = world.user(group)
        world.at("2026-11-20 12:00Z")
        late = world.user(group)
        answers = world.api.track_many([(early, "image"), (late, "image", 2)])
        assert [x["reset_at"].date().isoformat() for x in answers] == ["2026-12-05", "2026-12-20"]
        world.at("2026-12-06 12:00Z")
        assert [world.used(user, "month", "member") for user in (early, late)] == [0, 2]

    def test_the_groups_can_be_removed(self, world: World) -> None:
        world.at("2026-11-05 12:00Z")
        group = world.group(limit(5, period="month", starts="anchor"))
        user = world.user(group)
        world.api.save_group(group, anchor_at="2026-01-31T10:00:00Z")
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-11-30 10:00Z")
        assert world.api.save_group(group, priority=3)["anchor_at"] is not None
        assert world.api.save_group(group, no_anchor=True)["anchor_at"] is None
        again = world.api.track(user, "image")
        assert (again["reset_at"], again["remaining"]) == (datetime.fromisoformat("2026-12-05 12:00Z"), 3)

    def test_both_an_anchor_and_none_are_refused(self, world: World) -> None:
        group = world.group(limit(5))
        with pytest.raises(psycopg.Error, match="anchor_at: pass an anchor, or p_no_anchor, not both") as refused:
            world.api.save_group(group, anchor_at="2026-01-31T10:00:00Z", no_anchor=True)
        assert refused.value.sqlstate == "TL001"

    def test_a_members_own_can_be_changed_and_removed(self, world: World) -> None:
        world.at("2026-11-05 12:00Z")
        group = world.group(limit(5, period="month", scope="member", starts="anchor"))
        user, other = world.user(group), world.user(group)
        world.api.track(user, "image", 2)
        for anchor, reset_at in (("2026-10-20T00:00:00+00:00", "2026-11-20 00:00Z"), (None, "2026-12-05 12:00Z")):
            assert world.api.call("set_member_anchor", group_id=group, user_id=user, anchor_at=anchor) == {"set": True}
            (status,) = world.api.user_usage(user)
            # no refill: what was used is in the new period, too
            assert (status["used"], status["reset_at"]) == (2, datetime.fromisoformat(reset_at))
            anchors = {each["user_id"]: each["anchor_at"] for each in world.api.call("group_members", group_id=group)}
            assert anchors == {user: anchor, other: None}
        stranger = world.user()
        assert world.api.call("set_member_anchor", group_id=group, user_id=stranger, anchor_at=None) == {"set": False}


class TestFirstUse:
    """4.2"""

    def test_an_admitted_usage_opens_the_window_and_nothing_else_does(self, world: World) -> None:
        group = world.group(limit(2, period="5 hours", scope="member", starts="first_use"))
        user = world.user(group)
        world.at("2026-11-23 10:00Z")
        assert world.api.check(user, "image")["reset_at"] is None
        assert not world.api.track(user, "image", 3)["allowed"]
        world.api.record(user, "image", created_at=datetime.fromisoformat("2026-11-23 09:00Z"), group_id=group)
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [(0, None)]
        opened = world.at("2026-11-23 11:00Z")
        assert world.api.track(user, "image")["reset_at"] == opened + timedelta(hours=5)
        world.at("2026-11-23 15:59Z")
        assert world.api.track(user, "image")["allowed"]
        denied = world.api.track(user, "image")
        assert denied["reset_at"] == opened + timedelta(hours=5)
        assert denied["error"] == (
            "Image generation limit exceeded: 2 of 2 used by this user since 2026-11-23 11:00, "
            "resets 2026-11-23 16:00 UTC"
        )
        world.at("2026-11-23 16:00Z")
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [(0, None)]
        world.at("2026-11-23 20:00Z")
        [answer] = world.api.track_many([(user, "image")])
        assert answer["reset_at"] == datetime.fromisoformat("2026-11-24 01:00Z")

    def test_it_keeps_its_start_when_the_usage_is_given_back(self, world: World) -> None:
        user = world.user(world.group(limit(2, period="day", starts="first_use")))
        opened = world.at("2026-11-23 10:00Z")
        usage = world.api.track(user, "image")["usage_id"]
        world.at("2026-11-23 12:00Z")
        world.api.refund(usage)
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [(0, opened + timedelta(days=1))]

    def test_a_limit_that_is_added_finds_the_window_that_is_open(self, world: World) -> None:
        group = world.group(limit(None))
        user = world.user(group)
        world.at("2026-11-23 04:00Z")
        world.api.track(user, "image", 5)
        world.at("2026-11-23 10:00Z")
        world.api.track(user, "image", 1)
        world.at("2026-11-23 12:00Z")
        world.api.track(user, "image", 1)
        world.api.save_group(group_id=group, limits=[limit(9, period="5 hours", starts="first_use")])
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [
            (2, datetime.fromisoformat("2026-11-23 15:00Z"))
        ]

    @pytest.mark.parametrize("edit", ["a limit is added", "the anchor is moved"])
    def test_an_edit_keeps_the_start_that_it_finds(self, world: World, edit: str) -> None:
        """Also if the usage that has opened the window is given back before the next call."""
        first_use = limit(9, period="5 hours", starts="first_use")
        group = world.group(limit(None), *([first_use] if edit == "the anchor is moved" else []))
        user = world.user(group)
        opened = world.at("2026-11-23 10:00Z")
        usage = world.api.track(user, "image", 1)["usage_id"]
        world.at("2026-11-23 12:00Z")
        world.api.track(user, "image", 2)
        if edit == "a limit is added":
            world.api.save_group(group_id=group, limits=[first_use])
            world.api.refund(usage)
        else:
            world.api.refund(usage)
            world.api.save_group(group_id=group, anchor_at="2026-01-01 00:00Z", limits=[first_use])
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [(2, opened + timedelta(hours=5))]


class TestRolling:
    """4.2"""

    def test_room_returns_when_the_oldest_part_leaves(self, world: World) -> None:
        world.at("2026-11-23 10:00:30Z")
        user = world.user(world.group(limit(3, period="hour", starts="rolling")))
        world.api.track(user, "image")
        world.at("2026-11-23 10:20:00Z")
        answer = world.api.track(user, "image", 2)
        # the minute that begins at 10:00 has left the window an hour after its end
        assert answer["reset_at"] == datetime.fromisoformat("2026-11-23 11:01Z")
        denied = world.api.track(user, "image", 2)
        assert denied["reset_at"] == datetime.fromisoformat("2026-11-23 11:21Z")
        assert denied["error"] == (
            "Image generation limit exceeded: 3 of 3 used in the last hour, 2 more asked for, "
            "room again 2026-11-23 11:21 UTC"
        )
        world.at("2026-11-23 11:00:59.999999Z")
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-11-23 11:01Z")
        world.at("2026-11-23 11:01Z")
        assert world.api.track(user, "image")["allowed"]
        assert not world.api.track(user, "image")["allowed"]
        assert world.used(user, "hour") == 3

    def test_a_give_back_and_a_record_move_the_part_of_their_moment(self, world: World) -> None:
        world.at("2026-11-23 10:00Z")
        group = world.group(limit(9, period="hour", starts="rolling"))
        user = world.user(group)
        usage = world.api.track(user, "image", 5)["usage_id"]
        world.at("2026-11-23 10:30Z")
        world.api.record(user, "image", 2, created_at=datetime.fromisoformat("2026-11-23 10:10Z"), group_id=group)
        world.api.record(user, "image", 2, created_at=datetime.fromisoformat("2026-11-23 09:10Z"), group_id=group)
        assert world.used(user, "hour") == 7
        world.api.refund(usage)
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [
            (2, datetime.fromisoformat("2026-11-23 11:11Z"))
        ]
        world.at("2026-11-23 11:11Z")
        assert [(x["used"], x["reset_at"]) for x in world.api.user_usage(user)] == [(0, None)]

    def test_a_batch_fills_it(self, world: World) -> None:
        world.at("2026-11-23 10:01Z")
        user = world.user(
            world.group(limit(3, "credits", "3 hours", counts={"image": 1, "video": 2}, starts="rolling"))
        )
        answers = world.api.track_many([(user, "image"), (user, "video"), (user, "image")])
        assert [(x["allowed"], x["reset_at"]) for x in answers] == [
            (True, datetime.fromisoformat("2026-11-23 13:03Z")),
            (True, datetime.fromisoformat("2026-11-23 13:03Z")),
            (False, datetime.fromisoformat("2026-11-23 13:03Z")),
        ]

    def test_a_limit_that_is_added_counts_by_parts(self, world: World) -> None:
        group = world.group(limit(None))
        user = world.user(group)
        for minute in (0, 10, 20):
            world.at(f"2026-11-23 10:{minute:02}Z")
            world.api.track(user, "image")
        world.api.save_group(group_id=group, limits=[limit(3, period="hour", starts="rolling")])
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-11-23 11:01Z")
        for minute, used in [(1, 2), (11, 1), (21, 0)]:
            world.at(f"2026-11-23 11:{minute:02}Z")
            assert world.used(user, "hour") == used
            assert world.api.check(user, "image", 3 - used)["allowed"]

    def test_an_expired_hold_leaves_room(self, world: World) -> None:
        world.at("2026-11-23 10:00Z")
        user = world.user(world.group(limit(3, period="hour", starts="rolling")))
        world.api.reserve(user, "image", 3, 60)
        assert not world.api.track(user, "image")["allowed"]
        world.at("2026-11-23 10:02Z")
        assert world.api.track(user, "image", 3)["reset_at"] == datetime.fromisoformat("2026-11-23 11:03Z")


@pytest.mark.parametrize("starts", ["rolling", "first_use"])
@pytest.mark.parametrize("counts", [None, {"image": 1, "video": 3}])
def test_many_at_once_never_pass_the_max(database: Database, world: World, starts: str, counts: dict[str, int]) -> None:
    users = [world.user() for _ in range(4)]
    group = world.group(limit(50, "credits" if counts else "image", "day", counts=counts, starts=starts))
    for user in users:
        world.api.add_member(group, user)
    kinds = ("image", "video") if counts else ("image",)

    def work(number: int) -> int:
        api = Api(database.connect())
        spent = 0
        for turn in range(20):
            kind = kinds[(number + turn) % len(kinds)]
            if turn % 5 == 4:
                answers = api.track_many([(users[turn % 4], kind, 1, str(uuid4()))] * 2 + [(users[number % 4], kind)])
            else:
                answers = [api.track(users[(number + turn) % 4], kind)]
            spent += sum((counts or {kind: 1})[kind] for a in answers if a["allowed"] and not a["replayed"])
        return spent

    with ThreadPoolExecutor(8) as pool:
        spent = sum(pool.map(work, range(8)))
    [status] = world.api.user_usage(users[0])
    assert status["used"] == spent
    assert spent == 50 if counts is None else 48 <= spent <= 50
