"""`groups` and `limits`."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tokenlimits import GroupManager

    from .conftest import Program


def test_a_groups_life(tl: Program, groups: GroupManager, name: str) -> None:
    made = tl.json(
        *("groups", "create", name, "--limit", "image=1_000/month", "-l", "image=10/member/day", "-l", "x=unlimited"),
        *("--timezone", "Europe/Paris", "--priority", "-3", "--description", "d"),
    )
    assert (made["name"], made["priority"], made["timezone"], made["description"]) == (name, -3, "Europe/Paris", "d")
    assert [(each["kind"], each["max"], each["period"], each["scope"]) for each in made["limits"]] == [
        ("image", 1000, "month", "group"),
        ("image", 10, "day", "member"),
        ("x", None, "lifetime", "group"),
    ]
    assert made in tl.json("groups", "list", "--search", name)
    assert name in tl("groups", "list").stdout

    tl("groups", "edit", name.upper(), "--name", f"{name}!", "--priority", "4", "--default")
    shown = tl.json("groups", "show", made["id"])
    assert (shown["name"], shown["priority"], shown["timezone"], shown["is_default"]) == (
        f"{name}!",
        4,
        "Europe/Paris",
        True,
    )
    assert shown["usage"]["member_count"] == 0
    assert f"{name}!" in tl("groups", "show", made["id"]).stdout

    said = tl("groups", "reset", made["id"], "--kind", "image", "--yes").stdout
    assert re.search(r": usage counts from \d+ [A-Z][a-z]{2} \d{4}, \d\d:\d\d UTC\.\n", said)
    assert tl.fails("groups", "delete", made["id"]).endswith("? stdin is not a terminal; pass --yes to confirm.")
    assert groups.get(made["id"])
    tl("groups", "delete", made["id"], "--yes")
    assert "no group" in tl.fails("groups", "show", made["id"])


def test_json_of_changes(tl: Program, name: str) -> None:
    made = tl.json("groups", "create", name, "-l", "image=1")
    limits = tl.json("limits", "set", name, "image=2", "video=3/day")
    assert [(each["kind"], each["max"]) for each in limits] == [("image", 2), ("video", 3)]
    assert [each["kind"] for each in tl.json("limits", "remove", name, "video/day", "--yes")] == ["image"]
    reset = tl.json("groups", "reset", name, "--yes")
    assert reset["group"] == {"id": made["id"], "name": name}
    assert datetime.fromisoformat(reset["reset_at"]).tzinfo is not None
    assert tl.json("groups", "delete", name, "--yes")["id"] == made["id"]


def test_what_cannot_be_meant(tl: Program, name: str) -> None:
    tl("groups", "create", name, "-l", "image=1")
    assert "Nothing to change" in tl.fails("groups", "edit", name, status=2)
    assert "image/lifetime occurs twice" in tl.fails("limits", "set", name, "image=2", "image=3/lifetime")
    assert "image/lifetime occurs twice" in tl.fails("groups", "create", f"{name}2", "-l", "image=2", "-l", "image=3")
    assert "without its max, like image/month" in tl.fails("limits", "remove", name, "image=1")
    assert "its 1 limit and 0 memberships" in tl.fails("groups", "delete", name)


def test_a_narrow_terminal(tl: Program, name: str) -> None:
    """Numbers, ids and time zones stay whole; long names are folded in one list, and cut in the other."""
    long = f"{name} with more words than there is room for"
    tl("groups", "create", long, "-l", "image=1000000/month", "-l", "video=20/day", "--timezone", "Europe/Paris")
    made = tl.json("groups", "show", long)
    wide, narrow = (tl("groups", "list", "--search", long, COLUMNS=width).stdout for width in ("120", "60"))
    assert made["id"] in wide
    assert made["id"][:8] not in narrow
    for text, width in ((wide, 120), (narrow, 60)):
        assert "Europe/Paris" in text
        assert max(map(len, text.splitlines())) <= width
    usage = tl("usage", long, COLUMNS="60").stdout
    assert usage.count("1,000,000") == 2
    assert "20 a day" in usage
    assert max(map(len, usage.splitlines())) <= 60
    assert "…" in usage


def test_names_read_as_they_are(tl: Program, name: str) -> None:
    for hidden in ("\x1b[31m", "\u202e", "\u200b"):
        said = tl.fails("groups", "create", f"{name}{hidden}x")
        assert said.startswith("name: must have 1 to 200 characters")
        assert hidden not in said
    tl("groups", "create", f" {name} ")
    assert name in tl("groups", "list").stdout


def test_descriptions_may_hold_anything(tl: Program, name: str) -> None:
    tl("groups", "create", name, "--description", "[red]loud\x1b[31m")
    shown = tl("groups", "show", name).stdout
    assert "[red]loud" in shown
    assert "\x1b" not in shown


def test_limits_of_a_group(tl: Program, groups: GroupManager, name: str) -> None:
    group = groups.create(name, limits={"image": 5, "video": 5})
    tl("limits", "set", name, "image=7", "image=1/minute", "audio=0/week/member")
    kept = [("audio", 0, "week"), ("image", 1, "minute"), ("image", 7, "lifetime"), ("video", 5, "lifetime")]
    assert [(each["kind"], each["max"], each["period"]) for each in tl.json("limits", "list", name)] == kept
    assert "7" in tl("limits", "list", name).stdout

    assert "video=5/lifetime" in tl.fails("limits", "set", name, "image=8", "--replace")
    tl("limits", "set", name, "image=8", "--replace", "--yes")
    assert [(each.kind, each.max) for each in groups.get(group.id).limits] == [("image", 8)]

    assert "video: there is no such limit. There are: image/lifetime." in tl.fails("limits", "remove", name, "video")
    tl("limits", "remove", name, "image/lifetime", "--yes")
    assert groups.get(group.id).limits == ()
    assert "can't generate anything" in tl("limits", "list", name).stdout


PLAN = (
    "credits=1000/month/image:1+video:8",
    "image=100/month/anchor/member",
    "image=40/3h/rolling/member",
    "tokens=1000000/day/observe",
)


def test_pools_windows_and_modes(tl: Program, name: str) -> None:
    made = tl("groups", "create", name, *(word for limit in PLAN for word in ("-l", limit))).stdout
    for limit in PLAN:
        assert limit in made  # printed as it is written
    for words in (
        "1,000 a month: 1 an image, 8 a video",
        "100 a month each, anchored",
        "40 in the last 3 hours each",
        "1,000,000 a day, observed",
    ):
        assert words in made
    assert "credits: 1,000 a month: 1 an image, 8 a video" in tl("groups", "show", name).stdout

    said = tl("limits", "set", name, "credits=2000/month", "tokens=2000000/day/enforce").stdout
    assert "credits/month: 1,000/image:1+video:8 → 2,000/image:1+video:8\n" in said
    assert "tokens/day: 1,000,000/observe → 2,000,000\n" in said
    limits = tl.json("limits", "list", name)
    pool = next(each for each in limits if each["kind"] == "credits")
    assert pool == {
        "kind": "credits",
        "max": 2000,
        "period": "month",
        "scope": "group",
        "starts": "calendar",
        "counts": {"image": 1, "video": 8},
        "mode": "enforce",
    }

    several = tl.fails("limits", "remove", name, "image/member", "--yes")
    assert "several limits fit: image/3h/rolling/member, image/month/anchor/member" in several
    assert f"Remove image/3h/rolling/member from {name}?" in tl.fails("limits", "remove", name, "image/3h")
    assert len(tl.json("limits", "remove", name, "image/anchor", "image/rolling", "--yes")) == 2


def test_limits_as_json(tl: Program, name: str, tmp_path: Path) -> None:
    tl("groups", "create", name, *(word for limit in PLAN for word in ("-l", limit)))
    tl("groups", "create", f"{name} copy", "-l", "audio=1")
    listed = tl("limits", "list", name, "--json").stdout
    assert "Remove audio=1/lifetime" in tl.fails(
        "limits", "set", f"{name} copy", "--file", "-", "--replace", stdin=listed
    )
    copied = tl.json("limits", "set", f"{name} copy", "--file", "-", "--replace", "--yes", stdin=listed)
    assert copied == json.loads(listed)
    (tmp_path / "limits.json").write_text(json.dumps([{**copied[0], "max": 7}]))
    assert tl.json("limits", "set", name, "--file", "limits.json")[0]["max"] == 7
    for wrong in ((), ("image=1", "--file", "limits.json")):
        assert "either limits or a file" in tl.fails("limits", "set", name, *wrong, status=2)
    assert "stdin[0].max" in tl.fails("limits", "set", name, "--file", "-", stdin='[{"kind": "image", "max": -1}]')


def test_an_anchor(tl: Program, groups: GroupManager, name: str) -> None:
    made = tl.json("groups", "create", name, "-l", "image=10/month/anchor", "--anchor-at", "2026-01-31")
    assert made["anchor_at"] == "2026-01-31T00:00:00Z"
    assert "anchor       31 Jan 2026, 00:00 UTC" in tl("groups", "show", name).stdout
    tl("groups", "edit", name, "--anchor-at", "2026-01-15T09:00+01:00")
    assert groups.get_by_name(name).anchor_at == datetime(2026, 1, 15, 8, tzinfo=UTC)
    (usage,) = tl.json("usage", name)
    assert re.search(r"-15T08:00:00", usage["limits"][0]["reset_at"])
    tl("groups", "edit", name, "--priority", "3")
    assert groups.get_by_name(name).anchor_at is not None
    assert tl.json("groups", "edit", name, "--anchor-at", "none")["anchor_at"] is None
    assert "not a date" in tl.fails("groups", "edit", name, "--anchor-at", "someday", status=2)


@pytest.mark.parametrize(
    "limit",
    ["image", "image=", "image=-1", "image=1/5m", "image=1/day/week", "Image=1", "image=1/day/member/group", "=1"],
)
def test_a_limit_that_is_none(tl: Program, limit: str) -> None:
    assert tl.fails("groups", "create", "nobody makes this", "--limit", limit).startswith(f"{limit}:")


def test_what_the_server_refuses_is_one_line(tl: Program, groups: GroupManager, name: str) -> None:
    groups.create(name)
    assert "a group named" in tl.fails("groups", "create", name.lower())
    assert "time zone" in tl.fails("groups", "create", f"{name} 2", "--timezone", "Mars/Base")


def test_asks_before_it_deletes(tl: Program, groups: GroupManager, name: str) -> None:
    for answer, left in (("n\n", [name]), ("y\n", [])):
        if answer == "n\n":
            groups.create(name)
        with tl.on_terminal("groups", "delete", name) as terminal:
            terminal.wait_for(r"\[y/N\]")
            terminal.type(answer)
            assert terminal.status() == (0 if answer == "y\n" else 1)
        assert [group.name for group in groups.list(search=name)] == left
