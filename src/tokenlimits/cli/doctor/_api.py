"""What the doctor asks the API: is it there, does it take the key, does it serve our functions."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx
from pydantic import AliasChoices, Field, SecretStr

from tokenlimits.errors import HOW_TO_EXPOSE
from tokenlimits.settings import ProjectSettings, from_one_place
from tokenlimits.sql_files import checked_schema

from ._expected import REAPPLY
from ._findings import Finding, Findings, error, listed, ok, warning

_KEY_NAMES = ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
_SCHEMA_NAME = "TOKENLIMITS_SCHEMA"
_SLOW = 1.0
_WHERE = "Copy both from your project's API settings into the environment or .env."
SECRET = "Set SUPABASE_SECRET_KEY to the project's secret key (sb_secret_…), and keep it on the server."  # noqa: S105
# refused before they do anything, which shows that they are there
_PROBES: Mapping[str, Mapping[str, object]] = {
    "track_generation": {"p_user_id": None, "p_kind": ""},
    "check_generation": {"p_user_id": None, "p_kind": ""},
    "reserve_generation": {"p_user_id": None, "p_kind": ""},
    "record_generation": {"p_user_id": None, "p_kind": ""},
    "user_generation_usage": {"p_user_id": None},
    "find_groups": {"p_page_size": 1},
}


class Configuration(ProjectSettings):
    """The settings as they are, also wrong ones."""

    url: str = Field("", validation_alias="SUPABASE_URL")
    key: SecretStr = Field(SecretStr(""), validation_alias=AliasChoices(*_KEY_NAMES))
    schema_name: str = Field("public", validation_alias=_SCHEMA_NAME)

    @classmethod
    def load(cls, schema: str | None) -> Self:
        """Read the environment and `.env`; a schema that is given wins."""
        given: dict[str, Any] = {} if schema is None else {_SCHEMA_NAME: schema}
        return cls(**given)

    @property
    def text_of_key(self) -> str:
        """The key itself."""
        return self.key.get_secret_value().strip()

    @property
    def usable(self) -> bool:
        """Whether a request can be made of it."""
        return self.is_url and _can_be_sent(self.text_of_key) and not self.problem_of_schema

    @property
    def is_url(self) -> bool:
        """Whether the URL is one, with a host that can be looked for."""
        try:
            return urlsplit(self.url).scheme in ("http", "https") and bool(self.host.encode("idna"))
        except UnicodeError:  # a..b
            return False

    @property
    def text_of_schema(self) -> str:
        """The schema that tokenlimits is called in."""
        return self.schema_name.strip()

    @property
    def problem_of_schema(self) -> str:
        """Why it can't be that schema; empty when it can."""
        try:
            checked_schema(self.text_of_schema)
        except ValueError as reason:
            return str(reason)
        return ""

    @property
    def host(self) -> str:
        """The URL's host, without a password that might be in it."""
        return urlsplit(self.url).hostname or ""


def _can_be_sent(key: str) -> bool:
    return re.fullmatch(r"[!-~]+", key) is not None


class Answer:
    """What the API answered: a status, and JSON if it was some."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        try:
            answer: Any = response.json()
        except ValueError:
            answer = None
        self.json = answer
        problem: dict[str, Any] = cast("Any", answer) if isinstance(answer, dict) else {}
        self.code = str(problem.get("code") or "")
        self.message = str(problem.get("message") or "")

    @property
    def is_missing(self) -> bool:
        """Whether there is no such function."""
        return self.code in ("PGRST202", "42883")

    @property
    def is_not_exposed(self) -> bool:
        """Whether the API doesn't serve the schema."""
        return self.code == "PGRST106"


class Api:
    """The project's API; `call` answers None when it can't be reached."""

    def __init__(self, configuration: Configuration, http: httpx.Client) -> None:
        self._base = configuration.url.rstrip("/")
        self._key = configuration.text_of_key
        self._schema = configuration.text_of_schema
        self._http = http

    def call(self, function: str, params: Mapping[str, object] | None = None) -> Answer:
        """Call a function.

        Raises:
            httpx.HTTPError: There was no answer.
        """
        headers = {"apikey": self._key, "Authorization": f"Bearer {self._key}", "Content-Profile": self._schema}
        url = f"{self._base}/rest/v1/rpc/{function}"
        return Answer(self._http.post(url, json=params or {}, headers=headers))


def check_configuration(configuration: Configuration) -> Findings:
    """Look at the settings without using them."""
    if not configuration.url:
        yield error("configuration", "SUPABASE_URL is not set.", _WHERE + from_one_place())
    elif not configuration.is_url:
        yield error("configuration", "SUPABASE_URL is no URL like https://abc.supabase.co.", _WHERE)
    if configuration.problem_of_schema:
        remedy = "It names the schema that tokenlimits is installed in; where that is public, unset it."
        yield error("schema", f"TOKENLIMITS_SCHEMA: {configuration.problem_of_schema}", remedy)
    yield _key_finding(configuration.text_of_key, configuration.host)


def _key_finding(key: str, host: str) -> Finding:
    if not key:
        return error("key", "There is none.", SECRET + from_one_place())
    if not _can_be_sent(key):
        return error("key", "The key has characters that no key has: was something else copied?", SECRET)
    if key.startswith("sb_secret_"):
        return ok("key", "It is a secret key.")
    if key.startswith("sb_publishable_"):
        return error("key", "It is the publishable key, which may do nothing here.", SECRET)
    claims = _claims(key)
    if claims is None:
        return warning("key", "It looks like no key of Supabase's.", SECRET)
    return _token_finding(claims, host)


def _token_finding(claims: Mapping[str, Any], host: str) -> Finding:
    role, project, expires = claims.get("role"), claims.get("ref"), claims.get("exp")
    if role != "service_role":
        return error("key", f"It is a token of the role {role}, not of service_role.", SECRET)
    if isinstance(expires, int | float) and expires < datetime.now(UTC).timestamp():
        return error("key", "It is a service_role key that has expired.", SECRET)
    if host.endswith(".supabase.co") and project and not host.startswith(f"{project}."):
        return error("key", f"It belongs to the project {project}, and SUPABASE_URL to another.", _WHERE)
    return ok("key", "It is a service_role key. (The newer secret keys can be revoked one by one.)")


def _claims(key: str) -> dict[str, Any] | None:
    """Read what a JWT says, if the key is one; who signed it does not matter here."""
    parts = key.split(".")
    try:
        read: Any = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
    except (IndexError, ValueError):
        return None
    return cast("dict[str, Any]", read) if len(parts) == 3 and isinstance(read, dict) else None


def unreachable(host: str, reason: httpx.HTTPError) -> Finding:
    """Explain why there was no answer."""
    if isinstance(reason, httpx.TimeoutException):
        why = "it did not answer in time"
    elif "name" in str(reason).lower() and isinstance(reason, httpx.ConnectError):
        why = "there is no such host"
    else:
        why = str(reason) or type(reason).__name__
    remedy = "Is SUPABASE_URL right, the project not paused, and does a proxy or firewall stand between?"
    return error("url", f"{host} can't be reached: {why}.", remedy)


def check_answer(answer: Answer, took: float, host: str) -> Findings:
    """Judge the answer to a first call."""
    if answer.status == 401 and answer.code != "42501":  # PostgREST says 401 also to anon, who may do nothing
        yield ok("url", f"{host} answers.")
        yield error("api", "It does not know the key: it was revoked, or belongs to another project.", _WHERE)
    elif answer.json is None or (answer.status == 404 and not answer.is_missing):
        yield error("url", f"{host} answers with status {answer.status}, but not as Supabase does.", _WHERE)
    elif answer.status >= 500:
        remedy = "Look at the project's status and its logs; try again."
        yield error("url", f"{host} answers with status {answer.status}. {answer.message}", remedy)
    else:
        yield ok("url", f"{host} answers.")
        yield _speed(took)


def check_schema(answer: Answer, schema: str) -> Findings:
    """Tell whether the API serves the schema, and whether tokenlimits is in it; nothing when both are so."""
    if answer.is_not_exposed:
        yield error("schema", f"The API doesn't serve the schema {schema}.", HOW_TO_EXPOSE)
    elif answer.is_missing:
        elsewhere = "Is it in another schema than public? Set TOKENLIMITS_SCHEMA, or pass --schema."
        remedy = f"{REAPPLY} If you just did: notify pgrst, 'reload schema'."
        yield error(
            "version",
            f"tokenlimits is not installed in the schema {schema}, or the API has not noticed.",
            f"{remedy} {elsewhere}" if schema == "public" else remedy,
        )


def _speed(took: float) -> Finding:
    if took < _SLOW:
        return ok("speed", f"A call takes {took * 1000:.0f} ms.")
    remedy = "Is the project in another region, its instance too small, or something locking its tables?"
    return warning("speed", f"A call takes {took:.1f} s.", remedy)


def timed_call(api: Api, function: str) -> tuple[Answer, float]:
    """Call a function, the second time on a connection that is open: how long does it take?"""
    answer = api.call(function)
    started = time.monotonic()
    if answer.status < 400:
        answer = api.call(function)
    return answer, time.monotonic() - started


def check_functions(api: Api) -> Findings:
    """Call functions that workers and scripts need, in a way that does nothing."""
    answers = {name: api.call(name, params) for name, params in _PROBES.items()}
    missing = [name for name, answer in answers.items() if answer.is_missing]
    closed = [name for name, answer in answers.items() if answer.code == "42501"]
    if missing:
        remedy = f"{REAPPLY} If it is applied: notify pgrst, 'reload schema'."
        yield error("functions", f"The API has no {listed(missing)}.", remedy)
    if closed:
        yield error("functions", f"This key may not call {listed(closed)}.", f"{SECRET} {REAPPLY}")
    if not missing and not closed:
        yield ok("functions", "The API serves those that workers call.")
