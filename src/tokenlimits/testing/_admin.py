"""The SQL functions for admins on members and users, by their names and parameters (sql/schema/80 and 87)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from ._group_admin import GroupFunctions
from ._ledger import Json, text
from ._state import ALL_KINDS


class AdminFunctions(GroupFunctions):
    """Members, users and resets."""

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
