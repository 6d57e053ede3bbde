"""Exceptions: another max of one limit, for one member, one customer or a whole group; and the reset of one member."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from starlette.datastructures import FormData
from starlette.responses import Response

from tokenlimits import AsyncGroupManager, InvalidRequest, Limit
from tokenlimits.models import Group, Override, Scope
from tokenlimits.web._router import Router

from ._days import beginning, day_of
from ._forms import ids
from ._limit_rows import whole
from ._pages import PageRoute, Signed, Visit, done, stay

routes = Router(route_class=PageRoute, include_in_schema=False)

_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Exceptional:
    """A limit, with the exception from it that a member, a customer or a group has."""

    owner: Group
    limit: Limit
    override: Override | None

    @property
    def until(self) -> str:
        """The day with which it ends, where the limit's group is; empty: none."""
        return day_of(self.override and self.override.until, self.owner.timezone)

    @property
    def named(self) -> tuple[str, ...]:
        """What a form says of the limit."""
        return str(self.owner.id), self.limit.kind, self.limit.period, self.limit.starts


async def first_of_group(groups: AsyncGroupManager, group: Group) -> list[Override]:
    """Read the exceptions that a group's page shows, and one more if there are more; those from its plan come first."""
    found = [each async for each in _from_plan(groups, group)]
    async for each in groups.overrides(group.id):
        found.append(each)
        if len(found) > _SHOWN:
            break
    return found


async def _from_plan(groups: AsyncGroupManager, group: Group) -> AsyncIterator[Override]:
    if group.parent_id:
        async for each in groups.overrides(group.parent_id, child_id=group.id):
            yield each


async def excepted(groups: AsyncGroupManager, group_id: UUID) -> set[UUID]:
    """Read which members of a group have an exception now."""
    return {each.user_id async for each in groups.overrides(group_id) if each.user_id and each.status == "active"}


@routes.get("/groups/{group_id}/members/{user_id}")
async def member_dialog(visit: Signed, group_id: UUID, user_id: UUID) -> Response:
    """Show a member's limits, each with its exception."""
    return await _dialog(visit, group_id, user_id)


@routes.get("/groups/{group_id}/exceptions")
async def group_dialog(visit: Signed, group_id: UUID) -> Response:
    """Show the limits of a whole group, its own and those of its plan, each with its exception."""
    return await _dialog(visit, group_id)


@routes.post("/groups/{group_id}/exceptions")
async def set_exception(visit: Signed, group_id: UUID) -> Response:
    """Set an exception from a limit of a group, or say what is wrong."""
    form = await visit.form()
    owner = await visit.groups.get(group_id)
    try:
        override = await visit.groups.set_override(
            group_id, **_subject(form), max=_max(form), until=_day(form, "until", owner), **_which(form)
        )
    except InvalidRequest as error:
        words = str(error).removeprefix(f"{error.field}: ")
        named = (str(group_id), *_which(form).values())
        return await _of(visit, form, group_id, {"limit": named, "words": words}, 422)
    whose = override.email or override.child_name or override.user_id or owner.name
    return stay(await _of(visit, form, group_id), f"The exception for {whose} was saved.")


@routes.post("/groups/{group_id}/exceptions/remove")
async def remove_exception(visit: Signed, group_id: UUID) -> Response:
    """End an exception."""
    form = await visit.form()
    await visit.groups.remove_override(group_id, **_subject(form), **_which(form))
    message = "Exception removed: the limit's own maximum applies again."
    return stay(await _of(visit, form, group_id), message) if form.get("stay") else done(message)


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


async def _of(
    visit: Visit, form: FormData, owner_id: UUID, wrong: Mapping[str, object] | None = None, status: int = 200
) -> Response:
    """Show the dialog again that a form is in."""
    subject = _subject(form)
    return await _dialog(visit, subject["child_id"] or owner_id, subject["user_id"], wrong, status)


async def _dialog(
    visit: Visit,
    group_id: UUID,
    user_id: UUID | None = None,
    wrong: Mapping[str, object] | None = None,
    status: int = 200,
) -> Response:
    group = await visit.groups.get(group_id)
    shown = await (_of_group(visit, group) if user_id is None else _of_member(visit, group, user_id))
    today = datetime.now(UTC).date().isoformat()
    return visit.page("exceptions.html", status, group=group, user_id=user_id, today=today, wrong=wrong or {}, **shown)


async def _of_group(visit: Visit, group: Group) -> dict[str, Any]:
    overrides = [each async for each in visit.groups.overrides(group.id)]
    limits = _limits(group, "group", overrides)
    if group.parent_id:
        plan = await visit.groups.get(group.parent_id)
        limits = [*_limits(plan, "child", [each async for each in _from_plan(visit.groups, group)]), *limits]
    return {"whose": group.name, "member": None, "limits": limits}


async def _of_member(visit: Visit, group: Group, user_id: UUID) -> dict[str, Any]:
    before = str(UUID(int=max(user_id.int - 1, 0)))  # members are listed by id, from the one after
    members = await visit.groups.members_page(group.id, after=before, size=1)
    overrides = [each async for each in visit.groups.overrides(group.id, user_id=user_id)]
    member = next((member for member in members if member.id == user_id), None)
    return {
        "whose": (member and member.email) or str(user_id),
        "member": member,
        "anchor": day_of(member and member.anchor_at, group.timezone),
        "limits": _limits(group, "member", overrides),
    }


def _limits(owner: Group, scope: Scope, overrides: Sequence[Override]) -> list[Exceptional]:
    by_limit = {(each.kind, each.period, each.starts): each for each in overrides if each.scope == scope}
    own = [limit for limit in owner.limits if limit.scope == scope]
    return [Exceptional(owner, limit, by_limit.get((limit.kind, limit.period, limit.starts))) for limit in own]


def _subject(form: FormData) -> dict[str, UUID | None]:
    given = {name: ids(form, name) if form.get(name) else [] for name in ("user_id", "child_id")}
    return {name: next(iter(found), None) for name, found in given.items()}


def _which(form: FormData) -> dict[str, Any]:
    return {name: str(form.get(name, "")) for name in ("kind", "period", "starts")}


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
