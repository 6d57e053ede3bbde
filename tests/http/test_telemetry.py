"""What a client tells of its calls: to `on_result`, and as spans and metrics of OpenTelemetry."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.http.conftest import ANN, KEY, PRO, Server, Shell

from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    ConfigurationError,
    GroupManager,
    ServiceUnavailable,
    TokenLimits,
    otel,
    telemetry,
)
from tokenlimits.errors import AccessDenied
from tokenlimits.telemetry import CallResult
from tokenlimits.testing import FakeTokenLimits

USAGE = "0197f0a0-0000-7000-8000-000000000009"
# what stands in requests and answers, and in no span or metric
SECRETS = (ANN, PRO, USAGE, KEY, "job-1")


def allowed(**more: Any) -> dict[str, Any]:
    return {"allowed": True, "kind": "image", "cost": 1, "status": "committed", "usage_id": USAGE, **more}


def denied(reason: str = "limit_exceeded", **more: Any) -> dict[str, Any]:
    return {"allowed": False, "kind": "image", "cost": 1, "reason": reason, "error": "no", **more}


def answer(content: object) -> httpx.Response:
    return httpx.Response(200, json=content)


UNKNOWN_GROUP = {"code": "TL004", "message": f"there is no group {PRO}", "details": None, "hint": None}


class TestOnResult:
    def test_hears_of_one_call(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        result = shell.track(on_result=told.append)
        (heard,) = told
        assert (heard.function, heard.attempts, heard.outcome, heard.error) == ("track_generation", 1, "ok", None)
        assert heard.generations == (result,)
        assert heard.seconds > 0

    def test_counts_all_attempts_as_one_call(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        server.then(httpx.Response(503), httpx.ReadTimeout("timed out"))
        shell.track(on_result=told.append)
        assert [(heard.attempts, heard.outcome) for heard in told] == [(3, "ok")]

    def test_hears_of_a_denial(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        server.then(answer(denied()))
        shell.track(on_result=told.append)
        assert [(heard.outcome, heard.generations[0].reason) for heard in told] == [("denied", "limit_exceeded")]

    @pytest.mark.parametrize("policy", ["raise", "allow", "deny"])
    def test_hears_that_supabase_is_unavailable_whatever_the_caller_gets(
        self, shell: Shell, server: Server, policy: str
    ) -> None:
        told: list[CallResult] = []
        server.then(*[httpx.Response(503)] * 50)
        raised = pytest.raises(ServiceUnavailable) if policy == "raise" else nullcontext()
        with raised:
            shell.track(on_result=told.append, on_unavailable=policy, timeout=2)
        assert isinstance(told[0].error, ServiceUnavailable)
        assert [heard.outcome for heard in told] == ["unavailable"]
        assert told[0].attempts == len(server.requests) > 1
        assert told[0].generations == ()

    def test_hears_of_a_refusal(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        server.then(httpx.Response(401, json={"code": "PGRST301", "message": "JWT expired"}))
        with pytest.raises(AccessDenied):
            shell.track(on_result=told.append)
        assert [(heard.outcome, heard.attempts, type(heard.error)) for heard in told] == [("error", 1, AccessDenied)]

    def test_hears_nothing_of_what_is_not_sent(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        with pytest.raises(ValueError, match="user_id"):
            shell.limits("track", "nobody", "image", on_result=told.append)
        assert told == []

    def test_hears_of_the_calls_of_a_group_manager(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        shell.groups("create", "Pro", on_result=told.append)
        assert [(heard.function, heard.outcome, heard.generations) for heard in told] == [("save_group", "ok", ())]

    def test_hears_once_of_a_batch(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        server.then(answer([allowed(), denied(), allowed(replayed=True)]))
        results = shell.limits("track_many", [{"user_id": ANN, "kind": "image"}] * 3, on_result=told.append)
        assert [heard.generations for heard in told] == [tuple(results)]
        assert told[0].outcome == "ok"

    def test_a_missing_installation_is_one_call(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []
        server.then(httpx.Response(404, json={"code": "PGRST202", "message": "no function"}))
        with pytest.raises(Exception, match="has no function"):
            shell.track(on_result=told.append)
        assert server.functions == ["track_generation", "tokenlimits_version"]
        assert [(heard.function, heard.attempts) for heard in told] == [("track_generation", 1)]

    def test_an_error_in_it_is_logged_and_changes_nothing(
        self, shell: Shell, server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(_: CallResult) -> None:
            raise RuntimeError("the metrics server is down")

        assert shell.track(on_result=broken)
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("tokenlimits", logging.ERROR)
        assert "on_result raised an error, after track_generation" in record.message
        assert "the metrics server is down" in caplog.text

    @pytest.mark.parametrize("cls", [TokenLimits, AsyncTokenLimits, GroupManager, AsyncGroupManager])
    def test_must_be_a_plain_function(self, cls: Any) -> None:
        async def never_awaited(_: CallResult) -> None: ...

        for hook in (never_awaited, "statsd"):
            with pytest.raises(ConfigurationError, match="on_result: must be a function that is not async"):
                cls.from_env(on_result=hook)

    def test_hears_of_a_sender_of_ones_own(self) -> None:
        told: list[CallResult] = []
        fake = FakeTokenLimits({"image": 1})
        sync, asynchronous = (
            TokenLimits(fake.sender, on_result=told.append),
            AsyncTokenLimits(fake.async_sender, on_result=told.append),
        )
        assert sync.track(ANN, "image")
        assert not asyncio.run(asynchronous.track(ANN, "image"))
        assert [(heard.outcome, heard.attempts) for heard in told] == [("ok", 1), ("denied", 1)]

    def test_hears_of_a_cancelled_call(self, shell: Shell, server: Server) -> None:
        told: list[CallResult] = []

        def stop(_: httpx.Request) -> httpx.Response:
            raise KeyboardInterrupt if shell.colour == "sync" else asyncio.CancelledError

        server.then(stop)
        with pytest.raises((KeyboardInterrupt, asyncio.CancelledError)):
            shell.track(on_result=told.append)
        assert [heard.outcome for heard in told] == ["cancelled"]

    def test_coalesced_calls_are_one_call_with_all_their_generations(self, server: Server) -> None:
        told: list[CallResult] = []
        # the third travels again, as a lock holds up its group
        server.then(
            answer(
                [
                    allowed(reason=None),
                    denied(),
                    {"allowed": False, "reason": "busy", "group": {"id": PRO, "name": "Pro"}},
                ]
            ),
            answer(allowed()),
        )

        async def at_once() -> list[bool]:
            async with AsyncTokenLimits.from_env(coalesce=True, on_result=told.append) as limits:
                return [bool(each) for each in await asyncio.gather(*(limits.track(ANN, "image") for _ in range(3)))]

        assert asyncio.run(at_once()) == [True, False, True]
        assert [(heard.function, len(heard.generations)) for heard in told] == [
            ("track_generations", 2),
            ("track_generation", 1),
        ]


class Collected:
    """What OpenTelemetry's SDK has collected, in memory."""

    def __init__(self) -> None:
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(), MeterProvider([self._reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._spans.get_finished_spans())

    @property
    def span(self) -> ReadableSpan:
        (span,) = self.spans
        return span

    def points(self) -> Iterator[tuple[str, Any]]:
        data = self._reader.get_metrics_data()
        for of_resource in data.resource_metrics if data else ():
            for of_scope in of_resource.scope_metrics:
                for metric in of_scope.metrics:
                    yield from ((metric.name, point) for point in metric.data.data_points)

    def counted(self) -> dict[tuple[str, ...], int]:
        """By the counter and the values of its labels, in their order."""
        return {
            (name, *(str(value) for _, value in sorted(point.attributes.items()))): point.value
            for name, point in self.points()
            if not isinstance(point, HistogramDataPoint)
        }

    def text(self) -> str:
        spans = [span.to_json() for span in self.spans]
        return "\n".join([*spans, *(f"{name} {point}" for name, point in self.points())])


@pytest.fixture
def collected() -> Iterator[Collected]:
    collected = Collected()
    otel.instrument(tracer_provider=collected.tracers, meter_provider=collected.meters)
    yield collected
    otel.uninstrument()
    collected.tracers.shutdown()
    collected.meters.shutdown()


class TestSpans:
    def test_of_one_call(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(answer(allowed()))
        shell.track(idempotency_key="job-1")
        span = collected.span
        assert (span.name, span.kind) == ("tokenlimits track_generation", SpanKind.CLIENT)
        assert dict(span.attributes or {}) == {
            "tokenlimits.function": "track_generation",
            "tokenlimits.attempts": 1,
            "tokenlimits.outcome": "ok",
            "tokenlimits.kind": "image",
            "tokenlimits.cost": 1,
        }
        assert (span.status.status_code, span.events) == (StatusCode.UNSET, ())

    def test_has_each_attempt_that_failed(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(httpx.Response(503), httpx.ConnectError("connection refused"))
        shell.track()
        span = collected.span
        assert (span.attributes or {})["tokenlimits.attempts"] == 3
        assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
            (
                "attempt failed",
                {"tokenlimits.attempt": 1, "tokenlimits.reason": "the server answered with status 503"},
            ),
            ("attempt failed", {"tokenlimits.attempt": 2, "tokenlimits.reason": "ConnectError connection refused"}),
        ]
        assert span.status.status_code is StatusCode.UNSET

    def test_a_denial_is_no_error(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(answer(denied("no_limit_for_kind")))
        shell.track()
        attributes = dict(collected.span.attributes or {})
        assert (attributes["tokenlimits.outcome"], attributes["tokenlimits.reason"]) == ("denied", "no_limit_for_kind")
        assert collected.span.status.status_code is StatusCode.UNSET

    def test_says_why_supabase_is_unavailable(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(*[httpx.Response(503)] * 50)
        shell.track(on_unavailable="allow", timeout=2)
        span = collected.span
        assert (span.attributes or {})["error.type"] == "ServiceUnavailable"
        assert (span.attributes or {})["tokenlimits.outcome"] == "unavailable"
        assert span.status.status_code is StatusCode.ERROR
        assert "status 503" in (span.status.description or "")
        assert len(span.events) == (span.attributes or {})["tokenlimits.attempts"] == len(server.requests)

    def test_of_a_refusal_repeats_no_words(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(httpx.Response(400, json=UNKNOWN_GROUP))
        with pytest.raises(Exception, match=PRO):
            shell.track(group_id=PRO)
        assert (collected.span.status.status_code, collected.span.status.description) == (StatusCode.ERROR, None)

    def test_of_a_batch_has_numbers(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(answer([allowed(), denied(), allowed()]))
        shell.limits("track_many", [{"user_id": ANN, "kind": "image"}] * 3)
        attributes = dict(collected.span.attributes or {})
        assert (attributes["tokenlimits.generations"], attributes["tokenlimits.denied"]) == (3, 1)

    def test_is_the_current_one_during_the_request_and_no_longer(
        self, shell: Shell, server: Server, collected: Collected
    ) -> None:
        within: list[Any] = []

        def look(_: httpx.Request) -> httpx.Response:
            within.append(trace.get_current_span().get_span_context().span_id)
            return answer(allowed())

        server.then(look)
        shell.track()
        assert within == [collected.span.context.span_id]
        assert not trace.get_current_span().get_span_context().is_valid

    def test_is_a_child_of_the_callers_span(self, server: Server, collected: Collected) -> None:
        with collected.tracers.get_tracer("app").start_as_current_span("render"), TokenLimits.from_env() as limits:
            limits.track(ANN, "image")
        ours, theirs = collected.spans
        assert ours.parent is not None
        assert ours.parent.span_id == theirs.context.span_id


class TestMetrics:
    def test_count_what_was_judged(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(
            answer([allowed(), denied(), allowed(replayed=True), denied("not_in_group")]),
            answer(allowed(status="reserved")),
            answer(denied("no_limit_for_kind", kind="whatever_somebody_typed")),
        )
        shell.limits("track_many", [{"user_id": ANN, "kind": "image"}] * 4)
        shell.limits("reserve", ANN, "image")
        shell.track()
        # labels in the order of their names: kind, outcome, reason
        assert collected.counted() == {
            ("tokenlimits.generations", "image", "allowed"): 2,
            ("tokenlimits.generations", "image", "denied", "limit_exceeded"): 1,
            ("tokenlimits.generations", "image", "replayed"): 1,
            ("tokenlimits.generations", "denied", "not_in_group"): 1,
            ("tokenlimits.generations", "denied", "no_limit_for_kind"): 1,
        }

    def test_count_neither_questions_nor_settlements(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(answer(denied()), answer(allowed()))
        shell.limits("check", ANN, "image")
        shell.limits("commit", USAGE)
        assert collected.counted() == {}

    def test_count_retries(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(httpx.Response(503), httpx.Response(503))
        shell.track()
        assert collected.counted()["tokenlimits.retries", "track_generation"] == 2

    @pytest.mark.parametrize("policy", ["allow", "deny"])
    def test_count_what_got_no_answer_and_nothing_as_judged(
        self, shell: Shell, server: Server, collected: Collected, policy: str
    ) -> None:
        server.then(*[httpx.Response(503)] * 50)
        shell.track(on_unavailable=policy, timeout=2)
        counted = collected.counted()
        assert counted.pop(("tokenlimits.retries", "track_generation")) == len(server.requests) - 1
        assert counted == {("tokenlimits.unavailable", "track_generation"): 1}

    def test_have_the_duration_in_buckets_of_seconds(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(answer(denied()))
        shell.track()
        shell.groups("list")
        points = [point for name, point in collected.points() if name == "tokenlimits.call.duration"]
        assert {(point.attributes["function"], point.attributes["outcome"], point.count) for point in points} == {
            ("track_generation", "denied", 1),
            ("find_groups", "ok", 1),
        }
        assert {tuple(point.explicit_bounds) for point in points} == {telemetry.SECONDS}

    def test_labels_are_those_that_are_declared(self, shell: Shell, server: Server, collected: Collected) -> None:
        server.then(httpx.Response(503), answer(denied()), *[httpx.Response(503)] * 50)
        shell.track()
        shell.track(on_unavailable="deny", timeout=2)
        declared = {
            metric.name: set(metric.labels)
            for metric in (telemetry.GENERATIONS, telemetry.RETRIES, telemetry.UNAVAILABLE, telemetry.DURATION)
        }
        found = {name: set(point.attributes) for name, point in collected.points()}
        assert found == declared


def test_no_span_and_no_metric_has_an_id_or_a_key(shell: Shell, server: Server, collected: Collected) -> None:
    server.then(
        answer(allowed(group={"id": PRO, "name": "Pro"})),
        answer([allowed(), denied()]),
        httpx.Response(503),
        httpx.Response(400, json=UNKNOWN_GROUP),
    )
    shell.track(idempotency_key="job-1", metadata={"prompt": "a cat"})
    shell.limits("track_many", [{"user_id": ANN, "kind": "image"}] * 2)
    with pytest.raises(Exception, match=PRO):
        shell.track(group_id=PRO)
    text = collected.text()
    assert "track_generation" in text
    assert [secret for secret in (*SECRETS, "a cat") if secret in text] == []


def test_is_of_the_whole_process_until_it_is_undone(server: Server, collected: Collected) -> None:
    """A heartbeat and the worker threads of a pool are traced too."""
    with TokenLimits.from_env() as limits:
        thread = threading.Thread(target=limits.track, args=(ANN, "image"))
        thread.start()
        thread.join()
        assert len(collected.spans) == 1
        otel.uninstrument()
        limits.track(ANN, "image")
    assert len(collected.spans) == 1


def test_nothing_is_imported_without_being_asked_for() -> None:
    script = """
        import sys
        import tokenlimits
        assert not [name for name in sys.modules if name.startswith(("opentelemetry", "tokenlimits.otel"))]
    """
    script = "\n".join(line.strip() for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_its_extra_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['opentelemetry'] = None; import tokenlimits.otel"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("tokenlimits.otel needs more packages: pip install 'tokenlimits[otel]'\n")
