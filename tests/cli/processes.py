"""Commands in processes of their own: a test needs many."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

from tests.support.forks import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def run(arguments: Sequence[str], directory: Path, environment: dict[str, str], streams: Sequence[Path]) -> int:
    """Run `tokenlimits` in a process of its own, with files as its standard streams; return its exit status."""
    process = CONTEXT.Process(target=_become, args=(arguments, directory, environment, streams))
    process.start()
    try:
        process.join(120)
        assert process.exitcode is not None, f"{arguments} has not ended"
        return process.exitcode
    finally:
        process.kill()
        process.join()
        process.close()


def _become(arguments: Sequence[str], directory: Path, environment: dict[str, str], streams: Sequence[Path]) -> None:
    """Be as a process that was started with these, and run the command, whose own modules are imported here."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
    )
    warnings.simplefilter("error")
    from tokenlimits.cli import main  # noqa: PLC0415 - it looks at the streams

    sys.exit(main(arguments))
