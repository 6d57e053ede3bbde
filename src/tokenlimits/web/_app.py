"""The app: the panel, the API, and what all answers have in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import tokenlimits

from . import _health, _problems, _request_id
from ._backend import Backend
from ._metrics import Counted, Metrics
from ._security import HEADERS, SecurityHeaders
from ._settings import WebSettings, load
from .api._routes import api_of
from .panel._routes import nothing_here, panel_for, routes_of


def create_app(settings: WebSettings | None = None, *, self_service: Mapping[str, int] | None = None) -> FastAPI:
    """Make the app, to serve on its own or to mount in another app, as in `app.mount("/limits", …)`.

    Args:
        settings: Where Supabase is; from the environment when None.
        self_service: What signed-in users may track for themselves by the API: the cost of each kind. By default only
            workers track, with the secret key.

    Raises:
        ConfigurationError: A variable is missing or can't be right.

    Example:
        >>> import secrets
        >>> create_app(WebSettings(web_secret=secrets.token_urlsafe(32))).title
        'tokenlimits'
    """
    metrics = Metrics()
    backend = Backend(settings or load(), self_service=self_service, on_result=metrics.count)
    panel = panel_for(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await backend.aclose()

    app = FastAPI(
        title="tokenlimits",
        version=tokenlimits.__version__,
        summary="Limits on AI generations for groups of users",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        redirect_slashes=False,  # those lead to whatever Host a request names
    )
    app.include_router(api_of(backend))
    app.include_router(_health.routes_of(backend, metrics))
    app.include_router(routes_of(panel))
    app.mount("/static", _Static(packages=[("tokenlimits.web.panel", "static")]))
    app.add_middleware(GZipMiddleware)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Counted, metrics=metrics)
    app.add_middleware(_request_id.RequestIds)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # what it is registered for
        if _is_of_api(request):
            return _problems.of_status(error.status_code, error.detail, error.headers)
        if (
            error.status_code == 404
            and request.method in ("GET", "HEAD")
            and "text/html" in request.headers.get("accept", "")
        ):
            return await nothing_here(panel, request)
        return PlainTextResponse(error.detail, error.status_code, error.headers)

    async def unforeseen(request: Request, _: Exception) -> Response:
        # further out than all middleware, so that nothing else adds these; the server logs the error itself
        known = {**HEADERS, _request_id.HEADER: _request_id.begin(request.scope)}
        if _is_of_api(request):
            return _problems.of_status(500, "Internal Server Error", known)
        return PlainTextResponse("Internal Server Error", 500, known)

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unforeseen)
    return app


def _is_of_api(request: Request) -> bool:
    return request.url.path.startswith(f"{request.scope.get('root_path', '')}/api/")


class _Static(StaticFiles):
    """Files with their version in the URL, so that browsers may cache them forever."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response
