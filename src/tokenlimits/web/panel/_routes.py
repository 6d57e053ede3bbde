"""The panel as a router."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenlimits import ConfigurationError
from tokenlimits.web import _problems, _request_id
from tokenlimits.web._backend import Backend
from tokenlimits.web._problems import TooManyRequests
from tokenlimits.web._settings import MAKE_ONE

from . import _beneath, _exceptions, _group, _groups, _members, _overview, _sign_in, _tokens
from ._pages import PageRoute, Panel, render


def panel_for(backend: Backend) -> Panel:
    """Make what the panel's requests share, for a backend.

    Raises:
        ConfigurationError: There is no secret to seal the sessions with.
    """
    if not backend.settings.web_secret:
        raise ConfigurationError(
            "The panel needs TOKENLIMITS_WEB_SECRET, the same in all its processes. Make one: " + MAKE_ONE
        )
    return Panel(backend)


def routes_of(panel: Panel) -> APIRouter:
    """Make the router."""
    routes = APIRouter(route_class=PageRoute, dependencies=[Depends(panel)], include_in_schema=False)
    routes.include_router(_sign_in.routes)
    routes.include_router(_tokens.routes)
    routes.include_router(_groups.routes)
    routes.include_router(_members.routes)
    routes.include_router(_exceptions.routes)
    routes.include_router(_beneath.routes)
    routes.include_router(_group.routes)
    routes.include_router(_overview.routes)
    return routes


async def nothing_here(panel: Panel, request: Request) -> Response:
    """Show that the page doesn't exist."""
    try:
        await panel(request)
    except TooManyRequests as error:
        return _problems.of_error(error)
    words = {
        "title": "Page not found",
        "advice": "The address may be mistyped.",
        "retry": False,
        "request_id": _request_id.current(),
    }
    response = render(request, "problem.html", 404, **words)
    response.headers["Cache-Control"] = "no-store"
    return response
