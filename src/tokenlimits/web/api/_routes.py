"""The API as a router, for any FastAPI app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from tokenlimits import AsyncTokenLimits
from tokenlimits.web._backend import Backend
from tokenlimits.web._problems import Problem
from tokenlimits.web._settings import WebSettings, load

from . import _groups, _members, _overrides, _usage
from ._routing import Gate


def router(
    settings: WebSettings | None = None,
    *,
    limits: AsyncTokenLimits | None = None,
    self_service: Mapping[str, int] | None = None,
) -> APIRouter:
    """Make the router of the API: `/api/groups`, `/api/group-members`, `/api/usage/me`, `/api/track-generation`.

    Everything is done with the caller's own access token, so that the database decides. `/api/track-generation` alone
    uses the server's secret key, and isn't there without one. It is for workers. Each path is there with a version too:
    `/api/v1/groups` is the same as `/api/groups`.

    Args:
        settings: Where Supabase is; from the environment when None.
        limits: What tracks; by default a client with the settings' secret key.
        self_service: What signed-in users may track for themselves: the cost of each kind. They choose nothing else.

    Raises:
        ConfigurationError: A variable is missing or can't be right.

    Example:
        >>> from fastapi import FastAPI
        >>> app = FastAPI()
        >>> app.include_router(router())
    """
    return api_of(Backend(settings or load(), limits, self_service))


def api_of(backend: Backend) -> APIRouter:
    """Make the router for a backend."""
    gate = Gate(backend)
    # a response without a model of its own puts the schema of problems among the others
    responses: dict[int | str, dict[str, Any]] = {
        "default": {"model": Problem, "description": "What went wrong, as RFC 9457 problem details"}
    }
    api = APIRouter(responses=responses)
    api.include_router(_groups.routes_of(gate))
    api.include_router(_members.routes_of(gate))
    api.include_router(_overrides.routes_of(gate))
    api.include_router(_usage.routes_of(gate, can_track=backend.can_track))
    both = APIRouter()
    both.include_router(api, prefix="/api")
    # for those who want their paths to say which version they were written for
    both.include_router(api, prefix="/api/v1", include_in_schema=False)
    return both
