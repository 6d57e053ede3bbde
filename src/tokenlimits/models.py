"""What goes in and what comes out: frozen models that ignore unknown fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal, Self, TypeVar, cast
from uuid import UUID

from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from ._fields import Cost, Key, Kind, Max, Metadata, Moment, Name, Text, TimeZone
from ._limits import Counts, Mode, Period, SinglePeriod, Starts, number_and_unit, pooled, start
from ._refusals import refusal
from .errors import GenerationDenied, LimitExceeded, NoLimitForKind, NotInGroup, TokenLimitsError

__all__ = [
    "UNCHANGED",
    "Bucket",
    "BulkResult",
    "Cost",
    "CounterDrift",
    "Counts",
    "GenerationRequest",
    "Group",
    "GroupLimitUsage",
    "GroupRef",
    "GroupUsage",
    "HistoryDrift",
    "HistoryPoint",
    "Key",
    "Kind",
    "Limit",
    "LimitPressure",
    "LimitStatus",
    "Max",
    "Member",
    "Metadata",
    "Mode",
    "Model",
    "Moment",
    "Name",
    "OnUnavailable",
    "Overage",
    "Override",
    "OverrideStatus",
    "Page",
    "Period",
    "PressedMember",
    "Reason",
    "Reconciliation",
    "Refused",
    "Scope",
    "SinglePeriod",
    "Starts",
    "Status",
    "Text",
    "TimeZone",
    "TopMember",
    "TrackResult",
    "Unchanged",
    "UsageRecord",
    "UsageSum",
    "User",
    "UserLimit",
    "number_and_unit",
]

_T = TypeVar("_T")

Scope = Literal["group", "child", "member"]
"""`group`: one allowance for the group and all groups beneath it; `child`: a separate allowance for each group directly
beneath it, with all beneath that; `member`: a separate allowance for each user, wherever beneath."""

Reason = Literal["not_in_group", "no_limit_for_kind", "limit_exceeded", "refused", "unavailable"]
"""Why a generation is denied. `unavailable`: Supabase couldn't be reached, also where this allows the generation.
`refused`: `track` would have raised an error for this request of `track_many`."""

Status = Literal["reserved", "committed", "released", "refunded", "expired"]
"""The status of a usage; only the first two count towards limits."""

Bucket = Literal["hour", "day", "week", "month"]
"""The step of a history."""

OverrideStatus = Literal["active", "ended", "sleeping"]
"""`ended`: its `until` has passed; `sleeping`: there is no such limit, or no such child, at the moment."""

OnUnavailable = Literal["raise", "allow", "deny"]
"""What a worker gets when Supabase can't be reached."""

Overage = Literal["reject", "charge"]
"""Whether a hold may be committed for more than was reserved."""


def _known_or_newer(word: Any, known: ValidatorFunctionWrapHandler) -> Any:
    try:
        return known(word)
    except ValidationError:
        if isinstance(word, str):
            return word
        raise


_Open = (WrapValidator(_known_or_newer), PlainSerializer(lambda word: word))
"""For a word in an answer. A newer database may have words that the `Literal` lacks; they are passed on unchanged, so
that a denial remains a denial, whatever its reason."""


class Model(BaseModel):
    """Base class of all models: frozen, and tolerant of fields from newer servers."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")


class _Made(Model):
    """Base of what callers make: a misspelt field would silently be its default, so it is refused."""

    model_config = ConfigDict(extra="forbid")


class Unchanged(Enum):
    """What stands for "leave it alone" where None is a value."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


UNCHANGED: Final = Unchanged.UNCHANGED
"""Leave it alone."""


class Page(list[_T]):
    """A part of a longer list; `next` is what to pass as `after` for the part that follows (None: this is the last).

    `next` is opaque: pass it on as it is.

    Example:
        >>> page = groups.page(size=1)
        >>> [group.name for group in page], page.next
        (['Everyone'], 'Everyone')
        >>> page = groups.page(size=1, after=page.next)
        >>> [group.name for group in page], page.next
        (['Team'], None)
    """

    def __init__(self, items: Iterable[_T] = (), next: str | None = None) -> None:  # noqa: A002  # as the attribute
        super().__init__(items)
        self.next = next


class GroupRef(Model):
    """A reference to a group; `name` is None if the group has been deleted."""

    id: UUID
    name: str | None = None


class Limit(_Made):
    """How much of a kind a group, each group beneath it, or each of its members may use in a period.

    `max` is in units of cost; None is unlimited, and 0 blocks the kind. `counts` makes the limit a pool that several
    kinds share, with how many of its units one of each takes. `kind` is then only its name. With the period
    `in_flight`, `max` is how many holds of the kind may be open at once; `track` and `record` are not affected.

    Example:
        >>> credits = Limit(kind="credits", max=1000, period="month", counts={"image": 1, "video": 8})
        >>> credits.period, credits.scope, credits.starts, credits.mode
        ('month', 'group', 'calendar', 'enforce')
        >>> Limit(kind="image", max=50, period="5 hours", scope="member", starts="rolling").period
        '5 hours'
    """

    kind: Kind
    max: Max | None
    period: Period = "lifetime"
    scope: Scope = "group"
    starts: Starts = Field(default="calendar", validate_default=True)
    counts: Counts | None = None
    mode: Mode = "enforce"

    @field_validator("starts")
    @classmethod
    def _check_start(cls, starts: Starts, info: ValidationInfo) -> Starts:
        period: str | None = info.data.get("period")
        # without a period, that is what is refused
        return starts if period is None else start(starts, period)

    @field_validator("counts")
    @classmethod
    def _check_counts(cls, counts: Counts | None, info: ValidationInfo) -> Counts | None:
        return pooled(counts, info.data.get("period", ""))

    def __hash__(self) -> int:
        """Hash what identifies a limit within its group: `counts` can't be hashed."""
        return hash((self.kind, self.period, self.starts, self.scope))


class LimitStatus(Model):
    """A limit in its current period, which ends at `reset_at` (None: never by itself, or none is open).

    `used` and `max` are in units of the limit. In an answer about a kind, `remaining` is how many units of that kind
    still fit, where each takes `weight` of the limit; elsewhere, `weight` is 1. A limit in flight counts holds, and its
    `reset_at` is None, except where it denies: that is when the next place will be free. `group` is the group that the
    limit belongs to: the one that pays (in SQL's own answers None), or one above it.
    """

    kind: str
    period: Annotated[Period, *_Open]
    starts: Annotated[Starts, *_Open]
    scope: Annotated[Scope, *_Open]
    mode: Annotated[Mode, *_Open]
    max: int | None
    used: int
    remaining: int | None
    reset_at: AwareDatetime | None
    weight: int
    group: GroupRef | None = None


_Status = TypeVar("_Status", bound=LimitStatus)


def _owned(limit: _Status, answer: ValidationInfo) -> _Status:
    """Fill in the group that an answer is about, where the limit is its own."""
    return limit if limit.group is not None else limit.model_copy(update={"group": answer.data.get("group")})


class UserLimit(LimitStatus):
    """A limit that applies to a user, with the group that it belongs to."""

    # required, and never None: models are frozen, so a narrower type is safe
    group: GroupRef  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]


class TrackResult(Model):
    """The answer to a generation: whether it is allowed, how much remains, and when it resets.

    Truthy when allowed. `remaining` is the smallest among the enforced limits (None: unlimited). `reset_at` is when the
    limit with the least room resets or, if denied, when the limit that denied it will have room (None: never by
    itself); `retry_after` is the number of seconds until then, if denied. `would_deny` lists the observing limits that
    had no room for it. `usage_id` is the id of the recorded usage; it is
    opaque. `replayed` is true if an earlier call with the same idempotency key recorded the usage. `code` and `detail`
    belong to the error that `track` would have raised for a refused request of `track_many`.
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
    limits: tuple[Annotated[LimitStatus, AfterValidator(_owned)], ...] = ()
    denied_by: Annotated[LimitStatus, AfterValidator(_owned)] | None = None
    would_deny: tuple[Annotated[LimitStatus, AfterValidator(_owned)], ...] = ()
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
        """Return the result itself if allowed.

        Raises:
            LimitExceeded, NotInGroup, NoLimitForKind: Denied, for this reason; all are `GenerationDenied`.
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
        """Make the error that `track` would have raised for this refused request of `track_many`.

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
    idempotency_key: Key | None = None
    group_id: UUID | None = None
    metadata: Metadata | None = None


def _known_fields(limit: object) -> object:
    """Leave out what a newer server says of a limit."""
    if not isinstance(limit, dict):
        return limit
    return {name: value for name, value in cast("dict[str, object]", limit).items() if name in Limit.model_fields}


class Group(Model):
    """A group of users with its limits.

    What is used in it counts for its own limits, and for those of the group above it (`parent_id`; None: there is
    none) and of all above that. The periods of its group limits with `starts="anchor"`, and those of its allowance
    under `child` limits, are counted from `anchor_at` or, if it is None, `created_at`. A *spread* group has member
    limits only, so that its usage can be at home with its users.
    """

    id: UUID
    name: str
    description: str
    priority: int
    timezone: str
    is_default: bool
    anchor_at: Moment | None = None
    parent_id: UUID | None = None
    is_spread: bool = False
    created_at: Moment
    updated_at: Moment
    limits: tuple[Annotated[Limit, BeforeValidator(_known_fields)], ...]


class GroupLimitUsage(LimitStatus):
    """A limit of a group, or its allowance under a `child` limit of the group above, in its current period.

    For a member limit, `used` is the total of all users of the group and of all beneath it, and `capacity` is the sum
    of what each may use: `max` times their number, if none has an override. The same goes for the group's own `child`
    limits and the groups directly beneath it. `fraction` is `used` divided by `capacity` (None: unlimited); it exceeds
    1 after a limit was lowered below what is used.
    """

    capacity: int | None
    fraction: float | None


class GroupUsage(Model):
    """A group's place and member count, and its limits with their usage.

    `limits` includes the group's allowance under the `child` limits of the group above it, which is then the limit's
    `group`. `child_count` is the number of groups directly beneath it; `member_count` doesn't include their members.
    """

    group: GroupRef
    parent_id: UUID | None = None
    member_count: int
    child_count: int = 0
    limits: tuple[Annotated[GroupLimitUsage, AfterValidator(_owned)], ...]


class HistoryPoint(Model):
    """What was used of a kind in the hour, day, week or month that begins at `bucket`."""

    bucket: Moment
    kind: str
    used: int
    generations: int


class UsageSum(HistoryPoint):
    """What a group used of a kind in the hour, day, week or month of its `timezone` that begins at `bucket`."""

    group: GroupRef
    timezone: str


class CounterDrift(Model):
    """A counter that differed from the ledger: `subject` is the group or the user, `used` is the correct value."""

    kind: str
    period: Annotated[Period, *_Open]
    starts: Annotated[Starts, *_Open]
    scope: Annotated[Scope, *_Open]
    subject: UUID
    was: int
    used: int


class HistoryDrift(Model):
    """A quarter-hour of the history that differed from the ledger; `used` is the correct value."""

    kind: str
    bucket: Moment
    was: int
    used: int


class Reconciliation(Model):
    """What differed from the ledger: nothing, unless somebody bypassed the functions, or restored only the ledger.

    `holds` is the number of holds that would never have expired.
    """

    counters: tuple[CounterDrift, ...]
    rollup: tuple[HistoryDrift, ...]
    holds: int = 0

    @property
    def drifted(self) -> bool:
        """Whether anything differed."""
        return bool(self.counters or self.rollup or self.holds)


class User(Model):
    """A user of the Supabase project."""

    # the database calls it user_id, as the column of memberships and of the ledger
    id: UUID = Field(validation_alias=AliasChoices("id", "user_id"))
    email: str | None


class TopMember(User):
    """What a user used in a group; `email` is None if the user has been deleted."""

    used: int
    generations: int


class Override(Model):
    """Another max of one limit for one user (`user_id`), for one group beneath (`child_id`), or of a group limit.

    While it is active, `max` replaces the limit's own (None: unlimited), until `until` (None: for good). It names its
    limit by kind, period, starts and scope, so it sleeps while there is no such limit, or while the child isn't beneath
    the group. `email` is None if the user has been deleted; overrides of a group that is deleted go with it.
    """

    id: UUID
    group_id: UUID
    kind: str
    period: Annotated[Period, *_Open]
    starts: Annotated[Starts, *_Open]
    scope: Annotated[Scope, *_Open]
    user_id: UUID | None
    email: str | None
    child_id: UUID | None = None
    child_name: str | None = None
    max: int | None
    until: Moment | None
    status: Annotated[OverrideStatus, *_Open]
    created_at: Moment


class PressedMember(User):
    """What a member has used of a member limit, in its current period."""

    used: int


class LimitPressure(Model):
    """How many members, with those of the groups beneath, are at a member limit, or close to it.

    `full` of them have used all that they may, and `near` at least the percentage that was asked for, including those.
    `members` are the first of them, with the most used first. `max` is the limit's own; each member is compared with
    what they may use, which an override may have changed.
    """

    kind: str
    period: Annotated[Period, *_Open]
    starts: Annotated[Starts, *_Open]
    max: int | None
    full: int
    near: int
    members: tuple[PressedMember, ...]


class UsageRecord(Model):
    """A row of the ledger.

    `created_at` determines the period that it counts in. `expires_at` is set if it is or was a hold. `email` is None if
    the user has been deleted.
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
    created_at: Moment
    settled_at: Moment | None
    expires_at: Moment | None


class Member(User):
    """A user in a group.

    The periods of their limits with `starts="anchor"` are counted from `anchor_at` or, if it is None, `joined_at`.
    """

    joined_at: Moment
    anchor_at: Moment | None = None


class Refused(Model):
    """A user that a bulk operation refused, and why."""

    user_id: UUID
    reason: str


class BulkResult(Model):
    """How many users were added, how many already were members, and who was refused."""

    added: int
    already: int
    refused: tuple[Refused, ...]
