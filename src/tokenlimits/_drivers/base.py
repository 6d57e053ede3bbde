"""What the clients for workers and for groups have in common, sync and async."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Self, TypeVar

from supabase import AsyncClient, Client

from tokenlimits._core import arguments
from tokenlimits._core.flows import Flow, Pages
from tokenlimits.errors import ConfigurationError
from tokenlimits.senders import AsyncSender, Sender
from tokenlimits.settings import Settings, check_encrypted, load, named_schema

from .transport import AsyncTransport, Transport
from .watching import AsyncWatched, Watched, checked_hook

T = TypeVar("T")

DEFAULT_TIMEOUT = 10.0
"""Seconds for one call, including its retries."""

_A_YEAR = 366 * 86_400.0


def _checked_timeout(timeout: object) -> float:
    if isinstance(timeout, int | float) and 0 < timeout < _A_YEAR:
        return timeout
    raise ConfigurationError(f"timeout: must be more than 0 seconds, and finite (got {timeout!r})")


def _checked_schema(schema: object) -> str | None:
    return None if schema is None else named_schema(schema)


def _settings(client: Client | AsyncClient | None, allow_http: bool) -> Callable[[], Settings]:
    """Check where a client sends its key to, or make what reads that on first use."""
    allowed = arguments.flag(allow_http, "allow_http")
    if client is not None:
        check_encrypted(str(client.supabase_url), allow_http=allowed)
    return partial(load, allow_http=allowed)


def _shown(client: object, sender: Sender | AsyncSender, timeout: float) -> str:
    place = sender.place() if isinstance(sender, Transport | AsyncTransport) else repr(sender)
    return f"<{type(client).__name__} of {place}, timeout {timeout:g} s>"


class Base:
    """Holds what sends calls; a context manager that closes its connections."""

    def __init__(
        self,
        client: object,
        timeout: float,
        schema: object = None,
        *,
        allow_http: bool = False,
        on_result: object = None,
    ) -> None:
        self._timeout, schema = _checked_timeout(timeout), _checked_schema(schema)
        hook = checked_hook(on_result)
        if isinstance(client, Client | None):
            settings = _settings(client, allow_http)
            self._transport: Sender = Transport(client, self._timeout, settings, schema=schema, on_result=hook)
        elif isinstance(client, Sender):
            self._transport = Watched(client, hook)
        else:
            raise ConfigurationError(f"client: must be a supabase.Client (got {type(client).__name__})")

    def close(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open.

        Example:
            >>> limits.close()
        """
        self._transport.close()

    def _run(self, flow: Flow[T]) -> T:
        """Run an operation of several calls."""
        try:
            call = next(flow)
            while True:
                call = flow.send(self._transport.send(call))
        except StopIteration as end:
            return end.value

    def _iterate(self, pages: Pages[T]) -> Iterator[T]:
        """Yield the items of page after page."""
        try:
            call = next(pages)
            while True:
                page = self._transport.send(call)
                yield from page
                call = pages.send(page)
        except StopIteration:
            return

    def __repr__(self) -> str:
        return _shown(self, self._transport, self._timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncBase:
    """Holds what sends calls; an async context manager that closes its connections."""

    def __init__(
        self,
        client: object,
        timeout: float,
        schema: object = None,
        *,
        allow_http: bool = False,
        on_result: object = None,
    ) -> None:
        self._timeout, schema = _checked_timeout(timeout), _checked_schema(schema)
        hook = checked_hook(on_result)
        if isinstance(client, AsyncClient | None):
            self._transport: AsyncSender = AsyncTransport(
                client, self._timeout, _settings(client, allow_http), schema=schema, on_result=hook
            )
        elif isinstance(client, AsyncSender):
            self._transport = AsyncWatched(client, hook)
        else:
            raise ConfigurationError(f"client: must be a supabase.AsyncClient (got {type(client).__name__})")

    async def aclose(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open."""
        await self._transport.aclose()

    async def _run(self, flow: Flow[T]) -> T:
        """Run an operation of several calls."""
        try:
            call = next(flow)
            while True:
                call = flow.send(await self._transport.send(call))
        except StopIteration as end:
            return end.value

    async def _iterate(self, pages: Pages[T]) -> AsyncIterator[T]:
        """Yield the items of page after page."""
        try:
            call = next(pages)
            while True:
                page = await self._transport.send(call)
                for item in page:
                    yield item
                call = pages.send(page)
        except StopIteration:
            return

    def __repr__(self) -> str:
        return _shown(self, self._transport, self._timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
