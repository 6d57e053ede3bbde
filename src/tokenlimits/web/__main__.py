"""`python -m tokenlimits.web`: serve the admin panel and the API until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tokenlimits.errors import ConfigurationError

from ._serve import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        arguments: The command line; this process's own arguments when None.
    """
    parser = argparse.ArgumentParser(prog="python -m tokenlimits.web", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8321, help="default: 8321; 0 picks a free one")
    parser.add_argument("--forwarded-allow-ips", help="proxies whose X-Forwarded-* headers to trust, comma-separated")
    parser.add_argument("--root-path", default="", help="the path that a proxy serves the panel below and removes")
    options = parser.parse_args(arguments)
    try:
        serve(
            options.host,
            options.port,
            forwarded_allow_ips=options.forwarded_allow_ips,
            root_path=options.root_path,
        )
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
