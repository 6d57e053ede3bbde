"""What is final: each refusal as its error, after one request."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx
import pytest
from tests.http.conftest import ANN, PRO, Clock, Server, Shell

from tokenlimits import ConfigurationError, InvalidRequest, ServiceUnavailable, TokenLimitsError
from tokenlimits._refusals import BY_CODE
from tokenlimits.errors import (
    AccessDenied,
    AlreadySettled,
    GroupChanged,
    GroupExists,
    GroupNotFound,
    HoldExpired,
    IdempotencyConflict,
    SchemaNotInstalled,
    SchemaOutdated,
    UnknownUser,
    UsageNotFound,
)

HTML = "<!doctype html><title>Not here</title>"
OURS: dict[str, type[TokenLimitsError]] = {
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
}
MISSING = httpx.Response(
    404, json={"code": "PGRST202", "message": "Could not find the function public.x in the schema cache"}
)


def test_every_code_of_ours_is_here() -> None:
    assert OURS.keys() == {code for code in BY_CODE if code.startswith("TL")}


@pytest.mark.parametrize(("code", "cls"), OURS.items())
def test_a_code_is_its_error(
    shell: Shell, server: Server, clock: Clock, code: str, cls: type[TokenLimitsError]
) -> None:
    body = {"code": code, "message": f"it went wrong ({code})", "details": "cost", "hint": "Do it differently."}
    server.then(httpx.Response(400, json=body))
    with pytest.raises(cls) as caught:
        shell.track()
    assert type(caught.value) is cls
    assert (caught.value.code, caught.value.detail) == (code, "cost")
    assert str(caught.value) == f"it went wrong ({code}). Do it differently."
    if isinstance(caught.value, InvalidRequest):
        assert caught.value.field == "cost"
    assert len(server.requests) == 1
    assert clock.slept == []


@pytest.mark.parametrize("status", [400, 404, 405, 406, 408, 409, 413, 415, 422, 431, 451])
@pytest.mark.parametrize("body", [{"json": {"code": "PGRST999", "message": "no"}}, {"text": HTML}, {}])
def test_no_other_4xx_is_tried_again(
    shell: Shell, server: Server, clock: Clock, status: int, body: dict[str, Any]
) -> None:
    server.then(httpx.Response(status, **body))
    with pytest.raises(TokenLimitsError) as caught:
        shell.track()
    assert not isinstance(caught.value, ServiceUnavailable)
    assert len(server.requests) == 1
    assert clock.slept == []


@pytest.mark.parametrize("policy", ["raise", "allow", "deny"])
@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(401, json={"message": "Invalid API key", "hint": "Double check your Supabase API key."}),
        httpx.Response(401, json={"code": "PGRST301", "message": "JWT expired"}),
        httpx.Response(401, json={"code": "42501", "message": "permission denied for function track_generation"}),
        httpx.Response(401, text=HTML),
        httpx.Response(403, text=HTML),
        httpx.Response(403, json={"code": "42501", "message": "only an admin may do this", "hint": "Sign in."}),
    ],
    ids=["gateway", "expired", "anon", "html", "forbidden", "no admin"],
)
def test_a_wrong_key_is_denied_at_once(
    shell: Shell, server: Server, clock: Clock, answer: httpx.Response, policy: str
) -> None:
    server.then(answer)
    with pytest.raises(AccessDenied) as caught:
        shell.track(on_unavailable=policy)
    assert len(server.requests) == 1
    assert clock.slept == []
    # and then what to do
    assert "Sign in." in str(caught.value) or "SUPABASE_SECRET_KEY" in str(caught.value)


def test_a_denial_for_a_reason_of_a_newer_database_stays_one(shell: Shell, server: Server) -> None:
    denial = {"allowed": False, "reason": "suspended", "error": "Suspended.", "kind": "image", "cost": 1}
    server.then(httpx.Response(200, json=denial))
    result = shell.track(on_unavailable="allow")
    assert (result.allowed, result.reason, len(server.requests)) == (False, "suspended", 1)


@pytest.mark.parametrize("status", [404, 301, 405])
def test_a_page_where_supabase_should_be_is_a_wrong_url(shell: Shell, server: Server, status: int) -> None:
    server.then(httpx.Response(status, text=HTML, headers={"Location": "https://elsewhere.example"}))
    with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
        shell.track()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 521, 525])
@pytest.mark.parametrize("body", [{"text": HTML}, {"json": {"message": "An unexpected error occurred"}}])
def test_a_broken_server_is_unavailable(shell: Shell, server: Server, status: int, body: dict[str, Any]) -> None:
    server.then(httpx.Response(status, **body))
    with pytest.raises(ServiceUnavailable, match=str(status)):
        shell.track()
    assert len(server.requests) == 1


class TestMissingFunction:
    @pytest.mark.parametrize("policy", ["raise", "allow", "deny"])
    def test_where_nothing_is_installed(self, shell: Shell, server: Server, clock: Clock, policy: str) -> None:
        server.then(MISSING, MISSING)
        with pytest.raises(SchemaNotInstalled, match=r"sql/tokenlimits\.sql") as caught:
            shell.track(on_unavailable=policy)
        assert "notify pgrst" in str(caught.value)
        assert server.functions == ["track_generation", "tokenlimits_version"]
        assert clock.slept == []

    @pytest.mark.parametrize("policy", ["raise", "allow", "deny"])
    def test_where_an_older_one_is_installed(self, shell: Shell, server: Server, policy: str) -> None:
        server.then(MISSING)
        with pytest.raises(SchemaOutdated, match=r"track_generation.*sql/tokenlimits\.sql") as caught:
            shell.track(on_unavailable=policy)
        assert caught.value.code == "PGRST202"
        assert server.functions == ["track_generation", "tokenlimits_version"]

    def test_of_groups_too(self, shell: Shell, server: Server) -> None:
        server.then(MISSING, MISSING)
        with pytest.raises(SchemaNotInstalled):
            shell.groups("list")

    def test_while_the_server_goes_away(self, shell: Shell, server: Server) -> None:
        server.then(MISSING, *[httpx.ConnectError("refused")] * 100)
        with pytest.raises(SchemaNotInstalled):
            shell.track(on_unavailable="allow")

    def test_with_a_key_that_may_not_ask(self, shell: Shell, server: Server) -> None:
        server.then(MISSING, httpx.Response(401, json={"code": "42501", "message": "permission denied"}))
        with pytest.raises(AccessDenied):
            shell.track()


# a database in trouble, as PostgREST passes it on; each of its own kind
IN_TROUBLE = {
    code or "no code": httpx.Response(status, json={"code": code, "details": None, "hint": None, "message": ""})
    for status, code in [(400, ""), (405, "25006"), (503, "53100"), (500, "55P03"), (500, "57014"), (503, "57P01")]
}


class TestOnUnavailable:
    @pytest.fixture(params=["connect", "garbage", "busy", *IN_TROUBLE])
    def outage(self, request: pytest.FixtureRequest, server: Server) -> None:
        answers: dict[str, httpx.Response | Exception] = {
            "connect": httpx.ConnectError("refused"),
            "garbage": httpx.Response(200, text=HTML),
            "busy": httpx.Response(429, headers={"Retry-After": "60"}),
            **IN_TROUBLE,
        }
        server.then(*[answers[request.param]] * 100)

    @pytest.mark.usefixtures("outage")
    @pytest.mark.parametrize("method", ["track", "check", "reserve"])
    def test_raise(self, shell: Shell, method: str) -> None:
        with pytest.raises(ServiceUnavailable):
            shell.limits(method, ANN, "image", on_unavailable="raise")

    @pytest.mark.usefixtures("outage")
    @pytest.mark.parametrize("method", ["track", "check", "reserve"])
    def test_allow(self, shell: Shell, method: str) -> None:
        result = shell.limits(method, ANN, "video", 8, on_unavailable="allow")
        assert result
        assert result.raise_if_denied() is result
        assert (result.reason, result.usage_id, result.kind, result.cost) == ("unavailable", None, "video", 8)
        assert result.error is None

    @pytest.mark.usefixtures("outage")
    @pytest.mark.parametrize("method", ["track", "check", "reserve"])
    def test_deny(self, shell: Shell, method: str) -> None:
        result = shell.limits(method, ANN, "video", 8, on_unavailable="deny")
        assert not result
        assert (result.reason, result.usage_id, result.cost) == ("unavailable", None, 8)
        assert "could not be reached" in result.error

    @pytest.mark.parametrize("code", IN_TROUBLE)
    @pytest.mark.parametrize("function", ["commit", "release"])
    def test_a_settlement_that_gets_no_answer(self, shell: Shell, server: Server, function: str, code: str) -> None:
        server.then(*[IN_TROUBLE[code]] * 200)
        result = shell.limits(function, ANN, on_unavailable="allow")
        assert (result.allowed, result.reason, result.usage_id) == (True, "unavailable", UUID(ANN))
        with pytest.raises(ServiceUnavailable) as caught:
            shell.limits(function, ANN, on_unavailable="deny")
        assert caught.value.code == ("" if code == "no code" else code)

    def test_it_says_when(self, shell: Shell, server: Server) -> None:
        server.then(httpx.Response(429, headers={"Retry-After": "60"}))
        assert shell.track(on_unavailable="deny").retry_after == 60

    @pytest.mark.usefixtures("outage")
    @pytest.mark.parametrize("policy", ["allow", "deny"])
    def test_is_not_for_what_must_be_known(self, shell: Shell, policy: str) -> None:
        with pytest.raises(ServiceUnavailable):
            shell.limits("usage", ANN, on_unavailable=policy)
        with pytest.raises(ServiceUnavailable):
            shell.limits("record", ANN, "image", on_unavailable=policy)

    @pytest.mark.parametrize("policy", ["allow", "deny"])
    def test_is_not_for_mistakes(self, shell: Shell, server: Server, policy: str) -> None:
        server.then(httpx.Response(400, json={"code": "TL008", "message": "another request"}))
        with pytest.raises(IdempotencyConflict):
            shell.track(on_unavailable=policy)
        with pytest.raises(InvalidRequest):
            shell.limits("track", "ann", "image", on_unavailable=policy)
        server.then(httpx.Response(404, text=HTML))
        with pytest.raises(ConfigurationError):
            shell.track(on_unavailable=policy)

    def test_is_not_for_a_missing_variable(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SUPABASE_SECRET_KEY")
        with pytest.raises(ConfigurationError, match="SUPABASE_SECRET_KEY"):
            shell.track(on_unavailable="allow")


def test_groups_that_are_not_there(shell: Shell, server: Server) -> None:
    with pytest.raises(GroupNotFound, match=PRO):
        shell.groups("get", PRO)
    with pytest.raises(GroupNotFound, match="'pro'"):
        shell.groups("get_by_name", "pro")
    assert len(server.requests) == 2
