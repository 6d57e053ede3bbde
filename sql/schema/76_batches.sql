-- Many requests in one transaction: read, judged in memory, written, until a verdict holds.
--
-- Invariants
--   * The answers are those that single calls in that order would get. A bad request doesn't touch the others: what a
--     single call raises is an answer here, of reason 'refused'.
--   * An item is open until it has an answer; what was answered is never judged, and writes nothing. The first place of
--     a key stands for all the places that have it.
--   * The stripes of all groups are held, shared, before any limit is read. Each limit is read once, however many items
--     it binds, and each counter is moved once.
--   * With p_max_wait, no lock is waited for longer: what somebody holds is answered 'busy', and the rest goes on.

do $do$
begin
  if to_regtype('tokenlimits.batch_item') is null then
    -- one request; it needs nothing more once it has an answer
    create type tokenlimits.batch_item as (
      place integer,
      user_id uuid,
      kind text,
      cost bigint,
      idempotency_key text,
      group_id uuid,
      metadata jsonb,
      -- the first place with the same key
      first_place integer,
      -- those that may pay, in the order in which they are tried
      group_ids uuid[],
      -- the usage that had the key before, and counts no more
      dead_id uuid,
      answer jsonb
    );
    -- what an item is charged for: the place of its usage among those that are written, of its limits among those that
    -- the batch is about, and what was used of them right after it; a repeated key is the same usage, replayed
    create type tokenlimits.batch_charge as (
      place integer,
      usage integer,
      states integer[],
      used bigint[],
      replayed boolean
    );
  end if;
end
$do$;

-- Answers what a single call would raise.
create or replace function tokenlimits.refused(
  p_item tokenlimits.batch_item,
  p_code text,
  p_message text,
  p_detail text,
  p_hint text
)
returns jsonb
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.reason := 'refused';
  return tokenlimits.answer(v_verdict, p_item.kind, p_item.cost, null, p_replayed => false)
    || jsonb_build_object(
      'error', concat_ws('. ', p_message, nullif(p_hint, '')), 'code', p_code, 'detail', nullif(p_detail, '')
    );
end
$$;
{{ private(
  'refused(tokenlimits.batch_item, text, text, text, text)',
  "The answer to a request of a batch that a single call would refuse with this error."
) }}

create or replace function tokenlimits.read_request(p_request jsonb, p_place integer)
returns tokenlimits.batch_item
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_item tokenlimits.batch_item;
  {{ variables_of_an_error() | indent(2) }}
begin
  v_item.place := p_place;
  v_item.kind := {{ request_field('p_request', 'kind') }};
  v_item.user_id := {{ request_field('p_request', 'user_id') }};
  v_item.cost := {{ request_field('p_request', 'cost') }};
  v_item.idempotency_key := {{ request_field('p_request', 'idempotency_key') }};
  v_item.group_id := {{ request_field('p_request', 'group_id') }};
  v_item.metadata := {{ request_field('p_request', 'metadata') }};
  if ({{ is_item('v_item') | indent(2) }}) is not true then
    perform tokenlimits.refuse_request(
      v_item.user_id, v_item.kind, v_item.cost, v_item.idempotency_key, v_item.metadata
    );
  end if;
  return v_item;
exception
  when sqlstate 'TL001' or data_exception then
    {{ answer_error('v_item', 'v_item.answer') | indent(4) }}
    return v_item;
end
$$;
{{ private('read_request(jsonb, integer)', "One request of a batch; a bad one is answered.") }}

-- All at once where all are good, for a block with an exception costs as much as reading ten.
create or replace function tokenlimits.read_requests(p_requests jsonb)
returns tokenlimits.batch_item[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_items tokenlimits.batch_item[];
  v_default uuid[] := {{ default_group() }};
  v record;
begin
  if jsonb_typeof(p_requests) is distinct from 'array' or jsonb_array_length(p_requests) > 1000 then
    perform tokenlimits.refuse(
      'TL001', 'requests: must be a JSON array of at most 1000 requests', 'requests', 'Nothing was recorded.'
    );
  end if;
  begin
    select
      array_agg(
        row(
          r.place,
          {{ request_field('r.request', 'user_id') }},
          {{ request_field('r.request', 'kind') }},
          {{ request_field('r.request', 'cost') }},
          {{ request_field('r.request', 'idempotency_key') }},
          {{ request_field('r.request', 'group_id') }},
          {{ request_field('r.request', 'metadata') }},
          null, null, null, null
        )::tokenlimits.batch_item
        order by r.place
      )
    into v_items
    from jsonb_array_elements(p_requests) with ordinality as r (request, place);
    for v in
      select i.place
      from unnest(v_items) as i
      where ({{ is_item('i') | indent(6) }}) is not true
    loop
      v_items[v.place] := tokenlimits.read_request(p_requests -> (v.place - 1), v.place);
    end loop;
  exception
    when data_exception then
      select array_agg(tokenlimits.read_request(r.request, r.place::integer) order by r.place) into v_items
      from jsonb_array_elements(p_requests) with ordinality as r (request, place);
  end;
  return array(
    select
      row(
        i.place, i.user_id, i.kind, i.cost, i.idempotency_key, i.group_id, i.metadata,
        case when i.idempotency_key is not null and i.answer is null then
          min(i.place) filter (where i.answer is null) over (partition by i.user_id, i.idempotency_key)
        end,
        case when i.answer is null then {{ pinned('coalesce(o.ids, v_default)', 'i.group_id') | indent(8) }} end,
        null,
        i.answer
      )::tokenlimits.batch_item
    from unnest(v_items) as i
    left join (
      select m.user_id, array_agg(g.id order by {{ paying_order() }}) as ids
      from public.group_memberships as m
      inner join public.user_groups as g on g.id = m.group_id
      where m.user_id = any(array(select u.user_id from unnest(v_items) as u where u.answer is null))
      group by m.user_id
    ) as o on o.user_id = i.user_id
    order by i.place
  );
end
$$;
{{ private('read_requests(jsonb)', "The requests of a batch.") }}

-- Answers the items whose keys have a live usage, and notes which keys a dead one has.
create or replace function tokenlimits.replay(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v record;
begin
  for v in
    select i.place
    from unnest(p_items) as i
    inner join public.generation_usage as u on u.idempotency_key = i.idempotency_key and u.user_id = i.user_id
    where i.answer is null
  loop
    p_items[v.place] := tokenlimits.replay_item(p_items[v.place]);
  end loop;
  return p_items;
end
$$;
{{ private(
  'replay(tokenlimits.batch_item[])',
  "A batch with the items answered whose idempotency keys are taken."
) }}

create or replace function tokenlimits.replay_item(p_item tokenlimits.batch_item)
returns tokenlimits.batch_item
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_under_key record;
  {{ variables_of_an_error() | indent(2) }}
begin
  v_under_key := tokenlimits.usage_under_key(
    p_item.user_id, p_item.idempotency_key,
    {{ fingerprint("'track'", 'p_item.kind', 'p_item.cost', 'p_item.group_id') }}
  );
  p_item.dead_id := v_under_key.dead_id;
  if (v_under_key.live).id is not null then
    p_item.answer := tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
  end if;
  return p_item;
exception
  when sqlstate 'TL008' then
    {{ answer_error('p_item', 'p_item.answer') | indent(4) }}
    return p_item;
end
$$;
{{ private(
  'replay_item(tokenlimits.batch_item)',
  "An item, answered when its idempotency key is taken."
) }}

-- Why an item is not charged: its key is another item's, its group doesn't exist, or it is denied. Before that its key
-- is looked at again, as a single call does: who took the last room meanwhile may have done so under this very key.
create or replace function tokenlimits.deny_item(
  p_item tokenlimits.batch_item,
  p_verdict tokenlimits.verdict,
  p_holder_id uuid
)
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_answer jsonb;
  {{ variables_of_an_error() | indent(2) }}
begin
  if p_holder_id is not null then
    perform tokenlimits.refuse_key(p_item.idempotency_key, p_holder_id);
  elsif p_item.idempotency_key is not null then
    p_item := tokenlimits.replay_item(p_item);
  end if;
  if p_item.answer is null and p_verdict.reason = 'not_in_group' then
    perform tokenlimits.refuse_group('track', p_item.group_id);
  end if;
  return coalesce(
    p_item.answer, tokenlimits.answer(p_verdict, p_item.kind, p_item.cost, null, p_replayed => false)
  );
exception
  when sqlstate 'TL002' or sqlstate 'TL008' then
    {{ answer_error('p_item', 'v_answer') | indent(4) }}
    return v_answer;
end
$$;
{{ private(
  'deny_item(tokenlimits.batch_item, tokenlimits.verdict, uuid)',
  "The answer to an item that is not charged."
) }}

create or replace function tokenlimits.states_at(p_states tokenlimits.limit_state[], p_places integer[])
returns tokenlimits.limit_state[]
language plpgsql
immutable
{{ search_path() }}
as $$
begin
  return array(
    select p_states[p.place]
    from unnest(p_places) with ordinality as p (place, no)
    order by p.no
  );
end
$$;
{{ private('states_at(tokenlimits.limit_state[], integer[])', "Those of some states.") }}

-- Judges the open items in their order, each by what those before it have left. What is denied is answered; the others
-- become charges for usages. Answers also the limits that they were judged by, with all charges in them.
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
  v record;
  v_item tokenlimits.batch_item;
  v_usage public.generation_usage;
  v_charge tokenlimits.batch_charge;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_verdict tokenlimits.verdict;
  v_at timestamptz;
  v_no integer;
  -- by the first place of a key: which charge has it
  v_holders integer[] := array_fill(null::integer, array[cardinality(items)]);
  v_holder tokenlimits.batch_charge;
  v_fingerprint uuid;
begin
  states := array(
    select row(s.*)::tokenlimits.limit_state
    from ({{ pairs_of('items') | indent(4) }}) as p
    cross join lateral unnest(tokenlimits.limit_states(p.group_id, p.user_ids, p.kind, p_at)) as s
  );
  usages := '{}';
  charges := '{}';
  -- the groups that may pay for each open item, in the order in which they are tried, with the places of their limits;
  -- a row of nulls where no group may
  for v in
    select
      i.place,
      g.id as group_id,
      array_agg(s.no::integer order by s.no) filter (where s.no is not null) as states,
      coalesce(g.rank = 1, true) as is_first,
      coalesce(g.rank = cardinality(i.group_ids), true) as is_last
    from unnest(items) as i
    left join lateral unnest(i.group_ids) with ordinality as g (id, rank) on true
    cross join lateral (values ('group', g.id), ('member', i.user_id)) as w (scope, subject)
    left join unnest(states) with ordinality as s ({{ state_columns() }}, no)
      on s.group_id = g.id and s.kind = i.kind and s.scope = w.scope and s.subject = w.subject
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
        each='foreach v_no in array v.states loop\n  v_state := states[v_no];',
        states='tokenlimits.states_at(states, v.states)'
      ) | indent(6) }}
      v_charge.states := v.states;
    end if;
    continue when not v.is_last;

    v_fingerprint := {{ fingerprint("'track'", 'v_item.kind', 'v_item.cost', 'v_item.group_id') }};
    v_holder := charges[v_holders[v_item.first_place]];
    if usages[v_holder.usage].fingerprint = v_fingerprint then
      v_holder.place := v.place;
      v_holder.replayed := true;
      charges := charges || v_holder;
    elsif v_holder is null and v_verdict.allowed then
      v_usage := {{ usage(
        id=usage_id('v_at', 'v_verdict.group_id'), group_id='v_verdict.group_id', user_id='v_item.user_id',
        kind='v_item.kind', cost='v_item.cost', status="'committed'", idempotency_key='v_item.idempotency_key',
        fingerprint='v_fingerprint', metadata='v_item.metadata', created_at='v_at', settled_at='v_at'
      ) | indent(6) }};
      usages := usages || v_usage;
      v_charge.place := v.place;
      v_charge.usage := cardinality(usages);
      v_charge.used := '{}';
      v_charge.replayed := false;
      foreach v_no in array v_charge.states loop
        states[v_no].used := states[v_no].used + v_item.cost;
        v_charge.used := v_charge.used || states[v_no].used;
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
  "Judges the items of a batch in their order; writes nothing."
) }}

-- Writes the usages of a batch, and sweeps. Answers the counters that were moved as they are then; null, with nothing
-- written, when they have moved on meanwhile, or when somebody held a row for too long: is_held, and by which group it
-- was, if that is known.
--
-- This block has no other in it: who waits for a row of an inner one that was ended waits for the whole transaction,
-- and goes on doing so when the outer one is taken back. They would block each other.
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
  v_moves tokenlimits.usage_move[];
  {{ variables_of_moves() | indent(2) }}
begin
  is_held := false;
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
    array(select p.group_id from ({{ pairs_of('p_items') | indent(6) }}) as p order by p.group_id, p.kind),
    array(select p.kind from ({{ pairs_of('p_items') | indent(6) }}) as p order by p.group_id, p.kind),
    p_at
  );
  {{ move_all('v_moves', 'p_at') | indent(2) }}
  moved := v_moved;
exception
  when sqlstate 'TL099' then
    moved := null;
  when lock_not_available then
    moved := null;
    is_held := true;
    held_group_id := v_moving;
end
$$;
{{ private(
  'write_batch(tokenlimits.batch_item[], public.generation_usage[], tokenlimits.batch_charge[], timestamptz)',
  "Writes what a batch is charged for, and sweeps."
) }}

-- Answers what was charged: each sees the counters as they were right after it, also where others have moved them since
-- they were read. Where holds have expired, the verdict knows better than the counter what is used.
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
    v_tightest := null;
    for i in 1..cardinality(v_charge.states) loop
      v_state := p_states[v_charge.states[i]];
      v_state.used := v_charge.used[i] + v_others[v_charge.states[i]];
      {{ add_limit('v_state') | indent(6) }}
    end loop;
    p_items[v_charge.place].answer := {{ answer(
      kind='v_usage.kind', cost='v_usage.cost', group_id='v_usage.group_id', group_name='v_state.group_name',
      usage_id='v_usage.id', status='v_usage.status', expires_at='v_usage.expires_at', replayed='v_charge.replayed'
    ) | indent(4) }};
  end loop;
  return p_items;
end
$$;
{{ private(
  'answer_charges(tokenlimits.batch_item[], tokenlimits.limit_state[], public.generation_usage[], tokenlimits.batch_charge[], tokenlimits.limit_state[])',
  "A batch with its charges answered."
) }}

-- Answers the open items that a group may pay for; all when it is null.
create or replace function tokenlimits.answer_busy(p_items tokenlimits.batch_item[], p_group_id uuid)
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
  v_verdict.group_id := p_group_id;
  foreach v_item in array p_items loop
    if v_item.answer is null and (p_group_id is null or p_group_id = any(v_item.group_ids)) then
      p_items[v_item.place].answer := tokenlimits.answer(
        v_verdict, v_item.kind, v_item.cost, null, p_replayed => false
      );
    end if;
  end loop;
  return p_items;
end
$$;
{{ private(
  'answer_busy(tokenlimits.batch_item[], uuid)',
  "A batch with the items answered whose group is held by somebody else."
) }}

-- Takes the stripes of all groups; answers the items of those that could not be had in time.
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
    from ({{ pairs_of('p_items') | indent(4) }}) as p
    group by p.group_id
    order by {{ stripe('p.group_id') }}, p.group_id
  );
  v_group_id uuid;
begin
  perform tokenlimits.lock_groups(v_group_ids);
  return p_items;
exception
  when lock_not_available then
    foreach v_group_id in array v_group_ids loop
      begin
        perform tokenlimits.lock_groups(array[v_group_id]);
      exception
        when lock_not_available then
          p_items := tokenlimits.answer_busy(p_items, v_group_id);
      end;
    end loop;
    return p_items;
end
$$;
{{ private('lock_batch(tokenlimits.batch_item[])', "Holds the limits of a batch's groups still.") }}

create or replace function tokenlimits.track_generations(p_requests jsonb, p_max_wait bigint)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
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
    -- never before the moment that an earlier round came to, or a clock that was set back would go round for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    v_items := tokenlimits.replay(v_items);
    v_judged := tokenlimits.judge_batch(v_at, v_items);
    v_at := greatest(v_at, (select max(u.created_at) from unnest(v_judged.usages) as u));
    v_written := tokenlimits.write_batch(v_items, v_judged.usages, v_judged.charges, v_at);
    exit when v_written.moved is not null;
    if v_written.is_held then
      v_items := tokenlimits.answer_busy(v_items, v_written.held_group_id);
    end if;
  end loop;
  v_items := tokenlimits.answer_charges(
    v_judged.items, v_judged.states, v_judged.usages, v_judged.charges, v_written.moved
  );
  perform set_config('lock_timeout', v_lock_timeout, true);
  return coalesce((select jsonb_agg(i.answer order by i.place) from unnest(v_items) as i), '[]');
end
$$;

-- Each request is an object with the arguments of track_generation (without p_), and is answered at the same place. One
-- that track_generation would refuse with an error has the reason 'refused'. With p_max_wait, those whose group
-- somebody else holds for more than so many milliseconds have the reason 'busy', and may be asked again.
{{ rpc(
  'track_generations',
  ['p_requests jsonb', 'p_max_wait bigint default null'],
  to='service_role',
  comment="Tracks up to 1,000 generations in one transaction: each is judged by itself, in this order."
) }}
