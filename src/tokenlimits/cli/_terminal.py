"""All output: tables, colours where the terminal has them, progress bars, prompts; and JSON for programs."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from io import TextIOWrapper
from typing import Any, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tokenlimits.levels import Level, level

# wide enough that no table wraps in a pipe or a file
_WIDE = 240
_BAR = 20
NARROW = 100
"""Columns; narrower terminals get shorter tables."""
_NARROW_BAR = 4
_COLOURS: Mapping[Level, str] = {"none": "green", "ok": "green", "warn": "yellow", "full": "red"}


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width, soft_wrap=False)


out = _console()
"""For results."""

err = _console(stderr=True)
"""For errors, progress and prompts, so that results can be piped."""


_IN_ASCII = {
    **dict.fromkeys("█▉▊▋▌", "#"),
    **dict.fromkeys("▍▎▏░", "-"),
    "✓": "+",
    "✗": "x",
    "→": ">",
    "…": ".",
}


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding doesn't have, character by character, so that columns stay in line."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("tokenlimits", _substitute)


def print_anything() -> None:
    """Print what the encoding of stdout and stderr doesn't have in ASCII, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="tokenlimits")


def discard_output() -> None:
    """Let go of what stdout can't take: the interpreter would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Problem(Exception):
    """Ends a command with one line that says what to do."""

    exit_code = 1


class Misunderstood(Problem):
    """A command line that makes no sense."""

    exit_code = 2


def plain(text: object) -> str:
    """Make untrusted text safe to print: it can't move the cursor or change colours."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def plain_lines(text: object) -> str:
    """Make untrusted text of several lines safe to print."""
    return "\n".join(map(plain, str(text).split("\n")))


def say(text: object, style: str = "") -> None:
    """Print a line for people; it may contain names that users chose."""
    out.print(Text(plain_lines(text), style=style), soft_wrap=not out.is_terminal)


def note(text: object, style: str = "") -> None:
    """Print a line for people on stderr, apart from the results."""
    err.print(Text(plain_lines(text), style=style), soft_wrap=not err.is_terminal)


def table(
    *columns: str, rows: Iterable[Sequence[object]], right: Sequence[str] = (), whole: Sequence[str] = (), cut: str = ""
) -> Table:
    """Make a table; cells are text, or anything that rich can draw.

    In a narrow terminal, cells wrap, but not numbers (`right`) and not the columns in `whole`; the column `cut` is
    truncated instead.
    """
    made = Table(box=None, header_style="dim", pad_edge=False, collapse_padding=out.width < NARROW)
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="ellipsis" if column == cut else "fold",
            no_wrap=column in (*right, *whole, cut),
            max_width=out.width // 5 if column == cut else None,
        )
    for row in rows:
        made.add_row(*map(_cell, row))
    return made


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Make a table of names and values."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, _cell(value))
    return made


def _cell(value: object) -> RenderableType:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return moment(value)
    return cast("RenderableType", value) if isinstance(value, Bar | Text) else plain(value)


def show(thing: RenderableType) -> None:
    """Print a table, or anything else that rich can draw."""
    out.print(thing)


def print_json(value: object) -> None:
    """Print models, or lists and dicts of them, for programs."""
    print(json.dumps(value, default=_jsonable, indent=2), flush=True)  # noqa: T201


def print_json_list(values: Iterable[BaseModel]) -> None:
    """Print a list item by item, however long it is."""
    separator = "[\n  "
    for value in values:
        print(f"{separator}{json.dumps(value.model_dump(mode='json'))}", end="")  # noqa: T201
        separator = ",\n  "
    print("\n]" if separator.startswith(",") else "[]", flush=True)  # noqa: T201


def _jsonable(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation before something is destroyed.

    Raises:
        Problem: The answer is no, or stdin is not a terminal.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Problem(f"{question} stdin is not a terminal; pass --yes to confirm.")
    if not typer.confirm(plain(question), err=True):
        raise Problem("Nothing was changed.")


def progress(what: str, total: int | None, *, hidden: bool = False) -> tuple[Progress, Any]:
    """Make a progress bar on stderr, hidden where that is not a terminal; use it in a `with` statement."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=hidden or not err.is_terminal,
    )
    return bar, bar.add_task(what, total=total)


def counted(number: int, what: str) -> str:
    """Write a number with its noun: "1 row", "2 rows"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def zone_of(name: str) -> tzinfo:
    """Find a time zone.

    Raises:
        Problem: This system doesn't know it, though the database does. In another zone, a month would be another month.
    """
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except ZoneInfoNotFoundError:
        raise Problem(f"This system has no data on the time zone {name}. Run: pip install --upgrade tzdata") from None


def moment(at: datetime | None) -> str:
    """Write a moment in UTC to the minute, for a table; nothing for None."""
    return "" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


def moment_in_words(at: datetime) -> str:
    """Write a moment in UTC to the minute, for a sentence.

    Example:
        >>> moment_in_words(datetime(2026, 11, 7, 16, 44, tzinfo=UTC))
        '7 Nov 2026, 16:44 UTC'
    """
    at = at.astimezone(UTC)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def countdown(until: datetime | None, now: datetime) -> str:
    """Write how long it is until a moment."""
    if until is None:
        return "never"
    seconds = max(0, int((until - now).total_seconds()))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    # no seconds after hours: a narrow terminal has no room for them
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


def colour(fraction: float | None) -> str:
    """Choose green, yellow or red for the used fraction of a limit."""
    return _COLOURS[level(fraction)]


class Bar:
    """A bar of characters, as wide as there is room; it can be read without colours too."""

    def __init__(self, fraction: float, *, style: str | None = None, most: int = _BAR) -> None:
        self._fraction = min(max(fraction, 0), 1)
        self._most = max(_NARROW_BAR, min(most, _BAR))
        self._style = style or colour(fraction)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        width = min(options.max_width, _BAR)
        full, part = divmod(round(self._fraction * width * 8), 8)
        drawn = "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
        yield Text(drawn.ljust(width, "░"), style=self._style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the least and the most width that it takes."""
        return Measurement(min(_NARROW_BAR, options.max_width), min(self._most, options.max_width))
