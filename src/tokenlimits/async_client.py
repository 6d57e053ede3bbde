"""For generation workers in asyncio: ask before you spend money."""
# SYNC: workers in asyncio => workers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from typing import Any, Self
from uuid import UUID

from supabase import AsyncClient

from ._core import arguments, workers
from ._core.call import Call
from ._core.workers import DEFAULT_TTL, Settlement
from ._drivers import limited, sessions
from ._drivers.base import DEFAULT_TIMEOUT, AsyncBase
from ._drivers.coalescing import AsyncCoalescer
from ._drivers.generations import AsyncGeneration
from ._drivers.heartbeat import AsyncHeartbeat
from ._drivers.holds import AsyncHold
from ._drivers.limited import AsyncFunction
from .errors import ServiceUnavailable
from .models import GenerationRequest, OnUnavailable, Overage, TrackResult, UserLimit
from .senders import AsyncSender
from .telemetry import OnResult

__all__ = ["AsyncTokenLimits", "atrack_generation"]


class AsyncTokenLimits(AsyncBase):
    """Checks and records generations.

    Safe to share between tasks, and to use in several event loops and after a fork when made by `from_env`.

    Args:
        client: A `supabase.AsyncClient` with the secret (service_role) key. It stays yours: closing this doesn't
            close it. Without one, see `from_env`. Or an `AsyncSender`, which answers calls in a way of its own.
        timeout: Seconds for one call, including its retries.
        on_unavailable: What `track`, `check` and `reserve` do when Supabase can't be reached: `"raise"`
            ServiceUnavailable, `"allow"` the generation (it is not recorded), or `"deny"` it. With `"allow"`, `commit`,
            `release` and `extend` don't raise it either. A wrong key or a missing schema always raises an error.
        coalesce: Combine calls of `track` into one request: while a request is under way, further calls queue for the
            next one. Each call still has its own result, error and timeout. A lone call is sent at once.
        schema: The schema that tokenlimits is installed in; by default `TOKENLIMITS_SCHEMA` from the environment or
            `.env`, read on first use, or public. The client's own schema doesn't matter.
        allow_http: Send the key unencrypted (`http://`) to another machine, as in a private network;
            `TOKENLIMITS_ALLOW_HTTP=1` allows it too. This machine is always allowed.
        on_result: Called after each call with a `CallResult`: its attempts, how long it took, how it ended. It
            must be quick; an error in it is logged, and changes nothing. Coalesced calls are one call.

    Example:
        >>> async with AsyncTokenLimits.from_env() as limits:
        ...     (await limits.track(user_id, "image")).allowed
        True
    """

    # SYNC: between tasks, and to use in several event loops and after => between threads, and to use after

    def __init__(
        self,
        client: AsyncClient | AsyncSender | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        on_unavailable: OnUnavailable = "raise",
        coalesce: bool = False,
        schema: str | None = None,
        allow_http: bool = False,
        on_result: OnResult | None = None,
    ) -> None:
        super().__init__(client, timeout, schema, allow_http=allow_http, on_result=on_result)
        self._on_unavailable: OnUnavailable = arguments.policy(on_unavailable)
        together = arguments.flag(coalesce, "coalesce")
        self._coalescer = AsyncCoalescer(self._transport.send, self._timeout) if together else None
        self._heartbeat = AsyncHeartbeat(self._transport.send, self._timeout)

    @classmethod
    def from_env(
        cls,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        on_unavailable: OnUnavailable = "raise",
        coalesce: bool = False,
        schema: str | None = None,
        allow_http: bool = False,
        on_result: OnResult | None = None,
    ) -> Self:
        """Make one for `SUPABASE_URL` and `SUPABASE_SECRET_KEY` (or `SUPABASE_SERVICE_ROLE_KEY`), read on first use.

        Args:
            timeout: Seconds for one call, including its retries.
            on_unavailable: See the class.
            coalesce: See the class.
            schema: See the class.
            allow_http: See the class.
            on_result: See the class.

        Raises:
            ConfigurationError: On first use, when a variable is missing.

        Example:
            >>> limits = AsyncTokenLimits.from_env(timeout=5, on_unavailable="allow")
        """
        return cls(
            timeout=timeout,
            on_unavailable=on_unavailable,
            coalesce=coalesce,
            schema=schema,
            allow_http=allow_http,
            on_result=on_result,
        )

    async def track(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        idempotency_key: UUID | str | int | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrackResult:
        """Check every limit that applies and record the generation, in one atomic step.

        Call it before you spend money. A denied generation leaves no usage and no charge.

        Args:
            user_id: Who generates.
            kind: What is generated, like `"image"` or `"video"`.
            cost: How much it takes from the limits.
            idempotency_key: The job's own id (text, a UUID, or an int, which are the same key as their text): repeated
                calls charge once and return the same result, `replayed`. Take it from your job, never from an end user.
                Without one, the client makes one for its own retries.
            group_id: Which of the user's groups pays; by default the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Returns:
            Whether it is allowed, what remains, and when it resets. Truthy when allowed.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent.
            IdempotencyConflict: The key was used for another request of this user.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).
            AccessDenied, SchemaNotInstalled, SchemaOutdated, ConfigurationError: The setup is wrong or incomplete.

        Example:
            >>> result = await limits.track(user_id, "image", idempotency_key="job-1")
            >>> result.allowed, result.remaining
            (True, 99)
            >>> (await limits.track(user_id, "image", idempotency_key="job-1")).replayed
            True
        """
        call = workers.track(user_id, kind, cost, idempotency_key, group_id, metadata)
        return await self._judged(call, by=self._coalescer)

    async def track_many(self, requests: Iterable[GenerationRequest | Mapping[str, Any]]) -> list[TrackResult]:
        """Track many generations at once: each is judged by itself, in the order given.

        Up to a thousand are sent and judged as one call, many times faster than one after another. More are split.

        Args:
            requests: What `track` takes, as `GenerationRequest`s (or mappings with their fields). With idempotency keys
                all may be sent again after an error: what is already recorded is returned as `replayed`.

        Returns:
            One result for each request, in the same order. A request that `track` would raise an error for (its key was
            used for another request, its group doesn't exist) affects no other: it is denied with the reason
            `"refused"`, and `raise_if_denied` raises that error.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent. Its field is like `requests[3].cost`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`). Of more than a thousand,
                some may have been recorded.
            AccessDenied, SchemaNotInstalled, SchemaOutdated, ConfigurationError: The setup is wrong or incomplete.

        Example:
            >>> jobs = [GenerationRequest(user_id=user_id, kind="image", cost=cost) for cost in (1, 200, 2)]
            >>> [(result.allowed, result.remaining) for result in await limits.track_many(jobs)]
            [(True, 99), (False, 99), (True, 97)]
        """
        return [result for call in workers.track_many(requests) for result in await self._judged_together(call)]

    async def check(
        self, user_id: UUID | str, kind: str, cost: int = 1, *, group_id: UUID | str | None = None
    ) -> TrackResult:
        """Return what `track` would answer now, without recording anything.

        Others may use the room before you call `track`; only `track` decides.

        Args:
            user_id: Who would generate.
            kind: What would be generated.
            cost: How much it would take from the limits.
            group_id: Which of the user's groups would pay.

        Returns:
            The answer; `remaining` is what remains now.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).

        Example:
            >>> (await limits.check(user_id, "image", cost=101)).error
            'Image generation limit exceeded: 0 of 100 used in total, 101 more asked for'
        """
        return await self._judged(workers.check(user_id, kind, cost, group_id))

    async def record(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        created_at: datetime | None = None,
        idempotency_key: UUID | str | int | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrackResult:
        """Record usage that has already happened; this is never denied, so counters may pass their max.

        Args:
            user_id: Who generated.
            kind: What was generated.
            cost: How much it takes from the limits of its period.
            created_at: When it happened, with a time zone; now when None.
            idempotency_key: Calls with the same key are recorded once: pass one when you import.
            group_id: Which group it is recorded for (the user may have left it); by default the first of the
                user's groups that has a limit for the kind.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Returns:
            The usage, and what remains of the limits now.

        Raises:
            InvalidRequest: An argument is not valid, `created_at` lies in the future, or the user is in no group.
            IdempotencyConflict: The key was used for another request of this user.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time.

        Example:
            >>> from datetime import datetime, timezone
            >>> (await limits.record(user_id, "image", created_at=datetime(2026, 1, 31, tzinfo=timezone.utc))).status
            'committed'
        """
        call = workers.record(user_id, kind, cost, created_at, idempotency_key, group_id, metadata)
        return await self._transport.send(call)

    async def usage(self, user_id: UUID | str) -> tuple[UserLimit, ...]:
        """List every limit that applies to a user, with used, remaining and reset_at.

        Args:
            user_id: Whose.

        Returns:
            The limits of all the user's groups, in the order in which groups pay, with those of the groups above each
            that count the user's usage (`group` says whose a limit is); for a user in no group, those of the default
            group.

        Raises:
            InvalidRequest: `user_id` is not a UUID.
            ServiceUnavailable: Supabase could not be reached in time.

        Example:
            >>> [(limit.kind, limit.used, limit.max) for limit in await limits.usage(user_id)]
            [('image', 0, 100), ('video', 0, 20)]
        """
        return await self._transport.send(workers.usage(user_id))

    async def my_usage(self) -> tuple[UserLimit, ...]:
        """List every limit that binds the user whose session the client has, with used, remaining and reset_at.

        It takes a client with the access token of a signed-in user, who needs no other right. The secret key is
        nobody's: `usage` answers it about anybody.

        Returns:
            What `usage` answers about that user.

        Raises:
            AccessDenied: The client has no user's session, or one that has ended.
            ServiceUnavailable: Supabase could not be reached in time.

        Example:
            >>> mine = AsyncTokenLimits(session)
            >>> [(limit.kind, limit.remaining) for limit in await mine.my_usage()]
            [('image', 100), ('video', 20)]
        """
        return await self._transport.send(workers.my_usage())

    async def reserve(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        ttl: int = DEFAULT_TTL,
        idempotency_key: UUID | str | int | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrackResult:
        """Hold the cost of a generation until it is committed or released, or `ttl` expires.

        Meanwhile it counts as used. `generation` reserves and settles in one `with` statement.

        Args:
            user_id: Who generates.
            kind: What is generated, like `"image"` or `"video"`.
            cost: The most that it may take from the limits.
            ttl: Seconds until the hold expires, up to 30 days; allow for the longest that the work can take. The hold
                of a killed worker is given back then.
            idempotency_key: The job's own id: repeated calls return the same hold, `replayed`. Take it from your job,
                never from an end user. Without one, the client makes one for its own retries.
            group_id: Which of the user's groups pays; by default the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Returns:
            Whether it is allowed, and the `usage_id` to settle; see `track`.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent.
            IdempotencyConflict: The key was used for another request of this user.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).

        Example:
            >>> hold = await limits.reserve(user_id, "video", cost=8, ttl=600)
            >>> hold.status, hold.remaining
            ('reserved', 12)
        """
        call = workers.reserve(user_id, kind, cost, ttl, idempotency_key, group_id, metadata)
        return await self._judged(call)

    async def commit(
        self, usage_id: UUID | str | None, cost: int | None = None, overage: Overage = "reject"
    ) -> TrackResult:
        """Settle a hold for what was reserved, for less or for more; repeating the commit changes nothing.

        Args:
            usage_id: The hold's. With None (`on_unavailable` allowed it unrecorded), nothing is done.
            cost: 0 or more; what was reserved when None.
            overage: `"charge"`: the cost may be more than was reserved, and is charged even if the hold has expired or
                a limit has no room for it: the work was done. It counts in the periods in which it was reserved.

        Returns:
            The usage, and what remains of the limits now. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: An argument is not valid, or the cost is more than was reserved without `overage="charge"`.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was released or refunded, or committed for another cost.
            HoldExpired: It has expired, and its periods have ended or have no room left for it; nothing was charged.
            ServiceUnavailable: Supabase could not be reached in time; it is safe to repeat (see `on_unavailable`).

        Example:
            >>> hold = await limits.reserve(user_id, "video", cost=8)
            >>> result = await limits.commit(hold.usage_id, cost=5)
            >>> result.status, result.cost, result.remaining
            ('committed', 5, 15)
        """
        return await self._settled(workers.commit(usage_id, cost, overage))

    async def extend(self, usage_id: UUID | str | None, ttl: int = DEFAULT_TTL) -> TrackResult:
        """Let a hold expire `ttl` seconds from now, if that is later than before; repeating it does no harm.

        It never shortens a hold, and none lasts longer than 30 days after it was reserved, however often it is
        extended.
        `generation(…, heartbeat=True)` does this by itself.

        Args:
            usage_id: The hold's. With None (`on_unavailable` allowed it unrecorded), nothing is done.
            ttl: Seconds from now until the hold expires, up to 30 days.

        Returns:
            The usage, with its `expires_at`. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: An argument is not valid.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was committed, released or refunded, or was never a hold.
            HoldExpired: It has expired already. It may still be committed if there is room.
            ServiceUnavailable: Supabase could not be reached in time; it is safe to repeat (see `on_unavailable`).

        Example:
            >>> hold = await limits.reserve(user_id, "video", cost=8, ttl=60)
            >>> extended = await limits.extend(hold.usage_id, ttl=600)
            >>> extended.expires_at > hold.expires_at
            True
        """
        return await self._settled(workers.extend_if_recorded(usage_id, ttl))

    async def release(self, usage_id: UUID | str | None) -> TrackResult:
        """Give back the whole cost of a hold; repeating it changes nothing, nor does releasing an expired hold.

        Args:
            usage_id: The hold's. With None (`on_unavailable` allowed it unrecorded), nothing is done.

        Returns:
            The usage, and what remains of the limits now. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: `usage_id` is not a UUID.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was committed or refunded.
            ServiceUnavailable: Supabase could not be reached in time; it is safe to repeat (see `on_unavailable`).

        Example:
            >>> hold = await limits.reserve(user_id, "video", cost=8)
            >>> (await limits.release(hold.usage_id)).remaining
            20
        """
        return await self._settled(workers.release(usage_id))

    async def refund(self, usage_id: UUID | str | None) -> TrackResult:
        """Give back what a committed usage cost, tracked or held; repeating it changes nothing.

        Args:
            usage_id: The usage's. With None (`on_unavailable` allowed it unrecorded), nothing is done.

        Returns:
            The usage, and what remains of the limits now. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: `usage_id` is not a UUID, or is that of a hold that isn't committed: release it instead.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was released, or has expired.
            ServiceUnavailable: Supabase could not be reached in time, whatever `on_unavailable` says.

        Example:
            >>> tracked = await limits.track(user_id, "image")
            >>> (await limits.refund(tracked.usage_id)).status
            'refunded'
        """
        return await self._settled(workers.refund_if_recorded(usage_id))

    def generation(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        ttl: int = DEFAULT_TTL,
        heartbeat: bool = False,
        idempotency_key: UUID | str | int | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AbstractAsyncContextManager[AsyncHold, None]:
        """Reserve before the body, settle after it: `async with limits.generation(user_id, "video", cost=8) as hold`.

        A normal end commits what was reserved, or what `hold.commit` said. An abnormal end (an exception of any kind, a
        cancellation, a generator that is closed early) commits what `hold.used` declared so far, or releases everything
        if nothing was declared. The body's own exception always propagates; an error of settling is logged, and added
        to it as a note.

        A cancelled task settles before it ends. A process that is killed doesn't settle: `ttl` gives the hold back. So
        where the work may take long, choose a short `ttl` and `heartbeat=True`.

        With the key of a job that is already committed, the body runs (see `hold.replayed`) and isn't charged again.

        Args:
            user_id: Who generates.
            kind: What is generated, like `"image"` or `"video"`.
            cost: The most that it may take from the limits.
            ttl: Seconds until the hold expires, up to 30 days; allow for the longest that the work can take, or let
                `heartbeat` extend it.
            heartbeat: Extend the hold by `ttl` again and again while the body runs, in a task that all bodies of this
                client share. If Supabase can't be reached, that is logged and tried again. If the hold has
                expired all the same, that is logged too. The body isn't disturbed.
            idempotency_key: The job's own id: charged once, however often the job is retried.
            group_id: Which of the user's groups pays; by default the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Raises:
            GenerationDenied: As `LimitExceeded`, `NotInGroup` or `NoLimitForKind`; the body doesn't run.
            HoldExpired: The body ended normally, after `ttl`, and there is no room left for it; nothing was charged.
            AlreadySettled: The body ended normally, but somebody else has settled the hold.
            ServiceUnavailable: Supabase could not be reached in time. If the body ended normally, the hold lasts until
                `ttl` expires; until then, retry `limits.commit(hold.usage_id)`. With `on_unavailable="allow"` neither
                reserving nor settling raises this, and `hold.result.reason` is `"unavailable"`.
            InvalidRequest, IdempotencyConflict, GroupNotFound: See `reserve`.

        Example:
            >>> async with limits.generation(user_id, "video", cost=8) as hold:
            ...     for seconds in (1.5, 3.2):
            ...         hold.used(round(seconds))
            >>> hold.status, hold.result.cost
            ('committed', 8)
        """
        # SYNC: A cancelled task settles before it ends. A process => A process
        # SYNC: in a task that => in a thread that
        call = workers.reserve(user_id, kind, cost, ttl, idempotency_key, group_id, metadata)
        return self._open(call, heartbeat=arguments.flag(heartbeat, "heartbeat"))

    def limited(
        self,
        kind: str,
        *,
        user: str | Callable[..., UUID | str],
        cost: int | Callable[..., int] = 1,
        ttl: int = DEFAULT_TTL,
        heartbeat: bool = False,
        idempotency_key: str | Callable[..., UUID | str | int | None] | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Callable[[AsyncFunction], AsyncFunction]:
        """Run each call of an async function or generator inside a `generation`.

        A generator reserves when it is first asked for an item. Closing it early is an abnormal end, so its hold is
        released: to charge for a part, use `generation` and `hold.used` in its body.

        If only settling fails, the error's `returned` is what the function returned.

        Args:
            kind: What is generated, like `"image"` or `"video"`.
            user: The name of the parameter that is the user's id, or a function of the same arguments that returns it.
            cost: The most that a call may take from the limits, or a function of the same arguments that returns it.
            ttl: Seconds until the hold expires, up to 30 days; allow for the longest that the work can take, or let
                `heartbeat` extend it.
            heartbeat: Extend the hold again and again while the function runs; see `generation`.
            idempotency_key: The name of the parameter that is the job's own id, or a function of the same arguments
                that returns it.
            group_id: Which of the user's groups pays; by default the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Raises:
            ConfigurationError: When decorated: the function has no such parameter, or is not async.
            InvalidRequest: When decorated: an argument can't be valid.
            GenerationDenied: When called; so is whatever else `generation` raises.

        Example:
            >>> @limits.limited("image", user="user_id", cost=lambda prompt, **_: len(prompt.split()))
            ... async def generate(prompt, user_id):
            ...     return f"a picture of {prompt}"
            >>> await generate("two cats", user_id=user_id)
            'a picture of two cats'
            >>> (await limits.usage(user_id))[0].used
            2
        """
        # SYNC: or is not async => or is async
        open_ = partial(self._open, heartbeat=arguments.flag(heartbeat, "heartbeat"))
        return lambda function: limited.async_decorated(
            function,
            limited.reservation(function, kind, user, cost, ttl, idempotency_key, group_id, metadata),
            open_,
        )

    async def aclose(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open.

        Coalesced calls that are queued or under way get their results first.

        Example:
            >>> await limits.aclose()
        """
        try:
            if self._coalescer is not None:
                await self._coalescer.drain()
        finally:
            await super().aclose()

    def _open(self, call: Call[TrackResult], *, heartbeat: bool) -> AsyncGeneration:
        return AsyncGeneration(call, self._judged, self._settled, self._heartbeat if heartbeat else None)

    async def _judged(self, call: Call[TrackResult], by: AsyncCoalescer | AsyncSender | None = None) -> TrackResult:
        try:
            return await (by or self._transport).send(call)
        except ServiceUnavailable as error:
            return workers.without_service(call, self._on_unavailable, error)

    async def _judged_together(self, call: Call[list[TrackResult]]) -> list[TrackResult]:
        try:
            return await self._transport.send(call)
        except ServiceUnavailable as error:
            return workers.batch_without_service(call, self._on_unavailable, error)

    async def _settled(self, settlement: Settlement) -> TrackResult:
        if isinstance(settlement, TrackResult):
            return settlement
        try:
            return await self._transport.send(settlement)
        except ServiceUnavailable as error:
            return workers.settlement_without_service(settlement, self._on_unavailable, error)


class _AsyncDefault:
    """The client behind `atrack_generation`: made on first use, replaced by `tokenlimits.testing.override`."""

    current: AsyncTokenLimits | None = None

    @classmethod
    def choose(cls, client: AsyncTokenLimits | AsyncClient | None) -> AsyncTokenLimits:
        """Wrap what was passed in, or take the default."""
        if isinstance(client, AsyncTokenLimits):
            return client
        if client is not None:
            return AsyncTokenLimits(client)
        with sessions.lock():
            if cls.current is None:
                cls.current = AsyncTokenLimits.from_env()
            return cls.current


async def atrack_generation(
    user_id: UUID | str,
    kind: str,
    cost: int = 1,
    *,
    idempotency_key: UUID | str | int | None = None,
    group_id: UUID | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    client: AsyncTokenLimits | AsyncClient | None = None,
) -> TrackResult:
    """Check every limit that applies and record the generation, in one atomic step; see `AsyncTokenLimits.track`.

    Args:
        user_id: Who generates.
        kind: What is generated, like `"image"` or `"video"`.
        cost: How much it takes from the limits.
        idempotency_key: The job's own id: a repeated call charges once.
        group_id: Which of the user's groups pays.
        metadata: A JSON object that is kept with the usage, at most 8 kB.
        client: An `AsyncTokenLimits` or an async Supabase client; made from the environment on first use if None.

    Returns:
        Whether it is allowed, what remains, and when it resets. Truthy when allowed.

    Example:
        >>> result = await atrack_generation(user_id, "image")
        >>> if not result:
        ...     raise RuntimeError(result.error)
    """
    return await _AsyncDefault.choose(client).track(
        user_id, kind, cost, idempotency_key=idempotency_key, group_id=group_id, metadata=metadata
    )
