"""CSV that spreadsheets open too: no cell of it starts a formula."""

from __future__ import annotations

# what a spreadsheet takes for the beginning of a formula, or skips to find one
_FORMULA = tuple("=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\uff20")


def guarded(cell: object) -> object:
    """Put an apostrophe before text that would be taken for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def unguarded(cell: str) -> str:
    """Take that apostrophe away."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
