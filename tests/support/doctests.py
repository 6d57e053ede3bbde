"""Doctests that may await, as in `python -m asyncio`."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import pytest


@contextmanager
def top_level_await(run: Callable[[Coroutine[Any, Any, Any]], object]) -> Iterator[None]:
    """Let the examples that run inside of it await; `run` gets those that do."""

    def compile_(source: str, filename: str, mode: str, flags: int, dont_inherit: bool) -> CodeType:
        return compile(source, filename, mode, flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit)

    def exec_(code: CodeType, names: dict[str, Any]) -> None:
        if code.co_flags & inspect.CO_COROUTINE:
            run(eval(code, names))
        else:
            exec(code, names)

    # doctest has no hook for this: its module's own names hide the builtins that it calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctest, "compile", compile_, raising=False)
        patch.setattr(doctest, "exec", exec_, raising=False)
        yield
