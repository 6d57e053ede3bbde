"""`/usage/me` and `/track-generation`."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, HTTPException, Request
from pydantic import SecretStr

from tokenlimits import InvalidRequest, TrackResult
from tokenlimits.errors import AccessDenied, IdempotencyConflict
from tokenlimits.web import _ratelimit
from tokenlimits.web._backend import Backend
from tokenlimits.web._problems import documented
from tokenlimits.web._router import Router

from ._routing import Gate, TheBackend, Token, route_class
from ._shapes import RESULT, Generation, MyUsage

_RESULT_EXAMPLE = {"content": {"application/json": {"example": RESULT}}}


async def my_usage(backend: TheBackend, token: Token) -> MyUsage:
    """List every limit that applies to the caller, with what is used, what remains, and when it resets."""
    limits = await backend.limits_of(token)
    return MyUsage(items=await limits.my_usage())


async def track_generation(
    backend: TheBackend,
    token: Token,
    generation: Generation,
    request: Request,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> TrackResult:
    """Check every limit that applies, and record the generation, in one atomic step.

    Workers use the server's secret key and name the user. The header `Idempotency-Key` has the same effect as
    `idempotency_key` in the body. Signed-in users may track only for themselves, only the kinds that the server allows,
    at the server's cost, and may name only the kind. A denial is a problem: 429 with `Retry-After` if a limit has no
    room, 403 if no group of the user has a limit for the kind; `result` has the details.
    """
    fields = generation.model_dump(exclude={"user_id"})
    if idempotency_key is not None:
        if generation.idempotency_key not in (None, idempotency_key):
            raise IdempotencyConflict("Idempotency-Key and idempotency_key differ: send one of them")
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
    """Read what a signed-in user tracks. They may choose only the kind: with anything else, they could pay less."""
    person = await backend.auth.person(SecretStr(token))
    cost = backend.self_service.get(generation.kind)
    if cost is None:
        raise AccessDenied("This server doesn't let users track this kind. Workers use the secret key.")
    if generation.user_id not in (None, person.id):
        raise AccessDenied("A signed-in user can charge nobody else. Workers use the secret key.")
    chosen = sorted(generation.model_fields_set - {"kind", "user_id"}) + ["Idempotency-Key"] * (header is not None)
    if chosen:
        raise HTTPException(400, f"A signed-in user can't choose {', '.join(chosen)}; send the kind alone")
    return person.id, {"kind": generation.kind, "cost": cost}


def routes_of(gate: Gate, *, can_track: bool) -> APIRouter:
    """Make the routes behind a gate."""
    routes = Router(route_class=route_class(gate), tags=["usage"])
    routes.get("/usage/me", responses=documented())(my_usage)
    if can_track:
        responses = {200: _RESULT_EXAMPLE, **documented(404, 409, 413)}
        routes.post("/track-generation", responses=responses)(track_generation)
    return routes
