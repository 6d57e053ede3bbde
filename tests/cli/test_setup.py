"""`sql`, `init` and `migrate`: the ways into a database, on a model of a hosted one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tokenlimits.sql_files import migrations, one_paste

if TYPE_CHECKING:
    from .conftest import Newer, Program

NAMES = [migration.name for migration in migrations()]


def version(url: str) -> object:
    with psycopg.connect(url) as connection:
        found = connection.execute("select to_regprocedure('public.tokenlimits_version()') is not null").fetchone()
    return found == (True,)


def history(url: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "select version, name, cardinality(statements) from supabase_migrations.schema_migrations order by 1"
        ).fetchall()


class TestSql:
    def test_prints_the_one_paste(self, nowhere: Program) -> None:
        assert nowhere("sql").stdout == one_paste()

    def test_can_be_cut_off(self, nowhere: Program) -> None:
        with (
            subprocess.Popen(
                nowhere.command("sql"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=nowhere.environment
            ) as process,
            subprocess.Popen(["head", "-n", "1"], stdin=process.stdout, stdout=subprocess.PIPE) as head,
        ):
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert head.communicate()[0].startswith(b"-- tokenlimits")
            assert process.stderr.read() == b""


class TestInit:
    def test_copies_what_is_missing_and_leaves_the_rest_alone(self, nowhere: Program) -> None:
        directory = nowhere.directory / "supabase" / "migrations"
        done = nowhere("init")
        assert [path.name for path in sorted(directory.iterdir())] == NAMES
        assert [path.read_bytes() for path in sorted(directory.iterdir())] == [m.read_bytes() for m in migrations()]
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["new"] * len(NAMES)
        assert "supabase db push" in done.stderr
        directory.joinpath(NAMES[0]).write_text("-- ours")
        assert "differs" in nowhere("init").stdout
        assert directory.joinpath(NAMES[0]).read_text() == "-- ours"

    def test_copies_a_later_migration_beside_the_earlier(self, nowhere: Program, newer: Newer) -> None:
        nowhere("init")
        done = newer("init")
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["present"] * len(NAMES) + ["new"]
        directory = nowhere.directory / "supabase" / "migrations"
        assert [path.name for path in sorted(directory.iterdir())] == [*NAMES, newer.MIGRATION]

    def test_tells_how_to_apply_what_is_older_than_your_own(self, nowhere: Program) -> None:
        directory = nowhere.directory / "db"
        directory.mkdir()
        directory.joinpath("29991231000000_yours.sql").write_text("select 1")
        assert "--include-all" in nowhere("init", "--dir", "db").stderr

    def test_where_it_may_not_write(self, nowhere: Program) -> None:
        Path(nowhere.directory, "supabase").write_text("a file")
        assert "supabase" in nowhere.fails("init")


class TestMigrate:
    def test_applies_what_is_pending_and_records_it(self, nowhere: Program, hosted: str) -> None:
        checked = nowhere("migrate", "--check", "--db-url", hosted, status=1)
        assert [line.split() for line in checked.stdout.splitlines()] == [["pending", name] for name in NAMES]
        assert nowhere.json("migrate", "--check", "--db-url", hosted, status=1) == {"pending": NAMES}
        assert not version(hosted)
        done = nowhere("migrate", DATABASE_URL=hosted)
        assert [line.split() for line in done.stdout.splitlines()] == [["applied", name] for name in NAMES]
        assert version(hosted)
        parts = [name.removesuffix(".sql").partition("_") for name in NAMES]
        assert history(hosted) == [(number, "".join(rest), 1) for number, _, rest in parts]
        assert "Nothing is pending" in nowhere("migrate", SUPABASE_DB_URL=hosted).stdout
        assert nowhere.json("migrate", "--db-url", hosted) == {"applied": []}
        nowhere("migrate", "--check", "--db-url", hosted)

    def test_applies_a_later_one_alone(self, nowhere: Program, newer: Newer, hosted: str) -> None:
        nowhere("migrate", "--db-url", hosted)
        assert newer("migrate", "--check", "--db-url", hosted, status=1).stdout.split() == ["pending", newer.MIGRATION]
        assert newer.json("migrate", "--db-url", hosted) == {"applied": [newer.MIGRATION]}
        assert len(history(hosted)) == len(NAMES) + 1
        newer("migrate", "--check", "--db-url", hosted)
        assert "Nothing is pending" in nowhere("migrate", "--check", "--db-url", hosted).stdout

    def test_applies_all_at_once(self, newer: Newer, hosted: str) -> None:
        assert newer.json("migrate", "--db-url", hosted) == {"applied": [*NAMES, newer.MIGRATION]}

    def test_takes_everything_back_that_fails(self, nowhere: Program, hosted: str) -> None:
        with psycopg.connect(hosted) as connection:
            connection.execute("create table public.user_groups (id text)")
        assert "PostgreSQL refused" in nowhere.fails("migrate", "--db-url", hosted)
        assert not version(hosted)
        with psycopg.connect(hosted) as connection:
            assert connection.execute("select to_regnamespace('supabase_migrations')").fetchone() == (None,)

    def test_several_at_once_apply_it_once(self, nowhere: Program, hosted: str) -> None:
        command = nowhere.command("migrate", "--db-url", hosted)
        processes = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=nowhere.environment)
            for _ in range(3)
        ]
        assert [process.communicate()[1] for process in processes] == [b""] * 3
        assert len(history(hosted)) == len(NAMES)

    @pytest.mark.parametrize("url", ["", "postgresql//a:hush@b", "host", "postgresql://a:hush@127.0.0.1:1/x"])
    def test_says_what_is_wrong_with_a_url_and_never_its_password(self, nowhere: Program, url: str) -> None:
        for debug in ([], ["--debug"]):
            done = nowhere("migrate", *debug, "--db-url", url, status=1)
            assert "database" in done.stderr
            assert "hush" not in done.stdout + done.stderr

    def test_asks_for_a_url(self, nowhere: Program) -> None:
        assert "--db-url" in nowhere.fails("migrate")
