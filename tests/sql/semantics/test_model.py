"""The SQL against the plain model, side by side: random histories of calls, edits and time passing."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import psycopg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import FORGET_EVERYTHING, Database
from tests.support import clock, invariants
from tests.support.model import PERIODS, Model, Refusal, Rule, Usage, by_rule, differences

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

SETTINGS = settings(
    max_examples=1500 if THOROUGH else 80,
    stateful_step_count=60 if THOROUGH else 30,
    derandomize=not THOROUGH,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    report_multiple_bugs=False,
)

USERS = [UUID(int=number) for number in range(1, 5)]
NAMES = ["Alpha", "ALPHA", "Beta", "Gamma", "Delta"]

# moments around which something happens to the calendar
BEGINNINGS = [
    "2026-03-08 06:50:00+00:00",  # New York skips an hour, Havana skips midnight an hour before
    "2026-03-29 00:50:00+00:00",  # Paris and the Azores skip an hour
    "2026-04-04 14:50:00+00:00",  # Lord Howe goes back half an hour
    "2026-10-24 23:50:00+00:00",  # soon midnight happens twice in the Azores
    "2026-11-01 03:50:00+00:00",  # and in Havana
    "2026-12-31 22:10:00+00:00",  # a year ends in the middle of a week
    "2028-02-28 23:59:00+00:00",  # a leap day follows
]
ZONES = [
    "UTC",
    "Europe/Paris",
    "America/New_York",
    "America/Havana",
    "Atlantic/Azores",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
]

users = st.sampled_from(USERS)
kinds = st.sampled_from(["image", "image", "video", "gpu_second"])
periods = st.sampled_from(PERIODS)
scopes = st.sampled_from(["group", "member"])
costs = st.sampled_from([1, 1, 1, 2, 3, 7])
keys = st.sampled_from([None, None, "job-1", "job-2", "job-3"])
maxima = st.sampled_from([None, 0, 1, 2, 3, 5, 8, 13])
priorities = st.sampled_from([0, 0, 1, 5])
limits = st.lists(
    st.fixed_dictionaries({"kind": kinds, "period": periods, "scope": scopes, "max": maxima}),
    max_size=4,
    unique_by=lambda x: (x["kind"], x["period"], x["scope"]),
)
pasts = st.sampled_from(
    [timedelta(seconds=1), timedelta(minutes=20), timedelta(hours=7), timedelta(days=1), timedelta(days=40)]
)
ttls = st.sampled_from([1, 1, 60, 900, 3600, 24 * 3600, 3 * 24 * 3600])
steps = st.one_of(
    st.sampled_from([timedelta(microseconds=1), timedelta(seconds=59), timedelta(minutes=15)]),
    st.sampled_from([timedelta(minutes=30), timedelta(hours=1), timedelta(hours=11), timedelta(hours=24)]),
    st.sampled_from([timedelta(days=2), timedelta(days=6), timedelta(days=29), timedelta(days=180)]),
)

Either = Model | Api

# what nobody has swept yet is expired all the same
LEDGER = """
select
  id,
  case when status = 'reserved' and expires_at <= tokenlimits.clock() then 'expired' else status end,
  cost
from public.generation_usage
"""


class Machine(RuleBasedStateMachine):
    """Does the same to the model and to the database, and compares what they answer."""

    def __init__(self, api: Api, zones: Callable[[str], ZoneInfo]) -> None:
        super().__init__()
        self.api = api
        self.zones = zones
        self.usage_ids: dict[UUID, UUID] = {}
        self.deleted: list[UUID] = []

    @initialize(beginning=st.sampled_from(BEGINNINGS), zone=st.sampled_from(ZONES), first=limits, second=limits)
    def begin(self, beginning: str, zone: str, first: list[Any], second: list[Any]) -> None:
        self.api.execute(FORGET_EVERYTHING)
        for user in USERS:
            self.api.add_user(user)
        self.model = Model(datetime.fromisoformat(beginning), self.zones)
        self.show_time()
        one = self.make_group(name="First", timezone=zone, limits=first)
        two = self.make_group(name="Second", priority=1, limits=second)
        for group, user in ((one, 0), (one, 1), (two, 1), (two, 2)):
            self.both(lambda x, group=group, user=user: x.add_member(group, USERS[user]))

    # asking

    @rule(user=users, kind=kinds, cost=costs, key=keys, data=st.data())
    def track(self, user: UUID, kind: str, cost: int, key: str | None, data: st.DataObject) -> None:
        group = data.draw(self.pins())
        self.ask(lambda x: x.track(user, kind, cost, key, group))

    @rule(data=st.data(), size=st.integers(1, 8))
    def track_many(self, data: st.DataObject, size: int) -> None:
        """One batch answers what single calls in that order answer."""
        request = st.tuples(users, kinds, costs, keys, self.pins())
        requests = data.draw(st.lists(request, min_size=size, max_size=size))
        before = {usage.id for usage in self.model.usages}
        answers = self.api.track_many(requests)
        for one, actual in zip(requests, answers, strict=True):
            expected = self.outcome(lambda one=one: self.model.track(*one))
            if isinstance(expected, str):
                assert (actual["reason"], actual["code"]) == ("refused", expected)
            else:
                counters = {"limits", "remaining", "reset_at"} if expected["usage_id"] in before else set()
                assert set(differences(expected, actual)) <= counters
                self.same_usage(expected, actual)
        self.tick()

    @rule(user=users, cost=costs, times=st.integers(2, 6), data=st.data())
    def track_until_full(self, user: UUID, cost: int, times: int, data: st.DataObject) -> None:
        kind = data.draw(kinds)
        for _ in range(times):
            self.ask(lambda x: x.track(user, kind, cost))

    @precondition(lambda self: any(usage.key for usage in self.model.usages))
    @rule(data=st.data())
    def repeat_an_earlier_call(self, data: st.DataObject) -> None:
        keyed = [usage for usage in self.model.usages if usage.key]
        usage = data.draw(st.sampled_from(keyed))
        operation, kind, cost, group = usage.request
        key = usage.key  # before the model takes it from a dead usage
        if operation == "track":
            self.ask(lambda x: x.track(usage.user_id, kind, cost, key, group))
        elif operation == "reserve":
            self.ask(lambda x: x.reserve(usage.user_id, kind, cost, 60, key, group))
        else:
            self.ask(lambda x: x.record(usage.user_id, kind, cost, None, key, group))

    @rule(user=users, kind=kinds, cost=costs, data=st.data())
    def check(self, user: UUID, kind: str, cost: int, data: st.DataObject) -> None:
        group = data.draw(self.pins())
        self.ask(lambda x: x.check(user, kind, cost, group))

    @rule(user=users, kind=kinds, cost=costs, key=keys, past=st.none() | pasts, data=st.data())
    def record(
        self, user: UUID, kind: str, cost: int, key: str | None, past: timedelta | None, data: st.DataObject
    ) -> None:
        group = data.draw(self.pins())
        created_at = self.model.now - past if past else None
        self.ask(lambda x: x.record(user, kind, cost, created_at, key, group))

    @rule(user=users)
    def record_in_the_future(self, user: UUID) -> None:
        created_at = self.model.now + timedelta(minutes=2)
        assert self.both(lambda x: x.record(user, "image", 1, created_at)) == "TL001"

    @rule(user=users)
    def look_at_a_user(self, user: UUID) -> None:
        self.compare_user(user)

    @rule(data=st.data(), bucket=st.sampled_from(["hour", "day", "week", "month"]))
    def look_at_history(self, data: st.DataObject, bucket: str) -> None:
        group = data.draw(st.none() | st.sampled_from(list(self.model.groups))) if self.model.groups else None
        self.compare_history(group, bucket)

    # editing, by function

    @precondition(lambda self: len(self.model.groups) < 4)
    @rule(name=st.sampled_from(NAMES), priority=priorities, limits=limits)
    def add_group(self, name: str, priority: int, limits: list[Any]) -> None:
        self.make_group(name=name, priority=priority, limits=limits)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), name=st.none() | st.sampled_from(NAMES), priority=st.none() | priorities, limits=limits)
    def edit_group(self, data: st.DataObject, name: str | None, priority: int | None, limits: list[Any]) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.save_group(group, name=name, priority=priority, limits=limits) and None)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), is_default=st.booleans())
    def set_default(self, data: st.DataObject, is_default: bool) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.save_group(group, is_default=is_default) and None)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), zone=st.sampled_from(ZONES))
    def set_timezone(self, data: st.DataObject, zone: str) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.save_group(group, timezone=zone) and None)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), kind=kinds, period=periods, scope=scopes, maximum=maxima)
    def set_limit(self, data: st.DataObject, kind: str, period: str, scope: str, maximum: int | None) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.set_limit(group, kind, period, scope, maximum))

    @precondition(lambda self: self.limits())
    @rule(data=st.data(), maximum=maxima)
    def change_max(self, data: st.DataObject, maximum: int | None) -> None:
        group, limit = data.draw(st.sampled_from(self.limits()))
        self.both(lambda x: x.set_limit(group, limit.kind, limit.period, limit.scope, maximum))

    @precondition(lambda self: self.limits())
    @rule(data=st.data())
    def remove_limit(self, data: st.DataObject) -> None:
        group, limit = data.draw(st.sampled_from(self.limits()))
        self.both(lambda x: x.remove_limit(group, limit.kind, limit.period, limit.scope))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), user=users)
    def add_member(self, data: st.DataObject, user: UUID) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.add_member(group, user))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), user=users)
    def remove_member(self, data: st.DataObject, user: UUID) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.remove_member(group, user))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), user=users)
    def move_member(self, data: st.DataObject, user: UUID) -> None:
        from_, to = data.draw(self.groups()), data.draw(self.groups())
        self.both(lambda x: x.move_member(user, from_, to))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), kind=st.none() | kinds)
    def reset(self, data: st.DataObject, kind: str | None) -> None:
        group = data.draw(self.groups())
        self.both(lambda x: x.reset(group, kind))

    @precondition(lambda self: len(self.model.groups) > 1)
    @rule(data=st.data())
    def delete_group(self, data: st.DataObject) -> None:
        group = data.draw(self.groups())
        self.deleted.append(group)
        self.both(lambda x: x.delete_group(group))

    @rule(user=users)
    def delete_user_and_sign_up_again(self, user: UUID) -> None:
        self.both(lambda x: x.delete_user(user))
        self.api.add_user(user)

    # editing the tables, as an admin does in a table editor

    @precondition(lambda self: self.limits())
    @rule(data=st.data(), maximum=maxima)
    def edit_max_in_the_table(self, data: st.DataObject, maximum: int | None) -> None:
        group, limit = data.draw(st.sampled_from(self.limits()))
        self.model.set_limit(group, limit.kind, limit.period, limit.scope, maximum)
        assert self.update_limits("max = %s", [maximum], group, limit) == 1

    @precondition(lambda self: self.limits())
    @rule(data=st.data(), period=periods, scope=scopes)
    def make_a_limit_another_in_the_table(self, data: st.DataObject, period: str, scope: str) -> None:
        group, limit = data.draw(st.sampled_from(self.limits()))
        target = data.draw(self.groups())
        if Rule(limit.kind, period, scope) in self.model.groups[target].limits:
            return
        maximum = self.model.groups[group].limits.pop(limit)
        self.model.set_limit(target, limit.kind, period, scope, maximum)
        columns = "group_id = %s, period = %s, scope = %s"
        assert self.update_limits(columns, [target, period, scope], group, limit) == 1

    @precondition(lambda self: self.limits())
    @rule(data=st.data(), by=st.integers(0, 3))
    def raise_all_limits_of_a_group_in_the_table(self, data: st.DataObject, by: int) -> None:
        group, _ = data.draw(st.sampled_from(self.limits()))
        for limit, maximum in self.model.groups[group].limits.items():
            if maximum is not None:
                self.model.set_limit(group, limit.kind, limit.period, limit.scope, maximum + by)
        self.api.execute("update public.group_limits set max = max + %s where group_id = %s", [by, group])

    @precondition(lambda self: self.limits())
    @rule(data=st.data())
    def delete_limits_of_a_kind_in_the_table(self, data: st.DataObject) -> None:
        group, limit = data.draw(st.sampled_from(self.limits()))
        for other in list(self.model.groups[group].limits):
            if other.kind == limit.kind:
                self.model.remove_limit(group, other.kind, other.period, other.scope)
        self.api.execute("delete from public.group_limits where group_id = %s and kind = %s", [group, limit.kind])

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), zone=st.sampled_from(ZONES), priority=priorities)
    def edit_a_group_in_the_table(self, data: st.DataObject, zone: str, priority: int) -> None:
        group = data.draw(self.groups())
        self.model.save_group(group, timezone=zone, priority=priority)
        self.api.execute(
            "update public.user_groups set timezone = %s, priority = %s where id = %s",
            [zone.lower(), priority, group],
        )

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), user=users)
    def leave_and_rejoin_in_the_table(self, data: st.DataObject, user: UUID) -> None:
        group = data.draw(self.groups())
        self.model.remove_member(group, user)
        self.model.add_member(group, user)
        self.api.execute("delete from public.group_memberships where group_id = %s and user_id = %s", [group, user])
        self.api.execute("insert into public.group_memberships (group_id, user_id) values (%s, %s)", [group, user])

    # time

    @rule(step=steps)
    def wait(self, step: timedelta) -> None:
        self.model.advance(step)
        self.show_time()

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), period=st.sampled_from(PERIODS[:-1]), short=st.sampled_from([0, 0, 1]))
    def wait_for_the_period_to_end(self, data: st.DataObject, period: str, short: int) -> None:
        boundary = self.model.next_boundary(data.draw(self.groups()), period)
        self.model.advance_to(max(boundary - timedelta(microseconds=short), self.model.now))
        self.show_time()

    # always

    @invariant()
    def nothing_drifts(self) -> None:
        if hasattr(self, "model"):
            assert invariants.drift(self.api.connection) == []

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for user in USERS:
            self.compare_user(user)
        for group in self.model.groups:
            self.compare_group(group)
            self.compare_history(group, "day")
        self.compare_history(None, "hour")
        assert self.api.one("select count(*) from public.generation_usage") == len(self.model.usages)

    # how

    def groups(self) -> st.SearchStrategy[UUID]:
        return st.sampled_from(list(self.model.groups))

    def pins(self) -> st.SearchStrategy[UUID | None]:
        """A group to pin: mostly none, any that there is, rarely one that is gone."""
        there = list(self.model.groups)
        return st.sampled_from([None] * (2 * len(there) + 2) + there + self.deleted[-1:])

    def limits(self) -> list[tuple[UUID, Rule]]:
        return [(group.id, limit) for group in self.model.groups.values() for limit in group.limits]

    def update_limits(self, columns: str, values: list[Any], group: UUID, limit: Rule) -> int:
        where = "group_id = %s and kind = %s and period = %s and scope = %s"
        return self.api.execute(
            f"update public.group_limits set {columns} where {where}",
            [*values, group, limit.kind, limit.period, limit.scope],
        )

    def make_group(self, **fields: Any) -> UUID:
        made = self.outcome(lambda: self.api.save_group(**fields))
        new_id = uuid4() if isinstance(made, str) else made["id"]
        expected = self.outcome(lambda: self.model.save_group(new_id=new_id, **fields))
        if isinstance(made, str):
            assert made == expected
        else:
            assert differences(expected, made) == {}
        return new_id

    def ask(self, question: Callable[[Either], Any]) -> None:
        """Ask both for a usage or a verdict, and compare the answers; a moment passes."""
        expected = self.outcome(lambda: question(self.model))
        actual = self.outcome(lambda: question(self.api))
        if isinstance(expected, str) or isinstance(actual, str):
            assert actual == expected
        else:
            assert differences(expected, actual) == {}
            self.same_usage(expected, actual)
        self.tick()

    def same_usage(self, expected: Any, actual: Any) -> None:
        """Compare which usage an answer names: the one that the same answer named before."""
        if expected["usage_id"] is not None:
            assert actual["usage_id"] == self.usage_ids.setdefault(expected["usage_id"], actual["usage_id"])

    def both(self, action: Callable[[Either], Any]) -> Any:
        """Do it to both; they must answer the same, or refuse it for the same reason."""
        expected = self.outcome(lambda: action(self.model))
        actual = self.outcome(lambda: action(self.api))
        assert actual == expected
        self.tick()
        return actual

    @staticmethod
    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Refusal as refusal:
            return refusal.code
        except psycopg.Error as error:
            return error.sqlstate

    def tick(self) -> None:
        self.model.advance(timedelta(milliseconds=1))
        self.show_time()

    def show_time(self) -> None:
        clock.freeze(self.api.connection, self.model.now)

    def compare_user(self, user: UUID) -> None:
        expected, actual = self.model.user_usage(user), self.api.user_usage(user)
        assert by_rule(actual) == by_rule(expected)
        assert _order_of_groups(actual) == _order_of_groups(expected)

    def compare_group(self, group: UUID) -> None:
        expected, actual = self.model.group_usage(group), self.api.group_usage(group)
        assert differences(expected, actual) == {}

    def compare_history(self, group: UUID | None, bucket: str) -> None:
        assert self.api.history(group, bucket) == self.model.history(group, bucket)


class HoldsMachine(Machine):
    """Also reserves, settles and lets holds expire."""

    @rule(user=users, kind=kinds, cost=costs, ttl=ttls, key=keys, data=st.data())
    def reserve(self, user: UUID, kind: str, cost: int, ttl: int, key: str | None, data: st.DataObject) -> None:
        group = data.draw(self.pins())
        self.ask(lambda x: x.reserve(user, kind, cost, ttl, key, group))

    @rule(user=users, cost=costs, ttl=ttls, times=st.integers(2, 6), data=st.data())
    def reserve_until_full(self, user: UUID, cost: int, ttl: int, times: int, data: st.DataObject) -> None:
        kind = data.draw(kinds)
        for _ in range(times):
            self.ask(lambda x: x.reserve(user, kind, cost, ttl))

    @rule(user=users, ttl=st.sampled_from([-1, 0, 2_592_001]))
    def reserve_for_too_long_or_short(self, user: UUID, ttl: int) -> None:
        assert self.both(lambda x: x.reserve(user, "image", 1, ttl)) == "TL001"

    @precondition(lambda self: self.model.usages)
    @rule(data=st.data(), action=st.sampled_from(["commit", "commit", "release", "refund"]), times=st.integers(1, 2))
    def settle(self, data: st.DataObject, action: str, times: int) -> None:
        """Whatever usage it is: the answer may well be that it can't be settled so."""
        usage = data.draw(st.sampled_from(self.model.usages))
        for _ in range(times):
            self.settle_by(action, usage, data)

    @precondition(lambda self: self.holds("reserved", "expired"))
    @rule(data=st.data(), action=st.sampled_from(["commit", "commit", "commit", "release"]))
    def settle_a_hold(self, data: st.DataObject, action: str) -> None:
        self.settle_by(action, data.draw(st.sampled_from(self.holds("reserved", "expired"))), data)

    @precondition(lambda self: self.holds("expired"))
    @rule(data=st.data())
    def commit_late(self, data: st.DataObject) -> None:
        self.settle_by("commit", data.draw(st.sampled_from(self.holds("expired"))), data)

    @rule(action=st.sampled_from(["commit", "release", "refund"]))
    def settle_what_nobody_knows(self, action: str) -> None:
        assert self.both(lambda x: getattr(x, action)(UUID(int=0))) == "TL005"

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data())
    def reconcile(self, data: st.DataObject) -> None:
        assert self.api.reconcile(data.draw(self.groups())) == {"counters": [], "rollup": [], "holds": 0}

    @rule()
    def tidy(self) -> None:
        unswept = "select count(*) from tokenlimits.holds where expires_at <= tokenlimits.clock()"
        before = self.api.one(unswept)
        swept = self.api.tidy()
        assert self.api.one(unswept) == before - swept
        assert (swept > 0) == (before > 0)

    @precondition(lambda self: self.holds("reserved"))
    @rule(data=st.data(), short=st.sampled_from([0, 0, 1]))
    def wait_for_a_hold_to_expire(self, data: st.DataObject, short: int) -> None:
        at = data.draw(st.sampled_from(self.holds("reserved"))).expires_at
        assert at is not None
        self.model.advance_to(max(at - timedelta(microseconds=short), self.model.now))
        self.show_time()

    def teardown(self) -> None:
        super().teardown()
        if not hasattr(self, "model"):
            return
        rows = self.api.connection.execute(LEDGER).fetchall()
        statuses = {usage_id: (status, cost) for usage_id, status, cost in rows}
        assert statuses == {self.usage_ids[u.id]: (u.status, u.cost) for u in self.model.usages}
        while self.api.tidy():
            pass
        self.nothing_drifts()

    def holds(self, *statuses: str) -> list[Usage]:
        return [usage for usage in self.model.usages if usage.expires_at and usage.status in statuses]

    def settle_by(self, action: str, usage: Usage, data: st.DataObject) -> None:
        ids: dict[Any, UUID] = {self.model: usage.id, self.api: self.usage_ids[usage.id]}
        if action == "commit":
            held = usage.reserved_cost or 1
            cost = data.draw(st.sampled_from([None, None, held, held - 1, 0, 1, held + 1, -1]))
            self.ask(lambda x: x.commit(ids[x], cost))
        else:
            self.ask(lambda x: getattr(x, action)(ids[x]))


def _order_of_groups(limits: list[Any]) -> list[UUID]:
    return list(dict.fromkeys(limit["group"]["id"] for limit in limits))


def test_sql_answers_what_the_model_answers(shared_database: Database, zones: Callable[[str], ZoneInfo]) -> None:
    run_state_machine_as_test(lambda: HoldsMachine(Api(shared_database.owner), zones), settings=SETTINGS)
