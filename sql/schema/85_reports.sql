-- Usage for users and admins, and history.
--
-- Invariants
--   * Numbers come from counters and the rollup, never from scanning the ledger, so their cost doesn't grow.

create or replace function tokenlimits.user_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  return coalesce((
    select jsonb_agg(
      to_jsonb({{ limit_answer('s', payer="'00000000-0000-0000-0000-000000000000'") | indent(6) }})
      order by s.group_place, s.place
    )
    from (
      -- what two groups have above them is there once
      select distinct on (l.subject, l.counter_id) l.*, p.place as group_place
      from unnest({{ payers('p_user_id') | indent(6) }}) with ordinality as p (id, place)
      cross join lateral unnest(tokenlimits.limit_states(p.id, array[p_user_id], null, v_now))
      with ordinality as l ({{ state_columns() }}, place)
      order by l.subject, l.counter_id, p.place
    ) as s
  ), '[]');
end
$$;
{{ private(
  'user_usage(uuid)',
  "Every limit that applies to a user, of their groups and those above, in the order in which groups pay."
) }}

create or replace function tokenlimits.user_generation_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
{{ search_path() }}
as $$
begin
  if p_user_id is null then
    perform tokenlimits.refuse('TL001', 'user_id: is required', 'user_id');
  end if;
  return tokenlimits.user_usage(p_user_id);
end
$$;
{{ rpc(
  'user_generation_usage',
  ['p_user_id uuid'],
  to='service_role',
  comment="Every limit that applies to a user: group, kind, period, scope, max, used, remaining, reset_at.",
  volatility='stable'
) }}

create or replace function tokenlimits.my_generation_usage()
returns jsonb
language plpgsql
stable
-- definer: counters are private; it returns only the caller's own usage
security definer
{{ search_path() }}
as $$
declare
  v_user_id uuid := (select auth.uid());
begin
  if v_user_id is null then
    raise exception using
      errcode = '42501', message = 'no user is signed in', hint = 'Send the user''s access token.';
  end if;
  return tokenlimits.user_usage(v_user_id);
end
$$;
{{ rpc(
  'my_generation_usage',
  [],
  to='authenticated',
  comment="Every limit that applies to the signed-in user: group, kind, period, scope, max, used, remaining, reset_at.",
  volatility='stable'
) }}

do $do$
begin
  if to_regtype('tokenlimits.group_usage_answer') is null then
    -- as clients see it
    create type tokenlimits.group_limit_answer as (
      kind text,
      period text,
      starts text,
      scope text,
      mode text,
      max bigint,
      used numeric,
      remaining numeric,
      reset_at timestamptz,
      weight bigint,
      capacity numeric,
      fraction numeric,
      "group" tokenlimits.group_answer
    );
    create type tokenlimits.group_usage_answer as (
      "group" tokenlimits.group_answer,
      member_count bigint,
      limits json,
      parent_id uuid,
      child_count bigint
    );
  end if;
end
$do$;

-- What is used of a group's limits that don't start by the calendar: its own, and those of its members and of members
-- beneath it, each in their own window, added up.
create or replace function tokenlimits.uncommon_usage(p_group_id uuid, p_at timestamptz)
returns table (counter_id bigint, used numeric, until timestamptz)
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return query
  select s.counter_id, sum(s.used), case s.scope when 'group' then max(coalesce(s.reset_at, s.until)) end
  from unnest(tokenlimits.limit_states(
    p_group_id,
    {{ members_beneath('p_group_id') | indent(4) }},
    null,
    p_at
  )) as s
  where s.starts <> 'calendar' and s.group_id = p_group_id and s.scope <> 'child'
  group by s.counter_id, s.scope;
end
$$;
{{ private(
  'uncommon_usage(uuid, timestamptz)',
  "What is used of a group's limits that don't start by the calendar."
) }}

-- What members had used of a limit when their usage was reset, which their own counters no longer contain. Expired
-- holds among it were subtracted with all others.
create or replace function tokenlimits.used_before_resets(
  p_group_id uuid,
  p_kind text,
  p_counts jsonb,
  p_since timestamptz,
  p_at timestamptz
)
returns numeric
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_group_ids uuid[] := {{ beneath('p_group_id') }};
begin
  return coalesce((
    select sum(
      tokenlimits.count_limit(v_group_ids, r.subject, p_kind, null, p_counts, p_since, r.reset_at)
      - tokenlimits.expired_of_limit(v_group_ids, r.subject, p_kind, null, p_counts, p_since, p_at)
      + tokenlimits.expired_of_limit(v_group_ids, r.subject, p_kind, null, p_counts, r.reset_at, p_at)
    )
    from (
      select q.subject, max(q.reset_at) as reset_at
      from tokenlimits.usage_resets as q
      where q.group_id = p_group_id and q.kind in (p_kind, '*') and q.subject <> p_group_id
      group by q.subject
    ) as r
    where r.reset_at > p_since
  ), 0);
end
$$;
{{ private(
  'used_before_resets(uuid, text, jsonb, timestamptz, timestamptz)',
  "What members had used of a limit in its current period when their usage was reset."
) }}

-- A member limit is shown for the whole group: what all members used, of max times the number of members. All groups of
-- a page at once, since a dashboard asks for a thousand: what limit_states computes for one group, this computes for
-- all in one query. It returns json, which is only concatenated; jsonb would be rebuilt at every level.
create or replace function tokenlimits.group_usage(p_group_id uuid, p_after text, p_page_size integer)
returns json
language plpgsql
stable
-- definer: counters are private
security definer
{{ search_path() }}
-- the planner assumes that each step returns few rows, and would choose nested loops
set enable_nestloop = off
-- a plan for specific ids would read the statistics of each: half of the time for a thousand
set plan_cache_mode = force_generic_plan
-- the estimates are high, and compiling such a query for each call would take seconds
set jit = off
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_group_ids uuid[];
  v_nested_ids uuid[];
  v_any_expired boolean := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
  v_any_reset boolean := exists (select from tokenlimits.usage_resets as r where r.subject <> r.group_id);
begin
  perform tokenlimits.require_admin();
  if p_group_id is not null then
    v_group_ids := array[(tokenlimits.require_group(p_group_id)).id];
  else
    v_group_ids := array(
      select g.id
      from public.user_groups as g
      -- no name is empty; "p_after is null or" would read the earlier pages too
      where lower(g.name) > lower(coalesce(p_after, ''))
      order by lower(g.name)
      -- null: all
      limit case when p_page_size is not null then greatest(p_page_size, 1) end
    );
  end if;
  v_nested_ids := array(select g.id from public.user_groups as g where g.id = any(v_group_ids) and g.is_nested);
  return coalesce((
    -- "= any" in every step: each reads only these groups, not all
    with groups as materialized (
      select g.id, g.name, g.timezone, g.parent_id, p.place
      from public.user_groups as g
      inner join unnest(v_group_ids) with ordinality as p (id, place) on p.id = g.id
      where g.id = any(v_group_ids)
    ),

    members as materialized (
      select m.group_id, count(*) as members
      from public.group_memberships as m
      where m.group_id = any(v_group_ids)
      group by m.group_id
    ),

    children as materialized (
      select c.parent_id as group_id, count(*) as children
      from public.user_groups as c
      where c.parent_id = any(v_nested_ids)
      group by c.parent_id
    ),

    -- whom member limits of a group with others beneath it count
    reached as materialized (
      select t.above_id as group_id, count(distinct m.user_id) as members
      from tokenlimits.group_tree as t
      inner join public.group_memberships as m on m.group_id = t.group_id
      where t.above_id = any(v_nested_ids)
      group by t.above_id
    ),

    -- of the groups themselves, and of those who are members now
    overrides as materialized (
      select
        o.group_id, o.kind, o.period, o.starts, o.scope,
        count(*) as subjects, sum(o.max) as max, bool_or(o.max is null) as is_unlimited
      from public.limit_overrides as o
      where
        o.group_id = any(v_group_ids) and (o.until is null or o.until > v_now) and o.scope <> 'child'
        and (o.scope = 'group' or exists (
          select
          from tokenlimits.group_tree as t
          inner join public.group_memberships as m on m.group_id = t.group_id
          where t.above_id = o.group_id and m.user_id = o.subject
        ))
      group by o.group_id, o.kind, o.period, o.starts, o.scope
    ),

    limits as materialized (
      select
        l.group_id, l.kind, l.period, l.starts, l.scope, l.mode, l.counts, l.counter_id, g.timezone,
        case when l.scope = 'group' and o.subjects > 0 then o.max else l.max end as max,
        -- numeric: for many members, it exceeds a bigint
        case
          when o.is_unlimited then null
          when o.subjects = case l.scope when 'member' then coalesce(h.members, m.members) else 1 end then o.max
          else l.max::numeric * (
            case l.scope when 'member' then coalesce(h.members, m.members, 0) else 1 end - coalesce(o.subjects, 0)
          ) + coalesce(o.max, 0)
        end as capacity
      from public.group_limits as l
      inner join groups as g on g.id = l.group_id
      left join members as m on m.group_id = l.group_id
      left join reached as h on h.group_id = l.group_id
      left join overrides as o on {{ same_limit('o', 'l') | indent(6) }}
      where l.group_id = any(v_group_ids) and l.scope <> 'child'
    ),

    periods as materialized (
      select k.period, k.timezone, tokenlimits.period_of(k.period, k.timezone, v_now) as range
      from (select distinct l.period, l.timezone from limits as l where l.starts = 'calendar') as k
    ),

    -- as in limit_states: an open counter says what is used; if a new period has begun since, nothing is used; null
    -- means that there is no counter. A group limit of the same period, if there is one, has counted what all members
    -- used together.
    states as (
      select
        l.*,
        case
          when c.until > v_now then c.since
          else {{ new_since('p.range', 'c.until', 'l.group_id', 'l.kind', 'l.group_id') | indent(10) }}
        end as since,
        case when c.until > v_now then c.until else upper(p.range) end as until,
        case when c.until > v_now then c.used when c.until is not null then 0 end as used
      from limits as l
      inner join periods as p on p.period = l.period and p.timezone = l.timezone
      left join (
        select o.group_id, o.kind, o.period, o.counts, k.since, k.until, k.used
        from limits as o
        inner join tokenlimits.counters as k on k.subject = o.group_id and k.counter_id = o.counter_id
        where k.subject = any(v_group_ids) and o.scope = 'group' and o.starts = 'calendar'
      ) as c
        on c.group_id = l.group_id and c.kind = l.kind and c.period = l.period and c.counts is not distinct from l.counts
      where l.starts = 'calendar'
      -- each is worked out once, not wherever it is named below; to keep them all, as materialized does, costs more
      offset 0
    ),

    pools as materialized (
      select p.*, coalesce(p.reset_at, p.until) as ends_at
      from unnest(case when v_nested_ids <> '{}' then tokenlimits.child_pools(v_nested_ids, v_now) end) as p
    ),

    shown as (
      select
        c.group_id,
        json_agg(
          row(
            c.kind, c.period, c.starts, c.scope, c.mode, c.max, c.used,
            case when c.capacity is not null then greatest(c.capacity - c.used, 0) end,
            nullif(c.until, 'infinity'), 1, c.capacity,
            case
              when c.capacity > 0 then round(c.used / c.capacity, 6)
              -- a blocked limit is full; so is a member limit that was used in a group that has no members now
              when c.capacity = 0 then 1
            end,
            c.owner
          )::tokenlimits.group_limit_answer
          order by c.kind, c.scope = 'group', c.counter_id
        ) as limits
      from (
        select
          s.group_id, s.kind, s.period, s.starts, s.scope, s.mode, s.max, s.counter_id, s.capacity, s.until,
          null::tokenlimits.group_answer as owner,
          -- without a counter, the sum is computed as in count_usage; here, if the period consists of whole buckets
          coalesce(s.used, case
            when
              s.counts is null and s.period <> 'in_flight' and {{ is_whole('s.since', 's.until') }}
              and s.group_id <> all(v_nested_ids)
            then coalesce((
              select sum(r.cost)
              from tokenlimits.usage_rollup as r
              where r.group_id = s.group_id and r.kind = s.kind and r.bucket >= s.since and r.bucket < s.until
            ), 0)
            else tokenlimits.count_limit(
              {{ beneath('s.group_id') }}, null, s.kind, s.period, s.counts, s.since, s.until
            )
          end)
          - case when v_any_expired
            then tokenlimits.expired_of_limit(
              {{ beneath('s.group_id') }}, null, s.kind, s.period, s.counts, s.since, v_now
            )
            else 0
          end
          - case when v_any_reset and s.scope = 'member' and s.period <> 'in_flight'
            then tokenlimits.used_before_resets(s.group_id, s.kind, s.counts, s.since, v_now)
            else 0
          end as used
        from states as s
        union all
        select
          l.group_id, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counter_id, l.capacity, u.until, null,
          coalesce(u.used, 0)
        from (select distinct o.group_id from limits as o where o.starts <> 'calendar') as g
        inner join limits as l on l.group_id = g.group_id and l.starts <> 'calendar'
        left join lateral tokenlimits.uncommon_usage(g.group_id, v_now) as u on u.counter_id = l.counter_id
        union all
        -- a child's pool, as the child sees it
        select
          p.subject, p.kind, p.period, p.starts, p.scope, p.mode, p.max, p.counter_id, p.max, p.ends_at,
          row(p.group_id, p.group_name)::tokenlimits.group_answer, p.used
        from pools as p
        where p.subject = any(v_nested_ids)
        union all
        -- all pools, as the parent sees them
        select
          l.group_id, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counter_id,
          case when bool_and(p.max is not null or p.subject is null) then coalesce(sum(p.max), 0) end,
          case when l.starts = 'calendar' then max(p.until) end, null, coalesce(sum(p.used), 0)
        from public.group_limits as l
        left join pools as p on p.counter_id = l.counter_id
        where l.group_id = any(v_group_ids) and l.scope = 'child'
        group by l.id
      ) as c
      group by c.group_id
    )

    select json_agg(
      row(
        row(g.id, g.name)::tokenlimits.group_answer,
        coalesce(m.members, 0),
        coalesce(s.limits, '[]'),
        g.parent_id,
        coalesce(c.children, 0)
      )::tokenlimits.group_usage_answer
      order by g.place
    )
    from groups as g
    left join members as m on m.group_id = g.id
    left join children as c on c.group_id = g.id
    left join shown as s on s.group_id = g.id
  ), '[]');
end
$$;
{{ rpc(
  'group_usage',
  ['p_group_id uuid default null', 'p_after text default null', 'p_page_size integer default null'],
  to='authenticated, service_role',
  comment="Usage of one group, of all, or of the page of groups after a name: used, capacity and reset_at of each limit.",
  volatility='stable',
  returns='json'
) }}

create or replace function tokenlimits.check_bucket(p_bucket text)
returns void
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_bucket is null or p_bucket not in ('hour', 'day', 'week', 'month') then
    perform tokenlimits.refuse('TL001', 'bucket: must be hour, day, week or month', 'bucket');
  end if;
end
$$;
{{ private(
  'check_bucket(text)',
  "Raises TL001 unless it is a step of the history."
) }}

-- A group that was deleted has lost its time zone too.
create or replace function tokenlimits.timezone_of(p_group_id uuid)
returns text
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return coalesce((select g.timezone from public.user_groups as g where g.id = p_group_id), 'UTC');
end
$$;
{{ private(
  'timezone_of(uuid)',
  "The time zone in which a group's periods begin."
) }}

create or replace function tokenlimits.generation_history(
  p_group_id uuid,
  p_kind text,
  p_bucket text,
  p_since timestamptz,
  p_until timestamptz
)
returns jsonb
language plpgsql
stable
-- definer: the rollup is private
security definer
{{ search_path() }}
as $$
declare
  v_timezone text := 'UTC';
  v_now timestamptz := tokenlimits.clock();
  v_until timestamptz := coalesce(p_until, 'infinity');
  v_since timestamptz := coalesce(p_since, coalesce(p_until, v_now) - interval '30 days');
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_bucket(p_bucket);
  if p_group_id is not null then
    v_timezone := (tokenlimits.require_group(p_group_id)).timezone;
  end if;
  -- whole buckets: the first is the one that contains p_since
  v_since := lower(tokenlimits.period_of(p_bucket, v_timezone, v_since));
  return coalesce((
    select jsonb_agg(to_jsonb(points) order by points.bucket, points.kind)
    from (
      select
        lower(tokenlimits.period_of(p_bucket, v_timezone, r.bucket)) as bucket,
        r.kind,
        sum(r.cost) as used,
        sum(r.generations) as generations
      from (
        select q.bucket, q.kind, sum(q.cost) as cost, sum(q.generations) as generations
        from ({{ live_sums('v_now') | indent(8) }}) as q
        where
          (p_group_id is null or q.group_id = p_group_id)
          and (p_kind is null or q.kind = p_kind)
          and q.bucket >= v_since
          and q.bucket < v_until
        group by q.bucket, q.kind
      ) as r
      group by 1, 2
      having sum(r.generations) > 0
    ) as points
  ), '[]');
end
$$;
{{ rpc(
  'generation_history',
  ['p_group_id uuid default null', 'p_kind text default null', "p_bucket text default 'day'",
    'p_since timestamptz default null', 'p_until timestamptz default null'],
  to='authenticated, service_role',
  comment="Live usage per kind and bucket in a group's time zone (of all groups, in UTC, if null); 30 days by default.",
  volatility='stable'
) }}
