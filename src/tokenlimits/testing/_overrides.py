"""The SQL functions for overrides, by their names and parameters (sql/schema/82), and which limit a name means."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from uuid import uuid4

from ._answers import place_of
from ._groups import Group
from ._ledger import Json, refuse, text
from ._limits import Override, Rule
from ._periods import NEVER
from ._state import State

_MOST = 10**15


def named(rules: Iterable[Rule], kind: str, scope: str, period: str | None, starts: str | None) -> Rule | None:
    """Find the one limit that is meant, if there is any; refuse if there are several."""
    fitting = [
        rule
        for rule in rules
        if (rule.kind, rule.scope) == (kind, scope) and period in (None, rule.period) and starts in (None, rule.starts)
    ]
    if len(fitting) > 1:
        several = ", ".join(f"{rule.period} {rule.starts}" for rule in sorted(fitting, key=place_of))
        refuse(
            "TL001",
            f"period: {scope} has several limits on {kind}: {several}",
            detail="period",
            hint="Say which one by its period and starts. Nothing was changed.",
        )
    return fitting[0] if fitting else None


class OverrideFunctions(State):
    """Another max of one limit for one subject."""

    def set_limit_override(
        self,
        p_group_id: str,
        p_kind: str,
        p_max: int | None,
        p_user_id: str | None = None,
        p_period: str | None = None,
        p_starts: str | None = None,
        p_until: str | None = None,
        p_child_id: str | None = None,
    ) -> Json:
        """Replace the max of one limit for a user, for a child, or (neither) of a group limit."""
        group = self._group(p_group_id)
        self._require_user(p_user_id)
        _refuse_both(p_user_id, p_child_id)
        self._require_child(group, p_child_id)
        if p_max is not None and not 0 <= p_max <= _MOST:
            refuse("TL001", f"max: must be from 0 to {_MOST}, or null", detail="max", hint="Nothing was saved.")
        until = NEVER if p_until is None else datetime.fromisoformat(p_until)
        if until <= self.now:
            refuse("TL001", "until: must be in the future", detail="until", hint="Nothing was saved.")
        scope, whose = _subject(p_user_id, p_child_id)
        rule = named(group.limits, p_kind, scope, p_period, p_starts)
        if rule is None:
            name_it = "For a member limit, name the user; for a child limit, the child. " if scope == "group" else ""
            refuse(
                "TL001",
                f"kind: there is no such {scope} limit on {p_kind}",
                detail="kind",
                hint=f"{name_it}Nothing was saved.",
            )
        key = (group.id, rule, whose)
        before = self._overrides.get(key)
        self._overrides[key] = Override(before.id if before else self._override_id(), p_max, until, self.now)
        self._touch(group)
        return self._override_json(*key)

    def remove_limit_override(
        self,
        p_group_id: str,
        p_kind: str,
        p_user_id: str | None = None,
        p_period: str | None = None,
        p_starts: str | None = None,
        p_child_id: str | None = None,
    ) -> Json:
        """Let a limit's own max hold again; also one that isn't there at the moment."""
        group = self._group(p_group_id)
        _refuse_both(p_user_id, p_child_id)
        scope, whose = _subject(p_user_id, p_child_id)
        overridden = [rule for id_, rule, subject in self._overrides if (id_, subject) == (group.id, whose)]
        rule = named(overridden, p_kind, scope, p_period, p_starts)
        if rule is not None:
            del self._overrides[group.id, rule, whose]
        self._touch(group)
        return {"removed": rule is not None}

    def find_limit_overrides(
        self,
        p_group_id: str,
        p_user_id: str | None = None,
        p_after: str | None = None,
        p_page_size: int = 500,
        p_child_id: str | None = None,
    ) -> list[Json]:
        """List the overrides in a group, or those of one user or child, in order of id; the page after an id."""
        group = self._group(p_group_id)
        _refuse_both(p_user_id, p_child_id)
        found = [
            self._override_json(id_, rule, whose)
            for id_, rule, whose in self._overrides
            if id_ == group.id and (p_user_id or p_child_id) in (None, whose)
        ]
        found.sort(key=lambda override: override["id"])
        left = [override for override in found if p_after is None or override["id"] > p_after]
        return left[: min(max(p_page_size, 1), 1000)]

    def _require_child(self, group: Group, child_id: str | None) -> None:
        if child_id is not None and self._parents[self._group(child_id).id] != group.id:
            problem = f"child_id: {child_id} is not directly beneath the group"
            refuse("TL001", problem, detail="child_id", hint="Nothing was saved.")

    def _override_id(self) -> str:
        return str(uuid4())

    def _override_json(self, group_id: str, rule: Rule, whose: str | None) -> Json:
        override = self._overrides[group_id, rule, whose]
        user_id = whose if rule.scope == "member" else None
        child_id = whose if rule.scope == "child" else None
        is_there = rule in self._group(group_id).limits
        if child_id is not None:
            is_there = is_there and child_id in self._children_of(group_id)
        return {
            "id": override.id,
            "group_id": group_id,
            "kind": rule.kind,
            "period": rule.period,
            "starts": rule.starts,
            "scope": rule.scope,
            "user_id": user_id,
            "email": None if user_id is None else self._email(user_id),
            "child_id": child_id,
            "child_name": None if child_id is None else self.reference(child_id)["name"],
            "max": override.max,
            "until": text(override.until),
            "status": "ended" if override.until <= self.now else "active" if is_there else "sleeping",
            "created_at": text(override.created_at),
        }

    def _forget_overrides(self, group: Group) -> None:
        for key in [key for key in self._overrides if group.id in (key[0], key[2])]:
            del self._overrides[key]


def _refuse_both(user_id: str | None, child_id: str | None) -> None:
    if user_id is not None and child_id is not None:
        problem = "child_id: name a user or a child group, not both"
        refuse("TL001", problem, detail="child_id", hint="Nothing was saved.")


def _subject(user_id: str | None, child_id: str | None) -> tuple[str, str | None]:
    """Tell by whose limit it is which scope is meant."""
    if child_id is not None:
        return "child", child_id
    return ("group" if user_id is None else "member"), user_id
