"""A direct connection to PostgreSQL, for what the API can't do; no message shows its URL."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from tokenlimits.settings import is_loopback

from ._terminal import Problem

Connection = psycopg.Connection[tuple[object, ...]]

_HINT = "Copy it from your project's Connect dialog: postgresql://postgres@db.abc.supabase.co:5432/postgres or similar"


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    url: SecretStr | None = Field(None, validation_alias=AliasChoices("DATABASE_URL", "SUPABASE_DB_URL"))


def find_url(given: str | None) -> str | None:
    """Choose the database's URL: from the option, the file that it names after an @, the environment or `.env`.

    Raises:
        Problem: The file isn't text.
        OSError: It can't be read.
    """
    if given is not None and given.startswith("@"):
        try:
            return Path(given[1:]).read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise Problem(f"{given[1:]} is not UTF-8 text.") from None
    if given is not None:
        return given
    url = _Settings().url  # pyright: ignore[reportCallIssue]  # the field comes from the environment
    return None if url is None else url.get_secret_value()


@contextmanager
def connect(given: str | None) -> Generator[Connection]:
    """Connect to the database.

    Raises:
        Problem: There is no URL, it is wrong, the connection failed, or PostgreSQL refused a statement.
    """
    url = find_url(given)
    if url is None:
        raise Problem(f"No database URL: pass --db-url or set DATABASE_URL. {_HINT}")
    conninfo = connection_of(url)
    try:
        # no prepared statements: behind a pooler, the next transaction may have another connection
        with psycopg.connect(conninfo, autocommit=True, prepare_threshold=None, connect_timeout=15) as connection:
            yield connection
    except psycopg.Error as error:
        problem = _problem(error, conninfo)
    else:
        return
    # outside the except block, so that the error's context doesn't hold the URL
    raise problem


def connection_of(url: str) -> str:
    """Convert a database URL to what libpq takes, with encryption unless the URL says otherwise.

    Raises:
        Problem: It can't be read.
    """
    try:
        parts = conninfo_to_dict(_for_libpq(url))
    except psycopg.Error:
        parts = {}
    if not parts:
        raise Problem(f"The database's URL can't be read. {_HINT}")
    hosts = str(parts.get("hostaddr") or parts.get("host") or os.environ.get("PGHOST", "")).split(",")
    if not all(map(_is_here, hosts)) and "PGSSLMODE" not in os.environ:
        # libpq's default, prefer, falls back to plain text if the server, or somebody in between, refuses encryption
        parts = {"sslmode": "require"} | parts
    return make_conninfo("", **parts)


def _for_libpq(url: str) -> str:
    """Drop the parameters of other libraries, and encode a password that isn't encoded."""
    found = re.fullmatch(r"postgres(?:ql)?(?:\+\w+)?://(?:(?P<user>.*)@)?(?P<rest>[^@]*)", url.strip(), re.DOTALL)
    if found is None:
        return url
    rest, _, query = found["rest"].partition("?")
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    kept = urlencode([(name, value) for name, value in parse_qsl(query) if name in known])
    user = f"{':'.join(map(_encoded, found['user'].split(':', 1)))}@" if found["user"] else ""
    return f"postgresql://{user}{rest}" + (f"?{kept}" if kept else "")


def _encoded(text: str) -> str:
    return quote(text if re.search(r"%(?![0-9A-Fa-f]{2})", text) else unquote(text), safe="")


def _is_here(host: str) -> bool:
    """Whether a host is this machine: a socket, or its loopback interface."""
    return not host or host.startswith(("/", "@")) or is_loopback(host)


def _problem(error: psycopg.Error, conninfo: str) -> Problem:
    if error.sqlstate is not None:
        return Problem(refusal(error))
    reason = str(error).strip().splitlines()[0]
    host = str(conninfo_to_dict(conninfo).get("host", ""))
    if "SSL" in reason:
        hint = "If the whole network path is your own, add ?sslmode=disable to the URL."
    elif re.fullmatch(r"db\.\w+\.supabase\.co", host):
        hint = "This host has only an IPv6 address; without IPv6, use the session pooler's URL from the Connect dialog."
    else:
        hint = "Check the URL and its password."
    return Problem(f"The database can't be reached: {reason}. {hint}")


def refusal(error: psycopg.Error) -> str:
    """Say in one line why PostgreSQL refused a statement; the messages of our own SQL are shown as they are."""
    said = error.diag.message_primary or str(error)
    ours = (error.sqlstate or "").startswith("TL")
    sentences = [said if ours else f"PostgreSQL refused ({error.sqlstate}): {said}", error.diag.message_hint]
    whole = (" ".join(sentence.split()) for sentence in sentences if sentence)
    return " ".join(sentence if sentence.endswith((".", "?", "!")) else f"{sentence}." for sentence in whole)
