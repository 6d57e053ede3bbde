"""A Chromium that comes as an npm package, fetched once and kept in the user's cache directory; and axe."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tokenlimits.local._node import Node, find_node

HERE = Path(__file__).parent / "browser"
UNPACK = """
const { brotliDecompressSync } = require('node:zlib')
const { readFileSync, writeFileSync } = require('node:fs')
const bin = 'node_modules/@sparticuz/chromium/bin/'
for (const name of ['chromium', 'al2023.tar', 'fonts.tar', 'swiftshader.tar']) {
  writeFileSync(name, brotliDecompressSync(readFileSync(`${bin}${name}.br`)))
}
"""


def wheel_node() -> Node:
    """The one from PyPI, whatever is on PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        return find_node()


def packages() -> Path:
    """Return the directory that holds the unpacked browser and `node_modules`."""
    lock = (HERE / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenlimits"
    directory = cache / f"browser-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            _install(wheel_node(), Path(unfinished))
            shutil.copytree(unfinished, directory, symlinks=True)
    return directory


def _install(node: Node, directory: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, directory)
    path = os.pathsep.join([str(node.executable.parent), os.environ["PATH"]])
    command = [*node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, cwd=directory, env={**os.environ, "PATH": path}, check=True, timeout=600)
    subprocess.run([str(node.executable), "-e", UNPACK], cwd=directory, check=True, timeout=300)
    for archive in ("al2023", "fonts", "swiftshader"):
        shutil.unpack_archive(directory / f"{archive}.tar", directory, filter="data")
        (directory / f"{archive}.tar").unlink()
    (directory / "chromium").chmod(0o755)
    shutil.rmtree(directory / "node_modules" / "@sparticuz")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser."""
    directory = packages()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory / "lib"), "FONTCONFIG_PATH": str(directory / "fonts")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=directory / "chromium",
            env=environment,
            args=["--no-sandbox", "--headless=shell"],
        )
        yield browser
        browser.close()


def axe() -> str:
    """Return the script that looks for what keeps people out."""
    return (packages() / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
