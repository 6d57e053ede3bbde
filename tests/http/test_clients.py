"""Whose connections are used, with which session, and who closes them."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import supabase
from postgrest import AsyncPostgrestClient, SyncPostgrestClient
from supabase import AsyncClientOptions, Client, ClientOptions, create_async_client, create_client
from tests.http.conftest import ANN, KEY, URL, Clock, Server, Shell

import tokenlimits
from tokenlimits import (
    AsyncTokenLimits,
    ConfigurationError,
    GroupManager,
    TokenLimits,
    atrack_generation,
    track_generation,
)
from tokenlimits.async_client import _AsyncDefault
from tokenlimits.client import _Default
from tokenlimits.errors import SchemaOutdated


@pytest.fixture
def client(server: Server) -> Iterator[Client]:  # its transport is the server's
    with httpx.Client() as http:
        yield create_client(URL, KEY, ClientOptions(httpx_client=http))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Everything of supabase and postgrest that is made meanwhile."""
    made: list[object] = []
    for cls in (supabase.Client, supabase.AsyncClient, SyncPostgrestClient, AsyncPostgrestClient):
        original = cls.__init__

        def init(self: object, *args: Any, _original: Any = original, **kwargs: Any) -> None:
            made.append(self)
            threading.Event().wait(0.01)  # time enough for another thread to make one too
            _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    return made


@pytest.fixture(autouse=True)
def _no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Default, "current", None)
    monkeypatch.setattr(_AsyncDefault, "current", None)


def schemas(server: Server) -> list[str]:
    """Where each request asked for its function."""
    return [request.headers["content-profile"] for request in server.requests]


class TestSchema:
    @pytest.mark.parametrize("name", ["public", "api", "graphql_public"])
    def test_is_public_whatever_the_clients_own(self, shell: Shell, server: Server, name: str) -> None:
        assert shell.track(foreign={"schema": name})
        assert schemas(server) == ["public"]

    @pytest.mark.parametrize("foreign", [None, {}, {"schema": "api"}], ids=["own client", "theirs", "in a schema"])
    @pytest.mark.parametrize("from_file", [False, True], ids=["environment", "file"])
    def test_is_what_the_environment_says(
        self, shell: Shell, server: Server, monkeypatch: pytest.MonkeyPatch, foreign: Any, from_file: bool
    ) -> None:
        if from_file:
            Path(".env").write_text("TOKENLIMITS_SCHEMA=limits\n")
        else:
            monkeypatch.setenv("TOKENLIMITS_SCHEMA", " limits ")
        shell.track(foreign=foreign and {**foreign})
        shell.groups("list", foreign=foreign and {**foreign})
        assert schemas(server) == ["limits"] * 2

    @pytest.mark.parametrize("foreign", [False, True])
    @pytest.mark.parametrize("name", ["limits", "public"])
    def test_is_the_argument_before_all(
        self, shell: Shell, server: Server, monkeypatch: pytest.MonkeyPatch, foreign: bool, name: str
    ) -> None:
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "other")
        shell.track(schema=name, foreign={"schema": "api"} if foreign else None)
        shell.groups("list", schema=name, foreign={} if foreign else None)
        assert schemas(server) == [name] * 2

    def test_is_kept_through_every_call_of_a_flow(self, shell: Shell, server: Server) -> None:
        missing = httpx.Response(404, json={"code": "PGRST202", "message": "no such function"})
        server.then(httpx.Response(503), missing)
        with pytest.raises(SchemaOutdated):
            shell.track(schema="limits")
        assert server.functions == ["track_generation", "track_generation", "tokenlimits_version"]
        assert schemas(server) == ["limits"] * 3

    def test_of_the_client_stays(self, server: Server) -> None:
        with httpx.Client() as http:
            client = create_client(URL, KEY, ClientOptions(schema="api", httpx_client=http))
            TokenLimits(client, schema="limits").track(ANN, "image")
            TokenLimits(client).track(ANN, "image")
            assert client.postgrest.headers["content-profile"] == "api"
            assert client.options.schema == "api"
        assert schemas(server) == ["limits", "public"]

    def test_is_read_once_for_a_client(self, client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who passes theirs to each call shouldn't read a file for each."""
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "limits")
        track_generation(ANN, "image", client=client)
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "other")
        track_generation(ANN, "image", client=client)
        track_generation(ANN, "image", client=TokenLimits(client, schema="third"))
        assert schemas(server) == ["limits", "limits", "third"]

    def test_is_that_of_the_functions_too(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "limits")
        track_generation(ANN, "image")

        async def atrack() -> None:
            await atrack_generation(ANN, "image")

        asyncio.run(atrack())
        assert schemas(server) == ["limits"] * 2
        assert _Default.current is not None
        _Default.current.close()

    @pytest.mark.parametrize("name", ["auth", "Limits", "pg_temp", "tokenlimits", "", 'x"; drop', 7])
    @pytest.mark.parametrize("make", [TokenLimits, TokenLimits.from_env, AsyncTokenLimits, GroupManager.from_env])
    def test_that_can_not_be_is_refused_at_once(self, make: Any, name: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"^schema: "):
            make(schema=name)

    @pytest.mark.parametrize("foreign", [False, True])
    def test_that_the_environment_has_wrong_is_refused_before_anything_is_sent(
        self, shell: Shell, server: Server, monkeypatch: pytest.MonkeyPatch, foreign: bool
    ) -> None:
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "auth")
        with pytest.raises(ConfigurationError, match=r"^TOKENLIMITS_SCHEMA: .*auth"):
            shell.track(foreign={} if foreign else None, on_unavailable="allow")
        assert server.requests == []

    def test_nothing_is_read_where_it_is_named(self, shell: Shell, server: Server) -> None:
        Path(".env").write_bytes("TOKENLIMITS_SCHEMA=limits".encode("utf-16"))
        shell.track(foreign={}, schema="public")
        with pytest.raises(ConfigurationError, match=r"\.env is not UTF-8.*TOKENLIMITS_SCHEMA"):
            shell.track(foreign={})
        assert schemas(server) == ["public"]

    @pytest.mark.parametrize(
        "body",
        [
            {
                "message": "Invalid schema: limits",
                "hint": "Only the following schemas are exposed: graphql_public, public",
            },
            {"message": "The schema must be one of the following: graphql_public, public", "hint": None},
        ],
        ids=["newer", "older"],
    )
    @pytest.mark.parametrize("policy", ["raise", "allow", "deny"])
    def test_that_is_not_exposed(
        self, shell: Shell, server: Server, clock: Clock, body: dict[str, Any], policy: str
    ) -> None:
        server.then(httpx.Response(406, json={"code": "PGRST106", "details": None, **body}))
        with pytest.raises(ConfigurationError, match="Exposed schemas") as caught:
            shell.track(schema="limits", on_unavailable=policy)
        assert type(caught.value) is ConfigurationError
        assert caught.value.code == "PGRST106"
        for words in ("graphql_public, public. ", "[api] schemas", "supabase/config.toml", "TOKENLIMITS_SCHEMA"):
            assert words in str(caught.value)
        assert str(caught.value).startswith(str(body["message"]))
        assert len(server.requests) == 1
        assert clock.slept == []


PUBLISHABLE = "sb_publishable_x"
# {"role": "service_role"}
SERVICE_ROLE = "eyJyb2xlIjoic2VydmljZV9yb2xlIn0"


class TestKeys:
    def test_ours(self, shell: Shell, server: Server) -> None:
        shell.track()
        headers = server.requests[0].headers
        assert (headers["apikey"], headers["authorization"]) == (KEY, f"Bearer {KEY}")

    def test_a_session_of_a_foreign_client(self, shell: Shell, server: Server) -> None:
        shell.track(foreign={"key": PUBLISHABLE, "headers": {"Authorization": "Bearer a-token"}})
        headers = server.requests[0].headers
        assert (headers["apikey"], headers["authorization"]) == (PUBLISHABLE, "Bearer a-token")

    @pytest.mark.parametrize("key", [KEY, f"e30.{SERVICE_ROLE}.signature"])
    def test_a_session_on_a_secret_keys_client(self, shell: Shell, server: Server, key: str) -> None:
        """The worker would have the rights of whoever has signed in."""
        with pytest.raises(ConfigurationError, match=r"has signed in on this Supabase client.*publishable key"):
            shell.track(foreign={"key": key, "headers": {"Authorization": "Bearer a-token"}}, on_unavailable="allow")
        assert server.requests == []

    def test_a_token_that_was_set_on_postgrest_alone(self, client: Client, server: Server) -> None:
        client.postgrest.auth("a-token")
        limits = TokenLimits(client)
        for _ in range(2):
            limits.track(ANN, "image")
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer a-token"}


class TestManyThreads:
    def test_make_one_client(self, server: Server, made: list[object]) -> None:
        with TokenLimits.from_env() as limits, ThreadPoolExecutor(16) as threads:
            assert all(threads.map(lambda _: limits.track(ANN, "image"), range(64)))
        assert len(server.requests) == 64
        assert sorted(type(each).__name__ for each in made) == ["Client", "SyncPostgrestClient"]

    def test_make_one_default(self, server: Server, made: list[object]) -> None:
        barrier = threading.Barrier(16)

        def track(_: int) -> bool:
            barrier.wait()
            return bool(track_generation(ANN, "image"))

        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(track, range(16)))
        assert len(server.requests) == 16
        assert sorted(type(each).__name__ for each in made) == ["Client", "SyncPostgrestClient"]
        assert _Default.current is not None
        _Default.current.close()

    def test_make_one_default_for_their_loops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has a client for each loop, and is one thing to close, to replace and to give back."""
        from_env = AsyncTokenLimits.from_env

        def slow() -> AsyncTokenLimits:
            threading.Event().wait(0.01)
            return from_env()

        monkeypatch.setattr(AsyncTokenLimits, "from_env", slow)
        with ThreadPoolExecutor(16) as threads:
            chosen = set(threads.map(lambda _: _AsyncDefault.choose(None), range(64)))
        assert chosen == {_AsyncDefault.current}

    def test_make_one_postgrest_of_a_foreign_client(self, client: Client, server: Server, made: list[object]) -> None:
        """However many `TokenLimits` there are: `track_generation(client=…)` makes one each time."""
        barrier = threading.Barrier(16)

        def track(_: int) -> bool:
            barrier.wait()
            return bool(track_generation(ANN, "image", client=client))

        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(track, range(16)))
        assert len(server.requests) == 16
        assert [type(each).__name__ for each in made] == ["SyncPostgrestClient"]


class TestChangeOfSession:
    """Supabase forgets `client.postgrest` when somebody signs in, and then changes the header: not in one step."""

    @pytest.fixture
    def client(self, server: Server) -> Iterator[Client]:
        with httpx.Client() as http:
            yield create_client(URL, PUBLISHABLE, ClientOptions(httpx_client=http))

    @staticmethod
    def sign_in(client: Client, token: str) -> None:
        session: Any = type("Session", (), {"access_token": token})()
        client._listen_to_auth_events("SIGNED_IN", session)

    def test_is_seen_by_the_next_call(self, client: Client, server: Server) -> None:
        limits = TokenLimits(client)
        for token in ("one", "two"):
            self.sign_in(client, token)
            limits.track(ANN, "image")
        assert [request.headers["authorization"] for request in server.requests] == ["Bearer one", "Bearer two"]

    def test_a_call_in_the_middle_of_it_leaves_nothing_stale(self, client: Client, server: Server) -> None:
        limits = TokenLimits(client)
        limits.track(ANN, "image")

        class Headers(dict[str, str]):
            """Lets another call in before each change."""

            def __setitem__(self, name: str, value: str) -> None:
                client.options.headers = dict(self)
                limits.track(ANN, "image")
                client.options.headers = self
                super().__setitem__(name, value)

        client.options.headers = Headers(client.options.headers)
        self.sign_in(client, "one")
        limits.track(ANN, "image")
        GroupManager(client).list()
        sent = [request.headers["authorization"] for request in server.requests]
        assert sent == [f"Bearer {PUBLISHABLE}", f"Bearer {PUBLISHABLE}", "Bearer one", "Bearer one"]

    def test_that_comes_while_postgrest_is_read(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        real: Any = supabase.Client.postgrest
        answers: list[bool] = [False, False, True]

        def postgrest(client: Client) -> object:
            return real.fget(client) if answers.pop(0) else None

        monkeypatch.setattr(supabase.Client, "postgrest", property(postgrest))
        with TokenLimits.from_env() as limits:
            assert limits.track(ANN, "image")
        assert len(server.requests) == 1

    def test_many_threads_and_many_changes(self, client: Client, server: Server) -> None:
        limits = TokenLimits(client)
        stop = threading.Event()

        def change() -> None:
            for number in range(300):
                self.sign_in(client, f"token-{number}")
            stop.set()

        def track(_: int) -> None:
            while not stop.is_set():
                assert limits.track(ANN, "image")

        with ThreadPoolExecutor(5) as threads:
            changing = threads.submit(change)
            list(threads.map(track, range(4)))
            changing.result()
        limits.track(ANN, "image")
        assert server.requests[-1].headers["authorization"] == "Bearer token-299"


def session_of(limits: TokenLimits) -> Any:
    with limits._transport._client() as client:
        return client.postgrest.session


async def asession_of(limits: AsyncTokenLimits) -> Any:
    async with limits._transport._client() as client:
        return client.postgrest.session


class TestClosing:
    def test_a_foreign_client_stays_open(self, client: Client, server: Server) -> None:
        with TokenLimits(client) as limits, GroupManager(client) as groups:
            limits.track(ANN, "image")
            groups.list()
        limits.close()
        assert not client.postgrest.session.is_closed
        assert limits.track(ANN, "image")
        assert client.rpc("tokenlimits_version").execute().data == {"version": 1}
        assert len(server.requests) == 4

    def test_a_foreign_async_client_stays_open(self, server: Server) -> None:
        async def run() -> None:
            async with httpx.AsyncClient() as http:
                client = await create_async_client(URL, KEY, AsyncClientOptions(httpx_client=http))
                async with AsyncTokenLimits(client) as limits:
                    await limits.track(ANN, "image")
                await limits.aclose()
                assert not http.is_closed
                assert await limits.track(ANN, "image")

        asyncio.run(run())
        assert len(server.requests) == 2

    def test_ours_is_closed_and_made_anew(self, server: Server) -> None:
        limits = TokenLimits.from_env()
        sessions: list[Any] = []
        for _ in range(2):
            with limits:
                limits.track(ANN, "image")
                sessions.append(session_of(limits))
                assert not sessions[-1].is_closed
            assert sessions[-1].is_closed
        assert sessions[0] is not sessions[1]
        limits.close()
        assert len(server.requests) == 2

    def test_ours_in_asyncio_too(self, server: Server) -> None:
        async def run() -> None:
            limits = AsyncTokenLimits.from_env()
            sessions: list[Any] = []
            for _ in range(2):
                async with limits:
                    await limits.track(ANN, "image")
                    sessions.append(await asession_of(limits))
                assert sessions[-1].is_closed
            await limits.aclose()
            assert sessions[0] is not sessions[1]

        asyncio.run(run())
        assert len(server.requests) == 2

    def test_a_call_that_is_under_way_has_its_answer_first(self, server: Server) -> None:
        limits, arrived, go = TokenLimits.from_env(), threading.Event(), threading.Event()
        session = session_of(limits)

        def slow(request: httpx.Request) -> httpx.Response:
            arrived.set()
            assert go.wait(60)
            return Server.usual(request)

        server.then(slow)
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(limits.track, ANN, "image")
            assert arrived.wait(60)
            limits.close()
            assert not session.is_closed
            go.set()
            assert call.result().allowed
        assert session.is_closed
        assert len(server.requests) == 1

    def test_a_call_that_is_under_way_has_its_answer_first_in_asyncio(self) -> None:
        async def run() -> None:
            limits = AsyncTokenLimits.from_env()
            async with limits._transport._client() as client:  # as a call does
                await limits.aclose()
                assert not client.postgrest.session.is_closed
            assert client.postgrest.session.is_closed

        asyncio.run(run())

    def test_when_it_is_forgotten(self, server: Server) -> None:
        limits = TokenLimits.from_env()
        limits.track(ANN, "image")
        session: Any = session_of(limits)
        forgotten = weakref.ref(limits)
        del limits
        gc.collect()
        assert forgotten() is None
        assert session.is_closed
        assert len(server.requests) == 1

    def test_with_the_loop(self, server: Server) -> None:
        limits = AsyncTokenLimits.from_env()

        async def run() -> Any:
            await limits.track(ANN, "image")
            return await asession_of(limits)

        sessions = [asyncio.run(run()) for _ in range(3)]
        assert all(session.is_closed for session in sessions)
        assert len({id(session) for session in sessions}) == 3
        assert len(limits._transport._own) == 1  # the last; a closed one is dropped with the next
        assert len(server.requests) == 3

    @pytest.mark.filterwarnings("ignore:asynchronous generator .* was scheduled after")
    def test_in_a_loop_that_goes_on_after_its_generators_were_closed(self, server: Server) -> None:
        limits = AsyncTokenLimits.from_env()
        with closing(asyncio.new_event_loop()) as loop:
            for _ in range(2):
                assert loop.run_until_complete(limits.track(ANN, "image"))
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(limits.aclose())
        assert len(server.requests) == 2

    def test_of_loops_that_end_in_other_threads_meanwhile(self, server: Server) -> None:
        async def run() -> None:
            async with AsyncTokenLimits.from_env() as limits:
                own: Any = limits._transport._own

                class Ended:
                    def is_closed(self) -> bool:
                        own.clear()
                        return True

                own |= {(0, Ended()): None, (1, Ended()): None}
                assert await limits.track(ANN, "image")
                assert len(own) == 1

        asyncio.run(run())

    @pytest.mark.parametrize("policy", ["raise", "allow"])
    def test_a_foreign_client_that_was_closed(self, client: Client, policy: Any) -> None:
        limits = TokenLimits(client, on_unavailable=policy)
        limits.track(ANN, "image")
        client.postgrest.aclose()
        with pytest.raises(ConfigurationError, match="closed"):
            limits.track(ANN, "image")

    def test_a_foreign_async_client_that_was_closed(self, server: Server) -> None:
        async def run() -> None:
            async with httpx.AsyncClient() as http:
                client = await create_async_client(URL, KEY, AsyncClientOptions(httpx_client=http))
            await AsyncTokenLimits(client).track(ANN, "image")

        with pytest.raises(ConfigurationError, match="closed"):
            asyncio.run(run())
        assert server.requests == []

    def test_ours_that_is_closed_in_the_middle_of_a_call(self, server: Server) -> None:
        limits = TokenLimits.from_env()

        def close(request: httpx.Request) -> httpx.Response:
            limits.close()
            raise httpx.ReadError("closed", request=request)

        server.then(close)
        assert limits.track(ANN, "image")
        limits.close()
        assert len(server.requests) == 2

    def test_ours_that_is_closed_just_before_it_is_used(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = TokenLimits.from_env()
        real = httpx.Client.request

        def request(self: httpx.Client, *args: Any, **kwargs: Any) -> httpx.Response:
            monkeypatch.setattr(httpx.Client, "request", real)
            limits.close()
            return real(self, *args, **kwargs)

        monkeypatch.setattr(httpx.Client, "request", request)
        assert limits.track(ANN, "image")
        limits.close()
        assert len(server.requests) == 1

    def test_another_error_of_the_runtime_is_not_hidden(self, shell: Shell, server: Server) -> None:
        server.then(RuntimeError("something else"))
        with pytest.raises(RuntimeError, match="something else"):
            shell.track()


class TestOneCall:
    def test_with_the_default(self, server: Server) -> None:
        assert track_generation(ANN, "image", 2, idempotency_key="job-1")
        assert track_generation(ANN, "image")
        assert server.params[0] == {
            "p_user_id": ANN,
            "p_kind": "image",
            "p_cost": 2,
            "p_idempotency_key": "job-1",
        }
        assert _Default.current is not None
        _Default.current.close()

    def test_with_a_client(self, client: Client, server: Server) -> None:
        assert track_generation(ANN, "image", client=client)
        assert track_generation(ANN, "image", client=TokenLimits(client))
        assert _Default.current is None
        assert len(server.requests) == 2

    def test_with_a_client_of_the_other_colour(self, client: Client) -> None:
        with pytest.raises(ConfigurationError, match=r"supabase\.AsyncClient"):
            asyncio.run(atrack_generation(ANN, "image", client=client))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigurationError, match=r"supabase\.Client"):
            track_generation(ANN, "image", client=AsyncTokenLimits())  # pyright: ignore[reportArgumentType]

    def test_in_asyncio(self, server: Server) -> None:
        async def run() -> None:
            assert await atrack_generation(ANN, "image")
            assert await atrack_generation(ANN, "image", client=AsyncTokenLimits.from_env())

        for _ in range(3):
            asyncio.run(run())
        assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("HTTPS_PROXY", "socks9://proxy", "URL is not valid"),
        ("NO_PROXY", "[::1]", "IPv6 addresses have no brackets"),
        ("SSL_CERT_FILE", "/no/such/file", "No such file"),
    ],
)
def test_what_the_environment_asks_of_http_and_can_not_be(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.undo()  # the certificates are to be read
    monkeypatch.setenv("SUPABASE_URL", URL)
    monkeypatch.setenv("SUPABASE_SECRET_KEY", KEY)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{told}.*{name}"):
        shell.track()


def test_a_foreign_client_whose_url_names_no_host() -> None:
    with httpx.Client() as http:
        client = create_client("https://abc..supabase.co", KEY, ClientOptions(httpx_client=http))
        with pytest.raises(ConfigurationError, match="has no valid host"):
            TokenLimits(client).track(ANN, "image")


def test_http_2_is_off_whatever_supabase_would_do(server: Server) -> None:
    with TokenLimits.from_env() as limits:
        limits.track(ANN, "image")
        session: Any = session_of(limits)
        assert not session._transport._pool._http2
    assert server.requests


def test_nothing_warns() -> None:
    """Warnings are errors here; this says that they are."""
    assert tokenlimits.__version__
    with pytest.raises(DeprecationWarning):
        SyncPostgrestClient(URL, timeout=5)
