"""What a limit does, in words that people know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, get_args

from tokenlimits.models import Limit, SinglePeriod, number_and_unit

from ._format import amount, plural

STARTS: Mapping[str, str] = {
    "calendar": "By the calendar",
    "rolling": "Rolling",
    "first_use": "From first use",
    "anchor": "From an anchor",
}
"""Where periods begin."""

UNITS: Mapping[str, str] = {
    **{unit: unit for unit in get_args(SinglePeriod)},
    "lifetime": "in total",
    "in_flight": "at once",
}
"""How long a limit's usage counts."""

SCOPES: Mapping[str, str] = {"group": "Shared by all", "member": "Each member", "child": "Each customer"}
"""Whose usage a limit counts."""

FOR_EACH: Mapping[str, str] = {"group": "", "member": " for each member", "child": " for each customer"}
"""After what a limit allows: whose allowance it is."""

_WHO: Mapping[str, str] = {"group": "All members together", "member": "Each member", "child": "Each customer"}
_WHOSE: Mapping[str, str] = {"group": "the group's", "member": "their", "child": "its"}


class Timed(Protocol):
    """What has periods: a limit, or what is used of one."""

    @property
    def period(self) -> str: ...
    @property
    def starts(self) -> str: ...


def length(period: str) -> str:
    """Write how long a period is, after a word like "any".

    Example:
        >>> length("3 hours"), length("day")
        ('3 hours', 'day')
    """
    number, unit = number_and_unit(period)
    return unit if number == 1 else f"{number} {unit}s"


def _span(period: str) -> str:
    number, unit = number_and_unit(period)
    return f"{number} {plural(number, unit)}"


def when(limit: Timed) -> str:
    """Write the period of a limit in few words.

    Example:
        >>> when(Limit(kind="image", max=1, period="day")), when(Limit(kind="image", max=1))
        ('per day', 'in total')
        >>> when(Limit(kind="video", max=1, period="in_flight"))
        'at once'
        >>> when(Limit(kind="image", max=1, period="3 hours", starts="rolling"))
        'in any 3 hours'
        >>> when(Limit(kind="image", max=1, period="5 hours", starts="first_use"))
        '5 hours from first use'
    """
    if limit.period in ("lifetime", "in_flight"):
        return UNITS[limit.period]
    if limit.starts == "rolling":
        return f"in any {length(limit.period)}"
    if limit.starts == "first_use":
        return f"{_span(limit.period)} from first use"
    return f"per {length(limit.period)}" + (", from an anchor" if limit.starts == "anchor" else "")


def lately(limit: Timed) -> str:
    """Say since when a limit counts, where the calendar doesn't say it; empty where it does.

    Example:
        >>> lately(Limit(kind="image", max=1, period="hour", starts="rolling"))
        ' in the last hour'
    """
    return f" in the last {length(limit.period)}" if limit.starts == "rolling" else ""


def sentence(limit: Limit) -> str:
    """Say what a limit will do.

    Example:
        >>> sentence(Limit(kind="image", max=40, period="3 hours", scope="member", starts="rolling"))
        'Each member may use 40 images in any 3 hours.'
        >>> sentence(Limit(kind="credits", max=1000, period="month", counts={"image": 1, "video": 8}))
        'All members together may use 1,000 credits each month. An image takes 1 credit, a video 8.'
        >>> sentence(Limit(kind="credits", max=1000, period="month", scope="child"))
        'Each customer may use 1,000 credits each month, shared by all its members.'
        >>> sentence(Limit(kind="image", max=5, period="day", mode="observe"))
        'All members together should use 5 images each day. More is only observed: it is not denied.'
        >>> sentence(Limit(kind="video", max=2, period="in_flight", scope="member"))
        'Each member may have 2 videos in progress.'
        >>> sentence(Limit(kind="video", max=2, period="in_flight", scope="child"))
        'Each customer may have 2 videos in progress, of all its members together.'
    """
    who = _WHO[limit.scope]
    may = "may" if limit.mode == "enforce" or limit.max is None else "should"
    is_flight = limit.period == "in_flight"
    do, kinds = ("have" if is_flight else "use"), plural(2, limit.kind)
    if limit.max == 0:
        nobody = "No customer" if limit.scope == "child" else "Nobody"
        said = f"{nobody} {may} {do} {kinds}{' in progress' if is_flight else ''}."
    elif limit.max is None:
        said = f"{who} may {do} any number of {kinds}{' in progress' if is_flight else f', counted {_each(limit)}'}."
    else:
        said = f"{who} {may} {do} {amount(limit.max, limit.kind)} {_each(limit)}"
        if limit.scope == "child":
            said += ", of all its members together" if is_flight else ", shared by all its members"
        said += "."
    if limit.counts:
        said += f" {_weights(limit.kind, limit.counts)}."
    if limit.mode == "observe" and limit.max is not None:
        said += " More is only observed: it is not denied."
    return said


def _each(limit: Limit) -> str:
    whose = _WHOSE[limit.scope]
    number, unit = number_and_unit(limit.period)
    if limit.period == "in_flight":
        return "in progress"
    if limit.period == "lifetime":
        return "in total"
    if limit.starts == "rolling":
        return f"in any {length(limit.period)}"
    if limit.starts == "first_use":
        return f"in the {length(limit.period)} from {'the' if limit.scope == 'group' else whose} first use"
    each = f"each {unit}" if number == 1 else f"every {length(limit.period)}"
    return each + (f", counted from {whose} anchor" if limit.starts == "anchor" else "")


def _weights(pool: str, counts: Mapping[str, int]) -> str:
    (kind, weight), *others = counts.items()
    first = f"{_one(kind).capitalize()} takes {amount(weight, pool)}"
    return ", ".join([first, *(f"{_one(kind)} {weight:,}" for kind, weight in others)])


def _one(kind: str) -> str:
    word = plural(1, kind)
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
