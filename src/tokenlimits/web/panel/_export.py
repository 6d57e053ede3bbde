"""The ledger as CSV, row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator, Iterable

from tokenlimits._csv import guarded
from tokenlimits.models import UsageRecord

_COLUMNS = (
    "id", "created_at", "user_id", "email", "kind", "cost", "status", "settled_at", "expires_at", "idempotency_key",
    "metadata",
)  # fmt: skip


async def as_csv(records: AsyncIterator[UsageRecord]) -> AsyncIterator[str]:
    """Yield the header, and then row after row."""
    yield _line(_COLUMNS)
    async for record in records:
        written = record.model_dump(mode="json")
        written["metadata"] = json.dumps(written["metadata"], ensure_ascii=False)
        yield _line(guarded(written[name]) for name in _COLUMNS)  # users choose addresses and keys


def _line(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()
