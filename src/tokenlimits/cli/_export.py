"""`export`: the ledger or the history as CSV or JSON Lines, streamed, so that its length doesn't matter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from tokenlimits import ledger_csv
from tokenlimits.models import Bucket, UsageSum

from ._files import check_directory, written
from ._find import find_group, find_user, kind_meant, manager
from ._options import GroupOption, KindOption, Since, Until
from ._terminal import counted, err, note, plain_lines, progress, zone_of

Format = Literal["csv", "jsonl"]
Row = dict[str, Any]

_BYTE_ORDER_MARK = "\ufeff"
_SUMS = ("group_id", "group", "bucket", "kind", "used", "generations")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    *,
    format_: Annotated[Format, typer.Option("--format", help="The output format.")] = "csv",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file to write. Default: stdout.", callback=check_directory, show_default=False
        ),
    ] = None,
    excel: Annotated[
        bool, typer.Option("--excel", help="Begin CSV with a byte order mark: Excel then reads it as UTF-8.")
    ] = False,
    by: Annotated[
        Bucket | None,
        typer.Option("--by", help="Write sums per group, kind and step instead of single rows.", show_default=False),
    ] = None,
    group: GroupOption = None,
    user: Annotated[
        str | None, typer.Option("--user", help="A user's id or e-mail address.", show_default=False)
    ] = None,
    kind: KindOption = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Export the ledger, or its sums with --by.

    By default, this exports all groups (including deleted ones), users and kinds, from the beginning. Everything
    recorded before the export starts is in it exactly once, whatever is recorded meanwhile. Hours, days, weeks and
    months begin in the group's time zone. In CSV, an apostrophe precedes any text that a spreadsheet would take for a
    formula.
    """
    if excel and format_ != "csv":
        raise typer.BadParameter("--excel is for CSV; leave out --format")
    if by is not None and user is not None:
        raise typer.BadParameter("--by has no sums per user; leave out --user")
    with manager() as groups, _opened(output) as file:
        begin = _BYTE_ORDER_MARK if excel else ""
        group_id = find_group(groups, group).id if group is not None else None
        if by is None:
            user_id = find_user(groups, user) if user is not None else None
            found = groups.export_usage(group_id, user_id=user_id, kind=kind, since=since, until=until)
            rows = _write(file, format_, begin, ledger_csv.COLUMNS, map(ledger_csv.row, found))
        else:
            sums = groups.export_usage(group_id, kind=kind, since=since, until=until, bucket=by)
            rows = _write(file, format_, begin, _SUMS, map(_sum, sums))
        meant = "" if rows else kind_meant(groups, kind)
    if meant:
        note(f"There was no usage.{meant}", "yellow")
    if output is not None or err.is_terminal:
        note(counted(rows, "row") + (f" in {output}." if output is not None else "."))


@contextmanager
def _opened(output: Path | None) -> Generator[IO[str]]:
    """Open stdout as UTF-8, or a file that appears only once it is complete."""
    if output is None:
        reconfigure: Callable[..., None] | None = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", newline="")
        yield sys.stdout
        sys.stdout.flush()
        return
    with written(output) as file:
        yield file


def _sum(total: UsageSum) -> Row:
    # in the group's own time zone: in UTC, its November may begin in October
    bucket = total.bucket.astimezone(zone_of(total.timezone)).isoformat()
    numbers = {"bucket": bucket, "kind": total.kind, "used": total.used, "generations": total.generations}
    return {"group_id": str(total.group.id), "group": total.group.name, **numbers}


def _write(file: IO[str], format_: Format, begin: str, columns: tuple[str, ...], rows: Iterator[Row]) -> int:
    # rows and a progress bar in one terminal would garble each other
    terminal = file.isatty()
    bar, task = progress("Exporting", None, hidden=terminal)
    count = 0
    with bar:
        # write nothing before the first page has arrived: after an error, a lone header would look like no usage
        first = list(islice(rows, 1))
        if format_ == "csv":
            file.write(begin + ledger_csv.line(columns))
        for count, row in enumerate(chain(first, rows), 1):
            line = ledger_csv.line(row.values()) if format_ == "csv" else json.dumps(row) + "\n"
            file.write(plain_lines(line) if terminal else line)
            if count % 1000 == 0:
                bar.update(task, completed=count)
    return count
