"""Errors: the registry from a server's code to a class, what they carry, and that they travel between processes."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from tokenlimits import (
    ConfigurationError,
    GenerationDenied,
    InvalidRequest,
    LimitExceeded,
    ServiceUnavailable,
    TokenLimitsError,
    TrackResult,
    errors,
)
from tokenlimits._refusals import BY_CODE, refusal
from tokenlimits.errors import (
    HOW_TO_EXPOSE,
    AccessDenied,
    AlreadySettled,
    GroupChanged,
    GroupExists,
    GroupNotFound,
    HoldExpired,
    IdempotencyConflict,
    SchemaNotInstalled,
    UnknownUser,
    UsageNotFound,
)

SQL = Path(__file__).parents[2] / "sql" / "schema"
# caught inside the SQL, never leaves it
INNER = {"TL099"}

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, TokenLimitsError)]
RESULT = TrackResult(allowed=False, reason="limit_exceeded", error="Image limit exceeded", kind="image", cost=1)

EXPECTED: dict[str, type[TokenLimitsError]] = {
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
    "42501": AccessDenied,
    "42883": SchemaNotInstalled,
    "PGRST202": SchemaNotInstalled,
    "PGRST301": AccessDenied,
    "22P02": InvalidRequest,
    "22003": InvalidRequest,
    "23514": InvalidRequest,
    "P0001": TokenLimitsError,
    "PGRST100": TokenLimitsError,
}


def test_the_sql_lists_the_codes_of_the_registry() -> None:
    listed = set(re.findall(r"^--   (TL\d{3})  ", (SQL / "10_schema.sql").read_text(), re.MULTILINE))
    assert listed - INNER == {code for code in BY_CODE if code.startswith("TL")}


def test_the_sql_raises_no_other_codes() -> None:
    raised = {code for file in SQL.rglob("*.sql") for code in re.findall(r"'(TL\d{3})'", file.read_text())}
    assert raised - INNER <= BY_CODE.keys()


@pytest.mark.parametrize(("code", "cls"), EXPECTED.items())
def test_a_code_is_a_class(code: str, cls: type[TokenLimitsError]) -> None:
    error = refusal(400, {"code": code, "message": "no", "details": "the detail", "hint": "do this"})
    assert type(error) is cls
    assert (error.code, error.detail) == (code, "the detail")
    assert str(error) == "no. do this"


def test_a_schema_that_is_not_exposed_says_how_to_expose_it_whatever_the_server_hints() -> None:
    hint = "Only the following schemas are exposed: public"
    error = refusal(406, {"code": "PGRST106", "message": "Invalid schema: limits", "hint": hint})
    assert type(error) is ConfigurationError
    assert str(error) == f"Invalid schema: limits. {hint}. {HOW_TO_EXPOSE}"


def test_each_code_of_ours_is_expected_here() -> None:
    assert {code for code in BY_CODE if code.startswith("TL")} <= EXPECTED.keys()


def test_a_code_in_the_message_is_one_too() -> None:
    error = refusal(500, {"code": "SUP", "message": "there is no group x (TL002)"})
    assert type(error) is GroupNotFound
    assert error.code == "TL002"


@pytest.mark.parametrize("status", [401, 403])
def test_without_a_code_the_status_decides(status: int) -> None:
    error = refusal(status, {"error": "no"})
    assert type(error) is AccessDenied
    assert str(error) == f"no. {AccessDenied.default_hint}"


@pytest.mark.parametrize("answer", [{}, {"code": 7}, {"message": None, "hint": "", "details": None}])
def test_an_answer_that_says_nothing_still_has_a_text(answer: dict[str, object]) -> None:
    error = refusal(418, answer)
    assert str(error) == "The server answered with status 418"
    assert (error.code, error.detail) == (None, None)


def test_an_invalid_request_names_the_field() -> None:
    error = refusal(400, {"code": "TL001", "message": "limits[2].max: no", "details": "limits[2].max"})
    assert isinstance(error, InvalidRequest)
    assert isinstance(error, ValueError)
    assert error.field == "limits[2].max"


def example(cls: type[TokenLimitsError]) -> TokenLimitsError:
    if issubclass(cls, GenerationDenied):
        return cls(RESULT)
    more: dict[str, Any] = {"retry_after": 7.5} if cls is ServiceUnavailable else {}
    return cls("what happened", code="TL001", detail="the detail", **more)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_they_pickle_with_every_field(cls: type[TokenLimitsError], protocol: int) -> None:
    error = example(cls)
    error.__cause__ = ZeroDivisionError()
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.args == error.args


def test_a_denial_carries_its_result() -> None:
    error = LimitExceeded(RESULT)
    assert str(error) == RESULT.error
    assert pickle.loads(pickle.dumps(error)).result == RESULT


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_they_are_public_documented_and_of_one_base(cls: type[TokenLimitsError]) -> None:
    assert cls.__name__ in errors.__all__
    assert cls.__doc__


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_their_repr_shows_the_message(cls: type[TokenLimitsError]) -> None:
    assert str(example(cls)) in repr(example(cls))


@pytest.mark.parametrize(
    ("status", "answer", "cls", "says"),
    [
        (400, {"code": "22023", "message": 'role "editor" does not exist'}, AccessDenied, "secret"),
        (400, {"code": "22023", "message": "cost: must be a number"}, InvalidRequest, "must be a number"),
        (500, {"code": "54001", "message": "stack depth limit exceeded"}, ConfigurationError, "`security definer`"),
        (500, {"code": "42P17", "message": "infinite recursion"}, ConfigurationError, "`security definer`"),
        (404, {"code": "PGRST125", "message": "Invalid path"}, ConfigurationError, "without a path"),
    ],
)
def test_what_a_setup_comes_to(status: int, answer: dict[str, str], cls: type[Exception], says: str) -> None:
    error = refusal(status, answer | {"hint": "Increase max_stack_depth"} if status == 500 else answer)
    assert type(error) is cls
    assert says in str(error)
    assert answer["code"] != "54001" or "max_stack_depth" not in str(error)
