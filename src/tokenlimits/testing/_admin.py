"""The SQL functions for admins, by their names and parameters (sql/schema/80 to 87, but for overrides)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import NoReturn
from uuid import UUID, uuid4

from ._answers import group_json, group_limit_json
from ._ledger import Json, refuse, text
from ._limits import Rule, Terms
from ._overrides import OverrideFunctions, named
from ._periods import canonical
from ._state import ALL_KINDS, Group

_NIL = str(UUID(int=0))


class AdminFunctions(OverrideFunctions):
    """Groups, their limits and members."""

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
    ) -> Json:
        """Create a group, or change the fields that are not null; everything is checked before anything changes."""
        limits = None if p_limits is None else _limits(p_limits)
        group = None if p_group_id is None else self._group(p_group_id)
        id_ = self._new_id(group, p_id)
        if group is not None and p_updated_at is not None and datetime.fromisoformat(p_updated_at) != group.updated_at:
            refuse(
                "TL011",
                f"the group '{group.name}' was changed meanwhile",
                detail=group.updated_at.isoformat(),
                hint="Read it again, and decide whether your change still fits. Nothing was saved.",
            )
        name = p_name if p_name is not None else group.name if group else ""
        timezone = None if p_timezone is None else _timezone(p_timezone)
        if any(other is not group and other.name.lower() == name.lower() for other in self._groups.values()):
            refuse(
                "TL003",
                f"a group named '{name}' already exists",
                detail=name,
                hint="Names are unique regardless of case. Nothing was saved.",
            )
        if group is None:
            if id_ in self._group_ids:  # of a group that was deleted, which the SQL looks for last
                _refuse_id(id_)
            group = Group(id_, name, "", 0, "UTC", is_default=False, created_at=self.now, updated_at=self.now)
            self._groups[id_] = group
            self._group_ids.add(id_)
        if p_is_default:
            self._clear_default(group)
        group.name = name
        group.description = group.description if p_description is None else p_description
        group.priority = group.priority if p_priority is None else p_priority
        group.is_default = group.is_default if p_is_default is None else p_is_default
        anchor_at = group.anchor_at if p_anchor_at is None else datetime.fromisoformat(p_anchor_at)
        self._move_periods(group, timezone or group.timezone, None if p_no_anchor else anchor_at)
        if p_group_id is not None:
            self._touch(group)
        if limits is not None:
            self._edit_limits(group, limits, [rule for rule in group.limits if rule not in limits])
            group.unlimited = False
        return group_json(group)

    def set_group_limit(self, p_group_id: str, p_limit: Json) -> Json:
        """Add one limit, or change its max."""
        group = self._group(p_group_id)
        self._edit_limits(group, _limits([p_limit]))
        self._touch(group)
        return group_json(group)

    def _edit_limits(self, group: Group, edited: dict[Rule, Terms], removed: Sequence[Rule] = ()) -> None:
        """Add and change limits; one that counts otherwise than before is another, which comes last."""
        others = [rule for rule, old in group.limits.items() if rule in edited and edited[rule].counts != old.counts]
        self._forget_windows(group, *removed, *others)
        for rule in [*removed, *others]:
            del group.limits[rule]
        group.limits |= edited
        self._remember_windows_of_group(group)

    def _move_periods(self, group: Group, timezone: str, anchor_at: datetime | None) -> None:
        """Change where the periods of a group begin, which makes others of its limits."""
        # an anchor moves anchored periods alone, and those are computed
        group.anchor_at = anchor_at
        if group.timezone != timezone:
            group.timezone = timezone
            self._forget_windows(group, *group.limits)
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
        return group_json(group)

    def delete_group(self, p_group_id: str) -> Json:
        """Delete a group with its limits and memberships; the ledger stays."""
        group = self._group(p_group_id)
        self._forget_overrides(group)
        return group_json(self._groups.pop(group.id))

    def find_groups(
        self,
        p_group_id: str | None = None,
        p_name: str | None = None,
        p_search: str | None = None,
        p_after: str | None = None,
        p_page_size: int = 200,
    ) -> list[Json]:
        """Find groups by id, by name or by a part of the name; the page after a name."""
        found = [
            group
            for group in self._by_name()
            if p_group_id in (None, group.id)
            and (p_name is None or group.name.lower() == p_name.strip(" ").lower())
            and (p_search is None or p_search.strip(" ").lower() in group.name.lower())
            and (p_after is None or group.name.lower() > p_after.lower())
        ]
        return [group_json(group) for group in found[: min(max(p_page_size, 1), 500)]]

    def add_group_members(self, p_group_id: str, p_user_ids: list[str], p_anchor_at: str | None = None) -> Json:
        """Add users to a group."""
        group = self._group(p_group_id)
        asked = set(p_user_ids)
        known = asked if self._users is None else asked & self._users.keys()
        anchor_at = None if p_anchor_at is None else datetime.fromisoformat(p_anchor_at)
        added = sum([self._enlist(group, user_id, anchor_at) for user_id in sorted(known)])
        return {"added": added, "already": len(known) - added, "unknown": sorted(asked - known)}

    def set_member_anchor(self, p_group_id: str, p_user_id: str, p_anchor_at: str | None) -> Json:
        """Set from when a member's anchored periods are counted."""
        members = self._group(p_group_id).members
        if p_user_id not in members:
            return {"set": False}
        anchor_at = None if p_anchor_at is None else datetime.fromisoformat(p_anchor_at)
        members[p_user_id] = replace(members[p_user_id], anchor_at=anchor_at)
        return {"set": True}

    def remove_group_members(self, p_group_id: str, p_user_ids: list[str]) -> Json:
        """Remove users from a group; their usage stays."""
        members = self._group(p_group_id).members
        return {"removed": sum(members.pop(user_id, None) is not None for user_id in p_user_ids)}

    def move_group_member(self, p_user_id: str, p_from: str, p_to: str) -> Json:
        """Move a user from one group to another."""
        from_, to = self._group(p_from), self._group(p_to)
        moved = from_ is not to and from_.members.pop(p_user_id, None) is not None
        if moved:
            self._enlist(to, p_user_id)
        return {"moved": moved}

    def group_members(
        self, p_group_id: str, p_after: str | None = None, p_page_size: int = 500, p_search: str | None = None
    ) -> list[Json]:
        """List members, or those whose address contains a text, in order of id; the page after an id."""
        members = self._group(p_group_id).members
        emails = self._users or {}
        part = (p_search or "").strip(" ").lower()
        page = sorted(
            user_id
            for user_id in members
            if (p_after is None or user_id > p_after) and part in (emails.get(user_id) or "").lower()
        )
        return [
            {
                "user_id": user_id,
                "email": emails.get(user_id),
                "joined_at": text(member.joined_at),
                "anchor_at": member.anchor_at and text(member.anchor_at),
            }
            for user_id in page[: min(max(p_page_size, 1), 1000)]
            for member in [members[user_id]]
        ]

    def reset_group_usage(self, p_group_id: str, p_kind: str | None = None, p_user_id: str | None = None) -> Json:
        """Let usage of a kind, or of all, count from now on, of a group or of one user."""
        group = self._group(p_group_id)
        self._require_user(p_user_id)
        self._reset(group, p_kind or ALL_KINDS, p_user_id)
        return {"reset_at": self.now.isoformat()}

    def reconcile_usage(self, p_group_id: str, p_since: str | None = None) -> Json:  # noqa: ARG002  # as the SQL's
        """Recount a group's usage; here nobody can bypass the functions, so nothing ever differs."""
        self._group(p_group_id)
        return {"counters": [], "rollup": [], "holds": 0}

    def find_users(self, p_email: str, p_page_size: int = 20) -> list[Json]:
        """Find users by a part of their e-mail address."""
        part = p_email.strip(" ").lower()
        users = [(email, user_id) for user_id, email in (self._users or {}).items() if email is not None]
        found = sorted((email, user_id) for email, user_id in users if part in email.lower())
        return [{"user_id": user_id, "email": email} for email, user_id in found[: min(max(p_page_size, 1), 200)]]

    def group_usage(
        self, p_group_id: str | None = None, p_after: str | None = None, p_page_size: int | None = None
    ) -> list[Json]:
        """Show the member count and the limits of one group, of all, or of the page after a name."""
        groups = [self._group(p_group_id)] if p_group_id is not None else self._after(p_after, p_page_size)
        return [
            {
                "group": self.reference(group.id),
                "member_count": len(group.members),
                "limits": [
                    group_limit_json(
                        self._state(group, rule, terms, None),
                        [self._state(group, rule, terms, user_id) for user_id in group.members],
                    )
                    for rule, terms in group.rules().items()
                ],
            }
            for group in groups
        ]

    def _new_id(self, group: Group | None, wanted: str | None) -> str:
        """Choose the id of a new group, or refuse the wanted one: the ledger still refers to old ids."""
        if wanted is None:
            return str(uuid4())
        if group is not None:
            refuse("TL001", "id: is for a new group; group_id names an existing one", detail="id")
        if wanted == _NIL:
            refuse("TL001", "id: must not be the nil UUID", detail="id", hint="Choose an id that was never used.")
        if wanted in self._groups:
            _refuse_id(wanted)
        return wanted

    def _after(self, name: str | None, size: int | None) -> list[Group]:
        groups = [group for group in self._by_name() if name is None or group.name.lower() > name.lower()]
        return groups if size is None else groups[: max(size, 1)]

    def _by_name(self) -> list[Group]:
        return sorted(self._groups.values(), key=lambda group: group.name.lower())

    def _clear_default(self, heir: Group) -> None:
        for group in self._groups.values():
            if group.is_default and group is not heir:
                group.is_default = False
                self._touch(group)


def _limits(limits: list[Json]) -> dict[Rule, Terms]:
    return {
        Rule(limit["kind"], limit["period"], limit["scope"], limit["starts"]): Terms(
            limit["max"], limit["counts"], limit["mode"]
        )
        for limit in limits
    }


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
