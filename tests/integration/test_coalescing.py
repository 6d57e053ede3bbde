"""Calls that travel together, on the real stack: nobody's charge, answer or error is another's."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from supabase import AsyncClient, AsyncClientOptions, Client, ClientOptions
from tests.integration.conftest import RunPython

from tokenlimits import AsyncTokenLimits, GroupManager, Limit, TokenLimits, TrackResult
from tokenlimits.errors import GroupNotFound, IdempotencyConflict
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

THREADS, EACH = 64, 10
TASKS = 256

Team = Callable[..., Group]


class Wire:
    """What goes over it, of both colours; it loses the answer of the first batch when told to."""

    def __init__(self, stack: LocalStack) -> None:
        self.sent: Counter[str] = Counter()
        self.loses = False
        self._stack = stack

    @contextmanager
    def limits(self) -> Iterator[TokenLimits]:
        hooks = {"request": [self._sent], "response": [self._lose]}
        with httpx.Client(trust_env=False, event_hooks=hooks) as http:
            client = Client(self._stack.url, self._stack.secret_key, ClientOptions(httpx_client=http))
            with TokenLimits(client, timeout=60, coalesce=True) as limits:
                yield limits

    async def track(self, *calls: tuple[str, str], **options: object) -> list[TrackResult | BaseException]:
        """All at once, in one client."""

        async def sent(request: httpx.Request) -> None:
            self._sent(request)

        async with httpx.AsyncClient(trust_env=False, event_hooks={"request": [sent]}) as http:
            client = AsyncClient(self._stack.url, self._stack.secret_key, AsyncClientOptions(httpx_client=http))
            async with AsyncTokenLimits(client, timeout=60, coalesce=True) as limits:
                return await asyncio.gather(
                    *(limits.track(user, kind, metadata={"by": n}) for n, (user, kind) in enumerate(calls)),
                    return_exceptions=True,
                )

    def _sent(self, request: httpx.Request) -> None:
        self.sent[request.url.path.rpartition("/")[2]] += 1

    def _lose(self, response: httpx.Response) -> None:
        if self.loses and response.request.url.path.endswith("/track_generations"):
            self.loses = False
            raise httpx.ReadError("the answer was lost")


@pytest.fixture
def wire(stack: LocalStack) -> Wire:
    return Wire(stack)


@pytest.fixture
def users(stack: LocalStack) -> list[str]:
    return [str(user) for user in stack.create_users(THREADS)]


def recorded(stack: LocalStack, group: Group) -> dict[UUID, int]:
    """Each usage, and who asked for it."""
    rows = stack.sql(
        "select id, (metadata ->> 'by')::integer as by from public.generation_usage where group_id = $1", str(group.id)
    )
    return {UUID(row["id"]): row["by"] for row in rows}


def assert_exact(stack: LocalStack, group: Group, answers: list[tuple[int, TrackResult]], max_: int) -> None:
    allowed = {result.usage_id: by for by, result in answers if result}
    assert len(allowed) == sum(result.allowed for _, result in answers) == max_
    assert recorded(stack, group) == allowed
    assert sorted(result.remaining or 0 for _, result in answers if result) == list(range(max_))
    assert {result.reason for _, result in answers if not result} == {"limit_exceeded"}


@pytest.mark.slow
def test_threads_meet_a_limit_exactly_in_few_requests(
    stack: LocalStack, groups: GroupManager, team: Team, users: list[str], wire: Wire
) -> None:
    group = team(users, Limit(kind="image", max=500))
    barrier = threading.Barrier(THREADS)

    def work(n: int) -> list[tuple[int, TrackResult]]:
        barrier.wait()
        return [(n, limits.track(users[n], "image", metadata={"by": n})) for _ in range(EACH)]

    with wire.limits() as limits, ThreadPoolExecutor(THREADS) as threads:
        answers = [answer for several in threads.map(work, range(THREADS)) for answer in several]

    assert_exact(stack, group, answers, 500)
    assert groups.usage(group.id).limits[0].used == 500
    assert wire.sent.total() < THREADS * EACH / 2


def test_tasks_meet_a_limit_exactly_in_one_request(
    stack: LocalStack, groups: GroupManager, team: Team, users: list[str], wire: Wire
) -> None:
    group = team(users, Limit(kind="image", max=200))
    results = asyncio.run(wire.track(*((users[n % THREADS], "image") for n in range(TASKS))))
    assert_exact(
        stack, group, [(n, result) for n, result in enumerate(results) if isinstance(result, TrackResult)], 200
    )
    assert groups.usage(group.id).limits[0].used == 200
    assert wire.sent == {"track_generations": 1}


@contextmanager
def locked(stack: LocalStack, group: Group) -> Iterator[None]:
    """As by an admin who edits it, in a transaction that takes its time."""
    assert stack.database_url is not None
    with psycopg.connect(stack.database_url) as session:
        session.execute("select tokenlimits.lock_groups(array[%s]::uuid[], true)", [group.id])
        yield


def apart(groups: GroupManager, team: Team, one: list[str], two: list[str]) -> tuple[Group, Group]:
    """Two groups that don't share a lock by chance."""
    first = team(one, Limit(kind="image", max=100))
    second = team([], Limit(kind="image", max=100))
    while first.id.bytes[-1] == second.id.bytes[-1]:
        second = team([], Limit(kind="image", max=100))
    groups.add_members(second.id, two)
    return first, second


@pytest.mark.parametrize("alone", [True, False], ids=["a lone call", "a batch"])
def test_a_locked_group_holds_no_other_back(
    stack: LocalStack, groups: GroupManager, team: Team, users: list[str], wire: Wire, *, alone: bool
) -> None:
    hot, other = apart(groups, team, users[:8], users[8:])
    with wire.limits() as limits, ThreadPoolExecutor(THREADS) as threads:
        with locked(stack, hot):
            late = [threads.submit(limits.track, user, "image") for user in users[: 1 if alone else 8]]
            free = [threads.submit(limits.track, user, "image") for user in users[8:]]
            assert all(future.result(60).allowed for future in free)
            late += [threads.submit(limits.track, user, "image") for user in users[:8]]
            again = [threads.submit(limits.track, user, "image") for user in users[8:16]]
            assert all(future.result(60).allowed for future in again)
            assert not any(future.done() for future in late)
        assert all(future.result(60).allowed for future in late)
    assert groups.usage(hot.id).limits[0].used == len(late)
    assert groups.usage(other.id).limits[0].used == len(free) + len(again)


def test_a_locked_group_holds_no_other_task_back(
    stack: LocalStack, groups: GroupManager, team: Team, users: list[str]
) -> None:
    hot, _ = apart(groups, team, users[:8], users[8:])

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            client = AsyncClient(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http))
            async with AsyncTokenLimits(client, timeout=60, coalesce=True) as limits:
                with locked(stack, hot):
                    tasks = [asyncio.create_task(limits.track(user, "image")) for user in users]
                    assert all(await asyncio.gather(*tasks[8:]))
                    assert not any(task.done() for task in tasks[:8])
                assert all(await asyncio.gather(*tasks[:8]))

    asyncio.run(main())
    assert groups.usage(hot.id).limits[0].used == 8


def test_errors_of_some_are_nobody_elses(
    stack: LocalStack, groups: GroupManager, team: Team, users: list[str], wire: Wire
) -> None:
    group = team(users, Limit(kind="image", max=100), Limit(kind="video", max=100))
    missing = uuid4()

    async def main() -> list[TrackResult | BaseException]:
        async with httpx.AsyncClient(trust_env=False) as http:
            client = AsyncClient(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http))
            limits = AsyncTokenLimits(client, coalesce=True)
            await limits.track(users[0], "image", idempotency_key="job")
            return await asyncio.gather(
                limits.track(users[1], "image"),
                limits.track(users[0], "video", idempotency_key="job"),
                limits.track(users[2], "image", 2),
                limits.track(users[3], "image", group_id=missing),
                limits.track(users[0], "image", idempotency_key="job"),
                return_exceptions=True,
            )

    one, conflict, two, gone, replayed = asyncio.run(main())
    assert isinstance(one, TrackResult)
    assert isinstance(two, TrackResult)
    assert isinstance(replayed, TrackResult)
    assert (one.allowed, two.cost, replayed.replayed) == (True, 2, True)
    assert isinstance(conflict, IdempotencyConflict)
    assert isinstance(gone, GroupNotFound)
    assert str(missing) in str(gone)
    used = {limit.kind: limit.used for limit in groups.usage(group.id).limits}
    assert used == {"image": 4, "video": 0}


def test_the_errors_are_those_of_single_calls(stack: LocalStack, team: Team, users: list[str]) -> None:
    team(users, Limit(kind="image", max=100))

    async def errors(*, coalesce: bool) -> list[tuple[object, ...]]:
        async with httpx.AsyncClient(trust_env=False) as http:
            client = AsyncClient(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http))
            limits = AsyncTokenLimits(client, coalesce=coalesce)
            await limits.track(users[0], "image", idempotency_key="job")
            raised = await asyncio.gather(
                limits.track(users[0], "image", 2, idempotency_key="job"),
                limits.track(users[1], "image", group_id=UUID(int=7)),
                return_exceptions=True,
            )
            return [(type(error), str(error), getattr(error, "code", None)) for error in raised]

    assert asyncio.run(errors(coalesce=True)) == asyncio.run(errors(coalesce=False))


def test_a_lost_batch_is_sent_again_and_charged_once(
    stack: LocalStack, groups: GroupManager, team: Team, users: list[str], wire: Wire
) -> None:
    group = team(users, Limit(kind="image", max=1000))
    wire.loses = True
    barrier = threading.Barrier(THREADS)

    def work(n: int) -> tuple[int, TrackResult]:
        barrier.wait()
        return n, limits.track(users[n], "image", metadata={"by": n})

    with wire.limits() as limits, ThreadPoolExecutor(THREADS) as threads:
        answers = list(threads.map(work, range(THREADS)))

    assert not wire.loses
    assert any(result.replayed for _, result in answers)
    assert {result.usage_id: by for by, result in answers} == recorded(stack, group)
    assert groups.usage(group.id).limits[0].used == THREADS


SCRIPTS = {
    "threads": """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from tokenlimits import TokenLimits
        limits = TokenLimits.from_env(coalesce=True)
        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(lambda _: limits.track(sys.argv[1], "image"), range(64)))
    """,
    "loops, never closed": """
        import asyncio, sys
        from tokenlimits import AsyncTokenLimits
        limits = AsyncTokenLimits.from_env(coalesce=True)
        async def main():
            assert all(await asyncio.gather(*(limits.track(sys.argv[1], "image") for _ in range(16))))
        for _ in range(2):
            asyncio.run(main())
    """,
    "loops, closed": """
        import asyncio, sys
        from tokenlimits import AsyncTokenLimits
        async def main():
            async with AsyncTokenLimits.from_env(coalesce=True) as limits:
                assert all(await asyncio.gather(*(limits.track(sys.argv[1], "image") for _ in range(16))))
        for _ in range(2):
            asyncio.run(main())
    """,
    "closing in the middle": """
        import asyncio, sys
        from tokenlimits import AsyncTokenLimits
        async def main():
            async with AsyncTokenLimits.from_env(coalesce=True) as limits:
                calls = [asyncio.create_task(limits.track(sys.argv[1], "image")) for _ in range(16)]
                await asyncio.sleep(0)
            assert all(call.result() for call in calls)
        asyncio.run(main())
    """,
    "a loop that ends in the middle": """
        import asyncio, sys
        from tokenlimits import AsyncTokenLimits
        limits = AsyncTokenLimits.from_env(coalesce=True)
        async def main():
            assert await limits.track(sys.argv[1], "image")
            calls = [asyncio.create_task(limits.track(sys.argv[1], "image")) for _ in range(16)]
            for _ in range(5):
                await asyncio.sleep(0)
            assert not any(call.done() for call in calls)
        for _ in range(2):
            asyncio.run(main())
    """,
    "a fork while others wait": """
        import os, sys, threading, warnings
        from tokenlimits import TokenLimits
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says that this is dangerous
        limits = TokenLimits.from_env(coalesce=True)
        assert limits.track(sys.argv[1], "image")
        stop = threading.Event()
        def keep_busy():
            while not stop.is_set():
                limits.track(sys.argv[1], "image")
        threads = [threading.Thread(target=keep_busy) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = 0 if limits.track(sys.argv[1], "image") else 2
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for thread in threads:
            thread.join()
        limits.close()
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_ends_in_silence(
    stack: LocalStack, run_python: RunPython, team: Team, users: list[str], script: str
) -> None:
    team(users, Limit(kind="image", max=None))
    quiet = "import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)\n"  # it calls the loading of TLS slow
    lines = [line.removeprefix(" " * 8) for line in script.splitlines()]
    assert run_python(quiet + "\n".join(lines), users[0], dev=True) == ""
