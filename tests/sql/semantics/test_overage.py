"""Commits of more than was reserved (DESIGN 3.7): what has happened is charged, whether it fits or not."""

from __future__ import annotations

import pytest
from tests.sql.semantics.test_contract import refused
from tests.sql.semantics.test_holds import NOON, hold, later
from tests.sql.semantics.world import World, limit


def charged(world: World) -> list[tuple[int, int, str]]:
    """Tell cost, reserved cost and status of each usage."""
    return world.owner.connection.execute(
        "select cost, reserved_cost, status from public.generation_usage order by created_at, id"
    ).fetchall()


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_it_passes_max_and_keeps_what_was_reserved(world: World, late: bool, swept: bool) -> None:
    world.at(NOON)
    user = world.user(world.group(limit(10), limit(9, period="day", scope="member")))
    usage = hold(world, user)
    later(world, 60 if late else 1)
    if swept:
        world.owner.tidy()
    world.api.track(user, "image", 5)
    answer = world.api.commit(usage, 12, "charge")
    assert (answer["status"], answer["cost"], answer["replayed"], answer["remaining"]) == ("committed", 12, False, 0)
    assert (world.used(user), world.used(user, "day", "member")) == (17, 17)
    assert charged(world)[0] == (12, 4, "committed")
    assert world.api.commit(usage, 12, "charge") == answer | {"replayed": True}
    assert world.used(user) == 17
    assert not world.api.track(user, "image")["allowed"]
    assert world.api.refund(usage)["status"] == "refunded"
    assert (world.used(user), world.used(user, "day", "member")) == (5, 5)
    assert charged(world)[0] == (12, 4, "refunded")


@pytest.mark.parametrize("cost", [None, 0, 3, 4])
def test_it_charges_what_was_reserved_or_less_too_when_there_is_no_room_left(world: World, cost: int | None) -> None:
    world.at(NOON)
    user = world.user(world.group(limit(10)))
    usage = hold(world, user)
    later(world, 60)
    world.api.track(user, "image", 10)
    assert world.api.commit(usage, cost, "charge")["status"] == "committed"
    assert world.used(user) == 10 + (4 if cost is None else cost)


def test_it_is_charged_in_its_own_periods(world: World) -> None:
    world.at(NOON)
    user = world.user(
        world.group(limit(10, period="day"), limit(50), limit(10, period="hour", starts="rolling", scope="member"))
    )
    usage = hold(world, user)
    later(world, 86400)
    world.api.track(user, "image", 1)
    assert world.api.commit(usage, 60, "charge")["status"] == "committed"
    assert (world.used(user, "day"), world.used(user, "hour", "member"), world.used(user)) == (1, 1, 61)


def test_it_takes_its_weight_of_a_pool(world: World) -> None:
    world.at(NOON)
    user = world.user(world.group(limit(10, kind="credits", counts={"image": 2})))
    usage = hold(world, user)
    answer = world.api.commit(usage, 7, "charge")
    assert [(x["kind"], x["used"]) for x in answer["limits"]] == [("credits", 14)]


@pytest.mark.parametrize("cost", [-1, 1_000_000_001])
def test_no_cost_at_all_is_refused(world: World, cost: int) -> None:
    user = world.user(world.group(limit(10)))
    usage = hold(world, user)
    with refused("TL001", "cost"):
        world.api.commit(usage, cost, "charge")
    assert charged(world) == [(4, 4, "reserved")]


@pytest.mark.parametrize("overage", ["", "CHARGE", "allow"])
def test_another_overage_is_refused(world: World, overage: str) -> None:
    user = world.user(world.group(limit(10)))
    usage = hold(world, user)
    with refused("TL001", "overage"):
        world.api.commit(usage, 4, overage)
    assert charged(world) == [(4, 4, "reserved")]


def test_a_settled_usage_is_not_charged_again(world: World) -> None:
    user = world.user(world.group(limit(10)))
    usage = hold(world, user)
    world.api.commit(usage)
    with refused("TL006", "committed"):
        world.api.commit(usage, 9, "charge")
    other = hold(world, user)
    world.api.release(other)
    with refused("TL006", "released"):
        world.api.commit(other, 9, "charge")
    assert world.used(user) == 4


def test_reports_and_reconciliation_know_it(world: World) -> None:
    world.at(NOON)
    group = world.group(limit(10), limit(10, period="day"))
    user = world.user(group)
    world.api.commit(hold(world, user), 25, "charge")
    [day] = world.owner.history(None, "day")
    assert (day["used"], day["generations"]) == (25, 1)
    assert [x["used"] for x in world.api.group_usage(group)["limits"]] == [25, 25]
    assert world.api.reconcile(group) == {"counters": [], "rollup": [], "holds": 0}
    [row] = world.owner.call("export_usage")["rows"]
    assert (row["cost"], row["status"]) == (25, "committed")
