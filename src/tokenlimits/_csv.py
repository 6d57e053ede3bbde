"""CSV that is safe to open in a spreadsheet: no cell starts a formula."""

from __future__ import annotations

import re

# spreadsheets also take a formula after white space, and with East Asia's full-width signs
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def guarded(cell: object) -> object:
    """Put an apostrophe before text that a spreadsheet would take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    """Remove the apostrophe that `guarded` has added."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell, 1) else cell
