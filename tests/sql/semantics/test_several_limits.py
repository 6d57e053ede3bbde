"""Limits that differ only in how long their periods are, or where they begin: whoever edits one says which."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from tests.sql.semantics.world import World, limit

SEVERAL = [
    limit(1, period="day"),
    limit(2, period="day", starts="rolling"),
    limit(3, period="5 hours", starts="first_use"),
    limit(4, period="day", scope="member"),
]


def left(world: World, group: Any) -> list[int]:
    return sorted(x["max"] for x in world.api.group(group)["limits"])


def test_a_limit_that_could_be_one_of_several_is_not_removed(world: World) -> None:
    group = world.group(*SEVERAL)
    with pytest.raises(psycopg.Error) as error:
        world.api.call("remove_group_limit", group_id=group, kind="image")
    assert (error.value.sqlstate, error.value.diag.message_detail) == ("TL001", "period")
    assert error.value.diag.message_primary == (
        "period: group has several limits on image: 5 hours first_use, day calendar, day rolling (TL001)"
    )
    assert error.value.diag.message_hint == "Say which one by its period and starts. Nothing was changed."
    with pytest.raises(psycopg.Error) as error:
        world.api.call("remove_group_limit", group_id=group, kind="image", period="day")
    assert "image: day calendar, day rolling (" in (error.value.diag.message_primary or "")
    assert left(world, group) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("named", "others"),
    [
        ({"period": "5 hours"}, [1, 2, 4]),
        ({"starts": "first_use"}, [1, 2, 4]),
        ({"starts": "rolling"}, [1, 3, 4]),
        ({"period": "day", "starts": "calendar"}, [2, 3, 4]),
        ({"scope": "member"}, [1, 2, 3]),
        ({"period": "5 hours", "starts": "rolling"}, [1, 2, 3, 4]),
        ({"period": "week"}, [1, 2, 3, 4]),
    ],
)
def test_the_one_that_is_named_is_removed(world: World, named: dict[str, str], others: list[int]) -> None:
    group = world.group(*SEVERAL)
    world.api.call("remove_group_limit", group_id=group, kind="image", **named)
    assert left(world, group) == others


@pytest.mark.parametrize("index", range(4))
def test_an_edit_changes_the_one_with_that_period_and_start(world: World, index: int) -> None:
    group = world.group(*SEVERAL)
    world.api.call("set_group_limit", group_id=group, limit=SEVERAL[index] | {"max": 9, "mode": "observe"})
    assert left(world, group) == sorted({1, 2, 3, 4} - {index + 1} | {9})
    [edited] = [x for x in world.api.group(group)["limits"] if x["mode"] == "observe"]
    assert edited == SEVERAL[index] | {"starts": edited["starts"], "max": 9, "mode": "observe", "counts": None}


def test_an_edit_that_says_no_start_means_the_calendar(world: World) -> None:
    group = world.group(limit(2, period="day", starts="rolling"))
    world.api.set_limit(group, "image", "day", "group", 7)
    assert [(x["starts"], x["max"]) for x in world.api.group(group)["limits"]] == [("calendar", 7), ("rolling", 2)]
