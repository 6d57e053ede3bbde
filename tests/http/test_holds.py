"""What a worker gets when Supabase can't be reached while it holds: at the entry, at the end, and step by step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
import pytest
from tests.http.conftest import ANN, WHEN, Server, Shell

from tokenlimits import AsyncTokenLimits, GenerationDenied, Hold, ServiceUnavailable, TokenLimits, TrackResult

USAGE = "0197f0a0-0000-7000-8000-000000000009"
HELD = {
    "allowed": True,
    "usage_id": USAGE,
    "status": "reserved",
    "expires_at": WHEN,
    "kind": "image",
    "cost": 8,
}
SETTLED = {
    "commit_generation": HELD | {"status": "committed"},
    "release_generation": HELD | {"status": "released"},
    "refund_generation": HELD | {"status": "refunded"},
}


def held(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=HELD)


def settled(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=SETTLED[request.url.path.rpartition("/")[2]])


def lost(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("connection reset by peer", request=request)


DOWN = [lost] * 100


class Worker:
    """Runs a body in a generation of one colour."""

    def __init__(self, colour: str) -> None:
        self.colour = colour

    def run(self, body: Callable[[Hold], object] = lambda hold: None, **options: Any) -> Hold:
        policy = {"on_unavailable": options.pop("on_unavailable", "raise")}
        if self.colour == "async":
            return asyncio.run(self._arun(body, policy, options))
        with TokenLimits.from_env(**policy) as limits, limits.generation(ANN, "image", cost=8, **options) as hold:
            body(hold)
        return hold

    async def _arun(self, body: Callable[[Hold], object], policy: Any, options: dict[str, Any]) -> Hold:
        async with (
            AsyncTokenLimits.from_env(**policy) as limits,
            limits.generation(ANN, "image", cost=8, **options) as hold,
        ):
            body(hold)
        return hold


@pytest.fixture
def worker(shell: Shell) -> Worker:
    return Worker(shell.colour)


class TestLostAnswers:
    def test_of_reserve_repeat_the_same_key(self, worker: Worker, server: Server) -> None:
        server.then(lost, lost, held, settled)
        worker.run()
        assert server.functions == ["reserve_generation"] * 3 + ["commit_generation"]
        assert server.params[0] == server.params[1] == server.params[2]
        assert UUID(server.params[0]["p_idempotency_key"]).version == 7
        assert server.params[0]["p_ttl"] == 3600

    def test_of_reserve_repeat_the_callers_key(self, worker: Worker, server: Server) -> None:
        server.then(lost, held, settled)
        worker.run(idempotency_key="job-1")
        assert [params.get("p_idempotency_key") for params in server.params] == ["job-1", "job-1", None]

    def test_of_commit_repeat_it(self, worker: Worker, server: Server) -> None:
        server.then(held, lost, lost, settled)
        assert worker.run(lambda hold: hold.commit(cost=5)).status == "committed"
        assert server.params[1:] == [{"p_usage_id": USAGE, "p_cost": 5}] * 3

    def test_of_release_repeat_it(self, worker: Worker, server: Server) -> None:
        server.then(held, lost, settled)
        with pytest.raises(KeyError):
            worker.run(fail)
        assert server.functions[1:] == ["release_generation"] * 2

    @pytest.mark.parametrize("method", ["commit", "release", "refund"])
    def test_of_a_step_repeat_it(self, shell: Shell, server: Server, method: str) -> None:
        server.then(lost, settled)
        assert shell.limits(method, USAGE).usage_id == UUID(USAGE)
        assert server.params[0] == server.params[1]

    def test_of_a_refund_by_an_admin_repeat_it(self, shell: Shell, server: Server) -> None:
        server.then(lost, settled)
        assert shell.groups("refund", USAGE).status == "refunded"


def fail(hold: Hold) -> None:
    raise KeyError("the body's")


class TestDown:
    def test_at_the_entry(self, worker: Worker, server: Server) -> None:
        server.then(*DOWN)
        with pytest.raises(ServiceUnavailable, match="reserve_generation"):
            worker.run(lambda _: pytest.fail("the body ran"))

    def test_at_the_entry_and_denied(self, worker: Worker, server: Server) -> None:
        server.then(*DOWN)
        with pytest.raises(GenerationDenied) as caught:
            worker.run(lambda _: pytest.fail("the body ran"), on_unavailable="deny")
        assert caught.value.result.reason == "unavailable"

    def test_at_the_entry_and_allowed(self, worker: Worker, server: Server) -> None:
        server.then(*DOWN)
        seen: list[Any] = []

        def body(hold: Hold) -> None:
            hold.used(3)
            seen.append((hold.usage_id, hold.status, hold.expires_at, hold.cost))

        hold = worker.run(body, on_unavailable="allow")
        assert seen == [(None, None, None, 8)]
        assert set(server.functions) == {"reserve_generation"}
        assert hold.result == TrackResult(allowed=True, reason="unavailable", kind="image", cost=8)
        sent = len(server.requests)
        with pytest.raises(KeyError) as caught:
            worker.run(fail, on_unavailable="allow")
        assert not hasattr(caught.value, "__notes__")
        assert set(server.functions[sent:]) == {"reserve_generation"}

    @pytest.mark.parametrize("policy", ["raise", "deny"])
    def test_after_a_good_body(self, worker: Worker, server: Server, policy: str) -> None:
        server.then(held, *DOWN)
        with pytest.raises(ServiceUnavailable, match="commit_generation") as caught:
            worker.run(lambda hold: setattr(hold, "returned", "a film"), on_unavailable=policy)
        assert USAGE in caught.value.__notes__[0]
        assert caught.value.returned == "a film"
        assert isinstance(caught.value.__cause__, httpx.ReadError)

    def test_after_a_good_body_and_allowed(self, worker: Worker, server: Server) -> None:
        server.then(held, *DOWN)
        hold = worker.run(lambda hold: hold.commit(cost=5), on_unavailable="allow")
        assert hold.result == TrackResult(
            allowed=True, reason="unavailable", usage_id=UUID(USAGE), kind="image", cost=5
        )

    @pytest.mark.parametrize("used", [0, 3])
    def test_after_a_bad_body(
        self, worker: Worker, server: Server, used: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.then(held, *DOWN)

        def body(hold: Hold) -> None:
            hold.used(used)
            raise KeyError("the body's")

        with pytest.raises(KeyError, match="the body's") as caught:
            worker.run(body)
        (note,) = caught.value.__notes__
        assert USAGE in note
        assert "expires at 2026-03-01 12:00:00" in note
        assert ("commit" if used else "release") + "_generation" in note
        assert [record.levelname for record in caplog.records if "could not settle" in record.message] == ["ERROR"]
        assert caplog.records[-1].name == "tokenlimits"

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
    def test_never_replaces_what_ended_the_body(
        self, worker: Worker, server: Server, error: type[BaseException]
    ) -> None:
        server.then(held, *DOWN)

        def body(hold: Hold) -> None:
            raise error

        with pytest.raises(error):
            worker.run(body)
        assert "release_generation" in server.functions

    @pytest.mark.parametrize(
        ("status", "answer"),
        [
            (400, {"code": "TL005", "message": "there is no usage (TL005)"}),
            (401, {"message": "Invalid API key"}),
            (404, {"code": "PGRST202", "message": "no such function"}),
            (500, {"code": "XX000", "message": "internal error"}),
        ],
    )
    def test_a_refusal_after_a_bad_body(
        self, worker: Worker, server: Server, status: int, answer: dict[str, str]
    ) -> None:
        server.then(held, *(lambda _: httpx.Response(status, json=answer) for _ in range(2)))
        with pytest.raises(KeyError, match="the body's") as caught:
            worker.run(fail)
        assert len(caught.value.__notes__) == 1

    def test_what_is_not_ours_after_a_bad_body(self, worker: Worker, server: Server) -> None:
        server.then(held, RuntimeError("odd"))
        with pytest.raises(KeyError, match="the body's") as caught:
            worker.run(fail)
        assert "odd" in caught.value.__notes__[0]

    @pytest.mark.parametrize("method", ["commit", "release", "refund"])
    def test_step_by_step(self, shell: Shell, server: Server, method: str) -> None:
        server.then(*DOWN)
        with pytest.raises(ServiceUnavailable):
            shell.limits(method, USAGE)
        if method == "refund":
            with pytest.raises(ServiceUnavailable):
                shell.limits(method, USAGE, on_unavailable="allow")
        else:
            answer = shell.limits(method, USAGE, on_unavailable="allow")
            assert (answer.allowed, answer.reason, str(answer.usage_id)) == (True, "unavailable", USAGE)

    def test_logs_no_secret(self, worker: Worker, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        server.then(held, *DOWN)
        with caplog.at_level(logging.DEBUG), pytest.raises(KeyError) as caught:
            worker.run(fail)
        assert "sb_secret" not in caplog.text + "".join(caught.value.__notes__)


class TestCancelled:
    def test_while_the_settlement_fails(self, server: Server) -> None:
        """It is waited for, as long as the client's timeout lasts, and told beside the cancellation."""
        server.then(held)
        sent = asyncio.Event()

        async def main() -> None:
            loop_problems: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_problems.append(context))
            async with AsyncTokenLimits.from_env() as limits:

                async def work() -> None:
                    async with limits.generation(ANN, "image", cost=8):
                        task.cancel()  # arrives at the next await, which is the settlement's
                        server.then(*DOWN)
                        sent.set()

                task = asyncio.create_task(work())
                with pytest.raises(asyncio.CancelledError) as caught:
                    await task
                assert any(USAGE in note for each in _chain(caught.value) for note in getattr(each, "__notes__", ()))
            assert loop_problems == []

        asyncio.run(main(), debug=True)
        assert "commit_generation" in server.functions


def _chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_chain(error.__context__)]
