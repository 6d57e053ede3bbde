"""Tables of many cells, compared at once."""

from __future__ import annotations

from collections.abc import Mapping

import pytest


def assert_same(found: Mapping[tuple[str, ...], object], expected: Mapping[tuple[str, ...], object]) -> None:
    """Compare all cells; a failure lists those that differ, each as it should be and as it is."""
    cells = [cell for cell in {**expected, **found} if found.get(cell, "absent") != expected.get(cell, "absent")]
    lines = [
        f"{sign} {' | '.join(cell)}: {table.get(cell, 'absent')!r}"
        for cell in cells
        for sign, table in (("-", expected), ("+", found))
    ]
    if lines:
        pytest.fail("\n".join([f"{len(cells)} of {len(expected)} differ (- expected, + found):", *lines]))
