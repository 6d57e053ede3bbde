"""Groups and their usage, as cards show them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenlimits.levels import Level, level, short
from tokenlimits.models import Group, GroupLimitUsage, GroupUsage, Limit, LimitPressure

from . import _words
from ._format import amount, number

Sort = Literal["name", "usage", "members"]

_NEVER: Mapping[str, str] = {"in_flight": "room when one ends", "lifetime": "never resets"}
_LEVELS: tuple[Level, ...] = ("none", "ok", "warn", "full")


@dataclass(frozen=True, slots=True)
class Meter:
    """A limit as a page shows it; what it counts is empty if it is no pool."""

    limit: GroupLimitUsage
    counts: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def fraction(self) -> float | None:
        """How full it is; None if it is unlimited, or blocked on purpose."""
        # nothing is used up in a group without members
        return None if not self.limit.max else self.limit.fraction if self.limit.capacity else 0.0

    @property
    def level(self) -> Level:
        """How full it is, in a word."""
        if self.limit.mode == "observe":
            # nobody is denied
            return "none"
        found = level(self.fraction)
        # while members together have used little, some of them may have used all that they may
        return "none" if found == "ok" and self.limit.scope == "member" else found

    @property
    def used(self) -> str:
        """How much is used, in words."""
        if self.limit.period == "in_flight":
            return self._in_progress
        if self.limit.scope == "member":
            return f"{number(self.limit.used)} used by all members{_words.lately(self.limit)}"
        of = "" if not self.limit.max else f" of {short(self.limit.capacity)}"
        return f"{number(self.limit.used)}{of} used{_words.lately(self.limit)}"

    @property
    def _in_progress(self) -> str:
        who = " by all members" if self.limit.scope == "member" else ""
        most = f", at most {short(self.limit.capacity)} at once" if self.limit.max and not who else ""
        return f"{amount(self.limit.used, self.limit.kind)} in progress{who}{most}"

    @property
    def room(self) -> str:
        """What the moment brings at which a period ends, before how long that takes."""
        return "room" if self.limit.starts == "rolling" else "resets"

    @property
    def never(self) -> str:
        """Why there is no such moment, in words."""
        if self.limit.period in _NEVER:
            return _NEVER[self.limit.period]
        if self.limit.scope == "member":
            return "resets for each member"
        return "starts with the first use" if self.limit.starts == "first_use" else "nothing used"

    @property
    def left(self) -> str:
        """How much is left, in words; of a member limit, what each member has."""
        if self.limit.max is None:
            return "unlimited"
        if self.limit.mode == "observe" and self.limit.scope == "group" and not self.limit.remaining:
            return "would deny"
        if self.limit.max == 0:
            return "would deny" if self.limit.mode == "observe" else "blocked"
        if self.limit.scope == "member":
            return f"{short(self.limit.max)} per member"
        return f"{short(self.limit.remaining)} left"

    @property
    def bar(self) -> tuple[int, int] | None:
        """How long its bar is, and how long it can be; None if it is unlimited."""
        if self.limit.capacity is None:
            return None
        if self.limit.max == 0:
            return 1, 1
        return min(self.limit.used, self.limit.capacity), self.limit.capacity or 1


@dataclass(frozen=True, slots=True)
class Card:
    """A group with its usage."""

    group: Group
    usage: GroupUsage

    @property
    def meters(self) -> list[Meter]:
        """Its limits."""
        return meters(self.usage, self.group)

    @property
    def fraction(self) -> float | None:
        """How full its fullest limit is."""
        return _fullest(self.usage)

    @property
    def level(self) -> Level:
        """How full its fullest limit is, in a word."""
        return _level(self.usage)


@dataclass(frozen=True, slots=True)
class Summary:
    """All groups in four numbers."""

    groups: int
    members: int
    near: int
    full: int


def cards(groups: Iterable[Group], usages: Iterable[GroupUsage], search: str, sort: Sort) -> list[Card]:
    """Match groups with their usage; a group that was just created or deleted has no card."""
    by_id = {usage.group.id: usage for usage in usages}
    found = [Card(group, by_id[group.id]) for group in groups if group.id in by_id and _matches(group, search)]
    if sort == "usage":
        found.sort(key=lambda card: -1 if card.fraction is None else card.fraction, reverse=True)
    elif sort == "members":
        found.sort(key=lambda card: card.usage.member_count, reverse=True)
    return found


def _matches(group: Group, search: str) -> bool:
    wanted = search.strip().casefold()
    return wanted in group.name.casefold() or wanted in group.description.casefold()


def summary(usages: Iterable[GroupUsage]) -> Summary:
    """Count groups and members, and the groups whose fullest limit is yellow or red."""
    all_ = list(usages)
    levels = [_level(usage) for usage in all_]
    members = sum(usage.member_count for usage in all_)
    return Summary(len(all_), members, levels.count("warn"), levels.count("full"))


def meters(usage: GroupUsage, group: Group | None = None) -> list[Meter]:
    """Return the limits of a group as a page shows them; only the group says what its pools count."""
    pools = {_identity(limit): limit.counts or {} for limit in group.limits} if group else {}
    return [Meter(limit, pools.get(_identity(limit), {})) for limit in usage.limits]


def _identity(limit: Limit | GroupLimitUsage) -> tuple[str, str, str, str]:
    return limit.kind, limit.period, limit.starts, limit.scope


def pressed(pressure: Iterable[LimitPressure]) -> Mapping[tuple[str, str, str], LimitPressure]:
    """Return how many members are at each member limit, by its kind, its period and where that starts."""
    return {(limit.kind, limit.period, limit.starts): limit for limit in pressure}


def _fullest(usage: GroupUsage) -> float | None:
    enforced = (meter.fraction for meter in meters(usage) if meter.limit.mode != "observe")
    return max((fraction for fraction in enforced if fraction is not None), default=None)


def _level(usage: GroupUsage) -> Level:
    return _LEVELS[max((_LEVELS.index(meter.level) for meter in meters(usage)), default=0)]


def live(usages: Iterable[GroupUsage], group: Group | None = None) -> dict[str, Any]:
    """Return what can change on the cards, in a compact form: the page requests it every second.

    `shape` changes when a group or a limit is added, removed or edited; then the page loads its cards again. With the
    group of a page that says what its pools count, it changes with that, too.
    """
    all_ = list(usages)
    shape = [[str(usage.group.id), usage.group.name, _limits(meters(usage, group))] for usage in all_]
    numbers = {str(usage.group.id): _numbers(usage) for usage in all_}
    content: dict[str, Any] = {"shape": _digest(shape), "summary": _counts(all_), "groups": numbers}
    return {**content, "version": _digest(content)}


def shape(usages: Iterable[GroupUsage], group: Group | None = None) -> str:
    """Return the digest of the groups and limits that a page shows."""
    return live(usages, group)["shape"]


def _limits(meters: Iterable[Meter]) -> list[list[Any]]:
    return [[*_identity(each.limit), each.limit.mode, each.limit.max, sorted(each.counts.items())] for each in meters]


def _numbers(usage: GroupUsage) -> list[Any]:
    limits = [
        [meter.level, meter.bar, meter.used, meter.left, meter.limit.reset_at and meter.limit.reset_at.isoformat()]
        for meter in meters(usage)
    ]
    return [usage.member_count, _level(usage), limits]


def _counts(usages: Iterable[GroupUsage]) -> Mapping[str, int]:
    counted = summary(usages)
    return {"groups": counted.groups, "members": counted.members, "near": counted.near, "full": counted.full}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
