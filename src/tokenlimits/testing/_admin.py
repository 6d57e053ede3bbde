"""The SQL functions for admins, by their names and parameters (sql/schema/80 to 87)."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from functools import cache
from typing import get_args
from uuid import UUID, uuid4

from tokenlimits.models import SinglePeriod

from ._answers import group_json, group_limit_json
from ._periods import canonical, period_of, quarter
from ._state import ALL_KINDS, Group, Json, Rule, State, refuse

_NIL = str(UUID(int=0))
_PERIODS: tuple[str, ...] = get_args(SinglePeriod)


class AdminFunctions(State):
    """Groups, their limits and members, and reports."""

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
            group = Group(id_, name, "", 0, "UTC", is_default=False, created_at=self.now, updated_at=self.now)
            self._groups[id_] = group
            self._group_ids.add(id_)
        if p_is_default:
            self._clear_default(group)
        group.name = name
        group.description = group.description if p_description is None else p_description
        group.priority = group.priority if p_priority is None else p_priority
        group.timezone = timezone or group.timezone
        group.is_default = group.is_default if p_is_default is None else p_is_default
        if p_group_id is not None:
            self._touch(group)
        if limits is not None:
            kept = {rule: limits[rule] for rule in group.limits if rule in limits}
            group.limits = kept | limits
            group.unlimited = False
        return group_json(group, _PERIODS)

    def _touch(self, group: Group) -> None:
        # two changes never have the same moment, or the second editor would not notice the first
        group.updated_at = max(self.now, group.updated_at + timedelta(microseconds=1))

    def set_group_limit(self, p_group_id: str, p_limit: Json) -> Json:
        """Add one limit, or change its max."""
        group = self._group(p_group_id)
        group.limits |= _limits([p_limit])
        self._touch(group)
        return group_json(group, _PERIODS)

    def remove_group_limit(
        self, p_group_id: str, p_kind: str, p_period: str, p_scope: str, p_starts: str | None = None
    ) -> Json:
        """Remove one limit, if it is there."""
        group = self._group(p_group_id)
        group.limits.pop(Rule(p_kind, p_period, p_scope), None)
        self._touch(group)
        return group_json(group, _PERIODS)

    def delete_group(self, p_group_id: str) -> Json:
        """Delete a group with its limits and memberships; the ledger stays."""
        return group_json(self._groups.pop(self._group(p_group_id).id), _PERIODS)

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
        return [group_json(group, _PERIODS) for group in found[: min(max(p_page_size, 1), 500)]]

    def add_group_members(self, p_group_id: str, p_user_ids: list[str], p_anchor_at: str | None = None) -> Json:
        """Add users to a group."""
        group = self._group(p_group_id)
        asked = set(p_user_ids)
        known = asked if self._users is None else asked & self._users.keys()
        added = sum([self._enlist(group, user_id) for user_id in sorted(known)])
        return {"added": added, "already": len(known) - added, "unknown": sorted(asked - known)}

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
            {"user_id": user_id, "email": emails.get(user_id), "joined_at": members[user_id].joined_at.isoformat()}
            for user_id in page[: min(max(p_page_size, 1), 1000)]
        ]

    def reset_group_usage(self, p_group_id: str, p_kind: str | None = None) -> Json:
        """Let usage of a kind, or of all, count from now on."""
        group = self._group(p_group_id)
        self._reset(group, p_kind or ALL_KINDS)
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
                "limits": [group_limit_json(state, len(group.members)) for state in self._states(group, None)],
            }
            for group in groups
        ]

    def generation_history(
        self,
        p_group_id: str | None = None,
        p_kind: str | None = None,
        p_bucket: str = "day",
        p_since: str | None = None,
        p_until: str | None = None,
    ) -> list[Json]:
        """Add up live usage per kind and hour, day, week or month."""
        timezone = "UTC" if p_group_id is None else self._group(p_group_id).timezone
        until = None if p_until is None else datetime.fromisoformat(p_until)
        since = (until or self.now) - timedelta(days=30) if p_since is None else datetime.fromisoformat(p_since)

        @cache
        def begin(at: datetime) -> datetime:
            return period_of(p_bucket, timezone, at)[0]

        usages = [
            usage
            for usage in self.ledger
            if usage.live and p_group_id in (None, usage.group_id) and p_kind in (None, usage.kind)
        ]
        first = max(since, min((usage.created_at for usage in usages), default=since))
        used: Counter[tuple[datetime, str]] = Counter()
        generations: Counter[tuple[datetime, str]] = Counter()
        for usage in usages:
            at = quarter(usage.created_at)
            if at >= begin(first) and (until is None or at < until):
                used[begin(at), usage.kind] += usage.cost
                generations[begin(at), usage.kind] += 1
        return [
            {"bucket": at.isoformat(), "kind": kind, "used": used[at, kind], "generations": generations[at, kind]}
            for at, kind in sorted(generations)
        ]

    def _new_id(self, group: Group | None, wanted: str | None) -> str:
        """Choose the id of a new group, or refuse the wanted one: the ledger still refers to old ids."""
        if wanted is None:
            return str(uuid4())
        if group is not None:
            refuse("TL001", "id: is for a new group; group_id names an existing one", detail="id")
        problem = "must not be the nil UUID" if wanted == _NIL else f"{wanted} is or was the id of another group"
        if wanted == _NIL or wanted in self._group_ids:
            refuse("TL001", f"id: {problem}", detail="id", hint="Choose an id that was never used.")
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


def _limits(limits: list[Json]) -> dict[Rule, int | None]:
    return {Rule(limit["kind"], limit["period"], limit["scope"]): limit["max"] for limit in limits}


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
