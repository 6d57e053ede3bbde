"""Drives the queue of coalesced calls, in threads and in event loops; whoever makes a driver says how it sends."""

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

# Seconds after which a plain call is set aside: it holds back those behind it no longer than a locked group would.
_PATIENCE = MAX_WAIT / 1000


def _too_late(ticket: Ticket[Any], seconds: float) -> ServiceUnavailable:
    sent = isinstance(ticket.place, Flight)
    reason = "no answer in time" if sent else "the requests before it took too long; nothing was recorded"
    error = retry.give_up(ticket.call.function, retry.Transient(reason), seconds)
    # as for a call that was sent alone: its cause is a timeout, not our internal `Transient`
    error.__cause__ = TimeoutError(reason)
    return error


class Bell:
    """Wakes one thread: once it has been rung, the next `wait` returns, and it is silent again.

    An exception can strike a thread anywhere (Ctrl-C, a time limit). In the middle of a `threading.Event`, which is
    written in Python, it leaves the event's lock locked, and whoever sets the event hangs forever. This is one lock,
    written in C, which can't be left half locked.
    """

    def __init__(self) -> None:
        # held while silent; any thread may release it, unlike an RLock
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake the thread that waits, or will wait."""
        with suppress(RuntimeError):  # it was already ringing
            self._silence.release()

    def wait(self, seconds: float) -> bool:
        """Wait until it rings; return False if it did not in time."""
        return self._silence.acquire(timeout=seconds)

    def clear(self) -> None:
        """Make it silent."""
        self._silence.acquire(blocking=False)


class Coalescer:
    """Coalesces the calls of many threads. The callers do all the work.

    There is no thread of its own: a worker would not survive a fork, would have to be stopped, and would make a lone
    call pay for two switches.
    """

    def __init__(self, send: Send, timeout: float) -> None:
        self._send = send
        self._timeout = timeout
        # by fork: those who wait in the parent don't exist in the child, and its lock may be held by one of them
        self._own: dict[int, _Meeting] = {}

    def send(self, call: Call[TrackResult]) -> TrackResult:
        """Send a call, alone or with others."""
        return self._meeting().attend(Ticket(call, Bell()), Deadline(self._timeout))

    def drain(self) -> None:
        """Wait until the calls that are queued or under way now have their answers."""
        self._meeting().drain(Deadline(self._timeout))

    def _meeting(self) -> _Meeting:
        with sessions.lock():
            meeting = self._own.get(sessions.forks())
            if meeting is None:
                meeting = self._own[sessions.forks()] = _Meeting(self._send)
            return meeting


class _Meeting:
    """Where the threads of one process meet.

    A caller who finds a lane ready and is its leader sends the flight; whoever made the lane ready has woken them.
    Nobody is appointed to lead: a caller who dies before they could do so leaves it to the next.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        # for the queue, which is pure; held only for moments and never while sending, as others queue meanwhile
        self._lock = threading.Lock()
        self._queue = Queue[Bell]()
        self._drains: set[Bell] = set()

    def attend(self, ticket: Ticket[Bell], deadline: Deadline) -> TrackResult:
        """Wait for the outcome of a ticket, and send the flights that its caller leads meanwhile."""
        try:
            with self._lock:
                self._queue.join(ticket)
            while ticket.outcome is None:
                self._step(ticket, deadline)
        except BaseException:
            # Also KeyboardInterrupt and the like: nobody else would end the flight that this caller leads, and its lane
            # would stand still. To end a flight twice does no harm, so it doesn't matter where the exception struck.
            with self._lock:
                self._queue.give_up(ticket)
                if ticket.leads is not None:
                    self._end(ticket.leads)
                self._wake_others()
            raise
        return ticket.result()

    def drain(self, deadline: Deadline) -> None:
        """Wait until the calls of this moment are over, or until the deadline.

        A caller who was struck twice may have left a ticket that nobody will ever finish.
        """
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
        """Send the flight that is this caller's to lead, or wait for news."""
        if deadline.is_over():
            raise _too_late(ticket, deadline.elapsed())
        news = ticket.caller
        news.clear()  # before looking at the queue: a ring after this is news that the look may have missed
        with self._lock:
            lane = ticket.place
            if isinstance(lane, Lane) and lane.ready and self._queue.leader(lane) is ticket:
                self._queue.take_off(lane)
            ahead = lane.flight if isinstance(lane, Lane) else None
        # without the lock from here on: others join, and get answers, while this one sends or waits
        if ticket.leads is not None:
            self._fly(ticket.leads, deadline)
        elif ahead is not None and ahead.may_be_set_aside:
            # a plain call can't be told to come back busy, and its thread is in the request: only those who wait
            # behind it can let the lane go on
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
        except Exception as error:  # noqa: BLE001  # the queue passes it on to the callers
            with self._lock:
                self._queue.fail(flight, error)
                self._end(flight)
        else:
            with self._lock:
                self._queue.deliver(flight, answers)
                self._end(flight)

    def _end(self, flight: Flight[Bell]) -> None:
        """Free the lane, even if the leader was struck midway: tickets without an outcome travel again."""
        # Ring before `end`, which clears `leads`: if an exception struck between the two in the other order, nobody
        # would know that this flight's callers still sleep. Those who wake need the lock, so they look only afterwards.
        for ticket in flight.tickets:
            ticket.caller.ring()
        self._queue.end(flight)
        self._wake_others()

    def _wake_others(self) -> None:
        # not only the lane of this flight: busy tickets may have made a detour ready
        for lane in self._queue.ready():
            self._queue.leader(lane).caller.ring()
        for drain in self._drains:
            drain.ring()


class AsyncCoalescer:
    """Coalesces the calls of many tasks, separately in each event loop."""

    def __init__(self, send: AsyncSend, timeout: float) -> None:
        self._send = send
        self._timeout = timeout
        # weak: each asyncio.run() has a loop of its own, which must be collected with all that waits in it
        self._own: WeakKeyDictionary[asyncio.AbstractEventLoop, _AsyncMeeting] = WeakKeyDictionary()

    async def send(self, call: Call[TrackResult]) -> TrackResult:
        """Send a call, alone or with others."""
        return await self._meeting().attend(Ticket(call, asyncio.Event()), self._timeout)

    async def drain(self) -> None:
        """Wait until the calls that are queued or under way now have their answers."""
        await self._meeting().drain()

    def _meeting(self) -> _AsyncMeeting:
        loop = asyncio.get_running_loop()
        # the lock, since loops of several threads share this dictionary
        with sessions.lock():
            meeting = self._own.get(loop)
            # a child may go on with the parent's loop, but the parent's requests will be answered in the parent
            if meeting is None or meeting.forks != sessions.forks():
                meeting = self._own[loop] = _AsyncMeeting(self._send)
            return meeting


class _AsyncMeeting:
    """Where the tasks of one event loop meet; it needs no lock, as it awaits nothing between two steps of the queue.

    A flight is a task of its own, so that it survives when a caller is cancelled. It takes off only after the loop has
    run everything that is ready: calls that are made at the same time all catch the first flight.
    """

    def __init__(self, send: AsyncSend) -> None:
        self.forks = sessions.forks()
        self._send = send
        self._queue = Queue[asyncio.Event]()
        self._boarding: set[Lane[asyncio.Event]] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop has only weak references to its tasks
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
            # also when the task is cancelled: what still waits must not be sent, as nobody would learn of the charge
            self._queue.give_up(ticket)
            self._tell_drains()
        return ticket.result()

    async def drain(self) -> None:
        """Wait until the calls of this moment are over; each flight ends in time, as the transport has a deadline."""
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
                # not at once: the other callers of this turn of the loop have yet to join
                asyncio.get_running_loop().call_soon(self._take_off, lane)

    def _take_off(self, lane: Lane[asyncio.Event]) -> None:
        self._boarding.discard(lane)
        if lane.ready:  # all of its callers may have been cancelled since
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
        except Exception as error:  # noqa: BLE001  # the queue passes it on to the callers
            self._queue.fail(flight, error)
        finally:
            if timer is not None:
                timer.cancel()

    def _set_aside(self, flight: Flight[asyncio.Event]) -> None:
        self._queue.set_aside(flight)
        self._board()

    def _end(self, flight: Flight[asyncio.Event], task: asyncio.Task[None]) -> None:
        """Wake those who have an outcome; if the flight's task was cancelled, the others travel again."""
        # a callback of the task, as a task that is cancelled before its first step never runs its own `finally`
        self._tasks.discard(task)
        if not task.cancelled():
            # KeyboardInterrupt or SystemExit, which the loop has raised itself; unasked for, asyncio would log it too
            task.exception()
        self._queue.end(flight)
        for ticket in flight.tickets:
            if ticket.outcome is not None:
                ticket.caller.set()
        self._board()
        self._tell_drains()

    def _tell_drains(self) -> None:
        for drain in self._drains:
            drain.set()
