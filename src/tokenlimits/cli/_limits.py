"""`limits`, and how a limit is written: image=100/month, image=10/day/member, audio=unlimited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, get_args

import typer

from tokenlimits import GroupManager, Limit
from tokenlimits.models import Group, Scope, SinglePeriod

from ._find import find_group, kind_meant, manager
from ._options import AsJson, GroupArgument, Yes
from ._terminal import Problem, confirm, note, print_json, say, show, table

_EXAMPLE = "write it like image=100/month, image=10/day/member or audio=unlimited"
Limits = Annotated[
    list[str], typer.Argument(metavar="LIMIT", help="Such as image=100/month image=10/day/member audio=unlimited.")
]
Identities = Annotated[list[str], typer.Argument(metavar="LIMIT", help="Such as image/month image/day/member.")]

commands = typer.Typer(help="Manage the limits of a group.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="limits")


def parse(text: str) -> Limit:
    """Read a limit.

    Raises:
        Problem: It can't be read.
    """
    identity, equals, maximum = text.partition("=")
    amount, _, rest = maximum.partition("/")
    if not equals or "/" in identity:
        raise Problem(f"{text}: {_EXAMPLE}")
    return _limit(text, identity, _maximum(text, amount), rest.split("/") if rest else [])


def parse_identity(text: str) -> Limit:
    """Read which limit is meant, without its max.

    Raises:
        Problem: It can't be read.
    """
    if "=" in text:
        raise Problem(f"{text}: name it without its max, like image/month or image/day/member")
    kind, *rest = text.split("/")
    return _limit(text, kind, 0, rest)


def parse_all(texts: Sequence[str]) -> list[Limit]:
    """Read limits; each may occur once.

    Raises:
        Problem: One can't be read, or occurs twice.
    """
    limits: dict[tuple[str, str, str], Limit] = {}
    for text in texts:
        limit = parse(text)
        if limits.setdefault((limit.kind, limit.period, limit.scope), limit) is not limit:
            raise Problem(f"{text}: {limit.kind}{_suffix(limit)} occurs twice; give it one max")
    return list(limits.values())


def _maximum(text: str, amount: str) -> int | None:
    if amount == "unlimited":
        return None
    if not re.fullmatch(r"[0-9]+|[0-9]{1,3}(_[0-9]{3})+", amount):
        raise Problem(f"{text}: {amount!r} is neither a whole number nor unlimited; {_EXAMPLE}")
    return int(amount.replace("_", ""))


def _limit(text: str, kind: str, maximum: int | None, words: Sequence[str]) -> Limit:
    periods = [word for word in words if word in get_args(SinglePeriod)]
    scopes = [word for word in words if word in get_args(Scope)]
    if unknown := [word for word in words if word not in [*periods, *scopes]]:
        known = ", ".join([*get_args(SinglePeriod), *get_args(Scope)])
        raise Problem(f"{text}: {unknown[0]!r} is not one of {known}")
    if len(periods) > 1 or len(scopes) > 1:
        raise Problem(f"{text}: at most one period and one scope; {_EXAMPLE}")
    try:
        return Limit.model_validate(
            {"kind": kind, "max": maximum, "period": (periods or ["lifetime"])[0], "scope": (scopes or ["group"])[0]}
        )
    except ValueError:
        raise Problem(
            f"{text}: a kind has at most 32 lower-case letters, digits and _; a max is at most 10^15"
        ) from None


def write(limit: Limit) -> str:
    """Write a limit as `parse` reads it."""
    maximum = "unlimited" if limit.max is None else limit.max
    return f"{limit.kind}={maximum}{_suffix(limit)}"


def _suffix(limit: Limit) -> str:
    return f"/{limit.period}" + ("/member" if limit.scope == "member" else "")


def show_limits(group: Group) -> None:
    """Print a group's limits."""
    if not group.limits:
        say("This group has no limits, so its members can't generate anything with it.", style="yellow")
        return
    rows = [(limit.kind, _most(limit), limit.period, limit.scope) for limit in group.limits]
    show(table("kind", "max", "period", "scope", rows=rows, right=["max"]))


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


@commands.command("set")
def set_(
    group: GroupArgument,
    limits: Limits,
    *,
    replace: Annotated[bool, typer.Option("--replace", help="Remove all other limits.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Add limits, or change their max; usage stays.

    LIMIT is KIND=MAX[/PERIOD][/member]. MAX is a number or unlimited. PERIOD is minute, hour, day, week, month or
    lifetime (the default). With /member, the limit applies to each member separately.
    """
    wanted = parse_all(limits)
    with manager() as groups:
        before = find_group(groups, group)
        _warn_of_slips(groups, before, wanted)
        found = _replace(groups, before, wanted, yes=yes) if replace else _change(groups, before, wanted)
    if not as_json:
        _say_changes(before, found)
    _print(found, as_json=as_json)


def _say_changes(before: Group, after: Group) -> None:
    """Say what became of each limit: a slip shows at once."""
    was, now = ({f"{each.kind}{_suffix(each)}": _most(each) for each in group.limits} for group in (before, after))
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            say(f"{name}: {was.get(name, 'none')} → {now.get(name, 'none')}")


def _most(limit: Limit) -> str:
    return "unlimited" if limit.max is None else f"{limit.max:,}"


def _warn_of_slips(groups: GroupManager, group: Group, limits: Sequence[Limit]) -> None:
    for kind in {limit.kind for limit in limits} - {limit.kind for limit in group.limits}:
        if meant := kind_meant(groups, kind):
            note(f"{kind} is a new kind.{meant}", "yellow")


def _change(groups: GroupManager, group: Group, limits: Sequence[Limit]) -> Group:
    for limit in limits:
        group = groups.set_limit(group.id, limit)
    return group


def _replace(groups: GroupManager, group: Group, limits: Sequence[Limit], *, yes: bool) -> Group:
    kept = {(limit.kind, limit.period, limit.scope) for limit in limits}
    gone = [write(limit) for limit in group.limits if (limit.kind, limit.period, limit.scope) not in kept]
    if gone:
        confirm(f"Remove {', '.join(gone)} from {group.name}?", yes=yes)
    return groups.set_limits(group.id, limits)


@commands.command()
def remove(group: GroupArgument, limits: Identities, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Remove limits; the ledger keeps the usage."""
    wanted = [parse_identity(text) for text in limits]
    with manager() as groups:
        found = find_group(groups, group)
        there = {(limit.kind, limit.period, limit.scope) for limit in found.limits}
        for limit in wanted:
            if (limit.kind, limit.period, limit.scope) not in there:
                raise Problem(f"{found.name} has no limit {limit.kind}{_suffix(limit)}. See: tokenlimits groups show")
        confirm(f"Remove {', '.join(limits)} from {found.name}?", yes=yes)
        for limit in wanted:
            found = groups.remove_limit(found.id, limit.kind, period=limit.period, scope=limit.scope)
    _print(found, as_json=as_json)
