"""Reports and corrections as pure calls: usage, history, exports, rankings, drift."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from tokenlimits.errors import InvalidRequest
from tokenlimits.models import (
    Bucket,
    GroupUsage,
    HistoryPoint,
    LimitPressure,
    Moment,
    Page,
    Reconciliation,
    TopMember,
    UsageRecord,
    UsageSum,
)

from . import arguments
from .arguments import Id, parser
from .call import Call, field_parser
from .rows import row_parser, rows_parser

T = TypeVar("T")

_RECONCILIATION = parser(Reconciliation)
_RECORDS = rows_parser(UsageRecord)
_SUMS = rows_parser(UsageSum)
_PRESSURE = rows_parser(LimitPressure)
_TOP = rows_parser(TopMember)
_GROUP_USAGE = row_parser(GroupUsage)
_GROUP_USAGES = rows_parser(GroupUsage)
_HISTORY = rows_parser(HistoryPoint)
_RESET_AT = field_parser("reset_at", Moment)


EXPORT_PAGE = 2_000
"""The most rows of a page."""


@dataclass(frozen=True, slots=True)
class Export(Generic[T]):
    """What to export: a function that answers pages, its checked parameters, and the parser of its rows."""

    function: str
    params: Mapping[str, Any]
    parse: Callable[[Any], list[T]]

    def page(self, after: str | None, size: int) -> Call[Page[T]]:
        """Read the first page, or the one that another's `next` names."""
        size = arguments.size(size, EXPORT_PAGE)
        return Call(self.function, {**self.params, **arguments.cursor(after), "p_page_size": size}, self._page)

    def _page(self, answer: Any) -> Page[T]:
        # until: what is recorded meanwhile must not come into the pages that follow
        place = {"p_after": answer["next"], "p_until": answer["until"]}
        return Page(self.parse(answer["rows"]), None if answer["next"] is None else json.dumps(place))


def export(
    group_id: Id | None,
    user_id: Id | None,
    kind: str | None,
    since: datetime | None,
    until: datetime | None,
    bucket: Bucket | None,
) -> Export[Any]:
    """Check what to export: rows of the ledger or, with a bucket, sums."""
    if bucket is None:
        return ledger(group_id, user_id, kind, since, until)
    if user_id is not None:
        raise InvalidRequest(
            "user_id: there are no sums per user. Leave out bucket, and add up the rows.",
            code="TL001",
            detail="user_id",
        )
    params = {**_wanted(group_id, kind, since, until), "p_bucket": arguments.bucket(bucket)}
    return Export("export_history", params, _SUMS)


def ledger(
    group_id: Id | None, user_id: Id | None, kind: str | None, since: datetime | None, until: datetime | None
) -> Export[UsageRecord]:
    """Check which rows of the ledger to export."""
    params = {**_wanted(group_id, kind, since, until), "p_user_id": arguments.optional_id(user_id, "user_id")}
    return Export("export_usage", params, _RECORDS)


def _wanted(group_id: Id | None, kind: str | None, since: datetime | None, until: datetime | None) -> dict[str, Any]:
    return {
        "p_group_id": arguments.optional_id(group_id, "group_id"),
        "p_kind": arguments.optional_kind(kind),
        "p_since": arguments.moment(since, "since"),
        "p_until": arguments.moment(until, "until"),
    }


def top_members(
    group_id: Id, kind: str | None, since: datetime | None, until: datetime | None, count: int
) -> Call[list[TopMember]]:
    """Read who used the most."""
    params = {
        **arguments.of_group(group_id),
        "p_kind": arguments.optional_kind(kind),
        "p_since": arguments.moment(since, "since"),
        "p_until": arguments.moment(until, "until"),
        "p_count": arguments.count(count),
    }
    return Call("top_members", params, _TOP)


def limit_pressure(group_id: Id, at_least: int, count: int) -> Call[list[LimitPressure]]:
    """Read how many members are at their limits."""
    params = {
        **arguments.of_group(group_id),
        "p_at_least": arguments.percentage(at_least, "at_least"),
        "p_count": arguments.count(count),
    }
    return Call("limit_pressure", params, _PRESSURE)


def drift(group_id: Id, since: datetime | None) -> Call[Reconciliation]:
    """Compare a group's counters and history with the ledger."""
    params = {**arguments.of_group(group_id), "p_since": arguments.moment(since, "since")}
    return Call("usage_drift", params, _RECONCILIATION)


def reconcile(group_id: Id, since: datetime | None) -> Call[Reconciliation]:
    """Recount a group's usage from the ledger."""
    params = {**arguments.of_group(group_id), "p_since": arguments.moment(since, "since")}
    return Call("reconcile_usage", params, _RECONCILIATION)


def group_usage(group_id: Id) -> Call[GroupUsage]:
    """Read the usage of one group."""
    return Call("group_usage", arguments.of_group(group_id), lambda answer: _GROUP_USAGE(answer[0]))


def usage_page(after: str | None, size: int) -> Call[Page[GroupUsage]]:
    """Read the usage of a page of groups, after a name; a page that isn't full is the last."""

    def parse(answer: Any) -> Page[GroupUsage]:
        return Page(_GROUP_USAGES(answer), None if len(answer) < size else answer[-1]["group"]["name"])

    return Call("group_usage", {"p_after": after, "p_page_size": size}, parse)


def history(
    group_id: Id | None, kind: str | None, bucket: Bucket, since: datetime | None, until: datetime | None
) -> Call[list[HistoryPoint]]:
    """Read what was used over time."""
    params = {**_wanted(group_id, kind, since, until), "p_bucket": arguments.bucket(bucket)}
    return Call("generation_history", params, _HISTORY)


def reset_usage(group_id: Id, kind: str | None, user_id: Id | None) -> Call[datetime]:
    """Give a group a fresh start, or one of its members."""
    params = {**arguments.of_group(group_id), "p_kind": arguments.optional_kind(kind)}
    if user_id is not None:  # older SQL has no such parameter
        params["p_user_id"] = arguments.id_(user_id, "user_id")
    # a second reset would also forgive what was used since the first one
    return Call("reset_group_usage", params, _RESET_AT, retry_safe=False)
