"""How to write numbers, amounts and moments for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from tokenlimits.levels import short

# they have no plural
_UNCOUNTABLE = frozenset({"audio", "music", "sound", "speech", "text"})


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


def amount(value: int, kind: str) -> str:
    """Write a number with its noun.

    Example:
        >>> amount(1, "image"), amount(1200, "image")
        ('1 image', '1,200 images')
    """
    return f"{value:,} {plural(value, kind)}"


def plural(value: int, kind: str) -> str:
    """Write a kind in the singular or the plural.

    Example:
        >>> plural(2, "hd_image"), plural(1, "tokens"), plural(2, "audio"), plural(3, "story"), plural(0, "patch")
        ('hd images', 'token', 'audio', 'stories', 'patches')
    """
    words = kind.replace("_", " ")
    word = words.rpartition(" ")[2]
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "as", "is"))
    if value == 1:
        words = words.removesuffix("s") if is_plural else words
    elif not is_plural and word not in _UNCOUNTABLE:
        words = f"{words[:-1]}ies" if re.search("[^aeiou]y$", word) else words
        words += "" if words.endswith("ies") else "es" if re.search("(s|x|z|ch|sh)$", word) else "s"
    return words


def moment(value: datetime) -> str:
    """Write a moment for `<time datetime>`; the browser shows it in its own time zone.

    Example:
        >>> from datetime import UTC
        >>> moment(datetime(2026, 1, 31, 12, tzinfo=UTC))
        '2026-01-31T12:00:00+00:00'
    """
    return value.isoformat()


FILTERS: Mapping[str, Callable[..., str]] = {
    "number": number,
    "percent": percent,
    "short": short,
    "amount": amount,
    "plural": plural,
    "moment": moment,
}


def ago(time: timedelta) -> str:
    """Say how long ago something was.

    Example:
        >>> ago(timedelta(seconds=3)), ago(timedelta(minutes=2)), ago(timedelta(days=1, hours=3))
        ('just now', '2 minutes ago', '1 day ago')
    """
    for seconds, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if (count := int(time.total_seconds()) // seconds) > 0:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"
