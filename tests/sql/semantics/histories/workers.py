"""What workers ask, and how they settle; and time passing."""

from __future__ import annotations

from datetime import datetime, timedelta

from hypothesis import strategies as st
from tests.sql.semantics.api import Json
from tests.sql.semantics.histories import drawn
from tests.sql.semantics.histories.history import History, happens

from tokenlimits.testing._ledger import Usage
from tokenlimits.testing._periods import NEVER

COMMIT, RELEASE, REFUND = "commit_generation", "release_generation", "refund_generation"
EXTEND = "extend_generation"
_UNSWEPT = "select count(*) from tokenlimits.holds where expires_at <= tokenlimits.clock()"


class Workers(History):
    """Tracking, one by one and many at once, and what comes before and after."""

    @happens(6)
    def track(self) -> None:
        metadata = self.one_of([None, {"prompt": "a cat", "sizes": [512, 1.5]}])
        self.call("track_generation", **self.request(), p_metadata=metadata)

    @happens(3)
    def track_many(self) -> None:
        requests = [self.request() for _ in range(self.draw(st.integers(1, 8)))]
        self.twins.track_many([{name[2:]: value for name, value in request.items()} for request in requests])

    @happens(3)
    def track_until_full(self) -> None:
        request = self.request() | {"p_idempotency_key": None}
        for _ in range(self.draw(st.integers(2, 6))):
            self.call("track_generation", **request)

    @happens(3)
    def check(self) -> None:
        self.call("check_generation", **self.request(keyed=False))

    @happens(3)
    def record(self) -> None:
        # also ahead, for clocks differ; by a minute, and by more than that
        ahead = st.sampled_from([timedelta(minutes=-1), timedelta(minutes=-1, microseconds=-1)])
        past = self.draw(st.none() | drawn.pasts | drawn.pasts | ahead)
        created_at = (self.twins.now - past).isoformat() if past else None
        self.call("record_generation", **self.request(), p_created_at=created_at)

    @happens(3)
    def repeat(self) -> None:
        """Send an earlier call again, or one that is nearly the same."""
        for usage in self.any_of([usage for usage in self.twins.model.ledger if usage.idempotency_key]):
            operation, kind, cost, group = usage.request
            request = {
                "p_user_id": usage.user_id,
                "p_kind": kind,
                "p_cost": cost,
                "p_group_id": group,
                "p_idempotency_key": usage.idempotency_key,
            }
            other = self.one_of([{}, {}, {}, {"p_cost": 4}, {"p_kind": "video"}, {"p_group_id": None}])
            self.call(f"{operation}_generation", **request | other)

    def request(self, *, keyed: bool = True) -> Json:
        request = {
            "p_user_id": self.draw(drawn.users),
            "p_kind": self.draw(drawn.kinds),
            "p_cost": self.draw(drawn.costs),
            "p_group_id": self.pin(),
        }
        return request | {"p_idempotency_key": self.draw(drawn.keys)} if keyed else request

    def any_of(self, usages: list[Usage]) -> list[Usage]:
        """Draw one of them, if there is any."""
        return [self.one_of(usages)] if usages else []


class Holders(Workers):
    """The second step: commit, release, refund, and holds that expire."""

    @happens(6)
    def reserve(self) -> None:
        self.call("reserve_generation", **self.request(), p_ttl=self.draw(drawn.ttls))

    @happens(6)
    def settle_a_hold(self) -> None:
        for usage in self.any_of(self.holds("reserved")):
            self.settle_by(self.one_of([COMMIT, COMMIT, RELEASE]), usage)

    @happens(6)
    def settle_late(self) -> None:
        """Perhaps when it has been swept, and others have taken the room."""
        for usage in self.any_of(self.holds("reserved", "expired")):
            assert usage.expires_at
            self.twins.wait_until(usage.expires_at + self.one_of([timedelta(0), *drawn.SOON]))
            self.one_of([self.track, self.reserve, self.check, self.sweep])()
            self.settle_by(self.one_of([COMMIT, COMMIT, RELEASE]), usage)

    @happens(3)
    def extend(self) -> None:
        """Perhaps at the last moment, or too late."""
        for usage in self.any_of(self.holds("reserved", "expired")):
            assert usage.expires_at
            if self.one_of([True, False]):
                self.twins.wait_until(usage.expires_at - self.one_of([timedelta(microseconds=1), timedelta(0)]))
            self.settle_by(EXTEND, usage)

    @happens(3)
    def give_back_what_opened_a_window(self) -> None:
        """The window stays, unless it is counted afresh."""
        model = self.twins.model
        paths = {(usage.group_id, usage.user_id) for usage in model.ledger if usage.live}
        states = [state for path in sorted(paths) for state in model._states(*path) if state.rule.starts == "first_use"]
        opened = {state.since for state in states}
        for usage in self.any_of([usage for usage in model.ledger if usage.live and usage.created_at in opened]):
            self.call(RELEASE if usage.status == "reserved" else REFUND, p_usage_id=usage.id)

    @happens(3)
    def settle_whatever_it_is(self) -> None:
        """The answer may well be that it can't be settled so."""
        for usage in self.any_of(self.twins.model.ledger):
            self.settle_by(self.one_of([COMMIT, RELEASE, REFUND, REFUND, EXTEND]), usage)

    @happens()
    def settle_what_nobody_knows(self) -> None:
        self.call(self.one_of([COMMIT, RELEASE, REFUND, EXTEND]), p_usage_id=drawn.NOBODY)

    @happens()
    def sweep(self) -> None:
        before, swept, after = map(self.twins.count, (_UNSWEPT, "select tokenlimits.tidy()", _UNSWEPT))
        assert after == before - swept
        assert (swept > 0) == (before > 0)

    def settle_by(self, function: str, usage: Usage) -> None:
        params: Json = {"p_usage_id": usage.id}
        if function == COMMIT:
            held = usage.reserved_cost or 1
            params["p_cost"] = self.one_of([None, None, held, held - 1, 0, 1, held + 1, held + 7, -1])
            params["p_overage"] = self.one_of([None, "reject", "charge", "charge"])
        elif function == EXTEND:
            params["p_ttl"] = self.draw(drawn.ttls)
        for _ in range(self.one_of([1, 1, 2])):
            self.call(function, **params)


class Time(Holders):
    """Waiting."""

    @happens(3)
    def wait(self) -> None:
        self.twins.wait(self.one_of([*drawn.SOON, *drawn.LATER]))

    @happens(3)
    def wait_for_the_period_to_end(self) -> None:
        model, user = self.twins.model, self.draw(drawn.users)
        states = [state for group in self.groups() for state in model._states(group["id"], user)]
        ends = [at for state in states for at in (state.until, state.reset_at, state.override_ends) if at != NEVER]
        if ends:
            self.wait_until(self.one_of(ends))

    @happens(3)
    def wait_for_a_hold_to_expire(self) -> None:
        for usage in self.any_of(self.holds("reserved")):
            assert usage.expires_at
            self.wait_until(usage.expires_at)

    def wait_until(self, moment: datetime) -> None:
        """Wait until then, or until a moment before."""
        self.twins.wait_until(moment - timedelta(microseconds=self.one_of([0, 0, 1])))
