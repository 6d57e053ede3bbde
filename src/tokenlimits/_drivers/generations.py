"""Reserve, run the body, settle: the context managers, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from tokenlimits._core.call import Call
from tokenlimits._core.hold import RunningHold
from tokenlimits._core.workers import Settlement
from tokenlimits.errors import ConfigurationError
from tokenlimits.models import TrackResult

from .heartbeat import AsyncHeartbeat, Heartbeat
from .holds import AsyncHold, AsyncRunningHold, AsyncSettle, Hold, Settle, SyncRunningHold

T = TypeVar("T")


class _Generation:
    def __init__(self, call: Call[TrackResult]) -> None:
        self._call = call
        self._entered = False
        self._end_heartbeat: Callable[[], None] | None = None

    def _enter_once(self) -> Call[TrackResult]:
        if self._entered:
            raise ConfigurationError("A generation can be entered only once; call generation() for each one.")
        self._entered = True
        return self._call

    def _settlement(self, hold: RunningHold, error: BaseException | None) -> Settlement | None:
        # the heartbeat first: from here on, it would be told that the hold is settled
        if self._end_heartbeat is not None:
            self._end_heartbeat()
        return hold.settlement(error)


class Generation(_Generation, AbstractContextManager[Hold, None]):
    """Reserves the cost, and settles when the body has ended."""

    def __init__(
        self,
        call: Call[TrackResult],
        judge: Callable[[Call[TrackResult]], TrackResult],
        settle: Settle,
        heartbeat: Heartbeat | None,
    ) -> None:
        super().__init__(call)
        self._judge, self._settle, self._heartbeat = judge, settle, heartbeat
        self._hold: SyncRunningHold

    def __enter__(self) -> Hold:
        """Reserve, or raise the denial."""
        call = self._enter_once()
        self._hold = SyncRunningHold(call, self._judge(call), self._settle)
        if self._heartbeat is not None:
            self._end_heartbeat = self._heartbeat.begin(self._hold, call.params["p_ttl"])
        return self._hold

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle, and let the body's own error propagate."""
        settlement = self._settlement(self._hold, error)
        if settlement is None:
            return
        try:
            answer = self._settle(settlement)
        except Exception as failure:  # noqa: BLE001  # whatever it is, the body's own error takes precedence
            self._hold.failed(failure, error)
        else:
            self._hold.settled(answer)


class AsyncGeneration(_Generation, AbstractAsyncContextManager[AsyncHold, None]):
    """Reserves the cost, and settles when the body has ended, even if the task is cancelled."""

    def __init__(
        self,
        call: Call[TrackResult],
        judge: Callable[[Call[TrackResult]], Coroutine[Any, Any, TrackResult]],
        settle: AsyncSettle,
        heartbeat: AsyncHeartbeat | None,
    ) -> None:
        super().__init__(call)
        self._judge, self._settle, self._heartbeat = judge, settle, heartbeat
        self._hold: AsyncRunningHold

    async def __aenter__(self) -> AsyncHold:
        """Reserve, or raise the denial; if the task is cancelled meanwhile, release what was reserved."""
        call = self._enter_once()
        reserving, cancelled = await _outlast(lambda: self._judge(call))
        if cancelled is None or reserving.cancelled():
            self._hold = AsyncRunningHold(call, reserving.result(), self._settle)
        elif reserving.exception() is None and reserving.result().allowed:
            self._hold = AsyncRunningHold(call, reserving.result(), self._settle)
            await self._end(cancelled)
        if cancelled is not None:
            raise cancelled
        if self._heartbeat is not None:
            self._end_heartbeat = self._heartbeat.begin(self._hold, call.params["p_ttl"])
        return self._hold

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle, and let the body's own error propagate."""
        await self._end(error)

    async def _end(self, error: BaseException | None) -> None:
        settlement = self._settlement(self._hold, error)
        if settlement is None:
            return
        settling, cancelled = await _outlast(lambda: self._settle(settlement))
        failure = settling.exception()
        if failure is None:
            self._hold.settled(settling.result())
        else:
            self._hold.failed(failure, error or cancelled)
        if cancelled is not None:
            raise cancelled


async def _outlast(
    make: Callable[[], Coroutine[Any, Any, T]],
) -> tuple[asyncio.Task[T], asyncio.CancelledError | None]:
    """Run a call to its end in its own task, and return that with the cancellation of the waiting task, if any.

    The call ends in time, as the transport has a deadline. If its own task is cancelled, as `asyncio.run` cancels all
    tasks at its end, the call is sent once more; if the first one had arrived, that changes nothing.
    """
    cancelled = None
    task = asyncio.create_task(make())
    for again in (True, False):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
        if again and task.cancelled():
            task = asyncio.create_task(make())
    return task, cancelled
