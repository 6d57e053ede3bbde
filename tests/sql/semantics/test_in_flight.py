"""Limits on what runs at once (DESIGN 4.3): holds that are live, one each."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from tests.sql.semantics.hammer import Call, Hammer, Settle, allowed, assert_right
from tests.sql.semantics.world import World, limit

TWO = limit(2, "video", "in_flight", "member")


def in_progress(world: World, user: UUID) -> int:
    [found] = [x for x in world.api.user_usage(user) if x["period"] == "in_flight"]
    return found["used"]


class TestPlaces:
    """What takes a place, and what gives it back."""

    def test_each_hold_takes_one_whatever_it_costs(self, world: World) -> None:
        user = world.user(world.group(TWO, limit(100, "video")))
        world.at("2026-11-23 12:00Z")
        first = world.api.reserve(user, "video", 8, 600)
        assert [(x["period"], x["used"], x["remaining"], x["weight"], x["reset_at"]) for x in first["limits"]] == [
            ("in_flight", 1, 1, 1, None),
            ("lifetime", 8, 92, 1, None),
        ]
        assert first["remaining"] == 92
        assert world.api.reserve(user, "video", 1, 300)["allowed"]
        denied = world.api.reserve(user, "video")
        assert (denied["reason"], denied["denied_by"]["period"]) == ("limit_exceeded", "in_flight")
        assert denied["retry_after"] == 300
        assert denied["error"] == (
            "Video generation limit exceeded: 2 videos in progress by this user, at most 2 at once, "
            "next place 2026-11-23 12:05 UTC"
        )
        assert world.api.release(first["usage_id"])["limits"][0]["used"] == 1
        assert world.api.reserve(user, "video")["allowed"]

    def test_commits_and_releases_give_it_back_once(self, world: World) -> None:
        user = world.user(world.group(TWO))
        holds = [world.api.reserve(user, "video")["usage_id"] for _ in range(2)]
        for _ in range(2):
            world.api.commit(holds[0], 1)
            world.api.release(holds[1])
        assert in_progress(world, user) == 0
        world.api.refund(holds[0])
        assert in_progress(world, user) == 0

    def test_an_expired_hold_leaves_its_place_swept_or_not(self, world: World) -> None:
        user = world.user(world.group(TWO, limit(100, "video")))
        world.at("2026-11-23 12:00Z")
        holds = [world.api.reserve(user, "video", 1, 60)["usage_id"] for _ in range(2)]
        world.at("2026-11-23 12:01Z")
        assert in_progress(world, user) == 0
        assert [world.api.reserve(user, "video")["allowed"] for _ in range(3)] == [True, True, False]
        assert in_progress(world, user) == 2
        # its work is done: a late commit needs no place
        assert world.api.commit(holds[0])["status"] == "committed"
        assert in_progress(world, user) == 2

    def test_a_late_commit_of_an_unswept_hold_takes_no_place_of_another(self, world: World) -> None:
        user = world.user(world.group(TWO, limit(100, "video")))
        world.at("2026-11-23 12:00Z")
        hold = world.api.reserve(user, "video", 1, 60)["usage_id"]
        world.at("2026-11-23 12:01Z")
        world.api.commit(hold)
        assert [world.api.reserve(user, "video")["allowed"] for _ in range(3)] == [True, True, False]

    def test_an_extended_hold_keeps_its_place(self, world: World) -> None:
        user = world.user(world.group(limit(1, "video", "in_flight")))
        world.at("2026-11-23 12:00Z")
        hold = world.api.reserve(user, "video", 1, 60)["usage_id"]
        extended = world.api.extend(hold, 600)
        assert [(x["period"], x["used"]) for x in extended["limits"]] == [("in_flight", 1)]
        world.at("2026-11-23 12:05Z")
        assert world.api.reserve(user, "video")["retry_after"] == 300

    def test_the_wait_is_for_as_many_as_are_in_the_way(self, world: World) -> None:
        group = world.group(limit(3, "video", "in_flight"))
        user = world.user(group)
        start = world.at("2026-11-23 12:00Z")
        for ttl in (300, 100, 200):
            world.api.reserve(user, "video", 1, ttl)
        world.api.save_group(group_id=group, limits=[limit(2, "video", "in_flight")])
        assert world.api.reserve(user, "video")["reset_at"] == start + timedelta(seconds=200)
        world.api.save_group(group_id=group, limits=[limit(0, "video", "in_flight")])
        denied = world.api.reserve(user, "video")
        assert (denied["reset_at"], denied["retry_after"]) == (None, None)


class TestWhatIsNotAHold:
    """track, record, check and batches."""

    def test_they_are_neither_counted_nor_stopped(self, world: World) -> None:
        group = world.group(limit(0, "video", "in_flight"), limit(9, "video"))
        user = world.user(group)
        answers = [
            world.api.track(user, "video"),
            world.api.record(user, "video"),
            world.api.check(user, "video"),
            *world.api.track_many([(user, "video"), (user, "video")]),
        ]
        assert [a["allowed"] for a in answers] == [True] * 5
        assert {x["period"] for a in answers for x in a["limits"]} == {"lifetime"}
        assert in_progress(world, user) == 0
        assert world.api.refund(answers[0]["usage_id"])["limits"][0]["period"] == "lifetime"

    def test_it_entitles_only_holds(self, world: World) -> None:
        elsewhere = world.group(limit(5, "video"), priority=-1)
        user = world.user(world.group(TWO), elsewhere)
        assert world.api.track(user, "video")["group"]["id"] == elsewhere
        assert world.api.record(user, "video")["group"]["id"] == elsewhere
        assert world.api.track_many([(user, "video")])[0]["group"]["id"] == elsewhere
        assert world.api.reserve(user, "video")["group"]["id"] != elsewhere
        alone = world.user(world.group(TWO))
        assert world.api.track(alone, "video")["reason"] == "no_limit_for_kind"
        assert world.api.reserve(alone, "video")["allowed"]


class TestEdits:
    """What an admin does meanwhile."""

    def test_a_limit_that_is_added_counts_what_runs(self, world: World) -> None:
        group = world.group(limit(None, "video"))
        user = world.user(group)
        world.at("2026-11-23 12:00Z")
        world.api.reserve(user, "video", 1, 60)
        world.api.reserve(user, "video", 1, 600)
        world.at("2026-11-23 12:02Z")
        world.api.save_group(group_id=group, limits=[limit(None, "video"), TWO, limit(9, "video", "in_flight")])
        assert [x["used"] for x in world.api.user_usage(user) if x["period"] == "in_flight"] == [1, 1]
        assert [world.api.reserve(user, "video")["allowed"] for _ in range(2)] == [True, False]

    def test_resets_and_time_zones_take_no_hold_away(self, world: World) -> None:
        group = world.group(TWO, limit(9, "video", "day"))
        user = world.user(group)
        holds = [world.api.reserve(user, "video")["usage_id"] for _ in range(2)]
        world.api.reset(group)
        world.api.reset(group, "video", user)
        world.api.save_group(group_id=group, timezone="Asia/Tokyo")
        assert in_progress(world, user) == 2
        world.api.release(holds[0])
        assert in_progress(world, user) == 1

    def test_observing_says_what_it_would_deny(self, world: World) -> None:
        user = world.user(world.group(limit(1, "video", "in_flight", mode="observe")))
        assert world.api.reserve(user, "video")["would_deny"] == []
        assert [x["used"] for x in world.api.reserve(user, "video")["would_deny"]] == [2]

    def test_a_group_shows_what_all_members_have_in_progress(self, world: World) -> None:
        group = world.group(TWO, limit(9, "video", "in_flight"))
        world.at("2026-11-23 12:00Z")
        for user in (world.user(group), world.user(group)):
            world.api.reserve(user, "video", 1, 60)
            world.api.reserve(user, "video", 1, 600)
        world.at("2026-11-23 12:02Z")
        assert [(x["used"], x["capacity"], x["reset_at"]) for x in world.api.group_usage(group)["limits"]] == [
            (2, 4, None),
            (2, 9, None),
        ]

    def test_a_group_shows_it_without_a_limit_of_its_own(self, world: World) -> None:
        group = world.group(TWO)
        world.api.reserve(world.user(group), "video", 5)
        assert [(x["used"], x["capacity"]) for x in world.api.group_usage(group)["limits"]] == [(1, 2)]

    def test_reconciling_counts_the_holds(self, world: World) -> None:
        group = world.group(TWO)
        user = world.user(group)
        world.api.reserve(user, "video")
        world.owner.execute("update tokenlimits.counters set used = 5")
        [found] = world.api.reconcile(group)["counters"]
        assert (found["period"], found["was"], found["used"]) == ("in_flight", 5, 1)
        assert in_progress(world, user) == 1


def test_32_at_once_never_have_more_places_than_there_are(world: World, hammer: Hammer) -> None:
    """Each holds for a moment, and gives back in one way or another."""
    group = world.group(limit(2, "video", "in_flight"), limit(None, "video"))
    user = world.user(group)
    for then in ("release_generation", "commit_generation"):
        call = Call(user, "video", function="reserve_generation", ttl=60, then=then)
        answers = hammer([[call] * 20] * 32)
        assert_right(answers)
        assert allowed(answers) > 0
        assert in_progress(world, user) == 0


def test_what_is_killed_frees_its_place_and_no_other(world: World, hammer: Hammer) -> None:
    """Two are admitted; later, when they have expired unswept, just two of 32 that come at once."""
    group = world.group(limit(2, "video", "in_flight", "member"), limit(None, "video"))
    user = world.user(group)
    call = Call(user, "video", function="reserve_generation", ttl=60)
    world.at("2026-11-23 12:00Z")
    assert allowed(hammer([[call]] * 32)) == 2
    world.at("2026-11-23 12:02Z")
    late = [x["usage_id"] for x in usages(world)]
    settling = [[Settle("commit_generation", late[0])], [Settle("release_generation", late[1])]]
    answers = hammer([[call]] * 30 + settling)
    assert_right(answers)
    assert sum(a.allowed for a in answers if isinstance(a.call, Call)) == 2
    assert in_progress(world, user) == 2


def usages(world: World) -> list[dict[str, UUID]]:
    rows = world.owner.connection.execute("select id from public.generation_usage order by id").fetchall()
    return [{"usage_id": row[0]} for row in rows]


def test_a_moment_is_kept_in_answers(world: World) -> None:
    """`expires_at` of the next place is true to the microsecond."""
    user = world.user(world.group(limit(1, "video", "in_flight")))
    world.at("2026-11-23 12:00:00.123456Z")
    world.api.reserve(user, "video", 1, 60)
    assert world.api.reserve(user, "video")["reset_at"] == datetime.fromisoformat("2026-11-23 12:01:00.123456Z")
