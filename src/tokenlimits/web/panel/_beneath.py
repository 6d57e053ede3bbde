"""What is beneath a group: its customers with their pools, new ones, and moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from starlette.responses import Response

from tokenlimits import InvalidRequest, Limit
from tokenlimits.errors import GroupExists
from tokenlimits.models import Group, GroupLimitUsage, GroupUsage
from tokenlimits.web._router import Router

from . import _tree
from ._forms import GroupForm, ids
from ._meters import Meter, meters
from ._pages import PageRoute, Signed, Visit, done
from ._views import Card, cards

routes = Router(route_class=PageRoute, include_in_schema=False)

_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Row:
    """A group directly beneath another one, with the limits by which it is known there."""

    card: Card
    meters: Sequence[Meter]
    is_excepted: bool
    """Whether the maximum of one of them is not the plan's."""


@dataclass(frozen=True, slots=True)
class Beneath:
    """The groups directly beneath a group, the fullest first."""

    rows: Sequence[Row] = ()
    more: int = 0


async def beneath(visit: Visit, group: Group, usage: GroupUsage) -> Beneath:
    """Read what is directly beneath a group."""
    if not usage.child_count:
        return Beneath()
    children = await visit.groups.list(parent=group.id)
    wanted = {child.id for child in children}
    found = [each for each in await visit.groups.usage_all() if each.group.id in wanted]
    rows = sorted(
        (_row(card, group) for card in cards(children, found)),
        key=lambda row: max((meter.fraction or 0 for meter in row.meters), default=0),
        reverse=True,
    )
    return Beneath(rows[:_SHOWN], len(rows[_SHOWN:]))


def _row(card: Card, plan: Group) -> Row:
    planned = {_named(limit): limit.max for limit in plan.limits if limit.scope == "child"}
    pools = _pools(card)
    excepted = [
        each for each in pools if each.plan and each.limit.max != planned.get(_named(each.limit), each.limit.max)
    ]
    return Row(card, pools, bool(excepted))


def _named(limit: Limit | GroupLimitUsage) -> tuple[str, str, str]:
    return limit.kind, limit.period, limit.starts


def _pools(card: Card) -> list[Meter]:
    """Return its allowances under the limits of its plan; without a plan, its fullest limit."""
    all_ = meters(card.usage)
    pools = [meter for meter in all_ if meter.plan]
    return pools or sorted(all_, key=lambda meter: -1 if meter.fraction is None else meter.fraction)[-1:]


@routes.get("/groups/{group_id}/customers/new")
async def new_dialog(visit: Signed, group_id: UUID) -> Response:
    """Ask for the name of a new customer."""
    return _new_dialog(visit, await visit.groups.get(group_id))


@routes.post("/groups/{group_id}/customers/new")
async def create(visit: Signed, group_id: UUID) -> Response:
    """Create a group beneath, which has its limits from the plan, or say what is wrong."""
    plan = await visit.groups.get(group_id)
    name = str((await visit.form()).get("name", "")).strip()
    form, fields = GroupForm(name, priority=str(plan.priority), timezone=plan.timezone, parent=str(plan.id)).checked()
    if not fields:
        return _new_dialog(visit, plan, form)
    try:
        group = await visit.groups.create(**fields)
    except (GroupExists, InvalidRequest) as error:
        return _new_dialog(visit, plan, form.refused(error))
    return done(f"{group.name} was created. It has the limits of {plan.name}.")


def _new_dialog(visit: Visit, plan: Group, form: GroupForm | None = None) -> Response:
    return visit.page("customer.html", 422 if form else 200, plan=plan, form=form or GroupForm())


@routes.get("/groups/{group_id}/move")
async def move_dialog(visit: Signed, group_id: UUID) -> Response:
    """Ask where to move a group."""
    return await _move_dialog(visit, group_id)


@routes.post("/groups/{group_id}/move")
async def move(visit: Signed, group_id: UUID) -> Response:
    """Move a group beneath another one, or beneath none."""
    form = await visit.form()
    to = ids(form, "to") if form.get("to") else []
    try:
        group = await visit.groups.update(group_id, parent=to[0] if to else None)
    except InvalidRequest as error:
        return await _move_dialog(visit, group_id, str(error).removeprefix(f"{error.field}: "))
    where = f"beneath {(await visit.groups.get(to[0])).name}" if to else "beneath no group"
    return done(f"{group.name} is {where} now. Its usage came along.")


async def _move_dialog(visit: Visit, group_id: UUID, wrong: str = "") -> Response:
    group = await visit.groups.get(group_id)
    places = _tree.Tree(await visit.groups.list()).places(group_id)
    above = await _tree.above(visit.groups, group)
    words = {"wrong": wrong, "parent": above[-1] if above else None}
    return visit.page("move.html", 422 if wrong else 200, group=group, places=places, **words)
