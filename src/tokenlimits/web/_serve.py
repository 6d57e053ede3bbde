"""Serve the panel on its own until Ctrl-C."""

from __future__ import annotations

import ipaddress
import logging
import secrets

import uvicorn
from pydantic import SecretStr

from ._app import create_app
from ._settings import WebSettings, load


def serve(
    host: str = "127.0.0.1", port: int = 8321, *, forwarded_allow_ips: str | None = None, root_path: str = ""
) -> None:
    """Serve the panel and the API with the settings from the environment until Ctrl-C.

    Args:
        host: The address to listen on; by default only this machine can connect.
        port: The port; 0 picks a free one.
        forwarded_allow_ips: Proxies whose `X-Forwarded-*` headers to trust, comma-separated.
        root_path: The path that a proxy serves it below and removes, like `/limits`.

    Raises:
        ConfigurationError: A variable is missing or not valid; nothing was started.
    """
    app = create_app(_sealed(load(), host))
    logging.getLogger("uvicorn.access").addFilter(_for_the_log)
    root_path = root_path and f"/{root_path.strip('/')}"
    uvicorn.run(app, host=host, port=port, forwarded_allow_ips=forwarded_allow_ips, root_path=root_path)


def _for_the_log(record: logging.LogRecord) -> bool:
    """Leave out what open pages ask each second, and queries: people search for addresses."""
    if not isinstance(record.args, tuple) or len(record.args) != 5:
        return True
    client, method, path, version, status = record.args
    path = str(path).partition("?")[0]
    record.args = (client, method, path, version, status)
    return not (path.endswith("/live") and status in (200, 204))


def _sealed(settings: WebSettings, host: str) -> WebSettings:
    """Generate a secret if only this machine can connect: after a restart, people have to sign in again."""
    if not settings.web_secret and _is_loopback(host):
        return settings.model_copy(update={"web_secret": (SecretStr(secrets.token_urlsafe(32)),)})
    return settings


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
