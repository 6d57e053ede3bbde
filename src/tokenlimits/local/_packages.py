"""The npm packages that the stack runs on, downloaded once to the user's cache directory.

Their versions are pinned in `package.json` and `package-lock.json` beside this file, nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._errors import LocalStackError

if TYPE_CHECKING:
    from ._node import Node

_HERE: Final = files("tokenlimits.local")
_PINS: Final = ("package.json", "package-lock.json")
_INSTALL: Final = ("ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error")


def installed_packages(node: Node) -> Path:
    """Return the directory that holds `node_modules`; only the first call needs the network.

    Several processes may call it at once: the first to finish wins.

    Raises:
        LocalStackError: npm is missing, or can't download the packages.
    """
    pins = {name: _HERE.joinpath(name).read_bytes() for name in _PINS}
    directory = cache_directory() / f"lite-{hashlib.sha256(pins['package-lock.json']).hexdigest()[:12]}"
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".installing-", dir=directory.parent) as unfinished:
            _install(node, Path(unfinished) / "packages", pins)
            _move(Path(unfinished) / "packages", directory)
    return directory


def server_script(packages: Path) -> Path:
    """Return our server's script, placed next to `node_modules`, since Node looks for packages from there."""
    source = _HERE.joinpath("server.mjs").read_bytes()
    script = packages / f"server-{hashlib.sha256(source).hexdigest()[:12]}.mjs"
    if not script.exists():
        with tempfile.NamedTemporaryFile(dir=packages, delete=False) as unfinished:
            unfinished.write(source)
        Path(unfinished.name).replace(script)
    return script


def cache_directory() -> Path:
    """Return our directory in the user's cache directory."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "tokenlimits"


def _install(node: Node, directory: Path, pins: dict[str, bytes]) -> None:
    if not node.npm:
        raise LocalStackError(
            f"{node.executable} has no npm, which downloads Supabase Lite at the first start. "
            "Install it from PyPI: pip install 'tokenlimits[local]'"
        )
    directory.mkdir()
    for name, content in pins.items():
        directory.joinpath(name).write_bytes(content)
    search_path = os.pathsep.join([str(node.executable.parent), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(  # noqa: S603 - npm, with arguments of ours
            [*node.npm, *_INSTALL],
            cwd=directory,
            env={**os.environ, "PATH": search_path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=600,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalStackError(f"npm did not install Supabase Lite: {error}") from error
    if done.returncode != 0:
        raise LocalStackError(
            "npm could not install Supabase Lite. Only the first start needs the network (or a registry in npm's "
            f"configuration). Output of npm:\n{done.stdout.strip()[-2000:]}"
        )


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, and its copy stays
            raise
        shutil.rmtree(source)
