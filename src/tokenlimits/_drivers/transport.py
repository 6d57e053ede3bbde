"""Sends calls through a Supabase client: the only module that does I/O with supabase, postgrest and httpx.

It goes below `client.rpc(…).execute()`, which hides the status and headers of an error, to the HTTP session of that
client, so that a call keeps the session's key or access token, has its own deadline, and is retried in one place.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, TypeVar

import httpx
from supabase import AsyncClient, AsyncClientOptions, Client, ClientOptions
from tenacity import AsyncRetrying, Retrying

from tokenlimits._core import answers, retry
from tokenlimits._core.call import Call
from tokenlimits._core.flows import Flow, Pages
from tokenlimits.errors import ConfigurationError, SchemaNotInstalled, ServiceUnavailable
from tokenlimits.settings import Settings, load

from . import sessions
from .deadline import Deadline, Timeouts, extensions

T = TypeVar("T")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

logger = logging.getLogger("tokenlimits")

_OPTIONS: dict[str, Any] = {"auto_refresh_token": False, "persist_session": False}


# the last two: of a host that is no name
_FAILURES = (httpx.HTTPError, httpx.InvalidURL, UnicodeError)


def _failure(error: Exception) -> Exception:
    """Turn what went wrong on the way into what the retry policy understands."""
    if isinstance(error, httpx.LocalProtocolError):
        # neither its message nor itself: it holds the header's value, which is the key
        return sessions.unsendable_key()
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConfigurationError("The Supabase URL must begin with http:// or https://.")
    if not isinstance(error, httpx.HTTPError):
        return ConfigurationError("The Supabase URL names no host: it should be like https://abc.supabase.co.")
    never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return retry.Transient(f"{type(error).__name__} {error}".strip(), harmless=never_sent, cause=error)


def _closed(error: RuntimeError, session: httpx.Client | httpx.AsyncClient, *, foreign: bool) -> Exception:
    """Turn httpx's complaint that a client was closed into ours."""
    if not session.is_closed:
        return error
    if foreign:
        return ConfigurationError("This Supabase client was closed. Make a new one, or use from_env().")
    return retry.Transient("the connections were closed meanwhile", harmless=True, cause=error)


def _made(sort: Callable[..., Http], timeout: float) -> Http:
    """Make an HTTP client; it reads the environment."""
    try:
        # HTTP/2 loses calls when the server says GOAWAY to many threads
        return sort(http2=False, timeout=timeout)
    except (ImportError, OSError) as error:  # no SOCKS here; a file of certificates that isn't there
        problem = str(error)
    except (ValueError, httpx.InvalidURL):  # they may hold a proxy's password
        problem = "a proxy's address is not one"
    raise ConfigurationError(
        f"HTTP can't be set up as the environment asks: {problem}. Look at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, "
        "SSL_CERT_FILE and SSL_CERT_DIR."
    )


class _Own(NamedTuple):
    client: Client
    close: Callable[[], object]
    use: sessions.Use


class Transport:
    """Sends calls from any thread; notices forks; closes what it made."""

    def __init__(
        self,
        client: Client | None,
        timeout: float,
        settings: Callable[[], Settings] = load,
        *,
        schema: str | None = None,
    ) -> None:
        self._foreign = client
        self._settings = settings
        self._schema = schema
        self.timeout = timeout
        if client is not None:
            sessions.notice(client)
        # by fork: what the parent made must neither be used nor closed by the child, so it just stays
        self._own: dict[int, _Own] = {}

    def send(self, call: Call[T], timeout: float | None = None) -> T:
        """Send one call, retrying as its deadline allows."""
        deadline = Deadline(self.timeout if timeout is None else timeout)
        try:
            return self._send(call, deadline)
        except SchemaNotInstalled as error:
            missing = error
        if call.function != answers.version().function and self._is_installed(deadline):
            raise answers.outdated(call.function, missing) from missing
        raise missing

    def run(self, flow: Flow[T]) -> T:
        """Run an operation of several calls."""
        try:
            call = next(flow)
            while True:
                call = flow.send(self.send(call))
        except StopIteration as end:
            return end.value

    def iterate(self, pages: Pages[T]) -> Iterator[T]:
        """Yield the items of page after page."""
        try:
            call = next(pages)
            while True:
                page = self.send(call)
                yield from page
                call = pages.send(page)
        except StopIteration:
            return

    def close(self) -> None:
        """Close the connections, if this made them, as soon as no call is on them."""
        own = self._own.pop(sessions.forks(), None)
        if own is not None and own.use.retire():
            own.close()

    def _is_installed(self, deadline: Deadline) -> bool:
        try:
            self._send(answers.version(), deadline)
        except (SchemaNotInstalled, ServiceUnavailable):
            return False
        return True

    def _send(self, call: Call[T], deadline: Deadline) -> T:
        policy: Any = retry.policy(call.function, retry_safe=call.retry_safe, timeout=deadline.left())
        try:
            return Retrying(**policy)(self._attempt, call, deadline)
        except retry.Transient as error:
            raise retry.give_up(call.function, error, deadline.elapsed()) from error.__cause__ or error
        finally:
            _log(call.function, deadline)

    def _attempt(self, call: Call[T], deadline: Deadline) -> T:
        with self._client() as client:
            request = sessions.request(client, call, self._schema)
            try:
                response = request.session.request(
                    request.http_method,
                    str(request.path),
                    json=request.json,
                    headers=request.headers,
                    auth=request.auth,
                    extensions=extensions(deadline.attempt(retry_safe=call.retry_safe)),
                )
            except _FAILURES as error:
                failure = _failure(error)
            except RuntimeError as error:
                failure = _closed(error, request.session, foreign=self._foreign is not None)
            else:
                return answers.read(call, response.status_code, response.headers, response.content)
        raise failure  # out here, so that no context of it holds the key

    @contextmanager
    def _client(self) -> Generator[Client]:
        if self._foreign is not None:
            sessions.check_fork(self._foreign)
            yield self._foreign
            return
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
        # also at the interpreter's end, or it warns about open sockets
        own = self._own[sessions.forks()] = _Own(client, weakref.finalize(self, http.close), sessions.Use())
        return own


class _OfLoop(NamedTuple):
    client: AsyncClient
    http: httpx.AsyncClient
    until_loop_ends: AsyncGenerator[None]
    use: sessions.Use


class AsyncTransport:
    """Sends calls from any event loop; closes what it made, also when the loop ends."""

    def __init__(
        self,
        client: AsyncClient | None,
        timeout: float,
        settings: Callable[[], Settings] = load,
        *,
        schema: str | None = None,
    ) -> None:
        self._foreign = client
        self._settings = settings
        self._schema = schema
        self.timeout = timeout
        if client is not None:
            sessions.notice(client)
        self._own: dict[tuple[int, asyncio.AbstractEventLoop], _OfLoop] = {}

    async def send(self, call: Call[T]) -> T:
        """Send one call, retrying as its deadline allows."""
        deadline = Deadline(self.timeout)
        try:
            return await self._send(call, deadline)
        except SchemaNotInstalled as error:
            missing = error
        if call.function != answers.version().function and await self._is_installed(deadline):
            raise answers.outdated(call.function, missing) from missing
        raise missing

    async def run(self, flow: Flow[T]) -> T:
        """Run an operation of several calls."""
        try:
            call = next(flow)
            while True:
                call = flow.send(await self.send(call))
        except StopIteration as end:
            return end.value

    async def iterate(self, pages: Pages[T]) -> AsyncIterator[T]:
        """Yield the items of page after page."""
        try:
            call = next(pages)
            while True:
                page = await self.send(call)
                for item in page:
                    yield item
                call = pages.send(page)
        except StopIteration:
            return

    async def aclose(self) -> None:
        """Close this loop's connections, if this made them, as soon as no call is on them."""
        own = self._own.pop((sessions.forks(), asyncio.get_running_loop()), None)
        if own is not None and own.use.retire():
            await own.until_loop_ends.aclose()

    async def _is_installed(self, deadline: Deadline) -> bool:
        try:
            await self._send(answers.version(), deadline)
        except (SchemaNotInstalled, ServiceUnavailable):
            return False
        return True

    async def _send(self, call: Call[T], deadline: Deadline) -> T:
        policy: Any = retry.policy(call.function, retry_safe=call.retry_safe, timeout=deadline.left())
        try:
            return await AsyncRetrying(**policy)(self._attempt, call, deadline)
        except retry.Transient as error:
            raise retry.give_up(call.function, error, deadline.elapsed()) from error.__cause__ or error
        finally:
            _log(call.function, deadline)

    async def _attempt(self, call: Call[T], deadline: Deadline) -> T:
        async with self._client() as client:
            request = sessions.request(client, call, self._schema)
            attempt = deadline.attempt(retry_safe=call.retry_safe)
            try:
                async with asyncio.timeout(attempt.left()):
                    response = await request.session.request(
                        request.http_method,
                        str(request.path),
                        json=request.json,
                        headers=request.headers,
                        auth=request.auth,
                        extensions={"timeout": Timeouts(attempt)},
                    )
            except TimeoutError as error:
                failure = retry.Transient("no answer in time", cause=error)
            except _FAILURES as error:
                failure = _failure(error)
            except RuntimeError as error:
                failure = _closed(error, request.session, foreign=self._foreign is not None)
            else:
                return answers.read(call, response.status_code, response.headers, response.content)
        raise failure  # out here, so that no context of it holds the key

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[AsyncClient]:
        loop = asyncio.get_running_loop()
        if self._foreign is not None:
            sessions.check_fork(self._foreign)
            sessions.check_loop(self._foreign, loop)
            yield self._foreign
            return
        own = self._own.get((sessions.forks(), loop))
        if own is None or own.http.is_closed:
            own = self._make(loop)
            await anext(own.until_loop_ends)
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
        with sessions.lock():
            for key in list(self._own):  # at once: loops of other threads come and go
                if key[1].is_closed():
                    self._own.pop(key, None)
            own = self._own[sessions.forks(), loop] = _OfLoop(client, http, until_loop_ends(http), sessions.Use())
        return own


async def until_loop_ends(http: httpx.AsyncClient) -> AsyncGenerator[None]:
    """Close when asked, or with the loop: asyncio.run() closes the generators that are still open."""
    try:
        yield
    finally:
        await http.aclose()


def _log(function: str, deadline: Deadline) -> None:
    elapsed = deadline.elapsed()
    logger.debug("%s took %.1f ms", function, elapsed * 1000, extra={"function": function, "elapsed": elapsed})
