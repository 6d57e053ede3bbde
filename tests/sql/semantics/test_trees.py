"""Groups in groups (DESIGN 4.4): what is used in one counts for all above it."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from tests.sql.semantics.database import Database
from tests.sql.semantics.world import World, limit

PLAN = limit(10, scope="child")


def beneath(world: World, parent: UUID | None, *limits: dict[str, Any], **fields: Any) -> UUID:
    return world.group(*limits, **({"parent_id": parent} | fields))


def move(world: World, group: UUID, parent: UUID | None) -> None:
    world.api.save_group(group, **({"parent_id": parent} if parent else {"no_parent": True}))


def shown(world: World, group: UUID) -> dict[tuple[str, str, UUID | None], tuple[Any, ...]]:
    """Tell of each limit of a group what is used of which capacity."""
    return {
        (x["kind"], x["scope"], x["group"] and x["group"]["id"]): (x["used"], x["capacity"])
        for x in world.api.group_usage(group)["limits"]
    }


def statuses(answer: dict[str, Any]) -> list[tuple[str, int, UUID | None]]:
    return [(x["scope"], x["used"], x["group"] and x["group"]["id"]) for x in answer["limits"]]


class TestWhatCounts:
    """Each limit counts what is used in its group and in all beneath it, by its scope."""

    def test_a_group_limit_is_one_pool_for_all_beneath(self, world: World) -> None:
        top = world.group(limit(5))
        middle = beneath(world, top)
        leaves = [beneath(world, middle), beneath(world, top)]
        users = [world.user(group) for group in (top, middle, *leaves)]
        for user in users:
            assert world.api.track(user, "image")["allowed"]
        assert world.api.track(users[3], "image")["remaining"] == 0
        denied = world.api.track(users[2], "image")
        assert (denied["reason"], denied["group"]["id"]) == ("limit_exceeded", leaves[0])
        assert denied["denied_by"]["group"]["id"] == top
        assert "5 of 5 used in Group 1 in total" in denied["error"]

    def test_a_child_limit_is_a_pool_for_each_child_with_all_beneath_it(self, world: World) -> None:
        plan = world.group(PLAN)
        one, other = beneath(world, plan), beneath(world, plan)
        team = beneath(world, one)
        user, colleague, stranger = world.user(one), world.user(team), world.user(other)
        assert world.api.track(user, "image", 4)["remaining"] == 6
        assert world.api.track(colleague, "image", 6)["remaining"] == 0
        assert not world.api.track(user, "image")["allowed"]
        assert world.api.track(stranger, "image", 10)["allowed"]
        denied = world.api.track(stranger, "image")
        assert "10 of 10 used by this customer in total" in denied["error"]

    def test_a_child_limit_says_nothing_of_its_own_group(self, world: World) -> None:
        plan = world.group(PLAN)
        user = world.user(plan)
        assert world.api.track(user, "image")["reason"] == "no_limit_for_kind"
        world.api.set_limit(plan, "image", "lifetime", "group", None)
        answer = world.api.track(user, "image", 100)
        assert statuses(answer) == [("group", 100, None)]

    def test_a_member_limit_counts_one_user_wherever_beneath(self, world: World) -> None:
        top = world.group(limit(3, scope="member"))
        one, other = beneath(world, top), beneath(world, top)
        user, colleague = world.user(one, other), world.user(one)
        assert world.api.track(user, "image", 2, group_id=one)["allowed"]
        assert world.api.track(user, "image", group_id=other)["remaining"] == 0
        assert not world.api.track(user, "image", group_id=one)["allowed"]
        assert world.api.track(colleague, "image", 3)["allowed"]
        assert [(x["scope"], x["used"], x["group"]["id"]) for x in world.api.user_usage(user)] == [("member", 3, top)]

    def test_all_must_have_room_five_deep(self, world: World) -> None:
        path: list[UUID] = []
        for level in range(5):
            limits = [limit(10 - level), limit(20, scope="member"), limit(9 - level, scope="child")]
            path.append(beneath(world, path[-1] if path else None, *limits))
        with pytest.raises(psycopg.Error, match="groups nest at most 5 deep"):
            beneath(world, path[-1])
        user = world.user(path[-1])
        answer = world.api.track(user, "image", 6)
        assert [x[0] for x in statuses(answer)[:5]] == ["member"] * 5
        assert sorted(statuses(answer), key=str) == sorted(
            [
                (scope, 6, None if level == 4 else path[level])
                for level in range(5)
                for scope in ("member", "group", *(("child",) if level < 4 else ()))
            ],
            key=str,
        )
        # the pool of the fifth is as deep as its own
        assert answer["remaining"] == 0
        assert world.api.track(user, "image")["denied_by"]["max"] == 6

    def test_a_pool_with_weights_above(self, world: World) -> None:
        plan = world.group(limit(20, "credits", scope="child", counts={"image": 1, "video": 8}))
        customer = beneath(world, plan, limit(2, "video"))
        user = world.user(customer)
        assert world.api.track(user, "image", 4)["remaining"] == 16
        answer = world.api.track(user, "video", 2)
        assert (answer["allowed"], answer["remaining"]) == (True, 0)
        denied = world.api.track(user, "image")
        assert "20 of 20 credits used by this customer" in denied["error"]
        assert world.api.track(user, "video")["denied_by"]["kind"] in ("video", "credits")

    def test_the_zone_is_that_of_the_limit(self, world: World) -> None:
        world.at("2026-06-10 14:30Z")
        plan = world.group(limit(1, period="day", scope="child"), timezone="Asia/Tokyo")
        user = world.user(beneath(world, plan, timezone="America/New_York"))
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-06-10T15:00:00+00:00")
        world.at("2026-06-10 15:00Z")
        assert world.api.track(user, "image")["allowed"]

    def test_who_pays_is_decided_among_the_users_own_groups(self, world: World) -> None:
        plan = world.group(limit(1, scope="child"), priority=9)
        first, second = beneath(world, plan, priority=2), beneath(world, plan, priority=1)
        user = world.user(second, first)
        assert [world.api.track(user, "image")["group"]["id"] for _ in range(2)] == [first, second]
        assert world.api.track(user, "image")["reason"] == "limit_exceeded"

    def test_a_kind_is_inherited(self, world: World) -> None:
        plain = world.group(priority=5)
        team = beneath(world, world.group(limit(3)))
        user = world.user(plain, team)
        assert world.api.track(user, "image")["group"]["id"] == team
        assert world.api.record(user, "image")["group"]["id"] == team
        assert world.api.track(user, "video")["reason"] == "no_limit_for_kind"

    def test_what_is_recorded_is_not_of_a_plan_that_only_limits_its_customers(self, world: World) -> None:
        plan, team = world.group(PLAN, priority=5), world.group(limit(9))
        user = world.user(plan, team)
        assert world.api.record(user, "image")["group"]["id"] == team
        assert world.api.track(user, "image")["group"]["id"] == team

    def test_a_limit_that_is_added_above_counts_what_was_used(self, world: World) -> None:
        top = world.group()
        team = beneath(world, beneath(world, top), limit(None))
        user = world.user(team)
        world.api.track(user, "image", 3)
        world.api.reserve(user, "image", 2)
        world.api.set_limit(top, "image", "day", "group", 6)
        world.api.set_limit(top, "image", "day", "child", 6)
        world.api.set_limit(top, "image", "day", "member", 6)
        assert world.api.track(user, "image")["remaining"] == 0
        assert not world.api.track(user, "image")["allowed"]


class TestHolds:
    """Holds of a tree settle, expire and give back everywhere above."""

    def test_each_settlement_moves_all_pools(self, world: World) -> None:
        plan = world.group(limit(10), PLAN)
        customer = beneath(world, plan)
        user = world.user(customer)
        holds = [world.api.reserve(user, "image", 3)["usage_id"] for _ in range(3)]
        world.api.commit(holds[0], 1)
        world.api.release(holds[1])
        assert shown(world, plan)["image", "group", None] == (4, 10)
        world.api.commit(holds[2], 9, overage="charge")
        assert shown(world, plan)["image", "child", None] == (10, 10)
        assert world.api.refund(holds[2])["remaining"] == 9

    def test_the_hold_of_a_sibling_that_has_expired_leaves_room(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        plan = world.group(limit(4))
        one, other = beneath(world, plan), beneath(world, plan)
        user, stranger = world.user(one), world.user(other)
        assert world.api.reserve(user, "image", 4, ttl=60)["allowed"]
        assert not world.api.track(stranger, "image")["allowed"]
        world.at("2026-06-10 12:01Z")
        assert world.api.check(stranger, "image", 4)["allowed"]
        assert world.api.track(stranger, "image", 4)["remaining"] == 0
        assert shown(world, plan)["image", "group", None] == (4, 4)

    @pytest.mark.parametrize("room", [9, 1])
    def test_a_call_sweeps_what_its_siblings_have_left(self, world: World, room: int) -> None:
        """Admitted or denied: nobody else may ever call for them."""
        world.at("2026-06-10 12:00Z")
        plan = world.group(limit(room), limit(None, "video"))
        one, other = beneath(world, plan), beneath(world, plan)
        user, stranger = world.user(one), world.user(other)
        world.api.reserve(user, "image", 1, ttl=60)
        world.at("2026-06-10 12:01Z")
        assert world.api.track(stranger, "image", 2)["allowed"] == (room > 1)
        assert [x[-1] for x in world.recorded()][:1] == ["expired"]
        assert world.owner.one("select count(*) from tokenlimits.holds") == 0

    def test_but_not_while_their_limits_are_edited(self, world: World, database: Database) -> None:
        world.at("2026-06-10 12:00Z")
        one, other = UUID(int=0x1001), UUID(int=0x1002)
        plan = world.group(limit(9), id=UUID(int=0x1003))
        for group in (one, other):
            beneath(world, plan, id=group)
        world.api.reserve(world.user(one), "image", 1, ttl=60)
        stranger = world.user(other)
        world.at("2026-06-10 12:01Z")
        editor = database.connect("postgres")
        with editor.transaction():
            editor.execute("select tokenlimits.lock_groups(array[%s]::uuid[], true)", [one])
            assert world.api.track(stranger, "image", 9)["remaining"] == 0
            assert world.owner.one("select count(*) from tokenlimits.holds") == 1

    def test_the_expired_hold_of_a_child_leaves_room_at_the_top(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        plan = world.group(limit(4))
        user, boss = world.user(beneath(world, plan)), world.user(plan)
        world.api.reserve(user, "image", 4, ttl=60)
        world.at("2026-06-10 12:01Z")
        assert world.api.track(boss, "image", 4)["remaining"] == 0

    def test_in_flight_counts_wherever_beneath(self, world: World) -> None:
        top = world.group(
            limit(3, period="in_flight"), limit(2, period="in_flight", scope="child"), limit(9, period="day")
        )
        one, other = beneath(world, top), beneath(world, top)
        user, stranger = world.user(one), world.user(other)
        held = [world.api.reserve(user, "image", ttl=60)["usage_id"] for _ in range(2)]
        denied = world.api.reserve(user, "image")
        assert "2 images in progress by this customer, at most 2 at once" in denied["error"]
        assert world.api.reserve(stranger, "image")["allowed"]
        denied = world.api.reserve(stranger, "image")
        assert "3 images in progress in Group 1, at most 3 at once" in denied["error"]
        world.api.release(held[0])
        assert world.api.reserve(stranger, "image")["allowed"]


class TestMoving:
    """A moved group takes its usage along."""

    @pytest.mark.parametrize("scope", ["group", "child", "member"])
    def test_limits_above_are_counted_afresh_on_both_sides(self, world: World, scope: str) -> None:
        old, new = world.group(limit(9, scope=scope)), world.group(limit(9, scope=scope))
        team = beneath(world, old)
        deeper = beneath(world, team)
        user = world.user(deeper)
        rival = world.user(beneath(world, new)) if scope == "group" else None
        if rival:
            world.api.track(rival, "image")
        world.api.track(user, "image", 2)
        world.api.reserve(user, "image", 3)
        move(world, team, new)
        assert shown(world, old)["image", scope, None][0] == 0
        assert shown(world, new)["image", scope, None][0] == 5 + bool(rival)
        assert world.api.track(user, "image")["remaining"] == 3 - bool(rival)
        move(world, team, old)
        assert shown(world, new)["image", scope, None][0] == int(bool(rival))
        assert world.api.track(user, "image")["remaining"] == 2

    def test_to_the_top_and_back(self, world: World) -> None:
        top = world.group(limit(9))
        team = beneath(world, top, limit(None, scope="member"))
        user = world.user(team)
        world.api.track(user, "image", 4)
        move(world, team, None)
        assert statuses(world.api.track(user, "image", 9)) == [("member", 13, None)]
        assert shown(world, top)["image", "group", None][0] == 0
        move(world, team, top)
        assert not world.api.track(user, "image")["allowed"]

    def test_within_one_tree_the_top_is_left_alone(self, world: World) -> None:
        top = world.group(limit(9), limit(9, scope="child"))
        one, other = beneath(world, top), beneath(world, top)
        team = beneath(world, one)
        user = world.user(team)
        world.api.track(user, "image", 4)
        query = "select counter_id from public.group_limits where scope = 'group'"
        before = world.owner.one(query)
        move(world, team, other)
        assert world.owner.one(query) == before
        pools = {x["group"] and x["group"]["id"]: x["used"] for x in world.api.group_usage(other)["limits"]}
        assert pools == {top: 4}
        assert world.api.group_usage(one)["limits"][0]["used"] == 0

    def test_a_hold_goes_along(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        old, new = world.group(limit(5)), world.group(limit(5))
        team = beneath(world, old)
        user, stranger = world.user(team), world.user(beneath(world, new))
        hold = world.api.reserve(user, "image", 5, ttl=60)["usage_id"]
        move(world, team, new)
        assert not world.api.track(stranger, "image")["allowed"]
        world.at("2026-06-10 12:02Z")
        assert world.api.check(stranger, "image", 5)["allowed"]
        world.api.commit(hold, 2)
        assert world.api.track(stranger, "image", 3)["remaining"] == 0

    def test_no_circle_and_no_parent_that_isnt_there(self, world: World) -> None:
        top = world.group()
        leaf = beneath(world, beneath(world, top))
        for parent, words in ((leaf, "beneath itself"), (top, "beneath itself"), (uuid4(), "there is no group")):
            with pytest.raises(psycopg.Error, match=words) as refused:
                move(world, top, parent)
            assert (refused.value.sqlstate, refused.value.diag.message_detail) == ("TL001", "parent_id")
        chain = world.group()
        for _ in range(2):
            chain = beneath(world, chain)
        with pytest.raises(psycopg.Error, match="at most 5 deep"):
            move(world, top, chain)

    def test_in_the_table_editor_too(self, world: World) -> None:
        old, new = world.group(limit(9)), world.group(limit(9))
        team = beneath(world, old)
        user = world.user(team)
        world.api.track(user, "image", 4)
        world.api.execute("update public.user_groups set parent_id = %s where id = %s", [new, team])
        assert shown(world, new)["image", "group", None][0] == 4
        with pytest.raises(psycopg.Error, match="beneath itself"):
            world.api.execute("update public.user_groups set parent_id = %s where id = %s", [team, new])


class TestDeleting:
    """A deleted group stays where it was, for what it has used."""

    def test_its_usage_goes_on_counting_above(self, world: World) -> None:
        top = world.group(limit(9))
        team, other = beneath(world, top), beneath(world, top)
        user = world.user(team, other)
        world.api.track(user, "image", 3, group_id=team)
        hold = world.api.reserve(user, "image", 3, group_id=team)["usage_id"]
        world.api.delete_group(team)
        assert world.api.track(user, "image")["remaining"] == 2
        world.api.commit(hold, 1)
        assert shown(world, top)["image", "group", None][0] == 5
        world.api.set_limit(top, "image", "day", "group", 9)
        assert world.api.track(user, "image")["remaining"] == 3

    def test_it_moves_with_its_parent(self, world: World) -> None:
        old, new = world.group(limit(9)), world.group(limit(9))
        middle = beneath(world, old)
        team = beneath(world, middle)
        user = world.user(team)
        world.api.track(user, "image", 3)
        world.api.delete_group(team)
        move(world, middle, new)
        assert (shown(world, old)["image", "group", None][0], shown(world, new)["image", "group", None][0]) == (0, 3)

    def test_not_while_there_are_groups_beneath(self, world: World) -> None:
        top = world.group()
        children = [beneath(world, top) for _ in range(2)]
        for count in ("2 child groups", "1 child group"):
            with pytest.raises(psycopg.Error, match=rf"group_id: has {count}\b") as refused:
                world.api.delete_group(top)
            assert refused.value.sqlstate == "TL001"
            world.api.delete_group(children.pop())
        world.api.delete_group(top)

    def test_its_pool_on_the_plan_is_gone(self, world: World) -> None:
        plan = world.group(limit(9), limit(2, scope="child"))
        customer = beneath(world, plan)
        user = world.user(customer)
        hold = world.api.reserve(user, "image", 2)["usage_id"]
        world.api.delete_group(customer)
        answer = world.api.commit(hold, 5, overage="charge")
        assert statuses(answer) == [("group", 5, plan)]
        assert shown(world, plan) == {("image", "child", None): (0, 0), ("image", "group", None): (5, 9)}

    def test_a_first_child_is_no_edit_of_its_parent(self, world: World) -> None:
        top = world.group()
        [seen] = world.api.call("find_groups", group_id=top)
        leaf = beneath(world, top)
        assert world.api.save_group(top, updated_at=seen["updated_at"], description="still as it was seen")
        [seen] = world.api.call("find_groups", group_id=leaf)
        move(world, leaf, None)
        with pytest.raises(psycopg.Error, match="was changed meanwhile"):
            world.api.save_group(leaf, updated_at=seen["updated_at"], description="moved")

    def test_an_id_is_never_used_again(self, world: World) -> None:
        top = world.group()
        team = beneath(world, top)
        world.api.delete_group(team)
        with pytest.raises(psycopg.Error, match="is or was the id of another group"):
            world.group(id=team)


class TestResets:
    """A reset of a group: its own limits, and its pool on the plan; nobody else's."""

    def test_its_pool_on_the_plan_but_no_pool_above(self, world: World) -> None:
        plan = world.group(limit(20), PLAN)
        one, other = beneath(world, plan, limit(9)), beneath(world, plan)
        user, stranger = world.user(one), world.user(other)
        for each in (user, stranger):
            world.api.track(each, "image", 3)
        world.api.reset(one)
        assert shown(world, one) == {("image", "group", None): (0, 9), ("image", "child", plan): (0, 10)}
        assert shown(world, other) == {("image", "child", plan): (3, 10)}
        assert shown(world, plan)["image", "group", None] == (6, 20)
        assert [x["used"] for x in world.api.track(user, "image")["limits"]] == [1, 1, 7]

    def test_of_the_plan_leaves_pools_of_customers_alone(self, world: World) -> None:
        plan = world.group(limit(20), PLAN)
        user = world.user(beneath(world, plan))
        world.api.track(user, "image", 3)
        world.api.reset(plan)
        assert [x["used"] for x in world.api.track(user, "image")["limits"]] == [4, 1]

    def test_it_stays_with_the_group_when_that_moves(self, world: World) -> None:
        plan, better = world.group(PLAN), world.group(limit(50, scope="child"), limit(50))
        customer = beneath(world, plan)
        user = world.user(customer)
        world.api.track(user, "image", 3)
        world.api.reset(customer)
        world.api.track(user, "image", 2)
        move(world, customer, better)
        assert shown(world, customer) == {("image", "child", better): (2, 50)}
        # the pool of all counts what was used
        assert shown(world, better)["image", "group", None] == (5, 50)

    def test_of_one_member_wherever_beneath(self, world: World) -> None:
        top = world.group(limit(9, scope="member"), limit(9))
        user = world.user(beneath(world, top))
        world.api.track(user, "image", 3)
        world.api.reset(top, user_id=user)
        assert [x["used"] for x in world.api.track(user, "image")["limits"]] == [1, 4]
        assert shown(world, top)["image", "member", None][0] == 1


class TestOverrides:
    """Another max for one customer."""

    def override(self, world: World, group: UUID, child: UUID, maximum: int | None, **more: Any) -> dict[str, Any]:
        return world.api.one(
            "select public.set_limit_override(%s, 'image', %s, p_until => %s, p_child_id => %s)",
            [group, maximum, more.get("until"), child],
        )

    def test_for_that_customer_alone(self, world: World) -> None:
        plan = world.group(PLAN)
        one, other = beneath(world, plan), beneath(world, plan)
        user, stranger = world.user(one), world.user(other)
        world.api.track(user, "image", 10)
        made = self.override(world, plan, one, 15)
        assert (UUID(made["child_id"]), made["child_name"], made["user_id"], made["scope"]) == (
            one,
            "Group 2",
            None,
            "child",
        )
        assert world.api.track(user, "image")["remaining"] == 4
        assert not world.api.track(stranger, "image", 11)["allowed"]
        assert shown(world, one) == {("image", "child", plan): (11, 15)}
        assert shown(world, plan)["image", "child", None] == (11, 25)
        found = world.api.call("find_limit_overrides", group_id=plan, child_id=one)
        assert [str(x["id"]) for x in found] == [made["id"]]
        assert world.api.call("find_limit_overrides", group_id=plan, user_id=user) == []
        assert world.api.call("remove_limit_override", group_id=plan, kind="image", child_id=one)["removed"]
        assert not world.api.track(user, "image")["allowed"]

    def test_it_sleeps_while_the_customer_is_elsewhere(self, world: World) -> None:
        plan, other = world.group(PLAN), world.group(PLAN)
        customer = beneath(world, plan)
        user = world.user(customer)
        self.override(world, plan, customer, 20)
        world.api.track(user, "image", 12)
        move(world, customer, other)
        assert world.api.track(user, "image")["denied_by"]["max"] == 10
        assert world.api.call("find_limit_overrides", group_id=plan)[0]["status"] == "sleeping"
        move(world, customer, plan)
        assert world.api.track(user, "image")["remaining"] == 7
        move(world, customer, other)
        world.api.delete_group(customer)
        assert world.api.call("find_limit_overrides", group_id=plan) == []

    def test_only_for_a_child_of_the_group(self, world: World) -> None:
        plan = world.group(PLAN)
        grandchild = beneath(world, beneath(world, plan))
        with pytest.raises(psycopg.Error, match=r"child_id: .* is not directly beneath the group"):
            self.override(world, plan, grandchild, 1)
        with pytest.raises(psycopg.Error, match="there is no group"):
            self.override(world, plan, uuid4(), 1)
        with pytest.raises(psycopg.Error, match="a user or a child group, not both"):
            world.api.one(
                "select public.set_limit_override(%s, 'image', 1, p_user_id => %s, p_child_id => %s)",
                [plan, world.user(), beneath(world, plan)],
            )
        for function, more in (("find_limit_overrides", {}), ("remove_limit_override", {"kind": "image"})):
            with pytest.raises(psycopg.Error, match="a user or a child group, not both"):
                world.api.call(function, group_id=plan, user_id=uuid4(), child_id=uuid4(), **more)


class TestWindows:
    """Windows of limits above."""

    def test_a_childs_anchor_is_its_own(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        plan = world.group(limit(5, period="month", starts="anchor", scope="child"))
        one = beneath(world, plan, anchor_at="2026-05-31T00:00:00Z")
        other = beneath(world, plan)
        assert world.api.track(world.user(one), "image")["reset_at"] == datetime.fromisoformat(
            "2026-06-30T00:00:00+00:00"
        )
        user = world.user(other)
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-07-10T12:00:00+00:00")
        world.api.save_group(other, anchor_at="2026-06-10T11:00:00Z")
        assert world.api.track(user, "image")["reset_at"] == datetime.fromisoformat("2026-07-10T11:00:00+00:00")

    def test_a_members_anchor_is_that_of_the_earliest_membership_beneath(self, world: World) -> None:
        top = world.group(limit(5, period="month", starts="anchor", scope="member"))
        one, other = beneath(world, top), beneath(world, top)
        world.at("2026-06-10 12:00Z")
        user = world.user(one)
        world.at("2026-06-12 12:00Z")
        world.api.add_member(other, user)
        answer = world.api.track(user, "image", group_id=other)
        assert answer["reset_at"] == datetime.fromisoformat("2026-07-10T12:00:00+00:00")
        world.api.remove_member(one, user)
        answer = world.api.track(user, "image")
        assert (answer["reset_at"], answer["remaining"]) == (datetime.fromisoformat("2026-07-12T12:00:00+00:00"), 3)

    def test_a_move_changes_the_anchors_of_members_who_have_used_nothing_there(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        top, team = world.group(limit(5, period="month", starts="anchor", scope="member")), world.group()
        user = world.user(team)
        world.at("2026-06-12 12:00Z")
        world.api.add_member(top, user)
        world.api.track(user, "image")
        move(world, team, top)
        assert world.api.track(user, "image", group_id=top)["reset_at"] == datetime.fromisoformat(
            "2026-07-10T12:00:00+00:00"
        )

    def test_a_window_that_one_opens_is_open_for_all_beneath(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        plan = world.group(limit(3, period="5 hours", starts="first_use", scope="child"))
        customer = beneath(world, plan)
        user, colleague = world.user(customer), world.user(beneath(world, customer))
        world.api.track(user, "image", 2)
        world.at("2026-06-10 16:59Z")
        assert world.api.track(colleague, "image")["reset_at"] == datetime.fromisoformat("2026-06-10T17:00:00+00:00")
        assert not world.api.track(user, "image")["allowed"]
        world.at("2026-06-10 17:00Z")
        assert world.api.track(colleague, "image", 3)["reset_at"] == datetime.fromisoformat("2026-06-10T22:00:00+00:00")

    def test_rolling_over_all_beneath(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        top = world.group(limit(4, period="hour", starts="rolling"))
        user, stranger = world.user(beneath(world, top)), world.user(beneath(world, top))
        world.api.track(user, "image", 2)
        world.at("2026-06-10 12:30Z")
        world.api.reserve(stranger, "image", 2, ttl=600)
        denied = world.api.track(user, "image")
        assert denied["reset_at"] == datetime.fromisoformat("2026-06-10T13:01:00+00:00")
        world.at("2026-06-10 12:45Z")
        assert world.api.track(user, "image", 2)["remaining"] == 0

    def test_a_moved_group_takes_its_window_along(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        rolling = limit(9, "image", "hour", starts="rolling")
        first_use = limit(9, "image", "day", starts="first_use")
        old, new = world.group(rolling, first_use), world.group(rolling, first_use)
        team = beneath(world, old)
        user = world.user(team)
        world.api.track(user, "image", 4)
        world.at("2026-06-10 12:20Z")
        move(world, team, new)
        answer = world.api.track(user, "image")
        assert [(x["starts"], x["used"]) for x in answer["limits"]] == [("rolling", 5), ("first_use", 5)]
        assert answer["limits"][1]["reset_at"] == datetime.fromisoformat("2026-06-11T12:00:00+00:00")


class TestBatches:
    """Many requests of one tree at once."""

    def test_each_is_judged_by_what_those_before_it_have_left_above(self, world: World) -> None:
        plan = world.group(limit(7), limit(4, scope="child"))
        customers = [beneath(world, plan) for _ in range(3)]
        users = [world.user(customer) for customer in customers]
        answers = world.api.track_many([(user, "image", 2) for user in (*users, *users, users[0])])
        assert [x["allowed"] for x in answers] == [True, True, True, False, False, False, False]
        assert [x["denied_by"]["scope"] for x in answers[3:]] == ["group"] * 4
        assert [statuses(x) for x in answers[:2]] == [
            [("child", 2, plan), ("group", 2, plan)],
            [("child", 2, plan), ("group", 4, plan)],
        ]
        assert shown(world, plan)["image", "group", None] == (6, 7)

    def test_singles_say_the_same(self, world: World) -> None:
        plan = world.group(limit(7), limit(4, scope="child"), limit(5, scope="member"))
        one, other = beneath(world, plan), beneath(world, plan)
        users = [world.user(one), world.user(other), world.user(one, other)]
        script = [(user, "image", cost) for cost in (1, 2) for user in users]
        together = world.api.track_many(script)
        plan2 = world.group(limit(7), limit(4, scope="child"), limit(5, scope="member"))
        one2, other2 = beneath(world, plan2), beneath(world, plan2)
        users2 = [world.user(one2), world.user(other2), world.user(one2, other2)]
        single = [world.api.track(users2[users.index(user)], kind, cost) for user, kind, cost in script]

        def plain(answers: list[dict[str, Any]]) -> list[Any]:
            return [
                (x["allowed"], x["remaining"], [(y["scope"], y["used"], y["max"]) for y in x["limits"]])
                for x in answers
            ]

        assert plain(together) == plain(single)

    def test_busy_says_which_items_a_counter_above_holds_up(self, world: World) -> None:
        plan = world.group(limit(9))
        alone = world.group(limit(9))
        users = [world.user(beneath(world, plan)), world.user(beneath(world, plan)), world.user(alone)]
        for user in users:
            world.api.track(user, "image")
        with world.owner.connection.transaction():
            world.owner.execute("select from tokenlimits.counters where subject = %s for update", [plan])
            answers = world.api.track_many([(user, "image") for user in users], max_wait=100)
        assert [x["reason"] for x in answers] == ["busy", "busy", None]


class TestReports:
    """What admins and users see of a tree."""

    def test_a_plan_sums_its_customers_and_a_customer_sees_its_pool(self, world: World) -> None:
        plan = world.group(PLAN, limit(None, "video", scope="member"))
        one, other = beneath(world, plan), beneath(world, plan)
        user = world.user(one, other)
        world.user(other)
        world.api.track(user, "image", 3, group_id=one)
        world.api.track(user, "image", 4, group_id=other)
        world.api.track(user, "video", 5, group_id=other)
        usage = world.api.group_usage(plan)
        assert (usage["member_count"], usage["child_count"], usage["parent_id"]) == (0, 2, None)
        assert shown(world, plan) == {("image", "child", None): (7, 20), ("video", "member", None): (5, None)}
        customer = world.api.group_usage(one)
        assert (UUID(customer["parent_id"]), customer["child_count"], customer["member_count"]) == (plan, 0, 1)
        [pool] = customer["limits"]
        assert (pool["scope"], pool["used"], pool["max"], pool["remaining"], pool["fraction"]) == (
            "child",
            3,
            10,
            7,
            0.3,
        )

    def test_capacity_of_members_counts_each_once(self, world: World) -> None:
        top = world.group(limit(10, scope="member"))
        one, other = beneath(world, top), beneath(world, top)
        user = world.user(one, other)
        world.user(other)
        assert shown(world, top)["image", "member", None] == (0, 20)
        world.api.one("select public.set_limit_override(%s, 'image', 50, %s)", [top, user])
        assert shown(world, top)["image", "member", None] == (0, 60)

    def test_all_at_once_say_the_same_as_one_by_one(self, world: World) -> None:
        plan = world.group(PLAN, limit(30), limit(5, period="day", starts="rolling", scope="child"))
        groups = [plan, *(beneath(world, plan, limit(8, scope="member")) for _ in range(3))]
        for group in groups[1:]:
            world.api.track(world.user(group), "image", 2)
        world.api.reserve(world.user(groups[1]), "image", 1)
        together = {x["group"]["id"]: x for x in world.api.call("group_usage")}
        assert together == {group: world.api.group_usage(group) for group in groups}

    def test_of_groups_without_pools_beside_a_hold_that_has_expired(self, world: World) -> None:
        world.at("2026-06-10 12:00Z")
        top = world.group(limit(9))
        leaf = beneath(world, top)
        world.api.reserve(world.user(leaf), "image", 2, ttl=60)
        world.at("2026-06-10 12:01Z")
        assert shown(world, top) == {("image", "group", None): (0, 9)}
        assert shown(world, leaf) == {}

    def test_children_are_found(self, world: World) -> None:
        top = world.group()
        children = [beneath(world, top) for _ in range(2)]
        beneath(world, children[0])
        found = world.api.call("find_groups", parent_id=top)
        assert [x["id"] for x in found] == children
        assert {UUID(x["parent_id"]) for x in found} == {top}
        assert "is_nested" not in found[0]

    def test_drift_beneath_is_found_and_corrected_at_the_top(self, world: World) -> None:
        plan = world.group(limit(30), PLAN)
        user = world.user(beneath(world, plan))
        world.api.track(user, "image", 2)
        world.owner.execute("update tokenlimits.counters set used = 7")
        world.owner.execute("delete from tokenlimits.usage_rollup")
        found = world.api.reconcile(plan)
        assert sorted((x["scope"], x["was"], x["used"]) for x in found["counters"]) == [
            ("child", 7, 2),
            ("group", 7, 2),
        ]
        assert [(x["was"], x["used"]) for x in found["rollup"]] == [(0, 2)]
        assert world.api.track(user, "image")["remaining"] == 7


class TestSpread:
    """Groups whose usage is at home with their users (DESIGN 3.11)."""

    def test_ids_end_like_the_users(self, world: World) -> None:
        tier = world.group(limit(100, scope="member"), is_spread=True)
        user = world.user(beneath(world, tier, is_spread=True), tier)
        usages = [
            world.api.track(user, "image", group_id=tier),
            world.api.track(user, "image"),
            world.api.reserve(user, "image"),
            world.api.record(user, "image"),
            world.api.record(user, "audio"),
            *world.api.track_many([(user, "image"), (user, "image")]),
        ]
        assert {str(x["usage_id"])[-4:] for x in usages} == {str(user)[-4:]}
        other = world.user(world.group(limit(1)))
        answer = world.api.track(other, "image")
        assert str(answer["usage_id"])[-4:] == str(answer["group"]["id"])[-4:]

    def test_a_user_of_both_has_each_at_its_home(self, world: World) -> None:
        tier = world.group(limit(1, scope="member"), is_spread=True, priority=1)
        team = world.group(limit(1))
        user = world.user(tier, team)
        answers = [world.api.track(user, "image"), *world.api.track_many([(user, "image")])]
        assert [str(x["usage_id"])[-4:] for x in answers] == [str(user)[-4:], str(team)[-4:]]

    @pytest.mark.parametrize("scope", ["group", "child"])
    def test_it_has_no_pools(self, world: World, scope: str) -> None:
        tier = world.group(limit(1, scope="member"), is_spread=True)
        for write in (
            lambda: world.api.set_limit(tier, "image", "day", scope, 1),
            lambda: world.api.save_group(tier, limits=[limit(1, scope=scope)]),
            lambda: world.api.execute("update public.group_limits set scope = %s", [scope]),
            lambda: world.group(limit(1, scope=scope), is_spread=True),
        ):
            with pytest.raises(psycopg.Error, match="scope: must be member in a spread group") as refused:
                write()
            assert (refused.value.sqlstate, refused.value.diag.message_detail) == ("TL001", "scope")

    def test_it_is_chosen_once_and_for_a_whole_tree(self, world: World) -> None:
        tier, plain = world.group(is_spread=True), world.group()
        world.api.save_group(tier, is_spread=True, description="as it was")
        with pytest.raises(psycopg.Error, match="is_spread: is chosen when a group is created"):
            world.api.save_group(plain, is_spread=True)
        for parent, spread in ((tier, False), (plain, True)):
            with pytest.raises(psycopg.Error, match="a spread group is beneath spread groups only"):
                beneath(world, parent, is_spread=spread)
        with pytest.raises(psycopg.Error, match="a spread group is beneath spread groups only"):
            move(world, plain, tier)
