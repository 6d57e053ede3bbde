"""Readers of pages in processes of their own: each page needs one."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from tests.docs import run_page
from tests.support.forks import CONTEXT


class Done(NamedTuple):
    """How a process ended, and what it wrote."""

    status: int | None
    stdout: str
    stderr: str


def run(asked: dict[str, Any], directory: Path, environment: dict[str, str]) -> Done:
    """Run a page in a process of its own, in which every warning is an error."""
    streams = [directory / f".{name}" for name in ("stdout", "stderr")]
    process = CONTEXT.Process(target=_become, args=(json.dumps(asked), directory, environment, streams))
    process.start()
    try:
        process.join(300)
        return Done(process.exitcode, *(path.read_text() for path in streams))
    finally:
        process.kill()
        process.join()
        process.close()


def _become(asked: str, directory: Path, environment: dict[str, str], streams: list[Path]) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    warnings.simplefilter("error")
    # supabase says so to itself, whoever makes a client as its documentation does
    warnings.filterwarnings("ignore", "The '(timeout|verify)' parameter is deprecated", DeprecationWarning)
    sys.exit(run_page.main(json.loads(asked)))
