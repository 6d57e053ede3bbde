"""What all endpoints of the API have in common: the caller, rate limits, and errors as problem details."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.responses import Response

from tokenlimits import AsyncGroupManager
from tokenlimits.errors import InvalidRequest, TokenLimitsError
from tokenlimits.web import _problems
from tokenlimits.web._backend import Backend
from tokenlimits.web._limiter import Limiter, address, caller
from tokenlimits.web._problems import SignInRequired, TooManyRequests

_BEARER = HTTPBearer(
    scheme_name="token",
    bearerFormat="JWT",
    description="A Supabase access token: what the caller may do is decided by the database. "
    "A secret key is taken too, where no user is needed.",
    auto_error=False,
)
_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+|sb_secret_[!-~]+")
_REPEATABLE = frozenset({"user_id"})
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ApiRoute(APIRoute):
    """Answers errors as problem details, in whatever app it is mounted."""

    def get_route_handler(self) -> _Handler:
        """Wrap FastAPI's handler."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            response = await _answer(handler, request)
            headers: dict[str, str] = getattr(request.state, "ratelimit", {})
            return _problems.with_headers(response, {**headers, "Cache-Control": "no-store"})

        return answer


async def _answer(handler: _Handler, request: Request) -> Response:
    try:
        return await handler(request)
    except RequestValidationError as error:
        return _problems.of_validation(error.errors())
    except (TokenLimitsError, TooManyRequests, SignInRequired) as error:
        if _problems.is_sign_in_required(error):
            # whoever guesses tokens is known by the address alone
            request.state.failures.count(address(request))
        return _problems.of_error(error)
    except HTTPException as error:
        return _problems.of_status(error.status_code, str(error.detail), error.headers)


class Gate:
    """Counts requests, and hands the backend to the endpoints: the first dependency of each.

    Args:
        backend: Where the answers come from.
    """

    def __init__(self, backend: Backend) -> None:
        per_minute = backend.settings.requests_per_minute
        self._backend = backend
        self._requests = Limiter(per_minute, "requests")
        self._failures = Limiter(max(per_minute // 10, 1), "failures")

    async def __call__(self, request: Request) -> None:
        """Let a request in.

        Raises:
            TooManyRequests: Its caller sent too many.
            InvalidRequest: A parameter is there twice, or is unknown.
        """
        request.state.backend = self._backend
        request.state.failures = self._failures
        self._failures.check(address(request))
        request.state.ratelimit = self._requests.hit(caller(request))
        _check_query(request)


def _check_query(request: Request) -> None:
    """Refuse what FastAPI would ignore: misspelt names, and repeated values but for the last one."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(f"{name:.100}: is not a parameter here", detail=name[:100])
        if name not in _REPEATABLE and len(request.query_params.getlist(name)) > 1:
            raise InvalidRequest(f"{name}: occurs more than once", detail=name)


async def bearer(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)] = None) -> str:
    """Read the caller's token.

    Raises:
        SignInRequired: There is none, or it can't be one.
    """
    if credentials is None or not _TOKEN.fullmatch(credentials.credentials):
        raise SignInRequired("Send an access token: Authorization: Bearer …")
    return credentials.credentials


def backend_of(request: Request) -> Backend:
    """Return what the gate left for the endpoints."""
    return request.state.backend


Token = Annotated[str, Depends(bearer)]
TheBackend = Annotated[Backend, Depends(backend_of)]


async def _groups(backend: TheBackend, token: Token) -> AsyncGroupManager:
    return await backend.groups(token)


CallersGroups = Annotated[AsyncGroupManager, Depends(_groups)]
