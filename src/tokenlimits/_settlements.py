"""What happens to a usage in the ledger, as pure calls: reserve and settle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from . import _arguments
from ._arguments import Id, OnUnavailable
from ._calls import RESULT, Call
from .errors import ServiceUnavailable
from .models import TrackResult

DEFAULT_TTL = 3600
"""Seconds for which a hold holds."""

Settlement = Call[TrackResult] | TrackResult
"""The call that settles a usage, or the answer when nothing was recorded that could be settled."""


def reserve(
    user_id: Id,
    kind: str,
    cost: int,
    ttl: int,
    idempotency_key: str | None,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Call[TrackResult]:
    """Hold the cost of a generation."""
    params = _arguments.request(
        user_id=user_id,
        kind=kind,
        cost=cost,
        idempotency_key=idempotency_key,
        group_id=group_id,
        metadata=metadata,
    )
    return Call("reserve_generation", {**params, "p_ttl": _arguments.ttl(ttl)}, RESULT)


def commit(usage_id: Id | None, cost: int | None) -> Settlement:
    """Settle a hold for its cost, or for less."""
    params = {} if cost is None else {"p_cost": _arguments.settled_cost(cost)}
    if usage_id is None:
        return unavailable(None, cost)
    return Call("commit_generation", {**_usage_id(usage_id), **params}, RESULT)


def release(usage_id: Id | None) -> Settlement:
    """Give back what a hold holds."""
    return unavailable(None) if usage_id is None else Call("release_generation", _usage_id(usage_id), RESULT)


def refund(usage_id: Id) -> Call[TrackResult]:
    """Give back what a committed usage cost."""
    return Call("refund_generation", _usage_id(usage_id), RESULT)


def refund_if_recorded(usage_id: Id | None) -> Settlement:
    """Give back what a committed usage cost, if there is one."""
    return unavailable(None) if usage_id is None else refund(usage_id)


def without_service(call: Call[TrackResult], on_unavailable: OnUnavailable, error: ServiceUnavailable) -> TrackResult:
    """Make the answer for when Supabase can't be reached, or raise its error.

    Nothing is left to deny when a usage is settled. What can't be committed or released is given back at the hold's
    end, as if it had never been recorded; a refund would be lost.
    """
    if on_unavailable != "allow" or call.function == "refund_generation":
        raise error
    return unavailable(UUID(call.params["p_usage_id"]), call.params.get("p_cost"))


def unavailable(usage_id: UUID | None, cost: int | None = None) -> TrackResult:
    """Make the answer of a settlement that did not take place; nobody knows the kind any more."""
    return TrackResult(allowed=True, reason="unavailable", usage_id=usage_id, kind="", cost=cost or 0)


def _usage_id(value: Id) -> dict[str, str]:
    return {"p_usage_id": _arguments.id_(value, "usage_id")}
