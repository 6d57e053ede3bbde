"""What must be true of the database after every test, whatever happened in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg.rows import tuple_row

if TYPE_CHECKING:
    import psycopg

_LIVE = "u.status in ('reserved', 'committed')"

# what a limit counts for a subject: the group's usage, and that of all beneath it
_COUNTED = """u.group_id in (
  select t.group_id
  from tokenlimits.group_tree as t
  where t.above_id = case l.scope when 'child' then c.subject else l.group_id end
)"""

_COUNTERS = f"""
select
  l.group_id, l.kind, l.period, l.scope, c.subject, c.since, c.until, c.used,
  coalesce((
    select sum(
      case when l.period = 'in_flight' then 1 else u.cost end
      * case when l.counts is null then 1 else (l.counts ->> u.kind)::bigint end
    )
    from public.generation_usage as u
    where
      {_COUNTED}
      and (l.counts is null and u.kind = l.kind or l.counts ? u.kind)
      and (l.scope <> 'member' or u.user_id = c.subject)
      and u.created_at >= c.since
      and u.created_at < c.until
      and {_LIVE}
      and (l.period <> 'in_flight' or u.status = 'reserved')
  ), 0) as recorded
from tokenlimits.counters as c
inner join public.group_limits as l using (counter_id)
where c.until > tokenlimits.clock()
"""

DRIFTING_COUNTERS = f"select * from ({_COUNTERS}) as counted where used <> recorded"

DRIFTING_ROLLUP = f"""
with recorded as (
  select
    u.group_id, u.kind, date_bin('15 minutes', u.created_at, '2000-01-01 00:00:00+00') as bucket,
    sum(u.cost) as cost, count(*) as generations
  from public.generation_usage as u
  where {_LIVE}
  group by 1, 2, 3
),
rolled_up as (
  select r.group_id, r.kind, r.bucket, sum(r.cost) as cost, sum(r.generations) as generations
  from tokenlimits.usage_rollup as r
  group by 1, 2, 3
)
select
  group_id, kind, bucket,
  rolled_up.cost as used, recorded.cost as recorded,
  rolled_up.generations as counted, recorded.generations as rows_recorded
from recorded
full join rolled_up using (group_id, kind, bucket)
where
  coalesce(recorded.cost, 0) <> coalesce(rolled_up.cost, 0)
  or coalesce(recorded.generations, 0) <> coalesce(rolled_up.generations, 0)
"""

_PART = """make_interval(
  secs => extract(epoch from case when l.period ~ ' ' then l.period else '1 ' || l.period end::interval)::float8 / 60
)"""

DRIFTING_PARTS = f"""
with recorded as (
  select
    c.subject, c.counter_id, date_bin({_PART}, u.created_at, '1970-01-01 00:00:00+00') as part,
    sum(u.cost * case when l.counts is null then 1 else (l.counts ->> u.kind)::bigint end) as used
  from tokenlimits.counters as c
  inner join public.group_limits as l using (counter_id)
  inner join public.generation_usage as u
    on
      {_COUNTED} and (l.counts is null and u.kind = l.kind or l.counts ? u.kind)
      and (l.scope <> 'member' or u.user_id = c.subject) and u.created_at >= c.since and u.created_at < c.until
      and {_LIVE}
  where l.starts = 'rolling' and c.until > tokenlimits.clock()
  group by 1, 2, 3
),
counted as (
  select p.*
  from tokenlimits.counter_parts as p
  inner join tokenlimits.counters as c using (subject, counter_id)
  inner join public.group_limits as l using (counter_id)
  where c.until > tokenlimits.clock()
)
select subject, counter_id, part, counted.used, recorded.used as recorded
from recorded
full join counted using (subject, counter_id, part)
where coalesce(counted.used, 0) <> coalesce(recorded.used, 0)
"""

COUNTERS_FROM_BEFORE_A_RESET = f"""
select counted.*, r.reset_at
from ({_COUNTERS}) as counted
inner join tokenlimits.usage_resets as r
  on
    r.group_id = case counted.scope when 'child' then counted.subject else counted.group_id end
    and r.kind in (counted.kind, '*') and r.subject in (r.group_id, counted.subject)
where counted.since < r.reset_at and counted.period <> 'in_flight'
"""

COUNTERS_OF_NOBODY = f"""
select *
from ({_COUNTERS}) as counted
where
  (scope = 'group') <> (subject = group_id) or since >= until
  or (scope = 'child') <> exists (
    select
    from tokenlimits.group_tree as t
    where t.group_id = counted.subject and t.above_id = counted.group_id and t.distance = 1
  )
"""

OVERRIDES_UNKNOWN_TO_COUNTERS = """
select c.subject, l.kind, l.period, c.override_max, c.overridden_until, o.max, o.until
from tokenlimits.counters as c
inner join public.group_limits as l using (counter_id)
left join public.limit_overrides as o
  on
    (o.group_id, o.kind, o.period, o.starts, o.scope, o.subject)
    = (l.group_id, l.kind, l.period, l.starts, l.scope, c.subject)
    and (o.until is null or o.until > tokenlimits.clock())
where
  (o.id is not null, o.max, coalesce(o.until, 'infinity'))
  is distinct from (
    coalesce(c.overridden_until > tokenlimits.clock(), false),
    case when c.overridden_until > tokenlimits.clock() then c.override_max end,
    case when c.overridden_until > tokenlimits.clock() then c.overridden_until else 'infinity' end
  )
"""

HOLDS_OF_NOTHING = """
select h.usage_id as holds, u.id as reserved
from tokenlimits.holds as h
full join (select * from public.generation_usage where status = 'reserved') as u on u.id = h.usage_id
where
  (h.group_id, h.user_id, h.kind, h.cost, h.created_at, h.expires_at)
  is distinct from (u.group_id, u.user_id, u.kind, u.cost, u.created_at, u.expires_at)
"""

_PATHS = """
with recursive paths as (
  select g.id as group_id, g.id as above_id, null::uuid as child_id, 0 as distance, g.parent_id
  from public.user_groups as g
  union all
  select p.group_id, g.id, p.above_id, p.distance + 1, g.parent_id
  from paths as p
  inner join public.user_groups as g on g.id = p.parent_id
)
"""

# the ways up of all groups that exist; a deleted group stays beneath those that its parent is beneath
MISPLACED_GROUPS = f"""
select expected.*, found.*
from (
  {_PATHS}
  select
    p.group_id, p.above_id, p.child_id, p.distance, max(p.distance) over (partition by p.group_id) - p.distance as level
  from paths as p
) as expected
full join (
  select t.*
  from tokenlimits.group_tree as t
  where exists (select from public.user_groups as g where g.id = t.group_id)
) as found
  on
    (found.group_id, found.above_id, found.distance, found.level)
    = (expected.group_id, expected.above_id, expected.distance, expected.level)
    and found.child_id is not distinct from expected.child_id
where found.group_id is null or expected.group_id is null
"""

BROKEN_WAYS = """
select t.*
from tokenlimits.group_tree as t
left join tokenlimits.group_tree as s on s.group_id = t.child_id and s.above_id = t.above_id
where (t.distance = 0) <> (t.child_id is null) or (t.distance > 0 and s.distance is distinct from 1)
"""

UNMARKED_GROUPS = """
select g.id
from public.user_groups as g
where
  not g.is_nested
  and exists (
    select from tokenlimits.group_tree as t where t.distance > 0 and g.id in (t.group_id, t.above_id)
  )
"""

HOLDS_IN_ANOTHER_TREE = """
select h.usage_id, h.group_id, h.root_id
from tokenlimits.holds as h
inner join tokenlimits.group_tree as t on t.group_id = h.group_id and t.level = 0
where h.root_id <> t.above_id
"""

INVARIANTS = {
    "a counter is not the sum of the live usages of its period": DRIFTING_COUNTERS,
    "a part of a rolling counter is not the sum of its live usages": DRIFTING_PARTS,
    "the rollup is not the sum of the live usages": DRIFTING_ROLLUP,
    "a counter counts from before the last reset": COUNTERS_FROM_BEFORE_A_RESET,
    "a counter has no subject or no period": COUNTERS_OF_NOBODY,
    "a counter has another override than its subject": OVERRIDES_UNKNOWN_TO_COUNTERS,
    "the holds are not the reserved usages": HOLDS_OF_NOTHING,
    "a group is elsewhere in the tree than its parent says": MISPLACED_GROUPS,
    "a way up leaves out a group": BROKEN_WAYS,
    "a group in a tree is judged as if it were alone": UNMARKED_GROUPS,
    "a hold is in another tree than its group": HOLDS_IN_ANOTHER_TREE,
}


_ALL = "\nunion all\n".join(
    # as JSON: a lifetime begins at -infinity, which no datetime holds
    f"select '{problem}', to_jsonb(d) from ({query}) as d"
    for problem, query in INVARIANTS.items()
)


def drift(connection: psycopg.Connection[Any]) -> list[str]:
    """Tell what is out of step between counters, rollup, resets and the ledger; nothing should be."""
    rows = connection.cursor(row_factory=tuple_row).execute(_ALL).fetchall()
    return [f"{problem}: {row}" for problem, row in rows]
