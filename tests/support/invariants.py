"""What must be true of the database after every test, whatever happened in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg.rows import tuple_row

if TYPE_CHECKING:
    import psycopg

_LIVE = "u.status in ('reserved', 'committed')"

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
      u.group_id = l.group_id
      and (l.counts is null and u.kind = l.kind or l.counts ? u.kind)
      and (l.scope = 'group' or u.user_id = c.subject)
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
      u.group_id = l.group_id and (l.counts is null and u.kind = l.kind or l.counts ? u.kind)
      and (l.scope = 'group' or u.user_id = c.subject) and u.created_at >= c.since and u.created_at < c.until
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
    r.group_id = counted.group_id and r.kind in (counted.kind, '*')
    and r.subject in (counted.group_id, counted.subject)
where counted.since < r.reset_at and counted.period <> 'in_flight'
"""

COUNTERS_OF_NOBODY = f"""
select *
from ({_COUNTERS}) as counted
where (scope = 'group') <> (subject = group_id) or since >= until
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

INVARIANTS = {
    "a counter is not the sum of the live usages of its period": DRIFTING_COUNTERS,
    "a part of a rolling counter is not the sum of its live usages": DRIFTING_PARTS,
    "the rollup is not the sum of the live usages": DRIFTING_ROLLUP,
    "a counter counts from before the last reset": COUNTERS_FROM_BEFORE_A_RESET,
    "a counter has no subject or no period": COUNTERS_OF_NOBODY,
    "a counter has another override than its subject": OVERRIDES_UNKNOWN_TO_COUNTERS,
    "the holds are not the reserved usages": HOLDS_OF_NOTHING,
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
