"""The id of a request: in `X-Request-Id`, in every problem, and in every line that is logged meanwhile."""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar
from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "X-Request-Id"

_KEY: Final = "tokenlimits.request_id"
# a proxy's or the caller's own; whatever else they send could forge lines of the log
_USABLE: Final = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_current: ContextVar[str | None] = ContextVar(_KEY, default=None)


def current() -> str | None:
    """Return the id of the request that is being answered."""
    return _current.get()


def begin(scope: Scope) -> str:
    """Return the id of a request: as it came in, or a new one."""
    known: str | None = scope.get(_KEY)
    if known is None:
        sent = Headers(scope=scope).get(HEADER, "")
        known = scope[_KEY] = sent if _USABLE.fullmatch(sent) else uuid4().hex
    # never reset: what the server logs of the request, it logs when the app is done with it
    _current.set(known)
    return known


class RequestIds:
    """Gives each request an id, and each answer the header.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        known = begin(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = known
            await send(message)

        await self._app(scope, receive, send_with_id)


class InRecords(logging.Filter):
    """Gives each record of the log the request's id, as `request_id`; None outside of requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out nothing."""
        record.request_id = current()
        return True


# for the formatters of apps that include the API; `serve` sets the formatters of its own process
logging.getLogger("tokenlimits").addFilter(InRecords())
