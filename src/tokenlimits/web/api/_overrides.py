"""`/groups/{group_id}/overrides`: list, set, remove; and `/groups/{group_id}/reset`."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from tokenlimits.models import Kind, Override, Period, Starts
from tokenlimits.web._problems import documented
from tokenlimits.web._router import Router

from ._routing import CallersGroups, Gate, route_class
from ._shapes import OVERRIDE, OverrideIn, OverrideRemoved, Overrides, ResetAt, ResetIn

_OVERRIDE_EXAMPLE = {"content": {"application/json": {"example": OVERRIDE}}}


async def list_overrides(
    groups: CallersGroups,
    group_id: UUID,
    user_id: Annotated[UUID | None, Query(description="Only those of this user")] = None,
    child_id: Annotated[UUID | None, Query(description="Only those of this group directly beneath")] = None,
) -> Overrides:
    """List the overrides of a group's limits, by id, including those that have ended.

    Others sleep: while there is no such limit, or while the child isn't beneath the group.
    """
    return Overrides(items=[each async for each in groups.overrides(group_id, user_id=user_id, child_id=child_id)])


async def set_override(groups: CallersGroups, group_id: UUID, override: OverrideIn) -> Override:
    """Replace the max of one limit, for one user, for one group directly beneath, or of a group limit. Usage stays.

    It replaces an earlier override of the same limit. `period` and `starts` may be left out if one limit fits.
    """
    return await groups.set_override(
        group_id,
        override.kind,
        override.max,
        user_id=override.user_id,
        child_id=override.child_id,
        period=override.period,
        starts=override.starts,
        until=override.until,
    )


async def remove_override(
    groups: CallersGroups,
    group_id: UUID,
    kind: Annotated[Kind, Query()],
    user_id: Annotated[UUID | None, Query(description="Whose; without it and child_id, that of a group limit")] = None,
    child_id: Annotated[UUID | None, Query(description="Which group's override of a `child` limit")] = None,
    period: Annotated[Period | None, Query()] = None,
    starts: Annotated[Starts | None, Query()] = None,
) -> OverrideRemoved:
    """End an override, so that the limit's own max applies again."""
    removed = await groups.remove_override(
        group_id, kind, user_id=user_id, child_id=child_id, period=period, starts=starts
    )
    return OverrideRemoved(removed=removed)


async def reset_usage(groups: CallersGroups, group_id: UUID, reset: ResetIn) -> ResetAt:
    """Reset usage in the current periods, of all the group's limits or of one user's. The ledger keeps everything.

    Limits of groups above and beneath aren't reset, but the group's own allowance under `child` limits above it is.
    """
    return ResetAt(reset_at=await groups.reset_usage(group_id, kind=reset.kind, user_id=reset.user_id))


def routes_of(gate: Gate) -> APIRouter:
    """Make the routes behind a gate."""
    routes = Router(route_class=route_class(gate), tags=["overrides"])
    path = "/groups/{group_id}/overrides"
    routes.get(path, responses=documented(404))(list_overrides)
    routes.put(path, responses={200: _OVERRIDE_EXAMPLE, **documented(404, 413)})(set_override)
    routes.delete(path, responses=documented(404))(remove_override)
    routes.post("/groups/{group_id}/reset", responses=documented(404, 413))(reset_usage)
    return routes
