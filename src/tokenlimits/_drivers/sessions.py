"""How to handle Supabase clients with threads, forks and event loops; no I/O here."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import httpx
from supabase import AsyncClient, Client

from tokenlimits._core.call import Call
from tokenlimits.errors import ConfigurationError
from tokenlimits.settings import is_secret, load_schema

_forks = 0
# supabase makes `client.postgrest` lazily, on first use and after each change of session; without a lock, two threads
# would each make one. It belongs to the process, not to a TokenLimits: several of these may share a client.
_lock = threading.Lock()
# What we know of a caller's client is kept here, since the client isn't ours to change; and weakly, so that it can be
# collected when its owner lets go of it. Before which fork, and in which loop, it was first seen:
_seen_at: weakref.WeakKeyDictionary[Client | AsyncClient, int] = weakref.WeakKeyDictionary()
# a weak value too, or a client that outlives its loop would keep the loop alive
_seen_in: weakref.WeakKeyDictionary[AsyncClient, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()
# The schema from the environment, read once per client: some callers wrap their client in a new TokenLimits per call.
_schemas: weakref.WeakKeyDictionary[Client | AsyncClient, str] = weakref.WeakKeyDictionary()
# The session with which supabase made a `client.postgrest`.
_made_with: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def _after_fork() -> None:
    global _forks, _lock  # noqa: PLW0603  # they belong to the process
    # a count rather than the pid, which the system may use again
    _forks += 1
    # the old one may be held by a thread that exists only in the parent, and so would never be released
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


def forks() -> int:
    """Return the number of forks between the first process and this one."""
    return _forks


def lock() -> threading.Lock:
    """Return the lock of this process; it is held only for moments, so one is enough."""
    # a function, since a fork replaces the lock: an imported name would go on meaning the parent's
    return _lock


class Use:
    """Counts the calls on a client: a call hangs if its socket is closed while it reads from it.

    `leave` and `retire` return whether it is time to close: when the client is retired and the last call has left.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._retired = False

    def enter(self) -> None:
        """Count one more call; the caller holds the lock, or is in an event loop and awaits nothing meanwhile."""
        # not locked here: finding the client and entering must be one step, or it may be retired in between
        self._calls += 1

    def leave(self) -> bool:
        """Count one call fewer."""
        with lock():
            self._calls -= 1
            return self._retired and not self._calls

    def retire(self) -> bool:
        """Mark the client for closing; later calls use another one."""
        with lock():
            self._retired = True
            return not self._calls


def notice(client: Client | AsyncClient) -> None:
    """Remember the process in which a client was first seen."""
    # the first sight counts: a child that wraps the parent's client again must not adopt it
    _seen_at.setdefault(client, _forks)


def check_fork(client: Client | AsyncClient) -> None:
    """Refuse a client from before a fork: parent and child would share sockets and read each other's answers."""
    if _seen_at[client] != _forks:
        raise ConfigurationError(
            "This Supabase client was made before the process forked, and its connections belong to the parent. "
            "Make the client in the child (with Celery, in worker_process_init), or use from_env() or track_generation "
            "without client=, which handle forks."
        )


def check_loop(client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    """Refuse a client from another event loop: its connections wait for events of that loop."""
    if _seen_in.setdefault(client, weakref.ref(loop))() is not loop:
        raise ConfigurationError(
            "This AsyncClient was used in another event loop, to which its connections belong. Make a client in each "
            "loop, or use from_env() or atrack_generation without client=, which handle loops."
        )


def place(clients: Iterable[Client | AsyncClient]) -> str:
    """Say where the first client's project is; never more than host and port, for a URL may hold a password."""
    for client in clients:
        try:
            url = httpx.URL(str(client.supabase_url))
        except httpx.InvalidURL:
            return "a URL that can't be read"
        # a password that has a slash, unescaped, makes its rest a path
        return f"{url.scheme}://{url.netloc.decode()}" if "@" not in url.path else "a URL that can't be read"
    return "SUPABASE_URL (not read yet)"


def unsendable_key() -> ConfigurationError:
    """Make the error for a key that is not one, without showing it."""
    return ConfigurationError("The Supabase key can't be sent: it has characters that HTTP headers don't allow.")


def request(client: Client | AsyncClient, call: Call[Any], schema: str | None) -> Any:
    """Make the request for a call, with the client's current session.

    Without a schema, the environment says which; the client's own schema is for its other calls.
    """
    if schema is None:
        schema = _schemas.get(client) or _schemas.setdefault(client, load_schema())
    # suppressed, and the other error raised outside: UnicodeError holds the header's value, which is the key
    with suppress(UnicodeError):
        return _request(client, call, schema)
    raise unsendable_key()


def _check_session(client: Client | AsyncClient, authorization: str | None) -> None:
    """Refuse a client whose key may do everything, but which would send the token of whoever has signed in on it."""
    key: str = client.supabase_key
    if authorization not in (None, f"Bearer {key}") and is_secret(key):
        raise ConfigurationError(
            "Somebody has signed in on this Supabase client, so that it sends their token instead of its secret key. "
            "Sign users in on another client, made with the publishable key."
        )


def _request(client: Client | AsyncClient, call: Call[Any], schema: str) -> Any:
    # Read under the lock, so that `made_with` is what this `postgrest` was made with and no thread makes a second one.
    # supabase itself doesn't take the lock: when somebody signs in, it drops `postgrest` and then changes the header.
    with _lock:
        authorization = client.options.headers.get("Authorization")
        postgrest: Any = None
        while postgrest is None:  # dropped between the check and the return of supabase's property
            postgrest = client.postgrest
        made_with = _made_with.setdefault(postgrest, authorization)
    _check_session(client, authorization)
    made = postgrest.rpc(call.function, dict(call.params)).request
    # on the request: `client.schema(…)` would make another PostgREST client for each call
    made.headers["Content-Profile"] = made.headers["Accept-Profile"] = schema
    if made_with != authorization:
        # made after the drop and before the change of the header: supabase goes on using it with the old session
        made.headers["Authorization"] = authorization
    return made
