"""A Supabase that answers as told, a clock that only sleeping moves, and both colours of the clients."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import respx
from supabase import AsyncClientOptions, ClientOptions, create_async_client, create_client

from tokenlimits import AsyncGroupManager, AsyncTokenLimits, GroupManager, TokenLimits
from tokenlimits._drivers import deadline

URL = "https://abc.supabase.co"
KEY = "sb_secret_7Hn9wQzR4tYp_plantedA"
ANN = "0197f0a0-0000-7000-8000-000000000001"
PRO = "0197f0a0-0000-7000-8000-000000000002"
WHEN = "2026-03-01T12:00:00+00:00"

GROUP: dict[str, Any] = {
    "id": PRO,
    "name": "Pro",
    "description": "",
    "priority": 0,
    "timezone": "UTC",
    "is_default": False,
    "created_at": WHEN,
    "updated_at": WHEN,
    "limits": [],
}
USUAL: dict[str, Any] = {
    "check_generation": {"allowed": True, "kind": "image", "cost": 1},
    "delete_group": GROUP,
    "find_groups": [],
    "group_members": [],
    "move_group_member": {"moved": True},
    "record_generation": {"allowed": True, "kind": "image", "cost": 1, "status": "committed"},
    "reset_group_usage": {"reset_at": WHEN},
    "save_group": GROUP,
    "tokenlimits_version": {"version": 1},
    "track_generation": {"allowed": True, "kind": "image", "cost": 1, "status": "committed"},
    "user_generation_usage": [],
}

Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Clock:
    """Time that passes only when somebody sleeps, and then at once.

    Threads that ran before, such as a web server that other tests have started in this process, keep the real time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept: list[float] = []
        self._ahead = 0.0
        others = set(threading.enumerate()) - {threading.current_thread()}
        really_sleep, really_asleep, really_now = time.sleep, asyncio.sleep, time.monotonic
        begun = really_now()

        def pass_(seconds: float) -> None:
            self.slept.append(seconds)
            self._ahead += seconds

        def sleep(seconds: float) -> None:
            really_sleep(seconds) if threading.current_thread() in others else pass_(seconds)

        async def asleep(seconds: float) -> None:
            if threading.current_thread() in others:
                await really_asleep(seconds)
            else:
                pass_(seconds)
                await really_asleep(0)

        def now() -> float:
            return really_now() if threading.current_thread() in others else begun + self._ahead

        monkeypatch.setattr("time.sleep", sleep)
        monkeypatch.setattr("asyncio.sleep", asleep)
        monkeypatch.setattr("time.monotonic", now)
        monkeypatch.setattr(deadline, "monotonic", now)
        self.pass_ = pass_


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Server:
    """Answers requests in turn as told, then as usual; remembers them all."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self._answers: list[Answer] = []

    def then(self, *answers: Answer) -> None:
        self._answers += answers

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer: Answer = self._answers.pop(0) if self._answers else self.usual
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer

    @staticmethod
    def usual(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=USUAL[request.url.path.rpartition("/")[2]])

    @property
    def functions(self) -> list[str]:
        return [request.url.path.rpartition("/")[2] for request in self.requests]

    @property
    def params(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with respx.mock(assert_all_called=False) as router:
        router.post(url__startswith=f"{URL}/rest/v1/rpc/").mock(side_effect=server)
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith(("SUPABASE_", "TOKENLIMITS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SUPABASE_URL", URL)
    monkeypatch.setenv("SUPABASE_SECRET_KEY", KEY)


CLASSES: dict[str, dict[str, Any]] = {
    "sync": {"limits": TokenLimits, "groups": GroupManager},
    "async": {"limits": AsyncTokenLimits, "groups": AsyncGroupManager},
}


class Shell:
    """One colour of the clients: calls a method and waits for what it returns."""

    def __init__(self, colour: Literal["sync", "async"]) -> None:
        self.colour = colour

    def limits(self, method: str, *args: Any, **options: Any) -> Any:
        return self._call("limits", method, args, options)

    def groups(self, method: str, *args: Any, **options: Any) -> Any:
        return self._call("groups", method, args, options)

    def track(self, **options: Any) -> Any:
        return self.limits("track", ANN, "image", **options)

    def _call(self, which: str, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        cls = CLASSES[self.colour][which]
        of_client = ("timeout", "on_unavailable", "schema", "coalesce", "on_result")
        ours = {name: options.pop(name) for name in of_client if name in options}
        foreign = options.pop("foreign", None)
        if self.colour == "async":
            return asyncio.run(self._wait(cls, method, args, options, ours, foreign))
        client = None
        if foreign is not None:
            client = create_client(URL, foreign.pop("key", KEY), ClientOptions(httpx_client=httpx.Client(), **foreign))
        with cls(client, **ours) as made:
            returned = getattr(made, method)(*args, **options)
            returned = list(returned) if isinstance(returned, Iterator) else returned
        if client is not None:
            client.postgrest.aclose()
        return returned

    async def _wait(
        self, cls: Any, method: str, args: Any, options: dict[str, Any], ours: dict[str, Any], foreign: Any
    ) -> Any:
        client = None
        if foreign is not None:
            http = httpx.AsyncClient()
            client = await create_async_client(
                URL, foreign.pop("key", KEY), AsyncClientOptions(httpx_client=http, **foreign)
            )
        async with cls(client, **ours) as made:
            returned = getattr(made, method)(*args, **options)
            if isinstance(returned, AsyncIterator):
                returned = [item async for item in returned]
            elif isinstance(returned, Awaitable):
                returned = await returned
        if client is not None:
            await client.postgrest.aclose()
        return returned


@pytest.fixture(params=["sync", "async"])
def shell(request: pytest.FixtureRequest) -> Shell:
    return Shell(request.param)
