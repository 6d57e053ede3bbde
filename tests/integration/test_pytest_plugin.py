"""The pytest plugin, found by its entry point in a pytest of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

USER = "a5f40000-0000-4000-8000-000000000001"


def outcome(directory: Path, tests: str, *options: str) -> tuple[dict[str, int], str]:
    """Run a file of tests where nothing else is, and count how they ended."""
    source = f"import asyncio, sys\nimport pytest\nUSER = {USER!r}\n{textwrap.dedent(tests)}"
    (directory / "test_app.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "--strict-markers", *options]
    done = subprocess.run([*command, "."], cwd=directory, capture_output=True, text=True, check=False)
    counted = re.findall(r"(\d+) (passed|failed|errors?)", done.stdout.splitlines()[-1])
    return {how.removesuffix("s"): int(many) for many, how in counted}, done.stdout + done.stderr


@pytest.mark.slow
def test_the_fixture_is_what_track_generation_uses_meanwhile(tmp_path: Path) -> None:
    counted, output = outcome(
        tmp_path,
        """
        from tokenlimits import atrack_generation, track_generation
        from tokenlimits.client import _Default
        from tokenlimits.testing import FakeTokenLimits

        def test_unlimited(fake_limits):
            assert isinstance(fake_limits, FakeTokenLimits)
            assert track_generation(USER, "image").remaining is None
            assert asyncio.run(atrack_generation(USER, "video")).allowed
            assert [usage.kind for usage in fake_limits.tracked] == ["image", "video"]

        def test_another_test_has_another(fake_limits):
            assert fake_limits.tracked == ()

        def test_without_it_there_is_none():
            assert _Default.current is None
        """,
    )
    assert counted == {"passed": 3}, output


@pytest.mark.slow
def test_the_marker_sets_the_limits(tmp_path: Path) -> None:
    counted, output = outcome(
        tmp_path,
        """
        from tokenlimits import Limit, ServiceUnavailable, track_generation

        pytestmark = pytest.mark.fake_limits({"image": 3})

        def left(kind="image"):
            return track_generation(USER, kind).remaining

        def test_of_the_module(fake_limits):
            assert left() == 2

        @pytest.mark.fake_limits({"image": 2}, on_unavailable="deny")
        class TestOfTheClass:
            def test_it(self, fake_limits):
                assert left() == 1
                fake_limits.fail(ServiceUnavailable("away"))
                assert track_generation(USER, "image").error == "away"

            @pytest.mark.fake_limits([Limit(kind="image", max=1, period="day")])
            def test_of_the_function(self, fake_limits):
                assert left() == 0

        @pytest.fixture
        def begun():
            return left()

        def test_it_asks_for_the_fixture_before_others(begun):
            assert (begun, left()) == (2, 1)

        @pytest.mark.fake_limits(limits={"image": 9})
        @pytest.mark.parametrize("cost", [1, 2])
        def test_of_parameters(fake_limits, cost):
            assert fake_limits.track(USER, "image", cost=cost).remaining == 9 - cost
        """,
    )
    assert counted == {"passed": 6}, output


@pytest.mark.slow
def test_what_the_fake_refuses_is_an_error_of_the_test(tmp_path: Path) -> None:
    counted, output = outcome(
        tmp_path,
        """
        @pytest.mark.fake_limits({"Image": 3})
        def test_it(fake_limits): ...
        """,
    )
    assert counted == {"error": 1}
    assert "InvalidRequest: limits[0].kind" in output


@pytest.mark.slow
@pytest.mark.parametrize("module", ["supabase", "pydantic", "tokenlimits"])
def test_who_does_not_use_it_waits_for_nothing(tmp_path: Path, module: str) -> None:
    counted, output = outcome(tmp_path, f"def test_it(): assert {module!r} not in sys.modules")
    assert counted == {"passed": 1}, output


def test_the_marker_says_what_it_is_for(tmp_path: Path) -> None:
    assert "@pytest.mark.fake_limits(limits=None, *, users=None" in outcome(tmp_path, "", "--markers")[1]
