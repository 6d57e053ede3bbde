"""Supabase, as the panel and the API use it: always with the caller's own key or token."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import httpx
from pydantic import AwareDatetime, BaseModel, RootModel, ValidationError
from supabase import AsyncClient, AsyncClientOptions

from tokenlimits import AsyncGroupManager, AsyncTokenLimits, ConfigurationError, ServiceUnavailable
from tokenlimits.errors import AccessDenied, SchemaNotInstalled, SchemaOutdated
from tokenlimits.settings import unusable_network
from tokenlimits.sql_files import SCHEMA_VERSION
from tokenlimits.telemetry import OnResult

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
        on_result: What the clients that are made here tell of their calls.
    """

    def __init__(
        self,
        settings: WebSettings,
        limits: AsyncTokenLimits | None = None,
        self_service: Mapping[str, int] | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        self.settings = settings
        self._on_result = on_result
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
        return AsyncGroupManager(client, **self._options())

    async def limits_of(self, token: str) -> AsyncTokenLimits:
        """Make a client that acts as the bearer of a token: the database decides what they may do."""
        client = await self._client_of(token)
        return AsyncTokenLimits(client, **self._options())

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
        return AsyncTokenLimits(client, **self._options())

    async def check(self) -> None:
        """Check that Supabase answers and has the SQL, with the key that there is.

        Raises:
            SchemaNotInstalled: The database has no tokenlimits, or an older one than this package needs.
            ConfigurationError: Supabase doesn't accept the key.
            ServiceUnavailable: Supabase gave no answer.
        """
        secret = self.settings.secret_key
        token = self.settings.publishable_key if secret is None else secret.get_secret_value()
        answer = await self._get("rest/v1/rpc/tokenlimits_version", token)
        problem = _error_of(answer)
        if problem in ("PGRST106", "PGRST202"):  # the API doesn't serve the schema, or there is no such function in it
            raise SchemaNotInstalled(f"{self.settings.schema_name}.tokenlimits_version isn't there.", code=problem)
        # the database itself has answered: nobody without a session may ask for the version
        if problem == "42501":
            return
        if answer.status_code in (401, 403):
            raise ConfigurationError("Supabase doesn't accept the key. Is it of this project, and still valid?")
        if _read(answer, _Version).version < SCHEMA_VERSION:
            raise SchemaOutdated("The database has an older version of tokenlimits than this package needs.")

    def _options(self) -> dict[str, Any]:
        return {
            "timeout": self.settings.timeout,
            "schema": self.settings.schema_name,
            "on_result": self._on_result,
        }

    def is_worker(self, token: str) -> bool:
        """Whether a token is the server's own secret key."""
        key = self.settings.secret_key
        return key is not None and hmac.compare_digest(token.encode(), key.get_secret_value().encode())

    async def _get(self, path: str, token: str) -> httpx.Response:
        headers = {
            "apikey": self._key_with(token),
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
        return await self._client(self._key_with(token), token)

    def _key_with(self, token: str) -> str:
        """Return the key that a token is sent with: a secret key goes with no other."""
        return token if token.startswith("sb_secret_") else self.settings.publishable_key

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


class _Version(BaseModel):
    version: int


class _Problem(BaseModel):
    code: str | None = None


def _error_of(answer: httpx.Response) -> str | None:
    """Return the code of an error that PostgREST or the database answers with."""
    if answer.is_success:
        return None
    try:
        return _Problem.model_validate_json(answer.content).code
    except ValidationError:
        return None


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
