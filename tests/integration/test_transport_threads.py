"""Many threads on one client: exactly the limit is admitted, nothing is lost, and one client is made."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest
import supabase
from anyio.abc import SocketStream
from postgrest import SyncPostgrestClient
from supabase import ClientOptions, create_client

from tokenlimits import AsyncTokenLimits, GroupManager, Limit, TokenLimits, TrackResult, track_generation
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

THREADS = 32
CALLS = 25
LIMIT = 500


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What supabase and postgrest make meanwhile."""
    made: list[str] = []
    for cls in (supabase.Client, SyncPostgrestClient):
        original = cls.__init__

        def init(self: object, *args: Any, _original: Any = original, **kwargs: Any) -> None:
            made.append(type(self).__name__)
            _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    return made


@pytest.fixture
def group(stack: LocalStack, team: Callable[..., Group]) -> tuple[Group, list[str]]:
    users = [str(user) for user in stack.create_users(THREADS)]
    return team(users, Limit(kind="image", max=LIMIT)), users


def hammer(track: Callable[..., TrackResult], users: list[str]) -> list[TrackResult]:
    barrier = threading.Barrier(THREADS)

    def work(user: str) -> list[TrackResult]:
        barrier.wait()
        return [track(user, "image") for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as threads:
        return [result for results in threads.map(work, users) for result in results]


def assert_exact(stack: LocalStack, groups: GroupManager, group: Group, results: list[TrackResult]) -> None:
    admitted = [result for result in results if result]
    assert len(results) == THREADS * CALLS
    assert len({result.usage_id for result in admitted}) == len(admitted) == LIMIT
    assert sorted(result.remaining or 0 for result in admitted) == list(range(LIMIT))
    assert {result.reason for result in results if not result} == {"limit_exceeded"}
    [row] = stack.sql("select count(*)::integer as n from public.generation_usage where group_id = $1", str(group.id))
    assert row["n"] == groups.usage(group.id).limits[0].used == LIMIT


@pytest.mark.slow
def test_on_one_client(
    stack: LocalStack, groups: GroupManager, group: tuple[Group, list[str]], made: list[str]
) -> None:
    with httpx.Client(trust_env=False) as http:
        client = create_client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        results = hammer(TokenLimits(client, timeout=60).track, group[1])
    assert made == ["Client", "SyncPostgrestClient"]
    assert_exact(stack, groups, group[0], results)


@pytest.mark.slow
def test_on_the_default_client(
    from_env: LocalStack, groups: GroupManager, group: tuple[Group, list[str]], made: list[str]
) -> None:
    results = hammer(track_generation, group[1])
    assert made == ["Client", "SyncPostgrestClient"]
    assert_exact(from_env, groups, group[0], results)


@pytest.mark.usefixtures("from_env")
def test_while_it_is_closed_by_another(groups: GroupManager, group: tuple[Group, list[str]]) -> None:
    """What was on its way is sent again, on connections that are made anew."""
    limits = TokenLimits.from_env(timeout=60)
    done = threading.Semaphore(0)

    def track(user: str) -> TrackResult:
        result = limits.track(user, "image")
        done.release()
        return result

    with ThreadPoolExecutor(4) as threads:
        results = threads.map(track, group[1] * 5)
        for _ in range(5):
            for _ in range(20):
                done.acquire()
            limits.close()
    limits.close()
    assert len({result.usage_id for result in results}) == THREADS * 5
    assert groups.usage(group[0].id).limits[0].used == THREADS * 5


@pytest.mark.usefixtures("from_env")
def test_of_both_colours_at_once(group: tuple[Group, list[str]]) -> None:
    limits, alimits = TokenLimits.from_env(), AsyncTokenLimits.from_env()

    async def several(users: list[str]) -> list[TrackResult]:
        return await asyncio.gather(*(alimits.track(user, "image") for user in users))

    with ThreadPoolExecutor(4) as threads, limits:
        asynchronous = [threads.submit(asyncio.run, several(group[1])) for _ in range(2)]
        results = list(threads.map(lambda user: limits.track(user, "image"), group[1] * 2))
        for future in asynchronous:
            results += future.result()
    assert sorted(result.remaining or 0 for result in results) == list(range(LIMIT - THREADS * 4, LIMIT))


@pytest.mark.usefixtures("from_env")
def test_leaves_no_connection_that_was_being_made_when_it_was_closed(
    group: tuple[Group, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, connect, made = TokenLimits.from_env(), socket.create_connection, list[socket.socket]()

    def connect_and_close(*args: Any, **kwargs: Any) -> socket.socket:
        made.append(connect(*args, **kwargs))
        limits.close()
        return made[-1]

    monkeypatch.setattr(socket, "create_connection", connect_and_close)
    assert limits.track(group[1][0], "image")
    assert [connection.fileno() for connection in made] == [-1]


@pytest.mark.usefixtures("from_env")
def test_leaves_no_connection_that_was_being_made_when_it_was_closed_in_asyncio(
    group: tuple[Group, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, connect, made = AsyncTokenLimits.from_env(), anyio.connect_tcp, list[SocketStream]()

    async def connect_and_close(*args: Any, **kwargs: Any) -> SocketStream:
        made.append(await connect(*args, **kwargs))
        await limits.aclose()
        return made[-1]

    async def track() -> None:
        assert await limits.track(group[1][0], "image")
        [connection] = made
        with pytest.raises(anyio.ClosedResourceError):
            await connection.send(b"")

    monkeypatch.setattr(anyio, "connect_tcp", connect_and_close)
    asyncio.run(track())
