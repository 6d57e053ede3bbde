"""The JSON objects that the SQL functions answer with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import get_args

from tokenlimits._limits import SinglePeriod, number_and_unit
from tokenlimits.errors import TokenLimitsError

from ._groups import Bound, Group
from ._ledger import Json, Usage, text
from ._limits import Rule
from ._periods import NEVER, zone
from ._room import LimitState

_UNITS = get_args(SinglePeriod)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which group pays, or why none does; `group` is then the one that will have room first, at `room_at`.

    `observed` are the limits that would have denied it, if they didn't only observe.
    """

    reason: str | None
    group: Group | None = None
    states: tuple[LimitState, ...] = ()
    denied_by: LimitState | None = None
    room_at: datetime = NEVER
    observed: tuple[Bound, ...] = ()


def place_of(rule: Rule) -> tuple[object, ...]:
    """Order the limits of a group for those who read them."""
    number, unit = number_and_unit(rule.period)
    return (rule.kind, rule.scope, _UNITS.index(unit), number, rule.starts)


def group_json(group: Group, parent_id: str | None) -> Json:
    """Show a group with its limits."""
    return {
        "id": group.id,
        "parent_id": parent_id,
        "name": group.name,
        "description": group.description,
        "priority": group.priority,
        "timezone": group.timezone,
        "is_default": group.is_default,
        "is_spread": group.is_spread,
        "anchor_at": group.anchor_at and text(group.anchor_at),
        "created_at": text(group.created_at),
        "updated_at": text(group.updated_at),
        "limits": [
            {
                "kind": rule.kind,
                "period": rule.period,
                "starts": rule.starts,
                "scope": rule.scope,
                "mode": group.limits[rule].mode,
                "max": group.limits[rule].max,
                "counts": group.limits[rule].counts,
            }
            for rule in sorted(group.limits, key=place_of)
        ],
    }


def limit_json(state: LimitState, in_group: str | None, reset_at: datetime | None = None) -> Json:
    """Show a limit in its period, or until another moment; and whose it is, if not that of a group."""
    left, owner = state.units_left(), state.bound.owner
    return {
        "group": None if owner.id == in_group else {"id": owner.id, "name": owner.name},
        "kind": state.rule.kind,
        "period": state.rule.period,
        "starts": state.rule.starts,
        "scope": state.rule.scope,
        "mode": state.terms.mode,
        "max": state.terms.max,
        "used": state.used,
        "remaining": None if left is None else max(left, 0),
        "reset_at": text(reset_at or state.reset_at),
        "weight": state.weight,
    }


def group_limit_json(state: LimitState, subjects: Sequence[LimitState], in_group: str) -> Json:
    """Show a limit in the report of a group: a pool, or what all members or children have used, each in its window."""
    together = state.bound.whose is None and state.rule.scope != "group"
    if together and (state.rule.scope == "child" or state.rule.starts != "calendar"):
        reset_at = state.reset_at if subjects and state.rule.starts == "calendar" else NEVER
        state = replace(state, used=sum(each.used for each in subjects), reset_at=reset_at)
    # an override may let a subject use more than the others, or less
    shares = [each.terms.max for each in (subjects if together else [state])]
    if not shares and state.rule.scope == "member":
        shares = [None if state.terms.max is None else 0]
    capacity = None if None in shares else sum(filter(None, shares))
    fraction = None
    if capacity is not None:
        # rounded half up to six digits; what has no capacity is full
        fraction = (2_000_000 * state.used + capacity) // (2 * capacity) / 1_000_000 if capacity else 1
    remaining = None if capacity is None else max(capacity - state.used, 0)
    return {**limit_json(state, in_group), "capacity": capacity, "remaining": remaining, "fraction": fraction}


def allowed_json(
    kind: str,
    cost: int,
    group: Json | None,
    states: Sequence[LimitState],
    usage: Usage | None = None,
    *,
    observed: Sequence[Bound] = (),
    replayed: bool = False,
) -> Json:
    """Answer that it is allowed; `remaining` and `reset_at` are those of the enforced limit with the least room.

    How many may run at once is in other units.
    """
    enforced = [state for state in states if state.terms.mode == "enforce" and not state.rule.in_flight]
    payer: str | None = None if group is None else group["id"]
    room = [(left, state.reset_at) for state in enforced if (left := state.units_left()) is not None]
    remaining, reset_at = min(room, key=lambda limit: limit[0], default=(None, NEVER))
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
        "limits": [limit_json(state, payer) for state in states],
        "denied_by": None,
        "would_deny": [limit_json(state, payer) for state in states if state.bound in observed],
        "remaining": None if remaining is None else max(remaining, 0),
        "reset_at": text(reset_at),
        "retry_after": None,
        "replayed": replayed,
    }


def denied_json(kind: str, cost: int, group: Json | None, verdict: Verdict, now: datetime) -> Json:
    """Answer that it is denied; `reset_at` is when the denying limit will have room."""
    answer = allowed_json(kind, cost, group, verdict.states, observed=verdict.observed)
    payer: str | None = None if group is None else group["id"]
    denied_by = verdict.denied_by and limit_json(verdict.denied_by, payer, verdict.room_at)
    waits = None if verdict.room_at == NEVER else -((now - verdict.room_at) // timedelta(seconds=1))
    return {
        **answer,
        "allowed": False,
        "reason": verdict.reason,
        "error": _denial(kind, cost, verdict),
        "denied_by": denied_by,
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
    state, rule = verdict.denied_by, verdict.denied_by.rule
    error = f"{words[0].upper()}{words[1:]} generation limit exceeded: "
    timezone = state.bound.owner.timezone
    local = verdict.room_at.astimezone(zone(timezone)) if verdict.room_at != NEVER else None
    by = {"member": " by this user", "child": " by this customer"}.get(rule.scope, "")
    if not by and state.bound.owner is not verdict.group:
        by = f" in {state.bound.owner.name}"
    if rule.in_flight:
        error += f"{state.used} {words}{'' if state.used == 1 else 's'} in progress"
        error += f"{by}, at most {state.terms.max} at once"
        return error if local is None else f"{error}, next place {local:%Y-%m-%d %H:%M} {timezone}"
    units = state.units(cost)
    pool = f"{rule.kind} ".replace("_", " ") if state.terms.counts is not None else ""
    error += f"{state.used} of {state.terms.max} {pool}used{by} {_when(state)}"
    if units > 1:
        error += f", {units} more asked for"
    if local is not None:
        resets = "room again" if rule.starts == "rolling" else "resets"
        error += f", {resets} {local:%Y-%m-%d %H:%M} {timezone}"
    return error


def _when(state: LimitState) -> str:
    rule = state.rule
    if rule.starts == "rolling":
        return f"in the last {rule.period}"
    if rule.starts != "calendar":
        return f"since {state.since.astimezone(zone(state.bound.owner.timezone)):%Y-%m-%d %H:%M}"
    return {"day": "today", "lifetime": "in total"}.get(rule.period, f"this {rule.period}")
