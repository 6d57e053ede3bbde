"""The SQL goes into a hosted project in one paste, any number of times, and comes out again without the history."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.conftest import ROOT
from tests.sql.api import ACTORS, GROUP_ID, USER_ID, outcome, seed
from tests.sql.dumps import dump_of_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Connect, DefaultGrants
    from tests.sql.api import Connection

    NewDatabase = Callable[..., Connect]

MIGRATIONS = sorted((ROOT / "sql" / "migrations").glob("*.sql"))
UNINSTALL = (ROOT / "sql" / "uninstall.sql").read_text(encoding="utf-8")
OBJECTS = """
select 'schema ' || nspname from pg_namespace where nspname = 'tokenlimits'
union all
select relkind::text || ' ' || oid::regclass from pg_class
where relnamespace::regnamespace::text in ('public', 'tokenlimits') and relkind not in ('i', 't', 'c')
union all
select 'function ' || oid::regprocedure from pg_proc
where pronamespace::regnamespace::text in ('public', 'tokenlimits')
union all
select 'policy ' || policyname from pg_policies where schemaname = 'public'
union all
select 'trigger ' || tgname from pg_trigger where not tgisinternal
"""
OWN_IS_ADMIN = """
create or replace function tokenlimits.is_admin() returns boolean language sql stable
set search_path = pg_catalog, pg_temp as
$$ select (select auth.jwt()) ->> 'sub' = 'the boss' $$
"""


@pytest.fixture(scope="module")
def databases(new_database: NewDatabase, default_grants: DefaultGrants) -> dict[str, Connect]:
    return {name: new_database(default_grants, installed=name == "installed") for name in ("bare", "installed")}


@pytest.fixture
def bare(databases: dict[str, Connect]) -> Iterator[Connection]:
    """The role postgres in a hosted project's database; what a test does there is rolled back."""
    with databases["bare"]("postgres") as connection, connection.transaction(force_rollback=True):
        yield connection


@pytest.fixture
def installed(databases: dict[str, Connect]) -> Iterator[Connection]:
    """The same, with tokenlimits installed."""
    with databases["installed"]("postgres") as connection, connection.transaction(force_rollback=True):
        yield connection


def objects(connection: Connection) -> set[str]:
    return {name for (name,) in connection.execute(OBJECTS)}


def migrate(connection: Connection) -> None:
    for migration in MIGRATIONS:
        connection.execute(migration.read_text(encoding="utf-8"))  # pyright: ignore[reportArgumentType, reportCallIssue]


def history(connection: Connection) -> object:
    return connection.execute("select public.generation_history()").fetchone()


def test_installs_in_one_paste_without_a_superuser(
    new_database: NewDatabase, default_grants: DefaultGrants, install_sql: str
) -> None:
    with new_database(default_grants, installed=False)("postgres") as postgres:
        assert postgres.execute("select rolsuper from pg_roles where rolname = current_user").fetchone() == (False,)
        postgres.execute(install_sql)
        assert postgres.execute("select public.tokenlimits_version() ? 'version'").fetchone() == (True,)


def test_another_application_changes_nothing(
    new_database: NewDatabase, default_grants: DefaultGrants, install_sql: str
) -> None:
    with new_database(default_grants)("postgres") as postgres:
        seed(postgres)
        before = dump_of_ours(postgres, "--inserts")
        assert "other''s key" in before
        postgres.execute(install_sql)
        assert dump_of_ours(postgres, "--inserts") == before


def test_migrations_build_what_the_one_paste_builds(new_database: NewDatabase, default_grants: DefaultGrants) -> None:
    migrated, pasted = new_database(default_grants, installed=False), new_database(default_grants)
    with migrated("postgres") as by_steps, pasted("postgres") as at_once:
        migrate(by_steps)
        schema = dump_of_ours(by_steps, "--schema-only")
        assert "CREATE TABLE public.generation_usage" in schema
        assert schema == dump_of_ours(at_once, "--schema-only")


@pytest.mark.parametrize("script", ["tokenlimits.sql", "uninstall.sql"])
def test_postgrest_is_told_to_look_again(new_database: NewDatabase, script: str) -> None:
    text = (ROOT / "sql" / script).read_text(encoding="utf-8")
    # the one paste ends its transaction after it
    statements = [line for line in text.splitlines() if line and not line.startswith("--") and line != "commit;"]
    assert statements[-1] == "notify pgrst, 'reload schema';"
    database = new_database()
    with database("authenticator") as postgrest, database("postgres") as postgres:
        postgrest.execute("listen pgrst")
        postgres.execute(text)
        assert [notify.payload for notify in postgrest.notifies(timeout=5, stop_after=1)] == ["reload schema"]


def test_generated_sql_is_not_stale() -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "build_sql.py", "--check"], check=True)


def test_a_projects_own_is_admin_survives_another_application(installed: Connection, install_sql: str) -> None:
    query = "select prosrc from pg_proc where oid = 'tokenlimits.is_admin()'::regprocedure"
    installed.execute(OWN_IS_ADMIN)
    own = installed.execute(query).fetchone()
    installed.execute(install_sql)
    assert installed.execute(query).fetchone() == own
    assert own is not None
    assert "the boss" in own[0]


def test_uninstalling_leaves_the_ledger_alone(bare: Connection, install_sql: str) -> None:
    before = objects(bare)
    bare.execute(install_sql)
    seed(bare)
    bare.execute(UNINSTALL)
    assert objects(bare) == before | {"r generation_usage"}
    assert bare.execute("select count(*), sum(cost) from public.generation_usage").fetchone() == (5, 11)


def test_a_ledger_that_is_left_stays_closed(installed: Connection) -> None:
    seed(installed)
    installed.execute(UNINSTALL)
    seen = {name: outcome(installed, actor, "select from public.generation_usage") for name, actor in ACTORS.items()}
    assert seen == {"anon": "42501", "user": 0, "pretender": 0, "admin": 0, "service": 5}


def test_uninstalling_drops_the_ledger_when_told_so(bare: Connection, install_sql: str) -> None:
    before = objects(bare)
    bare.execute(install_sql)
    seed(bare)
    bare.execute("set tokenlimits.drop_ledger = 'yes'")
    bare.execute(UNINSTALL)
    assert objects(bare) == before


def test_uninstalling_twice_is_harmless(installed: Connection) -> None:
    installed.execute(UNINSTALL)
    left = objects(installed)
    installed.execute(UNINSTALL)
    assert objects(installed) == left


def test_uninstalling_leaves_a_projects_own_objects_alone(bare: Connection, install_sql: str) -> None:
    bare.execute(
        """
        create table public.projects (id bigint);
        create function public.generate() returns bigint language sql as $$ select 1 -- see tokenlimits.track $$
        """
    )
    own = objects(bare)
    bare.execute(install_sql)
    bare.execute(UNINSTALL)
    assert objects(bare) == own | {"r generation_usage"}


def test_history_comes_back_with_another_installation(installed: Connection, install_sql: str) -> None:
    seed(installed)
    installed.execute(f"select public.track_generation('{USER_ID}', 'image', 1)")
    before = history(installed)
    installed.execute(UNINSTALL)
    installed.execute(install_sql)
    assert history(installed) == before
    # and it counts for a group that is made again
    installed.execute(f"insert into public.user_groups (id, name) values ('{GROUP_ID}', 'Pro')")
    installed.execute(
        "insert into public.group_limits (group_id, kind, period, scope, max)"
        f" values ('{GROUP_ID}', 'image', 'lifetime', 'group', 100)"
    )
    used = installed.execute(f"select public.group_usage('{GROUP_ID}') -> 0 -> 'limits' -> 0 -> 'used'").fetchone()
    assert used == (8,)
    # as do holds: this one has expired meanwhile
    installed.execute("update tokenlimits.holds set expires_at = now() - interval '1 second'")
    used = installed.execute(f"select public.group_usage('{GROUP_ID}') -> 0 -> 'limits' -> 0 -> 'used'").fetchone()
    assert used == (7,)
