"""How often somebody may be wrong when they sign in: never so that others keep the right one out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from tokenlimits.web._limiter import Limiter
from tokenlimits.web._problems import TooManyRequests

# people mistype; then the pause doubles, from two seconds to a quarter of an hour
_FREE: Final = 5
_LONGEST: Final = 900.0
_EVERYWHERE: Final = 3
_MOST: Final = 10_000

T = TypeVar("T")
Who = tuple[str, str]


class _Wrong(NamedTuple):
    times: int
    until: float


class Attempts:
    """Counts failed sign-ins: of an account from an address, of an address, and of all.

    Whoever signed in to an account from an address has only their own failures there against them.

    Args:
        per_minute: How many an address may have, and a third of what all together may have.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of_address = Limiter(per_minute, "sign-ins", clock=clock)
        self._of_all = Limiter(per_minute * _EVERYWHERE, "sign-ins", clock=clock)
        # both with the least recent first
        self._wrong: dict[Who, _Wrong] = {}
        self._known: dict[Who, None] = {}

    def begin(self, account: str, address: str) -> Who:
        """Count an attempt as a failure before its password is tried, so that many at once are many.

        Raises:
            TooManyRequests: It must wait.
        """
        who, now = (account.strip().lower()[:320], address), self._clock()
        times, until = self._wrong.get(who, _Wrong(0, now))
        if until > now:
            raise TooManyRequests(until - now)
        if now - until > _LONGEST:
            times = 0  # forgotten
        if who not in self._known:
            self._of_address.check(address)
            self._of_all.check("")
            self._of_address.count(address)
            self._of_all.count("")
        _keep(self._wrong, who, _Wrong(times + 1, now + _pause(times + 1)))
        return who

    def succeeded(self, who: Who) -> None:
        """Forget that somebody was wrong before they were right."""
        self.take_back(who)
        self._wrong.pop(who, None)
        _keep(self._known, who, None)

    def take_back(self, who: Who) -> None:
        """Forget an attempt that came to nothing, since nobody could say whether the password was right."""
        times, _ = self._wrong.get(who, _Wrong(1, 0))
        _keep(self._wrong, who, _Wrong(times - 1, self._clock()))
        if who not in self._known:
            self._of_address.uncount(who[1])
            self._of_all.uncount("")


def _pause(times: int) -> float:
    return 0.0 if times <= _FREE else min(2.0 ** min(times - _FREE, 60), _LONGEST)


def _keep(kept: dict[Who, T], who: Who, value: T) -> None:
    kept.pop(who, None)
    kept[who] = value
    if len(kept) > _MOST:
        del kept[next(iter(kept))]
