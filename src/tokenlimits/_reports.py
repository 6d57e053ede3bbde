"""What is for reports and for those who run it, as pure calls: exports, rankings, drift, users by address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from . import _arguments
from ._arguments import Id, parser
from ._calls import Call
from .models import Reconciliation, TopMember, UsageRecord, User

_RECONCILIATION = parser(Reconciliation)
_RECORDS = parser(list[UsageRecord])
_TOP = parser(list[TopMember])
_USERS = parser(list[User])


Wanted = Mapping[str, Any]
"""Which part of the ledger, as parameters that were checked."""


class UsagePage(list[UsageRecord]):
    """A page of the ledger; `next` is where the next one begins (None: there is none), `until` where all of it ends."""

    def __init__(self, answer: Any) -> None:
        super().__init__(_RECORDS(answer["rows"]))
        self.next: dict[str, Any] | None = answer["next"]
        self.until: str = answer["until"]


def wanted_usage(
    group_id: Id | None, user_id: Id | None, kind: str | None, since: datetime | None, until: datetime | None
) -> Wanted:
    """Check what is to be exported."""
    return {
        "p_group_id": _arguments.optional_id(group_id, "group_id"),
        "p_user_id": _arguments.optional_id(user_id, "user_id"),
        "p_kind": _arguments.optional_kind(kind),
        "p_since": _arguments.moment(since, "since"),
        "p_until": _arguments.moment(until, "until"),
    }


def usage_page(wanted: Wanted, before: UsagePage | None, size: int) -> Call[list[UsageRecord]]:
    """Read the page of the ledger after another."""
    place = {} if before is None else {"p_after": before.next, "p_until": before.until}
    return Call("export_usage", {**wanted, **place, "p_page_size": size}, UsagePage)


def top_members(
    group_id: Id, kind: str | None, since: datetime | None, until: datetime | None, count: int
) -> Call[list[TopMember]]:
    """Read who used most."""
    params = {
        "p_group_id": _arguments.id_(group_id, "group_id"),
        "p_kind": _arguments.optional_kind(kind),
        "p_since": _arguments.moment(since, "since"),
        "p_until": _arguments.moment(until, "until"),
        "p_count": _arguments.count(count),
    }
    return Call("top_members", params, _TOP)


def drift(group_id: Id, since: datetime | None) -> Call[Reconciliation]:
    """Compare a group's counters and history with the ledger."""
    params = {"p_group_id": _arguments.id_(group_id, "group_id"), "p_since": _arguments.moment(since, "since")}
    return Call("usage_drift", params, _RECONCILIATION)


def reconcile(group_id: Id, since: datetime | None) -> Call[Reconciliation]:
    """Count a group's usage again."""
    params = {"p_group_id": _arguments.id_(group_id, "group_id"), "p_since": _arguments.moment(since, "since")}
    return Call("reconcile_usage", params, _RECONCILIATION)


def emails(values: Iterable[str]) -> list[str]:
    """Check e-mail addresses; repeated ones count once."""
    return list(dict.fromkeys(_arguments.emails(values)))


def users_by_email(addresses: list[str]) -> Call[list[User]]:
    """Find the users of up to a few thousand addresses."""
    return Call("find_users_by_email", {"p_emails": addresses}, _USERS)
