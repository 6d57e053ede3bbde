"""The part of `AsyncTokenLimits` that holds a cost while the work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

from . import _arguments, _batches, _calls, _limited, _settlements
from ._arguments import OnUnavailable
from ._base import AsyncBase
from ._calls import Call
from ._coalescing import AsyncCoalescer
from ._generations import AsyncGeneration
from ._hold import Hold
from ._limited import AsyncFunction
from ._settlements import DEFAULT_TTL, Settlement
from ._transport import AsyncTransport
from .errors import ServiceUnavailable
from .models import TrackResult


class AsyncHolding(AsyncBase):
    """Reserves and settles, in single steps or around a body of work."""

    def __init__(
        self, client: object, timeout: float, on_unavailable: OnUnavailable, *, coalesce: bool, schema: str | None
    ) -> None:
        super().__init__(client, timeout, schema)
        self._on_unavailable: OnUnavailable = _arguments.policy(on_unavailable)
        self._coalesce = _arguments.flag(coalesce, "coalesce")
        self._travel_by(self._transport)

    async def reserve(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        ttl: int = DEFAULT_TTL,
        idempotency_key: str | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrackResult:
        """Hold the cost of a generation until it is committed or released, or until `ttl` is over.

        It counts as used meanwhile. `generation` does this and the settling in one `with`.

        Args:
            user_id: Who generates.
            kind: What is generated, like `"image"` or `"video"`.
            cost: The most that it may take from the limits.
            ttl: For how many seconds it holds, up to 30 days: longer than the work takes at worst. What is left behind
                by a worker that died is given back then.
            idempotency_key: The job's own id: a repeated call answers the same hold, `replayed`. Take it from your job,
                never from an end user. Without one the client makes one for its own retries.
            group_id: Which of the user's groups pays; without it the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Returns:
            Whether it is allowed, and the `usage_id` to settle; see `track`.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent.
            IdempotencyConflict: The key was used for another request of this user.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).
        """
        call = _settlements.reserve(user_id, kind, cost, ttl, idempotency_key, group_id, metadata)
        return await self._judged(call)

    async def commit(self, usage_id: UUID | str | None, cost: int | None = None) -> TrackResult:
        """Settle a hold for what was reserved, or for less; the same commit again changes nothing.

        Args:
            usage_id: Of the hold. With None (nothing was recorded, as `on_unavailable` allowed) nothing is done.
            cost: From 0 to what was reserved, which is meant when None.

        Returns:
            The usage, and what remains of the limits now. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: An argument is not valid, or more than was reserved.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was released or refunded, or committed for another cost.
            HoldExpired: Its time was over, and its period is too, or there is no room for it any more; not charged.
            ServiceUnavailable: Supabase could not be reached in time; it may be repeated (see `on_unavailable`).
        """
        return await self._settled(_settlements.commit(usage_id, cost))

    async def release(self, usage_id: UUID | str | None) -> TrackResult:
        """Give back all that a hold holds; the same again changes nothing, also when the hold has expired.

        Args:
            usage_id: Of the hold. With None (nothing was recorded, as `on_unavailable` allowed) nothing is done.

        Returns:
            The usage, and what remains of the limits now. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: `usage_id` is not a UUID.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was committed or refunded.
            ServiceUnavailable: Supabase could not be reached in time; it may be repeated (see `on_unavailable`).
        """
        return await self._settled(_settlements.release(usage_id))

    async def refund(self, usage_id: UUID | str | None) -> TrackResult:
        """Give back what a committed usage cost, tracked or held; the same again changes nothing.

        Args:
            usage_id: Of the usage. With None (nothing was recorded, as `on_unavailable` allowed) nothing is done.

        Returns:
            The usage, and what remains of the limits now. Its `reason` is `"unavailable"` when nothing was done.

        Raises:
            InvalidRequest: `usage_id` is not a UUID, or a hold's that was not committed: release that.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was released, or has expired.
            ServiceUnavailable: Supabase could not be reached in time, whatever `on_unavailable` says.
        """
        return await self._settled(_settlements.refund_if_recorded(usage_id))

    def generation(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        ttl: int = DEFAULT_TTL,
        idempotency_key: str | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AbstractAsyncContextManager[Hold, None]:
        """Reserve before the body, settle after it: `async with limits.generation(user_id, "video", cost=8) as hold`.

        A normal end commits what was reserved, or what `hold.commit` said. An abnormal one (an exception of any kind, a
        cancellation, a generator that is closed early) commits what `hold.used` declared so far, and releases all when
        nothing was declared. The body's own error always goes on: one of settling is logged, and is a note of it.

        A cancelled task settles before it ends. A process that is killed doesn't: `ttl` gives the hold back.

        With the key of a job that was committed before, the body runs (see `hold.replayed`), and is not charged again.

        Args:
            user_id: Who generates.
            kind: What is generated, like `"image"` or `"video"`.
            cost: The most that it may take from the limits.
            ttl: For how many seconds it holds, up to 30 days: longer than the work takes at worst.
            idempotency_key: The job's own id: charged once, however often the job is tried.
            group_id: Which of the user's groups pays; without it the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Raises:
            GenerationDenied: As `LimitExceeded`, `NotInGroup` or `NoLimitForKind`; the body doesn't run.
            HoldExpired: After a good body that took longer than `ttl`: there is no room for it any more. Not charged.
            AlreadySettled: After a good body: somebody else settled the hold.
            ServiceUnavailable: Supabase could not be reached in time. After a good body: the hold lasts until `ttl` is
                over, and `limits.commit(hold.usage_id)` may be repeated until then. With `on_unavailable="allow"`
                neither end raises this, and `hold.result.reason` is `"unavailable"`.
            InvalidRequest, IdempotencyConflict, GroupNotFound: See `reserve`.
        """
        return self._open(_settlements.reserve(user_id, kind, cost, ttl, idempotency_key, group_id, metadata))

    def limited(
        self,
        kind: str,
        *,
        user: str | Callable[..., UUID | str],
        cost: int | Callable[..., int] = 1,
        ttl: int = DEFAULT_TTL,
        idempotency_key: str | Callable[..., str | None] | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Callable[[AsyncFunction], AsyncFunction]:
        """Run each call of a function or generator (async ones with `AsyncTokenLimits`) inside of a `generation`.

        A generator reserves when it is first asked for an item. One that is closed before its end has ended abnormally
        and is released: to charge for a part, use `generation` in its body, and `hold.used`.

        When only settling fails after the function returned, the error's `returned` is what it returned.

        Args:
            kind: What is generated, like `"image"` or `"video"`.
            user: The name of the parameter that is the user's id, or a function of the same arguments that answers it.
            cost: The most that a call may take from the limits, or a function of the same arguments that answers it.
            ttl: For how many seconds it holds, up to 30 days: longer than the work takes at worst.
            idempotency_key: The name of the parameter that is the job's own id, or a function of the same arguments
                that answers it.
            group_id: Which of the user's groups pays; without it the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Raises:
            ConfigurationError: When decorated: the function has no such parameter, or is async with `TokenLimits`, or
                is not with `AsyncTokenLimits`.
            InvalidRequest: When decorated: an argument can't be valid.
            GenerationDenied: When called, and what else `generation` raises.
        """
        return lambda function: _limited.async_decorated(
            function,
            _limited.reservation(function, kind, user, cost, ttl, idempotency_key, group_id, metadata),
            self._open,
        )

    async def aclose(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open.

        Calls that travel together have their answers first.
        """
        try:
            if self._coalescer is not None:
                await self._coalescer.drain()
        finally:
            await super().aclose()

    def _travel_by(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._coalescer = AsyncCoalescer(transport.send, transport.timeout) if self._coalesce else None

    def _open(self, call: Call[TrackResult]) -> AsyncGeneration:
        return AsyncGeneration(call, self._judged, self._settled)

    async def _judged(self, call: Call[TrackResult], by: AsyncCoalescer | AsyncTransport | None = None) -> TrackResult:
        try:
            return await (by or self._transport).send(call)
        except ServiceUnavailable as error:
            return _calls.without_service(call, self._on_unavailable, error)

    async def _judged_together(self, call: Call[list[TrackResult]]) -> list[TrackResult]:
        try:
            return await self._transport.send(call)
        except ServiceUnavailable as error:
            return _batches.without_service(call, self._on_unavailable, error)

    async def _settled(self, settlement: Settlement) -> TrackResult:
        if isinstance(settlement, TrackResult):
            return settlement
        try:
            return await self._transport.send(settlement)
        except ServiceUnavailable as error:
            return _settlements.without_service(settlement, self._on_unavailable, error)
