"""When each hold is to be extended next, and what to make of the answers: pure, without a clock."""

from __future__ import annotations

import heapq
import logging
import weakref
from itertools import count
from uuid import UUID

from tokenlimits.errors import AlreadySettled, HoldExpired, UsageNotFound
from tokenlimits.models import TrackResult

from . import workers
from .call import Call
from .hold import RunningHold

logger = logging.getLogger("tokenlimits")

# A third: two beats may fail before the hold expires.
_BEATS_PER_TTL = 3
# Seconds until a beat that failed is tried again, at most.
_RETRY = 10.0
# Entries, below which it isn't worth looking for those that are over.
_FEW = 32
_OVER = (AlreadySettled, HoldExpired, UsageNotFound)


class Beat:
    """What keeps one hold alive."""

    def __init__(self, hold: RunningHold, usage_id: UUID, ttl: int, now: float) -> None:
        self.usage_id = usage_id
        self.ttl = ttl
        # weak: a body that was abandoned without an end lets its hold expire
        self._hold = weakref.ref(hold)
        # how often it beats; also how long it waits for an answer, so that a slow one doesn't hold up those of others
        self.interval = ttl / _BEATS_PER_TTL
        # a hold of an earlier call may be about to expire
        self.due = now if hold.replayed else now + self.interval
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether there is nothing left to extend."""
        return self._ended or self._hold() is None

    def call(self) -> Call[TrackResult]:
        """Make the call that extends the hold."""
        return workers.extend(self.usage_id, self.ttl)

    def end(self) -> None:
        """Extend the hold no more."""
        self._ended = True

    def answered(self, answer: TrackResult, now: float) -> None:
        """Take the answer to a call."""
        hold = self._hold()
        if hold is not None:
            hold.extended(answer)
        self.due = now + self.interval

    def failed(self, error: Exception, now: float) -> None:
        """Take the failure of a call: log it, and try again unless the hold is over."""
        if self.over:  # the body has ended meanwhile, and settled the hold
            return
        about = {"usage_id": str(self.usage_id)}
        if isinstance(error, _OVER):
            self.end()
            logger.error("the hold of usage %s can't be extended any more: %s", self.usage_id, error, extra=about)
        else:
            self.due = now + min(self.interval, _RETRY)
            logger.warning("could not extend usage %s, trying again: %s", self.usage_id, error, extra=about)


class Pulse:
    """The beats of one process or event loop, by when they are due."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, Beat]] = []
        self._number = count()
        self._most = _FEW

    def add(self, beat: Beat) -> None:
        """Take in a beat, a new one or one that has been sent."""
        # bodies end long before their next beat is due: forget those before they pile up
        if len(self._queue) >= 2 * self._most:
            self._forget()
        heapq.heappush(self._queue, (beat.due, next(self._number), beat))

    def first(self) -> Beat | None:
        """Return what is due first, if anything is left."""
        while self._queue and self._queue[0][2].over:
            heapq.heappop(self._queue)
        return self._queue[0][2] if self._queue else None

    def take_due(self, now: float, most: int) -> list[Beat]:
        """Take out beats that are due, to send them."""
        beats: list[Beat] = []
        while len(beats) < most and (beat := self.first()) is not None and beat.due <= now:
            heapq.heappop(self._queue)
            beats.append(beat)
        return beats

    def _forget(self) -> None:
        self._queue = [entry for entry in self._queue if not entry[2].over]
        heapq.heapify(self._queue)
        self._most = max(len(self._queue), _FEW)
