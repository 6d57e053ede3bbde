"""Limits with what is used of them, as pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from tokenlimits.levels import Level, level, short
from tokenlimits.models import Group, GroupLimitUsage, GroupRef, GroupUsage, Limit, LimitPressure

from . import _words
from ._format import amount, number

_NEVER: Mapping[str, str] = {"in_flight": "room when one ends", "lifetime": "never resets"}
_LEVELS: tuple[Level, ...] = ("none", "ok", "warn", "full")
_SUMS: Mapping[str, str] = {"member": "member", "child": "customer"}

Identity = tuple[str, str, str, str, str]


@dataclass(frozen=True, slots=True)
class Meter:
    """A limit as a page shows it.

    What it counts is empty if it is no pool. With a plan, it is the group's own allowance under a limit of that plan.
    """

    limit: GroupLimitUsage
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    plan: GroupRef | None = None

    @property
    def each(self) -> str:
        """Who has an allowance each, where it shows the sum of these; empty where it is one allowance."""
        return "" if self.plan else _SUMS.get(self.limit.scope, "")

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
        # while all together have used little, some of them may have used all that they may
        return "none" if found == "ok" and self.each else found

    @property
    def used(self) -> str:
        """How much is used, in words."""
        by = f" by all {self.each}s" if self.each else ""
        if self.limit.period == "in_flight":
            most = f", at most {short(self.limit.capacity)} at once" if self.limit.max and not by else ""
            return f"{amount(self.limit.used, self.limit.kind)} in progress{by}{most}"
        # the members of a default group can't be counted, customers can
        is_part = self.limit.max and self.each != "member" and self.limit.capacity
        of = f" of {short(self.limit.capacity)}" if is_part else ""
        return f"{number(self.limit.used)}{of} used{by}{_words.lately(self.limit)}"

    @property
    def room(self) -> str:
        """What the moment brings at which a period ends, before how long that takes."""
        return "room" if self.limit.starts == "rolling" else "resets"

    @property
    def never(self) -> str:
        """Why there is no such moment, in words."""
        if self.limit.period in _NEVER:
            return _NEVER[self.limit.period]
        if self.each:
            return f"resets for each {self.each}"
        return "starts with the first use" if self.limit.starts == "first_use" else "nothing used"

    @property
    def left(self) -> str:
        """How much is left, in words; of a sum, what each has."""
        if self.limit.max is None:
            return "unlimited"
        if self.limit.mode == "observe" and not self.each and not self.limit.remaining:
            return "would deny"
        if self.limit.max == 0:
            return "would deny" if self.limit.mode == "observe" else "blocked"
        if self.each:
            return f"{short(self.limit.max)} per {self.each}"
        return f"{short(self.limit.remaining)} left"

    @property
    def bar(self) -> tuple[int, int] | None:
        """How long its bar is, and how long it can be; None if it is unlimited."""
        if self.limit.capacity is None:
            return None
        if self.limit.max == 0:
            return 1, 1
        return min(self.limit.used, self.limit.capacity), self.limit.capacity or 1


def meters(usage: GroupUsage, *owners: Group) -> list[Meter]:
    """Return the limits of a group as a page shows them; only the group and those above say what their pools count."""
    pools = {identity(limit, group.id): limit.counts or {} for group in owners for limit in group.limits}
    return [_meter(limit, usage.group.id, pools) for limit in usage.limits]


def _meter(limit: GroupLimitUsage, group_id: UUID, pools: Mapping[Identity, Mapping[str, int]]) -> Meter:
    owner = limit.group or GroupRef(id=group_id)
    plan = None if owner.id == group_id else owner
    return Meter(limit, pools.get(identity(limit, owner.id), {}), plan)


def identity(limit: Limit | GroupLimitUsage, owner: UUID) -> Identity:
    """Return what a limit is known by, among those of all groups."""
    return limit.kind, limit.period, limit.starts, limit.scope, str(owner)


def pressed(pressure: Iterable[LimitPressure]) -> Mapping[tuple[str, str, str], LimitPressure]:
    """Return how many members are at each member limit, by its kind, its period and where that starts."""
    return {(limit.kind, limit.period, limit.starts): limit for limit in pressure}


def fullest(usage: GroupUsage) -> float | None:
    """Return how full the fullest limit of a group is; None if nothing can be."""
    enforced = (meter.fraction for meter in meters(usage) if meter.limit.mode != "observe")
    return max((fraction for fraction in enforced if fraction is not None), default=None)


def level_of(usage: GroupUsage) -> Level:
    """Return how full the fullest limit of a group is, in a word."""
    return _LEVELS[max((_LEVELS.index(meter.level) for meter in meters(usage)), default=0)]
