-- Many requests in one transaction: read (76), judged (77), written, and judged again until a verdict holds.
--
-- Invariants
--   * The answers are those that single calls in that order would get, and a denial doesn't affect the others.
--   * All groups' stripes are held in shared mode before any limit is read. Each counter is moved once.
--   * With p_max_wait, no lock is waited for longer: items of a locked group are answered 'busy', and the rest
--     continues.

-- Writes the usages of a batch, and sweeps. Returns the moved counters with their new values. If a counter has changed
-- since it was read, nothing is written, and moved is null; likewise if a row was locked for too long: then is_held is
-- true, and held_group_id names the group, if it is known.
--
-- This block contains no inner block: whoever waits for a row of an inner block that has ended waits for the whole
-- transaction, and keeps waiting even after the outer block is rolled back. Two batches would block each other.
create or replace function tokenlimits.write_batch(
  p_items tokenlimits.batch_item[],
  p_usages public.generation_usage[],
  p_charges tokenlimits.batch_charge[],
  p_at timestamptz,
  out moved tokenlimits.limit_state[],
  out is_held boolean,
  out held_group_id uuid
)
returns record
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_group_ids uuid[];
  v_kinds text[];
  v_moves tokenlimits.usage_move[];
  {{ variables_of_moves() | indent(2) }}
begin
  is_held := false;
  select array_agg(p.group_id), array_agg(k.kind) into v_group_ids, v_kinds
  from ({{ groups_of('p_items') | indent(2) }}) as p
  cross join lateral unnest(p.kinds) as k (kind);
  v_moves := tokenlimits.write_ledger(
    p_usages,
    array(
      select i.dead_id
      from unnest(p_charges) as c
      inner join unnest(p_items) as i on i.place = c.place
      where not c.replayed
      order by c.usage
    ),
    true,
    v_group_ids,
    v_kinds,
    p_at
  );
  {{ move_all('v_moves', 'p_at') | indent(2) }}
  moved := v_moved;
exception
  when sqlstate 'TL099' then
    moved := null;
  when lock_not_available then
    -- what was written is rolled back, so the locks are free while the rest is judged again
    moved := null;
    is_held := true;
    held_group_id := v_moving;
end
$$;
{{ private(
  'write_batch(tokenlimits.batch_item[], public.generation_usage[], tokenlimits.batch_charge[], timestamptz)',
  "Writes the usages of a batch, and sweeps."
) }}

-- Answers the charged items. Each answer has the counters as they were right after its item, including what others have
-- moved since the counters were read. With expired holds, the verdict, not the counter, says what is used.
create or replace function tokenlimits.answer_charges(
  p_items tokenlimits.batch_item[],
  p_states tokenlimits.limit_state[],
  p_usages public.generation_usage[],
  p_charges tokenlimits.batch_charge[],
  p_moved tokenlimits.limit_state[]
)
returns tokenlimits.batch_item[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_others bigint[] := array_fill(0::bigint, array[cardinality(p_states)]);
  v record;
  v_charge tokenlimits.batch_charge;
  v_usage public.generation_usage;
  v_state tokenlimits.limit_state;
  v_group_name text;
  {{ variables_of_answer() | indent(2) }}
begin
  for v in
    select s.no, m.used - s.used as others
    from unnest(p_states) with ordinality as s ({{ state_columns() }}, no)
    inner join unnest(p_moved) as m on m.counter_id = s.counter_id and m.subject = s.subject
    where s.expired is null and m.used <> s.used
  loop
    v_others[v.no] := v.others;
  end loop;
  foreach v_charge in array p_charges loop
    v_usage := p_usages[v_charge.usage];
    v_limits := '{}';
    v_would_deny := '{}';
    v_tightest := null;
    for i in 1..cardinality(v_charge.states) loop
      v_state := p_states[v_charge.states[i]];
      v_state.used := v_charge.used[i] + v_others[v_charge.states[i]];
      v_state.weight := {{ weight_of('v_state', 'v_usage.kind') }};
      {{ add_limit('v_state', observed='v_charge.observed', payer='v_usage.group_id') | indent(6) }}
    end loop;
    {{ read_name('v_state', 'v_usage.group_id') | indent(4) }}
    p_items[v_charge.place].answer := {{ answer(
      kind='v_usage.kind', cost='v_usage.cost', group_id='v_usage.group_id',
      group_name='v_group_name',
      usage_id='v_usage.id', status='v_usage.status', expires_at='v_usage.expires_at', replayed='v_charge.replayed'
    ) | indent(4) }};
  end loop;
  return p_items;
end
$$;
{{ private(
  'answer_charges(tokenlimits.batch_item[], tokenlimits.limit_state[], public.generation_usage[], tokenlimits.batch_charge[], tokenlimits.limit_state[])',
  "A batch, with its charged items answered."
) }}

-- Answers 'busy' to the open items that one of some groups may pay for; to all open items if they are null.
create or replace function tokenlimits.answer_busy(p_items tokenlimits.batch_item[], p_group_ids uuid[])
returns tokenlimits.batch_item[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_item tokenlimits.batch_item;
  v_verdict tokenlimits.verdict;
begin
  v_verdict.reason := 'busy';
  foreach v_item in array p_items loop
    if v_item.answer is null and (p_group_ids is null or p_group_ids && v_item.group_ids) then
      v_verdict.group_id := (
        select g.id
        from unnest(v_item.group_ids) with ordinality as g (id, place)
        where g.id = any(p_group_ids)
        order by g.place
        limit 1
      );
      p_items[v_item.place].answer := tokenlimits.answer(
        v_verdict, v_item.kind, v_item.cost, null, p_replayed => false
      );
    end if;
  end loop;
  return p_items;
end
$$;
{{ private(
  'answer_busy(tokenlimits.batch_item[], uuid[])',
  "A batch, with those items answered whose group is locked by another transaction."
) }}

-- Takes the stripes of all groups; answers the items of those groups whose stripe was not free in time.
create or replace function tokenlimits.lock_batch(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  -- in the order of their stripes
  v_group_ids uuid[] := array(
    select p.group_id
    from ({{ groups_of('p_items') | indent(4) }}) as p
    order by {{ stripe('p.group_id') }}, p.group_id
  );
  v_group_id uuid;
begin
  perform tokenlimits.lock_groups(v_group_ids);
  return p_items;
exception
  when lock_not_available then
    -- at least one stripe is taken, and all others were given back: one by one, in the same order, to find out which
    foreach v_group_id in array v_group_ids loop
      begin
        perform tokenlimits.lock_groups(array[v_group_id]);
      exception
        when lock_not_available then
          p_items := tokenlimits.answer_busy(p_items, array[v_group_id]);
      end;
    end loop;
    return p_items;
end
$$;
{{ private('lock_batch(tokenlimits.batch_item[])', "Keeps the limits of a batch's groups unchanged.") }}

create or replace function tokenlimits.track_generations(p_requests jsonb, p_max_wait bigint)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
{{ search_path() }}
as $$
declare
  v_lock_timeout text := current_setting('lock_timeout');
  v_items tokenlimits.batch_item[] := tokenlimits.read_requests(p_requests);
  v_at timestamptz;
  v_judged record;
  v_written record;
begin
  if p_max_wait not between 1 and 60000 then
    perform tokenlimits.refuse(
      'TL001', 'max_wait: must be from 1 to 60000 milliseconds, or null', 'max_wait', 'Nothing was recorded.'
    );
  elsif p_max_wait is not null then
    perform set_config('lock_timeout', p_max_wait::text, true);
  end if;
  v_items := tokenlimits.lock_batch(v_items);
  loop
    -- never before the moment that an earlier round reached, or a clock that was set back would loop for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    v_items := tokenlimits.replay(v_items);
    v_judged := tokenlimits.judge_batch(v_at, v_items);
    v_written := tokenlimits.write_batch(v_items, v_judged.usages, v_judged.charges, v_at);
    exit when v_written.moved is not null;
    v_at := greatest(v_at, (select max(u.created_at) from unnest(v_judged.usages) as u));
    if v_written.is_held then
      -- a counter of that group: it counts for all beneath it
      v_items := tokenlimits.answer_busy(
        v_items, case when v_written.held_group_id is not null then {{ beneath('v_written.held_group_id') }} end
      );
    end if;
  end loop;
  v_items := tokenlimits.answer_charges(
    v_judged.items, v_judged.states, v_judged.usages, v_judged.charges, v_written.moved
  );
  perform set_config('lock_timeout', v_lock_timeout, true);
  return coalesce((select json_agg(i.answer order by i.place) from unnest(v_items) as i), '[]');
end
$$;

-- Each request is an object with the arguments of track_generation (without p_), and is answered at the same place. One
-- for which track_generation would raise an error has the reason 'refused'. With p_max_wait, requests whose group is
-- locked for more than that many milliseconds have the reason 'busy', and may be sent again.
{{ rpc(
  'track_generations',
  ['p_requests jsonb', 'p_max_wait bigint default null'],
  to='service_role',
  comment="Tracks up to 1,000 generations in one transaction: each is judged separately, in this order.",
  returns='json'
) }}
