"""`usage`: the usage of every limit, once or live."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tokenlimits import GroupManager, TokenLimits, TokenLimitsError
from tokenlimits.levels import short
from tokenlimits.models import GroupLimitUsage, GroupRef, GroupUsage, UserLimit

from ._find import find_group, find_user, manager, worker
from ._options import AsJson
from ._pressure import read_pressed, show_pressed
from ._terminal import NARROW, Bar, Problem, colour, out, plain, print_json, say, show, table
from ._watch import watch as show_live
from ._wording import allowance, resets_in

_NUMBERS = ("%", "used", "of", "left", "resets in")

Answer = Sequence[GroupUsage | UserLimit]
Line = tuple[GroupRef, GroupLimitUsage | UserLimit]
"""A group, and a limit of it or of the group above it."""


class _CantTell(Problem):
    """Usage can't be read: not the same as no alarm, nor as one."""

    exit_code = 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("usage")(usage)


def usage(
    group: Annotated[
        str | None,
        typer.Argument(metavar="GROUP", help="A group's name or id. Default: all groups.", show_default=False),
    ] = None,
    *,
    user: Annotated[
        str | None, typer.Option("--user", help="A user's id or e-mail address.", show_default=False)
    ] = None,
    at_least: Annotated[
        float | None,
        typer.Option(
            "--at-least",
            min=0,
            metavar="PERCENT",
            help="Only limits used to at least this percentage; exit with 1 if there are any.",
            show_default=False,
        ),
    ] = None,
    members: Annotated[
        bool, typer.Option("--members", help="With --at-least: the members who have used that much of a member limit.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep the display up to date until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.5, help="Seconds between updates with --watch.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show the usage of every limit.

    Without --user, a limit for each member, or for each customer (a group beneath), is shown for all of them together.
    A limit of a plan is shown with each of its customers too, as "of" the plan. With --at-least, the exit status is 0
    if no limit is that full, 1 if one is, and 3 if usage can't be read.
    """
    if group is not None and user is not None:
        raise Problem("Pass either a group or --user.")
    if watch and (as_json or not out.is_terminal):
        raise Problem("--watch needs a terminal and can't be combined with --json; leave it out to print once.")
    percentage = _percentage(at_least, may_be=user is None and not watch) if members else 0
    try:
        with manager() as groups, worker() as limits:
            if members:
                pressed = read_pressed(groups, group, percentage)
                show_pressed(pressed, percentage, as_json=as_json)
                raise typer.Exit(1 if pressed else 0)
            everything = _reader(groups, limits, group, user)
            read = everything if at_least is None else lambda: _full(everything(), at_least / 100)
            if watch:
                show_live(lambda: _fullest_first(read()), lambda lines: _draw(lines, brief=True), interval)
                return
            answer = read()
    except (Problem, TokenLimitsError) as error:
        if at_least is None:
            raise
        raise _CantTell(str(error)) from error
    if as_json:
        print_json(answer)
    elif at_least is not None and not answer:
        say(f"No limit is at {at_least:g} % or more.")
    else:
        _show(answer)
    if at_least is not None and answer:
        raise typer.Exit(1)


def _percentage(at_least: float | None, *, may_be: bool) -> int:
    """Return from which percentage on --members names somebody."""
    if not may_be or at_least is None or not 1 <= at_least <= 100 or at_least % 1:
        raise Problem("--members needs --at-least with a whole number from 1 to 100, and neither --user nor --watch.")
    return int(at_least)


def _reader(groups: GroupManager, limits: TokenLimits, group: str | None, user: str | None) -> Callable[[], Answer]:
    if user is not None:
        user_id = find_user(groups, user)
        return lambda: limits.usage(user_id)
    if group is not None:
        group_id = find_group(groups, group).id
        return lambda: [groups.usage(group_id)]
    return groups.usage_all


def _full(answer: Answer, fraction: float) -> Answer:
    """Keep the limits that are at least this full, but not those with a max of 0: they are blocked on purpose."""

    def is_full(limit: GroupLimitUsage | UserLimit) -> bool:
        return bool(limit.max) and _fullness(limit) >= fraction

    kept: list[GroupUsage | UserLimit] = []
    for each in answer:
        if isinstance(each, UserLimit):
            kept += [each] if is_full(each) else []
        elif limits := tuple(filter(is_full, each.limits)):
            kept.append(each.model_copy(update={"limits": limits}))
    return kept


def _fraction(limit: GroupLimitUsage | UserLimit) -> float | None:
    if isinstance(limit, UserLimit):
        return None if limit.max is None else limit.used / limit.max if limit.max else 1.0
    # a member limit of a group without members: the server calls it full, but it is no reason for an alarm
    return 0.0 if limit.capacity == limit.used == 0 and limit.max else limit.fraction


def _fullness(limit: GroupLimitUsage | UserLimit) -> float:
    """How near a limit is to denying; one with a max of 0 denies on purpose."""
    return (_fraction(limit) or 0) if limit.max else 0


def _show(answer: Answer) -> None:
    drawn = usage_table(answer)
    if drawn.row_count:
        show(drawn)
    else:
        say("There are no limits. Set one with: tokenlimits limits set GROUP image=100/month")


def usage_table(answer: Answer, *, name_groups: bool = True) -> Table:
    """Draw usage, one line per limit, with a bar in green, yellow or red."""
    return _draw(_lines(answer), name_groups=name_groups)


def _lines(answer: Answer) -> list[Line]:
    lines: list[Line] = []
    for each in answer:
        limits = [each] if isinstance(each, UserLimit) else each.limits
        lines += [(each.group, limit) for limit in limits]
    return lines


def _fullest_first(answer: Answer) -> list[Line]:
    """Put first what needs looking at: not everything fits on a screen."""
    return sorted(_lines(answer), key=lambda line: _fullness(line[1]), reverse=True)


def _draw(lines: Sequence[Line], *, name_groups: bool = True, brief: bool = False) -> Table:
    now = datetime.now(UTC)
    columns = ("group", "kind", "limit", "", "%", "used", "of", "left", "resets in")
    left_out = {"group"} if not name_groups else set[str]()
    if out.width < NARROW:
        left_out |= {"of", "%"}  # nearly the same as the limit, and as the bar
    rows = [
        [cell for column, cell in zip(columns, _cells(*line, now, brief=brief), strict=True) if column not in left_out]
        for line in lines
    ]
    return table(*(each for each in columns if each not in left_out), rows=rows, right=_NUMBERS, cut="group")


def _cells(group: GroupRef, limit: GroupLimitUsage | UserLimit, now: datetime, *, brief: bool) -> Sequence[object]:
    write = short if brief else "{:,}".format
    fraction = _fraction(limit)
    capacity = limit.max if isinstance(limit, UserLimit) else limit.capacity
    return (
        plain(group.name),
        limit.kind,
        allowance(limit, write, of=group),
        # narrow, so that the bar leaves room for the words
        "" if fraction is None else Bar(fraction, most=out.width // 12),
        "" if fraction is None else f"{math.floor(fraction * 100):,}",
        Text(write(limit.used), style=colour(fraction)),
        "" if capacity is None else write(capacity),
        "" if limit.remaining is None else write(limit.remaining),
        resets_in(limit, now, of=group),
    )
