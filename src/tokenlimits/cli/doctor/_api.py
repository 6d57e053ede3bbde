"""Checks of the API: whether it is reachable, accepts the key, and serves our functions."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Self, cast
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, AliasChoices, Field, SecretStr

from tokenlimits.errors import HOW_TO_EXPOSE
from tokenlimits.settings import ProjectSettings, claims, from_one_place, project_url
from tokenlimits.sql_files import checked_schema

from ._expected import REAPPLY
from ._findings import Finding, Findings, error, listed, ok, warning

_KEY_NAMES = ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
_SCHEMA_NAME = "TOKENLIMITS_SCHEMA"
_SLOW = 1.0
_WHERE = "Copy the URL and the key from your project's API settings to the environment or .env."
SECRET = "Set SUPABASE_SECRET_KEY to the project's secret key (sb_secret_…), and keep it on the server."  # noqa: S105
# bad arguments: a function that exists refuses them before it does anything
_PROBES: Mapping[str, Mapping[str, object]] = {
    "track_generation": {"p_user_id": None, "p_kind": ""},
    "check_generation": {"p_user_id": None, "p_kind": ""},
    "reserve_generation": {"p_user_id": None, "p_kind": ""},
    "record_generation": {"p_user_id": None, "p_kind": ""},
    "user_generation_usage": {"p_user_id": None},
    "find_groups": {"p_page_size": 1},
}


class Configuration(ProjectSettings):
    """The settings as they are, even if they are wrong."""

    url: Annotated[str, AfterValidator(project_url)] = Field("", validation_alias="SUPABASE_URL")
    key: SecretStr = Field(SecretStr(""), validation_alias=AliasChoices(*_KEY_NAMES))
    schema_name: str = Field("public", validation_alias=_SCHEMA_NAME)

    @classmethod
    def load(cls, schema: str | None) -> Self:
        """Read the environment and `.env`; the argument `schema` takes precedence."""
        given: dict[str, Any] = {} if schema is None else {_SCHEMA_NAME: schema}
        return cls(**given)

    @property
    def text_of_key(self) -> str:
        """The key itself."""
        return self.key.get_secret_value().strip()

    @property
    def usable(self) -> bool:
        """Whether these settings suffice for a request."""
        return self.is_url and _can_be_sent(self.text_of_key) and not self.problem_of_schema

    @property
    def is_url(self) -> bool:
        """Whether the URL is valid, with a host that can be looked up."""
        try:
            return urlsplit(self.url).scheme in ("http", "https") and bool(self.host.encode("idna"))
        except UnicodeError:  # a..b
            return False

    @property
    def text_of_schema(self) -> str:
        """The schema in which tokenlimits is called."""
        return self.schema_name.strip()

    @property
    def problem_of_schema(self) -> str:
        """What is wrong with the schema's name; empty if nothing."""
        try:
            checked_schema(self.text_of_schema)
        except ValueError as reason:
            return str(reason)
        return ""

    @property
    def host(self) -> str:
        """The URL's host, without a password that may be in the URL."""
        return urlsplit(self.url).hostname or ""


def _can_be_sent(key: str) -> bool:
    return re.fullmatch(r"[!-~]+", key) is not None


class Answer:
    """What the API answered: a status, and JSON if there was any."""

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
        """Whether the function doesn't exist."""
        return self.code in ("PGRST202", "42883")

    @property
    def is_not_exposed(self) -> bool:
        """Whether the API doesn't serve the schema."""
        return self.code == "PGRST106"


class Api:
    """The project's API."""

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
    """Check the settings without using them."""
    if not configuration.url:
        yield error("configuration", "SUPABASE_URL is not set.", _WHERE + from_one_place())
    elif not configuration.is_url:
        yield error("configuration", "SUPABASE_URL is not a URL like https://abc.supabase.co.", _WHERE)
    if configuration.problem_of_schema:
        remedy = "Set it to the schema that tokenlimits is installed in, or unset it if that is public."
        yield error("schema", f"TOKENLIMITS_SCHEMA: {configuration.problem_of_schema}", remedy)
    yield _key_finding(configuration.text_of_key, configuration.host)


def _key_finding(key: str, host: str) -> Finding:
    if not key:
        return error("key", "SUPABASE_SECRET_KEY is not set.", SECRET + from_one_place())
    if not _can_be_sent(key):
        return error("key", "The key has characters that no key has: was something else copied?", SECRET)
    if key.startswith("sb_secret_"):
        return ok("key", "This is a secret key.")
    if key.startswith("sb_publishable_"):
        return error("key", "This is a publishable key, which has no rights here.", SECRET)
    said = claims(key)
    if said is None:
        return warning("key", "This doesn't look like a Supabase key.", SECRET)
    return _token_finding(said, host)


def _token_finding(said: Mapping[str, Any], host: str) -> Finding:
    role, project, expires = said.get("role"), said.get("ref"), said.get("exp")
    if role != "service_role":
        return error("key", f"This is a token for the role {role}, not service_role.", SECRET)
    if isinstance(expires, int | float) and expires < datetime.now(UTC).timestamp():
        return error("key", "This service_role key has expired.", SECRET)
    if host.endswith(".supabase.co") and project and not host.startswith(f"{project}."):
        return error("key", f"The key belongs to the project {project}, and SUPABASE_URL to another.", _WHERE)
    return ok("key", "This is a service_role key. (Secret keys are newer and can be revoked one by one.)")


def unreachable(host: str, reason: httpx.HTTPError) -> Finding:
    """Say why there was no answer."""
    if isinstance(reason, httpx.TimeoutException):
        why = "it did not answer in time"
    elif "name" in str(reason).lower() and isinstance(reason, httpx.ConnectError):
        why = "there is no such host"
    else:
        why = str(reason) or type(reason).__name__
    remedy = "Check SUPABASE_URL, whether the project is paused, and any proxy or firewall in between."
    return error("url", f"{host} can't be reached: {why}.", remedy)


def check_answer(answer: Answer, took: float, host: str) -> Findings:
    """Check the answer to a first call."""
    if answer.status == 401 and answer.code != "42501":  # PostgREST also answers 401 when anon lacks a right
        yield ok("url", f"{host} answers.")
        yield error("api", "The API rejects the key: it was revoked, or belongs to another project.", _WHERE)
    elif answer.json is None or (answer.status == 404 and not answer.is_missing):
        yield error("url", f"{host} answers with status {answer.status}, but not like Supabase.", _WHERE)
    elif answer.status >= 500:
        remedy = "Check the project's status and its logs, and try again."
        yield error("url", f"{host} answers with status {answer.status}. {answer.message}", remedy)
    else:
        yield ok("url", f"{host} answers.")
        yield _speed(took)


def check_schema(answer: Answer, schema: str) -> Findings:
    """Check that the API serves the schema, and that tokenlimits is in it; no findings if so."""
    if answer.is_not_exposed:
        yield error("schema", f"The API doesn't expose the schema {schema}.", HOW_TO_EXPOSE)
    elif answer.is_missing:
        elsewhere = "If it is in another schema, set TOKENLIMITS_SCHEMA or pass --schema."
        remedy = f"{REAPPLY} If you just did, run `notify pgrst, 'reload schema'`."
        yield error(
            "version",
            f"tokenlimits is not installed in the schema {schema}, or the API's schema cache is out of date.",
            f"{remedy} {elsewhere}" if schema == "public" else remedy,
        )


def _speed(took: float) -> Finding:
    if took < _SLOW:
        return ok("speed", f"A call takes {took * 1000:.0f} ms.")
    remedy = "The project may be in a distant region, its instance too small, or a lock may be held on its tables."
    return warning("speed", f"A call takes {took:.1f} s.", remedy)


def timed_call(api: Api, function: str) -> tuple[Answer, float]:
    """Call a function twice, and time the second call, whose connection is already open."""
    answer = api.call(function)
    started = time.monotonic()
    if answer.status < 400:
        answer = api.call(function)
    return answer, time.monotonic() - started


def check_functions(api: Api) -> Findings:
    """Call the functions that workers and scripts need, in a way that changes nothing."""
    answers = {name: api.call(name, params) for name, params in _PROBES.items()}
    missing = [name for name, answer in answers.items() if answer.is_missing]
    closed = [name for name, answer in answers.items() if answer.code == "42501"]
    if missing:
        remedy = f"{REAPPLY} If you just did, run `notify pgrst, 'reload schema'`."
        yield error("functions", f"The API doesn't serve {listed(missing)}.", remedy)
    if closed:
        yield error("functions", f"This key may not call {listed(closed)}.", f"{SECRET} {REAPPLY}")
    if not missing and not closed:
        yield ok("functions", "The API serves the functions that workers call.")
