"""Both drivers of the queue, over a transport that answers when it is told to."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import count
from types import FrameType
from typing import Any, TypeVar
from uuid import UUID

import pytest
from tests.support.waiting import PATIENCE, eventually

from tokenlimits import AsyncTokenLimits, InvalidRequest, ServiceUnavailable, TokenLimits, TrackResult
from tokenlimits._core import queue as _queue
from tokenlimits._core import workers
from tokenlimits._core.call import Call
from tokenlimits._drivers import coalescing, deadline
from tokenlimits.errors import AccessDenied, IdempotencyConflict
from tokenlimits.senders import AsyncSender, Sender

T = TypeVar("T")

LONG = 600.0
"""Seconds that a call has; no test takes as long."""

ANN = UUID("0197f0a0-0000-7000-8000-00000000000a")
TEAM = "0197f0a0-0000-7000-8000-000000000001"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """By default nothing is set aside, however slow this machine is."""

    def set_(seconds: float) -> None:
        monkeypatch.setattr(coalescing, "_PATIENCE", seconds)

    set_(PATIENCE)
    return set_


class Strike(BaseException):
    """Like KeyboardInterrupt, SystemExit or GreenletExit."""


class Request:
    """One that is on its way."""

    def __init__(self, server: Server, call: Call[Any], timeout: float | None) -> None:
        self.call = call
        self.function = call.function
        self.timeout = timeout
        self.thread = threading.current_thread()
        self._server = server
        params = dict(call.params)
        self.items: list[dict[str, Any]] = params.get("p_requests") or [
            {name.removeprefix("p_"): value for name, value in params.items()}
        ]

    @property
    def costs(self) -> list[int]:
        """The callers of these tests pass costs by which they are known."""
        return [item["cost"] for item in self.items]

    def answered(self) -> Any:
        """Charge each, once for each key, and answer."""
        answers = [self._server.track(item, self.call.params.get("p_max_wait")) for item in self.items]
        return self.call.parse(answers if self.function == "track_generations" else answers[0])


class Server:
    """Charges; some kinds are special."""

    def __init__(self) -> None:
        self.functions: list[str] = []
        self.charged: Counter[tuple[str, str]] = Counter()
        self.locked: dict[str, Any] = {}

    def request(self, call: Call[Any], timeout: float | None) -> Request:
        self.functions.append(call.function)
        return Request(self, call, timeout)

    def track(self, item: dict[str, Any], max_wait: int | None) -> dict[str, Any]:
        kind, key = item["kind"], (item["user_id"], item.get("idempotency_key", ""))
        answer = {"allowed": True, "reason": None, "kind": kind, "cost": item["cost"]}
        if kind in self.locked and max_wait is not None:
            return {**answer, "allowed": False, "reason": "busy", "group": self.locked[kind]}
        if kind == "used":
            return {**answer, "allowed": False, "reason": "refused", "error": "the key was used", "code": "TL008"}
        replayed = key in self.charged
        self.charged[key] = item["cost"]
        return {**answer, "replayed": replayed}

    @property
    def total(self) -> int:
        return self.charged.total()


class Gate(Sender):
    """Holds each request until the test has decided about it."""

    def __init__(self) -> None:
        self.server = Server()
        self.open = False
        self.closed = 0
        self._arrived: queue.Queue[tuple[Request, Future[None]]] = queue.Queue()
        self._under_way: dict[Request, Future[None]] = {}

    def send(self, call: Call[T], timeout: float | None = None) -> T:
        request = self.server.request(call, timeout)
        if not self.open:
            decided: Future[None] = Future()
            self._arrived.put((request, decided))
            decided.result(PATIENCE)
        return request.answered()

    def close(self) -> None:
        self.closed += 1

    def next(self) -> Request:
        request, decided = self._arrived.get(timeout=PATIENCE)
        self._under_way[request] = decided
        return request

    def let(self, request: Request, error: BaseException | None = None) -> None:
        decided = self._under_way.pop(request)
        if error is None:
            decided.set_result(None)
        else:
            decided.set_exception(error)


class Threads:
    """Callers in threads, who are known by their costs."""

    def __init__(self, timeout: float = LONG, **options: Any) -> None:
        self.gate = Gate()
        self.limits = TokenLimits(self.gate, coalesce=True, timeout=timeout, **options)
        self.threads = ThreadPoolExecutor(100)

    def track(self, cost: int, kind: str = "image", **options: Any) -> Future[TrackResult]:
        return self.threads.submit(self.limits.track, ANN, kind, cost, **options)

    def queued(self, cost: int, kind: str = "image", **options: Any) -> Future[TrackResult]:
        """A call that waits for another's request now."""
        before = len(self.unfinished())
        future = self.track(cost, kind, **options)
        eventually(lambda: len(self.unfinished()) > before)
        return future

    def wake(self) -> None:
        """Let all who wait look at the clock."""
        for ticket in self.unfinished():
            ticket.caller.ring()

    def unfinished(self) -> list[Any]:
        meeting = self.limits._coalescer._meeting()  # type: ignore[union-attr]
        with meeting._lock:
            return meeting._queue.unfinished()

    def finish(self) -> None:
        self.gate.open = True
        for request in list(self.gate._under_way):
            self.gate.let(request)
        while not self.gate._arrived.empty():
            self.gate.let(self.gate.next())
        self.threads.shutdown()


@pytest.fixture
def make_threads() -> Iterator[Callable[..., Threads]]:
    made: list[Threads] = []

    def make(**options: Any) -> Threads:
        made.append(Threads(**options))
        return made[-1]

    yield make
    for each in made:
        each.finish()


@pytest.fixture
def let_pass(monkeypatch: pytest.MonkeyPatch, threads: Threads) -> Callable[[float], None]:
    """Let so many seconds of the deadlines pass, which stand still from now on otherwise."""
    begun, passed = deadline.monotonic(), [0.0]
    monkeypatch.setattr(deadline, "monotonic", lambda: begun + sum(passed))

    def let_pass(seconds: float) -> None:
        passed.append(seconds)
        threads.wake()

    return let_pass


@pytest.fixture
def threads(make_threads: Callable[..., Threads]) -> Threads:
    return make_threads()


def result(future: Future[T]) -> T:
    return future.result(PATIENCE)


class Blow:
    """Strikes its thread at the n-th moment at which Python looks whether it should: when a function has begun, or one
    of C has returned."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        ours = frame.f_globals["__name__"] in (coalescing.__name__, _queue.__name__, "threading")
        if ours and event in ("call", "c_return"):
            self.left -= 1
            if self.left == 0:
                raise Strike


def struck_at(moment: int) -> bool:
    """Strike a leader behind whom another caller waits, who is answered all the same; False: it was over before."""
    threads = Threads()
    followers: list[Future[TrackResult]] = []

    def send(call: Call[T], timeout: float | None = None) -> T:
        profile = sys.getprofile()  # None in the follower's thread
        sys.setprofile(None)
        if not followers:
            followers.append(threads.queued(2))
        answer = threads.gate.server.request(call, timeout).answered()
        sys.setprofile(profile)
        return answer

    def lead() -> None:
        sys.setprofile(blow)
        try:
            threads.limits.track(ANN, "image", 1)
        except Strike:
            pass
        finally:
            sys.setprofile(None)

    threads.gate.send = send  # type: ignore[method-assign]
    threads.limits = TokenLimits(threads.gate, coalesce=True)
    blow = Blow(moment)
    leader = threading.Thread(target=lead, daemon=True)
    leader.start()
    leader.join(PATIENCE)
    assert not leader.is_alive()
    for follower in followers or [threads.track(2)]:
        assert follower.result(5), f"struck at moment {moment}"
    threads.limits.close()
    threads.threads.shutdown()
    return blow.left <= 0


class TestThreads:
    def test_a_lone_call_is_a_plain_one(self, threads: Threads) -> None:
        threads.gate.open = True
        for cost in (1, 2):
            assert threads.limits.track(ANN, "image", cost).cost == cost
        assert threads.gate.server.functions == ["track_generation"] * 2

    def test_a_lone_caller_sends_in_their_own_thread(self, threads: Threads) -> None:
        future = threads.track(1)
        request = threads.gate.next()
        assert request.thread in threads.threads._threads
        threads.gate.let(request)
        assert result(future)

    def test_those_who_wait_travel_together(self, threads: Threads) -> None:
        first = threads.track(1)
        alone = threads.gate.next()
        others = [threads.queued(cost) for cost in range(2, 65)]
        before = threading.active_count()
        threads.gate.let(alone)
        together = threads.gate.next()
        assert together.costs == list(range(2, 65))
        threads.gate.let(together)
        assert [result(future).cost for future in (first, *others)] == list(range(1, 65))
        assert threads.gate.server.functions == ["track_generation", "track_generations"]
        assert threading.active_count() <= before

    def test_whoever_has_led_a_flight_goes_home_while_another_leads(self, threads: Threads) -> None:
        first = threads.track(1)
        request = threads.gate.next()
        for cost in range(2, 12, 2):
            futures = [threads.queued(cost), threads.queued(cost + 1)]
            threads.gate.let(request)
            result(first)
            request = threads.gate.next()
            assert request.costs == [cost, cost + 1]
            first = futures[1]
        threads.gate.let(request)
        assert result(first)

    def test_each_has_their_own_error(self, threads: Threads) -> None:
        threads.track(1)
        alone = threads.gate.next()
        one, two, three = threads.queued(2), threads.queued(3, "used"), threads.queued(4)
        threads.gate.let(alone)
        threads.gate.let(threads.gate.next())
        assert (result(one).cost, result(three).cost) == (2, 4)
        with pytest.raises(IdempotencyConflict):
            result(two)

    def test_a_failure_is_everybodys(self, threads: Threads) -> None:
        threads.track(1)
        alone = threads.gate.next()
        futures = [threads.queued(2), threads.queued(3)]
        threads.gate.let(alone)
        error, cause = AccessDenied("the key may not", code="42501"), OSError()
        error.__cause__ = cause
        threads.gate.let(threads.gate.next(), error)
        errors = [future.exception(PATIENCE) for future in futures]
        assert [(type(each), str(each)) for each in errors] == [(AccessDenied, "the key may not")] * 2
        assert [each.__cause__ for each in errors if each] == [cause] * 2
        assert len({id(each) for each in (error, *errors)}) == 3

    def test_a_bad_argument_is_refused_at_once(self, threads: Threads) -> None:
        with pytest.raises(InvalidRequest, match="cost"):
            threads.limits.track(ANN, "image", 0)
        assert threads.gate.server.functions == []

    def test_without_the_service_it_does_as_it_was_told(self, make_threads: Callable[..., Threads]) -> None:
        threads = make_threads(on_unavailable="deny")
        threads.track(1)
        alone = threads.gate.next()
        futures = [threads.queued(2), threads.queued(3)]
        threads.gate.let(alone)
        threads.gate.let(threads.gate.next(), ServiceUnavailable("away"))
        assert [(each.reason, each.cost) for each in map(result, futures)] == [("unavailable", 2), ("unavailable", 3)]

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), Strike(), ZeroDivisionError()], ids=repr)
    def test_a_leader_who_is_struck_hands_over(self, threads: Threads, error: BaseException) -> None:
        threads.track(1)
        alone = threads.gate.next()
        one, two, leader = threads.queued(2), threads.queued(3), threads.queued(4)
        threads.gate.let(alone)
        lost = threads.gate.next()
        later = threads.queued(5)
        lost.answered()  # it had arrived
        threads.gate.let(lost, error)
        again = threads.gate.next()
        assert again.costs == [2, 3, 5]
        assert again.items[:2] == lost.items[:2]
        assert again.thread is not lost.thread
        threads.gate.let(again)
        with pytest.raises(type(error)):
            result(leader)
        assert [result(future).cost for future in (one, two, later)] == [2, 3, 5]
        assert threads.gate.server.total == 1 + 2 + 3 + 4 + 5

    def test_a_leader_who_is_struck_while_giving_the_answers(
        self, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads.track(1)
        alone = threads.gate.next()
        one, two, leader = threads.queued(2), threads.queued(3), threads.queued(4)
        threads.gate.let(alone)
        lost = threads.gate.next()
        meeting: Any = threads.limits._coalescer._meeting()  # type: ignore[union-attr]
        deliver = meeting._queue.deliver

        def struck(flight: Any, answers: list[Any]) -> None:
            monkeypatch.undo()
            deliver(flight, _one_then(answers))

        monkeypatch.setattr(meeting._queue, "deliver", struck)
        threads.gate.let(lost)
        with pytest.raises(Strike):
            result(leader)
        assert result(one).replayed is False
        again = threads.gate.next()
        assert again.costs == [3]
        threads.gate.let(again)
        assert result(two).replayed is True
        assert threads.gate.server.total == 1 + 2 + 3 + 4

    def test_one_who_is_struck_before_they_could_lead(self, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
        threads.track(1)
        alone = threads.gate.next()
        one, leader = threads.queued(2), threads.queued(3)
        ticket = max(threads.unfinished(), key=lambda ticket: ticket.number)
        assert ticket.call.params["p_cost"] == 3

        def struck() -> None:
            raise Strike

        monkeypatch.setattr(ticket.caller, "clear", struck)
        threads.gate.let(alone)
        with pytest.raises(Strike):
            result(leader)
        request = threads.gate.next()
        assert request.costs == [2]
        threads.gate.let(request)
        assert result(one)

    def test_a_leader_who_is_struck_anywhere_holds_nobody_back(self) -> None:
        last = next(moment for moment in count(1) if not struck_at(moment))
        assert last > 30

    def test_whoever_runs_out_of_time_before_it_is_sent_is_never_charged(
        self, threads: Threads, let_pass: Callable[[float], None]
    ) -> None:
        first = threads.track(1)
        alone = threads.gate.next()
        late = threads.queued(2)
        let_pass(LONG)
        with pytest.raises(ServiceUnavailable, match="nothing was recorded") as raised:
            result(late)
        assert isinstance(raised.value.__cause__, TimeoutError)
        threads.gate.let(alone)
        assert result(first)
        assert threads.unfinished() == []
        assert threads.gate.server.total == 1

    def test_whoever_runs_out_of_time_under_way_leaves_the_others_alone(
        self, threads: Threads, let_pass: Callable[[float], None]
    ) -> None:
        threads.track(1)
        alone = threads.gate.next()
        late = threads.queued(2)
        let_pass(100)
        leader = threads.queued(3)
        let_pass(100)
        threads.gate.let(alone)
        together = threads.gate.next()
        assert together.timeout == pytest.approx(LONG - 100)
        let_pass(LONG - 200)
        with pytest.raises(ServiceUnavailable, match="no answer in time"):
            result(late)
        threads.gate.let(together)
        assert result(leader).cost == 3
        assert threads.gate.server.total == 1 + 2 + 3

    def test_a_slow_plain_call_is_set_aside(self, threads: Threads, patience: Callable[[float], None]) -> None:
        patience(0.01)
        slow = threads.track(1)
        aside = threads.gate.next()
        other = threads.track(2)
        request = threads.gate.next()
        threads.gate.let(request)
        assert result(other).cost == 2
        assert not slow.done()
        threads.gate.let(aside)
        assert result(slow).cost == 1

    @pytest.mark.parametrize("group", [{"id": TEAM, "name": "Team"}, None])
    def test_what_is_busy_takes_a_detour(self, threads: Threads, group: Any) -> None:
        threads.gate.server.locked = {"video": group}
        threads.track(1)
        alone = threads.gate.next()
        one, busy, two, also = (threads.queued(cost, kind) for cost, kind in zip(
            range(2, 6), ("image", "video", "image", "video"), strict=True))  # fmt: skip
        threads.gate.let(alone)
        threads.gate.let(threads.gate.next())
        assert [result(one).cost, result(two).cost] == [2, 4]
        detour = threads.gate.next()
        assert (detour.costs, detour.call.params["p_max_wait"]) == ([3, 5], None)
        later = threads.track(6)
        threads.gate.let(threads.gate.next())
        assert result(later).cost == 6
        assert not busy.done()
        threads.gate.let(detour)
        assert [result(busy).cost, result(also).cost] == [3, 5]
        assert threads.gate.server.total == sum(range(1, 7))

    def test_two_calls_with_one_key_are_charged_once(self, threads: Threads) -> None:
        threads.track(1)
        alone = threads.gate.next()
        futures = [threads.queued(2, idempotency_key="job") for _ in range(2)]
        threads.gate.let(alone)
        threads.gate.let(threads.gate.next())
        assert [result(future).replayed for future in futures] == [False, True]
        assert threads.gate.server.total == 1 + 2

    def test_closing_drains(self, threads: Threads) -> None:
        first = threads.track(1)
        alone = threads.gate.next()
        second = threads.queued(2)
        closing = threads.threads.submit(threads.limits.close)
        threads.gate.let(alone)
        assert result(first)
        request = threads.gate.next()
        assert threads.gate.closed == 0
        threads.gate.let(request)
        result(closing)
        assert (result(second).cost, threads.gate.closed) == (2, 1)

    @pytest.mark.slow
    def test_closing_does_not_wait_for_ever_for_a_caller_who_is_gone(
        self, make_threads: Callable[..., Threads]
    ) -> None:
        """Struck twice, say: a second Ctrl-C comes before what the first one left behind was taken away."""
        threads = make_threads(timeout=2)
        threads.gate.open = True
        meeting: Any = threads.limits._coalescer._meeting()  # type: ignore[union-attr]
        gone: Any = _queue.Ticket(workers.track(ANN, "image", 1, None, None, None), coalescing.Bell())
        meeting._queue.join(gone)
        result(threads.threads.submit(threads.limits.close))
        assert threads.limits.track(ANN, "image", 2).cost == 2
        assert threads.unfinished() == []

    def test_closing_waits_for_what_nobody_waits_for_any_more(
        self, threads: Threads, let_pass: Callable[[float], None]
    ) -> None:
        threads.track(1)
        alone = threads.gate.next()
        meeting: Any = threads.limits._coalescer._meeting()  # type: ignore[union-attr]
        queued = {threads.queued(2), threads.queued(3)}
        threads.gate.let(alone)
        together = threads.gate.next()
        let_pass(LONG)
        # either sends for both; the other gives up
        (late,) = wait(queued, PATIENCE, FIRST_COMPLETED).done
        with pytest.raises(ServiceUnavailable):
            result(late)
        closing = threads.threads.submit(threads.limits.close)
        eventually(lambda: meeting._drains)
        assert threads.gate.closed == 0
        threads.gate.let(together)
        result(closing)
        (leader,) = queued - {late}
        assert result(leader)

    def test_closing_doesnt_wait_for_later_calls(self, threads: Threads) -> None:
        first = threads.track(1)
        alone = threads.gate.next()
        meeting: Any = threads.limits._coalescer._meeting()  # type: ignore[union-attr]
        closing = threads.threads.submit(threads.limits.close)
        eventually(lambda: meeting._drains)
        threads.queued(2)
        threads.gate.let(alone)
        result(closing)
        assert result(first)
        assert meeting._drains == set()

    def test_it_goes_on_after_closing(self, threads: Threads) -> None:
        threads.gate.open = True
        with threads.limits as limits:
            assert limits.track(ANN, "image", 1)
        assert limits.track(ANN, "image", 2)
        assert (threads.gate.closed, threads.gate.server.total) == (1, 3)

    def test_only_track_queues(self, threads: Threads) -> None:
        threads.track(1)
        threads.gate.next()
        threads.gate.open = True
        for call in (threads.limits.check, threads.limits.record, threads.limits.reserve):
            assert call(ANN, "image")

    @pytest.mark.parametrize("held", [False, True])
    def test_a_child_begins_with_an_empty_queue(self, threads: Threads, *, held: bool) -> None:
        threads.track(1)
        threads.gate.next()
        threads.queued(2)
        threads.queued(3)
        meeting: Any = threads.limits._coalescer._meeting()  # type: ignore[union-attr]
        if held:
            meeting._lock.acquire()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says that this is dangerous
            child = os.fork()
        if child == 0:
            threads.gate.open = True
            good = False
            try:
                good = threads.limits.track(ANN, "image", 7).cost == 7
                good = good and threads.gate.server.total == 7 and threads.unfinished() == []
            finally:
                os._exit(0 if good else 1)
        if held:
            meeting._lock.release()
        eventually(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(threads.unfinished()) == 3

    def test_many_threads(self, threads: Threads) -> None:
        threads.gate.open = True
        futures = [threads.track(cost) for cost in range(1, 1001)]
        assert [result(future).cost for future in futures] == list(range(1, 1001))
        assert threads.gate.server.total == sum(range(1, 1001))
        assert threads.unfinished() == []


def _one_then(answers: list[Any]) -> Iterator[Any]:
    yield answers[0]
    raise Strike


class AsyncGate(AsyncSender):
    """Holds each request until the test has decided about it."""

    def __init__(self) -> None:
        self.server = Server()
        self.open = False
        self.closed = 0
        self.forget()

    def forget(self) -> None:
        """Forget the loop as well."""
        self._arrived: asyncio.Queue[Request] = asyncio.Queue()
        self._decided: dict[Request, asyncio.Future[None]] = {}

    async def send(self, call: Call[T]) -> T:
        request = self.server.request(call, None)
        if not self.open:
            self._decided[request] = asyncio.get_running_loop().create_future()
            self._arrived.put_nowait(request)
            await self._decided[request]
        await asyncio.sleep(0)
        return request.answered()

    async def aclose(self) -> None:
        self.closed += 1

    async def next(self) -> Request:
        async with asyncio.timeout(PATIENCE):
            return await self._arrived.get()

    def let(self, request: Request, error: BaseException | None = None) -> None:
        if error is None:
            self._decided[request].set_result(None)
        else:
            self._decided[request].set_exception(error)


class Tasks:
    """Callers in tasks, who are known by their costs."""

    def __init__(self, timeout: float = LONG, **options: Any) -> None:
        self.gate = AsyncGate()
        self.limits = AsyncTokenLimits(self.gate, coalesce=True, timeout=timeout, **options)

    def track(self, cost: int, kind: str = "image", **options: Any) -> asyncio.Task[TrackResult]:
        return asyncio.get_running_loop().create_task(self.limits.track(ANN, kind, cost, **options))

    @property
    def meeting(self) -> Any:
        return self.limits._coalescer._meeting()  # type: ignore[union-attr]

    async def first_alone(self, *kinds: str) -> tuple[Request, list[asyncio.Task[TrackResult]]]:
        """A lone call, under way; and those of these kinds, who wait for it."""
        self.track(1)
        alone = await self.gate.next()
        waiting = [self.track(cost, kind) for cost, kind in enumerate(kinds, 2)]
        await asyncio.sleep(0)
        return alone, waiting


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test of the tests' own colour; it must leave no task behind, and no exception unheard of."""

    def run(self: object, tasks: Tasks, patience: Callable[[float], None]) -> None:
        heard: list[Any] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
            await (test(self, tasks, patience) if test.__code__.co_argcount == 3 else test(self, tasks))
            while tasks.meeting._tasks:
                await asyncio.wait(tasks.meeting._tasks)

        asyncio.run(main(), debug=True)
        gc.collect()
        assert heard == []

    run.__name__ = test.__name__
    return run


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


class TestTasks:
    @in_a_loop
    async def test_a_lone_call_is_a_plain_one(self, tasks: Tasks) -> None:
        tasks.gate.open = True
        for cost in (1, 2):
            assert (await tasks.limits.track(ANN, "image", cost)).cost == cost
        assert tasks.gate.server.functions == ["track_generation"] * 2

    @in_a_loop
    async def test_those_who_wait_travel_together(self, tasks: Tasks) -> None:
        alone, waiting = await tasks.first_alone(*["image"] * 255)
        tasks.gate.let(alone)
        together = await tasks.gate.next()
        assert together.costs == list(range(2, 257))
        tasks.gate.let(together)
        assert [each.cost for each in await asyncio.gather(*waiting)] == list(range(2, 257))
        assert tasks.gate.server.functions == ["track_generation", "track_generations"]

    @in_a_loop
    async def test_those_who_come_at_once_are_one_request(self, tasks: Tasks) -> None:
        tasks.gate.open = True
        results = await asyncio.gather(*(tasks.limits.track(ANN, "image", cost) for cost in range(1, 101)))
        assert [each.cost for each in results] == list(range(1, 101))
        assert tasks.gate.server.functions == ["track_generations"]

    @in_a_loop
    async def test_each_has_their_own_error(self, tasks: Tasks) -> None:
        alone, (one, two, three) = await tasks.first_alone("image", "used", "image")
        tasks.gate.let(alone)
        tasks.gate.let(await tasks.gate.next())
        assert ((await one).cost, (await three).cost) == (2, 4)
        with pytest.raises(IdempotencyConflict):
            await two

    @in_a_loop
    async def test_a_failure_is_everybodys(self, tasks: Tasks) -> None:
        alone, waiting = await tasks.first_alone("image", "image")
        tasks.gate.let(alone)
        error, cause = AccessDenied("the key may not", code="42501"), OSError()
        error.__cause__ = cause
        tasks.gate.let(await tasks.gate.next(), error)
        errors: list[Any] = await asyncio.gather(*waiting, return_exceptions=True)
        assert [(type(each), str(each), each.__cause__) for each in errors] == [
            (AccessDenied, "the key may not", cause)
        ] * 2
        assert len({id(each) for each in (error, *errors)}) == 3

    @in_a_loop
    async def test_a_failure_that_isnt_ours_is_one_callers(self, tasks: Tasks) -> None:
        alone, (one, last) = await tasks.first_alone("image", "image")
        tasks.gate.let(alone)
        tasks.gate.let(await tasks.gate.next(), ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await last
        tasks.gate.let(await tasks.gate.next())
        assert (await one).cost == 2

    @in_a_loop
    async def test_a_bad_argument_is_refused_at_once(self, tasks: Tasks) -> None:
        with pytest.raises(InvalidRequest, match="cost"):
            await tasks.limits.track(ANN, "image", 0)
        assert tasks.gate.server.functions == []

    @in_a_loop
    async def test_whoever_is_cancelled_before_it_is_sent_is_never_charged(self, tasks: Tasks) -> None:
        alone, (one, gone, two) = await tasks.first_alone(*["image"] * 3)
        gone.cancel()
        await asyncio.wait([gone])
        tasks.gate.let(alone)
        tasks.gate.let(await tasks.gate.next())
        assert ((await one).cost, (await two).cost, gone.cancelled()) == (2, 4, True)
        assert tasks.gate.server.total == 1 + 2 + 4

    @in_a_loop
    async def test_whoever_is_cancelled_under_way_leaves_the_others_alone(self, tasks: Tasks) -> None:
        alone, waiting = await tasks.first_alone(*["image"] * 3)
        tasks.gate.let(alone)
        together = await tasks.gate.next()
        for gone in (waiting[0], waiting[2]):
            gone.cancel()
        await asyncio.wait([waiting[0], waiting[2]])
        tasks.gate.let(together)
        assert ((await waiting[1]).cost, waiting[0].cancelled(), waiting[2].cancelled()) == (3, True, True)
        assert tasks.gate.server.total == 1 + 2 + 3 + 4
        assert tasks.gate.server.functions == ["track_generation", "track_generations"]

    @in_a_loop
    async def test_a_lone_caller_who_is_cancelled_doesnt_stop_the_request(self, tasks: Tasks) -> None:
        caller = tasks.track(1)
        request = await tasks.gate.next()
        caller.cancel()
        await asyncio.wait([caller])
        tasks.gate.let(request)
        await tasks.limits.aclose()
        assert (caller.cancelled(), tasks.gate.server.total) == (True, 1)

    @in_a_loop
    async def test_whoever_is_cancelled_at_any_moment_is_lost_or_charged_once(self, tasks: Tasks) -> None:
        tasks.gate.open = True
        for steps in range(12):
            before = tasks.gate.server.total
            gone, stays = tasks.track(1), tasks.track(2)
            for _ in range(steps):
                await asyncio.sleep(0)
            gone.cancel()
            [lost, kept] = await asyncio.gather(gone, stays, return_exceptions=True)
            assert isinstance(kept, TrackResult)
            charged = tasks.gate.server.total - before - 2
            assert charged in (0, 1)
            assert isinstance(lost, asyncio.CancelledError) or charged == 1

    @in_a_loop
    async def test_a_flight_that_is_cancelled_goes_again(self, tasks: Tasks) -> None:
        alone, waiting = await tasks.first_alone("image", "image")
        tasks.gate.let(alone)
        lost = await tasks.gate.next()
        lost.answered()  # it had arrived
        [flight] = tasks.meeting._tasks
        flight.cancel()
        again = await tasks.gate.next()
        assert again.items == lost.items
        tasks.gate.let(again)
        assert [each.cost for each in await asyncio.gather(*waiting)] == [2, 3]
        assert tasks.gate.server.total == 1 + 2 + 3

    @in_a_loop
    async def test_a_slow_plain_call_is_set_aside(self, tasks: Tasks, patience: Callable[[float], None]) -> None:
        patience(0.01)
        aside, [other] = await tasks.first_alone("image")
        tasks.gate.let(await tasks.gate.next())
        assert (await other).cost == 2
        tasks.gate.let(aside)

    @in_a_loop
    async def test_what_is_busy_takes_a_detour(self, tasks: Tasks) -> None:
        tasks.gate.server.locked = {"video": {"id": TEAM, "name": "Team"}, "song": None}
        alone, (one, *busy, two) = await tasks.first_alone("image", "video", "song", "video", "image")
        tasks.gate.let(alone)
        tasks.gate.let(await tasks.gate.next())
        assert [(await one).cost, (await two).cost] == [2, 6]
        team, user = await tasks.gate.next(), await tasks.gate.next()
        assert (team.costs, team.call.params["p_max_wait"]) == ([3, 5], None)
        assert (user.costs, user.function) == ([4], "track_generation")
        later = tasks.track(7)
        tasks.gate.let(await tasks.gate.next())
        assert (await later).cost == 7
        assert not any(each.done() for each in busy)
        for detour in (user, team):
            tasks.gate.let(detour)
        assert [each.cost for each in await asyncio.gather(*busy)] == [3, 4, 5]
        assert tasks.gate.server.total == sum(range(1, 8))

    @in_a_loop
    async def test_closing_drains(self, tasks: Tasks) -> None:
        alone, waiting = await tasks.first_alone("image", "image")
        closing = asyncio.create_task(tasks.limits.aclose())
        tasks.gate.let(alone)
        together = await tasks.gate.next()
        waiting[0].cancel()
        await asyncio.wait(waiting, timeout=0)
        assert (closing.done(), tasks.gate.closed) == (False, 0)
        tasks.gate.let(together)
        await closing
        assert ((await waiting[1]).cost, tasks.gate.closed, tasks.meeting._drains) == (3, 1, set())

    @in_a_loop
    async def test_closing_that_is_cancelled_closes(self, tasks: Tasks) -> None:
        alone, _ = await tasks.first_alone()
        closing = asyncio.create_task(tasks.limits.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert (closing.cancelled(), tasks.gate.closed, tasks.meeting._drains) == (True, 1, set())
        tasks.gate.let(alone)

    @in_a_loop
    async def test_it_goes_on_after_closing(self, tasks: Tasks) -> None:
        tasks.gate.open = True
        async with tasks.limits as limits:
            assert await limits.track(ANN, "image", 1)
        assert await limits.track(ANN, "image", 2)
        assert (tasks.gate.closed, tasks.gate.server.total) == (1, 3)


class TestDeadlinesOfTasks:
    def test_before_it_is_sent_and_under_way(self) -> None:
        tasks = Tasks(timeout=1)

        async def main() -> None:
            late = tasks.track(1)
            await tasks.gate.next()
            unsent = tasks.track(2)
            with pytest.raises(ServiceUnavailable, match="no answer in time") as raised:
                await late
            assert isinstance(raised.value.__cause__, TimeoutError)
            with pytest.raises(ServiceUnavailable, match="nothing was recorded"):
                await unsent
            assert len(tasks.meeting._queue.unfinished()) == 1

        asyncio.run(main())
        assert tasks.gate.server.functions == ["track_generation"]

    def test_without_the_service_it_does_as_it_was_told(self) -> None:
        tasks = Tasks(timeout=0.05, on_unavailable="allow")

        async def main() -> list[TrackResult]:
            return await asyncio.gather(tasks.track(1), tasks.track(2))

        assert [(each.reason, each.cost) for each in asyncio.run(main())] == [("unavailable", 1), ("unavailable", 2)]


class TestLoops:
    @pytest.mark.parametrize("close", [False, True])
    def test_one_after_another(self, tasks: Tasks, *, close: bool) -> None:
        tasks.gate.open = True

        async def main() -> list[TrackResult]:
            results = await asyncio.gather(*(tasks.track(cost) for cost in range(1, 4)))
            if close:
                await tasks.limits.aclose()
            return results

        for _ in range(2):
            assert [each.cost for each in asyncio.run(main())] == [1, 2, 3]
        gc.collect()
        assert len(tasks.limits._coalescer._own) == 0  # type: ignore[union-attr]

    def test_that_end_in_the_middle_leave_nothing(self, tasks: Tasks, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            await tasks.first_alone("image", "image")

        asyncio.run(main())
        tasks.gate.forget()
        gc.collect()
        assert len(tasks.limits._coalescer._own) == 0  # type: ignore[union-attr]
        assert caplog.records == []
        tasks.gate.open = True
        assert asyncio.run(tasks.limits.track(ANN, "image", 7)).cost == 7

    def test_two_at_once_dont_meet(self, tasks: Tasks) -> None:
        tasks.gate.open = True
        barrier = threading.Barrier(2)

        async def main(costs: range) -> list[int]:
            barrier.wait()
            return [(await tasks.limits.track(ANN, "image", cost)).cost for cost in costs]

        with ThreadPoolExecutor(2) as threads:
            one, two = threads.map(lambda costs: asyncio.run(main(costs)), [range(1, 101), range(101, 201)])
        assert [*one, *two] == list(range(1, 201))


class TestOff:
    def test_by_default(self) -> None:
        assert TokenLimits()._coalescer is None
        assert AsyncTokenLimits.from_env()._coalescer is None
        assert TokenLimits.from_env(coalesce=True)._coalescer is not None

    @pytest.mark.parametrize("cls", [TokenLimits, AsyncTokenLimits])
    def test_other_values_are_refused(self, cls: Any) -> None:
        with pytest.raises(InvalidRequest, match="coalesce"):
            cls(coalesce="yes")
