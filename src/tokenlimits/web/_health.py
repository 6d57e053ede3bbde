"""`/healthz`, `/readyz` and `/metrics`, for what watches over this process; they need no token and no session."""

from __future__ import annotations

from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from tokenlimits.errors import TokenLimitsError

from . import _problems
from ._backend import Backend
from ._metrics import Metrics
from ._router import Router
from ._shared import Shared

# Seconds for which an answer about the database holds: anybody may ask, and each question costs a call.
_FRESH: Final = 5.0
_NOT_STORED: Final = {"Cache-Control": "no-store"}
PATHS: Final = ("/healthz", "/readyz", "/metrics")


def routes_of(backend: Backend, metrics: Metrics) -> Router:
    """Make the router."""
    routes = Router(include_in_schema=False)
    asked = Shared[TokenLimitsError | None](_FRESH)

    @routes.get("/healthz")
    async def healthz() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Say that the process answers; it asks nobody, so that an outage of Supabase restarts nothing."""
        return PlainTextResponse("ok\n", headers=_NOT_STORED)

    @routes.get("/readyz")
    async def readyz() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Say whether requests can be answered now, and if not, what is missing."""
        problem = await asked.get("", lambda: _problem_of(backend))
        if problem is None:
            return PlainTextResponse("ready\n", headers=_NOT_STORED)
        return _problems.with_headers(_problems.of_error(problem), _NOT_STORED)

    @routes.get("/metrics")
    async def metrics_() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(metrics.text(), headers=_NOT_STORED | {"Content-Type": CONTENT_TYPE_LATEST})

    return routes


async def _problem_of(backend: Backend) -> TokenLimitsError | None:
    # returned and not raised, so that an outage is asked about as rarely as anything else
    try:
        await backend.check()
    except TokenLimitsError as error:
        return error
    return None
