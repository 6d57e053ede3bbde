"""The ledger as CSV, as the command line and the panel write it, and spreadsheets open it.

Example:
    >>> from tokenlimits.testing import FakeTokenLimits
    >>> fake = FakeTokenLimits()
    >>> tracked = fake.track("a5f40000-0000-4000-8000-000000000001", "image", metadata={"model": "small"})
    >>> text = line(COLUMNS)
    >>> for usage in fake.groups.export_usage():
    ...     text += line(row(usage).values())
    >>> import csv
    >>> (read,) = csv.DictReader(text.splitlines())
    >>> read["group"], read["kind"], read["cost"], read["metadata"]
    ('fake', 'image', '1', '{"model": "small"}')
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from typing import Any

from .models import UsageRecord

__all__ = ["COLUMNS", "line", "row", "unguarded"]

COLUMNS = (
    "id",
    "created_at",
    "group_id",
    "group",
    "user_id",
    "email",
    "kind",
    "cost",
    "status",
    "idempotency_key",
    "metadata",
    "settled_at",
    "expires_at",
)
"""What a row of the ledger has, in this order."""

# also in the wide forms of East Asia
_BEGIN = r"[=+\-@\uff1d\uff0b\uff0d\uff20]"
# white space before it keeps no spreadsheet from it
_FORMULA = re.compile(rf"\s*{_BEGIN}|[\t\r\n]")
# Where semicolons or tabs separate, as in much of Europe, our commas don't, and so our quotation marks enclose nothing:
# a cell begins after each semicolon, tab and end of line.
_INSIDE = re.compile(rf"([;\t\r\n][\s\"]*)(?={_BEGIN})")
_GUARDED_INSIDE = re.compile(rf"([;\t\r\n][\s\"]*)'(?={_BEGIN})")


def row(usage: UsageRecord) -> dict[str, Any]:
    """Return what a row of the ledger has in each of the columns, as JSON has it.

    Args:
        usage: The row.
    """
    fields = usage.model_dump(mode="json")
    fields |= {"group_id": fields["group"]["id"], "group": fields["group"]["name"]}
    return {column: fields[column] for column in COLUMNS}


def line(cells: Iterable[object]) -> str:
    r"""Write a line of CSV; what others chose, like e-mail addresses and keys, starts no formula in a spreadsheet.

    Args:
        cells: What is in it: objects are written as JSON, empty ones and None as nothing, and text that a spreadsheet
            would take for a formula has an apostrophe before it, see `unguarded`, also after a semicolon, which
            separates cells in some countries.

    Example:
        >>> line(["image", 3, None, {}, {"size": [1, 2]}, "=SUM(A1)", "a;=B1"])
        'image,3,,,"{""size"": [1, 2]}",\'=SUM(A1),a;\'=B1\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow([_cell(cell) for cell in cells])
    # the csv module quotes a \r only where it is of what ends lines; other programs want \n alone there
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: object) -> object:
    if isinstance(value, dict):
        # its semicolons are in texts, where JSON has another way to write them
        return re.sub(_INSIDE, _escaped, json.dumps(value, ensure_ascii=False)) if value else ""
    if not isinstance(value, str):
        return value
    return ("'" if _FORMULA.match(value) else "") + _INSIDE.sub(r"\1'", value)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0][0]):04x}{found[0][1:]}"


def unguarded(cell: str) -> str:
    """Take away the apostrophes that `line` puts into text.

    Args:
        cell: A cell that was read; JSON has none.

    Example:
        >>> unguarded("'=SUM(A1)"), unguarded("a;'=B1"), unguarded("'tis")
        ('=SUM(A1)', 'a;=B1', "'tis")
    """
    text = cell[1:] if cell.startswith("'") and _FORMULA.match(cell, 1) else cell
    return _GUARDED_INSIDE.sub(r"\1", text)
