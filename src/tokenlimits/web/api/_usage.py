"""`/usage/me` and `/track-generation`."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import SecretStr

from tokenlimits import InvalidRequest, TrackResult
from tokenlimits.errors import AccessDenied
from tokenlimits.web import _ratelimit
from tokenlimits.web._backend import Backend
from tokenlimits.web._problems import documented

from ._routing import ApiRoute, CallersGroups, TheBackend, Token
from ._shapes import RESULT, Generation, MyUsage

usage_routes = APIRouter(route_class=ApiRoute, tags=["usage"])
track_routes = APIRouter(route_class=ApiRoute, tags=["usage"])


@usage_routes.get("/usage/me", responses=documented())
async def my_usage(groups: CallersGroups) -> MyUsage:
    """List every limit that binds the caller, with what is used, what remains, and when it resets."""
    return MyUsage(items=await groups.my_usage())


@track_routes.post(
    "/track-generation",
    responses={200: {"content": {"application/json": {"example": RESULT}}}, **documented(404, 409)},
)
async def track_generation(backend: TheBackend, token: Token, generation: Generation, request: Request) -> TrackResult:
    """Check every limit that applies, and record the generation, in one atomic step.

    A worker, with the server's secret key, may name any user. A signed-in user charges themself. A denial is a problem:
    429 with `Retry-After` where a limit has no room, 403 where no group of the user has the kind; its `result` says
    more.
    """
    fields = generation.model_dump()
    user_id = fields.pop("user_id")
    if not backend.is_worker(token):
        user_id = await _themself(backend, token, generation)
    elif user_id is None:
        raise InvalidRequest("user_id: a worker must say who generates", detail="user_id")
    limits = await backend.limits()
    result = (await limits.track(user_id, **fields)).raise_if_denied()
    request.state.ratelimit = _ratelimit.of_limits(result.limits) or request.state.ratelimit
    return result


async def _themself(backend: Backend, token: str, generation: Generation) -> UUID:
    person = await backend.auth.person(SecretStr(token))
    if generation.user_id not in (None, person.id):
        raise AccessDenied("A signed-in user can charge nobody else. Workers use the secret key.")
    if generation.idempotency_key is not None:
        # whoever chooses the key can have many generations for one charge
        raise AccessDenied("A signed-in user can't choose the idempotency key. Workers use the secret key.")
    return person.id
