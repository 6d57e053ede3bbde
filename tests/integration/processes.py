"""Servers and workers in processes of their own, which are gone afterwards, whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.waiting import PATIENCE


@contextmanager
def python(*arguments: str | Path, env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python, in which any warning is an error, until the end of the block; what it prints goes to a file."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            yield process
            process.terminate()
            process.wait(PATIENCE)
        finally:
            kill_all(process)
    assert "Warning" not in log.read_text(), log.read_text()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill it and its children, like a machine that loses its power."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
