"""The SQL functions that settle a usage, by their names and parameters (sql/schema/74_settle.sql).

Expired holds are marked whenever the clock moves, so there is nothing to sweep here.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NoReturn

from tokenlimits._core.arguments import MAX_COST, MAX_TTL
from tokenlimits.models import Status

from ._ledger import Json, Usage, refuse
from ._workers import WorkerFunctions


class HoldFunctions(WorkerFunctions):
    """Settling: once for each usage, by its id; and extending what isn't settled."""

    def commit_generation(self, p_usage_id: str, p_cost: int | None = None, p_overage: str = "reject") -> Json:
        """Settle a hold for what was reserved, or for less; or for more, which is charged whether it fits or not."""
        charges = p_overage == "charge"
        usage = self._recorded(p_usage_id)
        if usage.reserved_cost is None:
            _refuse_again(usage, "commit")
        cost = usage.reserved_cost if p_cost is None else p_cost
        if charges and not 0 <= cost <= MAX_COST:
            refuse("TL001", f"cost: must be from 0 to {MAX_COST}", detail="cost", hint="The hold is unchanged.")
        if not charges and not 0 <= cost <= usage.reserved_cost:
            refuse(
                "TL001",
                f"cost: must be from 0 to the reserved cost of {usage.reserved_cost}",
                detail="cost",
                hint='The hold is unchanged. To charge more than was reserved, pass the overage "charge".',
            )
        if usage.status == "expired" and not charges:
            self._require_room(usage, cost)
        replayed = usage.status == "committed" and usage.cost == cost
        if not replayed and usage.status not in ("reserved", "expired"):
            _refuse_again(usage, "commit")
        return self._settled(usage, None if replayed else "committed", cost)

    def release_generation(self, p_usage_id: str) -> Json:
        """Give back the whole cost of a hold."""
        usage = self._recorded(p_usage_id)
        if usage.status not in ("reserved", "released", "expired"):
            _refuse_again(usage, "release")
        return self._settled(usage, "released" if usage.status == "reserved" else None, usage.cost)

    def refund_generation(self, p_usage_id: str) -> Json:
        """Give back what a committed usage cost."""
        usage = self._recorded(p_usage_id)
        if usage.status == "reserved":
            refuse(
                "TL001",
                "usage_id: it is reserved; nothing was charged yet",
                detail="usage_id",
                hint="Release it instead.",
            )
        if usage.status not in ("committed", "refunded"):
            _refuse_again(usage, "refund")
        return self._settled(usage, "refunded" if usage.status == "committed" else None, usage.cost)

    def extend_generation(self, p_usage_id: str, p_ttl: int = 3600) -> Json:
        """Let a hold expire so many seconds from now, if that is later; at most 30 days after it was made."""
        usage = self._recorded(p_usage_id)
        if usage.status == "expired":
            refuse(
                "TL007",
                f"hold {usage.id} expired at {usage.expires_at}, so it can't be extended",
                detail=usage.id,
                hint="Extend a hold before it expires, or reserve for longer. "
                "It may still be committed if there is room.",
            )
        if usage.status != "reserved" or usage.expires_at is None:
            refuse(
                "TL006",
                f"usage {usage.id} is already {usage.status} with a cost of {usage.cost}, so it can't be extended",
                detail=usage.status,
                hint="Only a hold that is neither settled nor expired can be extended.",
            )
        latest = usage.created_at + timedelta(seconds=MAX_TTL)
        usage.expires_at = max(usage.expires_at, min(self.now + timedelta(seconds=p_ttl), latest))
        return self._usage_answer(usage)

    def _recorded(self, usage_id: str) -> Usage:
        usage = self._by_id.get(usage_id)
        if usage is None:
            refuse(
                "TL005",
                f"there is no usage {usage_id}",
                detail=usage_id,
                hint="Pass the usage_id of an allowed answer.",
            )
        return usage

    def _require_room(self, hold: Usage, cost: int) -> None:
        """Refuse to commit an expired hold unless all limits have room for it whose period still contains it.

        Its work is done, so it needs no place in flight.
        """
        states = self._states(hold.group_id, hold.user_id, hold.kind, in_flight=False)
        enforced = [state for state in states if state.terms.mode == "enforce"]
        judges = [state for state in enforced if hold.created_at >= state.since]
        if (enforced and not judges) or not all(state.has_room(cost) for state in judges):
            refuse(
                "TL007",
                f"hold {hold.id} expired at {hold.expires_at}, and its cost of {cost} no longer fits",
                detail=hold.id,
                hint="Nothing was charged. Reserve for longer or extend the hold in time, "
                'or charge it anyway with the overage "charge".',
            )

    def _settled(self, usage: Usage, status: Status | None, cost: int) -> Json:
        if status is not None:
            self._settle(usage, status, cost, self.now)
            self._remember_windows(usage)
        return self._usage_answer(usage, replayed=status is None)


def _refuse_again(usage: Usage, action: str) -> NoReturn:
    refuse(
        "TL006",
        f"usage {usage.id} is already {usage.status} with a cost of {usage.cost}, so it can't be settled by {action}",
        detail=usage.status,
        hint="Each usage settles once; only the same settlement may be repeated.",
    )
