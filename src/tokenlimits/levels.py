"""How a limit is shown: how full it is, in a word, and its numbers in few characters."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["FULL", "NEARLY_FULL", "Level", "level", "short"]

_STEPS = ((10**12, "T"), (10**9, "B"), (10**6, "M"))
# no letter is known to all for 10 to the power of this
_NAMELESS = 15
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Level = Literal["ok", "warn", "full", "none"]
"""The panel and the command line have a colour for each: `ok` is green, `warn` yellow, `full` red; `none` is of what is
unlimited."""

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


def short(value: int | None) -> str:
    """Write a number in few characters, from a million on; it is cut, not rounded, so no more is left than it says.

    Args:
        value: The number; None is unlimited.

    Example:
        >>> short(12_345), short(1_500_000), short(999_999_999), short(None)
        ('12,345', '1.5M', '999.9M', '∞')
    """
    if value is None:
        return "∞"
    if value < _STEPS[-1][0]:
        return f"{value:,}"
    power = len(str(value)) - 1
    size, name = next(step for step in _STEPS if value >= step[0])
    if power >= _NAMELESS:
        size, name = 10**power, f"\N{MULTIPLICATION SIGN}10{str(power).translate(_RAISED)}"
    whole, tenth = divmod(value * 10 // size, 10)
    return f"{whole}.{tenth}".removesuffix(".0") + name
