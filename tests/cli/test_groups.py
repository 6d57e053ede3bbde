"""`groups` and `limits`."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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

    assert "has no limit video/lifetime" in tl.fails("limits", "remove", name, "video", "--yes")
    tl("limits", "remove", name, "image/lifetime", "--yes")
    assert groups.get(group.id).limits == ()
    assert "can't generate anything" in tl("limits", "list", name).stdout


@pytest.mark.parametrize(
    "limit",
    ["image", "image=", "image=-1", "image=1/year", "image=1/day/week", "Image=1", "image=1/day/member/group", "=1"],
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
