"""`/usage/me` and `/track-generation`."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, HTTPException, Request
from pydantic import SecretStr

from tokenlimits import InvalidRequest, TrackResult
from tokenlimits.errors import AccessDenied
from tokenlimits.web import _ratelimit
from tokenlimits.web._backend import Backend
from tokenlimits.web._problems import documented

from ._routing import ApiRoute, TheBackend, Token
from ._shapes import RESULT, Generation, MyUsage

usage_routes = APIRouter(route_class=ApiRoute, tags=["usage"])
track_routes = APIRouter(route_class=ApiRoute, tags=["usage"])


@usage_routes.get("/usage/me", responses=documented())
async def my_usage(backend: TheBackend, token: Token) -> MyUsage:
    """List every limit that binds the caller, with what is used, what remains, and when it resets."""
    limits = await backend.limits_of(token)
    return MyUsage(items=await limits.my_usage())


@track_routes.post(
    "/track-generation",
    responses={200: {"content": {"application/json": {"example": RESULT}}}, **documented(404, 409)},
)
async def track_generation(
    backend: TheBackend,
    token: Token,
    generation: Generation,
    request: Request,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> TrackResult:
    """Check every limit that applies, and record the generation, in one atomic step.

    For workers, with the server's secret key, who name the user. A key in the header `Idempotency-Key` is the same as
    one in the body. A signed-in user may track what the server lets them track for themself, at its cost, and name the
    kind alone. A denial is a problem: 429 with `Retry-After` where a limit has no room, 403 where no group of the user
    has the kind; its `result` says more.
    """
    fields = generation.model_dump(exclude={"user_id"})
    if idempotency_key is not None:
        if generation.idempotency_key not in (None, idempotency_key):
            raise HTTPException(400, "Idempotency-Key and idempotency_key differ: send one of them")
        fields["idempotency_key"] = idempotency_key
    user_id = generation.user_id
    if not backend.is_worker(token):
        user_id, fields = await _themself(backend, token, generation, idempotency_key)
    elif user_id is None:
        raise InvalidRequest("user_id: a worker must say who generates", detail="user_id")
    limits = await backend.limits()
    result = (await limits.track(user_id, **fields)).raise_if_denied()
    request.state.ratelimit = _ratelimit.of_limits(result.limits) or request.state.ratelimit
    return result


async def _themself(
    backend: Backend, token: str, generation: Generation, header: str | None
) -> tuple[UUID, dict[str, Any]]:
    """Read what a signed-in user tracks: whatever they could choose, they could choose to be charged less for."""
    person = await backend.auth.person(SecretStr(token))
    cost = backend.self_service.get(generation.kind)
    if cost is None:
        raise AccessDenied("Tracking is for workers, with the secret key: this server lets no user track this kind.")
    if generation.user_id not in (None, person.id):
        raise AccessDenied("A signed-in user can charge nobody else. Workers use the secret key.")
    chosen = sorted(generation.model_fields_set - {"kind", "user_id"}) + ["Idempotency-Key"] * (header is not None)
    if chosen:
        raise HTTPException(400, f"A signed-in user can't choose {', '.join(chosen)}; send the kind alone")
    return person.id, {"kind": generation.kind, "cost": cost}
