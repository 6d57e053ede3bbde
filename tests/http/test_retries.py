"""What is retried, how often, after which wait, and what the caller gets in the end."""

from __future__ import annotations

import logging
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from tests.http.conftest import ANN, GROUP, PRO, URL, USUAL, Clock, Server, Shell

from tokenlimits import ServiceUnavailable, TokenLimitsError
from tokenlimits._drivers import bodies

HTML = "<!doctype html><title>502 Bad Gateway</title>"
LOST: dict[str, Callable[[], Exception]] = {
    "read timeout": lambda: httpx.ReadTimeout("timed out"),
    "write timeout": lambda: httpx.WriteTimeout("timed out"),
    "read error": lambda: httpx.ReadError("connection reset by peer"),
    "write error": lambda: httpx.WriteError("broken pipe"),
    "closed": lambda: httpx.CloseError("closed"),
    "disconnected": lambda: httpx.RemoteProtocolError("Server disconnected without sending a response."),
    "undecodable": lambda: httpx.DecodingError("incorrect header check"),
    "proxy": lambda: httpx.ProxyError("503 from the proxy"),
}
NEVER_SENT: dict[str, Callable[[], Exception]] = {
    "connect error": lambda: httpx.ConnectError("connection refused"),
    "connect timeout": lambda: httpx.ConnectTimeout("timed out"),
    "pool timeout": lambda: httpx.PoolTimeout("no connection was free"),
}
GARBAGE = {
    "html": httpx.Response(200, text="<title>Sign in to the hotel</title>"),
    "empty": httpx.Response(200),
    "truncated": httpx.Response(200, text='{"allowed": true, "kind": "ima'),
    "null": httpx.Response(200, json=None),
    "a list": httpx.Response(200, json=[1, 2]),
    "another shape": httpx.Response(200, json={"added": 3}),
}

# the database went away: perhaps before it committed, perhaps after
AROUND_A_COMMIT = [
    httpx.Response(400, json={"code": "", "details": None, "hint": None, "message": ""}),
    httpx.Response(503, json={"code": "57P01", "message": "terminating connection due to administrator command"}),
    httpx.Response(503, json={"code": "08006", "message": "connection failure"}),
]

FAILURES = [
    *(pytest.param(error, id=name) for name, error in (LOST | NEVER_SENT).items()),
    *(pytest.param(lambda status=s: httpx.Response(status, text=HTML), id=str(s)) for s in (502, 503, 504, 520)),
    *(pytest.param(lambda answer=a: answer, id=name) for name, a in GARBAGE.items()),
]

# what may not be sent again after a lost answer, as methods of GroupManager
NOT_RETRY_SAFE: dict[str, tuple[Any, ...]] = {
    "create": ("Pro",),
    "delete": (PRO,),
    "move_member": (ANN,),
    "reset_usage": (PRO,),
}


def not_retry_safe(shell: Shell, method: str, **options: Any) -> Any:
    if method == "move_member":
        options |= {"from_": PRO, "to": PRO}
    return shell.groups(method, *NOT_RETRY_SAFE[method], **options)


@pytest.fixture(params=NOT_RETRY_SAFE)
def unsafe(request: pytest.FixtureRequest) -> str:
    return request.param


class Ledger:
    """A database that commits what it is sent, once per key, whether its answer arrives or not."""

    def __init__(self, *, lose: int, answer: httpx.Response | None = None) -> None:
        self.usages: dict[str, str] = {}
        self._lose = lose
        self._answer = answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        key = httpx.Response(200, content=request.content).json()["p_idempotency_key"]
        replayed = key in self.usages
        usage_id = self.usages.setdefault(key, f"0197f0a0-0000-7000-8000-{len(self.usages):012}")
        if self._lose:
            self._lose -= 1
            if self._answer is not None:
                return self._answer
            raise httpx.ReadError("connection reset by peer", request=request)
        answer = USUAL["track_generation"] | {"usage_id": usage_id, "replayed": replayed, "remaining": 7}
        return httpx.Response(200, json=answer)


class TestLostAnswer:
    @pytest.mark.parametrize("answer", [None, *AROUND_A_COMMIT])
    def test_one_charge_and_the_first_calls_answer(
        self, shell: Shell, server: Server, answer: httpx.Response | None
    ) -> None:
        ledger = Ledger(lose=2, answer=answer)
        server.then(ledger, ledger, ledger)
        result = shell.track()
        assert len(ledger.usages) == 1
        keys = [params["p_idempotency_key"] for params in server.params]
        assert len(keys) == 3
        assert set(keys) == set(ledger.usages)
        assert UUID(keys[0]).version == 7
        assert (result.replayed, result.remaining) == (True, 7)
        assert result.usage_id == UUID(ledger.usages[keys[0]])

    def test_another_call_has_another_key(self, shell: Shell, server: Server) -> None:
        ledger = Ledger(lose=0)
        server.then(ledger, ledger)
        results = [shell.track() for _ in range(2)]
        assert len(ledger.usages) == 2
        assert not any(result.replayed for result in results)

    def test_the_callers_key_is_kept(self, shell: Shell, server: Server) -> None:
        ledger = Ledger(lose=1)
        server.then(ledger, ledger)
        shell.track(idempotency_key="job-1")
        assert list(ledger.usages) == ["job-1"]
        assert server.params[0] == server.params[1]

    def test_the_same_for_record(self, shell: Shell, server: Server) -> None:
        server.then(httpx.ReadTimeout("timed out"))
        shell.limits("record", ANN, "image")
        assert len(server.requests) == 2
        assert server.params[0] == server.params[1]


@pytest.mark.parametrize("failure", FAILURES)
class TestOneFailure:
    def test_then_success(
        self, shell: Shell, server: Server, clock: Clock, failure: Callable[[], httpx.Response | Exception]
    ) -> None:
        server.then(failure(), failure())
        assert shell.track()
        assert len(server.requests) == 3
        first, second = clock.slept
        assert 0.1 <= first <= 0.2
        assert 0.2 <= second <= 0.3

    def test_for_ever(
        self, shell: Shell, server: Server, clock: Clock, failure: Callable[[], httpx.Response | Exception]
    ) -> None:
        server.then(*(failure() for _ in range(100)))
        with pytest.raises(ServiceUnavailable, match=r"track_generation within \d\.\d s: .*SUPABASE_URL") as caught:
            shell.track()
        assert sum(clock.slept) < 10
        assert 5 <= len(server.requests) < 15
        error = failure()
        if isinstance(error, httpx.HTTPError):
            assert type(caught.value.__cause__) is type(error)
            assert type(error).__name__ in str(caught.value)
        assert caught.value.retry_after is None


class Endless(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that goes on for ever, a thousand bytes at a time; counts what was read of it."""

    def __init__(self, *, compressed: bool) -> None:
        self._gzip = zlib.compressobj(wbits=31) if compressed else None
        self.read = 0

    def __iter__(self) -> Iterator[bytes]:
        # in the end it fails, so that a test does
        while self.read < 10_000:
            self.read += 1
            part = b" " * 1000
            yield part if self._gzip is None else self._gzip.compress(part) + self._gzip.flush(zlib.Z_SYNC_FLUSH)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


@pytest.mark.parametrize("compressed", [False, True])
def test_no_more_is_read_than_any_answer_can_have(
    shell: Shell, server: Server, monkeypatch: pytest.MonkeyPatch, *, compressed: bool
) -> None:
    monkeypatch.setattr(bodies, "MOST", 100_500)
    endless = Endless(compressed=compressed)
    server.then(httpx.Response(200, headers={"content-encoding": "gzip"} if compressed else {}, stream=endless))
    assert shell.track()
    assert server.params[0] == server.params[1]
    assert endless.read == 101


def test_giving_up_is_logged_once_each_try_too(shell: Shell, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.then(*(httpx.ConnectError("refused") for _ in range(100)))
    with pytest.raises(ServiceUnavailable):
        shell.track(timeout=2)
    levels = [record.levelno for record in caplog.records if record.name == "tokenlimits"]
    assert levels == [logging.WARNING] * (len(server.requests) - 1) + [logging.ERROR]


class TestMany:
    def test_each_is_sent_again_with_its_key(self, shell: Shell, server: Server) -> None:
        results = [USUAL["track_generation"]] * 3
        server.then(httpx.ReadError("connection reset by peer"), httpx.Response(200, json=results))
        requests = [{"user_id": ANN, "kind": "image", "idempotency_key": key} for key in ("a", None, "b")]
        assert [result.allowed for result in shell.limits("track_many", requests)] == [True] * 3
        first, again = server.params
        assert first == again
        keys = [request.get("idempotency_key") for request in first["p_requests"]]
        assert (keys[0], keys[2]) == ("a", "b")
        assert UUID(keys[1]).version == 7

    @pytest.mark.parametrize("policy", ["allow", "deny"])
    def test_each_is_answered_when_there_is_no_service(self, shell: Shell, server: Server, policy: str) -> None:
        server.then(*[httpx.ConnectError("connection refused")] * 100)
        requests = [{"user_id": ANN, "kind": kind} for kind in ("image", "video")]
        results = shell.limits("track_many", requests, on_unavailable=policy, timeout=5)
        assert [(x.allowed, x.reason, x.kind) for x in results] == [
            (policy == "allow", "unavailable", kind) for kind in ("image", "video")
        ]


class TestRetryAfter:
    ANSWER = httpx.Response(429, json={"message": "slow down"}, headers={"Retry-After": "3"})

    def test_is_waited_once(self, shell: Shell, server: Server, clock: Clock) -> None:
        server.then(self.ANSWER)
        assert shell.track()
        assert clock.slept == [3.0]
        assert len(server.requests) == 2

    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.parametrize("body", [{"text": HTML}, {"json": {"code": None}}, {}])
    def test_whatever_the_body_and_status(
        self, shell: Shell, server: Server, clock: Clock, status: int, body: dict[str, Any]
    ) -> None:
        server.then(httpx.Response(status, headers={"Retry-After": "3"}, **body))
        assert shell.track()
        assert clock.slept == [3.0]

    def test_longer_than_the_deadline_is_not_waited(self, shell: Shell, server: Server, clock: Clock) -> None:
        server.then(httpx.Response(429, headers={"Retry-After": "30"}))
        with pytest.raises(ServiceUnavailable) as caught:
            shell.track(timeout=10)
        assert caught.value.retry_after == 30
        assert clock.slept == []
        assert len(server.requests) == 1

    def test_several_waits_share_one_deadline(self, shell: Shell, server: Server, clock: Clock) -> None:
        server.then(*[self.ANSWER] * 9)
        with pytest.raises(ServiceUnavailable) as caught:
            shell.track(timeout=10)
        assert clock.slept == [3.0, 3.0, 3.0]
        assert caught.value.retry_after == 3

    @pytest.mark.parametrize("header", ["soon", "", "-1", "0", "³"])
    def test_garbage_is_as_if_it_were_not_there(self, shell: Shell, server: Server, clock: Clock, header: str) -> None:
        server.then(httpx.Response(429, headers={b"Retry-After": header.encode("latin-1")}))
        assert shell.track()
        [wait] = clock.slept
        assert 0.1 <= wait <= 0.2

    def test_without_one_there_is_a_short_wait(self, shell: Shell, server: Server, clock: Clock) -> None:
        server.then(httpx.Response(429))
        assert shell.track()
        assert len(clock.slept) == 1


# by each of these PostgreSQL says that the transaction is rolled back, or that it was never begun
@pytest.mark.parametrize("code", ["40P01", "40001", "25006", "53100", "53300", "55P03", "57014", "57P03"])
class TestRolledBack:
    @pytest.mark.parametrize("status", [400, 409, 500])
    def test_is_tried_again(self, shell: Shell, server: Server, code: str, status: int) -> None:
        server.then(httpx.Response(status, json={"code": code, "message": "deadlock detected"}))
        assert shell.track()
        assert len(server.requests) == 2

    def test_also_what_is_not_retry_safe(self, shell: Shell, server: Server, code: str, unsafe: str) -> None:
        server.then(httpx.Response(500, json={"code": code, "message": "deadlock detected"}))
        assert not_retry_safe(shell, unsafe)
        assert len(server.requests) == 2

    def test_for_ever_is_unavailable(self, shell: Shell, server: Server, code: str) -> None:
        server.then(*[httpx.Response(500, json={"code": code, "message": "deadlock detected"})] * 100)
        with pytest.raises(ServiceUnavailable, match=code):
            shell.track()


class TestNotRetrySafe:
    @pytest.mark.parametrize("failure", LOST.values(), ids=LOST)
    def test_a_lost_answer_is_final(
        self, shell: Shell, server: Server, clock: Clock, unsafe: str, failure: Callable[[], Exception]
    ) -> None:
        server.then(failure())
        with pytest.raises(ServiceUnavailable) as caught:
            not_retry_safe(shell, unsafe)
        assert len(server.requests) == 1
        assert clock.slept == []
        assert type(caught.value.__cause__) is type(failure())

    @pytest.mark.parametrize(
        "answer", [*(httpx.Response(s, text=HTML) for s in (502, 503, 504, 520)), *GARBAGE.values(), *AROUND_A_COMMIT]
    )
    def test_an_answer_that_may_hide_a_success_is_final(
        self, shell: Shell, server: Server, unsafe: str, answer: httpx.Response
    ) -> None:
        server.then(answer)
        with pytest.raises(ServiceUnavailable):
            not_retry_safe(shell, unsafe)
        assert len(server.requests) == 1

    @pytest.mark.parametrize("failure", NEVER_SENT.values(), ids=NEVER_SENT)
    def test_what_was_never_sent_is_sent_again(
        self, shell: Shell, server: Server, unsafe: str, failure: Callable[[], Exception]
    ) -> None:
        server.then(failure())
        assert not_retry_safe(shell, unsafe)
        assert len(server.requests) == 2

    def test_what_was_turned_away_is_sent_again(self, shell: Shell, server: Server, clock: Clock, unsafe: str) -> None:
        server.then(httpx.Response(429, headers={"Retry-After": "2"}))
        assert not_retry_safe(shell, unsafe)
        assert clock.slept == [2.0]

    def test_changing_what_there_is_may_be_sent_again(self, shell: Shell, server: Server) -> None:
        server.then(httpx.ReadTimeout("timed out"))
        assert shell.groups("update", PRO, name="Pro").name == GROUP["name"]
        assert len(server.requests) == 2


class TestPostgrestsOwnRetry:
    def test_is_not_used(self, shell: Shell, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        for colour in ("_sync", "_async"):
            monkeypatch.delattr(f"postgrest.{colour}.request_builder.send_with_retry")
        server.then(httpx.Response(503), httpx.ReadError("reset"))
        assert shell.track()
        assert "x-retry-count" not in {name for request in server.requests for name in request.headers}


class TestDeadline:
    def test_is_one_over_all_attempts(self, shell: Shell, server: Server, clock: Clock) -> None:
        given: list[float] = []

        def slow(request: httpx.Request) -> httpx.Response:
            given.append(request.extensions["timeout"]["read"])
            clock.pass_(given[-1])
            raise httpx.ReadTimeout("timed out", request=request)

        server.then(*[slow] * 20)
        with pytest.raises(ServiceUnavailable, match=r"within 10\.\d s"):
            shell.track(timeout=10)
        assert given[0] == pytest.approx(8, abs=0.2)
        assert 9.5 < sum(clock.slept) < 10.5
        assert 2 <= len(given) <= 5

    def test_of_a_call_that_may_not_be_sent_again_is_its_attempts(self, shell: Shell, server: Server) -> None:
        shell.groups("create", "Pro", timeout=10)
        assert server.requests[0].extensions["timeout"]["read"] == pytest.approx(10, abs=0.2)

    def test_holds_for_asking_why_a_function_is_missing(self, shell: Shell, server: Server, clock: Clock) -> None:
        def slow(request: httpx.Request) -> httpx.Response:
            clock.pass_(1.5)
            raise httpx.ReadTimeout("timed out", request=request)

        missing = httpx.Response(404, json={"code": "PGRST202", "message": "no function"})
        server.then(missing, *[slow] * 20)
        with pytest.raises(TokenLimitsError):
            shell.track(timeout=4)
        assert sum(clock.slept) < 5


def test_a_request_goes_where_it_should(shell: Shell, server: Server) -> None:
    shell.track(cost=2, group_id=PRO, metadata={"model": "ü"})
    [request] = server.requests
    assert (request.method, str(request.url)) == ("POST", f"{URL}/rest/v1/rpc/track_generation")
    assert request.headers["content-type"] == "application/json"
    assert server.params[0].items() >= {"p_user_id": ANN, "p_cost": 2, "p_metadata": {"model": "ü"}}.items()
