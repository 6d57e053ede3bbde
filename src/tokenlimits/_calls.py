"""Every operation as a pure value: which SQL function to call, with what, and how to read the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import AwareDatetime

from . import _arguments
from ._arguments import Id, Limits, OnUnavailable, parser
from .errors import GroupNotFound, SchemaOutdated, ServiceUnavailable, UnknownUser
from .models import (
    AddedPage,
    Bucket,
    Group,
    GroupUsage,
    HistoryPoint,
    Limit,
    Member,
    Period,
    Scope,
    TrackResult,
    User,
    UserLimit,
)

T = TypeVar("T")

SCHEMA_VERSION = 1
"""The least version of the SQL that this package needs; it works with newer ones."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request to PostgREST.

    `retry_safe`: sent again after a lost answer, it leaves the same state, and its answer is still of use (it may say
    that there was nothing left to do).
    """

    function: str
    params: Mapping[str, Any]
    parse: Callable[[Any], T]
    retry_safe: bool = True


_GROUP = parser(Group)
_GROUPS = parser(list[Group])
_GROUP_USAGES = parser(list[GroupUsage])
_HISTORY = parser(list[HistoryPoint])
_MEMBERS = parser(list[Member])
RESULT = parser(TrackResult)
_USERS = parser(list[User])
_USER_LIMITS = parser(tuple[UserLimit, ...])
_ADDED = parser(AddedPage)


def _field(name: str, type_: Any) -> Callable[[Any], Any]:
    """Make a parser for an object of which one field matters."""
    parse = parser(type_)
    return lambda answer: parse(answer[name])


_INSTALLED = _field("version", int)
_MOVED = _field("moved", bool)
_REMOVED = _field("removed", int)
_RESET_AT = _field("reset_at", AwareDatetime)


def _group_id(value: Id) -> dict[str, str]:
    return {"p_group_id": _arguments.id_(value, "group_id")}


def track(
    user_id: Id,
    kind: str,
    cost: int,
    idempotency_key: str | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Check and record a generation."""
    params = _arguments.request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("track_generation", params, RESULT)


def without_service(call: Call[TrackResult], on_unavailable: OnUnavailable, error: ServiceUnavailable) -> TrackResult:
    """Make the answer for when Supabase can't be reached, or raise its error."""
    return unavailable(call.params["p_kind"], call.params["p_cost"], on_unavailable, error)


def unavailable(kind: str, cost: int, on_unavailable: OnUnavailable, error: ServiceUnavailable) -> TrackResult:
    """Make the answer to a generation for when Supabase can't be reached, or raise its error."""
    if on_unavailable == "raise":
        raise error
    allowed = on_unavailable == "allow"
    return TrackResult(
        allowed=allowed,
        reason="unavailable",
        error=None if allowed else str(error),
        kind=kind,
        cost=cost,
        retry_after=error.retry_after,
    )


def check(user_id: Id, kind: str, cost: int, group_id: Id | None) -> Call[TrackResult]:
    """Ask what tracking would answer."""
    params = _arguments.request(user_id=user_id, kind=kind, cost=cost, group_id=group_id)
    del params["p_idempotency_key"]
    return Call("check_generation", params, RESULT)


def record(
    user_id: Id,
    kind: str,
    cost: int,
    created_at: datetime | None,
    idempotency_key: str | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Record past or outside usage."""
    params = _arguments.request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("record_generation", {**params, "p_created_at": _arguments.recorded_at(created_at)}, RESULT)


def usage(user_id: Id) -> Call[tuple[UserLimit, ...]]:
    """List every limit that binds a user."""
    return Call("user_generation_usage", {"p_user_id": _arguments.id_(user_id, "user_id")}, _USER_LIMITS)


def version() -> Call[int]:
    """Ask for the version of the installed SQL."""

    def parse(answer: Any) -> int:
        installed: int = _INSTALLED(answer)
        if installed < SCHEMA_VERSION:
            raise SchemaOutdated(
                f"The database has version {installed} of the schema, and this package needs {SCHEMA_VERSION}. "
                f"{SchemaOutdated.default_hint}"
            )
        return installed

    return Call("tokenlimits_version", {}, parse)


def create_group(id_: Id | None = None, **fields: Any) -> Call[Group]:
    """Create a group, with an id of the caller's choice if there is one."""
    params = {"p_group_id": None, **_arguments.group(fields)}
    if id_ is not None:
        params["p_id"] = _arguments.id_(id_, "id")
    # after a lost answer, creating again would meet its own group's name
    return Call("save_group", params, _GROUP, retry_safe=False)


def update_group(group_id: Id, **fields: Any) -> Call[Group]:
    """Change what is not None of a group."""
    changes = {name: value for name, value in fields.items() if value is not None}
    return Call("save_group", {**_group_id(group_id), **_arguments.group(changes)}, _GROUP)


def set_limits(group_id: Id, limits: Limits) -> Call[Group]:
    """Replace a group's set of limits."""
    return Call("save_group", {**_group_id(group_id), "p_limits": _arguments.limits(limits)}, _GROUP)


def set_limit(group_id: Id, limit: Limit) -> Call[Group]:
    """Add one limit, or change its max."""
    params = {**_group_id(group_id), "p_limit": _arguments.limit(limit)}
    return Call("set_group_limit", params, _GROUP)


def remove_limit(group_id: Id, kind: str, period: Period, scope: Scope) -> Call[Group]:
    """Remove one limit."""
    params = {
        **_group_id(group_id),
        "p_kind": _arguments.kind(kind),
        "p_period": _arguments.period(period),
        "p_scope": _arguments.scope(scope),
    }
    return Call("remove_group_limit", params, _GROUP)


def get_group(group_id: Id) -> Call[Group]:
    """Read one group by its id."""
    return Call("find_groups", _group_id(group_id), lambda answer: _only(_GROUPS(answer), f"of id {group_id}"))


def get_group_by_name(name: str) -> Call[Group]:
    """Read one group by its name, whatever its case."""
    params = {"p_name": _arguments.name(name)}
    return Call("find_groups", params, lambda answer: _only(_GROUPS(answer), f"named {name!r}"))


def _only(groups: list[Group], what: str) -> Group:
    if not groups:
        raise GroupNotFound(f"There is no group {what}. List the groups to see which there are.", code="TL002")
    return groups[0]


def groups_page(search: str | None, after: str | None, size: int) -> Call[list[Group]]:
    """Read the page of groups after a name."""
    params = {"p_search": _arguments.group_search(search), "p_after": after, "p_page_size": size}
    return Call("find_groups", params, _GROUPS)


def delete_group(group_id: Id) -> Call[Group]:
    """Delete a group."""
    # after a lost answer, deleting again would not find it
    return Call("delete_group", _group_id(group_id), _GROUP, retry_safe=False)


def add_members(group_id: Id, user_ids: list[str]) -> Call[AddedPage]:
    """Add up to a few thousand users to a group."""
    return Call("add_group_members", {**_group_id(group_id), "p_user_ids": user_ids}, _ADDED)


def add_member(group_id: Id, user_id: Id) -> Call[bool]:
    """Add one user to a group."""
    id_ = _arguments.id_(user_id, "user_id")

    def parse(answer: Any) -> bool:
        page: AddedPage = _ADDED(answer)
        if page.unknown:
            raise UnknownUser(
                f"There is no user {id_} in auth.users. Users sign up through Supabase Auth.", code="TL004"
            )
        return page.added == 1

    return Call("add_group_members", {**_group_id(group_id), "p_user_ids": [id_]}, parse)


def remove_members(group_id: Id, user_ids: list[str]) -> Call[int]:
    """Remove up to a few thousand users from a group."""
    params = {**_group_id(group_id), "p_user_ids": user_ids}
    return Call("remove_group_members", params, _REMOVED)


def move_member(user_id: Id, from_: Id, to: Id) -> Call[bool]:
    """Move a user from one group to another."""
    params = {
        "p_user_id": _arguments.id_(user_id, "user_id"),
        "p_from": _arguments.id_(from_, "from_"),
        "p_to": _arguments.id_(to, "to"),
    }
    return Call("move_group_member", params, _MOVED, retry_safe=False)


def members_page(group_id: Id, search: str | None, after: Id | None, size: int) -> Call[list[Member]]:
    """Read the page of members after a user id."""
    params = {
        **_group_id(group_id),
        "p_after": None if after is None else str(after),
        "p_page_size": size,
    }
    if search is not None:  # older SQL doesn't know it
        params["p_search"] = _arguments.search(search)
    return Call("group_members", params, _MEMBERS)


def find_users(email: str) -> Call[list[User]]:
    """Find users by a part of their e-mail address."""
    return Call("find_users", {"p_email": _arguments.email(email)}, _USERS)


def group_usage(group_id: Id) -> Call[GroupUsage]:
    """Read the usage of one group."""
    return Call("group_usage", _group_id(group_id), lambda answer: _GROUP_USAGES(answer)[0])


def usage_page(after: str | None, size: int) -> Call[list[GroupUsage]]:
    """Read the usage of the page of groups after a name."""
    return Call("group_usage", {"p_after": after, "p_page_size": size}, _GROUP_USAGES)


def history(
    group_id: Id | None, kind: str | None, bucket: Bucket, since: datetime | None, until: datetime | None
) -> Call[list[HistoryPoint]]:
    """Read what was used over time."""
    params = {
        "p_group_id": _arguments.optional_id(group_id, "group_id"),
        "p_kind": _arguments.optional_kind(kind),
        "p_bucket": _arguments.bucket(bucket),
        "p_since": _arguments.moment(since, "since"),
        "p_until": _arguments.moment(until, "until"),
    }
    return Call("generation_history", params, _HISTORY)


def reset_usage(group_id: Id, kind: str | None) -> Call[datetime]:
    """Give a group a fresh start."""
    params = {**_group_id(group_id), "p_kind": _arguments.optional_kind(kind)}
    # a second reset would also forgive what was used since the first
    return Call("reset_group_usage", params, _RESET_AT, retry_safe=False)
