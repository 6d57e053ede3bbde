"""Where the Supabase project is, from the environment or `.env`."""

from __future__ import annotations

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import ConfigurationError


class Settings(BaseSettings):
    """`SUPABASE_URL`, and `SUPABASE_SECRET_KEY` or `SUPABASE_SERVICE_ROLE_KEY`; the environment wins over `.env`."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    url: str = Field(validation_alias="SUPABASE_URL", pattern=r"^https?://\S+$")
    key: SecretStr = Field(
        validation_alias=AliasChoices("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"), min_length=1
    )


def load() -> Settings:
    """Read the settings.

    Raises:
        ConfigurationError: A variable is missing or can't be right; the message says which.
    """
    try:
        settings = Settings()  # pyright: ignore[reportCallIssue]  # the fields come from the environment
    except ValidationError as error:
        names = ", ".join(sorted({str(e["loc"][0]) for e in error.errors()}))
        raise ConfigurationError(
            f"{names} is missing or not valid. Set SUPABASE_URL (like https://abc.supabase.co) and SUPABASE_SECRET_KEY "
            "(or SUPABASE_SERVICE_ROLE_KEY) in the environment or in .env; both are in your project's API settings."
        ) from None  # the values must not get into a traceback
    if settings.key.get_secret_value().startswith("sb_publishable_"):
        raise ConfigurationError(
            "The key is a publishable one, which may not track generations. Use the project's secret key, and keep it "
            "on the server."
        )
    return settings
