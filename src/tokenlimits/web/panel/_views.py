"""Groups and their usage, as cards show them: a tree, live."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from tokenlimits.levels import FULL, Level
from tokenlimits.models import Group, GroupUsage

from ._format import amount, percent
from ._meters import Meter, fullest, identity, level_of, meters
from ._tree import Tree, named

Sort = Literal["name", "usage", "members"]


@dataclass(frozen=True, slots=True)
class Card:
    """A group with its usage."""

    group: Group
    usage: GroupUsage
    path: str = ""
    """The names on the way to it."""

    @property
    def meters(self) -> list[Meter]:
        """Its limits."""
        return meters(self.usage, self.group)

    @property
    def fraction(self) -> float | None:
        """How full its fullest limit is."""
        return fullest(self.usage)

    @property
    def level(self) -> Level:
        """How full its fullest limit is, in a word."""
        return level_of(self.usage)


@dataclass(frozen=True, slots=True)
class Branch:
    """A card with those of the groups directly beneath it, which are branches again."""

    card: Card
    beneath: Sequence[Branch] = ()
    words: str = ""
    """What is beneath it."""

    @property
    def fraction(self) -> float:
        """How full the fullest limit of all its groups is."""
        own = -1.0 if self.card.fraction is None else self.card.fraction
        return max([own, *(branch.fraction for branch in self.beneath)])

    @property
    def members(self) -> int:
        """How many members all its groups have together."""
        return self.card.usage.member_count + sum(branch.members for branch in self.beneath)


@dataclass(frozen=True, slots=True)
class Summary:
    """All groups in four numbers."""

    groups: int
    members: int
    near: int
    full: int


def cards(groups: Iterable[Group], usages: Iterable[GroupUsage], search: str = "") -> list[Card]:
    """Match groups with their usage; a group that was just created or deleted has no card."""
    all_ = list(groups)
    by_id = {usage.group.id: usage for usage in usages}
    found = [group for group in all_ if group.id in by_id and _matches(group, search)]
    tree = Tree(all_)
    return [Card(group, by_id[group.id], named(tree.above(group.id))) for group in found]


def branches(cards: Iterable[Card], sort: Sort, *, flat: bool = False) -> list[Branch]:
    """Put cards beneath those of their parents; flat: each for itself, as a search finds them."""
    all_ = list(cards)
    shown = {card.group.id for card in all_}
    words = beneath(card.usage for card in all_)
    by_parent: dict[UUID | None, list[Card]] = {}
    for card in all_:
        parent = card.group.parent_id if not flat and card.group.parent_id in shown else None
        by_parent.setdefault(parent, []).append(card)
    return _grown(None, by_parent, words, sort)


def _grown(
    parent: UUID | None, by_parent: dict[UUID | None, list[Card]], words: Mapping[UUID, str], sort: Sort
) -> list[Branch]:
    # taken out: moves while the groups are read could make a circle
    found = [
        Branch(card, _grown(card.group.id, by_parent, words, sort), words.get(card.group.id, ""))
        for card in by_parent.pop(parent, [])
    ]
    if sort == "usage":
        return sorted(found, key=lambda branch: branch.fraction, reverse=True)
    if sort == "members":
        return sorted(found, key=lambda branch: branch.members, reverse=True)
    # they take the whole width: cards before them would leave a part of their last row empty
    return sorted(found, key=lambda branch: not branch.beneath)


def _matches(group: Group, search: str) -> bool:
    wanted = search.strip().casefold()
    return wanted in group.name.casefold() or wanted in group.description.casefold()


def customers(count: int, usage: GroupUsage) -> str:
    """Write how many groups are directly beneath one: customers, where it has limits for each."""
    has_plan = any(limit.scope == "child" and limit.group == usage.group for limit in usage.limits)
    return amount(count, "customer") if has_plan else f"{amount(count, 'group')} beneath"


def beneath(usages: Iterable[GroupUsage]) -> Mapping[UUID, str]:
    """Say how many groups are directly beneath each, and how many of these are full."""
    all_ = list(usages)
    full: dict[UUID | None, int] = {}
    for usage in all_:
        if level_of(usage) == "full":
            full[usage.parent_id] = full.get(usage.parent_id, 0) + 1
    return {
        usage.group.id: customers(usage.child_count, usage) + _full(full.get(usage.group.id, 0))
        for usage in all_
        if usage.child_count
    }


def _full(count: int) -> str:
    return f", {count:,} at {percent(FULL)} % or more" if count else ""


def summary(usages: Iterable[GroupUsage]) -> Summary:
    """Count groups and members, and the groups whose fullest limit is yellow or red."""
    all_ = list(usages)
    levels = [level_of(usage) for usage in all_]
    members = sum(usage.member_count for usage in all_)
    return Summary(len(all_), members, levels.count("warn"), levels.count("full"))


def live(usages: Iterable[GroupUsage], *owners: Group) -> dict[str, Any]:
    """Return what can change on the cards, in a compact form: the page requests it every second.

    `shape` changes when a group or a limit is added, moved, removed or edited; then the page loads its cards again.
    With the group of a page and those above, which say what pools count, it changes with that, too.
    """
    all_ = list(usages)
    shape = [
        [str(usage.group.id), usage.group.name, str(usage.parent_id), _limits(usage, meters(usage, *owners))]
        for usage in all_
    ]
    words = beneath(all_)
    numbers = {str(usage.group.id): _numbers(usage, words.get(usage.group.id, "")) for usage in all_}
    content: dict[str, Any] = {"shape": _digest(shape), "summary": _counts(all_), "groups": numbers}
    return {**content, "version": _digest(content)}


def shape(usages: Iterable[GroupUsage], *owners: Group) -> str:
    """Return the digest of the groups and limits that a page shows."""
    return live(usages, *owners)["shape"]


def _limits(usage: GroupUsage, meters: Iterable[Meter]) -> list[list[Any]]:
    return [
        [
            *identity(each.limit, (each.plan or usage.group).id),
            each.limit.mode,
            each.limit.max,
            sorted(each.counts.items()),
        ]
        for each in meters
    ]


def _numbers(usage: GroupUsage, words: str) -> list[Any]:
    limits = [
        [meter.level, meter.bar, meter.used, meter.left, meter.limit.reset_at and meter.limit.reset_at.isoformat()]
        for meter in meters(usage)
    ]
    return [usage.member_count, level_of(usage), limits, words]


def _counts(usages: Iterable[GroupUsage]) -> Mapping[str, int]:
    counted = summary(usages)
    return {"groups": counted.groups, "members": counted.members, "near": counted.near, "full": counted.full}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
