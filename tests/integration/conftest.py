"""One real stack for the tests of the transport: Supabase Lite on PostgreSQL 18."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from os import environ
from uuid import uuid4

import httpx
import pytest
from supabase import Client, ClientOptions, create_client
from tests.support.postgres import PostgresServer, servers

from tokenlimits import GroupManager, Limit
from tokenlimits.async_client import _AsyncDefault
from tokenlimits.client import _Default
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def stack() -> Iterator[LocalStack]:
    with PostgresServer(servers()["18"]) as server:
        server.create_database("transport")
        with LocalStack(server.url("transport")) as stack:
            yield stack


@pytest.fixture
def from_env(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalStack]:
    """The stack as this process's Supabase, and no default clients of before."""
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_Default, "current", None)
    monkeypatch.setattr(_AsyncDefault, "current", None)
    yield stack
    if _Default.current is not None:
        _Default.current.close()


@pytest.fixture
def service(stack: LocalStack) -> Iterator[Client]:
    with httpx.Client(trust_env=False) as http:
        yield create_client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))


@pytest.fixture
def groups(service: Client) -> GroupManager:
    return GroupManager(service, timeout=60)


@pytest.fixture
def team(groups: GroupManager) -> Iterator[Callable[..., Group]]:
    """Makes groups of users with limits; they are gone afterwards."""
    made: list[Group] = []

    def make(users: list[str], *limits: Limit) -> Group:
        made.append(groups.create(str(uuid4()), limits=limits))
        groups.add_members(made[-1].id, users)
        return made[-1]

    yield make
    for group in made:
        groups.delete(group.id)


@pytest.fixture
def run_python(stack: LocalStack) -> RunPython:
    """Run a script in a Python of its own, in which every warning is an error, on the stack; return its output."""

    def run(script: str, *arguments: str, dev: bool = False) -> str:
        options = ["-W", "error", *(["-X", "dev"] if dev else [])]
        done = subprocess.run(
            [sys.executable, *options, "-c", textwrap.dedent(script), *arguments],
            env={**environ, **stack.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    return run
