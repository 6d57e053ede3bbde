"""The panel's sessions: sealed in a cookie, so that any number of processes can serve them."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response

from tokenlimits import InvalidRequest, TokenLimitsError
from tokenlimits.errors import AccessDenied

from ._auth import Auth, Person, Tokens
from ._problems import SignInRequired, TooManyRequests
from ._seal import Seal
from ._shared import Shared

logger = logging.getLogger("tokenlimits")

# browsers keep 4,096 bytes with the name and the attributes
_MOST = 3900
# Seconds for which an answer of Supabase Auth holds.
_CONFIRMED = 60
# Seconds for which late requests may still have the cookie from before a refresh.
_LATE = 30


class BadOrigin(Exception):
    """A request that changes something didn't come from a page of the panel."""


@dataclass(frozen=True, slots=True)
class Session:
    """A browser; signed in when it has tokens.

    Its id is what its CSRF token is made of. `since` is when it signed in, `seen` when its cookie was sealed.
    """

    id: str
    tokens: Tokens | None = None
    since: float = field(default_factory=time.time)
    seen: float = field(default_factory=time.time, compare=False)


class Sessions:
    """Reads and writes the cookie, confirms sessions with Supabase Auth, and makes CSRF tokens.

    Args:
        auth: Supabase Auth.
        keys: The secrets. The first one seals cookies; the others open cookies that they sealed earlier.
        idle: Seconds after which an unused session ends.
        longest: Seconds after which a session ends in any case.
    """

    def __init__(self, auth: Auth, keys: Sequence[SecretStr], *, project: str, idle: float, longest: float) -> None:
        self._auth = auth
        self._project = project
        self._seal = Seal(keys, longest)
        self._idle = idle
        self._longest = longest
        self._refreshed: Shared[Tokens] = Shared(_LATE)
        self._persons: Shared[Person] = Shared(_CONFIRMED)

    def read(self, request: Request) -> Session:
        """Return the browser's session, or a new one."""
        sealed = request.cookies.get(self._cookie(request))
        return (None if sealed is None else self._open(sealed)) or Session(secrets.token_urlsafe(24))

    def write(self, request: Request, response: Response, session: Session) -> None:
        """Set the cookie with the session.

        Raises:
            InvalidRequest: The session is too large for a cookie.
        """
        sealed = self._close(session)
        if len(sealed) > _MOST:
            raise InvalidRequest("This account's access token is too large for a cookie; give it fewer claims.")
        response.set_cookie(
            self._cookie(request), sealed, path="/", httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )

    def is_due(self, session: Session) -> bool:
        """Whether to seal the cookie again, so that the session doesn't become idle."""
        return time.time() - session.seen > self._idle / 10

    def csrf(self, session: Session) -> str:
        """Make the token that proves that a request comes from a page of this session."""
        return self._seal.csrf(session.id)

    def check_csrf(self, request: Request, session: Session, token: object) -> None:
        """Check that a request that changes something comes from a page of this session.

        Raises:
            BadOrigin: It doesn't.
        """
        if not _is_from_here(request):
            raise BadOrigin
        if not isinstance(token, str) or not self._seal.is_csrf(session.id, token):
            raise BadOrigin

    async def fresh(self, session: Session) -> Session:
        """Return a session that Supabase Auth has confirmed within the last minute, with tokens that last.

        Raises:
            SignInRequired: There is none, or it has ended.
            TooManyRequests: Supabase Auth's rate limit is exceeded.
            ServiceUnavailable: Supabase Auth gave no answer.
        """
        if session.tokens is None:
            raise SignInRequired("Please sign in.")
        if not session.tokens.is_ending() and await self._is_confirmed(session.tokens):
            return session
        try:
            return replace(session, tokens=await self._refresh(session.tokens))
        except AccessDenied:
            raise SignInRequired("Your session has ended. Please sign in again.") from None

    async def end(self, session: Session) -> None:
        """End a session in Supabase Auth, so that copies of its cookie are worthless."""
        tokens = session.tokens
        if tokens is None:
            return
        try:
            if tokens.is_ending():  # Auth doesn't accept an expired token, not even to end its session
                tokens = await self._refresh(tokens)
            await self._auth.sign_out(tokens)
        except AccessDenied:
            pass  # it has ended already
        except (TokenLimitsError, TooManyRequests) as error:
            logger.warning("A session was signed out in the browser, but not in Supabase Auth: %s", error)
        self._persons.forget(tokens.access.get_secret_value())

    def _cookie(self, request: Request) -> str:
        """Name the cookie: each panel of a host has its own, and behind TLS no other host can set it."""
        # browsers give cookies of one port to all others of the host
        panel = f"{self._project} {request.url.port or ''} {request.scope.get('root_path', '')}"
        name = f"tokenlimits-{hashlib.sha256(panel.encode()).hexdigest()[:8]}"
        return f"__Host-{name}" if request.url.scheme == "https" else name

    async def _is_confirmed(self, tokens: Tokens) -> bool:
        """Whether Supabase Auth still says the same about the person as when it issued the tokens.

        If not, a refresh gives tokens with the person's current roles, or none; the database trusts a token until it
        expires.

        Raises:
            SignInRequired: The session was signed out.
        """
        key = tokens.access.get_secret_value()
        return await self._persons.get(key, lambda: self._auth.person(tokens.access)) == tokens.person

    async def _refresh(self, tokens: Tokens) -> Tokens:
        """Refresh once for all concurrent requests: a refresh token can be used only once."""

        async def refresh() -> Tokens:
            new = await self._auth.refresh(tokens)
            self._persons.keep(new.access.get_secret_value(), new.person)
            return new

        return await self._refreshed.get(tokens.refresh.get_secret_value(), refresh)

    def _close(self, session: Session) -> str:
        content: dict[str, object] = {"id": session.id, "since": session.since}
        if session.tokens is not None:
            tokens = session.tokens
            content |= {
                "access": tokens.access.get_secret_value(),
                "refresh": tokens.refresh.get_secret_value(),
                "expires_at": tokens.expires_at,
                "person": tokens.person.model_dump(mode="json"),
            }
        return self._seal.close(content)

    def _open(self, sealed: str) -> Session | None:
        opened = self._seal.open(sealed)
        if opened is None:
            return None
        content, seen = opened
        now = time.time()
        if "access" not in content or now - seen > self._idle or now - content["since"] > self._longest:
            # with its id, so that its open pages lead to the sign-in page rather than to a CSRF error
            return Session(content["id"], seen=seen)
        person = Person.model_validate(content["person"])
        access, refresh = SecretStr(content["access"]), SecretStr(content["refresh"])
        tokens = Tokens(access, refresh, content["expires_at"], person)
        return Session(content["id"], tokens, content["since"], seen)


def _is_from_here(request: Request) -> bool:
    """Whether a browser says that one of our pages sent a request, or nothing at all.

    Browsers say so themselves, if they are not too old and the connection is encrypted. Else the origin is compared:
    with the host, and with the one that a proxy forwards, whoever sends that, since no page of another site can.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    hosts = [request.headers.get("host", ""), *request.headers.get("x-forwarded-host", "").split(",")]
    return origin is None or any(_is_same(origin, host.strip()) for host in hosts)


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin has a host; proxies may leave its port out, or add the usual one of theirs."""
    try:
        theirs, ours = urlsplit(origin), urlsplit(f"//{host}")
        ports = theirs.port, ours.port
    except ValueError:
        return False
    if theirs.hostname is None or theirs.hostname != ours.hostname:
        return False
    return ports[1] in (None, ports[0]) or (ports[0] is None and ports[1] in (80, 443))
