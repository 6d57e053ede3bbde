"""The pytest plugin of tokenlimits: the fixture `fake_limits`, and the marker that sets its limits.

It stands beside the package, for a module of the package would import Supabase's client at the start of every test run
in this environment. The fixture imports it when a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tokenlimits.testing import FakeTokenLimits


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, so that `--strict-markers` knows it."""
    config.addinivalue_line(
        "markers",
        "fake_limits(limits=None, *, users=None, on_unavailable='raise'): run the test with the fixture fake_limits, "
        "made as tokenlimits.testing.FakeTokenLimits is made of the same arguments",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let the marker alone ask for the fixture: else a test that is marked would call Supabase."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("fake_limits") is None:
        return
    if "fake_limits" not in item.fixturenames:
        item.fixturenames.insert(0, "fake_limits")


@pytest.fixture
def fake_limits(request: pytest.FixtureRequest) -> Iterator[FakeTokenLimits]:
    """A `FakeTokenLimits` that `track_generation` and `atrack_generation` use during the test.

    Every kind is unlimited, unless the test, its class or its module has a marker with limits, like
    `@pytest.mark.fake_limits({"image": 2})`.
    """
    from tokenlimits.testing import FakeTokenLimits, override  # noqa: PLC0415  # not before somebody asks for it

    marker = request.node.get_closest_marker("fake_limits")
    fake = FakeTokenLimits(*marker.args, **marker.kwargs) if marker is not None else FakeTokenLimits()
    with override(fake):
        yield fake
