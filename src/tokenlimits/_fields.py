"""What the fields of models may hold, as types that say so, and refuse the rest in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, cast
from unicodedata import normalize

from pydantic import AfterValidator, Field, JsonValue, StrictInt

Text = Annotated[str, Field(strict=True, pattern=r"^[^\x00]*$")]
"""What PostgreSQL's text holds: any character but \\0."""

Kind = Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_]{0,31}$")]
"""What is generated."""

Cost = Annotated[StrictInt, Field(ge=1, le=1_000_000_000)]
"""How much a generation takes from a limit."""

Max = Annotated[StrictInt, Field(ge=0, le=1_000_000_000_000_000)]
"""The most that a limit admits in a period."""

# control characters, invisible ones, and those that turn the direction of text
_UNREADABLE = (
    r"\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e"
    r"\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
)
_NAME_PATTERN = rf"^[^{_UNREADABLE}]*[^\s{_UNREADABLE}][^{_UNREADABLE}]*$"


def composed(text: str) -> str:
    """Write accents as names are stored: one character for a letter and its accent, where there is one."""
    return normalize("NFC", text)


def _readable(name: str) -> str:
    name = composed(name.strip())
    if len(name) > 200 or not re.search(_NAME_PATTERN, name):
        raise ValueError("must have 1 to 200 characters, none of them a control, zero-width or direction character")
    return name


# a schema knows nothing of Unicode's normal forms: the length that counts is that of the name as it is stored
_NAME_SCHEMA = Field(json_schema_extra={"minLength": 1, "maxLength": 200, "pattern": _NAME_PATTERN})
Name = Annotated[Text, AfterValidator(_readable), _NAME_SCHEMA]
"""A group's name. It reads as it is: two that look the same are the same."""

NO_PLACES = frozenset({"CET", "EET", "MET", "WET", "Factory", "localtime", "posixrules"})
"""Names that the system has among its time zones. PostgreSQL takes the first four for abbreviations, which know no
daylight saving; the others are no places."""


def _place(timezone: str) -> str:
    if timezone.lower() in {name.lower() for name in NO_PLACES}:
        raise ValueError("is no IANA time zone of a place, like Europe/Paris, nor UTC")
    return timezone


TimeZone = Annotated[
    Text,
    Field(min_length=1, max_length=64, json_schema_extra={"format": "timezone"}),
    AfterValidator(_place),
]
"""What may be a group's time zone; whether there is one of that name, the database knows."""

# what readers of JSON take for a number; Python's integers go on
_LARGEST_NUMBER = 18 * 10**307


def _numbers(value: object) -> Iterator[int | float]:
    """Find the numbers in a value, however deep."""
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
    """Tell how much longer a number gets in PostgreSQL, which writes it without an exponent."""
    short = repr(number)
    return len(f"{Decimal(short):f}") - len(short) if isinstance(number, float) else 0


def _storable(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuse what PostgreSQL's jsonb can't hold, or tokenlimits doesn't keep."""
    if any(abs(number) > _LARGEST_NUMBER for number in _numbers(metadata)):
        raise ValueError("has a number beyond 1.8e308, which readers of JSON don't know")
    try:
        written = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
        size = len(written.encode()) + sum(_growth(number) for number in _numbers(metadata))
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which no text may hold") from None
    if re.search(r"(?<!\\)(\\\\)*\\u0000", written):
        raise ValueError("has the character \\0, which PostgreSQL can't hold")
    if size > 8192:
        raise ValueError(f"must be at most 8192 bytes of JSON, and is {size}")
    return metadata


Metadata = Annotated[dict[str, JsonValue], AfterValidator(_storable)]
"""A JSON object that PostgreSQL can hold, of at most 8 kB."""
