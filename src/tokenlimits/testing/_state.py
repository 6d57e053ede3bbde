"""The groups that the fake keeps in memory, their limits, and how much is used of these at the moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count

from tokenlimits.errors import InvalidRequest

from ._groups import Bound, Group, Membership
from ._ledger import MOMENT, Json, Ledger, Usage, refuse
from ._limits import Override, Rule
from ._periods import BEGINNING, NEVER, period_of
from ._room import LimitState
from ._windows import anchored, end_of, leaves_at, rolling

ALL_KINDS = "*"


class State(Ledger):
    """The tables."""

    def __init__(self, users: Mapping[str, str | None] | None) -> None:
        super().__init__()
        self._groups: dict[str, Group] = {}
        self._users = users
        self._places = count()
        # which limit was made after which
        self._ages = count()
        # by group, kind and user (None: all that the group's limits count)
        self._resets: dict[tuple[str, str, str | None], datetime] = {}
        # as `Bound.key` names limits and subjects
        self._overrides: dict[tuple[str, Rule, str | None], Override] = {}
        # when the last window was opened of a limit that starts with a first use
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

    def _children_of(self, group_id: str) -> list[str]:
        """List the groups directly beneath one that are still there."""
        return [child for child in self._children.get(group_id, ()) if child in self._groups]

    def _levels(self, group_id: str) -> int:
        """Count the levels of a group and those beneath it that are still there."""
        return 1 + max(map(self._levels, self._children_of(group_id)), default=0)

    def _paying_groups(self, user_id: str, pinned: str | None) -> list[Group]:
        theirs = [group for group in self._groups.values() if user_id in group.members]
        theirs.sort(key=lambda group: (-group.priority, group.members[user_id].joined_at, group.members[user_id].place))
        paying = theirs or [group for group in self._groups.values() if group.is_default]
        if pinned is None:
            return paying
        group = self._group(pinned)
        return [group] if group in paying else []

    def _bounds(self, group_id: str, user_id: str, kind: str | None = None, *, in_flight: bool = True) -> list[Bound]:
        """List the limits that bind a user in a group, its own and those above: those that count a kind, or all.

        A deleted child has no pool any more.
        They are in the order of the SQL: of a kind, member limits first, then pools from the deepest subject up.
        """
        found: list[tuple[int, Bound]] = []
        child: str | None = None
        for depth, owner_id in enumerate(self._path(group_id)):
            owner = self._groups.get(owner_id)
            if owner is not None:
                whose = {"member": user_id, "child": child, "group": None}
                place = {"member": -1, "child": depth - 1, "group": depth}
                rules = owner.rules(kind, beneath=child in self._groups, in_flight=in_flight)
                found += [(place[rule.scope], Bound(owner, rule, rules[rule], whose[rule.scope])) for rule in rules]
            child = owner_id
        found.sort(key=lambda each: (each[1].rule.kind, each[0], each[1].terms.place))
        return [bound for _, bound in found]

    def _states(
        self, group_id: str, user_id: str, kind: str | None = None, *, in_flight: bool = True
    ) -> list[LimitState]:
        """Return the limits that bind a user in a group: those that count a kind, or all, in their own units."""
        return [self._state(bound, kind) for bound in self._bounds(group_id, user_id, kind, in_flight=in_flight)]

    def _state(self, bound: Bound, kind: str | None = None) -> LimitState:
        """Return the state of a limit for its subject, or for all subjects together."""
        weight = 1 if kind is None else bound.terms.weights(bound.rule)[kind]
        state = self._used_state(bound, weight)
        override = self._overrides.get(bound.key)
        if override is None or override.until <= self.now:
            return state
        overridden = replace(bound.terms, max=override.max)
        return replace(state, terms=overridden, own_max=bound.terms.max, override_ends=override.until)

    def _used_state(self, bound: Bound, weight: int) -> LimitState:
        rule, terms = bound.rule, bound.terms
        if rule.in_flight:
            parts = sorted((ends, 1) for ends in self._ends_of_holds(bound.top, rule.kind, bound.user_id))
            return LimitState(bound, terms, weight, len(parts), BEGINNING, NEVER, NEVER, tuple(parts))
        window = self._window(bound)
        if window is None:
            return LimitState(bound, terms, weight, 0, self.now, NEVER, NEVER)
        since, until = max(window[0], self._reset_at(bound)), window[1]
        used = self._units_since(bound, since)
        if rule.scope == "member" and bound.whose is None:
            used -= self._units_before_resets(bound, since)
        if rule.starts != "rolling":
            return LimitState(bound, terms, weight, used, since, until, until)
        parts = sorted(
            (leaves_at(rule.period, usage.created_at), usage.cost * terms.weights(rule)[usage.kind])
            for usage in self._usages(bound, since)
        )
        reset_at = min((leaves for leaves, units in parts if units), default=NEVER)
        return LimitState(bound, terms, weight, used, since, until, reset_at, tuple(parts))

    def _units_since(self, bound: Bound, since: datetime) -> int:
        weights = bound.terms.weights(bound.rule)
        return sum(each * self._used(bound.top, kind, bound.user_id, since) for kind, each in weights.items())

    def _units_before_resets(self, bound: Bound, since: datetime) -> int:
        """Add up what single users had used of a member limit when their own usage was reset."""
        theirs = {user_id for group_id, _, user_id in self._resets if group_id == bound.owner.id and user_id}
        resets = {each: self._reset_at(each) for each in (replace(bound, whose=user_id) for user_id in theirs)}
        return sum(
            self._units_since(each, since) - self._units_since(each, at) for each, at in resets.items() if at > since
        )

    def _window(self, bound: Bound) -> tuple[datetime, datetime] | None:
        """Return when the current period of a limit begins and ends; None if no use has opened one."""
        rule, timezone = bound.rule, bound.owner.timezone
        match rule.starts:
            case "anchor":
                return anchored(rule.period, timezone, self._anchor(bound), self.now)
            case "rolling":
                return rolling(rule.period, self.now)
            case "first_use":
                since = self._opened_at(bound)
                return None if since is None else (since, end_of(rule.period, timezone, since))
            case _:
                return period_of(rule.period, timezone, self.now)

    def _anchor(self, bound: Bound) -> datetime:
        """Tell from when anchored periods of a subject are counted: of a user, by the earliest of memberships."""
        beneath = [group for id_ in self._beneath(bound.owner.id) if (group := self._groups.get(id_))]
        theirs = [group.members[bound.user_id].anchor for group in beneath if bound.user_id in group.members]
        return min(theirs, default=self._groups[bound.top].anchor)

    def _opened_at(self, bound: Bound) -> datetime | None:
        """Tell when the window was opened that hasn't ended: as remembered, else by the oldest usage that may have."""

        def lasts(since: datetime) -> bool:
            return end_of(bound.rule.period, bound.owner.timezone, since) > self.now

        known = self._opened.get(bound.key)
        if known is not None:
            return known if lasts(known) else None
        usages = self._usages(bound, self._reset_at(bound))
        moments = [usage.created_at for usage in usages if usage.is_of_its_moment and lasts(usage.created_at)]
        return min(moments, default=None)

    def _usages(self, bound: Bound, since: datetime) -> Iterator[Usage]:
        for kind in bound.terms.weights(bound.rule):
            yield from self._live(bound.top, kind, bound.user_id, since)

    def _remember_windows(self, usage: Usage) -> None:
        """Keep the starts of the windows that a usage moves in, which is new or settled; a new one may open some."""
        for bound in self._bounds(usage.group_id, usage.user_id, usage.kind):
            if bound.rule.starts == "first_use":
                since = self._opened_at(bound)
                if since is None and usage.live and usage.created_at == self.now:
                    since = self.now
                if since is not None and usage.created_at >= since:
                    self._opened[bound.key] = since

    def _remember_windows_of_group(self, group: Group) -> None:
        """Keep the starts of the windows of a group's pools whose limits were edited."""
        for rule, terms in group.limits.items():
            if rule.starts == "first_use" and rule.scope == "group":
                bound = Bound(group, rule, terms, None)
                since = self._opened_at(bound)
                if since is not None:
                    self._opened[bound.key] = since

    def _forget_windows(self, group_id: str, *rules: Rule, whose: str | None = None) -> None:
        """Count limits afresh, of one subject or of all."""
        for key in list(self._opened):
            if key[0] == group_id and key[1] in rules and whose in (None, key[2]):
                del self._opened[key]

    def _reset_at(self, bound: Bound) -> datetime:
        # a reset of a group is one of its own pool in the limits of its parent, and stays with it when it moves
        group_id = bound.top if bound.rule.scope == "child" else bound.owner.id
        kinds, subjects = (bound.rule.kind, ALL_KINDS), {None, bound.user_id}
        return max(self._resets.get((group_id, kind, each), BEGINNING) for kind in kinds for each in subjects)

    def _reset(self, group: Group, kind: str, user_id: str | None) -> None:
        """Let usage of a user or of all count from now on; usage of this very moment counts as before."""
        counted = set(self._beneath(group.id))
        if any(usage.created_at == self.now for usage in self.ledger if usage.group_id in counted):
            self.now += MOMENT
            self._expire()
        self._resets[group.id, kind, user_id] = self.now

        parent = self._groups.get(self._parents[group.id] or "")
        own, inherited = group.rules_of("group", "member"), parent.rules_of("child") if parent else []
        self._forget_windows(group.id, *(rule for rule in own if kind in (ALL_KINDS, rule.kind)), whose=user_id)
        if parent is not None and user_id is None:
            reset = (rule for rule in inherited if kind in (ALL_KINDS, rule.kind))
            self._forget_windows(parent.id, *reset, whose=group.id)

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
