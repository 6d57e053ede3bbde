"""The ledger as CSV, row by row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import AsyncIterator, Iterable

from tokenlimits.models import UsageRecord

_COLUMNS = (
    "id", "created_at", "user_id", "email", "kind", "cost", "status", "settled_at", "expires_at", "idempotency_key",
    "metadata",
)  # fmt: skip

# white space before it, and the wide forms of East Asia, keep no spreadsheet from it
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


async def as_csv(records: AsyncIterator[UsageRecord]) -> AsyncIterator[str]:
    """Write the header, and then row after row."""
    yield _line(_COLUMNS)
    async for record in records:
        written = record.model_dump(mode="json")
        written["metadata"] = json.dumps(written["metadata"], ensure_ascii=False)
        yield _line(_harmless(written[name]) for name in _COLUMNS)


def _harmless(value: object) -> object:
    """Keep spreadsheets from running what somebody chose as an address or a key."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _line(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()
