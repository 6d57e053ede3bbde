"""`drift`, `reconcile` and `refund`: compare with the ledger, recount, and give back."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from tokenlimits.models import Reconciliation

from ._find import as_id, find_group, manager
from ._options import AsJson, GroupArgument, Since, Yes
from ._terminal import Problem, confirm, counted, print_json, say, show, table


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("drift")(drift)
    app.command("reconcile")(reconcile)
    app.command("refund")(refund)


def drift(group: GroupArgument, *, since: Since = None, as_json: AsJson = False) -> None:
    """Compare a group's usage with the ledger.

    It changes nothing. The exit status is 1 if anything differs.
    """
    with manager() as groups:
        found = groups.drift(find_group(groups, group).id, since=since)
    _print(found, as_json=as_json)
    if found.drifted:
        raise typer.Exit(1)


def reconcile(group: GroupArgument, *, since: Since = None, yes: Yes = False, as_json: AsJson = False) -> None:
    """Recount a group's usage from the ledger.

    It shows what was wrong. Workers of this group wait meanwhile. After the ledger has been restored on its own, run
    this for every group.
    """
    with manager() as groups:
        found = find_group(groups, group)
        confirm(f"Recount the usage of {found.name} from the ledger?", yes=yes)
        corrected = groups.reconcile(found.id, since=since)
    _print(corrected, as_json=as_json)


def refund(
    usage: Annotated[list[str], typer.Argument(metavar="USAGE...", help="The ids of usages.", show_default=False)],
    *,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Give back what committed usages cost.

    The ledger keeps them, marked as refunded. A usage's id is in the answer to the worker, and in `tokenlimits export`.
    Refunding one twice changes nothing.
    """
    ids = [_usage_id(text) for text in usage]
    confirm(f"Refund {counted(len(ids), 'usage')}?", yes=yes)
    with manager() as groups:
        results = [groups.refund(usage_id) for usage_id in ids]
    if as_json:
        print_json(results)
        return
    rows = [
        (str(id_), result.kind, f"{result.cost:,}", result.status) for id_, result in zip(ids, results, strict=True)
    ]
    show(table("usage", "kind", "cost", "status", rows=rows, right=["cost"]))


def _usage_id(text: str) -> UUID:
    found = as_id(text)
    if found is None:
        raise Problem(f"{text} is not a usage's id. Find it with: tokenlimits export --user USER")
    return found


def _print(found: Reconciliation, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        *(
            (f"{each.kind} {each.period} {each.scope}", str(each.subject), each.was, each.used)
            for each in found.counters
        ),
        *((f"{each.kind} history", f"{each.bucket:%Y-%m-%d %H:%M} UTC", each.was, each.used) for each in found.rollup),
    ]
    if rows:
        show(table("what", "of", "was", "is", rows=rows, right=["was", "is"]))
    if found.holds:
        say(f"{counted(found.holds, 'hold')} would never have expired.", style="yellow")
    if not found.drifted:
        say("Nothing differs from the ledger.", style="green")
