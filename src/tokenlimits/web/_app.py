"""The app: the API, and what every answer has."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import tokenlimits

from . import _problems
from ._api import api_of
from ._backend import Backend
from ._security import SecurityHeaders
from ._settings import WebSettings, load


def create_app(settings: WebSettings | None = None) -> FastAPI:
    """Make the app, to be served by itself or mounted in another, as in `app.mount("/limits", …)`.

    Args:
        settings: Where Supabase is; from the environment when None.

    Raises:
        ConfigurationError: A variable is missing or can't be right.

    Example:
        >>> create_app().title
        'tokenlimits'
    """
    backend = Backend(settings or load())

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
    )
    app.include_router(api_of(backend))
    app.add_middleware(SecurityHeaders)
    app.add_exception_handler(HTTPException, _http_error)
    return app


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # what it is registered for
    return _problems.of_status(error.status_code, error.detail, error.headers)
