"""Supabase Auth: identities and sessions, through the client of the `supabase` package."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar
from uuid import UUID

import httpx
from pydantic import BaseModel, SecretStr
from supabase_auth import AsyncGoTrueClient
from supabase_auth.errors import AuthApiError, AuthError, AuthSessionMissingError, CustomAuthError
from supabase_auth.types import Session, User

from tokenlimits import ServiceUnavailable
from tokenlimits.errors import AccessDenied

from ._problems import SignInRequired, TooManyRequests
from ._settings import WebSettings

T = TypeVar("T")

_MARGIN = 60.0
# Auth doesn't say how long to wait; its limits refill within minutes
_WAIT = 60.0


class Person(BaseModel):
    """Who Supabase Auth says that a token belongs to; `standing` changes with their roles, and when they are banned."""

    id: UUID
    email: str | None = None
    standing: str


class Tokens(NamedTuple):
    """A session of Supabase Auth; `expires_at` is by this machine's clock."""

    access: SecretStr
    refresh: SecretStr
    expires_at: float
    person: Person

    def is_ending(self) -> bool:
        """Whether it ends within a minute."""
        return time.time() > self.expires_at - _MARGIN


class Auth:
    """Asks Supabase Auth.

    Args:
        settings: Where Supabase is.
        http: Returns the connections of the running event loop.
    """

    def __init__(self, settings: WebSettings, http: Callable[[], Awaitable[httpx.AsyncClient]]) -> None:
        self._settings = settings
        self._http = http

    async def person(self, token: SecretStr) -> Person:
        """Return whose access token it is.

        Raises:
            SignInRequired: Nobody's: it isn't valid, has ended, or its session was signed out.
            TooManyRequests: Supabase Auth has answered too many.
            ServiceUnavailable: It gave no answer.
        """

        async def request(client: AsyncGoTrueClient) -> Person:
            answer = await client.get_user(token.get_secret_value())
            return _person(None if answer is None else answer.user)

        try:
            return await self._ask(request)
        except AccessDenied:
            raise SignInRequired("The access token is not valid, or has expired.") from None

    async def sign_in(self, email: str, password: SecretStr) -> Tokens:
        """Begin a session.

        Raises:
            AccessDenied: The address or the password is wrong.
            TooManyRequests: Supabase Auth has answered too many.
            ServiceUnavailable: It gave no answer.
        """

        async def request(client: AsyncGoTrueClient) -> Tokens:
            answer = await client.sign_in_with_password({"email": email, "password": password.get_secret_value()})
            return _tokens(answer.session)

        return await self._ask(request)

    async def refresh(self, tokens: Tokens) -> Tokens:
        """Refresh a session.

        Raises:
            AccessDenied: It has ended.
            TooManyRequests: Supabase Auth has answered too many.
            ServiceUnavailable: It gave no answer.
        """

        async def request(client: AsyncGoTrueClient) -> Tokens:
            answer = await client.refresh_session(tokens.refresh.get_secret_value())
            return _tokens(answer.session)

        return await self._ask(request)

    async def sign_out(self, tokens: Tokens) -> None:
        """End a session, but no other session of the same person.

        Raises:
            AccessDenied: It has ended already.
            TooManyRequests: Supabase Auth has answered too many.
            ServiceUnavailable: It gave no answer.
        """
        await self._ask(lambda client: client.admin.sign_out(tokens.access.get_secret_value(), "local"))

    async def _ask(self, request: Callable[[AsyncGoTrueClient], Awaitable[T]]) -> T:
        # one for each request, since a client remembers who signed in last
        client = AsyncGoTrueClient(
            url=f"{self._settings.url.rstrip('/')}/auth/v1",
            headers={"apikey": self._settings.publishable_key},
            auto_refresh_token=False,
            persist_session=False,
            http_client=await self._http(),
        )
        try:
            # httpx limits each read, but not their number
            async with asyncio.timeout(self._settings.timeout):
                return await request(client)
        except (AuthError, TimeoutError, ValueError) as error:
            problem = _problem(error)
        # Outside the except block, so that it has no context: the client's errors hold the request with its password or
        # token, and pydantic's errors hold the answer.
        raise problem


def _problem(error: Exception) -> Exception:
    """Translate an error of the client, or an answer that it couldn't read, into ours."""
    if isinstance(error, AuthApiError | CustomAuthError) and 400 <= error.status < 500:
        if error.status == 429:
            return TooManyRequests(_WAIT)
        return AccessDenied("The e-mail address or the password is wrong, or the session has ended.")
    if isinstance(error, UnicodeEncodeError):  # no header can hold it, so it is not a token
        return AccessDenied("The access token is not valid.")
    if isinstance(error, AuthError | TimeoutError):
        return ServiceUnavailable(f"Supabase Auth could not be reached ({type(error).__name__})")
    return ServiceUnavailable("Supabase Auth gave an unexpected answer")


def _person(user: User | None) -> Person:
    if user is None:
        raise AuthSessionMissingError
    standing = json.dumps([user.app_metadata, user.banned_until], sort_keys=True)
    return Person(id=UUID(user.id), email=user.email, standing=hashlib.sha256(standing.encode()).hexdigest()[:16])


def _tokens(session: Session | None) -> Tokens:
    if session is None:
        raise AuthSessionMissingError
    access, refresh = SecretStr(session.access_token), SecretStr(session.refresh_token)
    return Tokens(access, refresh, time.time() + session.expires_in, _person(session.user))
