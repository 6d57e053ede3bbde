"""`usage --watch`: the usage of every limit on a terminal, the fullest first, page by page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from rich.console import Group as Stack
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenlimits import ServiceUnavailable

from ._keyboard import keyboard
from ._terminal import out, plain

T = TypeVar("T")
_NEXT = (" ", "n", "\x1b[6~", "\x1b[B")
_PREVIOUS = ("p", "b", "\x1b[5~", "\x1b[A")


def watch(read: Callable[[], Sequence[T]], draw: Callable[[Sequence[T]], Table], interval: float) -> None:
    """Read rows again after every interval, and count down every second in between, until Ctrl-C or q."""
    rows = read()
    problem = ""
    looked = time.monotonic()
    pages = Pages()
    with keyboard() as keys, Live(console=out, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(_screen(rows, draw, pages, problem), refresh=True)
                for key in keys(min(1, interval)):
                    if key == "q":
                        return
                    pages.turn(key)
                if time.monotonic() - looked >= interval:
                    try:
                        rows, problem = read(), ""
                    except ServiceUnavailable as error:
                        problem = str(error)
                    looked = time.monotonic()
        except KeyboardInterrupt:
            return


class Pages:
    """Which rows are on the screen. How many fit isn't known before they are drawn, so pages differ in length.

    Example:
        >>> pages = Pages()
        >>> pages.show(18, 30), pages.turn(" "), pages.begin(30)
        (None, None, 18)
        >>> pages.show(12, 30), pages.turn(" "), pages.begin(30)
        (None, None, 18)
        >>> pages.turn("p"), pages.begin(30)
        (None, 0)
    """

    def __init__(self) -> None:
        # where the pages so far begin; the last one is on the screen
        self._begins = [0]
        # where the next one begins, if there is one
        self._next: int | None = None

    def begin(self, rows: int) -> int:
        """Return the first row of the page; if there are too few rows now, it is an earlier page."""
        while self._begins[-1] >= rows and len(self._begins) > 1:
            self._begins.pop()
        return self._begins[-1]

    def show(self, shown: int, rows: int) -> None:
        """Take note of how many rows the page has, of how many."""
        end = self._begins[-1] + shown
        self._next = end if end < rows else None

    def turn(self, key: str) -> None:
        """Go to the next page or back, if that is what the key means."""
        if key in _NEXT and self._next is not None:
            self._begins.append(self._next)
            # where that one ends isn't known before it is drawn
            self._next = None
        elif key in _PREVIOUS and len(self._begins) > 1:
            self._begins.pop()


def _screen(rows: Sequence[T], draw: Callable[[Sequence[T]], Table], pages: Pages, problem: str) -> Stack:
    clock = Text(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC   Press Ctrl-C to stop", style="dim")
    begin = pages.begin(len(rows))
    shown = rows[begin : begin + _fitting(rows[begin:], draw, out.height - 6)]
    pages.show(len(shown), len(rows))
    where = f"{begin + 1:,} to {begin + len(shown):,} of {len(rows):,} limits   Space: next page   p: previous page"
    all_fits = len(shown) == len(rows)
    return Stack(clock, draw(shown), Text("" if all_fits else where, style="dim"), Text(plain(problem), style="red"))


def _fitting(rows: Sequence[T], draw: Callable[[Sequence[T]], Table], lines: int) -> int:
    """Count the rows that fit on the screen; in a narrow terminal, one may take several lines."""
    count = min(len(rows), max(1, lines))
    while count > 1 and len(out.render_lines(draw(rows[:count]), pad=False)) > lines + 1:
        count -= 1
    return count
