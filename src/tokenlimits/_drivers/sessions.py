"""Supabase clients, as they must be handled by threads, forks and event loops; no I/O here."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from contextlib import suppress
from typing import Any

from supabase import AsyncClient, Client

from tokenlimits._core.call import Call
from tokenlimits.errors import ConfigurationError
from tokenlimits.settings import load_schema

_forks = 0
# supabase makes `client.postgrest` on first touch and after a change of session: threads would make several
_lock = threading.Lock()
# of clients that callers made: before which fork, and in which loop, they were first seen
_seen_at: weakref.WeakKeyDictionary[Client | AsyncClient, int] = weakref.WeakKeyDictionary()
_seen_in: weakref.WeakKeyDictionary[AsyncClient, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()
# where the environment says that tokenlimits is: read once for a client, for some wrap theirs anew for each call
_schemas: weakref.WeakKeyDictionary[Client | AsyncClient, str] = weakref.WeakKeyDictionary()
# with which session supabase made a `client.postgrest`
_made_with: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def _after_fork() -> None:
    global _forks, _lock  # noqa: PLW0603  # facts of the process
    _forks += 1
    _lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def forks() -> int:
    """Count the forks between the first process and this one."""
    return _forks


def lock() -> threading.Lock:
    """Return the lock of this process; held only for moments, so that one is enough."""
    return _lock


class Use:
    """Counts the calls on a client: sockets that are closed under a call that reads from them let it hang.

    `leave` and `retire` answer whether it is time to close: when it was retired, and the last call has left.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._retired = False

    def enter(self) -> None:
        """Count one more call; the lock is held, or nobody else could come between."""
        self._calls += 1

    def leave(self) -> bool:
        """Count one call less."""
        with lock():
            self._calls -= 1
            return self._retired and not self._calls

    def retire(self) -> bool:
        """Let it be closed; whoever begins a call later uses another."""
        with lock():
            self._retired = True
            return not self._calls


def notice(client: Client | AsyncClient) -> None:
    """Remember in which process a client was first seen."""
    _seen_at.setdefault(client, _forks)


def check_fork(client: Client | AsyncClient) -> None:
    """Refuse a client from before a fork: parent and child would read each other's answers."""
    if _seen_at[client] != _forks:
        raise ConfigurationError(
            "This Supabase client was made before the process forked, and its connections belong to the parent. "
            "Make the client in the child (for Celery: in worker_process_init), or use from_env() or track_generation "
            "without client=, which notice."
        )


def check_loop(client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    """Refuse a client from another event loop."""
    if _seen_in.setdefault(client, weakref.ref(loop))() is not loop:
        raise ConfigurationError(
            "This AsyncClient was used in another event loop, to which its connections belong. Make a client in each "
            "loop, or use from_env() or atrack_generation without client=, which do."
        )


def unsendable_key() -> ConfigurationError:
    """Make the error for a key that is none; it doesn't say which."""
    return ConfigurationError("The Supabase key can't be sent: it has characters that no HTTP header may have.")


def request(client: Client | AsyncClient, call: Call[Any], schema: str | None) -> Any:
    """Make the request for a call, with the client's session of this moment.

    Without a schema, the environment says which; the client's own is for its other calls.
    """
    if schema is None:
        schema = _schemas.get(client) or _schemas.setdefault(client, load_schema())
    with suppress(UnicodeError):  # it holds the key
        return _request(client, call, schema)
    raise unsendable_key()


def _request(client: Client | AsyncClient, call: Call[Any], schema: str) -> Any:
    with _lock:
        authorization = client.options.headers.get("Authorization")
        postgrest: Any = None
        while postgrest is None:  # for a moment, while another thread signs in or out
            postgrest = client.postgrest
        made_with = _made_with.setdefault(postgrest, authorization)
    made = postgrest.rpc(call.function, dict(call.params)).request
    made.headers["Content-Profile"] = made.headers["Accept-Profile"] = schema
    if made_with != authorization:
        # in that moment it was made with the session that has ended, and supabase keeps it
        made.headers["Authorization"] = authorization
    return made
