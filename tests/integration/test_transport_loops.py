"""Event loops that come and go, and interpreters that end, without a word of warning."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from supabase import AsyncClientOptions, create_async_client
from tests.integration.conftest import RunPython

from tokenlimits import AsyncGroupManager, AsyncTokenLimits, ConfigurationError, Limit, TrackResult, atrack_generation
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

pytestmark = pytest.mark.slow


@pytest.fixture
def user(stack: LocalStack, team: Callable[..., Group]) -> str:
    user = str(stack.create_users(1)[0])
    team([user], Limit(kind="image", max=1000))
    return user


@pytest.mark.usefixtures("from_env")
class TestLoops:
    def test_one_after_another_with_the_default(self, user: str) -> None:
        left = [asyncio.run(atrack_generation(user, "image")).remaining for _ in range(3)]
        assert left == [999, 998, 997]

    def test_one_after_another_with_one_client(self, user: str) -> None:
        limits = AsyncTokenLimits.from_env()

        async def several() -> list[TrackResult]:
            return await asyncio.gather(*(limits.track(user, "image") for _ in range(5)))

        results = [result for _ in range(3) for result in asyncio.run(several())]
        assert sorted(result.remaining or 0 for result in results) == list(range(985, 1000))

    def test_two_at_once(self, user: str) -> None:
        limits = AsyncTokenLimits.from_env()
        barrier = threading.Barrier(2)

        async def several(kind: str) -> list[TrackResult]:
            barrier.wait()
            return [
                await track(user, kind, cost=cost)
                for cost in range(1, 16)
                for track in (limits.track, atrack_generation)
            ]

        with ThreadPoolExecutor(2) as threads:
            one, two = threads.map(lambda kind: asyncio.run(several(kind)), ["image", "video"])
        assert [(result.kind, result.cost, result.allowed) for result in one] == [
            ("image", cost, True) for cost in range(1, 16) for _ in range(2)
        ]
        assert {(result.kind, result.reason) for result in two} == {("video", "no_limit_for_kind")}

    def test_many_calls_at_once(self, user: str) -> None:
        async def several() -> list[TrackResult]:
            async with AsyncTokenLimits.from_env(timeout=60) as limits:
                return await asyncio.gather(*(limits.track(user, "image", 4) for _ in range(300)))

        results = asyncio.run(several())
        assert sum(result.allowed for result in results) == 250
        assert {result.reason for result in results if not result} == {"limit_exceeded"}

    def test_a_cancelled_call_leaves_the_client_usable(self, user: str) -> None:
        async def run() -> TrackResult:
            limits = AsyncTokenLimits.from_env()
            await limits.track(user, "image")
            calls = [asyncio.create_task(limits.track(user, "image")) for _ in range(20)]
            await asyncio.sleep(0.02)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            return await limits.track(user, "image")

        assert asyncio.run(run())

    def test_a_timeout_of_the_callers_is_theirs(self, user: str) -> None:
        async def run() -> None:
            async with AsyncTokenLimits.from_env() as limits, asyncio.timeout(0):
                await limits.track(user, "image")

        with pytest.raises(TimeoutError):
            asyncio.run(run())


def test_a_client_of_the_callers_in_a_second_loop(stack: LocalStack, user: str) -> None:
    http = httpx.AsyncClient(trust_env=False)

    async def first() -> Any:
        client = await create_async_client(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http))
        assert await AsyncTokenLimits(client).track(user, "image")
        return client

    async def second(client: Any) -> None:
        for made in (AsyncTokenLimits(client), AsyncTokenLimits(client, on_unavailable="allow")):
            with pytest.raises(ConfigurationError, match="another event loop"):
                await made.track(user, "image")
        with pytest.raises(ConfigurationError, match="another event loop"):
            await atrack_generation(user, "image", client=client)
        with pytest.raises(ConfigurationError, match="another event loop"):
            await AsyncGroupManager(client).list()

    with asyncio.Runner() as one, asyncio.Runner() as two:
        client = one.run(first())
        two.run(second(client))
        assert one.run(AsyncTokenLimits(client).track(user, "image"))
        one.run(http.aclose())


SCRIPTS = {
    "the default": """
        import sys
        from tokenlimits import track_generation
        assert track_generation(sys.argv[1], "image")
    """,
    "the default, in threads": """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from tokenlimits import track_generation
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(lambda _: track_generation(sys.argv[1], "image"), range(8)))
    """,
    "from_env, never closed": """
        import sys
        from tokenlimits import GroupManager, TokenLimits
        limits, groups = TokenLimits.from_env(), GroupManager.from_env()
        assert limits.track(sys.argv[1], "image")
        assert groups.list()
    """,
    "from_env, forgotten": """
        import gc, sys
        from tokenlimits import TokenLimits
        for _ in range(3):
            assert TokenLimits.from_env().track(sys.argv[1], "image")
        gc.collect()
    """,
    "from_env, closed": """
        import sys
        from tokenlimits import TokenLimits
        with TokenLimits.from_env() as limits:
            assert limits.track(sys.argv[1], "image")
    """,
    "the default in asyncio": """
        import asyncio, sys
        from tokenlimits import atrack_generation
        for _ in range(2):
            assert asyncio.run(atrack_generation(sys.argv[1], "image"))
    """,
    "from_env in asyncio, never closed": """
        import asyncio, sys
        from tokenlimits import AsyncTokenLimits
        limits = AsyncTokenLimits.from_env()
        for _ in range(2):
            assert asyncio.run(limits.track(sys.argv[1], "image"))
    """,
    "from_env in asyncio, forgotten": """
        import asyncio, gc, sys
        from tokenlimits import AsyncTokenLimits
        async def main():
            for _ in range(3):
                assert await AsyncTokenLimits.from_env().track(sys.argv[1], "image")
            gc.collect()
        asyncio.run(main())
    """,
    "iterating in asyncio, and stopping half-way": """
        import asyncio, sys
        from tokenlimits import AsyncGroupManager
        async def main():
            groups = AsyncGroupManager.from_env()
            for group in await groups.list():
                async for member in groups.members(group.id):
                    break
        asyncio.run(main())
    """,
    "an error at the end": """
        import sys
        from tokenlimits import InvalidRequest, TokenLimits
        limits = TokenLimits.from_env()
        limits.track(sys.argv[1], "image")
        try:
            limits.record("nobody", "image")
        except InvalidRequest:
            sys.exit(0)
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_ends_in_silence(run_python: RunPython, user: str, script: str) -> None:
    """Not even a `ResourceWarning`, with `-X dev` and every warning an error."""
    quiet = "import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)\n"  # it calls the loading of TLS slow
    lines = [line.removeprefix(" " * 8) for line in script.splitlines()]
    assert run_python(quiet + "\n".join(lines), user, dev=True) == ""
