"""`groups`: list, show, create, edit, delete, reset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated
from uuid import UUID

import typer
from rich.table import Table

from tokenlimits.models import UNCHANGED, Group, GroupUsage

from ._find import find_group, find_user, manager
from ._limit_words import parse_all, write
from ._limits import show_limits
from ._options import AnchorAt, AsJson, GroupArgument, KindOption, NewAnchorAt, Yes, chosen_anchor
from ._terminal import (
    NARROW,
    Misunderstood,
    confirm,
    counted,
    facts,
    moment_in_words,
    out,
    print_json,
    say,
    show,
    table,
)
from ._usage import usage_table
from ._wording import allowance

commands = typer.Typer(help="Manage groups of users.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The group's name; unique, ignoring case.", show_default=False)
]
NewName = Annotated[str | None, typer.Option("--name", help="The new name.", show_default=False)]
Description = Annotated[str | None, typer.Option("--description", help="A description for people.", show_default=False)]
Priority = Annotated[
    int | None,
    typer.Option("--priority", help="A user's groups pay in order of priority, highest first.", show_default=False),
]
Timezone = Annotated[
    str | None,
    typer.Option("--timezone", help="The time zone in which periods begin, such as Europe/Paris.", show_default=False),
]
Default = Annotated[
    bool | None,
    typer.Option("--default/--no-default", help="Use this group's limits for users in no group.", show_default=False),
]
Parent = Annotated[
    str | None,
    typer.Option(
        "--parent",
        help="The name or id of the group that it is beneath, whose limits count its usage too.",
        show_default=False,
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        "-l",
        help="A limit, such as image=100/month, as `limits set` takes it; repeatable.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="groups")


@commands.command("list")
def list_(
    *,
    search: Annotated[
        str | None, typer.Option("--search", help="Only groups whose name contains this.", show_default=False)
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option("--parent", help="Only groups directly beneath this one, by name or id.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List groups with their limits, each indented below its parent."""
    with manager() as groups:
        found = groups.list(search=search, parent=None if parent is None else find_group(groups, parent))
    if as_json:
        print_json(found)
    elif found:
        show(_list(found))
    elif parent is not None:
        say(f"There are no groups beneath {parent}. Create one with: tokenlimits groups create NAME --parent GROUP")
    else:
        say("There are no groups. Create one with: tokenlimits groups create Pro --limit image=100/month")


def _list(groups: Sequence[Group]) -> Table:
    rows = [
        (
            f"{'  ' * level}{group.name}{' (default)' if group.is_default else ''}",
            group.id,
            group.priority,
            group.timezone,
            " ".join(map(write, group.limits)) or "none",
        )
        for group, level in _tree(groups)
    ]
    columns = ("name", "id", "priority", "time zone", "limits")
    if out.width < NARROW:  # the command `show` has the ids
        columns, rows = columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]
    return table(*columns, rows=rows, right=["priority"], whole=["id", "time zone"])


def _tree(groups: Sequence[Group]) -> Iterator[tuple[Group, int]]:
    """Put each group below its parent, if that is among them, and say how deep it is."""
    there = {group.id for group in groups}
    beneath: dict[UUID | None, list[Group]] = defaultdict(list)
    for group in groups:
        beneath[group.parent_id if group.parent_id in there else None].append(group)
    left = [(group, 0) for group in reversed(beneath[None])]
    while left:
        group, level = left.pop()
        yield group, level
        left += [(child, level + 1) for child in reversed(beneath[group.id])]


@commands.command("show")
def show_(group: GroupArgument, *, as_json: AsJson = False) -> None:
    """Show a group: its settings, limits, members and usage."""
    with manager() as groups:
        found = find_group(groups, group)
        usage = groups.usage(found.id)
        parent = None if as_json or found.parent_id is None else groups.get(found.parent_id)
    if as_json:
        print_json({**found.model_dump(mode="json"), "usage": usage.model_dump(mode="json")})
    else:
        _show(found, parent, usage)


def _show(group: Group, parent: Group | None, usage: GroupUsage) -> None:
    say(group.name, style="bold")
    rows = [
        ("id", group.id),
        ("description", group.description),
        ("priority", group.priority),
        ("time zone", group.timezone),
        ("default", "yes" if group.is_default else "no"),
        *([("parent", parent.name)] if parent is not None else []),
        *([("beneath it", counted(usage.child_count, "group"))] if usage.child_count else []),
        ("members", f"{usage.member_count:,}"),
        ("created", moment_in_words(group.created_at)),
        *([("anchor", moment_in_words(group.anchor_at))] if group.anchor_at is not None else []),
    ]
    show(facts(rows))
    say("")
    if usage.limits:
        show(usage_table([usage], name_groups=False))
        for limit in group.limits:
            if limit.counts is not None:
                say(f"{limit.kind}: {allowance(limit)}")
    else:
        show_limits(group)


@commands.command()
def create(
    name: Name,
    *,
    limit: Limits = None,
    description: Description = "",
    priority: Priority = 0,
    timezone: Timezone = "UTC",
    default: Default = False,
    anchor_at: AnchorAt = None,
    parent: Parent = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Member limits only: for more users than one database is to hold.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create a group with its limits."""
    limits = parse_all(limit or [])
    with manager() as groups:
        made = groups.create(
            name,
            limits=limits,
            description=description or "",
            priority=priority or 0,
            timezone=timezone or "UTC",
            is_default=bool(default),
            anchor_at=anchor_at,
            parent=None if parent is None else find_group(groups, parent),
            is_spread=spread,
        )
    if as_json:
        print_json(made)
    else:
        say(f"Created {made.name}, {made.id}.", style="green")
        show_limits(made)


@commands.command()
def edit(
    group: GroupArgument,
    *,
    name: NewName = None,
    description: Description = None,
    priority: Priority = None,
    timezone: Timezone = None,
    default: Default = None,
    anchor_at: NewAnchorAt = None,
    parent: Parent = None,
    no_parent: Annotated[bool, typer.Option("--no-parent", help="Move it out, beneath no group.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change a group's settings; `limits set` changes its limits.

    A group that moves takes its usage along, with the groups beneath it.
    """
    if name is description is priority is timezone is default is anchor_at is parent is None and not no_parent:
        raise Misunderstood("Nothing to change: pass an option such as --name. See: tokenlimits groups edit --help")
    if parent is not None and no_parent:
        raise Misunderstood("Pass either --parent or --no-parent.")
    with manager() as groups:
        changed = groups.update(
            find_group(groups, group).id,
            name=name,
            description=description,
            priority=priority,
            timezone=timezone,
            is_default=default,
            anchor_at=UNCHANGED if anchor_at is None else chosen_anchor(anchor_at),
            parent=find_group(groups, parent) if parent is not None else None if no_parent else UNCHANGED,
        )
    if as_json:
        print_json(changed)
    else:
        say(f"Changed {changed.name}.", style="green")


@commands.command()
def delete(group: GroupArgument, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a group; the ledger keeps its usage."""
    with manager() as groups:
        found = find_group(groups, group)
        members = groups.usage(found.id).member_count
        its = f"{counted(len(found.limits), 'limit')} and {counted(members, 'membership')}"
        confirm(f"Delete {found.name}, its {its}?", yes=yes)
        deleted = groups.delete(found.id)
    if as_json:
        print_json(deleted)
    else:
        say(f"Deleted {found.name}.", style="green")


@commands.command()
def reset(
    group: GroupArgument,
    *,
    kind: KindOption = None,
    user: Annotated[
        str | None,
        typer.Option(
            "--user", help="Only the member limits of this user, by id or e-mail address.", show_default=False
        ),
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Reset a group's usage in its current periods.

    That is usage under its own limits for all and for each member, and its own under limits for each customer of the
    group above. The ledger and the history keep everything. Holds that are open still count in flight.
    """
    with manager() as groups:
        found = find_group(groups, group)
        user_id = None if user is None else find_user(groups, user)
        who = found.name if user is None else f"{user} in {found.name}"
        confirm(f"Reset what {who} has used of {kind or 'every kind'} in its current periods?", yes=yes)
        at = groups.reset_usage(found.id, kind=kind, user_id=user_id)
    if as_json:
        print_json({"group": {"id": found.id, "name": found.name}, "reset_at": at})
    else:
        say(f"Reset {who}: usage counts from {moment_in_words(at)}.", style="green")
