"""What all endpoints of the API have in common: the caller, rate limits, and errors as problem details."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tokenlimits import AsyncGroupManager
from tokenlimits.errors import InvalidRequest, TokenLimitsError
from tokenlimits.web import _problems, _request_id
from tokenlimits.web._backend import Backend
from tokenlimits.web._bearer import token_of
from tokenlimits.web._bodies import MOST, BoundedRequest
from tokenlimits.web._limiter import Limiter, address, caller
from tokenlimits.web._problems import SignInRequired, TooLarge, TooManyRequests, TooSlow

_BEARER = HTTPBearer(
    scheme_name="token",
    bearerFormat="JWT",
    description="A Supabase access token: what the caller may do is decided by the database. "
    "A secret key is taken too, where no user is needed.",
    auto_error=False,
)
_REPEATABLE = frozenset({"user_id"})
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Gate:
    """Lets requests in, before anything of them is read, and answers errors as problem details.

    Args:
        backend: Where the answers come from.
    """

    def __init__(self, backend: Backend) -> None:
        per_minute = backend.settings.requests_per_minute
        self._backend = backend
        self._requests = Limiter(per_minute, "requests")
        self._failures = Limiter(max(per_minute // 10, 1), "failures")

    async def answer(self, handler: _Handler, request: Request, most: int) -> Response:
        """Answer a request whose body has at most so many bytes."""
        # also in an app of somebody else, which has no middleware of ours
        known = _request_id.begin(request.scope)
        response = await self._answer(handler, request, most)
        headers: dict[str, str] = getattr(request.state, "ratelimit", {})
        return _problems.with_headers(response, {**headers, "Cache-Control": "no-store", _request_id.HEADER: known})

    async def _answer(self, handler: _Handler, request: Request, most: int) -> Response:
        try:
            return await handler(await self._let_in(request, most))
        except RequestValidationError as error:
            return _problems.of_validation(error.errors())
        except (TokenLimitsError, TooManyRequests, SignInRequired, TooLarge, TooSlow) as error:
            if _problems.is_sign_in_required(error):
                # whoever guesses tokens is known by the address alone
                self._failures.count(address(request))
            return _problems.of_error(error)
        except HTTPException as error:
            return _problems.of_status(error.status_code, str(error.detail), error.headers)

    async def _let_in(self, request: Request, most: int) -> Request:
        """Check what can be checked without the body.

        Raises:
            TooManyRequests: Its caller sent too many.
            SignInRequired: It has no token, or a long body and no valid token.
            AccessDenied: It has a long body, and its caller is no admin.
            InvalidRequest: A parameter is there twice, or is unknown.
            TooLarge: Its body is too long.
        """
        self._failures.check(address(request))
        request.state.ratelimit = self._requests.hit(caller(request))
        token = token_of(request)
        if token is None:
            raise SignInRequired("Send an access token: Authorization: Bearer …")
        request.state.backend = self._backend
        request.state.token = token
        _check_query(request)
        bounded = BoundedRequest(request, most)
        if most > MOST and bounded.may_be_long():
            # a forged token looks like any other until the database has seen it
            await (await self._backend.groups(token)).page(size=1)
        return bounded


def route_class(gate: Gate, most: int = MOST) -> type[APIRoute]:
    """Make the class of routes behind a gate, in whatever app they are.

    Args:
        gate: What lets requests in.
        most: Bytes of a body. Longer ones than `MOST` are read from admins alone.
    """

    class GatedRoute(APIRoute):
        def get_route_handler(self) -> _Handler:
            handler = super().get_route_handler()

            async def answer(request: Request) -> Response:
                return await gate.answer(handler, request, most)

            return answer

    return GatedRoute


def _check_query(request: Request) -> None:
    """Refuse what FastAPI would ignore: misspelt names, and repeated values but for the last one."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(f"{name:.100}: is not a parameter here", detail=name[:100])
        if name not in _REPEATABLE and len(request.query_params.getlist(name)) > 1:
            raise InvalidRequest(f"{name}: occurs more than once", detail=name)


async def bearer(request: Request, _: Annotated[object, Depends(_BEARER)]) -> str:
    """Return the caller's token; it stands in OpenAPI's document."""
    return request.state.token


def backend_of(request: Request) -> Backend:
    """Return what the gate left for the endpoints."""
    return request.state.backend


Token = Annotated[str, Depends(bearer)]
TheBackend = Annotated[Backend, Depends(backend_of)]


async def _groups(backend: TheBackend, token: Token) -> AsyncGroupManager:
    return await backend.groups(token)


CallersGroups = Annotated[AsyncGroupManager, Depends(_groups)]
