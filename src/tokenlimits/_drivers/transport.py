"""Sends calls through a Supabase client: the only module that does I/O with supabase, postgrest and httpx.

It bypasses `client.rpc(…).execute()`, which hides the status and headers of an error, and uses the client's HTTP
session directly. So a call keeps the session's key or access token, has its own deadline, and is retried in one place.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, TypeVar

import httpx
from supabase import AsyncClient, AsyncClientOptions, Client, ClientOptions
from tenacity import AsyncRetrying, Retrying

from tokenlimits._core import answers, retry
from tokenlimits._core.call import Call
from tokenlimits.errors import ConfigurationError, SchemaNotInstalled, ServiceUnavailable
from tokenlimits.senders import AsyncSender, Sender
from tokenlimits.settings import Settings, load, unusable_network
from tokenlimits.telemetry import OnResult

from . import bodies, sessions
from .deadline import Deadline, Timeouts, extensions
from .watching import NOBODY, Watch, watch

T = TypeVar("T")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

logger = logging.getLogger("tokenlimits")

# a service key has no session that could be refreshed or stored
_OPTIONS: dict[str, Any] = {"auto_refresh_token": False, "persist_session": False}


# the last two: the URL's host is not a valid name
_FAILURES = (httpx.HTTPError, httpx.InvalidURL, UnicodeError)


def _failure(error: Exception) -> Exception:
    """Turn an error of the connection into what the retry policy understands."""
    if isinstance(error, httpx.LocalProtocolError):
        # pass on neither its message nor the error: they hold the header's value, which is the key
        return sessions.unsendable_key()
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConfigurationError("The Supabase URL must begin with http:// or https://.")
    if not isinstance(error, httpx.HTTPError):
        return ConfigurationError("The Supabase URL has no valid host; it should look like https://abc.supabase.co.")
    # without a connection nothing was sent; after any other error, the server may have done what it was asked
    never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return retry.Transient(f"{type(error).__name__} {error}".strip(), harmless=never_sent, cause=error)


def _bare(error: BaseException, outside: BaseException | None) -> None:
    """Take the tracebacks off an error and off what caused it, up to what the caller was handling before the call.

    The local variables of httpx and httpcore hold headers, and so the key, and error trackers show local variables.
    """
    waiting: list[BaseException | None] = [error]
    seen = [outside]
    while waiting:
        each = waiting.pop()
        if each is None or any(each is known for known in seen):
            continue
        seen.append(each)
        each.__traceback__ = None
        waiting += [each.__cause__, each.__context__]


def _closed(error: RuntimeError, session: httpx.Client | httpx.AsyncClient, *, foreign: bool) -> Exception:
    """Turn httpx's error about a closed client into ours."""
    if not session.is_closed:  # httpx has no class of its own for it, so this may be any other RuntimeError
        return error
    if foreign:
        return ConfigurationError("This Supabase client was closed. Make a new one, or use from_env().")
    # ours, closed by another thread between finding it and using it: the next attempt makes a new one
    return retry.Transient("the connections were closed meanwhile", harmless=True, cause=error)


def _made(sort: Callable[..., Http], timeout: float) -> Http:
    """Make an HTTP client; it reads proxies and certificates from the environment."""
    try:
        # with HTTP/2, threads share a connection, and httpcore loses calls when the server sends GOAWAY on it
        return sort(http2=False, timeout=timeout)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        problem = unusable_network(error)
    raise problem  # outside the except block, so that its context doesn't hold a proxy's password


class _Own(NamedTuple):
    client: Client
    close: Callable[[], object]
    use: sessions.Use


class Transport(Sender):
    """Sends calls from any thread; handles forks; closes what it has made."""

    def __init__(
        self,
        client: Client | None,
        timeout: float,
        settings: Callable[[], Settings] = load,
        *,
        schema: str | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        self._foreign = client
        self._settings = settings
        self._schema = schema
        self._on_result = on_result
        self.timeout = timeout
        if client is not None:
            sessions.notice(client)
        # by fork: parent and child share the sockets of what was made before, which only the parent may use and close;
        # in the child, the entry just stays
        self._own: dict[int, _Own] = {}

    def place(self) -> str:
        """Say where the project is, as far as it is known."""
        own = [each.client for each in list(self._own.values())]  # at once: other threads come and go
        return sessions.place(own if self._foreign is None else [self._foreign])

    def send(self, call: Call[T], timeout: float | None = None) -> T:
        """Send one call, retrying as its deadline allows."""
        with watch(call.function, self._on_result) as watched:
            return watched.answered(self._answer(call, Deadline(self.timeout if timeout is None else timeout), watched))

    def _answer(self, call: Call[T], deadline: Deadline, watched: Watch) -> T:
        # PostgREST answers alike for a missing installation and for an old one that lacks the function: ask which
        try:
            return self._send(call, deadline, watched)
        except SchemaNotInstalled as error:
            missing = error
        if call.function != answers.version().function and self._is_installed(deadline):
            raise answers.outdated(call.function, missing) from missing
        raise missing

    def close(self) -> None:
        """Close the connections that this has made, as soon as no call is on them."""
        # forgotten first: later calls make new ones, so that a client works after closing too
        own = self._own.pop(sessions.forks(), None)
        if own is not None and own.use.retire():
            own.close()

    def _is_installed(self, deadline: Deadline) -> bool:
        try:
            self._send(answers.version(), deadline, NOBODY)
        except (SchemaNotInstalled, ServiceUnavailable):
            return False
        return True

    def _send(self, call: Call[T], deadline: Deadline, watched: Watch) -> T:
        policy: Any = retry.policy(call.function, retry_safe=call.retry_safe, timeout=deadline.left())
        try:
            return Retrying(**policy, **watched.callbacks)(self._attempt, call, deadline)
        except retry.Transient as error:
            raise retry.give_up(call.function, error, deadline.elapsed()) from error.__cause__ or error
        finally:
            _log(call.function, deadline)

    def _attempt(self, call: Call[T], deadline: Deadline) -> T:
        outside = sys.exception()
        with self._client() as client:
            # for each attempt anew: somebody may sign in between two of them
            request = sessions.request(client, call, self._schema)
            try:
                with request.session.stream(
                    request.http_method,
                    str(request.path),
                    json=request.json,
                    headers=request.headers,
                    auth=request.auth,
                    extensions=extensions(deadline.attempt(retry_safe=call.retry_safe)),
                ) as response:
                    content = bodies.read(response)
            except _FAILURES as error:
                _bare(error, outside)
                failure = _failure(error)
            except RuntimeError as error:
                failure = _closed(error, request.session, foreign=self._foreign is not None)
            else:
                return answers.read(call, response.status_code, response.headers, content)
        raise failure  # outside the except block, so that its context doesn't hold the key

    @contextmanager
    def _client(self) -> Generator[Client]:
        if self._foreign is not None:
            sessions.check_fork(self._foreign)
            yield self._foreign
            return
        # one step, or two threads would each make a client, or `close` would come between finding and entering
        with sessions.lock():
            own = self._own.get(sessions.forks()) or self._make()
            own.use.enter()
        try:
            yield own.client
        finally:
            if own.use.leave():
                own.close()

    def _make(self) -> _Own:
        settings = self._settings()
        http = _made(httpx.Client, self.timeout)
        options = ClientOptions(httpx_client=http, **_OPTIONS)
        client = Client(settings.url, settings.key.get_secret_value(), options)
        # closes when this is collected or the interpreter exits, which would warn about open sockets; it refers to
        # `http` and not to `self`, which could then never be collected
        own = self._own[sessions.forks()] = _Own(client, weakref.finalize(self, http.close), sessions.Use())
        return own


class _OfLoop(NamedTuple):
    client: AsyncClient
    http: httpx.AsyncClient
    until_loop_ends: AsyncGenerator[None]
    use: sessions.Use


class AsyncTransport(AsyncSender):
    """Sends calls from any event loop; closes what it has made, at the latest when the loop ends."""

    def __init__(
        self,
        client: AsyncClient | None,
        timeout: float,
        settings: Callable[[], Settings] = load,
        *,
        schema: str | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        self._foreign = client
        self._settings = settings
        self._schema = schema
        self._on_result = on_result
        self.timeout = timeout
        if client is not None:
            sessions.notice(client)
        # by fork and loop: connections wait for events of the loop that they were made in
        self._own: dict[tuple[int, asyncio.AbstractEventLoop], _OfLoop] = {}

    def place(self) -> str:
        """Say where the project is, as far as it is known."""
        own = [each.client for each in list(self._own.values())]  # at once: other threads come and go
        return sessions.place(own if self._foreign is None else [self._foreign])

    async def send(self, call: Call[T]) -> T:
        """Send one call, retrying as its deadline allows."""
        with watch(call.function, self._on_result) as watched:
            return watched.answered(await self._answer(call, Deadline(self.timeout), watched))

    async def _answer(self, call: Call[T], deadline: Deadline, watched: Watch) -> T:
        try:
            return await self._send(call, deadline, watched)
        except SchemaNotInstalled as error:
            missing = error
        if call.function != answers.version().function and await self._is_installed(deadline):
            raise answers.outdated(call.function, missing) from missing
        raise missing

    async def aclose(self) -> None:
        """Close the connections that this has made in this loop, as soon as no call is on them."""
        own = self._own.pop((sessions.forks(), asyncio.get_running_loop()), None)
        if own is not None and own.use.retire():
            await own.until_loop_ends.aclose()

    async def _is_installed(self, deadline: Deadline) -> bool:
        try:
            await self._send(answers.version(), deadline, NOBODY)
        except (SchemaNotInstalled, ServiceUnavailable):
            return False
        return True

    async def _send(self, call: Call[T], deadline: Deadline, watched: Watch) -> T:
        policy: Any = retry.policy(call.function, retry_safe=call.retry_safe, timeout=deadline.left())
        try:
            return await AsyncRetrying(**policy, **watched.callbacks)(self._attempt, call, deadline)
        except retry.Transient as error:
            raise retry.give_up(call.function, error, deadline.elapsed()) from error.__cause__ or error
        finally:
            _log(call.function, deadline)

    async def _attempt(self, call: Call[T], deadline: Deadline) -> T:
        outside = sys.exception()
        async with self._client() as client:
            request = sessions.request(client, call, self._schema)
            attempt = deadline.attempt(retry_safe=call.retry_safe)
            try:
                # asyncio's timeout ends any step, so this colour needs no wrapped reads; httpx's own timeouts stay, as
                # a ConnectTimeout says that the call was never sent
                async with (
                    asyncio.timeout(attempt.left()),
                    request.session.stream(
                        request.http_method,
                        str(request.path),
                        json=request.json,
                        headers=request.headers,
                        auth=request.auth,
                        extensions={"timeout": Timeouts(attempt)},
                    ) as response,
                ):
                    content = await bodies.aread(response)
            except TimeoutError as error:
                _bare(error, outside)
                failure = retry.Transient("no answer in time", cause=error)
            except _FAILURES as error:
                _bare(error, outside)
                failure = _failure(error)
            except RuntimeError as error:
                failure = _closed(error, request.session, foreign=self._foreign is not None)
            else:
                return answers.read(call, response.status_code, response.headers, content)
        raise failure  # outside the except block, so that its context doesn't hold the key

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[AsyncClient]:
        loop = asyncio.get_running_loop()
        if self._foreign is not None:
            sessions.check_fork(self._foreign)
            sessions.check_loop(self._foreign, loop)
            yield self._foreign
            return
        # no lock: only tasks of this loop find this entry, and they await nothing between finding and entering it
        own = self._own.get((sessions.forks(), loop))
        # `loop.shutdown_asyncgens()` has closed it, and yet the loop goes on
        if own is None or own.http.is_closed:
            own = self._make(loop)
            await anext(own.until_loop_ends)  # a generator that never started would not be closed with the loop
        own.use.enter()
        try:
            yield own.client
        finally:
            if own.use.leave():
                await own.until_loop_ends.aclose()

    def _make(self, loop: asyncio.AbstractEventLoop) -> _OfLoop:
        settings = self._settings()
        http = _made(httpx.AsyncClient, self.timeout)
        options = AsyncClientOptions(httpx_client=http, **_OPTIONS)
        client = AsyncClient(settings.url, settings.key.get_secret_value(), options)
        # locked, as the loops of several threads share the dictionary
        with sessions.lock():
            # forget the loops that have ended, or each asyncio.run() would leave one; a copy of the keys, since they
            # change while other loops close theirs
            for key in list(self._own):
                if key[1].is_closed():
                    self._own.pop(key, None)
            own = self._own[sessions.forks(), loop] = _OfLoop(client, http, until_loop_ends(http), sessions.Use())
        return own


async def until_loop_ends(http: httpx.AsyncClient) -> AsyncGenerator[None]:
    """Close when asked, or with the loop: `asyncio.run` closes the generators that are still open."""
    # the only hook that asyncio has at the end of a loop; a finalizer would come too late to await anything
    try:
        yield
    finally:
        await http.aclose()


def _log(function: str, deadline: Deadline) -> None:
    elapsed = deadline.elapsed()
    logger.debug("%s took %.1f ms", function, elapsed * 1000, extra={"function": function, "elapsed": elapsed})
