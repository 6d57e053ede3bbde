"""Worlds in which one and the same scenario is played: of the fake, and of the real thing, in both colours.

In a third colour every call of `track` is a batch, as if it had met others on its way.

A scenario uses `world.limits` and `world.groups` as plain, synchronous clients, whatever they are. All that they answer
and raise is written down, with ids by the order in which they were first seen, so that two worlds can be compared.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from unittest.mock import patch
from uuid import UUID

import httpx
import psycopg
from pydantic import BaseModel
from supabase import AsyncClient, AsyncClientOptions, Client, ClientOptions
from tests.support import clock

from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    GroupManager,
    Hold,
    TokenLimits,
    TokenLimitsError,
    TrackResult,
)
from tokenlimits._core.queue import MAX_WAIT, Flight
from tokenlimits._core.workers import track_together
from tokenlimits.local import LocalStack
from tokenlimits.models import Page, UsageSum
from tokenlimits.testing import FakeAsyncTokenLimits, FakeTokenLimits

Colour = Literal["sync", "async", "batches"]
Scenario = Callable[["World"], None]

ANN, BOB, CYD, NOBODY = (UUID(int=number) for number in (1, 2, 3, 99))
EMAILS = {ANN: "Ann@Example.com", BOB: "bob@example.com", CYD: "cyd@elsewhere.org"}
BASE = datetime(2026, 3, 14, 15, 9, 26, 535897, tzinfo=UTC)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# PostgreSQL's own clock tells these, which no test can turn
_WHENEVER = {"created_at", "joined_at"}


class World:
    """Two clients, a clock that stands still, and what they were heard to say."""

    def __init__(self, limits: Any, groups: Any, set_clock: Callable[[datetime], object]) -> None:
        self.transcript: list[Any] = []
        self._runner = asyncio.Runner()
        self._labels: dict[str, str] = {}
        self._set_clock = set_clock
        self.client = limits
        self.limits: Any = _Heard(self, limits)
        self.groups: Any = _Heard(self, groups)
        self.now = BASE
        self.at(BASE)

    def at(self, moment: datetime) -> None:
        """Set the clock."""
        self.now = moment
        self._set_clock(moment)

    def wait(self, **by: float) -> None:
        """Let time pass."""
        self.at(self.now + timedelta(**by))

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of either colour, and write down what it answers or raises."""
        try:
            answer = method(*args, **kwargs)
            if inspect.iscoroutine(answer):
                answer = self._runner.run(answer)
            elif hasattr(answer, "__aiter__"):
                answer = self._runner.run(_all(answer))
            elif isinstance(answer, Iterator):
                answer = list(answer)
        except TokenLimitsError as error:
            heard = (type(error).__name__, error.code, self._plain(error.detail))
            self.transcript.append((method.__name__, heard))
            raise
        self.transcript.append((method.__name__, self._plain(answer)))
        return answer

    def generation(self, body: Callable[[Hold], object], *args: Any, **kwargs: Any) -> Hold:
        """Run a body inside of a generation, and write down how that ends."""
        manager = self.client.generation(*args, **kwargs)
        holds: list[Hold] = []

        def generation() -> TrackResult:
            with manager if isinstance(manager, AbstractContextManager) else self._as_sync(manager) as hold:
                holds.append(hold)
                body(hold)
            return hold.result

        self.call(generation)
        return holds[0]

    @contextmanager
    def _as_sync(self, manager: AbstractAsyncContextManager[Hold]) -> Iterator[Hold]:
        hold = self.run(manager.__aenter__())
        try:
            yield hold
        except BaseException as error:
            if not self.run(manager.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.run(manager.__aexit__(None, None, None))

    def run(self, coroutine: Any) -> Any:
        """Run something of the world's own."""
        return self._runner.run(coroutine)

    def close(self) -> None:
        self._runner.close()

    def _plain(self, value: Any, field: str = "") -> Any:
        if isinstance(value, BaseModel):
            return {type(value).__name__: self._plain(value.model_dump())}
        if isinstance(value, Page):
            # what `next` says is each server's own
            value = {"page": list(value), "is_last": value.next is None}
        if isinstance(value, dict):
            return {key: self._plain(item, key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            plain = [self._plain(item) for item in value]
            # sums come in the order of their groups' ids, which are random
            unordered = field == "refused" or any(isinstance(item, UsageSum) for item in value)
            return sorted(plain, key=repr) if unordered else plain
        if isinstance(value, datetime) and field in _WHENEVER:
            return "whenever"
        if isinstance(value, UUID | str):
            return _UUID.sub(lambda found: self._label(found[0]), str(value))
        return value

    def _label(self, id_: str) -> str:
        """Users have the same ids everywhere; others are counted as they come."""
        if UUID(id_).int < 2**32:
            return id_
        return self._labels.setdefault(id_, f"#{len(self._labels) + 1}")


class _Heard:
    def __init__(self, world: World, client: object) -> None:
        self._world, self._client = world, client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._world.call(method, *args, **kwargs)


async def _all(items: Any) -> list[Any]:
    return [item async for item in items]


@contextmanager
def fake_world(colour: Colour, users: dict[UUID, str] = EMAILS) -> Iterator[World]:
    """Make a world of the fake, without its group."""
    fake: Any = FakeAsyncTokenLimits(users=users)
    if colour != "async":
        fake = FakeTokenLimits(users=users, coalesce=colour == "batches")
    sync = FakeTokenLimits.groups.fget(fake)  # type: ignore[attr-defined]
    sync.delete(sync.get_by_name("fake").id)

    def set_clock(moment: datetime) -> None:
        fake.now = moment

    world = World(fake, fake.groups, set_clock)
    with _flights_of(colour):
        try:
            yield world
        finally:
            world.close()


@contextmanager
def _flights_of(colour: Colour) -> Iterator[None]:
    if colour != "batches":
        yield
        return
    batch = property(lambda flight: track_together([ticket.call for ticket in flight.tickets], MAX_WAIT))
    with patch.object(Flight, "call", batch):
        yield


@contextmanager
def real_world(
    colour: Colour, stack: LocalStack, owner: psycopg.Connection[Any], users: dict[UUID, str] = EMAILS
) -> Iterator[World]:
    """Make a world of a stack that forgets everything first; its database has the tests' clock."""
    forget_everything(owner, users)
    # without TLS, whose certificates take longer to load than a scenario to play
    sync_http = httpx.Client(trust_env=False, verify=False)
    async_http = httpx.AsyncClient(trust_env=False, verify=False)
    if colour != "async":
        client = Client(stack.url, stack.secret_key, ClientOptions(httpx_client=sync_http))
        limits = TokenLimits(client, coalesce=colour == "batches", schema=stack.schema)
        clients: Any = limits, GroupManager(client, schema=stack.schema)
    else:
        aclient = AsyncClient(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=async_http))
        clients = AsyncTokenLimits(aclient, schema=stack.schema), AsyncGroupManager(aclient, schema=stack.schema)
    world = World(*clients, lambda moment: clock.freeze(owner, moment))
    with sync_http, _flights_of(colour):
        try:
            yield world
        finally:
            world.run(async_http.aclose())
            world.close()


def forget_everything(owner: psycopg.Connection[Any], users: dict[UUID, str]) -> None:
    """Empty every table, and sign up these users."""
    owner.execute(
        """
        delete from public.user_groups;
        delete from auth.users;
        delete from public.generation_usage;
        delete from tokenlimits.usage_rollup;
        delete from tokenlimits.usage_resets;
        delete from tokenlimits.counters;
        delete from tokenlimits.holds;
        """
    )
    owner.execute(
        "insert into auth.users (id, email) select * from unnest(%s::uuid[], %s::text[])",
        [list(users), list(users.values())],
    )
