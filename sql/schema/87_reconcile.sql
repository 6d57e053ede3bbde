-- Recounting everything, in case the numbers are in doubt.
--
-- Invariants
--   * The ledger is right by definition: counters and rollup are made to agree with it, never the other way round.
--   * Usage older than p_since isn't recounted: there, the rollup is trusted.
--   * No call is recorded for the group, or for one beneath it, meanwhile: their stripes are held in exclusive mode.

-- Whole buckets, or the beginning of the first one would be missed.
create or replace function tokenlimits.rollup_differences(p_group_id uuid, p_since timestamptz)
returns table (
  group_id uuid, kind text, bucket timestamptz, was numeric, used numeric, generations numeric
)
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_since timestamptz := {{ bucket('p_since') }};
  v_group_ids uuid[] := {{ beneath('p_group_id') }};
begin
  return query
  select d.group_id, d.kind, d.bucket, d.was, d.used, d.generations
  from (
    select
      coalesce(r.group_id, u.group_id) as group_id, coalesce(r.kind, u.kind) as kind, coalesce(r.bucket, u.bucket) as bucket,
      coalesce(r.cost, 0) as was, coalesce(u.cost, 0) as used,
      coalesce(u.generations, 0) - coalesce(r.generations, 0) as generations
    from (
      select s.group_id, s.kind, s.bucket, sum(s.cost) as cost, sum(s.generations) as generations
      from tokenlimits.usage_rollup as s
      where s.group_id = any(v_group_ids) and s.bucket >= v_since
      group by s.group_id, s.kind, s.bucket
    ) as r
    full join (
      select s.group_id, s.kind, s.bucket, sum(s.cost) as cost, count(*) as generations
      from (
        select l.group_id, l.kind, {{ bucket('l.created_at') }} as bucket, l.cost
        from public.generation_usage as l
        where l.group_id = any(v_group_ids) and l.created_at >= v_since and l.status in ('reserved', 'committed')
      ) as s
      group by s.group_id, s.kind, s.bucket
    ) as u on u.group_id = r.group_id and u.kind = r.kind and u.bucket = r.bucket
  ) as d
  where d.was <> d.used or d.generations <> 0;
end
$$;
{{ private(
  'rollup_differences(uuid, timestamptz)',
  "Where the history of a group, and of all beneath it, differs from the ledger since a moment."
) }}

-- The group's own counters come first, so that p_most leaves out members. A rolling counter may be right while its
-- parts are not: both numbers are equal then.
create or replace function tokenlimits.counter_differences(
  p_group_id uuid,
  p_at timestamptz,
  p_most integer default null
)
returns table (
  subject uuid, counter_id bigint, kind text, period text, starts text, scope text, was bigint, used bigint
)
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_group_ids uuid[] := {{ beneath('p_group_id') }};
begin
  return query
  select d.subject, d.counter_id, d.kind, d.period, d.starts, d.scope, d.was, d.used
  from (
    select
      c.subject, c.counter_id, c.kind, c.period, c.starts, c.scope, c.used as was,
      tokenlimits.count_limit(
        case c.scope when 'child' then {{ beneath('c.subject') }} else v_group_ids end,
        case c.scope when 'member' then c.subject end, c.kind, c.period, c.counts, c.since, c.until
      ) as used,
      c.starts = 'rolling' and exists (
        select
        from (
          select p.part, p.used
          from tokenlimits.counter_parts as p
          where p.subject = c.subject and p.counter_id = c.counter_id
          union all
          select r.part, -r.used
          from tokenlimits.recorded_parts(row(
            p_group_id, c.counter_id, c.subject, c.kind, c.period, c.starts, c.scope, c.mode, c.max, c.counts, 1,
            c.since, c.until, null, c.used, null, true, null, null, null, null, null, null
          )::tokenlimits.limit_state) as r
        ) as q
        group by q.part
        having sum(q.used) <> 0
      ) as has_other_parts
    from (
      select
        m.subject, m.counter_id, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counts, m.used, m.since, m.until
      from public.group_limits as l
      inner join tokenlimits.counters as m on m.counter_id = l.counter_id
      where l.group_id = p_group_id and m.until > p_at
      order by l.scope, m.subject
      limit p_most
    ) as c
  ) as d
  where d.was <> d.used or d.has_other_parts;
end
$$;
{{ private(
  'counter_differences(uuid, timestamptz, integer)',
  "Where a group's counters differ from the ledger."
) }}

-- Holds can be missing after a dump of the ledger alone was restored.
create or replace function tokenlimits.missing_holds(p_group_id uuid, p_since timestamptz)
returns setof public.generation_usage
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return query
  select u.*
  from public.generation_usage as u
  where
    u.group_id = any({{ beneath('p_group_id') }})
    and u.created_at >= p_since
    and u.status = 'reserved'
    and not exists (select from tokenlimits.holds as h where h.user_id = u.user_id and h.usage_id = u.id);
end
$$;
{{ private(
  'missing_holds(uuid, timestamptz)',
  "Reserved usages without a row in holds, which would never be found when they expire."
) }}

-- One group at a time, and from a moment on, since a statement ends after 8 s. Its counters include what is used
-- beneath it, so the history there is corrected too. Returns what differed: the old and the new values.
create or replace function tokenlimits.reconcile_usage(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: counters and rollup are private
security definer
{{ search_path() }}
as $$
declare
  v_counters jsonb;
  v_rollup jsonb;
  v_holds bigint;
  v_state tokenlimits.limit_state;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  {{ lock_tree() }}
  perform tokenlimits.lock_groups(array[p_group_id], true);

  {{ into_holds('u', root_id=root_of('u.group_id'), source="from tokenlimits.missing_holds(p_group_id, coalesce(p_since, '-infinity')) as u") | indent(2) }}
  get diagnostics v_holds = row_count;

  -- the rollup first, since the group's counters are counted from it
  with differences as (
    select d.group_id, d.kind, d.bucket, d.was, d.used, d.generations
    from tokenlimits.rollup_differences(p_group_id, coalesce(p_since, '-infinity')) as d
  ),

  repaired as (
    {{ merge_into_rollup(
      'select d.group_id, d.kind, d.bucket, 0, d.used - d.was, d.generations\nfrom differences as d'
    ) | indent(4) }}
  )

  select jsonb_agg(to_jsonb(d) - 'generations' order by d.group_id, d.kind, d.bucket) into v_rollup
  from differences as d;

  with differences as (
    select d.subject, d.counter_id, d.kind, d.period, d.starts, d.scope, d.was, d.used
    from tokenlimits.counter_differences(p_group_id, tokenlimits.clock()) as d
  ),

  repaired as (
    update tokenlimits.counters as c
    set used = d.used
    from differences as d
    where c.subject = d.subject and c.counter_id = d.counter_id
  )

  select jsonb_agg(to_jsonb(d) - 'counter_id' order by d.kind, d.period, d.subject) into v_counters
  from differences as d;

  for v_state in
    select
      l.group_id, l.counter_id, c.subject, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counts, 1 as weight,
      c.since, c.until, null as reset_at, c.used, null as expired, true as is_open, null as group_name, null as timezone,
      null as own_max, null as overridden_until, null as level,
      null as is_spread
    from public.group_limits as l
    inner join tokenlimits.counters as c on c.counter_id = l.counter_id
    where l.group_id = p_group_id and l.starts = 'rolling' and c.until > tokenlimits.clock()
  loop
    delete from tokenlimits.counter_parts as p
    where p.subject = v_state.subject and p.counter_id = v_state.counter_id;
    insert into tokenlimits.counter_parts (subject, counter_id, part, used)
    select v_state.subject, v_state.counter_id, r.part, r.used
    from tokenlimits.recorded_parts(v_state) as r;
  end loop;

  return jsonb_build_object(
    'counters', coalesce(v_counters, '[]'), 'rollup', coalesce(v_rollup, '[]'), 'holds', v_holds
  );
end
$$;
{{ rpc(
  'reconcile_usage',
  ['p_group_id uuid', 'p_since timestamptz default \'-infinity\''],
  to='authenticated, service_role',
  comment="Recounts the usage of a group, and of all beneath it, from the ledger; corrects its counters and the rollup, and returns what differed."
) }}
