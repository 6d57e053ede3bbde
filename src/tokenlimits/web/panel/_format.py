"""How numbers and moments are written for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

_PERIODS: Mapping[str, str] = {
    "minute": "a minute",
    "hour": "an hour",
    "day": "a day",
    "week": "a week",
    "month": "a month",
    "lifetime": "in total",
}
_STEPS = ((10**12, "T"), (10**9, "B"), (10**6, "M"))


def number(value: int | None) -> str:
    """Write a number in full.

    Example:
        >>> number(1234567), number(None)
        ('1,234,567', '∞')
    """
    return "∞" if value is None else f"{value:,}"


def percent(fraction: float) -> str:
    """Write a fraction in per cent.

    Example:
        >>> percent(0.7), percent(12.345)
        ('70', '1,234')
    """
    return f"{round(fraction * 100):,}"


def short(value: int | None) -> str:
    """Write a number in few characters, from a million on.

    Example:
        >>> short(12_345), short(1_500_000), short(2 * 10**9), short(None)
        ('12,345', '1.5M', '2B', '∞')
    """
    if value is None:
        return "∞"
    for size, name in _STEPS:
        if value >= size:
            return f"{value / size:.1f}".removesuffix(".0") + name
    return f"{value:,}"


def period(value: str) -> str:
    """Write a period.

    Example:
        >>> period("day"), period("lifetime")
        ('a day', 'in total')
    """
    return _PERIODS[value]


def moment(value: datetime) -> str:
    """Write a moment for `<time datetime>`; the browser shows it in its own time zone.

    Example:
        >>> from datetime import UTC
        >>> moment(datetime(2026, 1, 31, 12, tzinfo=UTC))
        '2026-01-31T12:00:00+00:00'
    """
    return value.isoformat()


FILTERS: Mapping[str, Callable[[Any], str]] = {
    "number": number,
    "percent": percent,
    "short": short,
    "period": period,
    "moment": moment,
}
