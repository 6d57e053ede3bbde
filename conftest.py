"""The names that the examples in docstrings use, on a real stack."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from httpx._transports import default as transports
from supabase import AsyncClientOptions, Client, ClientOptions, create_async_client
from tests.support.doctests import top_level_await

from tokenlimits import AsyncGroupManager, AsyncTokenLimits, GroupManager, Limit, TokenLimits
from tokenlimits.async_client import _AsyncDefault
from tokenlimits.local import LocalStack, LocalUser

pytest_plugins = ["tests.support.balance"]


@pytest.fixture(scope="session", autouse=True)
def one_tls_context() -> Iterator[None]:
    """Reading the certificates takes longer than most tests, and every client does it, also where it needs none."""
    create, made = transports.create_ssl_context, dict[tuple[object, ...], ssl.SSLContext]()

    def create_once(**options: Any) -> ssl.SSLContext:
        named = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        key = (*options.items(), *named)
        if key not in made:
            made[key] = create(**options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", create_once)
        yield


@pytest.fixture(scope="session")
def example_stack() -> Iterator[LocalStack]:
    """One for all examples."""
    with LocalStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def example_session(example_stack: LocalStack) -> tuple[LocalUser, dict[str, str]]:
    """Somebody who is signed in, and the header that says so."""
    user = example_stack.create_user("ann@example.com")
    return user, {"Authorization": f"Bearer {example_stack.access_token(user)}"}


@pytest.fixture(autouse=True)
def names_of_examples(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`limits`, `groups`, a user in a group with limits, and the group `team`, which nobody is in.

    `session` is the client of somebody else in that group, who is signed in.
    """
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    stack: LocalStack = request.getfixturevalue("example_stack")
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_AsyncDefault, "current", None)
    with httpx.Client(http2=False) as http, asyncio.Runner() as loop, top_level_await(loop.run):
        client = Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        groups = GroupManager(client)
        (user_id,) = stack.create_users(1)
        everyone = groups.create("Everyone", limits={"image": 100, "video": 20})
        groups.add_member(everyone.id, user_id)
        user, headers = request.getfixturevalue("example_session")
        groups.add_member(everyone.id, user.id)
        doctest_namespace |= {
            "limits": TokenLimits(client),
            "groups": groups,
            "session": Client(stack.url, stack.publishable_key, ClientOptions(httpx_client=http, headers=headers)),
            "user_id": user_id,
            "team": groups.create("Team", limits={"image": 50}),
            "GroupManager": GroupManager,
            "Limit": Limit,
            "TokenLimits": TokenLimits,
        }
        if "async" in request.node.name.lower():
            with async_clients(stack, loop, headers) as clients:
                doctest_namespace |= clients
                yield
        else:
            yield
        for group in groups.list():
            groups.delete(group.id)


@contextmanager
def async_clients(stack: LocalStack, loop: asyncio.Runner, headers: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The same names for the examples of the async classes and functions, in one event loop."""
    http = httpx.AsyncClient(http2=False)
    client = loop.run(create_async_client(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http)))
    options = AsyncClientOptions(httpx_client=http, headers=headers)
    session = loop.run(create_async_client(stack.url, stack.publishable_key, options))
    try:
        yield {"limits": AsyncTokenLimits(client), "groups": AsyncGroupManager(client), "session": session}
    finally:
        loop.run(http.aclose())
        if _AsyncDefault.current is not None:  # the client of atrack_generation
            loop.run(_AsyncDefault.current.aclose())
