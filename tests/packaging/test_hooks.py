"""pre-commit runs what `make check` runs."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from tests.packaging.makefile import ROOT, commands

CONFIG = ROOT / ".pre-commit-config.yaml"


def hooks() -> list[dict[str, Any]]:
    (repository,) = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"  # with the versions of the lock, and no other repository to trust
    return repository["hooks"]


def program(command: str) -> str:
    """Name what a command runs: `ruff format`, `tools/build_sql.py`."""
    words = [word for word in command.split() if "=" not in word and word not in {".venv/bin/python", "-m", "make"}]
    name = words[0].removeprefix(".venv/bin/")
    return " ".join([name, *words[1:2]]) if name == "ruff" else name


@pytest.mark.parametrize("command", [line for line in commands("check") if line.startswith((".venv/bin/", "tools/"))])
def test_each_check_is_a_hook(command: str) -> None:
    assert program(command) in {program(hook["entry"]) for hook in hooks()}, f"add a hook: {command}"


def test_the_configuration_is_valid() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hooks_look_at_files_that_there_are() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for hook in hooks():
        pattern = re.compile(hook.get("files", ""))
        assert any(pattern.search(path) for path in tracked), hook["id"]
