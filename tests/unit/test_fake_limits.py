"""The fake: pools, limits that only observe, and what answers and reports say of limits that begin elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tokenlimits import InvalidRequest, Limit
from tokenlimits.testing import FakeTokenLimits

ANN, BOB = "0197f0a0-0000-7000-8000-00000000000a", "0197f0a0-0000-7000-8000-00000000000b"
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CREDITS = Limit(kind="credits", max=20, period="month", counts={"image": 1, "video": 8})


def at_noon(*limits: Limit) -> FakeTokenLimits:
    fake = FakeTokenLimits(limits=limits)
    fake.now = NOON
    return fake


class TestPool:
    def test_takes_a_generation_with_its_weight_or_not_at_all(self) -> None:
        fake = at_noon(CREDITS, Limit(kind="video", max=2))
        video = fake.track(ANN, "video")
        assert [(limit.kind, limit.used, limit.remaining, limit.weight) for limit in video.limits] == [
            ("credits", 8, 1, 8),
            ("video", 1, 1, 1),
        ]
        assert (video.remaining, fake.track(ANN, "image", 5).remaining) == (1, 7)
        denied = fake.track(ANN, "video")
        assert denied.error == (
            "Video generation limit exceeded: 13 of 20 credits used this month, 8 more asked for, "
            "resets 2026-12-01 00:00 UTC"
        )
        assert [(limit.kind, limit.used, limit.remaining, limit.weight) for limit in fake.usage(ANN)] == [
            ("credits", 13, 7, 1),
            ("video", 1, 1, 1),
        ]

    def test_entitles_to_what_it_counts_alone(self) -> None:
        fake = at_noon(CREDITS)
        assert fake.track(ANN, "image").allowed
        assert fake.track(ANN, "credits").reason == "no_limit_for_kind"

    def test_counts_what_was_used_before(self) -> None:
        fake = at_noon(Limit(kind="image", max=None))
        fake.track(ANN, "image", 3)
        fake.groups.set_limit(fake.groups.get_by_name("fake").id, CREDITS)
        assert [limit.used for limit in fake.check(ANN, "image").limits] == [3, 3]

    def test_has_a_name_by_which_it_is_reset(self) -> None:
        fake = at_noon(CREDITS)
        group = fake.groups.get_by_name("fake").id
        fake.track(ANN, "image", 3)
        fake.groups.reset_usage(group, kind="image")
        assert fake.usage(ANN)[0].used == 3
        fake.groups.reset_usage(group, kind="credits")
        assert fake.usage(ANN)[0].used == 0


class TestObserving:
    def test_says_what_it_would_have_denied(self) -> None:
        fake = at_noon(Limit(kind="image", max=1, mode="observe"))
        assert fake.track(ANN, "image").would_deny == ()
        over = fake.track(ANN, "image")
        assert over.allowed
        assert [(limit.used, limit.remaining, limit.mode) for limit in over.would_deny] == [(2, 0, "observe")]
        assert (over.remaining, over.reset_at) == (None, None)
        assert fake.check(ANN, "image").would_deny == over.would_deny
        assert fake.record(ANN, "image").would_deny == ()

    def test_is_in_a_denial_too(self) -> None:
        fake = at_noon(Limit(kind="image", max=0, mode="observe"), Limit(kind="image", max=0, period="day"))
        denied = fake.track(ANN, "image")
        assert denied.denied_by is not None
        assert denied.denied_by.period == "day"
        assert [limit.period for limit in denied.would_deny] == ["lifetime"]

    def test_does_not_refuse_a_late_commit(self) -> None:
        fake = at_noon(Limit(kind="image", max=1, mode="observe"))
        hold = fake.reserve(ANN, "image", ttl=60)
        fake.now += timedelta(minutes=2)
        fake.track(ANN, "image")
        assert hold.usage_id is not None
        assert fake.commit(hold.usage_id).status == "committed"


@pytest.mark.parametrize(
    ("limit", "when", "until"),
    [
        (Limit(kind="image", max=1, period="year"), "this year", ", resets 2027-01-01 00:00 UTC"),
        (
            Limit(kind="image", max=1, period="5 hours", starts="first_use"),
            "since 2026-11-28 12:00",
            ", resets 2026-11-28 17:00 UTC",
        ),
        (
            Limit(kind="image", max=1, period="month", starts="first_use", scope="member"),
            "by this user since 2026-11-28 12:00",
            ", resets 2026-12-28 12:00 UTC",
        ),
        (
            Limit(kind="image", max=1, period="2 days", starts="anchor"),
            "since 2026-11-27 09:30",
            ", resets 2026-11-29 09:30 UTC",
        ),
        (
            Limit(kind="image", max=1, period="hour", starts="rolling"),
            "in the last hour",
            ", room again 2026-11-28 13:01 UTC",
        ),
        (
            Limit(kind="image", max=1, period="3 hours", starts="rolling"),
            "in the last 3 hours",
            ", room again 2026-11-28 15:03 UTC",
        ),
    ],
)
def test_a_denial_says_when(limit: Limit, when: str, until: str) -> None:
    fake = at_noon(limit)
    fake.groups.update(fake.groups.get_by_name("fake").id, anchor_at=datetime(2026, 11, 25, 9, 30, tzinfo=UTC))
    fake.track(ANN, "image")
    error = f"Image generation limit exceeded: 1 of 1 used {when}"
    assert fake.track(ANN, "image").error == error + until
    # what can never fit has no room at any time
    assert fake.track(ANN, "image", 2).error == f"{error}, 2 more asked for"


def test_members_have_their_own_periods() -> None:
    fake = at_noon()
    limit = Limit(kind="image", max=5, period="month", starts="anchor", scope="member")
    group = fake.groups.create("Pro", limits=[limit]).id
    fake.groups.add_member(group, ANN, anchor_at=NOON - 40 * DAY)
    fake.groups.add_member(group, BOB)
    for user in (ANN, BOB):
        fake.track(user, "image", 2)
    assert [fake.usage(user)[0].reset_at for user in (ANN, BOB)] == [
        datetime(2026, 12, 19, 12, tzinfo=UTC),
        datetime(2026, 12, 28, 12, tzinfo=UTC),
    ]
    fake.now = datetime(2026, 12, 20, tzinfo=UTC)
    assert [fake.usage(user)[0].used for user in (ANN, BOB)] == [0, 2]
    [usage] = fake.groups.usage(group).limits
    assert (usage.used, usage.capacity, usage.reset_at) == (2, 10, None)


def test_one_of_several_limits_must_be_named() -> None:
    fake = at_noon(
        Limit(kind="image", max=1, period="day"),
        Limit(kind="image", max=1, period="day", starts="anchor"),
        Limit(kind="image", max=1, scope="member"),
    )
    group = fake.groups.get_by_name("fake").id
    with pytest.raises(InvalidRequest, match="several limits on image: day anchor, day calendar"):
        fake.groups.remove_limit(group, "image")
    fake.groups.remove_limit(group, "image", starts="anchor")
    fake.groups.remove_limit(group, "image", scope="member")
    [left] = fake.groups.remove_limit(group, "video").limits
    assert (left.starts, left.scope) == ("calendar", "group")
