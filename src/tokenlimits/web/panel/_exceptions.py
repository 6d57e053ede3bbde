"""Exceptions: another max of one limit, for one member or of the group; and the reset of one member."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from starlette.datastructures import FormData
from starlette.responses import Response

from tokenlimits import AsyncGroupManager, InvalidRequest, Limit
from tokenlimits.models import Group, Override
from tokenlimits.web._router import Router

from ._days import beginning, day_of
from ._forms import ids
from ._limit_rows import whole
from ._pages import PageRoute, Signed, Visit, done, stay

routes = Router(route_class=PageRoute, include_in_schema=False)

_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Exceptional:
    """A member limit, with the exception from it that the member has."""

    limit: Limit
    override: Override | None
    until: str
    """The day with which it ends, where the group is; empty: none."""


async def first_of_group(groups: AsyncGroupManager, group_id: UUID) -> list[Override]:
    """Read the exceptions that a group's page shows, and one more if there are more."""
    found: list[Override] = []
    async for each in groups.overrides(group_id):
        found.append(each)
        if len(found) > _SHOWN:
            break
    return found


async def excepted(groups: AsyncGroupManager, group_id: UUID) -> set[UUID]:
    """Read which members of a group have an exception now."""
    return {each.user_id async for each in groups.overrides(group_id) if each.user_id and each.status == "active"}


@routes.get("/groups/{group_id}/members/{user_id}")
async def member_dialog(visit: Signed, group_id: UUID, user_id: UUID) -> Response:
    """Show a member's limits, each with its exception."""
    return await _dialog(visit, group_id, user_id)


@routes.post("/groups/{group_id}/members/{user_id}/exception")
async def set_exception(visit: Signed, group_id: UUID, user_id: UUID) -> Response:
    """Set an exception, or say what is wrong."""
    form = await visit.form()
    group = await visit.groups.get(group_id)
    try:
        override = await visit.groups.set_override(
            group_id, user_id=user_id, max=_max(form), until=_day(form, "until", group), **_which(form)
        )
    except InvalidRequest as error:
        wrong = {"limit": _named(form), "words": str(error).removeprefix(f"{error.field}: ")}
        return await _dialog(visit, group_id, user_id, wrong, 422)
    return stay(await _dialog(visit, group_id, user_id), f"The exception for {override.email or user_id} was saved.")


@routes.post("/groups/{group_id}/members/{user_id}/anchor")
async def set_anchor(visit: Signed, group_id: UUID, user_id: UUID) -> Response:
    """Set from when a member's anchored periods are counted."""
    form = await visit.form()
    group = await visit.groups.get(group_id)
    try:
        await visit.groups.set_member_anchor(group_id, user_id, _day(form, "anchor", group))
    except InvalidRequest as error:
        wrong = {"anchor": str(error).removeprefix(f"{error.field}: ")}
        return await _dialog(visit, group_id, user_id, wrong, 422)
    return stay(await _dialog(visit, group_id, user_id), "Anchor saved. Usage was counted again in the new periods.")


@routes.post("/groups/{group_id}/members/{user_id}/reset")
async def reset_member(visit: Signed, group_id: UUID, user_id: UUID) -> Response:
    """Reset what one member has used in the current periods."""
    await visit.groups.reset_usage(group_id, user_id=user_id)
    return stay(await _dialog(visit, group_id, user_id), "Usage reset. The ledger keeps everything.")


@routes.post("/groups/{group_id}/exceptions/remove")
async def remove_exception(visit: Signed, group_id: UUID) -> Response:
    """End an exception."""
    form = await visit.form()
    user_id = next(iter(ids(form, "user_id")), None) if form.get("user_id") else None
    await visit.groups.remove_override(group_id, user_id=user_id, **_which(form))
    message = "Exception removed: the limit's own maximum applies again."
    return stay(await _dialog(visit, group_id, user_id), message) if user_id and form.get("stay") else done(message)


async def _dialog(
    visit: Visit, group_id: UUID, user_id: UUID, wrong: Mapping[str, object] | None = None, status: int = 200
) -> Response:
    before = str(UUID(int=max(user_id.int - 1, 0)))  # members are listed by id, from the one after
    group, members = await asyncio.gather(
        visit.groups.get(group_id), visit.groups.members_page(group_id, after=before, size=1)
    )
    overrides = [each async for each in visit.groups.overrides(group_id, user_id=user_id)]
    member = next((member for member in members if member.id == user_id), None)
    return visit.page(
        "member.html",
        status,
        group=group,
        user_id=user_id,
        whose=(member and member.email) or str(user_id),
        member=member,
        anchor=day_of(member and member.anchor_at, group.timezone),
        limits=_limits(group, overrides),
        today=datetime.now(UTC).date().isoformat(),
        wrong=wrong or {},
    )


def _limits(group: Group, overrides: Sequence[Override]) -> list[Exceptional]:
    by_limit = {(each.kind, each.period, each.starts): each for each in overrides}
    own = [limit for limit in group.limits if limit.scope == "member"]
    found = [(limit, by_limit.get((limit.kind, limit.period, limit.starts))) for limit in own]
    return [Exceptional(limit, each, day_of(each and each.until, group.timezone)) for limit, each in found]


def _which(form: FormData) -> dict[str, Any]:
    return {name: str(form.get(name, "")) for name in ("kind", "period", "starts")}


def _named(form: FormData) -> tuple[str, ...]:
    return tuple(_which(form).values())


def _max(form: FormData) -> int | None:
    if "unlimited" in form:
        return None
    typed = whole(str(form.get("max", "")).strip())
    if typed is None:
        raise InvalidRequest(
            "max: A maximum is a whole number like 10,000 (commas between thousands only); 0 blocks.", detail="max"
        )
    return typed


def _day(form: FormData, name: str, group: Group) -> datetime | None:
    typed = str(form.get(name, "")).strip()
    try:
        return beginning(typed, group.timezone) if typed else None
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", detail=name) from None
