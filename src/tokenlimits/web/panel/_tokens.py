"""The Tokens page: a card for each group, live."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Query
from starlette.responses import JSONResponse, Response

from tokenlimits.web._router import Router

from . import _views
from ._pages import PageRoute, Signed, Watching

routes = Router(route_class=PageRoute, include_in_schema=False)


@routes.get("/")
async def tokens_page(
    visit: Signed,
    search: Annotated[str, Query(max_length=200)] = "",
    sort: Annotated[_views.Sort, Query()] = "name",
) -> Response:
    """Show the cards."""
    usages, groups = await asyncio.gather(visit.groups.usage_all(), visit.groups.list())
    branches = _views.branches(_views.cards(groups, usages, search), sort, flat=bool(search.strip()))
    return visit.page(
        "tokens.html",
        branches=branches,
        summary=_views.summary(usages),
        shape=_views.shape(usages),
        search=search,
        sort=sort,
    )


@routes.get("/live")
async def live(visit: Watching, version: Annotated[str, Query(max_length=16)] = "") -> Response:
    """Answer what has changed on the cards, if anything."""
    content = _views.live(await visit.groups.usage_all())
    return Response(status_code=204) if content["version"] == version else JSONResponse(content)
