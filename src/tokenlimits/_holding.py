"""The part of `TokenLimits` that holds a cost while the work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from uuid import UUID

from . import _arguments, _batches, _calls, _limited, _settlements
from ._arguments import OnUnavailable
from ._base import Base
from ._calls import Call
from ._coalescing import Coalescer
from ._generations import Generation
from ._hold import Hold
from ._limited import Function
from ._settlements import DEFAULT_TTL, Settlement
from ._transport import Transport
from .errors import ServiceUnavailable
from .models import TrackResult


class Holding(Base):
    """Reserves and settles, in single steps or around a body of work."""

    def __init__(
        self, client: object, timeout: float, on_unavailable: OnUnavailable, *, coalesce: bool, schema: str | None
    ) -> None:
        super().__init__(client, timeout, schema)
        self._on_unavailable: OnUnavailable = _arguments.policy(on_unavailable)
        self._coalesce = _arguments.flag(coalesce, "coalesce")
        self._travel_by(self._transport)

    def reserve(
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

        Example:
            >>> hold = limits.reserve(user_id, "video", cost=8, ttl=600)
            >>> hold.status, hold.remaining
            ('reserved', 12)
        """
        call = _settlements.reserve(user_id, kind, cost, ttl, idempotency_key, group_id, metadata)
        return self._judged(call)

    def commit(self, usage_id: UUID | str | None, cost: int | None = None) -> TrackResult:
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

        Example:
            >>> hold = limits.reserve(user_id, "video", cost=8)
            >>> result = limits.commit(hold.usage_id, cost=5)
            >>> result.status, result.cost, result.remaining
            ('committed', 5, 15)
        """
        return self._settled(_settlements.commit(usage_id, cost))

    def release(self, usage_id: UUID | str | None) -> TrackResult:
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

        Example:
            >>> hold = limits.reserve(user_id, "video", cost=8)
            >>> limits.release(hold.usage_id).remaining
            20
        """
        return self._settled(_settlements.release(usage_id))

    def refund(self, usage_id: UUID | str | None) -> TrackResult:
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

        Example:
            >>> tracked = limits.track(user_id, "image")
            >>> limits.refund(tracked.usage_id).status
            'refunded'
        """
        return self._settled(_settlements.refund_if_recorded(usage_id))

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
    ) -> AbstractContextManager[Hold, None]:
        """Reserve before the body, settle after it: `with limits.generation(user_id, "video", cost=8) as hold`.

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

        Example:
            >>> with limits.generation(user_id, "video", cost=8) as hold:
            ...     for seconds in (1.5, 3.2):
            ...         hold.used(round(seconds))
            >>> hold.status, hold.result.cost
            ('committed', 8)
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
    ) -> Callable[[Function], Function]:
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

        Example:
            >>> @limits.limited("image", user="user_id", cost=lambda prompt, **_: len(prompt.split()))
            ... def generate(prompt, user_id):
            ...     return f"a picture of {prompt}"
            >>> generate("two cats", user_id=user_id)
            'a picture of two cats'
            >>> limits.usage(user_id)[0].used
            2
        """
        return lambda function: _limited.decorated(
            function,
            _limited.reservation(function, kind, user, cost, ttl, idempotency_key, group_id, metadata),
            self._open,
        )

    def close(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open.

        Calls that travel together have their answers first.

        Example:
            >>> limits.close()
        """
        try:
            if self._coalescer is not None:
                self._coalescer.drain()
        finally:
            super().close()

    def _travel_by(self, transport: Transport) -> None:
        self._transport = transport
        self._coalescer = Coalescer(transport.send, transport.timeout) if self._coalesce else None

    def _open(self, call: Call[TrackResult]) -> Generation:
        return Generation(call, self._judged, self._settled)

    def _judged(self, call: Call[TrackResult], by: Coalescer | Transport | None = None) -> TrackResult:
        try:
            return (by or self._transport).send(call)
        except ServiceUnavailable as error:
            return _calls.without_service(call, self._on_unavailable, error)

    def _judged_together(self, call: Call[list[TrackResult]]) -> list[TrackResult]:
        try:
            return self._transport.send(call)
        except ServiceUnavailable as error:
            return _batches.without_service(call, self._on_unavailable, error)

    def _settled(self, settlement: Settlement) -> TrackResult:
        if isinstance(settlement, TrackResult):
            return settlement
        try:
            return self._transport.send(settlement)
        except ServiceUnavailable as error:
            return _settlements.without_service(settlement, self._on_unavailable, error)
