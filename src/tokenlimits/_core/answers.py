"""What an HTTP answer to a call means: its result, a failure to retry, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from tokenlimits._refusals import BY_CODE, refusal
from tokenlimits.errors import (
    ConfigurationError,
    SchemaNotInstalled,
    SchemaOutdated,
    ServiceUnavailable,
    TokenLimitsError,
)
from tokenlimits.sql_files import SCHEMA_VERSION

from . import retry
from .call import Call, field_parser

T = TypeVar("T")

_INSTALLED = field_parser("version", int)


def read(call: Call[T], status: int, headers: Mapping[str, str], content: bytes) -> T:
    """Parse an answer, or raise what it means."""
    try:
        answer: Any = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    problem: dict[str, Any] = cast("Any", answer) if isinstance(answer, dict) else {}
    code = problem.get("code")
    code = code if isinstance(code, str) else None
    if transient := retry.from_answer(status, headers, code):
        raise transient
    if 200 <= status < 300:
        return _parsed(call, status, answer)
    if status in (401, 403) or (problem and (status < 500 or code in BY_CODE)):
        raise refusal(status, problem)
    if status < 500:
        raise ConfigurationError(
            f"The server answered with status {status}, not as Supabase does: is SUPABASE_URL right?"
        )
    if code is None:
        raise ServiceUnavailable(
            f"Supabase answered {call.function} with status {status} (no code). Look at the project's "
            "status, and at its logs."
        )
    raise refusal(status, problem)


def _parsed(call: Call[T], status: int, answer: Any) -> T:
    try:
        return call.parse(answer)
    except TokenLimitsError:
        raise
    except (ValidationError, KeyError, IndexError, TypeError, ValueError) as error:
        raise retry.Transient(f"status {status}, but the answer is not one of {call.function}") from error


def outdated(function: str, error: SchemaNotInstalled) -> SchemaOutdated:
    """Make the error for a function that is missing where tokenlimits is installed."""
    return SchemaOutdated(
        f"The database's tokenlimits has no function {function}. {SchemaOutdated.default_hint}",
        code=error.code,
    )


def version() -> Call[int]:
    """Ask for the version of the installed SQL."""

    def parse(answer: Any) -> int:
        installed: int = _INSTALLED(answer)
        if installed < SCHEMA_VERSION:
            raise SchemaOutdated(
                f"The database has version {installed} of the schema, and this package needs {SCHEMA_VERSION}. "
                f"{SchemaOutdated.default_hint}"
            )
        return installed

    return Call("tokenlimits_version", {}, parse)
