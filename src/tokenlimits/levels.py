"""How full a limit is, in a word: the panel and the command line have a colour for each."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["FULL", "NEARLY_FULL", "Level", "level"]

Level = Literal["ok", "warn", "full", "none"]
"""`ok` is green, `warn` yellow, `full` red; `none` is of what is unlimited."""

NEARLY_FULL: Final = 0.7
"""From this fraction on it is `warn`."""

FULL: Final = 0.9
"""From this fraction on it is `full`."""


def level(fraction: float | None) -> Level:
    """Say how full something is.

    Args:
        fraction: What is used of it, from 0; None when it is unlimited.

    Example:
        >>> [level(fraction) for fraction in (0.69, 0.7, 0.89, 0.9, 1.2, None)]
        ['ok', 'warn', 'warn', 'full', 'full', 'none']
    """
    if fraction is None:
        return "none"
    return "ok" if fraction < NEARLY_FULL else "warn" if fraction < FULL else "full"
