"""Groups beneath groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from tokenlimits import AsyncGroupManager, Limit
from tokenlimits.models import Group

from . import _words

DEEPEST: Final = 5
"""How many levels groups nest, as the database has it."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A limit of a group above, which counts what is used in a group, too."""

    owner: Group
    limit: Limit

    @property
    def sentence(self) -> str:
        """What it will do."""
        return _words.sentence(self.limit)


@dataclass(frozen=True, slots=True)
class Place:
    """A group that another one may be beneath, with the names on the way to it."""

    id: UUID
    path: str


class Tree:
    """All groups, of which each knows the one that it is beneath."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self._by_id = {group.id: group for group in groups}

    def above(self, group_id: UUID) -> list[Group]:
        """Return the groups above one, from the root on; without those that were not listed."""
        found: list[Group] = []
        group = self._by_id.get(group_id)
        # what others move while the groups are listed may be beneath itself
        while group and (group := self._by_id.get(group.parent_id or group_id)) and len(found) < DEEPEST:
            if group.id == group_id:
                break
            found.append(group)
        return found[::-1]

    def path(self, group_id: UUID) -> str:
        """Write the names on the way to a group, from the root on."""
        return named([*self.above(group_id), self._by_id[group_id]])

    def places(self, moved: UUID | None = None) -> list[Place]:
        """Return what a group may be beneath: not what is beneath itself, and nothing that would be too deep."""
        depths = {each: len(self.above(each)) + 1 for each in self._by_id}
        beneath = {each for each in self._by_id if moved in {group.id for group in self.above(each)}}
        height = max((depths[each] - depths[moved] for each in beneath if moved), default=0) + 1
        fitting = [each for each in self._by_id if each not in beneath | {moved} and depths[each] + height <= DEEPEST]
        return sorted((Place(each, self.path(each)) for each in fitting), key=lambda place: place.path.casefold())


def named(way: Iterable[Group]) -> str:
    """Write the names on a way."""
    return " \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} ".join(group.name for group in way)


async def above(groups: AsyncGroupManager, group: Group) -> list[Group]:
    """Read the groups above one, from the root on."""
    found: list[Group] = []
    while group.parent_id and len(found) < DEEPEST:
        group = await groups.get(group.parent_id)
        found.append(group)
    return found[::-1]


def inherited(above: Sequence[Group]) -> list[Inherited]:
    """Return the limits of the groups above, those of the nearest first."""
    return [Inherited(owner, limit) for owner in reversed(above) for limit in owner.limits]
