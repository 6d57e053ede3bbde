"""Models: frozen, open to newer servers, strict about what a caller writes."""

from __future__ import annotations

import inspect
import pickle
from datetime import datetime
from itertools import product
from typing import Any, ClassVar, get_args
from uuid import UUID

import pytest
from pydantic import ValidationError

from tokenlimits import (
    GenerationDenied,
    GenerationRequest,
    Limit,
    LimitExceeded,
    NoLimitForKind,
    NotInGroup,
    TrackResult,
    models,
)
from tokenlimits._core import arguments
from tokenlimits.errors import InvalidRequest
from tokenlimits.models import (
    Group,
    GroupRef,
    GroupUsage,
    LimitStatus,
    Mode,
    Model,
    Period,
    Reason,
    Scope,
    SinglePeriod,
    Starts,
    User,
    UserLimit,
    _Made,
)

MODELS = [cls for _, cls in inspect.getmembers(models, inspect.isclass) if issubclass(cls, Model) and cls is not Model]
LIMIT = {"kind": "image", "period": "day", "starts": "calendar", "scope": "group", "mode": "enforce"}
ID = UUID("0197f0a0-0000-7000-8000-000000000001")


def result(**fields: Any) -> TrackResult:
    return TrackResult.model_validate({"allowed": True, "kind": "image", "cost": 1} | fields)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
class TestEveryModel:
    def test_is_frozen(self, cls: type[Model]) -> None:
        model = cls.model_construct()
        for field in cls.model_fields:
            with pytest.raises(ValidationError):
                setattr(model, field, None)

    def test_refuses_fields_that_it_does_not_know_if_callers_make_it(self, cls: type[Model]) -> None:
        assert cls.model_config.get("extra") == ("forbid" if issubclass(cls, _Made) else "ignore")

    def test_says_what_it_is(self, cls: type[Model]) -> None:
        assert cls.__doc__


@pytest.mark.parametrize(
    ("make", "given", "misspelt"),
    [
        (Limit, {"kind": "image", "max": 2, "perod": "day"}, "perod"),
        (Limit, {"kind": "image", "max": 2, "Scope": "member"}, "Scope"),
        (GenerationRequest, {"user_id": ID, "kind": "image", "costs": 8}, "costs"),
    ],
)
def test_a_misspelt_field_is_no_default(make: type[Model], given: dict[str, Any], misspelt: str) -> None:
    with pytest.raises(ValidationError, match=rf"{misspelt}\s+Extra inputs"):
        make(**given)


def test_limits_of_a_newer_server_are_read() -> None:
    limit = {"kind": "image", "max": 2, "period": "day", "scope": "member", "alert_at": [80]}
    read = Group.model_validate(
        {"id": ID, "name": "Pro", "description": "", "priority": 0, "timezone": "UTC", "is_default": False}
        | {"created_at": "2026-03-01T12:00:00Z", "updated_at": "2026-03-01T12:00:00Z", "limits": [limit]}
    )
    assert read.limits == (Limit(kind="image", max=2, period="day", scope="member"),)


@pytest.mark.parametrize("named", ["id", "user_id"])
def test_a_user_has_an_id_as_a_group_has(named: str) -> None:
    user = User.model_validate({named: str(ID), "email": None})
    assert user.id == ID
    assert user.model_dump() == {"id": ID, "email": None}


def test_fields_of_a_newer_server_are_ignored() -> None:
    read = result(weather="fine", group={"id": str(ID), "colour": "red"})
    assert not hasattr(read, "weather")
    assert read.group is not None
    assert read.group.name is None


class TestWordsOfANewerServer:
    """A denial must stay one, and usage readable, also where an older client doesn't know the word for it."""

    WORDS: ClassVar = {"period": "century", "starts": "full_moon", "scope": "region", "mode": "warn"}
    STATUS: ClassVar = {"kind": "image", **WORDS, "max": 5, "used": 5, "remaining": 0, "weight": 1}
    DENIED: ClassVar = {"allowed": False, "reason": "suspended", "error": "Suspended.", "status": "frozen"}

    def test_are_passed_on(self) -> None:
        read = result(**self.DENIED, limits=[{**self.STATUS, "reset_at": None}])
        assert (read.reason, read.status) == ("suspended", "frozen")
        assert read.limits[0].model_dump(include=set(self.WORDS)) == self.WORDS
        assert TrackResult.model_validate_json(read.model_dump_json()) == read
        assert TrackResult.model_validate(read.model_dump()) == read

    def test_deny(self) -> None:
        with pytest.raises(GenerationDenied, match="Suspended"):
            result(**self.DENIED).raise_if_denied()

    @pytest.mark.parametrize("field", ["reason", "status"])
    @pytest.mark.parametrize("value", [1, True, [], {}])
    def test_are_words(self, field: str, value: Any) -> None:
        with pytest.raises(ValidationError):
            result(**{field: value})

    def test_are_not_for_what_a_caller_writes(self) -> None:
        with pytest.raises(ValidationError):
            Limit.model_validate({"kind": "image", "max": 1, "period": "century"})

    def test_are_those_that_are_known_to_whoever_reads_the_schema(self) -> None:
        period = LimitStatus.model_json_schema(mode="serialization")["properties"]["period"]
        assert period["anyOf"][0]["enum"] == list(get_args(SinglePeriod))


class TestTrackResult:
    def test_is_true_when_allowed(self) -> None:
        assert result(allowed=True)
        assert not result(allowed=False)

    def test_raises_by_its_reason_when_denied(self) -> None:
        classes: dict[str | None, type[GenerationDenied]] = {
            "limit_exceeded": LimitExceeded,
            "not_in_group": NotInGroup,
            "no_limit_for_kind": NoLimitForKind,
            "unavailable": GenerationDenied,
            None: GenerationDenied,
        }
        # refused raises what track would have raised: tests/unit/test_batches.py
        assert {*get_args(Reason), None} == classes.keys() | {"refused"}
        for reason, cls in classes.items():
            denied = result(allowed=False, reason=reason, error="why")
            with pytest.raises(GenerationDenied, match=r"^why$") as caught:
                denied.raise_if_denied()
            assert type(caught.value) is cls
            assert caught.value.result is denied

    def test_returns_itself_when_allowed(self) -> None:
        for reason in (None, "unavailable"):
            allowed = result(reason=reason)
            assert allowed.raise_if_denied() is allowed

    def test_holds_ids_and_aware_moments(self) -> None:
        read = result(usage_id=str(ID), reset_at="2026-03-01T00:00:00+01:00", group={"id": str(ID), "name": "Pro"})
        assert read.usage_id == ID
        assert isinstance(read.reset_at, datetime)
        assert read.reset_at.utcoffset() is not None

    def test_refuses_a_moment_without_a_zone(self) -> None:
        with pytest.raises(ValidationError):
            result(reset_at="2026-03-01T00:00:00")

    def test_travels(self) -> None:
        sent = result(usage_id=str(ID), reset_at="2026-03-01T00:00:00Z", limits=[])
        assert TrackResult.model_validate_json(sent.model_dump_json()) == sent
        assert pickle.loads(pickle.dumps(sent)) == sent
        assert len({sent, pickle.loads(pickle.dumps(sent))}) == 1


class TestLimit:
    def test_its_defaults_are_a_lifetime_pool(self) -> None:
        limit = Limit(kind="image", max=3)
        assert (limit.period, limit.scope) == ("lifetime", "group")

    @pytest.mark.parametrize("period", get_args(SinglePeriod))
    @pytest.mark.parametrize("scope", get_args(Scope))
    @pytest.mark.parametrize("maximum", [None, 0, 10**15])
    def test_takes(self, period: Period, scope: Scope, maximum: int | None) -> None:
        assert Limit(kind="a" * 32, period=period, scope=scope, max=maximum).max == maximum

    @pytest.mark.parametrize(
        "fields",
        [
            {"kind": "Image"},
            {"kind": ""},
            {"kind": None},
            {"max": -1},
            {"max": 10**15 + 1},
            {"max": True},
            {"max": "5"},
            {"max": 5.0},
            {"scope": "world"},
            {"mode": "allow"},
            {"starts": "soon"},
        ],
    )
    def test_does_not_take(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Limit(**{"kind": "image", "max": 1} | fields)

    @pytest.mark.parametrize(
        ("period", "starts"),
        [
            *product(["minute", "hour", "day", "week", "month", "year"], ["calendar", "anchor", "first_use"]),
            *product(["lifetime", "in_flight"], ["calendar"]),
            *product(["minute", "hour", "day", "week", "2 minutes", "366 weeks"], ["rolling"]),
            *product(["2 minutes", "5 hours", "99 days", "366 weeks"], ["anchor", "first_use"]),
            *product(["2 months", "24 months"], ["anchor"]),
        ],
    )
    def test_periods_may_begin(self, period: Period, starts: Starts) -> None:
        limit = Limit(kind="image", max=1, period=period, starts=starts)
        assert (limit.period, limit.starts) == (period, starts)

    @pytest.mark.parametrize(
        ("period", "starts", "wanted"),
        [
            *product(
                ["2 minutes", "5 hours", "99 days", "366 weeks"], ["calendar"], ["must be anchor, first_use or rolling"]
            ),
            *product(["2 months", "24 months"], ["calendar", "first_use", "rolling"], ["must be anchor"]),
            *product(["month", "year"], ["rolling"], ["must not be rolling"]),
            *product(["lifetime", "in_flight"], ["anchor", "first_use", "rolling"], ["must be calendar"]),
        ],
    )
    def test_periods_may_not_begin(self, period: Period, starts: Starts, wanted: str) -> None:
        with pytest.raises(InvalidRequest, match=rf"^limits\[0\]\.starts: {wanted} ") as caught:
            arguments.limits([{"kind": "image", "max": 1, "period": period, "starts": starts}])  # pyright: ignore[reportArgumentType]
        assert caught.value.detail == "limits[0].starts"

    @pytest.mark.parametrize("unit", ["minute", "hour", "day", "week", "month"])
    def test_one_unit_needs_no_number(self, unit: str) -> None:
        assert Limit(kind="image", max=1, period=f"1 {unit}").period == unit
        assert Limit(kind="image", max=1, period=f"1 {unit}s").period == unit
        assert Limit(kind="image", max=1, period=f"2 {unit}", starts="anchor").period == f"2 {unit}s"

    @pytest.mark.parametrize(
        "period",
        [
            *["fortnight", "hours", "0 hours", "01 hours", "1.5 hours", "-2 hours", "2  hours", "2 hours ", "2 Hours"],
            *[
                "367 days",
                "1000 days",
                "25 months",
                "2 years",
                "1 year",
                "2 lifetimes",
                "2 in_flight",
                "",
                " hour",
                5,
                None,
                ["hour"],
            ],
        ],
    )
    @pytest.mark.parametrize("starts", get_args(Starts))
    def test_other_periods_are_refused(self, period: Any, starts: Starts) -> None:
        with pytest.raises(
            InvalidRequest, match=r'^limits\[0\]\.period: must be in_flight, minute, .*like "5 hours" \(got '
        ):
            arguments.limits([{"kind": "image", "max": 1, "period": period, "starts": starts}])  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("counts", [{"image": 1}, {f"kind_{n}": 1_000_000 for n in range(50)}])
    @pytest.mark.parametrize("mode", get_args(Mode))
    def test_a_pool_counts(self, counts: dict[str, int], mode: Mode) -> None:
        pool = Limit(kind="credits", max=1, counts=counts, mode=mode)
        assert (pool.counts, pool.mode) == (counts, mode)
        assert hash(pool) == hash(Limit(kind="credits", max=2))
        assert pool != Limit(kind="credits", max=1, mode=mode)

    @pytest.mark.parametrize(
        ("counts", "field"),
        [
            ({}, "counts"),
            ({f"kind_{n}": 1 for n in range(51)}, "counts"),
            (["image"], "counts"),
            ({"Image": 1}, "counts.Image"),
            ({"image": 0}, "counts.image"),
            ({"image": 1_000_001}, "counts.image"),
            ({"image": 1.0}, "counts.image"),
            ({"image": True}, "counts.image"),
            ({"image": None}, "counts.image"),
        ],
    )
    def test_a_pool_does_not_count(self, counts: Any, field: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            arguments.limits([{"kind": "credits", "max": 1, "counts": counts}])  # pyright: ignore[reportArgumentType]
        assert caught.value.detail == f"limits[0].{field}"

    def test_holds_have_no_pool(self) -> None:
        in_flight = {"kind": "video", "max": 2, "period": "in_flight", "scope": "member"}
        assert arguments.limits([Limit.model_validate(in_flight)])[0]["counts"] is None
        with pytest.raises(InvalidRequest, match="must be None where the period is in_flight") as caught:
            arguments.limits([in_flight | {"counts": {"video": 1}}])  # pyright: ignore[reportArgumentType]
        assert caught.value.detail == "limits[0].counts"

    def test_its_max_must_be_said(self) -> None:
        with pytest.raises(ValidationError):
            Limit(kind="image")  # pyright: ignore[reportCallIssue]

    def test_unlimited(self) -> None:
        status = LIMIT | {"period": "lifetime", "max": None, "used": 7, "weight": 1}
        read = LimitStatus.model_validate({**status, "remaining": None, "reset_at": None})
        assert (read.max, read.remaining, read.reset_at) == (None, None, None)


class TestGenerationRequest:
    def test_takes_ids_as_text_too(self) -> None:
        assert GenerationRequest.model_validate({"user_id": str(ID), "kind": "image"}).user_id == ID

    @pytest.mark.parametrize("fields", [{"cost": 0}, {"cost": 1.5}, {"kind": "x y"}, {"idempotency_key": ""}])
    def test_refuses_bad_input(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            GenerationRequest.model_validate({"user_id": str(ID), "kind": "image"} | fields)


def test_a_fraction_may_pass_one_after_a_limit_was_lowered() -> None:
    limit = LIMIT | {"max": 2, "used": 3, "remaining": 0, "reset_at": None, "weight": 1}
    usage = GroupUsage.model_validate(
        {"group": {"id": ID}, "member_count": 1, "limits": [{**limit, "capacity": 2, "fraction": 1.5}]}
    )
    assert usage.limits[0].fraction == 1.5


class TestTheGroupOfALimit:
    """The server names it only where it isn't the group that the answer is about."""

    OWN: ClassVar = {**LIMIT, "max": 5, "used": 1, "remaining": 4, "reset_at": None, "weight": 1, "group": None}
    PAYS: ClassVar = {"id": str(ID), "name": "Acme"}
    PLAN: ClassVar = {"id": str(UUID(int=7)), "name": "Pro"}

    @pytest.mark.parametrize("written", [True, False], ids=["from JSON", "from Python"])
    def test_is_the_one_that_pays(self, written: bool) -> None:
        inherited = {**self.OWN, "scope": "child", "group": self.PLAN}
        read = result(group=self.PAYS, limits=[self.OWN, inherited], denied_by=self.OWN, would_deny=[inherited])
        if written:
            read = TrackResult.model_validate_json(read.model_dump_json())
        own, plan = GroupRef.model_validate(self.PAYS), GroupRef.model_validate(self.PLAN)
        assert [limit.group for limit in read.limits] == [own, plan]
        assert read.denied_by is not None
        assert read.denied_by.group == own
        assert [limit.group for limit in read.would_deny] == [plan]

    def test_is_the_one_whose_usage_it_is(self) -> None:
        limits = [self.OWN, {**self.OWN, "scope": "child", "group": self.PLAN}]
        read = GroupUsage.model_validate(
            {"group": self.PAYS, "parent_id": self.PLAN["id"], "member_count": 2, "child_count": 0}
            | {"limits": [{**limit, "capacity": 5, "fraction": 0.2} for limit in limits]}
        )
        assert [limit.group and limit.group.name for limit in read.limits] == ["Acme", "Pro"]
        assert GroupUsage.model_validate(read.model_dump()) == read

    def test_is_none_where_the_answer_is_about_no_group(self) -> None:
        assert result(limits=[self.OWN]).limits[0].group is None

    def test_of_a_user_is_always_named(self) -> None:
        with pytest.raises(ValidationError, match="group"):
            UserLimit.model_validate(self.OWN)
