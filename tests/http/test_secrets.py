"""No key and no token is ever in a log line, an error, its chain, a traceback, or a repr."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from supabase import AsyncClientOptions, ClientOptions, create_async_client, create_client
from tests.http.conftest import ANN, KEY, URL, Server, Shell
from tests.http.leaks import text_of

from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    ConfigurationError,
    GroupManager,
    TokenLimits,
    TokenLimitsError,
)

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoicGxhbnRlZCJ9.c2lnbmVkLXBsYW50ZWQ"
SECRETS = (KEY, KEY[10:], TOKEN, TOKEN.split(".")[2])

ANSWERS: dict[str, Callable[[], httpx.Response | Exception]] = {
    "fine": lambda: httpx.Response(200, json={"allowed": True, "kind": "image", "cost": 1}),
    "refused": lambda: httpx.ConnectError("refused"),
    "lost": lambda: httpx.ReadTimeout("timed out"),
    "illegal": lambda: httpx.LocalProtocolError(f"Illegal header value b'Bearer {KEY}'"),
    "denied": lambda: httpx.Response(401, json={"message": "Invalid API key"}),
    "garbage": lambda: httpx.Response(200, text="<html>"),
    "busy": lambda: httpx.Response(429, headers={"Retry-After": "99"}),
    "bad request": lambda: httpx.Response(400, json={"code": "TL001", "message": "no", "details": "cost"}),
    "not installed": lambda: httpx.Response(404, json={"code": "PGRST202", "message": "no function"}),
    "broken": lambda: httpx.Response(500, text="<html>"),
}
FOREIGN: dict[str, Any] = {
    "ours": None,
    "a key": {"key": KEY},
    "a session": {"key": "sb_publishable_x", "headers": {"Authorization": f"Bearer {TOKEN}"}},
}


def assert_silent(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text


@pytest.fixture(autouse=True)
def _logs_are_silent(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.records:
        assert_silent(f"{record.getMessage()} {vars(record)}")


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_whatever_happens(
    shell: Shell,
    server: Server,
    foreign: dict[str, Any] | None,
    answer: Callable[[], httpx.Response | Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.then(*(answer() for _ in range(100)))
    try:
        result = shell.track(timeout=1, foreign=foreign and dict(foreign))
    except TokenLimitsError as error:
        assert_silent(text_of(error))
    else:
        assert_silent(repr(result))
    assert any(record.name == "tokenlimits" for record in caplog.records)
    assert any(secret in str(server.requests[0].headers.raw) for secret in SECRETS)


def test_a_key_that_no_header_may_hold(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_SECRET_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ConfigurationError) as caught:
        shell.track()
    assert_silent(text_of(caught.value))


def test_a_newline_around_the_key_does_not_matter(
    shell: Shell, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPABASE_SECRET_KEY", f" {KEY}\n")
    assert shell.track()
    assert server.requests[0].headers["apikey"] == KEY


class Refusing(httpx.BaseTransport):
    """Refuses a header with the words of h11, which come only after a connection is made."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError(f"Illegal header value {request.headers['authorization']!r}")


def test_a_foreign_client_with_a_newline_in_its_key() -> None:
    with httpx.Client(transport=Refusing()) as http:
        client = create_client(URL, f"{KEY}\n{KEY}", ClientOptions(httpx_client=http))
        with pytest.raises(ConfigurationError, match="The Supabase key can't be sent") as caught:
            TokenLimits(client).track(ANN, "image")
    assert_silent(text_of(caught.value))


def test_a_foreign_client_with_a_key_of_another_alphabet() -> None:
    with httpx.Client() as http:
        client = create_client(URL, f"{KEY}ключ", ClientOptions(httpx_client=http))
        with pytest.raises(ConfigurationError, match="The Supabase key can't be sent") as caught:
            TokenLimits(client).track(ANN, "image")
    assert_silent(text_of(caught.value))
    assert caught.value.__context__ is None  # a UnicodeError would hold the key as its object


def test_a_proxys_password(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:{KEY}@proxy:{KEY}")
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY") as caught:
        shell.track()
    assert_silent(text_of(caught.value))
    assert caught.value.__context__ is None


PLACED = {
    "https://abc.supabase.co": "https://abc.supabase.co",
    "http://127.0.0.1:54321/": "http://127.0.0.1:54321",
    f"https://ann:{KEY}@abc.supabase.co:99/x?apikey={KEY}#{KEY}": "https://abc.supabase.co:99",
    f"https://{KEY}@abc.supabase.co": "https://abc.supabase.co",
    f"https://ann:1/{KEY}@abc.supabase.co": "a URL that can't be read",
}


@pytest.mark.parametrize(("url", "place"), PLACED.items())
def test_a_repr_says_where_and_for_how_long(url: str, place: str) -> None:
    async def run() -> None:
        sync, asynchronous = create_client(url, KEY), await create_async_client(url, KEY)
        for cls, client in (
            (TokenLimits, sync),
            (GroupManager, sync),
            (AsyncTokenLimits, asynchronous),
            (AsyncGroupManager, asynchronous),
        ):
            assert repr(cls(client, timeout=2.5)) == f"<{cls.__name__} of {place}, timeout 2.5 s>"

    asyncio.run(run())


@pytest.mark.usefixtures("server")
def test_before_first_use_a_repr_says_where_it_will_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_URL", f"https://ann:{KEY}@abc.supabase.co")
    for cls in (TokenLimits, GroupManager, AsyncTokenLimits, AsyncGroupManager):
        assert repr(cls.from_env()) == f"<{cls.__name__} of SUPABASE_URL (not read yet), timeout 10 s>"
    with TokenLimits.from_env() as limits:
        limits.track(ANN, "image")
        assert repr(limits) == "<TokenLimits of https://abc.supabase.co, timeout 10 s>"


def test_no_repr_shows_it(server: Server) -> None:
    with httpx.Client() as http:
        client = create_client(URL, KEY, ClientOptions(httpx_client=http))
        limits, groups, own = TokenLimits(client), GroupManager(client), TokenLimits.from_env()
        limits.track(ANN, "image")
        own.track(ANN, "image")
        for made in (limits, groups, own):
            assert_silent(f"{made!r} {made._transport!r} {vars(made)} {vars(made._transport)}")
        own.close()
    assert len(server.requests) == 2


def test_no_repr_of_the_async_one_shows_it(server: Server) -> None:
    async def run() -> None:
        async with httpx.AsyncClient() as http, AsyncTokenLimits.from_env() as own:
            client = await create_async_client(URL, KEY, AsyncClientOptions(httpx_client=http))
            limits = AsyncTokenLimits(client)
            await limits.track(ANN, "image")
            await own.track(ANN, "image")
            for made in (limits, own):
                assert_silent(f"{made!r} {made._transport!r} {vars(made)} {vars(made._transport)}")

    asyncio.run(run())
    assert len(server.requests) == 2
