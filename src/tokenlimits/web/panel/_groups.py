"""Dialogs that create, edit and delete a group."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID
from zoneinfo import available_timezones

from fastapi import Query
from starlette.responses import Response

from tokenlimits import InvalidRequest
from tokenlimits.errors import GroupChanged, GroupExists
from tokenlimits.models import Group
from tokenlimits.web._router import Router

from . import _tree, _words
from ._format import ago
from ._forms import GroupForm
from ._limit_rows import LimitRow
from ._pages import BulkPageRoute, Signed, Visit, done
from ._plans import PLANS, plan_named
from ._views import customers

routes = Router(route_class=BulkPageRoute, include_in_schema=False)

_ZONES = ["UTC", *sorted(name for name in available_timezones() if "/" in name and not name.startswith("Etc/"))]


@routes.get("/groups/new")
async def new_dialog(
    visit: Signed,
    plan: Annotated[str, Query(max_length=32)] = "",
    name: Annotated[str, Query(max_length=200)] = "",
    parent: Annotated[str, Query(max_length=36)] = "",
) -> Response:
    """Show an empty form, or that of a plan, if the caller may create groups."""
    chosen = plan_named(plan)
    empty = GroupForm(name, parent=parent, rows=[LimitRow(kind="image")])
    return await _dialog(visit, None, chosen.form(name, parent) if chosen else empty, plan=plan)


@routes.post("/groups/new")
async def create(visit: Signed) -> Response:
    """Create a group, or say what is wrong."""
    return await _save(visit, None)


@routes.get("/limit-sentence")
async def limit_sentence(visit: Signed) -> Response:
    """Say what a limit will do, while it is typed."""
    rows = LimitRow.of_typed(visit.request.query_params)
    return visit.page("limit_sentence.html", sentence=rows[0].sentence if rows else "")


@routes.get("/groups/{group_id}/edit")
async def edit_dialog(visit: Signed, group_id: UUID) -> Response:
    """Show a group's form."""
    group = await visit.groups.get(group_id)
    above = await _tree.above(visit.groups, group)
    return await _dialog(visit, group, GroupForm.of_group(group, above))


@routes.post("/groups/{group_id}/edit")
async def edit(visit: Signed, group_id: UUID) -> Response:
    """Change a group, or say what is wrong."""
    return await _save(visit, group_id)


@routes.get("/groups/{group_id}/delete")
async def delete_dialog(visit: Signed, group_id: UUID) -> Response:
    """Ask for confirmation, and say what is deleted and what stays; or why it can't be."""
    return await _delete_dialog(visit, group_id)


@routes.post("/groups/{group_id}/delete")
async def delete(visit: Signed, group_id: UUID) -> Response:
    """Delete a group."""
    try:
        group = await visit.groups.delete(group_id)
    except InvalidRequest:
        return await _delete_dialog(visit, group_id, 422)  # somebody put a group beneath it meanwhile
    return _deleted(visit, f"{group.name} was deleted. The ledger keeps its usage.")


async def _delete_dialog(visit: Visit, group_id: UUID, status: int = 200) -> Response:
    usage = await visit.groups.usage(group_id)
    return visit.page("delete.html", status, usage=usage, beneath=customers(usage.child_count, usage))


def _deleted(visit: Visit, message: str) -> Response:
    # the group's own page is gone too
    if "/groups/" in visit.request.headers.get("hx-current-url", ""):
        return done(message, go={"to": f"{visit.request.scope.get('root_path', '')}/"})
    return done(message)


async def _save(visit: Visit, group_id: UUID | None) -> Response:
    sent = await visit.form()
    form = GroupForm.of_typed(sent)
    fields = {}
    if "draft" not in sent:
        form, fields = form.checked()
    if not fields:
        group = await visit.groups.get(group_id) if group_id else None
        return await _dialog(visit, group, form, 200 if "draft" in sent else 422)
    try:
        saved = await (visit.groups.update(group_id, **fields) if group_id else visit.groups.create(**fields))
    except GroupChanged:
        return await _changed(visit, group_id, form)
    except (GroupExists, InvalidRequest) as error:
        group = await visit.groups.get(group_id) if group_id else None
        return await _dialog(visit, group, form.refused(error), 422)
    return done(f"{saved.name} was saved." if group_id else f"{saved.name} was created.")


async def _changed(visit: Visit, group_id: UUID | None, form: GroupForm) -> Response:
    """Say what somebody else changed; saving again overwrites it."""
    assert group_id is not None  # noqa: S101  # a new group has no other editor
    group = await visit.groups.get(group_id)
    above = await _tree.above(visit.groups, group)
    changes = form.changed_meanwhile(group, above)
    now = GroupForm.of_group(group, above)
    form = replace(form, updated_at=now.updated_at, before=now.before)
    when = ago(datetime.now(UTC) - group.updated_at)
    return await _dialog(visit, group, form, 422, changes=changes, when=when)


async def _dialog(visit: Visit, group: Group | None, form: GroupForm, status: int = 200, **more: object) -> Response:
    choices = {"units": _words.UNITS, "starts": _words.STARTS, "scopes": _words.SCOPES, "zones": _ZONES}
    if group is None:
        places = _tree.Tree(await visit.groups.list()).places()
        more = {"plans": PLANS, "plan": "", "places": places, "above": [], **more}
    else:
        more = {"above": _tree.inherited(await _tree.above(visit.groups, group)), **more}
    return visit.page("group_form.html", status, group=group, form=form, empty=LimitRow(), **choices, **more)
