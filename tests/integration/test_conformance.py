"""One suite of behaviour, played on the fake and on the real thing: both must behave so, and answer the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import RFC_4122, UUID, uuid4

import psycopg
import pytest
from tests.sql.semantics.elsewhere import at_home
from tests.support import clock, invariants
from tests.support.conformance import (
    ANN,
    BOB,
    CYD,
    EMAILS,
    NOBODY,
    Colour,
    Scenario,
    World,
    fake_world,
    real_world,
)
from tests.support.postgres import PostgresServer, servers

from tokenlimits import (
    GenerationDenied,
    GenerationRequest,
    Hold,
    InvalidRequest,
    Limit,
    LimitExceeded,
    NoLimitForKind,
    NotInGroup,
    TokenLimitsError,
)
from tokenlimits._core import flows
from tokenlimits.errors import (
    AlreadySettled,
    GroupChanged,
    GroupExists,
    GroupNotFound,
    HoldExpired,
    IdempotencyConflict,
    UnknownUser,
    UsageNotFound,
)
from tokenlimits.local import LocalStack

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)

SCENARIOS: list[Any] = []
COLOURS = ("sync", "async", "batches")


def scenario(play: Scenario) -> Scenario:
    """Make it one of the scenarios."""
    SCENARIOS.extend(pytest.param(play, colour, id=f"{play.__name__}-{colour}") for colour in COLOURS)
    return play


def each(**cases: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a scenario of each case; what differs is the calendar, so that one colour is enough."""

    def add(play: Callable[..., None]) -> Callable[..., None]:
        for name, arguments in cases.items():
            SCENARIOS.append(
                pytest.param(
                    lambda world, arguments=arguments: play(world, *arguments), "sync", id=f"{play.__name__}-{name}"
                )
            )
        return play

    return add


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def team(world: World, limits: Any, *members: UUID, name: str = "Team", **fields: Any) -> UUID:
    group = world.groups.create(name, limits=limits, **fields)
    for member in members or (ANN,):
        world.groups.add_member(group.id, member)
    return group.id


def used(world: World, user: UUID = ANN) -> list[int]:
    return [limit.used for limit in world.limits.usage(user)]


def refused(error: type[TokenLimitsError], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    assert type(raised.value) is error
    return raised.value


def day(max_: int | None, scope: Any = "group", kind: str = "image") -> Limit:
    return Limit(kind=kind, max=max_, period="day", scope=scope)


# What a call answers


@scenario
def allowed_until_the_limit_then_denied(world: World) -> None:
    group = team(world, {"image": 2})
    first = world.limits.track(ANN, "image")
    assert first
    assert (first.allowed, first.reason, first.error, first.status) == (True, None, None, "committed")
    assert (first.remaining, first.reset_at, first.retry_after, first.replayed) == (1, None, None, False)
    assert first.group is not None
    assert (first.group.id, first.group.name, first.kind, first.cost) == (group, "Team", "image", 1)
    assert first.limits[0].model_dump() == {
        "kind": "image",
        "period": "lifetime",
        "starts": "calendar",
        "scope": "group",
        "mode": "enforce",
        "max": 2,
        "used": 1,
        "remaining": 1,
        "reset_at": None,
        "weight": 1,
        "group": {"id": group, "name": "Team"},
    }
    second = world.limits.track(str(ANN), "image").raise_if_denied()
    assert (second.remaining, second.usage_id == first.usage_id) == (0, False)

    denied = world.limits.track(ANN, "image")
    assert not denied
    assert (denied.reason, denied.usage_id, denied.status) == ("limit_exceeded", None, None)
    assert denied.error == "Image generation limit exceeded: 2 of 2 used in total"
    assert (denied.denied_by, denied.remaining, denied.reset_at) == (denied.limits[0], 0, None)
    assert used(world) == [2]
    assert refused(LimitExceeded, denied.raise_if_denied).result == denied


@scenario
def many_at_once(world: World) -> None:
    group = world.groups.create("Pro", limits=[Limit(kind="image", max=5), Limit(kind="image", max=3, scope="member")])
    for user in (ANN, BOB):
        world.groups.add_member(group.id, user)
    assert world.limits.track_many([]) == []
    world.limits.track(ANN, "image", idempotency_key="before")
    requests = [
        GenerationRequest(user_id=ANN, kind="image", cost=2, metadata={"job": 1}),
        GenerationRequest(user_id=ANN, kind="image"),
        GenerationRequest(user_id=ANN, kind="image", cost=2, idempotency_key="before"),
        GenerationRequest(user_id=ANN, kind="image", group_id=NOBODY),
        {"user_id": str(BOB), "kind": "image", "idempotency_key": "mine"},
        GenerationRequest(user_id=BOB, kind="image", idempotency_key="mine"),
        GenerationRequest(user_id=BOB, kind="audio"),
        GenerationRequest(user_id=NOBODY, kind="image"),
        GenerationRequest(user_id=BOB, kind="image", cost=2),
    ]
    results = world.limits.track_many(requests)
    refused = ["refused"] * 2
    denied = ["no_limit_for_kind", "not_in_group", "limit_exceeded"]
    assert [result.reason for result in results] == [None, "limit_exceeded", *refused, None, None, *denied]
    assert [result.replayed for result in results[4:6]] == [False, True]
    assert results[5].remaining == 1
    for result, error in zip(results[2:4], (IdempotencyConflict, GroupNotFound), strict=True):
        assert not result
        with pytest.raises(error):
            result.raise_if_denied()
    with pytest.raises(InvalidRequest) as bad:
        world.limits.track_many([*requests, {"user_id": ANN, "kind": "image", "cost": 0}])
    assert bad.value.field == "requests[9].cost"
    assert [limit.used for limit in world.groups.usage(group.id).limits] == [4, 4]


@scenario
def says_when_there_will_be_room(world: World) -> None:
    team(world, [day(1, "member")], timezone="America/New_York")
    world.at(utc("2026-06-30T22:30:00.25"))
    assert world.limits.track(ANN, "image").reset_at == utc("2026-07-01T04:00")
    denied = world.limits.track(ANN, "image")
    assert denied.reset_at == utc("2026-07-01T04:00")
    assert denied.retry_after == 5.5 * 3600
    assert denied.error == (
        "Image generation limit exceeded: 1 of 1 used by this user today, resets 2026-07-01 00:00 America/New_York"
    )


@scenario
def speaks_of_costs_and_kinds(world: World) -> None:
    team(world, [Limit(kind="gpu_second", max=10, period="month")])
    assert world.limits.track(ANN, "gpu_second", 7).remaining == 3
    denied = world.limits.track(ANN, "gpu_second", cost=4)
    assert denied.error == (
        "Gpu second generation limit exceeded: 7 of 10 used this month, 4 more asked for, resets 2026-04-01 00:00 UTC"
    )
    assert world.limits.track(ANN, "gpu_second", cost=2).remaining == 1
    assert "7 of 10" not in world.limits.track(ANN, "gpu_second", cost=2).error
    assert ", 2 more asked for, resets" in world.limits.check(ANN, "gpu_second", cost=2).error


@scenario
def what_can_never_fit_waits_for_ever(world: World) -> None:
    team(world, [day(5)])
    denied = world.limits.track(ANN, "image", 6)
    assert (denied.reset_at, denied.retry_after, denied.remaining) == (None, None, 5)
    assert denied.denied_by.reset_at is None
    assert denied.limits[0].reset_at == utc("2026-03-15T00:00")
    assert denied.error == "Image generation limit exceeded: 0 of 5 used today, 6 more asked for"


@scenario
def all_limits_or_none(world: World) -> None:
    team(world, [day(5, "member"), Limit(kind="image", max=2), Limit(kind="image", max=9, period="hour")], ANN, BOB)
    assert world.limits.track(ANN, "image", 2)
    denied = world.limits.track(BOB, "image")
    assert (denied.denied_by.period, denied.denied_by.scope) == ("lifetime", "group")
    assert used(world, BOB) == [0, 2, 2]
    assert used(world, ANN) == [2, 2, 2]


@scenario
def names_the_limit_that_has_room_last(world: World) -> None:
    limits = [Limit(kind="image", max=1, period=period) for period in ("minute", "month", "week", "day")]
    team(world, limits)
    assert world.limits.track(ANN, "image")
    denied = world.limits.track(ANN, "image")
    assert denied.denied_by.period == "month"
    assert denied.reset_at == utc("2026-04-01T00:00")


@scenario
def remaining_is_of_the_tightest_limit(world: World) -> None:
    team(world, [Limit(kind="image", max=None, period="hour"), day(9), Limit(kind="image", max=4, period="week")])
    result = world.limits.track(ANN, "image")
    assert (result.remaining, result.reset_at) == (3, utc("2026-03-16T00:00"))


@scenario
def unlimited(world: World) -> None:
    team(world, [day(None), day(None, "member")])
    result = world.limits.track(ANN, "image", 1_000_000_000)
    assert (result.allowed, result.remaining, result.reset_at) == (True, None, None)
    assert [(limit.used, limit.remaining) for limit in result.limits] == [(1_000_000_000, None)] * 2


@scenario
def what_somebody_else_changed_is_not_overwritten(world: World) -> None:
    made = world.groups.create("Pro", limits={"image": 1})
    world.wait(minutes=1)
    changed = world.groups.set_limit(made.id, Limit(kind="image", max=2))
    refused(GroupChanged, world.groups.update, made.id, limits={"image": 9}, unchanged_since=made.updated_at)
    world.groups.update(made.id, limits={"image": 9}, unchanged_since=changed.updated_at)
    # also within the same moment
    refused(GroupChanged, world.groups.update, made.id, name="Max", unchanged_since=changed.updated_at)
    removed = world.groups.remove_limit(made.id, "image")
    world.groups.update(made.id, name="Max", unchanged_since=removed.updated_at)


@scenario
def blocked(world: World) -> None:
    team(world, {"image": 0})
    denied = world.limits.track(ANN, "image")
    assert denied.error == "Image generation limit exceeded: 0 of 0 used in total"
    assert (denied.remaining, denied.reset_at) == (0, None)


@scenario
def in_no_group(world: World) -> None:
    denied = world.limits.track(NOBODY, "image")
    assert (denied.reason, denied.group, denied.limits, denied.remaining) == ("not_in_group", None, (), None)
    assert denied.error == "The user is in no group that may pay for this"
    refused(NotInGroup, denied.raise_if_denied)


@scenario
def no_limit_for_the_kind(world: World) -> None:
    team(world, {"image": 1})
    denied = world.limits.track(ANN, "long_video")
    assert (denied.reason, denied.group, denied.denied_by) == ("no_limit_for_kind", None, None)
    assert denied.error == "None of the user's groups has a limit for long video generations, so none is allowed"
    refused(NoLimitForKind, denied.raise_if_denied)


@scenario
def checking_records_nothing(world: World) -> None:
    team(world, [day(2), Limit(kind="image", max=3, scope="member")])
    looked = world.limits.check(ANN, "image")
    assert (looked.allowed, looked.usage_id, looked.status, looked.remaining) == (True, None, None, 2)
    assert used(world) == [0, 0]
    world.limits.track(ANN, "image", 2)
    denied = world.limits.check(ANN, "image")
    assert denied.model_dump() == world.limits.track(ANN, "image").model_dump()
    assert world.limits.check(ANN, "video").reason == "no_limit_for_kind"
    assert world.limits.check(NOBODY, "image").reason == "not_in_group"
    assert isinstance(refused(LimitExceeded, denied.raise_if_denied), GenerationDenied)


# Who pays


@scenario
def members_have_their_own_and_share_the_groups(world: World) -> None:
    team(world, [day(2, "member"), day(3)], ANN, BOB)
    assert [bool(world.limits.track(ANN, "image")) for _ in range(3)] == [True, True, False]
    assert world.limits.track(BOB, "image").remaining == 0
    denied = world.limits.track(BOB, "image")
    assert (denied.denied_by.scope, denied.denied_by.used) == ("group", 3)
    assert used(world, ANN) == [2, 3]
    assert used(world, BOB) == [1, 3]


@scenario
def groups_pay_by_priority_then_by_joining(world: World) -> None:
    second = team(world, {"image": 1}, CYD, name="Second")
    third = team(world, {"image": 1}, name="Third")
    world.wait(seconds=1)
    world.groups.add_member(second, ANN)
    first = team(world, {"image": 1}, name="First", priority=5)
    last = team(world, {"image": 1}, name="Last", priority=-1)
    payers = [world.limits.track(ANN, "image").group.id for _ in range(4)]
    assert payers == [first, third, second, last]
    assert [limit.group.name for limit in world.limits.usage(ANN)] == ["First", "Third", "Second", "Last"]

    world.groups.remove_member(third, ANN)
    world.wait(seconds=1)
    world.groups.add_member(third, ANN)
    assert [limit.group.name for limit in world.limits.usage(ANN)] == ["First", "Second", "Third", "Last"]


@scenario
def the_first_group_with_room_for_the_whole_cost_pays(world: World) -> None:
    team(world, {"image": 3}, name="Small", priority=1)
    big = team(world, {"image": 10}, name="Big")
    assert world.limits.track(ANN, "image", 4).group.id == big
    assert world.limits.track(ANN, "image", 3).group.name == "Small"
    team(world, {"video": 9}, name="Video alone", priority=9)
    assert world.limits.track(ANN, "image", 6).group.id == big


@scenario
def the_denial_is_of_the_group_that_has_room_first(world: World) -> None:
    team(world, [Limit(kind="image", max=0, period="month")], name="Month", priority=9)
    team(world, [Limit(kind="image", max=1, period="week")], name="Week", priority=2)
    team(world, [day(1), Limit(kind="image", max=9, period="month")], name="Day", priority=1)
    assert [world.limits.track(ANN, "image").group.name for _ in range(3)] == ["Week", "Day", "Day"]
    denied = world.limits.track(ANN, "image")
    assert (denied.denied_by.period, denied.reset_at) == ("day", utc("2026-03-15T00:00"))
    assert len(denied.limits) == 2


@scenario
def of_groups_that_have_room_at_the_same_time_the_first_is_named(world: World) -> None:
    team(world, [day(1)], name="Second", priority=1)
    team(world, [day(1)], name="First", priority=2)
    assert [world.limits.track(ANN, "image").group.name for _ in range(3)] == ["First", "Second", "First"]


@scenario
def pinned_to_a_group(world: World) -> None:
    rich = team(world, {"image": 9}, name="Rich", priority=9)
    poor = team(world, {"image": 1}, name="Poor")
    other = team(world, {"image": 9}, BOB, name="Other")
    assert world.limits.check(ANN, "image").group.id == rich
    assert world.limits.check(ANN, "image", group_id=str(poor)).group.id == poor
    assert world.limits.track(ANN, "image", group_id=poor).group.id == poor
    assert world.limits.track(ANN, "image", group_id=poor).reason == "limit_exceeded"
    assert world.limits.track(ANN, "video", group_id=poor).reason == "no_limit_for_kind"
    assert world.limits.track(ANN, "image", group_id=other).reason == "not_in_group"
    assert world.limits.track(NOBODY, "image", group_id=other).reason == "not_in_group"
    for user in (ANN, NOBODY):
        for ask in (world.limits.track, world.limits.check):
            assert refused(GroupNotFound, ask, user, "image", group_id=NOBODY).code == "TL002"


@scenario
def newcomers_are_judged_by_the_default_group(world: World) -> None:
    free = world.groups.create("Free", limits=[day(1, "member"), day(3)], is_default=True)
    assert world.limits.check(ANN, "image").group.id == free.id
    assert world.limits.track(ANN, "image").remaining == 0
    assert world.limits.track(NOBODY, "image", group_id=free.id)
    assert world.limits.track(ANN, "image").denied_by.scope == "member"
    assert [limit.group.name for limit in world.limits.usage(BOB)] == ["Free", "Free"]
    assert world.groups.usage(free.id).member_count == 0

    pro = team(world, {"video": 5}, ANN, name="Pro")
    assert world.limits.track(ANN, "image").reason == "no_limit_for_kind"
    assert world.limits.track(ANN, "image", group_id=free.id).reason == "not_in_group"
    world.groups.remove_member(pro, ANN)
    assert used(world, ANN) == [1, 2]


@scenario
def the_default_moves(world: World) -> None:
    one = world.groups.create("One", limits={"image": 1}, is_default=True)
    two = world.groups.create("Two", limits={"image": 1}, is_default=True)
    assert [world.groups.get(group.id).is_default for group in (one, two)] == [False, True]
    assert world.groups.update(one.id, is_default=True).is_default
    assert [group.is_default for group in world.groups.list()] == [True, False]
    assert world.limits.check(ANN, "image").group.id == one.id
    refused(GroupExists, world.groups.create, "TWO", is_default=True)
    assert world.groups.get(one.id).is_default
    world.groups.update(one.id, is_default=False)
    assert world.limits.check(ANN, "image").reason == "not_in_group"


# Periods

ENDS = {
    "minute": utc("2026-03-14T15:10"),
    "hour": utc("2026-03-14T15:15"),
    "day": utc("2026-03-14T18:15"),
    "week": utc("2026-03-15T18:15"),
    "month": utc("2026-03-31T18:15"),
}


@each(**{period: [period] for period in ENDS})
def a_period_ends(world: World, period: Any) -> None:
    limits = [Limit(kind="image", max=2, period=period, scope=scope) for scope in ("group", "member")]
    group = team(world, limits, timezone="Asia/Kathmandu")
    assert world.limits.track(ANN, "image", 2).reset_at == ENDS[period]
    world.at(ENDS[period] - timedelta(microseconds=1))
    denied = world.limits.track(ANN, "image")
    assert (denied.reset_at, denied.retry_after) == (ENDS[period], 1)
    assert [limit.used for limit in world.groups.usage(group).limits] == [2, 2]
    world.at(ENDS[period])
    assert used(world) == [0, 0]
    assert [limit.used for limit in world.groups.usage(group).limits] == [0, 0]
    result = world.limits.track(ANN, "image")
    assert result.remaining == 1
    assert result.reset_at > ENDS[period]


@scenario
def a_lifetime_never_ends(world: World) -> None:
    team(world, [Limit(kind="image", max=1), Limit(kind="image", max=1, scope="member")])
    world.limits.track(ANN, "image")
    world.wait(days=40_000)
    denied = world.limits.track(ANN, "image")
    assert (denied.reset_at, denied.remaining, [limit.used for limit in denied.limits]) == (None, 0, [1, 1])


CALENDARS = {
    # zone, moment, period, when it resets
    "spring": ("Europe/Paris", "2026-03-28T23:30", "day", "2026-03-29T22:00"),
    "autumn": ("Europe/Paris", "2026-10-24T22:30", "day", "2026-10-25T23:00"),
    "midnight_twice": ("America/Havana", "2026-11-01T04:30", "day", "2026-11-02T05:00"),
    "midnight_again": ("America/Havana", "2026-11-01T05:30", "day", "2026-11-02T05:00"),
    "midnight_soon": ("America/Havana", "2026-11-01T03:59", "day", "2026-11-01T04:00"),
    "no_midnight": ("America/Havana", "2026-03-08T04:59", "day", "2026-03-08T05:00"),
    "after_no_midnight": ("America/Havana", "2026-03-08T05:00", "day", "2026-03-09T04:00"),
    "azores": ("Atlantic/Azores", "2026-10-25T00:30", "day", "2026-10-26T01:00"),
    "hour_twice": ("Europe/Paris", "2026-10-25T00:30", "hour", "2026-10-25T01:00"),
    "hour_again": ("Europe/Paris", "2026-10-25T01:30", "hour", "2026-10-25T02:00"),
    "half_an_hour_twice": ("Australia/Lord_Howe", "2026-04-04T15:10", "hour", "2026-04-04T16:00"),
    "the_hour_that_is_half": ("Australia/Lord_Howe", "2026-04-05T13:10", "hour", "2026-04-05T13:30"),
    "week": ("America/New_York", "2026-03-08T12:00", "week", "2026-03-09T04:00"),
    "week_over_new_year": ("Pacific/Auckland", "2026-12-31T22:00", "week", "2027-01-03T11:00"),
    "leap_month": ("Pacific/Kiritimati", "2028-02-29T09:59", "month", "2028-02-29T10:00"),
    "december": ("Pacific/Pago_Pago", "2026-12-31T23:00", "month", "2027-01-01T11:00"),
}


@each(**CALENDARS)
def calendars(world: World, zone: str, moment: str, period: Any, ends: str) -> None:
    world.at(utc(moment))
    team(world, [Limit(kind="image", max=1, period=period)], timezone=zone)
    assert world.limits.track(ANN, "image").reset_at == utc(ends)
    assert not world.limits.track(ANN, "image")
    world.at(utc(ends))
    assert world.limits.track(ANN, "image")


# Retrying


@scenario
def a_repeated_call_charges_once(world: World) -> None:
    group = team(world, {"image": 5})
    first = world.limits.track(ANN, "image", 3, idempotency_key="job", group_id=group, metadata={"prompt": "a cat"})
    again = world.limits.track(ANN, "image", 3, idempotency_key="job", group_id=group)
    assert (first.replayed, again.replayed) == (False, True)
    assert again.model_dump(exclude={"replayed"}) == first.model_dump(exclude={"replayed"})
    assert used(world) == [3]
    world.limits.track(ANN, "image", 2)
    full = world.limits.track(ANN, "image", 3, idempotency_key="job", group_id=group)
    assert (full.allowed, full.replayed, full.usage_id, full.remaining) == (True, True, first.usage_id, 0)


@scenario
def a_key_is_for_one_request(world: World) -> None:
    group = team(world, {"image": 9, "video": 9}, ANN, BOB)
    world.limits.track(ANN, "image", 2, idempotency_key="job")
    for request in (
        {"kind": "video", "cost": 2},
        {"kind": "image", "cost": 1},
        {"kind": "image", "cost": 2, "group_id": group},
    ):
        assert refused(IdempotencyConflict, world.limits.track, ANN, idempotency_key="job", **request).code == "TL008"
    refused(IdempotencyConflict, world.limits.record, ANN, "image", 2, idempotency_key="job")
    assert not world.limits.track(BOB, "image", 2, idempotency_key="job").replayed
    assert used(world) == [4, 0]


@scenario
def a_conflict_is_found_where_there_is_no_room(world: World) -> None:
    team(world, {"image": 1})
    world.limits.track(ANN, "image", idempotency_key="job")
    refused(IdempotencyConflict, world.limits.track, ANN, "image", 2, idempotency_key="job")
    refused(IdempotencyConflict, world.limits.track, ANN, "video", idempotency_key="job")


@scenario
def a_denial_is_not_remembered(world: World) -> None:
    group = team(world, {"image": 0})
    assert not world.limits.track(ANN, "image", idempotency_key="job")
    world.groups.set_limits(group, {"image": 5})
    assert not world.limits.track(ANN, "image", 2, idempotency_key="job").replayed


@scenario
def a_repeated_call_is_answered_when_the_world_has_changed(world: World) -> None:
    group = team(world, {"image": 5})
    tracked = world.limits.track(ANN, "image", idempotency_key="tracked", group_id=group)
    recorded = world.limits.record(ANN, "image", idempotency_key="recorded")
    world.groups.set_limits(group, {"video": 1})
    assert world.limits.track(ANN, "image", idempotency_key="tracked", group_id=group).limits == ()
    world.groups.delete(group)
    again = world.limits.track(ANN, "image", idempotency_key="tracked", group_id=group)
    assert (again.usage_id, again.replayed) == (tracked.usage_id, True)
    assert (again.group.id, again.group.name) == (group, None)
    assert world.limits.record(ANN, "image", idempotency_key="recorded").usage_id == recorded.usage_id


# Recording


@scenario
def recording_is_never_denied(world: World) -> None:
    group = team(world, [day(2)])
    result = world.limits.record(ANN, "image", 3)
    assert (result.allowed, result.status, result.remaining) == (True, "committed", 0)
    assert (result.limits[0].used, result.limits[0].remaining) == (3, 0)
    assert world.groups.usage(group).limits[0].fraction == 1.5
    denied = world.limits.track(ANN, "image")
    assert denied.error == "Image generation limit exceeded: 3 of 2 used today, resets 2026-03-15 00:00 UTC"


@scenario
def what_was_recorded_counts_in_its_own_period(world: World) -> None:
    group = team(world, [day(9), day(9, "member"), Limit(kind="image", max=9, period="month")])
    result = world.limits.record(ANN, "image", 2, created_at=world.now - timedelta(days=1))
    assert sorted(limit.used for limit in result.limits) == [0, 0, 2]
    world.limits.record(ANN, "image", 4, created_at=world.now - timedelta(days=60))
    world.limits.record(ANN, "image", 1, created_at=world.now - timedelta(hours=1))
    assert sorted(used(world)) == [1, 1, 3]
    world.groups.set_limit(group, Limit(kind="image", max=None))
    assert max(used(world)) == 7


@scenario
def nothing_is_recorded_in_the_future(world: World) -> None:
    world.at(utc("2026-03-14T23:59:30"))
    team(world, [day(9)])
    assert world.limits.record(ANN, "image", created_at=world.now + timedelta(seconds=60)).remaining == 8
    late = world.now + timedelta(seconds=60, microseconds=1)
    assert refused(InvalidRequest, world.limits.record, ANN, "image", created_at=late).field == "created_at"
    assert used(world) == [1]
    world.wait(seconds=59)
    assert used(world) == [0]


@scenario
def which_group_is_recorded_on(world: World) -> None:
    assert refused(InvalidRequest, world.limits.record, ANN, "image").field == "group_id"
    refused(GroupNotFound, world.limits.record, ANN, "image", group_id=NOBODY)
    team(world, {"video": 1}, name="First", priority=2)
    assert world.limits.record(ANN, "image").group.name == "First"
    team(world, {"image": 1}, name="Entitling", priority=1)
    assert world.limits.record(ANN, "image").group.name == "Entitling"
    strange = team(world, {"image": 1}, BOB, name="Strange")
    assert world.limits.record(ANN, "image", group_id=strange).group.name == "Strange"
    assert world.limits.check(BOB, "image").remaining == 0
    assert world.limits.record(ANN, "audio").limits == ()


@scenario
def a_repeated_record_is_one(world: World) -> None:
    team(world, {"image": 9})
    yesterday = world.now - timedelta(days=1)
    first = world.limits.record(ANN, "image", created_at=yesterday, idempotency_key="import-1")
    again = world.limits.record(ANN, "image", idempotency_key="import-1")
    assert (again.usage_id, again.replayed) == (first.usage_id, True)
    refused(IdempotencyConflict, world.limits.track, ANN, "image", idempotency_key="import-1")
    assert used(world) == [1]


# Editing limits


@scenario
def lowering_a_limit_keeps_what_is_used(world: World) -> None:
    group = team(world, {"image": 9})
    world.limits.track(ANN, "image", 5)
    world.groups.set_limit(group, Limit(kind="image", max=3))
    assert world.limits.check(ANN, "image").denied_by.used == 5
    world.groups.set_limit(group, Limit(kind="image", max=6))
    assert world.limits.track(ANN, "image").remaining == 0
    world.groups.set_limits(group, {"image": 7, "video": 1})
    assert used(world) == [6, 0]


@scenario
def limits_that_stay_keep_their_place(world: World) -> None:
    limits = [Limit(kind="image", max=5, period=period) for period in ("month", "day", "week")]
    group = team(world, limits)
    world.groups.set_limits(group, [Limit(kind="image", max=5, period="hour"), *reversed(limits)])
    assert [limit.period for limit in world.limits.track(ANN, "image").limits] == ["month", "day", "week", "hour"]


@scenario
def a_new_limit_counts_what_was_used_before(world: World) -> None:
    group = team(world, {"image": 9}, ANN, BOB)
    world.limits.track(ANN, "image", 2)
    world.wait(days=1)
    world.limits.track(BOB, "image", 3)
    world.groups.set_limit(group, day(4))
    world.groups.set_limit(group, day(4, "member"))
    assert sorted(used(world, ANN)) == [0, 3, 5]
    assert sorted(used(world, BOB)) == [3, 3, 5]
    assert "day calendar, lifetime calendar" in str(refused(InvalidRequest, world.groups.remove_limit, group, "image"))
    world.groups.remove_limit(group, "image", period="lifetime")
    world.groups.remove_limit(group, "image", scope="member")
    world.limits.track(BOB, "image")
    assert world.limits.track(BOB, "image").denied_by.used == 4
    world.groups.set_limits(group, [Limit(kind="image", max=50, period="month", scope="member")])
    assert used(world, BOB) == [4]
    assert used(world, ANN) == [2]


@scenario
def limits_are_a_set(world: World) -> None:
    group = team(world, {"image": 9})
    edited = world.groups.set_limit(group, Limit(kind="audio", max=None, period="week", scope="member"))
    assert [(limit.kind, limit.max) for limit in edited.limits] == [("audio", None), ("image", 9)]
    same = world.groups.remove_limit(group, "image", period="day")
    assert same.limits == edited.limits
    assert [limit.kind for limit in world.groups.remove_limit(group, "image").limits] == ["audio"]
    assert world.groups.set_limits(group, {}).limits == ()
    limits = [
        Limit(kind="image", max=1, period=period, scope=scope) for period in ENDS for scope in ("group", "member")
    ]
    world.groups.set_limits(group, reversed(limits))
    shown = [(limit.scope, limit.period) for limit in world.groups.get(group).limits]
    assert shown == [(scope, period) for scope in ("group", "member") for period in ENDS]
    twice = [Limit(kind="image", max=1), Limit(kind="image", max=2)]
    assert refused(InvalidRequest, world.groups.set_limits, group, twice).field == "limits[1]"
    assert len(world.groups.get(group).limits) == 10


@scenario
def another_time_zone_counts_afresh(world: World) -> None:
    world.at(utc("2026-03-14T23:30"))
    group = team(world, [day(5), day(5, "member")])
    world.limits.track(ANN, "image", 2)
    world.wait(hours=1)
    assert used(world) == [0, 0]
    assert world.groups.update(group, timezone="america/new_york").timezone == "America/New_York"
    assert used(world) == [2, 2]
    assert world.limits.check(ANN, "image").reset_at == utc("2026-03-15T04:00")
    world.groups.update(group, timezone="Asia/Tokyo")
    assert used(world) == [2, 2]
    world.wait(hours=14)
    assert used(world) == [2, 2]
    world.wait(minutes=30)
    assert used(world) == [0, 0]


@scenario
def a_fresh_start(world: World) -> None:
    group = team(world, [day(2), day(2, "member"), Limit(kind="image", max=None), Limit(kind="video", max=5)])
    world.limits.track(ANN, "image", 2)
    world.limits.track(ANN, "video", 2)
    world.wait(seconds=1)
    assert world.groups.reset_usage(group, kind="image") == world.now
    assert used(world) == [0, 0, 0, 2]
    world.limits.record(ANN, "image", created_at=world.now - timedelta(milliseconds=500))
    assert used(world) == [0, 0, 0, 2]
    assert world.limits.track(ANN, "image", 2)
    world.groups.set_limit(group, Limit(kind="image", max=100, period="month", scope="member"))
    assert used(world) == [2, 2, 2, 2, 2]
    world.wait(seconds=1)
    world.groups.reset_usage(group)
    assert used(world) == [0, 0, 0, 0, 0]
    world.groups.set_limit(group, Limit(kind="audio", max=1))
    assert used(world) == [0, 0, 0, 0, 0, 0]
    assert sum(point.used for point in world.groups.history(group, since=world.now, bucket="day")) == 7


@scenario
def a_fresh_start_at_the_moment_of_a_usage(world: World) -> None:
    group = team(world, {"image": 1})
    world.limits.track(ANN, "image")
    assert world.groups.reset_usage(group) == world.now + timedelta(microseconds=1)
    assert world.limits.track(ANN, "image")
    assert not world.limits.track(ANN, "image")


# Holds


@scenario
def a_hold_is_committed_for_less_and_refunded(world: World) -> None:
    team(world, {"video": 20})
    hold = world.limits.reserve(ANN, "video", 8, ttl=600)
    assert (hold.allowed, hold.status, hold.cost, hold.remaining) == (True, "reserved", 8, 12)
    assert hold.expires_at == world.now + timedelta(minutes=10)
    assert used(world) == [8]
    world.wait(minutes=5)
    result = world.limits.commit(hold.usage_id, 5)
    assert (result.status, result.cost, result.remaining, result.replayed) == ("committed", 5, 15, False)
    assert (result.usage_id, result.expires_at) == (hold.usage_id, hold.expires_at)
    assert world.limits.commit(str(hold.usage_id), 5).replayed
    world.wait(days=400)
    assert used(world) == [5]
    for settle in (world.limits.commit, world.limits.release):
        error = refused(AlreadySettled, settle, hold.usage_id)
        assert (error.code, error.detail) == ("TL006", "committed")
    refunded = world.limits.refund(hold.usage_id)
    assert (refunded.status, refunded.cost, refunded.remaining, refunded.replayed) == ("refunded", 5, 20, False)
    assert world.groups.refund(hold.usage_id).replayed
    assert refused(AlreadySettled, world.limits.commit, hold.usage_id, 5).detail == "refunded"
    refused(AlreadySettled, world.limits.release, hold.usage_id)


@scenario
def a_hold_is_committed_in_full_or_for_nothing(world: World) -> None:
    group = team(world, [day(20), day(9, "member")])
    full, free = (world.limits.reserve(ANN, "image", 4) for _ in range(2))
    assert not world.limits.track(ANN, "image", 2)
    assert world.limits.commit(full.usage_id).cost == 4
    assert world.limits.commit(full.usage_id, 4).replayed
    assert world.limits.commit(free.usage_id, 0).cost == 0
    assert world.limits.commit(free.usage_id, 0).replayed
    refused(AlreadySettled, world.limits.commit, free.usage_id)
    assert used(world) == [4, 4]
    points = world.groups.history(group, since=world.now)
    assert [(point.used, point.generations) for point in points] == [(4, 2)]


@scenario
def a_hold_is_released(world: World) -> None:
    group = team(world, [day(5), day(5, "member")])
    hold = world.limits.reserve(ANN, "image", 5)
    denied = world.limits.reserve(ANN, "image")
    assert (denied.reason, denied.usage_id, denied.status, denied.expires_at) == ("limit_exceeded", None, None, None)
    result = world.limits.release(hold.usage_id)
    assert (result.allowed, result.status, result.cost, result.remaining) == (True, "released", 5, 5)
    world.wait(hours=2)
    again = world.limits.release(hold.usage_id)
    assert (again.status, again.replayed) == ("released", True)
    for settle in (world.limits.commit, world.limits.refund):
        assert refused(AlreadySettled, settle, hold.usage_id).detail == "released"
    assert used(world) == [0, 0]
    assert world.groups.history(group, since=world.now) == []


@scenario
def what_can_not_be_settled_so(world: World) -> None:
    team(world, {"image": 20})
    hold = world.limits.reserve(ANN, "image", 3)
    assert refused(InvalidRequest, world.limits.commit, hold.usage_id, 4).field == "cost"
    assert refused(InvalidRequest, world.limits.refund, hold.usage_id).field == "usage_id"
    world.limits.commit(hold.usage_id, 1)
    assert refused(InvalidRequest, world.limits.commit, hold.usage_id, 4).field == "cost"
    tracked, recorded = world.limits.track(ANN, "image"), world.limits.record(ANN, "image")
    assert (tracked.expires_at, recorded.expires_at) == (None, None)
    for usage in (tracked, recorded):
        refused(AlreadySettled, world.limits.commit, usage.usage_id, 1)
        refused(AlreadySettled, world.limits.release, usage.usage_id)
        assert world.limits.refund(usage.usage_id).status == "refunded"
    for settle in (world.limits.commit, world.limits.release, world.limits.refund, world.groups.refund):
        assert refused(UsageNotFound, settle, NOBODY).code == "TL005"
        assert refused(InvalidRequest, settle, "hold").field == "usage_id"
    for ttl in (0, 30 * 86_400 + 1):
        assert refused(InvalidRequest, lambda ttl=ttl: world.limits.reserve(ANN, "image", ttl=ttl)).field == "ttl"
    assert refused(InvalidRequest, world.limits.commit, hold.usage_id, -1).field == "cost"
    assert world.limits.reserve(ANN, "image", ttl=30 * 86_400).expires_at == world.now + timedelta(days=30)
    assert used(world) == [2]


@scenario
def a_hold_expires(world: World) -> None:
    group = team(world, [Limit(kind="image", max=3), Limit(kind="image", max=3, scope="member")])
    hold = world.limits.reserve(ANN, "image", 3, ttl=60)
    world.at(hold.expires_at - timedelta(microseconds=1))
    assert not world.limits.track(ANN, "image")
    assert [point.used for point in world.groups.history(group, since=world.now)] == [3]
    world.at(hold.expires_at)
    assert used(world) == [0, 0]
    assert [limit.used for limit in world.groups.usage(group).limits] == [0, 0]
    assert world.groups.history(group, since=world.now) == []
    assert world.limits.check(ANN, "image", 3).remaining == 3
    assert world.limits.track(ANN, "image", 3).remaining == 0
    assert used(world) == [3, 3]
    late = refused(HoldExpired, world.limits.commit, hold.usage_id, 1)
    assert (late.code, late.detail) == ("TL007", str(hold.usage_id))
    released = world.limits.release(hold.usage_id)
    assert (released.status, released.cost, released.remaining) == ("expired", 3, 0)
    assert refused(AlreadySettled, world.limits.refund, hold.usage_id).detail == "expired"
    assert world.limits.commit(hold.usage_id, 0).remaining == 0
    assert used(world) == [3, 3]


@scenario
def an_expired_hold_is_settled_the_same_swept_or_not(world: World) -> None:
    team(world, {"image": 4})
    for sweep in (True, False):
        hold = world.limits.reserve(ANN, "image", 2, ttl=1)
        world.wait(seconds=1)
        if sweep:
            world.limits.refund(world.limits.track(ANN, "image").usage_id)
        assert refused(AlreadySettled, world.limits.refund, hold.usage_id).detail == "expired"
        first, again = world.limits.release(hold.usage_id), world.limits.release(hold.usage_id)
        assert (first.status, first.replayed, again.replayed) == ("expired", True, True)
        assert world.limits.commit(hold.usage_id, 1).status == "committed"
        world.limits.refund(hold.usage_id)
    assert used(world) == [0]


@scenario
def a_hold_is_committed_late(world: World) -> None:
    group = team(world, [day(4), Limit(kind="image", max=4, period="week", scope="member")], ANN, BOB)
    for sweep in (False, True):
        hold = world.limits.reserve(ANN, "image", 2, ttl=1)
        world.wait(seconds=1)
        if sweep:
            world.limits.track(BOB, "image")
        result = world.limits.commit(hold.usage_id)
        assert (result.status, result.cost, result.replayed) == ("committed", 2, False)
        assert world.limits.commit(hold.usage_id).replayed
        world.limits.refund(hold.usage_id)
    assert used(world) == [0, 1]
    two, three = (world.limits.reserve(ANN, "image", cost, ttl=1) for cost in (2, 1))
    world.wait(seconds=1)
    world.limits.track(ANN, "image", 2)
    refused(HoldExpired, world.limits.commit, two.usage_id)
    assert world.limits.commit(two.usage_id, 1).remaining == 0
    refused(HoldExpired, world.limits.commit, three.usage_id)
    world.groups.set_limit(group, day(5))
    assert world.limits.commit(three.usage_id).remaining == 0
    assert used(world) == [4, 5]
    points = world.groups.history(group, since=world.now)
    assert [(point.used, point.generations) for point in points] == [(5, 4)]


@scenario
def a_late_commit_needs_its_room_once(world: World) -> None:
    team(world, [day(5), day(5, "member")])
    hold, other = world.limits.reserve(ANN, "image", 4, ttl=1), world.limits.reserve(ANN, "image", ttl=1)
    world.wait(seconds=1)
    assert world.limits.commit(hold.usage_id).remaining == 1
    assert world.limits.commit(other.usage_id).remaining == 0
    assert used(world) == [5, 5]


@scenario
def a_denial_leaves_a_key_alone(world: World) -> None:
    team(world, {"image": 2})
    hold = world.limits.reserve(ANN, "image", ttl=1, idempotency_key="job")
    world.wait(seconds=1)
    other = world.limits.track(ANN, "image", 2)
    assert not world.limits.reserve(ANN, "image", idempotency_key="job")
    world.limits.refund(other.usage_id)
    world.limits.commit(hold.usage_id)
    again = world.limits.reserve(ANN, "image", idempotency_key="job")
    assert (again.usage_id, again.replayed, used(world)) == (hold.usage_id, True, [1])


@scenario
def a_late_hold_of_a_period_that_lasts(world: World) -> None:
    team(world, [Limit(kind="image", max=3, period="month"), day(9)])
    hold = world.limits.reserve(ANN, "image", 2, ttl=60).usage_id
    world.wait(seconds=61)
    other = world.limits.reserve(ANN, "image", 2, ttl=60).usage_id
    world.wait(hours=23)
    assert world.limits.commit(hold).status == "committed"
    refused(HoldExpired, world.limits.commit, other)
    assert used(world) == [2, 0]


@scenario
def a_hold_of_a_past_period(world: World) -> None:
    group = team(world, [day(9)])
    long, short, gone = (world.limits.reserve(ANN, "image", 2, ttl=ttl) for ttl in (86_400, 60, 60))
    world.wait(hours=23)
    assert world.limits.track(ANN, "image").limits[-1].used == 1
    for hold in (short, gone):
        for cost in (0, 2):
            refused(HoldExpired, world.limits.commit, hold.usage_id, cost)
    assert world.limits.release(gone.usage_id).status == "expired"
    assert world.limits.commit(long.usage_id, 1).limits[-1].used == 1
    assert used(world)[-1] == 1
    points = world.groups.history(group, since=world.now - timedelta(days=1))
    assert [(point.used, point.generations) for point in points] == [(1, 1), (1, 1)]
    assert world.limits.refund(long.usage_id).limits[-1].used == 1


@scenario
def a_fresh_start_while_holds_are_under_way(world: World) -> None:
    group = team(world, {"image": 4})
    open_, late = world.limits.reserve(ANN, "image", 2), world.limits.reserve(ANN, "image", 2, ttl=60)
    world.wait(seconds=30)
    world.groups.reset_usage(group)
    assert used(world) == [0]
    world.wait(minutes=1)
    assert world.limits.commit(open_.usage_id, 1).remaining == 4
    refused(HoldExpired, world.limits.commit, late.usage_id)
    assert world.limits.refund(open_.usage_id).remaining == 4


@scenario
def keys_of_holds(world: World) -> None:
    team(world, {"image": 9})

    def reserve(cost: int = 3, **more: Any) -> Any:
        return world.limits.reserve(ANN, "image", cost, idempotency_key="job", ttl=60, **more)

    first = reserve()
    world.wait(seconds=30)
    again = reserve(metadata={"try": 2})
    assert (again.usage_id, again.replayed, again.expires_at) == (first.usage_id, True, first.expires_at)
    refused(IdempotencyConflict, world.limits.track, ANN, "image", 3, idempotency_key="job")
    refused(IdempotencyConflict, reserve, 2)
    assert world.limits.reserve(BOB, "image", idempotency_key="job").reason == "not_in_group"
    world.limits.commit(first.usage_id, 1)
    assert (reserve().status, reserve().cost, reserve().replayed) == ("committed", 1, True)
    world.wait(seconds=60)
    assert reserve().replayed
    world.limits.refund(first.usage_id)
    second = reserve(2)
    assert (second.replayed, second.usage_id == first.usage_id) == (False, False)
    world.limits.release(second.usage_id)
    third = reserve()
    world.wait(seconds=60)
    fourth = world.limits.track(ANN, "image", 2, idempotency_key="job")
    assert (third.replayed, fourth.replayed) == (False, False)
    assert world.limits.commit(third.usage_id).status == "committed"
    assert world.limits.track(ANN, "image", 2, idempotency_key="job").usage_id == fourth.usage_id
    assert used(world) == [5]


@scenario
def settling_needs_the_usage_alone(world: World) -> None:
    group = team(world, [day(9), day(9, "member"), Limit(kind="image", max=9)])
    one, two, three, four, five = (world.limits.reserve(ANN, "image", ttl=90) for _ in range(5))
    world.groups.remove_member(group, ANN)
    left = world.limits.commit(one.usage_id)
    assert [limit.used for limit in left.limits] == [5, 5, 5]
    world.groups.remove_limit(group, "image", period="day")
    assert [limit.used for limit in world.limits.release(two.usage_id).limits] == [4, 4]
    world.groups.set_limits(group, ())
    assert world.limits.commit(three.usage_id).limits == ()
    world.groups.delete(group)
    gone = world.limits.release(four.usage_id)
    assert (gone.group.id, gone.group.name, gone.remaining, gone.reset_at) == (group, None, None, None)
    world.wait(minutes=2)
    assert world.limits.commit(five.usage_id).status == "committed"
    assert world.limits.refund(one.usage_id).status == "refunded"
    points = world.groups.history(since=world.now)
    assert [(point.used, point.generations) for point in points] == [(2, 2)]


@scenario
def who_pays_for_a_hold(world: World) -> None:
    first = team(world, {"image": 3}, name="First", priority=1)
    second = team(world, {"image": 9}, name="Second")
    holds = [world.limits.reserve(ANN, "image", 2, ttl=60) for _ in range(2)]
    assert [hold.group.id for hold in holds] == [first, second]
    assert world.limits.reserve(ANN, "image", 2, group_id=first).reason == "limit_exceeded"
    assert world.limits.reserve(NOBODY, "image").reason == "not_in_group"
    assert world.limits.reserve(ANN, "video").reason == "no_limit_for_kind"
    assert refused(GroupNotFound, lambda: world.limits.reserve(ANN, "image", group_id=NOBODY)).code == "TL002"
    world.wait(seconds=60)
    assert world.limits.reserve(ANN, "image", 2).group.id == first
    assert world.limits.commit(holds[1].usage_id).group.id == second
    refused(HoldExpired, world.limits.commit, holds[0].usage_id)


@scenario
def a_generation_settles_itself(world: World) -> None:
    team(world, {"video": 20})

    def fails(hold: Hold) -> None:
        raise ZeroDivisionError

    def fails_late(hold: Hold) -> None:
        hold.used(3)
        raise ZeroDivisionError

    assert world.generation(lambda _: None, ANN, "video", 8, idempotency_key="job").status == "committed"
    assert world.generation(lambda hold: hold.commit(2), ANN, "video", cost=8).result.cost == 2
    for body in (fails, fails_late):
        with pytest.raises(ZeroDivisionError):
            world.generation(body, ANN, "video", 8)
    assert used(world) == [13]
    assert world.generation(lambda _: None, ANN, "video", 8, idempotency_key="job").replayed
    with pytest.raises(LimitExceeded):
        world.generation(lambda _: None, ANN, "video", 8)


@scenario
def a_generation_that_took_too_long(world: World) -> None:
    team(world, {"video": 8})

    def body(hold: Hold) -> None:
        world.wait(seconds=60)
        assert world.limits.track(ANN, "video", 8)

    with pytest.raises(HoldExpired):
        world.generation(body, ANN, "video", 8, ttl=60)
    assert used(world) == [8]


@scenario
def counting_again_finds_nothing(world: World) -> None:
    group = team(world, [day(9), day(9, "member")])
    world.limits.track(ANN, "image")
    hold = world.limits.reserve(ANN, "image", 2, ttl=60)
    world.limits.commit(world.limits.reserve(ANN, "image", 2).usage_id, 1)
    assert not world.groups.reconcile(group).drifted
    world.wait(minutes=1)
    assert not world.groups.reconcile(group, since=world.now).drifted
    world.limits.commit(hold.usage_id)
    assert not world.groups.reconcile(group).drifted
    assert used(world) == [4, 4]
    world.groups.delete(group)
    assert refused(GroupNotFound, world.groups.reconcile, group).code == "TL002"


# Groups


@scenario
def a_group_is_made_read_and_changed(world: World) -> None:
    made = world.groups.create("  Pro ", description="For professionals", limits={"video": None, "image": 100})
    assert (made.name, made.description, made.priority, made.timezone) == ("Pro", "For professionals", 0, "UTC")
    assert list(made.limits) == [Limit(kind="image", max=100), Limit(kind="video", max=None)]
    assert world.groups.get(str(made.id)) == made
    assert world.groups.get_by_name(" pRO") == made
    world.wait(minutes=1)
    changed = world.groups.update(made.id, name="PRO", priority=-3)
    assert (changed.name, changed.priority, changed.limits) == ("PRO", -3, made.limits)
    assert changed.updated_at == world.now
    assert changed.created_at == made.created_at
    emptied = world.groups.update(made.id, description="", priority=0)
    assert (emptied.description, emptied.priority) == ("", 0)
    assert world.groups.delete(made.id) == emptied
    assert world.groups.list() == []


@scenario
def groups_are_listed_by_name(world: World) -> None:
    for name in ("delta", "Alpha", "100% _legal\\", "Ärger", "beta", "Gamma"):
        world.groups.create(name)
    assert [group.name for group in world.groups.list()] == [
        "100% _legal\\", "Alpha", "beta", "delta", "Gamma", "Ärger"
    ]  # fmt: skip
    assert [group.name for group in world.groups.list(search=" ALPH ")] == ["Alpha"]
    assert [group.name for group in world.groups.list(search="ä")] == ["Ärger"]
    assert [group.name for group in world.groups.list(search="% _")] == ["100% _legal\\"]
    assert len(world.groups.list(search="")) == 6
    assert world.groups.list(search="nothing") == []


@scenario
def names_are_unique_whatever_their_case(world: World) -> None:
    one = world.groups.create("Straße", limits={"image": 1})
    two = world.groups.create("Two")
    assert refused(GroupExists, world.groups.create, " STRAße").code == "TL003"
    refused(GroupExists, world.groups.update, two.id, name="straße", description="changed", priority=3)
    assert world.groups.get(two.id) == two
    assert world.groups.update(one.id, name="sTRASSE").name == "sTRASSE"
    assert len(world.groups.list()) == 2


@scenario
def a_group_that_is_not_there(world: World) -> None:
    gone = world.groups.create("Gone").id
    here = world.groups.create("Here").id
    world.groups.delete(gone)
    groups = world.groups
    for call in (
        lambda: groups.get(gone),
        lambda: groups.get_by_name("gone"),
        lambda: groups.update(gone, name="Back"),
        lambda: groups.set_limits(gone, {"image": 1}),
        lambda: groups.set_limit(gone, Limit(kind="image", max=1)),
        lambda: groups.remove_limit(gone, "image"),
        lambda: groups.delete(gone),
        lambda: groups.add_member(gone, ANN),
        lambda: groups.add_members(gone, [ANN]),
        lambda: groups.remove_member(gone, ANN),
        lambda: groups.remove_members(gone, [ANN]),
        lambda: groups.move_member(ANN, from_=gone, to=here),
        lambda: groups.move_member(ANN, from_=here, to=gone),
        lambda: groups.members(gone),
        lambda: groups.usage(gone),
        lambda: groups.history(gone),
        lambda: groups.reset_usage(gone),
    ):
        assert refused(GroupNotFound, call).code == "TL002"


@scenario
def an_error_leaves_nothing_half_made(world: World) -> None:
    group = team(world, {"image": 1})
    before = world.groups.get(group)
    zone = refused(InvalidRequest, world.groups.create, "New", timezone="Foo/Bar5", limits={"image": 1})
    assert (zone.field, zone.code) == ("timezone", "TL001")
    for name in ("posix/Europe/Paris", "cet", "WET", "Paris", "Europe/" + "x" * 70):
        refused(InvalidRequest, world.groups.update, group, name="Other", timezone=name, is_default=True)
    assert world.groups.list() == [before]


@scenario
def bad_arguments_are_refused(world: World) -> None:
    group = team(world, {"image": 1})
    limits, groups = world.limits, world.groups
    for field, call in (
        ("user_id", lambda: limits.track("ann", "image")),
        ("kind", lambda: limits.track(ANN, "Image")),
        ("cost", lambda: limits.track(ANN, "image", 0)),
        ("idempotency_key", lambda: limits.track(ANN, "image", idempotency_key="")),
        ("group_id", lambda: limits.check(ANN, "image", group_id="team")),
        ("metadata", lambda: limits.record(ANN, "image", metadata={"prompt": "x" * 9000})),
        ("created_at", lambda: limits.record(ANN, "image", created_at=datetime(2026, 1, 1))),  # noqa: DTZ001
        ("user_id", lambda: limits.usage("ann")),
        ("name", lambda: groups.create(" ")),
        ("limits[0].max", lambda: groups.create("New", limits={"image": -1})),
        ("priority", lambda: groups.update(group, priority=2**31)),
        ("bucket", lambda: groups.history(group, bucket="minute")),
        ("bucket", lambda: groups.export_usage(group, bucket="minute")),
        ("user_id", lambda: groups.export_usage(group, user_id=ANN, bucket="day")),
        ("since", lambda: groups.export_usage(group, bucket="day", since=datetime(2026, 1, 1))),  # noqa: DTZ001
        ("kind", lambda: groups.reset_usage(group, kind="Image")),
    ):
        assert refused(InvalidRequest, call).field == field
    assert used(world) == [0]


# Members


@scenario
def members_come_and_go(world: World) -> None:
    group = world.groups.create("Team", limits=[day(5, "member")]).id
    assert world.groups.add_member(group, BOB)
    assert not world.groups.add_member(group, BOB)
    assert world.groups.add_member(group, str(ANN))
    members = list(world.groups.members(group))
    assert [(member.id, member.email) for member in members] == [(ANN, EMAILS[ANN]), (BOB, EMAILS[BOB])]
    assert all(member.joined_at.tzinfo for member in members)
    assert refused(UnknownUser, world.groups.add_member, group, NOBODY).code == "TL004"
    assert world.groups.remove_member(group, BOB)
    assert not world.groups.remove_member(group, BOB)
    assert [member.id for member in world.groups.members(group)] == [ANN]


@scenario
def members_are_found_by_a_part_of_their_address(world: World) -> None:
    group = team(world, {}, ANN, BOB, CYD)

    def found(text: str | None) -> list[UUID]:
        return [member.id for member in world.groups.members(group, search=text)]

    world.groups.remove_member(group, BOB)
    assert found(" ANN@ex ") == [ANN]
    assert found("@") == found(None) == found("") == found("  ") == [ANN, CYD]
    # who left, who never was there, and what means something in LIKE
    assert [found(text) for text in ("bob@", "nobody", "%", "_", "\\")] == [[]] * 5
    assert refused(InvalidRequest, found, "a\0").field == "search"


@scenario
def who_returns_finds_their_usage(world: World) -> None:
    group = team(world, [day(5, "member"), day(9)], ANN, BOB)
    world.limits.track(ANN, "image", 2)
    world.groups.remove_member(group, ANN)
    assert world.limits.track(ANN, "image").reason == "not_in_group"
    assert world.limits.usage(ANN) == ()
    world.limits.record(ANN, "image", group_id=group)
    world.groups.add_member(group, ANN)
    assert used(world) == [3, 3]


@scenario
def members_are_moved(world: World) -> None:
    one, two = (world.groups.create(name, limits={"image": 1}).id for name in ("One", "Two"))
    world.groups.add_member(one, ANN)
    assert world.groups.move_member(ANN, from_=one, to=two)
    assert not world.groups.move_member(ANN, from_=one, to=two)
    assert not world.groups.move_member(ANN, from_=two, to=two)
    world.groups.add_member(one, ANN)
    assert world.groups.move_member(ANN, from_=one, to=two)
    assert [list(world.groups.members(group)) == [] for group in (one, two)] == [True, False]


@scenario
def members_in_bulk(world: World) -> None:
    group = world.groups.create("Team").id
    world.groups.add_member(group, ANN)
    progress: list[tuple[int, int]] = []
    many = [UUID(int=number) for number in range(1000, 6001)]
    result = world.groups.add_members(
        group, (id_ for id_ in [BOB, ANN, str(BOB), NOBODY, *many]), on_progress=lambda *done: progress.append(done)
    )
    assert (result.added, result.already) == (2, 1)
    assert {refused.user_id for refused in result.refused} == {NOBODY, *many} - {many[0]}
    assert {refused.reason for refused in result.refused} == {"there is no such user"}
    assert progress == [(5000, 5004), (5004, 5004)]
    assert world.groups.usage(group).member_count == 3
    assert world.groups.remove_members(group, [ANN, CYD, NOBODY]) == 1
    assert [member.id for member in world.groups.members(group)] == [BOB, many[0]]
    assert refused(InvalidRequest, world.groups.add_members, group, [ANN, "x"]).field == "user_ids[1]"


@scenario
def users_are_found_by_email(world: World) -> None:
    assert [user.id for user in world.groups.find_users("EXAMPLE.com")] == [ANN, BOB]
    assert world.groups.find_users(" ann@ ")[0].email == EMAILS[ANN]
    assert world.groups.find_users("nobody") == []
    found = world.groups.find_users_by_email(
        [" ann@EXAMPLE.com ", "nobody@nowhere", "CYD@elsewhere.org", "example.com"]
    )
    assert [user.id for user in found] == [ANN, CYD]


# Reports


@scenario
def usage_of_a_group(world: World) -> None:
    limits = [
        Limit(kind="image", max=10, period="month"),
        day(7, "member"),
        Limit(kind="video", max=None, scope="member"),
        Limit(kind="audio", max=0),
    ]
    group = team(world, limits, ANN, BOB, CYD)
    world.limits.track(ANN, "image", 4)
    world.limits.track(BOB, "image", 3)
    world.limits.track(BOB, "video", 3)
    usage = world.groups.usage(group)
    assert (usage.group.id, usage.member_count) == (group, 3)
    shown = {limit.kind + limit.scope: limit for limit in usage.limits}
    assert (shown["imagegroup"].fraction, shown["imagegroup"].remaining) == (0.7, 3)
    member = shown["imagemember"]
    assert (member.used, member.capacity, member.remaining, member.fraction) == (7, 21, 14, 0.333333)
    assert member.reset_at == utc("2026-03-15T00:00")
    assert (shown["videomember"].used, shown["videomember"].fraction, shown["videomember"].capacity) == (3, None, None)
    assert (shown["audiogroup"].capacity, shown["audiogroup"].fraction) == (0, 1)
    world.groups.set_limit(group, day(5, "member"))
    world.limits.track(CYD, "image", 3)
    assert [limit.fraction for limit in world.groups.usage(group).limits if limit.capacity == 15] == [0.666667]
    world.groups.remove_members(group, [ANN, BOB, CYD])
    empty = {limit.kind + limit.scope: limit for limit in world.groups.usage(group).limits}
    assert (empty["imagemember"].capacity, empty["imagemember"].fraction, empty["imagemember"].used) == (0, 1, 10)


@scenario
def usage_of_all_groups(world: World) -> None:
    assert world.groups.usage_all() == []
    team(world, {"image": 3}, name="beta")
    team(world, (), BOB, CYD, name="Alpha")
    world.limits.track(ANN, "image")
    shown = [(usage.group.name, usage.member_count, len(usage.limits)) for usage in world.groups.usage_all()]
    assert shown == [("Alpha", 2, 0), ("beta", 1, 1)]


@scenario
def usage_of_all_groups_page_by_page(world: World) -> None:
    names = ["a", "A2", "b", "B b", "c"]
    for name in names:
        team(world, {"image": 3}, name=name)
    for size in (1, 2, 5):
        with patch.object(flows, "USAGE_PAGE", size):
            assert [usage.group.name for usage in world.groups.usage_all()] == names


@each(one=(1,), two=(2,), three=(3,), more=(7,))
def pages_of_a_chosen_length(world: World, size: int) -> None:
    names = ["a", "A2", "b", "B b", "c", "D"]
    groups = [team(world, {"image": None}, ANN, BOB, CYD, name=name) for name in names]
    for cost in (1, 2, 3, 4, 5, 6):
        world.limits.track(ANN, "image", cost, group_id=groups[0])
        world.wait(seconds=1)
    last = groups[0]
    read = [page_by_page(world.groups.page, size=size), page_by_page(world.groups.members_page, last, size=size)]
    assert [group.name for group in read[0]] == names
    assert [member.id for member in read[1]] == [ANN, BOB, CYD]
    for whose in ({"group_id": last}, {"user_id": ANN}):
        rows = page_by_page(world.groups.export_page, **whose, size=size)
        assert [usage.cost for usage in rows] == [1, 2, 3, 4, 5, 6]
    assert [group.name for group in page_by_page(world.groups.page, search="b", size=size)] == ["b", "B b"]
    found = page_by_page(world.groups.members_page, last, search="@example", size=size)
    assert [member.id for member in found] == [ANN, BOB]
    until = world.now - timedelta(seconds=2)
    rows = page_by_page(world.groups.export_page, last, since=until - timedelta(seconds=2), until=until, size=size)
    assert [usage.cost for usage in rows] == [3, 4]


def page_by_page(read: Callable[..., Any], *args: Any, size: int, **kwargs: Any) -> list[Any]:
    """Read all pages; the last one says that it is, and of the ledger it may be empty."""
    pages = [read(*args, size=size, **kwargs)]
    while pages[-1].next is not None:
        pages.append(read(*args, size=size, after=pages[-1].next, **kwargs))
    assert all(len(page) == size for page in pages[:-1])
    assert len(pages[-1]) <= size
    return [each for page in pages for each in page]


@scenario
def what_comes_meanwhile_is_on_no_page_of_the_ledger(world: World) -> None:
    group = team(world, {"image": None})
    for cost in (1, 2, 3):
        world.limits.track(ANN, "image", cost)
        world.wait(seconds=1)
    first = world.groups.export_page(group, size=2)
    world.wait(seconds=1)
    world.limits.track(ANN, "image", 4)
    rest = world.groups.export_page(group, size=2, after=first.next)
    assert [usage.cost for usage in (*first, *rest)] == [1, 2, 3]
    assert rest.next is None


@scenario
def pages_of_nothing(world: World) -> None:
    assert (world.groups.page(), world.groups.page().next) == ([], None)
    assert world.groups.export_page() == []
    group = world.groups.create("Team").id
    assert world.groups.members_page(group) == []
    assert refused(GroupNotFound, world.groups.members_page, uuid4()).code == "TL002"
    assert world.groups.export_page(uuid4()) == []  # it may have been deleted


@scenario
def a_group_is_changed_whole(world: World) -> None:
    group = team(world, [Limit(kind="image", max=5), Limit(kind="video", max=2)], name="Team")
    world.limits.track(ANN, "image", 3)
    team(world, (), BOB, name="Other")
    changed = world.groups.update(group, name="Crew", priority=7, limits={"image": 4, "audio": None})
    assert (changed.name, changed.priority) == ("Crew", 7)
    assert {limit.kind: limit.max for limit in changed.limits} == {"image": 4, "audio": None}
    assert world.limits.check(ANN, "image").remaining == 1  # what is used stays
    assert refused(GroupExists, world.groups.update, group, name="other", limits={"image": 100}).code == "TL003"
    assert world.groups.get(group) == changed  # all or nothing
    assert world.groups.update(group, limits=()).limits == ()


@scenario
def ids_are_of_their_moment_and_their_group(world: World) -> None:
    group = team(world, {"image": None})
    longer_ago = world.now - timedelta(days=400, microseconds=1)
    request = GenerationRequest(user_id=ANN, kind="image")
    ids = {
        world.limits.track(ANN, "image").usage_id: world.now,
        world.limits.reserve(ANN, "image").usage_id: world.now,
        world.limits.record(ANN, "image", created_at=longer_ago).usage_id: longer_ago,
        **{result.usage_id: world.now for result in world.limits.track_many([request, request])},
    }
    assert len(ids) == 5
    for id_, at in ids.items():
        assert (id_.version, id_.variant) == (7, RFC_4122)
        assert id_.int >> 80 == (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
        assert str(id_)[-4:] == str(group)[-4:]


@scenario
def names_read_as_they_are(world: World) -> None:
    group = world.groups.create("Cafe\u0301")
    assert group.name == "Caf\xe9"
    for spelt in ("Cafe\u0301", "CAF\xc9", " caf\xe9 "):
        assert world.groups.get_by_name(spelt).id == group.id
        assert refused(GroupExists, world.groups.create, spelt).code == "TL003"
    assert [found.id for found in world.groups.list(search="fe\u0301")] == [group.id]
    for name in ("Caf\u200b\xe9", "Caf\xe9\u202e", "Ca\tf\xe9", "\xad"):
        assert refused(InvalidRequest, world.groups.create, name).field == "name"
        assert refused(InvalidRequest, world.groups.update, group.id, name=name).field == "name"


@scenario
def time_zones_that_are_no_places(world: World) -> None:
    for timezone in ("CET", "wet", "localtime", "Factory", "posixrules", "Nowhere/Land"):
        assert refused(InvalidRequest, world.groups.create, "Team", timezone=timezone).field == "timezone"
    assert world.groups.list() == []


@scenario
def what_no_reader_could_keep(world: World) -> None:
    team(world, {"image": None})
    assert refused(InvalidRequest, world.limits.track, ANN, "image", metadata={"n": 10**309}).field == "metadata"
    assert world.limits.track(ANN, "image", metadata={"n": [10**308, 1.5, -(10**308)]})
    before = datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert refused(InvalidRequest, world.limits.record, ANN, "image", created_at=before).field == "created_at"
    assert world.limits.record(ANN, "image", created_at=datetime(1970, 1, 1, tzinfo=UTC))


@scenario
def usage_of_groups_in_every_state(world: World) -> None:
    minute = Limit(kind="image", max=9, period="minute", scope="member")
    both = [Limit(kind="image", max=50, period="month"), Limit(kind="image", max=20, period="month", scope="member")]
    one = team(world, [minute, *both, Limit(kind="video", max=5)], ANN, BOB, name="One", timezone="Asia/Kathmandu")
    two = team(world, [Limit(kind="image", max=None, period="week", scope="member")], CYD, name="Two")

    def used() -> list[list[int]]:
        together = world.groups.usage_all()
        assert together == [world.groups.usage(one), world.groups.usage(two)]
        return [[limit.used for limit in usage.limits] for usage in together]

    world.limits.track(ANN, "image", 2)
    world.limits.reserve(BOB, "image", 3, ttl=30)
    world.limits.reserve(BOB, "video", 4, ttl=30)
    world.limits.track(CYD, "image", 7)
    assert used() == [[5, 5, 5, 4], [7]]
    world.at(world.now + timedelta(seconds=31))  # the holds have expired, and nobody has swept them
    assert used() == [[2, 2, 2, 0], [7]]
    world.at(world.now + timedelta(seconds=60))
    assert used() == [[0, 2, 2, 0], [7]]
    world.groups.reset_usage(one, kind="image")
    world.at(world.now + timedelta(seconds=1))
    world.limits.track(ANN, "image", 4)
    assert used() == [[4, 4, 4, 0], [7]]
    world.groups.set_limit(one, Limit(kind="image", max=99, period="lifetime", scope="member"))
    world.groups.remove_limit(one, "image", period="month")
    assert used() == [[4, 4, 4, 0], [7]]
    world.at(world.now + timedelta(seconds=40 * 86_400))  # every counter's period is past
    assert used() == [[0, 0, 4, 0], [0]]


@scenario
def usage_of_a_user(world: World) -> None:
    team(world, [Limit(kind="video", max=1), day(2), day(3, "member")], ANN, BOB)
    world.limits.track(BOB, "image")
    shown = [(limit.kind, limit.scope, limit.used, limit.remaining) for limit in world.limits.usage(ANN)]
    assert shown == [("image", "member", 0, 3), ("image", "group", 1, 1), ("video", "group", 0, 1)]
    assert world.limits.usage(CYD) == ()


@each(
    hour=("hour", ["2026-10-24T23:00", "2026-10-25T00:00", "2026-10-25T01:00", "2026-10-25T23:00"]),
    day=("day", ["2026-10-24T22:00", "2026-10-25T23:00"]),
    week=("week", ["2026-10-18T22:00", "2026-10-25T23:00"]),
    month=("month", ["2026-09-30T22:00"]),
)
def history_in_buckets(world: World, bucket: Any, begins: list[str]) -> None:
    group = team(world, {"image": None, "video": None}, timezone="Europe/Paris")
    for moment in ("2026-10-24T23:59", "2026-10-25T00:10", "2026-10-25T01:59:59", "2026-10-25T23:30"):
        world.at(utc(moment))
        world.limits.track(ANN, "image", 2)
    points = world.groups.history(group, bucket=bucket, since=utc("2026-10-20T00:00"))
    assert [point.bucket for point in points] == [utc(begin) for begin in begins]
    assert (sum(point.used for point in points), sum(point.generations for point in points)) == (8, 4)


@scenario
def history_of_what_when_and_whom(world: World) -> None:
    one = team(world, {"image": None, "video": None}, ANN, name="One", timezone="Asia/Tokyo")
    two = team(world, {"image": None}, BOB, name="Two")
    world.limits.record(ANN, "image", 1, created_at=world.now - timedelta(days=40))
    world.limits.record(ANN, "image", 2, created_at=world.now - timedelta(days=3))
    world.limits.track(ANN, "video", 3)
    world.limits.track(BOB, "image", 4)
    history = world.groups.history
    since = world.now - timedelta(days=50)
    assert [(point.kind, point.used) for point in history(one, since=since)] == [
        ("image", 1), ("image", 2), ("video", 3)
    ]  # fmt: skip
    assert [point.used for point in history(one, kind="image", since=since)] == [1, 2]
    assert [point.used for point in history(since=since, bucket="month")] == [1, 6, 3]
    assert [point.used for point in history(since=world.now, bucket="week")] == [6, 3]
    assert [point.used for point in history(since=since, until=world.now - timedelta(hours=1))] == [1, 2]
    quarter = world.now.replace(minute=0, second=0, microsecond=0)
    assert sum(point.used for point in history(since=since, until=quarter)) == 3
    assert sum(point.used for point in history(since=since, until=quarter + timedelta(microseconds=1))) == 10
    assert history(two, since=world.now + timedelta(days=1)) == []
    assert [point.used for point in history(one, until=world.now - timedelta(days=2))] == [2]
    world.groups.delete(one)
    assert sum(point.used for point in history(since=since)) == 10


@scenario
def the_history_of_the_last_thirty_days(world: World) -> None:
    world.at(TODAY)
    group = team(world, {"image": None})
    world.limits.record(ANN, "image", 1, created_at=world.now - timedelta(days=32))
    world.limits.record(ANN, "image", 2, created_at=world.now - timedelta(days=29))
    assert sum(point.used for point in world.groups.history(group)) == 2


@scenario
def the_ledger_is_exported(world: World) -> None:
    one = team(world, {"image": None, "video": None}, ANN, BOB, name="One")
    two = team(world, {"image": None}, CYD, name="Two")
    past = world.now - timedelta(days=3)
    world.limits.record(ANN, "image", 5, created_at=past, idempotency_key="k", metadata={"a": [1, None]})
    hold = world.limits.reserve(BOB, "video", 2, ttl=60)
    tracked = world.limits.track(CYD, "image", 3)
    world.groups.refund(tracked.usage_id)
    export = world.groups.export_usage
    (first, second) = list(export(one))
    assert (first.kind, first.cost, first.status, first.created_at, first.email) == (
        "image",
        5,
        "committed",
        past,
        EMAILS[ANN],
    )
    assert (first.idempotency_key, first.metadata, first.group.name) == ("k", {"a": [1, None]}, "One")
    assert (second.id, second.status, second.expires_at) == (hold.usage_id, "reserved", hold.expires_at)
    assert [(each.id, each.status) for each in export(two)] == [(tracked.usage_id, "refunded")]
    assert [each.user_id for each in export(user_id=BOB)] == [BOB]
    assert list(export(two, user_id=BOB)) == []
    assert [each.kind for each in export(kind="video")] == ["video"]
    assert [each.cost for each in export(since=past, until=past + timedelta(seconds=1))] == [5]
    assert list(export(until=past)) == []
    world.groups.delete(one)
    assert [each.group.name for each in export(one)] == [None, None]


@each(
    hour=("hour", ["2026-10-24T23:00", "2026-10-25T00:00", "2026-10-25T01:00", "2026-10-25T23:00"]),
    day=("day", ["2026-10-24T22:00", "2026-10-25T23:00"]),
    week=("week", ["2026-10-18T22:00", "2026-10-25T23:00"]),
    month=("month", ["2026-09-30T22:00"]),
)
def sums_are_exported_in_buckets(world: World, bucket: Any, begins: list[str]) -> None:
    group = team(world, {"image": None}, timezone="Europe/Paris")
    for moment in ("2026-10-24T23:59", "2026-10-25T00:10", "2026-10-25T01:59:59", "2026-10-25T23:30"):
        world.at(utc(moment))
        world.limits.track(ANN, "image", 2)
    sums = list(world.groups.export_usage(group, bucket=bucket))
    assert [each.bucket for each in sums] == [utc(begin) for begin in begins]
    said = {(each.group.id, each.group.name, each.timezone, each.kind) for each in sums}
    assert said == {(group, "Team", "Europe/Paris", "image")}
    assert (sum(each.used for each in sums), sum(each.generations for each in sums)) == (8, 4)


@scenario
def sums_of_what_when_and_whom(world: World) -> None:
    world.at(TODAY)
    one = team(world, {"image": None, "video": None}, ANN, name="One", timezone="Asia/Tokyo")
    two = team(world, {"image": None}, BOB, name="Two")
    world.limits.record(ANN, "image", 1, created_at=world.now - timedelta(days=400))
    world.limits.record(ANN, "image", 2, created_at=world.now - timedelta(days=3))
    world.limits.track(ANN, "video", 3)
    world.limits.reserve(ANN, "image", 9, ttl=60)  # will have expired: given back
    world.limits.reserve(ANN, "video", 9, ttl=60)
    world.groups.refund(world.limits.track(BOB, "image", 5).usage_id)
    world.limits.track(BOB, "image", 4)
    world.at(world.now + timedelta(minutes=2))
    world.limits.reserve(BOB, "image", 6)

    def sums(group_id: UUID | None = None, **wanted: Any) -> set[tuple[UUID, str, int, int]]:
        found = list(world.groups.export_usage(group_id, **{"bucket": "day", **wanted}))
        keys = [(each.group.id, each.kind, each.bucket) for each in found]
        assert keys == sorted(set(keys))
        return {(each.group.id, each.kind, each.used, each.generations) for each in found}

    ones = {(one, "image", 1, 1), (one, "image", 2, 1), (one, "video", 3, 1)}
    twos = {(two, "image", 10, 2)}
    assert sums() == sums(since=utc("2001-01-01T00:00")) == ones | twos
    assert sums(one) == ones
    assert sums(two, kind="image") == twos
    assert sums(two, kind="video") == sums(uuid4()) == set()
    assert sums(kind="image", bucket="hour") == {each for each in ones | twos if each[1] == "image"}
    assert sums(since=world.now) == {(one, "video", 3, 1)} | twos
    assert sums(one, since=world.now - timedelta(days=3), until=world.now - timedelta(days=1)) == {(one, "image", 2, 1)}
    quarter = world.now.replace(minute=world.now.minute // 15 * 15, second=0, microsecond=0)
    assert sums(two, until=quarter) == set()
    assert sums(two, until=quarter + timedelta(microseconds=1)) == twos
    assert sums(since=world.now + timedelta(days=2)) == set()
    world.groups.delete(one)
    assert sums() == ones | twos
    said = {(each.group.name, each.timezone) for each in world.groups.export_usage(bucket="month")}
    assert said == {(None, "UTC"), ("Two", "UTC")}


@scenario
def sums_are_what_the_history_says(world: World) -> None:
    group = team(world, {"image": None, "video": None}, ANN, timezone="Asia/Kolkata")
    for hours in range(0, 900, 7):
        at = world.now - timedelta(hours=hours)
        world.limits.record(ANN, "video" if hours % 2 else "image", 1 + hours % 5, created_at=at)
    since = world.now - timedelta(days=30)
    for bucket in ("hour", "day", "week", "month"):
        sums = world.groups.export_usage(group, bucket=bucket, since=since)
        said = [(each.bucket, each.kind, each.used, each.generations) for each in sums]
        points = world.groups.history(group, bucket=bucket, since=since)
        assert sorted(said) == [(point.bucket, point.kind, point.used, point.generations) for point in points]


@scenario
def members_are_ranked(world: World) -> None:
    group = team(world, {"image": None, "video": None}, ANN, BOB, CYD)
    world.limits.record(ANN, "image", 50, created_at=world.now - timedelta(days=31))
    world.limits.track(ANN, "image", 2)
    world.limits.track(ANN, "video", 2)
    world.limits.track(BOB, "video", 3)
    world.groups.refund(world.limits.track(CYD, "image", 9).usage_id)
    world.groups.remove_member(group, ANN)

    def top(**arguments: Any) -> list[tuple[Any, ...]]:
        return [(each.id, each.used, each.generations) for each in world.groups.top_members(group, **arguments)]

    assert top() == [(ANN, 4, 2), (BOB, 3, 1)]
    assert top(count=1) == [(ANN, 4, 2)]
    assert top(kind="video") == [(BOB, 3, 1), (ANN, 2, 1)]
    assert top(since=world.now - timedelta(days=40), until=world.now) == [(ANN, 50, 1)]
    assert world.groups.top_members(group)[0].email == EMAILS[ANN]


@scenario
def members_at_their_limits_are_counted(world: World) -> None:
    group = team(world, [Limit(kind="image", max=10, scope="member"), Limit(kind="image", max=100)], ANN, BOB, CYD)

    def pressure(**arguments: Any) -> list[tuple[Any, ...]]:
        return [
            (each.kind, each.period, each.max, each.full, each.near, [(m.id, m.email, m.used) for m in each.members])
            for each in world.groups.limit_pressure(group, **arguments)
        ]

    assert pressure() == [("image", "lifetime", 10, 0, 0, [])]
    world.limits.track(BOB, "image", 9)
    world.limits.track(CYD, "image", 10)
    world.limits.track(ANN, "image", 8)
    hold = world.limits.reserve(ANN, "image", 2, ttl=3600)
    at_most = [(CYD, EMAILS[CYD], 10), (BOB, EMAILS[BOB], 9)]
    assert pressure(count=1) == [("image", "lifetime", 10, 2, 3, [min(at_most[0], (ANN, EMAILS[ANN], 10))])]
    world.groups.remove_member(group, BOB)
    assert pressure(at_least=100)[0][3:5] == (2, 2)
    world.limits.release(hold.usage_id)
    assert pressure() == [("image", "lifetime", 10, 1, 1, at_most[:1])]
    assert pressure(at_least=80)[0][3:5] == (1, 2)
    # a limit that is new counts what was used before, also of those who have used nothing since
    world.groups.set_limits(
        group, [Limit(kind="image", max=8, period="day", scope="member"), Limit(kind="video", max=0)]
    )
    assert [each[:5] for each in pressure()] == [("image", "day", 8, 2, 2)]
    world.groups.reset_usage(group)
    assert [each[:5] for each in pressure()] == [("image", "day", 8, 0, 0)]
    for wrong in (0, 101):
        with pytest.raises(InvalidRequest, match="at_least"):
            pressure(at_least=wrong)


@scenario
def nothing_drifts(world: World) -> None:
    group = team(world, [Limit(kind="image", max=9), day(5, "member")], ANN, BOB)
    world.limits.track(ANN, "image", 2)
    world.limits.reserve(BOB, "image", 2)
    assert not world.groups.drift(group).drifted
    refused(GroupNotFound, world.groups.drift, NOBODY)


@scenario
def groups_have_an_id_of_the_callers_choice(world: World) -> None:
    id_, other = uuid4(), uuid4()
    assert world.groups.create("Mine", id=id_, limits={"image": 9}).id == id_
    world.groups.add_member(id_, ANN)
    usage = world.limits.track(ANN, "image")
    assert (usage.group.id, str(usage.usage_id)[-4:]) == (id_, str(id_)[-4:])
    assert refused(InvalidRequest, world.groups.create, "Another", id=str(id_).upper()).field == "id"
    # what fails uses up no id
    refused(GroupExists, world.groups.create, "MINE", id=other)
    refused(InvalidRequest, world.groups.create, "Another", timezone="Mars/Base", id=other)
    assert world.groups.create("Another", id=str(other)).id == other
    world.groups.delete(id_)
    assert refused(InvalidRequest, world.groups.create, "Mine", id=id_).field == "id"
    assert refused(InvalidRequest, world.groups.create, "Mine", id="mine").field == "id"
    assert refused(InvalidRequest, world.groups.create, "Mine", id=UUID(int=0)).field == "id"
    assert world.groups.create("Mine").id not in (id_, other)
    assert [usage.group.id for usage in world.groups.export_usage(user_id=ANN)] == [id_]


# Groups beneath groups


def plan(world: World, *limits: Limit, **customers: UUID) -> tuple[UUID, dict[str, UUID]]:
    """Make a plan, and customers of these names beneath it, each with one member."""
    made = world.groups.create("Plan", limits=limits).id
    return made, {name: team(world, [], member, name=name, parent=made) for name, member in customers.items()}


def month(max_: int | None, scope: Any = "child", kind: str = "image") -> Limit:
    return Limit(kind=kind, max=max_, period="month", scope=scope)


@scenario
def each_customer_of_a_plan_has_their_own(world: World) -> None:
    above, customers = plan(world, month(3), month(4, "group"), Acme=ANN, Beta=BOB)
    first = world.limits.track(ANN, "image", 3)
    assert (first.group.name, first.remaining) == ("Acme", 0)
    assert [(each.scope, each.group.id, each.used) for each in first.limits] == [
        ("child", above, 3),
        ("group", above, 3),
    ]
    denied = world.limits.track(ANN, "image")
    assert (denied.group.id, denied.denied_by.scope, denied.denied_by.group.name) == (
        customers["Acme"],
        "child",
        "Plan",
    )
    assert denied.error.startswith("Image generation limit exceeded: 3 of 3 used by this customer this month, resets")
    denied = world.limits.track(BOB, "image", 2)
    assert (denied.denied_by.scope, denied.denied_by.used) == ("group", 3)
    assert denied.error.startswith("Image generation limit exceeded: 3 of 4 used in Plan this month, 2 more asked for")
    assert world.limits.track(BOB, "image")
    world.groups.set_limits(above, [month(5)])
    assert world.limits.track(ANN, "image", 2)
    assert [limit.group.id for limit in world.limits.usage(ANN)] == [above]
    assert world.limits.track(CYD, "image").reason == "not_in_group"
    world.groups.add_member(above, CYD)
    assert world.limits.track(CYD, "image").reason == "no_limit_for_kind"


@scenario
def places_in_a_tree_are_chosen_and_refused(world: World) -> None:
    path = [world.groups.create("1").id]
    for level in range(2, 6):
        path.append(world.groups.create(str(level), parent=path[-1]).id)
    assert [group.parent_id for group in world.groups.list()] == [None, *path[:-1]]
    assert [group.name for group in world.groups.list(parent=path[0])] == ["2"]
    page = world.groups.page(parent=str(path[1]), size=1)
    assert ([group.name for group in page], page.next) == (["3"], None)
    assert refused(InvalidRequest, world.groups.create, "6", parent=path[-1]).field == "parent_id"
    assert refused(InvalidRequest, world.groups.create, "6", parent=NOBODY).field == "parent_id"
    assert refused(InvalidRequest, world.groups.create, "6", parent="5").field == "parent"
    assert refused(InvalidRequest, world.groups.update, path[0], parent=path[-1]).field == "parent_id"
    assert refused(InvalidRequest, world.groups.delete, path[-2]).field == "group_id"
    assert world.groups.update(path[2], name="Three").parent_id == path[1]
    assert world.groups.update(path[2], parent=None).parent_id is None
    assert world.groups.update(path[2], parent=world.groups.get(path[0])).parent_id == path[0]
    usage = {each.group.name: (each.parent_id, each.child_count) for each in world.groups.usage_all()}
    assert usage == {"1": (None, 2), "2": (path[0], 0), "Three": (path[0], 1), "4": (path[2], 1), "5": (path[3], 0)}


@scenario
def a_group_that_moves_takes_its_usage_along(world: World) -> None:
    above, customers = plan(world, month(5), month(9, "group"), month(4, "member"), Acme=ANN)
    other = world.groups.create("Other", limits=[month(2)]).id
    world.limits.track(ANN, "image", 2)
    world.limits.reserve(ANN, "image", ttl=60)
    world.groups.update(customers["Acme"], parent=other)
    assert world.limits.track(ANN, "image").denied_by.used == 3
    assert [limit.used for limit in world.groups.usage(above).limits] == [0, 0, 0]
    world.wait(minutes=2)
    assert used(world) == [2]
    world.groups.update(customers["Acme"], parent=above)
    assert used(world) == [2, 2, 2]
    world.groups.delete(customers["Acme"])
    assert {limit.scope: limit.used for limit in world.groups.usage(above).limits}["group"] == 2


@scenario
def usage_of_a_plan_and_of_its_customers(world: World) -> None:
    above, customers = plan(world, month(10), month(5, "member"), Acme=ANN, Beta=BOB)
    world.groups.add_member(customers["Beta"], ANN)
    world.limits.track(ANN, "image", 4, group_id=customers["Acme"])
    world.limits.track(ANN, "image", 1, group_id=customers["Beta"])
    world.limits.track(BOB, "image", 3)

    def shown(group: UUID) -> dict[tuple[str, str], tuple[int, int, int]]:
        limits = world.groups.usage(group).limits
        return {(each.scope, each.group.name): (each.used, each.capacity, each.remaining) for each in limits}

    assert shown(above) == {("child", "Plan"): (8, 20, 12), ("member", "Plan"): (8, 10, 2)}
    assert shown(customers["Acme"]) == {("child", "Plan"): (4, 10, 6)}
    assert shown(customers["Beta"]) == {("child", "Plan"): (4, 10, 6)}
    assert world.groups.usage(above).member_count == 0
    assert [point.used for point in world.groups.history(above)] == []
    (pressed,) = world.groups.limit_pressure(above)
    assert (pressed.full, pressed.near, [member.id for member in pressed.members]) == (1, 1, [ANN])
    # both memberships lead to the same member limit, which is said once
    assert [(each.scope, each.used) for each in world.limits.usage(ANN)] == [("member", 5), ("child", 4), ("child", 4)]

    world.groups.reset_usage(above)
    assert shown(above) == {("child", "Plan"): (8, 20, 12), ("member", "Plan"): (0, 10, 10)}
    world.groups.reset_usage(customers["Acme"])
    assert shown(customers["Acme"]) == {("child", "Plan"): (0, 10, 10)}
    assert shown(customers["Beta"]) == {("child", "Plan"): (4, 10, 6)}


@scenario
def an_override_of_a_customer(world: World) -> None:
    above, customers = plan(world, month(1), Acme=ANN, Beta=BOB)
    acme = customers["Acme"]
    override = world.groups.set_override(above, "image", 3, child_id=acme, until=world.now + timedelta(days=1))
    assert (override.scope, override.child_id, override.child_name, override.user_id) == ("child", acme, "Acme", None)
    assert world.limits.track(ANN, "image", 3)
    assert not world.limits.track(BOB, "image", 2)
    assert world.groups.usage(above).limits[0].capacity == 4
    assert list(world.groups.overrides(above, child_id=str(acme))) == [override]
    assert list(world.groups.overrides(above, child_id=customers["Beta"])) == []
    world.groups.update(acme, parent=None)
    assert [each.status for each in world.groups.overrides(above)] == ["sleeping"]
    world.groups.update(acme, parent=above)
    assert [each.status for each in world.groups.overrides(above)] == ["active"]
    world.wait(days=1)
    assert [each.status for each in world.groups.overrides(above)] == ["ended"]
    assert world.limits.usage(ANN)[0].max == 1
    assert world.groups.remove_override(above, "image", child_id=acme)
    assert not world.groups.remove_override(above, "image", child_id=acme)

    set_override = world.groups.set_override
    assert refused(InvalidRequest, set_override, above, "image", 1, child_id=acme, user_id=ANN).field == "child_id"
    assert refused(InvalidRequest, set_override, acme, "image", 1, child_id=above).field == "child_id"
    assert refused(InvalidRequest, set_override, above, "image", 1, child_id=above).field == "child_id"
    refused(GroupNotFound, set_override, above, "image", 1, child_id=NOBODY)
    assert refused(InvalidRequest, set_override, above, "video", 1, child_id=acme).field == "kind"


# Playing them

Site = tuple[LocalStack, psycopg.Connection[Any]]
USERS = EMAILS | {UUID(int=1000): "many@many.org"}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(next(iter(servers().values()))) as server:
        yield server


@contextmanager
def site(server: PostgresServer, schema: str) -> Iterator[Site]:
    """A stack with tokenlimits in a schema, and a connection to its database as the owner, with a clock to turn."""
    server.create_database(schema)
    with LocalStack(server.url(schema), schema=schema) as stack, at_home(server.connect(schema)) as owner:
        clock.install(owner)
        yield stack, owner


@pytest.fixture(scope="module")
def in_public(server: PostgresServer) -> Iterator[Site]:
    with site(server, "public") as made:
        yield made


@pytest.fixture(scope="module")
def in_limits(server: PostgresServer) -> Iterator[Site]:
    with site(server, "limits") as made:
        yield made


@pytest.mark.parametrize(("play", "colour"), SCENARIOS)
def test_fake(play: Scenario, colour: Colour) -> None:
    with fake_world(colour, USERS) as world:
        play(world)


def slow_but_in_one_colour(case: Any) -> Any:
    marks = [pytest.mark.slow] if case.id.endswith(("-sync", "-batches")) else []
    return pytest.param(*case.values, id=case.id, marks=marks)


@pytest.mark.parametrize(("play", "colour"), [slow_but_in_one_colour(case) for case in SCENARIOS])
def test_the_real_thing_answers_the_same(play: Scenario, colour: Colour, in_public: Site) -> None:
    answers_the_same(play, colour, *in_public)


@pytest.mark.full
@pytest.mark.parametrize(("play", "colour"), [case for case in SCENARIOS if "sync" in case.values])
def test_the_real_thing_answers_the_same_in_another_schema(play: Scenario, colour: Colour, in_limits: Site) -> None:
    answers_the_same(play, colour, *in_limits)


def answers_the_same(play: Scenario, colour: Colour, stack: LocalStack, owner: psycopg.Connection[Any]) -> None:
    with real_world(colour, stack, owner, USERS) as real:
        play(real)
    with fake_world(colour, USERS) as fake:
        play(fake)
    assert real.transcript == fake.transcript
    assert invariants.drift(owner) == []
