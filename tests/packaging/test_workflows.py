"""The workflows on GitHub, as far as that can be told without GitHub: `make check` has zizmor and the schemas."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.packaging.makefile import ROOT, commands, made_by

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: (?:\./\S+(?: # zizmor: \S+)?|[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*)$")


def load(path: Path) -> dict[str, Any]:
    # a BaseLoader leaves the key `on` a word
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


def scripts(workflow: dict[str, Any]) -> Iterator[str]:
    for job in workflow["jobs"].values():
        yield from (step["run"] for step in job.get("steps", ()) if "run" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
class TestEachWorkflow:
    def test_names_targets_of_the_makefile(self, path: Path) -> None:
        for script in scripts(load(path)):
            for target in made_by(script):
                assert commands(target), target

    def test_pins_actions_to_commits(self, path: Path) -> None:
        lines = [line.strip().removeprefix("- ") for line in path.read_text(encoding="utf-8").splitlines()]
        used = [line for line in lines if line.startswith("uses:")]
        assert used
        assert [line for line in used if not PINNED.match(line)] == []

    def test_may_do_nothing_unless_a_job_says_so(self, path: Path) -> None:
        assert load(path)["permissions"] in ({}, {"contents": "read"})


class TestContinuousIntegration:
    workflow = load(GITHUB / "workflows" / "ci.yml")

    def test_makes_what_a_change_must_pass(self) -> None:
        needed = set(made_by((ROOT / ".ci" / "run").read_text(encoding="utf-8")))
        assert needed
        assert needed <= {target for script in scripts(self.workflow) for target in made_by(script)}

    def test_has_every_python_that_the_package_claims(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        claimed = {line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line}
        assert set(self.workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == claimed

    def test_has_every_postgresql(self) -> None:
        assert self.workflow["jobs"]["test"]["strategy"]["matrix"]["postgres"] == ["15", "16", "17", "18"]


class TestRelease:
    jobs = load(GITHUB / "workflows" / "release.yml")["jobs"]

    def test_only_what_passed_is_published(self) -> None:
        assert set(self._all_before("publish")) == {"test", "build", "attest"}
        assert self.jobs["test"]["uses"] == "./.github/workflows/ci.yml"

    def test_what_runs_code_of_ours_may_only_read(self) -> None:
        for name, job in self.jobs.items():
            if any("checkout" in step.get("uses", "") for step in job.get("steps", ())):
                assert job["permissions"] == {"contents": "read"}, name

    def test_there_is_no_token_to_steal(self) -> None:
        assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
        assert self.jobs["publish"]["permissions"] == {"id-token": "write"}

    def _all_before(self, name: str) -> Iterator[str]:
        for needed in self.jobs[name].get("needs", ()):
            yield needed
            yield from self._all_before(needed)


def test_dependabot_looks_where_there_are_manifests() -> None:
    names = {"npm": "package-lock.json", "uv": "requirements-dev.txt", "github-actions": ".github/workflows"}
    looked_at = {
        (update["package-ecosystem"], directory)
        for update in load(GITHUB / "dependabot.yml")["updates"]
        for directory in update.get("directories", [update.get("directory")])
    }
    missing = [place for place in looked_at if not (ROOT / place[1].lstrip("/") / names[place[0]]).exists()]
    assert missing == []
    tracked = {f"/{path.parent.relative_to(ROOT)}" for path in _npm_locks()}
    assert {directory for ecosystem, directory in looked_at if ecosystem == "npm"} == tracked


def _npm_locks() -> Iterator[Path]:
    for top in ("src", "tests", "tools", "examples", "docs", "benchmarks"):
        for path in (ROOT / top).rglob("package-lock.json"):
            if "node_modules" not in path.parts:
                yield path
