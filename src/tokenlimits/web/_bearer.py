"""The access token that a request carries."""

from __future__ import annotations

import re

from starlette.requests import HTTPConnection

_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+|sb_secret_[!-~]+", re.ASCII)


def token_of(connection: HTTPConnection) -> str | None:
    """Return the token of the `Authorization` header; None if there is none, or it can't be one."""
    scheme, _, token = connection.headers.get("authorization", "").strip().partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and _TOKEN.fullmatch(token) else None
