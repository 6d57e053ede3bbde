"""The command line: `tokenlimits`, or `python -m tokenlimits`; it needs the extra `tokenlimits[cli]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDED = ("psycopg", "rich", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; this process's own arguments when None.

    Returns:
        The exit status: 0 for success, 1 for failure, 2 for a wrong command line, 130 after Ctrl-C.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        tokenlimits 0...
        0
    """
    try:
        from ._app import run  # noqa: PLC0415 - whether it can be imported is the question
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        print("The command line needs more packages: pip install 'tokenlimits[cli]'", file=sys.stderr)  # noqa: T201
        return 1
    return run(sys.argv[1:] if arguments is None else arguments)
