"""What the API takes and answers, where it isn't a model of the library."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar, cast
from uuid import UUID

from fastapi import Query
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from tokenlimits import Limit
from tokenlimits.models import (
    Cost,
    Group,
    HistoryPoint,
    Kind,
    Max,
    Member,
    Metadata,
    Moment,
    Name,
    Override,
    Period,
    Starts,
    Text,
    TimeZone,
    UserLimit,
)

T = TypeVar("T")

GROUP_ID = "0b5e1f6c-7a39-4d52-9c0e-2f6a1b3c4d5e"
USER_ID = "3f2b8c1a-94d7-4e6b-8a5f-7c9d0e1f2a3b"
_PLAN_ID = "c2a4e6f8-1b3d-4f5a-8c7e-9d0b2f4a6c8e"
_LIMIT: dict[str, Any] = {"kind": "image", "max": 50, "period": "day", "scope": "member"}
_WHOLE_LIMIT: dict[str, Any] = {**_LIMIT, "starts": "calendar", "counts": None, "mode": "enforce"}
GROUP: dict[str, Any] = {
    "id": GROUP_ID,
    "name": "Pro",
    "description": "For paying customers",
    "priority": 10,
    "timezone": "Europe/Paris",
    "is_default": False,
    "anchor_at": None,
    "parent_id": _PLAN_ID,
    "is_spread": False,
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-01T00:00:00Z",
    "limits": [_WHOLE_LIMIT],
}
_MEMBER: dict[str, Any] = {
    "id": USER_ID,
    "email": "ann@example.com",
    "joined_at": "2026-01-01T00:00:00Z",
    "anchor_at": None,
}
_OVERRIDE_IN: dict[str, Any] = {
    "kind": "image",
    "max": 200,
    "user_id": USER_ID,
    "period": "day",
    "until": "2030-01-01T00:00:00Z",
}
OVERRIDE: dict[str, Any] = {
    "id": "5d7e9f1a-2b3c-4d4e-9f60-718293a4b5c6",
    "group_id": GROUP_ID,
    **_OVERRIDE_IN,
    "starts": "calendar",
    "scope": "member",
    "email": "ann@example.com",
    "child_id": None,
    "child_name": None,
    "status": "active",
    "created_at": "2026-01-01T00:00:00Z",
}
_STATUS: dict[str, Any] = {
    "kind": "image",
    "period": "day",
    "starts": "calendar",
    "scope": "member",
    "mode": "enforce",
    "max": 50,
    "used": 12,
    "remaining": 38,
    "reset_at": "2026-01-01T23:00:00Z",
    "weight": 1,
    "group": {"id": GROUP_ID, "name": "Pro"},
}
USAGE: dict[str, Any] = {
    "group": {"id": GROUP_ID, "name": "Pro"},
    "parent_id": _PLAN_ID,
    "member_count": 1,
    "child_count": 0,
    "limits": [{**_STATUS, "capacity": 50, "fraction": 0.24}],
}
RESULT: dict[str, Any] = {
    "allowed": True,
    "usage_id": "0190d7c5-6b1e-7c3a-9f54-0d2e4b6a8c10",
    "status": "committed",
    "group": {"id": GROUP_ID, "name": "Pro"},
    "kind": "image",
    "cost": 1,
    "limits": [_STATUS],
    "would_deny": [],
    "remaining": 38,
    "reset_at": "2026-01-01T23:00:00Z",
    "replayed": False,
}


def _whole(value: Any) -> Any:
    """Take 5.0 for 5: JSON has one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written_out(value: Any) -> Any:
    """Write out `{"image": 100}`."""
    if isinstance(value, dict):
        shorthand = cast("dict[object, object]", value)
        return [{"kind": kind, "max": _whole(max_)} for kind, max_ in shorthand.items()]
    if isinstance(value, list):
        return [_with_whole_numbers(each) for each in cast("list[object]", value)]
    return value


def _with_whole_numbers(limit: object) -> object:
    if not isinstance(limit, dict):
        return limit
    given = cast("dict[str, object]", limit)
    if "max" in given:
        given = {**given, "max": _whole(given["max"])}
    if isinstance(counts := given.get("counts"), dict):
        weights = cast("dict[object, object]", counts)
        given = {**given, "counts": {kind: _whole(weight) for kind, weight in weights.items()}}
    return given


_Whole = BeforeValidator(_whole)


def _in_utc(value: datetime) -> datetime:
    """Write a moment in UTC: PostgreSQL doesn't know every offset that ISO 8601 has."""
    return value.astimezone(UTC)


def cursor(next_: str | None) -> str | None:
    """Write where the next page begins: what that is may change, so nobody should read it."""
    return None if next_ is None else base64.urlsafe_b64encode(next_.encode()).decode().rstrip("=")


def _place(value: str) -> str:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True).decode()
    except ValueError:
        raise ValueError("must be the `next` of the page before") from None


After = Annotated[str, AfterValidator(_place), Query(max_length=1200, description="`next` of the page before")]
UtcMoment = Annotated[Moment, AfterValidator(_in_utc)]
_Anchor = Annotated[UtcMoment, Field(description="From when periods that start at an anchor are counted, since 1970")]
_Parent = Annotated[UUID, Field(description="The group that it is beneath, whose limits count its usage too")]
Priority = Annotated[StrictInt, Field(ge=-(2**31), lt=2**31), _Whole]
_Maxima = Annotated[
    dict[Kind, Max | None],
    WithJsonSchema(
        {
            "type": "object",
            "title": "Lifetime pools",
            "propertyNames": {"pattern": TypeAdapter[Any](Kind).json_schema()["pattern"]},
            "additionalProperties": {
                "anyOf": [{"type": "integer", "minimum": 0, "maximum": 1_000_000_000_000_000}, {"type": "null"}]
            },
            "maxProperties": 500,
        }
    ),
]
Limits = Annotated[
    list[Limit],
    Field(max_length=500),
    BeforeValidator(_written_out, json_schema_input_type=Annotated[list[Limit], Field(max_length=500)] | _Maxima),
]


class Page(BaseModel, Generic[T]):
    """A page of a list; `next` is the `after` of the next page, and null on the last one."""

    items: list[T]
    next: str | None = None


class Groups(Page[Group]):
    """A page of groups, by name."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [GROUP], "next": None}]})


class Members(Page[Member]):
    """A page of members, in the order of their ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [_MEMBER], "next": None}]})


class History(BaseModel):
    """What was used, oldest first."""

    items: list[HistoryPoint]


class MyUsage(BaseModel):
    """Every limit that binds the caller, in the order in which their groups pay."""

    items: tuple[UserLimit, ...]


class GroupIn(BaseModel):
    """A group to create: its limits as a list, or as a shorthand like `{"image": 100}` for lifetime pools."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"name": "Pro", "timezone": "Europe/Paris", "limits": [_LIMIT]}]},
    )

    name: Name
    description: Annotated[Text, Field(max_length=2000)] = ""
    priority: Priority = 0
    timezone: TimeZone = "UTC"
    is_default: StrictBool = False
    anchor_at: _Anchor | None = None
    parent_id: _Parent | None = None
    is_spread: Annotated[
        StrictBool, Field(description="Member limits only: for more users than one database is to hold")
    ] = False
    limits: Limits = Field(default_factory=list[Limit])


class GroupChanges(BaseModel):
    """What to change of a group; what is left out or null stays, but a null `anchor_at` or `parent_id` removes it.

    Limits are replaced as a whole. A group that moves takes its usage along, with the groups beneath it.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"limits": {"image": 100}}]})

    name: Name | None = None
    description: Annotated[Text, Field(max_length=2000)] | None = None
    priority: Priority | None = None
    timezone: TimeZone | None = None
    is_default: StrictBool | None = None
    anchor_at: _Anchor | None = None
    parent_id: _Parent | None = None
    limits: Limits | None = None


class NewMembers(BaseModel):
    """One user, as `user_id`, or many, as `user_ids`; `anchor_at` is for all who are added."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"group_id": GROUP_ID, "user_ids": [USER_ID]}],
            "oneOf": [{"required": ["user_id"]}, {"required": ["user_ids"]}],
        },
    )

    group_id: UUID
    user_id: UUID = Field(default=None, validate_default=False)  # pyright: ignore[reportAssignmentType]
    user_ids: list[UUID] = Field(default=None, validate_default=False, max_length=50_000)  # pyright: ignore[reportAssignmentType]
    anchor_at: _Anchor | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, value: Any) -> Any:
        if isinstance(value, dict) and ("user_id" in value) == ("user_ids" in value):
            raise ValueError("name either user_id or user_ids")
        return value  # pyright: ignore[reportUnknownVariableType]

    def ids(self) -> list[UUID]:
        """Return the users."""
        return self.user_ids if "user_ids" in self.model_fields_set else [self.user_id]


class NewAnchor(BaseModel):
    """From when a member's anchored periods are counted; null: from when they joined."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"group_id": GROUP_ID, "user_id": USER_ID, "anchor_at": "2026-01-31T09:00:00Z"}]
        },
    )

    group_id: UUID
    user_id: UUID
    anchor_at: _Anchor | None


class Anchored(BaseModel):
    """Whether the user is a member; if not, nothing was changed."""

    set: bool = Field(examples=[True])


class Removed(BaseModel):
    """How many of the users were members."""

    removed: int = Field(examples=[1])


class Generation(BaseModel):
    """A generation to track. A signed-in user can charge nobody else, and choose the kind alone."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"user_id": USER_ID, "kind": "image", "cost": 1}]}
    )

    kind: Kind
    cost: Annotated[Cost, _Whole] = 1
    user_id: UUID | None = None
    idempotency_key: Annotated[Text, Field(min_length=1, max_length=255)] | None = None
    group_id: UUID | None = None
    metadata: Metadata | None = None


class Overrides(BaseModel):
    """The overrides of a group's limits, by id."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [OVERRIDE]}]})

    items: list[Override]


class OverrideIn(BaseModel):
    """Another max of one limit: for one user, for one group directly beneath, or of a group limit if neither is named.

    Without `until`, it is for good.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_OVERRIDE_IN]})

    kind: Kind
    max: Annotated[Max, _Whole] | None = Field(description="What applies instead of the limit's max; null: unlimited")
    user_id: UUID | None = None
    child_id: UUID | None = Field(None, description="Whose allowance under a `child` limit; not with `user_id`")
    period: Period | None = None
    starts: Starts | None = None
    until: UtcMoment | None = None


class OverrideRemoved(BaseModel):
    """Whether there was such an override."""

    removed: bool = Field(examples=[True])


class ResetIn(BaseModel):
    """What to reset: limits on one kind, or all; those of the whole group, or a user's member limits alone.

    The whole group's are its group and member limits, and its own allowance under `child` limits of the group above.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"kind": "image", "user_id": USER_ID}]})

    kind: Kind | None = None
    user_id: UUID | None = None


class ResetAt(BaseModel):
    """From when usage counts."""

    reset_at: Moment = Field(examples=["2026-01-01T12:00:00Z"])
