"""The types of a limit's fields, and which of them go together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, Field, StrictInt, WithJsonSchema

from ._fields import Kind

SinglePeriod = Literal["in_flight", "minute", "hour", "day", "week", "month", "year", "lifetime"]
"""A period of one unit, or the present moment."""

_SINGLE = get_args(SinglePeriod)
_MOST = {"minute": 366, "hour": 366, "day": 366, "week": 366, "month": 24}


def number_and_unit(period: str) -> tuple[int, str]:
    """Split a period.

    Example:
        >>> number_and_unit("5 hours"), number_and_unit("day")
        ((5, 'hour'), (1, 'day'))
    """
    number, _, units = period.rpartition(" ")
    return (int(number), units.removesuffix("s")) if number else (1, units)


def _period(period: object) -> str:
    """Accept a period, and write one unit without its number."""
    if isinstance(period, str):
        if period in _SINGLE:
            return period
        given = re.fullmatch(r"([1-9][0-9]{0,2}) ([a-z]+?)s?", period)
        number, unit = (int(given[1]), given[2]) if given else (0, "")
        if number == 1 and unit in _MOST:
            return unit
        if 2 <= number <= _MOST.get(unit, 0):
            return f"{number} {unit}s"
    raise ValueError(
        f"must be {', '.join(_SINGLE[:-1])} or {_SINGLE[-1]}, or 2 to 366 minutes, hours, days or weeks, or 2 to 24 "
        'months, like "5 hours"'
    )


# the Literal is for editors, which suggest its words
Period = Annotated[
    SinglePeriod | str,
    BeforeValidator(_period),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": list(_SINGLE)},
                {
                    "type": "string",
                    "pattern": "^(([2-9]|[1-9][0-9]|[12][0-9]{2}|3[0-5][0-9]|36[0-6]) (minutes|hours|days|weeks)"
                    "|([2-9]|1[0-9]|2[0-4]) months)$",
                },
            ]
        }
    ),
]
"""How long a limit's usage counts: one unit, or several where `starts` isn't `calendar`, such as `"5 hours"`: 2 to 366
minutes, hours, days or weeks, or 2 to 24 months. Weeks of the calendar begin on Monday; lifetime never ends. A limit in
flight counts the holds that are open, one each whatever their cost."""

Starts = Literal["calendar", "anchor", "first_use", "rolling"]
"""Where a limit's periods begin. `calendar`: with the hour, day, week, … of the group's time zone; `anchor`: at the
moment when the user joined or the group was created, or at its `anchor_at`; `first_use`: with the first generation
after the last period has ended; `rolling`: the period is what has just passed, at every moment."""

Mode = Literal["enforce", "observe"]
"""`observe`: the limit counts, but never denies; an answer lists it in `would_deny` where it would have denied."""


def _pool(counts: Any) -> Any:
    kinds = cast("dict[Any, Any]", counts) if isinstance(counts, dict) else None
    if kinds is not None and not 1 <= len(kinds) <= 50:
        raise ValueError('must name 1 to 50 kinds with their weights, like {"image": 1, "video": 8}; None: no pool')
    return cast("Any", counts)


_Weight = Annotated[StrictInt, Field(ge=1, le=1_000_000)]
Counts = Annotated[
    dict[Kind, _Weight],
    BeforeValidator(_pool),
    Field(json_schema_extra={"minProperties": 1, "maxProperties": 50, "additionalProperties": False}),
]
"""The kinds that a pool counts, and how many units one of each takes."""


def start(starts: Starts, period: str) -> Starts:
    """Refuse a start at which periods of that length can't begin."""
    number, unit = number_and_unit(period)
    if period in ("lifetime", "in_flight") and starts != "calendar":
        raise ValueError(f"must be calendar where the period is {period}, which never begins again")
    if number > 1 and unit == "month" and starts != "anchor":
        raise ValueError(f"must be anchor where the period is {period}")
    if number > 1 and starts == "calendar":
        raise ValueError(f"must be anchor, first_use or rolling where the period is {period}")
    if unit in ("month", "year") and starts == "rolling":
        raise ValueError(f'must not be rolling where the period is a {unit}; use "30 days", for example')
    return starts


def pooled(counts: Counts | None, period: str) -> Counts | None:
    """Refuse a pool of holds.

    Example:
        >>> pooled({"video": 8}, "in_flight")
        Traceback (most recent call last):
        ...
        ValueError: must be None where the period is in_flight, which counts the holds of the limit's own kind
    """
    if counts is not None and period == "in_flight":
        raise ValueError("must be None where the period is in_flight, which counts the holds of the limit's own kind")
    return counts
