"""The queue of calls that travel together: who waits, what is under way, who gets which answer.

Pure: no lock, no clock, no I/O. Whoever drives it (`_coalescing`) tells it what happened, one thing after another.

- A *ticket* is the call of one caller. It joins the main lane, and its caller gets one outcome, or gives up.
- A *lane* has at most one flight under way; what joins it meanwhile waits, in the order of joining.
- A *flight* is one request for up to 1,000 tickets of a lane. A flight of one is the plain call of its ticket.
- The main lane waits for a locked group only for a moment. Tickets of such a group come back busy, with nothing
  recorded, and go again on a *detour*, a lane of that group, which waits as long as it takes. A plain call can't be
  told to come back, so it is *set aside*: it stays under way, and its lane goes on without it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count, islice
from typing import Any, Generic, TypeVar

from tokenlimits.errors import TokenLimitsError
from tokenlimits.models import TrackResult

from .call import Call
from .workers import LARGEST, Busy, track_together

Caller = TypeVar("Caller")

MAX_WAIT = 250
"""Milliseconds that the main lane waits for a group that somebody else holds locked."""


Answer = TrackResult | Busy


class Ticket(Generic[Caller]):
    """The call of one caller; `caller` is how its driver wakes them, `leads` the flight that is theirs to send."""

    def __init__(self, call: Call[TrackResult], caller: Caller) -> None:
        self.call = call
        self.caller = caller
        self.number = 0
        self.wanted = True
        self.place: Lane[Caller] | Flight[Caller] | None = None
        self.leads: Flight[Caller] | None = None
        self.outcome: TrackResult | Exception | None = None

    def result(self) -> TrackResult:
        """Answer, or raise, what came of it, once it has come."""
        if isinstance(self.outcome, TrackResult):
            return self.outcome
        raise self.outcome or RuntimeError("it has no outcome yet")


class Lane(Generic[Caller]):
    """What waits, and what is under way; `key` is None in the main lane, else whom the detour is for."""

    def __init__(self, key: tuple[str, str] | None) -> None:
        self.key = key
        self.waiting: dict[Ticket[Caller], None] = {}
        self.flight: Flight[Caller] | None = None

    @property
    def ready(self) -> bool:
        """Whether a flight can take off."""
        return bool(self.waiting) and self.flight is None

    @property
    def next(self) -> list[Ticket[Caller]]:
        """The tickets of the next flight."""
        return list(islice(self.waiting, LARGEST))


class Flight(Generic[Caller]):
    """One request for all its tickets."""

    def __init__(self, lane: Lane[Caller], tickets: Sequence[Ticket[Caller]]) -> None:
        self.lane = lane
        self.tickets = tickets

    @property
    def leader(self) -> Ticket[Caller]:
        """Whose caller sends it: the last of them to join, who has the most time left."""
        return self.tickets[-1]

    @property
    def may_be_set_aside(self) -> bool:
        """Whether it is a plain call that others may come to wait for."""
        return len(self.tickets) == 1 and self.lane.key is None

    @property
    def call(self) -> Call[list[Answer]]:
        """The request, with an answer for each ticket."""
        calls = [ticket.call for ticket in self.tickets]
        if len(calls) == 1:
            return Call(calls[0].function, calls[0].params, lambda answer: [calls[0].parse(answer)])
        return track_together(calls, MAX_WAIT if self.lane.key is None else None)


class Queue(Generic[Caller]):
    """All lanes of one client.

    A driver's thread may be struck by an exception in the middle of a flight, even while the answers are given: `end`
    lets those go again who have none, and does no harm when repeated.
    """

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, str] | None, Lane[Caller]] = {None: Lane(None)}
        self._flights: set[Flight[Caller]] = set()
        self._numbers = count()

    def join(self, ticket: Ticket[Caller]) -> None:
        """Let a ticket wait in the main lane."""
        ticket.number = next(self._numbers)
        ticket.place = lane = self._lanes[None]
        lane.waiting[ticket] = None

    def ready(self) -> list[Lane[Caller]]:
        """List the lanes in which something waits and nothing is under way."""
        return [lane for lane in self._lanes.values() if lane.ready]

    def leader(self, lane: Lane[Caller]) -> Ticket[Caller]:
        """Say whose caller sends the next flight of a lane that is ready."""
        return lane.next[-1]

    def take_off(self, lane: Lane[Caller]) -> Flight[Caller]:
        """Begin the next flight of a lane that is ready."""
        flight = Flight(lane, lane.next)
        flight.leader.leads = flight
        lane.flight = flight
        self._flights.add(flight)
        for ticket in flight.tickets:
            ticket.place = flight
            lane.waiting.pop(ticket, None)
        return flight

    def deliver(self, flight: Flight[Caller], answers: Iterable[Answer]) -> None:
        """Give each ticket of a flight its answer; what is busy goes on a detour, if anybody still wants it."""
        busy: defaultdict[tuple[str, str], list[Ticket[Caller]]] = defaultdict(list)
        for ticket, answer in zip(flight.tickets, answers, strict=True):
            if not isinstance(answer, Busy):
                _settle(ticket, answer.refusal() if answer.reason == "refused" else answer)
            elif ticket.wanted:
                busy[_detour(ticket, answer)].append(ticket)
        for key, tickets in busy.items():
            self._wait(self._lanes.setdefault(key, Lane(key)), tickets)

    def fail(self, flight: Flight[Caller], error: Exception) -> None:
        """Give each ticket of a flight an error of its own.

        One that isn't ours (a time limit of the caller's own framework, a bug) is for the leader alone.
        """
        tickets = [ticket for ticket in flight.tickets if ticket.wanted]
        if isinstance(error, TokenLimitsError):
            for ticket in tickets:
                _settle(ticket, _copy(error))
        elif tickets:
            _settle(tickets[-1], error)

    def end(self, flight: Flight[Caller]) -> None:
        """Free the lane of a flight, whatever became of it: who is still aboard waits again, in their old order."""
        aboard = [ticket for ticket in flight.tickets if ticket.place is flight]
        if again := [ticket for ticket in aboard if ticket.wanted]:
            self._wait(flight.lane, again)
        for ticket in flight.tickets:
            if ticket.place is flight:
                ticket.place = None
        self._flights.discard(flight)
        self.set_aside(flight)
        flight.leader.leads = None
        self._forget_if_empty(flight.lane)

    def set_aside(self, flight: Flight[Caller]) -> None:
        """Let the lane go on without a flight that is under way."""
        if flight.lane.flight is flight:
            flight.lane.flight = None

    def give_up(self, ticket: Ticket[Caller]) -> None:
        """Take a ticket out if it still waits; if it is under way, its answer goes nowhere."""
        ticket.wanted = False
        lane = ticket.place
        if isinstance(lane, Lane):
            lane.waiting.pop(ticket, None)
            ticket.place = None
            self._forget_if_empty(lane)

    def unfinished(self) -> list[Ticket[Caller]]:
        """List all that waits or is under way, also what nobody wants any more."""
        waiting = [ticket for lane in self._lanes.values() for ticket in lane.waiting]
        return waiting + [ticket for flight in self._flights for ticket in flight.tickets if ticket.place is flight]

    def _wait(self, lane: Lane[Caller], tickets: list[Ticket[Caller]]) -> None:
        for ticket in tickets:
            ticket.place = lane
        lane.waiting = dict.fromkeys(sorted([*tickets, *lane.waiting], key=lambda ticket: ticket.number))

    def _forget_if_empty(self, lane: Lane[Caller]) -> None:
        if lane.key is not None and not lane.waiting and lane.flight is None:
            self._lanes.pop(lane.key, None)


def _detour(ticket: Ticket[Any], busy: Busy) -> tuple[str, str]:
    """Name the detour of a group, or of a user where nobody knows which group it was."""
    return ("user", ticket.call.params["p_user_id"]) if busy.group_id is None else ("group", busy.group_id)


def _settle(ticket: Ticket[Any], outcome: TrackResult | Exception) -> None:
    ticket.outcome = outcome
    ticket.place = None


def _copy(error: TokenLimitsError) -> TokenLimitsError:
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    return own
