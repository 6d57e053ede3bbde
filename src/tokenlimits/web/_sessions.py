"""The panel's sessions: sealed in a cookie, so that any number of processes can serve them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import zlib
from dataclasses import dataclass, replace

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response

from tokenlimits import InvalidRequest
from tokenlimits.errors import AccessDenied

from ._backend import Backend, Person, Tokens
from ._problems import SignInRequired

# browsers keep 4,096 bytes with the name and the attributes
_MOST = 3900


class BadOrigin(Exception):
    """A request that changes something didn't come from a page of the panel."""


@dataclass(frozen=True, slots=True)
class Session:
    """A browser; signed in when it has tokens. Its id is what its CSRF token is made of."""

    id: str
    tokens: Tokens | None = None


class Sessions:
    """Reads and writes the cookie, goes on with sessions that are about to end, and makes CSRF tokens.

    Args:
        backend: Whom to ask for new tokens.
        secret: What seals the cookie.
    """

    def __init__(self, backend: Backend, secret: SecretStr) -> None:
        key = hashlib.sha256(b"tokenlimits cookie" + secret.get_secret_value().encode()).digest()
        self._csrf_key = hashlib.sha256(b"tokenlimits csrf" + secret.get_secret_value().encode()).digest()
        self._seal = Fernet(base64.urlsafe_b64encode(key))
        self._backend = backend
        self._refreshing: dict[str, asyncio.Task[Tokens]] = {}

    def read(self, request: Request) -> Session:
        """Return the browser's session, or a new one."""
        sealed = request.cookies.get(cookie_name(request))
        return (None if sealed is None else self._open(sealed)) or Session(secrets.token_urlsafe(24))

    def write(self, request: Request, response: Response, session: Session) -> None:
        """Give the browser its session.

        Raises:
            InvalidRequest: It is too large for a cookie.
        """
        sealed = self._close(session)
        if len(sealed) > _MOST:
            raise InvalidRequest("This account's access token is too large for a cookie: give it fewer claims.")
        response.set_cookie(
            cookie_name(request), sealed, path="/", httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )

    def csrf(self, session: Session) -> str:
        """Make the token that requests of this session prove with that they come from its pages."""
        return hmac.new(self._csrf_key, session.id.encode(), "sha256").hexdigest()

    def check_csrf(self, request: Request, session: Session, token: object) -> None:
        """Check that a request that changes something comes from a page of this session.

        Raises:
            BadOrigin: It doesn't.
        """
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise BadOrigin
        if not isinstance(token, str) or not hmac.compare_digest(token.encode(), self.csrf(session).encode()):
            raise BadOrigin

    async def fresh(self, session: Session) -> Session:
        """Go on with a session that is about to end.

        Raises:
            SignInRequired: There is none, or it has ended.
            ServiceUnavailable: Supabase gave no answer.
        """
        if session.tokens is None:
            raise SignInRequired("Please sign in.")
        if not session.tokens.is_ending():
            return session
        try:
            return replace(session, tokens=await self._refreshed(session.tokens))
        except AccessDenied:
            raise SignInRequired("Your session has ended. Please sign in again.") from None

    async def _refreshed(self, tokens: Tokens) -> Tokens:
        """Refresh once for all requests that come at once: a refresh token may be used but once."""
        key = tokens.refresh.get_secret_value()
        task = self._refreshing.get(key)
        if task is None:
            task = self._refreshing[key] = asyncio.create_task(self._backend.refresh(tokens))
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    def _forget(self, key: str, task: asyncio.Task[Tokens]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._refreshing[key]
        else:
            # late requests may still have the old cookie
            task.get_loop().call_later(30, self._refreshing.pop, key, None)

    def _close(self, session: Session) -> str:
        content: dict[str, object] = {"id": session.id}
        if session.tokens is not None:
            tokens = session.tokens
            content |= {
                "access": tokens.access.get_secret_value(),
                "refresh": tokens.refresh.get_secret_value(),
                "expires_at": tokens.expires_at,
                "person": tokens.person.model_dump(mode="json"),
            }
        return self._seal.encrypt(zlib.compress(json.dumps(content).encode())).decode()

    def _open(self, sealed: str) -> Session | None:
        try:
            content = json.loads(zlib.decompress(self._seal.decrypt(sealed.encode())))
        except InvalidToken:  # another secret sealed it, or nobody did
            return None
        if "access" not in content:
            return Session(content["id"])
        person = Person.model_validate(content["person"])
        access, refresh = SecretStr(content["access"]), SecretStr(content["refresh"])
        return Session(content["id"], Tokens(access, refresh, content["expires_at"], person))


def cookie_name(request: Request) -> str:
    """Name the cookie: behind TLS so that no other host can set it."""
    return "__Host-tokenlimits" if request.url.scheme == "https" else "tokenlimits"
