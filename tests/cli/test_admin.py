"""`admin` and `dev`."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import PostgresServer

    from tokenlimits.local import LocalStack

    from .conftest import Program


def role(stack: LocalStack, email: str) -> object:
    return stack.sql("select raw_app_meta_data ->> 'role' as role from auth.users where email = $1", email)[0]["role"]


def test_in_the_database(tl: Program, stack: LocalStack, server: PostgresServer) -> None:
    user = stack.create_user("granted@example.com")
    url = server.url("cli")
    assert "next sign-in" in tl("admin", "grant", "Granted@example.com", "--db-url", url).stdout
    assert role(stack, user.email) == "admin"
    tl("admin", "revoke", user.id, DATABASE_URL=url)
    assert role(stack, user.email) is None
    stack.sql('update auth.users set raw_app_meta_data = \'{"role": "editor"}\' where id = $1::uuid', str(user.id))
    tl("admin", "revoke", user.id, DATABASE_URL=url)
    assert role(stack, user.email) == "editor"
    assert "nobody" in tl.fails("admin", "grant", "nobody@example.com", "--db-url", url)


def test_lists_the_admins(tl: Program, stack: LocalStack, server: PostgresServer) -> None:
    url = server.url("cli")
    user = stack.create_user("listed@example.com")
    assert str(user.id) not in [each["id"] for each in tl.json("admin", "list", "--db-url", url)]
    tl("admin", "grant", user.email, "--db-url", url)
    assert {"id": str(user.id), "email": user.email} in tl.json("admin", "list", "--db-url", url)
    assert user.email in tl("admin", "list", DATABASE_URL=url).stdout


def test_an_address_that_was_not_confirmed_is_nobodys(tl: Program, stack: LocalStack, server: PostgresServer) -> None:
    url = server.url("cli")
    user = stack.create_user("unconfirmed@example.com")
    stack.sql("update auth.users set email_confirmed_at = null where id = $1::uuid", str(user.id))
    assert "not confirmed" in tl.fails("admin", "grant", user.email, "--db-url", url)
    assert role(stack, user.email) is None
    tl("admin", "grant", user.id, "--db-url", url)
    assert role(stack, user.email) == "admin"
    tl("admin", "revoke", user.email, "--db-url", url)
    assert role(stack, user.email) is None


ADMIN = {"id": "1", "email": "a@example.com", "app_metadata": {"role": "admin"}}


class AuthApi(BaseHTTPRequestHandler):
    """Answers as Supabase's auth API does, and passes everything else on to the stack."""

    stack: LocalStack
    changes: list[tuple[str, Any]]
    user: dict[str, Any]

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        authorized = self.headers["apikey"] == self.stack.secret_key
        self.changes.append((self.path, body))
        self._answer(200 if authorized else 401, b"{}")

    def do_GET(self) -> None:
        pages = {"1": [ADMIN, {"id": "2", "email": "b@example.com", "app_metadata": {}}], "2": []}
        _, _, query = self.path.partition("?page=")
        found = {"users": pages[query.partition("&")[0]]} if query else self.user
        self._answer(200, json.dumps(found).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"apikey": self.headers["apikey"], "Content-Type": "application/json"}
        answer = httpx.post(f"{self.stack.url}{self.path}", content=body, headers=headers, trust_env=False)
        self._answer(answer.status_code, answer.content)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def auth_api(stack: LocalStack) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    AuthApi.stack, AuthApi.changes = stack, []
    AuthApi.user = {"email_confirmed_at": "2026-03-01T12:00:00Z"}
    with ThreadingHTTPServer(("127.0.0.1", 0), AuthApi) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", AuthApi.changes
        server.shutdown()


def test_through_the_auth_api(tl: Program, stack: LocalStack, auth_api: tuple[str, list[tuple[str, Any]]]) -> None:
    url, changes = auth_api
    user = stack.create_user("through@example.com")
    tl("admin", "grant", user.email, SUPABASE_URL=url)
    tl("admin", "revoke", user.id, SUPABASE_URL=url)
    path = f"/auth/v1/admin/users/{user.id}"
    assert changes == [(path, {"app_metadata": {"role": "admin"}}), (path, {"app_metadata": {"role": None}})]
    assert tl.json("admin", "list", SUPABASE_URL=url) == [{"id": "1", "email": "a@example.com"}]
    AuthApi.user = {"email_confirmed_at": None}
    assert "not confirmed" in tl.fails("admin", "grant", user.email, SUPABASE_URL=url)
    assert len(changes) == 2
    # the local stack has none
    assert "--db-url" in tl.fails("admin", "grant", user.id)


@pytest.mark.slow
@pytest.mark.parametrize("home", ["public", pytest.param("limits", marks=pytest.mark.full)])
def test_dev_is_a_stack_with_an_admin_until_ctrl_c(tl: Program, server: PostgresServer, home: str) -> None:
    url = server.url(f"dev_{home}")
    server.create_database(f"dev_{home}")
    with tl.on_terminal("dev", "--db-url", url, "--schema", home, "--user", "ann@example.com") as terminal:
        terminal.wait_for("Ready")
        env = dict(line.split("=", 1) for line in terminal.text.split() if "=" in line)
        assert env["TOKENLIMITS_SCHEMA"] == home
        assert (env["TOKENLIMITS_USER_EMAIL"], len(env["TOKENLIMITS_USER_ID"])) == ("ann@example.com", 36)
        key = env["SUPABASE_PUBLISHABLE_KEY"]
        answer = httpx.post(
            f"{env['SUPABASE_URL']}/auth/v1/token?grant_type=password",
            headers={"apikey": key},
            json={"email": env["TOKENLIMITS_ADMIN_EMAIL"], "password": env["TOKENLIMITS_ADMIN_PASSWORD"]},
            trust_env=False,
        )
        listed = httpx.post(
            f"{env['SUPABASE_URL']}/rest/v1/rpc/find_groups",
            headers={
                "apikey": key,
                "Authorization": f"Bearer {answer.json()['access_token']}",
                "Content-Profile": home,
            },
            json={},
            trust_env=False,
        )
        assert (listed.status_code, listed.json()) == (200, [])
        terminal.interrupt()
        assert terminal.status() == 0
        assert "Stopped" in terminal.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(env["SUPABASE_URL"], trust_env=False)
    with psycopg.connect(url) as connection:
        assert connection.execute("select count(*) from auth.users").fetchone() == (2,)
    assert "taken" in tl.fails("dev", "--port", env_port(tl), "--db-url", url)


@pytest.mark.slow
def test_dev_keeps_its_data_in_a_directory(tl: Program) -> None:
    def run(*more: object) -> dict[str, str]:
        with tl.on_terminal("dev", "--data-dir", tl.directory / "kept", *more) as terminal:
            terminal.wait_for("Ready")
            terminal.interrupt()
            assert terminal.status() == 0
            return dict(line.split("=", 1) for line in terminal.text.split() if "=" in line)

    first, second = run("--user", "ann@example.com"), run()
    assert first["SUPABASE_SECRET_KEY"] == second["SUPABASE_SECRET_KEY"]
    # the admin is there already, with the password of the first time
    assert {"TOKENLIMITS_ADMIN_PASSWORD", "TOKENLIMITS_USER_ID"} <= first.keys() - second.keys()
    assert "either --db-url or --data-dir" in tl.fails("dev", "--data-dir", "x", "--db-url", "postgresql://h/d")


def env_port(tl: Program) -> str:
    """The port of the shared stack."""
    return tl.environment["SUPABASE_URL"].rpartition(":")[2]
