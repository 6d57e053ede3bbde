"""The whole API under generated requests, valid ones and others, with a token of each role."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any
from uuid import UUID, uuid4

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from schemathesis.generation import GenerationMode

from tokenlimits._limits import start
from tokenlimits.models import Period, Starts

PERIOD, STARTS = TypeAdapter[Any](Period).validate_python, TypeAdapter[Any](Starts).validate_python

schemathesis.openapi.format("timezone", st.sampled_from(["UTC", "Europe/Paris", "America/New_York"]))


def sayable(context: Any, body: Any) -> Any:
    """Make true what no schema can say.

    A limit is in a list but once, its periods can begin as it says, an anchor is since 1970, an override ends later,
    metadata is at most 8 kB and has no \\0, a worker says who generates, a name is measured as it is stored, a parent
    is a group, and nothing is for a user and for a group beneath at once.
    """
    if not isinstance(body, dict):
        return body
    limits = body.get("limits")
    if isinstance(limits, list) and all(isinstance(limit, dict) for limit in limits):
        names = [tuple(str(limit.get(name)) for name in ("kind", "period", "starts", "scope")) for limit in limits]
        body["limits"] = [possible(limit) for n, limit in enumerate(limits) if names[n] not in names[:n]]
    if isinstance(anchor := body.get("anchor_at"), str) and re.match("[0-9]{4}-", anchor):
        body["anchor_at"] = f"20{anchor[2:]}"
    if isinstance(until := body.get("until"), str) and re.match("[0-9]{4}-", until):
        body["until"] = f"24{until[2:]}"
    if "kind" in body and body.get("user_id") is None:
        body["user_id"] = "3f2b8c1a-94d7-4e6b-8a5f-7c9d0e1f2a3b"
    if isinstance(name := body.get("name"), str) and len(name) <= 200:  # a longer one is for the server to refuse
        body["name"] = unicodedata.normalize("NFC", name)[:200]
    for named in ("parent_id", "child_id"):
        if is_id(body.get(named)):
            del body[named]
    written = json.dumps(body.get("metadata"))
    if "\\u0000" in written or len(written) > 8000:
        del body["metadata"]
    return body


def is_id(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(UUID(value))
    except ValueError:
        return False


def possible(limit: dict[str, Any]) -> dict[str, Any]:
    """Leave out where periods begin, and how long they are, where it is just both together that can't be."""
    try:
        period, starts = PERIOD(limit.get("period", "lifetime")), STARTS(limit.get("starts", "calendar"))
    except ValidationError:
        return limit
    try:
        start(starts, period)
    except ValueError:
        return {name: value for name, value in limit.items() if name not in ("period", "starts")}
    return limit


def sendable(context: Any, case: Any) -> Any:
    """Send what no schema can say: one subject, one idempotency key, never used for a group, and no invented cursor."""
    if is_id(case.query.get("child_id")) and case.query.get("user_id") not in (None, "null"):
        del case.query["child_id"]
    after = case.query.get("after")
    if isinstance(after, str) and len(after) <= 1200:  # one that is too long is for the server to refuse
        del case.query["after"]
    for name in [name for name in case.headers if name.lower() == "idempotency-key"]:
        if isinstance(case.body, dict) and case.body.get("idempotency_key") is not None:
            del case.headers[name]
        elif case.operation.label == "POST /api/groups":
            case.headers[name] = str(uuid4())
    return case


@pytest.fixture(scope="module")
def operations(url: str) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{url}/api/openapi.json")
    schema.hook("map_body")(sayable)
    schema.hook("map_case")(sendable)
    return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("role", ["anon", "user", "admin", "service"])
@pytest.mark.usefixtures("groups")  # which go with it
def test_keeps_its_promises(operations: list[Any], mode: GenerationMode, role: str, tokens: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {tokens[role]}"}
    for operation in operations:

        @hypothesis_settings(
            max_examples=8,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.call_and_validate(headers=headers)

        ask()


def test_there_is_the_whole_api(operations: list[Any]) -> None:
    assert sorted(operation.label for operation in operations) == [
        "DELETE /api/group-members",
        "DELETE /api/groups/{group_id}",
        "DELETE /api/groups/{group_id}/overrides",
        "GET /api/group-members",
        "GET /api/groups",
        "GET /api/groups/{group_id}",
        "GET /api/groups/{group_id}/history",
        "GET /api/groups/{group_id}/overrides",
        "GET /api/groups/{group_id}/usage",
        "GET /api/usage/me",
        "PATCH /api/group-members",
        "PATCH /api/groups/{group_id}",
        "POST /api/group-members",
        "POST /api/groups",
        "POST /api/groups/{group_id}/reset",
        "POST /api/track-generation",
        "PUT /api/groups/{group_id}/overrides",
    ]
