"""The JSON objects that the SQL functions answer with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from tokenlimits.errors import TokenLimitsError

from ._periods import NEVER, zone
from ._state import Group, Json, LimitState, Usage, text


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which group pays, or why none does; `group` is then the one that will have room first, at `room_at`."""

    reason: str | None
    group: Group | None = None
    states: tuple[LimitState, ...] = ()
    denied_by: LimitState | None = None
    room_at: datetime = NEVER


def group_json(group: Group, periods: tuple[str, ...]) -> Json:
    """Show a group with its limits."""
    rules = sorted(group.limits, key=lambda rule: (rule.kind, rule.scope, periods.index(rule.period)))
    return {
        "id": group.id,
        "name": group.name,
        "description": group.description,
        "priority": group.priority,
        "timezone": group.timezone,
        "is_default": group.is_default,
        "created_at": text(group.created_at),
        "updated_at": text(group.updated_at),
        "limits": [
            {"kind": rule.kind, "period": rule.period, "scope": rule.scope, "max": group.limits[rule]} for rule in rules
        ],
    }


def limit_json(state: LimitState, until: datetime | None = None) -> Json:
    """Show a limit in its period, or until another moment."""
    return {
        "kind": state.rule.kind,
        "period": state.rule.period,
        "starts": "calendar",
        "scope": state.rule.scope,
        "mode": "enforce",
        "max": state.max,
        "used": state.used,
        "remaining": None if state.max is None else max(state.max - state.used, 0),
        "reset_at": text(until or state.until),
        "weight": 1,
    }


def group_limit_json(state: LimitState, members: int) -> Json:
    """Show a limit for the group as a whole; for a member limit, the total of all members."""
    capacity = None if state.max is None else state.max * (members if state.rule.scope == "member" else 1)
    fraction = None
    if capacity is not None:
        # rounded half up to six digits; what has no capacity is full
        fraction = (2_000_000 * state.used + capacity) // (2 * capacity) / 1_000_000 if capacity else 1
    remaining = None if capacity is None else max(capacity - state.used, 0)
    return {**limit_json(state), "capacity": capacity, "remaining": remaining, "fraction": fraction}


def allowed_json(
    kind: str,
    cost: int,
    group: Json | None,
    states: list[LimitState],
    usage: Usage | None = None,
    *,
    replayed: bool = False,
) -> Json:
    """Answer that it is allowed; `remaining` and `reset_at` are those of the limit with the least room."""
    room = [(state.max - state.used, state.until) for state in states if state.max is not None]
    remaining, until = min(room, key=lambda limit: limit[0], default=(None, NEVER))
    return {
        "allowed": True,
        "reason": None,
        "error": None,
        "usage_id": usage.id if usage else None,
        "status": usage.status if usage else None,
        "expires_at": text(usage.expires_at) if usage and usage.expires_at else None,
        "group": group,
        "kind": kind,
        "cost": cost,
        "limits": [limit_json(state) for state in states],
        "denied_by": None,
        "would_deny": [],
        "remaining": None if remaining is None else max(remaining, 0),
        "reset_at": text(until),
        "retry_after": None,
        "replayed": replayed,
    }


def denied_json(kind: str, cost: int, group: Json | None, verdict: Verdict, now: datetime) -> Json:
    """Answer that it is denied; `reset_at` is when the denying limit will have room."""
    answer = allowed_json(kind, cost, group, list(verdict.states))
    waits = None if verdict.room_at == NEVER else -((now - verdict.room_at) // timedelta(seconds=1))
    return {
        **answer,
        "allowed": False,
        "reason": verdict.reason,
        "error": _denial(kind, cost, verdict),
        "denied_by": limit_json(verdict.denied_by, verdict.room_at) if verdict.denied_by else None,
        "reset_at": text(verdict.room_at),
        "retry_after": waits,
    }


def refused_json(kind: str, cost: int, error: TokenLimitsError) -> Json:
    """Answer a request of a batch that would raise an error on its own."""
    answer = allowed_json(kind, cost, None, [])
    refusal = {"error": str(error), "code": error.code, "detail": error.detail}
    return {**answer, "allowed": False, "reason": "refused", **refusal}


def _denial(kind: str, cost: int, verdict: Verdict) -> str:
    words = kind.replace("_", " ")
    if verdict.reason == "not_in_group":
        return "The user is in no group that may pay for this"
    if verdict.group is None or verdict.denied_by is None:
        return f"None of the user's groups has a limit for {words} generations, so none is allowed"
    rule = verdict.denied_by.rule
    by = "by this user " if rule.scope == "member" else ""
    when = {"day": "today", "lifetime": "in total"}.get(rule.period, f"this {rule.period}")
    error = f"{words[0].upper()}{words[1:]} generation limit exceeded: "
    error += f"{verdict.denied_by.used} of {verdict.denied_by.max} used {by}{when}"
    if cost > 1:
        error += f", {cost} more asked for"
    if verdict.room_at != NEVER:
        local = verdict.room_at.astimezone(zone(verdict.group.timezone))
        error += f", resets {local:%Y-%m-%d %H:%M} {verdict.group.timezone}"
    return error
