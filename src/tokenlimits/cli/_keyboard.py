"""Reads keys as they are pressed, on each system in its own way."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

Keys = Callable[[float], list[str]]
"""Waits for keys for at most so many seconds; empty if none is pressed."""


def _no_key(seconds: float) -> list[str]:
    time.sleep(seconds)
    return []


if sys.platform == "win32":
    import msvcrt

    @contextmanager
    def keyboard() -> Generator[Keys]:
        """Read keys; Ctrl-C remains what it is."""
        yield _pressed if sys.stdin.isatty() else _no_key

    def _pressed(seconds: float) -> list[str]:
        end = time.monotonic() + seconds
        while not msvcrt.kbhit():
            if time.monotonic() >= end:
                return []
            time.sleep(0.05)
        return [msvcrt.getwch()]

else:
    import os
    import re
    import select
    import termios
    import tty

    @contextmanager
    def keyboard() -> Generator[Keys]:
        """Read keys; Ctrl-C remains what it is."""
        if not sys.stdin.isatty():
            yield _no_key
            return
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        tty.setcbreak(terminal)
        try:
            yield _pressed
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    def _pressed(seconds: float) -> list[str]:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        typed = os.read(sys.stdin.fileno(), 64).decode(errors="ignore") if ready else ""
        # a key such as Page Down sends several characters
        return re.findall(r"\x1b\[[0-9;]*[A-Za-z~]|.", typed)
