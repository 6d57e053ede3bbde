"""What is public says what it does, and nothing is public by accident.

The sync classes stand for both colours: they are built from the async ones.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
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


def public_modules() -> Iterator[ModuleType]:
    """Import every module that no part of its path calls private."""
    yield tokenlimits
    for found in pkgutil.walk_packages(tokenlimits.__path__, "tokenlimits."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


MODULES = list(public_modules())


def made(body: Iterable[ast.stmt], *, in_package: bool) -> Iterator[str]:
    """Name what the statements of a module define; what a package takes from its modules counts as its own."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.ImportFrom(level=1, names=names) if in_package:
                yield from (alias.asname or alias.name for alias in names)
            case ast.If(body=first, orelse=second) | ast.Try(body=first, orelse=second):
                yield from made([*first, *second], in_package=in_package)


def made_in(module: ModuleType) -> set[str]:
    path = Path(inspect.getfile(module))
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {name for name in made(body, in_package=path.name == "__init__.py") if not name.startswith("_")}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
class TestEveryPublicModule:
    def test_lists_what_it_defines(self, module: ModuleType) -> None:
        assert made_in(module) <= set(getattr(module, "__all__", ()))

    def test_has_what_it_lists_once_and_documented(self, module: ModuleType) -> None:
        listed = getattr(module, "__all__", [])
        assert len(listed) == len(set(listed))
        for name in listed:
            value = getattr(module, name)
            assert not inspect.isroutine(value) or value.__doc__
            assert not inspect.isclass(value) or value.__doc__


def test_a_module_that_is_public_is_no_accident() -> None:
    assert {module.__name__.removeprefix("tokenlimits.") for module in MODULES} == {
        *(
            "tokenlimits",
            "async_client",
            "async_groups",
            "client",
            "groups",
            "errors",
            "ledger_csv",
            "levels",
            "models",
            "otel",
            "senders",
            "settings",
            "sql_files",
            "telemetry",
        ),
        *("cli", "cli.doctor", "local", "testing", "web", "web.api", "web.panel"),
    }


def test_the_package_exports_what_people_type_every_day() -> None:
    """The rule stands in CONTRIBUTING; whoever adds a name here has read it."""
    assert set(tokenlimits.__all__) == {
        *("TokenLimits", "AsyncTokenLimits", "GroupManager", "AsyncGroupManager"),
        *("track_generation", "atrack_generation"),
        *("Limit", "GenerationRequest", "TrackResult", "Hold", "AsyncHold"),
        *("GenerationDenied", "LimitExceeded", "NotInGroup", "NoLimitForKind"),
        *("TokenLimitsError", "ConfigurationError", "InvalidRequest", "ServiceUnavailable"),
        "__version__",
    }
