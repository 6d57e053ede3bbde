"""`require_generation`: a FastAPI dependency that reserves before an endpoint, and settles after it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import Depends, HTTPException, Response, WebSocketException, status
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from tokenlimits import AsyncHold, AsyncTokenLimits, GenerationDenied, InvalidRequest, ServiceUnavailable

from . import _ratelimit
from ._backend import Backend
from ._bearer import token_of
from ._problems import SignInRequired, TooManyRequests, headers_of, kind_of
from ._settings import WebSettings, load


def require_generation(
    kind: str,
    cost: int | Callable[..., int | Awaitable[int]] = 1,
    *,
    user: Callable[..., UUID | Awaitable[UUID]] | None = None,
    ttl: int = 3600,
    heartbeat: bool = False,
    limits: AsyncTokenLimits | None = None,
    settings: WebSettings | None = None,
) -> Callable[..., AsyncIterator[AsyncHold]]:
    """Make a FastAPI dependency that reserves before the endpoint runs, commits after it, and releases if it raises.

    With FastAPI's default scope it commits when the response has been sent, so that a stream that breaks isn't charged;
    with `Depends(…, scope="function")` before it is sent. The endpoint may take the `AsyncHold`, and commit less.

    A denied request gets 403 (the user is in no group, or in none with a limit for the kind) or 429, with
    `Retry-After`, `RateLimit` and `RateLimit-Policy`. There is no idempotency key: the sender could choose it.

    On a WebSocket, a denied one is closed before it is accepted, which servers answer with 403. Whatever ends by an
    exception after a part was sent isn't charged: a WebSocket whose client leaves, or a background task that fails. If
    that part cost something, call `hold.used()` or `hold.commit()` before you send it.

    Args:
        kind: What is generated.
        cost: How much it takes from the limits; or a dependency that says so.
        user: A dependency that returns the id of the user who pays, and has checked who that is. By default the bearer
            of a Supabase access token, whom Supabase Auth is asked about.
        ttl: For how many seconds it holds: longer than the endpoint takes at worst, unless `heartbeat` extends it.
        heartbeat: Extend the hold again and again until it is settled.
        limits: What reserves; by default a client made from the environment.
        settings: Where Supabase Auth is, for the default `user`; from the environment when None, on first use.

    Raises:
        ConfigurationError: On first use: a variable is missing or can't be right.

    Example:
        >>> from fastapi import FastAPI
        >>> app = FastAPI()
        >>> @app.post("/images", dependencies=[Depends(require_generation("image", cost=2))])
        ... async def image(prompt: str) -> str:
        ...     return f"an image of {prompt}"
    """
    client = limits if limits is not None else AsyncTokenLimits.from_env()
    # refuses now what it would refuse of every request; what is not entered sends nothing
    client.generation(UUID(int=0), kind, ttl=ttl, heartbeat=heartbeat)
    payer = user if user is not None else _Bearer(settings)
    price = cost if callable(cost) else _Constant(cost)

    async def reserved(
        connection: HTTPConnection,
        response: Response,
        user_id: Annotated[UUID, Depends(payer)],
        price_: Annotated[int, Depends(price)],
    ) -> AsyncIterator[AsyncHold]:
        async with AsyncExitStack() as stack:
            generation = partial(client.generation, user_id, kind, price_, ttl=ttl, heartbeat=heartbeat)
            hold = await _enter(connection, stack, generation)
            response.headers.update(_ratelimit.of_limits(hold.result.limits))
            yield hold

    return reserved


async def _enter(
    connection: HTTPConnection, stack: AsyncExitStack, generation: Callable[[], AbstractAsyncContextManager[AsyncHold]]
) -> AsyncHold:
    try:
        return await stack.enter_async_context(generation())
    except (GenerationDenied, InvalidRequest) as error:
        raise _refused(connection, error, str(error)) from error
    except ServiceUnavailable as error:
        raise _refused(connection, error, "Generations can't be counted now. Please try again soon.") from error


def _refused(connection: HTTPConnection, error: Exception, words: str) -> Exception:
    kind = kind_of(error)
    if connection.scope["type"] == "websocket":
        code = status.WS_1013_TRY_AGAIN_LATER if kind.status == 503 else status.WS_1008_POLICY_VIOLATION
        # a closing frame holds 123 bytes of reason
        return WebSocketException(code, words.encode()[:123].decode(errors="ignore"))
    return HTTPException(kind.status, words, headers_of(error) or None)


class _Constant:
    """A dependency that returns what is known already."""

    def __init__(self, cost: int) -> None:
        self._cost = cost

    def __call__(self) -> int:
        return self._cost


class _Bearer:
    """A dependency that returns whose access token a request carries."""

    def __init__(self, settings: WebSettings | None) -> None:
        self._backend = None if settings is None else Backend(settings)

    async def __call__(self, connection: HTTPConnection) -> UUID:
        if self._backend is None:
            self._backend = Backend(load())
        token = token_of(connection)
        if token is not None:
            try:
                return (await self._backend.auth.person(SecretStr(token))).id
            except SignInRequired:
                pass
            except (TooManyRequests, ServiceUnavailable) as error:
                raise _refused(connection, error, kind_of(error).advice) from error
        nobody = SignInRequired()
        raise _refused(connection, nobody, kind_of(nobody).title)
