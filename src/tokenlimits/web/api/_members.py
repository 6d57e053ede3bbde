"""`/group-members`: list, add one or many, remove."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from tokenlimits.models import BulkResult, Text
from tokenlimits.web._bodies import MOST_IN_BULK
from tokenlimits.web._problems import documented
from tokenlimits.web._router import Router

from ._routing import CallersGroups, Gate, route_class
from ._shapes import After, Anchored, Members, NewAnchor, NewMembers, Removed, cursor

_BULK = {"added": 2, "already": 1, "refused": [{"user_id": "9c1f…", "reason": "there is no such user"}]}
_BULK_EXAMPLE = {"content": {"application/json": {"example": _BULK}}}


async def list_members(
    groups: CallersGroups,
    group_id: Annotated[UUID, Query()],
    search: Annotated[
        Text,
        Query(max_length=320, description="A part of the e-mail address, ignoring case", examples=["@example.com"]),
    ] = "",
    after: After = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> Members:
    """List a group's members, or those that match the search, in order of id."""
    page = await groups.members_page(group_id, search=search or None, after=after or None, size=limit)
    return Members(items=page, next=cursor(page.next))


async def add_members(groups: CallersGroups, members: NewMembers) -> BulkResult:
    """Add one or many users to a group; unknown users don't stop the others."""
    return await groups.add_members(members.group_id, members.ids(), anchor_at=members.anchor_at)


async def set_anchor(groups: CallersGroups, anchor: NewAnchor) -> Anchored:
    """Set from when a member's anchored periods are counted. What they have used is recounted in the new ones."""
    return Anchored(set=await groups.set_member_anchor(anchor.group_id, anchor.user_id, anchor.anchor_at))


async def remove_members(
    groups: CallersGroups,
    group_id: Annotated[UUID, Query()],
    user_id: Annotated[list[UUID], Query(min_length=1, max_length=500, description="May be repeated")],
) -> Removed:
    """Remove users from a group. Their usage stays, and counts again if they return."""
    return Removed(removed=await groups.remove_members(group_id, user_id))


def routes_of(gate: Gate) -> APIRouter:
    """Make the routes behind a gate."""
    routes = Router(route_class=route_class(gate, MOST_IN_BULK), tags=["members"])
    routes.get("/group-members", responses=documented(404))(list_members)
    routes.post("/group-members", responses={200: _BULK_EXAMPLE, **documented(404, 413)})(add_members)
    routes.patch("/group-members", responses=documented(404))(set_anchor)
    routes.delete("/group-members", responses=documented(404))(remove_members)
    return routes
