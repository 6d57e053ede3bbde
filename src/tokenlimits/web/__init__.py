"""The admin panel, the API, and a dependency for FastAPI apps: `pip install 'tokenlimits[web]'`.

The panel and the API act with the caller's access token, so that the database decides what the caller may do.

Example:
    from fastapi import Depends, FastAPI
    from tokenlimits.web import create_app, require_generation, router

    app = FastAPI()
    app.include_router(router())         # /api/groups, /api/usage/me, …
    app.mount("/limits", create_app())   # the panel

    @app.post("/images", dependencies=[Depends(require_generation("image"))])
    async def image(prompt: str) -> str: ...
"""

try:
    from ._app import create_app
    from ._generation import require_generation
    from ._serve import serve
    from ._settings import WebSettings
    from .api._routes import router
except ModuleNotFoundError as error:
    if (error.name or "").startswith("tokenlimits"):
        raise
    raise ModuleNotFoundError(
        "tokenlimits.web needs more packages: pip install 'tokenlimits[web]'", name=error.name
    ) from error

__all__ = ["WebSettings", "create_app", "require_generation", "router", "serve"]
