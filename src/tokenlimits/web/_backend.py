"""Supabase, as the panel and the API use it: always with the caller's own key or token."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from typing import NamedTuple, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import httpx
from pydantic import AwareDatetime, BaseModel, RootModel, ValidationError
from supabase import AsyncClient, AsyncClientOptions

from tokenlimits import AsyncGroupManager, AsyncTokenLimits, ConfigurationError, ServiceUnavailable
from tokenlimits.errors import AccessDenied
from tokenlimits.settings import unusable_network

from ._auth import Auth
from ._settings import WebSettings

T = TypeVar("T", bound=BaseModel)


class _OfLoop(NamedTuple):
    loop: asyncio.AbstractEventLoop
    http: httpx.AsyncClient
    until_loop_ends: AsyncGenerator[None]


class Backend:
    """Makes clients that share connections; `auth` is Supabase Auth, over the same ones.

    Args:
        settings: Where Supabase is.
        limits: What tracks for `/api/track-generation`; by default a client with the secret key of the settings.
        self_service: What users may track there for themselves: the cost of each kind.
    """

    def __init__(
        self,
        settings: WebSettings,
        limits: AsyncTokenLimits | None = None,
        self_service: Mapping[str, int] | None = None,
    ) -> None:
        self.settings = settings
        self.self_service = dict(self_service or {})
        self._limits = limits
        self._of_loop: _OfLoop | None = None
        self.auth = Auth(settings, self._http)

    @property
    def can_track(self) -> bool:
        """Whether there is a key to track with."""
        return self._limits is not None or self.settings.secret_key is not None

    async def groups(self, token: str) -> AsyncGroupManager:
        """Make a group manager that acts as the bearer of a token: the database decides what they may do."""
        client = await self._client_of(token)
        return AsyncGroupManager(client, timeout=self.settings.timeout, schema=self.settings.schema_name)

    async def limits_of(self, token: str) -> AsyncTokenLimits:
        """Make a client that acts as the bearer of a token: the database decides what they may do."""
        client = await self._client_of(token)
        return AsyncTokenLimits(client, timeout=self.settings.timeout, schema=self.settings.schema_name)

    async def limits(self) -> AsyncTokenLimits:
        """Make the client that tracks, with the server's secret key.

        Raises:
            ConfigurationError: There is none.
        """
        if self._limits is not None:
            return self._limits
        if self.settings.secret_key is None:
            raise ConfigurationError("Set SUPABASE_SECRET_KEY to track generations.")
        key = self.settings.secret_key.get_secret_value()
        client = await self._client(key, key)
        return AsyncTokenLimits(client, timeout=self.settings.timeout, schema=self.settings.schema_name)

    def is_worker(self, token: str) -> bool:
        """Whether a token is the server's own secret key."""
        key = self.settings.secret_key
        return key is not None and hmac.compare_digest(token.encode(), key.get_secret_value().encode())

    async def _get(self, path: str, token: str) -> httpx.Response:
        headers = {
            "apikey": self.settings.publishable_key,
            "Authorization": f"Bearer {token}",
            "Accept-Profile": self.settings.schema_name,
        }
        http = await self._http()
        try:
            return await http.get(f"{self.settings.url.rstrip('/')}/{path}", headers=headers)
        except httpx.HTTPError as error:
            reason = type(error).__name__
        # outside the except block, so that the error's context doesn't hold a token
        raise ServiceUnavailable(f"Supabase could not be reached ({reason})")

    async def moment_of(self, token: str, group_id: UUID, place: int) -> datetime | None:
        """Read when a group's usage at a place, counted from the newest, was recorded; None: there are fewer.

        Raises:
            AccessDenied: The token is not an admin's, or no longer valid.
            ServiceUnavailable: Supabase gave no answer.
        """
        query = {"select": "created_at", "group_id": f"eq.{group_id}", "order": "created_at.desc"}
        # infinity would come first, and no reader can represent it
        query["created_at"] = "lt.9999-01-01"
        path = f"rest/v1/generation_usage?{urlencode({**query, 'limit': 1, 'offset': place})}"
        answer = await self._get(path, token)
        if answer.status_code in (401, 403):
            raise AccessDenied(
                "Only an admin may read the ledger.", code="PGRST301" if answer.status_code == 401 else None
            )
        rows = _read(answer, _Moments).root
        return rows[0].created_at if rows else None

    async def _client_of(self, token: str) -> AsyncClient:
        """Make a client for an access token, or a secret key of the caller's own."""
        return await self._client(token if token.startswith("sb_secret_") else self.settings.publishable_key, token)

    async def _client(self, key: str, token: str) -> AsyncClient:
        options = AsyncClientOptions(
            httpx_client=await self._http(),
            headers={"Authorization": f"Bearer {token}"},
            auto_refresh_token=False,
            persist_session=False,
        )
        return AsyncClient(self.settings.url, key, options)

    async def _http(self) -> httpx.AsyncClient:
        """Return the connections of this event loop: a mounted app isn't told when the outer app starts or stops."""
        loop = asyncio.get_running_loop()
        if self._of_loop is None or self._of_loop.loop is not loop or self._of_loop.http.is_closed:
            http = _made(self.settings.timeout)
            self._of_loop = _OfLoop(loop, http, _until_loop_ends(http))
            await anext(self._of_loop.until_loop_ends)
        return self._of_loop.http

    async def aclose(self) -> None:
        """Close the connections."""
        if self._of_loop is not None:
            await self._of_loop.until_loop_ends.aclose()


def _made(timeout: float) -> httpx.AsyncClient:
    try:
        return httpx.AsyncClient(http2=False, timeout=timeout)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        problem = unusable_network(error)
    raise problem  # outside the except block, so that its context doesn't hold a proxy's password


async def _until_loop_ends(http: httpx.AsyncClient) -> AsyncGenerator[None]:
    """Close when asked, or with the loop: asyncio.run() closes the generators that are still open."""
    try:
        yield
    finally:
        await http.aclose()


class _Moment(BaseModel):
    created_at: AwareDatetime


class _Moments(RootModel[list[_Moment]]):
    pass


def _read(answer: httpx.Response, model: type[T]) -> T:
    if answer.is_success:
        try:
            return model.model_validate_json(answer.content)
        except ValidationError:
            pass  # not as Supabase answers: below, where no context of the error holds a token
    raise ServiceUnavailable(f"Supabase answered with status {answer.status_code}, and not as expected")
