"""Bad input is refused with its field's name, before anything is sent: every argument of every operation."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NoReturn
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    ConfigurationError,
    GenerationRequest,
    GroupManager,
    InvalidRequest,
    Limit,
    TokenLimits,
)
from tokenlimits._core import admins, workers
from tokenlimits._core import arguments as checks
from tokenlimits._drivers.transport import AsyncTransport, Transport
from tokenlimits._fields import NO_PLACES
from tokenlimits.testing import FakeTokenLimits

ID = "0197f0a0-0000-7000-8000-000000000001"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NAIVE = NOW.replace(tzinfo=None)
TWICE = [Limit(kind="image", max=1), Limit(kind="image", max=2)]

GOOD: dict[str, Any] = {
    "anchor_at": NOW,
    "after": ID,
    "at_least": 90,
    "bucket": "day",
    "child_id": ID,
    "cost": 2,
    "count": 3,
    "created_at": NOW,
    "description": "For teams",
    "email": "ann@",
    "emails": ["ann@example.com"],
    "from_": ID,
    "group_id": UUID(ID),
    "id": ID,
    "idempotency_key": "job-1",
    "is_default": True,
    "is_spread": True,
    "kind": "image",
    "limit": Limit(kind="image", max=1),
    "limits": {"image": 1, "video": None},
    "heartbeat": True,
    "max": 5,
    "metadata": {"model": "x", "n": [1, 2.5, None, True, {"deep": "ü"}]},
    "name": "Pro",
    "on_progress": lambda done, total: None,
    "overage": "charge",
    "parent": ID,
    "period": "day",
    "priority": 3,
    "requests": [GenerationRequest(user_id=UUID(ID), kind="image"), {"user_id": ID, "kind": "image"}],
    "scope": "member",
    "search": "pr",
    "since": NOW,
    "starts": "anchor",
    "size": 200,
    "timezone": "Europe/Paris",
    "to": ID,
    "ttl": 600,
    "unchanged_since": NOW,
    "until": NOW,
    "usage_id": ID,
    "user_id": ID,
    "user_ids": [ID, uuid4()],
}
SETTLEMENTS = ("commit", "extend", "release", "refund")
BAD_IDS = ["", "ann", 7, None, ID[:-1], b"abc", [ID]]
BAD_TEXTS = [7, "a\0b", "half of a pair: \ud83d", b"pro", ["pro"]]
BAD_KINDS = ["", "Image", "an image", "1image", "a" * 33, "image\n", 7, None, b"image"]
# each as the first and as the last of its range
UNREADABLE = "\x01\x1f\x7f\x9f\xad\u061c\u180e\u200b\u200f\u2028\u202e\u2060\u206f\ufeff"
BAD_NAMES = [f"Pro{character}fessional" for character in UNREADABLE]
BAD_MOMENTS = [NAIVE, "2026-03-01T12:00:00Z", NOW.date(), 1_700_000_000, float("inf")]
TOO_EARLY = [datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC), datetime.min.replace(tzinfo=UTC)]
TOO_LATE = [datetime(9999, 1, 1, tzinfo=UTC)]
BAD: dict[str, list[Any]] = {
    "anchor_at": [*BAD_MOMENTS, *TOO_EARLY, *TOO_LATE],
    "after": BAD_TEXTS,
    "at_least": [0, 101, 1.5, "90", True, None],
    "bucket": ["fortnight", "minute", "Day", "", None, 7],
    "child_id": BAD_IDS,
    "cost": [0, -1, 1_000_000_001, 1.0, "1", True, None],
    "count": [0, 1001, 1.0, "1", True, None],
    "created_at": [*BAD_MOMENTS, *TOO_EARLY],
    "description": ["x" * 2001, None, *BAD_TEXTS],
    "email": [None, *BAD_TEXTS],
    "emails": [None, 7, "ann@example.com", b"abc", [None], ["a@b.c", "a\0b"], [["a@b.c"]]],
    "from_": BAD_IDS,
    "group_id": BAD_IDS,
    "heartbeat": [1, "yes", None],
    "id": BAD_IDS,
    "idempotency_key": ["", "x" * 256, True, 1.5, 10**255, 10**5000, *(bad for bad in BAD_TEXTS if bad != 7)],
    "is_default": [1, "true", None],
    "is_spread": [1, "true", None],
    "kind": BAD_KINDS,
    "limit": [None, "image", {"kind": "image"}, {"kind": "Image", "max": 1}, {"kind": "image", "max": -1}],
    "limits": [
        None,
        7,
        "image",
        ["image"],
        TWICE,
        {"Image": 1},
        {"image": -1},
        {"image": 1.5},
        {"image": True},
        {"image": 10**15 + 1},
        [{"kind": "image", "max": 1, "period": "fortnight"}],
        [{"kind": "image", "max": 1, "scope": "world"}],
        [{"kind": "image", "max": 1, "period": "5 hours"}],
        [{"kind": "image", "max": 1, "counts": {}}],
        [{"kind": "image", "max": 1, "mode": "allow"}],
        [{"kind": "image"}],
    ],
    "max": [-1, 10**15 + 1, 1.0, "1", True],
    "metadata": [
        [1],
        "x",
        {1: 2},
        {"at": NOW},
        {"n": float("nan")},
        {"n": float("inf")},
        {"n": (1, 2)},
        {"text": "a\0b"},
        {"a\0b": 1},
        {"text": "\ud83d"},
        {"deep": [{"text": "\\\\\0"}]},
        {"text": "x" * 8192},
        {"n": 10**309},
        {"deep": [{"n": -18 * 10**307 - 1}]},
        {"n": [1e300] * 30},
    ],
    "name": ["", "   ", "x" * 201, "\u0958" * 101, None, *BAD_NAMES, *BAD_TEXTS],
    "on_progress": [7, "print"],
    "overage": ["allow", "Charge", "", None, True],
    "parent": BAD_IDS,
    "period": ["fortnight", "Day", "", None, 7],
    "priority": [1.0, "1", True, 2**31, -(2**31) - 1, None],
    "requests": [None, 7, "image", [None], [{"kind": "image"}], [{"user_id": ID, "kind": "image", "cost": 0}]],
    "scope": ["world", "", None, 7],
    "search": BAD_TEXTS,
    "since": BAD_MOMENTS,
    "size": [0, -1, 2_001, 1.0, "1", True, None],
    "starts": ["soon", "Anchor", "", 7],
    "timezone": ["", "x" * 65, None, *NO_PLACES, "cet", "LOCALTIME", *BAD_TEXTS],
    "to": BAD_IDS,
    "ttl": [0, -1, 30 * 86_400 + 1, 60.0, "60", True, None],
    "unchanged_since": BAD_MOMENTS,
    "until": BAD_MOMENTS,
    "usage_id": BAD_IDS,
    "user_id": BAD_IDS,
    "user_ids": [None, 7, ID, UUID(ID), b"abc", [ID, "ann"], [None], [[ID]]],
}

# otherwise than elsewhere: a hold may be settled for nothing, and so may what was never recorded
GOOD_HERE: dict[tuple[str, str], list[Any]] = {
    ("commit", "cost"): [0],
    **{(f"{cls}.{name}", "usage_id"): [None] for cls in ("TokenLimits", "AsyncTokenLimits") for name in SETTLEMENTS},
}

# what one operation alone refuses
BAD_HERE: dict[tuple[str, str], list[Any]] = {("set_override", "until"): [*TOO_EARLY, *TOO_LATE]}

# what one operation alone takes
GOOD_ALONE: dict[tuple[str, str], Any] = {
    ("export_page", "after"): '{"p_after": {"id": "0197f0a0-0000-7000-8000-000000000001"}, "p_until": null}'
}

# what can't be given together: there are no sums of single users, and a limit counts either users or groups beneath
OVERRIDING = ("set_override", "remove_override", "overrides")
APART = {"export_usage": ("user_id", "bucket")} | dict.fromkeys(OVERRIDING, ("user_id", "child_id"))

# where None is a value
CLEARED = {("update", "anchor_at"), ("update", "parent")}

OTHERWISE_CALLED = {"__init__", "from_env", "close", "aclose", "limited"}


class Sent(Exception):
    """Something was sent."""


def operations(cls: type) -> Iterator[tuple[type, str]]:
    for name in dir(cls):
        if not name.startswith("_") and name not in OTHERWISE_CALLED:
            yield cls, name


OPERATIONS = [
    operation
    for cls in (TokenLimits, AsyncTokenLimits, GroupManager, AsyncGroupManager)
    for operation in operations(cls)
]


def parameters(cls: type, name: str) -> dict[str, inspect.Parameter]:
    return {k: v for k, v in inspect.signature(getattr(cls, name)).parameters.items() if k != "self"}


def good(cls: type, name: str, parameter: str | None = None) -> dict[str, Any]:
    """Give good values to all parameters, or to those that may be given with one."""
    one, other = APART.get(name, (None, None))
    left_out = one if parameter == other else other
    return {each: GOOD_ALONE.get((name, each), GOOD[each]) for each in parameters(cls, name) if each != left_out}


ARGUMENTS = [
    pytest.param(cls, name, parameter, id=f"{cls.__name__}.{name}-{parameter}")
    for cls, name in OPERATIONS
    for parameter in parameters(cls, name)
]


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise Sent

    monkeypatch.setattr(Transport, "_send", refuse)
    monkeypatch.setattr(AsyncTransport, "_send", refuse)


def call(cls: type, name: str, arguments: dict[str, Any]) -> None:
    """Call a method by name as far as its first request; nothing is waited for until then, so few need a loop."""
    returned = getattr(cls(), name)(**arguments)
    if isinstance(returned, AbstractContextManager):
        returned.__enter__()
    if isinstance(returned, AbstractAsyncContextManager):
        asyncio.run(returned.__aenter__())
    if isinstance(returned, Iterator):
        next(returned)
    if isinstance(returned, AsyncIterator):
        returned = anext(returned)
    if isinstance(returned, Awaitable):
        next(returned.__await__())


def refusal(cls: type, name: str, arguments: dict[str, Any]) -> InvalidRequest | None:
    try:
        call(cls, name, arguments)
    except InvalidRequest as error:
        return error
    except Sent:
        pass
    return None


@pytest.mark.parametrize(("cls", "name", "parameter"), ARGUMENTS)
def test_bad_input_is_refused(cls: type, name: str, parameter: str) -> None:
    others = good(cls, name, parameter)
    optional = parameters(cls, name)[parameter].default is None or (name, parameter) in CLEARED
    taken = GOOD_HERE.get((name, parameter), []) + GOOD_HERE.get((f"{cls.__name__}.{name}", parameter), [])
    for bad in [*BAD[parameter], *BAD_HERE.get((name, parameter), [])]:
        if (bad is None and optional) or any(bad is each for each in taken):
            continue
        error = refusal(cls, name, others | {parameter: bad})
        assert error is not None, f"{bad!r} was taken"
        assert error.field is not None
        assert error.field.startswith(parameter), bad
        assert str(error).startswith(error.field)
        assert error.code == "TL001"
        assert error.__cause__ is error.__context__ is None


@pytest.mark.parametrize(("cls", "name"), OPERATIONS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_good_input_is_sent(cls: type, name: str) -> None:
    for parameter in (None, *APART.get(name, ())):
        with pytest.raises(Sent):
            call(cls, name, good(cls, name, parameter))


@pytest.mark.parametrize("cls", [GroupManager, AsyncGroupManager], ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", OVERRIDING)
def test_a_limit_is_overridden_for_a_user_or_for_a_group_beneath(cls: type, name: str) -> None:
    error = refusal(cls, name, good(cls, name, "user_id") | {"child_id": ID, "user_id": ID})
    assert str(error) == f"child_id: must be None where user_id is given: a limit counts users or groups (got '{ID}')"
    assert error is not None
    assert (error.code, error.field) == ("TL001", "child_id")


@pytest.mark.parametrize("cls", [GroupManager, AsyncGroupManager], ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", ["create", "update", "list", "page"])
def test_a_parent_may_be_the_group_itself(cls: type, name: str) -> None:
    parent = FakeTokenLimits().groups.create("Plan")
    with pytest.raises(Sent):
        call(cls, name, good(cls, name) | {"parent": parent})


@pytest.mark.parametrize(("parameter", "name"), [("parent", "update"), ("child_id", "set_override")])
def test_the_name_of_a_group_is_no_id(parameter: str, name: str) -> None:
    error = refusal(GroupManager, name, good(GroupManager, name, parameter) | {parameter: "Pro"})
    assert str(error).startswith(f"{parameter}: must be an id, and may be a name. GroupManager.get_by_name gives")


def test_patterns_are_said_in_words() -> None:
    for arguments, says in (
        ({"user_id": ID, "kind": "An image"}, "kind: must be of a to z, 0 to 9 and _, begin with a letter"),
        (
            {"user_id": ID, "kind": "image", "idempotency_key": "a\0"},
            r"idempotency_key: must not have the character \0",
        ),
    ):
        assert str(refusal(TokenLimits, "track", arguments)).startswith(says)


KEYS = st.uuids().map(lambda key: (key, str(key))) | st.integers().map(lambda key: (key, str(key)))


@given(KEYS)
def test_a_key_is_the_same_as_its_text(key: tuple[UUID | int, str]) -> None:
    given_, text = key
    assert text == text.lower()
    fields: dict[str, Any] = {"user_id": ID, "kind": "image"}
    for sent in (given_, text):
        assert checks.request(**fields, idempotency_key=sent)["p_idempotency_key"] == text
        assert checks.requests([{**fields, "idempotency_key": sent}])[0]["idempotency_key"] == text
        assert GenerationRequest(user_id=UUID(ID), kind="image", idempotency_key=sent).idempotency_key == text


@pytest.mark.parametrize(
    "key",
    [UUID(ID), 7, pytest.param(10**254, id="as long as can be"), "JOB", ID.upper()],
)
@pytest.mark.parametrize("operation", ["track", "reserve", "record"])
def test_every_operation_with_a_key_takes_it(operation: str, key: UUID | int | str) -> None:
    fake = FakeTokenLimits()
    first = getattr(fake, operation)(ID, "image", idempotency_key=key)
    again = getattr(fake, operation)(ID, "image", idempotency_key=str(key))
    assert (again.replayed, again.usage_id) == (True, first.usage_id)
    assert [usage.idempotency_key for usage in fake.tracked] == [str(key)]


@pytest.mark.parametrize("key", [UUID(ID), 7])
def test_so_do_contexts_and_decorators(key: UUID | int) -> None:
    fake = FakeTokenLimits()
    with fake.generation(ID, "image", idempotency_key=key):
        pass

    @fake.limited("image", user="user_id", idempotency_key="job")
    def by_name(user_id: str, job: UUID | int) -> None: ...

    @fake.limited("image", user="user_id", idempotency_key=lambda user_id, job: job)
    def by_function(user_id: str, job: UUID | int) -> None: ...

    by_name(ID, key)
    by_function(ID, key)
    assert [usage.idempotency_key for usage in fake.tracked] == [str(key)]


ADDRESS, NAME = "ann@example.com", "Pro plan"
SIBLINGS = {
    "user_id": (ADDRESS, "must be an id, and is an e-mail address. GroupManager.find_users gives the id"),
    "user_ids": (
        [ID, ADDRESS],
        "must be an id, and is an e-mail address. GroupManager.find_users_by_email gives the ids",
    ),
    **dict.fromkeys(
        ("group_id", "from_", "to"),
        (NAME, "must be an id, and may be a name. GroupManager.get_by_name gives the group with its id"),
    ),
}


@pytest.mark.parametrize(("cls", "name", "parameter"), [case for case in ARGUMENTS if case.values[2] in SIBLINGS])
def test_what_people_know_it_by_is_no_id(cls: type, name: str, parameter: str) -> None:
    value, says = SIBLINGS[parameter]
    error = refusal(cls, name, good(cls, name, parameter) | {parameter: value})
    place, shown = ("user_ids[1]", ADDRESS) if parameter == "user_ids" else (parameter, value)
    assert str(error) == f"{place}: {says} (got {shown!r})"


def test_so_in_a_batch() -> None:
    error = refusal(TokenLimits, "track_many", {"requests": [{"user_id": ADDRESS, "kind": "image"}]})
    assert str(error) == f"requests[0].user_id: {SIBLINGS['user_id'][1]} (got {ADDRESS!r})"


@pytest.mark.parametrize(
    ("operation", "values"),
    [
        ("track", {"user_id": "ann"}),
        ("track", {"user_id": "@"}),
        ("track", {"user_id": ID, "group_id": ID[:-1]}),
        ("track", {"user_id": ID, "group_id": "  "}),
        ("commit", {"usage_id": ADDRESS}),
    ],
)
def test_other_texts_are_only_no_ids(operation: str, values: dict[str, str]) -> None:
    kind = {"kind": "image"} if operation == "track" else {}
    assert ": Input should be a valid UUID" in str(refusal(TokenLimits, operation, kind | values))


def test_an_address_is_shown_no_longer_than_other_values() -> None:
    error = str(refusal(TokenLimits, "usage", {"user_id": f"{'ann' * 99}@example.com"}))
    assert error.endswith(f"(got '{'ann' * 33})")


def test_what_cannot_be_given_together() -> None:
    for cls in (GroupManager, AsyncGroupManager):
        error = refusal(cls, "export_usage", {"user_id": ID, "bucket": "day"})
        assert error is not None
        assert (error.field, error.code) == ("user_id", "TL001")


@pytest.mark.parametrize(("cls", "name"), OPERATIONS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_is_optional_may_be_left_out_or_none(cls: type, name: str) -> None:
    described = parameters(cls, name)
    required = {k: GOOD[k] for k, v in described.items() if v.default is v.empty}
    with pytest.raises(Sent):
        call(cls, name, required)
    with pytest.raises(Sent):
        call(cls, name, required | {k: None for k, v in described.items() if v.default is None})


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ([Limit(kind="image", max=1), {"kind": "image", "max": 1, "period": "x"}], "limits[1].period"),
        ([{"kind": "image", "max": 1, "peroid": "day"}], "limits[0].peroid"),
        ({"image": 1, "video": -1}, "limits[1].max"),
        ({"image": 1, "a b": 1}, "limits[1].kind"),
        (TWICE, "limits[1]"),
    ],
)
def test_the_field_says_where(limits: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GroupManager().create("Pro", limits=limits)
    assert caught.value.field == field


def test_the_field_says_which_of_many() -> None:
    with pytest.raises(InvalidRequest) as caught:
        GroupManager().add_members(ID, [*(uuid4() for _ in range(6000)), "ann"])
    assert caught.value.field == "user_ids[6000]"


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(InvalidRequest) as caught:
        TokenLimits().track(ID, "x" * 10_000)
    assert len(str(caught.value)) < 300


class Unspeakable:
    def __repr__(self) -> str:
        raise OSError("no")


def nested(depth: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(depth):
        metadata = {"in": metadata}
    return metadata


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"cost": 10**5000}, "cost"),
        ({"cost": Unspeakable()}, "cost"),
        ({"metadata": nested(100_000)}, "metadata"),
        ({"metadata": {"big": 10**5000}}, "metadata"),
    ],
    ids=["a number", "a repr", "a depth", "a number inside"],
)
def test_a_value_that_cannot_be_shown_is_refused_all_the_same(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        TokenLimits().track(ID, "image", **arguments)
    assert (caught.value.field or "").startswith(field)


def test_a_rule_of_ours_reads_as_one() -> None:
    with pytest.raises(InvalidRequest, match=r"^metadata: must be at most 8192 bytes of JSON, not 9012 "):
        TokenLimits().track(ID, "image", metadata={"text": "x" * 9000})


@pytest.mark.parametrize(
    "metadata",
    [
        {"text": r"\u0000 spelt out is no such character"},
        {"text": "\\\\u0000"},
        {"text": "x" * (8192 - len('{"text": ""}'))},
        MappingProxyType({"read": "only"}),
        {"big": 10**300, "": "", "ü": "😀", "true": True},
        {"largest": [18 * 10**307, -18 * 10**307, 1.7e308, 5e-324]},
    ],
)
def test_metadata_that_can_be_kept(metadata: dict[str, Any]) -> None:
    sent = workers.track(ID, "image", 1, None, None, metadata).params["p_metadata"]
    assert json.loads(json.dumps(sent)) == dict(metadata)


def test_a_name_is_sent_as_it_is_stored() -> None:
    decomposed = "Cafe\u0301 \u05e9\u05dc\u05d5\u05dd \U0001f600"
    for call in (admins.create_group(name=f" {decomposed} "), admins.get_group_by_name(decomposed)):
        assert call.params["p_name"] == "Caf\xe9 \u05e9\u05dc\u05d5\u05dd \U0001f600"
    assert admins.groups_after("e\u0301", None, None, 7).params["p_search"] == "\xe9"


def test_the_oldest_moment() -> None:
    created_at = datetime.fromisoformat("1970-01-01T01:00:00+01:00")
    params = workers.record(ID, "image", 1, created_at, None, None, None).params
    assert params["p_created_at"] == "1970-01-01T01:00:00+01:00"


def test_many_requests_are_checked_as_they_are_made() -> None:
    with pytest.raises(ValidationError):
        GenerationRequest(user_id=UUID(ID), kind="image", metadata={"n": float("nan")})


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *(("members_page", bad) for bad in ("", "ann", "Pro")),
        *(("export_page", bad) for bad in ("", "Pro", ID, "[]", "7", "null", "{}", '{"p_after": {}}', "[" * 100_000)),
        ("export_page", '{"p_after": {}, "p_until": null, "p_user_id": null}'),
    ],
)
def test_a_page_begins_where_another_of_its_kind_ended(name: str, after: str) -> None:
    for cls in (GroupManager, AsyncGroupManager):
        error = refusal(cls, name, {"group_id": ID, "after": after})
        assert error is not None
        assert (error.field, error.code) == ("after", "TL001")


@pytest.mark.parametrize(("name", "most"), [("page", 200), ("members_page", 500), ("export_page", 2_000)])
def test_the_longest_page(name: str, most: int) -> None:
    arguments = good(GroupManager, name)
    with pytest.raises(Sent):
        call(GroupManager, name, arguments | {"size": most})
    assert refusal(GroupManager, name, arguments | {"size": most + 1}) is not None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12, "5", None, [5]])
@pytest.mark.parametrize("cls", [TokenLimits, AsyncTokenLimits, GroupManager, AsyncGroupManager])
def test_bad_timeouts(cls: type, timeout: Any) -> None:
    for make in (cls, cls.from_env):  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ConfigurationError, match=r"^timeout: "):
            make(timeout=timeout)


@pytest.mark.parametrize("policy", ["", "Raise", None, True, 7])
@pytest.mark.parametrize("cls", [TokenLimits, AsyncTokenLimits])
def test_bad_policies(cls: type, policy: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^on_unavailable: "):
        cls(on_unavailable=policy)


@pytest.mark.parametrize("client", ["https://abc.supabase.co", 7, object()])
@pytest.mark.parametrize("cls", [TokenLimits, AsyncTokenLimits, GroupManager, AsyncGroupManager])
def test_bad_clients(cls: type, client: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^client: must be a supabase\.(Async)?Client"):
        cls(client)
