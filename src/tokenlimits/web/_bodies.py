"""How much of a request is read, and for how long: whoever sends it may be nobody we know."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.types import Message

from ._problems import TooLarge, TooSlow

MOST: Final = 65_536
"""Bytes of a body."""

MOST_IN_BULK: Final = 5_000_000
"""Bytes where a list is sent: 100,000 users have a good four million."""

_SECONDS = 60.0


class BoundedRequest(Request):
    """A request whose body has an end, even if it doesn't say how long it is.

    Args:
        request: What was sent.
        most: Bytes of its body that are read, within a minute; reading more raises `TooLarge`, and longer `TooSlow`.
    """

    def __init__(self, request: Request, most: int) -> None:
        super().__init__(request.scope, self._receive_within)
        self._unbounded = request.receive
        self._most = self._left = most
        self._until: float | None = None
        self._is_whole = False

    def may_be_long(self) -> bool:
        """Whether the body may be longer than most bodies are."""
        said = self._said_length()
        return said is None or said > MOST

    def _said_length(self) -> int | None:
        """Return the length of the header; servers let no more bytes pass."""
        said = self.headers.get("content-length", "")
        return int(said[:20]) if said.isascii() and said.isdigit() else None

    async def _receive_within(self) -> Message:
        if self._is_whole:
            return await self._unbounded()  # that somebody leaves, whenever that is
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + _SECONDS
            if (self._said_length() or 0) > self._most:
                raise TooLarge(self._most)
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._unbounded()
        except TimeoutError:
            raise TooSlow from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise TooLarge(self._most)
        self._is_whole = not message.get("more_body", False)
        return message
