"""Imports point one way, and only the transport does I/O (see `tool.importlinter` in pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"


def test_the_contracts_hold() -> None:
    done = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_importing_makes_no_client_and_no_noise() -> None:
    script = """
        import logging, sys, warnings
        import tokenlimits
        assert not logging.getLogger("tokenlimits").handlers
        assert "tokenlimits.local" not in sys.modules and "tokenlimits.testing" not in sys.modules
        assert "psycopg" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(line.strip() for line in script.splitlines())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_its_extra_the_web_says_what_to_install() -> None:
    script = "import sys; sys.modules['fastapi'] = None; import tokenlimits.web"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("tokenlimits.web needs more packages: pip install 'tokenlimits[web]'\n")


def test_every_test_is_collected() -> None:
    hidden = [
        f"{path.name}: {inner.name}"
        for path in (ROOT / "tests").rglob("*.py")
        for outer in ast.walk(ast.parse(path.read_text()))
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
        if isinstance(inner, ast.FunctionDef) and inner is not outer and inner.name.startswith("test_")
    ]
    assert hidden == []
