"""Operations of several calls, driven by hand: nothing is sent here."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest

from tokenlimits import InvalidRequest
from tokenlimits._core import admins, flows, reports
from tokenlimits._core.admins import AddedPage
from tokenlimits._core.call import Call
from tokenlimits.models import BulkResult, Group, GroupUsage, Member, Page, Refused, UsageRecord, User

T = TypeVar("T")

PRO = UUID("0197f0a0-0000-7000-8000-000000000002")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def drive(flow: Generator[Call[Any], Any, T], server: Callable[[Call[Any]], Any]) -> tuple[T, list[Call[Any]]]:
    """Answer each call of a flow, and return its result and what it called."""
    calls: list[Call[Any]] = []
    answer = None
    while True:
        try:
            calls.append(flow.send(answer))
        except StopIteration as end:
            return end.value, calls
        answer = server(calls[-1])


def group(name: str) -> Group:
    fields: dict[str, Any] = {"description": "", "priority": 0, "timezone": "UTC", "is_default": False, "limits": ()}
    return Group(id=uuid4(), name=name, created_at=NOW, updated_at=NOW, **fields)


def record(number: int) -> UsageRecord:
    fields: dict[str, Any] = {"group": {"id": PRO}, "user_id": PRO, "email": None, "kind": "image", "cost": 1}
    rest: dict[str, Any] = {"idempotency_key": None, "metadata": {}, "settled_at": None, "expires_at": None}
    return UsageRecord(id=UUID(int=number), status="committed", created_at=NOW, **fields, **rest)


class Pages:
    """A server that cuts each page to a length of its own."""

    def __init__(self, items: list[Any], lengths: list[int], cursor: str) -> None:
        self._items = items
        self._lengths = iter(lengths)
        self._cursor = cursor

    def __call__(self, call: Call[Any]) -> Page[Any]:
        after = call.params["p_after"]
        start = 0
        if after is not None:
            start = 1 + [str(getattr(item, self._cursor)) for item in self._items].index(after)
        items = self._items[start : start + min(next(self._lengths), call.params["p_page_size"])]
        return Page(items, str(getattr(items[-1], self._cursor)) if items else None)


LENGTHS = [
    pytest.param([200, 200, 200], id="whole pages"),
    pytest.param([1, 7, 150, 1, 200, 200, 200], id="cut short"),
    pytest.param([3] * 200, id="much cut short"),
]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_groups_are_read_until_a_page_is_empty(lengths: list[int]) -> None:
    groups = [group(f"group {n:03}") for n in range(400)]
    read, calls = drive(flows.all_groups("gr", None), Pages(groups, lengths, "name"))
    assert read == groups
    assert {call.function for call in calls} == {"find_groups"}
    assert {call.params["p_search"] for call in calls} == {"gr"}
    assert calls[0].params["p_after"] is None
    assert calls[-1].params["p_after"] == "group 399"


def test_no_groups() -> None:
    assert drive(flows.all_groups(None, None), lambda _: Page())[0] == []


def usage(name: str | None, id_: UUID | None = None) -> GroupUsage:
    group: dict[str, Any] = {"id": id_ or uuid4(), "name": name}
    return GroupUsage.model_validate({"group": group, "member_count": 0, "limits": []})


def usage_page(usages: list[GroupUsage], call: Call[Any]) -> Page[GroupUsage]:
    return Page(usages, usages[-1].group.name if len(usages) == call.params["p_page_size"] else None)


class TestUsageOfAllGroups:
    @pytest.mark.parametrize("groups", [0, 1, 999, 1000, 20_000])
    def test_is_read_page_by_page(self, groups: int) -> None:
        usages = [usage(f"group {n:05}") for n in range(groups)]

        def server(call: Call[Any]) -> Page[GroupUsage]:
            after = call.params["p_after"] or ""
            start = next((n for n, each in enumerate(usages) if (each.group.name or "") > after), len(usages))
            return usage_page(usages[start : start + call.params["p_page_size"]], call)

        read, calls = drive(flows.all_usage(), server)
        assert read == usages
        assert {(call.function, call.params["p_page_size"]) for call in calls} == {("group_usage", 1000)}
        assert calls[0].params["p_after"] is None
        # a page that isn't full is the last, so a panel that looks every two seconds asks once
        assert len(calls) == groups // 1000 + 1

    def test_has_a_group_once_that_is_renamed_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flows, "USAGE_PAGE", 2)
        first, second, third = (usage(name) for name in "abc")
        pages = iter([[first, second], [usage("b2", first.group.id), third], []])
        assert drive(flows.all_usage(), lambda call: usage_page(next(pages), call))[0] == [first, second, third]

    def test_ends_though_a_group_is_renamed_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flows, "USAGE_PAGE", 1)
        names = (f"group {n:05}" for n in range(100_000))
        read, calls = drive(flows.all_usage(), lambda call: usage_page([usage(next(names), PRO)], call))
        assert [each.group.name for each in read] == ["group 00000"]
        assert len(calls) == 2

    @pytest.mark.parametrize("name", ["Pro", None])
    def test_ends_on_a_server_that_has_one_page_for_all(self, name: str | None) -> None:
        all_ = [usage("Free"), usage(name)]
        assert drive(flows.all_usage(), lambda call: usage_page(all_, call))[0] == all_


@pytest.mark.parametrize("lengths", LENGTHS)
def test_members_are_read_until_a_page_is_empty(lengths: list[int]) -> None:
    ids = sorted(uuid4() for _ in range(400))
    members = [Member(id=id_, email=None, joined_at=NOW) for id_ in ids]
    server = Pages(members, lengths, "id")
    seen: list[Member] = []

    def remember(call: Call[Any]) -> Page[Member]:
        page = server(call)
        seen.extend(page)
        return page

    _, calls = drive(flows.all_members(PRO, None), remember)
    assert seen == members
    assert calls[-1].params == {"p_group_id": str(PRO), "p_after": str(ids[-1]), "p_page_size": admins.MEMBERS_PAGE}


def test_members_are_read_page_by_page() -> None:
    pages = flows.all_members(PRO, None)
    first = next(pages)
    assert first.params["p_after"] is None
    second = pages.send(Page([Member(user_id=PRO, email=None, joined_at=NOW)], str(PRO)))
    assert second.params["p_after"] == str(PRO)
    with pytest.raises(StopIteration):
        pages.send(Page())


def test_every_page_of_members_is_one_of_the_search() -> None:
    pages = flows.all_members(PRO, "ann@")
    assert next(pages).params["p_search"] == "ann@"
    assert pages.send(Page([Member(user_id=PRO, email=None, joined_at=NOW)], str(PRO))).params["p_search"] == "ann@"


def test_members_of_no_id_are_refused_before_the_first_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="group_id"):
        flows.all_members("Pro", None)


def test_overrides_are_read_page_by_page() -> None:
    pages = flows.all_overrides(PRO, None, None)
    first = next(pages)
    assert first.params == {"p_group_id": str(PRO), "p_user_id": None, "p_after": None, "p_page_size": 500}
    second = pages.send(Page([], str(PRO)))  # none of its rows could be read
    assert second.params == first.params | {"p_after": str(PRO)}
    with pytest.raises(StopIteration):
        pages.send(Page())


def test_groups_beneath_another_are_read_page_by_page() -> None:
    pages = flows.all_groups(None, PRO)
    assert next(pages).params["p_parent_id"] == str(PRO)
    assert pages.send(Page([group("Acme")], "Acme")).params["p_parent_id"] == str(PRO)


def test_overrides_of_a_group_beneath_are_read_page_by_page() -> None:
    pages = flows.all_overrides(PRO, None, PRO)
    assert next(pages).params["p_child_id"] == str(PRO)
    assert pages.send(Page([], str(PRO))).params["p_child_id"] == str(PRO)


@pytest.mark.parametrize(
    ("ids", "field"),
    [
        (("Pro", None, None), "group_id"),
        ((PRO, "ann@example.com", None), "user_id"),
        ((PRO, None, "Acme"), "child_id"),
        ((PRO, PRO, PRO), "child_id"),
    ],
)
def test_overrides_of_no_id_are_refused_before_the_first_is_asked_for(ids: tuple[Any, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        flows.all_overrides(*ids)


class TestAddMembers:
    def test_in_parts_with_progress(self) -> None:
        ids = [uuid4() for _ in range(12_001)]
        unknown = {str(ids[0]), str(ids[7_000]), str(ids[-1])}
        progress: list[tuple[int, int]] = []

        def server(call: Call[Any]) -> AddedPage:
            part = call.params["p_user_ids"]
            missing = [UUID(id_) for id_ in part if id_ in unknown]
            return AddedPage(added=len(part) - len(missing) - 1, already=1, unknown=tuple(missing))

        result, calls = drive(flows.add_members(PRO, ids, None, lambda *done: progress.append(done)), server)
        assert [len(call.params["p_user_ids"]) for call in calls] == [5000, 5000, 2001]
        assert [id_ for call in calls for id_ in call.params["p_user_ids"]] == [str(id_) for id_ in ids]
        assert progress == [(5000, 12_001), (10_000, 12_001), (12_001, 12_001)]
        assert result == BulkResult(
            added=12_001 - 6,
            already=3,
            refused=tuple(
                Refused(user_id=id_, reason="there is no such user") for id_ in (ids[0], ids[7_000], ids[-1])
            ),
        )

    def test_repeated_ids_count_once_however_they_are_written(self) -> None:
        one, two = uuid4(), uuid4()
        written = [one, str(one), str(one).upper(), one.hex, f"{{{one}}}", one.urn, two]
        answer = AddedPage(added=2, already=0, unknown=())
        _, calls = drive(flows.add_members(PRO, written, None, None), lambda _: answer)
        assert [call.params["p_user_ids"] for call in calls] == [[str(one), str(two)]]

    def test_nobody(self) -> None:
        progress: list[tuple[int, int]] = []
        result, calls = drive(flows.add_members(PRO, [], None, lambda *done: progress.append(done)), lambda _: None)
        assert result == BulkResult(added=0, already=0, refused=())
        assert calls == progress == []

    def test_any_iterable(self) -> None:
        answer = AddedPage(added=2, already=0, unknown=())
        flow = flows.add_members(PRO, (uuid4() for _ in range(2)), None, None)
        assert drive(flow, lambda _: answer)[0].added == 2

    def test_a_bad_id_far_behind_stops_all_before_anything_is_sent(self) -> None:
        flow = flows.add_members(PRO, [*(uuid4() for _ in range(6_000)), "ann"], None, None)
        with pytest.raises(ValueError, match=r"^user_ids\[6000\]: "):
            next(flow)


class TestRemoveMembers:
    def test_in_parts_with_progress(self) -> None:
        ids = [uuid4() for _ in range(5_001)]
        progress: list[tuple[int, int]] = []
        removed, calls = drive(
            flows.remove_members(PRO, [*ids, ids[0]], lambda *done: progress.append(done)),
            lambda call: len(call.params["p_user_ids"]),
        )
        assert removed == 5_001
        assert [call.function for call in calls] == ["remove_group_members"] * 2
        assert progress == [(5_000, 5_001), (5_001, 5_001)]


def test_the_ledger_is_read_to_its_end_also_through_empty_pages() -> None:
    begin = {"group_id": str(PRO), "kind": "image"}
    pages = [([record(1), record(2)], {"id": "a"}), ([], {"id": "b"}), ([record(3)], None)]
    answers = iter(pages)

    def server(_: Call[Any]) -> Page[UsageRecord]:
        rows, after = next(answers)
        return Page(rows, None if after is None else json.dumps({"p_after": after, "p_until": "then"}))

    _, calls = drive(flows.exported(reports.ledger(PRO, None, "image", None, None)), server)
    assert all(call.params.items() >= {f"p_{k}": v for k, v in begin.items()}.items() for call in calls)
    assert [(call.params.get("p_after"), call.params["p_until"]) for call in calls] == [
        (None, None),
        ({"id": "a"}, "then"),
        ({"id": "b"}, "then"),
    ]


def test_addresses_go_in_parts_and_count_once() -> None:
    asked = [f"user{number}@example.com" for number in range(flows.CHUNK + 1)]
    users, calls = drive(
        flows.users_by_email([*asked, *asked]),
        lambda call: [User(user_id=uuid4(), email=email) for email in call.params["p_emails"]],
    )
    assert [len(call.params["p_emails"]) for call in calls] == [flows.CHUNK, 1]
    assert [user.email for user in users] == asked
