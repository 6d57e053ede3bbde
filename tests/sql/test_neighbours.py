"""A project's database has tables of its own: nothing of them is taken over, changed or dropped."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors
from tests.conftest import ROOT
from tests.sql import dumps
from tests.sql.api import ACTORS, GROUP_ID, USER_ID, request_by, seed
from tests.support.postgres import create_hosted_database, servers

from tokenlimits._refusals import BY_CODE
from tokenlimits.sql_files import checked_schema, migrations, one_paste, uninstall

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Connect
    from tests.sql.api import Connection
    from tests.support.postgres import PostgresServer

    NewDatabase = Callable[..., Connect]

GUARD = (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8").partition("-- 10_schema.sql")[0]
TAKEN = {
    "table public.user_groups": """
        create table public.user_groups (id bigint primary key, name text);
        insert into public.user_groups values (1, 'theirs')
    """,
    "table public.group_memberships": """
        create table public.group_memberships (group_id uuid, user_id uuid, joined_at timestamptz);
        grant select on public.group_memberships to authenticated
    """,
    "table public.generation_usage": "create table public.generation_usage (id uuid primary key, tokens bigint)",
    "view public.group_limits": "create view public.group_limits as select 1 as max",
    "materialized view public.group_limits": "create materialized view public.group_limits as select 1 as max",
    "type public.user_groups": "create type public.user_groups as enum ('free', 'pro')",
    "sequence public.group_limits_counter_id_seq": "create sequence public.group_limits_counter_id_seq",
    "index public.user_groups_pkey": "create table public.teams (id bigint constraint user_groups_pkey primary key)",
    "index public.user_groups_name_key": """
        create table public.teams (name text); create index user_groups_name_key on public.teams (name)
    """,
    "function public.delete_group(p_group_id uuid)": """
        create function public.delete_group(p_group_id uuid) returns jsonb language sql as $$ select '{}'::jsonb $$;
        grant execute on function public.delete_group(uuid) to authenticated
    """,
    "function public.find_users(p_project bigint)": """
        create function public.find_users(p_project bigint) returns bigint language sql as $$ select p_project $$
    """,
    "table tokenlimits.counters": "create schema tokenlimits; create table tokenlimits.counters (id bigint)",
    "type tokenlimits.verdict": "create schema tokenlimits; create type tokenlimits.verdict as enum ('yes', 'no')",
    "function tokenlimits.clock()": """
        create schema tokenlimits;
        create function tokenlimits.clock() returns timestamptz language sql as 'select now()'
    """,
}
NO_AUTH = """
create schema tokenlimits;
create function tokenlimits.is_admin() returns boolean language sql as $$ select false $$;
create table public.people (id uuid primary key, address text);
create function tokenlimits.known_users(p_user_ids uuid[]) returns table (id uuid, email text) language sql stable
set search_path = pg_catalog, pg_temp as
$$ select p.id, p.address from public.people as p where p.id = any(p_user_ids) $$;
"""
FOREIGN_KEY = "select from pg_constraint where conname = 'group_memberships_user_id_fkey'"


def dump(connection: Connection) -> list[str]:
    """All that is in the database: objects, rows, comments and privileges."""
    return dumps.dump(connection, "--inserts")


def refusal(connection: Connection, sql: str) -> psycopg.errors.Error:
    """The error with which the SQL ends."""
    with pytest.raises(psycopg.Error) as raised:
        connection.execute(sql.encode())
    connection.rollback()
    return raised.value


class TestTakenNames:
    @pytest.mark.parametrize("name", TAKEN)
    def test_are_refused_before_anything_changes(self, new_database: NewDatabase, name: str) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(TAKEN[name].encode())
            before = dump(postgres)
            error = refusal(postgres, one_paste())
            assert error.sqlstate == "TL010"
            assert name in str(error.diag.message_primary)
            assert "Rename" in str(error.diag.message_hint)
            assert dump(postgres) == before

    def test_are_all_named(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            for sql in (TAKEN["table public.user_groups"], TAKEN["function public.find_users(p_project bigint)"]):
                postgres.execute(sql.encode())
            message = str(refusal(postgres, one_paste()).diag.message_primary)
            assert "table public.user_groups" in message
            assert "function public.find_users(p_project bigint)" in message

    @pytest.mark.parametrize(
        "sql", [one_paste(), *(migration.text for migration in migrations())], ids=["paste", "migration"]
    )
    def test_are_refused_where_statements_come_one_by_one(self, new_database: NewDatabase, sql: str) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(TAKEN["table public.user_groups"].encode())
            before = dump(postgres)
            info = postgres.info
            psql = servers()[str(info.server_version // 10000)] / "psql"
            url = f"postgresql://postgres@{info.host}:{info.port}/{info.dbname}"
            done = subprocess.run([psql, "-X", url], input=sql, capture_output=True, text=True, check=True)
            assert "table public.user_groups" in done.stderr
            assert dump(postgres) == before

    def test_of_a_temporary_table_or_a_copy_are_nobodys(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            postgres.execute("create temp table user_groups (i int); comment on table user_groups is 'tokenlimits: x'")
            postgres.execute("create schema backup; create table backup.user_groups (like public.user_groups)")
            postgres.execute("comment on table backup.user_groups is 'tokenlimits: Groups of users'")
            postgres.execute(one_paste().encode())
            postgres.execute(uninstall().encode())
            assert postgres.execute("select to_regclass('backup.user_groups') is not null").fetchone() == (True,)
            assert postgres.execute("select to_regclass('public.user_groups')").fetchone() == (None,)

    def test_are_ours_where_comments_were_lost_and_that_is_said(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            seed(postgres)
            before = dump(postgres)
            for (comment,) in postgres.execute(
                """
                select format('comment on table %s is null', c.oid::regclass) from pg_class as c
                where c.relkind = 'r' and obj_description(c.oid, 'pg_class') like 'tokenlimits:%'
                union all
                select format('comment on function %s is null', p.oid::regprocedure) from pg_proc as p
                where obj_description(p.oid, 'pg_proc') like 'tokenlimits:%'
                """
            ).fetchall():
                postgres.execute(comment)
            facts = postgres.execute("select public.tokenlimits_diagnosis()").fetchone()
            assert facts is not None
            assert {"user_groups", "track_generation"} <= set(facts[0]["unmarked"])
            assert "track_generation" in facts[0]["functions"]
            assert "tokenlimits.adopt" in str(refusal(postgres, one_paste()).diag.message_hint)
            postgres.execute("set tokenlimits.adopt = 'yes'")
            postgres.execute(one_paste().encode())
            # but for the comments of two functions that might be the project's own by now
            after = dump(postgres)
            assert [line for line in before if line not in after and "COMMENT" not in line] == []

    def test_are_all_that_it_makes(self, new_database: NewDatabase) -> None:
        with new_database()("supabase_admin") as catalog:
            made = catalog.execute(
                """
                select relname from pg_class where relnamespace = 'public'::regnamespace
                union all
                select proname from pg_proc where pronamespace = 'public'::regnamespace
                """
            ).fetchall()
        assert len(made) > 40
        assert [name for (name,) in made if f"'{name}'" not in GUARD] == []

    @pytest.mark.parametrize("name", TAKEN)
    def test_are_not_dropped(self, new_database: NewDatabase, name: str) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(TAKEN[name].encode())
            before = dump(postgres)
            postgres.execute(uninstall().encode())
            assert dump(postgres) == before


class TestUninstalling:
    def test_leaves_nothing_but_the_ledger(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute("create table public.projects (id bigint)")
            before = dump(postgres)
            postgres.execute(one_paste().encode())
            postgres.execute("set tokenlimits.drop_ledger = 'yes'")
            postgres.execute(uninstall().encode())
            assert dump(postgres) == before

    def test_and_installing_again_take_up_the_ledger(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            seed(postgres)
            rows = postgres.execute("select * from public.generation_usage order by id").fetchall()
            for _ in range(2):
                postgres.execute(uninstall().encode())
                postgres.execute(one_paste().encode())
            assert postgres.execute("select * from public.generation_usage order by id").fetchall() == rows

    def test_leaves_what_a_project_keeps_in_our_schema(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(NO_AUTH)
            postgres.execute(one_paste().encode())
            # a body that was replaced is the project's too, though the comment stays
            postgres.execute("create table tokenlimits.prices (id bigint)")
            before = dump(postgres)
            postgres.execute(uninstall().encode())
            left = dump(postgres)
            for ours in (
                "FUNCTION tokenlimits.is_admin()",
                "FUNCTION tokenlimits.known_users(",
                "TABLE tokenlimits.prices",
            ):
                assert any(ours in line for line in before)
                assert any(ours in line for line in left)
            assert not any("FUNCTION tokenlimits.clock()" in line for line in left)
            postgres.execute(one_paste().encode())
            # revoking and granting again puts privileges in another order
            assert sorted(dump(postgres)) == sorted(before)

    @pytest.mark.parametrize(
        "theirs",
        [
            "create view public.theirs as select name from public.user_groups",
            "create table public.theirs (group_id uuid references public.user_groups)",
            "create table public.theirs (g public.user_groups)",
            "create table public.theirs () inherits (public.user_groups)",
            "create table public.theirs (i int); create policy p on public.theirs using (tokenlimits.is_admin())",
            "create function public.theirs() returns setof public.user_groups language sql as 'table user_groups'",
        ],
    )
    def test_refuses_to_drop_what_depends_on_it(self, new_database: NewDatabase, theirs: str) -> None:
        with new_database()("postgres") as postgres:
            postgres.execute(theirs.encode())
            before = dump(postgres)
            error = refusal(postgres, uninstall())
            assert error.sqlstate == "TL010"
            assert "theirs" in str(error.diag.message_detail)
            assert dump(postgres) == before

    def test_leaves_what_only_says_that_it_is_ours(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            postgres.execute("create schema billing; create table billing.settings (id bigint)")
            postgres.execute("comment on table billing.settings is 'tokenlimits: our settings for the package'")
            postgres.execute("create function public.my_charge() returns int language sql as 'select 1'")
            postgres.execute("comment on function public.my_charge() is 'tokenlimits: charge wrapper'")
            postgres.execute("create procedure public.sweep() language sql as 'select 1'")
            postgres.execute("comment on procedure public.sweep() is 'tokenlimits: sweeps'")
            postgres.execute("alter table public.generation_usage rename to generation_usage_2026")
            postgres.execute(uninstall().encode())
            for name in ("billing.settings", "public.generation_usage_2026"):
                assert postgres.execute("select to_regclass(%s) is not null", [name]).fetchone() == (True,)
            for name in ("public.my_charge()", "public.sweep()"):
                assert postgres.execute("select to_regprocedure(%s) is not null", [name]).fetchone() == (True,)

    def test_drops_the_ledger_once_when_told_so(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            postgres.execute("set tokenlimits.drop_ledger = 'yes'")
            for kept in (None, "generation_usage"):
                postgres.execute(uninstall().encode())
                assert postgres.execute("select to_regclass('public.generation_usage')::text").fetchone() == (kept,)
                postgres.execute(one_paste().encode())

    def test_leaves_a_rule_that_began_as_ours(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            found = postgres.execute("select pg_get_functiondef('tokenlimits.is_admin'::regproc)").fetchone()
            assert found is not None
            postgres.execute(found[0].replace("'admin'", "'boss'"))
            postgres.execute(uninstall().encode())
            body = postgres.execute("select prosrc from pg_proc where proname = 'is_admin'").fetchone()
            assert "boss" in str(body)

    def test_leaves_a_rule_whose_body_was_replaced(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            postgres.execute(
                "create or replace function tokenlimits.is_admin() returns boolean language sql as $$ select false $$"
            )
            postgres.execute(uninstall().encode())
            assert postgres.execute("select tokenlimits.is_admin()").fetchone() == (False,)
            assert postgres.execute("select to_regprocedure('tokenlimits.known_users(uuid[])')").fetchone() == (None,)


class TestAnotherSchema:
    def test_leaves_public_alone(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            for name in ("table public.user_groups", "function public.delete_group(p_group_id uuid)"):
                postgres.execute(TAKEN[name].encode())
            before = dump(postgres)
            postgres.execute(one_paste("limits").encode())
            postgres.execute(one_paste("limits").encode())
            after = dump(postgres)
            assert [line for line in before if line not in after] == []
            postgres.execute("set tokenlimits.drop_ledger = 'yes'")
            postgres.execute(uninstall().encode())
            assert dump(postgres) == before

    def test_of_the_projects_keeps_what_is_in_it(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute("create schema app; comment on schema app is 'ours'; create table app.teams (id bigint)")
            before = dump(postgres)
            postgres.execute(one_paste("app").encode())
            postgres.execute("set tokenlimits.drop_ledger = 'yes'")
            postgres.execute(uninstall().encode())
            # the API's roles may still use the schema
            assert [line for line in dump(postgres) if line not in before] == [
                "GRANT USAGE ON SCHEMA app TO authenticated;",
                "GRANT USAGE ON SCHEMA app TO service_role;",
            ]

    @pytest.mark.parametrize("word", ["order", "user", "limit", "a_b1"])
    def test_may_have_any_plain_name(self, new_database: NewDatabase, word: str) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(one_paste(word).encode())
            postgres.execute(one_paste(word).encode())
            assert postgres.execute(f'select "{word}".tokenlimits_version()').fetchone() is not None

    @pytest.mark.parametrize(("first", "second"), [("public", "limits"), ("limits", "public"), ("limits", "more")])
    @pytest.mark.parametrize("removed", [False, True])
    def test_beside_another_installation_is_refused(
        self, new_database: NewDatabase, first: str, second: str, removed: bool
    ) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(one_paste(first).encode())
            if removed:  # but for the ledger
                postgres.execute(uninstall().encode())
            before = dump(postgres)
            error = refusal(postgres, one_paste(second))
            assert error.sqlstate == "TL010"
            assert f"{first}." in str(error.diag.message_primary)
            assert dump(postgres) == before
            if removed:
                postgres.execute(f"create schema if not exists {second}".encode())
                postgres.execute(f"alter table {first}.generation_usage set schema {second}".encode())
                postgres.execute(one_paste(second).encode())

    @pytest.mark.parametrize(
        "name", ["", "Limits", "1st", "a-b", "a b", "pg_limits", "auth", "tokenlimits", "storage", "x" * 64, 'a";drop']
    )
    def test_of_another_kind_of_name_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="can't be the schema"):
            checked_schema(name)

    def test_has_no_word_of_public_left(self) -> None:
        for line in one_paste("limits").splitlines():
            if not line.lstrip().startswith("--"):
                assert "public" not in line.replace("from public", ""), line


class TestKnownUsers:
    def test_from_elsewhere_need_no_auth(self, postgres_server: PostgresServer) -> None:
        name = f"no_auth_{uuid4().hex}"
        create_hosted_database(postgres_server, name)
        with postgres_server.connect(name) as superuser:
            superuser.execute("drop schema auth cascade")
        person, stranger = uuid4(), uuid4()
        with postgres_server.connect(name, "postgres") as postgres:
            postgres.execute(NO_AUTH)
            postgres.execute("insert into public.people values (%s, 'someone@example.com')", [person])
            postgres.execute(one_paste().encode())
            postgres.execute(one_paste().encode())

            def call(function: str, **arguments: Any) -> Any:
                named = ", ".join(f"p_{name} => %({name})s" for name in arguments)
                row = postgres.execute(f"select public.{function}({named})".encode(), arguments).fetchone()
                assert row is not None
                return row[0]

            group = call(
                "save_group", name="Pro", limits='[{"kind": "image", "period": "day", "scope": "member", "max": 2}]'
            )["id"]
            added = call("add_group_members", group_id=group, user_ids=[person, stranger])
            assert added == {"added": 1, "already": 0, "unknown": [str(stranger)]}
            assert call("track_generation", user_id=person, kind="image")["allowed"] is True
            assert [m["email"] for m in call("group_members", group_id=group)] == ["someone@example.com"]
            assert [m["email"] for m in call("group_members", group_id=group, search="SOME")] == ["someone@example.com"]
            assert call("group_members", group_id=group, search="nobody") == []
            assert [m["email"] for m in call("top_members", group_id=group)] == ["someone@example.com"]
            assert [row["email"] for row in call("export_usage")["rows"]] == ["someone@example.com"]
            facts = call("tokenlimits_diagnosis")
            assert (facts["users_in_no_group"], facts["groups"]) == (None, 1)
        postgres_server.drop_database(name)

    def test_decide_on_the_foreign_key(self, new_database: NewDatabase) -> None:
        own = NO_AUTH.partition("create function tokenlimits.known_users")[2]
        with new_database()("postgres") as postgres:

            def constraints() -> int:
                return len(postgres.execute(FOREIGN_KEY).fetchall())

            assert constraints() == 1
            definition = postgres.execute("select pg_get_functiondef('tokenlimits.known_users'::regproc)").fetchone()
            assert definition is not None
            postgres.execute("create table public.people (id uuid primary key, address text)")
            postgres.execute(f"create or replace function tokenlimits.known_users{own}".encode())
            postgres.execute(one_paste().encode())
            assert constraints() == 0
            body = postgres.execute("select prosrc from pg_proc where proname = 'known_users'").fetchone()
            assert "public.people" in str(body)
            postgres.execute(definition[0])
            postgres.execute(one_paste().encode())
            assert constraints() == 1

    def test_are_each_one_that_was_asked_for(self, new_database: NewDatabase) -> None:
        user, other = uuid4(), uuid4()
        with new_database(installed=False)("postgres") as postgres:
            # whoever is asked for, it answers all, and twice
            postgres.execute(
                f"""
                create schema tokenlimits;
                create function tokenlimits.known_users(uuid[]) returns table (id uuid, email text) language sql as $$
                select u.id, 'a@example.com' from unnest(array['{user}', '{other}', '{user}', null]::uuid[]) as u (id)
                $$
                """.encode()
            )
            postgres.execute(one_paste().encode())
            group = postgres.execute("select public.save_group(p_name => 'Pro') ->> 'id'").fetchone()
            assert group is not None
            added = postgres.execute(
                "select public.add_group_members(%s, %s)", [group[0], [user, user, uuid4()]]
            ).fetchone()
            assert added is not None
            assert (added[0]["added"], len(added[0]["unknown"])) == (1, 1)
            assert postgres.execute("select user_id from public.group_memberships").fetchall() == [(user,)]
            members = postgres.execute("select public.group_members(%s)", [group[0]]).fetchone()
            assert [member["user_id"] for member in (members or [[]])[0]] == [str(user)]

    def test_of_another_shape_are_refused(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute("create schema tokenlimits")
            postgres.execute(
                "create function tokenlimits.known_users(uuid[]) returns setof uuid language sql as 'select null::uuid'"
            )
            before = dump(postgres)
            error = refusal(postgres, one_paste())
            assert (error.sqlstate, "table (id uuid, email text)" in str(error.diag.message_primary)) == ("TL010", True)
            assert dump(postgres) == before

    def test_of_a_projects_own_keep_their_privileges(self, new_database: NewDatabase) -> None:
        with new_database(installed=False)("postgres") as postgres:
            postgres.execute(NO_AUTH)
            postgres.execute("grant execute on function tokenlimits.is_admin() to anon")
            postgres.execute(one_paste().encode())
            query = "select has_function_privilege('anon', 'tokenlimits.is_admin()', 'execute')"
            assert postgres.execute(query).fetchone() == (True,)

    def test_of_a_rule_that_reads_our_tables_as_its_caller_recurse(self, new_database: NewDatabase) -> None:
        """The errors for which the client says `security definer`."""
        with new_database()("postgres") as postgres:
            seed(postgres)
            postgres.execute("""
                create or replace function tokenlimits.is_admin() returns boolean language plpgsql stable as
                $$ begin return exists (select from public.group_memberships where user_id <> auth.uid()); end $$
            """)
            with request_by(postgres, ACTORS["user"]), pytest.raises(errors.StatementTooComplex) as raised:
                postgres.execute("select from public.group_memberships")
            assert raised.value.sqlstate in BY_CODE
            postgres.execute("alter function tokenlimits.is_admin() security definer")
            with request_by(postgres, ACTORS["user"]):
                postgres.execute("select from public.group_memberships")

    def test_are_not_told_to_anybody(self, new_database: NewDatabase) -> None:
        with new_database()("postgres") as postgres:
            for actor in ACTORS.values():
                with request_by(postgres, actor), pytest.raises(errors.InsufficientPrivilege):
                    postgres.execute("select * from tokenlimits.known_users('{}')")


class TestIdsOfGroups:
    @pytest.fixture
    def postgres(self, new_database: NewDatabase) -> Any:
        with new_database()("postgres") as postgres:
            yield postgres

    @staticmethod
    def save(connection: Connection, name: str, group_id: UUID | str | None) -> Any:
        row = connection.execute("select public.save_group(p_name => %s, p_id => %s)", [name, group_id]).fetchone()
        assert row is not None
        return row[0]

    def refused(self, connection: Connection, name: str, group_id: UUID | str) -> None:
        with pytest.raises(psycopg.Error) as raised:
            self.save(connection, name, group_id)
        assert (raised.value.sqlstate, raised.value.diag.message_detail) == ("TL001", "id")
        assert "never used" in str(raised.value.diag.message_hint)

    def test_are_of_the_callers_choice(self, postgres: Connection) -> None:
        group_id = uuid4()
        for number, actor in enumerate([ACTORS["admin"], ACTORS["service"]]):
            chosen = UUID(int=group_id.int ^ number)
            with request_by(postgres, actor):
                assert self.save(postgres, f"group {number}", chosen)["id"] == str(chosen)
                assert self.save(postgres, f"another {number}", None)["id"] != str(chosen)
        with request_by(postgres, ACTORS["user"]), pytest.raises(errors.InsufficientPrivilege):
            self.save(postgres, "mine", uuid4())

    def test_are_used_once(self, postgres: Connection) -> None:
        group_id = uuid4()
        self.save(postgres, "first", group_id)
        self.refused(postgres, "second", group_id)
        postgres.execute("select public.delete_group(%s)", [group_id])
        self.refused(postgres, "second", group_id)
        # though a restored dump may bring the group back
        postgres.execute("insert into public.user_groups (id, name) values (%s, 'first')", [group_id])

    def test_are_not_nil(self, postgres: Connection) -> None:
        self.refused(postgres, "nobody", UUID(int=0))

    def test_of_the_ledger_are_used(self, postgres: Connection) -> None:
        seed(postgres)
        postgres.execute(f"select public.track_generation('{USER_ID}', 'image')")
        postgres.execute(uninstall().encode())
        postgres.execute(one_paste().encode())
        self.refused(postgres, "again", GROUP_ID)

    def test_name_a_group_that_is_there_or_a_new_one(self, postgres: Connection) -> None:
        made = self.save(postgres, "first", None)["id"]
        with pytest.raises(psycopg.Error) as raised:
            postgres.execute("select public.save_group(p_group_id => %s, p_id => %s)", [made, uuid4()])
        assert (raised.value.sqlstate, raised.value.diag.message_detail) == ("TL001", "id")

    def test_are_used_once_also_where_two_are_first(self, new_database: NewDatabase) -> None:
        database, group_id = new_database(), uuid4()
        with database("postgres") as one, database("postgres") as two, ThreadPoolExecutor(1) as threads:
            with one.transaction():
                self.save(one, "one", group_id)
                waiting = threads.submit(self.refused, two, "two", group_id)
                while not one.execute(
                    "select from pg_locks where pid = %s and not granted", [two.info.backend_pid]
                ).fetchall():
                    assert not waiting.done()
            waiting.result()

    def test_of_a_group_that_is_deleted_meanwhile_are_used(self, new_database: NewDatabase) -> None:
        database, group_id = new_database(), uuid4()
        with database("postgres") as one, database("postgres") as two, ThreadPoolExecutor(1) as threads:
            with one.transaction():
                self.save(one, "one", group_id)
                one.execute("select public.delete_group(%s)", [group_id])
                waiting = threads.submit(self.refused, two, "two", group_id)
                while not one.execute(
                    "select from pg_locks where pid = %s and not granted", [two.info.backend_pid]
                ).fetchall():
                    assert not waiting.done()
            waiting.result()


class TestTheLedger:
    @pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
    def test_is_closed_whatever_was_granted(self, new_database: NewDatabase, role: str) -> None:
        with new_database()("postgres") as postgres:
            seed(postgres)
            # as the default privileges of old projects do, where a dump is restored
            postgres.execute(f"grant all on all tables in schema public to {role}".encode())
            before = postgres.execute("select * from public.generation_usage order by id").fetchall()
            postgres.execute(f"set role {role}".encode())
            for statement in (
                "insert into public.generation_usage select * from public.generation_usage",
                "update public.generation_usage set cost = 0",
                "delete from public.generation_usage",
                "truncate public.generation_usage",
            ):
                with pytest.raises(errors.InsufficientPrivilege, match="only the functions of tokenlimits"):
                    postgres.execute(statement)
            postgres.execute("reset role")
            assert postgres.execute("select * from public.generation_usage order by id").fetchall() == before
