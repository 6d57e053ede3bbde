"""`doctor` finds each of many faults that are planted one by one, and nothing where nothing is wrong."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from supabase import ClientOptions, create_client
from tests.conftest import ROOT
from tests.sql.test_security import FUNCTIONS
from tests.support.postgres import servers

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.cli.doctor._expected import POLICIES, expected
from tokenlimits.local import LocalStack

from .conftest import Newer, Program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import PostgresServer

INSTALL = (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8")
UNINSTALL = (ROOT / "sql" / "uninstall.sql").read_text(encoding="utf-8")
IS_ADMIN = "create or replace function tokenlimits.is_admin() returns boolean language sql stable as $$ select {} $$"
# longer than a name can be, so no server is asked for it
NO_HOST = ".".join(["a" * 60] * 5) + ".invalid"
ADOPT = "set tokenlimits.adopt = 'yes'"
UNCOMMENTED = """
do $do$
declare
  v_object text;
begin
  for v_object in
    select format('function %s', p.oid::regprocedure)
    from pg_proc as p
    where p.pronamespace in ('public'::regnamespace, 'tokenlimits'::regnamespace)
    union all
    select format('table %s', c.oid::regclass)
    from pg_class as c
    where c.relkind = 'r' and c.relnamespace in ('public'::regnamespace, 'tokenlimits'::regnamespace)
  loop
    execute format('comment on %s is null', v_object);
  end loop;
  comment on schema tokenlimits is null;
end
$do$
"""
DESCRIBED = """
create or replace function public.tokenlimits_diagnosis() returns jsonb language sql
set search_path = pg_catalog, pg_temp as $$ select (tokenlimits.tokenlimits_diagnosis() || '%s'::jsonb) %s $$
"""
CLOCK = """
create or replace function tokenlimits.clock() returns timestamptz language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$ begin return clock_timestamp(){}; end $$
"""


@pytest.fixture(scope="module")
def clinic(server: PostgresServer) -> Iterator[tuple[LocalStack, str]]:
    """A healthy installation: two users in two groups, one of which has used something."""
    server.create_database("clinic")
    url = server.url("clinic")
    with LocalStack(url) as stack, httpx.Client(trust_env=False) as http:
        client = create_client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        groups, users = GroupManager(client, timeout=60), stack.create_users(2)
        image = [Limit(kind="image", max=9), Limit(kind="image", max=5, period="day", scope="member")]
        groups.add_members(groups.create("Pro", limits=image).id, users)
        groups.create("Team", limits={"video": None})
        TokenLimits(client).track(users[0], "image", 3)
        yield stack, url


@pytest.fixture
def patient(clinic: tuple[LocalStack, str], tmp_path: Path) -> Program:
    return Program(tmp_path, {**clinic[0].environment(), "no_proxy": "127.0.0.1"})


def findings(program: Program, *arguments: object, **environment: str) -> dict[str, tuple[str, str]]:
    """The first finding of each check that is not green; every one has a remedy, and none shows the key."""
    done = program("doctor", "--json", *arguments, status=None, **environment)
    key = {**program.environment, **environment}.get("SUPABASE_SECRET_KEY")
    assert not key or key not in done.stdout + done.stderr
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == any(each["level"] == "error" for each in found)
    assert all(bool(each["remedy"]) == (each["level"] != "ok") for each in found)
    return {each["check"]: (each["level"], each["says"]) for each in reversed(found) if each["level"] != "ok"}


@contextmanager
def planted(url: str, fault: str, remedy: str) -> Iterator[None]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(fault.encode())
        try:
            yield
        finally:
            connection.execute(remedy.encode())


def token(**claims: object) -> str:
    parts = ({"alg": "HS256"}, claims)
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + ".xx"


@pytest.mark.parametrize(
    ("environment", "check", "says"),
    [
        ({"SUPABASE_URL": ""}, "configuration", "not set"),
        ({"SUPABASE_URL": "abc.supabase.co"}, "configuration", "not a URL"),
        ({"SUPABASE_URL": "https://abc..supabase.co"}, "configuration", "not a URL"),
        ({"SUPABASE_URL": "https://"}, "configuration", "not a URL"),
        ({"SUPABASE_URL": "http://127.0.0.1:1"}, "url", "can't be reached"),
        ({"SUPABASE_URL": f"http://{NO_HOST}"}, "url", "no such host"),
        ({"SUPABASE_SECRET_KEY": ""}, "key", "not set"),
        ({"SUPABASE_SECRET_KEY": "sb_secret_\u2026"}, "key", "characters"),
        ({"SUPABASE_SECRET_KEY": "{publishable}"}, "key", "publishable"),
        ({"SUPABASE_SECRET_KEY": "sb_secret_of_another_project"}, "api", "rejects the key"),
        ({"SUPABASE_SECRET_KEY": token(role="anon")}, "key", "role anon"),
        ({"SUPABASE_SECRET_KEY": token(role="service_role", exp=1)}, "key", "expired"),
        (
            {"SUPABASE_URL": "http://abc.supabase.co", "SUPABASE_SECRET_KEY": token(role="service_role", ref="xyz")},
            "key",
            "project xyz",
        ),
        ({"SUPABASE_SECRET_KEY": "postgres"}, "key", "doesn't look like a Supabase key"),
        ({"DATABASE_URL": "postgresql://a:hush@127.0.0.1:1/x"}, "migrations", "can't be reached"),
        ({"TOKENLIMITS_SCHEMA": "auth"}, "schema", "TOKENLIMITS_SCHEMA: "),
        ({"TOKENLIMITS_SCHEMA": "quotas"}, "schema", "The API doesn't expose the schema quotas."),
    ],
)
def test_what_is_configured_wrongly(patient: Program, environment: dict[str, str], check: str, says: str) -> None:
    publishable = patient.environment["SUPABASE_PUBLISHABLE_KEY"]
    given = {name: value.format(publishable=publishable) for name, value in environment.items()}
    # what would leave this machine meets a proxy where nothing listens
    level, said = findings(patient, **given, http_proxy="http://127.0.0.1:1", no_proxy="127.0.0.1,invalid")[check]
    assert says in said
    assert level in ("error", "warning")
    assert "hush" not in said


def test_a_network_that_can_not_be(patient: Program) -> None:
    for name, value in (("no_proxy", "127.0.0.1,[::1]"), ("https_proxy", "socks9://ann:hush@proxy")):
        level, said = findings(patient, **{name: value})["network"]
        assert (level, "NO_PROXY" in said, "hush" in said) == ("error", True, False)


def test_the_url_of_a_service_is_the_projects(patient: Program) -> None:
    url = patient.environment["SUPABASE_URL"]
    assert "url" not in findings(patient, SUPABASE_URL=f"{url}/rest/v1")


@pytest.mark.parametrize(
    ("environment", "conclusion"),
    [
        ({"SUPABASE_URL": ""}, "1 problem to correct."),
        ({"SUPABASE_URL": "", "SUPABASE_SECRET_KEY": ""}, "2 problems to correct."),
        ({"SUPABASE_URL": "", "SUPABASE_SECRET_KEY": "postgres"}, "1 problem to correct, 1 warning."),
    ],
)
def test_how_many_problems_there_are(patient: Program, environment: dict[str, str], conclusion: str) -> None:
    assert patient("doctor", status=1, **environment).stdout.endswith(f"\n{conclusion}\n")


def test_a_publishable_key_is_not_called_unknown(patient: Program) -> None:
    publishable = patient.environment["SUPABASE_PUBLISHABLE_KEY"]
    found = findings(patient, SUPABASE_SECRET_KEY=publishable)
    assert found["key"] == ("error", "This is a publishable key, which has no rights here.")
    assert "may not even read" in found["api"][1]


def test_a_server_that_is_no_supabase(patient: Program) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        found = findings(patient, SUPABASE_URL=f"http://127.0.0.1:{other.server_address[1]}")
        other.shutdown()
        thread.join()
    assert "not like Supabase" in found["url"][1]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


GROUP = "(select id from public.user_groups where name = 'Pro')"
FAULTS: dict[str, tuple[str, str, str, str]] = {
    "not installed": (UNINSTALL, "", "version", "not installed"),
    "outdated": (
        """create or replace function public.tokenlimits_version() returns jsonb language sql immutable
        set search_path = pg_catalog, pg_temp as $$ select '{"version": 0}'::jsonb $$""",
        "",
        "version",
        "version 0",
    ),
    "a function is gone": ("drop function public.check_generation", "", "functions", "check_generation"),
    "a function that no probe calls is gone": (
        "drop function public.commit_generation",
        "",
        "functions",
        "The database lacks commit_generation.",
    ),
    "a function has lost its mark": (
        "comment on function public.commit_generation is 'of mine'",
        ADOPT,
        "marks",
        "commit_generation, as after a restore without comments",
    ),
    "a table has lost its mark": ("comment on table public.user_groups is null", ADOPT, "marks", "user_groups"),
    "all comments are lost": (UNCOMMENTED, ADOPT, "marks", " more, as after a restore"),
    "all comments and rights are lost": (
        f"{UNCOMMENTED}; grant execute on all functions in schema public to anon",
        ADOPT,
        "rights",
        "to anon",
    ),
    "it describes itself with a null": (
        DESCRIBED % ('{"functions": null}', ""),
        "",
        "database",
        "The diagnosis is not valid: functions.",
    ),
    "it describes itself with less": (
        DESCRIBED % ("{}", "- 'unmarked' - 'triggers'"),
        "",
        "database",
        "triggers, unmarked",
    ),
    "a function is closed": (
        "revoke execute on function public.track_generation from service_role",
        "",
        "rights",
        "track_generation to service_role",
    ),
    "a function is open": (
        "grant execute on function public.track_generation to anon",
        "",
        "rights",
        "track_generation to anon",
    ),
    "row-level security is off": (
        "alter table public.generation_usage disable row level security",
        "",
        "tables",
        "generation_usage",
    ),
    "anon may read a table": ("grant select on public.user_groups to anon", "", "rights", "table user_groups to anon"),
    "users may write the ledger": (
        "grant insert on public.generation_usage to authenticated",
        "",
        "rights",
        "insert on generation_usage",
    ),
    "the secret key may write the ledger": (
        "grant insert on public.generation_usage to service_role",
        "",
        "rights",
        "insert on generation_usage to service_role",
    ),
    "a restored ledger was never added up": (
        "create table tokenlimits.aside as table tokenlimits.usage_rollup; delete from tokenlimits.usage_rollup",
        "insert into tokenlimits.usage_rollup table tokenlimits.aside; drop table tokenlimits.aside",
        "history",
        "1 group has usage",
    ),
    "admins may set ids": (
        "grant insert, update on public.user_groups to authenticated",
        "",
        "rights",
        "insert on user_groups, update on user_groups",
    ),
    "admins may change whose membership it is": (
        "grant update on public.group_memberships to authenticated",
        "",
        "rights",
        "update on group_memberships",
    ),
    "a policy lets everybody in": (
        "create policy everybody on public.group_limits for select to authenticated using (true)",
        "drop policy everybody on public.group_limits",
        "policies",
        "everybody",
    ),
    "a policy is gone": (
        'drop policy "admins may update" on public.user_groups',
        "",
        "policies",
        "admins may update",
    ),
    "users make themselves admins": (
        IS_ADMIN.format("auth.jwt() -> 'user_metadata' ->> 'role' = 'admin'"),
        "drop function tokenlimits.is_admin cascade",
        "admins",
        "user_metadata",
    ),
    "everybody is an admin": (
        IS_ADMIN.format("true"),
        "drop function tokenlimits.is_admin cascade",
        "admins",
        "user_metadata",
    ),
    "the admin rule fails": (
        IS_ADMIN.format("(auth.jwt() ->> 'role')::integer = 1"),
        "drop function tokenlimits.is_admin cascade",
        "admins",
        "fails",
    ),
    "the clock is wrong": (CLOCK.format(" + interval '1 hour'"), CLOCK.format(""), "clocks", "3600 s"),
    "a counter is wrong": (
        "update tokenlimits.counters set used = used + 1",
        "update tokenlimits.counters set used = used - 1",
        "counters",
        "Pro",
    ),
    "the history is wrong": (
        "update tokenlimits.usage_rollup set cost = cost + 1",
        "update tokenlimits.usage_rollup set cost = cost - 1",
        "counters",
        "Pro",
    ),
    "an index is gone": (
        "drop index public.generation_usage_user_id_idx",
        "",
        "indexes",
        "generation_usage_user_id_idx",
    ),
    "a trigger is disabled": (
        "alter table public.group_limits disable trigger group_limits_apply_insert",
        "alter table public.group_limits enable trigger group_limits_apply_insert",
        "triggers",
        "group_limits_apply_insert",
    ),
    "a user is in no group": (
        "insert into auth.users (id, email) values ('00000000-0000-4000-8000-000000000001', 'lost@example.com')",
        "delete from auth.users where email = 'lost@example.com'",
        "users",
        "In no group",
    ),
    "a group has no limits": (
        "insert into public.user_groups (name) values ('Empty')",
        "delete from public.user_groups where name = 'Empty'",
        "groups",
        "1 of 3 groups has no limits",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_in_the_database(patient: Program, clinic: tuple[LocalStack, str], fault: str) -> None:
    plant, remedy, check, says = FAULTS[fault]
    with planted(clinic[1], plant, f"{remedy};\n{INSTALL}"):
        found = findings(patient)
    assert says in found[check][1], found
    if fault == "not installed":
        restore(clinic)


def test_a_newer_version_that_describes_itself_otherwise(patient: Program, clinic: tuple[LocalStack, str]) -> None:
    for changed, level in (("", "warning"), (', "triggers": null', "error")):
        newer = DESCRIBED % (f'{{"version": 99{changed}}}', "- 'unmarked'")
        with planted(clinic[1], newer, INSTALL):
            found = findings(patient)
        assert found["database"][0] == level, found
        assert "unmarked" in found["database"][1]


def test_what_was_restored_without_comments_is_taken_over_again(
    patient: Program, clinic: tuple[LocalStack, str]
) -> None:
    """As the remedy says."""
    with planted(clinic[1], UNCOMMENTED, f"{ADOPT};\n{INSTALL}"):
        report = json.loads(patient("doctor", "--json", status=1).stdout)["findings"]
        (marks,) = [each for each in report if each["check"] == "marks"]
        assert marks["level"] == "error"
        (command,) = re.findall("`([^`]+)`", marks["remedy"])
        path = os.pathsep.join([str(servers()["18"]), str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", command.replace("psql", "psql --quiet --set ON_ERROR_STOP=1")],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "DATABASE_URL": clinic[1]},
        )
        assert (done.returncode, "ERROR" in done.stderr) == (0, False), done.stderr
        assert findings(patient) == {}


def followed(remedy: str, program: Program, url: str) -> None:
    """Do what a remedy says to the letter: it has commands and SQL in backticks."""
    steps = [step for step in re.findall("`([^`]+)`", remedy) if not step.startswith("pip ")]
    assert steps, remedy
    for step in steps:
        if step.startswith("tokenlimits "):
            words = {"GROUP": "Empty" if "limits set" in step else "Pro", "USER": "lost@example.com"}
            program(*(words.get(word, word) for word in step.split()[1:]), DATABASE_URL=url)
        elif step.startswith("("):
            path = os.pathsep.join([str(servers()["18"]), str(Path(sys.executable).parent), os.environ["PATH"]])
            environment = {**os.environ, "PATH": path, "DATABASE_URL": url}
            subprocess.run(["bash", "-c", step], check=True, capture_output=True, env=environment)
        else:
            with psycopg.connect(url, autocommit=True) as editor:
                editor.execute(step.encode())


# what people must decide or do outside the database
NO_COMMAND = {"clocks"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_remedy_works_to_the_letter(patient: Program, clinic: tuple[LocalStack, str], fault: str) -> None:
    plant, remedy, check, _ = FAULTS[fault]
    with planted(clinic[1], plant, f"{remedy};\n{INSTALL}" if check in NO_COMMAND else "select 1"):
        found = json.loads(patient("doctor", "--json", status=None).stdout)["findings"]
        for each in found:
            if each["level"] != "ok" and each["check"] not in NO_COMMAND:
                followed(each["remedy"], patient, clinic[1])
        if fault == "not installed":
            restore(clinic)
        if check not in NO_COMMAND:
            assert findings(patient, "--db-url", clinic[1]) == {}
    with psycopg.connect(clinic[1], autocommit=True) as tidier:
        tidier.execute("delete from auth.users where email = 'lost@example.com'")
        tidier.execute("delete from public.user_groups where name = 'Empty'")
        tidier.execute("update public.user_groups set is_default = false where is_default")
        tidier.execute("drop table if exists tokenlimits.aside")


HELD = {
    "the counters' rows": "select 'hush' from tokenlimits.counters for update",
    "a table": "lock table public.user_groups in access exclusive mode",
    "the ledger": "lock table public.generation_usage",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HELD)
def test_who_keeps_calls_waiting(patient: Program, clinic: tuple[LocalStack, str], what: str) -> None:
    with closing(psycopg.connect(clinic[1])) as holder:
        holder.execute(HELD[what].encode())
        time.sleep(1.1)
        begun = time.monotonic()
        found = json.loads(patient("doctor", "--json", status=1).stdout)["findings"]
        assert time.monotonic() - begun < 60
        bad = {each["check"]: each for each in found if each["level"] == "error"}
        assert set(bad) == {"writes", "locks"}
        assert "waited too long for a lock" in bad["writes"]["says"]
        pid = holder.info.backend_pid
        assert f"session {pid} ({holder.info.user}, idle in transaction) for " in bad["locks"]["says"]
        assert HELD[what].partition("'")[0] in bad["locks"]["says"]
        assert "hush" not in json.dumps(found)
        followed(bad["locks"]["remedy"], patient, clinic[1])
        assert findings(patient) == {}


def test_a_database_that_takes_no_writes(patient: Program, clinic: tuple[LocalStack, str]) -> None:
    with psycopg.connect(clinic[1], autocommit=True) as editor:
        editor.execute("alter database clinic set default_transaction_read_only = on")
        editor.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
    found = json.loads(patient("doctor", "--json", status=1).stdout)["findings"]
    (bad,) = [each for each in found if each["level"] == "error"]
    assert (bad["check"], bad["says"]) == ("writes", "The database is read-only, as when its disk is full.")
    followed(bad["remedy"], patient, clinic[1])
    assert findings(patient) == {}


LEDGER = """
insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at)
select gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'bloat', 1, 'committed', now()
from generate_series(1, 120000)
"""
HOLDS = """
insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
select gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'bloat', 1, now(), now()
from generate_series(1, 120000)
"""
INDEX = "public.generation_usage_user_id_idx"
SLOW: dict[str, tuple[list[str], str, str, str]] = {
    "an index that was not finished": (
        [f"update pg_index set indisvalid = false where indexrelid = '{INDEX}'::regclass"],
        "indexes",
        f"Not valid: {INDEX}",
        f"reindex index concurrently {INDEX}",
    ),
    "what was left of one": (
        [
            "create index generation_usage_user_id_idx_ccnew on public.generation_usage (user_id)",
            f"update pg_index set indisvalid = false where indexrelid = '{INDEX}_ccnew'::regclass",
        ],
        "indexes",
        f"Not valid: {INDEX}_ccnew",
        f"drop index concurrently {INDEX}_ccnew",
    ),
    "a bloated index": (
        [
            LEDGER,
            "analyze public.generation_usage",
            f"alter index {INDEX} set (fillfactor = 10)",
            f"reindex index {INDEX}",
            f"alter index {INDEX} reset (fillfactor)",
        ],
        "bloat",
        INDEX,
        f"reindex index concurrently {INDEX}",
    ),
    "dead rows": (
        ["alter table tokenlimits.holds set (autovacuum_enabled = off)", HOLDS, "delete from tokenlimits.holds"],
        "dead rows",
        "tokenlimits.holds (120,000, and 0 live)",
        "vacuum tokenlimits.holds",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW)
def test_what_makes_calls_slow(patient: Program, clinic: tuple[LocalStack, str], fault: str) -> None:
    """It's found, and gone when what doctor says was done."""
    plant, check, says, remedy = SLOW[fault]
    with psycopg.connect(clinic[1], autocommit=True) as connection:
        try:
            for statement in plant:
                connection.execute(statement.encode())
            connection.execute("select pg_stat_force_next_flush()")
            (finding,) = [each for each in patient.json("doctor", status=None)["findings"] if each["level"] != "ok"]
            assert finding["check"] == check
            assert says in finding["says"]
            assert f"`{remedy}`" in finding["remedy"]
            connection.execute(remedy.encode())
            assert findings(patient) == {}
        finally:
            connection.execute("delete from public.generation_usage where kind = 'bloat'")
            connection.execute("alter table tokenlimits.holds reset (autovacuum_enabled)")
            connection.execute("select pg_stat_force_next_flush()")
            connection.execute("vacuum public.generation_usage, tokenlimits.holds")


def test_small_tables_are_never_bloated(patient: Program, clinic: tuple[LocalStack, str]) -> None:
    """Many times as large as its rows need, and yet not worth a word."""
    with psycopg.connect(clinic[1], autocommit=True) as connection:
        connection.execute(LEDGER.replace("120000", "20000").encode())
        connection.execute("analyze public.generation_usage")
        with planted(clinic[1], "delete from public.generation_usage where kind = 'bloat'", "select 1"):
            connection.execute("vacuum analyze public.generation_usage")
            assert findings(patient) == {}


def restore(clinic: tuple[LocalStack, str]) -> None:
    """Make the groups again that went with the tables."""
    with httpx.Client(trust_env=False) as http:
        client = create_client(clinic[0].url, clinic[0].secret_key, ClientOptions(httpx_client=http))
        groups = GroupManager(client, timeout=60)
        users = [row["id"] for row in clinic[0].sql("select id from auth.users")]
        groups.add_members(groups.create("Pro", limits={"image": 9}).id, users)
        groups.create("Team", limits={"video": None})
        TokenLimits(client).track(users[0], "image", 3)


def test_pending_migrations(patient: Program, clinic: tuple[LocalStack, str]) -> None:
    newer = Newer(patient.directory, patient.environment)
    assert findings(newer, "--db-url", clinic[1]) == {
        "migrations": ("warning", f"Not in the database's history: {newer.MIGRATION}.")
    }


INDEX_ELSEWHERE = INDEX.replace("public", "limits")


@pytest.fixture(scope="module")
def elsewhere(server: PostgresServer) -> Iterator[tuple[LocalStack, str]]:
    server.create_database("elsewhere")
    url = server.url("elsewhere")
    with LocalStack(url, schema="limits") as stack, httpx.Client(trust_env=False) as http:
        client = create_client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        groups = GroupManager(client, timeout=60, schema="limits")
        groups.add_members(groups.create("Pro", limits={"image": 9}).id, stack.create_users(2))
        yield stack, url


class TestElsewhere:
    """Where tokenlimits is in a schema of its own."""

    @pytest.fixture
    def guest(self, elsewhere: tuple[LocalStack, str], tmp_path: Path) -> Program:
        return Program(tmp_path, {**elsewhere[0].environment(), "no_proxy": "127.0.0.1"})

    def found(self, program: Program, **environment: str) -> dict[str, Any]:
        done = program("doctor", "--json", status=1, **environment)
        return next(each for each in json.loads(done.stdout)["findings"] if each["level"] == "error")

    def test_all_is_well(self, guest: Program, elsewhere: tuple[LocalStack, str]) -> None:
        assert findings(guest, "--db-url", elsewhere[1]) == {}
        assert guest.json("doctor")["schema"] == "limits"

    def test_all_is_well_by_the_option(self, guest: Program) -> None:
        for environment in ({"TOKENLIMITS_SCHEMA": ""}, {"TOKENLIMITS_SCHEMA": "quotas"}):
            assert findings(guest, "--schema", "limits", **environment) == {}
        assert "not installed in the schema public" in findings(guest, "--schema", "public")["version"][1]

    def test_a_remedy_is_about_the_schema_that_was_asked_about(
        self, guest: Program, elsewhere: tuple[LocalStack, str]
    ) -> None:
        with psycopg.connect(elsewhere[1], autocommit=True) as owner:
            owner.execute("alter table limits.user_groups disable row level security")
        environment = {"TOKENLIMITS_SCHEMA": ""}
        done = guest("doctor", "--schema", "limits", "--json", status=1, **environment)
        (bad,) = [each for each in json.loads(done.stdout)["findings"] if each["level"] == "error"]
        guest.environment |= environment
        followed(bad["remedy"], guest, elsewhere[1])
        assert findings(guest, "--schema", "limits") == {}

    def test_what_lost_its_mark(self, guest: Program, elsewhere: tuple[LocalStack, str]) -> None:
        comment = "comment on table limits.user_groups is {}"
        with planted(elsewhere[1], comment.format("null"), comment.format("'tokenlimits: A group.'")):
            found = self.found(guest)
        assert found["check"] == "marks"
        assert "tokenlimits sql --schema limits)" in found["remedy"]

    def test_where_it_is_not_looked_for(self, guest: Program) -> None:
        found = self.found(guest, TOKENLIMITS_SCHEMA="public")
        assert "not installed in the schema public" in found["says"]
        assert "set TOKENLIMITS_SCHEMA" in found["remedy"]

    def test_where_the_api_does_not_look(self, guest: Program) -> None:
        found = self.found(guest, TOKENLIMITS_SCHEMA="quotas")
        assert found["says"] == "The API doesn't expose the schema quotas."
        for words in ("Exposed schemas", "supabase/config.toml", "TOKENLIMITS_SCHEMA"):
            assert words in found["remedy"]

    @pytest.mark.parametrize(
        ("fault", "remedy", "check", "says", "does"),
        [
            (
                "create policy everybody on limits.group_limits for select to authenticated using (true)",
                "drop policy everybody on limits.group_limits",
                "policies",
                "everybody",
                "on limits.",
            ),
            (
                "alter table limits.generation_usage disable row level security",
                "alter table limits.generation_usage enable row level security",
                "tables",
                "generation_usage",
                "tokenlimits migrate",
            ),
            (
                "alter table limits.group_limits disable trigger group_limits_apply_insert",
                "alter table limits.group_limits enable trigger group_limits_apply_insert",
                "triggers",
                "group_limits_apply_insert",
                "tokenlimits migrate",
            ),
            (
                "grant execute on function limits.track_generation to anon",
                "revoke execute on function limits.track_generation from anon",
                "rights",
                "track_generation to anon",
                "tokenlimits migrate",
            ),
            (
                f"update pg_index set indisvalid = false where indexrelid = '{INDEX_ELSEWHERE}'::regclass",
                f"update pg_index set indisvalid = true where indexrelid = '{INDEX_ELSEWHERE}'::regclass",
                "indexes",
                INDEX_ELSEWHERE,
                f"reindex index concurrently {INDEX_ELSEWHERE}",
            ),
        ],
    )
    def test_what_is_wrong_there(
        self,
        guest: Program,
        elsewhere: tuple[LocalStack, str],
        fault: str,
        remedy: str,
        check: str,
        says: str,
        does: str,
    ) -> None:
        with planted(elsewhere[1], fault, remedy):
            found = self.found(guest)
        assert found["check"] == check
        assert says in found["says"]
        assert does in found["remedy"]


def test_what_is_expected_is_read_from_the_sql() -> None:
    roles: dict[str, set[str]] = {"admin": {"authenticated"}, "user": {"authenticated"}, "service": {"service_role"}}
    wanted = {name: set().union(*(roles.get(each, set()) for each in who)) for name, who in FUNCTIONS.items()}
    assert {name: set(who) for name, who in expected().functions.items()} == wanted
    assert "group_limits_apply_insert" in expected().triggers
    assert {"generation_usage_user_id_idx", "counters_pkey", "generation_usage_key_key"} <= expected().indexes
    assert expected().version >= 1
    assert len(POLICIES) == 5


def test_all_is_well_again(patient: Program, clinic: tuple[LocalStack, str]) -> None:
    done = patient("doctor", "--db-url", clinic[1])
    assert done.stdout.endswith("\nNo problems.\n")
    assert {"✗", "!"}.isdisjoint(done.stdout)
    report = json.loads(patient("doctor", "--json").stdout)
    assert [each["level"] for each in report["findings"]] == ["ok"] * len(report["findings"])
    assert len(report["findings"]) >= 13
    assert report["host"] == "127.0.0.1"
