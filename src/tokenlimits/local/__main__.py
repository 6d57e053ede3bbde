"""`python -m tokenlimits.local`: run the stack until Ctrl-C, and print its URL and keys."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import TYPE_CHECKING

from . import LocalStack, LocalStackError

if TYPE_CHECKING:
    from types import FrameType


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    description = "Run a local Supabase until Ctrl-C, and print its URL and keys."
    parser = argparse.ArgumentParser(prog="python -m tokenlimits.local", description=description)
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--database-url", help="the PostgreSQL to serve; default: an embedded one")
    parser.add_argument("--sql-dir", help="the directory of the migrations to apply; default: those of tokenlimits")
    parser.add_argument("--schema", default="public", help="the schema to install tokenlimits in; default: public")
    options = parser.parse_args(arguments)
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        with LocalStack(options.database_url, options.port, options.sql_dir, schema=options.schema) as stack:
            for name, value in stack.environment().items():
                print(f"{name}={value}", flush=True)  # noqa: T201 - what the command is for
            while not ended.wait(3600):
                pass
    except LocalStackError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
