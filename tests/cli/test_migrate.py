"""`migrate`: into a database, on a model of a hosted one, and into the project's files."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import psycopg
import pytest

from tokenlimits.sql_files import migrations, uninstall

from .conftest import Newer, Program

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [migration.name for migration in migrations()]
# what the advisory lock of `migrate` is
LOCK = "select pg_advisory_xact_lock(1953459053)"
SCHEMAS = pytest.mark.parametrize("home", ["public", "limits"])


def ask(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def where(url: str) -> list[object]:
    """List the schemas that have tokenlimits."""
    query = "select pronamespace::regnamespace::text from pg_proc where proname = 'track_generation' order by 1"
    return [schema for (schema,) in ask(url, query) if schema != "tokenlimits"]


def history(url: str) -> list[tuple[object, ...]]:
    return ask(
        url, "select version, name, cardinality(statements) from supabase_migrations.schema_migrations order by 1"
    )


def started(program: Program, *arguments: str) -> subprocess.Popen[bytes]:
    command = program.command(*arguments)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=program.directory, env=program.environment, stdout=pipe, stderr=pipe)


def make_project(directory: Path) -> Path:
    """Make a Supabase project; return where its migrations go."""
    directory.joinpath("supabase").mkdir()
    directory.joinpath("supabase", "config.toml").write_text('project_id = "here"\n')
    return directory / "supabase" / "migrations"


class TestApplies:
    def test_what_is_pending_and_records_it(self, nowhere: Program, hosted: str) -> None:
        checked = nowhere("migrate", "--check", "--db-url", hosted, status=1)
        assert [line.split() for line in checked.stdout.splitlines()] == [["pending", name] for name in NAMES]
        assert nowhere.json("migrate", "--check", "--db-url", hosted, status=1) == {"pending": NAMES}
        assert where(hosted) == []
        done = nowhere("migrate", DATABASE_URL=hosted)
        assert [line.split() for line in done.stdout.splitlines()] == [["applied", name] for name in NAMES]
        assert where(hosted) == ["public"]
        parts = [name.removesuffix(".sql").partition("_") for name in NAMES]
        assert history(hosted) == [(number, "".join(rest), 1) for number, _, rest in parts]
        assert "Nothing is pending" in nowhere("migrate", SUPABASE_DB_URL=hosted).stdout
        assert nowhere.json("migrate", "--db-url", hosted) == {"applied": []}
        nowhere("migrate", "--check", "--db-url", hosted)

    @pytest.mark.slow
    def test_a_later_one_alone(self, nowhere: Program, newer: Newer, hosted: str) -> None:
        nowhere("migrate", "--db-url", hosted)
        assert newer("migrate", "--check", "--db-url", hosted, status=1).stdout.split() == ["pending", newer.MIGRATION]
        assert newer.json("migrate", "--db-url", hosted) == {"applied": [newer.MIGRATION]}
        assert len(history(hosted)) == len(NAMES) + 1
        newer("migrate", "--check", "--db-url", hosted)
        assert "Nothing is pending" in nowhere("migrate", "--check", "--db-url", hosted).stdout

    def test_all_at_once(self, newer: Newer, hosted: str) -> None:
        assert newer.json("migrate", "--db-url", hosted) == {"applied": [*NAMES, newer.MIGRATION]}

    @pytest.mark.slow
    def test_once_when_several_run(self, nowhere: Program, hosted: str) -> None:
        make_project(nowhere.directory)
        command = nowhere.command("migrate", "--db-url", hosted)
        processes = [
            subprocess.Popen(
                command,
                cwd=nowhere.directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=nowhere.environment,
            )
            for _ in range(3)
        ]
        said = [process.communicate()[0].decode() for process in processes]
        assert [process.returncode for process in processes] == [0] * 3, said
        assert len(history(hosted)) == len(NAMES)

    def test_in_another_schema(self, nowhere: Program, hosted: str) -> None:
        ask(hosted, "create table public.user_groups (id bigint, name text)")
        nowhere("migrate", "--schema", "limits", "--db-url", hosted)
        assert where(hosted) == ["limits"]
        assert "Nothing is pending" in nowhere("migrate", "--db-url", hosted, TOKENLIMITS_SCHEMA="limits").stdout
        found = ask(hosted, "select relrowsecurity from pg_class where oid = 'public.user_groups'::regclass")
        assert found == [(False,)]

    @pytest.mark.parametrize("comment", ["null", "'of the app'"])
    def test_beside_a_function_of_the_project_of_the_same_name(
        self, nowhere: Program, hosted: str, comment: str
    ) -> None:
        own = "app.tokenlimits_version()"
        ask(hosted, f"create schema app; create function {own} returns integer language sql return 1")
        ask(hosted, f"comment on function {own} is {comment}")
        nowhere("migrate", "--db-url", hosted)
        assert where(hosted) == ["public"]
        assert "Nothing is pending" in nowhere("migrate", "--db-url", hosted).stdout

    @pytest.mark.parametrize("options", [[], ["--reapply"]])
    def test_in_one_transaction_with_the_history(self, nowhere: Program, hosted: str, options: list[str]) -> None:
        """Whatever begin and commit are in the files."""
        make_project(nowhere.directory)
        assert all("\nbegin;\n" in each.text and "\ncommit;\n" in each.text for each in migrations())
        ask(hosted, "create schema supabase_migrations")
        ask(hosted, "create table supabase_migrations.schema_migrations (version text check (false))")
        says = nowhere.fails("migrate", *options, "--db-url", hosted)
        assert "PostgreSQL refused (23514)" in says
        assert where(hosted) == []


class TestRefuses:
    def test_names_that_are_taken(self, nowhere: Program, hosted: str) -> None:
        files = make_project(nowhere.directory)
        ask(hosted, "create table public.user_groups (id text)")
        for options in ([], ["--reapply"]):
            says = nowhere.fails("migrate", "--db-url", hosted, *options)
            assert "public.user_groups" in says
            assert "--schema" in says
            assert "Nothing was changed" in says
        assert where(hosted) == []
        assert not files.exists()
        assert ask(hosted, "select to_regnamespace('supabase_migrations'), to_regnamespace('tokenlimits')") == [
            (None, None)
        ]

    def test_what_postgresql_refuses(self, nowhere: Program, hosted: str) -> None:
        make_project(nowhere.directory)
        ask(hosted, "create schema supabase_migrations; create view supabase_migrations.schema_migrations as select 1")
        says = nowhere.fails("migrate", "--db-url", hosted)
        assert "PostgreSQL refused (42703)" in says
        assert says.count("\n") == 0

    @pytest.mark.parametrize("options", [[], ["--check"], ["--reapply"]])
    def test_a_schema_beside_the_one_that_it_is_in(self, nowhere: Program, hosted: str, options: list[str]) -> None:
        files = make_project(nowhere.directory)
        nowhere("migrate", "--schema", "limits", "--dir", "elsewhere", "--db-url", hosted)
        says = nowhere.fails("migrate", *options, "--db-url", hosted)
        assert "in schema limits, not in public" in says
        assert "TOKENLIMITS_SCHEMA" in says
        assert where(hosted) == ["limits"]
        assert not files.exists()

    @pytest.mark.parametrize("options", [[], ["--check"], ["--reapply"]])
    @pytest.mark.parametrize(("there", "asked"), [("limits", "public"), ("public", "limits")])
    def test_a_schema_beside_that_of_the_files(
        self, nowhere: Program, hosted: str, there: str, asked: str, options: list[str]
    ) -> None:
        """The next `supabase db reset` would install it in the other one."""
        nowhere("init", "--schema", there)
        says = nowhere.fails("migrate", "--schema", asked, *options, "--db-url", hosted)
        assert f"supabase/migrations/{NAMES[0]} is for schema {there}; pass --schema {there}" in says
        assert where(hosted) == []
        assert ask(hosted, "select to_regnamespace('supabase_migrations')") == [(None,)]

    def test_to_check_and_to_apply_again(self, nowhere: Program) -> None:
        assert "--reapply" in nowhere.fails("migrate", "--check", "--reapply", "--db-url", "postgresql://x", status=2)

    @pytest.mark.parametrize("url", ["", "postgresql//a:hush@b", "host", "postgresql://a:hush@127.0.0.1:1/x"])
    def test_a_wrong_url_without_its_password(self, nowhere: Program, url: str) -> None:
        for debug in ([], ["--debug"]):
            done = nowhere("migrate", *debug, "--db-url", url, status=1)
            assert "database" in done.stderr
            assert "hush" not in done.stdout + done.stderr

    def test_to_guess_a_url(self, nowhere: Program) -> None:
        assert "--db-url" in nowhere.fails("migrate")


class TestFiles:
    @SCHEMAS
    def test_are_written_where_a_project_is(self, nowhere: Program, hosted: str, home: str) -> None:
        files = make_project(nowhere.directory)
        nowhere("migrate", "--check", "--schema", home, "--db-url", hosted, status=1)
        assert not files.exists()
        done = nowhere("migrate", "--schema", home, "--db-url", hosted)
        assert [line.split() for line in done.stdout.splitlines()] == [["applied", name] for name in NAMES]
        assert [line.split()[1] for line in done.stderr.splitlines()] == [f"supabase/migrations/{n}:" for n in NAMES]
        assert [path.name for path in sorted(files.iterdir())] == NAMES
        assert [path.read_text() for path in sorted(files.iterdir())] == [m.text for m in migrations(home)]
        assert nowhere("migrate", "--schema", home, "--db-url", hosted).stderr == ""

    def test_are_written_later_too(self, nowhere: Program, hosted: str) -> None:
        """By whoever applied them elsewhere, before the project was here."""
        nowhere("migrate", "--db-url", hosted)
        files = nowhere.directory / "supabase" / "migrations"
        files.mkdir(parents=True)
        done = nowhere("migrate", "--db-url", hosted)
        assert "Nothing is pending" in done.stdout
        assert [path.name for path in sorted(files.iterdir())] == NAMES

    def test_go_where_they_should(self, nowhere: Program, hosted: str) -> None:
        nowhere("migrate", "--dir", "db/here", "--db-url", hosted)
        assert sorted(path.name for path in nowhere.directory.joinpath("db", "here").iterdir()) == NAMES

    def test_of_others_are_left_alone(self, nowhere: Program, hosted: str) -> None:
        files = make_project(nowhere.directory)
        files.mkdir()
        ours = "create or replace function app.own() returns integer language sql return 1;\n"
        files.joinpath(NAMES[0]).write_text(ours)
        with psycopg.connect(hosted) as holder, started(nowhere, "migrate", "--db-url", hosted) as process:
            holder.execute(LOCK)
            assert process.stderr is not None
            # before anything is applied
            assert b"was kept" in process.stderr.readline()
            assert where(hosted) == []
            holder.rollback()
            assert process.wait(60) == 0
            assert process.stderr.read() == b""
        assert files.joinpath(NAMES[0]).read_text() == ours
        assert where(hosted) == ["public"]

    @pytest.mark.parametrize("below", ["supabase", "supabase/functions", "apps/web"])
    def test_go_to_the_project_that_it_is_run_in(self, nowhere: Program, hosted: str, below: str) -> None:
        project = nowhere.directory
        make_project(project)
        directory = project / below
        directory.mkdir(parents=True, exist_ok=True)
        said = Program(directory, {})("migrate", "--db-url", hosted).stderr
        assert "supabase db push" in said
        assert "no Supabase project" not in said
        assert [path.name for path in sorted(project.joinpath("supabase", "migrations").iterdir())] == NAMES
        assert not directory.joinpath("supabase").exists()

    def test_go_to_the_configured_project_above(self, nowhere: Program, hosted: str) -> None:
        """As Supabase's command line does: it is the configuration that makes a project."""
        make_project(nowhere.directory)
        directory = nowhere.directory / "below"
        directory.joinpath("supabase", "migrations").mkdir(parents=True)
        Program(directory, {})("migrate", "--db-url", hosted)
        assert list(directory.joinpath("supabase", "migrations").iterdir()) == []
        assert len(list(nowhere.directory.joinpath("supabase", "migrations").iterdir())) == len(NAMES)

    def test_do_not_leave_the_repository(self, nowhere: Program, hosted: str) -> None:
        make_project(nowhere.directory)
        repository = nowhere.directory / "another"
        repository.joinpath(".git").mkdir(parents=True)
        assert "no Supabase project here" in Program(repository, {})("migrate", "--db-url", hosted).stderr
        assert not nowhere.directory.joinpath("supabase", "migrations").exists()

    def test_that_can_not_be_written_stop_it(self, nowhere: Program, hosted: str) -> None:
        nowhere.directory.joinpath("taken").write_text("a file")
        says = nowhere.fails("migrate", "--dir", "taken/migrations", "--db-url", hosted)
        assert "taken" in says
        assert where(hosted) == []

    @pytest.mark.parametrize("options", [[], ["--reapply"]])
    def test_are_spoken_of_before_where_no_project_is(self, nowhere: Program, hosted: str, options: list[str]) -> None:
        command = ["migrate", "--schema", "limits", "--db-url", hosted, *options]
        with psycopg.connect(hosted) as holder, started(nowhere, *command) as process:
            holder.execute(LOCK)
            assert process.stderr is not None
            said = process.stderr.readline()
            assert where(hosted) == []
            holder.rollback()
            assert process.wait(60) == 0
        assert b"supabase db push" in said
        assert b"tokenlimits init --schema limits" in said
        assert where(hosted) == ["limits"]
        assert list(nowhere.directory.iterdir()) == []
        again = nowhere("migrate", "--schema", "limits", "--db-url", hosted)
        assert (again.stdout, again.stderr) == ("Nothing is pending.\n", "")


SPOILED = """
alter table {schema}.generation_usage disable row level security;
grant all on {schema}.generation_usage to anon, authenticated;
do $do$
declare
  v_trigger record;
begin
  for v_trigger in select tgname, tgrelid::regclass as of from pg_trigger where not tgisinternal loop
    execute format('drop trigger %I on %s', v_trigger.tgname, v_trigger.of);
  end loop;
end
$do$;
drop function {schema}.track_generation;
drop policy "admins may select" on {schema}.user_groups;
"""
STATE = """
select 'trigger', tgname, tgrelid::regclass::text, '' from pg_trigger where not tgisinternal
union all
select 'policy', policyname, tablename, cmd from pg_policies where schemaname = '{schema}'
union all
select 'table', relname, relrowsecurity::text, array(select unnest(relacl)::text order by 1)::text
from pg_class
where relnamespace = '{schema}'::regnamespace and relkind = 'r'
union all
select 'function', proname, '', array(select unnest(proacl)::text order by 1)::text
from pg_proc
where pronamespace = '{schema}'::regnamespace
order by 1, 2, 3, 4
"""


class TestReapply:
    @SCHEMAS
    def test_mends_what_was_spoiled(self, nowhere: Program, hosted: str, home: str) -> None:
        nowhere("migrate", "--schema", home, "--db-url", hosted)
        ask(hosted, f"insert into {home}.user_groups (name) values ('kept')")
        before, entries = ask(hosted, STATE.format(schema=home)), history(hosted)
        ask(hosted, SPOILED.format(schema=home))
        assert ask(hosted, STATE.format(schema=home)) != before
        assert "Nothing is pending" in nowhere("migrate", "--schema", home, "--db-url", hosted).stdout
        assert ask(hosted, STATE.format(schema=home)) != before
        done = nowhere("migrate", "--reapply", "--schema", home, "--db-url", hosted)
        assert [line.split() for line in done.stdout.splitlines()] == [["reapplied", name] for name in NAMES]
        assert ask(hosted, STATE.format(schema=home)) == before
        assert ask(hosted, f"select name from {home}.user_groups") == [("kept",)]
        assert history(hosted) == entries

    def test_applies_what_is_pending_too(self, nowhere: Program, newer: Newer, hosted: str) -> None:
        assert nowhere.json("migrate", "--reapply", "--db-url", hosted) == {"applied": NAMES, "reapplied": []}
        assert newer.json("migrate", "--reapply", "--db-url", hosted) == {
            "applied": [newer.MIGRATION],
            "reapplied": NAMES,
        }
        assert len(history(hosted)) == len(NAMES) + 1
        assert nowhere.json("migrate", "--reapply", "--db-url", hosted) == {"applied": [], "reapplied": NAMES}

    def test_takes_all_back_when_a_part_fails(self, nowhere: Program, newer: Newer, hosted: str) -> None:
        nowhere("migrate", "--db-url", hosted)
        files = make_project(nowhere.directory)
        ask(hosted, "alter table public.user_groups disable row level security; create table public.later ()")
        done = newer("migrate", "--reapply", "--db-url", hosted, status=1)
        assert "PostgreSQL refused (42P07)" in done.stderr
        assert "Nothing of the SQL was applied" in done.stderr
        assert "Traceback" not in done.stderr
        assert ask(hosted, "select relrowsecurity from pg_class where relname = 'user_groups'") == [(False,)]
        assert len(history(hosted)) == len(NAMES)
        assert not files.joinpath(newer.MIGRATION).exists()

    def test_installs_what_was_uninstalled(self, nowhere: Program, hosted: str) -> None:
        """The history doesn't know that it was."""
        nowhere("migrate", "--db-url", hosted)
        ask(hosted, uninstall())
        for options in ([], ["--check"]):
            assert "tokenlimits migrate --reapply" in nowhere.fails("migrate", *options, "--db-url", hosted)
        assert where(hosted) == []
        nowhere("migrate", "--reapply", "--db-url", hosted)
        assert where(hosted) == ["public"]

    def test_writes_the_files(self, nowhere: Program, hosted: str) -> None:
        files = make_project(nowhere.directory)
        nowhere("migrate", "--reapply", "--db-url", hosted)
        assert [path.name for path in sorted(files.iterdir())] == NAMES
