"""`members`: one user or many, by id and e-mail address, from arguments, files and stdin."""

from __future__ import annotations

import csv
import os
import re
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import psycopg
import pytest

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.models import Group

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer

    from tokenlimits.local import LocalStack

    from .conftest import Program


@pytest.fixture
def team(groups: GroupManager, name: str) -> Group:
    return groups.create(name, limits={"image": 10})


@pytest.fixture
def users(stack: LocalStack) -> list[tuple[UUID, str]]:
    ids = stack.create_users(4)
    rows = stack.sql("select id, email from auth.users where id::text in (select jsonb_array_elements_text($1::jsonb))",
                     [str(id_) for id_ in ids])  # fmt: skip
    return [(UUID(row["id"]), row["email"]) for row in rows]


def members(groups: GroupManager, group: Group) -> set[UUID]:
    return {member.id for member in groups.members(group.id)}


def test_by_id_and_by_address(tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]]) -> None:
    (ann, _), (bob, bobs), (cyd, _), _ = users
    done = tl("members", "add", team.name, ann, bobs.upper(), str(ann).upper(), "nobody@example.com", "x", status=1)
    assert done.stdout == "2 added, 1 already there, 2 refused.\n"
    assert done.stderr.splitlines() == [
        "line 4: nobody@example.com: no user has this e-mail address",
        "line 5: x: is neither a user's id nor an e-mail address",
    ]
    assert members(groups, team) == {ann, bob}
    listed = tl.json("members", "list", team.id)
    assert {member["email"] for member in listed} == {email for id_, email in users if id_ in (ann, bob)}
    assert bobs in tl("members", "list", team.name).stdout
    assert [member["id"] for member in tl.json("members", "list", team.name, "--search", bobs.upper())] == [str(bob)]
    assert tl("members", "list", team.name, "--search", "nobody").stdout == ""

    assert "Remove 1 user from" in tl.fails("members", "remove", team.name, ann)
    assert tl("members", "remove", team.name, ann, cyd, "--yes").stdout == "1 removed, 1 not there, 0 refused.\n"
    assert members(groups, team) == {bob}


def test_nobody(tl: Program, team: Group) -> None:
    assert tl.json("members", "list", team.name) == []
    assert "Pass either users or a file" in tl.fails("members", "add", team.name)
    assert "Pass either users or a file" in tl.fails("members", "add", team.name, "x", "--file", "y")
    assert "nowhere.csv" in tl.fails("members", "add", team.name, "--file", "nowhere.csv")
    tl.directory.joinpath("binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in tl.fails("members", "add", team.name, "--file", "binary")


def test_the_top(
    tl: Program, groups: GroupManager, limits: TokenLimits, team: Group, users: list[tuple[UUID, str]]
) -> None:
    assert "There was no usage" in tl("members", "top", team.name).stdout
    groups.add_members(team.id, [id_ for id_, _ in users])
    for cost, (id_, _) in enumerate(users[:3], 1):
        limits.track(id_, "image", cost)
    top = tl.json("members", "top", team.name, "-n", 2, "--kind", "image")
    assert [(each["email"], each["used"]) for each in top] == [(users[2][1], 3), (users[1][1], 2)]
    assert users[0][1] in tl("members", "top", team.name).stdout
    assert "count" in tl.fails("members", "top", team.name, "-n", 0)


def test_moving(tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]], name: str) -> None:
    other = groups.create(f"{name} other")
    groups.add_members(team.id, [users[0][0], users[1][0]])
    done = tl("members", "move", "--from", team.name, "--to", other.name, *(email for _, email in users[:3]), status=1)
    assert done.stdout == "2 moved, 1 refused.\n"
    assert f"line 3: {users[2][1]}: was not in {team.name}" in done.stderr
    assert members(groups, other) == {users[0][0], users[1][0]}


HEADERS = ["email", "name,Email", "\ufeffemail", '\ufeff"name","email"', "name;email", "name\te-mail", ""]


@pytest.mark.parametrize("header", HEADERS)
def test_from_a_file(
    tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]], header: str
) -> None:
    between = next((each for each in ",;\t" if each in header), "")
    lines = [f"Ann{between}{email}" if between else email for _, email in users]
    text = "\r\n".join([*([header] if header else []), *lines[:2], "", *lines[2:]])
    tl.directory.joinpath("users.csv").write_text(text, encoding="utf-8", newline="")
    assert tl("members", "add", team.name, "--file", "users.csv").stdout.startswith("4 added")
    assert members(groups, team) == {id_ for id_, _ in users}
    assert tl("members", "remove", team.name, "-f", "-", "--yes", stdin=text).stdout.startswith("4 removed")


TITLED = "Customers,,\nExported by ann@example.com on 2026-01-02,,\n\nName,Email,\n"
STRIPE = "id,Description,Email,Name\n"
CLERK = "id,first_name,primary_email_address,verified_email_addresses\n"
# what stands before the lines, with what each line has around its address, and how it is encoded
EXPORTS = {
    "Stripe's customers": (STRIPE, "cus_Q1,a pro,{},Ann", "utf-8"),
    "Stripe's payments": ("id,Amount,Customer Email\n", "ch_3P,12.00,{}", "utf-8"),
    "Clerk's users": (CLERK, "user_2abc,Ann,{0},{0}", "utf-8"),
    "an id that is none": ("user_id,E-Mail Address\n", "auth0|17,{}", "utf-8"),
    "sep=": ("sep=;\r\nName;Email\r\n", "Ann;{}", "utf-8"),
    "a separator of one's own": ('\ufeff"sep=|"\nName|Email\n', "Ann|{}", "utf-8"),
    "a title": (TITLED, "Ann,{},", "utf-8"),
    "a title, with semicolons": (TITLED.replace(",", ";"), "Ann;{};", "utf-8"),
    "Excel's Unicode text": ("\ufeffName\tE-mail\r\n", "Änn\t{}", "utf-16-le"),
    "UTF-16 with the first byte first": ("\ufeffName,E-mail\r\n", "Änn,{}", "utf-16-be"),
    "UTF-16 that doesn't say so": ("email\n", "{}", "utf-16-le"),
    "returns alone": ("Name,Email\r", "Ann,{}\r", "utf-8"),
    "a long cell": ("note,email\n", '"' + "x\n" * 100_000 + '",{}', "utf-8"),
}


@pytest.mark.parametrize(("header", "line", "encoding"), EXPORTS.values(), ids=EXPORTS)
def test_what_others_export(
    tl: Program,
    groups: GroupManager,
    team: Group,
    users: list[tuple[UUID, str]],
    header: str,
    line: str,
    encoding: str,
) -> None:
    text = header + "".join(line.format(email) + ("" if line.endswith("\r") else "\n") for _, email in users)
    tl.directory.joinpath("users.csv").write_bytes(text.encode(encoding))
    assert tl("members", "add", team.name, "--file", "users.csv").stdout.startswith("4 added")
    assert members(groups, team) == {id_ for id_, _ in users}
    removed = tl("members", "remove", team.name, "-f", "-", "--yes", stdin=text.encode(encoding))
    assert removed.stdout == "4 removed, 0 not there, 0 refused.\n"


def test_lines_count_from_the_beginning_of_the_file(tl: Program, team: Group, users: list[tuple[UUID, str]]) -> None:
    text = "sep=,\nUsers\n\nemail,note\n" + "".join(f"{email},\n" for _, email in users) + "x,\n"
    done = tl("members", "add", team.name, "-f", "-", "--start-line", "7", stdin=text, status=1)
    assert (done.stdout, done.stderr[:8]) == ("2 added, 0 already there, 1 refused.\n", "line 9: ")


def test_no_line_of_data_is_taken_for_a_title(
    tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]]
) -> None:
    text = "\n".join([users[0][1], "user", "email", users[1][1]])
    done = tl("members", "add", team.name, "-f", "-", stdin=text, status=1)
    assert done.stdout == "2 added, 0 already there, 2 refused.\n"


def test_a_quotation_mark_that_is_never_closed(tl: Program, team: Group, users: list[tuple[UUID, str]]) -> None:
    text = "note,email\n" + "".join(f'"a,{email}\n' if n == 2 else f"a,{email}\n" for n, (_, email) in enumerate(users))
    said = tl.fails("members", "add", team.name, "-f", "-", stdin=text)
    assert "line 4 has a quotation mark that is never closed" in said


def test_a_pipe_is_read_like_a_file(
    tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]]
) -> None:
    pipe = tl.directory / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("email\n" + "".join(f"{e}\n" for _, e in users),))
    writer.start()
    assert tl("members", "add", team.name, "-f", "pipe").stdout.startswith("4 added")
    writer.join()


def test_where_a_report_can_go_is_known_before_the_work(
    tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]]
) -> None:
    for path, says in (("no/where.csv", "the directory no does not exist"), (".", ". is a directory")):
        assert says in tl.fails("members", "add", team.name, users[0][0], "x", "--report", path)
        assert says in tl.fails("import", "-", "--batch", "b", "--report", path)
    assert members(groups, team) == set()


def test_refused_lines_are_reported(tl: Program, team: Group, users: list[tuple[UUID, str]]) -> None:
    unknown = uuid4()
    lines = ["user_id,note", f'{users[0][0]},"a, b"', "x,y", f"{unknown},", "=1+1,"]
    done = tl("members", "add", team.name, "-f", "-", "--report", "r.csv", stdin="\n".join(lines), status=1)
    assert "r.csv" in done.stderr
    with tl.directory.joinpath("r.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"line": "3", "what": "x,y", "reason": "is neither a user's id nor an e-mail address"},
            {"line": "4", "what": f"{unknown},", "reason": "there is no such user"},
            {"line": "5", "what": "'=1+1,", "reason": "is neither a user's id nor an e-mail address"},
        ]


def test_files_that_say_nothing(tl: Program, team: Group) -> None:
    for text in ("", "\n\n", "email\n", "\ufeffuser_id;email\r\n"):
        assert "The input was empty" in tl("members", "add", team.name, "-f", "-", stdin=text).stdout
    said = tl.fails("members", "add", team.name, "-f", "-", stdin="name,mail\nAnn,ann@example.com\n")
    assert said.startswith("The first line names the columns name, mail; at least one must be of: user_id")
    assert "names the columns foo, bar" in tl.fails("import", "-", "--batch", "b", stdin="foo,bar\n1,2\n")
    # what no address has is refused where it stands, and stops nobody else
    done = tl("members", "add", team.name, "-f", "-", stdin="email\na\0b@example.com\nx@example.com\n", status=1)
    assert done.stdout == "0 added, 0 already there, 2 refused.\n"
    assert "line 2: a\N{REPLACEMENT CHARACTER}b@example.com: is neither" in done.stderr


def test_json_of_many(tl: Program, groups: GroupManager, team: Group, users: list[tuple[UUID, str]], name: str) -> None:
    (ann, _), (bob, bobs), *_ = users
    refused = [{"line": 3, "what": "x", "reason": "is neither a user's id nor an e-mail address"}]
    added = tl.json("members", "add", team.name, ann, bobs, "x", status=1)
    assert added == {"added": 2, "already_there": 0, "refused": refused}
    other = groups.create(f"{name} other")
    moved = tl.json("members", "move", "--from", team.name, "--to", other.name, ann, bob)
    assert moved == {"moved": 2, "refused": []}
    removed = tl.json("members", "remove", other.name, ann, users[2][0], "--yes")
    assert removed == {"removed": 1, "not_there": 1, "refused": []}


@pytest.mark.slow
def test_fifty_thousand_and_on_where_it_stopped(
    tl: Program, groups: GroupManager, team: Group, stack: LocalStack, server: PostgresServer
) -> None:
    ids = stack.create_users(50_000)
    tl.directory.joinpath("users.txt").write_text("".join(f"{id_}\n" for id_ in ids))
    with psycopg.connect(server.url("cli")) as another:
        # who adds one of the third part as well, and lets it wait
        another.execute(
            "insert into public.group_memberships (group_id, user_id) values (%s, %s)", [team.id, ids[2_500]]
        )
        with tl.on_terminal("members", "add", team.name, "-f", "users.txt") as terminal:
            terminal.wait_for("Adding .* 2000/50000")
            terminal.interrupt()
            assert terminal.status() == 130
            assert "━" in terminal.text
            (line,) = map(int, re.findall(r"--start-line (\d+)", terminal.text))
        another.rollback()
    assert 1_000 < line <= groups.usage(team.id).member_count + 1 < 50_000
    assert line % 1_000 == 1  # where a part begins
    done = tl("members", "add", team.name, "-f", "users.txt", "--start-line", line)
    assert sum(int(each.replace(",", "")) for each in re.findall(r"\d[\d,]*", done.stdout)) == 50_001 - line
    assert groups.usage(team.id).member_count == 50_000


def test_an_anchor(tl: Program, groups: GroupManager, name: str, users: list[tuple[UUID, str]]) -> None:
    team = groups.create(name, limits=[Limit(kind="image", max=10, period="month", scope="member", starts="anchor")])
    (ann, _), (bob, _), *_ = users
    tl("members", "add", team.name, ann, bob, "--anchor-at", "2026-01-31T10:00Z")
    assert [each["anchor_at"] for each in tl.json("members", "list", team.name)] == ["2026-01-31T10:00:00Z"] * 2
    assert "anchor 2026-01-31 10:00" in tl("members", "list", team.name).stdout
    (usage,) = tl.json("usage", "--user", ann)
    assert re.search(r"T10:00:00", usage["reset_at"])
    said = tl("members", "anchor", team.name, ann, "2026-02-15T09:00+01:00").stdout
    assert "counted from 15 Feb 2026, 08:00 UTC" in said
    (usage,) = tl.json("usage", "--user", ann)
    assert re.search(r"-15T08:00:00", usage["reset_at"])
    assert tl.json("members", "anchor", team.name, ann, "none")["anchor_at"] is None
    anchors = {member.id: member.anchor_at for member in groups.members(team.id)}
    assert anchors == {ann: None, bob: datetime(2026, 1, 31, 10, tzinfo=UTC)}
    groups.remove_member(team.id, bob)
    assert f"is not in {team.name}. Add them" in tl.fails("members", "anchor", team.name, bob, "none")
    assert "not a date" in tl.fails("members", "anchor", team.name, ann, "someday", status=2)
