"""What sends the calls of a client: implement one to answer them in another way, as `tokenlimits.testing` does.

A client takes a sender in place of a Supabase client.

Example:
    >>> class Logged:
    ...     def __init__(self, sender):
    ...         self.sender = sender
    ...     def send(self, call, timeout=None):
    ...         print(call.function)
    ...         return self.sender.send(call, timeout)
    ...     def close(self):
    ...         self.sender.close()
    >>> from tokenlimits import TokenLimits
    >>> from tokenlimits.testing import FakeTokenLimits
    >>> limits = TokenLimits(Logged(FakeTokenLimits().sender))
    >>> limits.track("a5f40000-0000-4000-8000-000000000001", "image").allowed
    track_generation
    True
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

from ._core.call import Call

_T = TypeVar("_T")

__all__ = ["AsyncSender", "Call", "Sender"]


@runtime_checkable
class Sender(Protocol):
    """Sends the calls of a `TokenLimits` or a `GroupManager`."""

    def send(self, call: Call[_T], timeout: float | None = None) -> _T:
        """Call `call.function` with `call.params`, and return `call.parse(answer)`.

        It raises what the client is to raise: `ServiceUnavailable` when there is no answer in time.

        Args:
            call: What to send.
            timeout: Seconds for it, including its retries; by default the sender's own.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; the client that it was passed to is closed."""
        ...


@runtime_checkable
class AsyncSender(Protocol):
    """Sends the calls of an `AsyncTokenLimits` or an `AsyncGroupManager`."""

    async def send(self, call: Call[_T]) -> _T:
        """Call `call.function` with `call.params`, and return `call.parse(answer)`; see `Sender`.

        Args:
            call: What to send.
        """
        ...

    async def aclose(self) -> None:
        """Let go of what it holds; the client that it was passed to is closed."""
        ...
