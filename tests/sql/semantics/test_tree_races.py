"""A tree of groups, used from all sides while it is edited, moved and reset."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from uuid import UUID

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.hammer import Batch, Call, Crowd, Hammer, allowed, assert_right
from tests.sql.semantics.test_holds import NOON
from tests.sql.semantics.test_races import is_blocked, lives_of_a_usage, run_fast, shuffled, sweeping
from tests.sql.semantics.test_trees import beneath, move, shown
from tests.sql.semantics.test_window_races import assert_settled, with_batches
from tests.sql.semantics.world import World, limit
from tests.support.waiting import PATIENCE, eventually


def all_of(world: World) -> list[UUID]:
    return [x for (x,) in world.owner.connection.execute("select id from public.user_groups order by id").fetchall()]


def assert_all_settled(world: World) -> None:
    for group in all_of(world):
        assert_settled(world, group)


class TestExact:
    """No pool is passed, and nobody is denied while there is room in all."""

    def test_of_a_pool_at_the_top_and_one_each(self, world: World, hammer: Hammer) -> None:
        plan = world.group(limit(250), limit(60, scope="child"), limit(50, period="day", scope="member"))
        customers = [beneath(world, plan, limit(55)) for _ in range(5)]
        users = [world.user(group) for group in customers for _ in range(2)]
        answers = hammer(with_batches(users, shuffled([Call(user, cost=cost) for user in users for cost in (1, 2)], 4)))
        assert_right(answers)
        assert shown(world, plan)["image", "group", None] == (250, 250)
        assert max(world.api.group_usage(group)["limits"][0]["used"] for group in customers) <= 55
        assert_all_settled(world)

    def test_of_users_in_several_leaves(self, world: World, hammer: Hammer) -> None:
        top = world.group(limit(100), limit(40, scope="child"))
        leaves = [beneath(world, beneath(world, top)) for _ in range(4)]
        users = [world.user(*random.Random(n).sample(leaves, 3)) for n in range(6)]
        answers = hammer(with_batches(users, shuffled([Call(user) for user in users], 6)))
        assert_right(answers)
        assert allowed(answers) == 100
        assert_all_settled(world)

    def test_whatever_becomes_of_holds(self, world: World, crowd: Crowd, database: Database) -> None:
        world.at(NOON)
        top = world.group(
            limit(90, "credits", "hour", counts={"image": 1, "video": 3}, starts="rolling"),
            limit(6, "image", "in_flight"),
            limit(40, scope="child"),
            limit(35, "video", "day", "child", starts="first_use"),
        )
        leaves = [beneath(world, beneath(world, top), limit(30, scope="member")) for _ in range(3)]
        users = [world.user(leaf) for leaf in leaves] + [world.user(leaves[0], leaves[1]), world.user(top)]
        lives = [call for user in users for call in lives_of_a_usage(user)]
        expired = "select count(*) from public.generation_usage where status = 'expired'"
        with sweeping(database), crowd.calling(database.url, with_batches(users, shuffled(lives, 1))) as answers:
            run_fast(world, lambda: world.owner.one(expired) > 40)
        assert_right(answers, "TL008")
        assert {a.settled.error for a in answers if a.settled} <= {None, "TL006", "TL007"}
        assert_all_settled(world)


class TestWhileAdminsEdit:
    """Edits of any group of the tree, and moves, in the middle of calls."""

    def test_a_group_becomes_a_parent_while_it_is_used(self, world: World, crowd: Crowd, database: Database) -> None:
        top = world.group(limit(None))
        boss = world.user(top)
        with crowd.calling(database.url, shuffled([Call(boss), Call(boss, ttl=60)], 1)[:16]) as answers:
            leaf = beneath(world, top)
            user = world.user(leaf)
            for _ in range(20):
                assert world.api.track(user, "image")["allowed"]
        assert_right(answers)
        assert shown(world, top)["image", "group", None][0] == allowed(answers) + 20

    def test_a_first_child_waits_for_calls_that_were_judged_without_it(self, world: World, database: Database) -> None:
        top = world.group(limit(6))
        boss = world.user(top)
        world.api.track(boss, "image")
        slow, admin = Api(database.connect()), World(Api(database.connect("postgres")), Api(database.connect()))
        with slow.connection.transaction():
            assert slow.track(boss, "image", 3)["allowed"]
            making = threading.Thread(target=beneath, args=(admin, top), kwargs={"name": "First"})
            making.start()
            eventually(lambda: is_blocked(world, admin.api))
        making.join(PATIENCE)
        [child] = world.api.call("find_groups", parent_id=top)
        assert world.api.track(world.user(child["id"]), "image", 2)["remaining"] == 0

    def test_a_new_child_waits_for_an_edit_above(self, world: World, database: Database) -> None:
        """Also one of the table: the edit has waited for calls of the groups that there were, and of no other."""
        top = world.group(limit(9))
        world.user(beneath(world, top))
        editor = database.connect("postgres")
        admin = World(Api(database.connect("postgres")), Api(database.connect()))
        with editor.transaction():
            editor.execute("update public.group_limits set kind = 'video'")
            making = threading.Thread(target=beneath, args=(admin, top), kwargs={"name": "New"})
            making.start()
            eventually(lambda: is_blocked(world, admin.api))
        making.join(PATIENCE)
        [child] = world.api.call("find_groups", name="New")
        assert world.api.track(world.user(child["id"]), "video", 9)["remaining"] == 0

    def test_a_team_goes_back_and_forth_and_no_pool_is_passed(
        self, world: World, crowd: Crowd, database: Database
    ) -> None:
        tops = [world.group(limit(400), limit(300, scope="child"), limit(200, scope="member")) for _ in range(2)]
        stay = [beneath(world, top) for top in tops]
        team = beneath(world, tops[0])
        leaf = beneath(world, team)
        users = [world.user(group) for group in (*stay, team, leaf)] + [world.user(stay[1], leaf)]
        calls = [Call(user, cost=cost, ttl=ttl) for user in users for cost in (1, 3) for ttl in (None, 60)]
        with crowd.calling(database.url, with_batches(users, shuffled(calls, 1))) as answers:
            for n in range(25):
                move(world, team, [tops[1], stay[1], stay[0], None, tops[0]][n % 5])
        # a team that arrives where little is left takes its usage along: pools may be passed by it, never by a call
        assert {a.error for a in answers} == {None}
        assert [a for a in answers if a.wrongly_denied] == []
        assert_all_settled(world)

    @pytest.mark.slow
    def test_all_admins_at_once(self, world: World, crowd: Crowd, database: Database) -> None:
        """Edits may wait for each other and for calls, but not in a circle."""
        world.at("2026-11-30 22:59Z")
        top = world.group(limit(None), limit(10**6, scope="child"))
        middles = [beneath(world, top, limit(None, scope="member")) for _ in range(2)]
        leaves = [beneath(world, middle, limit(None)) for middle in middles for _ in range(2)]
        other = world.group(limit(None, period="month"), limit(None, scope="child"))
        users = [world.user(leaf) for leaf in leaves] + [world.user(leaves[0], leaves[3], other)]
        unexpected: list[psycopg.Error] = []

        def admin(seed: int) -> None:
            mine = World(Api(database.connect("postgres")), Api(database.connect()))
            chance = random.Random(seed)
            for n in range(30):
                try:
                    edit_tree(mine, chance, [top, *middles, *leaves, other], users, f"{seed} {n}")
                except psycopg.Error as error:
                    # a circle, a group with children, or one that another admin has just deleted
                    if error.sqlstate not in ("TL001", "TL002"):
                        unexpected.append(error)

        calls = [Call(user, kind, cost) for user in users for kind in ("image", "video") for cost in (1, 2)]
        lives = [call for user in users for call in lives_of_a_usage(user)]
        scripts = with_batches(users, shuffled([*calls, *lives], 1))[:12]
        with crowd.calling(database.url, scripts) as answers:
            admins = [threading.Thread(target=admin, args=(seed,)) for seed in range(4)]
            for thread in admins:
                thread.start()
            for thread in admins:
                thread.join()
        assert unexpected == [], "\n".join(f"{e} | {e.diag.message_detail} | {e.diag.context}" for e in unexpected)
        assert {a.error for a in answers} <= {None, "TL008"}
        assert [a for a in answers if a.wrongly_denied] == []
        assert_all_settled(world)


def edit_tree(world: World, chance: random.Random, groups: list[UUID], users: list[UUID], name: str) -> None:
    """Do one thing that an admin may do to one of the groups."""
    group, parent, user = chance.choice(groups), chance.choice(groups), chance.choice(users)
    kind, period = chance.choice(["image", "video"]), chance.choice(["minute", "day", "month"])
    starts = chance.choice(["calendar", "first_use", "anchor"])
    scope = chance.choice(["group", "child", "member"])
    maximum = chance.choice([None, 50, 5000])

    def come_and_go() -> None:
        child = beneath(world, group, limit(None), name=f"Guest {name}")
        world.api.add_member(child, user)
        world.api.track(user, "image", group_id=child)
        world.api.delete_group(child)

    actions: list[Callable[[], object]] = [
        lambda: move(world, group, parent),
        lambda: move(world, group, parent),
        lambda: world.api.save_group(
            group, parent_id=parent, limits=[limit(None), limit(maximum, kind, period, scope)]
        ),
        lambda: world.api.save_group(group, no_parent=True),
        lambda: world.api.set_limit(group, kind, period, scope, maximum, starts=starts),
        lambda: world.api.remove_limit(group, kind, period, scope),
        lambda: world.api.save_group(group, timezone=chance.choice(["UTC", "Asia/Kathmandu"])),
        lambda: world.api.save_group(group, anchor_at="2026-11-03T00:00:00Z"),
        lambda: world.api.reset(group, chance.choice([None, kind])),
        lambda: world.api.reset(group, kind, user),
        lambda: world.api.reconcile(group),
        lambda: world.api.one(
            "select public.set_limit_override(%s, %s, %s, p_child_id => %s)", [parent, kind, maximum, group]
        ),
        lambda: world.api.add_member(group, user),
        come_and_go,
    ]
    chance.choice(actions)()


class TestBatchesAndMoves:
    def test_a_batch_over_the_whole_tree_waits_for_a_move_and_sees_it(
        self, world: World, crowd: Crowd, database: Database
    ) -> None:
        tops = [world.group(limit(10**6)) for _ in range(2)]
        leaves = [beneath(world, tops[n % 2]) for n in range(8)]
        users = [world.user(leaf) for leaf in leaves]
        batches = [[Batch(tuple(Call(user) for user in random.Random(n).sample(users, 8)))] for n in range(12)]
        with crowd.calling(database.url, batches) as answers:
            for n in range(24):
                move(world, leaves[n % 8], tops[(n // 8) % 2])
        assert_right(answers)
        assert sum(shown(world, top)["image", "group", None][0] for top in tops) == allowed(answers)
        assert_all_settled(world)
