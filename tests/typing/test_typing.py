"""The types that users see are what these files say: pyright agrees with every line of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [HERE / "holds.py"]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_pyright_agrees(path: Path, tmp_path: Path) -> None:
    settings = {
        "include": [os.path.relpath(path, tmp_path)],
        "extraPaths": [str(HERE.parents[1] / "src")],
        "pythonVersion": "3.11",
    }
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--project", project, "--pythonpath", sys.executable, "--outputjson"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    found = [(each["range"]["start"]["line"] + 1, each["message"]) for each in report["generalDiagnostics"]]
    assert found == []
    assert report["summary"]["filesAnalyzed"] == 1
