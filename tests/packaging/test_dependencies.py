"""What the package imports, it declares: what all need, or what the extra of that folder brings."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tokenlimits"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported(path: Path) -> Iterator[str]:
    """Name the modules of other projects that a file imports, also for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [node.module]
        else:
            continue
        yield from {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"tokenlimits"}


@pytest.mark.slow
def test_every_import_is_declared() -> None:
    distributions = packages_distributions()
    for path in SOURCE.rglob("*.py"):
        folder = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        declared = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"].get(folder, []))
        for module in imported(path):
            brought_by = {canonicalize_name(name) for name in distributions[module]}
            assert brought_by & declared, (
                f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml doesn't ask for"
            )
