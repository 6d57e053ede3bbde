"""Stored values that Python can't represent: lists leave them out and say so, and read on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from pydantic import TypeAdapter, ValidationError

from tokenlimits import GroupManager
from tokenlimits._core import admins, reports
from tokenlimits._core.call import Call
from tokenlimits.errors import UnreadableValue
from tokenlimits.models import Moment
from tokenlimits.senders import Sender

POISON = [
    "infinity",
    "-infinity",
    "10000-01-01T00:00:00+00:00",
    "0001-01-01T00:00:00+00:00",
    "0044-03-15T12:00:00+00:00 BC",
    "9999-12-31T23:59:59.999999+00:00",
]
WHEN = "2026-03-01T12:00:00+00:00"
ANN, BEN, PRO = (f"0197f0a0-0000-7000-8000-00000000000{n}" for n in (1, 2, 3))
GROUP: dict[str, Any] = {
    "id": PRO, "name": "Pro", "description": "", "priority": 0, "timezone": "UTC", "is_default": False,
    "created_at": WHEN, "updated_at": WHEN, "limits": [],
}  # fmt: skip
USAGE: dict[str, Any] = {
    "id": ANN, "group": {"id": PRO, "name": "Pro"}, "user_id": ANN, "email": None, "kind": "image", "cost": 1,
    "status": "committed", "idempotency_key": None, "metadata": {}, "created_at": WHEN, "settled_at": None,
    "expires_at": None,
}  # fmt: skip
POINT: dict[str, Any] = {"bucket": WHEN, "kind": "image", "used": 1, "generations": 1}
SUM: dict[str, Any] = {**POINT, "group": {"id": PRO, "name": "Pro"}, "timezone": "Pacific/Auckland"}
MEMBER: dict[str, Any] = {"user_id": ANN, "email": None, "joined_at": WHEN}


def rows(of: list[Any]) -> dict[str, Any]:
    return {"rows": of, "next": None, "until": WHEN}


def same(of: list[Any]) -> Any:
    return of


LISTS: dict[str, tuple[Call[Any], Callable[[list[Any]], Any], dict[str, Any], str, str]] = {
    "groups": (admins.groups_page(None, None, None, 9), same, GROUP, "updated_at", f"Group {PRO}"),
    "members": (admins.members_page(PRO, None, None, 9), same, MEMBER, "joined_at", f"Member {ANN}"),
    "ledger": (reports.ledger(None, None, None, None, None).page(None, 9), rows, USAGE, "created_at", "UsageRecord"),
    "settled": (reports.ledger(None, None, None, None, None).page(None, 9), rows, USAGE, "settled_at", ANN),
    "sums": (reports.export(None, None, None, None, None, "day").page(None, 9), rows, SUM, "bucket", f"UsageSum {PRO}"),
    "history": (reports.history(None, None, "day", None, None), same, POINT, "bucket", "HistoryPoint of image"),
}


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("name", LISTS)
def test_a_row_that_no_one_can_read_is_left_out(name: str, value: str, caplog: pytest.LogCaptureFixture) -> None:
    call, answer, row, field, says = LISTS[name]
    with caplog.at_level(logging.WARNING, "tokenlimits"):
        read = call.parse(answer([row, {**row, field: value}, row]))
    assert len(read) == 2
    (message,) = caplog.messages
    for words in (says, field, value):
        assert words in message


@pytest.mark.parametrize("name", LISTS)
def test_rows_of_something_else_are_no_answer(name: str) -> None:
    call, answer, row, field, _ = LISTS[name]
    for bad in ({}, {k: v for k, v in row.items() if k != field}, "row", None, 7):
        with pytest.raises((ValidationError, KeyError, TypeError)):
            call.parse(answer([row, bad]))


class Pages(Sender):
    """A server of which each page is full of rows that can't be read, but for the last."""

    def __init__(self, *pages: list[dict[str, Any]]) -> None:
        self.pages = list(pages)
        self.places: list[object] = []

    def send(self, call: Call[Any], timeout: float | None = None) -> Any:
        self.places.append(call.params["p_after"])
        return call.parse(self.pages.pop(0) if self.pages else [])

    def close(self) -> None:
        pass


BAD_GROUP = {**GROUP, "id": ANN, "name": "Bad", "created_at": "infinity"}
BAD_MEMBER = {**MEMBER, "user_id": BEN, "joined_at": "10000-01-01T00:00:00+00:00"}


def reader(*pages: list[dict[str, Any]]) -> tuple[GroupManager, Pages]:
    server = Pages(*pages)
    return GroupManager(server), server


class TestPagesGoOn:
    def test_after_groups_of_which_none_can_be_read(self) -> None:
        groups, server = reader([BAD_GROUP], [GROUP])
        assert [group.name for group in groups.list()] == ["Pro"]
        assert server.places == [None, "Bad", "Pro"]

    def test_after_members_of_whom_none_can_be_read(self) -> None:
        groups, server = reader([BAD_MEMBER], [MEMBER])
        assert [member.id for member in groups.members(PRO)] == [UUID(ANN)]
        assert server.places == [None, BEN, ANN]

    def test_after_a_page_that_ends_with_one(self) -> None:
        groups, _ = reader([GROUP, BAD_GROUP, GROUP], [MEMBER, BAD_MEMBER, MEMBER])
        page = groups.page(size=2)
        assert (len(page), page.next) == (1, "Bad")
        members = groups.members_page(PRO, size=2)
        assert (len(members), members.next) == (1, BEN)

    def test_after_usage_of_which_none_can_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tokenlimits._core.flows.USAGE_PAGE", 1)
        good = {"group": {"id": PRO, "name": "Pro"}, "member_count": 1, "limits": []}
        bad = {"group": {"id": ANN, "name": "Bad"}, "member_count": "many", "limits": []}
        groups, server = reader([bad], [good], [])
        assert [usage.group.name for usage in groups.usage_all()] == ["Pro"]
        assert server.places == [None, "Bad", "Pro"]


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("call", [admins.get_group(PRO), admins.get_group_by_name("Pro")], ids=["get", "by name"])
def test_one_that_is_asked_for_is_no_missing_one(call: Call[Any], value: str) -> None:
    with pytest.raises(UnreadableValue, match=rf"Group {PRO} can't be read: created_at is .*\. Correct it") as caught:
        call.parse([{**GROUP, "created_at": value}])
    assert caught.value.detail == "created_at"


def test_an_edit_says_what_cannot_be_read() -> None:
    with pytest.raises(UnreadableValue, match="updated_at is 'infinity'"):
        admins.update_group(PRO, name="Team").parse({**GROUP, "updated_at": "infinity"})


NUMBERS = ["1767225600000", " 1767225600 ", "-1", "20260131", "1767225600.5", 1767225600, 1767225600000, 1.5, True]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_are_no_moments(number: object) -> None:
    with pytest.raises(ValidationError, match="not a number"):
        TypeAdapter[Any](Moment).validate_python(number)


def test_moments_are_dates_with_times_and_zones() -> None:
    read = TypeAdapter[datetime](Moment).validate_python
    assert read("2026-03-01T13:00:00+01:00") == read(datetime(2026, 3, 1, 12, tzinfo=UTC)) == read(WHEN)
    assert read("0001-01-02T00:00:00Z").year == 1
