"""The types of the models' fields, which refuse anything else and say why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, cast
from unicodedata import normalize
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, GetPydanticSchema, JsonValue, StrictInt

Text = Annotated[str, Field(strict=True, pattern=r"^[^\x00]*$")]
"""What PostgreSQL's type text can hold: any character but \\0."""

KIND_PATTERN = r"^[a-z][a-z0-9_]{0,31}$"
Kind = Annotated[str, Field(strict=True, pattern=KIND_PATTERN)]
"""What is generated."""

Cost = Annotated[StrictInt, Field(ge=1, le=1_000_000_000)]
"""How much a generation takes from a limit."""

Max = Annotated[StrictInt, Field(ge=0, le=1_000_000_000_000_000)]
"""The most that a limit admits in a period."""

# control characters, invisible ones, and those that change the direction of text
_UNREADABLE = (
    r"\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e"
    r"\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
)
_NAME_PATTERN = rf"^[^{_UNREADABLE}]*[^\s{_UNREADABLE}][^{_UNREADABLE}]*$"


def composed(text: str) -> str:
    """Compose accents as names are stored: one character for a letter with its accent, where Unicode has one."""
    return normalize("NFC", text)


def _readable(name: str) -> str:
    name = composed(name.strip())
    if len(name) > 200 or not re.search(_NAME_PATTERN, name):
        raise ValueError("must have 1 to 200 characters, without control, zero-width or direction characters")
    return name


# spelled out, since JSON Schema knows no Unicode normal forms: the length that counts is that of the stored name
_NAME_SCHEMA = Field(json_schema_extra={"minLength": 1, "maxLength": 200, "pattern": _NAME_PATTERN})
Name = Annotated[Text, AfterValidator(_readable), _NAME_SCHEMA]
"""A group's name. It has no invisible characters, so two names that look the same are the same."""

NO_PLACES = frozenset({"CET", "EET", "MET", "WET", "Factory", "localtime", "posixrules"})
"""Names in the system's list of time zones that a group can't have. PostgreSQL takes the first four for abbreviations,
without daylight saving time; the others are not places."""


def _place(timezone: str) -> str:
    if timezone.lower() in {name.lower() for name in NO_PLACES}:
        raise ValueError("must be an IANA time zone of a place, such as Europe/Paris, or UTC")
    return timezone


TimeZone = Annotated[
    Text,
    Field(min_length=1, max_length=64, json_schema_extra={"format": "timezone"}),
    AfterValidator(_place),
]
"""A group's time zone; only the database knows whether the name exists."""


def _key_text(key: object) -> str:
    """Write a key as it is stored, so that a job's id is the same key whether it comes as a UUID or as its text."""
    if isinstance(key, str):
        return key
    if isinstance(key, UUID):
        return str(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{int(key)}"
    raise ValueError("must be text, a UUID or an int")


_KeyText = Annotated[Text, Field(min_length=1, max_length=255), BeforeValidator(_key_text)]
Key = Annotated[str | UUID | int, GetPydanticSchema(lambda _, schema_of: schema_of(_KeyText))]
"""An idempotency key: 1 to 255 characters, a UUID, or an int; kept as text."""

# about the largest double: JSON readers take numbers for doubles, while Python's integers have no end
_LARGEST_NUMBER = 18 * 10**307


def _numbers(value: object) -> Iterator[int | float]:
    """Yield the numbers in a value, at any depth."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += cast("dict[str, object]", value).values()
        elif isinstance(value, list):
            left += cast("list[object]", value)
        elif isinstance(value, int | float):
            yield value


def _growth(number: float) -> int:
    """Return how much longer a number gets in PostgreSQL, which writes it without an exponent."""
    short = repr(number)
    return len(f"{Decimal(short):f}") - len(short) if isinstance(number, float) else 0


def _storable(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuse what PostgreSQL's jsonb can't hold, or tokenlimits doesn't store."""
    if any(abs(number) > _LARGEST_NUMBER for number in _numbers(metadata)):
        raise ValueError("must have no number beyond 1.8e308: most JSON readers can't read it")
    try:
        written = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
        size = len(written.encode()) + sum(_growth(number) for number in _numbers(metadata))
    except UnicodeEncodeError:
        raise ValueError("must have no unpaired surrogate: it isn't valid Unicode") from None
    if re.search(r"(?<!\\)(\\\\)*\\u0000", written):
        raise ValueError("must not have the character \\0: PostgreSQL can't store it")
    if size > 8192:
        raise ValueError(f"must be at most 8192 bytes of JSON, not {size}")
    return metadata


Metadata = Annotated[dict[str, JsonValue], AfterValidator(_storable)]
"""A JSON object that PostgreSQL can store, of at most 8 kB."""


def _written_out(value: object) -> object:
    """Refuse numbers: 20260131 would be a day in 1970, and milliseconds would be seconds if there are few."""
    if isinstance(value, datetime) or (isinstance(value, str) and not is_number(value)):
        return value
    raise ValueError("must be a date and time like 2026-01-31T12:00:00Z, not a number")


def is_number(text: str) -> bool:
    """Whether a text is a number, such as milliseconds since 1970."""
    return re.fullmatch(r"\s*[-+]?[0-9]+([.,][0-9]*)?\s*", text) is not None


_FIRST = datetime.min.replace(tzinfo=UTC) + timedelta(days=1)
_LAST = datetime.max.replace(tzinfo=UTC) - timedelta(days=1)


def _in_every_zone(at: datetime) -> datetime:
    if not _FIRST <= at <= _LAST:
        raise ValueError("must not be within a day of the calendar's ends")
    return at


Moment = Annotated[AwareDatetime, BeforeValidator(_written_out), AfterValidator(_in_every_zone)]
"""A date and time with a time zone, which every time zone can express."""
