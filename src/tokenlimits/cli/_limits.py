"""`limits`: list, set, remove."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tokenlimits import GroupManager, Limit
from tokenlimits.models import Group

from ._find import find_group, kind_meant, kinds_of, manager
from ._limit_words import HELP, identity, more_words, name, named_by, parse_all, parse_json, write
from ._options import AsJson, GroupArgument, Yes
from ._terminal import Misunderstood, confirm, note, print_json, say, show, table
from ._wording import allowance, or_unlimited

Limits = Annotated[
    list[str] | None,
    typer.Argument(metavar="LIMIT", help="Such as image=100/month image=40/3h/rolling/member.", show_default=False),
]
Names = Annotated[list[str], typer.Argument(metavar="LIMIT", help="Such as image/month or image/day/member.")]

commands = typer.Typer(help="Manage the limits of a group.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="limits")


def show_limits(group: Group) -> None:
    """Print a group's limits, as they are written and in words."""
    if not group.limits and group.parent_id is not None:
        say("This group has no limits of its own; those of the groups above it apply.")
        return
    if not group.limits:
        say("This group has no limits, so its members can't generate anything with it.", style="yellow")
        return
    show(table("limit", "allows", rows=[(write(limit), allowance(limit)) for limit in group.limits]))


@commands.command("list")
def list_(group: GroupArgument, *, as_json: AsJson = False) -> None:
    """List a group's limits."""
    with manager() as groups:
        found = find_group(groups, group)
    _print(found, as_json=as_json)


def _print(group: Group, *, as_json: bool) -> None:
    if as_json:
        print_json(group.limits)
    else:
        show_limits(group)


@commands.command(
    "set",
    help="Add limits, or change them; usage stays.\n\n"
    f"A limit that is there keeps its pool and its mode where you leave them out.\n\n{HELP}",
)
def set_(
    group: GroupArgument,
    limits: Limits = None,
    *,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", help="Read limits as JSON, as `limits list --json` prints them (- is stdin).", show_default=False
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Remove all other limits.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Add limits, or change their max, kinds and mode."""
    wanted = _wanted(limits or [], file)
    with manager() as groups:
        before = find_group(groups, group)
        wanted = _completed(before, wanted)
        _warn_of_slips(groups, before, wanted)
        found = _replace(groups, before, wanted, yes=yes) if replace else _change(groups, before, wanted)
    if not as_json:
        _say_changes(before, found)
    _print(found, as_json=as_json)


def _wanted(texts: Sequence[str], file: Path | None) -> list[Limit]:
    if (file is None) == (not texts):
        raise Misunderstood("Pass either limits or a file with --file. See: tokenlimits limits set --help")
    if file is None:
        return parse_all(texts)
    stdin = str(file) == "-"
    return parse_json(sys.stdin.read() if stdin else file.read_text(encoding="utf-8"), "stdin" if stdin else str(file))


def _completed(group: Group, limits: Sequence[Limit]) -> list[Limit]:
    """Keep the kinds and the mode of limits that are there, where nothing is said of them.

    Who raises the max of a pool doesn't mean that it shall be none.
    """
    there = {identity(limit): limit for limit in group.limits}

    def completed(limit: Limit) -> Limit:
        old = there.get(identity(limit), limit)
        left_out = {"counts", "mode"} - limit.model_fields_set
        return limit.model_copy(update={field: getattr(old, field) for field in left_out})

    return [completed(limit) for limit in limits]


def _say_changes(before: Group, after: Group) -> None:
    """Say what became of each limit: a slip shows at once."""
    was, now = ({name(limit): _settings(limit) for limit in group.limits} for group in (before, after))
    for each in dict.fromkeys([*was, *now]):
        if was.get(each) != now.get(each):
            say(f"{each}: {was.get(each, 'none')} → {now.get(each, 'none')}")


def _settings(limit: Limit) -> str:
    return "/".join([or_unlimited(limit.max), *more_words(limit)])


def _warn_of_slips(groups: GroupManager, group: Group, limits: Sequence[Limit]) -> None:
    for kind in sorted(_kinds(limits) - _kinds(group.limits)):
        if meant := kind_meant(groups, kind):
            note(f"{kind} is a new kind.{meant}", "yellow")


def _kinds(limits: Sequence[Limit]) -> set[str]:
    return {kind for limit in limits for kind in kinds_of(limit)}


def _change(groups: GroupManager, group: Group, limits: Sequence[Limit]) -> Group:
    for limit in limits:
        group = groups.set_limit(group.id, limit)
    return group


def _replace(groups: GroupManager, group: Group, limits: Sequence[Limit], *, yes: bool) -> Group:
    kept = set(map(identity, limits))
    gone = [write(limit) for limit in group.limits if identity(limit) not in kept]
    if gone:
        confirm(f"Remove {', '.join(gone)} from {group.name}?", yes=yes)
    return groups.set_limits(group.id, limits)


@commands.command()
def remove(group: GroupArgument, limits: Names, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Remove limits; the ledger keeps the usage.

    LIMIT is a kind, or a pool's name, with as many words as tell the limit from the others: image, image/day,
    image/day/member.
    """
    with manager() as groups:
        found = find_group(groups, group)
        meant = {identity(limit): limit for limit in (named_by(text, found.limits) for text in limits)}.values()
        confirm(f"Remove {', '.join(map(name, meant))} from {found.name}?", yes=yes)
        for limit in meant:
            found = groups.remove_limit(
                found.id, limit.kind, period=limit.period, scope=limit.scope, starts=limit.starts
            )
    _print(found, as_json=as_json)
