"""Dialogs that create, edit and delete a group."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID
from zoneinfo import available_timezones

from starlette.responses import Response

from tokenlimits import InvalidRequest
from tokenlimits.errors import GroupChanged, GroupExists
from tokenlimits.web._router import Router

from . import _words
from ._format import ago
from ._forms import GroupForm
from ._limit_rows import LimitRow
from ._pages import BulkPageRoute, Signed, Visit, done

routes = Router(route_class=BulkPageRoute, include_in_schema=False)

_ZONES = ["UTC", *sorted(name for name in available_timezones() if "/" in name and not name.startswith("Etc/"))]


@routes.get("/groups/new")
async def new_dialog(visit: Signed) -> Response:
    """Show an empty form, if the caller may create groups."""
    await visit.groups.page(size=1)
    return _dialog(visit, None, GroupForm(rows=[LimitRow(kind="image")]))


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
    return _dialog(visit, group_id, GroupForm.of_group(await visit.groups.get(group_id)))


@routes.post("/groups/{group_id}/edit")
async def edit(visit: Signed, group_id: UUID) -> Response:
    """Change a group, or say what is wrong."""
    return await _save(visit, group_id)


@routes.get("/groups/{group_id}/delete")
async def delete_dialog(visit: Signed, group_id: UUID) -> Response:
    """Ask for confirmation, and say what is deleted and what stays."""
    return visit.page("delete.html", usage=await visit.groups.usage(group_id))


@routes.post("/groups/{group_id}/delete")
async def delete(visit: Signed, group_id: UUID) -> Response:
    """Delete a group."""
    group = await visit.groups.delete(group_id)
    return _deleted(visit, f"{group.name} was deleted. The ledger keeps its usage.")


def _deleted(visit: Visit, message: str) -> Response:
    # the group's own page is gone too
    if "/groups/" in visit.request.headers.get("hx-current-url", ""):
        return done(message, go={"to": f"{visit.request.scope.get('root_path', '')}/"})
    return done(message)


async def _save(visit: Visit, group_id: UUID | None) -> Response:
    sent = await visit.form()
    if "draft" in sent:
        return _dialog(visit, group_id, GroupForm.of_typed(sent))
    form, fields = GroupForm.of_typed(sent).checked()
    if not form.is_good():
        return _dialog(visit, group_id, form, 422)
    try:
        group = await (visit.groups.update(group_id, **fields) if group_id else visit.groups.create(**fields))
    except GroupChanged:
        return await _changed(visit, group_id, form)
    except (GroupExists, InvalidRequest) as error:
        return _dialog(visit, group_id, form.refused(error), 422)
    return done(f"{group.name} was saved." if group_id else f"{group.name} was created.")


async def _changed(visit: Visit, group_id: UUID | None, form: GroupForm) -> Response:
    """Say what somebody else changed; saving again overwrites it."""
    assert group_id is not None  # noqa: S101  # a new group has no other editor
    group = await visit.groups.get(group_id)
    changes = form.changed_meanwhile(group)
    now = GroupForm.of_group(group)
    form = replace(form, updated_at=now.updated_at, before=now.before)
    when = ago(datetime.now(UTC) - group.updated_at)
    return _dialog(visit, group_id, form, 422, changes=changes, when=when)


def _dialog(visit: Visit, group_id: UUID | None, form: GroupForm, status: int = 200, **more: object) -> Response:
    choices = {"units": _words.UNITS, "starts": _words.STARTS, "scopes": _words.SCOPES, "zones": _ZONES}
    return visit.page("group_form.html", status, group_id=group_id, form=form, empty=LimitRow(), **choices, **more)
