"""Periods as they are written."""

from __future__ import annotations


def number_and_unit(period: str) -> tuple[int, str]:
    """Split a period.

    Example:
        >>> number_and_unit("5 hours"), number_and_unit("day")
        ((5, 'hour'), (1, 'day'))
    """
    number, _, units = period.rpartition(" ")
    return (int(number), units.removesuffix("s")) if number else (1, units)
