"""Tells those who watch how each call went: a client's `on_result`, and `tokenlimits.otel`.

A call that nobody watches pays for one comparison.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar, cast

from tenacity import RetryCallState

from tokenlimits._core.call import Call
from tokenlimits.errors import ConfigurationError
from tokenlimits.models import TrackResult
from tokenlimits.senders import AsyncSender, Sender
from tokenlimits.telemetry import CallResult, OnResult

T = TypeVar("T")

logger = logging.getLogger("tokenlimits")


class Trace(Protocol):
    """One call, for whoever traces it."""

    def failed(self, attempt: int, reason: str) -> None:
        """Hear that an attempt failed in a way that another one may overcome."""
        ...

    def ended(self, result: CallResult) -> None:
        """Hear how the call ended."""
        ...


# of the process: the clients behind `track_generation` are traced too
_begin: Callable[[str], Trace] | None = None


def trace(begin: Callable[[str], Trace] | None) -> None:
    """Trace all calls from now on: `begin` is called with the function, before the first attempt."""
    global _begin  # noqa: PLW0603  # it belongs to the process
    _begin = begin


def checked_hook(on_result: object) -> OnResult | None:
    """Refuse what could not be called, or would never be awaited."""
    if on_result is None:
        return None
    if not callable(on_result) or inspect.iscoroutinefunction(on_result):
        raise ConfigurationError(f"on_result: must be a function that is not async (got {on_result!r:.100})")
    return cast("OnResult", on_result)


class Watch:
    """One call under way."""

    def __init__(self, function: str, on_result: OnResult | None, begin: Callable[[str], Trace] | None) -> None:
        self._function = function
        self._on_result = on_result
        self._begin = begin
        self._trace: Trace | None = None
        self._generations: tuple[TrackResult, ...] = ()
        self.attempts = 0

    @property
    def callbacks(self) -> Mapping[str, Any]:
        """What tenacity is to call around each attempt."""
        return {"before": self._attempt, "after": self._failed}

    def answered(self, answer: T) -> T:
        """Note what the answer says of generations."""
        whatever: Any = answer
        results = cast("list[Any]", whatever) if isinstance(whatever, list) else [whatever]
        # a list may be one of anything, and a coalesced call's also has those that have to travel again
        self._generations = tuple(result for result in results if isinstance(result, TrackResult))
        return answer

    def __enter__(self) -> Self:
        self._began = perf_counter()
        if self._begin is not None:
            self._trace = self._begin(self._function)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        seconds = perf_counter() - self._began
        result = CallResult(self._function, self.attempts, seconds, self._generations, error)
        if self._trace is not None:
            self._trace.ended(result)
        if self._on_result is not None:
            try:
                self._on_result(result)
            except Exception:  # whose generation was charged must get the answer
                logger.exception("on_result raised an error, after %s", self._function)

    def _attempt(self, state: RetryCallState) -> None:
        self.attempts = state.attempt_number

    def _failed(self, state: RetryCallState) -> None:
        if self._trace is not None and state.outcome is not None:
            self._trace.failed(state.attempt_number, str(state.outcome.exception()))


class _Nobody(Watch):
    """Nobody watches."""

    @property
    def callbacks(self) -> Mapping[str, Any]:
        return {}

    def answered(self, answer: T) -> T:
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


NOBODY: Final = _Nobody("", None, None)


def watch(function: str, on_result: OnResult | None) -> Watch:
    """Make the watch of a call, to enter before its first attempt."""
    return NOBODY if on_result is None and _begin is None else Watch(function, on_result, _begin)


class Watched(Sender):
    """A sender of the caller's own, whose calls are watched; what it does for each is one attempt."""

    def __init__(self, sender: Sender, on_result: OnResult | None) -> None:
        self._sender = sender
        self._on_result = on_result

    def send(self, call: Call[T], timeout: float | None = None) -> T:
        """Send a call."""
        with watch(call.function, self._on_result) as watched:
            watched.attempts = 1
            return watched.answered(self._sender.send(call, timeout))

    def close(self) -> None:
        """Close the sender."""
        self._sender.close()

    def __repr__(self) -> str:
        return repr(self._sender)


class AsyncWatched(AsyncSender):
    """A sender of the caller's own, whose calls are watched; what it does for each is one attempt."""

    def __init__(self, sender: AsyncSender, on_result: OnResult | None) -> None:
        self._sender = sender
        self._on_result = on_result

    async def send(self, call: Call[T]) -> T:
        """Send a call."""
        with watch(call.function, self._on_result) as watched:
            watched.attempts = 1
            return watched.answered(await self._sender.send(call))

    async def aclose(self) -> None:
        """Close the sender."""
        await self._sender.aclose()

    def __repr__(self) -> str:
        return repr(self._sender)
