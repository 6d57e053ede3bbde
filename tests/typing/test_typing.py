"""Pyright finds what the files beside this one expect, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def pyright(project: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", project],
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout)


def shown(found: dict[str, Any]) -> list[str]:
    return [
        f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in found["generalDiagnostics"]
    ]


@pytest.mark.slow
def test_every_expectation_holds() -> None:
    found = pyright(HERE)
    assert found["summary"]["filesAnalyzed"] >= 3
    assert shown(found) == []


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The same files, each with one expectation that is wrong."""
    (tmp_path / "pyrightconfig.json").write_text((HERE / "pyrightconfig.json").read_text())
    workers = (HERE / "workers.py").read_text()
    (tmp_path / "type.py").write_text(workers.replace("result.usage_id, UUID | None", "result.usage_id, UUID", 1))
    fine = re.sub(r'Limit\(kind="image", max=1, starts="soon"\)', 'Limit(kind="image", max=1)', workers, count=1)
    (tmp_path / "needless.py").write_text(fine)
    (tmp_path / "error.py").write_text(workers.replace("  # pyright: ignore[reportCallIssue]", "", 1))
    return tmp_path


@pytest.mark.slow
def test_an_expectation_that_is_wrong_is_found(broken: Path) -> None:
    assert {each.partition(":")[0] for each in shown(pyright(broken))} == {"type.py", "needless.py", "error.py"}
