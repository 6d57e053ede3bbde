"""The overview of all groups: totals and trends."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Query
from starlette.responses import JSONResponse, Response

from tokenlimits.web._router import Router

from . import _charts, _views
from ._pages import PageRoute, Signed

routes = Router(route_class=PageRoute, include_in_schema=False)

_FULLEST = 10


@routes.get("/overview")
async def overview_page(visit: Signed) -> Response:
    """Show totals, trends and the fullest groups; the chart requests its history separately."""
    now = datetime.now(UTC)
    usages, groups, points = await asyncio.gather(
        visit.groups.usage_all(),
        visit.groups.list(),
        visit.groups.history(bucket="day", since=now - timedelta(days=60)),
    )
    cards = [card for card in _views.cards(groups, usages) if card.fraction is not None]
    return visit.page(
        "overview.html",
        summary=_views.summary(usages),
        trends=_charts.trends(points, now),
        fullest=sorted(cards, key=lambda card: card.fraction or 0, reverse=True)[:_FULLEST],
    )


@routes.get("/overview/history")
async def history(visit: Signed, step: Annotated[_charts.Step, Query()] = "day") -> Response:
    """Answer the chart's numbers."""
    now = datetime.now(UTC)
    points = await visit.groups.history(bucket=step, since=_charts.first(step, "UTC", now))
    return JSONResponse(_charts.chart(points, step, "UTC", now))
