"""History as a chart shows it: a row of buckets without gaps, and for each kind a number in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tokenlimits.models import HistoryPoint

Step = Literal["hour", "day", "month"]

_SHOWN: Mapping[Step, int] = {"hour": 48, "day": 30, "month": 12}
_WRITTEN: Mapping[Step, str] = {"hour": "{0:%b} {0.day}, {0:%H:%M}{1}", "day": "{0:%b} {0.day}", "month": "{0:%b %Y}"}
_IN_UTC = "In UTC: this server has no data for the time zone {}. Run there: pip install --upgrade tzdata"


@dataclass(frozen=True, slots=True)
class Trend:
    """What was used of a kind in the last 30 days; `change` is the change from the 30 days before, in per cent.

    It is None if there was no usage before.
    """

    kind: str
    used: int
    generations: int
    change: int | None


def first(step: Step, timezone: str, now: datetime) -> datetime:
    """Return where a chart that ends now begins."""
    return buckets(step, timezone, now)[0]


def buckets(step: Step, timezone: str, now: datetime) -> list[datetime]:
    """List when the buckets of a chart begin, in a group's time zone.

    Example:
        >>> [b.isoformat() for b in buckets("month", "UTC", datetime(2026, 3, 9, tzinfo=UTC))][-2:]
        ['2026-02-01T00:00:00+00:00', '2026-03-01T00:00:00+00:00']
    """
    zone = zone_named(timezone) or UTC
    here = now.astimezone(zone)
    places = range(_SHOWN[step] - 1, -1, -1)
    if step == "hour":
        hour = now.astimezone(UTC) - timedelta(minutes=here.minute, seconds=here.second, microseconds=here.microsecond)
        return [(hour - timedelta(hours=n)).astimezone(zone) for n in places]
    midnight = here.replace(hour=0, minute=0, second=0, microsecond=0)
    if step == "day":
        return [midnight - timedelta(days=n) for n in places]
    months = here.year * 12 + here.month - 1
    return [midnight.replace(year=(months - n) // 12, month=(months - n) % 12 + 1, day=1) for n in places]


def chart(points: Iterable[HistoryPoint], step: Step, timezone: str, now: datetime) -> dict[str, Any]:
    """Convert a history for the chart library, with the kinds of the most generations first."""
    zone = zone_named(timezone) or UTC
    used: dict[str, dict[str, int]] = {}
    generations: Counter[str] = Counter()
    for point in points:
        generations[point.kind] += point.generations
        label = _label(step, point.bucket.astimezone(zone))
        of_kind = used.setdefault(point.kind, {})
        of_kind[label] = of_kind.get(label, 0) + point.used
    labels = list(dict.fromkeys(_label(step, bucket) for bucket in buckets(step, timezone, now)))
    kinds = sorted(used, key=lambda kind: (-generations[kind], kind))
    return {
        "labels": labels,
        "kinds": [{"kind": kind, "used": [used[kind].get(label, 0) for label in labels]} for kind in kinds],
        "note": None if zone_named(timezone) else _IN_UTC.format(timezone),
    }


def _label(step: Step, moment: datetime) -> str:
    """Write a moment; an hour that is repeated as the clocks go back has its offset."""
    repeated = moment.utcoffset() != moment.replace(fold=1 - moment.fold).utcoffset() and _exists(moment)
    return _WRITTEN[step].format(moment, f" ({moment:%Z})" if repeated else "")


def _exists(moment: datetime) -> bool:
    """Whether a local time isn't skipped as the clocks go forward."""
    return moment.astimezone(UTC).astimezone(moment.tzinfo) == moment


def trends(points: Iterable[HistoryPoint], now: datetime) -> list[Trend]:
    """Compare the last 30 days with the 30 before, per kind."""
    border = now - timedelta(days=30)
    found: dict[str, list[int]] = {}
    for point in points:
        numbers = found.setdefault(point.kind, [0, 0, 0])
        if point.bucket >= border:
            numbers[0] += point.used
            numbers[1] += point.generations
        else:
            numbers[2] += point.used
    trends_ = [
        Trend(kind, used, generations, round((used - before) * 100 / before) if before else None)
        for kind, (used, generations, before) in found.items()
    ]
    return sorted(trends_, key=lambda trend: (-trend.generations, trend.kind))


def zone_named(name: str) -> tzinfo | None:
    """Find a time zone; None if this machine has no data on it."""
    # the database may know more time zones than this machine; UTC works without data
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return None
