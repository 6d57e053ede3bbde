"""`sql` and `init`: the SQL as text, and as migrations of a project."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tokenlimits.sql_files import migrations, one_paste, uninstall

from .conftest import Newer, Program

NAMES = [migration.name for migration in migrations()]


class TestSql:
    def test_prints_the_one_paste(self, nowhere: Program) -> None:
        assert nowhere("sql").stdout == one_paste()

    def test_prints_it_for_another_schema(self, nowhere: Program) -> None:
        assert one_paste("limits") != one_paste()
        assert nowhere("sql", "--schema", "limits").stdout == one_paste("limits")
        assert nowhere("sql", TOKENLIMITS_SCHEMA="limits").stdout == one_paste("limits")
        nowhere.directory.joinpath(".env").write_text("TOKENLIMITS_SCHEMA=limits\n")
        assert nowhere("sql").stdout == one_paste("limits")
        assert nowhere("sql", "--schema", "public").stdout == one_paste()

    def test_prints_what_uninstalls(self, nowhere: Program) -> None:
        assert "drop schema" in uninstall()
        assert nowhere("sql", "--uninstall").stdout == uninstall()

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


@pytest.mark.parametrize("name", ["auth", "tokenlimits", "pg_temp", "Limits", "my-limits", "x" * 64])
def test_a_schema_that_it_may_not_be(nowhere: Program, name: str) -> None:
    for command in (["sql"], ["init"], ["migrate", "--db-url", "postgresql://127.0.0.1:1/x"]):
        says = nowhere.fails(*command, "--schema", name, status=2)
        assert "'--schema'" in says
        assert name in says
        says = nowhere.fails(*command, status=2, TOKENLIMITS_SCHEMA=name)
        assert "TOKENLIMITS_SCHEMA" in says
        assert name in says
    assert list(nowhere.directory.iterdir()) == []


def test_an_env_file_that_is_no_text(nowhere: Program) -> None:
    nowhere.directory.joinpath(".env").write_bytes(b"TOKENLIMITS_SCHEMA=\xff\xfe\n")
    assert ".env is not UTF-8" in nowhere.fails("sql", status=2)


class TestInit:
    def test_copies_what_is_missing_and_leaves_the_rest_alone(self, nowhere: Program) -> None:
        directory = nowhere.directory / "supabase" / "migrations"
        done = nowhere("init")
        assert [path.name for path in sorted(directory.iterdir())] == NAMES
        assert [path.read_text() for path in sorted(directory.iterdir())] == [m.text for m in migrations()]
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["new"] * len(NAMES)
        assert "supabase db push" in done.stderr
        assert {line.split()[0] for line in nowhere("init").stdout.splitlines()} == {"present"}
        directory.joinpath(NAMES[0]).write_text("-- ours")
        done = nowhere("init")
        assert done.stdout.startswith("differs ")
        assert "was kept" in done.stderr
        assert directory.joinpath(NAMES[0]).read_text() == "-- ours"

    def test_copies_those_of_another_schema(self, nowhere: Program) -> None:
        nowhere("init", "--schema", "limits", "--dir", "limits")
        nowhere("init", "--dir", "by_name", TOKENLIMITS_SCHEMA="limits")
        for directory in ("limits", "by_name"):
            paths = sorted(nowhere.directory.joinpath(directory).iterdir())
            assert [path.read_text() for path in paths] == [m.text for m in migrations("limits")]

    @pytest.mark.parametrize(("there", "asked"), [("limits", "public"), ("public", "limits"), ("public", "quotas")])
    def test_refuses_those_of_another_schema(self, newer: Newer, there: str, asked: str) -> None:
        """In one history they are the same versions, and a later one of another schema would not fit."""
        directory = newer.directory / "supabase" / "migrations"
        Program(newer.directory, {})("init", "--schema", there)
        before = {path.name: path.read_text() for path in directory.iterdir()}
        says = newer("init", "--schema", asked, status=1).stderr
        assert f"supabase/migrations/{NAMES[0]} is for schema {there}; pass --schema {there}" in says
        assert {path.name: path.read_text() for path in directory.iterdir()} == before

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

    def test_finds_the_project_that_it_is_in(self, nowhere: Program) -> None:
        project = nowhere.directory
        below = project / "apps" / "web"
        below.mkdir(parents=True)
        project.joinpath("supabase").mkdir()
        project.joinpath("supabase", "config.toml").write_text('project_id = "here"\n')
        assert f"../../supabase/migrations/{NAMES[0]}" in Program(below, {})("init").stdout
        assert [path.name for path in sorted(project.joinpath("supabase", "migrations").iterdir())] == NAMES
        assert list(below.iterdir()) == []

    def test_where_it_may_not_write(self, nowhere: Program) -> None:
        Path(nowhere.directory, "supabase").write_text("a file")
        assert "supabase" in nowhere.fails("init")
