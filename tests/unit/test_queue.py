"""The queue of calls that travel together, without anybody who sends them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenlimits import ServiceUnavailable, TrackResult
from tokenlimits._core import workers
from tokenlimits._core.queue import MAX_WAIT, Flight, Lane, Queue, Ticket
from tokenlimits._core.workers import LARGEST, Busy
from tokenlimits.errors import IdempotencyConflict

ANN, BOB = ("0197f0a0-0000-7000-8000-00000000000a", "0197f0a0-0000-7000-8000-00000000000b")
TEAM = "0197f0a0-0000-7000-8000-000000000001"
DOWN = ServiceUnavailable("Supabase is down", retry_after=3)

AnyTicket = Ticket[None]
AnyFlight = Flight[None]


def ticket(key: str, user: str = ANN) -> AnyTicket:
    return Ticket(workers.track(user, "image", 1, key, None, None), None)


def yes(n: int = 1) -> TrackResult:
    return TrackResult(allowed=True, kind="image", cost=n)


def item(**fields: Any) -> dict[str, Any]:
    return {"allowed": True, "reason": None, "kind": "image", "cost": 1, **fields}


def land(queue: Queue[None], flight: AnyFlight, *answers: Any) -> None:
    queue.deliver(flight, answers)
    queue.end(flight)


def take_off(queue: Queue[None]) -> AnyFlight:
    [lane] = queue.ready()
    return queue.take_off(lane)


@pytest.fixture
def queue() -> Queue[None]:
    return Queue()


def joined(queue: Queue[None], *tickets: AnyTicket) -> list[AnyTicket]:
    for each in tickets:
        queue.join(each)
    return list(tickets)


class TestFlights:
    def test_one_at_a_time_in_the_order_of_joining(self, queue: Queue[None]) -> None:
        [first] = joined(queue, ticket("1"))
        flight = take_off(queue)
        others = joined(queue, ticket("2"), ticket("3"))
        assert (list(flight.tickets), queue.ready()) == ([first], [])
        land(queue, flight, yes(1))
        assert first.result() == yes(1)
        assert list(take_off(queue).tickets) == others

    def test_of_a_thousand_at_most(self, queue: Queue[None]) -> None:
        tickets = joined(queue, *(ticket(str(n)) for n in range(LARGEST + 1)))
        flight = take_off(queue)
        assert list(flight.tickets) == tickets[:LARGEST]
        land(queue, flight, *[yes()] * LARGEST)
        assert list(take_off(queue).tickets) == tickets[LARGEST:]

    def test_of_one_is_the_plain_call(self, queue: Queue[None]) -> None:
        [only] = joined(queue, ticket("1"))
        call = take_off(queue).call
        assert (call.function, call.params) == ("track_generation", only.call.params)
        assert call.parse(item(cost=7)) == [yes(7)]

    def test_of_several_is_a_batch(self, queue: Queue[None]) -> None:
        pinned = Ticket(workers.track(BOB, "video", 8, "2", TEAM, {"seconds": 8}), None)
        joined(queue, ticket("1"), pinned)
        call = take_off(queue).call
        assert call.function == "track_generations"
        assert call.retry_safe
        assert call.params["p_max_wait"] == MAX_WAIT
        assert call.params["p_requests"] == [
            {"idempotency_key": "1", "user_id": ANN, "kind": "image", "cost": 1},
            {
                "idempotency_key": "2",
                "user_id": BOB,
                "kind": "video",
                "cost": 8,
                "group_id": TEAM,
                "metadata": {"seconds": 8},
            },
        ]

    def test_are_led_by_the_last_to_join_of_those_aboard(self, queue: Queue[None]) -> None:
        tickets = joined(queue, *(ticket(str(n)) for n in range(LARGEST + 5)))
        [lane] = queue.ready()
        assert queue.leader(lane) is tickets[LARGEST - 1]
        flight = queue.take_off(lane)
        assert flight.leader.leads is flight
        assert [each for each in tickets if each.leads] == [tickets[LARGEST - 1]]
        queue.end(flight)
        assert flight.leader.leads is None


class TestRefusals:
    def test_are_the_error_of_a_single_call(self, queue: Queue[None]) -> None:
        one, two = joined(queue, ticket("1", ANN), ticket("2", BOB))
        flight = take_off(queue)
        refused = item(allowed=False, reason="refused", error="The key was used", code="TL008", detail="usage")
        land(queue, flight, *flight.call.parse([refused, item()]))
        with pytest.raises(IdempotencyConflict, match="The key was used") as raised:
            one.result()
        assert (raised.value.code, raised.value.detail) == ("TL008", "usage")
        assert two.result() == yes()


class TestDetours:
    def busy(self, queue: Queue[None], group: Any, *tickets: AnyTicket) -> None:
        """Let these come back busy, beside one that doesn't."""
        joined(queue, ticket("other"), *tickets)
        flight = take_off(queue)
        answers = flight.call.parse([item(), *[item(allowed=False, reason="busy", group=group)] * len(tickets)])
        land(queue, flight, *answers)
        assert flight.tickets[0].result() == yes()

    def test_are_for_each_group_and_wait_as_long_as_it_takes(self, queue: Queue[None]) -> None:
        one, two, three = ticket("1"), ticket("2", BOB), ticket("3")
        self.busy(queue, {"id": TEAM, "name": "Team"}, one, two)
        self.busy_other(queue, three)
        first, second = (queue.take_off(lane) for lane in queue.ready())
        assert (list(first.tickets), list(second.tickets)) == ([one, two], [three])
        assert (first.call.params["p_max_wait"], second.call.function) == (None, "track_generation")

    def busy_other(self, queue: Queue[None], third: AnyTicket) -> None:
        joined(queue, ticket("other"), third)
        main = next(lane for lane in queue.ready() if lane.key is None)
        land(queue, queue.take_off(main), yes(), Busy("another"))

    def test_are_for_each_user_where_no_group_is_named(self, queue: Queue[None]) -> None:
        one, two, three = ticket("1"), ticket("2", BOB), ticket("3")
        self.busy(queue, None, one, two, three)
        assert [list(queue.take_off(lane).tickets) for lane in queue.ready()] == [[one, three], [two]]

    def test_hold_nobody_back(self, queue: Queue[None]) -> None:
        one, later = ticket("1"), ticket("later")
        self.busy(queue, {"id": TEAM}, one)
        detour = take_off(queue)
        joined(queue, later)
        land(queue, take_off(queue), yes(2))
        assert (later.result(), one.outcome) == (yes(2), None)
        land(queue, detour, yes(3))
        assert one.result() == yes(3)
        assert len(queue._lanes) == 1

    def test_take_those_that_come_later_when_they_are_back(self, queue: Queue[None]) -> None:
        one, two = ticket("1"), ticket("2")
        self.busy(queue, {"id": TEAM}, one)
        detour = take_off(queue)
        self.busy(queue, {"id": TEAM}, two)
        assert queue.ready() == []
        land(queue, detour, yes())
        assert list(take_off(queue).tickets) == [two]

    def test_are_tried_again_where_the_database_gave_up_waiting(self, queue: Queue[None]) -> None:
        one, two = ticket("1"), ticket("2")
        self.busy(queue, {"id": TEAM}, one, two)
        land(queue, take_off(queue), yes(), Busy(TEAM))
        assert one.result() == yes()
        assert list(take_off(queue).tickets) == [two]

    def test_are_not_for_those_who_gave_up(self, queue: Queue[None]) -> None:
        one, two = joined(queue, ticket("1"), ticket("2"))
        flight = take_off(queue)
        queue.give_up(two)
        land(queue, flight, yes(), Busy(TEAM))
        assert one.result() == yes()
        assert (queue.ready(), queue.unfinished()) == ([], [])


class TestFailures:
    def test_give_each_an_error_of_their_own(self, queue: Queue[None]) -> None:
        tickets = joined(queue, ticket("1"), ticket("2"))
        cause = OSError("no route")
        error = ServiceUnavailable("away", code="57P01", retry_after=3)
        error.__cause__ = cause
        flight = take_off(queue)
        queue.fail(flight, error)
        queue.end(flight)
        raised = []
        for each in tickets:
            with pytest.raises(ServiceUnavailable, match="away") as info:
                each.result()
            raised.append(info.value)
            assert (info.value.code, info.value.retry_after, info.value.__cause__) == ("57P01", 3, cause)
        assert len({id(each) for each in (*raised, error)}) == 3

    def test_that_are_not_ours_are_for_the_leader_alone(self, queue: Queue[None]) -> None:
        one, two, gone = joined(queue, ticket("1"), ticket("2"), ticket("3"))
        flight = take_off(queue)
        queue.give_up(gone)
        queue.fail(flight, ZeroDivisionError())
        queue.end(flight)
        with pytest.raises(ZeroDivisionError):
            two.result()
        assert list(take_off(queue).tickets) == [one]

    def test_of_the_leader_send_the_others_again_before_those_who_came_later(self, queue: Queue[None]) -> None:
        one, two, three = joined(queue, ticket("1"), ticket("2"), ticket("3"))
        flight = take_off(queue)
        [later] = joined(queue, ticket("4"))
        queue.give_up(three)
        queue.end(flight)
        again = take_off(queue)
        assert list(again.tickets) == [one, two, later]
        assert again.call.params["p_requests"][:2] == flight.call.params["p_requests"][:2]

    @pytest.mark.parametrize("delivered", range(3))
    def test_in_the_middle_of_the_delivery_lose_nobody(self, queue: Queue[None], delivered: int) -> None:
        """As when the leader's thread is struck in there."""
        tickets = joined(queue, ticket("1"), ticket("2"), ticket("3"))
        flight = take_off(queue)

        def struck() -> Any:
            yield from [yes()] * delivered
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            queue.deliver(flight, struck())
        queue.end(flight)
        assert [each.outcome for each in tickets[:delivered]] == [yes()] * delivered
        assert list(take_off(queue).tickets) == tickets[delivered:]

    def test_are_ended_twice_without_harm(self, queue: Queue[None]) -> None:
        joined(queue, ticket("1"))
        flight = take_off(queue)
        joined(queue, ticket("2"))
        land(queue, flight, yes())
        later = take_off(queue)
        queue.end(flight)
        assert (queue.ready(), queue.unfinished()) == ([], list(later.tickets))


class TestGivingUp:
    def test_before_it_is_sent_takes_it_out(self, queue: Queue[None]) -> None:
        one, two = joined(queue, ticket("1"), ticket("2"))
        queue.give_up(one)
        assert list(take_off(queue).tickets) == [two]

    def test_under_way_leaves_it_there(self, queue: Queue[None]) -> None:
        one, two = joined(queue, ticket("1"), ticket("2"))
        flight = take_off(queue)
        queue.give_up(one)
        assert len(flight.call.params["p_requests"]) == 2
        assert queue.unfinished() == [one, two]
        land(queue, flight, yes(), yes())
        assert queue.unfinished() == []

    def test_of_the_last_leaves_nothing_to_send(self, queue: Queue[None]) -> None:
        [one] = joined(queue, ticket("1"))
        queue.give_up(one)
        assert (queue.ready(), queue.unfinished()) == ([], [])


class TestSettingAside:
    def test_lets_the_others_go_on(self, queue: Queue[None]) -> None:
        [slow] = joined(queue, ticket("1"))
        aside = take_off(queue)
        assert aside.may_be_set_aside
        [other] = joined(queue, ticket("2"))
        queue.set_aside(aside)
        after = take_off(queue)
        assert queue.unfinished() in ([slow, other], [other, slow])
        land(queue, aside, yes(1))
        assert (slow.result(), after.lane.flight) == (yes(1), after)

    def test_is_for_plain_calls_of_the_main_lane(self, queue: Queue[None]) -> None:
        joined(queue, ticket("1"), ticket("2"))
        batch = take_off(queue)
        land(queue, batch, yes(), Busy(TEAM))
        detour = take_off(queue)
        assert (batch.may_be_set_aside, detour.may_be_set_aside) == (False, False)


class Machine(RuleBasedStateMachine):
    """Whatever happens, in whatever order."""

    @initialize()
    def begin(self) -> None:
        self.queue: Queue[None] = Queue()
        self.tickets: list[AnyTicket] = []
        self.under_way: list[AnyFlight] = []
        self.outcomes: dict[AnyTicket, Any] = {}
        self.closing: list[AnyTicket] = []

    @rule(user=st.sampled_from([ANN, BOB]), key=st.sampled_from("12345"))
    def join(self, user: str, key: str) -> None:
        self.tickets.append(ticket(key, user))
        self.queue.join(self.tickets[-1])

    @precondition(lambda self: self.queue.ready())
    @rule(data=st.data())
    def take_off(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(self.queue.ready()))
        leader = self.queue.leader(lane)
        flight = self.queue.take_off(lane)
        assert flight.leader is leader
        numbers = [each.number for each in flight.tickets]
        assert numbers == sorted(set(numbers))
        assert all(number < each.number for number in numbers for each in lane.waiting)
        for each in flight.tickets:
            assert each.wanted
            assert each.outcome is None
            assert all(each not in other.tickets or each.place is not other for other in self.under_way)
        self.under_way.append(flight)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        flight = self._any_flight(data)
        kinds = st.sampled_from(["yes", "busy", "refused"] if flight.lane.key is None else ["yes", "refused"])
        if len(flight.tickets) == 1:
            kinds = st.just("yes")
        answers = [self._answer(data.draw(kinds), n) for n, _ in enumerate(flight.tickets)]
        land(self.queue, flight, *answers)
        assert all(each.outcome or not each.wanted or each.place for each in flight.tickets)

    def _answer(self, kind: str, n: int) -> Any:
        if kind == "busy":
            return Busy([None, TEAM][n % 2])
        return yes() if kind == "yes" else yes().model_copy(update={"reason": "refused", "code": "TL008"})

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), error=st.sampled_from([DOWN, ZeroDivisionError()]))
    def fail(self, data: st.DataObject, error: Exception) -> None:
        flight = self._any_flight(data)
        self.queue.fail(flight, error)
        self.queue.end(flight)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def strike_the_leader(self, data: st.DataObject) -> None:
        flight = self._any_flight(data)
        self.queue.give_up(flight.leader)
        self.queue.end(flight)

    @precondition(lambda self: any(flight.may_be_set_aside for flight in self.under_way))
    @rule(data=st.data())
    def set_aside(self, data: st.DataObject) -> None:
        plain = [flight for flight in self.under_way if flight.may_be_set_aside]
        self.queue.set_aside(data.draw(st.sampled_from(plain)))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.queue.give_up(data.draw(st.sampled_from(self.tickets)))

    @rule()
    def close(self) -> None:
        self.closing = self.queue.unfinished()

    def _any_flight(self, data: st.DataObject) -> AnyFlight:
        return self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))

    @invariant()
    def everybody_has_one_outcome_or_a_place_or_gave_up(self) -> None:
        for each in self.tickets:
            assert (each.outcome is None) or (each.place is None)
            assert each.outcome or each.place or not each.wanted
            if each.outcome is not None:
                assert self.outcomes.setdefault(each, each.outcome) is each.outcome

    @invariant()
    def each_is_where_it_says(self) -> None:
        for each in self.tickets:
            lanes = [lane for lane in self.queue._lanes.values() if each in lane.waiting]
            flights = [flight for flight in self.under_way if each in flight.tickets and each.place is flight]
            assert [*lanes, *flights] == ([] if each.place is None else [each.place])
            assert not isinstance(each.place, Lane) or each.wanted

    @invariant()
    def what_waits_waits_for_something_or_may_go(self) -> None:
        for lane in self.queue._lanes.values():
            assert not lane.waiting or lane.ready or lane.flight in self.under_way
            assert lane.flight is None or lane.flight in self.under_way
            assert lane.key is None or lane.waiting or lane.flight

    @invariant()
    def closed_is_drained(self) -> None:
        unfinished = {each for each in self.tickets if each.place is not None}
        assert set(self.queue.unfinished()) == unfinished
        if unfinished.isdisjoint(self.closing):
            assert all(each.outcome or not each.wanted for each in self.closing)

    def teardown(self) -> None:
        """In the end, everybody who waits gets there."""
        for flight in self.under_way:
            land(self.queue, flight, *[yes()] * len(flight.tickets))
        while ready := self.queue.ready():
            flight = self.queue.take_off(ready[0])
            land(self.queue, flight, *[yes()] * len(flight.tickets))
        assert self.queue.unfinished() == []
        assert all(each.outcome or not each.wanted for each in self.tickets)
        assert len(self.queue._lanes) == 1


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
