"""Checks arguments, so that bad input is refused with the field's name before anything is sent."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, TypeVar, cast
from uuid import UUID

from pydantic import Field, StrictBool, StrictInt, TypeAdapter, ValidationError

from tokenlimits._fields import KIND_PATTERN, composed
from tokenlimits.errors import InvalidRequest
from tokenlimits.models import (
    Bucket,
    GenerationRequest,
    Group,
    Kind,
    Limit,
    Max,
    Name,
    OnUnavailable,
    Overage,
    Period,
    Scope,
    Starts,
    Text,
    TimeZone,
)

T = TypeVar("T")

Id = UUID | str
Key = UUID | str | int
Limits = Mapping[str, int | None] | Iterable[Limit]


MAX_COST = 1_000_000_000
MAX_TTL = 30 * 86_400
"""Seconds that a hold lasts at most, extended or not."""


def parser(type_: Any) -> Callable[[Any], Any]:
    """Make a function that validates a value as a type."""
    return TypeAdapter[Any](type_).validate_python


_BUCKET = parser(Bucket)
_PERCENTAGE = parser(Annotated[StrictInt, Field(ge=1, le=100)])
_COUNT = parser(Annotated[StrictInt, Field(ge=1, le=1000)])
_DESCRIPTION = parser(Annotated[Text, Field(max_length=2000)])
_FLAG = parser(StrictBool)
_KIND = parser(Kind)
_MAX = parser(Max | None)
_NAME = parser(Name)
_ON_UNAVAILABLE = parser(OnUnavailable)
_OVERAGE = parser(Overage)
_PERIOD = parser(Period)
_PRIORITY = parser(Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)])
_SCOPE = parser(Scope)
_STARTS = parser(Starts)
_SETTLED_COST = parser(Annotated[StrictInt, Field(ge=0, le=MAX_COST)])
_TEXT = parser(Text)
_TIMEZONE = parser(TimeZone)
_TTL = parser(Annotated[StrictInt, Field(ge=1, le=MAX_TTL)])
_UUID = parser(UUID)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""No usage is older: ids count the milliseconds since."""
_YEAR_9999 = datetime(9999, 1, 1, tzinfo=UTC)


def checked(parse: Callable[[Any], T], value: object, field: str = "") -> T:
    """Parse an argument, or refuse it with the field's name."""
    try:
        return parse(value)
    except ValidationError as error:
        first, title = error.errors(include_url=False)[0], error.title
    path = field
    for part in first["loc"]:
        # a bad key is named by its own part
        path += "" if part == "[key]" else f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "extra_forbidden":
        raise refused(path, f"is not a field of {title}", first["input"])
    pattern = str(first.get("ctx", {}).get("pattern"))
    rule = _PATTERNS.get(pattern, first["msg"].removeprefix("Value error, "))
    if first["type"] == "uuid_parsing":
        rule = _id_wanted(path, str(first["input"])) or rule
    raise refused(path, rule, first["input"])


# the patterns of the models in words
_PATTERNS = {
    KIND_PATTERN: "must be of a to z, 0 to 9 and _, begin with a letter, and have at most 32 characters",
    r"^[^\x00]*$": "must not have the character \\0",
}


# the methods that give the id for a field; fields without such a method are left out
_IDS_OF_ADDRESSES = {"user_id": "find_users gives the id", "user_ids": "find_users_by_email gives the ids"}
_IDS_OF_NAMES = {"group_id", "from_", "to", "parent", "child_id"}


def _id_wanted(path: str, given: str) -> str | None:
    """Say how to get the id if a text looks like an address or a name; None if it looks like an id."""
    field = path.rpartition(".")[2].partition("[")[0]
    if field in _IDS_OF_ADDRESSES and re.fullmatch(r"[^\s@]+@[^\s@]+", given.strip()):
        return f"must be an id, and is an e-mail address. GroupManager.{_IDS_OF_ADDRESSES[field]}"
    if field in _IDS_OF_NAMES and given.strip() and not re.fullmatch(r"[\s{}0-9a-fA-F-]{20,}", given):
        return "must be an id, and may be a name. GroupManager.get_by_name gives the group with its id"
    return None


def refused(field: str, rule: str, value: object) -> InvalidRequest:
    """Make the error for an argument that is not valid."""
    return InvalidRequest(f"{field}: {rule} (got {_shown(value)})", code="TL001", detail=field)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except Exception:  # noqa: BLE001  # nested too deeply, a number of too many digits, a repr that is broken
        return f"a {type(value).__name__}"


def id_(value: Id, field: str) -> str:
    """Check an id."""
    return str(checked(_UUID, value, field))


def ids(values: Iterable[Id], field: str) -> list[str]:
    """Check many ids; a bad one is refused with its index."""
    return [id_(value, f"{field}[{index}]") for index, value in enumerate(_iterable(values, field))]


def _iterable(values: Iterable[T], field: str) -> Iterable[T]:
    if isinstance(values, str | bytes) or not isinstance(cast("object", values), Iterable):
        raise refused(field, "must be a list", values)
    return values


def of_group(group_id: Id) -> dict[str, Any]:
    """Make the parameter of what is about one group."""
    return {"p_group_id": id_(group_id, "group_id")}


def optional_id(value: Id | None, field: str) -> str | None:
    """Check an id, or None."""
    return None if value is None else id_(value, field)


def parent(value: Id | Group) -> str:
    """Check the group that another is beneath."""
    return id_(value.id if isinstance(value, Group) else value, "parent")


def subject(user_id: Id | None, child_id: Id | None) -> dict[str, str | None]:
    """Check for whom a limit is overridden: a user, a group beneath, or neither."""
    params = {"p_user_id": optional_id(user_id, "user_id")}
    if child_id is None:
        return params
    if user_id is not None:
        raise refused("child_id", "must be None where user_id is given: a limit counts users or groups", child_id)
    return {**params, "p_child_id": id_(child_id, "child_id")}


def kind(value: str) -> str:
    """Check a kind."""
    return checked(_KIND, value, "kind")


def optional_kind(value: str | None) -> str | None:
    """Check a kind, or None."""
    return None if value is None else kind(value)


def optional_period(value: Period | None) -> Period | None:
    """Check a period, or None."""
    return None if value is None else checked(_PERIOD, value, "period")


def optional_starts(value: Starts | None) -> Starts | None:
    """Check where periods begin, or None."""
    return None if value is None else checked(_STARTS, value, "starts")


def max_(value: int | None) -> int | None:
    """Check the max of a limit; None: unlimited."""
    return checked(_MAX, value, "max")


def scope(value: Scope) -> Scope:
    """Check a scope."""
    return checked(_SCOPE, value, "scope")


def bucket(value: Bucket) -> Bucket:
    """Check the step of a history."""
    return checked(_BUCKET, value, "bucket")


def name(value: str) -> str:
    """Check a group's name."""
    return checked(_NAME, value, "name")


def email(value: str) -> str:
    """Check a part of an e-mail address."""
    return checked(_TEXT, value, "email")


def emails(values: Iterable[str]) -> list[str]:
    """Check e-mail addresses; a bad one is refused with its index."""
    return [checked(_TEXT, value, f"emails[{index}]") for index, value in enumerate(_iterable(values, "emails"))]


def count(value: int) -> int:
    """Check how many are requested."""
    return checked(_COUNT, value, "count")


def percentage(value: int, name: str) -> int:
    """Check a percentage, from 1."""
    return checked(_PERCENTAGE, value, name)


def size(value: int, most: int) -> int:
    """Check how long a page is to be."""
    return checked(parser(Annotated[StrictInt, Field(ge=1, le=most)]), value, "size")


def after(value: str | None) -> str | None:
    """Check where a page begins that is sorted by text, or None: at the beginning."""
    return None if value is None else checked(_TEXT, value, "after")


def cursor(value: str | None) -> Mapping[str, Any]:
    """Read where a page begins, and which rows it is about; nothing for None."""
    if value is None:
        return {}
    try:
        read: Any = json.loads(value)
    except (RecursionError, TypeError, ValueError):
        read = None
    if not isinstance(read, dict) or read.keys() != {"p_after", "p_until"}:
        raise refused("after", "must be the `next` of the page before", value)
    return cast("Mapping[str, Any]", read)


def search(value: str | None) -> str | None:
    """Check a text to look for, or None."""
    return None if value is None else checked(_TEXT, value, "search")


def group_search(value: str | None) -> str | None:
    """Check a part of a group's name, or None."""
    text = search(value)
    return None if text is None else composed(text)


def ttl(value: int) -> int:
    """Check the seconds until a hold expires."""
    return checked(_TTL, value, "ttl")


def settled_cost(value: int) -> int:
    """Check what a hold is settled for."""
    return checked(_SETTLED_COST, value, "cost")


def overage(value: Overage) -> Overage:
    """Check whether a hold may be settled for more than was reserved."""
    return checked(_OVERAGE, value, "overage")


def policy(value: OnUnavailable) -> OnUnavailable:
    """Check what happens when Supabase can't be reached."""
    return checked(_ON_UNAVAILABLE, value, "on_unavailable")


def flag(value: bool, field: str) -> bool:
    """Check a boolean."""
    return checked(_FLAG, value, field)


def callback(value: Callable[..., object] | None, field: str) -> None:
    """Check a callback, or None."""
    if value is not None and not callable(value):
        raise refused(field, "must be a function", value)


def moment(value: datetime | None, field: str) -> str | None:
    """Check a moment, which must have a time zone, or None."""
    if value is None:
        return None
    if not isinstance(cast("object", value), datetime):
        raise refused(field, "must be a datetime", value)
    if value.utcoffset() is None:
        raise refused(field, "needs a time zone, like datetime.now(timezone.utc)", value)
    return value.isoformat()


def recorded_at(value: datetime | None) -> str | None:
    """Check when a usage was, or None: now."""
    return _since_1970(value, "created_at")


def anchor(value: datetime | None) -> str | None:
    """Check from when periods are counted, or None."""
    return _before_9999(value, "anchor_at")


def until(value: datetime | None) -> str | None:
    """Check when something ends, or None: never; only the database knows whether that is in the future."""
    return _before_9999(value, "until")


def _before_9999(value: datetime | None, field: str) -> str | None:
    text = _since_1970(value, field)
    if value is not None and value >= _YEAR_9999:
        raise refused(field, "must be before the year 9999", value)
    return text


def _since_1970(value: datetime | None, field: str) -> str | None:
    text = moment(value, field)
    if value is not None and value < EPOCH:
        raise refused(field, "must not be before 1970", value)
    return text


def request(**fields: Any) -> dict[str, Any]:
    """Check a generation and make the parameters of its call; without a key, it gets a new one."""
    return {f"p_{name}": value for name, value in _generation(fields).items()}


def requests(values: Iterable[GenerationRequest | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check many generations, each of which gets a new key if it has none; a bad one is refused with its index."""
    return [_generation(value, f"requests[{index}]") for index, value in enumerate(_iterable(values, "requests"))]


def _generation(value: object, field: str = "") -> dict[str, Any]:
    given = checked(GenerationRequest.model_validate, value, field).model_dump(mode="json", exclude_none=True)
    return {"idempotency_key": new_key()} | given


def limit(value: Limit) -> dict[str, Any]:
    """Check one limit."""
    return checked(Limit.model_validate, value, "limit").model_dump()


def limits(value: Limits) -> list[dict[str, Any]]:
    """Check a set of limits, or its shorthand."""
    if isinstance(value, Mapping):
        shorthand = cast("Mapping[str, int | None]", value)
        given: list[Any] = [{"kind": kind_, "max": max_} for kind_, max_ in shorthand.items()]
    else:
        given = list(_iterable(value, "limits"))
    parsed = [checked(Limit.model_validate, each, f"limits[{index}]") for index, each in enumerate(given)]
    seen: set[tuple[str, str, str, str]] = set()
    for index, each in enumerate(parsed):
        identity = (each.kind, each.period, each.starts, each.scope)
        if identity in seen:
            raise refused(f"limits[{index}]", "occurs twice; there is one max per kind, period, starts and scope", each)
        seen.add(identity)
    return [each.model_dump() for each in parsed]


def group(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Check a group's fields, and make the parameters of its call."""
    return {f"p_{field}": _GROUP_FIELDS[field](value) for field, value in fields.items()}


_GROUP_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "name": name,
    "description": partial(checked, _DESCRIPTION, field="description"),
    "priority": partial(checked, _PRIORITY, field="priority"),
    "timezone": partial(checked, _TIMEZONE, field="timezone"),
    "is_default": partial(checked, _FLAG, field="is_default"),
    "limits": limits,
    "anchor_at": anchor,
}


def new_key() -> str:
    """Make a time-ordered key (UUIDv7), so that new keys go to the right edge of the index, which stays cached."""
    return str(uuid7(time.time_ns() // 1_000_000))


def uuid7(milliseconds: int) -> UUID:
    """Make a UUIDv7 (RFC 9562) of a moment, in milliseconds since 1970."""
    value = (milliseconds << 80) | (0x7 << 76) | (secrets.randbits(12) << 64) | (0b10 << 62) | secrets.randbits(62)
    return UUID(int=value)
