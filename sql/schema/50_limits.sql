-- The state of limits at a moment: read from counters, or counted from rollup and ledger if there is none.
--
-- Invariants
--   * limit_states returns members' limits first, then those of groups, the deepest first: the order of locks.
--   * A plain limit's counter says what is used. Others need more: limit_states and open_counter know what.
--   * It reads everything in one snapshot, so the counters that it read include the expired holds that it subtracts.

-- Counts what a counter would contain. For groups: whole buckets from the rollup, and the partial buckets before and
-- after them from the ledger, in separate queries: with one query for both, the planner may read all rows of a group.
-- For a member: from the member's own rows of the ledger.
create or replace function tokenlimits.count_usage(
  p_group_ids uuid[],
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
        and u.group_id = any(p_group_ids)
        and u.kind = p_kind
        and u.status in ('reserved', 'committed')
    ), 0);
  end if;
  return coalesce((
    select sum(r.cost)
    from tokenlimits.usage_rollup as r
    where r.group_id = any(p_group_ids) and r.kind = p_kind and r.bucket >= v_whole and r.bucket < v_rest
  ), 0)
  {%- for since, until in [('p_since', 'v_whole'), ('v_rest', 'p_until')] %} + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = any(p_group_ids)
      and u.created_at >= {{ since }}
      and u.created_at < {{ until }}
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0)
  {%- endfor %};
end
$$;
{{ private(
  'count_usage(uuid[], uuid, text, timestamptz, timestamptz)',
  "Live usage of a kind in some groups between two moments, of one user, or of all if the user is null."
) }}

create or replace function tokenlimits.expired_cost(
  p_group_ids uuid[],
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
        and h.group_id = any(p_group_ids)
        and h.kind = p_kind
        and h.expires_at <= p_at
        and h.created_at >= p_since
    ), 0);
  end if;
  return coalesce((
    select sum(h.cost)
    from tokenlimits.holds as h
    where h.group_id = any(p_group_ids) and h.kind = p_kind and h.expires_at <= p_at and h.created_at >= p_since
  ), 0);
end
$$;
{{ private(
  'expired_cost(uuid[], uuid, text, timestamptz, timestamptz)',
  "The cost of expired holds in some groups that counters since a moment contain, of one user, or of all if null."
) }}

create or replace function tokenlimits.count_holds(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_expired_at timestamptz default 'infinity'
)
returns bigint
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_user_id is not null then
    return (
      select count(*)
      from tokenlimits.holds as h
      where
        h.user_id = p_user_id and h.group_id = any(p_group_ids) and h.kind = p_kind and h.expires_at <= p_expired_at
    );
  end if;
  return (
    select count(*)
    from tokenlimits.holds as h
    where h.group_id = any(p_group_ids) and h.kind = p_kind and h.expires_at <= p_expired_at
  );
end
$$;
{{ private(
  'count_holds(uuid[], uuid, text, timestamptz)',
  "How many holds in some groups are unswept, or expired at a moment, of one user, or of all if the user is null."
) }}

create or replace function tokenlimits.count_limit(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_period text,
  p_counts jsonb,
  p_since timestamptz,
  p_until timestamptz
)
returns bigint
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_period = 'in_flight' then
    return tokenlimits.count_holds(p_group_ids, p_user_id, p_kind);
  elsif p_counts is null then
    return tokenlimits.count_usage(p_group_ids, p_user_id, p_kind, p_since, p_until);
  end if;
  return (
    select sum(w.value::bigint * tokenlimits.count_usage(p_group_ids, p_user_id, w.key, p_since, p_until))::bigint
    from jsonb_each_text(p_counts) as w
  );
end
$$;
{{ private(
  'count_limit(uuid[], uuid, text, text, jsonb, timestamptz, timestamptz)',
  "What a limit counts between two moments, whether it counts a kind, the kinds of a pool, or holds: see count_usage."
) }}

create or replace function tokenlimits.expired_of_limit(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_period text,
  p_counts jsonb,
  p_since timestamptz,
  p_at timestamptz
)
returns bigint
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_period = 'in_flight' then
    return tokenlimits.count_holds(p_group_ids, p_user_id, p_kind, p_at);
  elsif p_counts is null then
    return tokenlimits.expired_cost(p_group_ids, p_user_id, p_kind, p_since, p_at);
  end if;
  return (
    select sum(w.value::bigint * tokenlimits.expired_cost(p_group_ids, p_user_id, w.key, p_since, p_at))::bigint
    from jsonb_each_text(p_counts) as w
  );
end
$$;
{{ private(
  'expired_of_limit(uuid[], uuid, text, text, jsonb, timestamptz, timestamptz)',
  "What expired holds take from a limit: see expired_cost."
) }}

create or replace function tokenlimits.anchor_of(p_state tokenlimits.limit_state)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return coalesce(
    (
      select min(coalesce(m.anchor_at, m.joined_at))
      from public.group_memberships as m
      inner join tokenlimits.group_tree as t on t.group_id = m.group_id
      where p_state.scope = 'member' and t.above_id = p_state.group_id and m.user_id = p_state.subject
    ),
    (
      select coalesce(g.anchor_at, g.created_at)
      from public.user_groups as g
      where g.id = {{ home_of('p_state') }}
    )
  );
end
$$;
{{ private(
  'anchor_of(tokenlimits.limit_state)',
  "From when anchored periods are counted: of a member since the earliest membership, otherwise of the group."
) }}

-- When the window began that a usage has opened, of a limit whose counter is missing: at the oldest live usage whose
-- window has not ended. Usage that was recorded for the past opens none.
create or replace function tokenlimits.opened_at(p_state tokenlimits.limit_state, p_at timestamptz)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
declare
  -- two days more, since months differ; what is too old is left out below
  v_since timestamptz := greatest(
    p_at - tokenlimits.length_of(p_state.period) - interval '2 days',
    {{ last_reset(home_of('p_state'), 'p_state.kind', 'p_state.subject') | indent(4) }}
  );
begin
  return (
    select u.created_at
    from {{ live_usage_of('p_state', 'v_since') | indent(4) }} as u
    where
      (u.reserved_cost is not null or u.settled_at = u.created_at)
      and not {{ is_dead('u', 'p_at') }}
      and tokenlimits.end_of(p_state.period, p_state.timezone, u.created_at) > p_at
    order by u.created_at
    limit 1
  );
end
$$;
{{ private(
  'opened_at(tokenlimits.limit_state, timestamptz)',
  "When the current window of a limit was opened by a first use, if any is known from the ledger."
) }}

create or replace function tokenlimits.recorded_parts(p_state tokenlimits.limit_state)
returns table (part timestamptz, used bigint)
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return query
  select {{ part_at('v_part', 'u.created_at') }}, sum(u.cost * {{ weight_of('p_state', 'u.kind') }})::bigint
  from {{ live_usage_of('p_state', 'p_state.since') | indent(2) }} as u
  group by 1;
end
$$;
{{ private(
  'recorded_parts(tokenlimits.limit_state)',
  "What is used in each part of a rolling window, according to the ledger."
) }}

create or replace function tokenlimits.used_parts(p_state tokenlimits.limit_state, p_at timestamptz)
returns table (part timestamptz, used bigint)
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return query
  select q.part, sum(q.used)::bigint
  from (
    select c.part, c.used
    from tokenlimits.counter_parts as c
    where c.subject = p_state.subject and c.counter_id = p_state.counter_id
    union all
    select r.part, r.used
    from tokenlimits.recorded_parts(p_state) as r
    where p_state.is_open is null
    union all
    select {{ part_at('v_part', 'h.created_at') }}, -h.cost * {{ weight_of('p_state', 'h.kind') }}
    from tokenlimits.holds as h
    where
      h.group_id = any({{ counted_groups('p_state') }})
      and {{ counts_kind('p_state', 'h.kind') }} and h.expires_at <= p_at
      and (p_state.scope <> 'member' or h.user_id = p_state.subject)
      and h.created_at >= p_state.since
  ) as q
  where q.part > p_state.since - v_part
  group by q.part;
end
$$;
{{ private(
  'used_parts(tokenlimits.limit_state, timestamptz)',
  "What is used in each part of a rolling window, less expired holds; from the ledger, if there is no counter yet."
) }}

-- A part that began at a moment leaves the window one length after its end.
create or replace function tokenlimits.rolling_room_at(p_state tokenlimits.limit_state, p_cost bigint)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return coalesce(
    (
      select q.part + 61 * v_part
      from (
        select p.part, sum(p.used) over (order by p.part) as gone
        from tokenlimits.used_parts(p_state, tokenlimits.clock()) as p
      ) as q
      where p_state.used - q.gone + p_cost <= p_state.max
      order by q.part
      limit 1
    ),
    -- what a batch is about to use is in no part yet
    p_state.until + 60 * v_part
  );
end
$$;
{{ private(
  'rolling_room_at(tokenlimits.limit_state, bigint)',
  "When a rolling window will have room for a cost."
) }}

-- When as many live holds of the subject have expired as are in the way of one more.
create or replace function tokenlimits.next_place_at(p_state tokenlimits.limit_state)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return coalesce((
    select h.expires_at
    from tokenlimits.holds as h
    where
      h.group_id = any({{ counted_groups('p_state') }})
      and h.kind = p_state.kind and h.expires_at > tokenlimits.clock()
      and (p_state.scope <> 'member' or h.user_id = p_state.subject)
    order by h.expires_at
    offset greatest(p_state.used - p_state.max, 0)
    limit 1
  ), tokenlimits.clock());
end
$$;
{{ private('next_place_at(tokenlimits.limit_state)', "When one more hold will have a place, if none ends before.") }}

-- When a full limit will have room for a cost; infinity: never by itself. Under an override, that may be when it ends.
create or replace function tokenlimits.room_at(p_state tokenlimits.limit_state, p_cost bigint)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_until timestamptz := case
    when p_cost > p_state.max then 'infinity'
    when p_state.period = 'in_flight' then tokenlimits.next_place_at(p_state)
    when p_state.starts = 'rolling' then tokenlimits.rolling_room_at(p_state, p_cost)
    else p_state.until
  end;
  v_override_ends timestamptz := p_state.overridden_until;
begin
  if v_override_ends > tokenlimits.clock() and v_override_ends <= v_until and isfinite(v_override_ends) then
    p_state.max := p_state.own_max;
    p_state.overridden_until := null;
    return case
      when {{ has_room('p_state.max', 'p_state.used', 'p_cost') }} then v_override_ends
      else greatest(v_override_ends, tokenlimits.room_at(p_state, p_cost))
    end;
  end if;
  return v_until;
end
$$;
{{ private(
  'room_at(tokenlimits.limit_state, bigint)',
  "When a full limit will have room for a cost."
) }}

-- Completes a state whose counter is missing, or belongs to another period, or doesn't say when there is room again.
create or replace function tokenlimits.complete_state(
  p_state tokenlimits.limit_state,
  p_window tstzrange,
  p_at timestamptz
)
returns tokenlimits.limit_state
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_user_id uuid := case p_state.scope when 'member' then p_state.subject end;
  v_opened_at timestamptz;
  v_override public.limit_overrides;
begin
  if p_state.is_open is null then
    -- a counter would have it
    select * into v_override
    from public.limit_overrides as o
    where {{ overrides_now('o', 'p_state', 'p_state.subject', 'p_at') | indent(4) }};
    if found then
      p_state.max := v_override.max;
      p_state.overridden_until := coalesce(v_override.until, 'infinity');
    end if;
  end if;
  if p_state.is_open is not true then
    if p_window is null then
      p_window := tokenlimits.window_of(
        p_state.period, p_state.starts, p_state.timezone,
        case p_state.starts when 'anchor' then tokenlimits.anchor_of(p_state) end, p_at
      );
    end if;
    if p_state.starts = 'first_use' then
      v_opened_at := case when p_state.until is null then tokenlimits.opened_at(p_state, p_at) end;
      if v_opened_at is null then
        p_state.reset_at := 'infinity';
      else
        p_window := tstzrange(
          v_opened_at, tokenlimits.end_of(p_state.period, p_state.timezone, v_opened_at)
        );
      end if;
    end if;
    p_state.since := case
      -- a reset takes no hold away
      when p_state.period = 'in_flight' then lower(p_window)
      else {{ new_since(
        'p_window', "case when p_state.starts <> 'rolling' then p_state.until end",
        home_of('p_state'), 'p_state.kind', 'p_state.subject'
      ) | indent(6) }}
    end;
    -- statements of their own: a subquery costs time to set up, even where it isn't needed
    if p_state.until is null then
      p_state.used := tokenlimits.count_limit(
        {{ counted_groups('p_state') }},
        v_user_id, p_state.kind, p_state.period, p_state.counts, p_state.since, upper(p_window)
      );
    elsif p_state.starts = 'rolling' then
      p_state.used := coalesce((
        select sum(c.used)
        from tokenlimits.counter_parts as c
        where
          c.subject = p_state.subject and c.counter_id = p_state.counter_id and c.part >= lower(p_window)
      ), 0);
    else
      p_state.used := 0;
    end if;
    p_state.until := upper(p_window);
  end if;
  return p_state;
end
$$;
{{ private(
  'complete_state(tokenlimits.limit_state, tstzrange, timestamptz)',
  "A state whose counter was not current, as of a moment."
) }}

create or replace function tokenlimits.next_leaving(p_state tokenlimits.limit_state, p_at timestamptz)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return coalesce((
    select min(q.part) + 61 * v_part
    from tokenlimits.used_parts(p_state, p_at) as q
    where q.used > 0
  ), 'infinity');
end
$$;
{{ private(
  'next_leaving(tokenlimits.limit_state, timestamptz)',
  "When the oldest usage leaves a rolling window; infinity if there is none."
) }}

{#
Of states as they were read into v_states: completes those whose counter is missing, or belongs to another period, and
subtracts expired holds, if there are any. Lines, not a function: to pass states to one costs as much.
#}
{%- macro complete_states(at) -%}
-- calendar periods are the same for all
for v in
  select s.place, p.range
  from unnest(v_states) with ordinality as s ({{ state_columns() }}, place)
  left join (
    select d.period, d.timezone, tokenlimits.period_of(d.period, d.timezone, {{ at }}) as range
    from (
      select distinct o.period, o.timezone
      from unnest(v_states) as o
      where o.starts = 'calendar' and o.is_open is not true
    ) as d
  ) as p on p.period = s.period and p.timezone = s.timezone and s.starts = 'calendar'
  where s.is_open is not true
loop
  v_states[v.place] := tokenlimits.complete_state(v_states[v.place], v.range, {{ at }});
end loop;
for i in 1..cardinality(v_states) loop
  continue when not v_any_expired and (v_states[i]).starts <> 'rolling';
  v_state := v_states[i];
  if v_any_expired then
    v_state.expired := tokenlimits.expired_of_limit(
      {{ counted_groups('v_state') }},
      case v_state.scope when 'member' then v_state.subject end, v_state.kind, v_state.period,
      v_state.counts, v_state.since, v_now
    );
    v_state.used := v_state.used - v_state.expired;
  end if;
  if v_state.starts = 'rolling' then
    v_state.reset_at := tokenlimits.next_leaving(v_state, v_now);
  end if;
  v_states[i] := v_state;
end loop;
{%- endmacro %}
{%- macro variables_of_completion() -%}
v record;
v_state tokenlimits.limit_state;
v_any_expired boolean;
-- a counter may be ahead of a clock that was set back; holds expire by the clock
v_now timestamptz := least(p_at, tokenlimits.clock());
{%- endmacro %}
create or replace function tokenlimits.limit_states(
  p_group_id uuid,
  p_user_ids uuid[],
  p_kinds text[],
  p_at timestamptz,
  p_less_expired boolean default true,
  p_in_flight boolean default true
)
returns tokenlimits.limit_state[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  {{ variables_of_limits() | indent(2) }}
  {{ variables_of_completion() | indent(2) }}
begin
  {{ read_limits(
    'p_group_id',
    "unnest(case i.scope
      when 'group' then array[i.group_id]
      -- one that was deleted has no pool any more
      when 'child' then array(select c.id from public.user_groups as c where c.id = t.child_id)
      else p_user_ids
    end)",
    'p_kinds', 'p_at', in_flight='p_in_flight', of_many=true
  ) | indent(2) }}
  if v_states is null then
    return '{}';
  elsif v_is_plain then
    return v_states;
  end if;
  v_any_expired := p_less_expired and {{ any_expired_of_all('p_group_id', 'p_kinds', 'v_now') | indent(2) }};
  {{ complete_states('p_at') | indent(2) }}
  return v_states;
end
$$;
{{ private(
  'limit_states(uuid, uuid[], text[], timestamptz, boolean, boolean)',
  "The limits of a group and of all above it, for users, that count some kinds or (null) any, with the usage of each."
) }}

create or replace function tokenlimits.child_pools(p_group_ids uuid[], p_at timestamptz)
returns tokenlimits.limit_state[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  {{ variables_of_limits() | indent(2) }}
  {{ variables_of_completion() | indent(2) }}
begin
  v_any_expired := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
  {{ read_limits(
    '', 't.child_id', '(null::text[])', 'p_at', in_flight='true', of_many=true, expired='v_any_expired',
    which="i.scope = 'child' and t.distance = 1 and t.group_id = any(array(
      select c.id
      from public.user_groups as c
      where c.id = any(p_group_ids) or c.parent_id = any(p_group_ids)
    ))"
  ) | indent(2) }}
  if v_states is null then
    return '{}';
  elsif v_is_plain then
    return v_states;
  end if;
  {{ complete_states('p_at') | indent(2) }}
  return v_states;
end
$$;
{{ private(
  'child_pools(uuid[], timestamptz)',
  "The pools of some groups and of their children in child limits, with the usage of each at a moment."
) }}

-- The state was read a moment ago. If another call has opened the counter since, that counter stays unchanged. Returns
-- whether it was counted from the ledger, with all of its parts. Otherwise a rolling counter keeps those that still
-- count: they are read again now, under its lock.
create or replace function tokenlimits.open_counter(p_state tokenlimits.limit_state)
returns boolean
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_is_new boolean;
begin
  insert into tokenlimits.counters as c (
    subject, counter_id, since, until, used, override_max, overridden_until
  )
  values (
    p_state.subject, p_state.counter_id, p_state.since, p_state.until, p_state.used,
    case when p_state.overridden_until is not null then p_state.max end, p_state.overridden_until
  )
  on conflict on constraint counters_pkey do update
  set since = excluded.since, until = excluded.until, used = excluded.used
  where c.until <= excluded.since or (p_state.starts = 'rolling' and c.until < excluded.until)
  -- of a new row
  returning c.xmax = 0 into v_is_new;
  if p_state.starts = 'rolling' and v_is_new then
    insert into tokenlimits.counter_parts (subject, counter_id, part, used)
    select p_state.subject, p_state.counter_id, r.part, r.used
    from tokenlimits.recorded_parts(p_state) as r;
  elsif p_state.starts = 'rolling' and found then
    delete from tokenlimits.counter_parts as p
    where
      p.subject = p_state.subject and p.counter_id = p_state.counter_id
      and p.part <= p_state.since - tokenlimits.part_of(p_state.period);
    update tokenlimits.counters as c
    set used = coalesce((
      select sum(p.used)
      from tokenlimits.counter_parts as p
      where p.subject = c.subject and p.counter_id = c.counter_id
    ), 0)
    where c.subject = p_state.subject and c.counter_id = p_state.counter_id;
  end if;
  -- new counters are rare, so this is the time to drop those of removed limits, which would otherwise pile up
  if p_state.scope = 'member' then
    perform tokenlimits.drop_stale_counters(p_state.subject);
  end if;
  return v_is_new is true;
end
$$;
{{ private('open_counter(tokenlimits.limit_state)', 'Creates a counter, or rolls it over into its new period.') }}

-- The counter is locked: it has just been moved.
create or replace function tokenlimits.move_parts(
  p_state tokenlimits.limit_state,
  p_moves tokenlimits.usage_move[]
)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  insert into tokenlimits.counter_parts as p (subject, counter_id, part, used)
  select
    p_state.subject, p_state.counter_id, {{ part_at('v_part', 'm.created_at') }} as part,
    sum(m.cost * {{ weight_of('p_state', 'm.kind') }})
  from unnest(p_moves) as m
  where
    m.group_id = any({{ counted_groups('p_state') }}) and {{ counts_kind('p_state', 'm.kind') }}
    and (p_state.scope <> 'member' or m.user_id = p_state.subject)
    and m.created_at >= p_state.since
  group by 3
  on conflict on constraint counter_parts_pkey do update
  set used = p.used + excluded.used;
end
$$;
{{ private(
  'move_parts(tokenlimits.limit_state, tokenlimits.usage_move[])',
  "Moves the parts of a rolling counter by the moves that it counts."
) }}

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
