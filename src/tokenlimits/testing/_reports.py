"""The SQL functions for reports and operations, by their names and parameters (sql/schema/86 and 88)."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from functools import cache

from ._ledger import MOMENT, Json, Usage
from ._periods import BEGINNING, NEVER, period_of, quarter
from ._usage_reports import UsageReports


class ReportFunctions(UsageReports):
    """Exports, rankings, drift, users by address."""

    def find_users_by_email(self, p_emails: list[str]) -> list[Json]:
        """Find the users of whole e-mail addresses."""
        asked = {email.strip(" ").lower() for email in p_emails}
        users = [(email, user_id) for user_id, email in (self._users or {}).items() if email is not None]
        return [{"user_id": user_id, "email": email} for email, user_id in sorted(users) if email.lower() in asked]

    def export_usage(
        self,
        p_group_id: str | None = None,
        p_user_id: str | None = None,
        p_kind: str | None = None,
        p_since: str | None = None,
        p_until: str | None = None,
        p_after: Json | None = None,
        p_page_size: int = 1000,
    ) -> Json:
        """Read the ledger by group or, of one user, by time; the page after a row."""
        until = self.now + MOMENT if p_until is None else min(self.now + MOMENT, datetime.fromisoformat(p_until))
        after = ("", BEGINNING, "") if p_after is None else _place(p_after)
        usages = [
            usage
            for usage in self._between(p_group_id, p_kind, p_since, until)
            if p_user_id in (None, usage.user_id) and _key(usage, p_user_id) > after
        ]
        size = min(max(p_page_size, 1), 5000)
        page = sorted(usages, key=lambda usage: _key(usage, p_user_id))[:size]
        last = _key(page[-1], p_user_id) if len(page) == size else None
        return {
            "rows": [self._row(usage) for usage in page],
            "until": until.isoformat(),
            "next": None if last is None else {"group_id": last[0], "created_at": last[1].isoformat(), "id": last[2]},
        }

    def export_history(
        self,
        p_group_id: str | None = None,
        p_kind: str | None = None,
        p_bucket: str = "day",
        p_since: str | None = None,
        p_until: str | None = None,
        p_after: Json | None = None,
        p_page_size: int = 1000,
    ) -> Json:
        """Add up live usage by group, kind and time; the page after a sum."""
        until = self.now + MOMENT if p_until is None else min(self.now + MOMENT, datetime.fromisoformat(p_until))
        since = None if p_since is None else datetime.fromisoformat(p_since)
        after = ("", "", BEGINNING) if p_after is None else _sum_place(p_after)

        @cache
        def begin(group_id: str, at: datetime) -> datetime:
            return period_of(p_bucket, self._timezone_of(group_id), at)[0]

        used: Counter[tuple[str, str, datetime]] = Counter()
        generations: Counter[tuple[str, str, datetime]] = Counter()
        for usage in self._between(p_group_id, p_kind, None, NEVER):
            at = quarter(usage.created_at)
            if usage.live and at < until and (since is None or at >= since or at >= begin(usage.group_id, since)):
                key = (usage.group_id, usage.kind, begin(usage.group_id, at))
                used[key] += usage.cost
                generations[key] += 1
        left = sorted(key for key in generations if key >= after)
        size = min(max(p_page_size, 1), 5000)
        return {
            "rows": [
                {
                    "group": self.reference(group_id),
                    "timezone": self._timezone_of(group_id),
                    "kind": kind,
                    "bucket": at.isoformat(),
                    "used": used[group_id, kind, at],
                    "generations": generations[group_id, kind, at],
                }
                for group_id, kind, at in left[:size]
            ],
            "until": until.isoformat(),
            "next": _sum_next(left[size]) if len(left) > size else None,
        }

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

    def top_members(
        self,
        p_group_id: str,
        p_kind: str | None = None,
        p_since: str | None = None,
        p_until: str | None = None,
        p_count: int = 10,
    ) -> list[Json]:
        """Rank users by what they used in a group."""
        self._group(p_group_id)
        until = None if p_until is None else datetime.fromisoformat(p_until)
        since = p_since or ((until or self.now) - timedelta(days=30)).isoformat()
        used: Counter[str] = Counter()
        generations: Counter[str] = Counter()
        for usage in self._between(p_group_id, p_kind, since, until or NEVER):
            if usage.live:
                used[usage.user_id] += usage.cost
                generations[usage.user_id] += 1
        ranked = sorted(generations, key=lambda user_id: (-used[user_id], user_id))
        return [
            {"user_id": each, "used": used[each], "generations": generations[each], "email": self._email(each)}
            for each in ranked[: min(max(p_count, 1), 1000)]
        ]

    def usage_drift(self, p_group_id: str, p_since: str | None = None) -> Json:  # noqa: ARG002  # as the SQL's
        """Compare counters with the ledger; here nobody can bypass the functions, so nothing ever differs."""
        self._group(p_group_id)
        return {"counters": [], "rollup": [], "holds": 0}

    def _between(self, group_id: str | None, kind: str | None, since: str | None, until: datetime) -> list[Usage]:
        first = BEGINNING if since is None else datetime.fromisoformat(since)
        return [
            usage
            for usage in self.ledger
            if group_id in (None, usage.group_id) and kind in (None, usage.kind) and first <= usage.created_at < until
        ]

    def _timezone_of(self, group_id: str) -> str:
        group = self._groups.get(group_id)
        return group.timezone if group is not None else "UTC"

    def _row(self, usage: Usage) -> Json:
        return {
            "id": usage.id,
            "group": self.reference(usage.group_id),
            "user_id": usage.user_id,
            "email": self._email(usage.user_id),
            "kind": usage.kind,
            "cost": usage.cost,
            "status": usage.status,
            "idempotency_key": usage.idempotency_key,
            "metadata": usage.metadata,
            "created_at": usage.created_at.isoformat(),
            "settled_at": usage.settled_at and usage.settled_at.isoformat(),
            "expires_at": usage.expires_at and usage.expires_at.isoformat(),
        }


def _key(usage: Usage, user_id: str | None) -> tuple[str, datetime, str]:
    """Order usages by group, or those of one user by time alone."""
    return (usage.group_id if user_id is None else "", usage.created_at, usage.id)


def _place(after: Json) -> tuple[str, datetime, str]:
    return (after["group_id"], datetime.fromisoformat(after["created_at"]), after["id"])


def _sum_next(key: tuple[str, str, datetime]) -> Json:
    return {"group_id": key[0], "kind": key[1], "bucket": key[2].isoformat()}


def _sum_place(after: Json) -> tuple[str, str, datetime]:
    return (after["group_id"], after["kind"], datetime.fromisoformat(after["bucket"]))
