"""The groups that the fake keeps in memory, their limits, and how much is used of these at the moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count

from tokenlimits.errors import InvalidRequest

from ._ledger import MOMENT, Json, Ledger, Usage, refuse
from ._limits import LimitState, Override, Rule, Terms
from ._periods import BEGINNING, NEVER, period_of
from ._windows import anchored, end_of, leaves_at, rolling

ALL_KINDS = "*"


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

    def rules(self, kind: str | None = None, *, in_flight: bool = True) -> dict[Rule, Terms]:
        """List the limits that count a kind, or all, in the order of the SQL: a kind's member limits first."""
        rules = [
            rule
            for rule, terms in self.limits.items()
            if (kind is None or kind in terms.weights(rule)) and (in_flight or not rule.in_flight)
        ]
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


class State(Ledger):
    """The tables."""

    def __init__(self, users: Mapping[str, str | None] | None) -> None:
        super().__init__()
        self._groups: dict[str, Group] = {}
        # including those of deleted groups
        self._group_ids: set[str] = set()
        self._users = users
        self._places = count()
        # by group, kind and user (None: all that the group's limits count)
        self._resets: dict[tuple[str, str, str | None], datetime] = {}
        # by group, limit and user (None: the group)
        self._overrides: dict[tuple[str, Rule, str | None], Override] = {}
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

    def _states(
        self, group: Group, user_id: str, kind: str | None = None, *, in_flight: bool = True
    ) -> list[LimitState]:
        """Return a group's limits for a user: those that count a kind, or all, in their own units."""
        rules = group.rules(kind, in_flight=in_flight)
        return [self._state(group, rule, terms, user_id, kind) for rule, terms in rules.items()]

    def _state(
        self, group: Group, rule: Rule, terms: Terms, user_id: str | None, kind: str | None = None
    ) -> LimitState:
        """Return a limit's state; without a user, a member limit counts all users together."""
        whose = user_id if rule.scope == "member" else None
        weight = 1 if kind is None else terms.weights(rule)[kind]
        state = self._used_state(group, rule, terms, whose, weight)
        override = self._overrides.get((group.id, rule, whose))
        if override is None or override.until <= self.now:
            return state
        overridden = replace(terms, max=override.max)
        return replace(state, terms=overridden, own_max=terms.max, override_ends=override.until)

    def _used_state(self, group: Group, rule: Rule, terms: Terms, whose: str | None, weight: int) -> LimitState:
        if rule.in_flight:
            parts = sorted((ends, 1) for ends in self._ends_of_holds(group.id, rule.kind, whose))
            used = len(parts)
            return LimitState(rule, terms, weight, used, BEGINNING, NEVER, NEVER, group.timezone, tuple(parts))
        window = self._window(group, rule, terms, whose)
        if window is None:
            return LimitState(rule, terms, weight, 0, self.now, NEVER, NEVER, group.timezone)
        since, until = max(window[0], self._reset_at(group, rule, whose)), window[1]
        used = self._units_since(group, rule, terms, whose, since)
        if rule.scope == "member" and whose is None:
            used -= self._units_before_resets(group, rule, terms, since)
        if rule.starts != "rolling":
            return LimitState(rule, terms, weight, used, since, until, until, group.timezone)
        parts = sorted(
            (leaves_at(rule.period, usage.created_at), usage.cost * terms.weights(rule)[usage.kind])
            for usage in self._usages(group, rule, terms, whose, since)
        )
        reset_at = min((leaves for leaves, units in parts if units), default=NEVER)
        return LimitState(rule, terms, weight, used, since, until, reset_at, group.timezone, tuple(parts))

    def _units_since(self, group: Group, rule: Rule, terms: Terms, whose: str | None, since: datetime) -> int:
        return sum(each * self._used(group.id, kind, whose, since) for kind, each in terms.weights(rule).items())

    def _units_before_resets(self, group: Group, rule: Rule, terms: Terms, since: datetime) -> int:
        """Add up what single members had used when their own usage was reset."""
        resets = {user_id: self._reset_at(group, rule, user_id) for id_, _, user_id in self._resets if id_ == group.id}
        return sum(
            self._units_since(group, rule, terms, user_id, since) - self._units_since(group, rule, terms, user_id, at)
            for user_id, at in resets.items()
            if user_id is not None and at > since
        )

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
        usages = self._usages(group, rule, terms, whose, self._reset_at(group, rule, whose))
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

    def _forget_windows(self, group: Group, *rules: Rule, user_id: str | None = None) -> None:
        """Count limits afresh, of one user or of all."""
        for id_, rule, whose in list(self._opened):
            if id_ == group.id and rule in rules and user_id in (None, whose):
                del self._opened[id_, rule, whose]

    def _reset_at(self, group: Group, rule: Rule, whose: str | None) -> datetime:
        kinds, subjects = (rule.kind, ALL_KINDS), {None, whose}
        return max(self._resets.get((group.id, kind, each), BEGINNING) for kind in kinds for each in subjects)

    def _reset(self, group: Group, kind: str, user_id: str | None) -> None:
        """Let usage of a user or of all count from now on; usage of this very moment counts as before."""
        if any(usage.created_at == self.now for usage in self.ledger if usage.group_id == group.id):
            self.now += MOMENT
            self._expire()
        self._resets[group.id, kind, user_id] = self.now
        rules = [rule for rule in group.limits if kind in (ALL_KINDS, rule.kind)]
        self._forget_windows(group, *rules, user_id=user_id)

    def _touch(self, group: Group) -> None:
        # two changes never have the same moment, or the second editor would not notice the first
        group.updated_at = max(self.now, group.updated_at + MOMENT)

    def _require_user(self, user_id: str | None) -> None:
        if user_id is not None and self._users is not None and user_id not in self._users:
            refuse("TL004", f"there is no user {user_id}", detail=user_id, hint="Find the id with find_users.")

    def _email(self, user_id: str) -> str | None:
        return (self._users or {}).get(user_id)

    def _enlist(self, group: Group, user_id: str, anchor_at: datetime | None = None) -> bool:
        if user_id in group.members:
            return False
        group.members[user_id] = Membership(self.now, next(self._places), anchor_at)
        return True
