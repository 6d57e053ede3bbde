-- Export of the ledger or of its sums, page by page; top members.
--
-- Invariants
--   * A page reads a bounded number of rows, by an index, however rare the matching rows are: a short page is not the
--     end; a page without "next" is.
--   * Pages are ordered by columns that never change. Each usage that was committed before the first page, and created
--     before "until", is in exactly one page, as a row or in a sum.

{%- set is_over = "p_usage.status = 'reserved' and p_usage.expires_at <= tokenlimits.clock()" %}
-- A hold whose time is over has expired, whether it has been swept or not.
create or replace function tokenlimits.usage_json(p_usage public.generation_usage, p_email text)
returns jsonb
language sql
stable
{{ search_path() }}
as $$
  select jsonb_build_object(
    'id', p_usage.id,
    'group', jsonb_build_object(
      'id', p_usage.group_id,
      'name', (select g.name from public.user_groups as g where g.id = p_usage.group_id)
    ),
    'user_id', p_usage.user_id,
    'email', p_email,
    'kind', p_usage.kind,
    'cost', p_usage.cost,
    'status', case when {{ is_over }} then 'expired' else p_usage.status end,
    'idempotency_key', p_usage.idempotency_key,
    'metadata', p_usage.metadata,
    'created_at', p_usage.created_at,
    'settled_at', case when {{ is_over }} then p_usage.expires_at else p_usage.settled_at end,
    'expires_at', p_usage.expires_at
  )
$$;
{{ private(
  'usage_json(public.generation_usage, text)',
  "A row of the ledger and the user's e-mail address, as an export shows them."
) }}

-- Reads one user's rows by the user's index, or otherwise one group after the other by the group's index: another index
-- would cost every call. p_after is the "next" of the previous page.
create or replace function tokenlimits.export_usage(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_after jsonb,
  p_page_size integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
{{ search_path() }}
as $$
declare
  c_groups constant integer := 1000;
  v_since timestamptz := coalesce(p_since, '-infinity');
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, tokenlimits.clock() + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_group_id uuid := coalesce(p_group_id, (p_after ->> 'group_id')::uuid);
  v_at timestamptz := coalesce((p_after ->> 'created_at')::timestamptz, v_since);
  v_id uuid := coalesce((p_after ->> 'id')::uuid, '00000000-0000-0000-0000-000000000000');
  v_page public.generation_usage[];
  v_emails jsonb;
  v_rows jsonb := '[]';
begin
  perform tokenlimits.require_admin();
  for i in 1..c_groups loop
    if p_user_id is not null then
      v_page := array(
        select u
        from public.generation_usage as u
        where u.user_id = p_user_id and (u.created_at, u.id) > (v_at, v_id) and u.created_at < v_until
        order by u.created_at, u.id
        limit v_left
      );
    else
      v_group_id := coalesce(v_group_id, (
        select u.group_id from public.generation_usage as u order by u.group_id limit 1
      ));
      v_page := array(
        select u
        from public.generation_usage as u
        where u.group_id = v_group_id and (u.created_at, u.id) > (v_at, v_id) and u.created_at < v_until
        order by u.created_at, u.id
        limit v_left
      );
    end if;
    -- looked up, not joined: a cached plan would compare each row with each user
    v_emails := (
      select jsonb_object_agg(k.id, k.email)
      from tokenlimits.users(array(select distinct p.user_id from unnest(v_page) as p)) as k
    );
    v_rows := v_rows || coalesce((
      select jsonb_agg(
        tokenlimits.usage_json(row(p.*)::public.generation_usage, v_emails ->> p.user_id::text)
        order by p.created_at, p.id
      )
      from unnest(v_page) as p
      where (p_kind is null or p.kind = p_kind) and (p_group_id is null or p.group_id = p_group_id)
    ), '[]');
    v_left := v_left - cardinality(v_page);
    if v_left = 0 then
      v_at := v_page[cardinality(v_page)].created_at;
      v_id := v_page[cardinality(v_page)].id;
      exit;
    end if;
    v_at := v_since;
    v_id := '00000000-0000-0000-0000-000000000000';
    v_group_id := case when p_group_id is null and p_user_id is null then (
      select u.group_id from public.generation_usage as u where u.group_id > v_group_id order by u.group_id limit 1
    ) end;
    exit when v_group_id is null;
  end loop;
  return jsonb_build_object(
    'rows', v_rows,
    'until', v_until,
    'next', case when v_left = 0 or v_group_id is not null then jsonb_build_object(
      'group_id', v_group_id, 'created_at', v_at, 'id', v_id
    ) end
  );
end
$$;
{{ rpc(
  'export_usage',
  ['p_group_id uuid default null', 'p_user_id uuid default null', 'p_kind text default null', 'p_since timestamptz default null', 'p_until timestamptz default null', 'p_after jsonb default null', 'p_page_size integer default 1000'],
  to='authenticated, service_role',
  comment="The ledger, page by page: for the next page, pass this page's 'next' and 'until' as p_after and p_until.",
  volatility='stable'
) }}

-- The sums of each series (a group and a kind) of the rollup, in the order of its key: one look-up finds where the next
-- sum begins, another one adds it up, so unused time costs nothing. p_after is the "next" of the previous page.
create or replace function tokenlimits.export_history(
  p_group_id uuid,
  p_kind text,
  p_bucket text,
  p_since timestamptz,
  p_until timestamptz,
  p_after jsonb,
  p_page_size integer
)
returns jsonb
language plpgsql
stable
-- definer: the rollup is private
security definer
{{ search_path() }}
as $$
declare
  -- how many rows of the rollup a page may read (a month of one kind has up to 47,616), and what a look-up counts as
  c_rows constant integer := 100000;
  c_look_up constant integer := 50;
  v_now timestamptz := tokenlimits.clock();
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, v_now + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_rows_left integer := c_rows;
  v_group_id uuid := coalesce(
    (p_after ->> 'group_id')::uuid, p_group_id, '00000000-0000-0000-0000-000000000000'
  );
  v_kind text := coalesce(p_after ->> 'kind', '');
  v_timezone text := tokenlimits.timezone_of(v_group_id);
  -- where the next sum of this series begins; infinity: the series is finished
  v_at timestamptz := coalesce((p_after ->> 'bucket')::timestamptz, 'infinity');
  v_period tstzrange;
  v_sum record;
  v_rows jsonb[] := '{}';
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_bucket(p_bucket);
  while v_left > 0 and v_rows_left > 0 loop
    v_rows_left := v_rows_left - c_look_up;
    v_at := (
      select r.bucket
      from tokenlimits.usage_rollup as r
      where r.group_id = v_group_id and r.kind = v_kind and r.bucket >= v_at and r.bucket < v_until
      order by r.bucket
      limit 1
    );
    if v_at is null then
      select r.group_id, r.kind into v_group_id, v_kind
      from tokenlimits.usage_rollup as r
      where (r.group_id, r.kind) > (v_group_id, v_kind)
      order by r.group_id, r.kind
      limit 1;
      if v_group_id is null or v_group_id <> p_group_id then
        v_group_id := null;
        exit;
      end if;
      v_timezone := tokenlimits.timezone_of(v_group_id);
      v_at := case
        when v_kind <> p_kind then 'infinity'
        -- whole buckets: the first is the one that contains p_since
        when isfinite(p_since) then lower(tokenlimits.period_of(p_bucket, v_timezone, p_since))
        else coalesce(p_since, '-infinity')
      end;
      continue;
    end if;
    v_period := tokenlimits.period_of(p_bucket, v_timezone, v_at);
    select sum(q.cost) as used, sum(q.generations) as generations, count(*) as rows into v_sum
    from ({{ live_sums('v_now') | indent(4) }}) as q
    where
      q.group_id = v_group_id and q.kind = v_kind and q.bucket >= v_at and q.bucket < least(upper(v_period), v_until);
    if v_sum.generations > 0 then
      v_rows := v_rows || jsonb_build_object(
        'group', jsonb_build_object(
          'id', v_group_id,
          'name', (select g.name from public.user_groups as g where g.id = v_group_id)
        ),
        'timezone', v_timezone,
        'bucket', lower(v_period),
        'kind', v_kind,
        'used', v_sum.used,
        'generations', v_sum.generations
      );
      v_left := v_left - 1;
    end if;
    v_rows_left := v_rows_left - v_sum.rows::integer;
    v_at := upper(v_period);
  end loop;
  return jsonb_build_object(
    'rows', to_jsonb(v_rows),
    'until', v_until,
    'next', case when v_group_id is not null then jsonb_build_object(
      'group_id', v_group_id, 'kind', v_kind, 'bucket', v_at
    ) end
  );
end
$$;
{{ rpc(
  'export_history',
  ['p_group_id uuid default null', 'p_kind text default null', "p_bucket text default 'day'", 'p_since timestamptz default null', 'p_until timestamptz default null', 'p_after jsonb default null', 'p_page_size integer default 1000'],
  to='authenticated, service_role',
  comment="Live usage per group, kind and bucket in the group's time zone, page by page as export_usage.",
  volatility='stable'
) }}

-- Reads one counter per member and member limit: the cost grows with the group, so it isn't part of group_usage.
create or replace function tokenlimits.limit_pressure(p_group_id uuid, p_at_least integer, p_count integer)
returns jsonb
language plpgsql
stable
-- definer: counters are private, and e-mail addresses are not open to admins
security definer
{{ search_path() }}
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_at_least integer := least(greatest(p_at_least, 1), 100);
  v_any_expired boolean := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
  v_group_ids uuid[] := {{ beneath('p_group_id') }};
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    with limits as materialized (
      select
        l.group_id, l.kind, l.period, l.starts, l.scope, l.max, l.counts, l.counter_id, upper(p.range) as until,
        {{ new_since('p.range', 'null', 'p_group_id', 'l.kind', 'p_group_id') | indent(8) }} as since
      from public.group_limits as l
      inner join public.user_groups as g on g.id = l.group_id
      -- a case, since a join's condition may be looked at only after the function has refused a period
      cross join lateral (
        select case when l.starts = 'calendar' then tokenlimits.period_of(l.period, g.timezone, v_now) end as range
      ) as p
      where l.group_id = p_group_id and l.scope = 'member'
    ),

    members as materialized (
      select m.user_id
      from unnest({{ members_beneath('p_group_id') | indent(6) }}) as m (user_id)
    ),

    -- as in limit_states: an open counter says what is used; if a new period has begun since, nothing is used; null
    -- means that there is no counter
    states as (
      select
        l.kind, l.period, l.counts, l.counter_id, m.user_id, l.until,
        case when o.id is not null then o.max else l.max end as max,
        case
          when c.until > v_now then c.since
          else greatest(l.since, c.until, {{ last_reset('p_group_id', 'l.kind', 'm.user_id') | indent(10) }})
        end as since,
        case when c.until > v_now then c.used when c.until is not null then 0 end as used
      from limits as l
      cross join members as m
      left join lateral (
        select k.since, k.until, k.used
        from tokenlimits.counters as k
        where k.subject = m.user_id and k.counter_id = l.counter_id
        offset 0
      ) as c on true
      left join public.limit_overrides as o on {{ overrides_now('o', 'l', 'm.user_id', 'v_now') | indent(6) }}
      where l.starts = 'calendar'
    ),

    counted as (
      select
        s.kind, s.period, s.counts, s.max, s.counter_id, s.user_id, s.since,
        coalesce(
          s.used, tokenlimits.count_limit(v_group_ids, s.user_id, s.kind, s.period, s.counts, s.since, s.until)
        ) as used
      from states as s
      where s.max > 0
    ),

    pressed as materialized (
      select p.max, p.counter_id, p.user_id, p.used, row_number() over (
        partition by p.counter_id order by p.used desc, p.user_id
      ) as place
      from (
        select
          c.max, c.counter_id, c.user_id,
          c.used - case
            when v_any_expired
              then tokenlimits.expired_of_limit(
                v_group_ids, c.user_id, c.kind, c.period, c.counts, c.since, v_now
              )
            else 0
          end as used
        from counted as c
        where c.used * 100::numeric >= c.max * v_at_least::numeric
        union all
        select s.max, s.counter_id, s.subject, s.used
        from unnest(case when exists (select from limits as l where l.starts <> 'calendar') then
          tokenlimits.limit_states(
            p_group_id,
            array(select m.user_id from members as m),
            null,
            v_now
          )
        end) as s
        where s.group_id = p_group_id and s.scope = 'member' and s.starts <> 'calendar' and s.max > 0
      ) as p
      where p.used * 100::numeric >= p.max * v_at_least::numeric
    ),

    shown as materialized (
      select p.counter_id, p.user_id, p.used, p.place
      from pressed as p
      where p.place <= least(greatest(p_count, 0), 1000)
    )

    select jsonb_agg(
      jsonb_build_object(
        'kind', l.kind,
        'period', l.period,
        'starts', l.starts,
        'max', l.max,
        'full', (select count(*) from pressed as p where p.counter_id = l.counter_id and p.used >= p.max),
        'near', (select count(*) from pressed as p where p.counter_id = l.counter_id),
        'members', coalesce((
          select jsonb_agg(
            jsonb_build_object('user_id', s.user_id, 'email', k.email, 'used', s.used)
            order by s.place
          )
          from shown as s
          left join tokenlimits.users(array(select t.user_id from shown as t)) as k on k.id = s.user_id
          where s.counter_id = l.counter_id
        ), '[]')
      )
      order by l.kind, l.counter_id
    )
    from limits as l
    where l.max > 0 or exists (select from pressed as p where p.counter_id = l.counter_id)
  ), '[]');
end
$$;
{{ rpc(
  'limit_pressure',
  ['p_group_id uuid', 'p_at_least integer default 90', 'p_count integer default 100'],
  to='authenticated, service_role',
  comment="How many members have used all, or a percentage, of each member limit of a group, and the first of them.",
  volatility='stable'
) }}

-- Counters don't keep past periods, so this reads the ledger: the cost grows with the requested time, not with the
-- history.
create or replace function tokenlimits.top_members(
  p_group_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_count integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
{{ search_path() }}
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    with top as materialized (
      select u.user_id, sum(u.cost) as used, count(*) as generations
      from public.generation_usage as u
      where
        u.group_id = p_group_id
        and u.created_at >= coalesce(p_since, coalesce(p_until, v_now) - interval '30 days')
        and u.created_at < coalesce(p_until, 'infinity')
        and (p_kind is null or u.kind = p_kind)
        and not {{ is_dead('u', 'v_now') }}
      group by u.user_id
      order by used desc, u.user_id
      limit least(greatest(p_count, 1), 1000)
    )

    select jsonb_agg(to_jsonb(top) || jsonb_build_object('email', k.email) order by top.used desc, top.user_id)
    from top
    left join tokenlimits.users(array(select t.user_id from top as t)) as k on k.id = top.user_id
  ), '[]');
end
$$;
{{ rpc(
  'top_members',
  ['p_group_id uuid', 'p_kind text default null', 'p_since timestamptz default null', 'p_until timestamptz default null', 'p_count integer default 10'],
  to='authenticated, service_role',
  comment="The users with the most usage in a group, including former members; in the last 30 days by default.",
  volatility='stable'
) }}
