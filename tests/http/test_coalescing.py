"""Calls that travel together, when the server misbehaves."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from tests.http.conftest import ANN, USUAL, Clock, Server

from tokenlimits import AsyncTokenLimits, ServiceUnavailable, TokenLimits, TrackResult
from tokenlimits._core import workers
from tokenlimits.errors import AccessDenied, SchemaOutdated


def two_at_once(**options: Any) -> list[Any]:
    async def main() -> list[Any]:
        async with AsyncTokenLimits.from_env(coalesce=True, **options) as limits:
            calls = limits.track(ANN, "image"), limits.track(ANN, "image", 2)
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(main())


def answers(request: httpx.Request) -> httpx.Response:
    one = USUAL["track_generation"]
    return httpx.Response(200, json=[{**one, "reason": None}, {**one, "reason": None, "cost": 2}])


FAILURES = {
    "502": httpx.Response(502),
    "lost": httpx.ReadError("connection reset by peer"),
    "too few": httpx.Response(200, json=[USUAL["track_generation"]]),
    "no list": httpx.Response(200, json={"allowed": True}),
    "garbage": httpx.Response(200, text="<title>Sign in to the hotel</title>"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_batch_is_sent_again_with_the_same_keys(server: Server, failure: Any) -> None:
    server.then(failure, answers)
    results = two_at_once()
    assert [result.cost for result in results if isinstance(result, TrackResult)] == [1, 2]
    assert server.functions == ["track_generations"] * 2
    first, second = server.params
    assert first == second
    assert len({request["idempotency_key"] for request in first["p_requests"]}) == 2


def test_a_database_that_has_no_batches_yet_is_outdated(server: Server) -> None:
    server.then(httpx.Response(404, json={"code": "PGRST202", "message": "no function"}))
    errors = two_at_once()
    assert [type(error) for error in errors] == [SchemaOutdated] * 2
    assert "track_generations" in str(errors[0])


def test_a_wrong_key_is_everybodys(server: Server) -> None:
    server.then(httpx.Response(401, json={"message": "Invalid API key"}))
    errors = two_at_once(on_unavailable="allow")
    assert [type(error) for error in errors] == [AccessDenied] * 2
    assert errors[0] is not errors[1]


def test_without_the_service_each_gets_their_own_answer(server: Server) -> None:
    server.then(*[httpx.Response(503)] * 50)
    results = two_at_once(on_unavailable="deny", timeout=1)
    assert [(result.reason, result.cost) for result in results] == [("unavailable", 1), ("unavailable", 2)]


def test_a_leader_has_the_time_that_is_left_to_them(server: Server, clock: Clock) -> None:
    """A call of the transport may be given less than its own."""
    server.then(*[httpx.ConnectError("connection refused")] * 50)
    with TokenLimits.from_env(timeout=10) as limits, pytest.raises(ServiceUnavailable):
        limits._transport.send(workers.track(ANN, "image", 1, None, None, None), 2.0)
    assert 0 < sum(clock.slept) < 2
