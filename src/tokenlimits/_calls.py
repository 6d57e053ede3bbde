"""Every operation as a pure value: which SQL function to call, with what, and how to read the answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, cast
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from .errors import GroupNotFound, InvalidRequest, SchemaOutdated, ServiceUnavailable, UnknownUser
from .models import (
    AddedPage,
    Bucket,
    GenerationRequest,
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

Id = UUID | str
OnUnavailable = Literal["raise", "allow", "deny"]
"""What a worker gets when Supabase can't be reached."""

Limits = Mapping[str, int | None] | Iterable[Limit]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request to PostgREST.

    `retry_safe`: sending it again after a lost answer gives the same state and the same answer.
    """

    function: str
    params: Mapping[str, Any]
    parse: Callable[[Any], T]
    retry_safe: bool = True


def _parser(type_: Any) -> Callable[[Any], Any]:
    return TypeAdapter[Any](type_).validate_python


_UUID = _parser(UUID)
_GROUP = _parser(Group)
_GROUPS = _parser(list[Group])
_GROUP_USAGES = _parser(list[GroupUsage])
_HISTORY = _parser(list[HistoryPoint])
_LIMITS = _parser(tuple[Limit, ...])
_MEMBERS = _parser(list[Member])
_RESULT = _parser(TrackResult)
_USERS = _parser(list[User])
_USER_LIMITS = _parser(tuple[UserLimit, ...])
_ADDED = _parser(AddedPage)
_BUCKET = _parser(Bucket)
_ON_UNAVAILABLE = _parser(OnUnavailable)


def _checked(parse: Callable[[Any], T], value: object, field: str = "") -> T:
    """Parse an argument, or refuse it with the field's name before anything is sent."""
    try:
        return parse(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = field
        for part in first["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        raise InvalidRequest(
            f"{path}: {first['msg']} (got {first['input']!r:.100})", code="TL001", detail=path
        ) from None


def _id(value: Id, field: str) -> str:
    return str(_checked(_UUID, value, field))


def checked_ids(values: Iterable[Id], field: str) -> list[str]:
    """Check many ids; a bad one is refused with its place."""
    return [_id(value, f"{field}[{index}]") for index, value in enumerate(values)]


def checked_policy(value: OnUnavailable) -> OnUnavailable:
    """Refuse a policy that doesn't exist."""
    return _checked(_ON_UNAVAILABLE, value, "on_unavailable")


def _moment(value: datetime | None, field: str) -> str | None:
    if value is not None and value.tzinfo is None:
        raise InvalidRequest(
            f"{field}: needs a time zone, like datetime.now(timezone.utc) (got {value!r})",
            code="TL001",
            detail=field,
        )
    return None if value is None else value.isoformat()


def new_key() -> str:
    """Make a time-ordered key (UUIDv7): the index of keys stays hot at its right edge."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | (0x7 << 76) | (secrets.randbits(12) << 64) | (0b10 << 62) | secrets.randbits(62)
    return str(UUID(int=value))


def _request(**fields: Any) -> dict[str, Any]:
    request = _checked(GenerationRequest.model_validate, fields)
    params = {f"p_{name}": value for name, value in request.model_dump(mode="json").items() if value is not None}
    return {"p_idempotency_key": new_key(), **params}


def track(
    user_id: Id,
    kind: str,
    cost: int,
    idempotency_key: str | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Check and record a generation."""
    params = _request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("track_generation", params, _RESULT)


def without_service(call: Call[TrackResult], on_unavailable: OnUnavailable, error: ServiceUnavailable) -> TrackResult:
    """Make the answer for when Supabase can't be reached, or raise its error."""
    if on_unavailable == "raise":
        raise error
    allowed = on_unavailable == "allow"
    return TrackResult(
        allowed=allowed,
        reason="unavailable",
        error=None if allowed else str(error),
        kind=call.params["p_kind"],
        cost=call.params["p_cost"],
        retry_after=error.retry_after,
    )


def check(user_id: Id, kind: str, cost: int, group_id: Id | None) -> Call[TrackResult]:
    """Ask what tracking would answer."""
    params = _request(user_id=user_id, kind=kind, cost=cost, group_id=group_id)
    del params["p_idempotency_key"]
    return Call("check_generation", params, _RESULT)


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
    params = _request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("record_generation", {**params, "p_created_at": _moment(created_at, "created_at")}, _RESULT)


def usage(user_id: Id) -> Call[tuple[UserLimit, ...]]:
    """List every limit that binds a user."""
    return Call("user_generation_usage", {"p_user_id": _id(user_id, "user_id")}, _USER_LIMITS)


def version() -> Call[int]:
    """Ask for the version of the installed SQL."""

    def parse(answer: Any) -> int:
        installed = int(answer["version"])
        if installed < SCHEMA_VERSION:
            raise SchemaOutdated(
                f"The database has version {installed} of the schema, and this package needs {SCHEMA_VERSION}. "
                f"{SchemaOutdated.default_hint}"
            )
        return installed

    return Call("tokenlimits_version", {}, parse)


def _limits(limits: Limits) -> list[dict[str, Any]]:
    if isinstance(limits, Mapping):
        shorthand = cast("Mapping[str, int | None]", limits)
        given: list[Any] = [{"kind": kind, "max": max_} for kind, max_ in shorthand.items()]
    else:
        given = list(limits)
    return [limit.model_dump() for limit in _checked(_LIMITS, given, "limits")]


def save_group(
    group_id: Id | None,
    *,
    name: str | None = None,
    description: str | None = None,
    priority: int | None = None,
    timezone: str | None = None,
    is_default: bool | None = None,
    limits: Limits | None = None,
) -> Call[Group]:
    """Create a group (without an id), or change what is not None of one."""
    params = {
        "p_group_id": None if group_id is None else _id(group_id, "group_id"),
        "p_name": name,
        "p_description": description,
        "p_priority": priority,
        "p_timezone": timezone,
        "p_is_default": is_default,
        "p_limits": None if limits is None else _limits(limits),
    }
    # after a lost answer, creating again would meet its own group's name
    return Call("save_group", params, _GROUP, retry_safe=group_id is not None)


def set_limit(group_id: Id, limit: Limit) -> Call[Group]:
    """Add one limit, or change its max."""
    params = {"p_group_id": _id(group_id, "group_id"), "p_limit": _limits([limit])[0]}
    return Call("set_group_limit", params, _GROUP)


def remove_limit(group_id: Id, kind: str, period: Period, scope: Scope) -> Call[Group]:
    """Remove one limit."""
    limit = _checked(Limit.model_validate, {"kind": kind, "max": None, "period": period, "scope": scope}).model_dump()
    params = {"p_group_id": _id(group_id, "group_id")} | {f"p_{k}": v for k, v in limit.items() if k != "max"}
    return Call("remove_group_limit", params, _GROUP)


def get_group(group_id: Id) -> Call[Group]:
    """Read one group by its id."""
    id_ = _id(group_id, "group_id")
    return Call("find_groups", {"p_group_id": id_}, lambda answer: _only(_GROUPS(answer), f"of id {id_}"))


def get_group_by_name(name: str) -> Call[Group]:
    """Read one group by its name, whatever its case."""
    return Call("find_groups", {"p_name": name}, lambda answer: _only(_GROUPS(answer), f"named {name!r}"))


def _only(groups: list[Group], what: str) -> Group:
    if not groups:
        raise GroupNotFound(f"There is no group {what}. List the groups to see which there are.", code="TL002")
    return groups[0]


def groups_page(search: str | None, after: str | None, size: int) -> Call[list[Group]]:
    """Read the page of groups after a name."""
    return Call("find_groups", {"p_search": search, "p_after": after, "p_page_size": size}, _GROUPS)


def delete_group(group_id: Id) -> Call[Group]:
    """Delete a group."""
    # after a lost answer, deleting again would not find it
    return Call("delete_group", {"p_group_id": _id(group_id, "group_id")}, _GROUP, retry_safe=False)


def add_members(group_id: Id, user_ids: list[str]) -> Call[AddedPage]:
    """Add up to a few thousand users to a group."""
    return Call("add_group_members", {"p_group_id": _id(group_id, "group_id"), "p_user_ids": user_ids}, _ADDED)


def add_member(group_id: Id, user_id: Id) -> Call[bool]:
    """Add one user to a group."""
    id_ = _id(user_id, "user_id")

    def parse(answer: Any) -> bool:
        page: AddedPage = _ADDED(answer)
        if page.unknown:
            raise UnknownUser(
                f"There is no user {id_} in auth.users. Users sign up through Supabase Auth.", code="TL004"
            )
        return page.added == 1

    return Call("add_group_members", {"p_group_id": _id(group_id, "group_id"), "p_user_ids": [id_]}, parse)


def remove_members(group_id: Id, user_ids: list[str]) -> Call[int]:
    """Remove up to a few thousand users from a group."""
    params = {"p_group_id": _id(group_id, "group_id"), "p_user_ids": user_ids}
    return Call("remove_group_members", params, lambda answer: int(answer["removed"]))


def move_member(user_id: Id, from_: Id, to: Id) -> Call[bool]:
    """Move a user from one group to another."""
    params = {"p_user_id": _id(user_id, "user_id"), "p_from": _id(from_, "from_"), "p_to": _id(to, "to")}
    return Call("move_group_member", params, lambda answer: bool(answer["moved"]), retry_safe=False)


def members_page(group_id: Id, after: Id | None, size: int) -> Call[list[Member]]:
    """Read the page of members after a user id."""
    params = {
        "p_group_id": _id(group_id, "group_id"),
        "p_after": None if after is None else str(after),
        "p_page_size": size,
    }
    return Call("group_members", params, _MEMBERS)


def find_users(email: str) -> Call[list[User]]:
    """Find users by a part of their e-mail address."""
    return Call("find_users", {"p_email": email}, _USERS)


def group_usage(group_id: Id) -> Call[GroupUsage]:
    """Read the usage of one group."""
    return Call("group_usage", {"p_group_id": _id(group_id, "group_id")}, lambda answer: _GROUP_USAGES(answer)[0])


def all_usage() -> Call[list[GroupUsage]]:
    """Read the usage of all groups."""
    return Call("group_usage", {}, _GROUP_USAGES)


def history(
    group_id: Id | None, kind: str | None, bucket: Bucket, since: datetime | None, until: datetime | None
) -> Call[list[HistoryPoint]]:
    """Read what was used over time."""
    params = {
        "p_group_id": None if group_id is None else _id(group_id, "group_id"),
        "p_kind": kind,
        "p_bucket": _checked(_BUCKET, bucket, "bucket"),
        "p_since": _moment(since, "since"),
        "p_until": _moment(until, "until"),
    }
    return Call("generation_history", params, _HISTORY)


def reset_usage(group_id: Id, kind: str | None) -> Call[datetime]:
    """Give a group a fresh start."""
    params = {"p_group_id": _id(group_id, "group_id"), "p_kind": kind}
    # a second reset would also forgive what was used since the first
    return Call(
        "reset_group_usage",
        params,
        lambda answer: datetime.fromisoformat(answer["reset_at"]),
        retry_safe=False,
    )
