"""Every operation as a pure value: which function it calls, with what, and how it reads the answer."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from tokenlimits import Limit, ServiceUnavailable, TokenLimitsError, TrackResult
from tokenlimits._core import admins, answers, reports, workers
from tokenlimits._core.arguments import new_key
from tokenlimits._core.call import Call
from tokenlimits._core.retry import Transient
from tokenlimits.errors import GroupNotFound, SchemaOutdated, UnknownUser
from tokenlimits.models import Group, GroupRef, Override
from tokenlimits.sql_files import SCHEMA_VERSION, one_paste

ANN = "0197f0a0-0000-7000-8000-000000000001"
PRO = "0197f0a0-0000-7000-8000-000000000002"
TEAM = "0197f0a0-0000-7000-8000-000000000003"
WHEN = "2026-03-01T12:00:00+00:00"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIMIT = {
    "kind": "image",
    "period": "day",
    "starts": "calendar",
    "scope": "member",
    "mode": "enforce",
    "max": 50,
    "counts": None,
}
GROUP: dict[str, Any] = {
    "id": PRO,
    "name": "Pro",
    "description": "",
    "priority": 0,
    "timezone": "UTC",
    "is_default": False,
    "created_at": WHEN,
    "updated_at": WHEN,
    "limits": [LIMIT],
    "a field of a newer server": 1,
}
A_GROUP = Group.model_validate(GROUP)
STATUS = {**LIMIT, "used": 2, "remaining": 48, "reset_at": WHEN, "weight": 1}
RESULT: dict[str, Any] = {
    "allowed": True,
    "reason": None,
    "error": None,
    "usage_id": TEAM,
    "status": "committed",
    "expires_at": None,
    "group": {"id": PRO, "name": "Pro"},
    "kind": "image",
    "cost": 2,
    "limits": [STATUS],
    "denied_by": None,
    "would_deny": [],
    "remaining": 48,
    "reset_at": WHEN,
    "retry_after": None,
    "replayed": False,
}
A_RESULT = TrackResult.model_validate(RESULT)
OVERRIDE: dict[str, Any] = {
    "id": TEAM,
    "group_id": PRO,
    "kind": "image",
    "period": "day",
    "starts": "anchor",
    "scope": "member",
    "user_id": ANN,
    "email": "ann@example.com",
    "max": None,
    "until": WHEN,
    "status": "of a newer server",
    "created_at": WHEN,
}
AN_OVERRIDE = Override.model_validate(OVERRIDE)

CASES: dict[str, tuple[Any, str, dict[str, Any], bool, Any, Any]] = {
    "track": (
        workers.track(ANN, "image", 2, "job-1", UUID(PRO), {"model": "x"}),
        "track_generation",
        {
            "p_user_id": ANN,
            "p_kind": "image",
            "p_cost": 2,
            "p_idempotency_key": "job-1",
            "p_group_id": PRO,
            "p_metadata": {"model": "x"},
        },
        True,
        RESULT,
        A_RESULT,
    ),
    "create_group with an id": (
        admins.create_group(UUID(PRO), name="Pro"),
        "save_group",
        {"p_group_id": None, "p_name": "Pro", "p_id": PRO},
        False,
        GROUP,
        A_GROUP,
    ),
    "check": (
        workers.check(UUID(ANN), "image", 2, None),
        "check_generation",
        {"p_user_id": ANN, "p_kind": "image", "p_cost": 2},
        True,
        RESULT,
        A_RESULT,
    ),
    "record": (
        workers.record(ANN, "image", 2, NOW, "job-1", PRO, None),
        "record_generation",
        {
            "p_user_id": ANN,
            "p_kind": "image",
            "p_cost": 2,
            "p_created_at": WHEN,
            "p_idempotency_key": "job-1",
            "p_group_id": PRO,
        },
        True,
        RESULT,
        A_RESULT,
    ),
    "reserve": (
        workers.reserve(ANN, "image", 2, 600, "job-1", PRO, {"model": "x"}),
        "reserve_generation",
        {
            "p_user_id": ANN,
            "p_kind": "image",
            "p_cost": 2,
            "p_ttl": 600,
            "p_idempotency_key": "job-1",
            "p_group_id": PRO,
            "p_metadata": {"model": "x"},
        },
        True,
        RESULT,
        A_RESULT,
    ),
    "commit": (
        workers.commit(TEAM, None),
        "commit_generation",
        {"p_usage_id": TEAM},
        True,
        RESULT,
        A_RESULT,
    ),
    "commit for less": (
        workers.commit(UUID(TEAM), 0),
        "commit_generation",
        {"p_usage_id": TEAM, "p_cost": 0},
        True,
        RESULT,
        A_RESULT,
    ),
    "commit for more": (
        workers.commit(UUID(TEAM), 9, "charge"),
        "commit_generation",
        {"p_usage_id": TEAM, "p_cost": 9, "p_overage": "charge"},
        True,
        RESULT,
        A_RESULT,
    ),
    "extend": (
        workers.extend(TEAM, 600),
        "extend_generation",
        {"p_usage_id": TEAM, "p_ttl": 600},
        True,
        RESULT,
        A_RESULT,
    ),
    "release": (workers.release(TEAM), "release_generation", {"p_usage_id": TEAM}, True, RESULT, A_RESULT),
    "refund": (workers.refund(TEAM), "refund_generation", {"p_usage_id": TEAM}, True, RESULT, A_RESULT),
    "my_usage": (
        workers.my_usage(),
        "my_generation_usage",
        {},
        True,
        [{**STATUS, "group": {"id": PRO, "name": "Pro"}}],
        lambda usage: (usage[0].used, usage[0].group.name) == (2, "Pro"),
    ),
    "usage": (
        workers.usage(ANN),
        "user_generation_usage",
        {"p_user_id": ANN},
        True,
        [{**STATUS, "group": {"id": PRO, "name": "Pro"}}],
        lambda limits: limits[0].group == GroupRef(id=UUID(PRO), name="Pro") and limits[0].reset_at == NOW,
    ),
    "version": (answers.version(), "tokenlimits_version", {}, True, {"version": 7}, 7),
    "create": (
        admins.create_group(
            name="Pro",
            description="",
            limits={"image": 5},
            priority=0,
            timezone="UTC",
            is_default=False,
            anchor_at=None,
        ),
        "save_group",
        {
            "p_group_id": None,
            "p_name": "Pro",
            "p_description": "",
            "p_limits": [{**LIMIT, "max": 5, "period": "lifetime", "scope": "group"}],
            "p_anchor_at": None,
            "p_priority": 0,
            "p_timezone": "UTC",
            "p_is_default": False,
        },
        False,
        GROUP,
        A_GROUP,
    ),
    "update": (
        admins.update_group(PRO, name=None, description="x", is_default=False, priority=0, anchor_at=NOW),
        "save_group",
        {
            "p_group_id": PRO,
            "p_description": "x",
            "p_is_default": False,
            "p_priority": 0,
            "p_anchor_at": NOW.isoformat(),
        },
        True,
        GROUP,
        A_GROUP,
    ),
    "update without an anchor": (
        admins.update_group(PRO, anchor_at=None),
        "save_group",
        {"p_group_id": PRO, "p_no_anchor": True},
        True,
        GROUP,
        A_GROUP,
    ),
    "create beneath another": (
        admins.create_group(ANN, A_GROUP, name="Acme"),
        "save_group",
        {"p_group_id": None, "p_id": ANN, "p_name": "Acme", "p_parent_id": PRO},
        False,
        {**GROUP, "parent_id": TEAM},
        lambda group: group.parent_id == UUID(TEAM),
    ),
    "create a spread one": (
        admins.create_group(name="Free", is_spread=True),
        "save_group",
        {"p_group_id": None, "p_name": "Free", "p_is_spread": True},
        False,
        {**GROUP, "is_spread": True},
        lambda group: group.is_spread is True,
    ),
    "move": (
        admins.update_group(TEAM, parent=UUID(PRO)),
        "save_group",
        {"p_group_id": TEAM, "p_parent_id": PRO},
        True,
        GROUP,
        A_GROUP,
    ),
    "move beneath none": (
        admins.update_group(TEAM, parent=None),
        "save_group",
        {"p_group_id": TEAM, "p_no_parent": True},
        True,
        GROUP,
        lambda group: group.parent_id is None,
    ),
    "set_member_anchor": (
        admins.set_member_anchor(PRO, ANN, NOW),
        "set_member_anchor",
        {"p_group_id": PRO, "p_user_id": ANN, "p_anchor_at": NOW.isoformat()},
        True,
        {"set": True},
        True,
    ),
    "set_member_anchor to none": (
        admins.set_member_anchor(PRO, ANN, None),
        "set_member_anchor",
        {"p_group_id": PRO, "p_user_id": ANN, "p_anchor_at": None},
        True,
        {"set": False},
        False,
    ),
    "set_limits": (
        admins.set_limits(PRO, [Limit.model_validate(LIMIT)]),
        "save_group",
        {"p_group_id": PRO, "p_limits": [LIMIT]},
        True,
        GROUP,
        A_GROUP,
    ),
    "set_limit": (
        admins.set_limit(PRO, Limit.model_validate(LIMIT)),
        "set_group_limit",
        {"p_group_id": PRO, "p_limit": LIMIT},
        True,
        GROUP,
        A_GROUP,
    ),
    "remove_limit": (
        admins.remove_limit(PRO, "image", "day", "member", "anchor"),
        "remove_group_limit",
        {"p_group_id": PRO, "p_kind": "image", "p_period": "day", "p_scope": "member", "p_starts": "anchor"},
        True,
        GROUP,
        A_GROUP,
    ),
    "remove_limit, the only one": (
        admins.remove_limit(PRO, "image", None, "group", None),
        "remove_group_limit",
        {"p_group_id": PRO, "p_kind": "image", "p_period": None, "p_scope": "group", "p_starts": None},
        True,
        GROUP,
        A_GROUP,
    ),
    "set_override": (
        admins.set_override(PRO, "image", None, UUID(ANN), None, "day", "anchor", NOW),
        "set_limit_override",
        {
            "p_group_id": PRO,
            "p_kind": "image",
            "p_max": None,
            "p_user_id": ANN,
            "p_period": "day",
            "p_starts": "anchor",
            "p_until": WHEN,
        },
        True,
        OVERRIDE,
        AN_OVERRIDE,
    ),
    "set_override, of the group": (
        admins.set_override(UUID(PRO), "image", 0, None, None, None, None, None),
        "set_limit_override",
        {
            "p_group_id": PRO,
            "p_kind": "image",
            "p_max": 0,
            "p_user_id": None,
            "p_period": None,
            "p_starts": None,
            "p_until": None,
        },
        True,
        OVERRIDE | {"scope": "group", "user_id": None, "email": None, "max": 0, "until": None, "status": "active"},
        lambda override: (override.user_id, override.max, override.until) == (None, 0, None),
    ),
    "set_override, of a group beneath": (
        admins.set_override(PRO, "image", 7, None, UUID(TEAM), None, None, None),
        "set_limit_override",
        {
            "p_group_id": PRO,
            "p_kind": "image",
            "p_max": 7,
            "p_user_id": None,
            "p_child_id": TEAM,
            "p_period": None,
            "p_starts": None,
            "p_until": None,
        },
        True,
        OVERRIDE | {"scope": "child", "user_id": None, "email": None, "child_id": TEAM, "child_name": "Team"},
        lambda override: (override.child_id, override.child_name) == (UUID(TEAM), "Team"),
    ),
    "remove_override": (
        admins.remove_override(PRO, "image", ANN, None, "day", "anchor"),
        "remove_limit_override",
        {"p_group_id": PRO, "p_kind": "image", "p_user_id": ANN, "p_period": "day", "p_starts": "anchor"},
        True,
        {"removed": True},
        lambda removed: removed is True,
    ),
    "remove_override, of a group beneath": (
        admins.remove_override(PRO, "image", None, TEAM, None, None),
        "remove_limit_override",
        {
            "p_group_id": PRO,
            "p_kind": "image",
            "p_user_id": None,
            "p_child_id": TEAM,
            "p_period": None,
            "p_starts": None,
        },
        True,
        {"removed": False},
        lambda removed: removed is False,
    ),
    "overrides": (
        admins.overrides_after(PRO, {"p_user_id": ANN}, TEAM),
        "find_limit_overrides",
        {"p_group_id": PRO, "p_user_id": ANN, "p_after": TEAM, "p_page_size": 500},
        True,
        [OVERRIDE],
        lambda page: (list(page), page.next) == ([AN_OVERRIDE], TEAM),
    ),
    "get": (admins.get_group(PRO), "find_groups", {"p_group_id": PRO}, True, [GROUP], A_GROUP),
    "get_by_name": (admins.get_group_by_name("pro"), "find_groups", {"p_name": "pro"}, True, [GROUP], A_GROUP),
    "groups_page": (
        admins.groups_page("pr", None, "Alpha", 1),
        "find_groups",
        {"p_search": "pr", "p_after": "Alpha", "p_page_size": 2},
        True,
        [GROUP, {**GROUP, "id": TEAM, "name": "Team"}],
        lambda page: (list(page), page.next) == ([A_GROUP], "Pro"),
    ),
    "groups_page, the last": (
        admins.groups_page(None, None, None, 1),
        "find_groups",
        {"p_search": None, "p_after": None, "p_page_size": 2},
        True,
        [GROUP],
        lambda page: (list(page), page.next) == ([A_GROUP], None),
    ),
    "groups_after": (
        admins.groups_after("pr", None, "Pro", 200),
        "find_groups",
        {"p_search": "pr", "p_after": "Pro", "p_page_size": 200},
        True,
        [GROUP],
        [A_GROUP],
    ),
    "groups_after, beneath another": (
        admins.groups_after(None, TEAM, None, 200),
        "find_groups",
        {"p_search": None, "p_after": None, "p_page_size": 200, "p_parent_id": TEAM},
        True,
        [GROUP],
        [A_GROUP],
    ),
    "delete": (admins.delete_group(PRO), "delete_group", {"p_group_id": PRO}, False, GROUP, A_GROUP),
    "add_members": (
        admins.add_members(PRO, [ANN], NOW),
        "add_group_members",
        {"p_group_id": PRO, "p_user_ids": [ANN], "p_anchor_at": NOW.isoformat()},
        True,
        {"added": 1, "already": 0, "unknown": [TEAM]},
        lambda page: (page.added, page.already, page.unknown) == (1, 0, (UUID(TEAM),)),
    ),
    "add_member": (
        admins.add_member(PRO, ANN, None),
        "add_group_members",
        {"p_group_id": PRO, "p_user_ids": [ANN], "p_anchor_at": None},
        True,
        {"added": 1, "already": 0, "unknown": []},
        True,
    ),
    "add_member again": (
        admins.add_member(PRO, ANN, None),
        "add_group_members",
        {"p_group_id": PRO, "p_user_ids": [ANN], "p_anchor_at": None},
        True,
        {"added": 0, "already": 1, "unknown": []},
        False,
    ),
    "remove_members": (
        admins.remove_members(PRO, [ANN]),
        "remove_group_members",
        {"p_group_id": PRO, "p_user_ids": [ANN]},
        True,
        {"removed": 1},
        1,
    ),
    "move_member": (
        admins.move_member(ANN, PRO, TEAM),
        "move_group_member",
        {"p_user_id": ANN, "p_from": PRO, "p_to": TEAM},
        False,
        {"moved": True},
        True,
    ),
    "members_page": (
        admins.members_page(PRO, "ann@", TEAM, 1),
        "group_members",
        {"p_group_id": PRO, "p_after": TEAM, "p_page_size": 2, "p_search": "ann@"},
        True,
        [{"user_id": user, "email": None, "joined_at": WHEN} for user in (ANN, TEAM)],
        lambda page: ([member.id for member in page], page.next) == ([UUID(ANN)], ANN),
    ),
    "members_after": (
        admins.members_after(PRO, None, UUID(ANN), 500),
        "group_members",
        {"p_group_id": PRO, "p_after": ANN, "p_page_size": 500},
        True,
        [{"user_id": ANN, "email": None, "joined_at": WHEN}],
        lambda members: members[0].joined_at == NOW,
    ),
    "members_after of a search": (
        admins.members_after(PRO, "ann@", None, 500),
        "group_members",
        {"p_group_id": PRO, "p_after": None, "p_page_size": 500, "p_search": "ann@"},
        True,
        [],
        [],
    ),
    "find_users": (
        admins.find_users("ann@"),
        "find_users",
        {"p_email": "ann@"},
        True,
        [{"user_id": ANN, "email": "ann@example.com"}],
        lambda users: users[0].email == "ann@example.com",
    ),
    "users_by_email": (
        admins.users_by_email(["ann@example.com"]),
        "find_users_by_email",
        {"p_emails": ["ann@example.com"]},
        True,
        [{"user_id": ANN, "email": "ann@example.com"}],
        lambda users: users[0].email == "ann@example.com",
    ),
    "ledger": (
        reports.ledger(PRO, ANN, "image", NOW, NOW).page(None, 7),
        "export_usage",
        {"p_group_id": PRO, "p_user_id": ANN, "p_kind": "image", "p_since": WHEN, "p_until": WHEN, "p_page_size": 7},
        True,
        {"rows": [], "until": WHEN, "next": {"id": ANN}},
        lambda page: (list(page), json.loads(page.next)) == ([], {"p_after": {"id": ANN}, "p_until": WHEN}),
    ),
    "ledger, further on": (
        reports.ledger(PRO, None, None, None, None).page(json.dumps({"p_after": {"id": ANN}, "p_until": WHEN}), 7),
        "export_usage",
        {
            "p_group_id": PRO,
            "p_user_id": None,
            "p_kind": None,
            "p_since": None,
            "p_until": WHEN,
            "p_after": {"id": ANN},
            "p_page_size": 7,
        },
        True,
        {"rows": [], "until": WHEN, "next": None},
        lambda page: (list(page), page.next) == ([], None),
    ),
    "sums": (
        reports.export(PRO, None, "image", NOW, NOW, "week").page(None, 7),
        "export_history",
        {"p_group_id": PRO, "p_kind": "image", "p_since": WHEN, "p_until": WHEN, "p_bucket": "week", "p_page_size": 7},
        True,
        {
            "rows": [
                {"group": {"id": PRO}, "timezone": "UTC", "bucket": WHEN, "kind": "image", "used": 3, "generations": 2}
            ],
            "until": WHEN,
            "next": None,
        },
        lambda page: (page[0].group.id, page[0].used, page.next) == (UUID(PRO), 3, None),
    ),
    "limit_pressure": (
        reports.limit_pressure(PRO, 80, 3),
        "limit_pressure",
        {"p_group_id": PRO, "p_at_least": 80, "p_count": 3},
        True,
        [
            {
                "kind": "image",
                "period": "day",
                "starts": "calendar",
                "max": 5,
                "full": 1,
                "near": 2,
                "members": [{"user_id": ANN, "email": None, "used": 5}],
            }
        ],
        lambda limits: (limits[0].full, limits[0].members[0].id) == (1, UUID(ANN)),
    ),
    "top_members": (
        reports.top_members(PRO, "image", NOW, None, 3),
        "top_members",
        {"p_group_id": PRO, "p_kind": "image", "p_since": WHEN, "p_until": None, "p_count": 3},
        True,
        [{"user_id": ANN, "email": None, "used": 3, "generations": 2}],
        lambda top: (top[0].used, top[0].generations) == (3, 2),
    ),
    "drift": (
        reports.drift(PRO, NOW),
        "usage_drift",
        {"p_group_id": PRO, "p_since": WHEN},
        True,
        {"counters": [], "rollup": []},
        lambda drift: not drift.drifted,
    ),
    "group_usage": (
        reports.group_usage(PRO),
        "group_usage",
        {"p_group_id": PRO},
        True,
        [
            {
                "group": {"id": PRO, "name": "Pro"},
                "member_count": 3,
                "limits": [{**STATUS, "capacity": 150, "fraction": 0.5}],
            }
        ],
        lambda usage: (usage.member_count, usage.limits[0].capacity, usage.limits[0].fraction) == (3, 150, 0.5),
    ),
    "usage_page": (
        reports.usage_page("Pro", 1000),
        "group_usage",
        {"p_after": "Pro", "p_page_size": 1000},
        True,
        [],
        [],
    ),
    "history": (
        reports.history(PRO, "image", "hour", NOW, NOW),
        "generation_history",
        {"p_group_id": PRO, "p_kind": "image", "p_bucket": "hour", "p_since": WHEN, "p_until": WHEN},
        True,
        [{"bucket": WHEN, "kind": "image", "used": 3, "generations": 2}],
        lambda points: (points[0].bucket, points[0].used) == (NOW, 3),
    ),
    "reset_usage of a member": (
        reports.reset_usage(PRO, "image", UUID(ANN)),
        "reset_group_usage",
        {"p_group_id": PRO, "p_kind": "image", "p_user_id": ANN},
        False,
        {"reset_at": WHEN},
        NOW,
    ),
    "reset_usage": (
        reports.reset_usage(PRO, None, None),
        "reset_group_usage",
        {"p_group_id": PRO, "p_kind": None},
        False,
        {"reset_at": WHEN},
        NOW,
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@by_case
def test_what_is_sent(case: tuple[Call[Any], str, dict[str, Any], bool, Any, Any]) -> None:
    call, function, params, retry_safe, _, _ = case
    assert (call.function, call.params, call.retry_safe) == (function, params, retry_safe)


@by_case
def test_what_is_read(case: tuple[Call[Any], str, dict[str, Any], bool, Any, Any]) -> None:
    call, *_, answer, expected = case
    read = call.parse(answer)
    assert expected(read) if callable(expected) else read == expected


def spoilt(answer: Any) -> Iterator[Any]:
    """The answer, each time with another of its parts replaced by what can't be there."""
    yield from (None, True, -1, 1.5, math.inf, "", "x", [], {}, [None], {"code": []})
    parts = answer.items() if isinstance(answer, dict) else enumerate(answer) if isinstance(answer, list) else ()
    for place, part in parts:
        for other in spoilt(part):
            changed = answer.copy()
            changed[place] = other
            yield changed


@by_case
def test_what_is_read_of_a_spoilt_answer(case: tuple[Call[Any], str, dict[str, Any], bool, Any, Any]) -> None:
    """It is worth another try, or an error of ours; nothing else gets out."""
    call, *_, answer, _ = case
    for other in spoilt(answer):
        with suppress(Transient, TokenLimitsError):
            answers.read(call, 200, {}, json.dumps(other).encode())


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (answers.version(), {"version": math.inf}),
        (admins.remove_members(PRO, [ANN]), {"removed": math.inf}),
        (admins.remove_members(PRO, [ANN]), {"removed": 1.5}),
        (admins.move_member(ANN, PRO, TEAM), {"moved": "perhaps"}),
        (admins.remove_override(PRO, "image", None, None, None, None), {"removed": "perhaps"}),
        (reports.reset_usage(PRO, None, None), {"reset_at": "2026-03-01T12:00:00"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_field_of_another_type_is_worth_another_try(call: Call[Any], answer: dict[str, Any]) -> None:
    with pytest.raises(Transient):
        answers.read(call, 200, {}, json.dumps(answer).encode())


def functions() -> dict[str, dict[str, bool]]:
    """Find the public functions of the SQL: by name, their parameters and whether each is required."""
    found = re.findall(r"create or replace function public\.(\w+)\((.*?)\)\s*returns jsonb?\b", one_paste(), re.DOTALL)
    return {
        name: {each.split()[0]: " default " not in each for each in parameters.split(",") if each.strip()}
        for name, parameters in found
    }


@by_case
def test_the_sql_has_the_function(case: tuple[Call[Any], str, dict[str, Any], bool, Any, Any]) -> None:
    call = case[0]
    parameters = functions()[call.function]
    assert call.params.keys() <= parameters.keys()
    assert {name for name, required in parameters.items() if required} <= call.params.keys()


def test_the_sql_is_new_enough() -> None:
    found = re.search(r"jsonb_build_object\('version', (\d+)\)", one_paste())
    assert found is not None
    assert int(found[1]) >= SCHEMA_VERSION


class TestNoGroup:
    @pytest.mark.parametrize("call", [admins.get_group(PRO), admins.get_group_by_name("nobody")])
    def test_is_an_error_that_says_which(self, call: Call[Group]) -> None:
        with pytest.raises(GroupNotFound, match=f"{PRO}|'nobody'") as caught:
            call.parse([])
        assert caught.value.code == "TL002"


def test_an_unknown_user_cannot_be_added() -> None:
    with pytest.raises(UnknownUser, match=ANN) as caught:
        admins.add_member(PRO, ANN, None).parse({"added": 0, "already": 0, "unknown": [ANN]})
    assert caught.value.code == "TL004"


def test_an_old_schema_is_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SCHEMA_VERSION", 3)
    with pytest.raises(SchemaOutdated, match=r"version 2 .* needs 3.*sql/tokenlimits\.sql"):
        answers.version().parse({"version": 2})
    assert answers.version().parse({"version": 4}) == 4


@pytest.mark.parametrize("answer", [None, [], {}, "ok", 7, {"allowed": "perhaps"}, [RESULT]])
def test_an_answer_of_another_shape_is_refused(answer: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        workers.track(ANN, "image", 1, None, None, None).parse(answer)
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        answers.version().parse(answer)


class TestWithoutService:
    CALL = workers.track(ANN, "video", 8, None, None, None)
    ERROR = ServiceUnavailable("Supabase could not be reached", retry_after=7)

    def test_raise(self) -> None:
        with pytest.raises(ServiceUnavailable) as caught:
            workers.without_service(self.CALL, "raise", self.ERROR)
        assert caught.value is self.ERROR

    def test_allow(self) -> None:
        assert workers.without_service(self.CALL, "allow", self.ERROR) == TrackResult(
            allowed=True, reason="unavailable", kind="video", cost=8, retry_after=7
        )

    def test_deny(self) -> None:
        assert workers.without_service(self.CALL, "deny", self.ERROR) == TrackResult(
            allowed=False,
            reason="unavailable",
            error="Supabase could not be reached",
            kind="video",
            cost=8,
            retry_after=7,
        )


class TestNewKey:
    def test_is_made_when_there_is_none(self) -> None:
        calls = [workers.track(ANN, "image", 1, None, None, None) for _ in range(2)]
        keys = [UUID(call.params["p_idempotency_key"]) for call in calls]
        assert keys[0] != keys[1]
        assert UUID(workers.record(ANN, "image", 1, None, None, None, None).params["p_idempotency_key"]).version == 7

    def test_is_a_uuid_of_version_7(self) -> None:
        before = time.time_ns() // 1_000_000
        key = UUID(new_key())
        after = time.time_ns() // 1_000_000
        assert key.version == 7
        assert key.variant == "specified in RFC 4122"
        assert before <= key.int >> 80 <= after

    def test_is_ordered_by_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = []
        for milliseconds in (1, 2, 999, 1_700_000_000_000, 1_700_000_000_001):
            monkeypatch.setattr(time, "time_ns", lambda now=milliseconds: now * 1_000_000)
            keys.append(new_key())
        assert keys == sorted(keys)

    def test_is_never_the_same(self) -> None:
        assert len({new_key() for _ in range(10_000)}) == 10_000
