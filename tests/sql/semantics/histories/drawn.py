"""What histories are made of."""

from __future__ import annotations

from datetime import timedelta
from typing import get_args
from uuid import UUID

from hypothesis import strategies as st
from tests.sql.semantics.api import Json

from tokenlimits.models import SinglePeriod

# in flight is no period that passes: it begins nowhere else
PERIODS = [period for period in get_args(SinglePeriod) if period != "in_flight"]
SEVERAL = ["90 minutes", "5 hours", "30 days"]
# where the periods of a limit may begin, by how long they are
STARTS = [
    *[("in_flight", "calendar")] * 3,
    *[(period, "calendar") for period in PERIODS],
    *[(period, "anchor") for period in [*PERIODS[:-1], *SEVERAL, "2 weeks", "2 months"]],
    *[(period, "first_use") for period in [*PERIODS[:-1], *SEVERAL]],
    *[(period, "rolling") for period in [*PERIODS[:4], *SEVERAL]],
]
USERS = [str(UUID(int=number)) for number in range(1, 5)]
NOBODY = str(UUID(int=99))

# which group is beneath which at the beginning, by their places
TREES = [(None, None, None), (None, 0, 1), (None, 0, 0), (None, None, 1), (None, 0, 1, 2, 3)]

# moments around which something happens to the calendar
BEGINNINGS = [
    "2026-03-08 06:50:00+00:00",  # New York skips an hour, Havana skips midnight an hour before
    "2026-03-29 00:50:00+00:00",  # Paris and the Azores skip an hour
    "2026-04-04 14:50:00+00:00",  # Lord Howe goes back half an hour
    "2026-10-24 23:50:00+00:00",  # soon midnight happens twice in the Azores
    "2026-11-01 03:50:00+00:00",  # and in Havana
    "2026-12-31 22:10:00+00:00",  # a year ends in the middle of a week
    "2028-02-28 23:59:00+00:00",  # a leap day follows
]
ZONES = [
    "UTC",
    "Europe/Paris",
    "America/New_York",
    "America/Havana",
    "Atlantic/Azores",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
]

SOON = [timedelta(microseconds=1), timedelta(seconds=59), timedelta(minutes=15), timedelta(minutes=30)]
LATER = [timedelta(hours=1), timedelta(hours=11), timedelta(hours=24), *map(timedelta, (2, 6, 29, 180))]


def started(start: tuple[str, str]) -> dict[str, str]:
    """Write how long periods are and where they begin, as fields of a limit."""
    return dict(zip(("period", "starts"), start, strict=True))


def valid(limit: Json) -> Json:
    """Let a limit in flight count holds, and no kinds."""
    return limit | {"counts": None} if limit["period"] == "in_flight" else limit


users = st.sampled_from([*USERS[:3], *USERS])
kinds = st.sampled_from(["image", "image", "image", "video", "gpu_second"])
calendar = st.sampled_from([(period, "calendar") for period in PERIODS])
starts = calendar | st.sampled_from(STARTS)
# a pool may have the name of a kind that it doesn't count
counts = st.sampled_from(
    [None, None, None, {"image": 1, "video": 3}, {"image": 2}, {"video": 1, "gpu_second": 2, "audio": 1_000_000}]
)
modes = st.sampled_from(["enforce", "enforce", "enforce", "observe"])
anchors = st.sampled_from(
    [
        "2024-02-29T12:00:00+00:00",
        "2025-12-31T23:59:59.999999+00:00",
        "2026-01-31T00:30:00+00:00",
        "2026-03-29T01:30:00+00:00",  # skipped in the Azores a moment before, and in Paris half an hour
        "2026-10-25T00:30:00+00:00",  # happens twice in Paris
        "2026-10-25T01:30:00+00:00",  # for the second time
        "2026-11-01T04:15:00+00:00",  # happens twice in Havana
        "2030-06-15T08:00:00+00:00",
    ]
)
scopes = st.sampled_from(["group", "member", "child"])
costs = st.sampled_from([1, 1, 1, 2, 3, 7])
keys = st.sampled_from([None, None, "job-1", "job-2", "job-3"])
maxima = st.sampled_from([None, 0, 2, 3, 5, 8, 13, 21])
rarely = st.sampled_from([False] * 9 + [True])
priorities = st.sampled_from([0, 0, 1, 5])
zones = st.sampled_from(ZONES)
NAMES = ["Alpha", "ALPHA", "Beta", "Gamma", "Delta", "Epsilon", "Zeta"]
names = st.sampled_from(NAMES)
parts = st.sampled_from(["a", "A@", " 2@"])
sizes = st.sampled_from([1, 2, 50])
limit = st.fixed_dictionaries(
    {"kind": kinds, "start": starts, "scope": scopes, "mode": modes, "max": maxima, "counts": counts}
).map(lambda x: valid({name: value for name, value in x.items() if name != "start"} | started(x["start"])))
limits, some_limits = (
    st.lists(limit, min_size=least, max_size=5, unique_by=lambda x: (x["kind"], x["period"], x["starts"], x["scope"]))
    for least in (0, 2)
)
pasts = st.sampled_from([timedelta(seconds=1), *SOON[2:], timedelta(hours=7), timedelta(days=1), timedelta(days=40)])
# until when overrides last: rarely, that is over already
untils = st.sampled_from([None, None, timedelta(0), *SOON, *LATER])
ttls = st.sampled_from([1, 1, 60, 900, 3600, 24 * 3600, 3 * 24 * 3600])
