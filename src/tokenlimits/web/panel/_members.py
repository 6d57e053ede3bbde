"""The dialog with a group's members: list, search, add, remove, move."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Annotated
from uuid import UUID

from fastapi import Query
from starlette.responses import Response

from tokenlimits import AsyncGroupManager, InvalidRequest
from tokenlimits.models import BulkResult
from tokenlimits.web._router import Router

from ._exceptions import excepted
from ._forms import ids, pasted
from ._pages import BulkPageRoute, Signed, Visit, stay

routes = Router(route_class=BulkPageRoute, include_in_schema=False)

_PAGE = 50


@routes.get("/groups/{group_id}/members")
async def members_dialog(visit: Signed, group_id: UUID) -> Response:
    """Show the dialog, with the first members."""
    return await _dialog(visit, group_id)


@routes.get("/groups/{group_id}/members/rows")
async def member_rows(
    visit: Signed,
    group_id: UUID,
    search: Annotated[str, Query(max_length=320)] = "",
    after: Annotated[UUID | None, Query()] = None,
) -> Response:
    """Show the matching members, or the next page of them."""
    place = None if after is None else str(after)
    page, excepted_ = await asyncio.gather(
        visit.groups.members_page(group_id, search=search or None, after=place, size=_PAGE),
        excepted(visit.groups, group_id),
    )
    return visit.page("member_rows.html", group_id=group_id, search=search, members=page, excepted=excepted_)


@routes.get("/groups/{group_id}/members/search")
async def find_users(visit: Signed, group_id: UUID, email: Annotated[str, Query(max_length=320)] = "") -> Response:
    """Show users whose address contains a text."""
    users = await visit.groups.find_users(email.strip()) if len(email.strip()) > 1 else None
    return visit.page("found_users.html", group_id=group_id, email=email.strip(), users=users)


@routes.post("/groups/{group_id}/members")
async def add(visit: Signed, group_id: UUID) -> Response:
    """Add the selected users and those in a pasted list."""
    form = await visit.form()
    listed = pasted(str(form.get("list", "")))
    found, unknown = await _by_email(visit.groups, listed.emails)
    wanted = [*ids(form, "user_id"), *listed.ids, *found]
    result = await visit.groups.add_members(group_id, wanted)
    missing = [*listed.unknown, *unknown, *(str(refused.user_id) for refused in result.refused)]
    return stay(await _dialog(visit, group_id, missing), _added(result, missing))


@routes.post("/groups/{group_id}/members/remove")
async def remove(visit: Signed, group_id: UUID) -> Response:
    """Remove the selected members."""
    form = await visit.form()
    removed = await visit.groups.remove_members(group_id, ids(form, "member"))
    dialog = await _dialog(visit, group_id, search=str(form.get("search", "")))
    return stay(dialog, f"{_people(removed)} removed. Their usage stays.")


@routes.post("/groups/{group_id}/members/move")
async def move(visit: Signed, group_id: UUID) -> Response:
    """Move the selected members to another group."""
    form = await visit.form()
    to = ids(form, "to")
    if not to:
        raise InvalidRequest("Select the group to move them to.", detail="to")
    members = ids(form, "member")
    moved = [await visit.groups.move_member(member, from_=group_id, to=to[0]) for member in members]
    dialog = await _dialog(visit, group_id, search=str(form.get("search", "")))
    return stay(dialog, f"{_people(sum(moved))} moved.")


async def _dialog(visit: Visit, group_id: UUID, missing: Iterable[str] = (), search: str = "") -> Response:
    usage, page, groups, excepted_ = await asyncio.gather(
        visit.groups.usage(group_id),
        visit.groups.members_page(group_id, search=search or None, size=_PAGE),
        visit.groups.list(),
        excepted(visit.groups, group_id),
    )
    others = [group for group in groups if group.id != group_id]
    return visit.page(
        "members.html",
        group_id=group_id,
        usage=usage,
        search=search if usage.member_count else "",  # without members, there is nothing to search
        members=page,
        excepted=excepted_,
        others=others,
        missing=list(missing),
    )


async def _by_email(groups: AsyncGroupManager, emails: list[str]) -> tuple[list[UUID], list[str]]:
    """Find the users with these addresses, and the addresses that no user has."""
    users = await groups.find_users_by_email(emails) if emails else []
    known = {(user.email or "").lower() for user in users}
    return [user.id for user in users], [email for email in emails if email.lower() not in known]


def _added(result: BulkResult, missing: list[str]) -> str:
    words = [f"{_people(result.added)} added"]
    if result.already:
        words.append(f"{result.already:,} already there")
    if missing:
        words.append(f"{len(missing):,} not found")
    return ", ".join(words) + "."


def _people(count: int) -> str:
    return "1 member" if count == 1 else f"{count:,} members"
