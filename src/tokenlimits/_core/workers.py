"""The operations of generation workers as pure calls: track, check, record, reserve and settle, one or many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from tokenlimits.errors import ServiceUnavailable
from tokenlimits.models import GenerationRequest, GroupRef, OnUnavailable, Overage, TrackResult, UserLimit

from . import arguments
from .arguments import Id, Key, parser
from .call import Call

RESULT = parser(TrackResult)
_USER_LIMITS = parser(tuple[UserLimit, ...])
DEFAULT_TTL = 3600
"""Seconds until a hold expires."""
Settlement = Call[TrackResult] | TrackResult
"""The call that settles a usage, or the answer if there is no recorded usage to settle."""
LARGEST = 1_000
"""The most requests that the server takes in one call."""
Json = dict[str, Any]
_GROUP = parser(GroupRef)


def track(
    user_id: Id,
    kind: str,
    cost: int,
    idempotency_key: Key | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Check and record a generation."""
    params = arguments.request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("track_generation", params, RESULT)


def without_service(call: Call[TrackResult], on_unavailable: OnUnavailable, error: ServiceUnavailable) -> TrackResult:
    """Make the answer for when Supabase can't be reached, or raise the error."""
    return unavailable(call.params["p_kind"], call.params["p_cost"], on_unavailable, error)


def unavailable(kind: str, cost: int, on_unavailable: OnUnavailable, error: ServiceUnavailable) -> TrackResult:
    """Make the answer for a generation when Supabase can't be reached, or raise the error."""
    if on_unavailable == "raise":
        raise error
    allowed = on_unavailable == "allow"
    return TrackResult(
        allowed=allowed,
        reason="unavailable",
        error=None if allowed else str(error),
        kind=kind,
        cost=cost,
        retry_after=error.retry_after,
    )


def check(user_id: Id, kind: str, cost: int, group_id: Id | None) -> Call[TrackResult]:
    """Ask what `track` would answer."""
    params = arguments.request(user_id=user_id, kind=kind, cost=cost, group_id=group_id)
    del params["p_idempotency_key"]
    return Call("check_generation", params, RESULT)


def record(
    user_id: Id,
    kind: str,
    cost: int,
    created_at: datetime | None,
    idempotency_key: Key | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Record usage that has already happened."""
    params = arguments.request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("record_generation", {**params, "p_created_at": arguments.recorded_at(created_at)}, RESULT)


def usage(user_id: Id) -> Call[tuple[UserLimit, ...]]:
    """List every limit that applies to a user."""
    return Call("user_generation_usage", {"p_user_id": arguments.id_(user_id, "user_id")}, _USER_LIMITS)


def my_usage() -> Call[tuple[UserLimit, ...]]:
    """List every limit that binds the user who is signed in."""
    return Call("my_generation_usage", {}, _USER_LIMITS)


def reserve(
    user_id: Id,
    kind: str,
    cost: int,
    ttl: int,
    idempotency_key: Key | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Hold the cost of a generation."""
    params = arguments.request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("reserve_generation", {**params, "p_ttl": arguments.ttl(ttl)}, RESULT)


def commit(usage_id: Id | None, cost: int | None, overage: Overage = "reject") -> Settlement:
    """Settle a hold for its cost, or for less; or for more."""
    params: Json = {} if cost is None else {"p_cost": arguments.settled_cost(cost)}
    if arguments.overage(overage) != "reject":
        params["p_overage"] = overage
    if usage_id is None:
        return unsettled(None, cost)
    return Call("commit_generation", {**_usage_id(usage_id), **params}, RESULT)


def release(usage_id: Id | None) -> Settlement:
    """Give back the cost of a hold."""
    return unsettled(None) if usage_id is None else Call("release_generation", _usage_id(usage_id), RESULT)


def extend(usage_id: Id, ttl: int) -> Call[TrackResult]:
    """Let a hold expire later."""
    return Call("extend_generation", {**_usage_id(usage_id), "p_ttl": arguments.ttl(ttl)}, RESULT)


def extend_if_recorded(usage_id: Id | None, ttl: int) -> Settlement:
    """Let a hold expire later, if it was recorded."""
    arguments.ttl(ttl)
    return unsettled(None) if usage_id is None else extend(usage_id, ttl)


def refund(usage_id: Id) -> Call[TrackResult]:
    """Give back what a committed usage cost."""
    return Call("refund_generation", _usage_id(usage_id), RESULT)


def refund_if_recorded(usage_id: Id | None) -> Settlement:
    """Give back what a committed usage cost, if it was recorded."""
    return unsettled(None) if usage_id is None else refund(usage_id)


def settlement_without_service(
    call: Call[TrackResult], on_unavailable: OnUnavailable, error: ServiceUnavailable
) -> TrackResult:
    """Make the answer for when Supabase can't be reached, or raise the error.

    A settlement can't be denied any more. A hold that can't be committed or released is given back when it expires, as
    if it had never been recorded, and one that can't be extended may do so; a refund would be lost.
    """
    if on_unavailable != "allow" or call.function == "refund_generation":
        raise error
    return unsettled(UUID(call.params["p_usage_id"]), call.params.get("p_cost"))


def unsettled(usage_id: UUID | None, cost: int | None = None) -> TrackResult:
    """Make the answer for a settlement that did not take place; its kind isn't known."""
    return TrackResult(allowed=True, reason="unavailable", usage_id=usage_id, kind="", cost=cost or 0)


def _usage_id(value: Id) -> dict[str, str]:
    return {"p_usage_id": arguments.id_(value, "usage_id")}


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody else had locked the group of a request for too long; nothing was recorded, so it may be sent again."""

    group_id: str | None


def track_many(requests: Iterable[GenerationRequest | Mapping[str, Any]]) -> list[Call[list[TrackResult]]]:
    """Check and record any number of generations, in as few calls as the server takes."""
    checked = arguments.requests(requests)
    chunks = [checked[start : start + LARGEST] for start in range(0, len(checked), LARGEST)]
    return [Call("track_generations", {"p_requests": chunk}, partial(_results, chunk)) for chunk in chunks]


def track_together(calls: Sequence[Call[TrackResult]], max_wait: int | None) -> Call[list[TrackResult | Busy]]:
    """Combine calls of `track` into one, which waits up to `max_wait` milliseconds for a group that is locked."""
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
    # for a request that the server couldn't read, the answer lacks the kind and the cost
    return RESULT({**answer, "kind": request["kind"], "cost": request["cost"]})


def batch_without_service(
    call: Call[list[TrackResult]], on_unavailable: OnUnavailable, error: ServiceUnavailable
) -> list[TrackResult]:
    """Make the answers of a call for when Supabase can't be reached, or raise its error."""
    requests: list[Json] = call.params["p_requests"]
    return [unavailable(request["kind"], request["cost"], on_unavailable, error) for request in requests]
