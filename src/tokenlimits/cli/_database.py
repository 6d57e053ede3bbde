"""A connection of its own to PostgreSQL, for what the API can't do; its URL never shows in a message."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from ._terminal import Problem

Connection = psycopg.Connection[tuple[object, ...]]

_HINT = "Copy it from your project's Connect dialog, like postgresql://postgres@db.abc.supabase.co:5432/postgres"


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    url: SecretStr | None = Field(None, validation_alias=AliasChoices("DATABASE_URL", "SUPABASE_DB_URL"))


def find_url(given: str | None) -> str | None:
    """Choose the database's URL: the option's, else that of the environment or `.env`."""
    if given is not None:
        return given
    url = _Settings().url  # pyright: ignore[reportCallIssue]  # the field comes from the environment
    return None if url is None else url.get_secret_value()


@contextmanager
def connect(given: str | None) -> Generator[Connection]:
    """Connect to the database.

    Raises:
        Problem: No URL, a wrong one, no connection, or PostgreSQL refused a statement.
    """
    url = find_url(given)
    if url is None:
        raise Problem(f"Which database? Pass --db-url, or set DATABASE_URL. {_HINT}")
    _check(url)
    try:
        # nothing prepared: a pooler may give every transaction another connection
        with psycopg.connect(url, autocommit=True, prepare_threshold=None, connect_timeout=15) as connection:
            yield connection
    except psycopg.Error as error:
        problem = _problem(error)
    else:
        return
    # out here, so that no context of it holds the URL
    raise problem


def _check(url: str) -> None:
    try:
        conninfo_to_dict(url)
    except psycopg.Error:
        readable = False
    else:
        readable = "=" in url or "://" in url
    if not readable:
        raise Problem(f"The database's URL can't be read. {_HINT}")


def _problem(error: psycopg.Error) -> Problem:
    if error.sqlstate is None:
        reason = str(error).strip().splitlines()[0]
        return Problem(f"The database can't be reached: {reason}. Is the URL right, and the password in it?")
    return Problem(refusal(error))


def refusal(error: psycopg.Error) -> str:
    """Say in one line why PostgreSQL refused a statement; what our own SQL says needs no more words."""
    said = error.diag.message_primary or str(error)
    ours = (error.sqlstate or "").startswith("TL")
    sentences = [said if ours else f"PostgreSQL refused ({error.sqlstate}): {said}", error.diag.message_hint]
    whole = (" ".join(sentence.split()) for sentence in sentences if sentence)
    return " ".join(sentence if sentence.endswith((".", "?", "!")) else f"{sentence}." for sentence in whole)
