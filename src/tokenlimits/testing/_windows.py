"""The periods of limits that don't begin with the calendar's, as sql/schema/40_periods.sql defines them."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta

from tokenlimits._limits import number_and_unit

from ._periods import first_moment, floor, zone

PARTS = 60
"""A rolling window counts so many parts, and the one that has just begun."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LENGTHS = {
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
}
_MONTHS = {"month": 1, "year": 12}


def _length(period: str) -> timedelta:
    number, unit = number_and_unit(period)
    return number * _LENGTHS[unit]


def _months_later(local: datetime, months: int) -> datetime:
    """Go on by months; where a month has no such day, to its last."""
    year, month = divmod(12 * local.year + local.month - 1 + months, 12)
    return local.replace(year=year, month=month + 1, day=min(local.day, monthrange(year, month + 1)[1]))


def anchored(period: str, timezone: str, anchor: datetime, at: datetime) -> tuple[datetime, datetime]:
    """Return when the period of a moment begins and ends, where periods are counted from an anchor.

    Example:
        >>> anchor, at = datetime(2026, 1, 31, 12, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)
        >>> [f"{moment:%d %B, %H:%M}" for moment in anchored("month", "UTC", anchor, at)]
        ['28 February, 12:00', '31 March, 12:00']
    """
    number, unit = number_and_unit(period)
    if unit in ("minute", "hour"):
        since = floor(at, _length(period), anchor)
        return since, since + _length(period)
    local_anchor = anchor.astimezone(zone(timezone)).replace(tzinfo=None)

    def begin(place: int) -> datetime:
        if unit in _MONTHS:
            local = _months_later(local_anchor, place * number * _MONTHS[unit])
        else:
            local = local_anchor + place * _length(period)
        return first_moment(local, timezone)

    # about right, since months and days differ in length
    place = (at - anchor) // (timedelta(days=30.44) * number * _MONTHS[unit] if unit in _MONTHS else _length(period))
    while begin(place) > at:
        place -= 1
    while begin(place + 1) <= at:
        place += 1
    return begin(place), begin(place + 1)


def end_of(period: str, timezone: str, since: datetime) -> datetime:
    """Return when a window ends that a first use has opened.

    Example:
        >>> str(end_of("month", "UTC", datetime(2026, 1, 31, 12, tzinfo=UTC)))
        '2026-02-28 12:00:00+00:00'
    """
    _, unit = number_and_unit(period)
    if unit in _MONTHS:
        local = since.astimezone(zone(timezone)).replace(tzinfo=None)
        return first_moment(_months_later(local, _MONTHS[unit]), timezone)
    return since + _length(period)


def part_of(period: str, at: datetime) -> datetime:
    """Return when the part of a rolling window begins that contains a moment.

    Example:
        >>> str(part_of("hour", datetime(2026, 1, 1, 12, 0, 59, tzinfo=UTC)))
        '2026-01-01 12:00:00+00:00'
    """
    return floor(at, _length(period) / PARTS, _EPOCH)


def rolling(period: str, at: datetime) -> tuple[datetime, datetime]:
    """Return when the oldest part begins that counts at a moment, and when the one that has just begun ends.

    Example:
        >>> [str(moment) for moment in rolling("hour", datetime(2026, 1, 1, 12, 0, 59, tzinfo=UTC))]
        ['2026-01-01 11:00:00+00:00', '2026-01-01 12:01:00+00:00']
    """
    part = part_of(period, at)
    return part - _length(period), part + _length(period) / PARTS


def leaves_at(period: str, created_at: datetime) -> datetime:
    """Return when a usage no longer counts in a rolling window.

    Example:
        >>> str(leaves_at("hour", datetime(2026, 1, 1, 12, 0, 59, tzinfo=UTC)))
        '2026-01-01 13:01:00+00:00'
    """
    return rolling(period, created_at)[1] + _length(period)
