"""`overrides`: list, set, remove: another max for one user, for one customer, or for a group's own limit."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import typer

from tokenlimits import GroupManager
from tokenlimits.models import Override, Scope

from ._find import find_group, find_user, manager
from ._limit_words import name_of, parse_override, read_name
from ._options import AsJson, GroupArgument, Yes, moment_or_in
from ._terminal import Misunderstood, Problem, confirm, moment_in_words, print_json, print_json_list, say, show, table
from ._wording import or_unlimited

User = Annotated[
    str | None,
    typer.Option(
        "--user",
        help="A user's id or e-mail address: the member limit of this user. Default: the group's own limit.",
        show_default=False,
    ),
]
Child = Annotated[
    str | None,
    typer.Option(
        "--child",
        help="The name or id of a group directly beneath: the limit for each customer, of this one.",
        show_default=False,
    ),
]

commands = typer.Typer(
    help="Manage exceptions: another max for one user or customer.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="overrides")


@commands.command("list")
def list_(
    group: GroupArgument,
    *,
    user: Annotated[str | None, typer.Option("--user", help="Only those of this user.", show_default=False)] = None,
    child: Annotated[
        str | None, typer.Option("--child", help="Only those of this group beneath.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the overrides of a group's limits.

    They include those that have ended, and those that sleep: their limit is gone, or their customer has moved away.
    """
    _scope(user, child)
    with manager() as groups:
        found = groups.overrides(find_group(groups, group).id, **_subject(groups, user, child))
        if as_json:
            print_json_list(found)
            return
        rows = [
            (
                _whose(each),
                name_of(each),
                or_unlimited(each.max),
                "for good" if each.until is None else each.until,
                each.status,
            )
            for each in found
        ]
    if rows:
        show(table("whose", "limit", "max", "until", "status", rows=rows, right=["max"]))
    else:
        say("There are no overrides. Set one with: tokenlimits overrides set GROUP image=200/month --user USER")


@commands.command("set")
def set_(
    group: GroupArgument,
    limit: Annotated[str, typer.Argument(metavar="LIMIT", help="Such as image=200 or image=unlimited/month.")],
    *,
    user: User = None,
    child: Child = None,
    until: Annotated[
        datetime | None,
        typer.Option(
            "--until",
            parser=moment_or_in,
            metavar="TIME",
            help="When the limit's own max applies again: a date or time, in UTC by default, or 30d for in 30 days "
            "(h, d or w). Default: for good.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace a limit's max for a user, a customer, or the group itself.

    Usage stays.

    LIMIT is KIND=MAX with as many words as tell the limit from the others: image=200, image=200/day,
    image=200/3h/rolling. MAX is a number or unlimited.
    """
    max_, named = parse_override(limit, _scope(user, child))
    with manager() as groups:
        group_id = find_group(groups, group).id
        subject = _subject(groups, user, child)
        override = groups.set_override(group_id, named["kind"], max_, until=until, **subject, **_which(named))
    if as_json:
        print_json(override)
        return
    until_ = "for good" if override.until is None else f"until {moment_in_words(override.until)}"
    say(f"{_whose(override)}, {name_of(override)}: {or_unlimited(override.max)} {until_}.", style="green")


@commands.command()
def remove(
    group: GroupArgument,
    limit: Annotated[str, typer.Argument(metavar="LIMIT", help="Such as image or image/month.")],
    *,
    user: User = None,
    child: Child = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """End an override, so that the limit's own max applies again."""
    named = read_name(limit, _scope(user, child))
    whose = user or child or "the group"
    with manager() as groups:
        found = find_group(groups, group)
        subject = _subject(groups, user, child)
        confirm(f"Remove the override of {limit} for {whose} in {found.name}?", yes=yes)
        removed = groups.remove_override(found.id, named["kind"], **subject, **_which(named))
    if not removed:
        raise Problem(f"{limit}: {whose} has no such override. List them with: tokenlimits overrides list GROUP")
    if as_json:
        print_json({"removed": True})
    else:
        say(f"Removed: the limit's own max applies to {whose} again.", style="green")


def _scope(user: str | None, child: str | None) -> Scope:
    """Say which limits are meant by their scope, from whose override it is."""
    if user is not None and child is not None:
        raise Misunderstood("Pass either --user or --child: a limit counts users or customers.")
    return "member" if user is not None else "child" if child is not None else "group"


def _subject(groups: GroupManager, user: str | None, child: str | None) -> dict[str, UUID | None]:
    """Find whose override it is."""
    return {
        "user_id": None if user is None else find_user(groups, user),
        "child_id": None if child is None else find_group(groups, child).id,
    }


def _which(named: dict[str, Any]) -> dict[str, Any]:
    """Say which limit on the kind is meant, as far as it was said."""
    return {field: value for field, value in named.items() if field in ("period", "starts")}


def _whose(override: Override) -> str:
    if override.child_id is not None:
        return override.child_name or str(override.child_id)
    return "the group" if override.user_id is None else override.email or str(override.user_id)
