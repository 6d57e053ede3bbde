"""The SQL functions for workers, by their names and parameters (sql/schema/70 to 78)."""

from __future__ import annotations

from datetime import datetime, timedelta

from tokenlimits._core.arguments import EPOCH, uuid7
from tokenlimits.errors import TokenLimitsError

from ._answers import Verdict, allowed_json, denied_json, limit_json, refused_json
from ._groups import Bound, Group
from ._ledger import Json, Usage, refuse
from ._state import State

_CLOCKS_DIFFER = timedelta(minutes=1)


class WorkerFunctions(State):
    """Judging and recording."""

    def track_generation(
        self,
        p_user_id: str,
        p_kind: str,
        p_cost: int = 1,
        p_idempotency_key: str | None = None,
        p_group_id: str | None = None,
        p_metadata: Json | None = None,
    ) -> Json:
        """Check every limit that applies and record the generation."""
        return self._track(p_user_id, p_kind, p_cost, p_idempotency_key, p_group_id, p_metadata)

    def track_generations(
        self,
        p_requests: list[Json],
        p_max_wait: int | None = None,  # noqa: ARG002  # nobody else holds a group here
    ) -> list[Json]:
        """Track many, each by itself."""
        return [self._track_or_refuse(request) for request in p_requests]

    def _track_or_refuse(self, request: Json) -> Json:
        try:
            return self.track_generation(**{f"p_{name}": value for name, value in request.items()})
        except TokenLimitsError as error:
            return refused_json(request["kind"], request["cost"], error)

    def reserve_generation(
        self,
        p_user_id: str,
        p_kind: str,
        p_cost: int = 1,
        p_ttl: int = 3600,
        p_idempotency_key: str | None = None,
        p_group_id: str | None = None,
        p_metadata: Json | None = None,
    ) -> Json:
        """Hold a generation's cost until it is settled, or for so many seconds."""
        ttl = timedelta(seconds=p_ttl)
        return self._track(p_user_id, p_kind, p_cost, p_idempotency_key, p_group_id, p_metadata, ttl)

    def check_generation(self, p_user_id: str, p_kind: str, p_cost: int = 1, p_group_id: str | None = None) -> Json:
        """Say what tracking would answer; record nothing."""
        return self._verdict_answer(p_kind, p_cost, self._judge(p_user_id, p_kind, p_cost, p_group_id))

    def record_generation(
        self,
        p_user_id: str,
        p_kind: str,
        p_cost: int = 1,
        p_created_at: str | None = None,
        p_idempotency_key: str | None = None,
        p_group_id: str | None = None,
        p_metadata: Json | None = None,
    ) -> Json:
        """Record usage that has already happened; never denied."""
        created_at = self.now if p_created_at is None else datetime.fromisoformat(p_created_at)
        if created_at > self.now + _CLOCKS_DIFFER:
            refuse(
                "TL001",
                "created_at: must not be in the future",
                detail="created_at",
                hint="Nothing was recorded.",
            )
        request = ("record", p_kind, p_cost, p_group_id)
        if live := self._live_under(p_user_id, p_idempotency_key, request):
            return self._usage_answer(live, replayed=True)
        return self._record(
            self._recording_group(p_user_id, p_kind, p_group_id),
            p_user_id,
            p_kind,
            p_cost,
            min(created_at, self.now),
            p_idempotency_key,
            request,
            p_metadata,
        )

    def user_generation_usage(self, p_user_id: str) -> list[Json]:
        """List every limit that applies to a user."""
        bounds = [
            bound for group in self._paying_groups(p_user_id, None) for bound in self._bounds(group.id, p_user_id)
        ]
        # through two memberships, a user may inherit the same
        return [limit_json(self._state(bound), None) for bound in dict.fromkeys(bounds)]

    def _track(
        self,
        user_id: str,
        kind: str,
        cost: int,
        key: str | None,
        group_id: str | None,
        metadata: Json | None,
        ttl: timedelta | None = None,
    ) -> Json:
        request = ("track" if ttl is None else "reserve", kind, cost, group_id)
        if live := self._live_under(user_id, key, request):
            return self._usage_answer(live, replayed=True)
        verdict = self._judge(user_id, kind, cost, group_id, in_flight=ttl is not None)
        if verdict.reason is not None or verdict.group is None:
            return self._verdict_answer(kind, cost, verdict)
        group, observed = verdict.group, verdict.observed
        return self._record(group, user_id, kind, cost, self.now, key, request, metadata, ttl, observed)

    def _judge(self, user_id: str, kind: str, cost: int, pinned: str | None, *, in_flight: bool = False) -> Verdict:
        """Find the group that pays; only a hold is judged by limits in flight."""
        groups = self._paying_groups(user_id, pinned)
        denial = Verdict("no_limit_for_kind" if groups else "not_in_group")
        for group in groups:
            states = tuple(self._states(group.id, user_id, kind, in_flight=in_flight))
            if not states:
                continue
            without_room = [state for state in states if not state.has_room(cost)]
            observed = tuple(state.bound for state in without_room if state.terms.mode == "observe")
            full = [state for state in without_room if state.terms.mode == "enforce"]
            if not full:
                return Verdict(None, group, states, observed=observed)
            last = max(full, key=lambda state: state.room_at(cost))
            room_at = last.room_at(cost)
            if denial.group is None or room_at < denial.room_at:
                denial = Verdict("limit_exceeded", group, states, last, room_at, observed)
        return denial

    def _recording_group(self, user_id: str, kind: str, named: str | None) -> Group:
        if named is not None:
            return self._group(named)
        groups = self._paying_groups(user_id, None)
        if not groups:
            refuse(
                "TL001",
                "group_id: is required, since the user is in no group",
                detail="group_id",
                hint="Name the group that this usage belongs to.",
            )
        entitled = (group for group in groups if self._bounds(group.id, user_id, kind, in_flight=False))
        return next(entitled, groups[0])

    def _record(
        self,
        group: Group,
        user_id: str,
        kind: str,
        cost: int,
        created_at: datetime,
        key: str | None,
        request: tuple[object, ...],
        metadata: Json | None,
        ttl: timedelta | None = None,
        observed: tuple[Bound, ...] = (),
    ) -> Json:
        usage = Usage(
            id=self._usage_id(created_at, user_id if group.is_spread else group.id),
            group_id=group.id,
            user_id=user_id,
            kind=kind,
            cost=cost,
            status="committed" if ttl is None else "reserved",
            idempotency_key=key,
            request=request,
            metadata=metadata or {},
            created_at=created_at,
            reserved_cost=None if ttl is None else cost,
            settled_at=self.now if ttl is None else None,
            expires_at=None if ttl is None else created_at + ttl,
        )
        self._write(usage)
        self._remember_windows(usage)
        return self._usage_answer(usage, observed)

    def _usage_id(self, at: datetime, home: str) -> str:
        """Make the id of a usage: a UUIDv7 of its moment that ends with the last four hex digits of its home's id."""
        return str(uuid7((at - EPOCH) // timedelta(milliseconds=1)))[:-4] + home[-4:]

    def _usage_answer(self, usage: Usage, observed: tuple[Bound, ...] = (), *, replayed: bool = False) -> Json:
        is_hold = usage.reserved_cost is not None
        states = self._states(usage.group_id, usage.user_id, usage.kind, in_flight=is_hold)
        named = self.reference(usage.group_id)
        return allowed_json(usage.kind, usage.cost, named, states, usage, observed=observed, replayed=replayed)

    def _verdict_answer(self, kind: str, cost: int, verdict: Verdict) -> Json:
        group = self.reference(verdict.group.id) if verdict.group else None
        if verdict.reason is None:
            return allowed_json(kind, cost, group, verdict.states, observed=verdict.observed)
        return denied_json(kind, cost, group, verdict, self.now)
