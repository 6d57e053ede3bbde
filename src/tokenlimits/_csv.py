"""CSV that spreadsheets open too: no cell of it starts a formula."""

from __future__ import annotations

import re

# white space before it, and the wide forms of East Asia, keep no spreadsheet from it
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def guarded(cell: object) -> object:
    """Put an apostrophe before text that would be taken for a formula."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    """Take that apostrophe away."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell, 1) else cell
