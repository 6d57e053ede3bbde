"""Overrides, resets of one member, and limits on what is in progress."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from tests.cli.conftest import Program

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack
from tokenlimits.models import Group


@pytest.fixture
def email(stack: LocalStack) -> str:
    return stack.create_user(f"{uuid4()}@example.com").email


@pytest.fixture
def user(groups: GroupManager, email: str) -> UUID:
    return groups.find_users(email)[0].id


@pytest.fixture
def team(groups: GroupManager, user: UUID, name: str) -> Group:
    made = groups.create(
        name,
        limits=[
            Limit(kind="image", max=5, period="day", scope="member"),
            Limit(kind="image", max=9, period="3 hours", scope="member", starts="rolling"),
            Limit(kind="image", max=50, period="month"),
            Limit(kind="video", max=1, period="in_flight", scope="member"),
            Limit(kind="video", max=2, period="in_flight"),
        ],
    )
    groups.add_member(made.id, user)
    return made


def test_an_override_is_set_listed_and_removed(
    tl: Program, team: Group, email: str, user: UUID, limits: TokenLimits
) -> None:
    assert "no overrides" in tl("overrides", "list", team.name).stdout
    done = tl("overrides", "set", team.name, "image=200/day", "--user", email, "--until", "30d")
    assert f"{email}, image/day/member: 200 until " in done.stdout
    assert "the group, image/month: unlimited for good." in tl("overrides", "set", team.name, "image=unlimited").stdout
    shown = tl("overrides", "list", team.name).stdout
    assert "image/day/member" in shown
    assert "image/month" in shown
    (one,) = tl.json("overrides", "list", team.name, "--user", email)
    assert (one["max"], one["period"], one["status"], one["email"]) == (200, "day", "active", email)
    left = datetime.fromisoformat(one["until"]) - datetime.now(UTC)
    assert timedelta(days=29) < left <= timedelta(days=30)
    assert limits.usage(user)[0].max == 200

    assert "applies" in tl("overrides", "remove", team.name, "image/1d", "--user", email, "--yes").stdout
    assert tl.json("overrides", "list", team.name, "--user", email) == []
    assert "no such override" in tl.fails("overrides", "remove", team.name, "image/day", "--user", email, "--yes")
    assert tl.json("overrides", "remove", team.name, "image", "--yes") == {"removed": True}
    assert tl.json("overrides", "list", team.name) == []


def test_what_is_wrong_with_an_override_is_said(tl: Program, team: Group, email: str) -> None:
    for_user = ("--user", email)
    several = tl.fails("overrides", "set", team.name, "image=1", *for_user)
    assert "day calendar" in several
    assert "3 hours rolling" in several
    assert "no such" in tl.fails("overrides", "set", team.name, "audio=1", *for_user)
    assert "in the future" in tl.fails("overrides", "set", team.name, "image=1/day", *for_user, "--until", "2026-01-01")
    assert "pass --user with a member limit" in tl.fails("overrides", "set", team.name, "image=1/member")
    assert "leave out group, or --user" in tl.fails("overrides", "set", team.name, "image=1/group", *for_user)
    assert "write it like image=200" in tl.fails("overrides", "set", team.name, "image")
    assert "leave out its mode" in tl.fails("overrides", "set", team.name, "image=1/observe")
    assert "7d (in 7 days" in tl.fails("overrides", "set", team.name, "image=1", "--until", "soon", status=2)
    assert "pass --yes" in tl.fails("overrides", "remove", team.name, "image")


def test_one_member_is_reset(tl: Program, team: Group, email: str, user: UUID, limits: TokenLimits) -> None:
    limits.track(user, "image", 4)
    done = tl("groups", "reset", team.name, "--user", email, "--kind", "image", "--yes").stdout
    assert f"Reset {email} in {team.name}: " in done
    used = {(limit.scope, limit.used) for limit in limits.usage(user) if limit.kind == "image"}
    assert used == {("group", 4), ("member", 0)}


def test_limits_in_flight_are_set_and_shown(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    limits.reserve(user, "video")
    assert "video=2/in_flight          2 at once" in tl("limits", "list", team.name).stdout
    set_ = tl("limits", "set", team.name, "video=3/in_flight/member").stdout
    assert "video/in_flight/member: 1 → 3" in set_
    assert "3 at once each" in set_
    (line,) = [line for line in tl("usage", team.name).stdout.splitlines() if " 2 at once" in line]
    assert line.split()[-6:] == ["1", "2", "1", "as", "they", "end"]
