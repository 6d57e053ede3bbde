"""`drift`, `reconcile` and `refund`, and alarms that tell themselves from trouble."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.models import Group

if TYPE_CHECKING:
    from uuid import UUID

    from tokenlimits.local import LocalStack

    from .conftest import Program


@pytest.fixture
def user(stack: LocalStack) -> UUID:
    return stack.create_users(1)[0]


@pytest.fixture
def team(groups: GroupManager, user: UUID, name: str) -> Group:
    made = groups.create(name, limits={"image": 10})
    groups.add_member(made.id, user)
    return made


@pytest.mark.slow
def test_a_counter_that_drifted(
    tl: Program, stack: LocalStack, team: Group, user: UUID, groups: GroupManager, limits: TokenLimits
) -> None:
    limits.track(user, "image", cost=3)
    assert "Nothing differs" in tl("drift", team.name).stdout
    stack.sql("update tokenlimits.counters set used = 7 where subject = $1", str(team.id))
    shown = tl("drift", team.name, status=1).stdout
    assert shown.splitlines()[-1].split()[-2:] == ["7", "3"]
    assert tl.json("drift", team.id, status=1)["counters"][0]["was"] == 7
    assert "pass --yes" in tl.fails("reconcile", team.name)
    assert tl.json("reconcile", team.name, "--yes")["counters"][0]["used"] == 3
    assert "Nothing differs" in tl("reconcile", team.name, "--yes").stdout
    assert groups.usage(team.id).limits[0].used == 3


def test_refunds(tl: Program, team: Group, user: UUID, groups: GroupManager, limits: TokenLimits) -> None:
    ids = [limits.track(user, "image", cost=3).usage_id for _ in range(2)]
    assert "Refund 2 usages?" in tl.fails("refund", *ids)
    shown = tl("refund", *ids, "--yes").stdout
    assert shown.count("refunded") == 2
    assert groups.usage(team.id).limits[0].used == 0
    assert [each["status"] for each in tl.json("refund", ids[0], "--yes")] == ["refunded"]
    assert "is not a usage's id" in tl.fails("refund", "job-1", "--yes")
    assert "no usage" in tl.fails("refund", team.id, "--yes")


def test_what_became_of_a_limit_is_said(tl: Program, groups: GroupManager, team: Group) -> None:
    said = tl("limits", "set", team.name, "image=12000", "video=unlimited/day/member").stdout.splitlines()
    assert said[:2] == ["image/lifetime: 10 → 12,000", "video/day/member: none → unlimited"]
    said = tl("limits", "set", team.name, "image=12000", "--replace", "--yes").stdout.splitlines()
    assert said[0] == "video/day/member: unlimited → none"
    assert groups.get(team.id).limits == (Limit(kind="image", max=12_000),)


def test_an_alarm_that_can_not_tell(tl: Program, team: Group) -> None:
    assert "No limit" in tl("usage", team.name, "--at-least", 90).stdout
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "refuses connections" in tl("usage", "--at-least", 90, status=3, SUPABASE_URL=url).stderr
    assert "refuses connections" in tl("usage", status=1, SUPABASE_URL=url).stderr
    assert "no group" in tl("usage", "nowhere", "--at-least", 90, status=3).stderr
