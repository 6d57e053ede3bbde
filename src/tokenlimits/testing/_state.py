"""The groups that the fake keeps in memory, their limits, and how much is used of these at the moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count

from tokenlimits.errors import InvalidRequest

from ._ledger import MOMENT, Json, Ledger, Usage, refuse
from ._periods import BEGINNING, NEVER, period_of
from ._windows import anchored, end_of, leaves_at, rolling

ALL_KINDS = "*"


@dataclass(frozen=True, slots=True)
class Rule:
    """What identifies a limit within its group."""

    kind: str
    period: str
    scope: str
    starts: str = "calendar"


@dataclass(frozen=True, slots=True)
class Terms:
    """What else a limit has; `counts` are the kinds and weights of a pool."""

    max: int | None
    counts: Mapping[str, int] | None = None
    mode: str = "enforce"

    def weights(self, rule: Rule) -> Mapping[str, int]:
        """Tell which kinds the limit counts, and how much one of each takes."""
        return {rule.kind: 1} if self.counts is None else self.counts


@dataclass(frozen=True, slots=True)
class Membership:
    """A user's membership of a group; `place` orders members who joined while the clock stood still."""

    joined_at: datetime
    place: int
    anchor_at: datetime | None


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
    anchor_at: datetime | None = None
    unlimited: bool = False
    limits: dict[Rule, Terms] = field(default_factory=dict[Rule, Terms])
    members: dict[str, Membership] = field(default_factory=dict[str, Membership])

    def rules(self, kind: str | None = None) -> dict[Rule, Terms]:
        """List the limits that count a kind, or all, in the order of the SQL: a kind's member limits first."""
        rules = [rule for rule, terms in self.limits.items() if kind is None or kind in terms.weights(rule)]
        if not rules and self.unlimited and kind is not None:
            return {Rule(kind, "lifetime", "group"): Terms(None)}
        rules.sort(key=lambda rule: (rule.kind, rule.scope == "group"))
        return {rule: self.limits[rule] for rule in rules}

    def anchor(self, user_id: str | None) -> datetime:
        """Tell from when anchored periods are counted, of a member, or of the group."""
        membership = None if user_id is None else self.members.get(user_id)
        if membership is not None:
            return membership.anchor_at or membership.joined_at
        return self.anchor_at or self.created_at


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit and its usage since `since`, in the period that ends at `until`.

    `reset_at` is when there is more room without a settlement, `weight` what one unit of the kind takes that was asked
    for. `parts` are what a rolling window counts: when each usage leaves it, and what this gives back.
    """

    rule: Rule
    terms: Terms
    weight: int
    used: int
    since: datetime
    until: datetime
    reset_at: datetime
    timezone: str
    parts: tuple[tuple[datetime, int], ...] = ()

    def has_room(self, cost: int) -> bool:
        """Tell whether a cost fits."""
        return self.terms.max is None or self.used + cost * self.weight <= self.terms.max

    def units_left(self) -> int | None:
        """Tell how many units of the kind fit, or (negative) are too many; None: unlimited."""
        return None if self.terms.max is None else (self.terms.max - self.used) // self.weight

    def room_at(self, cost: int) -> datetime:
        """Tell when a cost will fit that doesn't; one that can never fit, and a lifetime limit, wait forever."""
        if self.terms.max is None or cost * self.weight > self.terms.max:
            return NEVER
        if self.rule.starts != "rolling":
            return self.until
        used = self.used
        for leaves, units in self.parts:
            used -= units
            if used + cost * self.weight <= self.terms.max:
                return leaves
        return NEVER


class State(Ledger):
    """The tables."""

    def __init__(self, users: Mapping[str, str | None] | None) -> None:
        super().__init__()
        self._groups: dict[str, Group] = {}
        # including those of deleted groups
        self._group_ids: set[str] = set()
        self._users = users
        self._places = count()
        self._resets: dict[tuple[str, str], datetime] = {}
        # when the last window was opened of a limit that starts with a first use, by group, limit and user
        self._opened: dict[tuple[str, Rule, str | None], datetime] = {}

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

    def _states(self, group: Group, user_id: str, kind: str | None = None) -> list[LimitState]:
        """Return a group's limits for a user: those that count a kind, or all, in their own units."""
        return [self._state(group, rule, terms, user_id, kind) for rule, terms in group.rules(kind).items()]

    def _state(
        self, group: Group, rule: Rule, terms: Terms, user_id: str | None, kind: str | None = None
    ) -> LimitState:
        """Return a limit's state; without a user, a member limit counts all users together."""
        whose = user_id if rule.scope == "member" else None
        weights = terms.weights(rule)
        weight = 1 if kind is None else weights[kind]
        window = self._window(group, rule, terms, whose)
        if window is None:
            return LimitState(rule, terms, weight, 0, self.now, NEVER, NEVER, group.timezone)
        since, until = max(window[0], self._reset_at(group, rule)), window[1]
        used = sum(each * self._used(group.id, kind, whose, since) for kind, each in weights.items())
        if rule.starts != "rolling":
            return LimitState(rule, terms, weight, used, since, until, until, group.timezone)
        parts = sorted(
            (leaves_at(rule.period, usage.created_at), usage.cost * weights[usage.kind])
            for usage in self._usages(group, rule, terms, whose, since)
        )
        reset_at = min((leaves for leaves, units in parts if units), default=NEVER)
        return LimitState(rule, terms, weight, used, since, until, reset_at, group.timezone, tuple(parts))

    def _window(self, group: Group, rule: Rule, terms: Terms, whose: str | None) -> tuple[datetime, datetime] | None:
        """Return when the current period of a limit begins and ends; None if no use has opened one."""
        match rule.starts:
            case "anchor":
                return anchored(rule.period, group.timezone, group.anchor(whose), self.now)
            case "rolling":
                return rolling(rule.period, self.now)
            case "first_use":
                since = self._opened_at(group, rule, terms, whose)
                return None if since is None else (since, end_of(rule.period, group.timezone, since))
            case _:
                return period_of(rule.period, group.timezone, self.now)

    def _opened_at(self, group: Group, rule: Rule, terms: Terms, whose: str | None) -> datetime | None:
        """Tell when the window was opened that hasn't ended: as remembered, else by the oldest usage that may have."""

        def lasts(since: datetime) -> bool:
            return end_of(rule.period, group.timezone, since) > self.now

        known = self._opened.get((group.id, rule, whose))
        if known is not None:
            return known if lasts(known) else None
        usages = self._usages(group, rule, terms, whose, self._reset_at(group, rule))
        moments = [usage.created_at for usage in usages if usage.is_of_its_moment and lasts(usage.created_at)]
        return min(moments, default=None)

    def _usages(self, group: Group, rule: Rule, terms: Terms, whose: str | None, since: datetime) -> Iterator[Usage]:
        for kind in terms.weights(rule):
            yield from self._live(group.id, kind, whose, since)

    def _remember_windows(self, usage: Usage) -> None:
        """Keep the starts of the windows that a usage moves in, which is new or settled; a new one may open some."""
        group = self._groups.get(usage.group_id)
        for rule, terms in group.rules(usage.kind).items() if group else ():
            whose = usage.user_id if rule.scope == "member" else None
            if group and rule.starts == "first_use":
                since = self._opened_at(group, rule, terms, whose)
                if since is None and usage.live and usage.created_at == self.now:
                    since = self.now
                if since is not None and usage.created_at >= since:
                    self._opened[group.id, rule, whose] = since

    def _remember_windows_of_group(self, group: Group) -> None:
        """Keep the starts of the windows of a group's pools whose limits were edited."""
        for rule, terms in group.limits.items():
            if rule.starts == "first_use" and rule.scope == "group":
                since = self._opened_at(group, rule, terms, None)
                if since is not None:
                    self._opened[group.id, rule, None] = since

    def _forget_windows(self, group: Group, *rules: Rule) -> None:
        """Count limits afresh."""
        for key in [key for key in self._opened if key[0] == group.id and key[1] in rules]:
            del self._opened[key]

    def _reset_at(self, group: Group, rule: Rule) -> datetime:
        resets = (self._resets.get((group.id, kind), BEGINNING) for kind in (rule.kind, ALL_KINDS))
        return max(resets)

    def _reset(self, group: Group, kind: str) -> None:
        """Let usage count from now on; usage of this very moment counts as before."""
        if any(usage.created_at == self.now for usage in self.ledger if usage.group_id == group.id):
            self.now += MOMENT
            self._expire()
        self._resets[group.id, kind] = self.now
        self._forget_windows(group, *(rule for rule in group.limits if kind in (ALL_KINDS, rule.kind)))

    def _enlist(self, group: Group, user_id: str, anchor_at: datetime | None = None) -> bool:
        if user_id in group.members:
            return False
        group.members[user_id] = Membership(self.now, next(self._places), anchor_at)
        return True
