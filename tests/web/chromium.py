"""A Chromium that comes as an npm package, fetched once and kept in the user's cache directory; and axe."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from tests.support.node import kept

from tokenlimits.local._node import Node

HERE = Path(__file__).parent / "browser"
UNPACK = """
const { brotliDecompressSync } = require('node:zlib')
const { readFileSync, writeFileSync } = require('node:fs')
const bin = 'node_modules/@sparticuz/chromium/bin/'
for (const name of ['chromium', 'al2023.tar', 'fonts.tar', 'swiftshader.tar']) {
  writeFileSync(name, brotliDecompressSync(readFileSync(`${bin}${name}.br`)))
}
"""


def packages() -> Path:
    """Return the directory that holds the unpacked browser and `node_modules`."""
    return kept("browser", HERE, _unpack)


def _unpack(node: Node, directory: Path) -> None:
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
