"""`usage --at-least 90 --members`: who is at a member limit, or close to it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenlimits import GroupManager
from tokenlimits.models import Group, LimitPressure

from ._find import find_group
from ._terminal import plain, print_json, say, show, table
from ._wording import or_unlimited, window

_MOST = 1000

Pressed = Sequence[tuple[Group, LimitPressure]]


def read_pressed(groups: GroupManager, group: str | None, at_least: int) -> Pressed:
    """Read the member limits of a group, or of all, that somebody has used to a percentage."""
    looked_at = [find_group(groups, group)] if group is not None else groups.list()
    return [
        (each, limit)
        for each in looked_at
        if any(limit.scope == "member" and limit.max for limit in each.limits)
        for limit in groups.limit_pressure(each.id, at_least=at_least, count=_MOST)
        if limit.near
    ]


def show_pressed(pressed: Pressed, at_least: int, *, as_json: bool) -> None:
    """Print a line per member, and how many there are."""
    if as_json:
        print_json(
            [
                {"group": {"id": str(group.id), "name": group.name}, **limit.model_dump(mode="json")}
                for group, limit in pressed
            ]
        )
        return
    if not pressed:
        say(f"No member is at {at_least} % or more of a member limit.")
        return
    rows = [
        (
            plain(group.name),
            member.email or member.id,
            limit.kind,
            window(limit.period, limit.starts),
            f"{member.used:,}",
            or_unlimited(limit.max),
        )
        for group, limit in pressed
        for member in limit.members
    ]
    show(table("group", "user", "kind", "period", "used", "of", rows=rows, right=["used", "of"], cut="group"))
    for group, limit in pressed:
        say(
            f"{plain(group.name)}, {limit.kind}, {window(limit.period, limit.starts)}: {limit.full:,} at the limit, "
            f"{limit.near:,} at {at_least} % or more"
        )
