"""Exactness under real concurrency: 32 connections that call at once, while admins edit and periods pass.

What is claimed is exact: with a limit of 300 and more than 300 calls, 300 are allowed. No call may fail, with a
deadlock or otherwise, unless a test says so.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import CONNECTIONS, Call, Crowd, Hammer, Script, Settle, allowed, assert_right
from tests.sql.semantics.world import World, limit
from tests.support import clock
from tests.support.waiting import PATIENCE, eventually


def everybody(calls: list[Call], times: int = 1) -> list[list[Call]]:
    """Let every connection make the same calls in the same order."""
    return [calls * times] * CONNECTIONS


def shuffled(calls: Sequence[Call | Settle], times: int) -> list[Script]:
    """Let every connection make the same calls, in an order of its own."""
    scripts: list[Script] = []
    for number in range(CONNECTIONS):
        script = [*calls] * times
        random.Random(number).shuffle(script)
        scripts.append(script)
    return scripts


def recorded(world: World) -> int:
    return world.owner.one("select coalesce(sum(cost), 0)::bigint from public.generation_usage")


class TestLimitsAreMetExactly:
    def test_of_one_hot_group(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(500))
        users = [world.user(group) for _ in range(10)]
        answers = hammer(shuffled([Call(user) for user in users], times=3))
        assert_right(answers)
        assert (len(answers), allowed(answers), recorded(world)) == (960, 500, 500)

    @pytest.mark.slow
    def test_of_a_hundred_groups(self, world: World, hammer: Hammer) -> None:
        groups = [world.group(limit(8)) for _ in range(100)]
        calls = [Call(world.user(group)) for group in groups]
        answers = hammer([calls[n:] + calls[:n] for n in range(CONNECTIONS)])
        assert_right(answers)
        paid = Counter(a.group_id for a in answers if a.allowed)
        assert paid == {str(group): 8 for group in groups}

    def test_of_two_groups_of_one_user(self, world: World, hammer: Hammer) -> None:
        first, second = world.group(limit(150), priority=1), world.group(limit(250))
        users = [world.user(first, second) for _ in range(4)] + [world.user(second)]
        answers = hammer(shuffled([Call(user) for user in users], times=4))
        assert_right(answers)
        paid = Counter(a.group_id for a in answers if a.allowed)
        assert paid == {str(first): 150, str(second): 250}

    def test_of_groups_that_users_joined_in_different_orders(self, world: World, hammer: Hammer) -> None:
        one, two = world.group(limit(170)), world.group(limit(230))
        users = [world.user(one, two), world.user(two, one), world.user(one, two), world.user(two, one)]
        answers = hammer(shuffled([Call(user) for user in users], times=4))
        assert_right(answers)
        assert allowed(answers) == 400

    def test_of_each_member(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(15, scope="member"))
        users = [world.user(group) for _ in range(20)]
        answers = hammer(shuffled([Call(user) for user in users], times=1))
        assert_right(answers)
        assert Counter(a.call.user_id for a in answers if a.allowed) == dict.fromkeys(users, 15)

    def test_of_several_at_once(self, world: World, hammer: Hammer) -> None:
        world.at("2026-11-23 12:00Z")
        group = world.group(
            limit(400),
            limit(300, period="day"),
            limit(80, scope="member"),
            limit(90, period="month", scope="member"),
            limit(90, kind="video"),
        )
        users = [world.user(group) for _ in range(5)]
        calls = [Call(user, kind) for user in users for kind in ("image", "video")]
        answers = hammer(shuffled(calls, times=4))
        assert_right(answers)
        assert Counter(a.call.kind for a in answers if a.allowed) == {"image": 300, "video": 90}
        by_user = Counter(a.call.user_id for a in answers if a.allowed and a.call.kind == "image")
        assert max(by_user.values()) <= 80
        assert {x["used"] for x in world.api.group_usage(group)["limits"]} == {300, 90}

    def test_with_costs_of_all_sizes(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(1000))
        user = world.user(group)
        answers = hammer(shuffled([Call(user, cost=cost) for cost in (1, 1, 1, 2, 3, 5, 8, 13)], times=4))
        assert_right(answers)
        assert recorded(world) == sum(a.call.cost for a in answers if a.allowed) == 1000

    def test_with_costs_that_cannot_fill_it(self, world: World, hammer: Hammer) -> None:
        """Usage only grows, so what was denied at any time must not fit at the end either."""
        group = world.group(limit(1000))
        user = world.user(group)
        answers = hammer(shuffled([Call(user, cost=cost) for cost in (7, 11, 19, 40)], times=3))
        assert_right(answers)
        used = recorded(world)
        assert used <= 1000
        assert [a.call.cost for a in answers if not a.allowed and used + a.call.cost <= 1000] == []

    def test_of_members_whose_first_calls_come_at_once(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(3, scope="member"), limit(5, period="month", scope="member"))
        users = [world.user(group) for _ in range(40)]
        answers = hammer(everybody([Call(user) for user in users]))
        assert_right(answers)
        assert Counter(a.call.user_id for a in answers if a.allowed) == dict.fromkeys(users, 3)

    def test_of_newcomers_in_the_default_group(self, world: World, hammer: Hammer) -> None:
        world.group(limit(2, scope="member"), limit(50), is_default=True)
        users = [world.user() for _ in range(30)]
        answers = hammer(everybody([Call(user) for user in users]))
        assert_right(answers)
        assert allowed(answers) == 50
        assert max(Counter(a.call.user_id for a in answers if a.allowed).values()) == 2

    def test_while_others_record_what_happened_elsewhere(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(600), limit(250, scope="member"))
        users = [world.user(group) for _ in range(4)]
        calls = [Call(user, function=f) for user in users for f in ("track_generation", "record_generation")]
        answers = hammer(shuffled(calls, times=4))
        tracked = [a for a in answers if a.call.function == "track_generation"]
        assert_right(tracked)
        records = [a for a in answers if a.call.function == "record_generation"]
        assert all(a.allowed for a in records)
        assert recorded(world) == allowed(tracked) + len(records)
        assert allowed(tracked) < len(tracked)


class TestKeys:
    def test_one_key_from_all_connections_at_once_charges_once(self, world: World, hammer: Hammer) -> None:
        user = world.user(world.group(limit(1000)))
        keys = [f"job-{n}" for n in range(25)]
        answers = hammer(everybody([Call(user, cost=3, idempotency_key=key) for key in keys]))
        assert_right(answers)
        for key in keys:
            mine = [a for a in answers if a.call.idempotency_key == key]
            assert Counter(a.replayed for a in mine) == {False: 1, True: 31}
            assert len({a.usage_id for a in mine}) == 1
        assert recorded(world) == 75

    def test_where_not_all_fit_a_key_is_allowed_for_all_or_for_none(self, world: World, hammer: Hammer) -> None:
        user = world.user(world.group(limit(10)))
        keys = [f"job-{n}" for n in range(25)]
        answers = hammer(shuffled([Call(user, idempotency_key=key) for key in keys], times=1))
        assert_right(answers)
        per_key = Counter(a.call.idempotency_key for a in answers if a.allowed)
        assert sorted(per_key.values()) == [CONNECTIONS] * 10
        assert (allowed(answers), recorded(world)) == (10, 10)

    def test_a_key_for_two_requests_serves_one_of_them(self, world: World, hammer: Hammer) -> None:
        user = world.user(world.group(limit(1000)))
        keys = [f"job-{n}" for n in range(25)]
        scripts = [[Call(user, cost=1 + n % 2, idempotency_key=key) for key in keys] for n in range(CONNECTIONS)]
        answers = hammer(scripts)
        assert_right(answers, "TL008")
        for key in keys:
            mine = [a for a in answers if a.call.idempotency_key == key]
            assert Counter((a.error, a.replayed) for a in mine) == {
                (None, False): 1,
                (None, True): 15,
                ("TL008", False): 16,
            }
            assert len({a.call.cost for a in mine if a.allowed}) == 1
        assert world.owner.one("select count(*) from public.generation_usage") == 25

    def test_keys_of_different_users_have_nothing_to_do_with_each_other(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(None))
        users = [world.user(group) for _ in range(10)]
        answers = hammer(shuffled([Call(user, idempotency_key="job") for user in users], times=2))
        assert_right(answers)
        assert allowed(answers) == 10


class TestWhilePeriodsPass:
    def test_every_day_gets_its_limit_and_no_more(self, world: World, crowd: Crowd, database: Database) -> None:
        group = world.group(limit(100, period="day"), limit(70, period="day", scope="member"))
        users = [world.user(group) for _ in range(2)]
        midnight = datetime.fromisoformat("2026-11-30 00:00Z")
        moments = [midnight + timedelta(days=n, microseconds=-1) for n in range(4)]
        world.at(moments[0].isoformat())
        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)) as answers:
            for moment in moments:
                world.at(moment.isoformat())
                eventually(lambda: world.used(users[0], "day") == 100)
        assert_right(answers)
        per_day = world.owner.connection.execute(
            "select count(*) from public.generation_usage group by date_trunc('day', created_at, 'UTC')"
        ).fetchall()
        assert per_day == [(100,)] * len(moments)

    def test_a_call_that_waited_over_midnight_belongs_to_the_new_day(self, world: World, database: Database) -> None:
        world.at("2026-11-23 23:59:59Z")
        group = world.group(limit(1, period="day"))
        user = world.user(group)
        admin, worker = Api(database.connect()), Api(database.connect())
        with admin.connection.transaction():
            admin.set_limit(group, "image", "day", "group", 2)
            waiting = threading.Thread(target=worker.track, args=(user, "image"))
            waiting.start()
            eventually(lambda: is_blocked(world, worker))
            world.at("2026-11-24 00:00:01Z")
        waiting.join(PATIENCE)
        assert world.owner.one("select created_at from public.generation_usage") >= datetime(2026, 11, 24, tzinfo=UTC)
        assert world.used(user, "day") == 1

    def test_also_when_the_clock_runs_through_midnight(self, world: World, crowd: Crowd, database: Database) -> None:
        midnight = datetime.fromisoformat("2026-12-01 00:00Z")
        world.at((midnight - timedelta(seconds=1)).isoformat())
        group = world.group(
            *(limit(150, period=period) for period in ("minute", "hour", "day", "month")),
            limit(400),
            limit(120, period="hour", scope="member"),
        )
        users = [world.user(group) for _ in range(3)]
        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)) as answers:
            eventually(lambda: world.used(users[0], "day") == 150)
            clock.run_from(database.owner, midnight - timedelta(seconds=0.5))
            eventually(lambda: clock.read(database.owner) > midnight)
            eventually(lambda: world.used(users[0], "month") == 150)
        assert_right(answers)
        counts = world.owner.connection.execute(
            "select created_at >= %s, count(*) from public.generation_usage group by 1 order by 1", [midnight]
        ).fetchall()
        assert counts == [(False, 150), (True, 150)]


class TestWhileAdminsEdit:
    def test_a_limit_added_in_the_middle_counts_what_is_in_flight(
        self, world: World, crowd: Crowd, database: Database
    ) -> None:
        group = world.group(limit(None))
        users = [world.user(group) for _ in range(4)]
        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)) as answers:
            eventually(lambda: world.used(users[0]) >= 150)
            world.api.set_limit(group, "image", "month", "group", 900)
            world.api.set_limit(group, "image", "month", "member", 240)
            eventually(lambda: world.used(users[0], "month") == 900)
        assert_right(answers)
        assert recorded(world) == 900
        assert max(Counter(a.call.user_id for a in answers if a.allowed).values()) <= 240

    @pytest.mark.parametrize("what", ["limit", "zone", "reset", "refund", "reconcile"])
    def test_nobody_edits_or_settles_by_an_old_snapshot(self, world: World, database: Database, what: str) -> None:
        group = world.group(limit(None))
        user = world.user(group)
        usage = world.api.track(user, "image", 1)["usage_id"]
        old = Api(database.connect())
        late: dict[str, Callable[[], object]] = {
            "limit": lambda: old.set_limit(group, "image", "day", "group", 6),
            "zone": lambda: old.save_group(group, timezone="Europe/Paris"),
            "reset": lambda: old.reset(group),
            "refund": lambda: old.refund(usage),
            "reconcile": lambda: old.reconcile(group),
        }
        old.execute("begin isolation level repeatable read")
        old.one("select count(*) from public.user_groups")
        world.api.set_limit(group, "image", "month", "group", 9)
        world.api.track(user, "image", 5)
        with pytest.raises(psycopg.DatabaseError) as error:
            late[what]()
        old.execute("rollback")
        assert error.value.sqlstate == "TL009"

    def test_a_new_limit_waits_for_a_call_that_was_judged_without_it(self, world: World, database: Database) -> None:
        group = world.group(limit(None))
        user = world.user(group)
        slow, admin = Api(database.connect()), Api(database.connect())
        with slow.connection.transaction():
            assert slow.track(user, "image", 5)["allowed"]
            adding = threading.Thread(target=admin.set_limit, args=(group, "image", "day", "group", 6))
            adding.start()
            eventually(lambda: is_blocked(world, admin))
        adding.join(PATIENCE)
        assert world.used(user, "day") == 5
        assert not world.api.track(user, "image", 2)["allowed"]

    @pytest.mark.slow
    def test_whatever_they_edit_nothing_is_lost_or_passed(self, world: World, crowd: Crowd, database: Database) -> None:
        world.at("2026-11-30 22:59Z")
        stays = world.group(limit(600), limit(3, kind="video"), priority=1)
        varies = world.group(limit(None), limit(50, kind="video"))
        users = [world.user(stays, varies) for _ in range(4)] + [world.user(varies) for _ in range(2)]
        calls = [Call(user, kind, cost) for user in users for kind in ("image", "video") for cost in (1, 2)]
        chance = random.Random(5)
        with crowd.calling(database.url, shuffled(calls, times=1)) as answers:
            for _ in range(60):
                edit(world, chance, stays, varies)
            world.api.save_group(stays, limits=[limit(600)], priority=9)
            eventually(lambda: world.api.check(users[0], "image", group_id=stays)["reason"] == "limit_exceeded")
        assert_right(answers)
        used_of_what_stayed = world.owner.one(
            "select sum(cost) from public.generation_usage where group_id = %s and kind = 'image'", [stays]
        )
        assert used_of_what_stayed == 600

    def test_many_groups_in_one_statement(self, world: World, crowd: Crowd, database: Database) -> None:
        """It takes all their stripes, as calls of users in several groups do, and in the same order."""
        groups = [UUID(int=number) for number in (0xF0, 0x80, 0x01)]  # the last byte is the stripe
        for group in groups:
            world.owner.execute("insert into public.user_groups (id, name) values (%s, %s)", [group, str(group)])
            world.api.set_limit(group, "image", "lifetime", "group", None)
        users = [world.user(*groups) for _ in range(4)]
        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)) as answers:
            for zone in ("Asia/Kathmandu", "UTC") * 6:
                world.owner.execute("update public.user_groups set timezone = %s", [zone])
                world.owner.execute("update public.group_limits set max = coalesce(max, 10^9) + 1")
            world.owner.execute("delete from public.user_groups")
        assert_right(answers)

    @pytest.mark.slow
    def test_users_who_come_and_go(self, world: World, crowd: Crowd, database: Database) -> None:
        one, two = world.group(limit(None), limit(40, scope="member")), world.group(limit(None))
        users = [world.user(one) for _ in range(6)]
        chance = random.Random(7)
        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)) as answers:
            for _ in range(80):
                user, (from_, to) = chance.choice(users), chance.choice([(one, two), (two, one)])
                world.api.move_member(user, from_, to)
                if chance.random() < 0.2:
                    world.owner.delete_user(user)
                    world.owner.add_user(user)
                    world.api.add_member(one, user)
        assert_right(answers)
        by_user = Counter(a.call.user_id for a in answers if a.allowed and a.group_id == str(one))
        assert max(by_user.values(), default=0) <= 40

    @pytest.mark.slow
    def test_groups_that_are_deleted_under_the_calls(self, world: World, crowd: Crowd, database: Database) -> None:
        group = world.group(limit(None), limit(10**6, scope="member"))
        users = [world.user(group) for _ in range(4)]
        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)) as answers:
            for _ in range(12):
                time.sleep(0.05)
                world.api.delete_group(group)
                group = world.group(limit(None), limit(10**6, scope="member"))
                for user in users:
                    world.api.add_member(group, user)
        assert_right(answers)
        assert {a.reason for a in answers} <= {None, "not_in_group", "no_limit_for_kind"}
        assert recorded(world) == allowed(answers)


def edit(world: World, chance: random.Random, stays: UUID, varies: UUID) -> None:
    """Do one thing that an admin may do; the group that stays keeps its lifetime limit, and is never reset."""
    kind = chance.choice(["image", "image", "video"])
    period = chance.choice(["minute", "hour", "day", "week", "month"])
    scope = chance.choice(["group", "member"])
    maximum = chance.choice([None, 0, 5, 50, 500, 5000])
    group = chance.choice([stays, varies])
    actions: list[Callable[[], object]] = [
        lambda: world.api.set_limit(group, kind, period, scope, maximum),
        lambda: world.api.set_limit(group, kind, period, scope, maximum),
        lambda: world.api.remove_limit(group, kind, period, scope),
        lambda: world.api.save_group(group, timezone=chance.choice(["UTC", "Europe/Paris", "Asia/Kathmandu"])),
        lambda: world.api.save_group(varies, limits=[limit(None), limit(maximum, kind, period, scope)]),
        lambda: world.api.save_group(group, priority=chance.randrange(3)),
        lambda: world.api.save_group(group, is_default=True),
        lambda: world.api.reset(varies, chance.choice([None, kind])),
        lambda: world.owner.execute(
            "update public.group_limits set max = max + 1 where (group_id, kind, period, scope) = (%s, %s, %s, %s)",
            [varies, kind, period, scope],
        ),
        lambda: world.at((clock.read(world.owner.connection) + timedelta(minutes=7)).isoformat()),
    ]
    chance.choice(actions)()


def is_blocked(world: World, other: Api) -> bool:
    pid = other.connection.info.backend_pid
    return world.owner.one("select cardinality(pg_blocking_pids(%s)) > 0", [pid])


class TestAdminsAtOnce:
    """Edits may wait for each other, but not in a circle."""

    def test_edits_of_one_group_at_the_same_time(self, world: World, crowd: Crowd, database: Database) -> None:
        world.at("2026-11-30 22:59Z")
        stays, varies = world.group(limit(None)), world.group(limit(None))
        users = [world.user(stays, varies), world.user(varies)]
        errors: list[psycopg.Error] = []

        def admin(seed: int) -> None:
            mine = World(Api(database.connect("postgres")), Api(database.connect()))
            chance = random.Random(seed)
            for _ in range(40):
                try:
                    edit(mine, chance, stays, varies)
                except psycopg.Error as error:
                    errors.append(error)

        with crowd.calling(database.url, shuffled([Call(user) for user in users], times=1)[:8]) as answers:
            admins = [threading.Thread(target=admin, args=(seed,)) for seed in range(4)]
            for thread in admins:
                thread.start()
            for thread in admins:
                thread.join()
        assert errors == []
        assert_right(answers)


class TestHolds:
    """Holds expire, are swept, settled and committed late, all at once."""

    def test_whatever_becomes_of_them_no_limit_is_passed(self, world: World, crowd: Crowd, database: Database) -> None:
        world.at("2026-11-23 12:00Z")
        hot = world.group(limit(60), limit(25, scope="member"), limit(50, period="day"), limit(40, kind="video"))
        others = [world.group(limit(12), limit(9, kind="video", scope="member")) for _ in range(3)]
        users = [world.user(hot) for _ in range(4)] + [world.user(hot, other) for other in others]
        scripts = shuffled([call for user in users for call in lives_of_a_usage(user)], times=2)
        expired = "select count(*) from public.generation_usage where status = 'expired'"
        settlements = (
            "select count(distinct status) from public.generation_usage where status not in ('reserved', 'expired')"
        )
        with crowd.calling(database.url, scripts) as answers:
            run_fast(world, lambda: world.owner.one(expired) > 60 and world.owner.one(settlements) == 3)
        assert_right(answers, "TL008")
        settled = [a.settled for a in answers if a.settled]
        assert {a.error for a in settled} <= {None, "TL007"}
        assert [a for a in settled if a.overfull] == []
        by_status = Counter(a.status for a in settled)
        assert by_status["committed"] > 0
        assert by_status["released"] + by_status["expired"] > 0
        assert by_status["refunded"] > 0
        for group in (hot, *others):
            assert_sound(world, group)

    def test_nobody_is_denied_for_what_has_expired(self, world: World, crowd: Crowd, database: Database) -> None:
        group = world.group(limit(40), limit(40, scope="member"))
        users = [world.user(group) for _ in range(2)]
        for hour in range(12, 16):
            world.at(f"2026-11-23 {hour}:00Z")
            for _ in range(40):
                assert world.api.reserve(users[0], "image", 1, 60)["allowed"]
            world.at(f"2026-11-23 {hour}:01Z")
            scripts = [[Call(users[n % 2], ttl=[None, 1][n % 2])] for n in range(CONNECTIONS)]
            answers = crowd.call(database.url, scripts)
            assert_right(answers)
            assert allowed(answers) == CONNECTIONS
            world.at(f"2026-11-23 {hour}:02Z")
            for usage in [a.usage_id for a in answers if a.call.ttl is None]:
                world.api.refund(usage)
        assert_sound(world, group)

    @pytest.mark.parametrize("expired", [False, True])
    def test_settled_from_all_sides_each_settles_once(self, world: World, hammer: Hammer, expired: bool) -> None:
        world.at("2026-11-23 12:00Z")
        group = world.group(limit(1000), limit(1000, scope="member"))
        user = world.user(group)
        usages = [world.api.reserve(user, "image", 4, 60)["usage_id"] for _ in range(25)]
        world.at("2026-11-23 12:01Z" if expired else "2026-11-23 12:00:30Z")
        ways = [("commit_generation", None), ("commit_generation", 1), ("release_generation", None)]
        scripts = [[Settle(*settle_by(ways[n % 3], usage)) for usage in usages] for n in range(CONNECTIONS)]
        answers = hammer(scripts)
        assert_right(answers, "TL006")
        charged = 0
        for usage in usages:
            mine = [a for a in answers if a.call.usage_id == usage]
            effects = [a for a in mine if not a.error and not a.replayed]
            charged += sum(4 if a.call.cost is None else 1 for a in effects if a.status == "committed")
            # a release changes nothing of an expired hold
            assert len(effects) == 1
            assert {a.call.cost for a in mine if a.status == "committed"} <= {effects[0].call.cost}
        assert world.used(user) == charged
        assert_sound(world, group)

    def test_refunded_by_all_it_is_given_back_once(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(1000), limit(1000, scope="member"))
        user = world.user(group)
        usages = [world.api.track(user, "image", 4)["usage_id"] for _ in range(25)]
        answers = hammer(shuffled([Settle("refund_generation", usage) for usage in usages], times=1))
        assert_right(answers)
        assert Counter(a.call.usage_id for a in answers if not a.replayed) == dict.fromkeys(usages, 1)
        assert world.used(user) == 0
        assert_sound(world, group)

    @pytest.mark.slow
    def test_late_commits_get_the_last_room_and_no_more(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(20), limit(15, scope="member"))
        users = [world.user(group) for _ in range(2)]
        usages = []
        for minute in range(4):
            world.at(f"2026-11-23 12:{minute:02}Z")
            usages += [world.api.reserve(user, "image", 1, 60)["usage_id"] for user in users for _ in range(10)]
        world.at("2026-11-23 13:00Z")
        answers = hammer(shuffled([Settle("commit_generation", usage) for usage in usages], times=1))
        assert_right(answers, "TL007")
        assert len([a for a in answers if not a.error and not a.replayed]) == 20
        assert {a.error for a in answers} == {None, "TL007"}
        assert world.used(users[0]) == 20
        assert_sound(world, group)

    def test_sweeps_and_settlements_of_the_same_holds(self, world: World, crowd: Crowd, database: Database) -> None:
        group = world.group(limit(200), limit(150, scope="member"), limit(200, kind="video"))
        users = [world.user(group) for _ in range(3)]
        usages = []
        for minute in range(3):
            world.at(f"2026-11-23 12:{minute:02}Z")
            for user in users:
                for kind in ("image", "video"):
                    usages += [world.api.reserve(user, kind, 2, 60)["usage_id"] for _ in range(12)]
        world.at("2026-11-23 12:10Z")
        settling = [Settle(f, usage) for usage in usages for f in ("commit_generation", "release_generation")]
        scripts: list[Script] = [*shuffled(settling, times=1)[: CONNECTIONS // 2]]
        takes = [Call(user, kind, ttl=ttl) for user in users for kind in ("image", "video") for ttl in (None, 1)]
        scripts += shuffled(takes, times=1)[CONNECTIONS // 2 :]
        over = """
            select count(*) > 400 and not bool_or(status = 'reserved' and created_at < '2026-11-23 12:05Z')
            from public.generation_usage
        """
        with sweeping(database), crowd.calling(database.url, scripts) as answers:
            run_fast(world, lambda: world.owner.one(over))
        assert_right(answers, "TL006", "TL007")
        assert {a.status for a in answers if isinstance(a.call, Settle)} >= {"committed", "expired"}
        assert_sound(world, group)

    def test_keys_that_go_from_dead_usages_of_one_kind_to_another(
        self, world: World, crowd: Crowd, database: Database
    ) -> None:
        world.at("2026-11-23 12:00Z")
        one, two = (world.group(limit(None), limit(None, kind="video")) for _ in range(2))
        users = [world.user(one, two) for _ in range(2)]
        calls = [
            Call(user, kind, idempotency_key=f"job-{n}", group_id=group, ttl=1)
            for user in users
            for kind in ("image", "video")
            for group in (one, two)
            for n in range(6)
        ]
        with sweeping(database), crowd.calling(database.url, shuffled(calls, times=1)) as answers:
            run_fast(world, lambda: world.owner.one("select count(*) from public.generation_usage") > 2 * len(calls))
        assert_right(answers, "TL008")
        assert allowed(answers) > len(calls)
        for group in (one, two):
            assert_sound(world, group)


def lives_of_a_usage(user: UUID) -> list[Call]:
    """Take something in every way and let everything become of it; in fast time, a pause is long."""
    return [
        Call(user),
        Call(user, then="refund_generation"),
        Call(user, "video", 2, then="refund_generation", pause=0.02),
        Call(user, ttl=1),
        Call(user, cost=3, ttl=2),
        Call(user, "video", ttl=2),
        Call(user, ttl=60, then="commit_generation"),
        Call(user, ttl=1, then="commit_generation", pause=0.05),
        Call(user, cost=2, ttl=60, then="release_generation"),
        Call(user, "video", ttl=1, then="release_generation", pause=0.05),
        Call(user, idempotency_key="job", ttl=1),
        Call(user, "video", idempotency_key="job", ttl=2),
    ]


def settle_by(way: tuple[str, int | None], usage: UUID) -> tuple[str, UUID, int | None]:
    return way[0], usage, way[1]


def run_fast(world: World, enough: Callable[[], bool]) -> None:
    """Let a clock that stands run, thirty times as fast as a real one, until enough has happened."""
    begun, at = time.monotonic(), clock.read(world.owner.connection)

    def look() -> bool:
        world.at((at + timedelta(seconds=30 * (time.monotonic() - begun))).isoformat())
        return enough()

    eventually(look)


@contextmanager
def sweeping(database: Database) -> Iterator[None]:
    """Let two jobs sweep all the time."""
    stop = threading.Event()
    errors: list[psycopg.Error] = []

    def sweep(api: Api) -> None:
        try:
            while not stop.is_set():
                api.tidy()
                stop.wait(0.01)
        except psycopg.Error as error:
            errors.append(error)

    jobs = [threading.Thread(target=sweep, args=(Api(database.connect("postgres")),)) for _ in range(2)]
    for job in jobs:
        job.start()
    try:
        yield
    finally:
        stop.set()
        for job in jobs:
            job.join()
    assert errors == []


def assert_sound(world: World, group: UUID) -> None:
    """When all holds have expired, there is room for exactly what was not charged, and all sums are right."""
    nothing: dict[str, object] = {"counters": [], "rollup": [], "holds": 0}
    assert world.api.reconcile(group) == nothing
    world.at((clock.read(world.owner.connection) + timedelta(minutes=2)).isoformat())
    charged = dict(
        world.owner.connection.execute(
            "select kind, sum(cost)::bigint from public.generation_usage"
            " where group_id = %s and status = 'committed' group by kind",
            [group],
        ).fetchall()
    )
    newcomer = world.user(group)
    for x in world.api.group_usage(group)["limits"]:
        assert x["used"] == charged.get(x["kind"], 0)
    for kind in ("image", "video"):
        answer = world.api.check(newcomer, kind, group_id=group)
        for x in answer["limits"]:
            if x["max"] is not None:
                assert x["used"] == (charged.get(kind, 0) if x["scope"] == "group" else 0)
                assert x["used"] <= x["max"]
        if answer["remaining"]:
            assert world.api.reserve(newcomer, kind, answer["remaining"], 1, group_id=group)["allowed"]
    assert world.api.reconcile(group) == nothing
