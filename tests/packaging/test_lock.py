"""The lock: everything that the project needs, at one version, with the hashes of its files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from itertools import chain
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements-dev.txt"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_ENTRY = re.compile(r"^(?P<name>[\w.-]+)(?:\[[^\]]*\])?==(?P<version>[^\s;]+)(?: ; (?P<marker>[^\\\n]+?))? \\$")


class Locked:
    """One entry of the lock."""

    def __init__(self, name: str, version: str, marker: str | None, hashes: list[str]) -> None:
        self.name = canonicalize_name(name)
        self.version = Version(version)
        self.marker = None if marker is None else Marker(marker)
        self.hashes = hashes

    def counts_for(self, python: str) -> bool:
        versions = {"python_version": python, "python_full_version": f"{python}.0"}
        return self.marker is None or self.marker.evaluate(versions)


def entries() -> Iterator[Locked]:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.strip() and "#" not in line[:6]]
    for index, line in enumerate(lines):
        if line.startswith(" "):
            continue
        entry = _ENTRY.match(line)
        assert entry is not None, f"not a pinned version with hashes: {line}"
        hashes: list[str] = []
        for following in lines[index + 1 :]:
            if not following.startswith("    --hash="):
                break
            hashes.append(following.strip(" \\").removeprefix("--hash="))
        yield Locked(entry["name"], entry["version"], entry["marker"], hashes)


@pytest.fixture(scope="module")
def lock() -> list[Locked]:
    return list(entries())


def declared() -> Iterator[Requirement]:
    """Yield what pyproject.toml asks for, to build, to run and to develop."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras: dict[str, list[str]] = content["project"]["optional-dependencies"]
    project: list[str] = [*content["build-system"]["requires"], *content["project"]["dependencies"]]
    for line in chain(project, *extras.values()):
        requirement = Requirement(line)
        if requirement.name != content["project"]["name"]:
            yield requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_holds_what_the_project_declares(lock: list[Locked], python: str) -> None:
    versions = {entry.name: entry.version for entry in lock if entry.counts_for(python)}
    for requirement in declared():
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is missing: run make lock"
        assert version in requirement.specifier, f"{requirement}, but {version} is locked: run make lock"


def test_holds_what_that_needs_in_turn(lock: list[Locked]) -> None:
    here = {entry.name for entry in lock if entry.marker is None or entry.marker.evaluate()}
    assert {name for name in _needed("tokenlimits", frozenset({"dev"})) if name not in here} == set()


def _needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]] | None = None) -> Iterator[str]:
    """Yield what an installed distribution needs here, and what that needs."""
    seen = set() if seen is None else seen
    for requirement in map(Requirement, requires(name) or ()):
        wanted = any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        )
        step = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if not wanted or step in seen:
            continue
        seen.add(step)
        if step[0] != "tokenlimits":
            yield step[0]
        yield from _needed(*step, seen)


def test_every_file_has_its_hash(lock: list[Locked]) -> None:
    assert [entry.name for entry in lock if not entry.hashes] == []
    hashes = [digest for entry in lock for digest in entry.hashes]
    assert [digest for digest in hashes if not re.fullmatch("sha256:[0-9a-f]{64}", digest)] == []


def test_each_package_has_one_version_wherever_it_counts(lock: list[Locked]) -> None:
    for python in PYTHONS:
        names = [entry.name for entry in lock if entry.counts_for(python)]
        assert len(names) == len(set(names))


def test_names_no_registry() -> None:
    """Which registry is asked is the machine's to say."""
    for path in [LOCK, *ROOT.glob("t*/*/package-lock.json"), ROOT / "src/tokenlimits/local/package-lock.json"]:
        text = path.read_text(encoding="utf-8")
        assert [word for word in ("registry", "pypi.org", "--index", '"resolved"') if word in text] == [], path
