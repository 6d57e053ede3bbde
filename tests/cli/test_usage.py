"""`usage`, `history`, `track` and `check`."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.cli._usage import _fullest_first
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
    made = groups.create(
        name,
        limits=[Limit(kind="image", max=10), Limit(kind="image", max=4, period="day", scope="member")],
        timezone="Pacific/Kiritimati",
    )
    groups.add_member(made.id, user)
    return made


def test_track_and_check(tl: Program, team: Group, user: UUID, stack: LocalStack) -> None:
    email = stack.sql("select email from auth.users where id = $1", str(user))[0]["email"]
    tracked = tl.json("track", user, "image", "--cost", 3, "--key", "job")
    assert (tracked["allowed"], tracked["remaining"]) == (True, 1)
    assert "earlier call" in tl("track", email.upper(), "image", "--cost", 3, "--key", "job").stdout
    assert "job" in tl.fails("track", user, "image", "--cost", 2, "--key", "job")
    assert tl.json("check", email, "image")["allowed"] is True
    denied = tl.json("check", user, "image", "--cost", 2, status=1)
    assert denied["reason"] == "limit_exceeded"
    assert "3 of 4 used" in tl("track", user, "image", "--cost", 2, status=1).stdout
    assert "Allowed" in tl("track", user, "image", "--group", team.id).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["track", "nobody@example.com", "image"], "nobody@example.com"),
        (["track", uuid4(), "Image"], "kind"),
        (["check", uuid4(), "image", "--cost", "0"], "cost"),
        (["check", uuid4(), "image", "--group", "no such group"], "no such group"),
        (["usage", "no such group"], "no such group"),
        (["usage", "a", "--user", "b"], "either a group or --user"),
        (["usage", "--watch"], "terminal"),
        (["history", "--kind", "Image"], "kind"),
    ],
)
def test_what_is_wrong_is_said(tl: Program, arguments: list[object], says: str) -> None:
    assert says in tl.fails(*arguments)


def test_usage(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    limits.track(user, "image", 3)
    (usage,) = tl.json("usage", team.name)
    assert [(each["scope"], each["used"]) for each in usage["limits"]] == [("member", 3), ("group", 3)]
    assert team.name in {each["group"]["name"] for each in tl.json("usage")}
    assert [each["remaining"] for each in tl.json("usage", "--user", user)] == [1, 7]
    shown = tl("usage", team.id).stdout
    assert f"{team.name}  image  4 a day each" in shown
    assert "███" in shown
    assert team.name in tl("usage", "--user", user).stdout


WINDOWS = [
    Limit(kind="credits", max=100, period="day", counts={"image": 1, "video": 8}),
    Limit(kind="image", max=40, period="3 hours", starts="rolling", scope="member"),
    Limit(kind="video", max=5, period="5 hours", starts="first_use", scope="member"),
    Limit(kind="video", max=3, period="week", starts="anchor"),
    Limit(kind="image", max=2, period="year", mode="observe"),
    Limit(kind="lone", max=2, period="day", starts="first_use"),
]


def _line(text: str, words: str) -> str:
    """Find the line of a limit, with single spaces and without its bar."""
    (line,) = [line for line in text.splitlines() if words in line]
    return " ".join(re.sub(r"[█▉▊▋▌▍▎▏░]+", "", line).split())


def test_usage_of_windows_pools_and_modes(
    tl: Program, groups: GroupManager, user: UUID, limits: TokenLimits, name: str
) -> None:
    team = groups.create(name, limits=WINDOWS)
    groups.add_member(team.id, user)
    shown = tl("usage", "--user", user).stdout
    assert " credits 100 a day 0 0 100 100 " in _line(shown, "credits")
    assert _line(shown, "last 3 hours").endswith(" image 40 in the last 3 hours each 0 0 40 40")
    assert _line(shown, "per 5 hours").endswith(" video 5 per 5 hours each, from the first use 0 0 5 5 not started")
    assert "resets in" not in tl("check", user, "lone").stdout

    tracked = tl("track", user, "image", "--cost", 3).stdout
    assert "would deny  image, 2 a year, observed: 3 used" in tracked
    assert re.search(r"^left +37\s+resets in +(3h 0|2h 5)\dm \(part\) *$", tracked, re.MULTILINE)
    limits.track(user, "video")
    shown = tl("usage", "--user", user).stdout
    assert " 100 a day 11 11 100 89 " in _line(shown, "credits")
    assert re.search(r" in the last 3 hours each 7 3 40 37 (3h 0|2h 5)\dm \(part\)$", _line(shown, "last 3 hours"))
    assert re.search(r" from the first use 20 1 5 4 (4h 59m|5h 00m)$", _line(shown, "per 5 hours"))
    assert re.search(r" 3 a week, anchored 33 1 3 2 (6d 23h|7d 00h)$", _line(shown, "anchored"))
    assert " 2 a year, observed 150 3 2 " in _line(shown, "observed")
    whole = tl("usage", team.name).stdout
    assert _line(whole, "last 3 hours").endswith(" 7 3 40 37 varies")
    assert _line(whole, "per 5 hours").endswith(" 20 1 5 4 varies")
    pressed = tl("usage", team.name, "--members", "--at-least", 20, status=1).stdout
    assert f"{team.name}, video, 5 hours, from the first use: 0 at the limit, 1 at 20 % or more" in pressed


def test_usage_warns_of_what_is_nearly_full(
    tl: Program, groups: GroupManager, team: Group, user: UUID, limits: TokenLimits
) -> None:
    groups.set_limit(team.id, Limit(kind="video", max=0))
    limits.track(user, "image", 3)
    assert "No limit is at 80 % or more" in tl("usage", team.name, "--at-least", 80).stdout
    assert tl.json("usage", "--user", user, "--at-least", 80) == []
    (usage,) = tl.json("usage", team.name, "--at-least", 75, status=1)
    assert [(each["scope"], each["used"]) for each in usage["limits"]] == [("member", 3)]
    assert [each["scope"] for each in tl.json("usage", "--user", user, "--at-least", 30, status=1)] == [
        "member",
        "group",
    ]
    shown = tl("usage", "--at-least", 75, status=1).stdout
    assert "4 a day each" in shown
    assert f"{team.name}  image  10 in total" not in shown


def test_who_is_at_a_member_limit(
    tl: Program, team: Group, user: UUID, limits: TokenLimits, groups: GroupManager
) -> None:
    needs = ("usage", team.name, "--members", "--at-least")
    assert "No member is at 90 % or more" in tl(*needs, 90).stdout
    limits.track(user, "image", 3)
    assert tl.json(*needs, 90) == []
    (found,) = tl.json(*needs, 75, status=1)
    assert found["group"] == {"id": str(team.id), "name": team.name}
    assert (found["kind"], found["full"], found["near"]) == ("image", 0, 1)
    assert [(each["id"], each["used"]) for each in found["members"]] == [(str(user), 3)]
    shown = tl("usage", "--members", "--at-least", 75, status=1).stdout
    assert "0 at the limit, 1 at 75 % or more" in shown
    for wrong in (("--at-least", 0), ("--at-least", 12.5), ("--at-least", 90, "--user", user), ()):
        assert "--members needs --at-least" in tl("usage", "--members", *wrong, status=1).stderr


def test_usage_live(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    with tl.on_terminal("usage", team.name, "--watch", "--interval", "0.5") as terminal:
        terminal.wait_for("10 in total .* 0 ")
        limits.track(user, "image", 4)
        terminal.wait_for("10 in total .* 4 ")
        assert "\x1b[31m" in terminal.raw  # the member's limit is full
        assert "\x1b[32m" in terminal.raw
        terminal.interrupt()
        assert terminal.status() == 0
        assert "Traceback" not in terminal.text


def test_live_usage_begins_with_the_fullest(groups: GroupManager, team: Group, user: UUID, limits: TokenLimits) -> None:
    first = groups.create(f"A {team.name}", limits={"image": 100, "video": 0})
    limits.track(user, "image", 3)
    read = [each for each in groups.usage_all() if each.group.id in (team.id, first.id)]
    assert [each.group.id for each in read] == [first.id, team.id]
    assert [(each.name, limit.kind, limit.scope) for each, limit in _fullest_first(read)] == [
        (team.name, "image", "member"),
        (team.name, "image", "group"),
        (first.name, "image", "group"),
        (first.name, "video", "group"),
    ]


def test_live_usage_of_many_limits_has_pages(
    tl: Program, groups: GroupManager, name: str, user: UUID, limits: TokenLimits
) -> None:
    group = groups.create(name, limits=[Limit(kind=f"k{n}", max=12_345_678) for n in range(90)])
    limits.record(user, "k7", 1_500_000, group_id=group.id)
    with tl.on_terminal("usage", name, "--watch", "--interval", "0.5") as terminal:
        terminal.wait_for("k7 .*12.3M in total .* 12 +1.5M +12.3M +10.8M(?s:.*)1 to 34 of 90 limits")
        terminal.type(" ")
        terminal.wait_for("35 to 68 of 90 limits")
        terminal.type(" ")
        terminal.wait_for("69 to 90 of 90 limits")
        terminal.type(" ")
        terminal.type("p")
        terminal.wait_for("(?s)69 to 90.*35 to 68")
        terminal.type("q")
        assert terminal.status() == 0


@pytest.fixture
def past(team: Group, user: UUID, limits: TokenLimits) -> Callable[[int], datetime]:
    """Usage of each of the last three days."""
    now = datetime.now(UTC)
    for days in range(3):
        limits.record(user, "image", days + 1, created_at=now - timedelta(days=days), group_id=team.id)
    return lambda days: now - timedelta(days=days)


@pytest.mark.slow
def test_history(tl: Program, groups: GroupManager, team: Group, past: Callable[[int], datetime]) -> None:
    points: list[dict[str, Any]] = tl.json("history", team.name)
    assert [point["used"] for point in points] == [3, 2, 1]
    assert datetime.fromisoformat(points[0]["bucket"]).astimezone(UTC).hour == 10  # midnight on Kiritimati
    shown = tl("history", team.name).stdout
    assert "day (Pacific/Kiritimati)" in shown
    assert shown.count("image") == 3
    groups.set_limit(team.id, Limit(kind="image", max=4, period="day"))
    assert re.search(r"image +[█░▎▌▊]+ +3 +4 +1\n", tl("history", team.name).stdout)
    assert len(tl.json("history", team.name, "--by", "hour", "--since", past(1).isoformat())) == 2
    since = f"{past(1).astimezone(UTC):%Y-%m-%d}"
    assert tl.json("history", team.id, "--kind", "video", "--since", since) == []
    assert "There was no usage" in tl("history", team.id, "--kind", "video").stdout
    assert "image" in tl("history", "--by", "month").stdout
    assert "not a date" in tl.fails("history", "--since", "yesterdays", status=2)
    assert "year" in tl.fails("history", "--by", "year", status=2)


def test_history_is_shown_against_limits_of_its_steps_alone(
    tl: Program, groups: GroupManager, team: Group, past: Callable[[int], datetime]
) -> None:
    assert past(0)
    groups.set_limits(
        team.id,
        [
            Limit(kind="image", max=5, period="day", starts="anchor"),
            Limit(kind="image", max=6, period="day", counts={"video": 1, "image": 2}),
        ],
    )
    assert not re.search(r"image +\S+ +\d+ +[56] +1\n", tl("history", team.name).stdout)


def test_a_pools_kinds_are_known(tl: Program, groups: GroupManager, team: Group, user: UUID) -> None:
    groups.set_limits(team.id, [Limit(kind="credits", max=5, period="day", counts={"hologram": 1})])
    assert tl("track", user, "holograms", status=1).stdout.endswith(". Did you mean hologram?\n")
    said = tl("limits", "set", team.name, "pool=3/holograms:1").stderr
    assert said == "holograms is a new kind. Did you mean hologram?\n"


@pytest.mark.slow
def test_a_kind_that_is_a_slip(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    asked = "Did you mean image?"
    limits.track(user, "image")
    for command in (["track", user, "images"], ["check", user, "imgae"]):
        assert tl(*command, status=1).stdout.endswith(f". {asked}\n")
    for command in (["history", team.name, "--kind", "images"], ["members", "top", team.name, "--kind", "images"]):
        assert tl(*command).stdout == f"There was no usage in that time. {asked}\n"
    assert tl("export", "--group", team.name, "--kind", "images").stderr == f"There was no usage. {asked}\n"
    assert asked not in tl("track", user, "music", status=1).stdout
    assert asked not in tl("history", team.name, "--since", "0h").stdout
    assert tl("limits", "set", team.name, "images=3").stderr == f"images is a new kind. {asked}\n"
    assert tl("limits", "set", team.name, "image_hd=3", "image=11", "images=4").stderr == ""


def test_how_long_ago(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    for days in (0, 3, 10):
        limits.record(user, "image", created_at=datetime.now(UTC) - timedelta(days=days, minutes=5))
    exported = [
        tl("export", "--group", team.name, "--since", since).stdout.count("\n") - 1 for since in ("1h", "7d", "2W")
    ]
    assert exported == [1, 2, 3]
    assert tl("export", "--group", team.name, "--until", "48h").stdout.count("\n") - 1 == 2
    assert "like 7d (7 days ago; h, d or w), 2026-01-31 or" in tl.fails("history", "--since", "7y", status=2)
    assert "not a date" in tl.fails("history", "--since", "99999w", status=2)
