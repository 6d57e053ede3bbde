"""The fake: limits in flight, overrides of a limit's max, and resets of one member."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from tokenlimits import Limit, TokenLimitsError
from tokenlimits.errors import UnknownUser
from tokenlimits.testing import FakeTokenLimits

ANN, BOB = "0197f0a0-0000-7000-8000-00000000000a", "0197f0a0-0000-7000-8000-00000000000b"
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def fake_of(*limits: Limit) -> tuple[FakeTokenLimits, UUID]:
    fake = FakeTokenLimits(users={ANN: "ann@example.com", BOB: "bob@example.com"})
    fake.now = NOON
    group = fake.groups.create("Pro", limits=limits, is_default=True).id
    fake.groups.add_members(group, [ANN, BOB])
    return fake, group


def at(hour: int, minute: int = 0) -> datetime:
    return NOON.replace(hour=hour, minute=minute)


TWO_VIDEOS = Limit(kind="video", max=2, period="in_flight", scope="member")


class TestInFlight:
    def test_counts_holds_whatever_they_cost(self) -> None:
        fake, group = fake_of(TWO_VIDEOS, Limit(kind="video", max=100))
        first = fake.reserve(ANN, "video", cost=8, ttl=3600)
        assert [(limit.period, limit.used, limit.remaining, limit.reset_at) for limit in first.limits] == [
            ("in_flight", 1, 1, None),
            ("lifetime", 8, 92, None),
        ]
        assert (first.remaining, first.reset_at) == (92, None)
        fake.reserve(ANN, "video", cost=8, ttl=600)
        denied = fake.reserve(ANN, "video")
        assert denied.error == (
            "Video generation limit exceeded: 2 videos in progress by this user, at most 2 at once, "
            "next place 2026-11-28 12:10 UTC"
        )
        assert denied.denied_by is not None
        assert denied.denied_by.reset_at == denied.reset_at == at(12, 10)
        assert (denied.retry_after, denied.remaining) == (600, 84)
        assert fake.reserve(BOB, "video").allowed
        [usage, _] = fake.groups.usage(group).limits
        assert (usage.used, usage.capacity, usage.reset_at) == (3, 4, None)
        assert [limit.used for limit in fake.usage(ANN)] == [2, 17]

    def test_a_place_is_free_once_a_hold_is_settled_or_expires(self) -> None:
        fake, _ = fake_of(TWO_VIDEOS, Limit(kind="video", max=100))
        committed, released = (fake.reserve(ANN, "video", ttl=600).usage_id for _ in range(2))
        assert committed is not None
        assert released is not None
        assert fake.commit(committed).limits[0].used == 1
        assert fake.release(released).limits[0].used == 0
        fake.reserve(ANN, "video", ttl=60)
        extended = fake.reserve(ANN, "video", ttl=60).usage_id
        assert extended is not None
        assert fake.extend(extended, ttl=1200).limits[0].used == 2
        fake.now += timedelta(seconds=60)
        assert fake.usage(ANN)[0].used == 1
        fake.reserve(ANN, "video", ttl=1200)
        assert fake.reserve(ANN, "video").reset_at == at(12, 20)

    def test_a_late_commit_needs_no_place(self) -> None:
        fake, _ = fake_of(Limit(kind="video", max=1, period="in_flight"), Limit(kind="video", max=100))
        late = fake.reserve(ANN, "video", ttl=60).usage_id
        assert late is not None
        fake.now += timedelta(minutes=2)
        fake.reserve(BOB, "video")
        assert [(limit.period, limit.used) for limit in fake.commit(late).limits] == [
            ("in_flight", 1),
            ("lifetime", 2),
        ]

    def test_what_is_no_hold_is_neither_counted_nor_stopped_nor_entitled(self) -> None:
        fake, _ = fake_of(Limit(kind="video", max=0, period="in_flight"))
        for answer in (fake.track(ANN, "video"), fake.check(ANN, "video")):
            assert (answer.reason, answer.limits) == ("no_limit_for_kind", ())
        assert fake.track_many([{"user_id": ANN, "kind": "video"}])[0].reason == "no_limit_for_kind"
        assert fake.record(ANN, "video").limits == ()
        denied = fake.reserve(ANN, "video")
        assert denied.error == "Video generation limit exceeded: 0 videos in progress, at most 0 at once"
        assert (denied.reset_at, denied.retry_after) == (None, None)

    def test_a_hold_alone_may_be_entitled_by_it(self) -> None:
        fake, _ = fake_of(Limit(kind="gpu_second", max=1, period="in_flight"))
        assert fake.reserve(ANN, "gpu_second").remaining is None
        assert str(fake.reserve(ANN, "gpu_second").error).startswith(
            "Gpu second generation limit exceeded: 1 gpu second in progress, at most 1 at once, next place "
        )

    def test_several_must_end_where_the_limit_was_lowered(self) -> None:
        fake, group = fake_of(Limit(kind="video", max=3, period="in_flight"))
        for minutes in (30, 10, 20):
            fake.reserve(ANN, "video", ttl=60 * minutes)
        fake.groups.set_limit(group, Limit(kind="video", max=2, period="in_flight"))
        assert fake.reserve(ANN, "video").reset_at == at(12, 20)

    def test_observing(self) -> None:
        fake, _ = fake_of(Limit(kind="video", max=0, period="in_flight", mode="observe"))
        held = fake.reserve(ANN, "video")
        assert held.allowed
        assert [(limit.period, limit.used) for limit in held.would_deny] == [("in_flight", 1)]

    def test_no_reset_takes_a_hold_away(self) -> None:
        fake, group = fake_of(TWO_VIDEOS)
        fake.reserve(ANN, "video")
        fake.groups.reset_usage(group)
        fake.groups.reset_usage(group, user_id=ANN)
        assert fake.usage(ANN)[0].used == 1

    def test_the_group_that_has_a_place_first_denies(self) -> None:
        fake, _ = fake_of(Limit(kind="video", max=1, period="in_flight"))
        other = fake.groups.create("Other", limits=[Limit(kind="video", max=1, period="in_flight")], priority=-1).id
        fake.groups.add_member(other, ANN)
        fake.reserve(ANN, "video", ttl=1200)
        fake.reserve(ANN, "video", ttl=600)
        denied = fake.reserve(ANN, "video")
        assert denied.group is not None
        assert (denied.group.name, denied.reset_at) == ("Other", at(12, 10))


FIVE_A_DAY = Limit(kind="image", max=5, period="day", scope="member")


class TestOverrides:
    def test_one_member_may_use_more_until_a_moment(self) -> None:
        fake, group = fake_of(FIVE_A_DAY)
        override = fake.groups.set_override(group, "image", 8, user_id=ANN, until=at(18))
        assert (override.email, override.scope, override.created_at) == ("ann@example.com", "member", NOON)
        fake.track(ANN, "image", 5)
        assert [fake.check(user, "image").limits[0].max for user in (ANN, BOB)] == [8, 5]
        [usage] = fake.groups.usage(group).limits
        assert (usage.max, usage.used, usage.capacity) == (5, 5, 13)
        assert fake.track(ANN, "image", 3).allowed
        assert fake.track(ANN, "image").reset_at == at(0) + DAY
        # nothing of that size fits into the limit's own max
        assert fake.track(ANN, "image", 6).reset_at is None
        fake.now = at(18)
        assert (fake.usage(ANN)[0].max, fake.usage(ANN)[0].remaining) == (5, 0)
        assert [each.status for each in fake.groups.overrides(group)] == ["ended"]

    def test_room_may_return_when_an_override_ends(self) -> None:
        fake, group = fake_of(FIVE_A_DAY)
        fake.groups.set_override(group, "image", 0, user_id=ANN, until=at(18))
        denied = fake.track(ANN, "image")
        assert (denied.reset_at, denied.retry_after) == (at(18), 6 * 3600)
        assert denied.error == (
            "Image generation limit exceeded: 0 of 0 used by this user today, resets 2026-11-28 18:00 UTC"
        )
        fake.groups.set_override(group, "image", 0, user_id=ANN)
        assert fake.track(ANN, "image").reset_at is None
        fake.groups.set_override(group, "image", 0, user_id=ANN, until=at(18) + DAY)
        assert fake.track(ANN, "image").reset_at == at(18) + DAY
        assert fake.groups.remove_override(group, "image", user_id=ANN)
        assert fake.track(ANN, "image").allowed

    def test_a_place_may_return_when_an_override_ends(self) -> None:
        fake, group = fake_of(TWO_VIDEOS)
        fake.groups.set_override(group, "video", 1, user_id=ANN, until=at(12, 5))
        fake.reserve(ANN, "video", ttl=600)
        assert fake.reserve(ANN, "video").reset_at == at(12, 5)
        fake.groups.set_override(group, "video", 1, user_id=ANN, until=at(12, 15))
        assert fake.reserve(ANN, "video").reset_at == at(12, 10)

    def test_of_the_group(self) -> None:
        fake, group = fake_of(Limit(kind="image", max=None))
        fake.groups.set_override(group, "image", 2)
        fake.track(ANN, "image")
        [usage] = fake.groups.usage(group).limits
        assert (usage.max, usage.capacity, usage.fraction) == (2, 2, 0.5)

    def test_a_member_may_be_unlimited(self) -> None:
        fake, group = fake_of(FIVE_A_DAY)
        fake.groups.set_override(group, "image", None, user_id=BOB)
        assert fake.track(BOB, "image", 50).remaining is None
        [usage] = fake.groups.usage(group).limits
        assert (usage.max, usage.capacity, usage.remaining, usage.fraction) == (5, None, None, None)
        assert fake.groups.limit_pressure(group)[0].near == 0

    def test_pressure_is_of_what_each_may_use(self) -> None:
        fake, group = fake_of(Limit(kind="image", max=None, scope="member"))
        fake.groups.set_override(group, "image", 2, user_id=ANN)
        assert fake.groups.limit_pressure(group) == []
        for user in (ANN, BOB):
            fake.track(user, "image", 2)
        [pressure] = fake.groups.limit_pressure(group)
        assert (pressure.max, pressure.full, pressure.near) == (None, 1, 1)

    def test_it_sleeps_while_there_is_no_such_limit(self) -> None:
        fake, group = fake_of(FIVE_A_DAY)
        made = fake.groups.set_override(group, "image", 8, user_id=ANN)
        fake.groups.set_limits(group, [])
        assert [each.status for each in fake.groups.overrides(group)] == ["sleeping"]
        fake.groups.set_limits(group, [FIVE_A_DAY.model_copy(update={"max": 3})])
        assert fake.check(ANN, "image").limits[0].max == 8
        again = fake.groups.set_override(group, "image", 9, user_id=ANN)
        assert (again.id, again.max) == (made.id, 9)
        fake.groups.set_limits(group, [])
        assert fake.groups.remove_override(group, "image", user_id=ANN)
        assert not fake.groups.remove_override(group, "image", user_id=ANN)

    def test_which_there_are(self) -> None:
        fake, group = fake_of(FIVE_A_DAY, Limit(kind="image", max=50))
        fake.groups.set_override(group, "image", 1)
        for user in (ANN, BOB):
            fake.groups.set_override(group, "image", 2, user_id=user)
        every = list(fake.groups.overrides(group))
        assert [each.id for each in every] == sorted(each.id for each in every)
        assert {each.user_id for each in every} == {None, UUID(ANN), UUID(BOB)}
        assert [str(each.user_id) for each in fake.groups.overrides(group, user_id=BOB)] == [BOB]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"kind": "video"}, "kind: there is no such group limit on video .*For a member limit, name the user"),
            ({"user_id": ANN, "period": "week"}, "kind: there is no such member limit on image"),
            ({"user_id": ANN}, "period: member has several limits on image: day calendar, month calendar"),
            ({"until": NOON}, "until: must be in the future"),
            ({"user_id": "0197f0a0-0000-7000-8000-00000000000c"}, "there is no user"),
        ],
    )
    def test_refuses(self, arguments: dict[str, Any], says: str) -> None:
        month = Limit(kind="image", max=50, period="month", scope="member")
        fake, group = fake_of(FIVE_A_DAY, month, Limit(kind="image", max=50))
        with pytest.raises(TokenLimitsError, match=says):
            fake.groups.set_override(group, max=1, **{"kind": "image"} | arguments)
        assert list(fake.groups.overrides(group)) == []


class TestResetOfAMember:
    def test_leaves_the_others_and_the_group(self) -> None:
        fake, group = fake_of(FIVE_A_DAY, Limit(kind="image", max=50, period="day"))
        for user in (ANN, BOB):
            fake.track(user, "image", 5)
        assert fake.groups.reset_usage(group, user_id=ANN) == NOON + timedelta(microseconds=1)
        assert fake.track(ANN, "image", 2).allowed
        assert [[limit.used for limit in fake.usage(user)] for user in (ANN, BOB)] == [[2, 12], [5, 12]]
        assert [limit.used for limit in fake.groups.usage(group).limits] == [7, 12]

    def test_of_one_kind(self) -> None:
        fake, group = fake_of(FIVE_A_DAY)
        fake.track(ANN, "image", 5)
        fake.groups.reset_usage(group, kind="video", user_id=ANN)
        assert fake.usage(ANN)[0].used == 5
        fake.groups.reset_usage(group, kind="image", user_id=ANN)
        assert fake.usage(ANN)[0].used == 0

    def test_ends_the_windows_that_a_first_use_has_opened(self) -> None:
        limit = Limit(kind="image", max=5, period="5 hours", starts="first_use", scope="member")
        fake, group = fake_of(limit)
        for user in (ANN, BOB):
            fake.track(user, "image")
        fake.now = at(13)
        fake.groups.reset_usage(group, user_id=ANN)
        assert [fake.usage(user)[0].reset_at for user in (ANN, BOB)] == [None, at(17)]
        assert fake.track(ANN, "image").reset_at == at(18)

    def test_of_nobody(self) -> None:
        fake, group = fake_of(FIVE_A_DAY)
        with pytest.raises(UnknownUser, match="there is no user"):
            fake.groups.reset_usage(group, user_id="0197f0a0-0000-7000-8000-00000000000c")
