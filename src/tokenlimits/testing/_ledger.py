"""The ledger that the fake keeps in memory, and its clock.

Usage since a moment is added up from the ledger when it is first needed, and kept up to date from then on. Ids are
text, as in JSON. Nothing is recorded later than `now`, so whatever was recorded since a period began is in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, NoReturn

from tokenlimits._refusals import refusal
from tokenlimits.models import Status

from ._periods import NEVER
from ._tree import Tree

Json = dict[str, Any]

MOMENT = timedelta(microseconds=1)

# more than the limits of one group have different beginnings at a time
_MANY_TOTALS = 16


@dataclass(eq=False, slots=True)
class Usage:
    """A row of the ledger; `request` is what was requested with the idempotency key."""

    id: str
    group_id: str
    user_id: str
    kind: str
    cost: int
    status: Status
    idempotency_key: str | None
    request: tuple[object, ...]
    metadata: Json
    created_at: datetime
    # of a hold, or what was one
    reserved_cost: int | None = None
    expires_at: datetime | None = None
    settled_at: datetime | None = None

    @property
    def live(self) -> bool:
        """Whether it counts towards limits."""
        return self.status in ("reserved", "committed")

    @property
    def is_of_its_moment(self) -> bool:
        """Whether it was not recorded for the past."""
        return self.reserved_cost is not None or self.settled_at == self.created_at


def refuse(code: str, message: str, *, detail: str | None = None, hint: str | None = None) -> NoReturn:
    """Raise the error that a client raises when the server answers with this one."""
    raise refusal(400, {"code": code, "message": f"{message} ({code})", "details": detail, "hint": hint})


class Ledger(Tree):
    """The usage, and a clock that stands still until it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime.now(UTC)
        self.ledger: list[Usage] = []
        self._by_group_and_kind: defaultdict[tuple[str, str], list[Usage]] = defaultdict(list)
        self._by_id: dict[str, Usage] = {}
        self._by_key: dict[tuple[str, str], Usage] = {}
        self._holds: dict[str, Usage] = {}
        # by group, kind and user (None: all users): what was used in it and beneath it since each moment
        self._totals: defaultdict[tuple[str, str, str | None], dict[datetime, int]] = defaultdict(dict)

    def _plant(self, group_id: str, parent_id: str | None) -> None:
        super()._plant(group_id, parent_id)
        self._totals.clear()

    def _live(self, top: str, kind: str, user_id: str | None, since: datetime) -> Iterator[Usage]:
        """List what counts of a kind since a moment in a group and beneath it, of a user or (None) of all."""
        for group_id in self._beneath(top):
            for usage in self._by_group_and_kind.get((group_id, kind), ()):
                if usage.live and usage.created_at >= since and user_id in (None, usage.user_id):
                    yield usage

    def _ends_of_holds(self, top: str, kind: str, user_id: str | None) -> Iterator[datetime]:
        """Tell when the open holds of a kind expire in a group and beneath it, of a user or (None) of all."""
        for hold in self._holds.values():
            is_counted = hold.kind == kind and user_id in (None, hold.user_id) and top in self._path(hold.group_id)
            if is_counted and hold.expires_at:
                yield hold.expires_at

    def _used(self, top: str, kind: str, user_id: str | None, since: datetime) -> int:
        totals = self._totals[top, kind, user_id]
        if since not in totals:
            if len(totals) >= _MANY_TOTALS:
                totals.clear()
            totals[since] = sum(usage.cost for usage in self._live(top, kind, user_id, since))
        return totals[since]

    def _write(self, usage: Usage) -> None:
        self.ledger.append(usage)
        self._by_group_and_kind[usage.group_id, usage.kind].append(usage)
        self._count(usage, usage.cost)
        if usage.status == "reserved":
            self._holds[usage.id] = usage
        if usage.idempotency_key is not None:
            self._take_key(usage, usage.idempotency_key)
        self._by_id[usage.id] = usage

    def _take_key(self, usage: Usage, key: str) -> None:
        """Bind a key to a usage; a dead one that had it has none from then on."""
        dead = self._by_key.get((usage.user_id, key))
        if dead is not None:
            dead.idempotency_key = None
        self._by_key[usage.user_id, key] = usage

    def _settle(self, usage: Usage, status: Status, cost: int, at: datetime) -> None:
        before = usage.cost if usage.live else 0
        usage.status, usage.cost, usage.settled_at = status, cost, at
        self._holds.pop(usage.id, None)
        self._count(usage, (cost if usage.live else 0) - before)

    def _count(self, usage: Usage, cost: int) -> None:
        for top, whose in product(self._path(usage.group_id), (None, usage.user_id)):
            totals = self._totals[top, usage.kind, whose]
            totals.update({since: used + cost for since, used in totals.items() if usage.created_at >= since})

    def _expire(self) -> None:
        """Mark holds whose time is over as expired; called whenever the clock moves."""
        for hold in list(self._holds.values()):
            if hold.expires_at is not None and hold.expires_at <= self.now:
                self._settle(hold, "expired", hold.cost, hold.expires_at)

    def _live_under(self, user_id: str, key: str | None, request: tuple[object, ...]) -> Usage | None:
        usage = None if key is None else self._by_key.get((user_id, key))
        if usage is None or not usage.live:
            return None
        if usage.request != request:
            refuse(
                "TL008",
                f"idempotency_key '{key}' was used for another request of this user",
                detail=usage.id,
                hint="Use one key per job: the same operation, kind, cost and group every time.",
            )
        return usage


def text(moment: datetime) -> str | None:
    """Write a moment as in JSON; null if it never comes."""
    return None if moment == NEVER else moment.isoformat()
