"""The fake: groups beneath groups, whose usage counts for the limits of all above them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from tokenlimits import InvalidRequest, Limit
from tokenlimits.errors import GroupChanged, HoldExpired
from tokenlimits.models import GroupRef, TrackResult
from tokenlimits.testing import FakeTokenLimits

ANN, BOB, CYD = (f"0197f0a0-0000-7000-8000-00000000000{letter}" for letter in "abc")
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)

Limits = list[Limit]


class World:
    """A fake with an agency and its customers Acme and Beta, with Ann and Bob in these."""

    def __init__(self, agency: Limits | None = None, acme: Limits | None = None, beta: Limits | None = None) -> None:
        self.fake = FakeTokenLimits({}, users=dict.fromkeys((ANN, BOB, CYD)))
        self.fake.now = NOON
        self.groups = self.fake.groups
        self.agency = self.groups.create("Agency", limits=agency or []).id
        self.acme = self.groups.create("Acme", parent=self.agency, limits=acme or []).id
        self.beta = self.groups.create("Beta", parent=self.agency, limits=beta or []).id
        self.groups.add_member(self.acme, ANN)
        self.groups.add_member(self.beta, BOB)

    def used(self, user: str) -> list[int]:
        return [limit.used for limit in self.fake.usage(user)]

    def hold(self, user: str, ttl: int = 3600, **more: Any) -> UUID:
        usage_id = self.fake.reserve(user, "video", ttl=ttl, **more).usage_id
        assert usage_id is not None
        return usage_id


def owners(answer: TrackResult) -> list[str | None]:
    return [limit.group and limit.group.name for limit in answer.limits]


class TestTree:
    def test_a_group_has_a_parent(self) -> None:
        world = World()
        assert world.groups.get(world.acme).parent_id == world.agency
        assert world.groups.get(world.agency).parent_id is None
        assert [group.name for group in world.groups.list(parent=world.agency)] == ["Acme", "Beta"]
        assert world.groups.list(parent=world.acme) == []
        assert [group.name for group in world.groups.list(parent=world.agency, search="be")] == ["Beta"]

    def test_an_edit_leaves_a_group_where_it_is(self) -> None:
        world = World()
        assert world.groups.update(world.acme, name="Acme Ltd").parent_id == world.agency

    def test_a_move_is_an_edit_that_others_notice(self) -> None:
        world = World()
        read = world.groups.get(world.acme)
        world.fake.advance(HOUR)
        assert world.groups.update(world.acme, parent=None).parent_id is None
        with pytest.raises(GroupChanged):
            world.groups.update(world.acme, parent=world.agency, unchanged_since=read.updated_at)
        assert world.groups.get(world.acme).parent_id is None

    def test_a_child_leaves_its_parent_as_it_was(self) -> None:
        world = World()
        before = world.groups.get(world.beta)
        world.fake.advance(HOUR)
        world.groups.create("Leaf", parent=world.beta)
        assert world.groups.get(world.beta) == before

    def test_at_most_five_levels(self) -> None:
        world = World()
        path = [world.agency, world.acme]
        while len(path) < 5:
            path.append(world.groups.create(f"Level {len(path)}", parent=path[-1]).id)
        with pytest.raises(InvalidRequest, match="parent_id: groups nest at most 5 deep") as refused:
            world.groups.create("Too deep", parent=path[-1])
        assert (refused.value.code, refused.value.detail) == ("TL001", "parent_id")
        # with all that is beneath it
        other = world.groups.create("Other").id
        assert world.groups.update(path[2], parent=other).parent_id == other
        with pytest.raises(InvalidRequest, match="at most 5 deep"):
            world.groups.update(other, parent=world.acme)
        assert world.groups.get(other).parent_id is None

    def test_deleted_groups_need_no_level(self) -> None:
        world = World()
        lower = world.groups.create("Lower", parent=world.beta).id
        world.groups.delete(lower)
        top = world.groups.create("1").id
        for level in range(2, 5):
            top = world.groups.create(str(level), parent=top).id
        assert world.groups.update(world.beta, parent=top).parent_id == top

    @pytest.mark.parametrize("itself", [True, False])
    def test_no_cycles(self, itself: bool) -> None:
        world = World()
        with pytest.raises(InvalidRequest, match="parent_id: would be beneath itself") as refused:
            world.groups.update(world.agency, parent=world.agency if itself else world.acme)
        assert refused.value.detail == "parent_id"

    def test_nowhere(self) -> None:
        world = World()
        world.groups.delete(world.beta)
        for nobody in (uuid4(), world.beta):
            with pytest.raises(InvalidRequest, match=f"parent_id: there is no group {nobody}") as refused:
                world.groups.create("New", parent=nobody)
            assert refused.value.detail == "parent_id"

    def test_a_parent_or_none(self) -> None:
        world = World()
        engine, ids = world.fake._engine, {"p_group_id": str(world.acme), "p_parent_id": str(world.beta)}
        with pytest.raises(InvalidRequest, match="parent_id: pass a parent, or p_no_parent, not both"):
            engine.answer("save_group", {**ids, "p_no_parent": True})

    def test_a_group_with_children_is_not_deleted(self) -> None:
        world = World()
        with pytest.raises(InvalidRequest, match=r"group_id: has 2 child groups.*Nothing was deleted") as refused:
            world.groups.delete(world.agency)
        assert refused.value.detail == "group_id"
        world.groups.delete(world.beta)
        with pytest.raises(InvalidRequest, match="group_id: has 1 child group"):
            world.groups.delete(world.agency)
        world.groups.update(world.acme, parent=None)
        assert world.groups.delete(world.agency).id == world.agency


TEN = Limit(kind="image", max=10)
TWO_EACH = Limit(kind="image", max=2, scope="member")


class TestCounting:
    def test_usage_counts_for_all_above(self) -> None:
        world = World([TEN, TWO_EACH], [Limit(kind="image", max=5)])
        world.fake.track(BOB, "image", 1)
        answer = world.fake.track(ANN, "image", 2)
        assert answer.group == GroupRef(id=world.acme, name="Acme")
        assert [(limit.scope, limit.max, limit.used) for limit in answer.limits] == [
            ("member", 2, 2), ("group", 5, 2), ("group", 10, 3),
        ]  # fmt: skip
        assert owners(answer) == ["Agency", "Acme", "Agency"]
        assert (answer.remaining, world.used(BOB)) == (0, [1, 3])

    def test_an_answer_names_the_group_of_limits_above_alone(self) -> None:
        world = World([TEN], [TEN])
        answer = world.fake._engine.answer("check_generation", {"p_user_id": ANN, "p_kind": "image"})
        assert [limit["group"] for limit in answer["limits"]] == [None, {"id": str(world.agency), "name": "Agency"}]

    def test_a_limit_above_denies_the_group_that_would_pay(self) -> None:
        world = World([TEN])
        world.fake.track(BOB, "image", 9)
        denied = world.fake.track(ANN, "image", 2)
        assert denied.denied_by is not None
        assert (denied.group, denied.denied_by.group) == (
            GroupRef(id=world.acme, name="Acme"),
            GroupRef(id=world.agency, name="Agency"),
        )
        assert denied.error == ("Image generation limit exceeded: 9 of 10 used in Agency in total, 2 more asked for")
        assert world.fake.check(ANN, "image").allowed
        assert [usage.cost for usage in world.fake.tracked] == [9]

    def test_a_group_is_not_named_in_its_own_denials(self) -> None:
        world = World(acme=[Limit(kind="image", max=0)])
        assert world.fake.track(ANN, "image").error == "Image generation limit exceeded: 0 of 0 used in total"

    def test_a_members_limit_above_is_of_the_user_wherever_beneath(self) -> None:
        world = World([TWO_EACH])
        world.groups.add_member(world.beta, ANN)
        world.fake.track(ANN, "image", group_id=world.acme)
        world.fake.track(ANN, "image", group_id=world.beta)
        denied = world.fake.track(ANN, "image")
        assert denied.error == "Image generation limit exceeded: 2 of 2 used by this user in total"
        assert world.fake.track(BOB, "image", 2).allowed
        # through two memberships, it is the same limit
        assert [(limit.group.name, limit.used) for limit in world.fake.usage(ANN)] == [("Agency", 2)]

    def test_who_pays_is_decided_among_the_users_own_groups(self) -> None:
        world = World([TEN], beta=[Limit(kind="image", max=1)])
        world.groups.add_member(world.beta, ANN)
        world.groups.update(world.beta, priority=5)
        paid = [world.fake.track(ANN, "image").group for _ in range(2)]
        assert [group and group.name for group in paid] == ["Beta", "Acme"]
        assert [(limit.group.name, limit.used) for limit in world.fake.usage(ANN)] == [("Beta", 1), ("Agency", 2)]

    def test_the_group_that_was_joined_first_pays_first(self) -> None:
        world = World([TEN])
        world.fake.now = NOON + HOUR
        world.groups.add_member(world.acme, CYD)
        # the clock may be set back, where nothing was recorded
        world.fake.now = NOON
        world.groups.add_member(world.beta, CYD)
        paid = world.fake.track(CYD, "image").group
        assert paid is not None
        assert paid.name == "Beta"

    def test_a_group_is_entitled_by_those_above(self) -> None:
        world = World([TEN], beta=[Limit(kind="audio", max=1)])
        assert world.fake.track(ANN, "image").allowed
        assert world.fake.track(ANN, "video").reason == "no_limit_for_kind"
        other = world.groups.create("Other", priority=5).id
        world.groups.add_member(other, ANN)
        recorded = world.fake.record(ANN, "image").group
        assert recorded is not None
        assert recorded.name == "Acme"

    def test_a_limit_in_flight_above_entitles_holds_alone(self) -> None:
        world = World([Limit(kind="video", max=1, period="in_flight")])
        assert world.fake.track(ANN, "video").reason == "no_limit_for_kind"
        world.hold(ANN, ttl=600)
        denied = world.fake.reserve(BOB, "video")
        assert denied.error == (
            "Video generation limit exceeded: 1 video in progress in Agency, at most 1 at once, "
            "next place 2026-11-28 12:10 UTC"
        )

    def test_what_is_in_flight_beneath(self) -> None:
        world = World(
            [Limit(kind="video", max=3, period="in_flight")], [Limit(kind="video", max=1, period="in_flight")]
        )
        first = world.hold(ANN)
        world.hold(BOB)
        assert world.fake.reserve(ANN, "video").allowed is False
        assert world.fake.release(first).allowed
        assert world.used(BOB) == [1]
        assert world.used(ANN) == [0, 1]

    def test_pools_of_kinds(self) -> None:
        world = World([Limit(kind="credits", max=20, counts={"image": 1, "video": 8})])
        world.fake.track(BOB, "video")
        denied = world.fake.track(ANN, "video", 2)
        assert denied.error == (
            "Video generation limit exceeded: 8 of 20 credits used in Agency in total, 16 more asked for"
        )
        assert world.fake.track(ANN, "image").remaining == 11

    def test_an_observing_limit_above_denies_nothing(self) -> None:
        one, ten = (Limit(kind="image", max=most, mode="observe") for most in (1, 10))
        world = World([one], [ten])
        world.fake.track(BOB, "image")
        answer = world.fake.track(ANN, "image")
        assert answer.allowed
        # its own limit of the same kind, which has room, is another
        assert [limit.group and limit.group.name for limit in answer.would_deny] == ["Agency"]

    def test_periods_are_in_the_owners_time_zone(self) -> None:
        daily = Limit(kind="image", max=5, period="day")
        world = World([daily], [daily])
        world.groups.update(world.agency, timezone="Europe/Paris")
        midnights = [limit.reset_at for limit in world.fake.track(ANN, "image").limits]
        assert midnights == [NOON + 12 * HOUR, NOON + 11 * HOUR]

    def test_settling_moves_all_above(self) -> None:
        world = World([Limit(kind="video", max=10)])
        hold = world.hold(ANN, cost=4)
        assert world.used(BOB) == [4]
        world.fake.commit(hold, cost=12, overage="charge")
        assert world.used(BOB) == [12]
        world.fake.refund(hold)
        assert world.used(BOB) == [0]

    def test_a_late_commit_needs_room_above(self) -> None:
        world = World([Limit(kind="video", max=1)])
        hold = world.hold(ANN, ttl=60)
        world.fake.advance(HOUR)
        world.fake.track(BOB, "video")
        with pytest.raises(HoldExpired, match="no longer fits"):
            world.fake.commit(hold)

    def test_members_of_the_group_above_pay_for_themselves(self) -> None:
        world = World([TEN], [Limit(kind="image", max=0)])
        world.groups.add_member(world.agency, CYD)
        answer = world.fake.track(CYD, "image")
        assert answer.group == GroupRef(id=world.agency, name="Agency")
        assert owners(answer) == ["Agency"]
        assert world.used(BOB) == [1]

    def test_a_fake_without_limits_allows_every_kind_beneath_its_group(self) -> None:
        fake = FakeTokenLimits()
        [everyone] = fake.groups.list()
        team = fake.groups.create("Team", parent=everyone.id, limits=[Limit(kind="image", max=1)]).id
        fake.groups.add_member(team, ANN)
        assert [limit.max for limit in fake.track(ANN, "image").limits] == [1, None]
        assert fake.track(ANN, "video").allowed


class TestMovedAndDeleted:
    def test_usage_moves_along(self) -> None:
        world = World([TEN])
        leaf = world.groups.create("Leaf", parent=world.acme).id
        world.groups.add_member(leaf, CYD)
        for user in (ANN, BOB, CYD):
            world.fake.track(user, "image")
        other = world.groups.create("Other", limits=[TEN]).id
        world.groups.update(world.acme, parent=other)
        assert [world.used(user) for user in (ANN, BOB, CYD)] == [[2], [1], [2]]
        world.groups.update(world.acme, parent=None)
        assert [world.used(user) for user in (ANN, BOB)] == [[], [1]]

    def test_a_deleted_group_counts_above_for_ever(self) -> None:
        world = World([TEN, Limit(kind="video", max=10)])
        leaf = world.groups.create("Leaf", parent=world.acme).id
        world.groups.add_member(leaf, CYD)
        world.fake.track(CYD, "image", 3)
        world.groups.delete(leaf)
        assert world.used(ANN) == [3, 0]
        # also where the group above it moves
        other = world.groups.create("Other", limits=[TEN]).id
        world.groups.update(world.acme, parent=other)
        assert (world.used(ANN), world.used(BOB)) == ([3], [0, 0])
        world.groups.delete(world.acme)
        assert [limit.used for limit in world.groups.usage(other).limits] == [3]

    def test_holds_of_a_deleted_group_settle_there(self) -> None:
        world = World([Limit(kind="video", max=10)])
        committed, released = world.hold(ANN, cost=4), world.hold(ANN, cost=2)
        world.groups.delete(world.acme)
        assert world.used(BOB) == [6]
        answer = world.fake.commit(committed, cost=3)
        assert answer.group == GroupRef(id=world.acme, name=None)
        assert [(limit.group and limit.group.name, limit.used) for limit in answer.limits] == [("Agency", 5)]
        world.fake.release(released)
        assert world.used(BOB) == [3]

    def test_a_hold_of_a_deleted_group_needs_room_above_when_it_is_late(self) -> None:
        world = World([Limit(kind="video", max=1)])
        hold = world.hold(ANN, ttl=60)
        world.groups.delete(world.acme)
        world.fake.advance(HOUR)
        world.fake.track(BOB, "video")
        with pytest.raises(HoldExpired, match="no longer fits"):
            world.fake.commit(hold)

    def test_a_move_is_no_refill(self) -> None:
        world = World([TEN])
        world.fake.track(ANN, "image", 10)
        world.groups.update(world.acme, parent=None)
        world.groups.update(world.acme, parent=world.agency)
        assert not world.fake.track(ANN, "image")

    def test_windows_above_are_found_again_in_the_ledger(self) -> None:
        window = Limit(kind="image", max=10, period="5 hours", starts="first_use")
        world = World([window])
        opened = world.fake.track(ANN, "image").usage_id
        assert opened is not None
        world.fake.advance(HOUR)
        world.fake.track(BOB, "image")
        world.fake.refund(opened)
        assert world.fake.usage(BOB)[0].reset_at == NOON + 5 * HOUR
        world.groups.update(world.acme, parent=None)
        assert world.fake.usage(BOB)[0].reset_at == NOON + 6 * HOUR

    def test_a_window_found_after_a_move_stays(self) -> None:
        world = World([Limit(kind="image", max=10, period="5 hours", starts="first_use")])
        first = world.fake.track(ANN, "image").usage_id
        assert first is not None
        leaf = world.groups.create("Leaf").id
        world.groups.add_member(leaf, CYD)
        world.groups.update(leaf, parent=world.agency)
        world.fake.refund(first)
        assert world.fake.usage(ANN)[0].reset_at == NOON + 5 * HOUR

    def test_a_move_within_a_tree_leaves_what_is_above_both(self) -> None:
        window = Limit(kind="image", max=10, period="5 hours", starts="first_use")
        world = World([window])
        opened = world.fake.track(ANN, "image").usage_id
        assert opened is not None
        world.fake.advance(HOUR)
        world.fake.track(BOB, "image")
        world.fake.refund(opened)
        world.groups.update(world.acme, parent=world.beta)
        assert world.fake.usage(BOB)[0].reset_at == NOON + 5 * HOUR


class TestAnchors:
    def test_a_members_is_the_earliest_of_the_memberships_beneath(self) -> None:
        world = World([Limit(kind="image", max=5, period="month", starts="anchor", scope="member")])
        anchors = [NOON.replace(day=day) - timedelta(days=365) for day in (20, 7)]
        world.groups.set_member_anchor(world.acme, ANN, anchors[0])
        assert world.fake.usage(ANN)[0].reset_at == datetime(2026, 12, 20, 12, tzinfo=UTC)
        world.groups.add_member(world.beta, ANN, anchor_at=anchors[1])
        assert world.fake.usage(ANN)[0].reset_at == datetime(2026, 12, 7, 12, tzinfo=UTC)
        world.groups.delete(world.beta)
        assert world.fake.usage(ANN)[0].reset_at == datetime(2026, 12, 20, 12, tzinfo=UTC)

    def test_who_is_in_none_has_the_owners(self) -> None:
        world = World([Limit(kind="image", max=5, period="month", starts="anchor", scope="member")])
        world.groups.update(world.agency, anchor_at=datetime(2026, 1, 3, tzinfo=UTC))
        answer = world.fake.record(CYD, "image", group_id=world.acme)
        assert answer.limits[0].reset_at == datetime(2026, 12, 3, tzinfo=UTC)

    def test_a_pools_is_the_owners(self) -> None:
        world = World([Limit(kind="image", max=5, period="month", starts="anchor")])
        world.groups.update(world.agency, anchor_at=datetime(2026, 1, 3, tzinfo=UTC))
        world.groups.update(world.acme, anchor_at=datetime(2026, 1, 5, tzinfo=UTC))
        assert world.fake.track(ANN, "image").reset_at == datetime(2026, 12, 3, tzinfo=UTC)


class TestSpread:
    """What is used in a spread group is at home with its users."""

    def test_a_usages_home_is_in_its_id(self) -> None:
        world = World()
        spread = world.groups.create("Spread", is_spread=True, limits=[TWO_EACH])
        assert spread.is_spread
        assert not world.groups.get(world.acme).is_spread
        world.groups.add_member(spread.id, CYD)
        usage_id = world.fake.track(CYD, "image").usage_id
        assert str(usage_id)[-4:] == CYD[-4:]
        assert str(world.fake.record(ANN, "image").usage_id)[-4:] == str(world.acme)[-4:]

    def test_it_has_member_limits_only(self) -> None:
        world = World()
        with pytest.raises(InvalidRequest, match="scope: must be member in a spread group: a group limit on image"):
            world.groups.create("Spread", is_spread=True, limits=[TWO_EACH, TEN])
        assert "Spread" not in [group.name for group in world.groups.list()]
        spread = world.groups.create("Spread", is_spread=True).id
        with pytest.raises(InvalidRequest, match="a child limit on image would need one place") as refused:
            world.groups.set_limit(spread, Limit(kind="image", max=1, scope="child"))
        assert refused.value.detail == "scope"

    def test_it_is_in_a_tree_of_its_kind(self) -> None:
        world = World()
        spread = world.groups.create("Spread", is_spread=True, limits=[TWO_EACH]).id
        leaf = world.groups.create("Leaf", is_spread=True, parent=spread).id
        world.groups.add_member(leaf, CYD)
        assert world.fake.track(CYD, "image").remaining == 1
        for group, parent in ((leaf, world.agency), (world.acme, spread)):
            with pytest.raises(InvalidRequest, match="parent_id: a spread group is beneath spread groups only"):
                world.groups.update(group, parent=parent)

    def test_it_is_chosen_when_a_group_is_created(self) -> None:
        world = World()
        engine, params = world.fake._engine, {"p_group_id": str(world.acme)}
        with pytest.raises(InvalidRequest, match="is_spread: is chosen when a group is created"):
            engine.answer("save_group", {**params, "p_is_spread": True})
        assert engine.answer("save_group", {**params, "p_is_spread": False})["is_spread"] is False
