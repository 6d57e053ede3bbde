"""The queue of coalesced calls: who waits, what is under way, who gets which answer.

Pure: no locks, no clock, no I/O. Its driver (`_drivers/coalescing.py`) tells it what happened, one thing at a time.

- A *ticket* is the call of one caller. It joins the main lane; its caller gets one outcome, or gives up.
- A *lane* has at most one flight under way; tickets that join meanwhile wait, in order of joining.
- A *flight* is one request for up to 1,000 tickets of a lane. A flight of one is its ticket's plain call.
- The main lane waits for a locked group only for a moment. Tickets of such a group come back busy, with nothing
  recorded, and travel again on a *detour*, a lane for that group, which waits as long as it takes. A plain call can't
  be told to come back, so it is *set aside*: it stays under way, and its lane goes on without it.
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
"""Milliseconds that the main lane waits for a group that somebody else has locked."""


Answer = TrackResult | Busy


class Ticket(Generic[Caller]):
    """The call of one caller; `caller` is how the driver wakes them, `leads` is the flight that is theirs to send."""

    def __init__(self, call: Call[TrackResult], caller: Caller) -> None:
        self.call = call
        self.caller = caller
        # its place in the order of joining, also when it travels again: no newcomer overtakes it
        self.number = 0
        # False once its caller has given up; a ticket under way can't be taken out any more
        self.wanted = True
        self.place: Lane[Caller] | Flight[Caller] | None = None
        self.leads: Flight[Caller] | None = None
        self.outcome: TrackResult | Exception | None = None

    def result(self) -> TrackResult:
        """Return or raise its outcome, which must have come."""
        if isinstance(self.outcome, TrackResult):
            return self.outcome
        raise self.outcome or RuntimeError("it has no outcome yet")


class Lane(Generic[Caller]):
    """What waits and what is under way; `key` is None for the main lane, or the group or user of a detour."""

    def __init__(self, key: tuple[str, str] | None) -> None:
        self.key = key
        # an ordered set: a caller who gives up leaves from the middle
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
        """The ticket whose caller sends it: the last to join, who has the most time left."""
        return self.tickets[-1]

    @property
    def may_be_set_aside(self) -> bool:
        """Whether it is a plain call in the main lane, which may keep others waiting for a lock."""
        return len(self.tickets) == 1 and self.lane.key is None

    @property
    def call(self) -> Call[list[Answer]]:
        """The request, with an answer for each ticket."""
        calls = [ticket.call for ticket in self.tickets]
        if len(calls) == 1:  # exactly what would be sent without coalescing
            return Call(calls[0].function, calls[0].params, lambda answer: [calls[0].parse(answer)])
        return track_together(calls, MAX_WAIT if self.lane.key is None else None)


class Queue(Generic[Caller]):
    """All lanes of one client.

    An exception can strike a driver's thread in the middle of a flight, even while answers are being delivered. So
    `end` lets tickets without an outcome travel again, and repeating it does no harm.
    """

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, str] | None, Lane[Caller]] = {None: Lane(None)}
        self._flights: set[Flight[Caller]] = set()
        self._numbers = count()

    def join(self, ticket: Ticket[Caller]) -> None:
        """Add a ticket to the main lane."""
        ticket.number = next(self._numbers)
        ticket.place = lane = self._lanes[None]
        lane.waiting[ticket] = None

    def ready(self) -> list[Lane[Caller]]:
        """List the lanes in which tickets wait and nothing is under way."""
        return [lane for lane in self._lanes.values() if lane.ready]

    def leader(self, lane: Lane[Caller]) -> Ticket[Caller]:
        """Return the ticket whose caller sends the next flight of a lane that is ready."""
        return lane.next[-1]

    def take_off(self, lane: Lane[Caller]) -> Flight[Caller]:
        """Start the next flight of a lane that is ready."""
        flight = Flight(lane, lane.next)
        # `leads` first: from here on its caller's thread ends the flight, wherever an exception strikes
        flight.leader.leads = flight
        lane.flight = flight
        # kept here as well, since a flight that was set aside is in no lane
        self._flights.add(flight)
        for ticket in flight.tickets:
            ticket.place = flight
            lane.waiting.pop(ticket, None)
        return flight

    def deliver(self, flight: Flight[Caller], answers: Iterable[Answer]) -> None:
        """Give each ticket of a flight its answer; busy ones take a detour, unless their caller has given up."""
        busy: defaultdict[tuple[str, str], list[Ticket[Caller]]] = defaultdict(list)
        for ticket, answer in zip(flight.tickets, answers, strict=True):
            if not isinstance(answer, Busy):
                _settle(ticket, answer.refusal() if answer.reason == "refused" else answer)
            elif ticket.wanted:
                busy[_detour(ticket, answer)].append(ticket)
        for key, tickets in busy.items():
            self._wait(self._lanes.setdefault(key, Lane(key)), tickets)

    def fail(self, flight: Flight[Caller], error: Exception) -> None:
        """Give each ticket of a flight its own copy of the error.

        An error that isn't ours (a time limit of the caller's framework, a bug) is for the leader only.
        """
        tickets = [ticket for ticket in flight.tickets if ticket.wanted]
        if isinstance(error, TokenLimitsError):
            # copies: each thread raises its own, or tracebacks and notes of all callers would end up on one object
            for ticket in tickets:
                _settle(ticket, _copy(error))
        elif tickets:
            _settle(tickets[-1], error)

    def end(self, flight: Flight[Caller]) -> None:
        """Free the lane of a flight, whatever became of it; tickets still aboard wait again, in their old order."""
        aboard = [ticket for ticket in flight.tickets if ticket.place is flight]
        if again := [ticket for ticket in aboard if ticket.wanted]:
            self._wait(flight.lane, again)
        # aboard and unwanted: nobody waits for it, and `drain` must not do so either
        for ticket in flight.tickets:
            if ticket.place is flight:
                ticket.place = None
        self._flights.discard(flight)
        self.set_aside(flight)
        # only now: as long as it is set, the leader's thread repeats this after an exception
        flight.leader.leads = None
        self._forget_if_empty(flight.lane)

    def set_aside(self, flight: Flight[Caller]) -> None:
        """Let the lane go on without a flight that is under way."""
        if flight.lane.flight is flight:  # not if it was set aside before: another one may be under way by now
            flight.lane.flight = None

    def give_up(self, ticket: Ticket[Caller]) -> None:
        """Remove a ticket that still waits; if it is under way, its answer is dropped."""
        ticket.wanted = False
        lane = ticket.place
        if isinstance(lane, Lane):
            lane.waiting.pop(ticket, None)
            ticket.place = None
            self._forget_if_empty(lane)

    def unfinished(self) -> list[Ticket[Caller]]:
        """List the tickets that wait or are under way, including those whose callers have given up."""
        waiting = [ticket for lane in self._lanes.values() for ticket in lane.waiting]
        return waiting + [ticket for flight in self._flights for ticket in flight.tickets if ticket.place is flight]

    def _wait(self, lane: Lane[Caller], tickets: list[Ticket[Caller]]) -> None:
        # sorted, and not in front: tickets may come back from several flights, and from one that was set aside
        for ticket in tickets:
            ticket.place = lane
        lane.waiting = dict.fromkeys(sorted([*tickets, *lane.waiting], key=lambda ticket: ticket.number))

    def _forget_if_empty(self, lane: Lane[Caller]) -> None:
        # a client lives for months, and would collect a lane for each group that was ever locked
        if lane.key is not None and not lane.waiting and lane.flight is None:
            self._lanes.pop(lane.key, None)


def _detour(ticket: Ticket[Any], busy: Busy) -> tuple[str, str]:
    """Return the key of a detour: the group, or the user if the answer doesn't name the group."""
    return ("user", ticket.call.params["p_user_id"]) if busy.group_id is None else ("group", busy.group_id)


def _settle(ticket: Ticket[Any], outcome: TrackResult | Exception) -> None:
    ticket.outcome = outcome
    ticket.place = None


def _copy(error: TokenLimitsError) -> TokenLimitsError:
    own = copy.copy(error)
    own.__cause__ = error.__cause__  # which copying leaves behind
    return own
