"""Days, as people type them where a group is."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time

from ._charts import zone_named


def beginning(typed: str, timezone: str) -> datetime:
    """Read a day, as the moment when it begins there.

    Raises:
        ValueError: It isn't one, with words for people.

    Example:
        >>> beginning("2026-01-31", "UTC").isoformat()
        '2026-01-31T00:00:00+00:00'
    """
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", typed):
        raise ValueError("A day is written like 2026-12-31.")
    try:
        day = date.fromisoformat(typed)
    except ValueError:
        raise ValueError("There is no such day.") from None
    return datetime.combine(day, time.min, zone_named(timezone) or UTC)


def day_of(moment: datetime | None, timezone: str) -> str:
    """Write the day that a moment lies in there; empty: no moment."""
    return "" if moment is None else moment.astimezone(zone_named(timezone) or UTC).date().isoformat()
