"""`python -m tokenlimits.web`: serve the admin panel and the API until Ctrl-C."""

from __future__ import annotations

import argparse
import ipaddress
import secrets
import sys
from collections.abc import Sequence

import uvicorn
from pydantic import SecretStr

from tokenlimits.errors import ConfigurationError

from ._app import create_app
from ._settings import WebSettings, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        arguments: Of the command line; those of this process when None.
    """
    parser = argparse.ArgumentParser(prog="python -m tokenlimits.web", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8321, help="default: 8321; 0: a free one")
    parser.add_argument("--forwarded-allow-ips", help="proxies whose X-Forwarded-… headers are believed")
    options = parser.parse_args(arguments)
    try:
        settings = _sealed(load(), options.host)
        app = create_app(settings)
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    uvicorn.run(app, host=options.host, port=options.port, forwarded_allow_ips=options.forwarded_allow_ips)
    return 0


def _sealed(settings: WebSettings, host: str) -> WebSettings:
    """On this machine alone a secret may be made up: when it ends, people sign in again."""
    if settings.web_secret is None and _is_loopback(host):
        return settings.model_copy(update={"web_secret": SecretStr(secrets.token_urlsafe(32))})
    return settings


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
