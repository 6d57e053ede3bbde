"""Calendar periods in a time zone, as sql/schema/40_periods.sql defines them.

A day begins at the first moment that reads its date, also where midnight happens twice or not at all; hours are counted
from the beginning of the day, so that a repeated hour is a period of its own.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

from tokenlimits._fields import NO_PLACES
from tokenlimits.errors import ConfigurationError

BEGINNING = datetime.min.replace(tzinfo=UTC)
NEVER = datetime.max.replace(tzinfo=UTC)

_MINUTE, _HOUR, _DAY, _WEEK = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1), timedelta(weeks=1)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@cache
def _names() -> dict[str, str]:
    return {name.lower(): name for name in (available_timezones() | {"UTC"}) - NO_PLACES}


def canonical(timezone: str) -> str | None:
    """Return an IANA name in its own spelling, ignoring case; None if a group can't have it.

    Example:
        >>> canonical("utc"), canonical("Nowhere/Land")
        ('UTC', None)
    """
    names = _names()
    if len(names) == 1 and timezone.lower() not in names:
        raise ConfigurationError(
            f"This system has no time zone data, so not {timezone} either. Run: pip install tzdata"
        )
    return names.get(timezone.lower())


@cache
def zone(timezone: str) -> tzinfo:
    """Find the time zone of a name; UTC works even if the system has no time zones."""
    return UTC if timezone == "UTC" else ZoneInfo(timezone)


def floor(at: datetime, step: timedelta, origin: datetime = _EPOCH) -> datetime:
    """Round a moment down to a whole number of steps since an origin.

    Example:
        >>> str(floor(datetime(2026, 5, 1, 12, 44, tzinfo=UTC), timedelta(minutes=15)))
        '2026-05-01 12:30:00+00:00'
    """
    return origin + (at - origin) // step * step


def quarter(at: datetime) -> datetime:
    """Round a moment down to the quarter of an hour, as the SQL's rollup does: every zone's hours begin on one.

    Example:
        >>> str(quarter(datetime(2026, 5, 1, 12, 44, tzinfo=UTC)))
        '2026-05-01 12:30:00+00:00'
    """
    return floor(at, timedelta(minutes=15))


def period_of(period: str, timezone: str, at: datetime) -> tuple[datetime, datetime]:
    """Return when the period of a moment begins, and when the next one does.

    Example:
        >>> noon = datetime(2026, 3, 29, 12, tzinfo=UTC)
        >>> [str(moment) for moment in period_of("day", "Europe/Paris", noon)]
        ['2026-03-28 23:00:00+00:00', '2026-03-29 22:00:00+00:00']
    """
    if period == "lifetime":
        return BEGINNING, NEVER
    if period == "minute":
        minute = floor(at, _MINUTE)
        return minute, minute + _MINUTE
    today = at.astimezone(zone(timezone)).date()
    if period == "hour":
        midnight = _begin(today, timezone)
        hour = floor(at, _HOUR, midnight)
        return hour, min(hour + _HOUR, _begin(today + _DAY, timezone))
    first, following = _dates(period, today)
    return _begin(first, timezone), _begin(following, timezone)


def _dates(period: str, today: date) -> tuple[date, date]:
    if period == "day":
        return today, today + _DAY
    if period == "week":
        monday = today - today.weekday() * _DAY
        return monday, monday + _WEEK
    if period == "year":
        return date(today.year, 1, 1), date(today.year + 1, 1, 1)
    first = today.replace(day=1)
    return first, (first + 31 * _DAY).replace(day=1)


def _begin(day: date, timezone: str) -> datetime:
    return first_moment(datetime.combine(day, time()), timezone)


def first_moment(local: datetime, timezone: str) -> datetime:
    """Return the first moment at which a zone's clocks show a time.

    A time that is skipped is taken for the one that is as long after the gap's end, as it is after its beginning: a
    skipped midnight is the end of the gap.

    Example:
        >>> str(first_moment(datetime(2026, 10, 25, 2, 30), "Europe/Paris"))
        '2026-10-25 00:30:00+00:00'
    """
    # fold=0 does both; a time that was read off a zone's clocks may have the other
    return local.replace(tzinfo=zone(timezone), fold=0).astimezone(UTC)
