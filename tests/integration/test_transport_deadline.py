"""A call ends with its deadline, whatever the server does; and one that goes wrong leaves time for another."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from supabase import ClientOptions, create_client
from tests.http.leaks import chain
from tests.integration.servers import (
    Handler,
    certificate,
    chosen_by_kind,
    dripping,
    raw_server,
    read_request,
    relay_to,
    silent,
)
from tests.support.waiting import PATIENCE

from tokenlimits import AsyncTokenLimits, GroupManager, Limit, ServiceUnavailable, TokenLimits, TrackResult
from tokenlimits._drivers import deadline
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

pytestmark = pytest.mark.slow

ANN = "0197f0a0-0000-7000-8000-000000000001"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

Track = Callable[..., TrackResult]

STALLING: dict[str, Handler] = {
    "drips_the_first_line": dripping(b""),
    "drips_the_headers": dripping(HEAD + b"X-Slow: "),
    "drips_the_body": dripping(HEAD + b"Content-Length: 100000\r\n\r\n"),
    "drips_after_interim_answers": dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 5),
}


@pytest.fixture(params=["sync", "async", "foreign"])
def track(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Track:
    """Tracks with either colour, or with a client that the caller made."""

    def run(url: str, *args: Any, timeout: float, key: str = "sb_secret_x", **kwargs: Any) -> TrackResult:
        monkeypatch.setenv("SUPABASE_URL", url)
        monkeypatch.setenv("SUPABASE_SECRET_KEY", key)
        if request.param == "foreign":
            with httpx.Client() as http:
                client = create_client(url, key, ClientOptions(httpx_client=http))
                return TokenLimits(client, timeout=timeout).track(*args, **kwargs)
        if request.param == "sync":
            with TokenLimits.from_env(timeout=timeout) as limits:
                return limits.track(*args, **kwargs)
        return asyncio.run(AsyncTokenLimits.from_env(timeout=timeout).track(*args, **kwargs))

    return run


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return certificate(tmp_path_factory.mktemp("tls"))


def gives_up(track: Track, url: str, kind: str = "image") -> bool:
    """Whether a call is given up; what isn't held to its deadline takes as long as the server stays."""
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="could not be reached"):
        track(url, ANN, kind, timeout=2)
    return time.monotonic() - began < PATIENCE


def share(monkeypatch: pytest.MonkeyPatch, of_the_time: float) -> None:
    """Leave even a busy machine time for another attempt."""
    monkeypatch.setattr(deadline, "_SHARE", of_the_time)


class TestAServerThatStalls:
    def test_is_given_up_in_time(self, track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
        share(monkeypatch, 0.2)
        with raw_server(silent, stays=2 * PATIENCE) as server:
            assert gives_up(track, server.url)
            assert server.accepted >= 2  # an attempt is shorter than the deadline

    def test_however_it_stalls(self, track: Track) -> None:
        with (
            raw_server(chosen_by_kind(STALLING), stays=2 * PATIENCE) as server,
            ThreadPoolExecutor(len(STALLING)) as threads,
        ):
            assert all(threads.map(lambda kind: gives_up(track, server.url, kind), STALLING))

    def test_also_over_tls(
        self, track: Track, tls: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context, trusted = tls
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        with raw_server(chosen_by_kind(STALLING), context, stays=2 * PATIENCE) as server:
            assert gives_up(track, server.url, "drips_the_headers")

    def test_also_while_tls_begins(self, track: Track) -> None:
        with raw_server(silent, stays=2 * PATIENCE) as server:
            assert gives_up(track, server.url.replace("http:", "https:"))

    def test_what_may_not_be_sent_again_is_tried_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUPABASE_SECRET_KEY", "sb_secret_x")
        with raw_server(silent) as server:
            monkeypatch.setenv("SUPABASE_URL", server.url)
            with GroupManager.from_env(timeout=1.5) as groups, pytest.raises(ServiceUnavailable):
                groups.create("Pro")
            assert server.accepted == 1


@pytest.fixture
def ann(stack: LocalStack, team: Callable[..., Group]) -> str:
    user = str(stack.create_users(1)[0])
    team([user], Limit(kind="image", max=100))
    return user


def usages(stack: LocalStack, user: str) -> int:
    [row] = stack.sql("select count(*)::integer as n from public.generation_usage where user_id = $1::uuid", user)
    return row["n"]


class Flaky:
    """In front of the stack: lets each connection but the first few through."""

    def __init__(self, stack: LocalStack, *beginnings: Handler) -> None:
        self._beginnings = list(beginnings)
        self._relay = relay_to(stack.url)

    def __call__(self, connection: socket.socket, over: threading.Event) -> None:
        handler = self._beginnings.pop(0) if self._beginnings else self._relay
        handler(connection, over)


def hang_up(connection: socket.socket, over: threading.Event) -> None:
    read_request(connection)


def swallow_answer(stack: LocalStack) -> Handler:
    """Let the database commit, and hang up before a byte of its answer."""
    host, _, port = stack.url.removeprefix("http://").rpartition(":")

    def swallow(connection: socket.socket, over: threading.Event) -> None:
        with socket.create_connection((host, int(port))) as real:
            real.sendall(read_request(connection))
            real.settimeout(10)
            assert real.recv(65536).startswith(b"HTTP/1.1 200")

    return swallow


class TestOneThatGoesWrongOnce:
    def test_a_dead_connection_leaves_time_for_another(
        self, track: Track, stack: LocalStack, ann: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        share(monkeypatch, 0.02)
        with raw_server(Flaky(stack, silent)) as server:
            assert track(server.url, ann, "image", timeout=PATIENCE, key=stack.secret_key)
            assert server.accepted == 2
        assert usages(stack, ann) == 1

    def test_a_lost_answer_is_not_charged_twice(self, track: Track, stack: LocalStack, ann: str) -> None:
        beginnings = [swallow_answer(stack), hang_up, swallow_answer(stack)]
        with raw_server(Flaky(stack, *beginnings)) as server:
            result = track(server.url, ann, "image", timeout=PATIENCE, key=stack.secret_key)
            assert server.accepted == 4
        assert result.replayed
        assert result.remaining == 99
        assert usages(stack, ann) == 1

    @pytest.mark.parametrize("track", ["sync", "async"], indirect=True)
    def test_a_server_that_says_when_is_asked_then(self, track: Track, stack: LocalStack, ann: str) -> None:
        def turn_away(connection: socket.socket, over: threading.Event) -> None:
            read_request(connection)
            body = b'{"message": "rate limit exceeded"}'
            connection.sendall(
                b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )

        began = time.monotonic()
        with raw_server(Flaky(stack, turn_away)) as server:
            assert track(server.url, ann, "image", timeout=PATIENCE, key=stack.secret_key)
            assert server.accepted == 2
        assert time.monotonic() - began >= 3
        assert usages(stack, ann) == 1


def test_our_clients_speak_http_1_also_to_a_server_that_offers_http_2(
    track: Track,
    stack: LocalStack,
    ann: str,
    tls: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context, trusted = tls
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    negotiated: list[object] = []

    def look(connection: Any) -> None:
        negotiated.append(connection.selected_alpn_protocol())

    with caplog.at_level("INFO", "httpx"), raw_server(relay_to(stack.url, look), context) as server:
        assert track(server.url, ann, "image", timeout=PATIENCE, key=stack.secret_key)
    assert negotiated == ["http/1.1"]
    assert [record.getMessage().split('"')[1] for record in caplog.records if record.name == "httpx"] == [
        "HTTP/1.1 200 OK"
    ]


def test_no_traceback_of_a_time_out_holds_the_key(track: Track) -> None:
    """Error trackers send the local variables of every frame."""
    key = "sb_secret_7Hn9wQz"
    with raw_server(silent) as server:
        try:
            raise LookupError("what the caller was about")
        except LookupError:
            with pytest.raises(ServiceUnavailable) as caught:
                track(server.url, ANN, "image", timeout=0.3, key=key)
    found = list(chain(caught.value))
    assert any(isinstance(each, httpx.TimeoutException | TimeoutError) for each in found)
    (about,) = (each for each in found if isinstance(each, LookupError))
    assert about.__traceback__ is not None
    for each in found:
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if frame.f_code.co_filename != __file__:
                assert key not in repr(frame.f_locals), frame
