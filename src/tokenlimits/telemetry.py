"""What a client tells of its calls: to `on_result`, and to what counts them.

`on_result` is a function of your own, which a client calls after each call with a `CallResult`. `counts` says what a
call adds to which counter; OpenTelemetry (`tokenlimits.otel`) and the panel's `/metrics` both count by it.

Example:
    >>> from tokenlimits import TokenLimits
    >>> from tokenlimits.testing import FakeTokenLimits
    >>> told = []
    >>> limits = TokenLimits(FakeTokenLimits({"image": 2}).sender, on_result=told.append)
    >>> limits.track("a5f40000-0000-4000-8000-000000000001", "image", cost=3).allowed
    False
    >>> told[0].function, told[0].outcome, told[0].attempts, told[0].generations[0].reason
    ('track_generation', 'denied', 1, 'limit_exceeded')
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from .errors import ServiceUnavailable
from .models import TrackResult

__all__ = [
    "DURATION",
    "GENERATIONS",
    "RETRIES",
    "SECONDS",
    "UNAVAILABLE",
    "CallResult",
    "Count",
    "Metric",
    "OnResult",
    "Outcome",
    "counts",
    "labels_of",
]

Outcome = Literal["ok", "denied", "unavailable", "error", "cancelled"]
"""How a call ended: `denied` if nothing that it asked for was allowed, `cancelled` if its caller stopped waiting."""

# those that admit generations: a check is a question, and a settlement is about one that was admitted before
_ADMITTING: Final = frozenset({"track_generation", "track_generations", "reserve_generation"})
# Of the others, users may choose the kind, and a label must not have as many values as they can think of.
_OF_A_LIMIT: Final = frozenset({None, "limit_exceeded"})


@dataclass(frozen=True, slots=True)
class CallResult:
    """How one call of a client ended, over all its attempts.

    Args:
        function: The SQL function that was called, like `"track_generation"`.
        attempts: How many times it was sent; 1 without a retry, 0 if it could not be sent at all.
        seconds: How long the caller waited, with the pauses before retries.
        generations: The results in its answer: one of `track`, many of `track_many`, and of coalesced calls those of
            all callers whom the request was for. Empty for other calls, and after an error.
        error: What the caller gets instead of an answer.
    """

    function: str
    attempts: int
    seconds: float
    generations: tuple[TrackResult, ...] = ()
    error: BaseException | None = None

    @property
    def outcome(self) -> Outcome:
        """How it ended, in one word.

        Example:
            >>> CallResult("group_usage", attempts=1, seconds=0.02).outcome
            'ok'
        """
        if self.error is None:
            return "denied" if self.generations and not any(self.generations) else "ok"
        if isinstance(self.error, ServiceUnavailable):
            return "unavailable"
        # a cancelled task, Ctrl-C
        return "error" if isinstance(self.error, Exception) else "cancelled"


OnResult = Callable[[CallResult], object]
"""A client's hook. It runs in the caller's thread or event loop, so it must be quick and must not block."""


class Metric(NamedTuple):
    """A metric: its name in OpenTelemetry, what it counts, its unit, and its labels.

    No label is a user, a group or a key: their numbers grow, and metrics are read by many.
    """

    name: str
    help: str
    unit: str
    labels: tuple[str, ...]


GENERATIONS: Final = Metric(
    "tokenlimits.generations",
    "Generations that were judged: allowed, denied for a reason, or replayed for a repeated key",
    "{generation}",
    ("outcome", "reason", "kind"),
)
RETRIES: Final = Metric("tokenlimits.retries", "Attempts after the first", "{attempt}", ("function",))
UNAVAILABLE: Final = Metric(
    "tokenlimits.unavailable", "Calls that got no answer from Supabase in time", "{call}", ("function",)
)
DURATION: Final = Metric(
    "tokenlimits.call.duration", "How long callers waited, over all attempts", "s", ("function", "outcome")
)
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper bounds of the buckets of `DURATION`."""


class Count(NamedTuple):
    """What to add to a counter."""

    metric: Metric
    amount: int
    labels: Mapping[str, str]


def counts(result: CallResult) -> Iterator[Count]:
    """Say what a call adds to which counter; its duration is `result.seconds`, with the labels of `labels_of`.

    Args:
        result: How the call ended.

    Example:
        >>> lost = CallResult("track_generation", attempts=3, seconds=2.5, error=ServiceUnavailable("no answer"))
        >>> [(count.metric.name, count.amount) for count in counts(lost)]
        [('tokenlimits.retries', 2), ('tokenlimits.unavailable', 1)]
    """
    if result.function in _ADMITTING:
        for generation in result.generations:
            yield Count(GENERATIONS, 1, _labels_of_generation(generation))
    function = {"function": result.function}
    if result.attempts > 1:
        yield Count(RETRIES, result.attempts - 1, function)
    if result.outcome == "unavailable":
        yield Count(UNAVAILABLE, 1, function)


def labels_of(result: CallResult) -> Mapping[str, str]:
    """Return the labels of a call's duration.

    Args:
        result: How the call ended.

    Example:
        >>> labels_of(CallResult("group_usage", attempts=1, seconds=0.02))
        {'function': 'group_usage', 'outcome': 'ok'}
    """
    return {"function": result.function, "outcome": result.outcome}


def _labels_of_generation(generation: TrackResult) -> Mapping[str, str]:
    outcome = "replayed" if generation.replayed else "allowed" if generation.allowed else "denied"
    return {
        "outcome": outcome,
        "reason": generation.reason or "",
        "kind": generation.kind if generation.reason in _OF_A_LIMIT else "",
    }
