"""A limit, and another max of it for one subject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Rule:
    """What identifies a limit within its group."""

    kind: str
    period: str
    scope: str
    starts: str = "calendar"

    @property
    def in_flight(self) -> bool:
        """Whether it counts holds, one each."""
        return self.period == "in_flight"


@dataclass(frozen=True, slots=True)
class Terms:
    """What else a limit has; `counts` are the kinds and weights of a pool, `place` orders limits by age."""

    max: int | None
    counts: Mapping[str, int] | None = None
    mode: str = "enforce"
    place: int = field(default=0, compare=False)

    def weights(self, rule: Rule) -> Mapping[str, int]:
        """Tell which kinds the limit counts, and how much one of each takes."""
        return {rule.kind: 1} if self.counts is None else self.counts


@dataclass(frozen=True, slots=True)
class Override:
    """Another max of a limit for one subject, until a moment."""

    id: str
    max: int | None
    until: datetime
    created_at: datetime
