-- The state of a group's limits at a moment: read from counters, or counted from rollup and ledger if there is none.
--
-- Invariants
--   * limit_states returns members' limits first, by member, then the group's: the order in which they are locked.
--   * It reads everything in one snapshot, so the counters that it read include the expired holds that it subtracts.

-- Counts what a counter would contain. For a group: whole buckets from the rollup, and the partial buckets before and
-- after them from the ledger, in separate queries: with one query for both, the planner may read all of the group's
-- rows. For a member: from the member's own rows of the ledger.
create or replace function tokenlimits.count_usage(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz
)
returns bigint
language plpgsql
stable
{{ search_path() }}
as $$
declare
  -- least: a minute has no whole bucket
  v_whole timestamptz := least({{ bucket("p_since + interval '15 minutes' - interval '1 us'") }}, p_until);
  v_rest timestamptz := greatest({{ bucket('p_until') }}, v_whole);
begin
  if p_user_id is not null then
    return coalesce((
      select sum(u.cost)
      from public.generation_usage as u
      where
        u.user_id = p_user_id
        and u.created_at >= p_since
        and u.created_at < p_until
        and u.group_id = p_group_id
        and u.kind = p_kind
        and u.status in ('reserved', 'committed')
    ), 0);
  end if;
  return coalesce((
    select sum(r.cost)
    from tokenlimits.usage_rollup as r
    where r.group_id = p_group_id and r.kind = p_kind and r.bucket >= v_whole and r.bucket < v_rest
  ), 0)
  {%- for since, until in [('p_since', 'v_whole'), ('v_rest', 'p_until')] %} + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = p_group_id
      and u.created_at >= {{ since }}
      and u.created_at < {{ until }}
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0)
  {%- endfor %};
end
$$;
{{ private(
  'count_usage(uuid, uuid, text, timestamptz, timestamptz)',
  "Live usage of a kind between two moments, of a member of a group, or of the whole group if the user is null."
) }}

create or replace function tokenlimits.expired_cost(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_at timestamptz
)
returns bigint
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_user_id is not null then
    return coalesce((
      select sum(h.cost)
      from tokenlimits.holds as h
      where
        h.user_id = p_user_id
        and h.group_id = p_group_id
        and h.kind = p_kind
        and h.expires_at <= p_at
        and h.created_at >= p_since
    ), 0);
  end if;
  return coalesce((
    select sum(h.cost)
    from tokenlimits.holds as h
    where h.group_id = p_group_id and h.kind = p_kind and h.expires_at <= p_at and h.created_at >= p_since
  ), 0);
end
$$;
{{ private(
  'expired_cost(uuid, uuid, text, timestamptz, timestamptz)',
  "The cost of expired holds that counters since a moment contain, of a member, or of the group if the user is null."
) }}

create or replace function tokenlimits.limit_states(
  p_group_id uuid,
  p_user_ids uuid[],
  p_kind text,
  p_at timestamptz,
  p_less_expired boolean default true
)
returns tokenlimits.limit_state[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  {{ variables_of_limits() | indent(2) }}
  v record;
  v_state tokenlimits.limit_state;
  -- a counter may be ahead of a clock that was set back; holds expire by the clock
  v_now timestamptz := least(p_at, tokenlimits.clock());
begin
  {{ read_limits(
    'p_group_id', "unnest(case i.scope when 'group' then array[i.group_id] else p_user_ids end)", 'p_kind', 'p_at',
    of_many=true
  ) | indent(2) }}
  if v_states is null then
    return '{}';
  end if;
  if v_is_plain then
    return v_states;
  end if;
  if exists (select from unnest(v_states) as s where s.is_open is not true) then
    -- a counter is missing (a new limit or member), or belongs to another period
    for v in
      select
        s.place,
        upper(p.range) as until,
        {{ new_since('p.range', 's.until', 'p_group_id', 's.kind') | indent(8) }} as since
      from unnest(v_states) with ordinality as s ({{ state_columns() }}, place)
      inner join (
        select d.period, tokenlimits.period_of(d.period, d.timezone, p_at) as range
        from (
          select distinct o.period, o.timezone
          from unnest(v_states) as o
        ) as d
      ) as p on p.period = s.period
      where s.is_open is not true
    loop
      v_state := v_states[v.place];
      v_state.used := case
        when v_state.until is null then tokenlimits.count_usage(
          p_group_id, case v_state.scope when 'member' then v_state.subject end, v_state.kind, v.since, v.until
        )
        else 0
      end;
      v_state.since := v.since;
      v_state.until := v.until;
      v_states[v.place] := v_state;
    end loop;
  end if;
  if p_less_expired and {{ any_expired_of_all('p_group_id', 'p_kind', 'v_now') | indent(2) }} then
    for i in 1..cardinality(v_states) loop
      v_state := v_states[i];
      v_state.expired := tokenlimits.expired_cost(
        p_group_id, case v_state.scope when 'member' then v_state.subject end, v_state.kind, v_state.since, v_now
      );
      v_state.used := v_state.used - v_state.expired;
      v_states[i] := v_state;
    end loop;
  end if;
  return v_states;
end
$$;
{{ private(
  'limit_states(uuid, uuid[], text, timestamptz, boolean)',
  "A group's limits for users, of one kind or of all, with the usage of each at a moment."
) }}

-- The state was read a moment ago. If another call has opened the counter since, that counter stays unchanged.
create or replace function tokenlimits.open_counter(p_state tokenlimits.limit_state)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  insert into tokenlimits.counters as c (subject, counter_id, since, until, used)
  values (p_state.subject, p_state.counter_id, p_state.since, p_state.until, p_state.used)
  on conflict on constraint counters_pkey do update
  set since = excluded.since, until = excluded.until, used = excluded.used
  where c.until <= excluded.since;
  -- new counters are rare, so this is the time to drop those of removed limits, which would otherwise pile up
  if p_state.scope = 'member' then
    perform tokenlimits.drop_stale_counters(p_state.subject);
  end if;
end
$$;
{{ private('open_counter(tokenlimits.limit_state)', 'Creates a counter, or rolls it over into its new period.') }}

create or replace function tokenlimits.drop_stale_counters(p_subject uuid)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  -- skip those that another call is dropping: waiting for them would break the order of locks
  delete from tokenlimits.counters as c
  using (
    select s.subject, s.counter_id
    from tokenlimits.counters as s
    where
      s.subject = p_subject
      and not exists (select from public.group_limits as l where l.counter_id = s.counter_id)
    for update skip locked
  ) as d
  where c.subject = d.subject and c.counter_id = d.counter_id;
end
$$;
{{ private('drop_stale_counters(uuid)', "Drops a subject's counters of removed limits.") }}
