"""What the panel and the API need to know, from the environment, `.env` or code."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import NoDecode, SettingsConfigDict

from tokenlimits.errors import ConfigurationError
from tokenlimits.settings import (
    ProjectSettings,
    check_encrypted,
    checked_key,
    checked_url,
    from_one_place,
    is_secret,
    stripped_schema,
)

MAKE_ONE: Final = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"


def _is_weak(secret: str) -> bool:
    """Whether it is too short, or has a pattern that nobody has to guess much for."""
    steps = {ord(after) - ord(before) for before, after in pairwise(secret)}
    repeats = any(secret[period:] == secret[:-period] for period in range(1, len(secret) // 2 + 1))
    return len(secret) < 32 or len(set(secret)) < 8 or len(steps) < 8 or repeats


def _hard_to_guess(values: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if any(_is_weak(value.get_secret_value()) for value in values):
        raise ValueError(f"must have 32 random characters or more. Make one: {MAKE_ONE}")
    return values


def _split(value: object) -> object:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if isinstance(text, str):
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


def _not_secret(value: str) -> str:
    key = checked_key(SecretStr(value)).get_secret_value()
    if is_secret(key):
        raise ValueError("is the project's secret key, and must be the publishable one")
    return key


class WebSettings(ProjectSettings):
    """Settings of the admin panel and the API; the environment overrides `.env`.

    Args:
        url: The project's URL, `SUPABASE_URL`.
        publishable_key: `SUPABASE_PUBLISHABLE_KEY` or `SUPABASE_ANON_KEY`; administration needs no other key.
        secret_key: `SUPABASE_SECRET_KEY` or `SUPABASE_SERVICE_ROLE_KEY`: for `/api/track-generation` alone, which
            isn't there without it.
        web_secret: `TOKENLIMITS_WEB_SECRET`, 32 random characters or more, the same in all processes; it seals the
            panel's session cookies. You can list several, separated by commas, for rotation: the first one seals
            cookies, and all of them open cookies. The API needs none.
        session_idle_minutes: `TOKENLIMITS_WEB_SESSION_IDLE_MINUTES`; an unused session of the panel ends after this
            time. A page that only refreshes itself doesn't count as use.
        session_hours: `TOKENLIMITS_WEB_SESSION_HOURS`; a session ends after this time in any case.
        requests_per_minute: `TOKENLIMITS_WEB_REQUESTS_PER_MINUTE`, for each caller of the API and each user of the
            panel.
        sign_ins_per_minute: `TOKENLIMITS_WEB_SIGN_INS_PER_MINUTE`: how many may fail from each address; three times as
            many from all together.
        schema_name: `TOKENLIMITS_SCHEMA`, the schema that tokenlimits is installed in; public by default.
        timeout: Seconds that one call to Supabase may take.
    """

    # case-sensitive, or another program's SECRET_KEY, URL and TIMEOUT would be taken for the fields of these names
    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        env_ignore_empty=True,
        populate_by_name=True,
        case_sensitive=True,
        frozen=True,
        hide_input_in_errors=True,
    )

    url: Annotated[str, AfterValidator(checked_url)] = Field(validation_alias=AliasChoices("url", "SUPABASE_URL"))
    publishable_key: Annotated[str, AfterValidator(_not_secret)] = Field(
        validation_alias=AliasChoices("publishable_key", "SUPABASE_PUBLISHABLE_KEY", "SUPABASE_ANON_KEY"), repr=False
    )
    secret_key: Annotated[SecretStr, AfterValidator(checked_key)] | None = Field(
        None, validation_alias=AliasChoices("secret_key", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    )
    web_secret: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split), AfterValidator(_hard_to_guess)] = (
        Field((), validation_alias=AliasChoices("web_secret", "TOKENLIMITS_WEB_SECRET"))
    )
    session_idle_minutes: int = Field(
        120, ge=1, validation_alias=AliasChoices("session_idle_minutes", "TOKENLIMITS_WEB_SESSION_IDLE_MINUTES")
    )
    session_hours: int = Field(
        12, ge=1, validation_alias=AliasChoices("session_hours", "TOKENLIMITS_WEB_SESSION_HOURS")
    )
    requests_per_minute: int = Field(
        600, ge=1, validation_alias=AliasChoices("requests_per_minute", "TOKENLIMITS_WEB_REQUESTS_PER_MINUTE")
    )
    sign_ins_per_minute: int = Field(
        10, ge=1, validation_alias=AliasChoices("sign_ins_per_minute", "TOKENLIMITS_WEB_SIGN_INS_PER_MINUTE")
    )
    schema_name: Annotated[str, AfterValidator(stripped_schema)] = Field(
        "public", validation_alias=AliasChoices("schema_name", "TOKENLIMITS_SCHEMA")
    )
    timeout: float = Field(5, gt=0, le=60)

    @model_validator(mode="after")
    def _is_encrypted(self) -> Self:
        try:
            check_encrypted(self.url)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
        return self


def load() -> WebSettings:
    """Read the settings from the environment or `.env`.

    Raises:
        ConfigurationError: A variable is missing or can't be right; the message says which, and never its value.
    """
    try:
        return WebSettings()  # pyright: ignore[reportCallIssue]  # the fields come from the environment
    except ValidationError as error:
        problems = "; ".join(
            sorted({": ".join([*map(_variable, e["loc"]), e["msg"]]) for e in error.errors(include_input=False)})
        )
    except UnicodeDecodeError:
        problems = "the file .env is not UTF-8 text"
    # out here, so that no context of the error holds the values
    raise ConfigurationError(
        f"The panel is not configured. {problems}. Set SUPABASE_URL, SUPABASE_PUBLISHABLE_KEY and "
        f"TOKENLIMITS_WEB_SECRET in the environment or in .env.{from_one_place()}"
    )


def _variable(field: int | str) -> str:
    alias = WebSettings.model_fields[str(field)].validation_alias
    return str(alias.choices[1] if isinstance(alias, AliasChoices) else field)
