"""What an editor infers for a worker; pyright reads this, nothing runs it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, assert_type
from uuid import UUID

from supabase import AsyncClient, Client

from tokenlimits import (
    AsyncTokenLimits,
    GenerationDenied,
    GenerationRequest,
    InvalidRequest,
    Limit,
    ServiceUnavailable,
    TokenLimits,
    TokenLimitsError,
    TrackResult,
    atrack_generation,
    track_generation,
)
from tokenlimits.models import GroupRef, LimitStatus, SinglePeriod, UserLimit


def one_call(user_id: UUID, client: Client, aclient: AsyncClient, now: datetime) -> None:
    assert_type(track_generation(user_id, "image"), TrackResult)
    assert_type(track_generation(str(user_id), "image", 2, idempotency_key="job-1", metadata={"a": [1]}), TrackResult)
    assert_type(track_generation(user_id, "image", client=client), TrackResult)
    assert_type(track_generation(user_id, "image", client=TokenLimits(client)), TrackResult)

    track_generation(user_id, "image", client=aclient)  # pyright: ignore[reportArgumentType]
    track_generation(user_id, "image", client=AsyncTokenLimits())  # pyright: ignore[reportArgumentType]
    track_generation(user_id)  # pyright: ignore[reportCallIssue]
    track_generation(7, "image")  # pyright: ignore[reportArgumentType]
    track_generation(user_id, "image", 1.5)  # pyright: ignore[reportArgumentType]
    track_generation(user_id, "image", 1, "job-1")  # pyright: ignore[reportCallIssue]
    track_generation(user_id, "image", metadata=[1])  # pyright: ignore[reportArgumentType]
    track_generation(user_id, "image", created_at=now)  # pyright: ignore[reportCallIssue]


async def one_call_in_asyncio(user_id: UUID, client: Client, aclient: AsyncClient) -> None:
    assert_type(await atrack_generation(user_id, "image"), TrackResult)
    assert_type(await atrack_generation(user_id, "image", client=aclient), TrackResult)
    assert_type(await atrack_generation(user_id, "image", client=AsyncTokenLimits.from_env()), TrackResult)

    atrack_generation(user_id, "image", client=client)  # pyright: ignore[reportArgumentType, reportUnusedCoroutine]
    assert_type(atrack_generation(user_id, "image"), TrackResult)  # pyright: ignore[reportAssertTypeFailure, reportUnusedCoroutine]


def keys(limits: TokenLimits, user_id: UUID, key: UUID | str | int) -> None:
    track_generation(user_id, "image", idempotency_key=key)
    limits.track(user_id, "image", idempotency_key=key)
    limits.record(user_id, "image", idempotency_key=key)
    limits.reserve(user_id, "image", idempotency_key=key)
    limits.generation(user_id, "image", idempotency_key=key)
    limits.track_many([GenerationRequest(user_id=user_id, kind="image", idempotency_key=key)])

    limits.track(user_id, "image", idempotency_key=1.5)  # pyright: ignore[reportArgumentType]
    limits.track(user_id, "image", idempotency_key=b"job")  # pyright: ignore[reportArgumentType]
    GenerationRequest(user_id=user_id, kind="image", idempotency_key=[key])  # pyright: ignore[reportArgumentType]


async def keys_in_asyncio(limits: AsyncTokenLimits, user_id: UUID, key: UUID | str | int) -> None:
    await atrack_generation(user_id, "image", idempotency_key=key)
    await limits.track(user_id, "image", idempotency_key=key)
    await limits.record(user_id, "image", idempotency_key=key)
    await limits.reserve(user_id, "image", idempotency_key=key)
    limits.generation(user_id, "image", idempotency_key=key)


def result(result: TrackResult) -> str | None:
    if not result:
        assert_type(result, TrackResult)
        return result.error
    while result:
        break
    assert_type(bool(result), bool)
    assert_type(result.raise_if_denied(), TrackResult)
    assert_type(result.allowed, bool)
    assert_type(result.usage_id, UUID | None)
    assert_type(result.group, GroupRef | None)
    assert_type(result.remaining, int | None)
    assert_type(result.reset_at, datetime | None)
    assert_type(result.expires_at, datetime | None)
    assert_type(result.retry_after, float | None)
    assert_type(result.limits, tuple[LimitStatus, ...])
    assert_type(result.denied_by, LimitStatus | None)
    assert_type(
        result.reason, Literal["not_in_group", "no_limit_for_kind", "limit_exceeded", "refused", "unavailable"] | None
    )
    assert_type(result.status, Literal["reserved", "committed", "released", "refunded", "expired"] | None)
    if result.reason == "to_expensive":  # pyright: ignore[reportUnnecessaryComparison]
        return None
    return result.nonsense  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]


def client(client: Client, aclient: AsyncClient, user_id: UUID, now: datetime, more: Mapping[str, Any]) -> None:
    assert_type(TokenLimits.from_env(timeout=5, on_unavailable="allow", schema="limits"), TokenLimits)
    with TokenLimits(client, timeout=5, on_unavailable="deny", schema="limits") as limits:
        assert_type(limits, TokenLimits)
        assert_type(limits.track(user_id, "video", cost=8, metadata=more).raise_if_denied(), TrackResult)
        assert_type(limits.track_many([GenerationRequest(user_id=user_id, kind="image")]), list[TrackResult])
        limits.track_many(GenerationRequest(user_id=user_id, kind="image"))  # pyright: ignore[reportArgumentType]
        assert_type(limits.check(user_id, "image"), TrackResult)
        assert_type(limits.record(user_id, "image", created_at=now), TrackResult)
        assert_type(limits.usage(user_id), tuple[UserLimit, ...])
        assert_type(limits.usage(user_id)[0].group, GroupRef)
        assert_type(limits.close(), None)
        limits.record(user_id, "image", created_at="yesterday")  # pyright: ignore[reportArgumentType]
        limits.track(user_id, None)  # pyright: ignore[reportArgumentType]

    TokenLimits(aclient)  # pyright: ignore[reportArgumentType]
    TokenLimits("https://abc.supabase.co")  # pyright: ignore[reportArgumentType]
    TokenLimits(client, on_unavailable="ignore")  # pyright: ignore[reportArgumentType]
    TokenLimits(client, schema=7)  # pyright: ignore[reportArgumentType]
    TokenLimits(client, 5)  # pyright: ignore[reportCallIssue]


async def async_client(aclient: AsyncClient, client: Client, user_id: UUID, now: datetime) -> None:
    async with AsyncTokenLimits(aclient) as limits:
        assert_type(limits, AsyncTokenLimits)
        assert_type(await limits.track(user_id, "video", cost=8), TrackResult)
        assert_type(await limits.check(user_id, "image"), TrackResult)
        assert_type(await limits.record(user_id, "image", created_at=now), TrackResult)
        assert_type(await limits.usage(user_id), tuple[UserLimit, ...])
        assert_type(await limits.aclose(), None)
        assert_type(limits.track(user_id, "image"), TrackResult)  # pyright: ignore[reportAssertTypeFailure, reportUnusedCoroutine]
    AsyncTokenLimits(client)  # pyright: ignore[reportArgumentType]
    with AsyncTokenLimits(aclient):  # pyright: ignore[reportGeneralTypeIssues]
        pass


class Ours(TokenLimits):
    """A subclass keeps its type."""


def subclass() -> None:
    assert_type(Ours.from_env(), Ours)
    with Ours() as ours:
        assert_type(ours, Ours)


def models(user_id: UUID) -> None:
    assert_type(Limit(kind="image", max=None).max, int | None)
    assert_type(Limit(kind="image", max=1).period, SinglePeriod | str)
    Limit(kind="image", max=1, period="5 hours", starts="rolling", counts={"image": 2}, mode="observe")
    assert_type(Limit(kind="image", max=1).scope, Literal["group", "child", "member"])
    Limit(kind="image", max=1, period=5)  # pyright: ignore[reportArgumentType]
    Limit(kind="image", max=1, starts="soon")  # pyright: ignore[reportArgumentType]
    Limit(kind="image", max=1, counts=["image"])  # pyright: ignore[reportArgumentType]
    Limit(kind="image", max=1, mode="allow")  # pyright: ignore[reportArgumentType]
    Limit(kind="image", max=1, scope="world")  # pyright: ignore[reportArgumentType]
    Limit(kind="image", max="1")  # pyright: ignore[reportArgumentType]
    Limit(kind="image")  # pyright: ignore[reportCallIssue]
    Limit(kind="image", max=1, per="day")  # pyright: ignore[reportCallIssue]
    GenerationRequest(user_id=user_id, kind="image", cost=2, metadata={"a": [1, None]})
    GenerationRequest(kind="image")  # pyright: ignore[reportCallIssue]


def errors(error: TokenLimitsError) -> None:
    assert_type(error.code, str | None)
    if isinstance(error, GenerationDenied):
        assert_type(error.result, TrackResult)
    if isinstance(error, InvalidRequest):
        assert_type(error.field, str | None)
    if isinstance(error, ServiceUnavailable):
        assert_type(error.retry_after, float | None)
    str(error.result)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]
