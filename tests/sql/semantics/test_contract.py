"""The contract of the SQL, line by line (DESIGN 3.1 to 3.6 and 3.8 to 3.10), as small examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database
from tests.sql.semantics.world import World, limit

NOVEMBER_23 = "2026-11-23 12:00Z"

Json = dict[str, Any]


@contextmanager
def refused(code: str, detail: str | None = None) -> Iterator[None]:
    with pytest.raises(psycopg.Error) as caught:
        yield
    assert caught.value.sqlstate == code
    if detail is not None:
        assert caught.value.diag.message_detail == detail


class TestAllOrNothing:
    """3.1"""

    def test_an_allowed_call_moves_every_limit_of_its_kind_and_no_other(self, world: World) -> None:
        user = world.user(
            world.group(
                limit(10),
                limit(10, period="day"),
                limit(10, scope="member"),
                limit(10, period="hour", scope="member"),
                limit(10, kind="video"),
            )
        )
        answer = world.api.track(user, "image", 3)
        assert [(x["used"], x["remaining"]) for x in answer["limits"]] == [(3, 7)] * 4
        used = {(x["kind"], x["period"], x["scope"]): x["used"] for x in world.api.user_usage(user)}
        assert used.pop(("video", "lifetime", "group")) == 0
        assert set(used.values()) == {3}

    def test_a_denied_call_leaves_no_usage_and_no_charge(self, world: World) -> None:
        user = world.user(world.group(limit(10), limit(2, period="day"), limit(10, scope="member")))
        answer = world.api.track(user, "image", 3)
        assert (answer["allowed"], answer["usage_id"], answer["status"]) == (False, None, None)
        assert world.recorded() == []
        assert [x["used"] for x in world.api.user_usage(user)] == [0, 0, 0]

    def test_a_transaction_that_fails_later_takes_the_usage_back(self, world: World) -> None:
        user = world.user(world.group(limit(10)))
        with world.api.connection.transaction(force_rollback=True):
            assert world.api.track(user, "image")["allowed"]
        assert world.recorded() == []
        assert world.used(user) == 0

    def test_the_answer_tells_what_was_recorded(self, world: World) -> None:
        group = world.group(limit(10), name="Pro")
        user = world.user(group)
        answer = world.api.track(user, "image", 4)
        assert world.recorded() == [(user, "image", 4, "committed")]
        assert answer["usage_id"] == world.owner.one("select id from public.generation_usage")
        assert answer["group"] == {"id": group, "name": "Pro"}
        assert (answer["kind"], answer["cost"], answer["remaining"]) == ("image", 4, 6)

    def test_metadata_is_kept(self, world: World) -> None:
        user = world.user(world.group(limit(10)))
        world.api.call("track_generation", user_id=user, kind="image", metadata={"model": "large"})
        assert world.owner.one("select metadata from public.generation_usage") == {"model": "large"}

    @pytest.mark.parametrize(
        ("field", "bad"),
        [
            ("kind", ""),
            ("kind", "Image"),
            ("kind", "image\n"),
            ("kind", "a" * 33),
            ("cost", 0),
            ("cost", -1),
            ("cost", 1_000_000_001),
            ("idempotency_key", ""),
            ("idempotency_key", "k" * 256),
            ("metadata", [1]),
            ("metadata", {"long": "x" * 9000}),
        ],
    )
    def test_a_bad_request_is_refused_with_the_name_of_the_field(self, world: World, field: str, bad: Any) -> None:
        user = world.user(world.group(limit(10)))
        with refused("TL001", field):
            world.api.call("track_generation", **{"user_id": user, "kind": "image", field: bad})
        assert world.recorded() == []


class TestExact:
    """3.2"""

    def test_the_last_unit_is_given_and_not_one_more(self, world: World) -> None:
        user = world.user(world.group(limit(3)))
        assert [world.api.track(user, "image")["allowed"] for _ in range(5)] == [True] * 3 + [False] * 2
        assert world.used(user) == 3

    def test_a_smaller_cost_still_fits_where_a_larger_did_not(self, world: World) -> None:
        user = world.user(world.group(limit(10)))
        answers = [world.api.track(user, "image", cost)["allowed"] for cost in (7, 4, 3, 1)]
        assert answers == [True, False, True, False]

    def test_members_share_a_group_limit(self, world: World) -> None:
        group = world.group(limit(3))
        one, two = world.user(group), world.user(group)
        assert world.api.track(one, "image", 2)["remaining"] == 1
        assert not world.api.track(two, "image", 2)["allowed"]
        assert world.api.track(two, "image")["remaining"] == 0

    def test_each_member_has_a_member_limit_of_their_own(self, world: World) -> None:
        group = world.group(limit(2, scope="member"), limit(3))
        one, two = world.user(group), world.user(group)
        assert world.api.track(one, "image", 2)["allowed"]
        assert world.api.track(one, "image")["denied_by"]["scope"] == "member"
        assert world.api.track(two, "image")["allowed"]
        assert world.api.track(two, "image")["denied_by"]["scope"] == "group"

    def test_kinds_are_counted_apart(self, world: World) -> None:
        user = world.user(world.group(limit(1), limit(1, kind="video")))
        assert world.api.track(user, "image")["allowed"]
        assert world.api.track(user, "video")["allowed"]
        assert not world.api.track(user, "image")["allowed"]

    def test_members_with_limits_of_their_own_do_not_wait_for_each_other(
        self, world: World, database: Database
    ) -> None:
        group = world.group(limit(5, scope="member"))
        one, two = world.user(group), world.user(group)
        first, second = _connections_that_begin_at_the_same_slot(database)
        with first.connection.transaction():
            assert first.track(one, "image")["allowed"]
            second.execute("set lock_timeout = '2s'")
            assert second.track(two, "image")["allowed"]

    @pytest.mark.parametrize("level", ["repeatable read", "serializable"])
    @pytest.mark.parametrize("function", ["track_generation", "check_generation", "record_generation"])
    def test_only_read_committed_transactions_are_served(self, world: World, level: str, function: str) -> None:
        user = world.user(world.group(limit(5)))
        with refused("TL009", level), world.api.connection.transaction():
            world.api.execute(f"set transaction isolation level {level}")
            world.api.call(function, user_id=user, kind="image")
        assert world.recorded() == []


def _connections_that_begin_at_the_same_slot(database: Database) -> tuple[Api, Api]:
    """Two that would write the same row of the rollup, if they looked no further."""
    slots: dict[int, psycopg.Connection[Any]] = {}
    while True:
        connection = database.connect()
        slot = connection.info.backend_pid % 16
        if slot in slots:
            return Api(slots[slot]), Api(connection)
        slots[slot] = connection


class TestWhoPays:
    """3.3"""

    def test_the_group_of_the_highest_priority_pays(self, world: World) -> None:
        low, high = world.group(limit(5), priority=1), world.group(limit(5), priority=2)
        assert world.api.track(world.user(low, high), "image")["group"]["id"] == high

    def test_among_equals_the_one_that_the_user_joined_first_pays(self, world: World) -> None:
        one, two = world.group(limit(5)), world.group(limit(5))
        assert world.api.track(world.user(two, one), "image")["group"]["id"] == two

    def test_the_next_group_pays_when_one_has_no_room_for_the_whole_cost(self, world: World) -> None:
        one, two = world.group(limit(3), priority=1), world.group(limit(5))
        user = world.user(one, two)
        paid_by = [world.api.track(user, "image", cost)["group"]["id"] for cost in (2, 2, 1, 3)]
        assert paid_by == [one, two, one, two]
        assert not world.api.track(user, "image")["allowed"]

    def test_a_pinned_group_pays_or_nobody(self, world: World) -> None:
        one, two = world.group(limit(1), priority=1), world.group(limit(5))
        user = world.user(one, two)
        assert world.api.track(user, "image", group_id=two)["group"]["id"] == two
        assert world.api.track(user, "image", group_id=one)["allowed"]
        denied = world.api.track(user, "image", group_id=one)
        assert (denied["reason"], denied["group"]["id"]) == ("limit_exceeded", one)

    def test_a_pinned_group_without_the_user(self, world: World) -> None:
        user, stranger = world.user(world.group(limit(5))), world.group(limit(5))
        assert world.api.track(user, "image", group_id=stranger)["reason"] == "not_in_group"

    def test_a_pinned_group_that_does_not_exist(self, world: World) -> None:
        user, nowhere = world.user(world.group(limit(5))), uuid4()
        with refused("TL002", str(nowhere)):
            world.api.track(user, "image", group_id=nowhere)

    def test_a_user_in_no_group_is_denied(self, world: World) -> None:
        answer = world.api.track(world.user(), "image")
        assert (answer["allowed"], answer["reason"], answer["group"]) == (False, "not_in_group", None)
        assert answer["error"] == "The user is in no group that may pay for this"
        assert (answer["limits"], answer["remaining"], answer["reset_at"]) == ([], None, None)

    def test_a_group_without_a_limit_for_the_kind_is_skipped(self, world: World) -> None:
        one, two = world.group(limit(5, kind="video"), priority=1), world.group(limit(5))
        assert world.api.track(world.user(one, two), "image")["group"]["id"] == two

    def test_a_kind_without_any_limit_is_denied(self, world: World) -> None:
        answer = world.api.track(world.user(world.group(limit(5))), "gpu_second")
        assert (answer["allowed"], answer["reason"]) == (False, "no_limit_for_kind")
        assert answer["error"] == (
            "None of the user's groups has a limit for gpu second generations, so none is allowed"
        )

    def test_a_denial_names_the_limit_of_the_group_that_has_room_first(self, world: World) -> None:
        world.at(NOVEMBER_23)
        month = world.group(limit(0, period="lifetime"), limit(1, period="month"), priority=3)
        day = world.group(limit(1, period="day"), limit(1, period="hour", scope="member"), priority=2)
        week = world.group(limit(1, period="week"), priority=1)
        user = world.user(month, day, week)
        for _ in range(2):
            assert world.api.track(user, "image")["allowed"]
        denied = world.api.track(user, "image")
        assert denied["group"]["id"] == day
        assert (denied["denied_by"]["period"], denied["denied_by"]["scope"]) == ("day", "group")
        assert denied["reset_at"] == datetime(2026, 11, 24, tzinfo=UTC)
        assert denied["retry_after"] == 12 * 3600

    def test_a_cost_above_the_max_never_has_room(self, world: World) -> None:
        world.at(NOVEMBER_23)
        user = world.user(world.group(limit(5, period="day")), world.group(limit(9, period="month")))
        assert world.api.track(user, "image", 8)["allowed"]
        denied = world.api.track(user, "image", 8)
        assert denied["denied_by"]["period"] == "month"
        never = world.api.track(user, "image", 10)
        assert (never["reset_at"], never["retry_after"]) == (None, None)

    def test_checking_answers_like_tracking_and_records_nothing(self, world: World) -> None:
        user = world.user(world.group(limit(1)))
        assert world.api.check(user, "image")["remaining"] == 1
        assert world.api.check(user, "image")["usage_id"] is None
        assert world.api.track(user, "image")["allowed"]
        assert world.api.check(user, "image")["reason"] == "limit_exceeded"
        assert len(world.recorded()) == 1

    @pytest.mark.parametrize(
        ("limits", "costs", "text"),
        [
            (
                [limit(100, period="month")],
                (100, 1),
                "Image generation limit exceeded: 100 of 100 used this month, resets 2026-12-01 00:00 UTC",
            ),
            (
                [limit(5, period="day", scope="member")],
                (4, 2),
                "Image generation limit exceeded: 4 of 5 used by this user today, 2 more asked for, "
                "resets 2026-11-24 00:00 UTC",
            ),
            ([limit(1)], (1, 1), "Image generation limit exceeded: 1 of 1 used in total"),
            ([limit(0, period="hour")], (1,), "Image generation limit exceeded: 0 of 0 used this hour"),
            (
                [limit(1, period="week")],
                (1, 1),
                "Image generation limit exceeded: 1 of 1 used this week, resets 2026-11-30 00:00 UTC",
            ),
        ],
    )
    def test_what_a_denial_says(self, world: World, limits: list[Json], costs: tuple[int, ...], text: str) -> None:
        world.at(NOVEMBER_23)
        user = world.user(world.group(*limits))
        answers = [world.api.track(user, "image", cost) for cost in costs]
        assert answers[-1]["error"] == text

    def test_a_denial_tells_the_time_in_the_groups_zone(self, world: World) -> None:
        world.at(NOVEMBER_23)
        user = world.user(world.group(limit(0), limit(1, kind="video", period="day"), timezone="Asia/Kathmandu"))
        world.api.track(user, "video")
        assert world.api.track(user, "video")["error"].endswith("resets 2026-11-24 00:00 Asia/Kathmandu")


class TestSafeToRetry:
    """3.4"""

    def test_a_repeated_call_answers_the_first_ones_usage_and_charges_nothing(self, world: World) -> None:
        user = world.user(world.group(limit(5)))
        first, again = (world.api.track(user, "image", 2, "job") for _ in range(2))
        assert (first["replayed"], again["replayed"]) == (False, True)
        assert again["usage_id"] == first["usage_id"]
        assert (again["allowed"], again["status"], again["cost"]) == (True, "committed", 2)
        assert world.used(user) == 2

    def test_also_when_the_limit_is_full_by_now(self, world: World) -> None:
        user = world.user(world.group(limit(2)))
        first = world.api.track(user, "image", 2, "job")
        assert not world.api.track(user, "image", 1, "another")["allowed"]
        assert world.api.track(user, "image", 2, "job")["usage_id"] == first["usage_id"]

    def test_also_when_the_user_has_left(self, world: World) -> None:
        group = world.group(limit(5))
        user = world.user(group)
        first = world.api.track(user, "image", 1, "job")
        world.api.remove_member(group, user)
        assert world.api.track(user, "image", 1, "job")["usage_id"] == first["usage_id"]

    def test_also_when_the_pinned_group_is_gone(self, world: World) -> None:
        group = world.group(limit(5))
        user = world.user(group)
        first = world.api.track(user, "image", 1, "job", group)
        world.api.delete_group(group)
        again = world.api.track(user, "image", 1, "job", group)
        assert (again["usage_id"], again["replayed"]) == (first["usage_id"], True)
        assert again["group"] == {"id": group, "name": None}

    def test_also_in_a_later_period(self, world: World) -> None:
        world.at(NOVEMBER_23)
        user = world.user(world.group(limit(1, period="day")))
        world.api.track(user, "image", 1, "job")
        world.at("2026-11-24 12:00Z")
        again = world.api.track(user, "image", 1, "job")
        assert (again["replayed"], again["limits"][0]["used"]) == (True, 0)

    @pytest.mark.parametrize("other", [{"kind": "video"}, {"cost": 2}, {"group_id": True}])
    def test_a_key_for_another_request_is_a_conflict(self, world: World, other: Json) -> None:
        group = world.group(limit(5), limit(5, kind="video"))
        user = world.user(group)
        world.api.track(user, "image", 1, "job")
        request: Json = {"kind": "image", "cost": 1} | other
        if "group_id" in other:
            request["group_id"] = group
        with refused("TL008"):
            world.api.track(user, idempotency_key="job", **request)
        assert len(world.recorded()) == 1

    def test_a_key_of_another_operation_is_a_conflict(self, world: World) -> None:
        user = world.user(world.group(limit(5)))
        world.api.track(user, "image", 1, "job")
        with refused("TL008"):
            world.api.record(user, "image", 1, idempotency_key="job")

    def test_a_conflict_is_told_also_when_there_is_no_room(self, world: World) -> None:
        user = world.user(world.group(limit(1)))
        world.api.track(user, "image", 1, "job")
        with refused("TL008"):
            world.api.track(user, "image", 2, "job")

    def test_keys_belong_to_a_user(self, world: World) -> None:
        group = world.group(limit(5))
        one, two = world.user(group), world.user(group)
        answers = [world.api.track(user, "image", 1, "job") for user in (one, two)]
        assert [x["replayed"] for x in answers] == [False, False]

    def test_a_denial_is_not_remembered(self, world: World) -> None:
        group = world.group(limit(0))
        user = world.user(group)
        assert not world.api.track(user, "image", 1, "job")["allowed"]
        world.api.set_limit(group, "image", "lifetime", "group", 1)
        answer = world.api.track(user, "image", 1, "job")
        assert (answer["allowed"], answer["replayed"]) == (True, False)

    def test_without_a_key_every_call_counts(self, world: World) -> None:
        user = world.user(world.group(limit(5)))
        assert [world.api.track(user, "image")["remaining"] for _ in range(2)] == [4, 3]


class TestPeriods:
    """3.5"""

    @pytest.mark.parametrize(
        ("period", "zone", "last_moment", "reset_at"),
        [
            ("minute", "UTC", "2026-11-23 12:00:59.999999Z", "2026-11-23 12:01Z"),
            ("hour", "UTC", "2026-11-23 12:59:59.999999Z", "2026-11-23 13:00Z"),
            ("hour", "Asia/Kathmandu", "2026-11-23 12:14:59.999999Z", "2026-11-23 12:15Z"),
            ("day", "UTC", "2026-11-23 23:59:59.999999Z", "2026-11-24 00:00Z"),
            ("day", "Europe/Paris", "2026-11-23 22:59:59.999999Z", "2026-11-23 23:00Z"),
            ("week", "UTC", "2026-11-29 23:59:59.999999Z", "2026-11-30 00:00Z"),
            ("month", "UTC", "2026-11-30 23:59:59.999999Z", "2026-12-01 00:00Z"),
            ("day", "America/Havana", "2026-11-01 03:59:59.999999Z", "2026-11-01 04:00Z"),
            ("day", "America/Havana", "2026-11-02 04:59:59.999999Z", "2026-11-02 05:00Z"),
            ("day", "Atlantic/Azores", "2026-10-26 00:59:59.999999Z", "2026-10-26 01:00Z"),
        ],
    )
    def test_a_period_ends_by_itself_at_its_last_moment(
        self, world: World, period: str, zone: str, last_moment: str, reset_at: str
    ) -> None:
        world.at(last_moment)
        user = world.user(world.group(limit(1, period=period), timezone=zone))
        first = world.api.track(user, "image")
        assert (first["allowed"], first["reset_at"]) == (True, datetime.fromisoformat(reset_at))
        assert not world.api.track(user, "image")["allowed"]
        world.at(reset_at)
        assert world.used(user, period) == 0
        assert world.api.track(user, "image")["allowed"]
        assert not world.api.track(user, "image")["allowed"]

    def test_where_midnight_happens_twice_the_day_begins_once(self, world: World) -> None:
        user = world.user(world.group(limit(1, period="day"), timezone="America/Havana"))
        world.at("2026-11-01 04:30Z")  # 00:30
        assert world.api.track(user, "image")["allowed"]
        world.at("2026-11-01 05:30Z")  # 00:30 again
        assert not world.api.track(user, "image")["allowed"]

    def test_a_lifetime_never_ends(self, world: World) -> None:
        user = world.user(world.group(limit(1)))
        world.at(NOVEMBER_23)
        assert world.api.track(user, "image")["reset_at"] is None
        world.at("2036-11-23 12:00Z")
        assert not world.api.track(user, "image")["allowed"]

    def test_a_clock_that_was_set_back_loses_nothing(self, world: World) -> None:
        user = world.user(world.group(limit(2, period="day")))
        world.at("2026-11-24 00:00Z")
        world.api.track(user, "image")
        world.at("2026-11-23 23:59Z")
        assert world.api.track(user, "image")["remaining"] == 0
        assert not world.api.track(user, "image")["allowed"]
        world.at("2026-11-24 00:01Z")
        assert not world.api.track(user, "image")["allowed"]

    def test_after_a_clock_was_set_back_all_counters_agree_on_the_moment(self, world: World) -> None:
        world.at("2026-11-23 12:59:10Z")
        group = world.group(limit(9, period="hour"), limit(2, period="minute", scope="member"))
        one, two = world.user(group), world.user(group)
        world.api.track(one, "image")
        world.at("2026-11-23 13:00Z")
        world.api.track(two, "image")
        world.at("2026-11-23 12:59:30Z")
        assert world.api.track(one, "image")["allowed"]
        world.at("2026-11-23 13:00:10Z")
        assert (world.used(one, "minute", "member"), world.used(one, "hour")) == (1, 2)

    @pytest.mark.parametrize("shift", [timedelta(hours=-1), timedelta(hours=1)])
    def test_new_rules_of_a_time_zone_stop_nobody(self, world: World, shift: timedelta) -> None:
        """As after an update of the server's time zones: the counter's period is not one of the new calendar's."""
        world.at(NOVEMBER_23)
        user = world.user(world.group(limit(3, period="day")))
        world.api.track(user, "image")
        world.owner.execute("update tokenlimits.counters set since = since + %s, until = until + %s", [shift] * 2)
        world.at("2026-11-24 00:30Z")
        world.api.execute("set statement_timeout = '60s'")
        assert world.api.track(user, "image")["allowed"]
        world.at("2026-11-24 12:00Z")
        assert world.api.track(user, "image")["allowed"]


class TestEditing:
    """3.6"""

    def test_lowering_a_limit_denies_until_there_is_room_again(self, world: World) -> None:
        world.at(NOVEMBER_23)
        group = world.group(limit(10, period="day"))
        user = world.user(group)
        world.api.track(user, "image", 8)
        world.api.set_limit(group, "image", "day", "group", 5)
        denied = world.api.track(user, "image")
        assert (denied["denied_by"]["used"], denied["denied_by"]["remaining"]) == (8, 0)
        world.at("2026-11-24 12:00Z")
        assert world.api.track(user, "image", 5)["allowed"]

    def test_raising_a_limit_gives_room_at_once(self, world: World) -> None:
        group = world.group(limit(1))
        user = world.user(group)
        world.api.track(user, "image")
        world.api.set_limit(group, "image", "lifetime", "group", 3)
        assert world.api.track(user, "image", 2)["remaining"] == 0

    @pytest.mark.parametrize("scope", ["group", "member"])
    @pytest.mark.parametrize("period", ["minute", "hour", "day", "week", "month", "lifetime"])
    def test_a_limit_added_later_counts_what_was_used_in_its_period(
        self, world: World, period: str, scope: str
    ) -> None:
        world.at(NOVEMBER_23)
        group = world.group(limit(None, period="lifetime"))
        user, other = world.user(group), world.user(group)
        for past in (timedelta(0), timedelta(days=400)):
            world.api.record(user, "image", 2, datetime.fromisoformat(NOVEMBER_23) - past)
        world.api.record(other, "image", 1)
        world.api.set_limit(group, "image", period, scope, 100)
        expected = (2 if scope == "member" else 3) + (2 if period == "lifetime" else 0)
        assert world.used(user, period, scope) == expected
        assert world.api.track(user, "image")["allowed"]
        assert world.used(user, period, scope) == expected + 1

    def test_another_period_is_another_limit(self, world: World) -> None:
        world.at(NOVEMBER_23)
        group = world.group(limit(10, period="hour"))
        user = world.user(group)
        world.api.track(user, "image", 4)
        world.at("2026-11-23 13:00Z")
        world.owner.execute("update public.group_limits set period = 'day' where group_id = %s", [group])
        assert world.used(user, "day") == 4

    def test_another_time_zone_counts_afresh(self, world: World) -> None:
        world.at("2026-11-23 11:00Z")
        group = world.group(limit(10, period="day"))
        user = world.user(group)
        world.api.track(user, "image", 4)
        world.at("2026-11-23 13:00Z")
        world.api.track(user, "image", 1)
        world.api.save_group(group, timezone="Pacific/Auckland")  # where it is 02:00 of the next day
        assert world.used(user, "day") == 5
        world.api.save_group(group, timezone="Asia/Kathmandu")
        assert world.used(user, "day") == 5
        world.api.save_group(group, timezone="Pacific/Noumea")  # midnight was at 13:00 UTC
        assert world.used(user, "day") == 1

    def test_a_removed_limit_binds_no_more(self, world: World) -> None:
        group = world.group(limit(0, period="day"), limit(5))
        user = world.user(group)
        assert not world.api.track(user, "image")["allowed"]
        world.api.remove_limit(group, "image", "day", "group")
        assert world.api.track(user, "image")["allowed"]

    def test_an_unlimited_limit_entitles_and_counts(self, world: World) -> None:
        group = world.group(limit(None, period="month"))
        user = world.user(group)
        answer = world.api.track(user, "image", 1_000_000_000)
        assert (answer["allowed"], answer["remaining"], answer["reset_at"]) == (True, None, None)
        assert (answer["limits"][0]["used"], answer["limits"][0]["remaining"]) == (1_000_000_000, None)
        [shown] = world.api.group_usage(group)["limits"]
        assert (shown["remaining"], shown["capacity"], shown["fraction"]) == (None, None, None)

    def test_of_an_unlimited_and_a_limited_one_the_limited_one_tells(self, world: World) -> None:
        user = world.user(world.group(limit(None), limit(3, period="day"), limit(None, period="month")))
        assert world.api.track(user, "image")["remaining"] == 2

    def test_a_blocked_limit_denies_everything(self, world: World) -> None:
        group = world.group(limit(0))
        answer = world.api.track(world.user(group), "image")
        assert (answer["reason"], answer["remaining"], answer["reset_at"]) == ("limit_exceeded", 0, None)
        assert world.api.group_usage(group)["limits"][0]["fraction"] == 1

    def test_the_highest_limit_of_each_of_many_members_is_shown(self, world: World) -> None:
        group = world.group(limit(10**15, scope="member"))
        world.owner.execute("insert into auth.users (id) select gen_random_uuid() from generate_series(1, 10000)")
        world.owner.execute(
            "insert into public.group_memberships (group_id, user_id) select %s, u.id from auth.users as u", [group]
        )
        usage = world.api.group_usage(group)
        assert usage["limits"][0]["capacity"] == usage["member_count"] * 10**15 > 2**63

    @pytest.mark.parametrize("scope", ["group", "member"])
    @pytest.mark.parametrize("period", ["minute", "day", "month"])
    def test_a_new_limit_counts_nothing_of_a_later_period(self, world: World, period: str, scope: str) -> None:
        world.at("2026-12-01 00:00:30Z")
        group = world.group(limit(None))
        user = world.user(group)
        world.api.track(user, "image", 4)
        world.at("2026-11-30 23:59:30Z")  # the server's clock was set back
        world.api.track(user, "image", 2)
        world.api.set_limit(group, "image", period, scope, 5)
        assert world.used(user, period, scope) == 2
        assert {x["period"]: x["used"] for x in world.api.group_usage(group)["limits"]}[period] == 2
        assert world.api.track(user, "image", 3)["allowed"]

    def test_replacing_the_limits_keeps_what_is_used_of_those_that_stay(self, world: World) -> None:
        group = world.group(limit(10), limit(10, period="day"))
        user = world.user(group)
        world.api.track(user, "image", 4)
        world.api.save_group(group, limits=[limit(20), limit(20, period="month")])
        assert {x["period"]: x["used"] for x in world.api.user_usage(user)} == {"lifetime": 4, "month": 4}

    def test_a_reset_is_a_fresh_start_and_the_ledger_keeps_everything(self, world: World) -> None:
        group = world.group(limit(5), limit(5, scope="member"), limit(5, kind="video"))
        user = world.user(group)
        for kind in ("image", "video"):
            world.api.track(user, kind, 5)
        world.api.reset(group, "image")
        assert world.api.track(user, "image", 5)["allowed"]
        assert not world.api.track(user, "video")["allowed"]
        world.api.reset(group)
        assert world.api.track(user, "video", 5)["allowed"]
        assert [row[2] for row in world.recorded()] == [5, 5, 5, 5]

    def test_counters_of_limits_that_are_gone_do_not_pile_up(self, world: World) -> None:
        group = world.group(limit(None), limit(None, scope="member"))
        user = world.user(group)
        for _ in range(5):
            world.api.track(user, "image")
            world.api.reset(group)
        world.api.track(user, "image")
        assert world.owner.one("select count(*) from tokenlimits.counters") == 2

    def test_a_limit_added_after_a_reset_counts_from_the_reset(self, world: World) -> None:
        group = world.group(limit(None))
        user = world.user(group)
        world.api.track(user, "image", 5)
        world.api.reset(group)
        world.api.track(user, "image", 2)
        world.api.set_limit(group, "image", "month", "group", 10)
        world.api.set_limit(group, "image", "month", "member", 10)
        assert world.used(user, "month") == world.used(user, "month", "member") == 2


class TestRecording:
    """Past or outside usage is never denied."""

    def test_it_moves_the_counters_past_their_max(self, world: World) -> None:
        user = world.user(world.group(limit(3)))
        answer = world.api.record(user, "image", 5)
        assert (answer["allowed"], answer["remaining"], answer["limits"][0]["used"]) == (True, 0, 5)
        assert not world.api.track(user, "image")["allowed"]

    def test_it_belongs_to_the_period_in_which_it_happened(self, world: World) -> None:
        now = world.at(NOVEMBER_23)
        user = world.user(world.group(limit(9, period="day"), limit(9, period="month")))
        world.api.record(user, "image", 2, now - timedelta(days=1))
        assert (world.used(user, "day"), world.used(user, "month")) == (0, 2)

    def test_the_future_is_refused(self, world: World) -> None:
        now = world.at(NOVEMBER_23)
        user = world.user(world.group(limit(9)))
        with refused("TL001", "created_at"):
            world.api.record(user, "image", 1, now + timedelta(seconds=61))

    def test_a_clock_a_little_ahead_is_forgiven(self, world: World) -> None:
        now = world.at(NOVEMBER_23)
        user = world.user(world.group(limit(9)))
        world.api.record(user, "image", 1, now + timedelta(seconds=59))
        assert world.owner.one("select created_at from public.generation_usage") == now

    def test_it_is_booked_on_a_group_that_has_a_limit_for_the_kind(self, world: World) -> None:
        video, image = world.group(limit(9, kind="video"), priority=1), world.group(limit(9))
        user = world.user(video, image)
        assert world.api.record(user, "image")["group"]["id"] == image
        assert world.api.record(user, "gpu_second")["group"]["id"] == video

    def test_any_group_may_be_named(self, world: World) -> None:
        group = world.group(limit(9))
        assert world.api.record(world.user(), "image", group_id=group)["group"]["id"] == group

    def test_without_a_group_one_must_be_named(self, world: World) -> None:
        with refused("TL001", "group_id"):
            world.api.record(world.user(), "image")

    def test_a_repeated_call_is_answered_also_when_the_user_has_left(self, world: World) -> None:
        group = world.group(limit(9))
        user = world.user(group)
        first = world.api.record(user, "image", idempotency_key="job")
        world.api.remove_member(group, user)
        again = world.api.record(user, "image", idempotency_key="job")
        assert (again["usage_id"], again["replayed"]) == (first["usage_id"], True)


class TestWhatIsRecordedStays:
    """3.8"""

    def test_deleting_a_group_keeps_its_ledger(self, world: World) -> None:
        group = world.group(limit(9))
        user = world.user(group)
        world.api.track(user, "image")
        world.api.delete_group(group)
        assert world.recorded() == [(user, "image", 1, "committed")]
        assert world.api.track(user, "image")["reason"] == "not_in_group"

    def test_deleting_a_user_keeps_their_ledger_and_what_the_group_used(self, world: World) -> None:
        group = world.group(limit(3))
        leaver, stayer = world.user(group), world.user(group)
        world.api.track(leaver, "image", 2)
        world.owner.delete_user(leaver)
        assert world.recorded() == [(leaver, "image", 2, "committed")]
        assert world.used(stayer) == 2

    def test_a_member_who_returns_finds_their_usage_of_the_period(self, world: World) -> None:
        group = world.group(limit(3, scope="member"))
        user = world.user(group)
        world.api.track(user, "image", 2)
        world.api.remove_member(group, user)
        assert world.api.track(user, "image")["reason"] == "not_in_group"
        world.api.add_member(group, user)
        assert world.api.track(user, "image")["remaining"] == 0

    @pytest.mark.parametrize("name", ["Pro", "pro", " PRO "])
    def test_a_groups_name_is_unique_whatever_its_case(self, world: World, name: str) -> None:
        world.group(name="Pro")
        with refused("TL003"):
            world.group(name=name)
        with refused("TL003"):
            world.api.save_group(world.group(name="Another"), name=name)

    def test_a_group_may_change_the_case_of_its_own_name(self, world: World) -> None:
        group = world.group(name="Pro")
        assert world.api.save_group(group, name="PRO")["name"] == "PRO"

    @pytest.mark.parametrize(
        "bad",
        [
            {"timezone": "Europe/Atlantis"},
            {"timezone": "Foo/Bar5"},
            {"timezone": "CET"},  # to PostgreSQL an abbreviation, without daylight saving
            {"name": ""},
            {"limits": [limit(5, period="day"), limit(-1)]},
            {"limits": [limit(5), limit(6)]},
            {"limits": [limit(5, period="decade")]},
        ],
    )
    def test_a_save_that_is_refused_leaves_nothing_half_made(self, world: World, bad: Json) -> None:
        group = world.group(limit(9), name="Pro", is_default=True)
        before = world.api.group(group)
        with refused("TL001"):
            world.api.save_group(group, **{"name": "Changed", "is_default": False, "limits": []} | bad)
        with refused("TL001"):
            world.api.save_group(**{"name": "New", "is_default": True, "limits": [limit(1)]} | bad)
        assert world.api.group(group) == before
        assert world.owner.one("select count(*) from public.user_groups") == 1

    def test_saving_again_changes_only_what_is_given(self, world: World) -> None:
        group = world.group(limit(9), name="Pro", description="old", priority=3, timezone="Europe/Paris")
        saved = world.api.save_group(group, description="new")
        assert (saved["name"], saved["description"], saved["priority"]) == ("Pro", "new", 3)
        assert (saved["timezone"], saved["limits"]) == (
            "Europe/Paris",
            [limit(9, starts="calendar", mode="enforce", counts=None)],
        )

    def test_adding_members_tells_who_was_added_already_there_or_unknown(self, world: World) -> None:
        group = world.group(limit(9))
        there, new, unknown = world.user(group), world.user(), uuid4()
        answer = world.api.call("add_group_members", group_id=group, user_ids=(there, new, unknown, new))
        assert (answer["added"], answer["already"]) == (1, 1)
        assert [UUID(x) for x in answer["unknown"]] == [unknown]

    def test_members_that_are_searched_for_come_page_by_page(self, world: World) -> None:
        group, other = world.group(), world.group()
        named = sorted(world.user(group) for _ in range(5))
        world.user(group)  # without an address
        elsewhere = world.user(other)
        world.owner.execute(
            "update auth.users set email = 'Ann' || id || '@example.com' where id = any(%s)", [[*named, elsewhere]]
        )

        def page(after: UUID | None, search: str) -> list[UUID]:
            found = world.api.call("group_members", group_id=group, after=after, page_size=2, search=search)
            return [UUID(str(member["user_id"])) for member in found]

        assert page(None, " aNN") == named[:2]
        assert page(named[1], "ann") == named[2:4]
        assert page(named[3], "ann") == named[4:]
        assert page(named[4], "ann") == page(None, "bob") == page(None, "ann%") == []
        assert len(world.api.call("group_members", group_id=group, search=" ")) == 6

    def test_moving_a_member_is_one_step(self, world: World) -> None:
        one, two = world.group(limit(9)), world.group(limit(9))
        user = world.user(one)
        assert world.api.move_member(user, one, two)
        assert world.api.track(user, "image")["group"]["id"] == two
        assert not world.api.move_member(user, one, two)

    def test_history_keeps_what_was_used(self, world: World) -> None:
        world.at(NOVEMBER_23)
        group = world.group(limit(9), timezone="Asia/Kathmandu")
        user = world.user(group)
        for instant, cost in (("2026-11-22 18:00Z", 1), ("2026-11-22 18:15Z", 2), ("2026-11-23 12:00Z", 3)):
            world.api.record(user, "image", cost, datetime.fromisoformat(instant))
        assert world.api.history(group, "day") == [
            {"bucket": datetime(2026, 11, 21, 18, 15, tzinfo=UTC), "kind": "image", "used": 1, "generations": 1},
            {"bucket": datetime(2026, 11, 22, 18, 15, tzinfo=UTC), "kind": "image", "used": 5, "generations": 2},
        ]


class TestFlat:
    """3.9"""

    @pytest.fixture
    def reader(self, database: Database) -> Api:
        """A connection whose plans are always those for large tables."""
        reader = Api(database.connect("postgres"))
        reader.execute("set enable_seqscan = off")
        reader.execute("set plan_cache_mode = force_generic_plan")
        return reader

    def test_a_call_reads_nothing_of_history(self, owner: Api, world: World, reader: Api) -> None:
        every = [limit(10**9, period=p, scope=s) for p in ("hour", "month", "lifetime") for s in ("group", "member")]
        new, old = world.group(*every), world.group()
        beginner, veteran = world.user(new), world.user(old)
        _make_history(owner, old, veteran, 20_000)
        world.api.save_group(old, limits=every)
        assert world.used(veteran) > 20_000
        owner.execute("analyze")
        for call in (reader.track, reader.check):
            few, many = (
                _rows_read(reader, lambda user=user, call=call: call(user, "image")) for user in (beginner, veteran)
            )
            assert _grown(few, many) == {}
            assert many["generation_usage"] == 0

    def test_a_call_reads_nothing_of_a_large_group(self, owner: Api, world: World, reader: Api) -> None:
        limits = [limit(10**9), limit(10**9, period="day", scope="member")]
        small, large = world.group(*limits), world.group(*limits)
        alone, crowded = world.user(small), world.user(large)
        owner.execute(
            """
            with many as (
              insert into auth.users (id) select gen_random_uuid() from generate_series(1, 3000) returning id
            )
            insert into public.group_memberships (group_id, user_id) select %s, id from many
            """,
            [large],
        )
        owner.execute("analyze")
        few, many = (_rows_read(reader, lambda user=user: reader.track(user, "image")) for user in (alone, crowded))
        assert _grown(few, many) == {}

    def test_a_search_of_members_reads_nothing_of_other_users(self, owner: Api, world: World, reader: Api) -> None:
        group = world.group()
        owner.execute("insert into auth.users (id) select gen_random_uuid() from generate_series(1, 12000)")
        owner.execute(
            "insert into public.group_memberships (group_id, user_id)"
            " select %s, id from auth.users order by id limit 2000",
            [group],
        )
        owner.execute("analyze")
        query = "select idx_tup_fetch + seq_tup_read from pg_stat_xact_user_tables where relid = 'auth.users'::regclass"
        with reader.connection.transaction():
            before = reader.one(query)
            assert reader.call("group_members", group_id=group, page_size=50, search="nobody") == []
            assert reader.one(query) - before == 2000

    def test_a_page_reads_nothing_of_the_pages_before(self, owner: Api, world: World, reader: Api) -> None:
        crowded = world.group()
        owner.execute("insert into public.user_groups (name) select 'page ' || i from generate_series(1000, 4999) as i")
        owner.execute(
            """
            with many as (
              insert into auth.users (id) select gen_random_uuid() from generate_series(1, 4000) returning id
            )
            insert into public.group_memberships (group_id, user_id) select %s, id from many
            """,
            [crowded],
        )
        owner.execute("analyze")
        middle = owner.one("select user_id from public.group_memberships order by user_id offset 2000 limit 1")
        for function, arguments in (
            ("find_groups", {"after": "page 3000"}),
            ("group_usage", {"after": "page 3000"}),
            ("group_members", {"group_id": crowded, "after": middle}),
        ):

            def ask(function: str = function, arguments: dict[str, Any] = arguments) -> Any:
                return reader.call(function, **arguments, page_size=10)

            # a plan that is kept comes only after five that knew the arguments
            for _ in range(6):
                assert len(ask()) == 10
            assert {table: rows for table, rows in _rows_read(reader, ask).items() if rows > 50} == {}, function

    def test_a_new_period_reads_nothing_of_history(self, owner: Api, world: World, reader: Api) -> None:
        world.at(NOVEMBER_23)
        group = world.group(limit(10**9, period="day"), limit(10**9, period="day", scope="member"))
        user = world.user(group)
        owner.track(user, "image")
        _make_history(owner, group, user, 2_000, until="2026-11-22 12:00Z")
        world.at("2026-11-24 12:00Z")
        with reader.connection.transaction():
            before = _rows_read_so_far(reader)
            assert reader.track(user, "image")["limits"][0]["used"] == 1
            assert _rows_read_so_far(reader)["generation_usage"] == before["generation_usage"]

    # the last, for what is known of holds from then on changes plans
    def test_a_call_reads_nothing_of_holds_that_live(self, owner: Api, world: World, database: Database) -> None:
        # as planned everywhere: that expects to find an expired one soon, if it reads the whole table
        caller = Api(database.connect("postgres"))
        caller.execute("set plan_cache_mode = force_generic_plan")
        group = world.group(limit(10**9), limit(10**9, scope="member"))
        user = world.user(group)
        owner.execute(
            """
            insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
            select gen_random_uuid(), %s, %s, gen_random_uuid(), 'image', 1, now(), '2100-01-01 00:00Z'
            from generate_series(1, 5000)
            """,
            [group, group],
        )
        owner.execute("analyze")
        for call in (caller.track, caller.check):
            assert _rows_read(caller, lambda call=call: call(user, "image"))["holds"] == 0
        assert _rows_read(caller, lambda: caller.user_usage(user))["holds"] == 0
        owner.execute("truncate tokenlimits.holds")  # no ledger has them


def _grown(few: dict[str, int], many: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Tell where more rows were read: thousands, if they were read at all, not the few that a merge join meets."""
    return {table: (few[table], many[table]) for table in few if many[table] > few[table] + 20}


def _rows_read(reader: Api, call: Callable[[], Any]) -> dict[str, int]:
    """Count the rows that a call reads, by table; a first one opens counters and makes plans."""
    call()
    with reader.connection.transaction(force_rollback=True):
        before = _rows_read_so_far(reader)
        call()
        after = _rows_read_so_far(reader)
    return {table: after[table] - before[table] for table in after}


def _rows_read_so_far(owner: Api) -> dict[str, int]:
    rows = owner.connection.execute(
        """
        select relname, seq_tup_read + coalesce(idx_tup_fetch, 0)
        from pg_stat_xact_user_tables
        where schemaname in ('public', 'tokenlimits') and relname <> 'test_clock'
        """
    )
    return dict(rows.fetchall())


def _make_history(owner: Api, group: UUID, user: UUID, rows: int, until: str = "now") -> None:
    """Write a long past, one generation a minute, to ledger and rollup."""
    owner.execute(
        """
        with made as (
          insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at, settled_at)
          select gen_random_uuid(), %s, %s, 'image', 1, 'committed', at, at
          from generate_series(%s::timestamptz - interval '1 minute' * %s, %s::timestamptz, '1 minute') as at
          returning *
        )
        insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
        select
          group_id, kind, date_bin('15 minutes', created_at, '2000-01-01 00:00:00+00') as bucket, 0, sum(cost), count(*)
        from made
        group by 1, 2, 3
        """,
        [group, user, until, rows, until],
    )


class TestNewcomers:
    """3.10"""

    def test_a_user_in_no_group_is_judged_by_the_default_group(self, world: World) -> None:
        group = world.group(limit(1), is_default=True)
        user = world.user()
        assert world.api.user_usage(user)[0]["group"]["id"] == group
        assert world.api.check(user, "image")["allowed"]
        assert world.recorded() == []
        assert world.api.track(user, "image")["group"]["id"] == group
        assert not world.api.track(user, "image")["allowed"]
        assert world.owner.one("select count(*) from public.group_memberships") == 0

    def test_newcomers_share_its_pool_and_have_member_limits_of_their_own(self, world: World) -> None:
        world.group(limit(3), limit(2, scope="member"), is_default=True)
        one, two = world.user(), world.user()
        assert world.api.track(one, "image", 2)["allowed"]
        assert world.api.track(one, "image")["denied_by"]["scope"] == "member"
        assert world.api.track(two, "image", 2)["denied_by"]["scope"] == "group"

    def test_a_user_in_any_group_is_not_judged_by_it(self, world: World) -> None:
        world.group(limit(9), is_default=True)
        user = world.user(world.group(limit(9, kind="video")))
        assert world.api.track(user, "image")["reason"] == "no_limit_for_kind"

    def test_it_may_be_pinned(self, world: World) -> None:
        group = world.group(limit(9), is_default=True)
        assert world.api.track(world.user(), "image", group_id=group)["allowed"]

    def test_there_is_one_default_group_and_it_moves(self, world: World) -> None:
        first, second = world.group(limit(9), is_default=True), world.group(limit(9))
        world.api.save_group(second, is_default=True)
        assert [world.api.group(x)["is_default"] for x in (first, second)] == [False, True]
        assert world.api.track(world.user(), "image")["group"]["id"] == second
        with refused("23505"):
            world.owner.execute("update public.user_groups set is_default = true where id = %s", [first])
