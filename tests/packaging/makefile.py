"""What the Makefile would run, and which of its targets others name."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = (".venv/.ready", "tools/biome/node_modules/.ready")
"""What the Makefile makes before anything else, whether that is up to date or not."""
_MAKE = re.compile(r"(?:^|[;&|]|\bif\b)\s*make\b([^;&|\n]*)", re.MULTILINE)


def commands(target: str) -> list[str]:
    """List a target's own commands, which aren't run; fails where there is no such target."""
    # those of a make that runs the tests are none of this one's business
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *(f"--old-file={path}" for path in INSTALLED), *target.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r"\\\n\s*", " ", done.stdout).splitlines()


def made_by(script: str) -> Iterator[str]:
    """Name the targets that a shell script makes."""
    for words in _MAKE.findall(script):
        yield from (word for word in words.split() if re.fullmatch(r"[a-z][\w-]*", word))
