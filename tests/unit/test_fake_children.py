"""The fake: limits of scope child, of which a plan is made; resets, overrides and reports in a tree."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tokenlimits import InvalidRequest, Limit
from tokenlimits.errors import GroupNotFound
from tokenlimits.models import GroupLimitUsage
from tokenlimits.testing import FakeTokenLimits

ANN, BOB, CYD = (f"0197f0a0-0000-7000-8000-00000000000{letter}" for letter in "abc")
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)

Limits = list[Limit]
TEN_EACH = Limit(kind="image", max=10, scope="child")
FIVE_HOURS = Limit(kind="image", max=10, period="5 hours", starts="first_use")
FIVE_HOURS_EACH = FIVE_HOURS.model_copy(update={"scope": "child"})


class World:
    """A plan with the customers Acme, in which is Ann, and Beta, in whose team is Bob."""

    def __init__(self, *plan: Limit, acme: Limits | None = None, beta: Limits | None = None) -> None:
        self.fake = FakeTokenLimits({}, users=dict.fromkeys((ANN, BOB, CYD)))
        self.fake.now = NOON
        self.groups = self.fake.groups
        self.plan = self.groups.create("Plan", limits=plan).id
        self.acme = self.groups.create("Acme", parent=self.plan, limits=acme or []).id
        self.beta = self.groups.create("Beta", parent=self.plan, limits=beta or []).id
        self.team = self.groups.create("Team", parent=self.beta).id
        self.groups.add_member(self.acme, ANN)
        self.groups.add_member(self.team, BOB)

    def open_windows(self) -> None:
        """Let Bob and Ann each open a window at noon by what is given back, and use it an hour later."""
        opened = [self.fake.track(user, "image").usage_id for user in (BOB, ANN)]
        self.fake.advance(HOUR)
        for user, usage_id in zip((BOB, ANN), opened, strict=True):
            self.fake.track(user, "image")
            assert usage_id is not None
            self.fake.refund(usage_id)

    def hours(self, *users: str) -> list[float | None]:
        """Tell how many hours after noon the first limit of each resets: 6 if the window is found in the ledger."""
        resets = [self.fake.usage(user)[0].reset_at for user in users]
        return [reset_at and (reset_at - NOON) / HOUR for reset_at in resets]

    def used(self, user: str) -> list[int]:
        return [limit.used for limit in self.fake.usage(user)]

    def report(self, group: Any) -> list[tuple[str, str, int, int | None]]:
        limits: tuple[GroupLimitUsage, ...] = self.groups.usage(group).limits
        return [
            (limit.scope, limit.group.name or "" if limit.group else "", limit.used, limit.capacity) for limit in limits
        ]


class TestChildLimits:
    def test_each_child_has_a_pool_with_all_beneath_it(self) -> None:
        world = World(TEN_EACH)
        world.groups.add_member(world.beta, CYD)
        answer = world.fake.track(BOB, "image", 4)
        assert [(limit.scope, limit.used, limit.group and limit.group.name) for limit in answer.limits] == [
            ("child", 4, "Plan")
        ]
        assert answer.group is not None
        assert answer.group.name == "Team"
        world.fake.track(CYD, "image", 6)
        denied = world.fake.track(BOB, "image")
        assert denied.error == "Image generation limit exceeded: 10 of 10 used by this customer in total"
        assert world.fake.track(ANN, "image", 10).allowed

    def test_one_edit_reaches_all(self) -> None:
        world = World(TEN_EACH)
        world.groups.set_limit(world.plan, TEN_EACH.model_copy(update={"max": 3}))
        assert [world.fake.check(user, "image").remaining for user in (ANN, BOB)] == [3, 3]

    def test_the_owner_itself_is_neither_counted_nor_stopped_nor_entitled(self) -> None:
        world = World(TEN_EACH, Limit(kind="video", max=0, scope="child"), Limit(kind="video", max=5))
        world.groups.add_member(world.plan, CYD)
        assert world.fake.track(CYD, "image").reason == "no_limit_for_kind"
        assert [limit.scope for limit in world.fake.track(CYD, "video").limits] == ["group"]
        assert [limit.scope for limit in world.fake.usage(CYD)] == ["group"]
        world.fake.record(CYD, "image", 7)
        assert [user for user in (ANN, BOB) if world.used(user)[:1] != [0]] == []

    def test_an_unlimited_group_entitles_beneath_it_to_what_it_does_itself(self) -> None:
        fake = FakeTokenLimits()
        [everyone] = fake.groups.list()
        fake.groups.set_limit(everyone.id, TEN_EACH)
        assert fake.track(ANN, "image").allowed

    def test_in_flight(self) -> None:
        world = World(Limit(kind="video", max=1, period="in_flight", scope="child"))
        held = world.fake.reserve(BOB, "video", ttl=600).usage_id
        assert held is not None
        assert world.fake.reserve(BOB, "video").error == (
            "Video generation limit exceeded: 1 video in progress by this customer, at most 1 at once, "
            "next place 2026-11-28 12:10 UTC"
        )
        assert world.fake.reserve(ANN, "video").allowed
        world.fake.commit(held)
        assert world.fake.reserve(BOB, "video").allowed

    def test_rolling(self) -> None:
        world = World(Limit(kind="image", max=2, period="hour", scope="child", starts="rolling"))
        world.fake.track(BOB, "image", 2)
        world.fake.track(ANN, "image")
        room_at = NOON + HOUR + timedelta(minutes=1)
        assert world.fake.track(BOB, "image").reset_at == room_at
        world.fake.now = room_at
        assert world.used(BOB) == [0]

    def test_first_use_opens_a_window_of_each_child(self) -> None:
        world = World(Limit(kind="image", max=2, period="5 hours", scope="child", starts="first_use"))
        world.fake.track(BOB, "image")
        world.fake.advance(HOUR)
        world.fake.track(ANN, "image")
        world.fake.track(BOB, "image")
        assert [world.fake.usage(user)[0].reset_at for user in (BOB, ANN)] == [NOON + 5 * HOUR, NOON + 6 * HOUR]

    def test_an_anchor_is_the_childs(self) -> None:
        world = World(Limit(kind="image", max=2, period="month", scope="child", starts="anchor"))
        world.groups.update(world.beta, anchor_at=datetime(2026, 1, 5, tzinfo=UTC))
        world.groups.update(world.team, anchor_at=datetime(2026, 1, 7, tzinfo=UTC))
        world.groups.update(world.plan, anchor_at=datetime(2026, 1, 9, tzinfo=UTC))
        resets = [world.fake.usage(user)[0].reset_at for user in (BOB, ANN)]
        # Acme has none, so its own begin when it was created
        assert resets == [datetime(2026, 12, 5, tzinfo=UTC), datetime(2026, 12, 28, 12, tzinfo=UTC)]

    def test_a_moved_child_has_its_pool_elsewhere(self) -> None:
        world = World(TEN_EACH)
        world.fake.track(BOB, "image", 4)
        other = world.groups.create("Other", limits=[TEN_EACH.model_copy(update={"max": 20})]).id
        world.groups.update(world.beta, parent=other)
        assert [(limit.used, limit.max) for limit in world.fake.usage(BOB)] == [(4, 20)]
        world.groups.update(world.team, parent=world.plan)
        assert [(limit.used, limit.max) for limit in world.fake.usage(BOB)] == [(4, 10)]

    def test_a_moved_child_opens_its_window_anew(self) -> None:
        world = World(FIVE_HOURS_EACH)
        world.open_windows()
        world.groups.update(world.beta, parent=None)
        world.groups.update(world.beta, parent=world.plan)
        assert world.hours(BOB, ANN) == [6, 5]

    def test_a_group_in_which_nobody_is_moves_nothing(self) -> None:
        world = World(FIVE_HOURS)
        world.open_windows()
        empty = world.groups.create("Empty").id
        world.groups.update(empty, parent=world.plan)
        assert world.hours(BOB) == [5]
        # who is in it may have another anchor
        other = world.groups.create("Other").id
        world.groups.add_member(other, CYD)
        world.groups.update(other, parent=world.plan)
        assert world.hours(BOB) == [6]

    def test_a_deleted_child_has_no_pool(self) -> None:
        world = World(Limit(kind="video", max=5, scope="child"), Limit(kind="video", max=9))
        held = world.fake.reserve(BOB, "video", cost=3).usage_id
        assert held is not None
        world.groups.delete(world.team)
        assert world.report(world.beta) == [("child", "Plan", 3, 5)]
        world.groups.delete(world.beta)
        assert [limit.scope for limit in world.fake.commit(held).limits] == ["group"]
        assert world.report(world.plan) == [("child", "Plan", 0, 5), ("group", "Plan", 3, 9)]

    def test_states_are_in_order(self) -> None:
        def limits(*scopes: Any) -> Limits:
            return [Limit(kind="image", max=50, scope=scope, period=period) for period, scope in scopes]

        plan = limits(("year", "group"), ("year", "child"), ("year", "member"))
        beta = limits(("week", "group"), ("week", "child"), ("week", "member"))
        world = World(*plan, beta=beta)
        world.groups.set_limits(world.team, limits(("day", "group"), ("day", "member"), ("day", "child")))
        # those of the user by age; then those of Team, of Beta, and of the plan
        assert [(limit.scope, limit.period) for limit in world.fake.track(BOB, "image").limits] == [
            *[("member", "year"), ("member", "week"), ("member", "day")],
            *[("child", "week"), ("group", "day")],
            *[("child", "year"), ("group", "week")],
            ("group", "year"),
        ]


class TestResets:
    def test_a_groups_own_limits_and_its_pool(self) -> None:
        both = [Limit(kind="image", max=50), Limit(kind="image", max=50, scope="member")]
        world = World(TEN_EACH, *both, beta=[*both, TEN_EACH])
        world.fake.track(BOB, "image", 3)
        world.fake.track(ANN, "image", 1)
        before = [(limit.scope, limit.group.name) for limit in world.fake.usage(BOB)]
        assert before == [
            *[("member", "Plan"), ("member", "Beta"), ("child", "Beta")],
            *[("child", "Plan"), ("group", "Beta"), ("group", "Plan")],
        ]
        world.groups.reset_usage(world.beta)
        # not the plan's own, and not the pool of the team in Beta's limit
        assert world.used(BOB) == [3, 0, 3, 0, 0, 4]
        assert world.used(ANN) == [1, 1, 4]
        world.groups.reset_usage(world.plan)
        assert world.used(BOB) == [0, 0, 3, 0, 0, 0]
        assert world.used(ANN) == [0, 1, 0]

    def test_of_a_kind(self) -> None:
        world = World(TEN_EACH)
        world.fake.track(BOB, "image", 3)
        world.groups.reset_usage(world.beta, kind="video")
        assert world.used(BOB) == [3]
        world.groups.reset_usage(world.beta, kind="image")
        assert world.used(BOB) == [0]

    def test_of_a_member_leaves_pools(self) -> None:
        each = Limit(kind="image", max=50, scope="member")
        world = World(TEN_EACH, beta=[each])
        for user in (BOB, ANN):
            world.fake.track(user, "image", 3)
        world.groups.reset_usage(world.beta, user_id=BOB)
        assert (world.used(BOB), world.used(ANN)) == ([0, 3], [3])

    def test_what_happens_at_the_same_moment_beneath_was_before(self) -> None:
        world = World(TEN_EACH)
        world.fake.track(BOB, "image", 3)
        assert world.groups.reset_usage(world.beta) > NOON
        world.fake.track(BOB, "image")
        assert world.used(BOB) == [1]

    def test_stays_with_a_group_that_moves(self) -> None:
        world = World(TEN_EACH)
        world.fake.track(BOB, "image", 3)
        world.groups.reset_usage(world.beta)
        world.fake.track(BOB, "image", 2)
        other = world.groups.create("Other", limits=[TEN_EACH, Limit(kind="image", max=50)]).id
        world.groups.update(world.beta, parent=other)
        assert world.used(BOB) == [2, 5]

    def test_leaves_holds_in_flight(self) -> None:
        world = World(Limit(kind="video", max=5, period="in_flight", scope="child"))
        world.fake.reserve(BOB, "video")
        world.groups.reset_usage(world.beta)
        assert world.used(BOB) == [1]

    def test_closes_the_window_of_its_pool_alone(self) -> None:
        world = World(FIVE_HOURS_EACH)
        world.open_windows()
        world.groups.reset_usage(world.beta)
        assert world.hours(BOB, ANN) == [None, 5]

    def test_leaves_the_windows_of_its_childrens_pools(self) -> None:
        world = World(FIVE_HOURS_EACH)
        world.open_windows()
        world.groups.reset_usage(world.plan)
        assert world.hours(BOB, ANN) == [5, 5]


class TestOverrides:
    def test_of_a_child(self) -> None:
        world = World(TEN_EACH)
        override = world.groups.set_override(world.plan, "image", 20, child_id=world.beta, until=NOON + HOUR)
        assert (override.scope, override.child_id, override.child_name) == ("child", world.beta, "Beta")
        assert (override.user_id, override.email, override.status) == (None, None, "active")
        assert [world.fake.check(user, "image").remaining for user in (BOB, ANN)] == [20, 10]
        assert world.report(world.plan) == [("child", "Plan", 0, 30)]
        assert world.report(world.beta) == [("child", "Plan", 0, 20)]
        world.fake.now = NOON + HOUR
        assert world.fake.check(BOB, "image").remaining == 10

    def test_removing(self) -> None:
        world = World(TEN_EACH)
        world.groups.set_override(world.plan, "image", 20, child_id=world.beta)
        assert not world.groups.remove_override(world.plan, "image")
        assert not world.groups.remove_override(world.plan, "image", child_id=world.acme)
        assert world.groups.remove_override(world.plan, "image", child_id=world.beta)
        assert world.fake.check(BOB, "image").remaining == 10

    def test_which_there_are(self) -> None:
        member, group = (Limit(kind="image", max=50, scope=scope) for scope in ("member", "group"))
        world = World(TEN_EACH, member, group)
        world.groups.set_override(world.plan, "image", 1)
        world.groups.set_override(world.plan, "image", 2, user_id=ANN)
        for child in (world.acme, world.beta):
            world.groups.set_override(world.plan, "image", 3, child_id=child)
        assert sorted(each.max or 0 for each in world.groups.overrides(world.plan)) == [1, 2, 3, 3]
        assert [each.child_name for each in world.groups.overrides(world.plan, child_id=world.acme)] == ["Acme"]
        assert [each.max for each in world.groups.overrides(world.plan, user_id=ANN)] == [2]

    def test_sleeps_while_the_child_is_elsewhere(self) -> None:
        world = World(TEN_EACH)
        world.groups.set_override(world.plan, "image", 20, child_id=world.beta)
        world.groups.update(world.beta, parent=None)
        assert [each.status for each in world.groups.overrides(world.plan)] == ["sleeping"]
        world.groups.update(world.beta, parent=world.plan)
        assert world.fake.check(BOB, "image").remaining == 20

    def test_goes_with_the_child(self) -> None:
        world = World(TEN_EACH)
        world.groups.set_override(world.plan, "image", 20, child_id=world.acme)
        world.groups.delete(world.acme)
        assert list(world.groups.overrides(world.plan)) == []

    @pytest.mark.parametrize(
        ("whose", "error", "says"),
        [
            ("team", InvalidRequest, r"child_id: .* is not directly beneath the group"),
            ("plan", InvalidRequest, r"child_id: .* is not directly beneath the group"),
            ("nobody", GroupNotFound, "there is no group"),
        ],
    )
    def test_refuses(self, whose: str, error: type[Exception], says: str) -> None:
        world = World(TEN_EACH)
        with pytest.raises(error, match=says):
            world.groups.set_override(world.plan, "image", 1, child_id=getattr(world, whose, uuid4()))
        assert list(world.groups.overrides(world.plan)) == []

    @pytest.mark.parametrize("function", ["set_limit_override", "remove_limit_override", "find_limit_overrides"])
    def test_refuses_a_user_and_a_child(self, function: str) -> None:
        world = World(TEN_EACH)
        params = {"p_group_id": str(world.plan), "p_user_id": ANN, "p_child_id": str(world.acme)}
        named = {} if function.startswith("find") else {"p_kind": "image"}
        most = {"p_max": 1} if function.startswith("set") else {}
        with pytest.raises(InvalidRequest, match="child_id: name a user or a child group, not both") as refused:
            world.fake._engine.answer(function, params | named | most)
        assert refused.value.detail == "child_id"

    def test_without_a_child_it_is_the_group_limits(self) -> None:
        world = World(TEN_EACH)
        with pytest.raises(InvalidRequest, match=r"no such group limit on image.*for a child limit, the child"):
            world.groups.set_override(world.plan, "image", 1)


class TestReports:
    def test_of_a_plan_and_its_customers(self) -> None:
        own = Limit(kind="image", max=7, period="day")
        world = World(TEN_EACH, Limit(kind="image", max=100), acme=[own])
        world.fake.track(BOB, "image", 4)
        world.fake.track(ANN, "image", 1)
        reports = {report.group.name: report for report in world.groups.usage_all()}
        assert {
            name: (report.parent_id, report.child_count, report.member_count) for name, report in reports.items()
        } == {
            "fake": (None, 0, 0),
            "Plan": (None, 2, 0),
            "Acme": (world.plan, 0, 1),
            "Beta": (world.plan, 1, 0),
            "Team": (world.beta, 0, 1),
        }
        assert world.report(world.plan) == [("child", "Plan", 5, 20), ("group", "Plan", 5, 100)]
        assert world.report(world.acme) == [("child", "Plan", 1, 10), ("group", "Acme", 1, 7)]
        assert world.report(world.beta) == [("child", "Plan", 4, 10)]
        assert world.report(world.team) == []
        [pool] = world.groups.usage(world.beta).limits
        assert (pool.max, pool.remaining, pool.fraction, pool.reset_at) == (10, 6, 0.4, None)

    def test_of_members_beneath(self) -> None:
        world = World(Limit(kind="image", max=5, period="day", scope="member"))
        for group in (world.beta, world.team, world.acme):
            world.groups.add_member(group, CYD)
        world.fake.track(CYD, "image", 2)
        assert world.report(world.plan) == [("member", "Plan", 2, 15)]
        world.groups.set_override(world.plan, "image", 50, user_id=CYD)
        assert world.report(world.plan) == [("member", "Plan", 2, 60)]
        world.groups.reset_usage(world.plan, user_id=CYD)
        assert world.report(world.plan) == [("member", "Plan", 0, 60)]
        world.fake.track(CYD, "image", 48)
        world.fake.track(BOB, "image", 5)
        [pressure] = world.groups.limit_pressure(world.plan)
        assert [(str(member.id), member.used) for member in pressure.members] == [(CYD, 48), (BOB, 5)]

    def test_of_members_windows(self) -> None:
        world = World(Limit(kind="image", max=5, period="day", scope="member", starts="anchor"))
        world.groups.add_member(world.beta, BOB)
        world.fake.track(BOB, "image", 2)
        world.fake.track(ANN, "image", 1)
        assert world.report(world.plan) == [("member", "Plan", 3, 10)]

    @pytest.mark.parametrize("most", [10, None])
    def test_without_children_there_is_no_capacity(self, most: int | None) -> None:
        world = World()
        world.groups.set_limit(world.acme, Limit(kind="image", max=most, period="day", scope="child"))
        [report] = world.groups.usage(world.acme).limits
        assert (report.used, report.capacity, report.remaining, report.reset_at) == (0, 0, 0, None)

    def test_of_pools_that_begin_at_different_times(self) -> None:
        world = World(Limit(kind="image", max=5, period="day", scope="child", starts="first_use"))
        world.fake.track(BOB, "image", 2)
        world.fake.advance(HOUR)
        world.fake.track(ANN, "image", 1)
        [report] = world.groups.usage(world.plan).limits
        assert (report.used, report.capacity, report.reset_at) == (3, 10, None)
        [pool] = world.groups.usage(world.beta).limits
        assert (pool.used, pool.reset_at) == (2, NOON + DAY)

    def test_history_and_ranking_are_of_the_group_alone(self) -> None:
        world = World(TEN_EACH)
        world.fake.track(BOB, "image", 4)
        assert world.groups.history(group_id=world.plan) == world.groups.top_members(world.beta) == []
        assert [point.used for point in world.groups.history(group_id=world.team)] == [4]
