"""A hold in its body, sync and async."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from tokenlimits._core.call import Call
from tokenlimits._core.hold import BaseHold, RunningHold
from tokenlimits._core.workers import Settlement
from tokenlimits.models import TrackResult

Settle = Callable[[Settlement], TrackResult]
AsyncSettle = Callable[[Settlement], Coroutine[Any, Any, TrackResult]]


class Hold(BaseHold):
    """A generation under way, in the body of `TokenLimits.generation`; settled when the body ends.

    A normal end commits the reserved cost, or what `commit` said. An abnormal end (an exception of any kind, a
    cancellation, a generator that is closed early) commits what `used` declared so far, or releases everything if
    nothing was declared.

    Attributes:
        cost: The requested cost.
        result: The answer to `reserve`; after the end, the answer to settling.
        returned: You may set it to what the body has made. If only settling fails, the error has it as
            `error.returned`.

    Example:
        >>> with limits.generation(user_id, "video", cost=8) as hold:
        ...     hold.used(3)
        ...     hold.commit(cost=5)
        >>> hold.status, hold.result.cost
        ('committed', 5)
    """

    _settle: Settle

    def extend(self, ttl: int) -> None:
        """Let the hold expire `ttl` seconds from now, if that is later; see `TokenLimits.extend`.

        Args:
            ttl: Seconds, up to 30 days.

        Raises:
            HoldExpired: It has expired already.
            AlreadySettled: The body has ended, or somebody else has settled the hold.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).

        Example:
            >>> with limits.generation(user_id, "video", ttl=60) as hold:
            ...     before = hold.expires_at
            ...     hold.extend(600)
            >>> hold.expires_at > before
            True
        """
        self._extended(self._settle(self._extension(ttl)))


class AsyncHold(BaseHold):
    """A generation under way, in the body of `AsyncTokenLimits.generation`; settled when the body ends.

    Like `Hold`, but for `extend`.

    Attributes:
        cost: The requested cost.
        result: The answer to `reserve`; after the end, the answer to settling.
        returned: You may set it to what the body has made. If only settling fails, the error has it as
            `error.returned`.

    Example:
        >>> async with limits.generation(user_id, "video", cost=8) as hold:
        ...     hold.used(3)
        ...     hold.commit(cost=5)
        >>> hold.status, hold.result.cost
        ('committed', 5)
    """

    _settle: AsyncSettle

    async def extend(self, ttl: int) -> None:
        """Let the hold expire `ttl` seconds from now, if that is later; see `AsyncTokenLimits.extend`.

        Args:
            ttl: Seconds, up to 30 days.

        Raises:
            HoldExpired: It has expired already.
            AlreadySettled: The body has ended, or somebody else has settled the hold.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).

        Example:
            >>> async with limits.generation(user_id, "video", ttl=60) as hold:
            ...     before = hold.expires_at
            ...     await hold.extend(600)
            >>> hold.expires_at > before
            True
        """
        self._extended(await self._settle(self._extension(ttl)))


class SyncRunningHold(RunningHold, Hold):
    """A hold with what its context manager needs."""

    def __init__(self, call: Call[TrackResult], answer: TrackResult, settle: Settle) -> None:
        super().__init__(call, answer)
        self._settle = settle


class AsyncRunningHold(RunningHold, AsyncHold):
    """A hold with what its context manager needs."""

    def __init__(self, call: Call[TrackResult], answer: TrackResult, settle: AsyncSettle) -> None:
        super().__init__(call, answer)
        self._settle = settle
