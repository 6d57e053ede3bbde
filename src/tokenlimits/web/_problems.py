"""Errors as RFC 9457 problem details."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tokenlimits import TrackResult, errors

from . import _ratelimit, _request_id

logger = logging.getLogger("tokenlimits")

MEDIA_TYPE = "application/problem+json"


class FieldProblem(BaseModel):
    """What is wrong with one field of a request."""

    field: str = Field(examples=["limits[0].max"])
    message: str = Field(examples=["Input should be greater than or equal to 0"])


class Problem(BaseModel):
    """Problem details, as RFC 9457 defines them; what may be null is left out then.

    `request_id` is the request's `X-Request-Id`, by which the server's log names it too.
    """

    model_config = ConfigDict(title="Problem")

    type: str = Field(examples=["urn:tokenlimits:problem:group-not-found"])
    title: str = Field(examples=["There is no such group"])
    status: int = Field(examples=[404])
    detail: str | None = Field(None, examples=["There is no group 6b1b…"])
    errors: list[FieldProblem] | None = None
    result: TrackResult | None = None
    request_id: str | None = Field(None, examples=["4f0c2f5b6a1d4c0f9a7e3b8d2c1e0f9a"])


class SignInRequired(Exception):
    """The caller sent no access token, or not a valid one."""


class TooManyRequests(Exception):
    """The caller sent more requests than they may."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many requests")
        self.retry_after = retry_after


class TooLarge(HTTPException):
    """A body has more bytes than are read; as an HTTPException, or FastAPI says that it can't be parsed."""

    def __init__(self, most: int) -> None:
        super().__init__(413, f"A body may have {most:,} bytes here. Send it in parts.")


class TooSlow(HTTPException):
    """A body took too long to arrive."""

    def __init__(self) -> None:
        super().__init__(408, "The body took too long to arrive. Send it again, or in parts.")


class Kind(NamedTuple):
    """What an error is to a caller: its HTTP status, its name as a problem, and to people a title and what to do."""

    error: type[Exception]
    status: int
    name: str
    title: str
    advice: str = ""


_KINDS: Sequence[Kind] = (
    Kind(SignInRequired, 401, "sign-in-required", "Send a valid access token", "Please sign in again."),
    Kind(TooManyRequests, 429, "too-many-requests", "Too many requests", "Please wait a minute."),
    Kind(TooLarge, 413, "too-large", "This is too large", "Send it in parts."),
    Kind(TooSlow, 408, "too-slow", "This took too long to arrive", "Send it again, or in parts."),
    Kind(errors.InvalidRequest, 422, "invalid-request", "The request is not valid"),
    Kind(errors.AccessDenied, 403, "access-denied", "You have no right to do this", "Only admins have."),
    Kind(errors.GroupNotFound, 404, "group-not-found", "There is no such group", "It may have been deleted meanwhile."),
    Kind(errors.UnknownUser, 404, "unknown-user", "There is no such user"),
    Kind(errors.UsageNotFound, 404, "usage-not-found", "There is no such usage"),
    Kind(errors.GroupChanged, 412, "group-changed", "Somebody else changed the group meanwhile"),
    Kind(errors.GroupExists, 409, "group-exists", "Another group has this name"),
    Kind(
        errors.AlreadySettled,
        409,
        "already-settled",
        "The usage was already settled in another way",
        "Reload the page to see it.",
    ),
    Kind(errors.IdempotencyConflict, 409, "idempotency-conflict", "The key was used for another request"),
    Kind(errors.LimitExceeded, 429, "limit-exceeded", "A limit has no room"),
    Kind(errors.NotInGroup, 403, "not-in-group", "The user is in no group that can pay"),
    Kind(errors.NoLimitForKind, 403, "no-limit-for-kind", "No group of the user has a limit for this kind"),
    Kind(errors.ServiceUnavailable, 503, "unavailable", "Supabase can't be reached", "Please try again soon."),
    Kind(
        errors.SchemaNotInstalled,
        503,
        "not-installed",
        "tokenlimits is not installed in the database",
        "Apply sql/tokenlimits.sql to it.",
    ),
    Kind(
        errors.SchemaOutdated,
        503,
        "not-installed",
        "The database has an older version of tokenlimits",
        "Apply the newest sql/tokenlimits.sql to it.",
    ),
    Kind(
        errors.UnreadableValue,
        500,
        "unreadable-value",
        "The database holds a value that can't be read",
        "See the server's log.",
    ),
    Kind(errors.TokenLimitsError, 500, "internal", "The server is not set up correctly", "See the server's log."),
)
# PostgREST's codes for a token that is not valid, or no longer valid
_BAD_TOKEN = ("PGRST301", "PGRST302", "PGRST303")


def is_sign_in_required(error: Exception) -> bool:
    """Whether the caller's token was rejected, here or by the database."""
    return isinstance(error, SignInRequired) or (isinstance(error, errors.AccessDenied) and error.code in _BAD_TOKEN)


def kind_of(error: Exception, also: Sequence[Kind] = ()) -> Kind:
    """Find what an error is to a caller: the one table of errors, statuses and words.

    Args:
        error: The error.
        also: What else may be raised where it was.
    """
    return next(kind for kind in (*also, *_KINDS) if isinstance(error, kind.error))


def headers_of(error: Exception) -> dict[str, str]:
    """Make the headers of the answer for an error."""
    status = kind_of(error).status
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.GenerationDenied):
        headers |= _ratelimit.of_denial(error.result)
    retry_after = 5 if status == 503 else None
    if isinstance(error, errors.ServiceUnavailable | TooManyRequests):
        retry_after = error.retry_after or retry_after
    if retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return headers


def of_error(error: Exception) -> JSONResponse:
    """Make the answer for an error that an endpoint raised."""
    if is_sign_in_required(error):
        error = SignInRequired("The access token is not valid, or has expired.")
    kind = kind_of(error)
    if kind.status == 500:
        logger.error("%s: %s", type(error).__name__, error)
    # the details of the server's own problems are only for its log
    words = error.detail if isinstance(error, HTTPException) else str(error)
    detail = None if kind.status >= 500 else words or None
    fields: list[FieldProblem] | None = None
    if isinstance(error, errors.InvalidRequest) and error.field:
        fields = [FieldProblem(field=error.field, message=str(error))]
    result = error.result if isinstance(error, errors.GenerationDenied) else None
    return _answer(kind.status, kind.name, kind.title, detail, headers_of(error), errors=fields, result=result)


def of_validation(found: Sequence[Any]) -> JSONResponse:
    """Make the answer for a request that FastAPI refused, from what pydantic found."""
    fields = [FieldProblem(field=_path(each["loc"]), message=str(each["msg"])) for each in found]
    kind = kind_of(errors.InvalidRequest(""))
    return _answer(kind.status, kind.name, kind.title, None, {}, errors=fields)


def of_status(status: int, title: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Make the answer for an HTTP error that has no details."""
    return _answer(status, None, title, None, dict(headers or {}))


def _path(place: Sequence[object]) -> str:
    path = ""
    for part in place[1:] if len(place) > 1 else place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _answer(
    status: int, name: str | None, title: str, detail: str | None, headers: dict[str, str], **more: Any
) -> JSONResponse:
    type_ = f"urn:tokenlimits:problem:{name}" if name else "about:blank"
    known = _request_id.current()
    problem = Problem(type=type_, title=title, status=status, detail=detail, request_id=known, **more)
    content = problem.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, status, headers, media_type=MEDIA_TYPE)


# by status, the name and the detail of a problem that may have it
_EXAMPLES: Mapping[int, tuple[str, str]] = {
    400: ("bad-request", ""),
    401: ("sign-in-required", "The access token is not valid, or has expired."),
    403: ("access-denied", "only an admin may do this"),
    404: ("group-not-found", "There is no group of this id."),
    409: ("group-exists", "a group named 'Pro' already exists"),
    412: ("group-changed", "the group 'Pro' was changed meanwhile"),
    413: ("too-large", "A body may have 65,536 bytes here. Send it in parts."),
    422: ("invalid-request", "name: must have 1 to 200 characters"),
    429: ("too-many-requests", "too many requests"),
    503: ("unavailable", ""),
}
_HEADERS: Mapping[int, tuple[str, ...]] = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the problems that an endpoint may answer with, for OpenAPI."""
    return {status: _documented(status) for status in (400, 401, 403, 422, 429, 503, *statuses)}


def _documented(status: int) -> dict[str, Any]:
    name, detail = _EXAMPLES[status]
    title = next((kind.title for kind in _KINDS if kind.name == name), "The body is not JSON")
    example = {"type": f"urn:tokenlimits:problem:{name}", "title": title, "status": status, "detail": detail}
    described: dict[str, Any] = {
        "description": title,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}},
    }
    if headers := _HEADERS.get(status):
        described["headers"] = {name: {"schema": {"type": "string"}} for name in headers}
    return described


def with_headers(response: Response, headers: Mapping[str, str]) -> Response:
    """Add headers that the response doesn't have yet."""
    for name, value in headers.items():
        response.headers.setdefault(name, value)
    return response
