"""Node, and what tests fetch from npm: once, whichever process is first, into the user's cache directory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tokenlimits.local._node import Node, find_node
from tokenlimits.local._packages import cache_directory

SUPABASE_CLI: Final = "supabase@3.1.0"


def wheel_node() -> Node:
    """The one from PyPI, whatever is on PATH: supabase-js needs a newer one than the local stack does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        return find_node()


def environment(node: Node, **others: str) -> dict[str, str]:
    """Ours, with this Node before any other."""
    return {**os.environ, "PATH": f"{node.executable.parent}{os.pathsep}{os.environ['PATH']}", **others}


def kept(name: str, source: Path, finish: Callable[[Node, Path], None] | None = None) -> Path:
    """The directory with `node_modules` as the package-lock.json in `source` says, and what `finish` makes of it."""
    lock = (source / "package-lock.json").read_bytes()
    directory = cache_directory() / f"{name}-{hashlib.sha256(lock).hexdigest()[:12]}"
    with _alone(name):
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(dir=directory.parent) as unfinished:
                packages = Path(unfinished, "packages")
                packages.mkdir()
                _install(packages, source, finish)
                packages.rename(directory)
    return directory


def _install(directory: Path, source: Path, finish: Callable[[Node, Path], None] | None) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(source / name, directory)
    node = wheel_node()
    command = [*node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, cwd=directory, env=environment(node), check=True, timeout=600)
    if finish is not None:
        finish(node, directory)


@cache
def _supabase() -> str:
    """Where npm keeps Supabase's own command line, which takes longer to tell than most of its commands take."""
    node = find_node()
    where = "process.env.PATH.split(require('path').delimiter)[0]"
    command = ["exec", "--yes", "--prefer-offline", f"--package={SUPABASE_CLI}", "--", "node", "--print", where]
    with _alone("supabase"):  # npm itself lets two of it write the same directory
        found = subprocess.run([*node.npm, *command], check=True, capture_output=True, text=True, env=environment(node))
    return str(Path(found.stdout.strip(), "supabase"))


def supabase(directory: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Supabase's own command line in a directory, which is its home too."""
    done = subprocess.run(
        [_supabase(), *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
        env=environment(
            find_node(),
            SUPABASE_HOME=str(directory),
            SUPABASE_NO_UPDATE_NOTIFIER="1",
            SUPABASE_TELEMETRY_DISABLED="1",
        ),
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@contextmanager
def _alone(name: str) -> Generator[None]:
    cache_directory().mkdir(parents=True, exist_ok=True)
    with cache_directory().joinpath(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
