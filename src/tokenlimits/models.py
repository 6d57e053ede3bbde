"""What goes in and what comes out: frozen models that ignore fields they don't know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast
from uuid import UUID

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from ._fields import Cost, Kind, Max, Metadata, Name, Text, TimeZone
from ._refusals import refusal
from .errors import GenerationDenied, LimitExceeded, NoLimitForKind, NotInGroup, TokenLimitsError

__all__ = [
    "Bucket",
    "BulkResult",
    "Cost",
    "CounterDrift",
    "GenerationRequest",
    "Group",
    "GroupLimitUsage",
    "GroupRef",
    "GroupUsage",
    "HistoryDrift",
    "HistoryPoint",
    "Kind",
    "Limit",
    "LimitStatus",
    "Max",
    "Member",
    "Metadata",
    "Model",
    "Name",
    "OnUnavailable",
    "Period",
    "Reason",
    "Reconciliation",
    "Refused",
    "Scope",
    "Status",
    "Text",
    "TimeZone",
    "TopMember",
    "TrackResult",
    "UsageRecord",
    "UsageSum",
    "User",
    "UserLimit",
]

Period = Literal["minute", "hour", "day", "week", "month", "lifetime"]
"""Calendar periods begin in the group's time zone; weeks on Monday; lifetime never ends."""

Scope = Literal["group", "member"]
"""`group`: one pool that the members share; `member`: each member has their own."""

Reason = Literal["not_in_group", "no_limit_for_kind", "limit_exceeded", "refused", "unavailable"]
"""Why a generation is denied; `unavailable` also when it is allowed because Supabase can't be reached; `refused` for a
request of `track_many` that `track` would have raised an error for."""

Status = Literal["reserved", "committed", "released", "refunded", "expired"]
"""Of a usage; the first two count."""

Bucket = Literal["hour", "day", "week", "month"]
"""The step of a history."""

OnUnavailable = Literal["raise", "allow", "deny"]
"""What a worker gets when Supabase can't be reached."""


def _known_or_newer(word: Any, known: ValidatorFunctionWrapHandler) -> Any:
    try:
        return known(word)
    except ValidationError:
        if isinstance(word, str):
            return word
        raise


_Open = (WrapValidator(_known_or_newer), PlainSerializer(lambda word: word))
"""Of a word in an answer: a newer database may have words that aren't in its `Literal`. They are passed on as they are,
for a denial must stay one, whatever its reason."""


class Model(BaseModel):
    """Base of all models: frozen, and open to fields of newer servers."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")


class _Made(Model):
    """Base of what callers make: a misspelt field would silently be its default, so it is refused."""

    model_config = ConfigDict(extra="forbid")


class GroupRef(Model):
    """Which group; `name` is None when it was deleted since."""

    id: UUID
    name: str | None = None


class Limit(_Made):
    """How much of a kind a group, or each of its members, may use in a period.

    `max` is in units of cost: None is unlimited, 0 blocks.

    Example:
        >>> Limit(kind="image", max=50, period="day", scope="member")
        Limit(kind='image', max=50, period='day', scope='member')
    """

    kind: Kind
    max: Max | None
    period: Period = "lifetime"
    scope: Scope = "group"


class LimitStatus(Model):
    """A limit in its current period: `used` and `remaining` in units of cost, `reset_at` when the period ends."""

    kind: str
    period: Annotated[Period, *_Open]
    scope: Annotated[Scope, *_Open]
    max: int | None
    used: int
    remaining: int | None
    reset_at: AwareDatetime | None


class UserLimit(LimitStatus):
    """A limit that binds a user, and the group that it belongs to."""

    group: GroupRef


class TrackResult(Model):
    """The answer to a generation: whether it is allowed, how much remains, and when it resets.

    It is true when allowed. `remaining` is the smallest of the limits' (None: unlimited). `reset_at` is when the limit
    with the least room resets, or, when denied, when the limit that denied will have room (None: never by itself);
    `retry_after` is how many seconds that is from now. `usage_id` names the usage that was recorded; it is opaque: read
    nothing from it. `replayed` says that an earlier call with the same idempotency key had recorded it. `code` and
    `detail` are those of the error that `track` would have raised, when `track_many` was refused one of its requests.
    """

    allowed: bool
    reason: Annotated[Reason | None, *_Open] = None
    error: str | None = None
    usage_id: UUID | None = None
    status: Annotated[Status | None, *_Open] = None
    expires_at: AwareDatetime | None = None
    group: GroupRef | None = None
    kind: str
    cost: int
    limits: tuple[LimitStatus, ...] = ()
    denied_by: LimitStatus | None = None
    remaining: int | None = None
    reset_at: AwareDatetime | None = None
    retry_after: float | None = None
    replayed: bool = False
    code: str | None = None
    detail: str | None = None

    def __bool__(self) -> bool:
        """Whether the generation is allowed."""
        return self.allowed

    def raise_if_denied(self) -> Self:
        """Return the result itself when allowed.

        Raises:
            LimitExceeded, NotInGroup, NoLimitForKind: By the reason; all are `GenerationDenied`.
            InvalidRequest, IdempotencyConflict, GroupNotFound: What `track` would have raised for this request of
                `track_many`.

        Example:
            >>> TrackResult(allowed=True, kind="image", cost=1).raise_if_denied().allowed
            True
        """
        if self.allowed:
            return self
        if self.reason == "refused":
            raise self.refusal()
        by_reason: Mapping[str | None, type[GenerationDenied]] = {
            "limit_exceeded": LimitExceeded,
            "not_in_group": NotInGroup,
            "no_limit_for_kind": NoLimitForKind,
        }
        raise by_reason.get(self.reason, GenerationDenied)(self)

    def refusal(self) -> TokenLimitsError:
        """Make the error that `track` would have raised for this request of `track_many`, when it was refused.

        Example:
            >>> refused = {"allowed": False, "kind": "image", "cost": 1, "reason": "refused", "code": "TL002"}
            >>> type(TrackResult.model_validate(refused).refusal()).__name__
            'GroupNotFound'
        """
        return refusal(400, {"code": self.code, "message": self.error, "details": self.detail})


class GenerationRequest(_Made):
    """One generation to track."""

    user_id: UUID
    kind: Kind
    cost: Cost = 1
    idempotency_key: Annotated[Text, Field(min_length=1, max_length=255)] | None = None
    group_id: UUID | None = None
    metadata: Metadata | None = None


def _known_fields(limit: object) -> object:
    """Leave out what a newer server says of a limit."""
    if not isinstance(limit, dict):
        return limit
    return {name: value for name, value in cast("dict[str, object]", limit).items() if name in Limit.model_fields}


class Group(Model):
    """A group of users with its limits."""

    id: UUID
    name: str
    description: str
    priority: int
    timezone: str
    is_default: bool
    created_at: AwareDatetime
    updated_at: AwareDatetime
    limits: tuple[Annotated[Limit, BeforeValidator(_known_fields)], ...]


class GroupLimitUsage(LimitStatus):
    """A limit of a group in its current period.

    Of a member limit, `used` is what all members used together and `capacity` is `max` times the members. `fraction`
    is `used` of `capacity`, from 0 (None: unlimited); above 1 after a limit was lowered.
    """

    capacity: int | None
    fraction: float | None


class GroupUsage(Model):
    """A group's members counted, and its limits."""

    group: GroupRef
    member_count: int
    limits: tuple[GroupLimitUsage, ...]


class HistoryPoint(Model):
    """What was used of a kind in the hour, day, week or month that begins at `bucket`."""

    bucket: AwareDatetime
    kind: str
    used: int
    generations: int


class UsageSum(HistoryPoint):
    """What a group used of a kind in the hour, day, week or month of its `timezone` that begins at `bucket`."""

    group: GroupRef
    timezone: str


class CounterDrift(Model):
    """A counter that did not agree with the ledger: `subject` is the group or the member, `used` what is right."""

    kind: str
    period: Period
    scope: Scope
    subject: UUID
    was: int
    used: int


class HistoryDrift(Model):
    """A quarter of an hour of the history that did not agree with the ledger; `used` is what is right."""

    kind: str
    bucket: AwareDatetime
    was: int
    used: int


class Reconciliation(Model):
    """What differed from the ledger: nothing, unless somebody wrote past the functions, or restored the ledger alone.

    `holds` is the number of holds that would never have expired.
    """

    counters: tuple[CounterDrift, ...]
    rollup: tuple[HistoryDrift, ...]
    holds: int = 0

    @property
    def drifted(self) -> bool:
        """Whether anything did."""
        return bool(self.counters or self.rollup or self.holds)


class User(Model):
    """A user of the Supabase project."""

    user_id: UUID
    email: str | None


class TopMember(User):
    """What a user used in a group; `email` is None when the user was deleted since."""

    used: int
    generations: int


class UsageRecord(Model):
    """A row of the ledger.

    `created_at` decides the period that it belongs to. `expires_at` is set when it is a hold, or was one. `email` is
    None when the user was deleted since.
    """

    id: UUID
    group: GroupRef
    user_id: UUID
    email: str | None
    kind: str
    cost: int
    status: Annotated[Status, *_Open]
    idempotency_key: str | None
    metadata: dict[str, JsonValue]
    created_at: AwareDatetime
    settled_at: AwareDatetime | None
    expires_at: AwareDatetime | None


class Member(User):
    """A user in a group."""

    joined_at: AwareDatetime


class Refused(Model):
    """A user that a bulk operation could not take, and why."""

    user_id: UUID
    reason: str


class BulkResult(Model):
    """How many users were added, how many were members already, and who was refused."""

    added: int
    already: int
    refused: tuple[Refused, ...]
