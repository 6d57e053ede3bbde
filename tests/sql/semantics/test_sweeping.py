"""Many holds that expire together: a call sweeps some of them, and is judged right with the rest unswept."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import Call, Hammer, Settle, assert_right
from tests.sql.semantics.test_races import is_blocked, shuffled
from tests.sql.semantics.world import World, limit
from tests.support import clock
from tests.support.waiting import PATIENCE, eventually

NOON = "2026-11-23 12:00Z"
LATER = "2026-11-23 12:02Z"
SWEPT = 500
"""How many holds a call sweeps at most."""

RESERVE_MANY = """
select count(*) filter (where (answer ->> 'allowed')::boolean)
from generate_series(1, %(times)s) as i
cross join lateral (
  select public.reserve_generation(%(user)s, 'image', 1, 60, p_metadata => jsonb_build_object('i', i)) as answer
) as r
"""


def hold_many(world: World, user: UUID, times: int) -> None:
    world.at(NOON)
    assert world.owner.one(RESERVE_MANY, {"user": user, "times": times}) == times


def statuses(world: World) -> Counter[str]:
    rows = world.owner.connection.execute("select status from public.generation_usage").fetchall()
    return Counter(status for (status,) in rows)


@pytest.mark.slow
class TestMoreThanACallSweeps:
    @pytest.fixture
    def user(self, world: World) -> UUID:
        """A member whose 1,300 holds have expired, and fill the group's limit."""
        user = world.user(world.group(limit(1300), limit(1300, period="day", scope="member")))
        hold_many(world, user, 1300)
        world.at(LATER)
        return user

    def test_a_call_sweeps_some_and_subtracts_the_rest(self, world: World, user: UUID) -> None:
        answer = world.api.track(user, "image")
        assert [x["used"] for x in answer["limits"]] == [1, 1]
        assert statuses(world) == {"expired": SWEPT, "reserved": 1300 - SWEPT, "committed": 1}
        assert world.used(user) == world.used(user, "day", "member") == 1

    def test_a_call_gets_the_room_of_those_that_are_left(self, world: World, user: UUID) -> None:
        answer = world.api.track(user, "image", 1300)
        assert (answer["allowed"], answer["remaining"]) == (True, 0)
        assert statuses(world) == {"expired": SWEPT, "reserved": 1300 - SWEPT, "committed": 1}
        denied = world.api.track(user, "image")
        assert (denied["allowed"], denied["denied_by"]["used"]) == (False, 1300)
        assert statuses(world)["expired"] == 2 * SWEPT, "a denied call sweeps too"

    def test_another_member_gets_it_too(self, world: World, user: UUID) -> None:
        other = world.user(world.api.check(user, "image")["group"]["id"])
        assert world.api.reserve(other, "image", 1300)["allowed"]
        assert not world.api.check(user, "image")["allowed"]

    def test_a_batch_gets_it_and_not_more(self, world: World, user: UUID) -> None:
        answers = world.api.track_many(
            [(user, "image", 500), (user, "image", 801), (user, "image", 800), (user, "image")]
        )
        assert [a["allowed"] for a in answers] == [True, False, True, False]
        assert [a["remaining"] for a in answers] == [800, 800, 0, 0]
        assert statuses(world) == {"expired": SWEPT, "reserved": 1300 - SWEPT, "committed": 2}

    def test_a_late_commit_gets_it_and_sweeps_nothing(self, world: World, user: UUID) -> None:
        assert world.api.track(user, "image", 1299)["allowed"]
        usages = world.owner.connection.execute(
            "select id from public.generation_usage where status = 'reserved' limit 2"
        ).fetchall()
        assert world.api.commit(usages[0][0])["remaining"] == 0
        with pytest.raises(psycopg.DatabaseError) as error:
            world.api.commit(usages[1][0])
        assert error.value.sqlstate == "TL007"
        assert statuses(world) == {"expired": SWEPT, "reserved": 1300 - SWEPT - 1, "committed": 2}

    def test_a_job_sweeps_them_in_steps(self, world: World, user: UUID) -> None:
        assert [world.owner.tidy() for _ in range(4)] == [500, 500, 300, 0]
        assert world.used(user) == 0

    def test_reports_subtract_them_all(self, world: World, user: UUID) -> None:
        group = world.api.check(user, "image")["group"]["id"]
        assert [x["used"] for x in world.api.group_usage(group)["limits"]] == [0, 0]
        assert world.owner.history(None, "day") == []

    def test_from_all_connections_at_once(self, world: World, hammer: Hammer, user: UUID) -> None:
        group = world.api.check(user, "image")["group"]["id"]
        users = [user, *(world.user(group) for _ in range(3))]
        answers = hammer(shuffled([Call(one, cost=13) for one in users], times=1))
        assert_right(answers)
        assert sum(a.allowed for a in answers) == 100
        assert world.used(user) == 1300


class TestWhoeverIsFirst:
    """A hold is committed in time, but before that is done it expires, and somebody takes its room."""

    def test_a_commit_that_was_overtaken_is_late(self, world: World, database: Database) -> None:
        world.at(NOON)
        group = world.group(limit(1), limit(5, scope="member"))
        holder, other = world.user(group), world.user(group)
        usage = world.api.reserve(holder, "image", 1, 60)["usage_id"]
        blocker, slow = Api(database.connect("postgres")), Api(database.connect())
        errors: list[str | None] = []

        def commit() -> None:
            try:
                slow.commit(usage)
            except psycopg.DatabaseError as error:
                errors.append(error.sqlstate)

        with blocker.connection.transaction():
            # what a call of the holder's own in another kind of limit would hold: the member's counter, not the group's
            blocker.execute("select from tokenlimits.counters where subject = %s for update", [holder])
            committing = threading.Thread(target=commit)
            committing.start()
            eventually(lambda: is_blocked(world, slow))
            world.at(LATER)
            taken = world.api.track(other, "image")
            assert taken["allowed"]
        committing.join(PATIENCE)
        assert errors == ["TL007"]
        assert world.used(other) == 1

    def test_a_commit_that_nobody_overtook_succeeds(self, world: World, database: Database) -> None:
        world.at(NOON)
        group = world.group(limit(1), limit(5, scope="member"))
        holder, other = world.user(group), world.user(group)
        usage = world.api.reserve(holder, "image", 1, 60)["usage_id"]
        blocker, slow = Api(database.connect("postgres")), Api(database.connect())
        with blocker.connection.transaction():
            blocker.execute("select from tokenlimits.counters where subject = %s for update", [holder])
            committing = threading.Thread(target=slow.commit, args=[usage])
            committing.start()
            eventually(lambda: is_blocked(world, slow))
            world.at(LATER)
        committing.join(PATIENCE)
        assert not world.api.track(other, "image")["allowed"]
        assert world.recorded() == [(holder, "image", 1, "committed")]

    def test_a_sweep_waits_for_nobody_who_settles(self, world: World, database: Database) -> None:
        world.at(NOON)
        group = world.group(limit(10))
        holder, other = world.user(group), world.user(group)
        usages = [world.api.reserve(holder, "image", 1, 60)["usage_id"] for _ in range(3)]
        slow = Api(database.connect("postgres"))
        with slow.connection.transaction():
            slow.execute("select from public.generation_usage where id = %s for update", [usages[0]])
            world.at(LATER)
            world.owner.connection.execute("set statement_timeout = '10s'")
            assert world.owner.track(other, "image", 10)["allowed"]
            world.owner.connection.execute("set statement_timeout = '60s'")
        assert statuses(world) == {"expired": 2, "reserved": 1, "committed": 1}
        assert world.used(other) == 10

    def test_commits_in_time_and_calls_for_their_room(self, world: World, hammer: Hammer) -> None:
        """Real time: holds expire while they are committed, and others wait for their room."""
        group = world.group(limit(40), limit(40, scope="member"))
        users = [world.user(group) for _ in range(4)]
        clock.shift(world.owner.connection, timedelta(0))
        usages = [world.api.reserve(user, "image", 1, 1)["usage_id"] for user in users for _ in range(10)]
        settle = [Settle("commit_generation", usage) for usage in usages]
        take = [Call(user) for user in users for _ in range(10)]
        answers = hammer([*shuffled(settle, times=1)[:16], *shuffled(take, times=2)[16:]])
        assert_right(answers, "TL007")
        assert world.owner.one("select sum(cost) from public.generation_usage where status = 'committed'") <= 40


class TestIds:
    @pytest.mark.parametrize("way", ["track", "reserve", "record", "batch"])
    def test_a_usage_knows_its_moment_and_its_home(self, world: World, way: str) -> None:
        at = world.at("2026-11-23 12:00:00.123987Z")
        group = world.group(limit(10))
        user = world.user(group)
        if way == "batch":
            usages = {answer["usage_id"] for answer in world.api.track_many([(user, "image")] * 3)}
        elif way == "record":
            at -= timedelta(days=400)
            usages = {world.api.record(user, "image", 1, at)["usage_id"] for _ in range(3)}
        else:
            usages = {getattr(world.api, way)(user, "image")["usage_id"] for _ in range(3)}
        assert len(usages) == 3
        for usage in usages:
            assert (usage.version, usage.variant) == (7, "specified in RFC 4122")
            assert usage.int >> 80 == int(at.timestamp() * 1000)
            assert usage.hex[-4:] == group.hex[-4:]
