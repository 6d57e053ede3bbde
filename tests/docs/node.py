"""Node from PyPI, with the packages that the example of a front end has."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from tests.docs.pages import ROOT

from tokenlimits.local._node import Node, find_node

FRONTEND = ROOT / "examples" / "frontend"


def node() -> Node:
    """The one from PyPI: supabase-js needs a newer one than the local stack does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        return find_node()


def node_modules(node: Node) -> Path:
    """What the front end's package-lock.json names, fetched once and kept in the user's cache directory."""
    lock = (FRONTEND / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenlimits"
    directory = cache / f"frontend-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(FRONTEND / name, unfinished)
            path = os.pathsep.join([str(node.executable.parent), os.environ["PATH"]])
            command = [*node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            subprocess.run(command, cwd=unfinished, env={**os.environ, "PATH": path}, check=True, timeout=300)
            shutil.copytree(unfinished, directory, symlinks=True)
    return directory / "node_modules"
