"""The IETF's `RateLimit` and `RateLimit-Policy` fields (draft-ietf-httpapi-ratelimit-headers), and `Retry-After`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from tokenlimits import TrackResult
from tokenlimits.models import LimitStatus, number_and_unit

# months and years have no fixed length, and lifetime never ends
_SECONDS: Mapping[str, int] = {"minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}


def policy(name: str, quota: int, window: int | None) -> str:
    """Write one policy.

    Example:
        >>> policy("image-day-group", 50, 86_400)
        '"image-day-group";q=50;w=86400'
    """
    return f'"{name}";q={quota}' + ("" if window is None else f";w={window}")


def state(name: str, remaining: int, reset: float | None) -> str:
    """Write what remains of a policy, and in how many seconds it resets.

    Example:
        >>> state("image-day-group", 0, 12.3)
        '"image-day-group";r=0;t=13'
    """
    return f'"{name}";r={remaining}' + ("" if reset is None else f";t={max(math.ceil(reset), 0)}")


def of_limits(limits: Iterable[LimitStatus]) -> dict[str, str]:
    """Write the fields for the limits that apply to a generation, except unlimited ones and those that only observe.

    A pool's are in units of the kind that was asked for, like its `remaining`.
    """
    now = datetime.now(UTC)
    policies: list[str] = []
    states: list[str] = []
    for limit in limits:
        if limit.max is None or limit.remaining is None or limit.mode == "observe":
            continue
        name = _name(limit)
        reset = None if limit.reset_at is None else (limit.reset_at - now).total_seconds()
        policies.append(policy(name, limit.max // limit.weight, _window(limit.period)))
        states.append(state(name, limit.remaining, reset))
    if not policies:
        return {}
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}


def _name(limit: LimitStatus) -> str:
    starts = "" if limit.starts == "calendar" else f"-{limit.starts}"
    return f"{limit.kind}-{limit.period}{starts}-{limit.scope}".replace(" ", "-")


def _window(period: str) -> int | None:
    number, unit = number_and_unit(period)
    return number * _SECONDS[unit] if unit in _SECONDS else None


def of_denial(result: TrackResult) -> dict[str, str]:
    """Write the headers for a generation that was denied.

    Example:
        >>> of_denial(TrackResult(allowed=False, kind="image", cost=1, reason="limit_exceeded", retry_after=7.2))
        {'Retry-After': '8'}
    """
    headers = of_limits(result.limits or ([result.denied_by] if result.denied_by else []))
    if result.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(result.retry_after))
    return headers
