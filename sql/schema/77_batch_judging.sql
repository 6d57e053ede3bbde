-- Many requests in one transaction, second step: judging them, in memory.
--
-- Invariants
--   * Each item is judged by the room that those before it have left, as if it had come alone.
--   * Nothing is written here, and no lock is waited for. Each limit is read once, however many items it applies to.

create or replace function tokenlimits.states_at(
  p_states tokenlimits.limit_state[],
  p_places integer[],
  p_kind text
)
returns tokenlimits.limit_state[]
language plpgsql
immutable
{{ search_path() }}
as $$
declare
  v_no integer;
  v_state tokenlimits.limit_state;
  v_states tokenlimits.limit_state[] := '{}';
begin
  foreach v_no in array p_places loop
    v_state := p_states[v_no];
    v_state.weight := {{ weight_of('v_state', 'p_kind') }};
    v_states := v_states || v_state;
  end loop;
  return v_states;
end
$$;
{{ private(
  'states_at(tokenlimits.limit_state[], integer[], text)',
  "The states at some places, as those of a kind."
) }}

-- Judges the open items in their order, each by the room that those before it have left. Denied items are answered; the
-- others become charges for usages. Also returns the limits by which they were judged, with all charges included.
create or replace function tokenlimits.judge_batch(
  p_at timestamptz,
  inout items tokenlimits.batch_item[],
  out states tokenlimits.limit_state[],
  out usages public.generation_usage[],
  out charges tokenlimits.batch_charge[]
)
returns record
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_ways tokenlimits.group_tree[];
  v record;
  v_item tokenlimits.batch_item;
  v_usage public.generation_usage;
  v_charge tokenlimits.batch_charge;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_observed bigint[];
  v_verdict tokenlimits.verdict;
  v_at timestamptz;
  v_no integer;
  -- the charge that has a key, by the first place of the key
  v_holders integer[] := array_fill(null::integer, array[cardinality(items)]);
  v_holder tokenlimits.batch_charge;
  v_fingerprint uuid;
begin
  states := array(
    -- several groups may have the same above them
    select distinct on (s.subject, s.counter_id) row(s.*)::tokenlimits.limit_state
    from ({{ groups_of('items') | indent(4) }}) as p
    cross join lateral unnest(tokenlimits.limit_states(
      p.group_id, p.user_ids, p.kinds, p_at, p_in_flight => false
    )) as s
    order by s.subject, s.counter_id
  );
  v_ways := {{ ways_up("array(select g.id from unnest(items) as i cross join lateral unnest(i.group_ids) as g (id))") | indent(2) }};
  usages := '{}';
  charges := '{}';
  -- the groups that may pay for each open item, in the order in which they are tried, with the places of their limits;
  -- a row of nulls if none may
  for v in
    select
      i.place,
      g.id as group_id,
      array_agg(
        s.no::integer order by s.kind, s.scope <> 'member', s.level desc, s.counter_id
      ) filter (where s.no is not null) as states,
      coalesce(g.rank = 1, true) as is_first,
      coalesce(g.rank = cardinality(i.group_ids), true) as is_last
    from unnest(items) as i
    left join lateral unnest(i.group_ids) with ordinality as g (id, rank) on true
    left join unnest(v_ways) as t on t.group_id = g.id
    cross join lateral (
      values ('group', t.above_id), ('child', t.child_id), ('member', i.user_id)
    ) as w (scope, subject)
    left join unnest(states) with ordinality as s ({{ state_columns() }}, no)
      on s.group_id = t.above_id and s.scope = w.scope and s.subject = w.subject and {{ counts_kind('s', 'i.kind') }}
    where i.answer is null
    group by i.place, i.group_ids, g.id, g.rank
    order by i.place, g.rank
  loop
    if v.is_first then
      v_item := items[v.place];
      v_at := p_at;
      {{ unjudged('v_item.group_ids') | indent(6) }}
    end if;
    if not v_verdict.allowed and v.states is not null then
      {{ weigh(
        'v.group_id', 'v_item.cost',
        each="foreach v_no in array v.states loop\n  v_state := states[v_no];\n  v_state.weight := "
          ~ weight_of('v_state', 'v_item.kind') ~ ';',
        states='tokenlimits.states_at(states, v.states, v_item.kind)'
      ) | indent(6) }}
      v_charge.states := v.states;
    end if;
    continue when not v.is_last;

    v_fingerprint := {{ fingerprint("'track'", 'v_item.kind', 'v_item.cost', 'v_item.group_id') }};
    v_holder := charges[v_holders[v_item.first_place]];
    -- null unless an earlier item of this batch was charged under the key; the same request is then a replay
    if usages[v_holder.usage].fingerprint = v_fingerprint then
      v_holder.place := v.place;
      v_holder.replayed := true;
      v_holder.observed := null;
      charges := charges || v_holder;
    elsif v_holder is null and v_verdict.allowed then
      v_usage := {{ usage(
        id=usage_id('v_at', home('v_state', 'v_verdict.group_id', 'v_item.user_id')), group_id='v_verdict.group_id', user_id='v_item.user_id',
        kind='v_item.kind', cost='v_item.cost', status="'committed'", idempotency_key='v_item.idempotency_key',
        fingerprint='v_fingerprint', metadata='v_item.metadata', created_at='v_at', settled_at='v_at'
      ) | indent(6) }};
      usages := usages || v_usage;
      v_charge.place := v.place;
      v_charge.usage := cardinality(usages);
      v_charge.used := '{}';
      v_charge.observed := v_verdict.observed;
      v_charge.replayed := false;
      -- in memory only: the items to come find less room
      foreach v_no in array v_charge.states loop
        v_state := states[v_no];
        v_state.used := v_state.used + v_item.cost * {{ weight_of('v_state', 'v_item.kind') }};
        if v_state.reset_at = 'infinity' then
          -- it is the first use in this window
          v_state.reset_at := case v_state.starts
            when 'rolling' then v_state.until + 60 * tokenlimits.part_of(v_state.period)
          end;
        end if;
        states[v_no] := v_state;
        v_charge.used := v_charge.used || v_state.used;
      end loop;
      charges := charges || v_charge;
      if v_item.first_place is not null then
        v_holders[v_item.first_place] := cardinality(charges);
      end if;
    else
      items[v.place].answer := tokenlimits.deny_item(v_item, v_verdict, usages[v_holder.usage].id);
    end if;
  end loop;
end
$$;
{{ private(
  'judge_batch(timestamptz, tokenlimits.batch_item[])',
  "Judges the items of a batch in order; writes nothing."
) }}
