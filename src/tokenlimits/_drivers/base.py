"""What the clients for workers and for groups have in common, sync and async."""

from __future__ import annotations

from typing import Self

from supabase import AsyncClient, Client

from tokenlimits.errors import ConfigurationError
from tokenlimits.settings import named_schema

from .transport import AsyncTransport, Transport

DEFAULT_TIMEOUT = 10.0
"""Seconds for one call, including its retries."""

_A_YEAR = 366 * 86_400.0


def _checked_timeout(timeout: object) -> float:
    if isinstance(timeout, int | float) and 0 < timeout < _A_YEAR:
        return timeout
    raise ConfigurationError(f"timeout: must be more than 0 seconds, and finite (got {timeout!r})")


def _checked_schema(schema: object) -> str | None:
    return None if schema is None else named_schema(schema)


def _shown(client: object, transport: Transport | AsyncTransport) -> str:
    return f"<{type(client).__name__} of {transport.place()}, timeout {transport.timeout:g} s>"


class Base:
    """Holds the transport; a context manager that closes its connections."""

    def __init__(self, client: object, timeout: float, schema: object = None) -> None:
        if not isinstance(client, Client | None):
            raise ConfigurationError(f"client: must be a supabase.Client (got {type(client).__name__})")
        self._transport = Transport(client, _checked_timeout(timeout), schema=_checked_schema(schema))

    def close(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open.

        Example:
            >>> limits.close()
        """
        self._transport.close()

    def __repr__(self) -> str:
        return _shown(self, self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncBase:
    """Holds the transport; an async context manager that closes its connections."""

    def __init__(self, client: object, timeout: float, schema: object = None) -> None:
        if not isinstance(client, AsyncClient | None):
            raise ConfigurationError(f"client: must be a supabase.AsyncClient (got {type(client).__name__})")
        self._transport = AsyncTransport(client, _checked_timeout(timeout), schema=_checked_schema(schema))

    async def aclose(self) -> None:
        """Close the connections that were made here; a client that you passed in stays open."""
        await self._transport.aclose()

    def __repr__(self) -> str:
        return _shown(self, self._transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
