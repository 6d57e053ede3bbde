"""One deadline for a call, over all its attempts and over every step of each.

httpx has no such thing: it bounds each connect, write and read by itself, so that a server that sends a byte now and
then is waited for as long as it likes. httpcore reads a request's timeouts at the beginning of each step, from a
mapping that may be ours; and inside a step it gives them to each read of the connection, which may look again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

# of what is left, for one attempt: a connection that went dead leaves time for another. Of the default 10 s it is the
# 8 s after which Supabase ends a statement.
_SHARE = 0.8
_INDIVISIBLE = 1.0


class Deadline:
    """When a call must be over."""

    def __init__(self, seconds: float) -> None:
        self._began = monotonic()
        self._ends = self._began + seconds

    def elapsed(self) -> float:
        """Seconds since it began."""
        return monotonic() - self._began

    def is_over(self) -> bool:
        """Whether it has ended."""
        return monotonic() >= self._ends

    def left(self) -> float:
        """Seconds until it ends; never 0, which would mean not to wait at all."""
        return max(self._ends - monotonic(), 0.001)

    def attempt(self, *, retry_safe: bool) -> Deadline:
        """Make the deadline of the next attempt."""
        left = self.left()
        return Deadline(left * _SHARE if retry_safe and left > _INDIVISIBLE else left)


def extensions(deadline: Deadline) -> dict[str, Any]:
    """Make the extensions of an httpx request that hold it to a deadline."""
    return {"timeout": Timeouts(deadline), "trace": _watch}


class _Left(float):
    """Seconds that are left, which knows of what."""

    deadline: Deadline


class Timeouts(Mapping[str, float]):
    """The timeouts of connect, write, read and pool, each looked up when the step begins."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def __getitem__(self, step: str) -> float:
        # that of connect holds twice, for TCP and for TLS
        left = _Left(self._deadline.left() / (2 if step == "connect" else 1))
        left.deadline = self._deadline
        return left

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "write", "read", "pool"))

    def __len__(self) -> int:
        return 4


def _watch(event: str, info: Mapping[str, Any]) -> None:
    """See each new connection, and let its reads look again at how much is left."""
    if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
        return
    stream = info["return_value"]
    read = stream.read

    def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
        return read(max_bytes, timeout.deadline.left() if isinstance(timeout, _Left) else timeout)

    stream.read = read_in_time
