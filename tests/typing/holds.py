"""What type checkers know of holds and of decorated functions; pyright reads this, nothing runs it."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=error, reportUnusedFunction=false

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, assert_type
from uuid import UUID

from tokenlimits import AsyncHold, AsyncTokenLimits, GroupManager, Hold, TokenLimits, TrackResult
from tokenlimits.errors import HoldExpired

limits = TokenLimits()
alimits = AsyncTokenLimits()
user = UUID(int=1)


def words(prompt: str, *_: object, **__: object) -> int:
    return len(prompt.split())


def whose(user_id: UUID, job: str | None = None) -> UUID:
    return user_id


@limits.limited("image", user="user_id", cost=words)
def function(prompt: str, user_id: UUID, *, size: int = 3) -> bytes:
    return prompt.encode()


assert_type(function("a cat", user, size=4), bytes)
function(7, user)  # pyright: ignore[reportArgumentType]
function("a cat")  # pyright: ignore[reportCallIssue]


@alimits.limited("image", user=whose, idempotency_key="job")
async def coroutine(user_id: UUID, job: str | None = None) -> bytes:
    return b""


def job_of(user_id: UUID, job: UUID | int | str | None) -> UUID | int | str | None:
    return job


@limits.limited("image", user="user_id", idempotency_key=job_of)
def keyed(user_id: UUID, job: UUID) -> None: ...


@limits.limited("image", user="user_id", idempotency_key=7)  # pyright: ignore[reportArgumentType]
def keyed_wrongly(user_id: UUID, job: UUID) -> None: ...


_: Callable[[UUID], Coroutine[Any, Any, bytes]] = coroutine
coroutine()  # pyright: ignore[reportCallIssue]


@limits.limited("video", user="user_id")
def generator(user_id: UUID) -> Generator[int, str, bytes]:
    yield 1
    return b""


assert_type(generator(user), Generator[int, str, bytes])


@alimits.limited("video", user="user_id")
async def async_generator(user_id: UUID) -> AsyncGenerator[int, str]:
    yield 1


assert_type(async_generator(user), AsyncGenerator[int, str])


def plain(user_id: UUID) -> str:
    return ""


alimits.limited("video", user="user_id")(plain)  # pyright: ignore[reportArgumentType]


class Studio:
    @limits.limited("video", user="user_id")
    def film(self, user_id: UUID) -> str:
        return ""

    @classmethod
    @limits.limited("video", user="user_id")
    def short(cls, user_id: UUID) -> str:
        return ""

    @staticmethod
    @limits.limited("video", user="user_id")
    def trailer(user_id: UUID) -> str:
        return ""


assert_type(Studio().film(user), str)
assert_type(Studio.short(user), str)
assert_type(Studio.trailer(user), str)
limits.limited("video")  # pyright: ignore[reportCallIssue]
limits.limited("video", user=words)  # pyright: ignore[reportArgumentType]
limits.limited("video", user=7)  # pyright: ignore[reportArgumentType]


def with_body() -> str:
    with limits.generation(user, "video", cost=8) as hold:
        assert_type(hold, Hold)
        assert_type(hold.used(3), None)
        assert_type(hold.commit(cost=5), None)
        assert_type(hold.usage_id, UUID | None)
        film = "made"
    return film.upper()  # known to be made: no exception is swallowed


async def with_async_body() -> str:
    async with alimits.generation(user, "video", cost=8) as hold:
        assert_type(hold, AsyncHold)
        film = "made"
    return film.upper()


async def steps() -> None:
    held = limits.reserve(user, "video", ttl=600)
    assert_type(held, TrackResult)
    assert_type(limits.commit(held.usage_id, cost=5), TrackResult)
    assert_type(await alimits.release(held.usage_id), TrackResult)
    assert_type(await alimits.refund(held.usage_id), TrackResult)
    GroupManager().refund(held.usage_id)  # pyright: ignore[reportArgumentType]
    with alimits.generation(user, "video"):  # pyright: ignore[reportGeneralTypeIssues]
        pass


def what_was_made(error: HoldExpired) -> object:
    return error.returned
