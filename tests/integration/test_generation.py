"""However a body of work ends, the ledger says what is true of it: on the real stack, in both colours."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import psycopg
import pytest
from supabase import AsyncClient, AsyncClientOptions
from tests.support import clock
from tests.support.hammer import supabase_client
from tests.support.invariants import drift
from tests.support.postgres import PostgresServer, servers
from tests.support.waiting import PATIENCE, eventually

from tokenlimits import (
    AsyncTokenLimits,
    ConfigurationError,
    GenerationDenied,
    GroupManager,
    Hold,
    InvalidRequest,
    LimitExceeded,
    NoLimitForKind,
    NotInGroup,
    ServiceUnavailable,
    TokenLimits,
)
from tokenlimits.errors import AlreadySettled, HoldExpired, IdempotencyConflict, UsageNotFound
from tokenlimits.local import LocalStack

MAX = 10


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(servers()["18"]) as server:
        server.create_database("app")
        yield server


@pytest.fixture(scope="module")
def stack(server: PostgresServer) -> Iterator[LocalStack]:
    with LocalStack(database_url=server.url("app")) as stack:
        with server.connect("app") as owner:
            clock.install(owner)
        yield stack


@pytest.fixture
def owner(server: PostgresServer, stack: LocalStack) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.url("app"), autocommit=True) as connection:
        yield connection
        assert drift(connection) == []


@pytest.fixture
def limits(stack: LocalStack) -> Iterator[TokenLimits]:
    with supabase_client(stack.url, stack.secret_key) as client:
        yield TokenLimits(client, timeout=PATIENCE)


@pytest.fixture
def groups(stack: LocalStack) -> Iterator[GroupManager]:
    with supabase_client(stack.url, stack.secret_key) as client:
        yield GroupManager(client, timeout=PATIENCE)


@pytest.fixture
def user(stack: LocalStack, groups: GroupManager) -> UUID:
    """Somebody who may use 10 of `video`."""
    (user,) = stack.create_users(1)
    group = groups.create(str(uuid4()), limits={"video": MAX})
    groups.add_member(group.id, user)
    return user


@pytest.fixture
def ledger(owner: psycopg.Connection[Any], user: UUID) -> Callable[[], list[tuple[str, int]]]:
    """Read the user's usages."""

    def read() -> list[tuple[str, int]]:
        query = "select status, cost from public.generation_usage where user_id = %s order by id"
        return owner.execute(query, [user]).fetchall()

    return read


Ledger = Callable[[], list[tuple[str, int]]]


@pytest.fixture
def let_pass(owner: psycopg.Connection[Any]) -> Callable[[int], None]:
    """Let so many seconds pass in the database."""
    return lambda seconds: clock.run_from(owner, clock.read(owner) + timedelta(seconds=seconds))


LetPass = Callable[[int], None]


@asynccontextmanager
async def async_limits(stack: LocalStack) -> AsyncIterator[AsyncTokenLimits]:
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=60) as http:
        client = AsyncClient(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http))
        yield AsyncTokenLimits(client, timeout=PATIENCE)


class Colour:
    """Runs a body inside of a generation of one colour."""

    def __init__(self, name: str, stack: LocalStack, limits: TokenLimits, user: UUID) -> None:
        self.name, self.stack, self.limits, self.user = name, stack, limits, user
        self.transport: Any = None
        """What the calls of the generation go by."""

    def generate(self, body: Callable[[Hold], object] = lambda hold: None, **options: Any) -> Hold:
        arguments = {"user_id": self.user, "kind": "video", "cost": 8} | options
        if self.name == "async":
            return asyncio.run(self._agenerate(body, arguments))
        limits = TokenLimits(self.limits._transport._foreign, timeout=PATIENCE)
        self.transport = limits._transport
        with limits.generation(**arguments) as hold:
            body(hold)
        return hold

    async def _agenerate(self, body: Callable[[Hold], object], arguments: dict[str, Any]) -> Hold:
        async with async_limits(self.stack) as limits:
            self.transport = limits._transport
            async with limits.generation(**arguments) as hold:
                body(hold)
            return hold

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with async_limits(self.stack) as limits:
                return await getattr(limits, method)(*args, **kwargs)

        return asyncio.run(run()) if self.name == "async" else getattr(self.limits, method)(*args, **kwargs)


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest, stack: LocalStack, limits: TokenLimits, user: UUID) -> Colour:
    return Colour(request.param, stack, limits, user)


@contextmanager
def nobody_writes(server: PostgresServer) -> Iterator[SimpleNamespace]:
    """Let whoever writes the ledger wait, until the end or until `go`; `wait` waits for the first to come."""
    with psycopg.connect(server.url("app")) as locking, psycopg.connect(server.url("app"), autocommit=True) as looking:
        locking.execute("lock table public.generation_usage in share mode")

        def wait() -> None:
            eventually(lambda: looking.execute("select 1 from pg_locks where not granted").fetchone())

        yield SimpleNamespace(wait=wait, go=locking.rollback)


def steps(*declared: Callable[[Hold], object], error: BaseException | None = None) -> Callable[[Hold], None]:
    def body(hold: Hold) -> None:
        for declare in declared:
            declare(hold)
        if error is not None:
            raise error

    return body


# A normal end


@pytest.mark.parametrize(
    ("body", "charged"),
    [
        (steps(), 8),
        (steps(lambda hold: hold.used(3)), 8),
        (steps(lambda hold: hold.commit()), 8),
        (steps(lambda hold: hold.commit(cost=5)), 5),
        (steps(lambda hold: hold.commit(cost=0)), 0),
    ],
    ids=["all", "all, whatever was used", "all, said so", "less", "nothing"],
)
def test_normal_ends(colour: Colour, ledger: Ledger, body: Callable[[Hold], None], charged: int) -> None:
    seen: list[Any] = []
    hold = colour.generate(lambda hold: (seen.append((hold.status, ledger())), body(hold)))
    assert seen == [("reserved", [("reserved", 8)])]
    assert ledger() == [("committed", charged)]
    assert (hold.status, hold.result.cost, hold.result.remaining) == ("committed", charged, MAX - charged)


# Abnormal ends

ERRORS = [ValueError, KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("declared", "row"),
    [
        ([], ("released", 8)),
        ([lambda hold: hold.used(0)], ("released", 8)),
        ([lambda hold: hold.used(2), lambda hold: hold.used(3)], ("committed", 3)),
        ([lambda hold: hold.used(8)], ("committed", 8)),
        ([lambda hold: hold.used(3), lambda hold: hold.commit(cost=4)], ("committed", 4)),
    ],
    ids=["nothing", "zero", "some", "all", "committed"],
)
def test_abnormal_ends(
    colour: Colour, ledger: Ledger, error: type[BaseException], declared: list[Any], row: tuple[str, int]
) -> None:
    raised = error("the body's")
    with pytest.raises(error) as caught:
        colour.generate(steps(*declared, error=raised))
    if colour.name == "sync":  # asyncio.run makes its own of some
        assert caught.value is raised
    assert ledger() == [row]
    charged = row[1] if row[0] == "committed" else 0
    assert colour.limits.check(colour.user, "video").remaining == MAX - charged


def test_what_may_not_be_declared_ends_the_body(colour: Colour, ledger: Ledger) -> None:
    with pytest.raises(InvalidRequest):
        colour.generate(steps(lambda hold: hold.used(5), lambda hold: hold.used(-1)))
    assert ledger() == [("committed", 5)]


def test_more_than_was_reserved_is_charged_when_the_body_fails(colour: Colour, ledger: Ledger) -> None:
    def fail(_: Hold) -> None:
        raise RuntimeError("it ran for longer than it should")

    with pytest.raises(RuntimeError):
        colour.generate(steps(lambda hold: hold.used(MAX + 1), fail))
    assert ledger() == [("committed", MAX + 1)]


# No entry


def test_denials(colour: Colour, ledger: Ledger, stack: LocalStack) -> None:
    (stranger,) = stack.create_users(1)
    for error, options in (
        (LimitExceeded, {"cost": MAX + 1}),
        (NoLimitForKind, {"kind": "audio"}),
        (NotInGroup, {"user_id": stranger}),
    ):
        with pytest.raises(GenerationDenied) as caught:
            colour.generate(lambda _: pytest.fail("the body ran"), **options)
        assert type(caught.value) is error
        assert not caught.value.result
    assert ledger() == []


def test_room_that_is_held_is_denied_to_others(colour: Colour, ledger: Ledger) -> None:
    def body(_: Hold) -> None:
        assert not colour.limits.track(colour.user, "video", cost=3)
        assert colour.limits.track(colour.user, "video", cost=2)

    colour.generate(body)
    assert ledger() == [("committed", 8), ("committed", 2)]


def test_a_generation_is_entered_once(limits: TokenLimits, user: UUID, ledger: Ledger) -> None:
    generation = limits.generation(user, "video")
    with generation:
        pass
    with pytest.raises(ConfigurationError, match="entered only once"), generation:
        pytest.fail("the body ran")
    assert ledger() == [("committed", 1)]


# Keys


def test_a_job_that_was_done_is_not_charged_again(colour: Colour, ledger: Ledger) -> None:
    colour.generate(lambda hold: hold.commit(cost=5), idempotency_key="job-1")
    seen: list[Any] = []

    def body(hold: Hold) -> None:
        seen.append((hold.replayed, hold.status, hold.cost, hold.result.cost))
        hold.commit(cost=6)

    assert colour.generate(body, idempotency_key="job-1").status == "committed"
    with pytest.raises(KeyError):
        colour.generate(steps(error=KeyError("x")), idempotency_key="job-1")
    assert seen == [(True, "committed", 8, 5)]
    assert ledger() == [("committed", 5)]


def test_a_job_that_failed_is_tried_anew(colour: Colour, ledger: Ledger) -> None:
    with pytest.raises(KeyError):
        colour.generate(steps(error=KeyError("x")), idempotency_key="job-1")
    assert not colour.generate(idempotency_key="job-1").replayed
    assert ledger() == [("released", 8), ("committed", 8)]


def test_a_job_whose_worker_died_is_carried_on(colour: Colour, ledger: Ledger) -> None:
    died = colour.call("reserve", colour.user, "video", 8, idempotency_key="job-1")
    hold = colour.generate(idempotency_key="job-1")
    assert (hold.replayed, hold.usage_id) == (True, died.usage_id)
    assert ledger() == [("committed", 8)]


def test_a_key_of_something_else(colour: Colour, ledger: Ledger) -> None:
    colour.limits.track(colour.user, "video", 8, idempotency_key="job-1")
    with pytest.raises(IdempotencyConflict):
        colour.generate(lambda _: pytest.fail("the body ran"), idempotency_key="job-1")
    assert ledger() == [("committed", 8)]


# Time


def test_a_hold_that_expired_is_committed_when_there_is_room(colour: Colour, ledger: Ledger, let_pass: LetPass) -> None:
    hold = colour.generate(lambda _: let_pass(60), ttl=60)
    assert hold.status == "committed"
    assert ledger() == [("committed", 8)]


def test_a_hold_that_expired_fails_when_there_is_none(colour: Colour, ledger: Ledger, let_pass: LetPass) -> None:
    made: list[str] = []

    def body(hold: Hold) -> None:
        let_pass(60)
        assert colour.limits.track(colour.user, "video", cost=MAX)
        made.append("a film")

    with pytest.raises(HoldExpired, match="no longer fits"):
        colour.generate(body, ttl=60)
    assert made == ["a film"]
    assert ledger() == [("expired", 8), ("committed", MAX)]


def test_what_expired_and_was_used_is_noted_at_the_bodys_error(
    colour: Colour, ledger: Ledger, let_pass: LetPass, caplog: pytest.LogCaptureFixture
) -> None:
    def body(hold: Hold) -> None:
        hold.used(3)
        let_pass(60)
        assert colour.limits.track(colour.user, "video", cost=MAX)
        raise KeyError("the body's")

    with pytest.raises(KeyError, match="the body's") as caught:
        colour.generate(body, ttl=60)
    (note,) = caught.value.__notes__
    assert "no longer fits" in note
    assert "could not settle usage" in caplog.text
    assert ledger() == [("expired", 8), ("committed", MAX)]


def test_somebody_else_settles_the_hold(colour: Colour, ledger: Ledger) -> None:
    with pytest.raises(AlreadySettled):
        colour.generate(lambda hold: colour.limits.release(hold.usage_id))
    assert ledger() == [("released", 8)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills otherwise")
def test_a_worker_that_is_killed(
    stack: LocalStack, limits: TokenLimits, user: UUID, ledger: Ledger, let_pass: LetPass
) -> None:
    script = f"""
        import time
        from tokenlimits import TokenLimits
        with TokenLimits.from_env().generation({str(user)!r}, "video", cost=8, ttl=600):
            print("working", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env=os.environ | stack.environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        process.kill()
    assert ledger() == [("reserved", 8)]
    assert not limits.track(user, "video", cost=MAX)
    let_pass(600)
    assert limits.check(user, "video").remaining == MAX
    assert limits.track(user, "video", cost=MAX)
    assert ledger() == [("expired", 8), ("committed", MAX)]


def test_ctrl_c(stack: LocalStack, user: UUID, ledger: Ledger) -> None:
    script = f"""
        import asyncio, sys, time
        from tokenlimits import AsyncTokenLimits, TokenLimits

        def sync():
            with TokenLimits.from_env().generation({str(user)!r}, "video", cost=2) as hold:
                hold.used(1)
                print("working", flush=True)
                time.sleep(60)

        async def main():
            async with AsyncTokenLimits.from_env().generation({str(user)!r}, "video", cost=2) as hold:
                hold.used(1)
                print("working", flush=True)
                await asyncio.sleep(60)

        try:
            sync() if sys.argv[1] == "sync" else asyncio.run(main())
        except KeyboardInterrupt:
            print("interrupted")
    """
    for name in ("sync", "async"):
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | stack.environment(),
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"working\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=PATIENCE) == (b"interrupted\n", b"")
    assert ledger() == [("committed", 1)] * 2


# Supabase is slow


def test_a_commit_that_is_not_answered(colour: Colour, server: PostgresServer, ledger: Ledger) -> None:
    held: list[Hold] = []

    with ExitStack() as locks:

        def body(hold: Hold) -> None:
            held.append(hold)
            locks.enter_context(nobody_writes(server))
            colour.transport.timeout = 0.5

        with pytest.raises(ServiceUnavailable) as caught:
            colour.generate(body)
    assert "commit the usage again" in caught.value.__notes__[0]
    assert colour.limits.commit(held[0].usage_id).status == "committed"
    assert ledger() == [("committed", 8)]


# Cancellation


class TestCancellation:
    @pytest.mark.parametrize(("used", "row"), [(0, ("released", 8)), (3, ("committed", 3))])
    def test_in_the_body(self, stack: LocalStack, user: UUID, ledger: Ledger, used: int, row: Any) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:
                working = asyncio.Event()

                async def work() -> None:
                    async with limits.generation(user, "video", cost=8) as hold:
                        hold.used(used)
                        working.set()
                        await asyncio.sleep(60)

                task = asyncio.create_task(work())
                await working.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert task.cancelled()
                assert ledger() == [row]

        run(main())

    @pytest.mark.parametrize("times", [1, 3])
    def test_while_it_settles(
        self, stack: LocalStack, server: PostgresServer, user: UUID, ledger: Ledger, times: int
    ) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:
                held = asyncio.Event()
                go = asyncio.Event()

                async def work() -> None:
                    async with limits.generation(user, "video", cost=8):
                        held.set()
                        await go.wait()

                task = asyncio.create_task(work())
                await held.wait()
                with nobody_writes(server) as lock:
                    go.set()
                    await asyncio.to_thread(lock.wait)
                    for _ in range(times):
                        task.cancel()
                        await asyncio.sleep(0.05)
                        assert not task.done()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert ledger() == [("committed", 8)]

        run(main())

    def test_of_all_tasks_while_it_settles(
        self, stack: LocalStack, server: PostgresServer, user: UUID, ledger: Ledger
    ) -> None:
        """As at the end of `asyncio.run`: the settlement's own task is among them."""

        async def main() -> None:
            async with async_limits(stack) as limits:
                held, go = asyncio.Event(), asyncio.Event()

                async def work() -> None:
                    async with limits.generation(user, "video", cost=8):
                        held.set()
                        await go.wait()

                task = asyncio.create_task(work())
                await held.wait()
                with nobody_writes(server) as lock:
                    go.set()
                    await asyncio.to_thread(lock.wait)
                    for each in asyncio.all_tasks() - {asyncio.current_task()}:
                        each.cancel()
                    await asyncio.sleep(0.1)
                    assert not task.done()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert ledger() == [("committed", 8)]

        run(main())

    def test_while_it_reserves(self, stack: LocalStack, server: PostgresServer, user: UUID, ledger: Ledger) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:

                async def work() -> None:
                    async with limits.generation(user, "video", cost=8):
                        pytest.fail("the body ran")

                with nobody_writes(server) as lock:
                    task = asyncio.create_task(work())
                    await asyncio.to_thread(lock.wait)
                    task.cancel()
                    await asyncio.sleep(0.05)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert ledger() == [("released", 8)]

        run(main())

    def test_while_it_reserves_and_is_denied(
        self, stack: LocalStack, server: PostgresServer, user: UUID, ledger: Ledger
    ) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:
                task = asyncio.create_task(anext(aiter(generate(limits, user, cost=MAX + 1))))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        run(main())
        assert ledger() == []

    def test_by_a_timeout(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:

                async def work() -> None:
                    async with asyncio.timeout(None) as timeout, limits.generation(user, "video", cost=8):
                        timeout.reschedule(asyncio.get_running_loop().time())
                        await asyncio.sleep(60)

                with pytest.raises(TimeoutError):
                    await work()
                assert ledger() == [("released", 8)]

        run(main())

    def test_by_a_scope_that_cancels_again_and_again(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        """As Starlette and FastAPI do when a client has gone."""

        async def main() -> None:
            async with async_limits(stack) as limits:
                with anyio.move_on_after(60) as scope:
                    async with limits.generation(user, "video", cost=8) as hold:
                        hold.used(2)
                        scope.deadline = anyio.current_time()
                        await anyio.sleep(60)
                assert scope.cancelled_caught
                assert ledger() == [("committed", 2)]

        run(main())

    def test_of_one_in_a_task_group(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:
                held = asyncio.Event()

                async def work() -> None:
                    async with limits.generation(user, "video", cost=8):
                        held.set()
                        await asyncio.sleep(60)

                async def group() -> None:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(work())
                        await held.wait()
                        raise ValueError

                with pytest.raises(ExceptionGroup):
                    await group()
                assert ledger() == [("released", 8)]

        run(main())


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run it in a loop that says what it doesn't like."""
    problems: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        await main

    asyncio.run(watched(), debug=True)
    gc.collect()
    assert problems == []


async def generate(limits: AsyncTokenLimits, user: UUID, cost: int = 8) -> AsyncIterator[int]:
    async with limits.generation(user, "video", cost=cost) as hold:
        for part in range(1, 9):
            hold.used(part)
            yield part


class TestGenerators:
    """That open a generation in their own body, and declare what was used."""

    def test_closed_early(self, limits: TokenLimits, user: UUID, ledger: Ledger) -> None:
        def parts() -> Iterator[int]:
            with limits.generation(user, "video", cost=8) as hold:
                for part in range(1, 9):
                    hold.used(part)
                    yield part

        for part in parts():
            if part == 3:
                break
        gc.collect()
        assert ledger() == [("committed", 3)]

    def test_async_closed_early(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:
                parts = generate(limits, user)
                assert [await anext(parts) for _ in range(3)] == [1, 2, 3]
                await parts.aclose()  # type: ignore[attr-defined]
                assert ledger() == [("committed", 3)]

        run(main())

    def test_async_forgotten_in_the_middle(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:
                async for part in generate(limits, user):
                    if part == 3:
                        break
                gc.collect()
                await asyncio.to_thread(eventually, lambda: ledger() != [("reserved", 8)])
                assert ledger() == [("committed", 3)]

        run(main())


# Decorators


class TestLimited:
    def test_a_function(self, limits: TokenLimits, user: UUID, ledger: Ledger) -> None:
        @limits.limited("video", user="user_id", cost=lambda seconds, **_: seconds)
        def film(seconds: int, *, user_id: UUID) -> str:
            if seconds == 3:
                raise KeyError
            return f"{seconds} s"

        assert film(2, user_id=user) == "2 s"
        assert film(seconds=1, user_id=user) == "1 s"
        with pytest.raises(KeyError):
            film(3, user_id=user)
        with pytest.raises(LimitExceeded):
            film(9, user_id=user)
        with pytest.raises(TypeError, match="user_id"):
            film(2)  # type: ignore[call-arg]
        assert ledger() == [("committed", 2), ("committed", 1), ("released", 3)]

    def test_a_coroutine(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        async def main() -> None:
            async with async_limits(stack) as limits:

                @limits.limited("video", user="user_id", cost=2, idempotency_key="job")
                async def film(user_id: UUID, job: str, *, fail: bool = False) -> str:
                    await asyncio.sleep(0)
                    if fail:
                        raise KeyError
                    return "film"

                assert await asyncio.gather(film(user, "a"), film(user, "b"), film(user, "c")) == ["film"] * 3
                assert await film(user, job="a") == "film"
                with pytest.raises(KeyError):
                    await film(user, job="d", fail=True)
                assert sorted(ledger()) == [("committed", 2)] * 3 + [("released", 2)]

        run(main())

    def test_a_generator(self, limits: TokenLimits, user: UUID, ledger: Ledger) -> None:
        @limits.limited("video", user="user_id", cost=2)
        def echo(user_id: UUID) -> Any:
            heard = None
            while heard != "end":
                try:
                    heard = yield heard
                except KeyError:
                    heard = "a KeyError"
            return "returned"

        whole = echo(user)
        assert ledger() == []
        assert next(whole) is None
        assert ledger() == [("reserved", 2)]
        assert whole.send("hello") == "hello"
        assert whole.throw(KeyError()) == "a KeyError"
        with pytest.raises(StopIteration) as caught:
            whole.send("end")
        assert caught.value.value == "returned"
        early = echo(user)
        next(early)
        early.close()
        failing = echo(user)
        next(failing)
        with pytest.raises(ValueError, match="thrown"):
            failing.throw(ValueError("thrown"))
        echo(user)
        assert ledger() == [("committed", 2), ("released", 2), ("released", 2)]

    def test_an_async_generator(self, stack: LocalStack, user: UUID, ledger: Ledger) -> None:
        closed: list[str] = []

        async def main() -> None:
            async with async_limits(stack) as limits:

                @limits.limited("video", user="user_id", cost=2)
                async def echo(user_id: UUID, end: str = "end") -> Any:
                    heard = None
                    try:
                        while heard != end:
                            try:
                                heard = yield heard
                            except KeyError:
                                heard = "a KeyError"
                    finally:
                        await asyncio.sleep(0)
                        closed.append("closed")

                whole = echo(user)
                assert ledger() == []
                assert await anext(whole) is None
                assert ledger() == [("reserved", 2)]
                assert await whole.asend("hello") == "hello"
                assert await whole.athrow(KeyError()) == "a KeyError"
                with pytest.raises(StopAsyncIteration):
                    await whole.asend("end")
                early = echo(user)
                await anext(early)
                await early.aclose()
                failing = echo(user)
                await anext(failing)
                with pytest.raises(ValueError, match="thrown"):
                    await failing.athrow(ValueError("thrown"))
                assert [item async for item in echo(user, end=None)] == []
                await echo(user).aclose()
                assert ledger() == [("committed", 2), ("released", 2), ("released", 2), ("committed", 2)]

        run(main())
        assert closed == ["closed"] * 4

    def test_methods(self, limits: TokenLimits, user: UUID, ledger: Ledger) -> None:
        class Studio:
            def __init__(self, user_id: UUID) -> None:
                self.user_id = user_id

            @limits.limited("video", user=lambda self, *_: self.user_id)
            def film(self, title: str) -> str:
                return f"{title} by {self.user_id}"

            @classmethod
            @limits.limited("video", user="user_id", cost=2)
            def short(cls, user_id: UUID) -> str:
                return cls.__name__

            @staticmethod
            @limits.limited("video", user="user_id", cost=3)
            def trailer(user_id: UUID) -> str:
                return "trailer"

        studio = Studio(user)
        assert studio.film("Metropolis") == f"Metropolis by {user}"
        assert (studio.short(user), Studio.trailer(user)) == ("Studio", "trailer")
        assert ledger() == [("committed", 1), ("committed", 2), ("committed", 3)]

    def test_from_many_threads(self, limits: TokenLimits, user: UUID, ledger: Ledger) -> None:
        @limits.limited("video", user="user_id")
        def film(user_id: UUID) -> None:
            time.sleep(0.01)

        def attempt(_: int) -> bool:
            try:
                film(user)
            except LimitExceeded:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(attempt, range(30))) == MAX
        assert ledger() == [("committed", 1)] * MAX

    def test_what_was_made_survives_a_failing_settlement(
        self, colour: Colour, user: UUID, ledger: Ledger, limits: TokenLimits, let_pass: LetPass
    ) -> None:
        def work(user_id: UUID) -> str:
            let_pass(60)
            assert limits.track(user_id, "video", cost=MAX)
            return "a film"

        async def awork(user_id: UUID) -> str:
            return work(user_id)

        async def main() -> None:
            async with async_limits(colour.stack) as made:
                await made.limited("video", user="user_id", ttl=60)(awork)(user)

        def call() -> None:
            if colour.name == "async":
                asyncio.run(main())
            else:
                limits.limited("video", user="user_id", ttl=60)(work)(user)

        with pytest.raises(HoldExpired) as caught:
            call()
        assert caught.value.returned == "a film"
        assert ledger() == [("expired", 1), ("committed", MAX)]


# Step by step


class TestSteps:
    def test_reserve_and_commit(self, colour: Colour, ledger: Ledger) -> None:
        held = colour.call("reserve", colour.user, "video", 8, ttl=600, metadata={"a": 1})
        assert (held.status, held.remaining, held.replayed) == ("reserved", 2, False)
        assert held.expires_at is not None
        for replayed in (False, True):
            answer = colour.call("commit", held.usage_id, cost=5)
            assert (answer.status, answer.cost, answer.remaining, answer.replayed) == ("committed", 5, 5, replayed)
        with pytest.raises(AlreadySettled):
            colour.call("commit", held.usage_id)
        with pytest.raises(AlreadySettled):
            colour.call("release", str(held.usage_id))
        assert ledger() == [("committed", 5)]

    def test_release(self, colour: Colour, ledger: Ledger) -> None:
        held = colour.call("reserve", colour.user, "video", 8)
        for replayed in (False, True):
            answer = colour.call("release", held.usage_id)
            assert (answer.status, answer.remaining, answer.replayed) == ("released", MAX, replayed)
        assert ledger() == [("released", 8)]

    def test_refund(self, colour: Colour, groups: GroupManager, ledger: Ledger) -> None:
        tracked = [colour.limits.track(colour.user, "video", 2).usage_id for _ in range(2)]
        for replayed in (False, True):
            answer = colour.call("refund", tracked[0])
            assert (answer.status, answer.replayed) == ("refunded", replayed)
        assert tracked[1] is not None
        assert groups.refund(tracked[1]).remaining == MAX
        assert ledger() == [("refunded", 2)] * 2

    def test_what_cannot_be(self, colour: Colour, ledger: Ledger) -> None:
        held = colour.call("reserve", colour.user, "video", 8)
        with pytest.raises(InvalidRequest) as caught:
            colour.call("commit", held.usage_id, cost=9)
        assert caught.value.field == "cost"
        with pytest.raises(InvalidRequest) as caught:
            colour.call("refund", held.usage_id)
        assert caught.value.field == "usage_id"
        with pytest.raises(UsageNotFound):
            colour.call("commit", uuid4())
        assert not colour.call("reserve", colour.user, "video", 3)
        colour.call("release", held.usage_id)
        assert ledger() == [("released", 8)]

    @pytest.mark.parametrize("method", ["commit", "release", "refund"])
    def test_nothing_recorded(self, colour: Colour, ledger: Ledger, method: str) -> None:
        answer = colour.call(method, None)
        assert (answer.allowed, answer.reason, answer.usage_id) == (True, "unavailable", None)
        assert ledger() == []
