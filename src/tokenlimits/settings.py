"""The Supabase project's URL and key, from the environment or `.env`."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, AnyHttpUrl, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from .errors import ConfigurationError
from .sql_files import checked_schema

__all__ = [
    "ProjectSettings",
    "Settings",
    "check_encrypted",
    "checked_key",
    "checked_url",
    "claims",
    "exported",
    "from_one_place",
    "is_loopback",
    "is_secret",
    "load",
    "load_schema",
    "named_schema",
    "project_url",
    "stripped_schema",
    "unusable_network",
]

_URL = TypeAdapter(AnyHttpUrl)


def project_url(value: str) -> str:
    """Return the URL of a project, where somebody has copied that of one of its services.

    Example:
        >>> project_url("https://abc.supabase.co/rest/v1/")
        'https://abc.supabase.co'
    """
    return re.sub(r"/(auth|functions|graphql|rest|storage)/v1/?$", "", value.strip())


def checked_url(value: str) -> str:
    """Check the URL of a project."""
    url = project_url(value)
    host = _URL.validate_python(url).host or ""
    host.encode("idna")  # pydantic accepts labels that are empty or too long
    return url


def checked_key(value: SecretStr) -> SecretStr:
    """Check a key."""
    key = value.get_secret_value().strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("has characters that are not allowed in an HTTP header")
    return SecretStr(key)


def claims(key: str) -> Mapping[str, Any] | None:
    """Read what a key says of itself if it is a JWT, whoever has signed it; None if it is none.

    Args:
        key: A key of a project.

    Example:
        >>> claims("e30.eyJyb2xlIjoiYW5vbiJ9.signature"), claims("sb_secret_…")
        ({'role': 'anon'}, None)
    """
    parts = key.split(".")
    try:
        read: Any = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
    except (IndexError, ValueError):
        return None
    return cast("dict[str, Any]", read) if len(parts) == 3 and isinstance(read, dict) else None


def is_secret(key: str) -> bool:
    """Whether a key may do everything: a secret key, or the older service_role key.

    Args:
        key: A key of a project.

    Example:
        >>> is_secret("sb_secret_…"), is_secret("e30.eyJyb2xlIjoiYW5vbiJ9.signature")
        (True, False)
    """
    return key.startswith("sb_secret_") or (claims(key) or {}).get("role") == "service_role"


def unusable_network(error: Exception) -> ConfigurationError:
    """Make the error for what the environment says of HTTP and can't be.

    Args:
        error: What went wrong. Its message is only repeated where it can't contain a proxy's password.
    """
    # the first two: SOCKS isn't installed; a file of certificates doesn't exist
    problem = (
        str(error)
        if isinstance(error, ImportError | OSError)
        else "a proxy's URL is not valid, or a host in NO_PROXY isn't (there, IPv6 addresses have no brackets)"
    )
    return ConfigurationError(
        f"HTTP can't be set up from the environment: {problem}. Check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, "
        "SSL_CERT_FILE and SSL_CERT_DIR."
    )


def stripped_schema(value: str) -> str:
    """Check the name of a schema from a variable."""
    return checked_schema(value.strip())


# a key is sent to the URL, so a .env in the working directory must not redirect a key from the environment
_TOGETHER = frozenset(
    {
        "SUPABASE_URL",
        "SUPABASE_SECRET_KEY",
        "SUPABASE_SERVICE_ROLE_KEY",
        "SUPABASE_PUBLISHABLE_KEY",
        "SUPABASE_ANON_KEY",
    }
)


def exported() -> list[str]:
    """List the project's variables, its URL and keys, that the environment has."""
    return sorted(name for name, value in os.environ.items() if name.upper() in _TOGETHER and value.strip())


class ProjectSettings(BaseSettings):
    """Settings of which the URL and the keys come from one place: the environment or `.env`."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the URL and the keys of `.env` alone where the environment has one of them."""
        if isinstance(dotenv_settings, DotEnvSettingsSource) and exported():
            values = dotenv_settings.env_vars.items()
            dotenv_settings.env_vars = {name: value for name, value in values if name.upper() not in _TOGETHER}
        return init_settings, env_settings, dotenv_settings, file_secret_settings


def from_one_place() -> str:
    """Say, where it may explain a missing variable, that what is exported isn't combined with `.env`."""
    names = exported()
    if not names:
        return ""
    return f" {names[0]} is exported, so .env isn't read for the others: a key never goes to the URL of another place."


class Settings(ProjectSettings):
    """`SUPABASE_URL`, and `SUPABASE_SECRET_KEY` or `SUPABASE_SERVICE_ROLE_KEY`; the environment wins over `.env`."""

    url: Annotated[str, AfterValidator(checked_url)] = Field(validation_alias="SUPABASE_URL")
    key: Annotated[SecretStr, AfterValidator(checked_key)] = Field(
        validation_alias=AliasChoices("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    )


class _Installation(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    name: Annotated[str, AfterValidator(stripped_schema)] = Field(default="public", alias="TOKENLIMITS_SCHEMA")


class _Network(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    allow_http: bool = Field(default=False, alias="TOKENLIMITS_ALLOW_HTTP")


def check_encrypted(url: str, *, allow_http: bool = False) -> None:
    """Refuse to send a key unencrypted to another machine.

    Raises:
        ConfigurationError: The URL is `http://`, its host isn't this machine, and nobody allows it.
    """
    address = urlsplit(url.strip())
    if address.scheme != "http" or allow_http or is_loopback(address.hostname or ""):
        return
    try:
        allowed = _Network().allow_http
    except ValidationError:
        allowed = False
    if not allowed:
        raise ConfigurationError(
            f"The URL is http://{address.hostname}, so keys and tokens would be sent unencrypted. Use https://; in "
            "a private network, pass allow_http=True or set TOKENLIMITS_ALLOW_HTTP=1."
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself.

    Example:
        >>> is_loopback("localhost"), is_loopback("[::1]"), is_loopback("10.0.0.1")
        (True, True, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load_schema() -> str:
    """Read the schema that tokenlimits is installed in: `TOKENLIMITS_SCHEMA`, or public.

    Raises:
        ConfigurationError: The name is not allowed.
    """
    try:
        return _Installation().name
    except ValidationError as error:
        problem = f"TOKENLIMITS_SCHEMA: {_words(error)}"
    except UnicodeDecodeError:
        problem = "The file .env is not UTF-8 text, so TOKENLIMITS_SCHEMA can't be read from it."
    raise ConfigurationError(problem)


def named_schema(name: object) -> str:
    """Check the name of a schema from a caller.

    Raises:
        ConfigurationError: The name is not allowed.
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


def load(*, allow_http: bool = False) -> Settings:
    """Read the settings.

    Args:
        allow_http: Accept an `http://` URL of another machine, as in a private network.

    Raises:
        ConfigurationError: A variable is missing or not valid; the message says which.
    """
    try:
        settings = Settings()  # pyright: ignore[reportCallIssue]  # the fields come from the environment
    except ValidationError as error:
        names = sorted({str(e["loc"][0]) for e in error.errors()})
        problem = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing or not valid."
    except UnicodeDecodeError:
        problem = "The file .env is not UTF-8 text."
    else:
        check_encrypted(settings.url, allow_http=allow_http)
        return _allowed(settings)
    # outside the except block, so that the error's context doesn't hold the values
    raise ConfigurationError(
        f"{problem} Set SUPABASE_URL (like https://abc.supabase.co) and SUPABASE_SECRET_KEY (or "
        "SUPABASE_SERVICE_ROLE_KEY) in the environment or .env; both are in your project's API settings."
        + from_one_place()
    )


def _allowed(settings: Settings) -> Settings:
    if settings.key.get_secret_value().startswith("sb_publishable_"):
        raise ConfigurationError(
            "This is a publishable key, which can neither track generations nor manage groups. Use the project's "
            "secret key, and keep it on the server."
        )
    return settings
