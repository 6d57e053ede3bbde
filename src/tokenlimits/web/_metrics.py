"""What `/metrics` shows: the requests to this process, and its calls to Supabase."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenlimits import telemetry
from tokenlimits.telemetry import CallResult, Metric

_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Metrics:
    """The metrics of one app: an app that is mounted twice, or made for a test, counts for itself."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._counters = {
            metric: Counter(_name(metric), metric.help, metric.labels, registry=self._registry)
            for metric in (telemetry.GENERATIONS, telemetry.RETRIES, telemetry.UNAVAILABLE)
        }
        duration = telemetry.DURATION
        self._calls = Histogram(
            f"{_name(duration)}_seconds",
            duration.help,
            duration.labels,
            registry=self._registry,
            buckets=telemetry.SECONDS,
        )
        self._requests = Histogram(
            "tokenlimits_web_request_duration_seconds",
            "How long the panel and the API took to answer",
            ("method", "route", "status"),
            registry=self._registry,
            buckets=telemetry.SECONDS,
        )

    def count(self, result: CallResult) -> None:
        """Count a call to Supabase: the `on_result` of the app's clients."""
        for count in telemetry.counts(result):
            self._counters[count.metric].labels(**count.labels).inc(count.amount)
        self._calls.labels(**telemetry.labels_of(result)).observe(result.seconds)

    def count_request(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, _route(scope), str(status)).observe(seconds)

    def text(self) -> bytes:
        """Write them all in Prometheus' format."""
        return generate_latest(self._registry)


class Counted:
    """Counts the requests to an app.

    Args:
        app: What answers.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500  # what an exception becomes, further out

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.count_request(scope, status, time.perf_counter() - began)


def _name(metric: Metric) -> str:
    """As OpenTelemetry's exporters for Prometheus write it, so that one board shows both."""
    return metric.name.replace(".", "_")


def _route(scope: Scope) -> str:
    """The template of the path, never the path itself: whoever asks chooses that."""
    template: str | None = getattr(scope.get("route"), "path", None)
    if template is None:
        return "none"
    # a route doesn't know the prefix of the router that it is in: the API's and the panel's have the same templates
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    prefix = path.split("/")[: path.count("/") - template.count("/") + 1]
    return "/".join(prefix) + template
