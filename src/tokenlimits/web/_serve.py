"""Serve the panel on its own until Ctrl-C."""

from __future__ import annotations

import copy
import ipaddress
import logging
import secrets
from typing import Any

import uvicorn
from pydantic import SecretStr
from uvicorn.config import LOGGING_CONFIG

from . import _health, _request_id
from ._app import create_app
from ._settings import WebSettings, load

_QUIET = ("/live", *_health.PATHS)


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
    uvicorn.run(
        app,
        host=host,
        port=port,
        forwarded_allow_ips=forwarded_allow_ips,
        root_path=root_path,
        log_config=_log_config(),
    )


class _WithId(_request_id.InRecords):
    """Makes the id a part of the line, if there is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        super().filter(record)
        known = _request_id.current()
        record.within = "" if known is None else f" request_id={known}"
        return True


def _log_config() -> dict[str, Any]:
    """Make uvicorn's own configuration, with the id of the request on each line, and with our log."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"request_id": {"()": _WithId}}
    for name in ("default", "access"):
        config["formatters"][name]["fmt"] += "%(within)s"
        config["handlers"][name]["filters"] = ["request_id"]
    config["loggers"]["tokenlimits"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config


def _for_the_log(record: logging.LogRecord) -> bool:
    """Leave out what open pages and monitors ask all the time, and queries: people search for addresses."""
    if not isinstance(record.args, tuple) or len(record.args) != 5:
        return True
    client, method, path, version, status = record.args
    path = str(path).partition("?")[0]
    record.args = (client, method, path, version, status)
    return not (path.endswith(_QUIET) and status in (200, 204))


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
