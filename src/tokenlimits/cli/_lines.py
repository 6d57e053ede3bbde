"""Lines of input: from arguments, or a file in whatever way spreadsheets and other services write CSV."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import SpooledTemporaryFile
from typing import IO

from ._find import as_id, names_a_user
from ._terminal import Problem

EMAILS = (
    "email",
    "e_mail",
    "email_address",
    "e_mail_address",
    "primary_email",
    "primary_email_address",
    "customer_email",
)
"""Columns of e-mail addresses, as Stripe, Clerk and others name them; see `_normal`."""

# exports of some programs begin with a title, a date and empty lines
_BEFORE_HEADER = 20
_DELIMITERS = ";\t,"
_IN_MEMORY = 1_000_000
# the most that the csv module takes on all systems; its default is too little for some exports
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line of the input: its number, its cells by column, and which of those that say the same it is."""

    number: int
    cells: Mapping[str, str]
    nth: int = 1

    def __str__(self) -> str:
        return ",".join(self.cells.values())

    def user(self, columns: Sequence[str]) -> str:
        """Return the first of the columns that holds an id or an address: other services have ids of their own."""
        found = [self.cells[column] for column in columns if self.cells.get(column)]
        return next(filter(names_a_user, found), found[0] if found else "")


@dataclass(frozen=True)
class Source:
    """Where lines come from, and how many there are."""

    lines: Iterator[Line]
    total: int


@dataclass(frozen=True)
class _Layout:
    """What separates cells, the names of the columns, and the number of the last line that is no data."""

    delimiter: str
    names: Sequence[str]
    header: int


@contextmanager
def source(words: Sequence[str], file: Path | None, columns: Sequence[str], start: int = 1) -> Generator[Source]:
    """Open the arguments, or a file, as lines.

    A file's first line, or one of the next after a title, may name its columns; without names, it has one column: the
    first of `columns`.

    Raises:
        Problem: Neither or both were given, or the file isn't text.
    """
    if (file is None) == (not words):
        raise Problem("Pass either users or a file with --file (- is stdin).")
    if file is None:
        yield Source((Line(number, {columns[0]: word}) for number, word in enumerate(words, 1)), len(words))
        return
    longest = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _rewindable(file) as data:
            text = TextIOWrapper(data, encoding=_encoding(data), newline="")
            # all of it, so that a file that isn't text is refused before anything is done
            count = sum(1 for _ in text)
            layout = _layout(text, columns)
            yield Source(_read(text, layout, start), max(0, count - max(start - 1, layout.header)))
    except UnicodeError:
        raise Problem(f"{file} is neither UTF-8 nor UTF-16 text. Save it as CSV UTF-8.") from None
    except csv.Error as error:
        raise Problem(f"{file} is not a CSV file: {error}") from None
    finally:
        csv.field_size_limit(longest)


@contextmanager
def _rewindable(file: Path) -> Generator[IO[bytes]]:
    """Open a file, or copy stdin or a pipe into one: it is read for its encoding, its header and its lines."""
    stdin = str(file) == "-"
    with nullcontext(sys.stdin.buffer) if stdin else file.open("rb") as data:
        if not stdin and data.seekable():
            yield data
            return
        with SpooledTemporaryFile(_IN_MEMORY) as copy:
            copyfileobj(data, copy)
            copy.seek(0)
            yield copy


def _encoding(data: IO[bytes]) -> str:
    """Detect UTF-16 by its byte order mark, or by the zeros of its first two letters."""
    begin = data.read(4)
    data.seek(0)
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return {b"\0\0": "utf-16-le"}.get(begin[1::2]) or {b"\0\0": "utf-16-be"}.get(begin[::2]) or "utf-8-sig"


def _layout(text: TextIOWrapper, columns: Sequence[str]) -> _Layout:
    text.seek(0)
    said = re.fullmatch(r'"?sep=(.)"?\s*', text.readline(), re.IGNORECASE)
    delimiters = said[1] if said else _DELIMITERS
    found = next(filter(None, (_header(text, delimiter, columns) for delimiter in delimiters)), None)
    if found is None:
        layout = _Layout(delimiters[-1], columns[:1], 1 if said else 0)
        cells = next((cells for number, cells in _rows(text, layout.delimiter) if number > layout.header), list[str]())
        if len(cells) > 1 and not any("@" in cell or as_id(cell) for cell in cells):
            raise Problem(
                f"The first line names the columns {', '.join(cells)}; at least one must be of: {', '.join(columns)}."
            )
        return layout
    if repeated := [name for name in columns if found.names.count(name) > 1]:
        raise Problem(f"The first line names the column {repeated[0]} twice: keep the one that you mean.")
    return found


def _header(text: TextIOWrapper, delimiter: str, columns: Sequence[str]) -> _Layout | None:
    """Find the line that names columns, if this is the delimiter; no line of data comes before it."""
    try:
        for number, cells in islice(_rows(text, delimiter), _BEFORE_HEADER):
            names = list(map(_normal, cells))
            if set(names) & set(columns) and (len(names) > 1 or delimiter == _DELIMITERS[-1]):
                return _Layout(delimiter, names, number)
            if any(map(names_a_user, cells)):
                return None
    except csv.Error:
        pass
    return None


def _normal(name: str) -> str:
    """Write a column's name in one way: "E-Mail Address" is e_mail_address."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _rows(text: TextIOWrapper, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Read the rows from the beginning, each with the number of its last line."""
    text.seek(0)
    over = False

    def lines() -> Iterator[str]:
        nonlocal over
        yield from iter(text.readline, "")  # not from `text`, which would be closed along with this generator
        over = True

    reader = csv.reader(lines(), delimiter=delimiter)
    before = 0
    for row in reader:
        # a row that is complete is returned before the next line is asked for
        if over:
            raise csv.Error(f"line {before + 1} has a quotation mark that is never closed")
        before = reader.line_num
        yield before, [cell.strip() for cell in row]


def _read(text: TextIOWrapper, layout: _Layout, start: int) -> Iterator[Line]:
    for number, cells in _rows(text, layout.delimiter):
        if number >= start and number > layout.header and any(cells):
            yield Line(number, dict(zip(layout.names, cells, strict=False)))
