"""A group's page: history, limits, top members, recent usage, export, reset."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

from fastapi import Query
from starlette.responses import JSONResponse, Response, StreamingResponse

from tokenlimits import ledger_csv
from tokenlimits.levels import FULL
from tokenlimits.models import Group, TopMember, UsageRecord
from tokenlimits.web._router import Router

from . import _charts, _exceptions, _meters, _tree, _views
from ._beneath import beneath
from ._format import amount
from ._pages import PageRoute, Panel, Signed, Visit, Watching, done

routes = Router(route_class=PageRoute, include_in_schema=False)

_RECENT = 25
_TOP = 8
_PRESSED = 100
# in per cent
_NEAR = round(FULL * 100)


@dataclass(frozen=True, slots=True)
class _Top:
    """Who used most of a kind, and of which kinds anything was used: units of different kinds can't be added."""

    kind: str | None = None
    kinds: Sequence[str] = ()
    members: Sequence[TopMember] = ()


@routes.get("/groups/{group_id}")
async def group_page(visit: Signed, group_id: UUID, top: Annotated[str, Query(max_length=32)] = "") -> Response:
    """Show the group, with the top members of a kind; the chart requests its history separately."""
    group, usage, pressure, top_, recent = await asyncio.gather(
        visit.groups.get(group_id),
        visit.groups.usage(group_id),
        visit.groups.limit_pressure(group_id, at_least=_NEAR, count=1),
        _top(visit, group_id, top),
        _recent(visit, group_id),
    )
    above, beneath_, exceptions = await asyncio.gather(
        _tree.above(visit.groups, group), beneath(visit, group, usage), _exceptions.first_of_group(visit.groups, group)
    )
    return visit.page(
        "group.html",
        group=group,
        usage=usage,
        above=above,
        others_above=[each for each in _tree.inherited(above) if not _is_shown(each, group)],
        beneath=beneath_,
        beneath_words=_views.customers(usage.child_count, usage),
        is_plan=any(limit.scope == "child" for limit in group.limits),
        meters=_meters.meters(usage, group, *above),
        pressed=_meters.pressed(pressure),
        near=_NEAR,
        top=top_,
        recent=recent,
        exceptions=exceptions,
        shape=_views.shape([usage], group, *above),
    )


def _is_shown(inherited: _tree.Inherited, group: Group) -> bool:
    """Whether the group has an allowance of its own under this limit of a group above."""
    return inherited.limit.scope == "child" and inherited.owner.id == group.parent_id


@routes.get("/groups/{group_id}/pressure")
async def pressed_members(
    visit: Signed,
    group_id: UUID,
    kind: Annotated[str, Query(max_length=32)] = "",
    period: Annotated[str, Query(max_length=32)] = "",
    starts: Annotated[str, Query(max_length=32)] = "calendar",
) -> Response:
    """Show the dialog with the members who are at a member limit, or close to it."""
    group, pressure = await asyncio.gather(
        visit.groups.get(group_id), visit.groups.limit_pressure(group_id, at_least=_NEAR, count=_PRESSED)
    )
    limit = _meters.pressed(pressure).get((kind, period, starts))
    return visit.page("pressure.html", group=group, limit=limit, near=_NEAR)


@routes.get("/groups/{group_id}/live")
async def live(visit: Watching, group_id: UUID, version: Annotated[str, Query(max_length=16)] = "") -> Response:
    """Answer what has changed on the page, if anything."""
    group, usage = await asyncio.gather(visit.groups.get(group_id), visit.groups.usage(group_id))
    content = _views.live([usage], group, *await _tree.above(visit.groups, group))
    return Response(status_code=204) if content["version"] == version else JSONResponse(content)


@routes.get("/groups/{group_id}/history")
async def history(visit: Signed, group_id: UUID, step: Annotated[_charts.Step, Query()] = "day") -> Response:
    """Answer the chart's numbers."""
    group = await visit.groups.get(group_id)
    now = datetime.now(UTC)
    since = _charts.first(step, group.timezone, now)
    points = await visit.groups.history(group_id, bucket=step, since=since)
    return JSONResponse(_charts.chart(points, step, group.timezone, now))


@routes.get("/groups/{group_id}/export")
async def export(visit: Signed, group_id: UUID) -> Response:
    """Send the group's ledger as CSV, while it is read."""
    group = await visit.groups.get(group_id)
    name = re.sub(r"[^A-Za-z0-9]+", "-", group.name).strip("-")[:60] or "group"
    headers = {"Content-Disposition": f'attachment; filename="{name}-usage.csv"'}
    lines = _csv(visit.groups.export_usage(group_id))
    first = [await anext(lines), await anext(lines, "")]  # before the status is sent: an error can still be a page
    return StreamingResponse(_chain(first, lines), headers=headers, media_type="text/csv")


@routes.post("/usages/{usage_id}/refund")
async def refund(visit: Signed, usage_id: UUID) -> Response:
    """Give back what a usage cost."""
    result = await visit.groups.refund(usage_id)
    return done(f"Refunded {amount(result.cost, result.kind)}.")


@routes.post("/groups/{group_id}/reset")
async def reset(visit: Signed, group_id: UUID) -> Response:
    """Reset the group's usage in its current periods."""
    await visit.groups.reset_usage(group_id)
    return done("Usage reset. The ledger keeps everything.")


async def _top(visit: Visit, group_id: UUID, kind: str) -> _Top:
    now = datetime.now(UTC)
    points = await visit.groups.history(group_id, bucket="day", since=now - timedelta(days=30))
    kinds = [trend.kind for trend in _charts.trends(points, now)]
    if not kinds:
        return _Top()
    shown = kind if kind in kinds else kinds[0]
    return _Top(shown, kinds, await visit.groups.top_members(group_id, kind=shown, count=_TOP))


async def _recent(visit: Visit, group_id: UUID) -> list[UsageRecord]:
    panel: Panel = visit.request.state.panel
    token = visit.tokens.access.get_secret_value()
    since = await panel.backend.moment_of(token, group_id, _RECENT - 1)
    # oldest first, and more may come meanwhile
    page = await visit.groups.export_page(group_id, since=since, size=1000)
    return page[::-1][:_RECENT]


async def _csv(usages: AsyncIterator[UsageRecord]) -> AsyncIterator[str]:
    yield ledger_csv.line(ledger_csv.COLUMNS)
    async for usage in usages:
        yield ledger_csv.line(ledger_csv.row(usage).values())


async def _chain(first: list[str], rest: AsyncIterator[str]) -> AsyncIterator[str]:
    for line in first:
        yield line
    async for line in rest:
        yield line
