"""Both shells are one: the same methods, signatures and docstrings, whatever the colour."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import tokenlimits
from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    GroupManager,
    TokenLimits,
    atrack_generation,
    track_generation,
)

CLASSES = [(TokenLimits, AsyncTokenLimits), (GroupManager, AsyncGroupManager)]
CLASS_IDS = [sync.__name__ for sync, _ in CLASSES]
# the context manager's two methods have names that differ in more than an a
NAMES = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}


def colourless(text: str) -> str:
    """Take out of a text or an annotation what says which colour it is of."""
    text = re.sub(r"Async(?=[A-Z])|\basync ", "", text)
    text = re.sub(r"\b([Aa])n (?=`[A-Z]|[A-Z])", r"\1 ", text)
    return re.sub(r"\s+", " ", text).strip()


def public(cls: type) -> dict[str, Any]:
    """Find the public methods of a class, by their names in the sync class."""
    dunders = ("__init__", *NAMES, *NAMES.values())
    names = [name for name in dir(cls) if not name.startswith("_") or name in dunders]
    return {NAMES.get(name, name): inspect.getattr_static(cls, name) for name in names}


def plain(member: Any) -> Callable[..., Any]:
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


PAIRS = [
    pytest.param(plain(method), plain(public(async_)[name]), id=f"{sync.__name__}.{name}")
    for sync, async_ in CLASSES
    for name, method in public(sync).items()
    if name in public(async_)
] + [pytest.param(track_generation, atrack_generation, id="track_generation")]

DOCUMENTED = [
    pytest.param(plain(method), id=f"{sync.__name__}.{name}")
    for sync, _ in CLASSES
    for name, method in public(sync).items()
    if not name.startswith("__")
] + [pytest.param(track_generation, id="track_generation")]


@pytest.mark.parametrize(("sync", "async_"), CLASSES, ids=CLASS_IDS)
def test_the_same_methods(sync: type, async_: type) -> None:
    assert public(sync).keys() == public(async_).keys()


@pytest.mark.parametrize(("sync", "async_"), PAIRS)
def test_the_same_signature(sync: Callable[..., Any], async_: Callable[..., Any]) -> None:
    ours, theirs = inspect.signature(sync), inspect.signature(async_)
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in ours.parameters.items():
        twin = theirs.parameters[name]
        assert (parameter.kind, parameter.default) == (twin.kind, twin.default), name
        assert colourless(str(parameter.annotation)) == colourless(str(twin.annotation)), name
    assert colourless(str(ours.return_annotation)) == colourless(str(theirs.return_annotation))


def before_example(docstring: str | None) -> str:
    return colourless((docstring or "").split("Example:")[0])


@pytest.mark.parametrize(("sync", "async_"), PAIRS)
def test_the_same_docstring(sync: Callable[..., Any], async_: Callable[..., Any]) -> None:
    assert before_example(sync.__doc__) == before_example(async_.__doc__)


def arguments(docstring: str | None) -> str:
    section = re.search(r"Args:\n(.*?)(?=\n\s*\n|\Z)", inspect.cleandoc(docstring or ""), re.DOTALL)
    return section[1] if section else ""


@pytest.mark.parametrize(("sync", "async_"), CLASSES, ids=CLASS_IDS)
def test_the_same_arguments_of_the_classes(sync: type, async_: type) -> None:
    assert arguments(sync.__doc__)
    assert colourless(arguments(sync.__doc__)) == colourless(arguments(async_.__doc__))


@pytest.mark.parametrize("method", DOCUMENTED)
def test_every_argument_is_documented(method: Callable[..., Any]) -> None:
    parameters = [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]
    assert re.findall(r"^    (\w+):", arguments(method.__doc__), re.MULTILINE) == parameters


@pytest.mark.parametrize("method", [*DOCUMENTED, *(pytest.param(c, id=c.__name__) for c, _ in CLASSES)])
def test_every_sync_docstring_has_an_example(method: Callable[..., Any]) -> None:
    assert re.search(r"Example:\n\s+>>> ", method.__doc__ or "")


def test_the_public_names_are_those_that_are_exported() -> None:
    imported = {
        name for name, value in vars(tokenlimits).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert imported | {"__version__"} == set(tokenlimits.__all__)
    assert len(tokenlimits.__all__) == len(set(tokenlimits.__all__))
