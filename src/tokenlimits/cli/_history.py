"""`history`: what was used over time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from tokenlimits.models import Bucket, Group, HistoryPoint

from ._find import find_group, kind_meant, manager
from ._options import AsJson, KindOption, Since, Until
from ._terminal import Bar, print_json, say, show, table, zone_of


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("history")(history)


def history(
    group: Annotated[
        str | None,
        typer.Argument(metavar="GROUP", help="A group's name or id. Default: all groups, in UTC.", show_default=False),
    ] = None,
    *,
    by: Annotated[Bucket, typer.Option("--by", help="The step of the history.")] = "day",
    kind: KindOption = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Show usage over time.

    By default, this shows the last 30 days. Hours, days, weeks and months begin in the group's time zone. If the group
    has a limit per such step, usage is shown against it.
    """
    with manager() as groups:
        found = find_group(groups, group) if group is not None else None
        group_id = found.id if found is not None else None
        points = groups.history(group_id, kind=kind, bucket=by, since=since, until=until)
        meant = "" if points else kind_meant(groups, kind)
    if as_json:
        print_json(points)
    elif points:
        show(_table(points, by, found))
    else:
        say(f"There was no usage in that time.{meant}")


def _table(points: Sequence[HistoryPoint], by: Bucket, group: Group | None) -> Table:
    """Draw each point against the group's current limit per step if there is one, or else against the largest point."""
    zone = zone_of(group.timezone if group is not None else "UTC")
    limits = {
        limit.kind: limit.max
        for limit in (group.limits if group is not None else ())
        if (limit.period, limit.starts, limit.scope, limit.counts) == (by, "calendar", "group", None) and limit.max
    }
    most: dict[str, int] = {}
    for point in points:
        most[point.kind] = max(point.used, most.get(point.kind, 1))
    rows = [
        (
            _when(point.bucket.astimezone(zone), by),
            point.kind,
            Bar(point.used / limits[point.kind])
            if point.kind in limits
            else Bar(point.used / most[point.kind], style="cyan"),
            f"{point.used:,}",
            f"{limits[point.kind]:,}" if point.kind in limits else "",
            f"{point.generations:,}",
        )
        for point in points
    ]
    columns = ("kind", "", "used", "of", "generations")
    return table(f"{by} ({zone})", *columns, rows=rows, right=["used", "of", "generations"])


def _when(at: datetime, by: Bucket) -> str:
    return f"{at:%Y-%m-%d %H:%M}" if by == "hour" else f"{at:%Y-%m}" if by == "month" else f"{at:%Y-%m-%d}"
