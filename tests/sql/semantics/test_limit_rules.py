"""Which limits there can be: the same rules for the functions and for an admin who edits the table."""

from __future__ import annotations

import json
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from tests.sql.semantics.world import World, limit

FIFTY: Final = {f"kind{number}": number + 1 for number in range(50)}

# what is wrong with a limit, and the field that the refusal names
REFUSED: Final[dict[str, tuple[dict[str, Any], str]]] = {
    # periods
    "one of several": ({"period": "1 hour", "starts": "anchor"}, "period"),
    "no days": ({"period": "0 days", "starts": "anchor"}, "period"),
    "a leading zero": ({"period": "02 days", "starts": "anchor"}, "period"),
    "more than a year of days": ({"period": "367 days", "starts": "anchor"}, "period"),
    "several without a number": ({"period": "hours", "starts": "anchor"}, "period"),
    "a unit that there isn't": ({"period": "3 years", "starts": "anchor"}, "period"),
    "a trailing line": ({"period": "3 days\n", "starts": "anchor"}, "period"),
    "more than two years of months": ({"period": "25 months", "starts": "anchor"}, "period"),
    # where periods of that length can begin
    "several by the calendar": ({"period": "5 hours"}, "starts"),
    "several months by the calendar": ({"period": "2 months"}, "starts"),
    "a lifetime from an anchor": ({"period": "lifetime", "starts": "anchor"}, "starts"),
    "a lifetime from a first use": ({"period": "lifetime", "starts": "first_use"}, "starts"),
    "a rolling lifetime": ({"period": "lifetime", "starts": "rolling"}, "starts"),
    "a rolling month": ({"period": "month", "starts": "rolling"}, "starts"),
    "a rolling year": ({"period": "year", "starts": "rolling"}, "starts"),
    "rolling months": ({"period": "2 months", "starts": "rolling"}, "starts"),
    "months from a first use": ({"period": "2 months", "starts": "first_use"}, "starts"),
    "holds from an anchor": ({"period": "in_flight", "starts": "anchor"}, "starts"),
    "rolling holds": ({"period": "in_flight", "starts": "rolling"}, "starts"),
    # the other words
    "an unknown start": ({"starts": "monday"}, "starts"),
    "an unknown mode": ({"mode": "warn"}, "mode"),
    "an unknown scope": ({"scope": "team"}, "scope"),
    # what a pool counts
    "holds of a pool": ({"period": "in_flight", "counts": {"image": 1}}, "counts"),
    "no kinds": ({"counts": {}}, "counts"),
    "too many kinds": ({"counts": FIFTY | {"image": 1}}, "counts"),
    "a bad kind": ({"counts": {"image": 1, "Video": 1}}, "counts"),
    "a kind with a line": ({"counts": {"image\n": 1}}, "counts"),
    "a kind that is too long": ({"counts": {"k" * 33: 1}}, "counts"),
    "a weight of nothing": ({"counts": {"image": 0}}, "counts"),
    "a weight below nothing": ({"counts": {"image": -1}}, "counts"),
    "a part of a unit": ({"counts": {"image": 1, "video": 1.5}}, "counts"),
    "a weight that is too large": ({"counts": {"image": 1_000_001}}, "counts"),
    "a weight that is enormous": ({"counts": {"image": 10**400}}, "counts"),
    "a weight as text": ({"counts": {"image": "1"}}, "counts"),
    "a weight that is true": ({"counts": {"image": True}}, "counts"),
    "a weight of null": ({"counts": {"image": None}}, "counts"),
    "weights in an array": ({"counts": {"image": [1]}}, "counts"),
    "weights in an object": ({"counts": {"image": {"small": 1}}}, "counts"),
    "kinds in an array": ({"counts": ["image"]}, "counts"),
    "objects in an array": ({"counts": [{"image": 1}]}, "counts"),
    "an empty array": ({"counts": []}, "counts"),
    "kinds as text": ({"counts": "image"}, "counts"),
    "a number of kinds": ({"counts": 1}, "counts"),
    "counting true": ({"counts": True}, "counts"),
}
ACCEPTED: Final[dict[str, dict[str, Any]]] = {
    **{
        f"{period} {starts}": {"period": period, "starts": starts}
        for starts, periods in {
            "calendar": ("in_flight", "minute", "hour", "day", "week", "month", "year", "lifetime"),
            "anchor": ("minute", "day", "week", "month", "year", "2 minutes", "366 days", "2 months", "24 months"),
            "first_use": ("minute", "month", "year", "2 minutes", "366 weeks"),
            "rolling": ("minute", "week", "2 minutes", "366 hours", "366 weeks"),
        }.items()
        for period in periods
    },
    "fifty kinds": {"counts": FIFTY},
    "one kind": {"counts": {"k" * 32: 1}},
    "the heaviest": {"counts": {"image": 1, "video": 1_000_000}},
    "fifty long kinds": {"counts": {f"{'k' * 30}{number}": 1_000_000 for number in range(10, 60)}},
    "an observing one": {"mode": "observe"},
}
INSERT: Final = """
insert into public.group_limits (group_id, kind, period, starts, scope, mode, max, counts)
values (%(group)s, %(kind)s, %(period)s, %(starts)s, %(scope)s, %(mode)s, %(max)s, %(counts)s)
"""
UPDATE: Final = """
update public.group_limits
set period = %(period)s, starts = %(starts)s, scope = %(scope)s, mode = %(mode)s, max = %(max)s, counts = %(counts)s
where group_id = %(group)s and kind = %(kind)s
"""
IS_ADMIN: Final = """{"sub": "33333333-3333-4333-8333-333333333333", "app_metadata": {"role": "admin"}}"""


def edit(world: World, statement: str, group: UUID, limit: dict[str, Any]) -> int:
    """Edit the table as an admin who is signed in does."""
    whole = {"starts": "calendar", "mode": "enforce", "counts": None} | limit
    counts = None if whole["counts"] is None else json.dumps(whole["counts"])
    with world.owner.connection.transaction():
        world.owner.execute("set local role authenticated")
        world.owner.execute("select set_config('request.jwt.claims', %s, true)", [IS_ADMIN])
        return world.owner.execute(statement, {"group": group} | whole | {"counts": counts})


def refusal(error: pytest.ExceptionInfo[psycopg.Error]) -> tuple[str | None, str | None]:
    return error.value.sqlstate, error.value.diag.message_detail


@pytest.mark.parametrize("wrong", REFUSED)
def test_each_rule_is_refused_by_the_functions(world: World, wrong: str) -> None:
    fields, field = REFUSED[wrong]
    good = limit(1, "audio")
    group = world.group(good)
    given = limit(1) | fields
    with pytest.raises(psycopg.Error) as error:
        world.api.save_group(group, name="Another", limits=[good | {"max": 2}, given])
    assert refusal(error) == ("TL001", f"limits[1].{field}")
    assert (error.value.diag.message_primary or "").startswith(f"limits[1].{field}: must")
    with pytest.raises(psycopg.Error) as error:
        world.api.call("set_group_limit", group_id=group, limit=given)
    assert refusal(error) == ("TL001", f"limits[0].{field}")
    assert [(x["kind"], x["max"]) for x in world.api.group(group)["limits"]] == [("audio", 1)]


@pytest.mark.parametrize("wrong", REFUSED)
def test_each_rule_is_kept_by_the_table(world: World, wrong: str) -> None:
    fields, _ = REFUSED[wrong]
    group = world.group()
    for statement in (INSERT, UPDATE):
        with pytest.raises(psycopg.Error) as error:
            edit(world, statement, group, limit(1) | fields)
        assert error.value.sqlstate == "23514"
        if statement == INSERT:
            world.api.save_group(group, limits=[limit(1)])


@pytest.mark.parametrize("right", ACCEPTED)
def test_what_is_allowed_is_allowed_everywhere(world: World, right: str) -> None:
    given = limit(1) | ACCEPTED[right]
    stored = {"starts": "calendar", "mode": "enforce", "counts": None} | given
    saved, added, inserted = (world.group() for _ in range(3))
    world.api.save_group(saved, limits=[given])
    world.api.call("set_group_limit", group_id=added, limit=given)
    assert edit(world, INSERT, inserted, given) == 1
    for group in (saved, added, inserted):
        assert world.api.group(group)["limits"] == [stored]
