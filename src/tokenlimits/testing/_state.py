"""What the fake keeps in memory, and what its functions ask of it.

Usage since a moment is added up from the ledger when it is first needed, and kept up to date from then on. Ids are
text, as in JSON. Nothing is recorded later than `now`, so whatever was recorded since a period began is in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, NoReturn

from tokenlimits._refusals import refusal
from tokenlimits.errors import InvalidRequest
from tokenlimits.models import Status

from ._periods import BEGINNING, NEVER, period_of

Json = dict[str, Any]

ALL_KINDS = "*"
MOMENT = timedelta(microseconds=1)

# more than the limits of one group have different beginnings at a time
_MANY_TOTALS = 16


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit without its max."""

    kind: str
    period: str
    scope: str


@dataclass(frozen=True, slots=True)
class Membership:
    """A user's membership of a group; `place` orders members who joined while the clock stood still."""

    joined_at: datetime
    place: int


@dataclass(eq=False, slots=True)
class Group:
    """A group with its limits and members; `unlimited` allows any kind that has no limit."""

    id: str
    name: str
    description: str
    priority: int
    timezone: str
    is_default: bool
    created_at: datetime
    updated_at: datetime
    unlimited: bool = False
    limits: dict[Rule, int | None] = field(default_factory=dict[Rule, "int | None"])
    members: dict[str, Membership] = field(default_factory=dict[str, Membership])

    def rules(self, kind: str | None = None) -> dict[Rule, int | None]:
        """List the limits of a kind, or all, in the order of the SQL: a kind's member limits first."""
        rules = sorted((r for r in self.limits if kind in (None, r.kind)), key=lambda r: (r.kind, r.scope == "group"))
        if not rules and self.unlimited and kind is not None:
            return {Rule(kind, "lifetime", "group"): None}
        return {rule: self.limits[rule] for rule in rules}


@dataclass(eq=False, slots=True)
class Usage:
    """A row of the ledger; `request` is what was requested with the idempotency key."""

    id: str
    group_id: str
    user_id: str
    kind: str
    cost: int
    status: Status
    idempotency_key: str | None
    request: tuple[object, ...]
    metadata: Json
    created_at: datetime
    # of a hold, or what was one
    reserved_cost: int | None = None
    expires_at: datetime | None = None
    settled_at: datetime | None = None

    @property
    def live(self) -> bool:
        """Whether it counts towards limits."""
        return self.status in ("reserved", "committed")


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit and its usage since `since`, in the period that ends at `until`."""

    rule: Rule
    max: int | None
    used: int
    since: datetime
    until: datetime


def refuse(code: str, message: str, *, detail: str | None = None, hint: str | None = None) -> NoReturn:
    """Raise the error that a client raises when the server answers with this one."""
    raise refusal(400, {"code": code, "message": f"{message} ({code})", "details": detail, "hint": hint})


class State:
    """The tables, and a clock that stands still until it is moved."""

    def __init__(self, users: Mapping[str, str | None] | None) -> None:
        self.now = datetime.now(UTC)
        self.ledger: list[Usage] = []
        self._groups: dict[str, Group] = {}
        # including those of deleted groups
        self._group_ids: set[str] = set()
        self._users = users
        self._places = count()
        self._resets: dict[tuple[str, str], datetime] = {}
        self._by_group_and_kind: defaultdict[tuple[str, str], list[Usage]] = defaultdict(list)
        self._by_id: dict[str, Usage] = {}
        self._by_key: dict[tuple[str, str], Usage] = {}
        self._holds: dict[str, Usage] = {}
        # by group, kind and user (None: all users): what was used since each moment
        self._totals: defaultdict[tuple[str, str, str | None], dict[datetime, int]] = defaultdict(dict)

    def move_clock(self, moment: datetime) -> None:
        """Move the clock, but not back to before anything that was recorded."""
        if moment.tzinfo is None:
            raise InvalidRequest(f"now: needs a time zone (got {moment!r})", code="TL001", detail="now")
        happened = [usage.settled_at or usage.created_at for usage in self.ledger] + list(self._resets.values())
        if moment < max(happened, default=BEGINNING):
            raise InvalidRequest(
                "now: must not be before anything that was recorded. Set the clock before you track.",
                code="TL001",
                detail="now",
            )
        self.now = moment.astimezone(UTC)
        self._expire()

    def reference(self, group_id: str) -> Json:
        """Refer to a group; a deleted group has no name."""
        group = self._groups.get(group_id)
        return {"id": group_id, "name": group.name if group else None}

    def _group(self, group_id: str) -> Group:
        group = self._groups.get(group_id)
        if group is None:
            refuse(
                "TL002",
                f"there is no group {group_id}",
                detail=group_id,
                hint="It may have been deleted; list the groups to see which exist.",
            )
        return group

    def _paying_groups(self, user_id: str, pinned: str | None) -> list[Group]:
        theirs = [group for group in self._groups.values() if user_id in group.members]
        theirs.sort(key=lambda group: (-group.priority, group.members[user_id].place))
        paying = theirs or [group for group in self._groups.values() if group.is_default]
        if pinned is None:
            return paying
        group = self._group(pinned)
        return [group] if group in paying else []

    def _states(self, group: Group, user_id: str | None, kind: str | None = None) -> list[LimitState]:
        """Return a group's limits for a user; without a user, member limits count all members together."""
        states: list[LimitState] = []
        for rule, max_ in group.rules(kind).items():
            since, until = period_of(rule.period, group.timezone, self.now)
            for reset in ((group.id, rule.kind), (group.id, ALL_KINDS)):
                since = max(since, self._resets.get(reset, BEGINNING))
            whose = user_id if rule.scope == "member" else None
            states.append(LimitState(rule, max_, self._used(group.id, rule.kind, whose, since), since, until))
        return states

    def _used(self, group_id: str, kind: str, user_id: str | None, since: datetime) -> int:
        totals = self._totals[group_id, kind, user_id]
        if since not in totals:
            if len(totals) >= _MANY_TOTALS:
                totals.clear()
            totals[since] = sum(
                usage.cost
                for usage in self._by_group_and_kind[group_id, kind]
                if usage.live and usage.created_at >= since and user_id in (None, usage.user_id)
            )
        return totals[since]

    def _write(self, usage: Usage) -> None:
        self.ledger.append(usage)
        self._by_group_and_kind[usage.group_id, usage.kind].append(usage)
        self._count(usage, usage.cost)
        if usage.status == "reserved":
            self._holds[usage.id] = usage
        if usage.idempotency_key is not None:
            self._take_key(usage, usage.idempotency_key)
        self._by_id[usage.id] = usage

    def _take_key(self, usage: Usage, key: str) -> None:
        """Bind a key to a usage; a dead one that had it has none from then on."""
        dead = self._by_key.get((usage.user_id, key))
        if dead is not None:
            dead.idempotency_key = None
        self._by_key[usage.user_id, key] = usage

    def _settle(self, usage: Usage, status: Status, cost: int, at: datetime) -> None:
        before = usage.cost if usage.live else 0
        usage.status, usage.cost, usage.settled_at = status, cost, at
        self._holds.pop(usage.id, None)
        self._count(usage, (cost if usage.live else 0) - before)

    def _count(self, usage: Usage, cost: int) -> None:
        for whose in (None, usage.user_id):
            totals = self._totals[usage.group_id, usage.kind, whose]
            totals.update({since: used + cost for since, used in totals.items() if usage.created_at >= since})

    def _expire(self) -> None:
        """Mark holds whose time is over as expired; called whenever the clock moves."""
        for hold in list(self._holds.values()):
            if hold.expires_at is not None and hold.expires_at <= self.now:
                self._settle(hold, "expired", hold.cost, hold.expires_at)

    def _live_under(self, user_id: str, key: str | None, request: tuple[object, ...]) -> Usage | None:
        usage = None if key is None else self._by_key.get((user_id, key))
        if usage is None or not usage.live:
            return None
        if usage.request != request:
            refuse(
                "TL008",
                f"idempotency_key '{key}' was used for another request of this user",
                detail=usage.id,
                hint="Use one key per job: the same operation, kind, cost and group every time.",
            )
        return usage

    def _reset(self, group: Group, kind: str) -> None:
        """Let usage count from now on; usage of this very moment counts as before."""
        if any(usage.created_at == self.now for usage in self.ledger if usage.group_id == group.id):
            self.now += MOMENT
            self._expire()
        self._resets[group.id, kind] = self.now

    def _enlist(self, group: Group, user_id: str) -> bool:
        if user_id in group.members:
            return False
        group.members[user_id] = Membership(self.now, next(self._places))
        return True


def text(moment: datetime) -> str | None:
    """Write a moment as in JSON; null if it never comes."""
    return None if moment == NEVER else moment.isoformat()
