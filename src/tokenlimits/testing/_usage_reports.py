"""The SQL functions that report how much of a group's limits is used, by their names (sql/schema/85 and 88)."""

from __future__ import annotations

from itertools import product

from ._answers import group_limit_json
from ._groups import Bound, Group
from ._ledger import Json
from ._state import State


class UsageReports(State):
    """Of groups, and of their members."""

    def group_usage(
        self, p_group_id: str | None = None, p_after: str | None = None, p_page_size: int | None = None
    ) -> list[Json]:
        """Show the member count and the limits of one group, of all, or of the page after a name."""
        groups = [self._group(p_group_id)] if p_group_id is not None else self._after(p_after, p_page_size)
        return [
            {
                "group": self.reference(group.id),
                "parent_id": self._parents[group.id],
                "child_count": len(self._children_of(group.id)),
                "member_count": len(group.members),
                "limits": [self._limit_report(group, bound) for bound in self._reported(group)],
            }
            for group in groups
        ]

    def _reported(self, group: Group) -> list[Bound]:
        """List a group's own limits, and the pool that it is in child limits of its parent."""
        own = [Bound(group, rule, terms, None) for rule, terms in group.limits.items()]
        parent = self._groups.get(self._parents[group.id] or "")
        of_parent = parent.limits.items() if parent else ()
        inherited = [
            Bound(parent, rule, terms, group.id) for rule, terms in of_parent if parent and rule.scope == "child"
        ]
        return sorted([*own, *inherited], key=_place)

    def _limit_report(self, group: Group, bound: Bound) -> Json:
        subjects = {"member": self._users_beneath(group), "child": self._children_of(group.id), "group": []}
        whose = subjects[bound.rule.scope] if bound.owner is group else []
        states = [self._state(Bound(group, bound.rule, bound.terms, each)) for each in whose]
        return group_limit_json(self._state(bound), states, group.id)

    def _users_beneath(self, group: Group) -> list[str]:
        groups = [self._groups[id_] for id_ in self._beneath(group.id) if id_ in self._groups]
        return list(dict.fromkeys(user_id for each in groups for user_id in each.members))

    def limit_pressure(self, p_group_id: str, p_at_least: int = 90, p_count: int = 100) -> list[Json]:
        """Count the members who have used all of a member limit, or a percentage of it."""
        group = self._group(p_group_id)
        at_least = min(max(p_at_least, 1), 100)
        # as they are sorted: by what they have used, from the most, and by id; and whether that is all that they may
        pressed = {
            bound.rule: list[tuple[int, str, bool]]() for bound in self._reported(group) if bound.rule.scope == "member"
        }
        for user_id, rule in product(self._users_beneath(group), pressed):
            state = self._state(Bound(group, rule, group.limits[rule], user_id))
            max_ = state.terms.max
            if max_ and 100 * state.used >= max_ * at_least:
                pressed[rule].append((-state.used, user_id, state.used >= max_))
        return [
            {
                "kind": rule.kind,
                "period": rule.period,
                "starts": rule.starts,
                "max": group.limits[rule].max,
                "full": sum(is_full for _, _, is_full in members),
                "near": len(members),
                "members": [
                    {"user_id": user_id, "email": self._email(user_id), "used": -minus}
                    for minus, user_id, _ in sorted(members)[: min(max(p_count, 0), 1000)]
                ],
            }
            for rule, members in pressed.items()
            if members or group.limits[rule].max
        ]

    def _after(self, name: str | None, size: int | None) -> list[Group]:
        groups = [
            group
            for group in sorted(self._groups.values(), key=lambda group: group.name.lower())
            if name is None or group.name.lower() > name.lower()
        ]
        return groups if size is None else groups[: max(size, 1)]


def _place(bound: Bound) -> tuple[str, bool, int]:
    return bound.rule.kind, bound.rule.scope == "group", bound.terms.place
