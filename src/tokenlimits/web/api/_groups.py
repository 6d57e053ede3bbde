"""`/groups`: list, create, read, edit, delete; usage and history."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response

from tokenlimits import InvalidRequest
from tokenlimits.errors import GroupExists, GroupNotFound
from tokenlimits.models import Bucket, Group, GroupUsage, Kind, Text
from tokenlimits.web._bodies import MOST_IN_BULK
from tokenlimits.web._problems import documented
from tokenlimits.web._router import Router

from ._routing import CallersGroups, Gate, route_class
from ._shapes import GROUP, USAGE, After, GroupChanges, GroupIn, Groups, History, UtcMoment, cursor

_GROUP_EXAMPLE = {"content": {"application/json": {"example": GROUP}}}
_USAGE_EXAMPLE = {"content": {"application/json": {"example": USAGE}}}
_ONE = {200: _GROUP_EXAMPLE, **documented(404)}


async def list_groups(
    groups: CallersGroups,
    search: Annotated[Text, Query(max_length=200, description="A part of the name, ignoring case")] = "",
    parent_id: Annotated[UUID | None, Query(description="Only groups directly beneath this one")] = None,
    after: After = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Groups:
    """List groups with their limits, by name."""
    page = await groups.page(search=search or None, parent=parent_id, after=after or None, size=limit)
    return Groups(items=page, next=cursor(page.next))


async def create_group(
    groups: CallersGroups,
    group: GroupIn,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Group:
    """Create a group with its limits, in one step.

    Sent again with the same `Idempotency-Key` and name, the request returns the group that the first one created.
    """
    if idempotency_key is None:
        return await groups.create(**_fields(group))
    # the key makes the id, so that the database itself knows a repetition
    id_ = UUID(bytes=sha256(f"{idempotency_key}\0{group.name.casefold()}".encode()).digest()[:16], version=5)
    try:
        return await groups.create(id=id_, **_fields(group))
    except (GroupExists, InvalidRequest):
        with suppress(GroupNotFound):
            return await groups.get(id_)
        raise


async def read_group(groups: CallersGroups, group_id: UUID, response: Response) -> Group:
    """Read one group with its limits. Its `ETag` tells this state from any later one."""
    return _tagged(await groups.get(group_id), response)


async def edit_group(
    groups: CallersGroups,
    group_id: UUID,
    changes: GroupChanges,
    response: Response,
    if_match: Annotated[str | None, Header(description="The `ETag` of the group that you decided by")] = None,
) -> Group:
    """Change the given fields of a group in one step. Usage stays.

    With `If-Match`, a change that somebody else made meanwhile isn't overwritten: 412.
    """
    group = await groups.update(group_id, **_fields(changes), unchanged_since=_read_tag(if_match))
    return _tagged(group, response)


async def delete_group(groups: CallersGroups, group_id: UUID) -> Group:
    """Delete a group with its limits and memberships, and return it as it was. The ledger keeps its usage.

    A group with others beneath it isn't deleted: delete or move those first.
    """
    return await groups.delete(group_id)


async def read_usage(groups: CallersGroups, group_id: UUID) -> GroupUsage:
    """Return the member count and, for each limit, what is used, what remains, and when it resets.

    It includes the group's allowance under the `child` limits of the group above it, which is then the limit's `group`.
    """
    return await groups.usage(group_id)


async def read_history(
    groups: CallersGroups,
    group_id: UUID,
    kind: Annotated[Kind | None, Query()] = None,
    bucket: Annotated[Bucket, Query()] = "day",
    since: Annotated[UtcMoment | None, Query(description="Default: 30 days ago")] = None,
    until: Annotated[UtcMoment | None, Query(description="Default: now")] = None,
) -> History:
    """Read what was used per kind and hour, day, week or month of the group's time zone; empty ones are left out."""
    points = await groups.history(group_id, kind=kind, bucket=bucket, since=since, until=until)
    return History(items=points)


_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
"""When no group was changed: what stands for a tag that isn't one of ours."""


def _tagged(group: Group, response: Response) -> Group:
    response.headers["ETag"] = f'"{group.updated_at.isoformat()}"'
    return group


def _read_tag(if_match: str | None) -> datetime | None:
    if if_match is None or if_match.strip() == "*":
        return None
    try:
        moment = datetime.fromisoformat(if_match.strip().removeprefix("W/").strip('"'))
    except ValueError:
        return _NEVER
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _fields(group: GroupIn | GroupChanges) -> dict[str, Any]:
    """Make the client's arguments; what isn't given stays as it is, also where null is a value."""
    given = {name: getattr(group, name) for name in group.model_fields_set}
    return {"parent" if name == "parent_id" else name: value for name, value in given.items()}


def routes_of(gate: Gate) -> APIRouter:
    """Make the routes behind a gate; 500 limits are a list."""
    routes = Router(route_class=route_class(gate, MOST_IN_BULK), tags=["groups"])
    routes.get("/groups", responses=documented())(list_groups)
    routes.post("/groups", status_code=201, responses={201: _GROUP_EXAMPLE, **documented(409, 413)})(create_group)
    routes.get("/groups/{group_id}", responses=_ONE)(read_group)
    routes.patch("/groups/{group_id}", responses={**_ONE, **documented(404, 409, 412, 413)})(edit_group)
    routes.delete("/groups/{group_id}", responses=_ONE)(delete_group)
    routes.get("/groups/{group_id}/usage", responses={**_ONE, 200: _USAGE_EXAMPLE})(read_usage)
    routes.get("/groups/{group_id}/history", responses=documented(404))(read_history)
    return routes
