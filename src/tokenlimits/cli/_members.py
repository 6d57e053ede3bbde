"""`members`: list, add, remove, move; one user or fifty thousand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated
from uuid import UUID

import typer

from tokenlimits import GroupManager
from tokenlimits.models import Group

from ._bulk import File, Outcome, Report, StartLine, at_once, in_parts, report
from ._find import find_group, find_user, kind_meant, manager, resolve
from ._lines import EMAILS, Line, source
from ._options import (
    Anchor,
    AnchorAt,
    AsJson,
    GroupArgument,
    KindOption,
    Since,
    Until,
    UserArgument,
    Yes,
    chosen_anchor,
)
from ._terminal import (
    Bar,
    Problem,
    confirm,
    counted,
    moment,
    moment_in_words,
    out,
    plain,
    print_json,
    print_json_list,
    say,
    show,
    table,
)

commands = typer.Typer(help="Manage the members of a group.", no_args_is_help=True, rich_markup_mode=None)

Users = Annotated[
    list[str] | None, typer.Argument(metavar="USER", help="User ids or e-mail addresses.", show_default=False)
]

_COLUMNS = ("user_id", "id", "user", *EMAILS)
_PART = 1_000
_MOVES = 100


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="members")


@commands.command("list")
def list_(
    group: GroupArgument,
    *,
    search: Annotated[
        str | None,
        typer.Option("--search", help="Only members whose address contains this.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List a group's members."""
    with manager() as groups:
        members = groups.members(find_group(groups, group).id, search=search)
        if as_json:
            print_json_list(members)
            return
        for member in members:
            email = "" if member.email is None else plain(member.email)
            anchor = "" if member.anchor_at is None else f"  anchor {moment(member.anchor_at)}"
            out.print(f"{member.id}  {moment(member.joined_at)}  {email}{anchor}", soft_wrap=True)


@commands.command()
def top(
    group: GroupArgument,
    *,
    count: Annotated[int, typer.Option("--count", "-n", help="How many users to show.")] = 10,
    kind: KindOption = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Show who used the most, including users who have left.

    By default, this covers the last 30 days.
    """
    with manager() as groups:
        found = find_group(groups, group)
        members = groups.top_members(found.id, kind=kind, since=since, until=until, count=count)
        meant = "" if members else kind_meant(groups, kind)
    if as_json:
        print_json(members)
    elif members:
        rows = [
            (
                member.email or member.id,
                Bar(member.used / max(1, members[0].used), style="cyan"),
                f"{member.used:,}",
                f"{member.generations:,}",
            )
            for member in members
        ]
        show(table("user", "", "used", "generations", rows=rows, right=["used", "generations"]))
    else:
        say(f"There was no usage in that time.{meant}")


@commands.command()
def add(
    group: GroupArgument,
    users: Users = None,
    *,
    anchor_at: AnchorAt = None,
    file: File = None,
    start_line: StartLine = 1,
    report_to: Report = None,
    as_json: AsJson = False,
) -> None:
    """Add users to a group, by id or e-mail address.

    A file has one user per line, or is CSV with a column user_id or email. Adding a member again changes nothing.
    Anchored member limits count from --anchor-at or, without it, from when the user joins.
    """
    outcome = Outcome()
    with manager() as groups, source(users or [], file, _COLUMNS, start_line) as lines:
        found = find_group(groups, group)
        in_parts(lines, "Adding", _PART, lambda part: _add(groups, found, part, anchor_at, outcome))
    report(outcome, report_to, as_json=as_json)


def _add(
    groups: GroupManager, group: Group, part: Sequence[Line], anchor_at: datetime | None, outcome: Outcome
) -> None:
    ids = _ids(groups, part, outcome)
    result = groups.add_members(group.id, ids.values(), anchor_at=anchor_at)
    reasons = {each.user_id: each.reason for each in result.refused}
    unknown = [line for line, user_id in ids.items() if user_id in reasons]
    for line in unknown:
        outcome.refuse(line, reasons[ids[line]])
    already = len(ids) - len(unknown) - result.added
    outcome.counts.update({"added": result.added, "already there": already})


@commands.command()
def anchor(group: GroupArgument, user: UserArgument, anchor_at: Anchor, *, as_json: AsJson = False) -> None:
    """Set from when a member's anchored limits are counted.

    What they have used is recounted in their new periods.
    """
    with manager() as groups:
        found, who = find_group(groups, group), find_user(groups, user)
        at = chosen_anchor(anchor_at)
        if not groups.set_member_anchor(found.id, who, at):
            raise Problem(f"{user} is not in {found.name}. Add them with: tokenlimits members add")
    if as_json:
        print_json({"group": {"id": found.id, "name": found.name}, "user_id": who, "anchor_at": at})
        return
    since = "from when they joined" if at is None else f"from {moment_in_words(at)}"
    say(f"Anchored limits of {user} in {found.name} are counted {since}.", style="green")


@commands.command()
def remove(
    group: GroupArgument,
    users: Users = None,
    *,
    file: File = None,
    start_line: StartLine = 1,
    report_to: Report = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove users from a group.

    Their usage stays, and counts again if they return.
    """
    outcome = Outcome()
    with manager() as groups, source(users or [], file, _COLUMNS, start_line) as lines:
        found = find_group(groups, group)
        whom = counted(len(users), "user") if users else f"the users in {file}"
        confirm(f"Remove {whom} from {found.name}?", yes=yes)
        in_parts(lines, "Removing", _PART, lambda part: _remove(groups, found, part, outcome))
    report(outcome, report_to, as_json=as_json)


def _remove(groups: GroupManager, group: Group, part: Sequence[Line], outcome: Outcome) -> None:
    ids = _ids(groups, part, outcome)
    removed = groups.remove_members(group.id, ids.values())
    outcome.counts.update({"removed": removed, "not there": len(ids) - removed})


@commands.command()
def move(
    users: Users = None,
    *,
    from_: Annotated[str, typer.Option("--from", metavar="GROUP", help="The group to leave.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="GROUP", help="The group to join.", show_default=False)],
    file: File = None,
    start_line: StartLine = 1,
    report_to: Report = None,
    as_json: AsJson = False,
) -> None:
    """Move users from one group to another, each in one atomic step."""
    outcome = Outcome()
    with manager() as groups, source(users or [], file, _COLUMNS, start_line) as lines:
        left, joined = find_group(groups, from_), find_group(groups, to)
        in_parts(lines, "Moving", _MOVES, lambda part: _move(groups, left, joined, part, outcome))
    report(outcome, report_to, as_json=as_json)


def _move(groups: GroupManager, left: Group, joined: Group, part: Sequence[Line], outcome: Outcome) -> None:
    ids = _ids(groups, part, outcome)
    moved = at_once(lambda user_id: groups.move_member(user_id, from_=left.id, to=joined.id), ids.values())
    for line, done in zip(ids, moved, strict=True):
        if not done:
            outcome.refuse(line, f"was not in {left.name}")
    outcome.counts.update({"moved": sum(moved)})


def _ids(groups: GroupManager, part: Sequence[Line], outcome: Outcome) -> dict[Line, UUID]:
    """Read or look up the users of some lines; refuse the lines that name none."""
    names = {line: line.user(_COLUMNS) for line in part}
    users = resolve(groups, names.values())
    found: dict[Line, UUID] = {}
    for line, name in names.items():
        user = users[name]
        if isinstance(user, UUID):
            found[line] = user
        else:
            outcome.refuse(line, user)
    return found
