"""`track` and `check`, to try out limits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import typer

from tokenlimits import TrackResult
from tokenlimits.models import LimitStatus

from ._find import find_group, find_user, kind_meant, manager, worker
from ._options import AsJson, GroupOption, KindArgument, UserArgument
from ._terminal import facts, print_json, say, show
from ._wording import allowance, or_unlimited, resets_in

Cost = Annotated[int, typer.Option("--cost", help="How much the generation takes from the limits.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("track")(track)
    app.command("check")(check)


def track(
    user: UserArgument,
    kind: KindArgument,
    *,
    cost: Cost = 1,
    group: GroupOption = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="The idempotency key: the same key is charged only once.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Track one generation; exits with 1 when it is denied."""
    user_id, group_id = _who(user, group)
    with worker() as limits:
        _answer(limits.track(user_id, kind, cost, idempotency_key=key, group_id=group_id), as_json=as_json)


def check(
    user: UserArgument, kind: KindArgument, *, cost: Cost = 1, group: GroupOption = None, as_json: AsJson = False
) -> None:
    """Show what track would answer, without recording anything."""
    user_id, group_id = _who(user, group)
    with worker() as limits:
        _answer(limits.check(user_id, kind, cost, group_id=group_id), as_json=as_json)


def _who(user: str, group: str | None) -> tuple[UUID, UUID | None]:
    with manager() as groups:
        return find_user(groups, user), find_group(groups, group).id if group is not None else None


def _answer(result: TrackResult, *, as_json: bool) -> None:
    if as_json:
        print_json(result)
    elif result.allowed:
        _show(result)
    else:
        say(f"Denied ({result.reason}): {_why(result)}", style="red")
    if not result.allowed:
        raise typer.Exit(1)


def _why(result: TrackResult) -> str:
    why = f"{result.error}"
    if result.reason != "no_limit_for_kind":
        return why
    with manager() as groups:
        meant = kind_meant(groups, result.kind)
    return f"{why.removesuffix('.')}.{meant}" if meant else why


def _next(result: TrackResult) -> Sequence[LimitStatus]:
    """Find the limit whose reset the answer names, if one is to come."""
    enforced = [limit for limit in result.limits if limit.mode == "enforce"]
    return [limit for limit in enforced if limit.reset_at is not None and limit.reset_at == result.reset_at][:1]


def _show(result: TrackResult) -> None:
    say("Allowed." if not result.replayed else "Allowed: already recorded by an earlier call with this key.", "green")
    rows = [
        ("usage", result.usage_id or "not recorded"),
        ("paid by", result.group.name if result.group is not None else ""),
        ("left", or_unlimited(result.remaining)),
        *[("resets in", resets_in(limit, datetime.now(UTC))) for limit in _next(result)],
        *[
            ("would deny", f"{limit.kind}, {allowance(limit, of=result.group)}: {limit.used:,} used")
            for limit in result.would_deny
        ],
    ]
    show(facts(rows))
