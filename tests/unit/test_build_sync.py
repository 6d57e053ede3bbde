"""The sync clients are what tools/build_sync.py makes of the async ones."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from tools import build_sync


def dedent(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("async def aclose(self): await self._transport.aclose()", "def close(self): self._transport.close()"),
        ("async with generation() as hold: pass", "with generation() as hold: pass"),
        ("async for page in pages: pass", "for page in pages: pass"),
        ("all = [one async for page in pages async for one in page]", "all = [one for page in pages for one in page]"),
        ("room = (await limits.check(user)).remaining", "room = limits.check(user).remaining"),
        ("(\n    await limits.track(\n        user)\n)", "limits.track(\n        user)"),
        ("answer = await (by or transport).send(call)", "answer = (by or transport).send(call)"),
        ("class AsyncHolding(AsyncBase): pass", "class Holding(Base): pass"),
        ("from supabase import AsyncClient", "from supabase import Client"),
        ("x: AbstractAsyncContextManager[Hold, None]", "x: AbstractContextManager[Hold, None]"),
        ("await AsyncDefault.choose(client).track(user)", "Default.choose(client).track(user)"),
        ("track = atrack_generation", "track = track_generation"),
        ("__all__ = ['AsyncTokenLimits', 'atrack_generation']", "__all__ = ['TokenLimits', 'track_generation']"),
        ("message = 'AsyncTokenLimits does not await'", "message = 'AsyncTokenLimits does not await'"),
    ],
)
def test_code(code: str, expected: str) -> None:
    assert build_sync.sync_code(code) == expected


@pytest.mark.parametrize(
    ("prose", "expected"),
    [
        ("An `AsyncTokenLimits`, or an async Supabase client.", "A `TokenLimits`, or a Supabase client."),
        ("Returns an `AsyncIterator` from an async iterator.", "Returns an `Iterator` from an iterator."),
        ("A `supabase.AsyncClient`; see `AsyncTokenLimits.track`.", "A `supabase.Client`; see `TokenLimits.track`."),
        ("`async with limits.generation(user) as hold`", "`with limits.generation(user) as hold`"),
        ("Then `hold = await limits.reserve(user)`.", "Then `hold = limits.reserve(user)`."),
        ("Calls `aclose` of `atrack_generation`.", "Calls `close` of `track_generation`."),
        ("Who must await it is async with a loop, or async.", "Who must await it is async with a loop, or async."),
    ],
)
def test_prose(prose: str, expected: str) -> None:
    assert build_sync.sync_prose(prose) == expected


def test_docstrings_and_comments_come_out_right_in_place() -> None:
    source = dedent('''
        class AsyncLimits:
            """Made by an `AsyncFactory`."""

            # an AsyncClient's
            timeout = 10  # as of atrack_generation

            async def all(self) -> None:
                """Read all.

                Example:
                    >>> async with AsyncLimits() as limits:
                    ...     (await limits.track(user)).allowed
                    ...
                    ...     [one async for one in limits.all()]
                    True
                    [<AsyncLimits>]
                    >>> await limits.aclose()
                """
                return await self._all()  # in one AsyncIterator
    ''')
    expected = dedent('''
        class Limits:
            """Made by a `Factory`."""

            # a Client's
            timeout = 10  # as of track_generation

            def all(self) -> None:
                """Read all.

                Example:
                    >>> with Limits() as limits:
                    ...     limits.track(user).allowed
                    ...
                    ...     [one for one in limits.all()]
                    True
                    [<Limits>]
                    >>> limits.close()
                """
                return self._all()  # in one Iterator
    ''')
    assert build_sync.formatted(build_sync.sync_code(source), build_sync.PACKAGE / "client.py") == expected


def test_a_docstring_may_say_something_else() -> None:
    source = dedent('''
        """For event loops."""
        # SYNC: event loops => threads

        async def limited():
            """Refuse one that is not async.

            And one that is no `AsyncFunction`.
            """
            # SYNC: is not async => is async
            # another comment
            # SYNC: And one that is no `AsyncFunction` => No `AsyncFunction` either
            return 1
    ''')
    expected = dedent('''
        """For threads."""

        def limited():
            """Refuse one that is async.

            No `Function` either.
            """
            # another comment
            return 1
    ''')
    assert build_sync.sync_code(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""For tasks."""\n# SYNC: loops => threads\nx = 1\n',
        '"""For tasks and tasks."""\n# SYNC: tasks => threads\nx = 1\n',
        '"""For tasks."""\nx = 1\n# SYNC: tasks => threads\ny = 1\n',
        '"""For tasks."""\n# SYNC: tasks -> threads\nx = 1\n',
        'def f():\n    """For tasks."""\n    # SYNC: tasks => threads\n',
        "# SYNC: tasks => threads\nx = 1\n",
    ],
)
def test_a_comment_that_does_not_fit_is_refused(source: str) -> None:
    with pytest.raises(build_sync.Unconvertible, match="SYNC"):
        build_sync.sync_code(source)


def test_what_is_checked_in_is_fresh() -> None:
    assert build_sync.main(["--check"]) == 0


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Two sources, and what they were built to."""
    for name in build_sync.SOURCES.values():
        (tmp_path / name).write_text('"""A module."""\n\n\nasync def track():\n    """Track."""\n')
    assert build_sync.main([], tmp_path) == 0
    return tmp_path


def test_what_is_built_says_where_it_is_from(package: Path) -> None:
    head = "# Generated from async_client.py by `make sync`; edit it there.\n"
    assert (package / "client.py").read_text() == head + '"""A module."""\n\n\ndef track():\n    """Track."""\n'


def test_imports_are_sorted_by_their_new_names(package: Path) -> None:
    (package / "async_groups.py").write_text(
        "from collections.abc import AsyncIterator, Iterable\n\nfrom supabase import AsyncClient, Timeout\n"
    )
    assert build_sync.main([], package) == 0
    imports = "from collections.abc import Iterable, Iterator\n\nfrom supabase import Client, Timeout\n"
    assert (package / "groups.py").read_text().endswith(imports)


def test_what_is_stale_is_named_and_left_alone(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_sync.main(["--check"], package) == 0
    (package / "client.py").write_text("by hand")
    (package / "groups.py").unlink()
    assert build_sync.main(["--check"], package) == 1
    assert capsys.readouterr().err == "client.py is stale: run `make sync`\ngroups.py is stale: run `make sync`\n"
    assert (package / "client.py").read_text() == "by hand"
    assert not (package / "groups.py").exists()
    assert build_sync.main([], package) == 0
    assert build_sync.main(["--check"], package) == 0


def test_a_comment_that_does_not_fit_is_named_with_its_file(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "async_groups.py").write_text('"""For tasks."""\n# SYNC: loops => threads\nx = 1\n')
    assert build_sync.main([], package) == 1
    assert capsys.readouterr().err == (
        "async_groups.py: the docstring has 'loops' 0 times; correct its `# SYNC:` comment\n"
    )
