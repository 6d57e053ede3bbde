"""Many generations in one call: what is sent, and who gets which answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import _arguments, _calls
from ._arguments import OnUnavailable, parser
from ._calls import Call
from .errors import ServiceUnavailable
from .models import GenerationRequest, GroupRef, TrackResult

LARGEST = 1_000
"""As many requests as the server takes in one call."""

Json = dict[str, Any]

_GROUP = parser(GroupRef)


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody else held the group of a request for too long; nothing was recorded, and it may be sent again."""

    group_id: str | None


def track_many(requests: Iterable[GenerationRequest | Mapping[str, Any]]) -> list[Call[list[TrackResult]]]:
    """Check and record any number of generations, in as few calls as the server takes."""
    checked = _arguments.requests(requests)
    chunks = [checked[start : start + LARGEST] for start in range(0, len(checked), LARGEST)]
    return [Call("track_generations", {"p_requests": chunk}, partial(_results, chunk)) for chunk in chunks]


def track_together(calls: Sequence[Call[TrackResult]], max_wait: int | None) -> Call[list[TrackResult | Busy]]:
    """Send calls of `track` as one, which waits up to so many milliseconds for a group that somebody else holds."""
    requests = [{name.removeprefix("p_"): value for name, value in call.params.items()} for call in calls]
    return Call("track_generations", {"p_requests": requests, "p_max_wait": max_wait}, partial(_outcomes, requests))


def _outcomes(requests: list[Json], answers: list[Json]) -> list[TrackResult | Busy]:
    return [
        _busy(answer["group"]) if answer["reason"] == "busy" else _result(request, answer)
        for request, answer in zip(requests, answers, strict=True)
    ]


def _busy(group: object) -> Busy:
    return Busy(None if group is None else str(_GROUP(group).id))


def _results(requests: list[Json], answers: list[Json]) -> list[TrackResult]:
    return [_result(request, answer) for request, answer in zip(requests, answers, strict=True)]


def _result(request: Json, answer: Json) -> TrackResult:
    # the server can't say the kind and the cost of what it could not read
    return _calls.RESULT({**answer, "kind": request["kind"], "cost": request["cost"]})


def without_service(
    call: Call[list[TrackResult]], on_unavailable: OnUnavailable, error: ServiceUnavailable
) -> list[TrackResult]:
    """Make the answers of a call for when Supabase can't be reached, or raise its error."""
    requests: list[Json] = call.params["p_requests"]
    return [_calls.unavailable(request["kind"], request["cost"], on_unavailable, error) for request in requests]
