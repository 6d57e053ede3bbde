"""How much the API and the panel read, from whom, and for how long."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI
from tests.web.conftest import served
from tests.web.test_api import Ask, problem
from tests.web.test_panel import browsing, csrf_of, sign_in

from tokenlimits import GroupManager
from tokenlimits.local import LocalUser
from tokenlimits.web import WebSettings, create_app, router
from tokenlimits.web._bodies import MOST, MOST_IN_BULK

FORGED = "e30.e30.AA"

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture(params=["said", "streamed"])
def sent(request: pytest.FixtureRequest) -> Callable[[bytes], bytes | Iterator[bytes]]:
    """Send a body with its length, or in chunks without one."""

    def chunks(content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), 50_000):
            yield content[start : start + 50_000]

    return chunks if request.param == "streamed" else lambda content: content


@pytest.fixture(params=["the app", "router() in another app"])
def api(request: pytest.FixtureRequest, settings: WebSettings, tokens: dict[str, str]) -> Iterator[Ask]:
    app = create_app(settings)
    if request.param != "the app":
        app = FastAPI()
        app.include_router(router(settings))
    with served(app) as url, httpx.Client(base_url=f"{url}/api", trust_env=False, timeout=30) as client:

        def ask(role: str | None, method: str, path: str, **more: object) -> httpx.Response:
            known = {} if role is None else {"Authorization": f"Bearer {tokens.get(role, role)}"}
            return client.request(method, path, headers=JSON | known, **more)

        yield ask


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what was parsed as JSON from requests."""
    lengths: list[int] = []

    def loads(content: bytes) -> object:
        lengths.append(len(content))
        return json.loads(content)

    monkeypatch.setattr("starlette.requests.json", SimpleNamespace(loads=loads))
    return lengths


def many_members(count: int, group: object) -> bytes:
    return json.dumps({"group_id": str(group), "user_ids": [str(uuid4()) for _ in range(count)]}).encode()


class TestTheApi:
    @pytest.mark.slow
    @pytest.mark.parametrize("path", ["/groups", "/group-members", "/track-generation"])
    def test_parses_nothing_of_nobody(
        self, api: Ask, parsed: list[int], path: str, sent: Callable[..., object]
    ) -> None:
        problem(api(None, "POST", path, content=sent(b"[" * 9_000_000)), 401, "sign-in-required")
        problem(api("garbage", "POST", path, content=sent(b"{}")), 401, "sign-in-required")
        assert parsed == []

    @pytest.mark.parametrize("role", ["user", "service", FORGED])
    def test_reads_64_kb(self, api: Ask, parsed: list[int], role: str, sent: Callable[..., object]) -> None:
        long = b'{"kind": "image"' + b" " * MOST + b"}"
        problem(api(role, "POST", "/track-generation", content=sent(long)), 413, "too-large")
        assert not any(length > MOST for length in parsed)
        full = long[: MOST - len(long)]
        assert len(full) == MOST
        assert api(role, "POST", "/track-generation", content=sent(full)).status_code in (400, 422)

    @pytest.mark.parametrize("path", ["/groups", "/group-members"])
    def test_reads_lists_from_admins_alone(
        self, api: Ask, parsed: list[int], groups: GroupManager, path: str, sent: Callable[..., object]
    ) -> None:
        body = many_members(2000, uuid4())
        problem(api("user", "POST", path, content=sent(body)), 403, "access-denied")
        problem(api(FORGED, "POST", path, content=sent(body)), 401, "sign-in-required")
        assert not any(length == len(body) for length in parsed)
        assert api("admin", "POST", path, content=sent(body)).status_code in (404, 422)
        assert any(length == len(body) for length in parsed)
        problem(api("admin", "POST", path, content=sent(b" " * (MOST_IN_BULK + 1))), 413, "too-large")

    def test_a_list_of_members_is_taken(self, api: Ask, groups: GroupManager, sent: Callable[..., object]) -> None:
        pro = groups.create("Pro")
        added = api("admin", "POST", "/group-members", content=sent(many_members(2000, pro.id))).json()
        assert len(added["refused"]) == 2000


class TestThePanel:
    def test_reads_64_kb(self, url: str, sent: Callable[..., object]) -> None:
        with browsing(url) as browser:
            page = browser.post("/sign-in", content=sent(b"a=" + b"a" * 20_000_000), headers=FORM)
        assert page.status_code == 413
        assert "This is too large" in page.text

    def test_reads_lists_from_admins_alone(
        self, url: str, user: LocalUser, admin: LocalUser, groups: GroupManager, sent: Callable[..., object]
    ) -> None:
        path = f"/groups/{groups.create('Pro').id}/members"
        listed = b"list=" + b"nobody%40example.com%0A" * 20_000
        with browsing(url) as browser:
            answer = browser.post(path, content=sent(listed), headers=FORM)
            assert answer.url.path == "/sign-in"
            csrf = csrf_of(sign_in(browser, user))
            assert browser.post(path, content=sent(listed), headers=FORM | {"X-CSRF-Token": csrf}).status_code == 403
        with browsing(url) as browser:
            csrf = csrf_of(sign_in(browser, admin))
            headers = FORM | {"X-CSRF-Token": csrf}
            assert browser.post(path, content=sent(listed), headers=headers).status_code == 200
            long = b"list=" + b"a" * MOST_IN_BULK
            assert browser.post(path, content=sent(long), headers=headers).status_code == 413


@pytest.mark.parametrize("path", ["/api/track-generation", "/sign-in"])
def test_whoever_never_ends_is_told_so(
    settings: WebSettings, tokens: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenlimits.web._bodies._SECONDS", 0.2)
    with served(create_app(settings)) as url:
        to = urlsplit(url)
        with socket.create_connection((to.hostname, to.port), timeout=30) as slow:
            slow.sendall(
                f"POST {path} HTTP/1.1\r\nHost: {to.netloc}\r\nContent-Length: 100\r\n"
                f"Authorization: Bearer {tokens['service']}\r\nContent-Type: {FORM['Content-Type']}\r\n\r\na=1".encode()
            )
            assert slow.recv(12) == b"HTTP/1.1 408"
