"""All errors of tokenlimits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .models import TrackResult

__all__ = [
    "HOW_TO_EXPOSE",
    "AccessDenied",
    "AlreadySettled",
    "ConfigurationError",
    "GenerationDenied",
    "GroupChanged",
    "GroupExists",
    "GroupNotFound",
    "HoldExpired",
    "IdempotencyConflict",
    "InvalidRequest",
    "LimitExceeded",
    "NoLimitForKind",
    "NotInGroup",
    "SchemaNotInstalled",
    "SchemaOutdated",
    "ServiceUnavailable",
    "TokenLimitsError",
    "UnknownUser",
    "UnreadableValue",
    "UsageNotFound",
]


class TokenLimitsError(Exception):
    """Base class of all errors of tokenlimits.

    `code` is the server's SQLSTATE or PostgREST code if the server refused the request. `returned` is what a function
    decorated with `limited` had returned (or `hold.returned`) when its work succeeded and only settling failed.
    """

    default_hint: ClassVar[str] = ""
    returned: Any = None

    def __init__(self, message: str, *, code: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with every field, for process pools and task queues."""
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[TokenLimitsError], args: tuple[str, ...], state: dict[str, object]) -> TokenLimitsError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(TokenLimitsError):
    """The setup is wrong: a variable is missing, or a client is used where it can't be."""


class SchemaNotInstalled(TokenLimitsError):
    """tokenlimits is not installed in the database."""

    default_hint = (
        "Apply sql/tokenlimits.sql in Supabase's SQL editor (or as a migration). "
        "If you just did, run: notify pgrst, 'reload schema'. "
        "If it is installed in another schema, pass schema=, or set TOKENLIMITS_SCHEMA"
    )


class SchemaOutdated(TokenLimitsError):
    """The database has an older version of tokenlimits than this package needs."""

    default_hint = "Apply the newest sql/tokenlimits.sql; this keeps all data."


class AccessDenied(TokenLimitsError):
    """The key or the session has no right to do this."""

    default_hint = (
        "Workers need the project's secret (service_role) key, in SUPABASE_SECRET_KEY or SUPABASE_SERVICE_ROLE_KEY. To "
        "manage groups, the session of a user whose app_metadata.role is 'admin' will do too."
    )


class InvalidRequest(TokenLimitsError, ValueError):
    """An argument is not valid; `field` names it."""

    @property
    def field(self) -> str | None:
        """The argument's name, with its place in a list, like `limits[2].max`."""
        return self.detail


class GroupNotFound(TokenLimitsError):
    """The group doesn't exist."""


class GroupExists(TokenLimitsError):
    """Another group has this name (names are unique, ignoring case)."""


class GroupChanged(TokenLimitsError):
    """Somebody else has changed the group since it was read; nothing was saved."""


class UnknownUser(TokenLimitsError):
    """`auth.users` has no user with this id."""


class UsageNotFound(TokenLimitsError):
    """There is no usage with this id."""


class UnreadableValue(TokenLimitsError):
    """The database holds a value that Python can't represent, such as the moment `infinity`; `detail` is its field.

    Lists leave such rows out, and log a warning for each.
    """


class AlreadySettled(TokenLimitsError):
    """The usage was already settled in another way, or the body of its hold has ended."""


class HoldExpired(TokenLimitsError):
    """The hold has expired, and its period is over or has no room left for it; nothing was charged."""


class IdempotencyConflict(TokenLimitsError):
    """The idempotency key was already used for another request of this user."""


class ServiceUnavailable(TokenLimitsError):
    """Supabase could not be reached, or gave no usable answer, before the timeout, despite retries.

    `retry_after` is the number of seconds that the server asked to wait, if it did.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        detail: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code=code, detail=detail)
        self.retry_after = retry_after


class GenerationDenied(TokenLimitsError):
    """The generation is denied; `result` says why, and when it will be allowed."""

    def __init__(self, result: TrackResult) -> None:
        super().__init__(result.error or "The generation is denied")
        self.result = result


class LimitExceeded(GenerationDenied):
    """A limit has no room for the cost."""


class NotInGroup(GenerationDenied):
    """The user is in no group that can pay."""


class NoLimitForKind(GenerationDenied):
    """None of the user's groups has a limit for this kind."""


HOW_TO_EXPOSE = (
    "Expose the schema that tokenlimits is installed in: on hosted Supabase, under Project Settings > Data API > "
    "Exposed schemas; with the Supabase CLI, in supabase/config.toml under [api] schemas. If it is installed in "
    "another schema, pass schema=, or set TOKENLIMITS_SCHEMA (default: public)."
)
"""What to do when PostgREST refuses the schema: its own message only lists the exposed ones."""
