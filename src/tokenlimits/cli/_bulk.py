"""Bulk input: lines from arguments, a file or stdin, processed in batches, with a report of the refused ones."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Annotated, TypeVar

import typer

from tokenlimits import ledger_csv

from ._find import as_id
from ._terminal import Problem, note, plain, print_json, progress, say

R = TypeVar("R")
T = TypeVar("T")

_BYTE_ORDER_MARK = "\ufeff"
_SHOWN = 10
_THREADS = 8

File = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="A CSV file, or text with one user per line; - is stdin.", show_default=False),
]
StartLine = Annotated[int, typer.Option("--start-line", min=1, help="Resume at this line of the file.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", help="Write the refused lines, with the reasons, to this CSV file.", show_default=False),
]


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line of the input: its number, its cells by column, and which of those that say the same it is."""

    number: int
    cells: Mapping[str, str]
    nth: int = 1

    def __str__(self) -> str:
        return ",".join(self.cells.values())


@dataclass
class Outcome:
    """How many lines had which outcome, and which were refused."""

    counts: Counter[str] = field(default_factory=Counter[str])
    refused: list[tuple[Line, str]] = field(default_factory=list[tuple[Line, str]])

    def refuse(self, line: Line, reason: str) -> None:
        """Record a line that can't be processed."""
        self.refused.append((line, reason))


@dataclass(frozen=True)
class Source:
    """Where lines come from, and how many there are (None: unknown)."""

    lines: Iterator[Line]
    total: int | None


@contextmanager
def source(words: Sequence[str], file: Path | None, columns: Sequence[str], start: int = 1) -> Generator[Source]:
    """Open the arguments, or a file, as lines.

    A file's first line may name its columns; without names, it has one column: the first of `columns`.

    Raises:
        Problem: Neither or both were given, or the file isn't text.
    """
    if (file is None) == (not words):
        raise Problem("Pass either users or a file with --file (- is stdin).")
    if file is None:
        lines = (Line(number, {columns[0]: word}) for number, word in enumerate(words, 1))
        yield Source(lines, len(words))
        return
    try:
        if str(file) == "-":
            yield Source(_read(sys.stdin, columns, start), None)
        else:
            with file.open(encoding="utf-8", newline="") as text:
                yield Source(_read(text, columns, start), max(0, _count(file) - start + 1))
    except UnicodeDecodeError:
        raise Problem(f"{file} is not UTF-8 text. Save it as CSV UTF-8.") from None
    except csv.Error as error:
        raise Problem(f"{file} is not a CSV file: {error}") from None


def _count(file: Path) -> int:
    with file.open("rb") as data:
        return sum(1 for _ in data)


def _read(text: IO[str], columns: Sequence[str], start: int) -> Iterator[Line]:
    first = text.readline().removeprefix(_BYTE_ORDER_MARK)
    reader = csv.reader(chain([first], text), delimiter=_delimiter(first, columns))
    names: Sequence[str] = columns[:1]
    for row in reader:
        cells = [cell.strip() for cell in row]
        if reader.line_num == 1 and set(map(str.lower, cells)) & set(columns):
            names = [cell.lower() for cell in cells]
            if repeated := [name for name in columns if names.count(name) > 1]:
                raise Problem(f"The first line names the column {repeated[0]} twice: keep the one that you mean.")
        elif reader.line_num == 1 and len(cells) > 1 and not any("@" in cell or as_id(cell) for cell in cells):
            raise Problem(
                f"The first line names the columns {', '.join(cells)}; at least one must be of: {', '.join(columns)}."
            )
        elif reader.line_num >= start and any(cells):
            yield Line(reader.line_num, dict(zip(names, cells, strict=False)))


def _delimiter(first: str, columns: Sequence[str]) -> str:
    """Detect the delimiter from the column names in the first line: many spreadsheets write semicolons."""
    for delimiter in ";\t":
        if {cell.strip(' "\r\n').lower() for cell in first.split(delimiter)} & set(columns) and delimiter in first:
            return delimiter
    return ","


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
        with file.open("w", encoding="utf-8", newline="") as text:
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
