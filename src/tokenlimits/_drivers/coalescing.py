"""Drives the queue of calls that travel together, for each colour; what sends the requests is given to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from tokenlimits._core import retry
from tokenlimits._core.call import Call
from tokenlimits._core.queue import MAX_WAIT, Answer, Flight, Lane, Queue, Ticket
from tokenlimits.errors import ServiceUnavailable
from tokenlimits.models import TrackResult

from . import sessions
from .deadline import Deadline

Send = Callable[[Call[list[Answer]], float], list[Answer]]
AsyncSend = Callable[[Call[list[Answer]]], Coroutine[Any, Any, list[Answer]]]

# what a lock may cost those behind it costs a plain call as well, see `Queue.set_aside`
_PATIENCE = MAX_WAIT / 1000


def _too_late(ticket: Ticket[Any], seconds: float) -> ServiceUnavailable:
    sent = isinstance(ticket.place, Flight)
    reason = "no answer in time" if sent else "the requests before it took too long; nothing was recorded"
    error = retry.give_up(ticket.call.function, retry.Transient(reason), seconds)
    error.__cause__ = TimeoutError(reason)
    return error


class Bell:
    """Wakes one thread: once rung, the next `wait` returns, and it is silent again.

    An exception may strike a thread anywhere (Ctrl-C, a time limit). In the middle of a `threading.Event` it leaves
    that one's lock locked, and whoever sets it then hangs for ever. This is one lock of C, which can't be half locked.
    """

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake who waits, or who will."""
        with suppress(RuntimeError):  # it was ringing already
            self._silence.release()

    def wait(self, seconds: float) -> bool:
        """Wait until it rings; False when it did not in time."""
        return self._silence.acquire(timeout=seconds)

    def clear(self) -> None:
        """Let it be silent."""
        self._silence.acquire(blocking=False)


class Coalescer:
    """Lets the calls of many threads travel together. The callers do all the work; no thread is started."""

    def __init__(self, send: Send, timeout: float) -> None:
        self._send = send
        self._timeout = timeout
        # by fork: those who wait in the parent are no business of the child's
        self._own: dict[int, _Meeting] = {}

    def send(self, call: Call[TrackResult]) -> TrackResult:
        """Send a call, alone or with others."""
        return self._meeting().attend(Ticket(call, Bell()), Deadline(self._timeout))

    def drain(self) -> None:
        """Wait until all calls of this moment have their answers."""
        self._meeting().drain(Deadline(self._timeout))

    def _meeting(self) -> _Meeting:
        with sessions.lock():
            meeting = self._own.get(sessions.forks())
            if meeting is None:
                meeting = self._own[sessions.forks()] = _Meeting(self._send)
            return meeting


class _Meeting:
    """Where the threads of one process meet.

    Whoever finds a lane ready and is its leader sends the flight; whoever made it ready has woken the leader. So
    nobody is bound to lead: a caller who dies before they could leaves it to the next.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._queue = Queue[Bell]()
        self._drains: set[Bell] = set()

    def attend(self, ticket: Ticket[Bell], deadline: Deadline) -> TrackResult:
        """Wait for the outcome of a ticket, and send the flights that fall to its caller meanwhile."""
        try:
            with self._lock:
                self._queue.join(ticket)
            while ticket.outcome is None:
                self._step(ticket, deadline)
        except BaseException:
            with self._lock:
                self._queue.give_up(ticket)
                if ticket.leads is not None:
                    self._end(ticket.leads)
                self._wake_others()
            raise
        return ticket.result()

    def drain(self, deadline: Deadline) -> None:
        """Wait until all calls of this moment are over; those that aren't in time have nobody who waits for them."""
        changed = Bell()
        with self._lock:
            tickets = self._queue.unfinished()
            self._drains.add(changed)
        try:
            while any(ticket.place is not None for ticket in tickets) and not deadline.is_over():
                changed.wait(deadline.left())
        finally:
            with self._lock:
                self._drains.discard(changed)

    def _step(self, ticket: Ticket[Bell], deadline: Deadline) -> None:
        """Lead, or wait for news."""
        if deadline.is_over():
            raise _too_late(ticket, deadline.elapsed())
        news = ticket.caller
        news.clear()  # before looking: news of after that isn't lost
        with self._lock:
            lane = ticket.place
            if isinstance(lane, Lane) and lane.ready and self._queue.leader(lane) is ticket:
                self._queue.take_off(lane)
            ahead = lane.flight if isinstance(lane, Lane) else None
        if ticket.leads is not None:
            self._fly(ticket.leads, deadline)
        elif ahead is not None and ahead.may_be_set_aside:
            if not news.wait(min(_PATIENCE, deadline.left())):
                with self._lock:
                    self._queue.set_aside(ahead)
                    self._wake_others()
        elif ticket.outcome is None:
            news.wait(deadline.left())

    def _fly(self, flight: Flight[Bell], deadline: Deadline) -> None:
        """Send a flight for as long as its leader has time, which is longer than the others have."""
        try:
            answers = self._send(flight.call, deadline.left())
        except Exception as error:  # noqa: BLE001  # it goes to those whom it concerns
            with self._lock:
                self._queue.fail(flight, error)
                self._end(flight)
        else:
            with self._lock:
                self._queue.deliver(flight, answers)
                self._end(flight)

    def _end(self, flight: Flight[Bell]) -> None:
        """Free the lane, also when the leader was struck in the middle: who has no outcome yet goes again."""
        for ticket in flight.tickets:
            ticket.caller.ring()
        self._queue.end(flight)
        self._wake_others()

    def _wake_others(self) -> None:
        for lane in self._queue.ready():
            self._queue.leader(lane).caller.ring()
        for drain in self._drains:
            drain.ring()


class AsyncCoalescer:
    """Lets the calls of many tasks travel together, in each event loop its own."""

    def __init__(self, send: AsyncSend, timeout: float) -> None:
        self._send = send
        self._timeout = timeout
        self._own: WeakKeyDictionary[asyncio.AbstractEventLoop, _AsyncMeeting] = WeakKeyDictionary()

    async def send(self, call: Call[TrackResult]) -> TrackResult:
        """Send a call, alone or with others."""
        return await self._meeting().attend(Ticket(call, asyncio.Event()), self._timeout)

    async def drain(self) -> None:
        """Wait until all calls of this moment have their answers."""
        await self._meeting().drain()

    def _meeting(self) -> _AsyncMeeting:
        loop = asyncio.get_running_loop()
        with sessions.lock():
            meeting = self._own.get(loop)
            if meeting is None or meeting.forks != sessions.forks():
                meeting = self._own[loop] = _AsyncMeeting(self._send)
            return meeting


class _AsyncMeeting:
    """Where the tasks of one event loop meet. Flights are tasks of their own, so no caller's end is theirs.

    A flight takes off when the loop has let all run that could: calls that are made at once all catch the first.
    """

    def __init__(self, send: AsyncSend) -> None:
        self.forks = sessions.forks()
        self._send = send
        self._queue = Queue[asyncio.Event]()
        self._boarding: set[Lane[asyncio.Event]] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself would let them be collected
        self._drains: set[asyncio.Event] = set()

    async def attend(self, ticket: Ticket[asyncio.Event], timeout: float) -> TrackResult:  # noqa: ASYNC109  # it knows why
        """Wait for the outcome of a ticket."""
        try:
            self._queue.join(ticket)
            self._board()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await ticket.caller.wait()
            if ticket.outcome is None:
                raise _too_late(ticket, timeout)
        finally:
            self._queue.give_up(ticket)
            self._tell_drains()
        return ticket.result()

    async def drain(self) -> None:
        """Wait until all calls of this moment are over."""
        changed = asyncio.Event()
        tickets = self._queue.unfinished()
        self._drains.add(changed)
        try:
            while any(ticket.place is not None for ticket in tickets):
                await changed.wait()
                changed.clear()
        finally:
            self._drains.discard(changed)

    def _board(self) -> None:
        for lane in self._queue.ready():
            if lane not in self._boarding:
                self._boarding.add(lane)
                asyncio.get_running_loop().call_soon(self._take_off, lane)

    def _take_off(self, lane: Lane[asyncio.Event]) -> None:
        self._boarding.discard(lane)
        if lane.ready:  # somebody still wants it
            flight = self._queue.take_off(lane)
            task = asyncio.get_running_loop().create_task(self._fly(flight))
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._end(flight, task))

    async def _fly(self, flight: Flight[asyncio.Event]) -> None:
        timer = None
        if flight.may_be_set_aside:
            timer = asyncio.get_running_loop().call_later(_PATIENCE, self._set_aside, flight)
        try:
            self._queue.deliver(flight, await self._send(flight.call))
        except Exception as error:  # noqa: BLE001  # it goes to those whom it concerns
            self._queue.fail(flight, error)
        finally:
            if timer is not None:
                timer.cancel()

    def _set_aside(self, flight: Flight[asyncio.Event]) -> None:
        self._queue.set_aside(flight)
        self._board()

    def _end(self, flight: Flight[asyncio.Event], task: asyncio.Task[None]) -> None:
        """Wake who has an outcome; the others go again, for the flight's task was cancelled."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # KeyboardInterrupt or SystemExit, which the loop has raised
        self._queue.end(flight)
        for ticket in flight.tickets:
            if ticket.outcome is not None:
                ticket.caller.set()
        self._board()
        self._tell_drains()

    def _tell_drains(self) -> None:
        for drain in self._drains:
            drain.set()
