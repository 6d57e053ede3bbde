"""Everything that tokenlimits raises."""

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
    "UsageNotFound",
]


class TokenLimitsError(Exception):
    """Base of all errors of tokenlimits.

    `code` is the server's SQLSTATE or PostgREST code, when it was the server that refused. `returned` is what a
    function decorated by `limited` had returned (or `hold.returned`), when its work went well and only settling failed.
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
    """The client is set up wrongly: a variable is missing, or a client is used where it can't be."""


class SchemaNotInstalled(TokenLimitsError):
    """The database has no tokenlimits yet."""

    default_hint = (
        "Apply sql/tokenlimits.sql in Supabase's SQL editor (or as a migration). "
        "If you just did, run: notify pgrst, 'reload schema'. "
        "If it is installed in another schema, name that: schema=, or TOKENLIMITS_SCHEMA in the environment"
    )


class SchemaOutdated(TokenLimitsError):
    """The database has an older tokenlimits than this package needs."""

    default_hint = "Apply the newest sql/tokenlimits.sql; applying it again keeps all data."


class AccessDenied(TokenLimitsError):
    """The key or the session may not do this."""

    default_hint = (
        "Workers need the secret (service_role) key; managing groups also works with the session of a user "
        "whose app_metadata.role is 'admin'."
    )


class InvalidRequest(TokenLimitsError, ValueError):
    """An argument is not valid; `field` names it."""

    @property
    def field(self) -> str | None:
        """The argument's name, with its place in a list, like `limits[2].max`."""
        return self.detail


class GroupNotFound(TokenLimitsError):
    """There is no such group."""


class GroupExists(TokenLimitsError):
    """Another group has that name (names are unique whatever their case)."""


class UnknownUser(TokenLimitsError):
    """There is no user of that id in `auth.users`."""


class UsageNotFound(TokenLimitsError):
    """There is no usage of that id."""


class AlreadySettled(TokenLimitsError):
    """The usage was settled in another way before, or the body of its hold has ended."""


class HoldExpired(TokenLimitsError):
    """The hold has expired, and its period is over or has no room for it any more; nothing was charged."""


class IdempotencyConflict(TokenLimitsError):
    """The idempotency key was used for another request of this user."""


class ServiceUnavailable(TokenLimitsError):
    """Supabase could not be reached, or gave no sensible answer, within the timeout and its retries.

    `retry_after` is how many seconds the server asked to wait, if it did.
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
    """The generation is not allowed; `result` says why, and when it will be."""

    def __init__(self, result: TrackResult) -> None:
        super().__init__(result.error or "The generation is not allowed")
        self.result = result


class LimitExceeded(GenerationDenied):
    """A limit has no room for the cost."""


class NotInGroup(GenerationDenied):
    """The user is in no group that may pay."""


class NoLimitForKind(GenerationDenied):
    """None of the user's groups entitles to this kind."""


HOW_TO_EXPOSE = (
    "Expose the schema that tokenlimits is installed in: on hosted Supabase under Project Settings > Data API > "
    "Exposed schemas, for the Supabase CLI in supabase/config.toml as [api] schemas. If it is installed in another "
    "one, name that: schema=, or TOKENLIMITS_SCHEMA in the environment (without them it is public)."
)
"""What to do when PostgREST refuses the schema; it knows which ones are exposed, and not how to change that."""
