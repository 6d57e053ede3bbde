"""What is public says what it does, and nothing is public by accident.

The sync classes stand for both colours: they are built from the async ones.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import tokenlimits
from tokenlimits import GroupManager, TokenLimits, track_generation

CLASSES = [TokenLimits, GroupManager]


def plain(member: Any) -> Callable[..., Any]:
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


METHODS = [
    pytest.param(plain(inspect.getattr_static(cls, name)), id=f"{cls.__name__}.{name}")
    for cls in CLASSES
    for name in dir(cls)
    if not name.startswith("_")
] + [pytest.param(track_generation, id="track_generation")]


def arguments(docstring: str | None) -> list[str]:
    section = re.search(r"Args:\n(.*?)(?=\n\s*\n|\Z)", inspect.cleandoc(docstring or ""), re.DOTALL)
    return re.findall(r"^    (\w+):", section[1], re.MULTILINE) if section else []


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_of_a_method_is_documented(method: Callable[..., Any]) -> None:
    parameters = [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]
    assert arguments(method.__doc__) == parameters


@pytest.mark.parametrize("cls", CLASSES)
def test_every_argument_of_a_class_is_documented(cls: type) -> None:
    assert arguments(cls.__doc__) == list(inspect.signature(cls).parameters)


@pytest.mark.parametrize("documented", [*METHODS, *(pytest.param(cls, id=cls.__name__) for cls in CLASSES)])
def test_every_docstring_has_an_example(documented: Callable[..., Any]) -> None:
    assert re.search(r"Example:\n\s+>>> ", documented.__doc__ or "")


def test_the_public_names_are_those_that_are_exported() -> None:
    imported = {
        name for name, value in vars(tokenlimits).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert imported | {"__version__"} == set(tokenlimits.__all__)
    assert len(tokenlimits.__all__) == len(set(tokenlimits.__all__))
