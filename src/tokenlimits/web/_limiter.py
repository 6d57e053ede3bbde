"""Rate limits per caller, with the library `limits`, in this process's memory."""

from __future__ import annotations

import hashlib
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import Request

from . import _ratelimit
from ._problems import TooManyRequests


class Limiter:
    """Counts the requests of each caller within the last minute.

    Args:
        per_minute: How many requests each caller may send.
        name: The policy's name in the `RateLimit` fields.
    """

    def __init__(self, per_minute: int, name: str) -> None:
        self._limit = RateLimitItemPerMinute(per_minute)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._name = name

    def hit(self, caller: str) -> dict[str, str]:
        """Count a request, and return its `RateLimit` fields.

        Raises:
            TooManyRequests: The caller has none left.
        """
        allowed = self._limiter.hit(self._limit, self._name, caller)
        reset, remaining = self._limiter.get_window_stats(self._limit, self._name, caller)
        wait = max(reset - time.time(), 1)
        if not allowed:
            raise TooManyRequests(wait)
        return {
            "RateLimit-Policy": _ratelimit.policy(self._name, self._limit.amount, 60),
            "RateLimit": _ratelimit.state(self._name, remaining, wait),
        }

    def count(self, caller: str) -> None:
        """Count a request, even if none is left."""
        self._limiter.hit(self._limit, self._name, caller)

    def check(self, caller: str) -> None:
        """Check that a request is left, without counting one.

        Raises:
            TooManyRequests: The caller has no request left.
        """
        if not self._limiter.test(self._limit, self._name, caller):
            reset, _ = self._limiter.get_window_stats(self._limit, self._name, caller)
            raise TooManyRequests(max(reset - time.time(), 1))


def address(request: Request) -> str:
    """Return the address that a request came from, as the server sees it."""
    return request.client.host if request.client else "unknown"


def caller(request: Request) -> str:
    """Name who sends a request: by their token, which is not kept, or else by their address."""
    token = request.headers.get("authorization")
    return address(request) if token is None else hashlib.sha256(token.encode()).hexdigest()
