"""Many requests in one call: each is answered as if it had come alone, and no two batches ever block each other."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import CONNECTIONS, Batch, Call, Crowd, Hammer, Script, allowed, assert_right
from tests.sql.semantics.test_races import is_blocked
from tests.sql.semantics.world import World, limit
from tests.support.waiting import PATIENCE, eventually


def told(answers: list[Any]) -> list[tuple[bool, str | None, int | None]]:
    return [(answer["allowed"], answer["reason"], answer["remaining"]) for answer in answers]


class TestAnswers:
    def test_each_is_judged_by_what_those_before_it_left(self, world: World) -> None:
        user = world.user(world.group(limit(5), limit(3, scope="member")))
        answers = world.api.track_many([(user, "image", 2), (user, "image", 2), (user, "image", 1), (user, "image", 1)])
        denied = (False, "limit_exceeded", 1)
        assert told(answers) == [(True, None, 1), denied, (True, None, 0), (False, "limit_exceeded", 0)]
        assert [cost for *_, cost, _ in world.recorded()] == [2, 1]

    def test_the_next_group_pays_when_those_before_have_filled_the_first(self, world: World) -> None:
        first, second = world.group(limit(2), priority=1), world.group(limit(1))
        user = world.user(first, second)
        answers = world.api.track_many([(user, "image")] * 4)
        assert [answer["group"]["id"] for answer in answers[:3]] == [first, first, second]
        assert answers[3]["reason"] == "limit_exceeded"

    def test_a_denial_or_a_refusal_touches_no_other(self, world: World) -> None:
        user = world.user(world.group(limit(10)))
        world.api.track(user, "image", 1, "taken")
        nowhere = uuid4()
        answers = world.api.track_many(
            [
                (user, "image", 1),
                (user, "image", 100),
                (user, "image", 2, "taken"),
                (user, "image", 1, None, nowhere),
                (user, "Image", 1),
                (uuid4(), "image", 1),
                (user, "audio", 1),
                (user, "image", 3),
            ]
        )
        reasons = [None, "limit_exceeded", *["refused"] * 3, "not_in_group", "no_limit_for_kind", None]
        assert [answer["reason"] for answer in answers] == reasons
        assert [(x["code"], x["detail"]) for x in answers[2:5]] == [
            ("TL008", answers[2]["detail"]),
            ("TL002", str(nowhere)),
            ("TL001", "kind"),
        ]
        assert [answer["error"] for answer in answers[2:5]] == [
            "idempotency_key 'taken' was used for another request of this user (TL008). "
            "Use one key per job: the same operation, kind, cost and group every time.",
            f"there is no group {nowhere} (TL002). It may have been deleted; list the groups to see which exist.",
            "kind: must be 1 to 32 of a-z, 0-9 and _, and begin with a letter (TL001). Nothing was recorded.",
        ]
        assert world.used(user) == 5

    @pytest.mark.parametrize(
        ("request_", "code"),
        [
            ("text", "TL001"),
            (None, "TL001"),
            ([], "TL001"),
            ({}, "TL001"),
            ({"user_id": "nobody", "kind": "image"}, "22P02"),
            ({"user_id": str(UUID(int=1)), "kind": "image", "cost": 1.5}, "22P02"),
            ({"user_id": str(UUID(int=1)), "kind": "image", "cost": None}, "TL001"),
            ({"user_id": str(UUID(int=1)), "kind": "image", "cost": 10**30}, "22003"),
            ({"user_id": str(UUID(int=1)), "kind": "image", "cost": 0}, "TL001"),
            ({"user_id": str(UUID(int=1)), "kind": "image", "metadata": []}, "TL001"),
            ({"user_id": str(UUID(int=1)), "kind": "image", "idempotency_key": ""}, "TL001"),
        ],
    )
    def test_what_cannot_be_read_is_refused_alone(self, world: World, request_: Any, code: str) -> None:
        user = world.user(world.group(limit(10)))
        good = {"user_id": str(user), "kind": "image"}
        answers = world.api.call("track_generations", requests=[good, request_, good])
        assert [answer.get("code") for answer in answers] == [None, code, None]
        assert [answer["allowed"] for answer in answers] == [True, False, True]

    @pytest.mark.parametrize("requests", ['{"user_id": 1}', "7", "null", "[" + "1," * 1000 + "1]"])
    def test_what_is_no_list_of_at_most_a_thousand_is_refused_whole(self, world: World, requests: str) -> None:
        with pytest.raises(psycopg.DatabaseError, match="requests: must be a JSON array of at most 1000") as error:
            world.api.one("select public.track_generations(%s::jsonb)", [requests])
        assert error.value.sqlstate == "TL001"

    def test_none_are_answered_by_none(self, world: World) -> None:
        assert world.api.track_many([]) == []

    def test_a_thousand_fit(self, world: World) -> None:
        users = [world.user(world.group(limit(300), limit(150, scope="member"))) for _ in range(2)]
        answers = world.api.track_many([(users[n % 2], "image") for n in range(1000)])
        assert Counter((answer["allowed"]) for answer in answers) == {True: 300, False: 700}

    def test_a_key_that_comes_twice_is_charged_once(self, world: World) -> None:
        user, other = (world.user(world.group(limit(2))) for _ in range(2))
        key = "job"
        answers = world.api.track_many(
            [
                (user, "image", 3, key),  # denied, and no denial binds a key
                (user, "image", 1, key),
                (user, "image", 1, key),
                (user, "image", 2, key),
                (other, "image", 1, key),
                (user, "image", 1, key),
            ]
        )
        assert [answer["reason"] for answer in answers] == ["limit_exceeded", None, None, "refused", None, None]
        assert [answer["replayed"] for answer in answers] == [False, False, True, False, False, True]
        assert answers[3]["code"] == "TL008"
        assert UUID(answers[3]["detail"]) == answers[1]["usage_id"] == answers[2]["usage_id"] == answers[5]["usage_id"]
        assert world.used(user) == world.used(other) == 1

    def test_a_batch_that_is_sent_again_is_charged_once(self, world: World) -> None:
        user = world.user(world.group(limit(3)))
        requests = [(user, "image", 1, f"job-{n}") for n in range(4)]
        first, again = world.api.track_many(requests), world.api.track_many(requests)
        assert [answer["usage_id"] for answer in again] == [answer["usage_id"] for answer in first]
        assert [answer["replayed"] for answer in again] == [True, True, True, False]
        assert world.used(user) == 3

    def test_a_single_call_and_a_batch_know_each_others_keys(self, world: World) -> None:
        user = world.user(world.group(limit(10)))
        single = world.api.track(user, "image", 2, "a")
        [replayed, batched] = world.api.track_many([(user, "image", 2, "a"), (user, "image", 3, "b")])
        assert (replayed["usage_id"], replayed["replayed"]) == (single["usage_id"], True)
        assert world.api.track(user, "image", 3, "b") == batched | {"replayed": True}

    def test_the_key_of_a_dead_usage_is_free(self, world: World) -> None:
        user = world.user(world.group(limit(10), limit(10, kind="video")))
        world.at("2026-11-23 12:00Z")
        world.api.reserve(user, "video", 4, 60, "expired")
        world.api.refund(world.api.track(user, "image", 1, "refunded")["usage_id"])
        world.at("2026-11-23 12:02Z")
        requests = [(user, "image", 1, "expired"), (user, "image", 1, "refunded"), (user, "image", 9, "expired")]
        answers = world.api.track_many(requests)
        assert [answer["reason"] for answer in answers] == [None, None, "refused"]
        assert world.used(user) == 2

    def test_a_denial_leaves_the_key_of_an_expired_hold_where_it_is(self, world: World) -> None:
        user = world.user(world.group(limit(3)))
        world.at("2026-11-23 12:00Z")
        hold = world.api.reserve(user, "image", 2, 60, "job")
        world.at("2026-11-23 12:02Z")
        [denied] = world.api.track_many([(user, "image", 9, "job")])
        assert not denied["allowed"]
        assert world.api.commit(hold["usage_id"])["allowed"]
        assert world.api.reserve(user, "image", 2, 60, "job")["replayed"]

    def test_expired_holds_are_room(self, world: World) -> None:
        group = world.group(limit(10), limit(6, scope="member"))
        users = [world.user(group) for _ in range(3)]
        world.at("2026-11-23 12:00Z")
        for user in users[:2]:
            assert world.api.reserve(user, "image", 5, 60)["allowed"]
        world.at("2026-11-23 12:02Z")
        answers = world.api.track_many([(user, "image", 4) for user in users] + [(users[0], "image", 2)])
        assert told(answers) == [
            (True, None, 2),
            (True, None, 2),
            (False, "limit_exceeded", 2),
            (True, None, 0),
        ]
        assert world.owner.one("select count(*) from tokenlimits.holds") == 0

    def test_where_all_are_denied_nothing_is_written(self, world: World) -> None:
        user = world.user(world.group(limit(1)))
        tables = ("public.generation_usage", "tokenlimits.counters", "tokenlimits.usage_rollup")
        count = "select " + " + ".join(f"(select count(*) from {table})" for table in tables)
        before = world.owner.one(count)
        assert told(world.api.track_many([(user, "image", 2)] * 3)) == [(False, "limit_exceeded", 1)] * 3
        assert world.owner.one(count) == before

    def test_a_clock_that_is_set_back_over_midnight_does_not_go_round_for_ever(self, world: World) -> None:
        world.at("2026-11-23 23:59:59Z")
        group = world.group(limit(10, period="day"), limit(5, period="day", scope="member"))
        early, late = world.user(group), world.user(group)
        world.api.track(early, "image")
        world.at("2026-11-24 00:00:01Z")
        world.api.track(late, "image")
        world.at("2026-11-23 23:59:59Z")
        world.api.execute("set statement_timeout = '60s'")
        [answer] = world.api.track_many([(early, "image")])
        assert {x["scope"]: x["used"] for x in answer["limits"]} == {"group": 2, "member": 1}

    def test_a_group_may_have_the_id_of_its_member(self, world: World) -> None:
        user = world.user()
        world.owner.execute("insert into public.user_groups (id, name) values (%s, 'Mine')", [user])
        world.api.save_group(user, limits=[limit(10), limit(8, scope="member")])
        world.api.add_member(user, user)
        world.at("2026-11-23 12:00Z")
        world.api.reserve(user, "image", 4, 60)
        world.at("2026-11-23 12:01Z")
        answers = world.api.track_many([(user, "image", 3)] * 3)
        assert [answer["remaining"] for answer in answers] == [5, 2, 2]
        assert world.api.reconcile(user) == {"counters": [], "rollup": [], "holds": 0}
        world.api.delete_group(user)

    def test_only_in_read_committed(self, world: World) -> None:
        user = world.user(world.group(limit(1)))
        world.api.connection.execute("begin isolation level repeatable read")
        with pytest.raises(psycopg.DatabaseError) as error:
            world.api.track_many([(user, "image")])
        world.api.connection.execute("rollback")
        assert error.value.sqlstate == "TL009"


class TestBusy:
    """A group that somebody else holds for longer than p_max_wait doesn't hold up the others."""

    @pytest.fixture
    def other(self, database: Database) -> Api:
        """Somebody who begins a transaction and stays in it."""
        api = Api(database.connect("postgres"))
        api.connection.execute("begin")
        return api

    def groups(self, world: World) -> list[UUID]:
        """Two groups whose limits are not held by the same lock: that goes by the last byte of the id."""
        made = [UUID(int=number) for number in (1, 2)]
        for group in made:
            world.owner.execute("insert into public.user_groups (id, name) values (%s, %s)", [group, str(group)])
            world.api.save_group(group, limits=[limit(10)])
        return made

    def test_while_its_counter_is_held(self, world: World, other: Api) -> None:
        held, free = self.groups(world)
        users = [world.user(held), world.user(free), world.user(held)]
        other.track(users[0], "image")
        answers = world.api.track_many([(user, "image", 1, "job") for user in users], 50)
        assert [answer["reason"] for answer in answers] == ["busy", None, "busy"]
        assert [answer["group"]["id"] for answer in answers] == [held, free, held]
        assert [user for user, *_ in world.recorded()] == [users[1]]
        other.connection.execute("commit")
        again = world.api.track_many([(user, "image", 1, "job") for user in users], 50)
        assert [(answer["allowed"], answer["replayed"]) for answer in again] == [(True, n == 1) for n in range(3)]

    def test_while_its_limits_are_edited(self, world: World, other: Api) -> None:
        held, free = self.groups(world)
        users = [world.user(held), world.user(free)]
        other.set_limit(held, "image", "day", "group", 5)
        answers = world.api.track_many([(user, "image") for user in users], 50)
        assert [answer["reason"] for answer in answers] == ["busy", None]

    def test_a_group_that_has_no_limit_for_the_kind_is_not_waited_for(self, world: World, other: Api) -> None:
        held, free = self.groups(world)
        world.api.save_group(held, limits=[limit(10, "video")], priority=1)
        user = world.user(held, free)
        # its first limit for the kind, about to come
        other.set_limit(held, "image", "day", "group", 5)
        world.api.execute("set lock_timeout = '5s'")
        answers = [world.api.track(user, "image"), world.api.reserve(user, "image"), world.api.check(user, "image")]
        answers += world.api.track_many([(user, "image"), (user, "image")], 5000)
        assert [answer["group"]["id"] for answer in answers] == [free] * 5
        other.connection.execute("commit")
        [answer] = world.api.track_many([(user, "image")])
        assert [answer["group"]["id"], world.api.track(user, "image")["group"]["id"]] == [held] * 2
        assert [(x["period"], x["used"]) for x in answer["limits"]] == [("day", 1)]

    def test_where_no_group_has_a_limit_for_the_kind_that_is_the_reason(self, world: World) -> None:
        user = world.user(*self.groups(world))
        answers = [world.api.track(user, "video"), *world.api.track_many([(user, "video")])]
        assert [answer["reason"] for answer in answers] == ["no_limit_for_kind"] * 2

    def test_what_can_be_had_is_taken_in_the_order_that_others_take_it(self, world: World, database: Database) -> None:
        """An edit of all groups waits for the first; a batch that holds the others would wait for it in a circle."""
        made = [UUID(int=number) for number in range(1, 9)]
        for group in made:
            world.owner.execute("insert into public.user_groups (id, name) values (%s, %s)", [group, str(group)])
            world.api.save_group(group, limits=[limit(10)])
        users = [world.user(group) for group in made]
        holder, admin, batch = (Api(database.connect("postgres")) for _ in range(3))
        answers: list[Any] = []

        def track_many() -> None:
            answers.extend(batch.track_many([(user, "image") for user in users], 1500))

        threads = [
            threading.Thread(target=admin.execute, args=["update public.group_limits set max = 9"]),
            threading.Thread(target=track_many),
        ]
        with holder.connection.transaction():
            holder.execute("select pg_advisory_xact_lock(1953459052, 1)")
            for thread, api in zip(threads, (admin, batch), strict=True):
                thread.start()
                eventually(lambda api=api: is_blocked(world, api))
            first = waits_since(world, batch)
            eventually(lambda: waits_since(world, batch) not in (None, first))
        for thread in threads:
            thread.join(PATIENCE)
        # the lock came free in time for it, or too late on a busy machine
        assert [answer["reason"] for answer in answers] in ([None] * 8, ["busy"] + [None] * 7)

    def test_while_a_key_is_in_somebodys_hands_all_are_asked_to_come_again(self, world: World, other: Api) -> None:
        held, free = self.groups(world)
        users = [world.user(held), world.user(free)]
        # of another kind: it would not wait for the counter
        world.api.set_limit(held, "video", "lifetime", "group", 5)
        other.track(users[0], "image", 1, "job")
        answers = world.api.track_many([(users[0], "video", 1, "job"), (users[1], "image", 1, "job")], 50)
        assert [(answer["reason"], answer["group"]) for answer in answers] == [("busy", None)] * 2
        assert world.recorded() == []

    def test_without_it_a_batch_waits(self, world: World, other: Api) -> None:
        held, free = self.groups(world)
        users = [world.user(held), world.user(free)]
        other.track(users[0], "image")
        world.api.execute("set statement_timeout = '200ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            world.api.track_many([(user, "image") for user in users])
        assert world.recorded() == []

    def test_the_callers_own_lock_timeout_is_as_it_was(self, world: World) -> None:
        user = world.user(self.groups(world)[0])
        world.api.execute("set lock_timeout = '7s'")
        with world.api.connection.transaction():
            world.api.track_many([(user, "image")], 50)
            assert world.api.one("show lock_timeout") == "7s"

    @pytest.mark.parametrize("max_wait", [-1, 0, 60_001])
    def test_no_wait_can_be_for_ever(self, world: World, max_wait: int) -> None:
        with pytest.raises(psycopg.DatabaseError, match="max_wait: must be from 1 to 60000") as error:
            world.api.track_many([], max_wait)
        assert error.value.sqlstate == "TL001"


def waits_since(world: World, other: Api) -> Any:
    """When the lock was asked for that somebody waits for; null when there is none."""
    pid = other.connection.info.backend_pid
    return world.owner.one("select min(waitstart) from pg_locks where pid = %s and not granted", [pid])


def shuffled(calls: Sequence[Call], size: int) -> list[Script]:
    """Let every connection make the same calls in batches, in an order of its own."""
    scripts: list[Script] = []
    for number in range(CONNECTIONS):
        mine = random.Random(number).sample(calls, len(calls))
        scripts.append([Batch(tuple(mine[start : start + size])) for start in range(0, len(mine), size)])
    return scripts


class TestAtOnce:
    def test_the_last_room_may_have_gone_under_the_very_same_key(self, world: World, database: Database) -> None:
        """The key is free when it is looked at first, and the room is gone when the request is judged."""
        user = world.user(world.group(limit(2)))
        world.api.track(user, "image", 1, "replayed")
        other, batch = Api(database.connect("postgres")), Api(database.connect())
        answers: list[Any] = []

        def track_many() -> None:
            requests = [(user, "image", 1, "replayed"), (user, "image", 1, "job"), (user, "image", 2, "job")]
            answers.extend(batch.track_many(requests))

        with other.connection.transaction():
            # the replayed one is answered with its counter, after the keys were looked at
            other.execute("lock table tokenlimits.counters in access exclusive mode")
            waiting = threading.Thread(target=track_many)
            waiting.start()
            eventually(lambda: is_blocked(world, batch))
            taken = other.track(user, "image", 1, "job")
        waiting.join(PATIENCE)
        assert [answer["reason"] for answer in answers] == [None, None, "refused"]
        assert (answers[1]["usage_id"], answers[1]["replayed"]) == (taken["usage_id"], True)
        assert answers[2]["code"] == "TL008"

    def test_a_key_that_dies_between_two_batches_makes_no_circle(self, world: World, database: Database) -> None:
        user = world.user(world.group(limit(10), limit(10, kind="video")))
        other, first, second = (Api(database.connect()) for _ in range(3))
        answers: dict[Api, list[Any]] = {}

        def track_many(api: Api, keys: str) -> threading.Thread:
            requests = [(user, "image", 1, key) for key in keys]
            thread = threading.Thread(target=lambda: answers.update({api: api.track_many(requests)}))
            thread.start()
            eventually(lambda: is_blocked(world, api))
            return thread

        other.execute("begin")
        other.track(user, "video", 1, "b")
        threads = [track_many(first, "abc")]  # has a, and waits for b
        world.api.refund(world.api.track(user, "image", 1, "c")["usage_id"])
        threads += [track_many(second, "ac")]  # may have c, of a dead usage, and waits for a
        other.execute("rollback")
        for thread in threads:
            thread.join(PATIENCE)
        assert [[answer["allowed"] for answer in answers[api]] for api in (first, second)] == [[True] * 3, [True] * 2]
        assert world.used(user) == 3

    def test_where_not_all_fit_a_key_is_allowed_for_all_or_for_none(self, world: World, hammer: Hammer) -> None:
        user = world.user(world.group(limit(10)))
        answers = hammer(shuffled([Call(user, idempotency_key=f"job-{n}") for n in range(25)], size=5))
        assert_right(answers)
        per_key = Counter(a.call.idempotency_key for a in answers if a.allowed)
        assert sorted(per_key.values()) == [CONNECTIONS] * 10

    @pytest.mark.slow
    def test_on_one_hot_group_the_limit_is_met_exactly(self, world: World, hammer: Hammer) -> None:
        group = world.group(limit(3000), limit(400, scope="member"))
        users = [world.user(group) for _ in range(10)]
        answers = hammer(shuffled([Call(user) for user in users] * 20, size=50))
        assert_right(answers)
        # each was told what was used right after it, whatever others did meanwhile
        assert sorted(answer.used or 0 for answer in answers if answer.allowed) == list(range(1, 3001))

    @pytest.mark.slow
    def test_over_many_groups_in_all_orders(self, world: World, hammer: Hammer) -> None:
        groups = [
            world.group(limit(50), limit(30, scope="member"), limit(40, kind="video", period="month"))
            for _ in range(12)
        ]
        joined = [random.Random(n).sample(groups, 3) for n in range(12)]
        users = [world.user(*mine) for mine in joined]
        calls = [Call(user, kind) for user in users for kind in ("image", "video") for _ in range(4)]
        answers = hammer(shuffled(calls, size=24))
        assert_right(answers)
        members = Counter(group for mine in joined for group in mine)
        assert allowed(answers) == sum(min(50, 30 * number) + 40 for number in members.values())

    def test_with_the_same_keys_each_is_charged_once(self, world: World, hammer: Hammer) -> None:
        groups = [world.group(limit(30), limit(60, kind="video")) for _ in range(4)]
        users = [world.user(*groups) for _ in range(3)]
        calls = [
            Call(user, kind, idempotency_key=f"job-{n}")
            for user in users
            for n, kind in enumerate(["image", "video"] * 15)
        ]
        answers = hammer(shuffled(calls, size=18))
        assert_right(answers)
        charged = Counter((a.call.user_id, a.call.idempotency_key) for a in answers if a.allowed and not a.replayed)
        assert charged == Counter((call.user_id, call.idempotency_key) for call in calls)

    @pytest.mark.slow
    def test_beside_single_calls_holds_and_settlements(self, world: World, crowd: Crowd, database: Database) -> None:
        groups = [world.group(limit(400), limit(200, scope="member"), limit(90, period="day")) for _ in range(3)]
        users = [world.user(*random.Random(n).sample(groups, 2)) for n in range(6)]
        singles = [
            call
            for user in users
            for call in (
                Call(user, then="refund_generation"),
                Call(user, ttl=1),
                Call(user, ttl=60, cost=2, then="commit_generation"),
                Call(user, ttl=60, then="release_generation"),
                Call(user, idempotency_key="job", ttl=1),
            )
        ]
        scripts = shuffled([Call(user, idempotency_key=key) for user in users for key in (None, "job")] * 3, size=12)
        for number in range(0, CONNECTIONS, 2):
            scripts[number] = random.Random(number).sample(singles, len(singles))
        with crowd.calling(database.url, scripts, cycles=2) as answers:
            pass
        assert_right(answers, "TL008")
        assert allowed(answers) > 0
        for group in groups:
            assert world.api.reconcile(group) == {"counters": [], "rollup": [], "holds": 0}
