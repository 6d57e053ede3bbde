"""Calendar periods: PostgreSQL's arithmetic against the model's."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.sql.semantics.api import Api
from tests.sql.semantics.database import Database

from tokenlimits.testing._periods import period_of

CALENDAR = ["minute", "hour", "day", "week", "month"]

ZONES = [
    "UTC",
    "Europe/Paris",
    "America/New_York",
    "Atlantic/Azores",  # midnight happens twice
    "America/Havana",  # twice in autumn, and not at all in spring
    "Africa/Cairo",  # no midnight in spring
    "Asia/Beirut",  # no midnight in spring, and 23 o'clock twice in autumn
    "Australia/Lord_Howe",  # half an hour
    "America/Nuuk",  # the day before
    "Asia/Kathmandu",  # UTC+5:45
    "Pacific/Chatham",  # UTC+12:45, and in summer 13:45
    "Pacific/Apia",  # UTC+13, and +14 until 2021
]

MICROSECOND = timedelta(microseconds=1)

Range = tuple[datetime, datetime]


@pytest.fixture(scope="module")
def periods(shared_database: Database, time_zones: None) -> Api:
    return Api(shared_database.owner)


def of_sql(api: Api, period: str, zone: str, instants: Iterable[datetime]) -> list[Range]:
    """Ask the SQL about many instants at once."""
    rows = api.connection.execute(
        """
        select lower(p.period), upper(p.period)
        from unnest(%s::timestamptz[]) with ordinality as t (at, place)
        cross join lateral tokenlimits.period_of(%s, %s, t.at) as p (period)
        order by t.place
        """,
        [list(instants), period, zone],
    ).fetchall()
    return [(since.astimezone(UTC), until.astimezone(UTC)) for since, until in rows]


def changes(name: str, first_year: int, last_year: int) -> list[datetime]:
    """Find the instants at which the zone's clocks are changed."""
    zone = ZoneInfo(name)
    found = []
    day = datetime(first_year, 1, 1, tzinfo=UTC)
    while day.year <= last_year:
        before, after = day, day + timedelta(days=1)
        offset = before.astimezone(zone).utcoffset()
        if after.astimezone(zone).utcoffset() != offset:
            while after - before > timedelta(minutes=1):
                middle = before + (after - before) // timedelta(minutes=2) * timedelta(minutes=1)
                if middle.astimezone(zone).utcoffset() == offset:
                    before = middle
                else:
                    after = middle
            found.append(after)
        day += timedelta(days=1)
    return found


def around(instant: datetime) -> list[datetime]:
    """List instants from a day before to a day after, closer together where something happens."""
    half_hours = [instant + timedelta(minutes=30) * n for n in range(-53, 54)]
    return [at + nudge for at in half_hours for nudge in (-MICROSECOND, timedelta(0), timedelta(minutes=1))]


def assert_agrees(api: Api, name: str, instants: list[datetime]) -> None:
    for period in CALENDAR:
        expected = [period_of(period, name, at) for at in instants]
        actual = of_sql(api, period, name, instants)
        wrong = [(period, name, at, e, a) for at, e, a in zip(instants, expected, actual, strict=True) if e != a]
        assert wrong == []


@pytest.mark.parametrize("name", ZONES)
def test_days_on_which_clocks_change(periods: Api, name: str) -> None:
    for change in changes(name, 2020, 2027):
        assert_agrees(periods, name, around(change))


@pytest.mark.parametrize("name", ZONES)
def test_ends_of_months_weeks_and_years(periods: Api, name: str) -> None:
    for year in (2023, 2024, 2025, 2026, 2027, 2028):
        for day in (date(year, 1, 1), date(year, 2, 28), date(year, 3, 1), date(year, 12, 31)):
            assert_agrees(periods, name, around(datetime(day.year, day.month, day.day, tzinfo=UTC)))


def test_both_sides_know_the_same_changes_of_clocks(periods: Api) -> None:
    for name in ZONES:
        for change in changes(name, 2015, 2037):
            for at in (change - MICROSECOND, change):
                shown = periods.one("select %s::timestamptz at time zone %s", [at, name])
                assert shown == at.astimezone(ZoneInfo(name)).replace(tzinfo=None)


def test_no_day_begins_before_another_ends(periods: Api) -> None:
    """What the definitions rest on: no zone's calendar goes back to the day before, in years that matter."""
    for name in ZONES:
        zone = ZoneInfo(name)
        for change in changes(name, 2015, 2037):
            before = (change - MICROSECOND).astimezone(zone).date()
            assert change.astimezone(zone).date() >= before


EXAMPLES = [
    # period, zone, instant, since, until
    ("day", "Europe/Paris", "2026-03-29 12:00Z", "2026-03-28 23:00Z", "2026-03-29 22:00Z"),
    ("day", "Europe/Paris", "2026-10-25 12:00Z", "2026-10-24 22:00Z", "2026-10-25 23:00Z"),
    ("hour", "Europe/Paris", "2026-10-25 00:30Z", "2026-10-25 00:00Z", "2026-10-25 01:00Z"),
    ("hour", "Europe/Paris", "2026-10-25 01:30Z", "2026-10-25 01:00Z", "2026-10-25 02:00Z"),
    ("day", "America/Havana", "2026-11-01 04:30Z", "2026-11-01 04:00Z", "2026-11-02 05:00Z"),
    ("day", "America/Havana", "2026-11-01 05:30Z", "2026-11-01 04:00Z", "2026-11-02 05:00Z"),
    ("month", "America/Havana", "2026-11-01 04:30Z", "2026-11-01 04:00Z", "2026-12-01 05:00Z"),
    ("month", "America/Havana", "2026-11-01 03:59Z", "2026-10-01 04:00Z", "2026-11-01 04:00Z"),
    ("day", "America/Havana", "2026-03-08 05:00Z", "2026-03-08 05:00Z", "2026-03-09 04:00Z"),
    ("day", "Atlantic/Azores", "2026-10-25 00:30Z", "2026-10-25 00:00Z", "2026-10-26 01:00Z"),
    ("day", "Africa/Cairo", "2026-04-24 12:00Z", "2026-04-23 22:00Z", "2026-04-24 21:00Z"),
    ("hour", "Australia/Lord_Howe", "2026-04-05 13:15Z", "2026-04-05 13:00Z", "2026-04-05 13:30Z"),
    ("hour", "Asia/Kathmandu", "2026-01-01 12:00Z", "2026-01-01 11:15Z", "2026-01-01 12:15Z"),
    ("day", "Pacific/Chatham", "2026-01-01 10:14Z", "2025-12-31 10:15Z", "2026-01-01 10:15Z"),
    ("week", "UTC", "2027-01-01 12:00Z", "2026-12-28 00:00Z", "2027-01-04 00:00Z"),
    ("month", "UTC", "2028-02-29 12:00Z", "2028-02-01 00:00Z", "2028-03-01 00:00Z"),
    ("minute", "Asia/Kathmandu", "2026-01-01 12:00:59.9Z", "2026-01-01 12:00Z", "2026-01-01 12:01Z"),
]


@pytest.mark.parametrize(("period", "name", "at", "since", "until"), EXAMPLES)
def test_examples(periods: Api, period: str, name: str, at: str, since: str, until: str) -> None:
    instant = datetime.fromisoformat(at)
    expected = (datetime.fromisoformat(since), datetime.fromisoformat(until))
    assert of_sql(periods, period, name, [instant]) == [expected]
    assert period_of(period, name, instant) == expected


def test_a_lifetime_has_neither_beginning_nor_end(periods: Api) -> None:
    unbounded = periods.one("select tokenlimits.period_of('lifetime', 'UTC', now())::text")
    assert unbounded == "[-infinity,infinity)"


@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_periods_follow_each_other_everywhere_and_always(
    periods: Api, all_zones: list[str], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(all_zones))
    at = datetime(2015, 1, 1, tzinfo=UTC) + data.draw(st.timedeltas(timedelta(0), timedelta(days=23 * 365)))
    for period in CALENDAR:
        [(since, until)] = of_sql(periods, period, name, [at])
        before, after = of_sql(periods, period, name, [since - MICROSECOND, until])
        assert since <= at < until
        assert before[1] == since
        assert after[0] == until
        assert (since, until) == period_of(period, name, at)


@pytest.fixture(scope="module")
def all_zones(periods: Api) -> list[str]:
    """All that a group may have."""
    return periods.one(
        """
        select array_agg(name order by name)
        from pg_timezone_names
        where name not like 'posix/%' and name not like 'right/%'
          and name not in ('localtime', 'posixrules', 'CET', 'EET', 'MET', 'WET')
        """
    )


def test_rollup_buckets_fit_into_every_hour(periods: Api, all_zones: list[str]) -> None:
    """History is added up in quarters of an hour, so all hours must begin on one."""
    quarter = timedelta(minutes=15)
    off = []
    for name in all_zones:
        for at in (datetime(2026, 1, 15, 12, tzinfo=UTC), datetime(2026, 7, 15, 12, tzinfo=UTC)):
            offset: Any = at.astimezone(ZoneInfo(name)).utcoffset()
            if offset % quarter:
                off.append((name, offset))
    assert off == []
