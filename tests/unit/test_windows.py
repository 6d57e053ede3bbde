"""Windows that don't begin with the calendar's periods, against what is promised of them, found by trying."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenlimits import Limit
from tokenlimits.testing import FakeTokenLimits
from tokenlimits.testing._windows import anchored, end_of, leaves_at, rolling

ANN = "0197f0a0-0000-7000-8000-00000000000a"
MICROSECOND, MINUTE, HOUR, DAY = (
    timedelta(microseconds=1),
    timedelta(minutes=1),
    timedelta(hours=1),
    timedelta(days=1),
)
LENGTHS = {"minute": MINUTE, "90 minutes": 90 * MINUTE, "hour": HOUR, "5 hours": 5 * HOUR, "day": DAY, "week": 7 * DAY}
DAYS = {"day": 1, "2 days": 2, "week": 7, "2 weeks": 14, "30 days": 30}
MONTHS = {"month": 1, "2 months": 2, "24 months": 24, "year": 12}
# Chatham is at a quarter of an hour, Lord Howe changes by half an hour, Havana and the Azores change at midnight
ZONES = ["UTC", "Europe/Paris", "America/Havana", "Atlantic/Azores", "Australia/Lord_Howe", "Pacific/Chatham"]

zones = st.sampled_from(ZONES)
moments = st.integers(0, 6 * 366 * 86_400 * 10**6).map(lambda n: datetime(2023, 1, 1, tzinfo=UTC) + n * MICROSECOND)
# the days on which something happens to the calendar
odd_days = st.sampled_from(
    [
        *["2024-02-29T00Z", "2026-01-31T00Z", "2026-12-31T12Z", "2026-03-29T00Z", "2026-10-25T00Z", "2026-03-08T04Z"],
        *["2026-11-01T03Z", "2026-10-03T14Z", "2026-04-04T14Z"],
    ]
).map(datetime.fromisoformat)
odd_moments = st.tuples(odd_days, st.integers(0, 24 * 60)).map(lambda drawn: drawn[0] + drawn[1] * MINUTE)
anchors = moments | odd_moments


def clock(at: datetime, zone: str) -> datetime:
    """Read what a zone's clocks show."""
    return at.astimezone(ZoneInfo(zone)).replace(tzinfo=None)


def shown_first(local: datetime, zone: str) -> datetime | None:
    """Find the first moment at which a zone's clocks show a time, if they ever do: no offset is a part of a minute."""
    candidates = (local.replace(tzinfo=UTC) + n * MINUTE for n in range(-15 * 60, 15 * 60, 15))
    return next((at for at in candidates if clock(at, zone) == local), None)


def later(local: datetime, months: int) -> datetime:
    """Go on month by month."""
    year, month = local.year, local.month
    for _ in range(abs(months)):
        month += 1 if months > 0 else -1
        year, month = (year + 1, 1) if month > 12 else (year - 1, 12) if month < 1 else (year, month)
    return local.replace(year=year, month=month, day=min(local.day, monthrange(year, month)[1]))


class TestAnchored:
    @given(st.sampled_from(["minute", "90 minutes", "hour", "5 hours"]), zones, anchors, anchors)
    def test_minutes_and_hours_are_whole_multiples(
        self, period: str, zone: str, anchor: datetime, at: datetime
    ) -> None:
        since, until = anchored(period, zone, anchor, at)
        assert since <= at < until == since + LENGTHS[period]
        assert (since - anchor) % LENGTHS[period] == timedelta(0)

    @given(st.sampled_from([*DAYS, *MONTHS]), zones, anchors, st.integers(-40, 40))
    def test_a_period_begins_where_the_local_calendar_says(
        self, period: str, zone: str, anchor: datetime, place: int
    ) -> None:
        local = clock(anchor, zone)
        if period in DAYS:
            first, following = (local + DAY * DAYS[period] * n for n in (place, place + 1))
        else:
            first, following = (later(local, MONTHS[period] * n) for n in (place, place + 1))
        begin, end = shown_first(first, zone), shown_first(following, zone)
        assume(begin is not None and end is not None)
        assert begin is not None
        assert end is not None
        for at in (begin, begin + (end - begin) / 2, end - MICROSECOND):
            assert anchored(period, zone, anchor, at) == (begin, end)

    @given(st.sampled_from([*DAYS, *MONTHS]), zones, anchors, anchors)
    def test_periods_follow_each_other(self, period: str, zone: str, anchor: datetime, at: datetime) -> None:
        since, until = anchored(period, zone, anchor, at)
        assert since <= at < until
        assert anchored(period, zone, anchor, until)[0] == until
        assert anchored(period, zone, anchor, since - MICROSECOND)[1] == since

    def test_a_month_is_counted_from_the_original_day(self) -> None:
        anchor = datetime(2024, 1, 31, 12, tzinfo=UTC)
        begins = [anchored("month", "UTC", anchor, datetime(2024, month, 15, tzinfo=UTC))[1] for month in range(1, 6)]
        assert [f"{at:%m-%d}" for at in begins] == ["01-31", "02-29", "03-31", "04-30", "05-31"]
        leap = datetime(2024, 2, 29, tzinfo=UTC)
        begins = [anchored("year", "UTC", leap, datetime(year, 1, 1, tzinfo=UTC))[1] for year in range(2023, 2029)]
        assert [f"{at:%y-%m-%d}" for at in begins] == [
            "23-02-28", "24-02-29", "25-02-28", "26-02-28", "27-02-28", "28-02-29",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("zone", "anchor", "at", "since"),
        [
            # 2:30 is skipped: as long after the gap as it is after its beginning
            ("Europe/Paris", "2026-03-01T02:30+01:00", "2026-03-29T12:00+02:00", "2026-03-29T03:30+02:00"),
            # 2:30 happens twice: the first
            ("Europe/Paris", "2026-10-01T02:30+02:00", "2026-10-25T12:00+01:00", "2026-10-25T02:30+02:00"),
            # the anchor is the second 2:30; the day itself begins at the first
            ("Europe/Paris", "2026-10-25T02:30+01:00", "2026-10-25T02:15+01:00", "2026-10-25T02:30+02:00"),
            # midnight is skipped
            ("America/Havana", "2026-03-01T00:00-05:00", "2026-03-08T12:00-04:00", "2026-03-08T01:00-04:00"),
        ],
    )
    def test_clocks_change(self, zone: str, anchor: str, at: str, since: str) -> None:
        period = anchored("day", zone, datetime.fromisoformat(anchor), datetime.fromisoformat(at))
        assert period[0] == datetime.fromisoformat(since)

    @pytest.mark.parametrize("period", ["day", "month", "year"])
    def test_an_anchor_at_the_second_of_two_equal_times_is_one_at_the_first(self, period: str) -> None:
        first, second = (datetime.fromisoformat(f"2026-10-25T02:30+0{hours}:00") for hours in (2, 1))
        assert anchored(period, "Europe/Paris", second, first)[0] == first


class TestFirstUse:
    @given(st.sampled_from([*LENGTHS]), zones, anchors)
    def test_a_window_has_its_length(self, period: str, zone: str, since: datetime) -> None:
        assert end_of(period, zone, since) == since + LENGTHS[period]

    @given(st.sampled_from(["month", "year"]), zones, anchors)
    def test_months_and_years_are_of_the_local_calendar(self, period: str, zone: str, since: datetime) -> None:
        end = shown_first(later(clock(since, zone), MONTHS[period]), zone)
        assume(end is not None)
        assert end_of(period, zone, since) == end

    @given(st.lists(st.tuples(st.integers(0, 90), st.sampled_from(["track", "check", "refund"])), max_size=20))
    def test_the_first_use_opens_it(self, steps: list[tuple[int, str]]) -> None:
        fake = FakeTokenLimits(limits=[Limit(kind="image", max=2, period="hour", starts="first_use")])
        opened: datetime | None = None
        costs: list[str] = []
        for minutes, step in steps:
            fake.now += minutes * MINUTE
            if opened is not None and fake.now >= opened + HOUR:
                opened, costs = None, []
            if step == "refund" and costs:
                fake.refund(costs.pop())
            elif step == "track":
                result = fake.track(ANN, "image")
                assert result.allowed == (len(costs) < 2)
                if result.allowed:
                    opened = opened or fake.now
                    costs.append(str(result.usage_id))
            [limit] = fake.usage(ANN)
            assert (limit.used, limit.reset_at) == (len(costs), opened and opened + HOUR)


class TestRolling:
    @given(st.sampled_from([*LENGTHS]), moments, st.floats(0, 2, allow_nan=False))
    def test_usage_counts_for_its_length_and_at_most_a_sixtieth_longer(
        self, period: str, created_at: datetime, lengths: float
    ) -> None:
        length = LENGTHS[period]
        at = created_at + length * lengths
        counts = created_at >= rolling(period, at)[0]
        assert counts or at > created_at + length
        assert not counts or at < created_at + length + length / 60 + MICROSECOND
        assert counts == (at < leaves_at(period, created_at))

    @given(
        st.sampled_from([*LENGTHS]),
        st.lists(st.tuples(st.floats(0, 0.7), st.integers(1, 3)), min_size=1, max_size=40),
        st.integers(1, 5),
    )
    def test_never_more_than_max_and_room_when_it_was_said(
        self, period: str, steps: list[tuple[float, int]], most: int
    ) -> None:
        length = LENGTHS[period]
        fake = FakeTokenLimits(limits=[Limit(kind="image", max=most, period=period, starts="rolling")])
        admitted: list[tuple[datetime, int]] = []

        def used(since: datetime, until: datetime) -> int:
            return sum(cost for at, cost in admitted if since < at <= until)

        for lengths, cost in steps:
            fake.now += length * lengths
            now = fake.now
            result = fake.track(ANN, "image", cost)
            if result:
                admitted.append((now, cost))
                assert used(now - length, now) <= most
            elif cost > most:
                assert result.reset_at is None
            else:
                # what counts may be a sixtieth older
                assert used(now - length * 61 / 60 - MICROSECOND, now) + cost > most
                assert result.reset_at is not None
                fake.now = result.reset_at - MICROSECOND
                assert not fake.check(ANN, "image", cost)
                fake.now = result.reset_at
                assert fake.check(ANN, "image", cost)
