"""`export` and `import`: what goes out comes in again, in little memory, and is never counted twice."""

from __future__ import annotations

import csv
import io
import json
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from tokenlimits import GroupManager, TokenLimits
from tokenlimits.models import Group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenlimits.local import LocalStack

    from .conftest import Program

NOW = datetime.now(UTC).replace(microsecond=0)
LEDGER = """
insert into public.generation_usage (id, group_id, user_id, kind, cost, status, metadata, created_at)
select gen_random_uuid(), '{group}', '{user}', 'image', 1, 'committed', '{{"n": 1}}',
  now() - make_interval(secs => (n / 3) + 10)
from generate_series(1, {count}) as n
"""


@pytest.fixture
def team(groups: GroupManager, name: str) -> Group:
    return groups.create(name, limits={"image": None, "video": None}, timezone="Asia/Tokyo")


@pytest.fixture
def user(groups: GroupManager, team: Group, stack: LocalStack) -> UUID:
    user = stack.create_user(f"{team.id}@example.com")
    groups.add_member(team.id, user.id)
    return user.id


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_ledger(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    for days, kind in ((3, "image"), (2, "video"), (1, "image")):
        key = f'=HYPERLINK("{days}")'
        limits.record(user, kind, days, created_at=NOW - timedelta(days=days), idempotency_key=key, metadata={"a": 1})
    lines = [json.loads(line) for line in tl("export", "--format", "jsonl", "--group", team.name).stdout.splitlines()]
    assert [(line["kind"], line["cost"], line["group"], line["email"]) for line in lines] == [
        ("image", 3, team.name, f"{team.id}@example.com"),
        ("video", 2, team.name, f"{team.id}@example.com"),
        ("image", 1, team.name, f"{team.id}@example.com"),
    ]
    assert [datetime.fromisoformat(line["created_at"]) for line in lines] == [
        NOW - timedelta(days=n) for n in (3, 2, 1)
    ]
    assert lines[0]["idempotency_key"] == '=HYPERLINK("3")'
    assert lines[0]["metadata"] == {"a": 1}

    found = rows(tl("export", "--group", team.id).stdout)
    assert [row["idempotency_key"] for row in found] == [f'\'=HYPERLINK("{days}")' for days in (3, 2, 1)]
    assert [row["metadata"] for row in found] == ['{"a": 1}'] * 3
    assert len(rows(tl("export", "--user", user, "--kind", "image").stdout)) == 2
    since, until = NOW - timedelta(days=2), NOW - timedelta(days=1)
    done = tl("export", "--user", user, "--since", since.isoformat(), "--until", until.isoformat(), "-o", "out.csv")
    assert done.stdout == ""
    assert "1 row in out.csv" in done.stderr
    assert [row["kind"] for row in rows(tl.directory.joinpath("out.csv").read_text())] == ["video"]


def test_a_file_appears_when_it_is_whole(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    limits.track(user, "image")
    tl.directory.joinpath("out.csv").write_text("what was there")
    tl.fails("export", "-o", "out.csv", "--kind", "Image")
    assert [path.name for path in tl.directory.iterdir()] == ["out.csv"]
    assert tl.directory.joinpath("out.csv").read_text() == "what was there"
    assert "1 row in /dev/null" in tl("export", "--group", team.name, "-o", "/dev/null").stderr
    assert not Path("/dev/null").is_file()


def test_nobody_else_reads_or_redirects_a_file(tl: Program, team: Group) -> None:
    tl.directory.joinpath("precious").write_text("precious")
    tl.directory.joinpath("tty").symlink_to("/dev/zero")
    for name in ("out.csv", "out.csv.unfinished"):
        tl.directory.joinpath(name).symlink_to("precious")
    for name in ("out.csv", "tty"):
        tl("export", "--group", team.name, "-o", name)
        path = tl.directory / name
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tl.directory.joinpath("precious").read_text() == "precious"


def test_for_excel(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    limits.track(user, "image")
    tl("export", "--group", team.name, "-o", "out.csv", "--excel")
    assert tl.directory.joinpath("out.csv").read_bytes().startswith(b"\xef\xbb\xbfid,created_at,")
    assert tl.json("import", "out.csv") == {"already_there": 1, "refused": []}
    assert "--excel is for CSV" in tl.fails("export", "--excel", "--format", "jsonl", status=2)


def test_no_key_moves_the_cursor_of_a_terminal(tl: Program, team: Group, user: UUID, limits: TokenLimits) -> None:
    limits.track(user, "image", idempotency_key="a\x1b[31mb\x9b2Jc")
    with tl.on_terminal("export", "--group", team.name) as terminal:
        assert terminal.status() == 0
        assert "a\ufffd[31mb\ufffd2Jc" in terminal.text
        assert "\x1b[31m" not in terminal.raw
    assert "a\x1b[31mb" in tl("export", "--group", team.name).stdout


def test_semicolons_come_back(tl: Program, groups: GroupManager, team: Group, user: UUID, limits: TokenLimits) -> None:
    metadata = {"a;=b": ";'=1", "c": "d;@e"}
    limits.track(user, "image", idempotency_key="a;=1", metadata=metadata)
    text = tl("export", "--group", team.name).stdout
    assert ";=" not in text
    stray = text.replace(text.splitlines()[1].split(",")[0], "").replace("a;'=1", "b;'=1")
    assert tl.json("import", "-", "--batch", "b", stdin=stray) == {"recorded": 1, "refused": []}
    found = {usage.idempotency_key: usage.metadata for usage in groups.export_usage(team.id)}
    assert found == {"a;=1": metadata, "b;=1": metadata}


def test_sums(tl: Program, groups: GroupManager, team: Group, user: UUID, limits: TokenLimits) -> None:
    for hours in (0, 1, 30, 24 * 90):
        limits.record(user, "image", 2, created_at=NOW - timedelta(hours=hours))
    found = rows(tl("export", "--by", "month", "--group", team.name).stdout)
    assert list(found[0]) == ["group_id", "group", "bucket", "kind", "used", "generations"]
    assert sum(int(row["used"]) for row in found) == 8  # from the beginning, as the ledger
    assert {(row["group"], row["kind"]) for row in found} == {(team.name, "image")}
    assert {row["bucket"][7:] for row in found} == {"-01T00:00:00+09:00"}  # as the team writes it
    yesterday = (NOW - timedelta(days=1)).isoformat()
    found = rows(tl("export", "--by", "day", "--group", team.name, "--kind", "image", "--since", yesterday).stdout)
    assert sum(int(row["used"]) for row in found) in (4, 6)  # whole days
    assert "--user" in tl.fails("export", "--by", "day", "--user", user, status=2)
    groups.delete(team.id)  # what it used stays
    everything = map(json.loads, tl("export", "--by", "day", "--format", "jsonl").stdout.splitlines())
    gone = [line for line in everything if line["group_id"] == str(team.id)]
    assert sum(line["used"] for line in gone) == 8
    assert {line["group"] for line in gone} == {None}


def test_without_time_zones_no_month_is_another(
    tl: Program, groups: GroupManager, team: Group, user: UUID, limits: TokenLimits
) -> None:
    limits.track(user, "image")
    script = """
import sys
sys.modules["tzdata"] = None
from tokenlimits.cli import main
sys.exit(main(sys.argv[1:]))
"""
    for command in (["export", "--by", "month", "--group", str(team.id)], ["history", str(team.id), "--by", "month"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *command],
            env=tl.environment | {"PYTHONTZPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert "This system has no data on the time zone Asia/Tokyo. Run: pip install" in done.stderr


def test_nothing_is_written_before_there_is_an_answer(tl: Program) -> None:
    for arguments in ([], ["--by", "day"]):
        done = tl("export", *arguments, status=1, SUPABASE_SECRET_KEY="sb_secret_of_another_project")
        assert done.stdout == ""
    assert "the directory nowhere does not exist" in tl.fails("export", "-o", "nowhere/usage.csv")


def test_whoever_reads_may_go_away(tl: Program, stack: LocalStack, team: Group, user: UUID) -> None:
    stack.sql(LEDGER.format(group=team.id, user=user, count=5_000))
    with subprocess.Popen(
        tl.command("export", "--group", team.id),
        env=tl.environment,
        cwd=tl.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline().startswith("id,created_at")
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 1


def test_stable_while_others_write(
    groups: GroupManager, limits: TokenLimits, stack: LocalStack, team: Group, user: UUID
) -> None:
    """Every row of before comes once, whatever happens between two pages; no row comes twice."""
    stack.sql(LEDGER.format(group=team.id, user=user, count=5_000))
    before = {
        row["id"] for row in stack.sql("select id from public.generation_usage where group_id = $1::uuid", str(team.id))
    }
    seen: list[str] = []
    for number, usage in enumerate(groups.export_usage(team.id)):
        seen.append(str(usage.id))
        if number % 1_000 == 0:
            limits.record(user, "image", created_at=NOW - timedelta(minutes=number))
            limits.track(user, "image")
    assert len(seen) == len(set(seen))
    assert before <= set(seen)
    assert len(seen) < len(before) + 10


def test_all_groups_also_those_that_are_gone(
    groups: GroupManager, limits: TokenLimits, stack: LocalStack, name: str
) -> None:
    (user,) = stack.create_users(1)
    made = [groups.create(f"{name} {number}", limits={"image": None}) for number in range(5)]
    for group in made:
        groups.add_member(group.id, user)
        stack.sql(LEDGER.format(group=group.id, user=user, count=900))
    groups.delete(made[0].id)
    counted: dict[UUID, int] = dict.fromkeys([group.id for group in made], 0)
    for usage in groups.export_usage():
        if usage.group.id in counted:
            counted[usage.group.id] += 1
            assert (usage.group.name is None) is (usage.group.id == made[0].id)
    assert set(counted.values()) == {900}


@pytest.mark.slow
def test_little_memory_for_many_rows(tl: Program, stack: LocalStack, team: Group, user: UUID) -> None:
    """100,000 rows are 40 MB of JSON; what it takes beyond 10 rows must not be a part of that."""
    stack.sql(LEDGER.format(group=team.id, user=user, count=10))
    script = """
import resource, sys
from tokenlimits.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""

    def peak() -> int:
        command = [sys.executable, "-c", script, "export", "--group", str(team.id), "--format", "jsonl"]
        # by a shell, which is small: on Linux a process begins with the peak of the one that started it
        done = subprocess.run(
            ["sh", "-c", '"$@"; exit $?', "sh", *command],
            capture_output=True,
            text=True,
            check=True,
            env=tl.environment,
        )
        lines.append(done.stdout.count("\n"))
        return int(done.stderr.split()[-1])

    lines: list[int] = []
    few = peak()
    stack.sql(LEDGER.format(group=team.id, user=user, count=100_000))
    many = peak()
    assert lines == [10, 100_010]
    assert many < few + 40_000  # kB
    assert many < 200_000


@pytest.fixture
def poison(stack: LocalStack, team: Group, user: UUID) -> Iterator[None]:
    """Rows of which two can't be read, as somebody's restore may leave them."""
    values = ", ".join(
        f"('{UUID(int=n)}', '{team.id}', '{user}', 'image', 1, 'committed', '{at}', '{settled_at}')"
        for n, at, settled_at in (
            (0xBAD0, "2026-01-01", "infinity"),
            (0xBAD1, "2026-01-02", "2026-01-03"),
            (0xBAD2, "0044-03-15 BC", "2026-01-03"),
        )
    )
    columns = "id, group_id, user_id, kind, cost, status, created_at, settled_at"
    stack.sql(f"insert into public.generation_usage ({columns}) values {values}")
    yield
    stack.sql(f"delete from public.generation_usage where group_id = '{team.id}'")


@pytest.mark.usefixtures("poison")
def test_what_no_reader_knows_is_left_out(tl: Program, team: Group) -> None:
    done = tl("export", "--group", team.name)
    assert [row["created_at"] for row in rows(done.stdout)] == ["2026-01-02T00:00:00Z"]
    for id_, value in (
        (UUID(int=0xBAD0), "settled_at is 'infinity'"),
        (UUID(int=0xBAD2), "created_at is '0044-03-15T00:00:00+00:00 BC'"),
    ):
        assert f"Left out: UsageRecord {id_} can't be read: {value}." in done.stderr


@pytest.mark.parametrize("number", ["1712010112345", "1767225600", "17672256000000", "1701012345"])
def test_a_number_is_no_year(tl: Program, number: str) -> None:
    assert "not a date or time like" in tl.fails("export", "--since", number, status=2)


class TestImport:
    def test_moments_that_cannot_be(self, tl: Program, groups: GroupManager, user: UUID) -> None:
        bad = ["1712010112345", "1767225600", "0001-01-01", "9999-12-31T23:59:59.999999Z", "10000-01-01", "infinity"]
        lines = [f"{UUID(int=n)},{user},image,{moment}" for n, moment in enumerate(bad)]
        tl.directory.joinpath("past.csv").write_text("\n".join(["id,user_id,kind,created_at", *lines]))
        found = tl.json("import", "past.csv", status=1)
        assert [refused["line"] for refused in found["refused"]] == [2, 3, 4, 5, 6, 7]
        assert all("created_at" in refused["reason"] for refused in found["refused"])
        assert list(groups.export_usage(user_id=user)) == []

    def test_what_was_exported(self, tl: Program, groups: GroupManager, team: Group, user: UUID, name: str) -> None:
        other = groups.create(f"{name} other", limits={"image": 5})
        text = (
            "user_id,email,kind,cost,created_at,group,idempotency_key,metadata\r\n"
            f'{user},,image,3,2026-01-02 03:04:05+00:00,{team.name},\'=1,"{{""a"": 1}}"\r\n'
            f",{team.id}@EXAMPLE.com,video,,2026-01-03,,,\r\n"
            f"{user},,image,9,2026-01-04T00:00:00Z,{other.name.upper()},,\r\n"
        )
        tl.directory.joinpath("past.csv").write_text(text)
        assert tl("import", "past.csv").stdout == "3 recorded, 0 refused.\n"
        assert tl.json("import", "past.csv") == {"already_there": 3, "refused": []}
        found = [(u.kind, u.cost, u.group.id, u.idempotency_key) for u in groups.export_usage(user_id=user)]
        assert [each[:3] for each in found] == [("image", 3, team.id), ("video", 1, team.id), ("image", 9, other.id)]
        assert found[0][3] == "=1"
        assert groups.usage(other.id).limits[0].used == 9

    def test_an_export_changes_nothing(
        self, tl: Program, groups: GroupManager, team: Group, user: UUID, limits: TokenLimits
    ) -> None:
        limits.track(user, "image", cost=3, idempotency_key="job-1")
        limits.track(user, "image", cost=3)
        limits.record(user, "image", cost=2, created_at=NOW - timedelta(days=1))
        given_back = [limits.track(user, "video", cost=5).usage_id, limits.reserve(user, "video", cost=5).usage_id]
        groups.refund(given_back[0])
        limits.release(given_back[1])
        limits.commit(limits.reserve(user, "video", cost=8).usage_id, cost=6)
        limits.reserve(user, "video", cost=4)
        before = [limit.used for limit in groups.usage(team.id).limits]
        assert before == [8, 10]
        tl("export", "--group", team.name, "-o", "ours.csv")
        assert tl.json("import", "ours.csv") == {"already_there": 4, "given_back": 2, "not_settled": 1, "refused": []}
        # without ids, a key that was tracked with is found
        found = [row | {"id": ""} for row in rows(tl.directory.joinpath("ours.csv").read_text())]
        written = io.StringIO()
        writer = csv.DictWriter(written, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in found if row["idempotency_key"])
        counts = tl.json("import", "-", "--batch", "without ids", stdin=written.getvalue())
        assert (counts["already_there"], counts["refused"]) == (4, [])
        assert [limit.used for limit in groups.usage(team.id).limits] == before

    def test_another_database_takes_an_export(self, tl: Program, groups: GroupManager, team: Group, user: UUID) -> None:
        elsewhere = "0197f0a0-0000-7000-8000-00000000"
        header = "id,created_at,group,user_id,kind,cost,status\n"
        lines = [
            f"{elsewhere}{number:04},2026-01-02T03:04:05Z,{team.name},{user},image,2,{status}\n"
            for number, status in enumerate(["committed", "committed", "refunded", "reserved"])
        ]
        text = header + "".join(lines)
        counts = tl.json("import", "-", "--batch", "b", stdin=text)
        assert counts == {"recorded": 2, "given_back": 1, "not_settled": 1, "refused": []}
        assert tl.json("import", "-", "--batch", "b", stdin=text)["already_there"] == 2
        assert groups.usage(team.id).limits[0].used == 4

    def test_a_changed_file_counts_nothing_twice(
        self, tl: Program, groups: GroupManager, team: Group, user: UUID
    ) -> None:
        def counts(text: str, *words: str) -> dict[str, Any]:
            found: dict[str, Any] = tl.json("import", "-", "--batch", "b", *words, stdin=text)
            return {name: count for name, count in found.items() if name != "refused"}

        line = f"{user},image,2,2026-01-02T03:04:05Z"
        other = f"{user},image,3,2026-01-02T03:04:05Z"
        header = "user_id,kind,cost,created_at"
        first = "\n".join([header, f"{user},image,zero,2026-01-02", line, line, other])
        tl("import", "-", "--batch", "b", stdin=first, status=1)
        assert groups.usage(team.id).limits[0].used == 7
        # the refused line is gone, there is a column more, a moment is written otherwise, and a third such line
        cells = f"{user},image,2,2026-01-02 04:04:05+01:00"
        again = "\n".join([header + ",note", *[f"{line},x", f"{cells},y", f"{other},z", f"{line},new"]])
        assert counts(again) == {"already_there": 3, "recorded": 1}
        assert counts(again, "--start-line", "4") == {"already_there": 2}
        assert groups.usage(team.id).limits[0].used == 9

    def test_a_column_that_is_there_twice(self, tl: Program, user: UUID) -> None:
        text = f"user_id,kind,created_at,kind\n{user},image,2026-01-02,video\n"
        assert "kind twice" in tl("import", "-", "--batch", "b", stdin=text, status=1).stderr

    def test_what_others_export(self, tl: Program, groups: GroupManager, team: Group, user: UUID) -> None:
        text = (
            "Usage\n\nuser_id;Customer Email;Kind;Cost;Created At\n"
            f"cus_1;{team.id}@example.com;image;2;2026-01-02\n{user};;image;3;2026-01-02\n"
        )
        content = text.encode("utf-16")
        assert tl("import", "-", "--batch", "b", stdin=content).stdout == "2 recorded, 0 refused.\n"
        assert tl("import", "-", "--batch", "b", stdin=content).stdout == "2 already there, 0 refused.\n"
        assert groups.usage(team.id).limits[0].used == 5

    def test_an_unknown_status_is_refused(self, tl: Program, user: UUID) -> None:
        text = f"user_id,kind,created_at,status\n{user},image,2026-01-02,failed\n"
        assert "'failed' is none of committed" in tl("import", "-", "--batch", "b", stdin=text, status=1).stderr

    def test_what_is_refused(self, tl: Program, team: Group, user: UUID) -> None:
        lines: list[tuple[str, Any]] = [
            (f"{user},image,1,2026-01-02", None),
            (f"{user},Image,1,2026-01-02", "kind"),
            (f"{user},image,x,2026-01-02", "cost: 'x'"),
            (f"{user},image,1,soon", "created_at"),
            (f"{user},image,1,2999-01-01", "created_at"),
            (f"{user},,1,2026-01-02", "kind"),
            ("ann,image,1,2026-01-02", "neither"),
            (f"{user},image,1,2026-01-02,no such group", "no such group"),
            (f"{user},image,1,2026-01-02,,[1]", "must be a JSON object"),
        ]
        text = "user_id,kind,cost,created_at,group,metadata\n" + "\n".join(line for line, _ in lines)
        done = tl("import", "-", "--batch", "b", "--group", team.name, "--report", "r.csv", stdin=text, status=1)
        assert done.stdout == f"1 recorded, {len(lines) - 1} refused.\n"
        refused = rows(tl.directory.joinpath("r.csv").read_text())
        assert [int(row["line"]) for row in refused] == list(range(3, len(lines) + 2))
        for row, (line, says) in zip(refused, lines[1:], strict=True):
            assert says in row["reason"], line

    def test_a_file_without_names(self, tl: Program, user: UUID) -> None:
        done = tl("import", "-", "--batch", "b", stdin=f"{user}\n", status=1)
        assert "first line" in done.stderr
        assert "--batch" in tl.fails("import", "-")
        assert "nowhere" in tl.fails("import", "nowhere.csv")
