"""Extends holds while their bodies run: one thread a client, or one task in each event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from tokenlimits._core.call import Call
from tokenlimits._core.hold import RunningHold
from tokenlimits._core.pulse import Beat, Pulse
from tokenlimits.models import TrackResult

from . import sessions
from .coalescing import Bell

logger = logging.getLogger("tokenlimits")

Send = Callable[[Call[TrackResult], float], TrackResult]
"""Takes a timeout in seconds."""
AsyncSend = Callable[[Call[TrackResult]], Coroutine[Any, Any, TrackResult]]
End = Callable[[], None]

# Requests of one event loop at once.
_AT_ONCE = 16


def _never() -> None:
    """End nothing."""


class Heartbeat:
    """Extends the holds of many threads, by a thread that lasts as long as there are any."""

    def __init__(self, send: Send, timeout: float) -> None:
        self._send, self._timeout = send, timeout
        # by fork: the thread exists in the parent alone, where the bodies go on, and the child's lock may be held by it
        self._own: dict[int, _Thread] = {}

    def begin(self, hold: RunningHold, ttl: int) -> End:
        """Extend a hold from now on; returns what ends that."""
        if hold.usage_id is None or hold.status != "reserved":
            return _never
        beat = Beat(hold, hold.usage_id, ttl, monotonic())
        forks = sessions.forks()
        with sessions.lock():
            own = self._own.get(forks)
            if own is None:
                own = self._own[forks] = _Thread(self._send, self._timeout)
        own.begin(beat)

        def end() -> None:
            beat.end()
            if sessions.forks() == forks:
                own.notice()

        return end


class _Thread:
    """The thread of one process."""

    def __init__(self, send: Send, timeout: float) -> None:
        self._send, self._timeout = send, timeout
        self._lock = threading.Lock()  # held only for moments, never while sending
        self._pulse = Pulse()
        self._news = Bell()
        self._running = False

    def begin(self, beat: Beat) -> None:
        """Take in a beat, and start the thread if there is none."""
        with self._lock:
            self._pulse.add(beat)
            if not self._running:
                # a daemon: a body that runs at the end of the process must not keep it alive
                thread = threading.Thread(target=self._run, name="tokenlimits-heartbeat", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the process ends, or has too many; the body runs all the same
                    logger.error("no heartbeat for usage %s: %s", beat.usage_id, error)  # noqa: TRY400
                else:
                    self._running = True
        self._news.ring()

    def notice(self) -> None:
        """Look again at what is left."""
        self._news.ring()

    def _run(self) -> None:
        while True:
            with self._lock:
                beat = self._pulse.first()
                if beat is None:
                    self._running = False
                    return
                wait = beat.due - monotonic()
                if wait <= 0:
                    self._pulse.take_due(monotonic(), 1)
            if wait > 0:
                self._news.wait(wait)
                continue
            self._extend(beat)
            with self._lock:
                self._pulse.add(beat)

    def _extend(self, beat: Beat) -> None:
        try:
            answer = self._send(beat.call(), min(self._timeout, beat.interval))
        except Exception as error:  # noqa: BLE001  # whatever it is, the body goes on, and so must its heartbeat
            beat.failed(error, monotonic())
        else:
            beat.answered(answer, monotonic())


class AsyncHeartbeat:
    """Extends the holds of many tasks, by one task in each event loop that lasts as long as there are any."""

    def __init__(self, send: AsyncSend, timeout: float) -> None:
        self._send, self._timeout = send, timeout
        # weak: each asyncio.run() has a loop of its own, which must be collected with all that waits in it
        self._own: WeakKeyDictionary[asyncio.AbstractEventLoop, _Task] = WeakKeyDictionary()

    def begin(self, hold: RunningHold, ttl: int) -> End:
        """Extend a hold from now on; returns what ends that."""
        if hold.usage_id is None or hold.status != "reserved":
            return _never
        beat = Beat(hold, hold.usage_id, ttl, monotonic())
        loop = asyncio.get_running_loop()
        # the lock, since loops of several threads share this dictionary
        with sessions.lock():
            own = self._own.get(loop)
            # a child may go on with the parent's loop, but the parent's task runs in the parent
            if own is None or own.forks != sessions.forks():
                own = self._own[loop] = _Task(self._send, self._timeout)
        own.begin(beat)

        def end() -> None:
            beat.end()
            if own.notice():
                # its event knows the loop, which would never be collected
                with sessions.lock():
                    if self._own.get(loop) is own:
                        del self._own[loop]

        return end


class _Task:
    """The task of one event loop; it needs no lock, as only tasks of the loop use it."""

    def __init__(self, send: AsyncSend, timeout: float) -> None:
        self.forks = sessions.forks()
        self._send, self._timeout = send, timeout
        self._pulse = Pulse()
        self._sending: list[Beat] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None  # the loop has only weak references to its tasks

    def begin(self, beat: Beat) -> None:
        """Take in a beat, and start the task if there is none."""
        self._pulse.add(beat)
        self._news.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="tokenlimits-heartbeat")

    def notice(self) -> bool:
        """Look again at what is left; if nothing is, end the task, even while it sends, and return True."""
        if self.forks != sessions.forks() or self._task is None:
            return False
        self._news.set()
        if self._pulse.first() is not None or not all(beat.over for beat in self._sending):
            return False
        self._task.cancel()
        self._task = None
        return True

    async def _run(self) -> None:
        while True:
            beat = self._pulse.first()
            if beat is None:
                return
            wait = beat.due - monotonic()
            if wait > 0:
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._news.wait()
                continue
            self._sending = self._pulse.take_due(monotonic(), _AT_ONCE)
            await asyncio.gather(*map(self._extend, self._sending))
            for sent in self._sending:
                self._pulse.add(sent)
            self._sending = []

    async def _extend(self, beat: Beat) -> None:
        try:
            async with asyncio.timeout(min(self._timeout, beat.interval)):
                answer = await self._send(beat.call())
        except Exception as error:  # noqa: BLE001  # whatever it is, the body goes on, and so must its heartbeat
            beat.failed(error, monotonic())
        else:
            beat.answered(answer, monotonic())
