"""Groups and their usage, as cards show them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenlimits.levels import Level, level
from tokenlimits.models import Group, GroupLimitUsage, GroupUsage

Sort = Literal["name", "usage", "members"]


@dataclass(frozen=True, slots=True)
class Card:
    """A group with its usage."""

    group: Group
    usage: GroupUsage

    @property
    def fraction(self) -> float | None:
        """How full its fullest limit is."""
        return _fullest(self.usage.limits)

    @property
    def level(self) -> Level:
        """How full its fullest limit is, in a word."""
        return level(self.fraction)


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
    levels = [level(_fullest(usage.limits)) for usage in all_]
    members = sum(usage.member_count for usage in all_)
    return Summary(len(all_), members, levels.count("warn"), levels.count("full"))


def _fullest(limits: Iterable[GroupLimitUsage]) -> float | None:
    return max((limit.fraction for limit in limits if limit.fraction is not None), default=None)


def live(usages: Iterable[GroupUsage]) -> dict[str, Any]:
    """Return what can change on the cards, in a compact form: the page requests it every second.

    `shape` changes when a group or a limit is added, removed or edited; then the page loads its cards again.
    """
    all_ = list(usages)
    shape = [[str(u.group.id), u.group.name, [[x.kind, x.period, x.scope, x.max] for x in u.limits]] for u in all_]
    numbers = {str(usage.group.id): _numbers(usage) for usage in all_}
    content: dict[str, Any] = {"shape": _digest(shape), "summary": _counts(all_), "groups": numbers}
    return {**content, "version": _digest(content)}


def shape(usages: Iterable[GroupUsage]) -> str:
    """Return the digest of the groups and limits that a page shows."""
    return live(usages)["shape"]


def _numbers(usage: GroupUsage) -> list[Any]:
    limits = [
        [
            limit.used,
            limit.remaining,
            level(limit.fraction),
            limit.reset_at and limit.reset_at.isoformat(),
            limit.capacity,
        ]
        for limit in usage.limits
    ]
    return [usage.member_count, level(_fullest(usage.limits)), limits]


def _counts(usages: Iterable[GroupUsage]) -> Mapping[str, int]:
    counted = summary(usages)
    return {"groups": counted.groups, "members": counted.members, "near": counted.near, "full": counted.full}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
