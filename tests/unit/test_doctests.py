"""Examples in docstrings may await, and fail as others do."""

from __future__ import annotations

import asyncio
import doctest
from typing import Any

from tests.support.doctests import top_level_await

NAMES = """
    >>> import asyncio
    >>> async def double(number):
    ...     await asyncio.sleep(0)
    ...     return 2 * number
    >>> async def numbers():
    ...     yield await double(1)
"""


def failures(examples: str, **names: Any) -> int:
    test = doctest.DocTestParser().get_doctest(NAMES + examples, names, "examples", None, None)
    with asyncio.Runner() as loop, top_level_await(loop.run):
        return doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed


def test_what_is_awaited_is_shown_and_kept() -> None:
    examples = """
        >>> await double(2)
        4
        >>> doubled = await double(3)
        >>> doubled, (await double(4)).bit_length()
        (6, 4)
        >>> [number async for number in numbers()]
        [2]
        >>> async for number in numbers():
        ...     print(number)
        2
    """
    assert failures(examples) == 0


def test_a_wrong_answer_fails() -> None:
    assert failures("\n    >>> await double(2)\n    5\n") == 1


def test_an_error_fails_unless_it_is_expected() -> None:
    raised = "\n    >>> await double(None)\n"
    assert failures(raised) == 1
    assert failures(raised + "    Traceback (most recent call last):\n    TypeError: unsupported operand\n") == 1
    examples = raised + "    Traceback (most recent call last):\n    TypeError: unsupported operand ...\n"
    assert failures(examples.replace("(None)", "(None)  # doctest: +ELLIPSIS")) == 0


def test_examples_that_do_not_await_need_no_loop() -> None:
    assert failures("\n    >>> asyncio.run(double(2))\n    4\n    >>> 1 + 1\n    2\n") == 0


def test_afterwards_doctest_is_as_it_was() -> None:
    assert failures("") == 0
    assert not {"compile", "exec"} & vars(doctest).keys()
