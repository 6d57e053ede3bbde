"""Two steps, where the work can fail (DESIGN 3.7 and 3.4), as small examples."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.sql.semantics.test_contract import refused
from tests.sql.semantics.world import World, limit

NOON = "2026-11-23 12:00Z"
Settle = Callable[[World, UUID], Any]

SETTLEMENTS: dict[str, Settle] = {
    "commit": lambda world, usage: world.api.commit(usage),
    "commit less": lambda world, usage: world.api.commit(usage, 1),
    "commit nothing": lambda world, usage: world.api.commit(usage, 0),
    "release": lambda world, usage: world.api.release(usage),
    "refund": lambda world, usage: world.api.refund(usage),
}
COMMITS = ["commit", "commit less", "commit nothing"]


@pytest.fixture(params=[False, True], ids=["unswept", "swept"])
def sweep(request: pytest.FixtureRequest, world: World) -> Callable[[], None]:
    """Let expired holds be, or sweep them: nobody may see a difference."""

    def swept() -> None:
        assert world.owner.tidy() > 0

    return swept if request.param else lambda: None


@pytest.fixture
def user(world: World) -> UUID:
    """A member of a group that allows 10, at noon."""
    world.at(NOON)
    return world.user(world.group(limit(10), limit(10, period="day", scope="member")))


def later(world: World, seconds: float) -> None:
    now = world.owner.one("select tokenlimits.clock()")
    world.at((now + timedelta(seconds=seconds)).isoformat())


def hold(world: World, user: UUID, cost: int = 4, ttl: int = 60, key: str | None = None) -> UUID:
    answer = world.api.reserve(user, "image", cost, ttl, key)
    assert answer["allowed"]
    assert not answer["replayed"]
    return answer["usage_id"]


def ledger(world: World) -> list[tuple[Any, ...]]:
    """Tell cost and status of each usage, as they count."""
    return world.owner.connection.execute(
        """
        select
          cost,
          case when status = 'reserved' and expires_at <= tokenlimits.clock() then 'expired' else status end
        from public.generation_usage
        order by created_at, id
        """
    ).fetchall()


class TestReserving:
    def test_holds_the_cost_until_it_expires(self, world: World, user: UUID) -> None:
        at = world.at(NOON)
        answer = world.api.reserve(user, "image", 4)
        assert (answer["allowed"], answer["status"], answer["cost"], answer["remaining"]) == (True, "reserved", 4, 6)
        assert answer["expires_at"] == at + timedelta(hours=1)
        assert [x["used"] for x in answer["limits"]] == [4, 4]
        assert world.recorded() == [(user, "image", 4, "reserved")]

    def test_is_denied_like_tracking(self, world: World, user: UUID) -> None:
        hold(world, user, 8)
        denied = world.api.reserve(user, "image", 3)
        assert denied == world.api.track(user, "image", 3) == world.api.check(user, "image", 3)
        assert (denied["reason"], denied["usage_id"], denied["expires_at"]) == ("limit_exceeded", None, None)

    @pytest.mark.parametrize("ttl", [1, 2_592_000])
    def test_lasts_as_long_as_was_asked_for(self, world: World, user: UUID, ttl: int) -> None:
        assert world.api.reserve(user, "image", 1, ttl)["expires_at"] == world.at(NOON) + timedelta(seconds=ttl)

    @pytest.mark.parametrize("ttl", [-1, 0, 2_592_001])
    def test_for_no_time_or_for_ever_is_refused(self, world: World, user: UUID, ttl: int) -> None:
        with refused("TL001", "ttl"):
            world.api.reserve(user, "image", 1, ttl)
        assert world.recorded() == []


class TestSettling:
    @pytest.mark.parametrize(
        ("how", "status", "cost", "used"),
        [
            ("commit", "committed", 4, 4),
            ("commit less", "committed", 1, 1),
            ("commit nothing", "committed", 0, 0),
            ("release", "released", 4, 0),
        ],
    )
    def test_once_counts_and_once_more_changes_nothing(
        self, world: World, user: UUID, how: str, status: str, cost: int, used: int
    ) -> None:
        usage = hold(world, user)
        first = SETTLEMENTS[how](world, usage)
        assert (first["usage_id"], first["status"], first["cost"]) == (usage, status, cost)
        assert (first["allowed"], first["replayed"], first["remaining"]) == (True, False, 10 - used)
        again = SETTLEMENTS[how](world, usage)
        assert again == first | {"replayed": True}
        assert world.used(user) == used
        assert ledger(world) == [(cost, status)]

    @pytest.mark.parametrize("cost", [-1, 5, 1_000_000])
    def test_for_more_than_was_reserved_is_refused(self, world: World, user: UUID, cost: int) -> None:
        usage = hold(world, user)
        with refused("TL001", "cost"):
            world.api.commit(usage, cost)
        assert world.recorded() == [(user, "image", 4, "reserved")]
        assert world.api.commit(usage)["status"] == "committed"

    @pytest.mark.parametrize("first", [*COMMITS, "release"])
    @pytest.mark.parametrize("second", SETTLEMENTS)
    def test_otherwise_is_refused(self, world: World, user: UUID, first: str, second: str) -> None:
        if first == second or (second == "refund" and first in COMMITS):
            return
        usage = hold(world, user)
        SETTLEMENTS[first](world, usage)
        before = ledger(world), world.used(user)
        with refused("TL006", before[0][0][1]):
            SETTLEMENTS[second](world, usage)
        assert (ledger(world), world.used(user)) == before

    @pytest.mark.parametrize("how", SETTLEMENTS)
    def test_what_does_not_exist_is_refused(self, world: World, user: UUID, how: str) -> None:
        with refused("TL005"):
            SETTLEMENTS[how](world, uuid4())

    @pytest.mark.parametrize("how", [*COMMITS, "release"])
    @pytest.mark.parametrize("gone", ["member", "user", "group", "limit"])
    def test_needs_nothing_but_the_id(self, world: World, how: str, gone: str) -> None:
        group = world.group(limit(10))
        user = world.user(group)
        usage = hold(world, user)
        {
            "member": lambda: world.api.remove_member(group, user),
            "user": lambda: world.owner.delete_user(user),
            "group": lambda: world.api.delete_group(group),
            "limit": lambda: world.api.remove_limit(group, "image", "lifetime", "group"),
        }[gone]()
        settled = SETTLEMENTS[how](world, usage)
        assert (settled["usage_id"], settled["group"]["id"]) == (usage, group)
        assert (settled["group"]["name"] is None) == (gone == "group")
        if settled["status"] == "committed":
            assert world.api.refund(usage)["status"] == "refunded"

    @pytest.mark.parametrize(("how", "today"), [("commit", 5), ("commit less", 5), ("release", 5)])
    def test_a_usage_of_yesterday_moves_nothing_of_today(self, world: World, user: UUID, how: str, today: int) -> None:
        usage = hold(world, user, ttl=3 * 86400)
        later(world, 86400)
        world.api.track(user, "image", today)
        settled = SETTLEMENTS[how](world, usage)
        assert world.used(user, "day", "member") == today
        assert world.used(user) == today + (settled["cost"] if settled["status"] == "committed" else 0)

    def test_a_commit_before_the_end_needs_no_room(self, world: World) -> None:
        group = world.group(limit(4))
        usage = hold(world, world.user(group))
        world.api.set_limit(group, "image", "lifetime", "group", 1)
        assert world.api.commit(usage)["status"] == "committed"

    def test_what_is_given_back_is_there_for_others_at_once(self, world: World) -> None:
        user = world.user(world.group(limit(4)))
        for give_back in (world.api.release, lambda usage: world.api.commit(usage, 0)):
            usage = hold(world, user)
            assert not world.api.track(user, "image")["allowed"]
            give_back(usage)
        assert world.api.track(user, "image", 4)["allowed"]


class TestRefunding:
    @pytest.mark.parametrize("origin", ["track", "record", "commit", "commit less", "late commit"])
    def test_gives_back_what_was_charged_once(self, world: World, user: UUID, origin: str) -> None:
        if origin in ("track", "record"):
            usage = getattr(world.api, origin)(user, "image", 4)["usage_id"]
        else:
            usage = hold(world, user)
            later(world, 61 if origin == "late commit" else 0)
            world.api.commit(usage, 1 if origin == "commit less" else None)
        assert world.used(user) > 0
        first = world.api.refund(usage)
        assert (first["status"], first["replayed"], world.used(user)) == ("refunded", False, 0)
        assert world.api.refund(usage) == first | {"replayed": True}
        assert world.used(user) == 0
        with refused("TL006", "refunded"):
            world.api.commit(usage)

    def test_of_a_hold_is_refused(self, world: World, user: UUID) -> None:
        usage = hold(world, user)
        with refused("TL001", "usage_id"):
            world.api.refund(usage)
        assert ledger(world) == [(4, "reserved")]

    @pytest.mark.parametrize("how", ["commit", "release"])
    def test_what_was_tracked_can_only_be_refunded(self, world: World, user: UUID, how: str) -> None:
        usage = world.api.track(user, "image", 4)["usage_id"]
        with refused("TL006", "committed"):
            SETTLEMENTS[how](world, usage)
        assert world.used(user) == 4


class TestAnExpiredHold:
    def test_counts_as_released_from_the_moment_on(self, world: World, user: UUID) -> None:
        hold(world, user, 10)
        later(world, 59.999999)
        assert (world.used(user), world.api.check(user, "image")["allowed"]) == (10, False)
        later(world, 0.000001)
        assert (world.used(user), world.used(user, "day", "member")) == (0, 0)
        assert world.api.check(user, "image", 10)["allowed"]
        assert [x["used"] for group in [world.api.user_usage(user)] for x in group] == [0, 0]
        assert world.owner.history(None, "day") == []
        assert world.recorded() == [(user, "image", 10, "reserved")], "looking sweeps nothing"
        assert world.api.track(user, "image", 10)["remaining"] == 0
        assert world.recorded() == [(user, "image", 10, "expired"), (user, "image", 10, "committed")]

    def test_settled_when_it_expired(self, world: World, user: UUID) -> None:
        end = world.at(NOON) + timedelta(seconds=60)
        hold(world, user)
        later(world, 3600)
        assert world.owner.tidy() == 1
        assert world.owner.one("select settled_at from public.generation_usage") == end
        assert world.owner.tidy() == 0

    def test_is_swept_by_a_denied_call_too(self, world: World, user: UUID) -> None:
        hold(world, user)
        later(world, 60)
        assert not world.api.track(user, "image", 11)["allowed"]
        assert world.recorded() == [(user, "image", 4, "expired")]

    def test_is_swept_by_another_member_where_a_limit_was_lowered_meanwhile(self, world: World) -> None:
        world.at(NOON)
        group = world.group(limit(10, period="day", scope="member"))
        user, other = world.user(group), world.user(group)
        world.api.track(user, "image", 4)
        hold(world, user)
        later(world, 60)
        world.api.set_limit(group, "image", "day", "member", 3)
        world.owner.connection.execute("set statement_timeout = '60s'")
        assert world.owner.track(other, "image", 3)["allowed"]
        world.owner.connection.execute("reset statement_timeout")
        assert sorted(world.recorded(), key=lambda row: (row[0] != user, row[3])) == [
            (user, "image", 4, "committed"),
            (user, "image", 4, "expired"),
            (other, "image", 3, "committed"),
        ]

    def test_is_released_without_an_error(self, world: World, user: UUID, sweep: Callable[[], None]) -> None:
        usage = hold(world, user)
        later(world, 60)
        sweep()
        answer = world.api.release(usage)
        assert (answer["status"], answer["replayed"], answer["remaining"]) == ("expired", True, 10)
        assert world.api.release(usage) == answer
        assert world.used(user) == 0

    def test_is_not_refunded(self, world: World, user: UUID, sweep: Callable[[], None]) -> None:
        usage = hold(world, user)
        later(world, 60)
        sweep()
        with refused("TL006", "expired"):
            world.api.refund(usage)

    @pytest.mark.parametrize(("cost", "used"), [(None, 4), (1, 1), (0, 0)])
    def test_is_committed_late_where_it_still_fits(
        self, world: World, user: UUID, sweep: Callable[[], None], cost: int | None, used: int
    ) -> None:
        usage = hold(world, user)
        later(world, 60)
        world.api.track(user, "image", 6)
        later(world, 1)
        hold(world, user, 4, ttl=1)
        later(world, 1)
        sweep()
        answer = world.api.commit(usage, cost)
        assert (answer["status"], answer["replayed"], answer["remaining"]) == ("committed", False, 4 - used)
        assert world.api.commit(usage, cost) == answer | {"replayed": True}
        assert world.used(user) == 6 + used

    def test_is_not_committed_where_it_does_not_fit(self, world: World, user: UUID, sweep: Callable[[], None]) -> None:
        usage, other = hold(world, user), hold(world, user, 1)
        later(world, 60)
        world.api.record(user, "image", 7, group_id=None)
        hold(world, user, 1, ttl=1)
        later(world, 1)
        sweep()
        with refused("TL007", str(usage)):
            world.api.commit(usage)
        assert world.used(user) == 7
        assert world.api.commit(other)["remaining"] == 2
        assert world.api.commit(usage, 2)["remaining"] == 0

    def test_is_not_committed_when_all_of_its_periods_are_over(self, world: World, sweep: Callable[[], None]) -> None:
        world.at(NOON)
        user = world.user(world.group(limit(10, period="day"), limit(9, period="day", scope="member")))
        usage = hold(world, user)
        later(world, 12 * 3600 - 0.000001)
        assert world.api.commit(hold(world, user, 1))["allowed"]
        later(world, 0.000001)
        if world.owner.one("select exists (select from tokenlimits.holds)"):
            sweep()
        for cost in (None, 1, 0):
            with refused("TL007", str(usage)):
                world.api.commit(usage, cost)
        assert world.used(user, "day") == 0

    def test_needs_room_where_its_period_lasts_and_nowhere_else(
        self, world: World, user: UUID, sweep: Callable[[], None]
    ) -> None:
        usage = hold(world, user)
        sweep_later = hold(world, user, 1)
        later(world, 12 * 3600)
        sweep()
        world.api.record(user, "image", 7)
        assert world.used(user, "day", "member") == 7
        with refused("TL007", str(usage)):
            world.api.commit(usage)
        assert world.api.commit(usage, 3)["status"] == "committed"
        assert (world.used(user), world.used(user, "day", "member")) == (10, 7)
        with refused("TL007", str(sweep_later)):
            world.api.commit(sweep_later)

    @pytest.mark.parametrize("starts", ["rolling", "first_use"])
    def test_is_committed_though_a_window_has_moved_past_it(
        self, world: World, sweep: Callable[[], None], starts: str
    ) -> None:
        world.at(NOON)
        user = world.user(world.group(limit(10), limit(4, period="hour", starts=starts)))
        usage = hold(world, user)
        later(world, 2 * 3600)
        sweep()
        world.api.track(user, "image", 4)
        assert world.api.commit(usage)["status"] == "committed"
        assert world.used(user) == 8

    def test_is_committed_where_its_own_return_opens_a_window_that_it_overfills(self, world: World) -> None:
        world.at(NOON)
        group = world.group(limit(10))
        user = world.user(group)
        usage = hold(world, user)
        later(world, 60)
        world.owner.tidy()
        world.api.set_limit(group, "image", "hour", "group", 1, starts="first_use")
        assert world.api.commit(usage)["status"] == "committed"
        assert not world.api.track(user, "image")["allowed"]

    def test_is_not_kept_out_by_a_limit_that_only_observes(self, world: World, sweep: Callable[[], None]) -> None:
        world.at(NOON)
        user = world.user(world.group(limit(3, mode="observe"), limit(1, period="hour", mode="observe")))
        usage = hold(world, user)
        later(world, 3600)
        sweep()
        assert world.api.commit(usage)["status"] == "committed"

    def test_commits_late_for_no_more_than_was_reserved(self, world: World, user: UUID) -> None:
        usage = hold(world, user)
        later(world, 60)
        with refused("TL001", "cost"):
            world.api.commit(usage, 5)

    @pytest.mark.parametrize("gone", ["group", "limit", "member"])
    def test_commits_late_when_nothing_limits_it_any_more(
        self, world: World, sweep: Callable[[], None], gone: str
    ) -> None:
        group = world.group(limit(4))
        user = world.user(group)
        world.at(NOON)
        usage = hold(world, user)
        {
            "group": lambda: world.api.delete_group(group),
            "limit": lambda: world.api.remove_limit(group, "image", "lifetime", "group"),
            "member": lambda: world.api.remove_member(group, user),
        }[gone]()
        later(world, 60)
        sweep()
        assert world.api.commit(usage)["status"] == "committed"
        assert ledger(world) == [(4, "committed")]


class TestKeys:
    def test_one_key_reserves_once(self, world: World, user: UUID) -> None:
        first = world.api.reserve(user, "image", 4, 60, "job")
        again = world.api.reserve(user, "image", 4, 3600, "job")
        assert again == first | {"replayed": True}
        assert world.used(user) == 4

    def test_it_answers_the_settled_usage_while_that_lives(self, world: World, user: UUID) -> None:
        usage = hold(world, user, key="job")
        world.api.commit(usage, 1)
        later(world, 3600)
        again = world.api.reserve(user, "image", 4, 60, "job")
        assert (again["usage_id"], again["status"], again["cost"], again["replayed"]) == (usage, "committed", 1, True)

    @pytest.mark.parametrize(("first", "second"), [("track", "reserve"), ("reserve", "track")])
    def test_tracking_and_reserving_are_different_requests(
        self, world: World, user: UUID, first: str, second: str
    ) -> None:
        getattr(world.api, first)(user, "image", 1, idempotency_key="job")
        with refused("TL008"):
            getattr(world.api, second)(user, "image", 1, idempotency_key="job")

    @pytest.mark.parametrize("operation", ["track", "reserve", "record"])
    @pytest.mark.parametrize("death", ["release", "refund", "expiry", "swept"])
    def test_a_key_is_free_again_when_its_usage_is_dead(
        self, world: World, user: UUID, death: str, operation: str
    ) -> None:
        usage = hold(world, user, key="job")
        if death == "refund":
            world.api.commit(usage)
            world.api.refund(usage)
        elif death == "release":
            world.api.release(usage)
        else:
            later(world, 60)
            if death == "swept":
                world.owner.tidy()
        answer = getattr(world.api, operation)(user, "image", 2, idempotency_key="job")
        assert (answer["replayed"], answer["cost"]) == (False, 2)
        assert answer["usage_id"] != usage
        assert world.used(user) == 2

    def test_a_dead_usage_is_never_answered_as_allowed(self, world: World, user: UUID) -> None:
        hold(world, user, key="job")
        later(world, 60)
        world.api.track(user, "image", 10)
        answer = world.api.reserve(user, "image", 4, 60, "job")
        assert (answer["allowed"], answer["usage_id"]) == (False, None)

    def test_a_denial_in_between_does_not_free_the_key(self, world: World, user: UUID) -> None:
        usage = hold(world, user, key="job")
        later(world, 60)
        other = world.api.track(user, "image", 10)["usage_id"]
        assert not world.api.reserve(user, "image", 4, 60, "job")["allowed"]
        world.api.refund(other)
        assert world.api.commit(usage)["status"] == "committed"
        again = world.api.reserve(user, "image", 4, 60, "job")
        assert (again["usage_id"], again["replayed"]) == (usage, True)
        assert world.used(user) == 4

    def test_an_expired_hold_whose_key_was_used_again_commits_beside_it(self, world: World, user: UUID) -> None:
        first = hold(world, user, key="job")
        later(world, 60)
        second = hold(world, user, key="job")
        assert world.api.commit(first)["status"] == "committed"
        assert world.api.reserve(user, "image", 4, 60, "job")["usage_id"] == second
        assert world.used(user) == 8


@pytest.mark.parametrize("how", SETTLEMENTS)
def test_a_clock_that_is_set_back_over_midnight_does_not_go_round_for_ever(world: World, how: str) -> None:
    world.at("2026-11-24 00:00:01Z")
    group = world.group(limit(10))
    user = world.user(group)
    usage = world.api.track(user, "image", 4)["usage_id"] if how == "refund" else hold(world, user)
    world.at("2026-11-23 23:59:59Z")
    # its counter is opened by the settlement
    world.api.set_limit(group, "image", "day", "member", 5)
    world.api.execute("set statement_timeout = '60s'")
    SETTLEMENTS[how](world, usage)
    assert world.api.reconcile(group) == {"counters": [], "rollup": [], "holds": 0}


def test_reconciling_finds_nothing_wrong_with_holds(world: World, user: UUID) -> None:
    group = world.api.user_usage(user)[0]["group"]["id"]
    nothing: dict[str, Any] = {"counters": [], "rollup": [], "holds": 0}
    usages = [hold(world, user, 2) for _ in range(4)]
    assert world.api.reconcile(group) == nothing
    world.api.commit(usages[0], 1)
    world.api.release(usages[1])
    later(world, 60)
    assert world.api.reconcile(group) == nothing
    world.api.commit(usages[2])
    assert world.api.reconcile(group) == nothing
    assert world.used(user) == 3


@pytest.mark.parametrize("how", ["commit", "release", "refund", "late commit", "reserve", "sweep", "key"])
def test_no_call_reads_the_whole_ledger(world: World, user: UUID, how: str) -> None:
    world.owner.execute(
        """
        insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at)
        select gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'image', 1, 'released', now()
        from generate_series(1, 3000)
        """
    )
    world.owner.execute("analyze public.generation_usage")
    usage = hold(world, user, key="job")
    if how == "refund":
        world.api.commit(usage)
    elif how in ("late commit", "sweep", "key"):
        later(world, 60)
    call: Callable[[], Any] = {
        "reserve": lambda: world.api.reserve(user, "image"),
        "sweep": lambda: world.api.track(user, "image"),
        "key": lambda: world.api.track(user, "image", idempotency_key="job"),
        "late commit": lambda: world.api.commit(usage),
    }.get(how, lambda: SETTLEMENTS[how](world, usage))
    read = """
    select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'generation_usage'
    """
    with world.api.connection.transaction():
        assert call()["allowed"]
        assert world.api.one(read) < 50
