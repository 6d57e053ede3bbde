"""The real clients over senders that ask the engine instead of Supabase."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from pydantic import AwareDatetime, JsonValue

from tokenlimits._core import arguments
from tokenlimits._core.arguments import Limits
from tokenlimits._core.call import Call
from tokenlimits._drivers.base import DEFAULT_TIMEOUT
from tokenlimits.async_client import AsyncTokenLimits, _AsyncDefault
from tokenlimits.async_groups import AsyncGroupManager
from tokenlimits.client import TokenLimits, _Default
from tokenlimits.groups import GroupManager
from tokenlimits.models import GroupRef, Model, OnUnavailable, Status
from tokenlimits.senders import AsyncSender, Sender
from tokenlimits.telemetry import OnResult

from ._engine import Engine

T = TypeVar("T")
Users = Mapping[UUID | str, str | None]


class TrackedUsage(Model):
    """A generation that a fake has recorded, in its current state; `group` is the group that paid."""

    usage_id: UUID
    user_id: UUID
    kind: str
    cost: int
    status: Status
    group: GroupRef
    metadata: dict[str, JsonValue]
    idempotency_key: str | None
    created_at: AwareDatetime
    expires_at: AwareDatetime | None


class _Asks(Sender):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def send(self, call: Call[T], timeout: float | None = None) -> T:  # noqa: ARG002  # nothing takes any time here
        return call.parse(self._engine.answer(call.function, call.params))

    def close(self) -> None:
        pass

    def __repr__(self) -> str:
        return repr(self._engine)


class _AsyncAsks(AsyncSender):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def send(self, call: Call[T]) -> T:
        await asyncio.sleep(0)  # lets other tasks run, as they would during a real call
        return call.parse(self._engine.answer(call.function, call.params))

    async def aclose(self) -> None:
        pass

    def __repr__(self) -> str:
        return repr(self._engine)


class _Controls:
    """What a test can do with a fake, sync or async."""

    _engine: Engine

    @property
    def sender(self) -> Sender:
        """What answers calls of this fake, for other clients: `GroupManager(fake.sender)`.

        Example:
            >>> from tokenlimits import GroupManager
            >>> fake = FakeTokenLimits({"image": 2})
            >>> [group.name for group in GroupManager(fake.sender).list()]
            ['fake']
        """
        return _Asks(self._engine)

    @property
    def async_sender(self) -> AsyncSender:
        """What answers calls of this fake, for other async clients.

        Example:
            >>> from tokenlimits import AsyncTokenLimits
            >>> fake = FakeTokenLimits({"image": 2})
            >>> limits = AsyncTokenLimits(fake.async_sender, coalesce=True)
            >>> asyncio.run(limits.track("a5f40000-0000-4000-8000-000000000001", "image")).remaining
            1
        """
        return _AsyncAsks(self._engine)

    @property
    def now(self) -> datetime:
        """The fake's current time; it stands still until you set it or call `advance`."""
        return self._engine.now

    @now.setter
    def now(self, moment: datetime) -> None:
        with self._engine.lock:
            self._engine.move_clock(moment)

    def advance(self, by: timedelta) -> None:
        """Move the clock forward.

        Example:
            >>> fake = FakeTokenLimits()
            >>> before = fake.now
            >>> fake.advance(timedelta(hours=1))
            >>> str(fake.now - before)
            '1:00:00'
        """
        with self._engine.lock:
            self._engine.move_clock(self._engine.now + by)

    def fail(self, error: Exception, *, times: int = 1) -> None:
        """Make the next calls fail with this error, including those of `groups`.

        Example:
            >>> from tokenlimits import ServiceUnavailable
            >>> fake = FakeTokenLimits(on_unavailable="deny")
            >>> fake.fail(ServiceUnavailable("Supabase is down"))
            >>> fake.track("a5f40000-0000-4000-8000-000000000001", "image").error
            'Supabase is down'
        """
        with self._engine.lock:
            self._engine.failures.extend([error] * times)

    def sign_in(self, user_id: UUID | str | None) -> None:
        """Let it be a user's session, which `my_usage` answers for; None: the secret key's, as in the beginning.

        Whose session it is decides nothing else here.

        Example:
            >>> fake = FakeTokenLimits({"image": 2})
            >>> fake.sign_in("a5f40000-0000-4000-8000-000000000001")
            >>> [(limit.kind, limit.remaining) for limit in fake.my_usage()]
            [('image', 2)]
        """
        with self._engine.lock:
            self._engine.signed_in = arguments.optional_id(user_id, "user_id")

    @property
    def tracked(self) -> tuple[TrackedUsage, ...]:
        """What was recorded, in order; denied and replayed calls record nothing."""
        with self._engine.lock:
            return tuple(
                TrackedUsage(
                    usage_id=UUID(usage.id),
                    user_id=UUID(usage.user_id),
                    kind=usage.kind,
                    cost=usage.cost,
                    status=usage.status,
                    group=GroupRef.model_validate(self._engine.reference(usage.group_id)),
                    metadata=usage.metadata,
                    idempotency_key=usage.idempotency_key,
                    created_at=usage.created_at,
                    expires_at=usage.expires_at,
                )
                for usage in self._engine.ledger
            )


def _make_engine(limits: Limits | None, users: Users | None) -> Engine:
    return Engine(
        None if limits is None else arguments.limits(limits),
        None if users is None else dict(zip(arguments.ids(users, "users"), users.values(), strict=True)),
    )


class FakeTokenLimits(_Controls, TokenLimits):
    """A `TokenLimits` for tests: the whole contract, in memory, with a clock that stands still.

    Everybody is in one group named "fake", which has these limits. It is the default group: a user whom you add to
    another group with `groups` is only in that one.

    Args:
        limits: A list of `Limit`, or the shorthand `{"image": 2}` for lifetime limits. Without (None), every kind
            is allowed and unlimited; with no limits (`{}`), no kind is allowed.
        users: The existing users, with their e-mail addresses; for others, `groups` raises `UnknownUser`. By default,
            any id is a user's.
        timeout: Like the real client's; nothing takes any time here.
        on_unavailable: Like the real client's: what `track`, `check` and `reserve` do after
            `fail(ServiceUnavailable(…))`.
        coalesce: Like the real client's: calls that wait at the same time become one call of `track_generations`,
            which can `fail` as a whole.
        schema: Like the real client's; it is checked, but makes no difference here.
        allow_http: Like the real client's; nothing is sent here.
        on_result: Like the real client's; each call is one attempt.

    Example:
        >>> fake = FakeTokenLimits(limits={"image": 2})
        >>> user_id = "a5f40000-0000-4000-8000-000000000001"
        >>> [fake.track(user_id, "image").allowed for _ in range(3)]
        [True, True, False]
        >>> [usage.cost for usage in fake.tracked]
        [1, 1]
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        users: Users | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        on_unavailable: OnUnavailable = "raise",
        coalesce: bool = False,
        schema: str | None = None,
        allow_http: bool = False,
        on_result: OnResult | None = None,
    ) -> None:
        self._on_result = on_result
        self._engine = _make_engine(limits, users)
        super().__init__(
            self.sender,
            timeout=timeout,
            on_unavailable=on_unavailable,
            coalesce=coalesce,
            schema=schema,
            allow_http=allow_http,
            on_result=on_result,
        )

    @property
    def groups(self) -> FakeGroupManager:
        """The groups of this fake: set up more groups, or read usage and history.

        Example:
            >>> fake = FakeTokenLimits()
            >>> pro = fake.groups.create("Pro", limits={"image": 100})
            >>> fake.groups.add_member(pro.id, "a5f40000-0000-4000-8000-000000000001")
            True
        """
        return FakeGroupManager(self)

    def in_both_colours(self) -> tuple[TokenLimits, AsyncTokenLimits]:
        """Return this and an async client of the same fake, which behave alike; `override` takes both.

        Example:
            >>> limits, async_limits = FakeTokenLimits({"image": 2}).in_both_colours()
            >>> limits.track("a5f40000-0000-4000-8000-000000000001", "image").remaining
            1
            >>> asyncio.run(async_limits.track("a5f40000-0000-4000-8000-000000000001", "image")).remaining
            0
        """
        return self, AsyncTokenLimits(
            self.async_sender,
            on_unavailable=self._on_unavailable,
            coalesce=self._coalescer is not None,
            on_result=self._on_result,
        )


class FakeAsyncTokenLimits(_Controls, AsyncTokenLimits):
    """An `AsyncTokenLimits` for tests; see `FakeTokenLimits`. It works in any event loop.

    Args:
        limits: A list of `Limit`, or the shorthand `{"image": 2}` for lifetime limits. Without (None), every kind
            is allowed and unlimited; with no limits (`{}`), no kind is allowed.
        users: The existing users, with their e-mail addresses; for others, `groups` raises `UnknownUser`. By default,
            any id is a user's.
        timeout: Like the real client's; nothing takes any time here.
        on_unavailable: Like the real client's: what `track`, `check` and `reserve` do after
            `fail(ServiceUnavailable(…))`.
        coalesce: Like the real client's: calls that wait at the same time become one call of `track_generations`,
            which can `fail` as a whole.
        schema: Like the real client's; it is checked, but makes no difference here.
        allow_http: Like the real client's; nothing is sent here.
        on_result: Like the real client's; each call is one attempt.

    Example:
        >>> fake = FakeAsyncTokenLimits(limits={"image": 2})
        >>> asyncio.run(fake.track("a5f40000-0000-4000-8000-000000000001", "image")).remaining
        1
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        users: Users | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        on_unavailable: OnUnavailable = "raise",
        coalesce: bool = False,
        schema: str | None = None,
        allow_http: bool = False,
        on_result: OnResult | None = None,
    ) -> None:
        self._on_result = on_result
        self._engine = _make_engine(limits, users)
        super().__init__(
            self.async_sender,
            timeout=timeout,
            on_unavailable=on_unavailable,
            coalesce=coalesce,
            schema=schema,
            allow_http=allow_http,
            on_result=on_result,
        )

    @property
    def groups(self) -> FakeAsyncGroupManager:
        """The groups of this fake: set up more groups, or read usage and history.

        Example:
            >>> fake = FakeAsyncTokenLimits({"image": 2})
            >>> [group.name for group in asyncio.run(fake.groups.list())]
            ['fake']
        """
        return FakeAsyncGroupManager(self)

    def in_both_colours(self) -> tuple[TokenLimits, AsyncTokenLimits]:
        """Return a sync client of the same fake, which behaves alike, and this; see `FakeTokenLimits`."""
        sync = TokenLimits(
            self.sender,
            on_unavailable=self._on_unavailable,
            coalesce=self._coalescer is not None,
            on_result=self._on_result,
        )
        return sync, self


AnyFake = FakeTokenLimits | FakeAsyncTokenLimits
F = TypeVar("F", bound=AnyFake)


class FakeGroupManager(GroupManager):
    """A `GroupManager` of a fake's groups.

    Args:
        fake: The fake, sync or async.

    Example:
        >>> fake = FakeTokenLimits({"image": 2})
        >>> [group.name for group in FakeGroupManager(fake).list()]
        ['fake']
    """

    def __init__(self, fake: AnyFake) -> None:
        super().__init__(fake.sender)


class FakeAsyncGroupManager(AsyncGroupManager):
    """An `AsyncGroupManager` of a fake's groups.

    Args:
        fake: The fake, sync or async.
    """

    def __init__(self, fake: AnyFake) -> None:
        super().__init__(fake.async_sender)


@contextmanager
def override(fake: F) -> Generator[F]:
    """Make `track_generation` and `atrack_generation` use a fake in all threads and event loops, inside a `with` block.

    A sync or an async fake serves both. As a decorator, it works on plain functions; an `async def` needs the `with`
    inside. Calls with `client=` are not affected.

    Args:
        fake: The fake, which `with … as` returns.

    Example:
        >>> from tokenlimits import track_generation
        >>> with override(FakeTokenLimits(limits={"image": 2})) as fake:
        ...     track_generation("a5f40000-0000-4000-8000-000000000001", "image").remaining
        1
        >>> len(fake.tracked)
        1
    """
    before = _Default.current, _AsyncDefault.current
    _Default.current, _AsyncDefault.current = fake.in_both_colours()
    try:
        yield fake
    finally:
        _Default.current, _AsyncDefault.current = before
