"""Sends calls through a Supabase client: the only module that knows supabase, postgrest and httpx.

It goes below `client.rpc(…).execute()`, which hides the status and headers of an error, to the HTTP session of that
client, so that a call keeps the session's key or access token, has its own deadline, and is retried in one place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from time import monotonic
from typing import Any, TypeVar, cast

import httpx
from pydantic import ValidationError
from supabase import AsyncClient, AsyncClientOptions, Client, ClientOptions
from tenacity import AsyncRetrying, Retrying

from . import _calls, _retry
from ._calls import Call
from ._flows import Flow, Pages
from .errors import (
    BY_CODE,
    ConfigurationError,
    SchemaNotInstalled,
    SchemaOutdated,
    ServiceUnavailable,
    TokenLimitsError,
    refusal,
)
from .settings import Settings, load

T = TypeVar("T")

logger = logging.getLogger("tokenlimits")

# PostgreSQL's classes for: connection, resources, operator intervention (also statement timeouts), system errors
_UNAVAILABLE_CLASSES = ("08", "53", "57", "58")

_forks = 0
# of clients that callers made: before which fork, and in which loop, they were first seen
_seen_at: weakref.WeakKeyDictionary[Client | AsyncClient, int] = weakref.WeakKeyDictionary()
_seen_in: weakref.WeakKeyDictionary[AsyncClient, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  # a process-wide fact
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


def _check_fork(client: Client | AsyncClient) -> None:
    if _seen_at[client] != _forks:
        raise ConfigurationError(
            "This Supabase client was made before the process forked, and its connections belong to the parent. "
            "Make the client in the child (for Celery: in worker_process_init), or use from_env() or track_generation "
            "without client=, which notice."
        )


def _check_loop(client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    if _seen_in.setdefault(client, weakref.ref(loop))() is not loop:
        raise ConfigurationError(
            "This AsyncClient was used in another event loop, to which its connections belong. Make a client in each "
            "loop, or use from_env() or atrack_generation without client=, which do."
        )


_OPTIONS: dict[str, Any] = {"auto_refresh_token": False, "persist_session": False}


def _failure(error: httpx.HTTPError) -> Exception:
    """Turn what went wrong on the way into what the retry policy understands."""
    if isinstance(error, httpx.LocalProtocolError):
        # its message holds the header's value, which is the key
        return ConfigurationError("The Supabase key can't be sent: it has characters that no HTTP header may have.")
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConfigurationError("The Supabase URL must begin with http:// or https://.")
    never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return _retry.Transient(f"{type(error).__name__} {error}".strip(), harmless=never_sent)


def _read(call: Call[T], response: httpx.Response) -> T:
    """Parse an answer, or raise what it means."""
    status = response.status_code
    try:
        answer: Any = json.loads(response.content)
    except ValueError:
        answer = None
    problem = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
    code = problem.get("code")
    if transient := _retry.from_answer(status, response.headers, code):
        raise transient
    if response.is_success:
        try:
            return call.parse(answer)
        except TokenLimitsError:
            raise
        except (ValidationError, KeyError, IndexError, TypeError, ValueError) as error:
            raise _retry.Transient(f"status {status}, but the answer is not one of {call.function}") from error
    if status in (401, 403) or (problem and (status < 500 or code in BY_CODE)):
        raise refusal(status, problem)
    if status < 500:
        raise ConfigurationError(
            f"The server answered with status {status}, not as Supabase does: is SUPABASE_URL right?"
        )
    if code is None or str(code).startswith(_UNAVAILABLE_CLASSES):
        raise ServiceUnavailable(
            f"Supabase answered {call.function} with status {status} ({code or 'no code'})", code=code
        )
    raise refusal(status, problem)


def _outdated(function: str, error: SchemaNotInstalled) -> SchemaOutdated:
    return SchemaOutdated(
        f"The database's tokenlimits has no function {function}. {SchemaOutdated.default_hint}",
        code=error.code,
    )


class Transport:
    """Sends calls from any thread; notices forks; closes what it made."""

    def __init__(self, client: Client | None, timeout: float, settings: Callable[[], Settings] = load) -> None:
        self._foreign = client
        self._settings = settings
        self.timeout = timeout
        if client is not None:
            _seen_at.setdefault(client, _forks)
        # by fork: what the parent made must neither be used nor closed by the child, so it just stays
        self._own: dict[int, Client] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._finalizers: dict[int, weakref.finalize[..., Transport]] = {}

    def send(self, call: Call[T]) -> T:
        """Send one call, retrying as its deadline allows."""
        try:
            return self._send(call)
        except SchemaNotInstalled as error:
            if call.function == _calls.version().function:
                raise
            self._send(_calls.version())  # raises when nothing is installed at all
            raise _outdated(call.function, error) from error

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
        """Close the connections, if this made them."""
        finalizer = self._finalizers.pop(_forks, None)
        self._own.pop(_forks, None)
        if finalizer is not None:
            finalizer()

    def _send(self, call: Call[T]) -> T:
        started = monotonic()

        def attempt() -> T:
            request = self._request(call)
            try:
                response = request.session.request(
                    request.http_method,
                    str(request.path),
                    json=request.json,
                    headers=request.headers,
                    auth=request.auth,
                    timeout=max(started + self.timeout - monotonic(), 0.001),
                )
            except httpx.HTTPError as error:
                failure = _failure(error)
                raise failure from (error if isinstance(failure, _retry.Transient) else None)
            return _read(call, response)

        policy: Any = _retry.policy(call.function, retry_safe=call.retry_safe, timeout=self.timeout)
        try:
            return Retrying(**policy)(attempt)
        except _retry.Transient as error:
            raise _retry.give_up(call.function, error, monotonic() - started) from error.__cause__ or error
        finally:
            _log(call.function, monotonic() - started)

    def _request(self, call: Call[Any]) -> Any:
        # supabase makes `client.postgrest` on first touch and after a change of session: threads would make several
        with self._locks.setdefault(_forks, threading.Lock()):
            client = self._client()
            postgrest = client.postgrest
        if client.options.schema != "public":
            postgrest = postgrest.schema("public")
        builder: Any = postgrest.rpc(call.function, dict(call.params))
        return builder.request

    def _client(self) -> Client:
        if self._foreign is not None:
            _check_fork(self._foreign)
            return self._foreign
        client = self._own.get(_forks)
        if client is None:
            settings = self._settings()
            # HTTP/2 loses calls when the server says GOAWAY to many threads
            http = httpx.Client(http2=False, timeout=self.timeout)
            options = ClientOptions(httpx_client=http, **_OPTIONS)
            client = Client(settings.url, settings.key.get_secret_value(), options)
            self._own[_forks] = client
            # also at the interpreter's end, or it warns about open sockets
            self._finalizers[_forks] = weakref.finalize(self, http.close)
        return client


class AsyncTransport:
    """Sends calls from any event loop; closes what it made, also when the loop ends."""

    def __init__(self, client: AsyncClient | None, timeout: float, settings: Callable[[], Settings] = load) -> None:
        self._foreign = client
        self._settings = settings
        self.timeout = timeout
        if client is not None:
            _seen_at.setdefault(client, _forks)
        self._own: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncClient, AsyncGenerator[None]]] = (
            weakref.WeakKeyDictionary()
        )

    async def send(self, call: Call[T]) -> T:
        """Send one call, retrying as its deadline allows."""
        try:
            return await self._send(call)
        except SchemaNotInstalled as error:
            if call.function == _calls.version().function:
                raise
            await self._send(_calls.version())  # raises when nothing is installed at all
            raise _outdated(call.function, error) from error

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
        """Close this loop's connections, if this made them."""
        own = self._own.pop(asyncio.get_running_loop(), None)
        if own is not None:
            await own[1].aclose()

    async def _send(self, call: Call[T]) -> T:
        started = monotonic()

        async def attempt() -> T:
            request = await self._request(call)
            remaining = max(started + self.timeout - monotonic(), 0.001)
            try:
                async with asyncio.timeout(remaining):
                    response = await request.session.request(
                        request.http_method,
                        str(request.path),
                        json=request.json,
                        headers=request.headers,
                        auth=request.auth,
                        timeout=remaining,
                    )
            except TimeoutError as error:
                raise _retry.Transient("no answer in time") from error
            except httpx.HTTPError as error:
                failure = _failure(error)
                raise failure from (error if isinstance(failure, _retry.Transient) else None)
            return _read(call, response)

        policy: Any = _retry.policy(call.function, retry_safe=call.retry_safe, timeout=self.timeout)
        try:
            return await AsyncRetrying(**policy)(attempt)
        except _retry.Transient as error:
            raise _retry.give_up(call.function, error, monotonic() - started) from error.__cause__ or error
        finally:
            _log(call.function, monotonic() - started)

    async def _request(self, call: Call[Any]) -> Any:
        client = await self._client()
        postgrest = client.postgrest
        if client.options.schema != "public":
            postgrest = postgrest.schema("public")
        builder: Any = postgrest.rpc(call.function, dict(call.params))
        return builder.request

    async def _client(self) -> AsyncClient:
        loop = asyncio.get_running_loop()
        if self._foreign is not None:
            _check_fork(self._foreign)
            _check_loop(self._foreign, loop)
            return self._foreign
        own = self._own.get(loop)
        if own is None:
            settings = self._settings()
            http = httpx.AsyncClient(http2=False, timeout=self.timeout)
            options = AsyncClientOptions(httpx_client=http, **_OPTIONS)
            client = AsyncClient(settings.url, settings.key.get_secret_value(), options)
            own = self._own[loop] = (client, _until_loop_ends(http))
            await anext(own[1])
        return own[0]


async def _until_loop_ends(http: httpx.AsyncClient) -> AsyncGenerator[None]:
    """Close when asked, or with the loop: asyncio.run() closes the generators that are still open."""
    try:
        yield
    finally:
        await http.aclose()


def _log(function: str, elapsed: float) -> None:
    logger.debug("%s took %.1f ms", function, elapsed * 1000, extra={"function": function, "elapsed": elapsed})
