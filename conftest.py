"""The names that the examples in docstrings use, on a real stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from supabase import Client, ClientOptions

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack


@pytest.fixture(scope="session")
def example_stack() -> Iterator[LocalStack]:
    """One for all examples."""
    with LocalStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def names_of_examples(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`limits`, `groups`, a user in a group with limits, and the group `team`, which nobody is in."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    stack: LocalStack = request.getfixturevalue("example_stack")
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    with httpx.Client(http2=False) as http:
        client = Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        groups = GroupManager(client)
        (user_id,) = stack.create_users(1)
        everyone = groups.create("Everyone", limits={"image": 100, "video": 20})
        groups.add_member(everyone.id, user_id)
        doctest_namespace |= {
            "limits": TokenLimits(client),
            "groups": groups,
            "user_id": user_id,
            "team": groups.create("Team", limits={"image": 50}),
            "GroupManager": GroupManager,
            "Limit": Limit,
            "TokenLimits": TokenLimits,
        }
        yield
        for group in groups.list():
            groups.delete(group.id)
