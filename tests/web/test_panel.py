"""The panel without a browser: sessions, CSRF, headers, who sees what."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import FastAPI
from tests.web.conftest import served, settings_for

from tokenlimits import ConfigurationError, GroupManager, Limit
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import WebSettings, create_app
from tokenlimits.web._backend import Backend

ROOT = Path(__file__).parents[2]


@contextmanager
def browsing(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, follow_redirects=True, timeout=30) as browser:
        yield browser


@pytest.fixture
def browser(url: str) -> Iterator[httpx.Client]:
    with browsing(url) as browser:
        yield browser


def csrf_of(page: httpx.Response) -> str:
    """Find the token in a page."""
    found = re.search(r'name="csrf" value="([0-9a-f]{64})"', page.text)
    assert found is not None, page.text
    return found[1]


def sign_in(browser: httpx.Client, user: LocalUser, **more: str) -> httpx.Response:
    """Sign in as a browser does."""
    csrf = csrf_of(browser.get("sign-in"))
    return browser.post("sign-in", data={"csrf": csrf, "email": user.email, "password": user.password, **more})


class TestSigningIn:
    def test_an_admin_sees_the_groups(self, browser: httpx.Client, admin: LocalUser, groups: GroupManager) -> None:
        groups.create("Pro", limits={"image": 1})
        first = browser.get("/")
        assert first.url.path == "/sign-in"
        page = sign_in(browser, admin, next="/")
        assert (page.status_code, page.url.path) == (200, "/")
        assert "Pro" in page.text
        assert admin.email in page.text

    def test_nobody_else_sees_anything(self, browser: httpx.Client, user: LocalUser, groups: GroupManager) -> None:
        pro = groups.create("Pro", limits={"image": 1})
        page = sign_in(browser, user)
        assert page.status_code == 403
        assert "You are not an admin" in page.text
        for path in ("/", "/live"):
            answer = browser.get(path)
            assert answer.status_code == 403
            assert "Pro" not in answer.text
            assert str(pro.id) not in answer.text

    def test_a_wrong_password_is_said_beside_the_fields(self, browser: httpx.Client, admin: LocalUser) -> None:
        csrf = csrf_of(browser.get("/sign-in"))
        page = browser.post("/sign-in", data={"csrf": csrf, "email": admin.email, "password": "wrong"})
        assert page.status_code == 401
        assert 'role="alert"' in page.text
        assert admin.email in page.text
        assert "wrong" not in page.text.replace("belong", "")
        assert browser.get("/").url.path == "/sign-in"

    @pytest.mark.parametrize("there", ["https://evil.example/", "//evil.example", "/\\evil.example", "/\tx", "x"])
    def test_leads_nowhere_else(self, url: str, admin: LocalUser, there: str) -> None:
        with httpx.Client(base_url=url, trust_env=False) as browser:
            answer = sign_in(browser, admin, next=there)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")

    def test_attempts_are_limited(self, stack: LocalStack, admin: LocalUser) -> None:
        with served(create_app(settings_for(stack, sign_ins_per_minute=3))) as url, browsing(url) as browser:
            csrf = csrf_of(browser.get("/sign-in"))
            wrong = {"csrf": csrf, "email": admin.email, "password": "x"}
            assert [browser.post("/sign-in", data=wrong).status_code for _ in range(4)] == [401, 401, 401, 429]
            assert sign_in(browser, admin).status_code == 429


class TestCsrf:
    @pytest.mark.parametrize("token", [None, "", "0" * 64, "ü"])
    def test_without_the_token_nothing_is_done(
        self, browser: httpx.Client, admin: LocalUser, token: str | None
    ) -> None:
        sign_in(browser, admin)
        data = {} if token is None else {"csrf": token}
        assert browser.post("/sign-out", data=data).status_code == 403
        assert browser.get("/").url.path == "/"

    def test_the_token_of_another_session_is_none(self, url: str, browser: httpx.Client, admin: LocalUser) -> None:
        with browsing(url) as other:
            theirs = csrf_of(sign_in(other, admin))
        sign_in(browser, admin)
        assert browser.post("/sign-out", data={"csrf": theirs}).status_code == 403

    def test_nor_may_another_site_send_it(self, browser: httpx.Client, admin: LocalUser) -> None:
        csrf = csrf_of(sign_in(browser, admin))
        headers = {"Origin": "https://evil.example"}
        assert browser.post("/sign-out", data={"csrf": csrf}, headers=headers).status_code == 403
        for origin in ("null", "http://[", "http://evil.example/@127.0.0.1", "x" * 1000):
            headers = {"Origin": origin}
            assert browser.post("/sign-out", data={"csrf": csrf}, headers=headers).status_code == 403
        headers = {"Origin": str(browser.base_url).rstrip("/")}
        assert browser.post("/sign-out", data={"csrf": csrf}, headers=headers).url.path == "/sign-in"


class TestBehindAProxy:
    """Where the host that the panel sees is not, or not quite, the one that the browser has."""

    HERE = "https://limits.example"

    @pytest.mark.parametrize(
        "seen",
        [
            {"Sec-Fetch-Site": "same-origin"},  # nginx with its default Host, and any browser of these years
            {"X-Forwarded-Host": "limits.example"},
            {"X-Forwarded-Host": "127.0.0.1:8321, limits.example"},
            {"Host": "limits.example"},
            {"Host": "limits.example:443"},
            {"Host": "LIMITS.example:80"},
            {"Host": "limits.example", "Origin": "https://limits.example:8443"},
            {"Host": "limits.example:8443", "Origin": "https://limits.example:8443"},
            {"Host": "[2001:db8::1]:8321", "Origin": "http://[2001:db8::1]:8321"},
        ],
    )
    def test_somebody_signs_in(self, browser: httpx.Client, admin: LocalUser, seen: dict[str, str]) -> None:
        host = {name: value for name, value in seen.items() if name == "Host"}
        form = {
            "csrf": csrf_of(browser.get("/sign-in", headers=host)),
            "email": admin.email,
            "password": admin.password,
        }
        answer = browser.post("/sign-in", data=form, headers={"Origin": self.HERE} | seen, follow_redirects=False)
        assert (answer.status_code, answer.headers.get("location")) == (303, "/")

    @pytest.mark.parametrize(
        "seen",
        [
            {},
            {"Sec-Fetch-Site": "same-site", "Host": "limits.example"},
            {"Sec-Fetch-Site": "cross-site", "Origin": "null"},
            {"Host": "limits.example:8443"},
            {"Host": "limits.example:8443", "Origin": "https://limits.example:9443"},
            {"Host": "example"},
            {"Host": "limits.example:x"},
            {"X-Forwarded-Host": "other.example"},
        ],
    )
    def test_nobody_does_from_elsewhere(self, browser: httpx.Client, admin: LocalUser, seen: dict[str, str]) -> None:
        form = {"csrf": csrf_of(browser.get("/sign-in")), "email": admin.email, "password": admin.password}
        answer = browser.post("/sign-in", data=form, headers={"Origin": self.HERE} | seen)
        assert answer.status_code == 403

    @pytest.mark.parametrize("path", ["/groups/new/", "/api/groups/", "/sign-in/", "//evil.example/"])
    def test_nothing_leads_to_the_host_of_a_request(self, browser: httpx.Client, path: str) -> None:
        answer = browser.get(path, headers={"Host": "evil.example"}, follow_redirects=False)
        assert "evil" not in answer.headers.get("location", "")


class TestHead:
    @pytest.mark.parametrize(
        "path", ["/", "/sign-in", "/groups/new", "/live", "/static/panel.css", "/api/openapi.json", "/nowhere"]
    )
    def test_answers_as_get_without_a_body(self, browser: httpx.Client, admin: LocalUser, path: str) -> None:
        sign_in(browser, admin)
        read, head = (browser.request(method, path) for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (read.status_code, b"")
        assert head.headers["content-type"] == read.headers["content-type"]


class TestHeaders:
    @pytest.mark.parametrize("path", ["/sign-in", "/", "/api/groups", "/static/panel.css", "/nowhere"])
    def test_are_on_every_answer(self, browser: httpx.Client, path: str) -> None:
        headers = browser.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert "strict-transport-security" not in headers

    def test_behind_tls_browsers_are_told_to_stay_there(self, settings: WebSettings) -> None:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(create_app(settings))
            async with httpx.AsyncClient(transport=transport, base_url="https://limits.example") as client:
                return await client.get("/sign-in")

        answer = asyncio.run(ask())
        assert answer.headers["strict-transport-security"].startswith("max-age=31536000")
        assert answer.headers["set-cookie"].startswith("__Host-tokenlimits-")

    def test_pages_are_not_kept_and_files_are(self, browser: httpx.Client, admin: LocalUser) -> None:
        page = sign_in(browser, admin)
        assert page.headers["cache-control"] == "no-store"
        for file in set(re.findall(r'/static/[^"]+', page.text)):
            answer = browser.get(file)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]

    def test_no_page_needs_what_the_policy_forbids(self, browser: httpx.Client, admin: LocalUser) -> None:
        for page in (browser.get("/sign-in"), sign_in(browser, admin)):
            assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=|https?://", page.text)


class TestVendoredFiles:
    def test_are_named_with_their_licences(self) -> None:
        static = ROOT / "src" / "tokenlimits" / "web" / "panel" / "static"
        named = set(re.findall(r"^\| `([^`]+)`", (static / "VENDORED.md").read_text(), re.MULTILINE))
        assert named == {file.name for file in static.iterdir() if ".min." in file.name or file.suffix == ".woff2"}
        licences = (static / "LICENSES.txt").read_text()
        assert all(f"(static/{name})" in licences for name in named)


class TestLive:
    def test_answers_nothing_when_nothing_has_changed(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager
    ) -> None:
        sign_in(browser, admin)
        pro = groups.create("Pro", limits={"image": 4})
        first = browser.get("/live").json()
        assert first["groups"][str(pro.id)] == [0, "ok", [["ok", [0, 4], "0 of 4 used", "4 left", None]], ""]
        assert browser.get("/live", params={"version": first["version"]}).status_code == 204
        groups.set_limits(pro.id, {"image": 5})
        second = browser.get("/live", params={"version": first["version"]}).json()
        assert second["shape"] != first["shape"]

    @pytest.mark.parametrize(
        "change", [{"counts": {"image": 3, "video": 8}}, {"mode": "observe"}, {"starts": "anchor"}, {"max": 101}]
    )
    def test_the_groups_page_notices_each_edit_of_a_limit(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager, change: dict[str, Any]
    ) -> None:
        sign_in(browser, admin)
        pool: dict[str, Any] = {"kind": "credits", "max": 100, "period": "day", "counts": {"image": 1, "video": 8}}
        pro = groups.create("Pro", limits=[Limit(**pool)])
        page = f"/groups/{pro.id}"
        first = browser.get(f"{page}/live").json()
        assert f'data-shape="{first["shape"]}"' in browser.get(page).text
        groups.set_limits(pro.id, [Limit(**pool | change)])
        second = browser.get(f"{page}/live", params={"version": first["version"]}).json()
        assert second["shape"] != first["shape"]

    def test_a_customer_notices_its_move_and_its_plan(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager
    ) -> None:
        sign_in(browser, admin)
        pool: dict[str, Any] = {"kind": "credits", "max": 9, "period": "day", "scope": "child"}
        pro = groups.create("Pro", limits=[Limit(**pool, counts={"image": 1})])
        acme = groups.create("Acme", parent=pro)
        page = f"/groups/{acme.id}"
        shapes = [browser.get(f"{page}/live").json()["shape"]]
        assert f'data-shape="{shapes[0]}"' in browser.get(page).text
        groups.set_limits(pro.id, [Limit(**pool, counts={"image": 2})])
        shapes.append(browser.get(f"{page}/live").json()["shape"])
        groups.set_limits(pro.id, [])
        shapes.append(browser.get(f"{page}/live").json()["shape"])
        groups.update(acme.id, parent=None)
        shapes.append(browser.get(f"{page}/live").json()["shape"])
        assert len(set(shapes)) == 4


class TestMounted:
    def test_works_below_a_path(self, settings: WebSettings, admin: LocalUser) -> None:
        app = FastAPI()
        app.mount("/limits", create_app(settings))
        with served(app) as url, browsing(f"{url}/limits") as browser:
            page = sign_in(browser, admin, next="/limits/")
            assert (page.status_code, page.url.path) == (200, "/limits/")
            assert browser.get("live").status_code == 200
            for address in set(re.findall(r'(?:href|src|action|hx-get)="([^"#]*)"', page.text)):
                assert address.startswith("/limits/")


class TestStarting:
    def test_refuses_to_start_half_configured(self, settings: WebSettings, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigurationError, match="TOKENLIMITS_WEB_SECRET"):
            create_app(settings.model_copy(update={"web_secret": ()}))
        for name in ("URL", "PUBLISHABLE_KEY", "ANON_KEY", "SECRET_KEY", "SERVICE_ROLE_KEY"):
            monkeypatch.delenv(f"SUPABASE_{name}", raising=False)
        with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
            create_app()
        monkeypatch.setenv("SUPABASE_URL", "https://abc.supabase.co")
        service_role = "e30.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.abcdefgh"
        for name, key in (("PUBLISHABLE_KEY", "sb_secret_abcdefgh"), ("ANON_KEY", service_role)):
            with monkeypatch.context() as patched:
                patched.setenv(f"SUPABASE_{name}", key)
                with pytest.raises(ConfigurationError, match="must be the publishable one") as refused:
                    create_app()
            assert "abcdefgh" not in str(refused.value)

    @pytest.mark.parametrize(("name", "value"), [("no_proxy", "[::1]"), ("https_proxy", "socks9://ann:hush@proxy")])
    def test_says_which_variable_http_can_not_use(
        self, settings: WebSettings, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError, match=name.upper()) as refused:
            asyncio.run(Backend(settings)._http())
        assert "hush" not in str(refused.value)
        assert refused.value.__context__ is None


class TestWithoutSupabase:
    def test_says_so(self, settings: WebSettings, admin: LocalUser) -> None:
        away = settings.model_copy(update={"url": "http://127.0.0.1:9", "timeout": 0.5})
        with served(create_app(away)) as url, browsing(url) as browser:
            page = sign_in(browser, admin)
        assert page.status_code == 503
        assert "Supabase can&#39;t be reached" in page.text
        assert "Traceback" not in page.text


class TestDialogs:
    def post(self, browser: httpx.Client, path: str, data: dict[str, object]) -> httpx.Response:
        csrf = csrf_of(browser.get("/"))
        return browser.post(path, data=data, headers={"HX-Request": "true", "X-CSRF-Token": csrf})

    def test_what_the_database_refuses_is_said_beside_the_field(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager
    ) -> None:
        sign_in(browser, admin)
        groups.create("Pro")
        form = {"name": "PRO", "description": "", "priority": "0", "timezone": "UTC"}
        answer = self.post(browser, "/groups/new", form)
        assert answer.status_code == 422
        assert "Another group has this name." in answer.text
        answer = self.post(browser, "/groups/new", {**form, "name": "Other", "timezone": "Mars/Base"})
        assert "This time zone doesn&#39;t exist." in answer.text
        assert [group.name for group in groups.list()] == ["Pro"]

    def test_a_spread_group_is_made_and_takes_member_limits_only(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager
    ) -> None:
        sign_in(browser, admin)
        assert 'name="is_spread"' in browser.get("/groups/new", headers={"HX-Request": "true"}).text
        limit = {"kind": "image", "max": "10", "number": "1", "unit": "day", "starts": "calendar", "unlimited": "no"}
        form = {"name": "Free", "description": "", "priority": "0", "timezone": "UTC", "is_spread": "on"}
        form |= limit | {"mode": "enforce", "counts": ""}
        answer = self.post(browser, "/groups/new", {**form, "scope": "group"})
        assert (answer.status_code, groups.list()) == (422, [])
        assert "must be member in a spread group" in answer.text
        self.post(browser, "/groups/new", {**form, "scope": "member"})
        [free] = groups.list()
        assert free.is_spread
        assert "<dt>Spread</dt><dd>yes</dd>" in browser.get(f"/groups/{free.id}").text
        assert 'name="is_spread"' not in browser.get(f"/groups/{free.id}/edit", headers={"HX-Request": "true"}).text

    @pytest.mark.slow
    def test_fifty_thousand_members_can_be_pasted_and_paged(
        self, admin: LocalUser, groups: GroupManager, stack: LocalStack
    ) -> None:
        pro = groups.create("Pro")
        users = stack.create_users(50_000)
        listed = "\n".join([*map(str, users), "nobody@example.com"])
        # on the embedded PostgreSQL a part of the list takes seconds, when others compute too
        with served(create_app(settings_for(stack, timeout=60))) as url, browsing(url) as browser:
            browser.timeout = 300
            sign_in(browser, admin)
            answer = self.post(browser, f"/groups/{pro.id}/members", {"list": listed})
            assert answer.status_code == 200, answer.text
            assert "50,000 members added, 1 not found." in answer.headers["hx-trigger"]
            assert "nobody@example.com" in answer.text
            assert groups.usage(pro.id).member_count == 50_000
            more = re.search(r'hx-get="([^"]*after=[^"]*)"', answer.text)
            assert more is not None
            rows = browser.get(more[1])
            assert rows.text.count('name="member"') == 50
            last = list(groups.members(pro.id))[-1]
            rows = browser.get(f"/groups/{pro.id}/members/rows", params={"search": last.email})
            assert [str(last.id)] == re.findall(r'name="member" value="([^"]+)"', rows.text)

    def test_members_move_to_another_group(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager, stack: LocalStack
    ) -> None:
        pro, free = groups.create("Pro"), groups.create("Free")
        users = stack.create_users(3)
        groups.add_members(free.id, users)
        sign_in(browser, admin)
        chosen = {"member": [str(user) for user in users[:2]], "to": str(pro.id)}
        answer = self.post(browser, f"/groups/{free.id}/members/move", chosen)
        assert "2 members moved." in answer.headers["hx-trigger"]
        assert (groups.usage(free.id).member_count, groups.usage(pro.id).member_count) == (1, 2)

    def test_rows_that_no_reader_knows_hide_no_others(
        self, browser: httpx.Client, admin: LocalUser, groups: GroupManager, stack: LocalStack
    ) -> None:
        pro = groups.create("Pro", limits={"image": None})
        stack.sql(
            "insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at, settled_at) "
            f"select gen_random_uuid(), '{pro.id}', '{admin.id}', 'image', 1000 + n, 'committed', at, settled_at "
            "from generate_series(1, 40) as n, lateral (values "
            "(timestamptz 'infinity', now()), ('0044-03-15 BC', now()), "
            "(now() - n * interval '1 day', now()), (now() - n * interval '1 day', 'infinity')) as e (at, settled_at)"
        )
        try:
            sign_in(browser, admin)
            page = browser.get(f"groups/{pro.id}")
            exported = browser.get(f"groups/{pro.id}/export")
        finally:
            stack.sql(f"delete from public.generation_usage where group_id = '{pro.id}'")
        assert (page.status_code, exported.status_code) == (200, 200)
        assert "Recent usage" in page.text
        assert len(re.findall(r"\b10[0-4][0-9]\b|\b1,0[0-4][0-9]\b", page.text)) >= 10
        assert len(exported.text.splitlines()) == 1 + 40

    def test_a_group_that_is_gone_is_said_in_words(self, browser: httpx.Client, admin: LocalUser) -> None:
        sign_in(browser, admin)
        for path in (f"/groups/{uuid4()}", "/groups/x"):
            assert browser.get(path).status_code == 404
            assert "<html" in browser.get(path).text
        answer = browser.get(f"/groups/{uuid4()}/edit", headers={"HX-Request": "true"})
        assert (answer.status_code, answer.headers["content-type"]) == (404, "text/plain; charset=utf-8")

    @pytest.mark.parametrize("path", ["/nowhere", "/groups/x/y", "/static/nothing.css"])
    def test_a_mistyped_address_is_said_in_words(self, browser: httpx.Client, admin: LocalUser, path: str) -> None:
        for _ in range(2):
            answer = browser.get(path, headers={"Accept": "text/html,*/*;q=0.8"})
            assert answer.status_code == 404
            assert "Page not found" in answer.text
            assert answer.headers["cache-control"] == "no-store"
            sign_in(browser, admin)
        assert browser.get(path).text == "Not Found"

    def test_nobody_else_may_use_any_of_it(self, browser: httpx.Client, user: LocalUser, groups: GroupManager) -> None:
        pro = groups.create("Pro", limits={"image": 1})
        csrf = csrf_of(sign_in(browser, user))
        headers = {"HX-Request": "true", "X-CSRF-Token": csrf}
        group = f"/groups/{pro.id}"
        for path in ("/groups/new", group, f"{group}/edit", f"{group}/delete", f"{group}/members", f"{group}/live",
                     f"{group}/history", f"{group}/pressure", f"{group}/export", "/overview", "/overview/history",
                     f"{group}/members/search?email=example", f"{group}/members/rows?search=example",
                     f"{group}/members/rows?after={uuid4()}", f"{group}/exceptions", f"{group}/move",
                     f"{group}/members/{user.id}", f"{group}/customers/new"):  # fmt: skip
            answer = browser.get(path, headers=headers)
            assert answer.status_code == 403, path
            assert "example.com" not in answer.text
        form = {"name": "Mine", "priority": "0", "timezone": "UTC", "member": str(user.id), "user_id": str(user.id)}
        for path in ("/groups/new", f"{group}/edit", f"{group}/delete", f"{group}/members", f"{group}/members/remove",
                     f"{group}/reset", f"/usages/{uuid4()}/refund", f"{group}/move",
                     f"{group}/customers/new"):  # fmt: skip
            assert browser.post(path, data=form, headers=headers).status_code == 403, path
        form = {"kind": "image", "period": "lifetime", "starts": "calendar", "max": "5"}
        for path in (f"{group}/exceptions", f"{group}/exceptions/remove"):
            assert browser.post(path, data=form, headers=headers).status_code == 403, path
        assert groups.list() == [pro]


@pytest.mark.parametrize("program", [["tokenlimits.web"], ["tokenlimits", "admin"]], ids=["module", "command"])
class TestCommand:
    def run(self, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    @pytest.mark.slow
    def test_refuses_to_start_half_configured(self, stack: LocalStack, program: list[str]) -> None:
        done = self.run({}, *program)
        assert (done.returncode, done.stdout) == (1, "")
        assert "SUPABASE_URL" in done.stderr
        assert "Traceback" not in done.stderr
        done = self.run(stack.environment(), *program, "--host", "0.0.0.0")
        assert done.returncode == 1
        assert "TOKENLIMITS_WEB_SECRET" in done.stderr

    @pytest.mark.slow
    def test_serves_this_machine_alone(self, stack: LocalStack, program: list[str]) -> None:
        command = [sys.executable, "-m", *program, "--port", "0"]
        server = subprocess.Popen(command, env=stack.environment(), stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            assert httpx.get(f"{url}/sign-in", trust_env=False).status_code == 200
        finally:
            server.terminate()
            server.communicate(timeout=30)


class TestServing:
    @pytest.mark.slow
    def test_below_the_path_of_a_proxy_and_quietly(self, stack: LocalStack, admin: LocalUser) -> None:
        command = [sys.executable, "-m", "tokenlimits.web", "--port", "0", "--root-path", "limits/"]
        # buffered, or the log could fill the pipe
        with tempfile.TemporaryFile("w+") as log:
            environment = {**stack.environment(), "PYTHONPATH": str(ROOT / "src")}
            server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=log, text=True)
            try:
                assert server.stderr is not None
                found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stderr)
                url = next(each[0] for each in found if each)
                with browsing(url) as browser:
                    form = {"csrf": csrf_of(browser.get("/sign-in")), "email": admin.email, "password": admin.password}
                    answer = browser.post("/sign-in", data=form, follow_redirects=False)
                    assert answer.headers["location"] == "/limits/"
                    page = browser.get("/")
                    for address in set(re.findall(r'(?:href|src|action|hx-get)="([^"#]*)"', page.text)):
                        assert address.startswith("/limits/")
                    problem = browser.get("/api/nowhere")
                    assert problem.headers["content-type"] == "application/problem+json"
                    for path in ("/live", "/live?version=x", "/?search=ada%40example.com"):
                        assert browser.get(path).status_code == 200
            finally:
                server.terminate()
                server.communicate(timeout=30)
            log.seek(0)
            lines = log.read()
        assert "GET /limits/ HTTP" in lines
        assert "live" not in lines
        assert "ada" not in lines


class TestDemo:
    @pytest.mark.slow
    def test_starts_with_groups_that_are_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "examples/admin_panel.py", "--port", str(port)]
        demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert demo.stdout is not None
            said = [line.strip() for line in iter(demo.stdout.readline, "  Press Ctrl-C to stop.\n")]
            email, password = said[-2].split(", ")
            with browsing(f"http://127.0.0.1:{port}") as browser:
                wait_for(browser)
                page = sign_in(browser, LocalUser(UUID(int=0), email, password))
                assert page.text.count("<article") == 16
                assert "4 customers" in page.text
                for level in ("ok", "warn", "full"):
                    assert f'class="card is-{level}"' in page.text
        finally:
            demo.terminate()
            demo.communicate(timeout=30)


def wait_for(browser: httpx.Client) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            browser.get("/sign-in")
        except httpx.ConnectError:
            assert time.monotonic() < until
        else:
            return
