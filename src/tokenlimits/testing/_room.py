"""How much of a limit is used at the moment, and when there will be room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from ._groups import Bound
from ._limits import Rule, Terms
from ._periods import NEVER


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit that binds a subject and its usage since `since`, in the period that ends at `until`.

    `terms` are those that hold for the subject now.

    `reset_at` is when there is more room without a settlement, `weight` what one unit of the kind takes that was asked
    for. `parts` are what a rolling window or a limit in flight counts: when each usage leaves it, and what this gives
    back. `own_max` is the limit's own, which applies again from `override_ends` on.
    """

    bound: Bound
    terms: Terms
    weight: int
    used: int
    since: datetime
    until: datetime
    reset_at: datetime
    parts: tuple[tuple[datetime, int], ...] = ()
    own_max: int | None = None
    override_ends: datetime = NEVER

    @property
    def rule(self) -> Rule:
        """What identifies the limit within its group."""
        return self.bound.rule

    def units(self, cost: int) -> int:
        """Tell how much a cost takes from the limit: a hold is one, whatever it costs."""
        return 1 if self.rule.in_flight else cost * self.weight

    def has_room(self, cost: int) -> bool:
        """Tell whether a cost fits."""
        return self.terms.max is None or self.used + self.units(cost) <= self.terms.max

    def units_left(self) -> int | None:
        """Tell how many units of the kind fit, or (negative) are too many; None: unlimited."""
        return None if self.terms.max is None else (self.terms.max - self.used) // self.weight

    def room_at(self, cost: int) -> datetime:
        """Tell when a cost will fit that doesn't: perhaps only when an override has ended, perhaps never."""
        room_at = self._room_under_this_max(cost)
        if self.override_ends == NEVER or self.override_ends > room_at:
            return room_at
        later = replace(self, terms=replace(self.terms, max=self.own_max))
        if later.has_room(cost):
            return self.override_ends
        return max(self.override_ends, later._room_under_this_max(cost))  # noqa: SLF001  # of the same class

    def _room_under_this_max(self, cost: int) -> datetime:
        if self.terms.max is None or self.units(cost) > self.terms.max:
            return NEVER
        if self.rule.starts != "rolling" and not self.rule.in_flight:
            return self.until
        used = self.used
        for leaves, units in self.parts:
            used -= units
            if used + self.units(cost) <= self.terms.max:
                return leaves
        return NEVER
