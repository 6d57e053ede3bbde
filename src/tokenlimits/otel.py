"""OpenTelemetry: a span and metrics for each call, `pip install 'tokenlimits[otel]'`.

This needs OpenTelemetry's API alone. Which SDK collects, and where it exports to, is your app's choice; without one,
nothing is collected.

Example:
    >>> from tokenlimits import otel
    >>> otel.instrument()       # once, when the app starts
    >>> otel.uninstrument()
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Token

from . import __version__, telemetry
from ._drivers import watching
from .telemetry import CallResult

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "tokenlimits.otel needs more packages: pip install 'tokenlimits[otel]'", name=error.name
    ) from error

__all__ = ["instrument", "uninstrument"]


def instrument(*, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None) -> None:
    """Make a span and metrics for each call of all clients in this process, also of those that exist already.

    A span has the attempts and the outcome, and an event for each attempt that failed. Neither spans nor metrics have
    the id of a user or a group, or a key.

    Args:
        tracer_provider: Where spans go; the app's global one when None.
        meter_provider: Where metrics go; the app's global one when None.

    Example:
        >>> instrument()
        >>> limits.track(user_id, "image").allowed
        True
        >>> uninstrument()
    """
    watching.trace(_Instruments(tracer_provider, meter_provider).begin)


def uninstrument() -> None:
    """Stop: the calls after this one are neither traced nor counted.

    Example:
        >>> uninstrument()
    """
    watching.trace(None)


class _Instruments:
    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self.tracer = trace.get_tracer("tokenlimits", __version__, tracer_provider)
        meter = metrics.get_meter("tokenlimits", __version__, meter_provider)
        self.counters = {
            metric: meter.create_counter(metric.name, metric.unit, metric.help)
            for metric in (telemetry.GENERATIONS, telemetry.RETRIES, telemetry.UNAVAILABLE)
        }
        duration = telemetry.DURATION
        self.duration = meter.create_histogram(
            duration.name, duration.unit, duration.help, explicit_bucket_boundaries_advisory=telemetry.SECONDS
        )

    def begin(self, function: str) -> _Call:
        return _Call(self, function)


class _Call:
    """One call: its span is the current one until it ends, so that those of an instrumented httpx are in it."""

    def __init__(self, instruments: _Instruments, function: str) -> None:
        self._instruments = instruments
        attributes = {"tokenlimits.function": function}
        self._span: Span = instruments.tracer.start_span(
            f"tokenlimits {function}", kind=SpanKind.CLIENT, attributes=attributes
        )
        self._token: Token[Context] = context.attach(trace.set_span_in_context(self._span))

    def failed(self, attempt: int, reason: str) -> None:
        self._span.add_event("attempt failed", {"tokenlimits.attempt": attempt, "tokenlimits.reason": reason})

    def ended(self, result: CallResult) -> None:
        # counted while the span is the current one, so that exemplars lead to it
        for count in telemetry.counts(result):
            self._instruments.counters[count.metric].add(count.amount, _without_empty(count.labels))
        self._instruments.duration.record(result.seconds, _without_empty(telemetry.labels_of(result)))
        context.detach(self._token)
        self._span.set_attributes(_attributes(result))
        if result.error is not None:
            # only this error is sure to be about the service and not about a user; the app's own span has the others
            words = str(result.error) if result.outcome == "unavailable" else None
            self._span.set_status(Status(StatusCode.ERROR, words))
        self._span.end()


def _without_empty(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if value}


def _attributes(result: CallResult) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "tokenlimits.attempts": result.attempts,
        "tokenlimits.outcome": result.outcome,
    }
    if result.error is not None:
        attributes["error.type"] = type(result.error).__qualname__
    match result.generations:
        case ():
            pass
        case (generation,):
            attributes |= {"tokenlimits.kind": generation.kind, "tokenlimits.cost": generation.cost}
            if generation.reason is not None:
                attributes["tokenlimits.reason"] = generation.reason
        case generations:
            denied = sum(not generation for generation in generations)
            attributes |= {"tokenlimits.generations": len(generations), "tokenlimits.denied": denied}
    return attributes
