"""One deadline for a call, over all its attempts and over every step of each.

httpx has no such thing: it limits each connect, write and read separately, so a server that sends a byte now and then
can keep a call waiting for as long as it likes. But httpcore looks up a request's timeouts at the beginning of each
step, in a mapping that we can supply, and passes the timeout of a step to each read of the connection, which we can
wrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

# The share of the remaining time that one attempt may take, so that a dead connection leaves time for another attempt.
# With the default of 10 s, the first attempt gets the 8 s after which Supabase ends a statement anyway.
_SHARE = 0.8
# Seconds; less is not worth sharing: both attempts might be too short for a call over TLS.
_INDIVISIBLE = 1.0


class Deadline:
    """When a call must be over."""

    def __init__(self, seconds: float) -> None:
        # not time(): a deadline must not move when somebody sets the clock
        self._began = monotonic()
        self._ends = self._began + seconds

    def elapsed(self) -> float:
        """Return the seconds since it began."""
        return monotonic() - self._began

    def is_over(self) -> bool:
        """Return whether it has passed."""
        return monotonic() >= self._ends

    def left(self) -> float:
        """Return the seconds until it ends, never less than a millisecond."""
        # a socket with a timeout of 0 is non-blocking: it raises BlockingIOError instead of a timeout
        return max(self._ends - monotonic(), 0.001)

    def attempt(self, *, retry_safe: bool) -> Deadline:
        """Make the deadline of the next attempt."""
        left = self.left()
        # a call that must not be repeated has no use for the time that another attempt would need
        return Deadline(left * _SHARE if retry_safe and left > _INDIVISIBLE else left)


def extensions(deadline: Deadline) -> dict[str, Any]:
    """Make the extensions that hold an httpx request to a deadline."""
    return {"timeout": Timeouts(deadline), "trace": _watch}


class _Left(float):
    """The seconds that are left, with the deadline itself, so that a read can look again.

    It must be a float, as httpcore passes it to the socket.
    """

    deadline: Deadline


class Timeouts(Mapping[str, float]):
    """The timeouts of connect, write, read and pool; httpcore looks each up when the step begins."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def __getitem__(self, step: str) -> float:
        # httpcore applies the connect timeout twice: to the TCP connection and to the TLS handshake
        left = _Left(self._deadline.left() / (2 if step == "connect" else 1))
        left.deadline = self._deadline
        return left

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "write", "read", "pool"))

    def __len__(self) -> int:
        return 4


def _watch(event: str, info: Mapping[str, Any]) -> None:
    """Wrap the reads of each new connection, so that each one looks again at how much time is left."""
    # both events, as `start_tls` returns another stream; a connection from the pool was wrapped when it was made
    if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
        return
    stream = info["return_value"]
    read = stream.read

    def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
        # the deadline comes with the timeout, not with the connection: the next request here has another one
        return read(max_bytes, timeout.deadline.left() if isinstance(timeout, _Left) else timeout)

    stream.read = read_in_time
