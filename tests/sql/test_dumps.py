"""Backups as people make them, with pg_dump, pg_restore and psql: everything goes on where it was."""

from __future__ import annotations

import json
import re
from itertools import count
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import pytest
from tests.sql.api import ACTORS, CALLS, GROUP_ID, OTHER_GROUP_ID, USER_ID, argument_types, call_sql, outcome
from tests.sql.dumps import (
    GROUPS,
    NOT_THEIR_DATA,
    RESET,
    USAGE,
    USERS,
    Programs,
    apply,
    as_hosted,
    assert_goes_on,
    dump_of_ours,
    name_of,
    one,
    picture,
    restore_project,
    restore_public,
    track,
    url,
    used,
)
from tests.sql.test_install import UNINSTALL, objects
from tests.sql.test_security import DENIED, FUNCTIONS, INSERTS, UPDATES, WORKERS
from tests.support.invariants import drift
from tests.support.postgres import PostgresServer, create_hosted_database, servers

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Connect, DefaultGrants
    from tests.sql.api import Connection

    NewDatabase = Callable[..., Connect]
    Restore = Callable[[Programs, Connect, Connect], None]

WRITES: Final = {
    "insert": f"insert into public.generation_usage {INSERTS['generation_usage']}",
    "update": f"update public.generation_usage set {UPDATES['generation_usage']} where true",
    "delete": "delete from public.generation_usage where true",
    "truncate": "truncate public.generation_usage",
}
RESTORATIONS: Final[dict[str, Restore]] = {"a project": restore_project, "public alone": restore_public}


@pytest.fixture(scope="session")
def programs(postgres_server: PostgresServer) -> Programs:
    return Programs(postgres_server._bin)


@pytest.fixture(scope="session")
def source(new_database: NewDatabase) -> Connect:
    """A project in use."""
    database = new_database()
    apply(database, USERS + GROUPS + USAGE)
    return database


@pytest.fixture(scope="session")
def restore(
    programs: Programs, source: Connect, new_database: NewDatabase, postgres_server: PostgresServer
) -> Callable[[str, DefaultGrants], Connect]:
    """Restore into a project without tokenlimits: once, and copied for each test."""
    templates: dict[tuple[str, DefaultGrants], str] = {}
    numbers = count(1)

    def make(what: str, grants: DefaultGrants) -> Connect:
        if (what, grants) not in templates:
            target = as_hosted(new_database(grants, installed=False))
            RESTORATIONS[what](programs, source, target)
            templates[what, grants] = name_of(target)
        copy = elsewhere(postgres_server, f"restored_{next(numbers)}", templates[what, grants])
        return as_hosted(copy)

    return make


@pytest.fixture
def project(restore: Callable[[str, DefaultGrants], Connect], default_grants: DefaultGrants) -> Connect:
    """A project that was restored; nothing else was done since."""
    return restore("a project", default_grants)


@pytest.fixture(params=RESTORATIONS)
def restored(
    request: pytest.FixtureRequest, restore: Callable[[str, DefaultGrants], Connect], default_grants: DefaultGrants
) -> Connect:
    """The same, or where public alone was restored."""
    return restore(request.param, default_grants)


@pytest.fixture
def fresh(new_database: NewDatabase) -> Connect:
    """A project where tokenlimits was just installed."""
    return as_hosted(new_database())


def elsewhere(server: PostgresServer, name: str, template: str | None = None) -> Connect:
    """Make a database, without a template an empty one, which isn't even like a hosted one."""
    server.create_database(name, template)
    return lambda user: server.connect(name, user)


def test_a_whole_database_goes_on_where_it_was(
    new_database: NewDatabase, postgres_server: PostgresServer, programs: Programs, tmp_path: Path
) -> None:
    source, target = new_database(), elsewhere(postgres_server, "restored")
    apply(source, USERS + GROUPS + USAGE)
    apply(source, RESET)  # is among what is private
    programs.run("pg_dump", "--format=custom", f"--file={tmp_path / 'dump'}", url(source, "supabase_admin"))
    programs.run("pg_restore", "--exit-on-error", f"--dbname={url(target, 'supabase_admin')}", tmp_path / "dump")
    assert picture(target) == picture(source)
    assert used(target) == {"Pro": 7, "Team": 0}
    assert_goes_on(target)


def test_an_older_postgresql_moves_to_the_newest(
    source: Connect, postgres_server: PostgresServer, newest: PostgresServer, programs: Programs, tmp_path: Path
) -> None:
    target = elsewhere(newest, f"from_{postgres_server.port}")
    # dumped by its own program: a server that is older, but was released later, may have what the newest doesn't know
    programs.run("pg_dump", "--format=directory", f"--file={tmp_path / 'dump'}", url(source, "supabase_admin"))
    restored = url(target, "supabase_admin")
    Programs(newest._bin).run("pg_restore", "--exit-on-error", f"--dbname={restored}", tmp_path / "dump")
    assert picture(target) == picture(source)
    assert_goes_on(target)


@pytest.fixture(scope="session")
def newest(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """The newest server, with the roles of hosted projects."""
    programs = next(iter(servers().values()))
    if postgres_server._bin == programs:
        yield postgres_server
        return
    with PostgresServer(programs) as server:
        create_hosted_database(server, "roles")
        yield server


def test_a_restored_project_goes_on_where_it_was(source: Connect, project: Connect) -> None:
    assert picture(project) == picture(source)
    assert_goes_on(project)


def test_what_was_restored_goes_on_once_the_sql_is_applied(
    source: Connect, restored: Connect, install_sql: str
) -> None:
    apply(restored, install_sql)
    assert picture(restored) == picture(source)
    assert_goes_on(restored)


def test_applying_makes_of_what_was_restored_what_a_new_installation_is(
    restored: Connect, new_database: NewDatabase, default_grants: DefaultGrants, install_sql: str
) -> None:
    apply(restored, install_sql)
    with new_database(default_grants)("postgres") as new, restored("postgres") as old:
        assert defined(old) == defined(new)


def defined(connection: Connection) -> list[str]:
    """All that is defined, line by line; PostgreSQL writes fewer parentheses after a restoration."""
    return re.sub(r"[()]", "", dump_of_ours(connection, "--schema-only")).splitlines()


def written(database: Connect) -> dict[str, Any]:
    """Who writes the ledger, and what comes of it; row-level security leaves users nothing to change."""
    with database("postgres") as connection:
        return {
            f"{name}: {action}": result
            for name, actor in ACTORS.items()
            for action, statement in WRITES.items()
            if (result := outcome(connection, actor, statement)) not in {DENIED, 0}
        }


def test_nobody_writes_a_restored_ledger(restored: Connect) -> None:
    assert written(restored) == {}


def test_nobody_writes_what_was_restored_once_the_sql_is_applied(restored: Connect, install_sql: str) -> None:
    apply(restored, install_sql)
    assert written(restored) == {}


def test_nobody_but_the_server_calls_what_workers_call(project: Connect) -> None:
    with project("postgres") as connection:
        types = argument_types(connection)
        calls = {name: call_sql(name, types[name], CALLS[name]) for name in FUNCTIONS if FUNCTIONS[name] == WORKERS}
        assert {
            (who, name): result
            for who in ACTORS.keys() - WORKERS
            for name, call in calls.items()
            if (result := outcome(connection, ACTORS[who], call, [json.dumps(CALLS[name])])) != DENIED
        } == {}


def rights(database: Connect) -> Any:
    """What the diagnosis says of who may do what."""
    with database("postgres") as connection:
        found = one(connection, "select public.tokenlimits_diagnosis()")
    roles = ("anon", "authenticated", "service_role")
    return {
        "functions": found["functions"],
        "tables": {name: {role: table[role] for role in roles} for name, table in found["tables"].items()},
    }


def test_rights_that_are_too_wide_are_named_until_the_sql_is_applied(
    source: Connect, restore: Callable[[str, DefaultGrants], Connect], install_sql: str
) -> None:
    right, target = rights(source), restore("a project", "old")
    seen = rights(target)["tables"]["generation_usage"]
    assert seen == {
        "anon": True,
        "authenticated": ["delete", "insert", "select", "update"],
        "service_role": ["delete", "insert", "select", "update"],
    }
    assert "anon" in rights(target)["functions"]["track_generation"]
    apply(target, install_sql)
    assert rights(target) == right


def load_all(programs: Programs, source: Connect, fresh: Connect) -> None:
    programs.restore(fresh, programs.supabase_data(source, NOT_THEIR_DATA, "--schema=*"))


def load_public(programs: Programs, source: Connect, fresh: Connect) -> None:
    apply(fresh, USERS)
    programs.restore(fresh, programs.supabase_data(source, "--schema=public"))


def load_public_through_triggers(programs: Programs, source: Connect, fresh: Connect) -> None:
    apply(fresh, USERS)
    data = programs.run("pg_dump", "--data-only", "--schema=public", url(source)).stdout
    programs.restore(fresh, data)


LOADS: Final[dict[str, Restore]] = {"past triggers": load_public, "through triggers": load_public_through_triggers}


def test_data_of_all_schemas_goes_on_where_it_was(programs: Programs, source: Connect, fresh: Connect) -> None:
    load_all(programs, source, fresh)
    assert picture(fresh) == picture(source)
    assert_goes_on(fresh)


def not_summed(connection: Connection) -> int:
    return one(connection, "select public.tokenlimits_diagnosis() -> 'groups_not_summed'")


def reconcile(connection: Connection) -> None:
    for group in (GROUP_ID, OTHER_GROUP_ID):
        connection.execute("select public.reconcile_usage(%s)", [group])


@pytest.mark.parametrize("load", LOADS)
def test_data_of_public_alone_is_found_and_counted_again(
    programs: Programs, source: Connect, fresh: Connect, load: str
) -> None:
    LOADS[load](programs, source, fresh)
    with fresh("postgres") as connection:
        assert not_summed(connection) == 2
        reconcile(connection)
        assert not_summed(connection) == 0
    assert picture(fresh) == picture(source)
    assert_goes_on(fresh)


@pytest.mark.parametrize("load", LOADS)
def test_data_of_public_alone_is_counted_again_also_after_calls(
    programs: Programs, source: Connect, fresh: Connect, load: str
) -> None:
    LOADS[load](programs, source, fresh)
    with fresh("postgres") as connection:
        # opens the counters, which count from what there is
        early = track(connection, USER_ID, 1)
        assert early["allowed"]
        assert not_summed(connection) == 2
        reconcile(connection)
        assert not_summed(connection) == 0
        assert used(fresh) == {"Pro": 8, "Team": 9}
        connection.execute("select public.refund_generation(%s)", [early["usage_id"]])
    assert_goes_on(fresh)


def test_groups_are_put_into_their_tree_in_whatever_order_they_come(fresh: Connect) -> None:
    """Past triggers, as a dump of the data alone does: a child may come before its parent."""
    leaf, middle, top = (uuid4() for _ in range(3))
    with fresh("postgres") as connection:
        connection.execute("set session_replication_role = replica")
        for group, parent in ((leaf, middle), (top, None), (middle, top)):
            connection.execute(
                "insert into public.user_groups (id, name, parent_id, is_nested) values (%s, %s, %s, true)",
                [group, str(group), parent],
            )
        connection.execute("reset session_replication_role")
        assert drift(connection) == []
        found = connection.execute(
            "select above_id from tokenlimits.group_tree where group_id = %s order by distance", [leaf]
        ).fetchall()
        assert [above for (above,) in found] == [leaf, middle, top]


def test_what_was_restored_can_be_uninstalled(source: Connect, restored: Connect, install_sql: str) -> None:
    apply(restored, UNINSTALL)
    with restored("postgres") as connection:
        assert objects(connection) == {"r generation_usage"}
    apply(restored, install_sql)
    before, after = picture(source), picture(restored)
    assert (after["ledger"], after["history"]) == (before["ledger"], before["history"])


def test_a_ledger_that_was_left_is_taken_up_from_a_dump(
    new_database: NewDatabase, programs: Programs, source: Connect, project: Connect, install_sql: str
) -> None:
    apply(project, UNINSTALL)
    target = as_hosted(new_database(installed=False))
    restore_project(programs, project, target)
    apply(target, install_sql)
    before, after = picture(source), picture(target)
    assert (after["ledger"], after["history"]) == (before["ledger"], before["history"])
    apply(target, GROUPS)
    assert used(target) == used(source)
    assert_goes_on(target)
