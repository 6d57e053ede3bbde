"""What is for reports and for those who run it, as pure calls: exports, rankings, drift, users by address."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from . import _arguments
from ._arguments import Id, parser
from ._calls import Call
from .errors import InvalidRequest
from .models import Bucket, Reconciliation, TopMember, UsageRecord, UsageSum, User

T = TypeVar("T")

_RECONCILIATION = parser(Reconciliation)
_RECORDS = parser(list[UsageRecord])
_SUMS = parser(list[UsageSum])
_TOP = parser(list[TopMember])
_USERS = parser(list[User])


class Page(list[T]):
    """A page of an export; `next` is how the one after it is asked for (None: there is none)."""

    def __init__(self, rows: list[T], answer: Any) -> None:
        super().__init__(rows)
        after, until = answer["next"], answer["until"]
        self.next: Mapping[str, Any] | None = None if after is None else {"p_after": after, "p_until": until}


@dataclass(frozen=True, slots=True)
class Export(Generic[T]):
    """What is to be exported: a function that answers pages, parameters that were checked, and what its rows are."""

    function: str
    params: Mapping[str, Any]
    parse: Callable[[Any], list[T]]

    def page(self, before: Page[T] | None, size: int) -> Call[list[T]]:
        """Read the page after another."""
        after = before.next if before is not None else None
        params = {**self.params, **(after or {}), "p_page_size": size}
        return Call(self.function, params, lambda answer: Page(self.parse(answer["rows"]), answer))


def export(
    group_id: Id | None,
    user_id: Id | None,
    kind: str | None,
    since: datetime | None,
    until: datetime | None,
    bucket: Bucket | None,
) -> Export[Any]:
    """Check what is to be exported: rows of the ledger or, with a bucket, sums."""
    if bucket is None:
        return ledger(group_id, user_id, kind, since, until)
    if user_id is not None:
        raise InvalidRequest(
            "user_id: there are no sums of single users. Leave out bucket, and add up.", code="TL001", detail="user_id"
        )
    params = {**_wanted(group_id, kind, since, until), "p_bucket": _arguments.bucket(bucket)}
    return Export("export_history", params, _SUMS)


def ledger(
    group_id: Id | None, user_id: Id | None, kind: str | None, since: datetime | None, until: datetime | None
) -> Export[UsageRecord]:
    """Check which rows of the ledger are to be exported."""
    params = {**_wanted(group_id, kind, since, until), "p_user_id": _arguments.optional_id(user_id, "user_id")}
    return Export("export_usage", params, _RECORDS)


def _wanted(group_id: Id | None, kind: str | None, since: datetime | None, until: datetime | None) -> dict[str, Any]:
    return {
        "p_group_id": _arguments.optional_id(group_id, "group_id"),
        "p_kind": _arguments.optional_kind(kind),
        "p_since": _arguments.moment(since, "since"),
        "p_until": _arguments.moment(until, "until"),
    }


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
