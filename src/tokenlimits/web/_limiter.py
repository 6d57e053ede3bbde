"""How many requests a caller may send, counted in this process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Final, NamedTuple

from starlette.requests import HTTPConnection

from . import _ratelimit
from ._bearer import token_of
from ._problems import TooManyRequests

_MINUTE: Final = 60
# some ten megabytes; whoever has this many keys is not stopped by a count for each
_MOST_CALLERS: Final = 50_000


class _Minute(NamedTuple):
    ends: float
    sent: int


class Limiter:
    """Counts the requests of each caller, in minutes that begin with the first.

    Args:
        per_minute: How many each may send.
        name: Of the policy, in the `RateLimit` fields.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(self, per_minute: int, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._name = name
        self._clock = clock
        # in the order in which they end
        self._minutes: dict[str, _Minute] = {}

    def hit(self, caller: str) -> dict[str, str]:
        """Count a request, and return its `RateLimit` fields.

        Raises:
            TooManyRequests: The caller has none left.
        """
        self.check(caller)
        self.count(caller)
        minute = self._minutes[caller]
        return {
            "RateLimit-Policy": _ratelimit.policy(self._name, self._per_minute, _MINUTE),
            "RateLimit": _ratelimit.state(self._name, self._per_minute - minute.sent, minute.ends - self._clock()),
        }

    def check(self, caller: str) -> None:
        """Refuse, and count nothing.

        Raises:
            TooManyRequests: The caller has no request left.
        """
        self._drop_ended()
        minute = self._minutes.get(caller)
        if minute is not None and minute.sent >= self._per_minute:
            raise TooManyRequests(minute.ends - self._clock())

    def count(self, caller: str) -> None:
        """Count a request, whether there is one left or not."""
        self._drop_ended()
        minute = self._minutes.get(caller) or _Minute(self._clock() + _MINUTE, 0)
        self._minutes[caller] = minute._replace(sent=minute.sent + 1)

    def uncount(self, caller: str) -> None:
        """Take back a request that was counted."""
        minute = self._minutes.get(caller)
        if minute is not None:
            self._minutes[caller] = minute._replace(sent=max(minute.sent - 1, 0))

    def _drop_ended(self) -> None:
        now = self._clock()
        while self._minutes:
            first = next(iter(self._minutes))
            if self._minutes[first].ends > now and len(self._minutes) <= _MOST_CALLERS:
                return
            del self._minutes[first]


def address(connection: HTTPConnection) -> str:
    """Name where a request came from, as the server sees it: an IPv6 host has all addresses of its /64."""
    host = connection.client.host if connection.client else "unknown"
    try:
        ip = ip_address(host)
    except ValueError:
        return host
    if not isinstance(ip, IPv6Address):
        return host
    return str(ip.ipv4_mapped or IPv6Network((int(ip), 64), strict=False))


def caller(connection: HTTPConnection) -> str:
    """Name who sends a request: by their token, which is not kept, or else by their address."""
    token = token_of(connection)
    return address(connection) if token is None else hashlib.sha256(token.encode()).hexdigest()
