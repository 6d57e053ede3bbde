"""The ledger as CSV: the columns, and that no cell starts a formula."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from tokenlimits.ledger_csv import COLUMNS, line, row, unguarded
from tokenlimits.models import GroupRef, UsageRecord

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BEGINS = ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "\uff1d", "\uff0b", "\uff0d", "\uff20"]


def usage(**fields: Any) -> UsageRecord:
    of_all: dict[str, Any] = {"group": GroupRef(id=UUID(int=2), name="Pro"), "user_id": UUID(int=3), "email": None}
    rest: dict[str, Any] = {"idempotency_key": None, "metadata": {}, "settled_at": None, "expires_at": None}
    record: dict[str, Any] = {"id": UUID(int=1), "kind": "image", "cost": 2, "status": "committed", "created_at": NOW}
    return UsageRecord(**{**of_all, **rest, **record, **fields})


def read(record: UsageRecord) -> dict[str, str]:
    (found,) = csv.DictReader(io.StringIO(line(COLUMNS) + line(row(record).values()), newline=""))
    return found


def test_every_column() -> None:
    group = GroupRef(id=UUID(int=2), name="Pro")
    record = usage(
        group=group, email="ann@example.com", idempotency_key="a,b", metadata={"n": 1, "deep": ["ü"]}, expires_at=NOW
    )
    assert read(record) == {
        "id": str(UUID(int=1)),
        "created_at": "2026-03-01T12:00:00Z",
        "group_id": str(UUID(int=2)),
        "group": "Pro",
        "user_id": str(UUID(int=3)),
        "email": "ann@example.com",
        "kind": "image",
        "cost": "2",
        "status": "committed",
        "idempotency_key": "a,b",
        "metadata": '{"n": 1, "deep": ["ü"]}',
        "settled_at": "",
        "expires_at": "2026-03-01T12:00:00Z",
    }


def test_what_is_not_there_is_nothing() -> None:
    found = read(usage(group=GroupRef(id=UUID(int=2))))
    assert {name for name, cell in found.items() if cell == ""} == {
        "group", "email", "idempotency_key", "metadata", "settled_at", "expires_at",
    }  # fmt: skip


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("column", ["email", "idempotency_key", "group"])
def test_no_cell_starts_a_formula(column: str, begin: str) -> None:
    text = f"{begin}cmd()"
    value: Any = GroupRef(id=UUID(int=2), name=text) if column == "group" else text
    found = read(usage(**{column: value}))[column]
    assert re.sub(r"(?<=[\t\r\n])'", "", found) == f"'{text}"
    assert unguarded(found) == text


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("separator", [";", "\t", "\n", '; "', ';""'])
def test_no_cell_starts_a_formula_where_semicolons_separate(separator: str, begin: str) -> None:
    """Commas don't separate there, so that the quotation marks around a cell are within one."""
    text = f"a, b{separator}{begin}cmd()"
    record = usage(email=text, idempotency_key=text, metadata={"a": {text: [text]}})
    for cell in re.split(r"[;\t\r\n]", line(row(record).values())):
        assert not re.match(r'[\s"]*[=+\-@\uff1d\uff0b\uff0d\uff20]', cell)
    found = read(record)
    assert unguarded(found["email"]) == unguarded(found["idempotency_key"]) == text
    assert json.loads(found["metadata"]) == {"a": {text: [text]}}


@pytest.mark.parametrize("text", ["", "'", "'tis", "a=b", "''=1", "'a=b", "a; b=c", "a;'b", "1;2"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert unguarded(text) == text
    assert next(csv.reader([line([text, 1])]))[0] == text
