"""What each HTTP answer means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlimits import ConfigurationError, InvalidRequest, ServiceUnavailable, TokenLimitsError
from tokenlimits._core import answers
from tokenlimits._core.call import Call
from tokenlimits._core.retry import Transient
from tokenlimits.errors import AccessDenied, SchemaNotInstalled

CALL: Call[int] = Call("count_things", {}, lambda answer: int(answer["things"]))


def read(status: int, body: object = None, *, text: str | None = None, **headers: str) -> int:
    content = json.dumps(body) if text is None else text
    return answers.read(CALL, status, headers, content.encode())


@pytest.mark.parametrize("status", [200, 201, 206])
def test_an_answer_is_parsed(status: int) -> None:
    assert read(status, {"things": 3}) == 3


HTML = "<!doctype html><title>Sign in to the hotel's network</title>"


@pytest.mark.parametrize(
    "text",
    [
        HTML,
        "",
        '{"things": ',
        "null",
        "[]",
        '{"things": "many"}',
        '{"others": 3}',
        "\x00",
        "[" * 100_000,
        "NaN",
        '{"things": ' + "9" * 5_000 + "}",
    ],
    ids=lambda text: text[:20],
)
def test_garbage_is_worth_another_try(text: str) -> None:
    with pytest.raises(Transient, match="status 200, but the answer is not one of count_things") as caught:
        read(200, text=text)
    assert not caught.value.harmless


def test_what_a_parser_refuses_is_final() -> None:
    def refuse(_: object) -> int:
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        answers.read(Call("count_things", {}, refuse), 200, {}, b"{}")


@pytest.mark.parametrize("status", [301, 302, 400, 404, 405, 406, 418, 421])
@pytest.mark.parametrize("text", [HTML, "", "[]", "null", '"no"'])
def test_a_refusal_that_is_not_supabases_is_a_wrong_url(status: int, text: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"status {status}.*SUPABASE_URL"):
        read(status, text=text)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("text", [HTML, "", "[]", '{"message": "Invalid API key", "hint": "Check it."}', '{"code": 7}'])
def test_a_wrong_key_is_denied(status: int, text: str) -> None:
    with pytest.raises(AccessDenied):
        read(status, text=text)


def test_a_gateways_message_and_hint_are_passed_on_with_where_the_key_comes_from() -> None:
    body = {"message": "Invalid API key", "hint": "Double check your Supabase API key."}
    says = r"^Invalid API key\. Double check your Supabase API key\. Workers need .* SUPABASE_SECRET_KEY or"
    with pytest.raises(AccessDenied, match=says):
        read(401, body)


@pytest.mark.parametrize("status", [500, 501, 521, 525, 530])
@pytest.mark.parametrize(
    "text", [HTML, "", "[]", '{"message": "worker boot error"}', '{"code": null}', '{"code": 500}']
)
def test_a_broken_server_is_unavailable(status: int, text: str) -> None:
    with pytest.raises(ServiceUnavailable, match=rf"count_things with status {status} .*\. Look at .* logs"):
        read(status, text=text)


# what the service says of itself, and whether what was asked may have been done
TROUBLES = {
    "": (400, "went away", False),
    "08006": (503, "connection", False),
    "25006": (405, "read-only", True),
    "40001": (500, "rolled back", True),
    "40P01": (500, "rolled back", True),
    "53100": (503, "disk is full", True),
    "53200": (503, "resources", True),
    "53300": (503, "no free connection", True),
    "55P03": (500, "holds a lock", True),
    "57014": (500, "took longer", True),
    "57P01": (503, "shuts down", False),
    "57P02": (500, "shuts down", False),
    "57P03": (503, "starting up", True),
    "58030": (500, "machine", True),
    "PGRST000": (503, "not there", True),
    "PGRST003": (504, "waited too long", True),
}


@pytest.mark.parametrize("code", TROUBLES)
def test_a_database_in_trouble_is_worth_another_try(code: str) -> None:
    status, words, harmless = TROUBLES[code]
    with pytest.raises(Transient, match=rf"status {status}.*{words}") as caught:
        read(status, {"code": code, "details": None, "hint": None, "message": ""})
    assert (caught.value.code, caught.value.harmless) == (code, harmless)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gateway_without_a_code_refuses_the_key(status: int) -> None:
    with pytest.raises(AccessDenied):
        read(status, {"code": "", "message": "Unauthorized"})


def test_a_result_has_no_trouble_whatever_its_fields_are_called() -> None:
    assert read(200, {"things": 3, "code": "57014"}) == 3


def test_a_bug_on_the_server_is_not() -> None:
    with pytest.raises(TokenLimitsError, match="division by zero") as caught:
        read(500, {"code": "XX000", "message": "division by zero"})
    assert type(caught.value) is TokenLimitsError


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_known_code_means_the_same_with_any_status(status: int) -> None:
    with pytest.raises(SchemaNotInstalled):
        read(status, {"code": "PGRST202", "message": "Could not find the function"})


@pytest.mark.parametrize("status", [429, 502, 503, 504, 520])
@pytest.mark.parametrize("text", [HTML, "", '{"code": "PGRST003"}'])
def test_a_server_that_is_busy_is_worth_another_try(status: int, text: str) -> None:
    with pytest.raises(Transient, match=str(status)):
        read(status, text=text)


def test_outdated_names_the_function() -> None:
    error = answers.outdated("reserve_generation", SchemaNotInstalled("no", code="PGRST202"))
    assert "no function reserve_generation" in str(error)
    assert "sql/tokenlimits.sql" in str(error)
    assert error.code == "PGRST202"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["code", "message", "hint", "details"]), inner),
)


@settings(deadline=None)
@given(status=st.integers(100, 599), body=JSON.map(json.dumps) | st.text(), headers=st.just(dict[str, str]()))
def test_whatever_comes_is_understood(status: int, body: str, headers: Mapping[str, Any]) -> None:
    """An answer of whatever kind is a result, worth another try, or an error of ours; nothing else gets out."""
    with suppress(Transient, TokenLimitsError):
        answers.read(CALL, status, headers, body.encode("utf-8", "surrogatepass"))
