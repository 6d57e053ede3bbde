"""Where the Supabase project is, from the environment or `.env`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, AnyHttpUrl, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import ConfigurationError
from .sql_files import checked_schema

__all__ = ["Settings", "checked_key", "checked_url", "load", "load_schema", "named_schema", "stripped_schema"]

_URL = TypeAdapter(AnyHttpUrl)


def checked_url(value: str) -> str:
    """Check the address of a project."""
    host = _URL.validate_python(value.strip()).host or ""
    host.encode("idna")  # a label that is empty or too long is found only here
    return value.strip()


def checked_key(value: SecretStr) -> SecretStr:
    """Check a key."""
    key = value.get_secret_value().strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("a header can't hold it")
    return SecretStr(key)


def stripped_schema(value: str) -> str:
    """Check the name of a schema that a variable holds."""
    return checked_schema(value.strip())


class Settings(BaseSettings):
    """`SUPABASE_URL`, and `SUPABASE_SECRET_KEY` or `SUPABASE_SERVICE_ROLE_KEY`; the environment wins over `.env`."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    url: Annotated[str, AfterValidator(checked_url)] = Field(validation_alias="SUPABASE_URL")
    key: Annotated[SecretStr, AfterValidator(checked_key)] = Field(
        validation_alias=AliasChoices("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    )


class _Installation(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    name: Annotated[str, AfterValidator(stripped_schema)] = Field(default="public", alias="TOKENLIMITS_SCHEMA")


def load_schema() -> str:
    """Read in which schema tokenlimits is installed: `TOKENLIMITS_SCHEMA`, or public.

    Raises:
        ConfigurationError: It can't be the name of that schema.
    """
    try:
        return _Installation().name
    except ValidationError as error:
        problem = f"TOKENLIMITS_SCHEMA: {_words(error)}"
    except UnicodeDecodeError:
        problem = "The file .env is not UTF-8 text, so TOKENLIMITS_SCHEMA can't be read from it."
    raise ConfigurationError(problem)


def named_schema(name: object) -> str:
    """Check the name of the schema that a caller names.

    Raises:
        ConfigurationError: It can't be that of a schema with tokenlimits.
    """
    try:
        if isinstance(name, str):
            return checked_schema(name)
        problem = f"must be a name, like 'limits' (got {name!r:.100})"
    except ValueError as error:
        problem = str(error)
    raise ConfigurationError(f"schema: {problem}")


def _words(error: ValidationError) -> str:
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def load() -> Settings:
    """Read the settings.

    Raises:
        ConfigurationError: A variable is missing or can't be right; the message says which.
    """
    try:
        settings = Settings()  # pyright: ignore[reportCallIssue]  # the fields come from the environment
    except ValidationError as error:
        names = sorted({str(e["loc"][0]) for e in error.errors()})
        problem = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing or not valid."
    except UnicodeDecodeError:
        problem = "The file .env is not UTF-8 text."
    else:
        return _allowed(settings)
    # out here, so that no context of the error holds the values
    raise ConfigurationError(
        f"{problem} Set SUPABASE_URL (like https://abc.supabase.co) and SUPABASE_SECRET_KEY (or "
        "SUPABASE_SERVICE_ROLE_KEY) in the environment or in .env; both are in your project's API settings."
    )


def _allowed(settings: Settings) -> Settings:
    if settings.key.get_secret_value().startswith("sb_publishable_"):
        raise ConfigurationError(
            "The key is a publishable one, which may neither track generations nor manage groups. Use the project's "
            "secret key, and keep it on the server."
        )
    return settings
