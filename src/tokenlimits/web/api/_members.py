"""`/group-members`: list, add one or many, remove."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from tokenlimits.models import BulkResult, Text
from tokenlimits.web._problems import documented

from ._routing import ApiRoute, CallersGroups
from ._shapes import Members, NewMembers, Removed

routes = APIRouter(route_class=ApiRoute, tags=["members"])

_BULK = {"added": 2, "already": 1, "refused": [{"user_id": "9c1f…", "reason": "there is no such user"}]}


@routes.get("/group-members", responses=documented(404))
async def list_members(
    groups: CallersGroups,
    group_id: Annotated[UUID, Query()],
    search: Annotated[
        Text,
        Query(max_length=320, description="A part of the e-mail address, ignoring case", examples=["@example.com"]),
    ] = "",
    after: Annotated[UUID | None, Query(description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> Members:
    """List a group's members, or those that match the search, in order of id."""
    page = await groups.members_page(
        group_id, search=search or None, after=None if after is None else str(after), size=limit
    )
    return Members(items=page, next=page.next)


@routes.post(
    "/group-members", responses={200: {"content": {"application/json": {"example": _BULK}}}, **documented(404)}
)
async def add_members(groups: CallersGroups, members: NewMembers) -> BulkResult:
    """Add one or many users to a group; unknown users don't stop the others."""
    return await groups.add_members(members.group_id, members.ids())


@routes.delete("/group-members", responses=documented(404))
async def remove_members(
    groups: CallersGroups,
    group_id: Annotated[UUID, Query()],
    user_id: Annotated[list[UUID], Query(min_length=1, max_length=500, description="May be repeated")],
) -> Removed:
    """Remove users from a group. Their usage stays, and counts again if they return."""
    return Removed(removed=await groups.remove_members(group_id, user_id))
