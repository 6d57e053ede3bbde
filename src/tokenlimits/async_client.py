"""For generation workers in asyncio: ask before money is spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Self
from uuid import UUID

from supabase import AsyncClient

from . import _batches, _calls, _sessions
from ._arguments import OnUnavailable
from ._async_holding import AsyncHolding
from ._base import DEFAULT_TIMEOUT
from .models import GenerationRequest, TrackResult, UserLimit


class AsyncTokenLimits(AsyncHolding):
    """Checks and records generations.

    Made by `from_env` it has a client for each event loop, and may be used after a fork.

    Args:
        client: A `supabase.AsyncClient` with the secret (service_role) key. It stays yours: closing this doesn't
            close it. Without one, see `from_env`.
        timeout: Seconds for one call, with all its retries.
        on_unavailable: What `track`, `check` and `reserve` do when Supabase can't be reached: `"raise"`
            ServiceUnavailable, `"allow"` the generation (it is not recorded), or `"deny"` it. With `"allow"` no
            `commit` or `release` raises it either. A wrong key or a missing schema always raises.
        coalesce: Let calls of `track` that wait at once travel together: while one request is under way, others queue,
            and go as one. Each still has its own answer, error and timeout. A call that is alone goes at once.
        schema: Where tokenlimits is installed, if not in public; by default what `TOKENLIMITS_SCHEMA` in the
            environment or `.env` says on first use. Which schema the client itself uses doesn't matter.
    """

    def __init__(
        self,
        client: AsyncClient | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        on_unavailable: OnUnavailable = "raise",
        coalesce: bool = False,
        schema: str | None = None,
    ) -> None:
        super().__init__(client, timeout, on_unavailable, coalesce=coalesce, schema=schema)

    @classmethod
    def from_env(
        cls,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        on_unavailable: OnUnavailable = "raise",
        coalesce: bool = False,
        schema: str | None = None,
    ) -> Self:
        """Make one for `SUPABASE_URL` and `SUPABASE_SECRET_KEY` (or `SUPABASE_SERVICE_ROLE_KEY`), read on first use.

        Args:
            timeout: Seconds for one call, with all its retries.
            on_unavailable: See the class.
            coalesce: See the class.
            schema: See the class.

        Raises:
            ConfigurationError: On first use, when a variable is missing.
        """
        return cls(timeout=timeout, on_unavailable=on_unavailable, coalesce=coalesce, schema=schema)

    async def track(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        idempotency_key: str | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrackResult:
        """Check every limit that applies and record the generation, in one atomic step.

        Call it before you spend money. A denied generation leaves no usage and no charge.

        Args:
            user_id: Who generates.
            kind: What is generated, like `"image"` or `"video"`.
            cost: How much it takes from the limits.
            idempotency_key: The job's own id: a repeated call charges once and answers the same, `replayed`. Take it
                from your job, never from an end user. Without one the client makes one for its own retries.
            group_id: Which of the user's groups pays; without it the first that has room, by priority.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Returns:
            Whether it is allowed, what remains, and when it resets. It is true when allowed.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent.
            IdempotencyConflict: The key was used for another request of this user.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`).
            AccessDenied, SchemaNotInstalled, SchemaOutdated, ConfigurationError: It is not set up right.
        """
        call = _calls.track(user_id, kind, cost, idempotency_key, group_id, metadata)
        return await self._judged(call, by=self._coalescer)

    async def track_many(self, requests: Iterable[GenerationRequest | Mapping[str, Any]]) -> list[TrackResult]:
        """Track many generations at once: each is judged by itself, in the order given.

        A thousand travel and are judged as one call, so it is many times faster than one after another. More are split.

        Args:
            requests: What `track` takes, as `GenerationRequest`s (or mappings with their fields). With idempotency keys
                all may be repeated after an error: what was recorded before is answered, `replayed`.

        Returns:
            The answers, at the same places. A request that `track` would raise an error for (its key was used for
            another request, its group doesn't exist) touches no other: it is denied, with the reason `"refused"`, and
            `raise_if_denied` raises that error.

        Raises:
            InvalidRequest: An argument is not valid; nothing was sent. Its field is like `requests[3].cost`.
            ServiceUnavailable: Supabase could not be reached in time (see `on_unavailable`). Of more than a thousand,
                some may have been recorded.
            AccessDenied, SchemaNotInstalled, SchemaOutdated, ConfigurationError: It is not set up right.
        """
        return [result for call in _batches.track_many(requests) for result in await self._judged_together(call)]

    async def check(
        self, user_id: UUID | str, kind: str, cost: int = 1, *, group_id: UUID | str | None = None
    ) -> TrackResult:
        """Say what `track` would answer now; record nothing.

        By the time that you track, others may have used the room: only `track` decides.

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
        """
        return await self._judged(_calls.check(user_id, kind, cost, group_id))

    async def record(
        self,
        user_id: UUID | str,
        kind: str,
        cost: int = 1,
        *,
        created_at: datetime | None = None,
        idempotency_key: str | None = None,
        group_id: UUID | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrackResult:
        """Record usage that has happened, here or elsewhere; never denied, so counters may pass their max.

        Args:
            user_id: Who generated.
            kind: What was generated.
            cost: How much it takes from the limits of its period.
            created_at: When it happened, with a time zone; now when None.
            idempotency_key: The same call with the same key is recorded once: use one when you import.
            group_id: Which group it is booked on (the user may have left it); without it, the first of the user's
                groups that has a limit for the kind.
            metadata: A JSON object that is kept with the usage, at most 8 kB.

        Returns:
            The usage, and what remains of the limits now.

        Raises:
            InvalidRequest: An argument is not valid, `created_at` lies in the future, or the user is in no group.
            IdempotencyConflict: The key was used for another request of this user.
            GroupNotFound: There is no group `group_id`.
            ServiceUnavailable: Supabase could not be reached in time.
        """
        call = _calls.record(user_id, kind, cost, created_at, idempotency_key, group_id, metadata)
        return await self._transport.send(call)

    async def usage(self, user_id: UUID | str) -> tuple[UserLimit, ...]:
        """List every limit that binds a user, with used, remaining and reset_at.

        Args:
            user_id: Whose.

        Returns:
            The limits of all the user's groups, in the order in which groups pay; those of the default group for a user
            in none.

        Raises:
            InvalidRequest: `user_id` is not a UUID.
            ServiceUnavailable: Supabase could not be reached in time.
        """
        return await self._transport.send(_calls.usage(user_id))


class AsyncDefault:
    """The client behind `atrack_generation`: made on first use, replaced by `tokenlimits.testing.override`."""

    current: AsyncTokenLimits | None = None

    @classmethod
    def choose(cls, client: AsyncTokenLimits | AsyncClient | None) -> AsyncTokenLimits:
        """Wrap what was passed in, or take the default."""
        if isinstance(client, AsyncTokenLimits):
            return client
        if client is not None:
            return AsyncTokenLimits(client)
        with _sessions.lock():
            if cls.current is None:
                cls.current = AsyncTokenLimits.from_env()
            return cls.current


async def atrack_generation(
    user_id: UUID | str,
    kind: str,
    cost: int = 1,
    *,
    idempotency_key: str | None = None,
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
        metadata: A JSON object that is kept with the usage.
        client: An `AsyncTokenLimits` or an async Supabase client; without it, one is made from the environment on
            first use.

    Returns:
        Whether it is allowed, what remains, and when it resets. It is true when allowed.
    """
    return await AsyncDefault.choose(client).track(
        user_id, kind, cost, idempotency_key=idempotency_key, group_id=group_id, metadata=metadata
    )
