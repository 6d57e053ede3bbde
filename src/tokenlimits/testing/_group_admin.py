"""The SQL functions for admins on groups and their limits, by their names and parameters (sql/schema/80)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from typing import NoReturn
from uuid import UUID, uuid4

from ._answers import group_json
from ._groups import Group
from ._ledger import Json, refuse
from ._limits import Rule, Terms
from ._overrides import OverrideFunctions, named
from ._periods import canonical
from ._tree import DEEPEST

_NIL = str(UUID(int=0))


class GroupFunctions(OverrideFunctions):
    """Groups with their limits, and groups beneath groups."""

    def save_group(
        self,
        p_group_id: str | None = None,
        p_name: str | None = None,
        p_description: str | None = None,
        p_priority: int | None = None,
        p_timezone: str | None = None,
        p_is_default: bool | None = None,
        p_limits: list[Json] | None = None,
        p_id: str | None = None,
        p_updated_at: str | None = None,
        p_anchor_at: str | None = None,
        p_no_anchor: bool = False,  # noqa: FBT002  # as the SQL's
        p_parent_id: str | None = None,
        p_no_parent: bool = False,  # noqa: FBT002  # as the SQL's
        p_is_spread: bool | None = None,
    ) -> Json:
        """Create a group, or change the fields that are not null; everything is checked before anything changes."""
        limits = None if p_limits is None else _limits(p_limits)
        if p_no_parent and p_parent_id is not None:
            _refuse_parent("pass a parent, or p_no_parent, not both")
        group = None if p_group_id is None else self._group(p_group_id)
        id_ = self._new_id(group, p_id)
        if group is not None:
            _require_same_spread(group, p_is_spread)
        self._require_parent(p_parent_id)
        if group is not None:
            _require_unchanged(group, p_updated_at)
        elif id_ in self._parents:
            _refuse_id(id_)
        is_spread = bool(p_is_spread) if group is None else group.is_spread
        timezone = None if p_timezone is None else _timezone(p_timezone)
        if p_parent_id is not None:
            self._require_place(id_, p_parent_id, is_spread=is_spread)
        name = p_name if p_name is not None else group.name if group else ""
        self._require_free_name(group, name)
        _require_no_pools(limits or {}, is_spread=is_spread)
        if group is None:
            group = Group(id_, name, is_spread=is_spread, created_at=self.now, updated_at=self.now)
            self._groups[id_] = group
            self._plant(id_, p_parent_id)
        else:
            if p_no_parent or p_parent_id is not None:
                self._move(group, p_parent_id)
            self._touch(group)
        if p_is_default:
            self._clear_default(group)
        group.name = name
        group.description = group.description if p_description is None else p_description
        group.priority = group.priority if p_priority is None else p_priority
        group.is_default = group.is_default if p_is_default is None else p_is_default
        anchor_at = group.anchor_at if p_anchor_at is None else datetime.fromisoformat(p_anchor_at)
        self._move_periods(group, timezone or group.timezone, None if p_no_anchor else anchor_at)
        if limits is not None:
            self._edit_limits(group, limits, [rule for rule in group.limits if rule not in limits])
            group.unlimited = False
        return self._group_json(group)

    def set_group_limit(self, p_group_id: str, p_limit: Json) -> Json:
        """Add one limit, or change its max."""
        group, edited = self._group(p_group_id), _limits([p_limit])
        _require_no_pools(edited, is_spread=group.is_spread)
        self._edit_limits(group, edited)
        self._touch(group)
        return self._group_json(group)

    def _edit_limits(self, group: Group, edited: dict[Rule, Terms], removed: Sequence[Rule] = ()) -> None:
        """Add and change limits; one that counts otherwise than before is another, which comes last."""
        others = [rule for rule, old in group.limits.items() if rule in edited and edited[rule].counts != old.counts]
        self._forget_windows(group.id, *removed, *others)
        for rule in [*removed, *others]:
            del group.limits[rule]
        for rule, terms in edited.items():
            old = group.limits.get(rule)
            group.limits[rule] = replace(terms, place=old.place if old else next(self._ages))
        self._remember_windows_of_group(group)

    def _move_periods(self, group: Group, timezone: str, anchor_at: datetime | None) -> None:
        """Change where the periods of a group begin, which makes others of its limits."""
        # an anchor moves anchored periods alone, and those are computed
        group.anchor_at = anchor_at
        if group.timezone != timezone:
            group.timezone = timezone
            self._forget_windows(group.id, *group.limits)
            self._remember_windows_of_group(group)

    def remove_group_limit(
        self,
        p_group_id: str,
        p_kind: str,
        p_period: str | None = None,
        p_scope: str = "group",
        p_starts: str | None = None,
    ) -> Json:
        """Remove one limit, if it is there."""
        group = self._group(p_group_id)
        rule = named(group.limits, p_kind, p_scope, p_period, p_starts)
        self._edit_limits(group, {}, [] if rule is None else [rule])
        self._touch(group)
        return self._group_json(group)

    def delete_group(self, p_group_id: str) -> Json:
        """Delete a group with its limits and memberships; the ledger stays, and goes on counting above."""
        group = self._group(p_group_id)
        children = len(self._children_of(group.id))
        if children:
            refuse(
                "TL001",
                f"group_id: has {children} child group{'' if children == 1 else 's'}",
                detail="group_id",
                hint="Delete or move them first. Nothing was deleted.",
            )
        self._forget_overrides(group)
        del self._groups[group.id]
        return self._group_json(group)

    def find_groups(
        self,
        p_group_id: str | None = None,
        p_name: str | None = None,
        p_search: str | None = None,
        p_after: str | None = None,
        p_page_size: int = 200,
        p_parent_id: str | None = None,
    ) -> list[Json]:
        """Find groups by id, by name, by a part of the name or by their parent; the page after a name."""
        found = [
            group
            for group in self._by_name()
            if p_group_id in (None, group.id)
            and p_parent_id in (None, self._parents[group.id])
            and (p_name is None or group.name.lower() == p_name.strip(" ").lower())
            and (p_search is None or p_search.strip(" ").lower() in group.name.lower())
            and (p_after is None or group.name.lower() > p_after.lower())
        ]
        return [self._group_json(group) for group in found[: min(max(p_page_size, 1), 500)]]

    def _group_json(self, group: Group) -> Json:
        return group_json(group, self._parents[group.id])

    def _require_free_name(self, group: Group | None, name: str) -> None:
        if any(other is not group and other.name.lower() == name.lower() for other in self._groups.values()):
            refuse(
                "TL003",
                f"a group named '{name}' already exists",
                detail=name,
                hint="Names are unique regardless of case. Nothing was saved.",
            )

    def _require_parent(self, parent_id: str | None) -> None:
        if parent_id is not None and parent_id not in self._groups:
            _refuse_parent(f"there is no group {parent_id}")

    def _require_place(self, group_id: str, parent_id: str, *, is_spread: bool) -> None:
        """Refuse a parent that a group can't have."""
        above = self._path(parent_id)
        problem = None
        if self._groups[parent_id].is_spread != is_spread:
            problem = "a spread group is beneath spread groups only, and another one beneath none"
        elif group_id in above:
            problem = "would be beneath itself"
        elif len(above) + self._levels(group_id) > DEEPEST:
            problem = f"groups nest at most {DEEPEST} deep"
        if problem is not None:
            _refuse_parent(problem)

    def _is_unused(self, group_ids: set[str]) -> bool:
        """Tell whether nothing that limits above count is in some groups: neither usage nor members, with anchors."""
        has_members = any(group.members for id_, group in self._groups.items() if id_ in group_ids)
        return not has_members and all(usage.group_id not in group_ids for usage in self.ledger)

    def _move(self, group: Group, parent_id: str | None) -> None:
        """Put a group beneath another one, or none; what counts it no longer, or from now on, is counted afresh."""
        if parent_id == self._parents[group.id]:
            return
        before = self._path(group.id)
        self._plant(group.id, parent_id)
        after = self._path(group.id)
        if self._is_unused(set(self._beneath(group.id))):
            return
        for child, owner in set(pairwise(before)) ^ set(pairwise(after)):
            self._forget_windows(owner, *self._groups[owner].rules_of("child"), whose=child)
        for owner in set(before) ^ set(after):
            self._forget_windows(owner, *self._groups[owner].rules_of("group", "member"))
            self._remember_windows_of_group(self._groups[owner])

    def _new_id(self, group: Group | None, wanted: str | None) -> str:
        """Choose the id of a new group, or refuse the wanted one."""
        if wanted is None:
            return str(uuid4()) if group is None else group.id
        if group is not None:
            refuse("TL001", "id: is for a new group; group_id names an existing one", detail="id")
        if wanted == _NIL:
            refuse("TL001", "id: must not be the nil UUID", detail="id", hint="Choose an id that was never used.")
        return wanted

    def _by_name(self) -> list[Group]:
        return sorted(self._groups.values(), key=lambda group: group.name.lower())

    def _clear_default(self, heir: Group) -> None:
        for group in self._groups.values():
            if group.is_default and group is not heir:
                group.is_default = False
                self._touch(group)


def _require_same_spread(group: Group, is_spread: bool | None) -> None:
    if is_spread not in (None, group.is_spread):
        refuse(
            "TL001",
            "is_spread: is chosen when a group is created",
            detail="is_spread",
            hint="Create another group. Nothing was saved.",
        )


def _require_unchanged(group: Group, updated_at: str | None) -> None:
    if updated_at is not None and datetime.fromisoformat(updated_at) != group.updated_at:
        refuse(
            "TL011",
            f"the group '{group.name}' was changed meanwhile",
            detail=group.updated_at.isoformat(),
            hint="Read it again, and decide whether your change still fits. Nothing was saved.",
        )


def _require_no_pools(limits: Iterable[Rule], *, is_spread: bool) -> None:
    """Refuse limits that would need one place, of a group whose usage is in many."""
    pool = next((rule for rule in limits if rule.scope != "member"), None)
    if is_spread and pool is not None:
        refuse(
            "TL001",
            f"scope: must be member in a spread group: a {pool.scope} limit on {pool.kind} would need one place",
            detail="scope",
            hint="Nothing was saved.",
        )


def _limits(limits: list[Json]) -> dict[Rule, Terms]:
    return {
        Rule(limit["kind"], limit["period"], limit["scope"], limit["starts"]): Terms(
            limit["max"], limit["counts"], limit["mode"]
        )
        for limit in limits
    }


def _refuse_parent(problem: str) -> NoReturn:
    refuse("TL001", f"parent_id: {problem}", detail="parent_id", hint="Nothing was saved.")


def _refuse_id(id_: str) -> NoReturn:
    problem = f"id: {id_} is or was the id of another group"
    refuse("TL001", problem, detail="id", hint="Choose an id that was never used.")


def _timezone(name: str) -> str:
    known = canonical(name)
    if known is None:
        refuse(
            "TL001",
            f"timezone: '{name}' is no IANA time zone",
            detail="timezone",
            hint="Use a name like 'Europe/Paris' or 'UTC'.",
        )
    return known
