"""The sums of an export, page by page: each comes once, whatever happens between two pages, and no page reads much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import cycle
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb
from tests.sql.semantics.api import Api
from tests.sql.semantics.world import World, limit

Json = dict[str, Any]
Row = tuple[UUID, str, datetime, int]

KINDS = ["image", "video"]
QUARTERS = 96
# two rows of the ledger for each quarter of an hour, in two slots of the rollup
USED = """
with made as (
  insert into public.generation_usage (id, group_id, user_id, kind, cost, status, created_at, settled_at)
  select gen_random_uuid(), g.id, gen_random_uuid(), k.kind, s.slot + 1, 'committed', q.at, q.at
  from unnest(%s::uuid[]) as g (id), unnest(%s::text[]) as k (kind), generate_series(0, 1) as s (slot), (
    select date_bin('15 minutes', tokenlimits.clock(), '2000-01-01 00:00:00+00') - n * interval '15 minutes' as at
    from generate_series(1, %s) as n
  ) as q
  returning group_id, kind, created_at, cost
)
insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
select group_id, kind, created_at, cost - 1, cost, 1 from made
"""


PAGE = """
select public.export_history(
  p_group_id => %(group_id)s, p_kind => %(kind)s, p_bucket => %(bucket)s,
  p_until => %(until)s, p_after => %(after)s, p_page_size => %(page_size)s
)
"""
WANTED: Json = {"group_id": None, "kind": None, "bucket": "day", "page_size": 1000, "until": None, "after": None}


def pages(api: Api, meanwhile: Callable[[], object] = lambda: None, **wanted: Any) -> Iterator[Json]:
    """Ask for page after page; something happens between each two."""
    page = api.one(PAGE, WANTED | wanted)
    yield page
    while page["next"] is not None:
        meanwhile()
        page = api.one(PAGE, WANTED | wanted | {"after": Jsonb(page["next"]), "until": page["until"]})
        yield page


def sums(api: Api, meanwhile: Callable[[], object] = lambda: None, **wanted: Any) -> list[Row]:
    return [
        (UUID(row["group"]["id"]), row["kind"], datetime.fromisoformat(row["bucket"]), row["used"])
        for page in pages(api, meanwhile, **wanted)
        for row in page["rows"]
    ]


@pytest.fixture
def busy(world: World) -> list[UUID]:
    """Two groups that used both kinds in every quarter of an hour of a day."""
    groups = sorted(world.group(timezone=zone) for zone in ("UTC", "Asia/Kathmandu"))
    world.owner.execute(USED, [groups, KINDS, QUARTERS])
    for group in groups:
        world.api.save_group(group, limits=[limit(None, kind) for kind in KINDS])
    return groups


@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize("bucket", ["hour", "day", "month"])
def test_every_sum_comes_once_in_pages_of_any_size(api: Api, busy: list[UUID], bucket: str, size: int) -> None:
    found = sums(api, bucket=bucket, page_size=size)
    keys = [row[:3] for row in found]
    assert keys == sorted(set(keys))
    assert sum(used for *_, used in found) == len(busy) * len(KINDS) * QUARTERS * 3
    assert sums(api, bucket=bucket, page_size=size, group_id=busy[0], kind="video") == [
        row for row in found if row[:2] == (busy[0], "video")
    ]


def test_what_was_used_before_counts_once_whatever_happens_meanwhile(api: Api, world: World, busy: list[UUID]) -> None:
    """Others track, and the groups' time zones change, so that buckets begin elsewhere."""
    user = world.user(busy[1])
    zones = cycle(["America/New_York", "Asia/Tokyo", "Australia/Lord_Howe", "UTC"])

    def meanwhile() -> None:
        world.api.track(user, "video", 1000)
        zone = next(zones)
        for group in busy:
            world.api.save_group(group, timezone=zone)

    found = sums(api, meanwhile, bucket="day", page_size=1)
    assert sum(used % 1000 for *_, used in found) == len(busy) * len(KINDS) * QUARTERS * 3
    assert len(found) > len(busy) * len(KINDS)


@pytest.mark.slow
def test_a_page_that_finds_nothing_ends_before_it_has_read_everything(api: Api, owner: Api) -> None:
    gone = sorted(uuid4() for _ in range(2_500))
    owner.execute(USED, [gone, ["image"], 1])
    found = list(pages(api, kind="video"))
    assert [page["rows"] for page in found] == [[], []]
    assert len(sums(api, kind="image")) == len(gone)


@pytest.mark.slow
def test_a_page_of_long_sums_is_short(api: Api, owner: Api) -> None:
    """A month of 15-minute buckets in two slots is 5,952 rows; a page reads about 100,000."""
    gone = sorted(uuid4() for _ in range(8))
    owner.execute(USED, [gone, KINDS, 3 * 31 * 96])
    lengths = [len(page["rows"]) for page in pages(api, bucket="month", page_size=5000)]
    assert len(lengths) == 3
    assert 15 < lengths[0] < 30


def test_exports_are_of_kinds_and_reports_of_pools(world: World) -> None:
    """A pool is what is counted, not what was used: an export has one row and one cost for each usage."""
    world.at("2026-11-23 12:00Z")
    group = world.group(
        limit(50, "credits", period="3 days", starts="anchor", counts={"image": 2, "video": 8}),
        limit(9, "video", period="5 hours", starts="rolling", scope="member"),
    )
    user = world.user(group)
    assert world.api.track(user, "image", 3)["allowed"]
    assert world.api.track(user, "video", 2)["allowed"]
    page = world.api.call("export_usage", group_id=group)
    assert sorted((row["kind"], row["cost"]) for row in page["rows"]) == [("image", 3), ("video", 2)]
    assert sorted(row[1::2] for row in sums(world.api, group_id=group)) == [("image", 3), ("video", 2)]
    assert [
        (x["kind"], x["period"], x["used"], x["remaining"], x["weight"])
        for x in world.api.group_usage(group)["limits"]
        if x["scope"] == "group"
    ] == [("credits", "3 days", 22, 28, 1)]
    [member] = [x for x in world.api.group_usage(group)["limits"] if x["scope"] == "member"]
    assert (member["period"], member["used"], member["capacity"], member["reset_at"]) == ("5 hours", 2, 9, None)
