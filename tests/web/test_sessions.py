"""The panel's sessions: what is in the cookie, how long it works, and what ends it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import wraps
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.fernet import MultiFernet
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response
from tests.web.conftest import SECRET, served, settings_for
from tests.web.test_panel import browsing, csrf_of, sign_in

from tokenlimits import ConfigurationError, ServiceUnavailable
from tokenlimits.errors import AccessDenied
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import WebSettings, create_app
from tokenlimits.web._auth import Auth, Person, Tokens
from tokenlimits.web._backend import Backend
from tokenlimits.web._sessions import Session, Sessions
from tokenlimits.web._settings import load
from tokenlimits.web._shared import Shared
from tokenlimits.web.panel._pages import Panel

HOUR = 3600.0


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that awaits."""

    @wraps(test)
    def run(*args: Any, **more: Any) -> None:
        asyncio.run(test(*args, **more))

    return run


@pytest.fixture
def browser(url: str) -> Iterator[httpx.Client]:
    with browsing(url) as browser:
        yield browser


@pytest.fixture
def url_of_the_impatient(settings: WebSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another process of the panel, for which the minute is over in which an answer of Supabase Auth is believed."""
    monkeypatch.setattr("tokenlimits.web._sessions._CONFIRMED", 0)
    with served(create_app(settings)) as url:
        yield url


@pytest.fixture
def impatient(url_of_the_impatient: str) -> Iterator[httpx.Client]:
    with browsing(url_of_the_impatient) as browser:
        yield browser


def sessions_of(settings: WebSettings) -> Sessions:
    return Panel(Backend(settings)).sessions


def tokens_of(settings: WebSettings, user: LocalUser) -> Tokens:
    async def signed_in() -> Tokens:
        backend = Backend(settings)
        try:
            return await backend.auth.sign_in(user.email, SecretStr(user.password))
        finally:
            await backend.aclose()

    return asyncio.run(signed_in())


def name_of_cookie(browser: httpx.Client) -> str:
    """Return what the panel calls its cookie."""
    return browser.get("/sign-in").headers["set-cookie"].partition("=")[0]


def carry(browser: httpx.Client, cookie: str) -> None:
    name = name_of_cookie(browser)
    browser.cookies.clear()
    browser.cookies.set(name, cookie, domain="127.0.0.1")


def cookie_in(browser: httpx.Client) -> str:
    return "".join(browser.cookies.values())


def is_signed_in(browser: httpx.Client, cookie: str) -> bool:
    carry(browser, cookie)
    return browser.get("/", follow_redirects=False).status_code == 200


class TestTheCookie:
    def test_is_sealed_and_out_of_reach(self, url: str, admin: LocalUser) -> None:
        with httpx.Client(base_url=url, trust_env=False) as browser:
            cookie = sign_in(browser, admin).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert "eyJ" not in cookie
        assert "Secure" not in cookie  # http, on loopback

    def test_behind_tls_it_is_secure_and_of_this_host_alone(self, settings: WebSettings) -> None:
        request = Request(
            {"type": "http", "scheme": "https", "server": ("limits.example", 443), "path": "/", "headers": []}
        )
        response = Response()
        sessions_of(settings).write(request, response, Session("id"))
        assert response.headers["set-cookie"].startswith("__Host-tokenlimits-")
        assert "Secure" in response.headers["set-cookie"]

    def test_each_panel_of_a_host_has_its_own(self, stack: LocalStack, settings: WebSettings, admin: LocalUser) -> None:
        there = settings_for(stack, url=f"{stack.url}/", web_secret=secrets.token_urlsafe(32))
        host = FastAPI()
        host.mount("/a", create_app(settings))
        host.mount("/b", create_app(there))
        host.mount("/c", create_app(settings_for(stack, web_secret=secrets.token_urlsafe(32))))
        with served(host) as url, browsing(url) as browser:
            for panel in "abc":
                csrf = csrf_of(browser.get(f"/{panel}/sign-in"))
                form = {"csrf": csrf, "email": admin.email, "password": admin.password}
                assert browser.post(f"/{panel}/sign-in", data=form).status_code == 200
            assert [browser.get(f"/{panel}/").url.path for panel in "abc"] == ["/a/", "/b/", "/c/"]

    def test_two_panels_of_one_project_on_two_ports_leave_each_other_alone(
        self, stack: LocalStack, settings: WebSettings, admin: LocalUser
    ) -> None:
        with (
            served(create_app(settings)) as one,
            served(create_app(settings_for(stack, web_secret=secrets.token_urlsafe(32)))) as other,
            httpx.Client(trust_env=False, timeout=30) as browser,
        ):
            for url in (one, other):
                form = {
                    "csrf": csrf_of(browser.get(f"{url}/sign-in")),
                    "email": admin.email,
                    "password": admin.password,
                }
                assert browser.post(f"{url}/sign-in", data=form, headers={"Origin": url}).status_code == 303
            assert [browser.get(f"{url}/").status_code for url in (one, other)] == [200, 200]

    @pytest.mark.parametrize("cookie", ["", "garbage", "gAAAAABn", "gAAAAAB\u00fc".encode().decode("latin-1")])
    def test_one_that_was_changed_is_nobody(self, browser: httpx.Client, cookie: str) -> None:
        header = {b"Cookie": f"{name_of_cookie(browser)}={cookie}".encode("latin-1")}
        assert browser.get("/", headers=header).url.path == "/sign-in"

    def test_one_that_is_too_large_is_said_in_words(
        self, url: str, admin: LocalUser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tokenlimits.web._sessions._MOST", 500)
        with browsing(url) as browser:
            page = sign_in(browser, admin)
        assert page.status_code == 422
        assert "too large for a cookie" in page.text


class TestRefreshing:
    @pytest.mark.parametrize(("ends", "is_new"), [(HOUR, False), (30.0, True), (-30.0, True)])
    def test_before_the_token_ends(
        self, browser: httpx.Client, settings: WebSettings, admin: LocalUser, ends: float, is_new: bool
    ) -> None:
        sessions = sessions_of(settings)
        tokens = tokens_of(settings, admin)._replace(expires_at=time.time() + ends)
        since = time.time() - HOUR
        carry(browser, sessions._close(Session("id", tokens, since)))
        page = browser.get("/")
        assert page.status_code == 200
        assert ("set-cookie" in page.headers) is is_new
        if is_new:
            written = sessions._open(cookie_in(browser))
            assert written is not None
            assert written.tokens is not None
            assert written.tokens.expires_at > time.time() + 3000
            assert (written.id, written.since) == ("id", since)  # it is no new session

    def test_a_session_that_can_not_be_has_ended(
        self, browser: httpx.Client, settings: WebSettings, admin: LocalUser
    ) -> None:
        tokens = tokens_of(settings, admin)
        ended = tokens._replace(expires_at=time.time() + 30, refresh=SecretStr("spent"))
        carry(browser, sessions_of(settings)._close(Session("id", ended)))
        assert browser.get("/").url.path == "/sign-in"
        assert browser.get("/live", headers={"HX-Request": "true"}).status_code == 401


class TestLimits:
    def sealed(self, settings: WebSettings, session: Session, ago: float, monkeypatch: pytest.MonkeyPatch) -> str:
        def earlier(fernets: MultiFernet, content: bytes) -> bytes:
            return fernets.encrypt_at_time(content, int(time.time() - ago))

        with monkeypatch.context() as patched:
            patched.setattr(MultiFernet, "encrypt", earlier)
            return sessions_of(settings)._close(session)

    @pytest.mark.parametrize(("idle", "works"), [(0.0, True), (1.9 * HOUR, True), (2.1 * HOUR, False)])
    def test_an_idle_session_ends(
        self,
        browser: httpx.Client,
        settings: WebSettings,
        admin: LocalUser,
        monkeypatch: pytest.MonkeyPatch,
        idle: float,
        works: bool,
    ) -> None:
        session = Session("id", tokens_of(settings, admin), time.time() - 3 * HOUR)
        assert is_signed_in(browser, self.sealed(settings, session, idle, monkeypatch)) is works

    @pytest.mark.parametrize(("age", "works"), [(11.9 * HOUR, True), (12.1 * HOUR, False)])
    def test_so_does_one_that_was_always_used(
        self, browser: httpx.Client, settings: WebSettings, admin: LocalUser, age: float, works: bool
    ) -> None:
        session = Session("id", tokens_of(settings, admin), time.time() - age)
        assert is_signed_in(browser, sessions_of(settings)._close(session)) is works

    def test_settings_say_when(
        self, stack: LocalStack, settings: WebSettings, admin: LocalUser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = settings_for(stack, session_idle_minutes=1, session_hours=1)
        tokens = tokens_of(settings, admin)
        with served(create_app(given)) as url, browsing(url) as browser:
            assert is_signed_in(browser, self.sealed(settings, Session("id", tokens), 50, monkeypatch))
            assert not is_signed_in(browser, self.sealed(settings, Session("id", tokens), 70, monkeypatch))
            old = Session("id", tokens, time.time() - 1.1 * HOUR)
            assert not is_signed_in(browser, self.sealed(settings, old, 0, monkeypatch))

    def test_using_it_keeps_it_and_a_page_that_refreshes_itself_does_not(
        self, browser: httpx.Client, settings: WebSettings, admin: LocalUser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        since = time.time() - 3 * HOUR
        session = Session("id", tokens_of(settings, admin), since)
        old = self.sealed(settings, session, HOUR, monkeypatch)
        carry(browser, old)
        assert browser.get("/live").status_code == 200
        assert cookie_in(browser) == old
        assert browser.get("/").status_code == 200
        renewed = sessions_of(settings)._open(cookie_in(browser))
        assert renewed is not None
        assert (renewed.id, renewed.tokens, renewed.since) == (session.id, session.tokens, since)
        assert renewed.seen > time.time() - 60
        # but not with every request: that would send thousands of bytes each time
        assert "set-cookie" not in browser.get("/").headers

    def test_forms_of_an_ended_session_lead_to_the_sign_in_page(
        self, browser: httpx.Client, settings: WebSettings, admin: LocalUser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        page = sign_in(browser, admin)
        session = sessions_of(settings)._open(cookie_in(browser))
        assert session is not None
        carry(browser, self.sealed(settings, session, 3 * HOUR, monkeypatch))
        answer = browser.post("/groups/new", data={"csrf": csrf_of(page), "name": "Pro"})
        assert (answer.status_code, answer.url.path) == (200, "/sign-in")


class TestSigningOut:
    def test_ends_it_here_at_once(self, browser: httpx.Client, admin: LocalUser) -> None:
        page = sign_in(browser, admin)
        old = cookie_in(browser)
        assert browser.post("/sign-out", data={"csrf": csrf_of(page)}).url.path == "/sign-in"
        assert cookie_in(browser) != old
        assert browser.get("/").url.path == "/sign-in"
        assert not is_signed_in(browser, old)

    def test_ends_it_in_other_processes_within_a_minute(
        self, browser: httpx.Client, impatient: httpx.Client, admin: LocalUser
    ) -> None:
        page = sign_in(browser, admin)
        copy = cookie_in(browser)
        assert is_signed_in(impatient, copy)
        browser.post("/sign-out", data={"csrf": csrf_of(page)})
        assert not is_signed_in(impatient, copy)

    def test_ends_one_whose_token_has_ended(
        self, browser: httpx.Client, settings: WebSettings, admin: LocalUser
    ) -> None:
        sessions = sessions_of(settings)
        tokens = tokens_of(settings, admin)
        junk = SecretStr(tokens.access.get_secret_value()[:-4] + "AAAA")  # refused, like one that has ended
        session = Session("id", tokens._replace(access=junk, expires_at=time.time() - 60))
        carry(browser, sessions._close(session))
        browser.post("/sign-out", data={"csrf": sessions.csrf(session)})
        assert not is_signed_in(browser, sessions._close(Session("id", tokens)))

    def test_leaves_other_sessions_of_the_same_person_alone(
        self, url: str, browser: httpx.Client, admin: LocalUser
    ) -> None:
        with browsing(url) as other:
            sign_in(other, admin)
            page = sign_in(browser, admin)
            browser.post("/sign-out", data={"csrf": csrf_of(page)})
            assert other.get("/").url.path == "/"

    def test_with_supabase_away_the_log_says_so(
        self, settings: WebSettings, admin: LocalUser, caplog: pytest.LogCaptureFixture
    ) -> None:
        away = settings.model_copy(update={"url": "http://127.0.0.1:9"})
        tokens = tokens_of(settings, admin)
        with served(create_app(away)) as url, browsing(url) as browser:
            sessions = sessions_of(away)
            session = Session("id", tokens)
            carry(browser, sessions._close(session))
            answer = browser.post("/sign-out", data={"csrf": sessions.csrf(session)})
            assert (answer.status_code, answer.url.path) == (200, "/sign-in")
            assert browser.get("/").url.path == "/sign-in"
        assert "not in Supabase Auth" in caplog.text


class TestSomebodyWhoIsNoAdminAnyMore:
    def test_sees_nothing_within_a_minute(
        self, impatient: httpx.Client, stack: LocalStack, newcomer: LocalUser
    ) -> None:
        stack.grant_admin(newcomer.id)
        assert sign_in(impatient, newcomer, next="/").status_code == 200
        copy = cookie_in(impatient)
        stack.revoke_admin(newcomer.id)
        for path in ("/", "/live"):
            answer = impatient.get(path)
            assert answer.status_code == 403
        carry(impatient, copy)
        assert impatient.get("/live").status_code == 403

    def test_and_somebody_who_has_become_one_sees_all(
        self, impatient: httpx.Client, stack: LocalStack, newcomer: LocalUser
    ) -> None:
        assert sign_in(impatient, newcomer).status_code == 403
        stack.grant_admin(newcomer.id)
        assert impatient.get("/").status_code == 200

    def test_nor_does_somebody_who_was_deleted(
        self, impatient: httpx.Client, stack: LocalStack, newcomer: LocalUser
    ) -> None:
        stack.grant_admin(newcomer.id)
        assert sign_in(impatient, newcomer).status_code == 200
        stack.sql("delete from auth.users where id = $1::uuid", str(newcomer.id))
        assert impatient.get("/").url.path == "/sign-in"


class CountingAuth(Auth):
    """Says always the same, and counts who asks."""

    def __init__(self, said: Person) -> None:
        self.said = said
        self.persons = self.refreshes = 0

    async def person(self, token: SecretStr) -> Person:
        self.persons += 1
        await asyncio.sleep(0)
        return self.said

    async def refresh(self, tokens: Tokens) -> Tokens:
        self.refreshes += 1
        await asyncio.sleep(0)
        return tokens._replace(access=SecretStr(f"access {self.refreshes}"), person=tokens.person)


@pytest.fixture
def turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Turn the clock of what is kept."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tokenlimits.web._shared.time", SimpleNamespace(monotonic=lambda: clock.now))

    def ahead(seconds: float) -> None:
        clock.now += seconds

    return ahead


class TestConfirming:
    ADA = Person(id="00000000-0000-0000-0000-00000000000a", standing="admin")

    def held(self, auth: Auth) -> tuple[Sessions, Session]:
        tokens = Tokens(SecretStr("access"), SecretStr("refresh"), time.time() + HOUR, self.ADA)
        return Sessions(auth, [SecretStr(SECRET)], project="", idle=HOUR, longest=HOUR), Session("id", tokens)

    @in_a_loop
    async def test_once_a_minute_for_all_requests(self, turn: Callable[[float], None]) -> None:
        auth = CountingAuth(self.ADA)
        sessions, session = self.held(auth)
        for seconds in (0, 59.9):
            turn(seconds)
            assert await asyncio.gather(*(sessions.fresh(session) for _ in range(9))) == [session] * 9
            assert auth.persons == 1
        turn(0.2)
        await asyncio.gather(*(sessions.fresh(session) for _ in range(9)))
        assert (auth.persons, auth.refreshes) == (2, 0)

    @in_a_loop
    async def test_a_changed_standing_refreshes_once(self, turn: Callable[[float], None]) -> None:
        auth = CountingAuth(self.ADA.model_copy(update={"standing": "nobody"}))
        sessions, session = self.held(auth)
        fresh = await asyncio.gather(*(sessions.fresh(session) for _ in range(9)))
        assert (auth.persons, auth.refreshes) == (1, 1)
        assert fresh[0].tokens is not None
        # though Auth goes on to say something else, as it might where a hook changes what is in tokens
        for _ in range(9):
            assert await sessions.fresh(fresh[0]) is fresh[0]
        assert (auth.persons, auth.refreshes) == (1, 1)

    @in_a_loop
    async def test_what_can_not_be_confirmed_is_not_believed(self) -> None:
        class Away(CountingAuth):
            async def person(self, token: SecretStr) -> Person:
                raise ServiceUnavailable("away")

        sessions, session = self.held(Away(self.ADA))
        for _ in range(2):
            with pytest.raises(ServiceUnavailable):
                await sessions.fresh(session)


class TestShared:
    @in_a_loop
    async def test_whoever_gives_up_takes_the_answer_from_nobody(self) -> None:
        shared: Shared[int] = Shared(60)
        go = asyncio.Event()

        async def ask() -> int:
            await go.wait()
            return 1

        first, second = (asyncio.create_task(shared.get("a", ask)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        go.set()
        assert await second == 1

    @in_a_loop
    async def test_keeps_no_error_and_nothing_old(self, turn: Callable[[float], None]) -> None:
        shared: Shared[int] = Shared(60)

        async def refuse() -> int:
            raise AccessDenied("no")

        async def one() -> int:
            return 1

        with pytest.raises(AccessDenied):
            await shared.get("a", refuse)
        assert await shared.get("a", one) == 1
        assert await shared.get("a", refuse) == 1
        shared.forget("a")
        with pytest.raises(AccessDenied):
            await shared.get("a", refuse)
        for key in range(100):
            turn(1)
            await shared.get(str(key), one)
        assert len(shared._kept) <= 61


class TestSecrets:
    def test_are_rotated_without_signing_anybody_out(self, stack: LocalStack, admin: LocalUser) -> None:
        old, new = SECRET, secrets.token_urlsafe(32)
        both = settings_for(stack, web_secret=f"{new}, {old}")
        alone = settings_for(stack, web_secret=[new])
        with served(create_app(settings_for(stack))) as url, browsing(url) as browser:
            page = sign_in(browser, admin)
            before = cookie_in(browser)
        with served(create_app(both)) as url, browsing(url) as browser:
            assert is_signed_in(browser, before)
            # a form that was open meanwhile still works
            assert browser.post("/groups/new", data={"csrf": csrf_of(page)}).status_code == 422
            sign_in(browser, admin)
            after = cookie_in(browser)
        with served(create_app(alone)) as url, browsing(url) as browser:
            assert is_signed_in(browser, after)
            assert not is_signed_in(browser, before)
            assert browser.post("/groups/new", data={"csrf": csrf_of(page)}).status_code == 403

    def test_a_key_is_for_one_purpose(self, settings: WebSettings) -> None:
        sessions = sessions_of(settings)
        keys = {*sessions._seal._csrf_keys, SECRET.encode()[:32]}
        keys |= {each._signing_key + each._encryption_key for each in sessions._seal._fernets._fernets}
        assert len(keys) == 3
        assert {len(key) for key in keys} == {32}

    @pytest.mark.parametrize(
        "weak",
        ["short", "x" * 64, "0123456789" * 4, "hunter2-" * 8, "abcdefghijklmnopqrstuvwxyz0123456789", "ab" * 20],
    )
    @pytest.mark.parametrize("before", ["", f"{SECRET},"], ids=["alone", "after a strong one"])
    def test_a_weak_one_is_refused_at_the_start(self, monkeypatch: pytest.MonkeyPatch, weak: str, before: str) -> None:
        monkeypatch.setenv("SUPABASE_URL", "https://abc.supabase.co")
        monkeypatch.setenv("SUPABASE_PUBLISHABLE_KEY", "sb_publishable_abc")
        monkeypatch.setenv("TOKENLIMITS_WEB_SECRET", before + weak)
        with pytest.raises(ConfigurationError, match=r"TOKENLIMITS_WEB_SECRET: .*secrets\.token_urlsafe") as caught:
            load()
        assert weak not in str(caught.value)
        with pytest.raises(ValueError, match=r"secrets\.token_urlsafe") as refused:
            WebSettings(url="https://abc.supabase.co", publishable_key="sb_publishable_abc", web_secret=weak)
        assert weak not in str(refused.value)

    @pytest.mark.parametrize("make", [secrets.token_urlsafe, secrets.token_hex], ids=["base64", "hex"])
    def test_a_random_one_is_taken(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], str]) -> None:
        monkeypatch.setenv("SUPABASE_URL", "https://abc.supabase.co")
        monkeypatch.setenv("SUPABASE_PUBLISHABLE_KEY", "sb_publishable_abc")
        for _ in range(100):
            first, second = make(32), make(32)
            monkeypatch.setenv("TOKENLIMITS_WEB_SECRET", f"{first} , {second},")
            assert load().web_secret == (SecretStr(first), SecretStr(second))
