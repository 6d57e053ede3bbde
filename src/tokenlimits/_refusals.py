"""The one table from a server's code to the class of its error."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import (
    HOW_TO_EXPOSE,
    AccessDenied,
    AlreadySettled,
    ConfigurationError,
    GroupChanged,
    GroupExists,
    GroupNotFound,
    HoldExpired,
    IdempotencyConflict,
    InvalidRequest,
    SchemaNotInstalled,
    TokenLimitsError,
    UnknownUser,
    UsageNotFound,
)

BY_CODE: Mapping[str, type[TokenLimitsError]] = {
    "TL001": InvalidRequest,
    "TL002": GroupNotFound,
    "TL003": GroupExists,
    "TL004": UnknownUser,
    "TL005": UsageNotFound,
    "TL006": AlreadySettled,
    "TL007": HoldExpired,
    "TL008": IdempotencyConflict,
    "TL009": ConfigurationError,
    "TL010": ConfigurationError,
    "TL011": GroupChanged,
    "42501": AccessDenied,  # insufficient_privilege
    "42883": SchemaNotInstalled,  # undefined_function
    "3F000": SchemaNotInstalled,  # invalid_schema_name
    "23502": InvalidRequest,  # not_null_violation
    "23503": UnknownUser,  # foreign_key_violation: only memberships refer to a table of others, auth.users
    "23514": InvalidRequest,  # check_violation
    "42P17": ConfigurationError,  # infinite recursion, of a policy in itself
    "54001": ConfigurationError,  # too deep a recursion, of a policy by way of a function
    "PGRST106": ConfigurationError,  # the schema is not exposed
    "PGRST125": ConfigurationError,  # no such path
    "PGRST202": SchemaNotInstalled,  # function not in the schema cache
    "PGRST301": AccessDenied,  # the JWT is not valid
    "PGRST302": AccessDenied,  # anonymous access is off
    "PGRST303": AccessDenied,  # the JWT's claims are not valid
}
"""The class for each SQLSTATE (sql/schema/10_schema.sql lists our own) or PostgREST code."""


_RECURSION = (
    "A policy reads a table whose policy comes back to it. If the project has its own tokenlimits.is_admin(), make it "
    "`security definer`, with `set search_path = pg_catalog, pg_temp`"
)
_HINTS: Mapping[str, str] = {
    "42P17": _RECURSION,
    "54001": _RECURSION,
    "PGRST106": HOW_TO_EXPOSE,
    "PGRST125": "The client's URL must be the project's, like https://abc.supabase.co, without a path",
}


def refusal(status: int, answer: Mapping[str, object]) -> TokenLimitsError:
    """Make the error for a request that the server has refused with this HTTP status and JSON object."""
    text = str(answer.get("message") or answer.get("error") or f"The server answered with status {status}")
    code = answer.get("code")
    # our functions repeat the code in the message, as some servers in between replace the field `code`
    if in_message := re.search(r"\((TL\d{3})\)$", text):
        code = in_message[1]
    code = code if isinstance(code, str) else None
    cls = _class_of(status, code, text)
    # PostgreSQL's hint for 54001 is a larger stack
    theirs = None if code == "54001" else answer.get("hint")
    # a gateway, which knows no code, doesn't know either where the key comes from
    ours = cls.default_hint if theirs is None or code is None else None
    detail = answer.get("details")
    parts = [text, theirs, ours, _HINTS.get(code or "")]
    message = ". ".join(str(part) for part in parts if part).replace(".. ", ". ")
    return cls(message, code=code, detail=None if detail is None else str(detail))


def _class_of(status: int, code: str | None, text: str) -> type[TokenLimitsError]:
    if code == "22023" and re.fullmatch(r'role ".*" does not exist', text):  # the JWT's
        return AccessDenied
    if code is not None and code in BY_CODE:
        return BY_CODE[code]
    if status in (401, 403):
        return AccessDenied
    if code is not None and code.startswith("22"):  # data exceptions: text where a number belongs, \u0000, …
        return InvalidRequest
    return TokenLimitsError
