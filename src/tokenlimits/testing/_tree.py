"""Which groups are beneath which. A deleted group stays where it was, and its usage goes on counting above."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

DEEPEST = 5
"""How many levels there may be: a root, and four below."""


class Tree:
    """The groups by their ids."""

    def __init__(self) -> None:
        # of every group that there is or was; None: a root
        self._parents: dict[str, str | None] = {}
        self._children: defaultdict[str | None, list[str]] = defaultdict(list)

    def _plant(self, group_id: str, parent_id: str | None) -> None:
        """Put a group beneath another, or move it there with all that is beneath it."""
        if group_id in self._parents:
            self._children[self._parents[group_id]].remove(group_id)
        self._parents[group_id] = parent_id
        self._children[parent_id].append(group_id)

    def _path(self, group_id: str | None) -> list[str]:
        """List a group and those above it, up to the root."""
        path: list[str] = []
        while group_id is not None:
            path.append(group_id)
            group_id = self._parents[group_id]
        return path

    def _beneath(self, group_id: str) -> Iterator[str]:
        """List a group and all beneath it."""
        yield group_id
        for child in self._children.get(group_id, ()):
            yield from self._beneath(child)
