"""What people read of a limit: how much it allows, in which window, and when there is more."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from tokenlimits import Limit
from tokenlimits.models import GroupLimitUsage, GroupRef, LimitStatus

from ._terminal import countdown, plain

_AT_ONCE = "at once"
_PERIODS = {"in_flight": _AT_ONCE, "lifetime": "in total"}
_FROM = {"anchor": ", anchored", "first_use": ", from the first use"}
_EACH = {"member": " each", "child": " for each customer"}


def allowance(
    limit: Limit | LimitStatus, number: Callable[[int], str] = "{:,}".format, *, of: GroupRef | None = None
) -> str:
    """Say how much a limit allows; `number` writes its max, and `of` is the group whose usage it is shown with.

    Example:
        >>> allowance(Limit(kind="image", max=1000, period="month"))
        '1,000 a month'
        >>> allowance(Limit(kind="image", max=40, period="3 hours", starts="rolling", scope="member"))
        '40 in the last 3 hours each'
        >>> allowance(Limit(kind="credits", max=50, period="month", starts="anchor", counts={"image": 2, "video": 9}))
        '50 a month, anchored: 2 an image, 9 a video'
        >>> allowance(Limit(kind="image", max=5, period="day", scope="member", starts="first_use", mode="observe"))
        '5 a day each, from the first use, observed'
        >>> allowance(Limit(kind="video", max=2, period="in_flight", scope="member"))
        '2 at once each'
        >>> allowance(Limit(kind="image", max=1000, period="month", scope="child", starts="anchor"))
        '1,000 a month for each customer, anchored'
    """
    owner = _above(limit, of)
    # the allowance of one child is shown with that child
    each = "" if owner and limit.scope == "child" else _EACH.get(limit.scope, "")
    where = _FROM.get(limit.starts, "")
    observed = ", observed" if limit.mode == "observe" else ""
    counts = limit.counts if isinstance(limit, Limit) else None
    pool = ", ".join(f"{weight:,} {_a(kind)}" for kind, weight in (counts or {}).items())
    most = "unlimited" if limit.max is None else "blocked" if limit.max == 0 else number(limit.max)
    return f"{most} {_per(limit.period, limit.starts)}{each}{where}{observed}{f': {pool}' if pool else ''}{owner}"


def _above(limit: Limit | LimitStatus, of: GroupRef | None) -> str:
    """Name the group that a limit belongs to, if that is another one."""
    owner = limit.group if isinstance(limit, LimitStatus) else None
    return "" if owner is None or of is None or owner.id == of.id else f", of {plain(owner.name)}"


def or_unlimited(number: int | None) -> str:
    """Write a maximum, or what remains of one."""
    return "unlimited" if number is None else f"{number:,}"


def window(period: str, starts: str) -> str:
    """Say which time a limit counts.

    Example:
        >>> window("day", "calendar"), window("3 hours", "rolling"), window("3 months", "anchor")
        ('day', 'last 3 hours', '3 months, anchored')
        >>> window("in_flight", "calendar")
        'at once'
    """
    if period == "in_flight":
        return _AT_ONCE
    return f"{'last ' if starts == 'rolling' else ''}{period}{_FROM.get(starts, '')}"


def _per(period: str, starts: str) -> str:
    if period in _PERIODS:
        return _PERIODS[period]
    if starts == "rolling":
        return f"in the last {period}"
    return f"per {period}" if " " in period else _a(period)


def _a(noun: str) -> str:
    noun = noun.replace("_", " ")
    # the h of the one unit that begins with it is silent
    return f"an {noun}" if noun[0] in "aeio" or noun == "hour" else f"a {noun}"


def resets_in(limit: LimitStatus, now: datetime, *, of: GroupRef | None = None) -> str:
    """Say how long it is until a limit has more room by itself; `of` is the group whose usage it is shown with.

    A rolling limit gets a part of it back at that moment. The members of a group, and the groups beneath it, have each
    their own windows, unless the calendar begins them.
    """
    if limit.period == "in_flight":
        return "as they end"
    if limit.reset_at is not None:
        return countdown(limit.reset_at, now) + (" (part)" if limit.starts == "rolling" else "")
    if limit.starts == "calendar":
        return "never"
    if isinstance(limit, GroupLimitUsage) and limit.scope in _EACH and not _above(limit, of):
        return "varies"
    return "not started" if limit.starts == "first_use" else ""
