"""Bulk input, processed in batches, with a report of the refused lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tokenlimits import ledger_csv

from ._files import check_directory, written
from ._lines import Line, Source
from ._terminal import note, plain, print_json, progress, say

R = TypeVar("R")
T = TypeVar("T")

_SHOWN = 10
_THREADS = 8

File = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="A CSV file, or text with one user per line; - is stdin.", show_default=False),
]
StartLine = Annotated[int, typer.Option("--start-line", min=1, help="Resume at this line of the file.")]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Write the refused lines, with the reasons, to this CSV file.",
        callback=check_directory,
        show_default=False,
    ),
]


@dataclass
class Outcome:
    """How many lines had which outcome, and which were refused."""

    counts: Counter[str] = field(default_factory=Counter[str])
    refused: list[tuple[Line, str]] = field(default_factory=list[tuple[Line, str]])

    def refuse(self, line: Line, reason: str) -> None:
        """Record a line that can't be processed."""
        self.refused.append((line, reason))


def in_parts(lines: Source, what: str, size: int, work: Callable[[list[Line]], object]) -> None:
    """Process batch after batch, with a progress bar; when it is interrupted, say where to resume."""
    bar, task = progress(what, lines.total)
    last = 0
    with bar:
        try:
            while part := list(islice(lines.lines, size)):
                work(part)
                last = part[-1].number
                bar.advance(task, len(part))
        except BaseException:
            bar.stop()
            if last:
                note(f"Stopped: lines up to {last:,} are done. Resume with --start-line {last + 1}.", "yellow")
            raise
        bar.update(task, total=bar.tasks[0].completed)


def at_once(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Process several at once and return the results in order; the first error stops it."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def report(outcome: Outcome, file: Path | None, *, as_json: bool) -> None:
    """Print the outcome.

    Raises:
        typer.Exit: Lines were refused.
    """
    outcome.refused.sort(key=lambda each: each[0].number)
    if as_json:
        refused = [{"line": line.number, "what": str(line), "reason": reason} for line, reason in outcome.refused]
        print_json({**{what.replace(" ", "_"): count for what, count in outcome.counts.items()}, "refused": refused})
    elif not outcome.counts and not outcome.refused:
        say("The input was empty.", style="yellow")
    else:
        counts = [*(f"{count:,} {what}" for what, count in outcome.counts.items()), f"{len(outcome.refused):,} refused"]
        say(f"{', '.join(counts)}.", style="yellow" if outcome.refused else "green")
    if not outcome.refused:
        return
    if file is not None:
        with written(file) as text:
            text.write(ledger_csv.line(("line", "what", "reason")))
            for line, reason in outcome.refused:
                text.write(ledger_csv.line((line.number, str(line), reason)))
        note(f"The refused lines are in {file}.")
    elif not as_json:
        for line, reason in outcome.refused[:_SHOWN]:
            note(f"line {line.number}: {plain(line)}: {reason}")
        if len(outcome.refused) > _SHOWN:
            note(f"and {len(outcome.refused) - _SHOWN:,} more: pass --report FILE to get them all")
    raise typer.Exit(1)
