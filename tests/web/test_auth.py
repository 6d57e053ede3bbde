"""Supabase Auth as the panel asks it: what its answers mean, and that no error tells a secret."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from uuid import uuid4

import pytest
from pydantic import SecretStr
from starlette.types import Message, Receive, Scope, Send
from tests.http.leaks import chain, text_of
from tests.web.conftest import served

from tokenlimits import ServiceUnavailable
from tokenlimits.errors import AccessDenied
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import WebSettings
from tokenlimits.web._auth import Auth, Person, Tokens
from tokenlimits.web._backend import Backend
from tokenlimits.web._problems import SignInRequired, TooManyRequests

PASSWORD, ACCESS, REFRESH = "correct-horse", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmVk", "refresh-me-once"
SECRETS = (PASSWORD, ACCESS, REFRESH)
USER = {"id": str(uuid4()), "app_metadata": {}, "user_metadata": {}, "aud": "", "created_at": "2026-01-01T00:00:00Z"}
SESSION = {"access_token": ACCESS, "refresh_token": REFRESH, "expires_in": 3600, "token_type": "bearer", "user": USER}
HELD = Tokens(SecretStr(ACCESS), SecretStr(REFRESH), 0, Person(id=uuid4(), standing=""))

CALLS: dict[str, Callable[[Auth], Awaitable[object]]] = {
    "sign in": lambda auth: auth.sign_in("ada@example.com", SecretStr(PASSWORD)),
    "refresh": lambda auth: auth.refresh(HELD),
    "person": lambda auth: auth.person(HELD.access),
    "sign out": lambda auth: auth.sign_out(HELD),
}


class FakeAuth:
    """A server that answers all requests alike, in the name of Supabase Auth."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.is_endless = False
        self.connections = set[tuple[str, int]]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.connections.add(scope["client"])
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        while self.is_endless and not await self._has_left(receive):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await send({"type": "http.response.body", "body": self.body})

    async def _has_left(self, receive: Receive) -> bool:
        message: Message = {}
        while message.get("type") != "http.disconnect":
            try:
                message = await asyncio.wait_for(receive(), 0.05)
            except TimeoutError:
                return False
        return True


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeAuth, str]]:
    app = FakeAuth()
    with served(app) as url:
        yield app, url


@pytest.fixture
def fake(server: tuple[FakeAuth, str]) -> FakeAuth:
    server[0].is_endless = False
    return server[0]


@pytest.fixture
def settings(server: tuple[FakeAuth, str]) -> WebSettings:
    return WebSettings(url=server[1], publishable_key="sb_publishable_abc")


@pytest.fixture(autouse=True)
def _logs_are_silent(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.records:
        assert_silent(f"{record.getMessage()} {vars(record)}")


def assert_silent(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text


def assert_safe(error: object) -> None:
    """It shows no secret, and carries no error of others: those hold requests, and whoever holds them reads all."""
    assert isinstance(error, BaseException)
    assert_silent(text_of(error))
    assert {type(each).__module__.partition(".")[0] for each in chain(error)} == {"tokenlimits"}


def ask(settings: WebSettings, *calls: Callable[[Auth], Awaitable[object]]) -> list[object]:
    """Ask, and return the answers, or the errors in their place."""

    async def main() -> list[object]:
        backend = Backend(settings)
        try:
            return [(await asyncio.gather(call(backend.auth), return_exceptions=True))[0] for call in calls]
        finally:
            await backend.aclose()

    return asyncio.run(main())


REFUSALS = {
    "wrong": (400, {"code": "invalid_credentials", "message": "Invalid login credentials"}),
    "no token": (403, {"code": "bad_jwt", "message": f"bad {ACCESS} {REFRESH} {PASSWORD}"}),
    "signed out": (403, {"code": "session_not_found", "message": "Session from session_id claim doesn't exist"}),
    "old words": (401, {"error": "invalid_grant", "error_description": "no"}),
    "weak": (422, {"code": 422, "weak_password": {"reasons": ["length"]}, "msg": "weak"}),
}
FAULTS = {
    "broken": (500, {"code": "unexpected_failure", "message": "no"}),
    "away": (503, {"message": "no"}),
    "a proxy's page": (403, "<html>"),
    "a proxy's error": (502, "<html>"),
    "moved": (302, ""),
    "no JSON": (200, f"<html>{ACCESS}"),
    "another answer": (200, {"access_token": ACCESS, "refresh_token": REFRESH}),
    "nobody's id": (200, SESSION | {"user": USER | {"id": f"no id {ACCESS}"}}),
}


@pytest.mark.parametrize("call", CALLS)
class TestWhatAnswersMean:
    def answered(self, fake: FakeAuth, settings: WebSettings, call: str, answer: tuple[int, object]) -> object:
        fake.status = answer[0]
        fake.body = (answer[1] if isinstance(answer[1], str) else json.dumps(answer[1])).encode()
        got = ask(settings, CALLS[call])[0]
        if isinstance(got, BaseException):
            assert_safe(got)
        return got

    @pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
    def test_a_refusal(self, fake: FakeAuth, settings: WebSettings, call: str, answer: tuple[int, object]) -> None:
        refused = SignInRequired if call == "person" else AccessDenied
        assert type(self.answered(fake, settings, call, answer)) is refused

    @pytest.mark.parametrize("answer", FAULTS.values(), ids=FAULTS)
    def test_a_fault(self, fake: FakeAuth, settings: WebSettings, call: str, answer: tuple[int, object]) -> None:
        got = self.answered(fake, settings, call, answer)
        if call == "sign out" and answer[0] == 200:
            assert got is None  # whatever it says
        else:
            assert type(got) is ServiceUnavailable

    def test_too_many(self, fake: FakeAuth, settings: WebSettings, call: str) -> None:
        answer = (429, {"code": "over_request_rate_limit", "message": "Request rate limit reached"})
        got = self.answered(fake, settings, call, answer)
        assert isinstance(got, TooManyRequests)
        assert got.retry_after > 0

    def test_nobody_there(self, settings: WebSettings, call: str) -> None:
        got = ask(settings.model_copy(update={"url": "http://127.0.0.1:9"}), CALLS[call])[0]
        assert type(got) is ServiceUnavailable
        assert_safe(got)

    def test_one_that_never_ends(self, fake: FakeAuth, settings: WebSettings, call: str) -> None:
        fake.is_endless = True
        got = ask(settings.model_copy(update={"timeout": 0.5}), CALLS[call])[0]
        assert type(got) is ServiceUnavailable
        assert_safe(got)


def test_what_is_no_token_is_nobodys(settings: WebSettings) -> None:
    for token in ("", "ключ", "é"):
        got = ask(settings, lambda auth, token=token: auth.person(SecretStr(token)))[0]
        assert type(got) is SignInRequired
        assert_safe(got)


def test_connections_are_shared_and_sessions_are_not(fake: FakeAuth, settings: WebSettings) -> None:
    fake.status, fake.body = 200, json.dumps(SESSION).encode()
    fake.connections.clear()
    signed_in, again, nobody = ask(
        settings, CALLS["sign in"], CALLS["refresh"], lambda auth: auth.person(SecretStr(""))
    )
    assert len(fake.connections) == 1
    assert isinstance(signed_in, Tokens)
    assert_silent(f"{signed_in!r} {again!r}")
    assert type(nobody) is SignInRequired


def test_a_ban_changes_the_standing(fake: FakeAuth, settings: WebSettings) -> None:
    standings = set[str]()
    for more in ({}, {"banned_until": "2030-01-01T00:00:00Z"}, {"app_metadata": {"role": "admin"}}, {"phone": "1"}):
        fake.status, fake.body = 200, json.dumps(USER | more).encode()
        person = ask(settings, CALLS["person"])[0]
        assert isinstance(person, Person)
        standings.add(person.standing)
    assert len(standings) == 3


class TestSupabaseLite:
    """What the panel relies on, and the local stack does as hosted Supabase."""

    @pytest.mark.slow
    def test_a_session_from_end_to_end(self, stack: LocalStack, newcomer: LocalUser) -> None:
        settings = WebSettings(url=stack.url, publishable_key=stack.publishable_key)
        wrong, tokens, other = ask(
            settings,
            lambda auth: auth.sign_in(newcomer.email, SecretStr("wrong")),
            *[lambda auth: auth.sign_in(newcomer.email, SecretStr(newcomer.password))] * 2,
        )
        assert type(wrong) is AccessDenied
        assert isinstance(tokens, Tokens)
        assert isinstance(other, Tokens)
        assert tokens.person.id == newcomer.id
        person, signed_out, nobody, ended, still = ask(
            settings,
            lambda auth: auth.person(tokens.access),
            lambda auth: auth.sign_out(tokens),
            lambda auth: auth.person(tokens.access),
            lambda auth: auth.refresh(tokens),
            lambda auth: auth.person(other.access),
        )
        assert person == tokens.person
        assert signed_out is None
        assert type(nobody) is SignInRequired
        assert type(ended) is AccessDenied
        assert still == other.person

    def test_a_role_changes_the_standing(self, stack: LocalStack, newcomer: LocalUser) -> None:
        settings = WebSettings(url=stack.url, publishable_key=stack.publishable_key)
        before = ask(settings, lambda auth: auth.sign_in(newcomer.email, SecretStr(newcomer.password)))[0]
        assert isinstance(before, Tokens)
        stack.grant_admin(newcomer.id)
        now, refreshed = ask(settings, lambda auth: auth.person(before.access), lambda auth: auth.refresh(before))
        assert isinstance(refreshed, Tokens)
        assert now == refreshed.person
        assert now != before.person
