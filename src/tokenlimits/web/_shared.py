"""Answers that concurrent requests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Kept(NamedTuple, Generic[T]):
    answer: asyncio.Future[T]
    until: float


class Shared(Generic[T]):
    """Asks once for all concurrent requests with the same key, and keeps the answer for a while.

    Args:
        seconds: For how long, from the question on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept: dict[str, _Kept[T]] = {}

    async def get(self, key: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the answer; errors are raised, and not kept."""
        now = time.monotonic()
        kept = self._kept.get(key)
        if kept is None or kept.until <= now:
            self._kept = {each: kept for each, kept in self._kept.items() if kept.until > now}
            task = asyncio.create_task(ask())
            kept = self._kept[key] = _Kept(task, now + self._seconds)
            task.add_done_callback(lambda _: self._drop_failed(key, task))
        # shielded: a request that is cancelled must not cancel the question of the others
        return await asyncio.shield(kept.answer)

    def keep(self, key: str, answer: T) -> None:
        """Keep an answer that came in another way."""
        known: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        known.set_result(answer)
        self._kept[key] = _Kept(known, time.monotonic() + self._seconds)

    def forget(self, key: str) -> None:
        """Ask again the next time."""
        self._kept.pop(key, None)

    def _drop_failed(self, key: str, task: asyncio.Task[T]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._kept.get(key, (None,))[0] is task:
            del self._kept[key]
