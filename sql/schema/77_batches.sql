-- Many requests in one transaction: each is judged by itself, in the order given.
--
-- Invariants
--   * The answers are those that single calls in that order would get. A denial or a bad request doesn't touch the
--     others: what a single call raises is an answer here, of reason 'refused'.
--   * Judging is in memory, and nothing is written before the last verdict. If a counter then has no room any more, all
--     is taken back and judged again.
--   * Locks in the order of 30_counters.sql, over the whole batch: stripes, ledger rows by id, keys in order, then by
--     group and kind the rollup and the counters. So batches that overlap never deadlock.

-- One request. It needs nothing more once it has an answer.
do $do$
begin
  if to_regtype('tokenlimits.batch_item') is null then
    create type tokenlimits.batch_item as (
      place integer,
      user_id uuid,
      kind text,
      cost bigint,
      idempotency_key text,
      group_id uuid,
      metadata jsonb,
      fingerprint uuid,
      -- the first place with the same key
      first_place integer,
      -- those that may pay, in the order in which they are tried
      group_ids uuid[],
      -- the usage that had the key before, and counts no more
      dead_id uuid,
      answer jsonb
    );
  end if;
end
$do$;

-- What an item is charged for, and the places of its limits among those that the batch is about. A repeated key in one
-- batch is a charge of the same usage, replayed.
do $do$
begin
  if to_regtype('tokenlimits.batch_charge') is null then
    create type tokenlimits.batch_charge as (
      place integer,
      usage public.generation_usage,
      states integer[],
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
set search_path = ''
as $$
begin
  return tokenlimits.answer(p_item.kind, p_item.cost, 'refused', null, '{}', null, null, p_replayed => false)
    || jsonb_build_object(
      'error', concat_ws('. ', p_message, nullif(p_hint, '')), 'code', p_code, 'detail', nullif(p_detail, '')
    );
end
$$;
comment on function tokenlimits.refused(tokenlimits.batch_item, text, text, text, text)
is 'The answer to a request of a batch that a single call would refuse with this error.';
revoke execute on function tokenlimits.refused(tokenlimits.batch_item, text, text, text, text)
from public, anon, authenticated;

create or replace function tokenlimits.read_request(p_request jsonb, p_place integer)
returns tokenlimits.batch_item
language plpgsql
stable
set search_path = ''
as $$
declare
  v_item tokenlimits.batch_item;
  v_message text;
  v_detail text;
  v_hint text;
begin
  v_item.place := p_place;
  v_item.kind := p_request ->> 'kind';
  v_item.user_id := p_request ->> 'user_id';
  v_item.cost := case when p_request ? 'cost' then p_request ->> 'cost' else '1' end;
  v_item.idempotency_key := p_request ->> 'idempotency_key';
  v_item.group_id := p_request ->> 'group_id';
  v_item.metadata := nullif(p_request -> 'metadata', 'null');
  perform tokenlimits.check_request(
    v_item.user_id, v_item.kind, v_item.cost, v_item.idempotency_key, v_item.metadata
  );
  v_item.fingerprint := md5(concat_ws(' ', 'track', v_item.kind, v_item.cost, v_item.group_id))::uuid;
  v_item.group_ids := tokenlimits.paying_groups(v_item.user_id, v_item.group_id);
  return v_item;
exception
  when sqlstate 'TL001' or data_exception then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    v_item.answer := tokenlimits.refused(v_item, sqlstate, v_message, v_detail, v_hint);
    return v_item;
end
$$;
comment on function tokenlimits.read_request(jsonb, integer) is 'One request of a batch; a bad one is answered.';
revoke execute on function tokenlimits.read_request(jsonb, integer) from public, anon, authenticated;

create or replace function tokenlimits.read_requests(p_requests jsonb)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_items tokenlimits.batch_item[];
  v record;
begin
  if jsonb_typeof(p_requests) is distinct from 'array' or jsonb_array_length(p_requests) > 1000 then
    perform tokenlimits.refuse(
      'TL001', 'requests: must be a JSON array of at most 1000 requests', 'requests', 'Nothing was recorded.'
    );
  end if;
  select array_agg(tokenlimits.read_request(r.request, r.place::integer) order by r.place) into v_items
  from jsonb_array_elements(p_requests) with ordinality as r (request, place);
  for v in
    select i.place, min(i.place) over (partition by i.user_id, i.idempotency_key) as first_place
    from unnest(v_items) as i
    where i.idempotency_key is not null and i.answer is null
  loop
    v_items[v.place].first_place := v.first_place;
  end loop;
  return coalesce(v_items, '{}');
end
$$;
comment on function tokenlimits.read_requests(jsonb) is 'The requests of a batch.';
revoke execute on function tokenlimits.read_requests(jsonb) from public, anon, authenticated;

-- Answers the items whose keys have a live usage, and notes which keys a dead one has.
create or replace function tokenlimits.replay(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v record;
  v_item tokenlimits.batch_item;
  v_live public.generation_usage;
  v_message text;
  v_detail text;
  v_hint text;
begin
  for v in
    select i.place, u.id
    from unnest(p_items) as i
    inner join public.generation_usage as u on u.idempotency_key = i.idempotency_key and u.user_id = i.user_id
    where i.answer is null
  loop
    v_item := p_items[v.place];
    begin
      v_live := tokenlimits.usage_under_key(v_item.user_id, v_item.idempotency_key, v_item.fingerprint);
      if v_live.id is null then
        v_item.dead_id := v.id;
      else
        v_item.answer := tokenlimits.answer(
          v_item.kind, v_live.cost, null, v_live.group_id,
          tokenlimits.limit_states(
            v_live.group_id, array[v_item.user_id], v_item.kind, tokenlimits.clock()
          ),
          null, v_live, p_replayed => true
        );
      end if;
    exception
      when sqlstate 'TL008' then
        get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
        v_item.answer := tokenlimits.refused(v_item, sqlstate, v_message, v_detail, v_hint);
    end;
    p_items[v.place] := v_item;
  end loop;
  return p_items;
end
$$;
comment on function tokenlimits.replay(tokenlimits.batch_item[])
is 'A batch with the items answered whose idempotency keys are taken.';
revoke execute on function tokenlimits.replay(tokenlimits.batch_item[]) from public, anon, authenticated;

create or replace function tokenlimits.batch_pairs(p_items tokenlimits.batch_item[])
returns table (group_id uuid, kind text, user_ids uuid[])
language plpgsql
immutable
set search_path = ''
as $$
begin
  return query
  select g.id, i.kind, array_agg(distinct i.user_id)
  from unnest(p_items) as i
  cross join lateral unnest(i.group_ids) as g (id)
  where i.answer is null
  group by g.id, i.kind;
end
$$;
comment on function tokenlimits.batch_pairs(tokenlimits.batch_item[])
is 'The groups and kinds that the open items of a batch are about, and the users of each.';
revoke execute on function tokenlimits.batch_pairs(tokenlimits.batch_item[]) from public, anon, authenticated;

-- Every limit that the open items are about, once, and the group that each belongs to.
create or replace function tokenlimits.batch_states(
  p_items tokenlimits.batch_item[],
  p_at timestamptz,
  out states tokenlimits.limit_state[],
  out group_ids uuid[]
)
returns record
language plpgsql
stable
set search_path = ''
as $$
begin
  select
    coalesce(array_agg(
      row(
        s.counter_id, s.subject, s.kind, s.period, s.scope, s.max, s.since, s.until, s.used, s.expired, s.is_open
      )::tokenlimits.limit_state
      order by p.group_id, p.kind, s.place
    ), '{}'),
    coalesce(array_agg(p.group_id order by p.group_id, p.kind, s.place), '{}')
  into states, group_ids
  from tokenlimits.batch_pairs(p_items) as p
  cross join lateral unnest(
    tokenlimits.limit_states(p.group_id, p.user_ids, p.kind, p_at)
  ) with ordinality as s (
    counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, place
  );
end
$$;
comment on function tokenlimits.batch_states(tokenlimits.batch_item[], timestamptz)
is 'The limits that a batch is about, and their groups.';
revoke execute on function tokenlimits.batch_states(tokenlimits.batch_item[], timestamptz)
from public, anon, authenticated;

-- The groups that may pay for each open item, in the order in which they are tried, with the places of their limits; a
-- row of nulls where no group may.
create or replace function tokenlimits.batch_options(
  p_items tokenlimits.batch_item[],
  p_states tokenlimits.limit_state[],
  p_group_ids uuid[]
)
returns table (place integer, group_id uuid, states integer[], is_first boolean, is_last boolean)
language plpgsql
immutable
set search_path = ''
as $$
begin
  return query
  select
    i.place,
    g.id,
    array_agg(s.no::integer order by s.no) filter (where s.no is not null),
    coalesce(g.rank = 1, true),
    coalesce(g.rank = cardinality(i.group_ids), true)
  from unnest(p_items) as i
  left join lateral unnest(i.group_ids) with ordinality as g (id, rank) on true
  cross join lateral (values (g.id), (i.user_id)) as w (subject)
  left join rows from (unnest(p_states), unnest(p_group_ids)) with ordinality as s (
    counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, group_id, no
  ) on s.group_id = g.id and s.kind = i.kind and s.subject = w.subject
  where i.answer is null
  group by i.place, i.group_ids, g.id, g.rank
  order by i.place, g.rank;
end
$$;
comment on function tokenlimits.batch_options(tokenlimits.batch_item[], tokenlimits.limit_state[], uuid[])
is 'Who may pay for which item of a batch.';
revoke execute on function tokenlimits.batch_options(tokenlimits.batch_item[], tokenlimits.limit_state[], uuid[])
from public, anon, authenticated;

create or replace function tokenlimits.states_at(p_states tokenlimits.limit_state[], p_places integer[])
returns tokenlimits.limit_state[]
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_states tokenlimits.limit_state[] := '{}';
  v_place integer;
begin
  foreach v_place in array coalesce(p_places, '{}') loop
    v_states := v_states || p_states[v_place];
  end loop;
  return v_states;
end
$$;
comment on function tokenlimits.states_at(tokenlimits.limit_state[], integer[]) is 'Those of some states.';
revoke execute on function tokenlimits.states_at(tokenlimits.limit_state[], integer[])
from public, anon, authenticated;

create or replace function tokenlimits.batch_usage(p_item tokenlimits.batch_item, p_verdict tokenlimits.verdict)
returns public.generation_usage
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_usage public.generation_usage;
begin
  v_usage.id := tokenlimits.uuid_v7();
  v_usage.group_id := p_verdict.group_id;
  v_usage.user_id := p_item.user_id;
  v_usage.kind := p_item.kind;
  v_usage.cost := p_item.cost;
  v_usage.status := 'committed';
  v_usage.idempotency_key := p_item.idempotency_key;
  v_usage.fingerprint := p_item.fingerprint;
  v_usage.metadata := coalesce(p_item.metadata, '{}');
  v_usage.created_at := p_verdict.at;
  v_usage.settled_at := p_verdict.at;
  return v_usage;
end
$$;
comment on function tokenlimits.batch_usage(tokenlimits.batch_item, tokenlimits.verdict)
is 'What an allowed item writes into the ledger.';
revoke execute on function tokenlimits.batch_usage(tokenlimits.batch_item, tokenlimits.verdict)
from public, anon, authenticated;

-- Why an item is not charged: its key is another one's, its group doesn't exist, or it is denied.
create or replace function tokenlimits.batch_denial(
  p_item tokenlimits.batch_item,
  p_verdict tokenlimits.verdict,
  p_holder_id uuid
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
declare
  v_message text;
  v_detail text;
  v_hint text;
begin
  if p_holder_id is not null then
    perform tokenlimits.refuse_key(p_item.idempotency_key, p_holder_id);
  elsif p_verdict.reason = 'not_in_group' and p_item.group_id is not null then
    perform tokenlimits.require_group(p_item.group_id);
  end if;
  return tokenlimits.answer(
    p_item.kind, p_item.cost, p_verdict.reason, p_verdict.group_id, p_verdict.states, p_verdict.denied_by, null,
    p_replayed => false
  );
exception
  when sqlstate 'TL002' or sqlstate 'TL008' then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    return tokenlimits.refused(p_item, sqlstate, v_message, v_detail, v_hint);
end
$$;
comment on function tokenlimits.batch_denial(tokenlimits.batch_item, tokenlimits.verdict, uuid)
is 'The answer to an item that is not charged.';
revoke execute on function tokenlimits.batch_denial(tokenlimits.batch_item, tokenlimits.verdict, uuid)
from public, anon, authenticated;

-- Judges the open items one after another, each by what those before it have left. Denied ones are answered; the others
-- become charges. Answers also the limits that they were judged by, with all charges in them.
create or replace function tokenlimits.judge_batch(
  p_at timestamptz,
  inout items tokenlimits.batch_item[],
  out states tokenlimits.limit_state[],
  out charges tokenlimits.batch_charge[]
)
returns record
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_group_ids uuid[];
  v record;
  v_item tokenlimits.batch_item;
  v_verdict tokenlimits.verdict;
  v_charge tokenlimits.batch_charge;
  v_no integer;
  -- by the first place of a key: which charge has it
  v_holders integer[] := array_fill(null::integer, array[cardinality(items)]);
  v_holder integer;
begin
  select b.states, b.group_ids into states, v_group_ids
  from tokenlimits.batch_states(items, p_at) as b;
  charges := '{}';
  for v in
    select *
    from tokenlimits.batch_options(items, states, v_group_ids)
  loop
    if v.is_first then
      v_item := items[v.place];
      v_verdict := tokenlimits.unjudged(v_item.group_ids, p_at);
    end if;
    if not v_verdict.allowed and v.states is not null then
      v_verdict := tokenlimits.weigh(
        v_verdict, v.group_id, tokenlimits.states_at(states, v.states), v_item.cost
      );
      v_charge.states := v.states;
    end if;
    continue when not v.is_last;

    v_holder := v_holders[v_item.first_place];
    if v_holder is not null and (charges[v_holder].usage).fingerprint = v_item.fingerprint then
      v_charge := charges[v_holder];
      v_charge.place := v.place;
      v_charge.replayed := true;
      charges := charges || v_charge;
    elsif v_holder is null and v_verdict.allowed then
      v_charge.place := v.place;
      v_charge.usage := tokenlimits.batch_usage(v_item, v_verdict);
      v_charge.replayed := false;
      charges := charges || v_charge;
      foreach v_no in array v_charge.states loop
        states[v_no].used := states[v_no].used + v_item.cost;
      end loop;
      if v_item.first_place is not null then
        v_holders[v_item.first_place] := cardinality(charges);
      end if;
    else
      items[v.place].answer := tokenlimits.batch_denial(v_item, v_verdict, (charges[v_holder].usage).id);
    end if;
  end loop;
end
$$;
comment on function tokenlimits.judge_batch(timestamptz, tokenlimits.batch_item[])
is 'Judges the items of a batch in their order; writes nothing.';
revoke execute on function tokenlimits.judge_batch(timestamptz, tokenlimits.batch_item[])
from public, anon, authenticated;

-- Writes the usages of a batch, and sweeps the expired holds of every group and kind that it is about. Answers the
-- counters that were moved as they are then; null, with nothing written, when they have moved on meanwhile, or when
-- somebody held a row for too long: is_held, and by which group it was, if that is known.
--
-- This block has no other in it: who waits for a row of an inner one that was ended waits for the whole transaction,
-- and goes on doing so when the outer one is taken back. They would block each other.
create or replace function tokenlimits.write_batch(
  p_items tokenlimits.batch_item[],
  p_charges tokenlimits.batch_charge[],
  p_at timestamptz,
  out moved tokenlimits.limit_state[],
  out is_held boolean,
  out held_group_id uuid
)
returns record
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_dead uuid[] := array(
    select i.dead_id
    from unnest(p_items) as i
    inner join unnest(p_charges) as c on c.place = i.place
    where i.dead_id is not null
  );
  v_written bigint;
  v record;
begin
  is_held := false;
  moved := '{}';
  perform tokenlimits.lock_usages(v_dead || array(
    select unnest(tokenlimits.expired_holds(p.group_id, p.kind, p_at))
    from tokenlimits.batch_pairs(p_items) as p
  ));
  perform tokenlimits.free_keys(v_dead, p_at);

  insert into public.generation_usage as u (
    id, group_id, user_id, kind, cost, status, idempotency_key, fingerprint, metadata, created_at, settled_at
  )
  select
    (c.usage).id, (c.usage).group_id, (c.usage).user_id, (c.usage).kind, (c.usage).cost, (c.usage).status,
    (c.usage).idempotency_key, (c.usage).fingerprint, (c.usage).metadata,
    (c.usage).created_at, (c.usage).settled_at
  from unnest(p_charges) as c
  where not c.replayed
  order by (c.usage).idempotency_key, (c.usage).user_id
  on conflict on constraint generation_usage_key_key do nothing;
  get diagnostics v_written = row_count;
  if v_written < (select count(*) from unnest(p_charges) as c where not c.replayed) then
    -- somebody has taken a key since it was looked at
    raise sqlstate 'TL099';
  end if;

  for v in
    select
      p.group_id,
      p.kind,
      tokenlimits.expired_holds(p.group_id, p.kind, p_at) as expired,
      coalesce(m.moves, '{}') as moves
    from tokenlimits.batch_pairs(p_items) as p
    left join (
      select
        (c.usage).group_id,
        (c.usage).kind,
        array_agg(
          row((c.usage).user_id, (c.usage).created_at, (c.usage).cost, 1)::tokenlimits.usage_move
        ) as moves
      from unnest(p_charges) as c
      where not c.replayed
      group by (c.usage).group_id, (c.usage).kind
    ) as m on m.group_id = p.group_id and m.kind = p.kind
    order by p.group_id, p.kind
  loop
    held_group_id := v.group_id;
    v.moves := tokenlimits.expire(v.expired, p_at) || v.moves;
    continue when v.moves = '{}';
    moved := moved || tokenlimits.move_usage(v.group_id, v.kind, v.moves, p_at, p_enforce => true);
  end loop;
exception
  when sqlstate 'TL099' then
    moved := null;
  when lock_not_available then
    moved := null;
    is_held := true;
end
$$;
comment on function tokenlimits.write_batch(tokenlimits.batch_item[], tokenlimits.batch_charge[], timestamptz)
is 'Writes what a batch is charged for, and sweeps.';
revoke execute on function tokenlimits.write_batch(
  tokenlimits.batch_item[], tokenlimits.batch_charge[], timestamptz
) from public, anon, authenticated;

-- Answers what was charged, from the last to the first: each sees the counters as they were right after it.
create or replace function tokenlimits.batch_answers(
  p_items tokenlimits.batch_item[],
  p_charges tokenlimits.batch_charge[],
  p_states tokenlimits.limit_state[],
  p_moved tokenlimits.limit_state[]
)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v record;
  v_charge tokenlimits.batch_charge;
  v_no integer;
begin
  for v in
    select s.no, m.used
    from unnest(p_states) with ordinality as s (
      counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, no
    )
    inner join unnest(p_moved) as m on m.counter_id = s.counter_id and m.subject = s.subject
  loop
    p_states[v.no].used := v.used;
  end loop;
  for i in reverse cardinality(p_charges)..1 loop
    v_charge := p_charges[i];
    p_items[v_charge.place].answer := tokenlimits.answer(
      (v_charge.usage).kind, (v_charge.usage).cost, null, (v_charge.usage).group_id,
      tokenlimits.states_at(p_states, v_charge.states), null, v_charge.usage, v_charge.replayed
    );
    continue when v_charge.replayed;
    foreach v_no in array v_charge.states loop
      p_states[v_no].used := p_states[v_no].used - (v_charge.usage).cost;
    end loop;
  end loop;
  return p_items;
end
$$;
comment on function tokenlimits.batch_answers(
  tokenlimits.batch_item[], tokenlimits.batch_charge[], tokenlimits.limit_state[], tokenlimits.limit_state[]
) is 'A batch with its charges answered.';
revoke execute on function tokenlimits.batch_answers(
  tokenlimits.batch_item[], tokenlimits.batch_charge[], tokenlimits.limit_state[], tokenlimits.limit_state[]
) from public, anon, authenticated;

-- Answers the open items that a group may pay for; all when it is null.
create or replace function tokenlimits.answer_busy(p_items tokenlimits.batch_item[], p_group_id uuid)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_item tokenlimits.batch_item;
begin
  foreach v_item in array p_items loop
    if v_item.answer is null and (p_group_id is null or p_group_id = any(v_item.group_ids)) then
      p_items[v_item.place].answer := tokenlimits.answer(
        v_item.kind, v_item.cost, 'busy', p_group_id, '{}', null, null, p_replayed => false
      );
    end if;
  end loop;
  return p_items;
end
$$;
comment on function tokenlimits.answer_busy(tokenlimits.batch_item[], uuid)
is 'A batch with the items answered whose group is held by somebody else.';
revoke execute on function tokenlimits.answer_busy(tokenlimits.batch_item[], uuid) from public, anon, authenticated;

-- Takes the stripes of all groups; answers the items of those that could not be had in time.
create or replace function tokenlimits.lock_batch(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_group_ids uuid[] := array(select distinct p.group_id from tokenlimits.batch_pairs(p_items) as p);
  v_group_id uuid;
begin
  perform tokenlimits.lock_groups(v_group_ids);
  return p_items;
exception
  when lock_not_available then
    -- no wait is for ever now, so the order is of no account
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
comment on function tokenlimits.lock_batch(tokenlimits.batch_item[])
is 'Holds the limits of a batch''s groups still.';
revoke execute on function tokenlimits.lock_batch(tokenlimits.batch_item[]) from public, anon, authenticated;

create or replace function tokenlimits.track_many(p_requests jsonb, p_max_wait bigint)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_lock_timeout text := current_setting('lock_timeout');
  v_items tokenlimits.batch_item[] := tokenlimits.read_requests(p_requests);
  v_judged tokenlimits.batch_item[];
  v_states tokenlimits.limit_state[];
  v_charges tokenlimits.batch_charge[];
  v_at timestamptz;
  v record;
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
    v_at := greatest(tokenlimits.clock(), v_at);
    v_items := tokenlimits.replay(v_items);
    select j.items, j.states, j.charges into v_judged, v_states, v_charges
    from tokenlimits.judge_batch(v_at, v_items) as j;
    select w.moved, w.is_held, w.held_group_id into v
    from tokenlimits.write_batch(v_items, v_charges, v_at) as w;
    exit when v.moved is not null;
    if v.is_held then
      v_items := tokenlimits.answer_busy(v_items, v.held_group_id);
    end if;
  end loop;
  v_items := tokenlimits.batch_answers(v_judged, v_charges, v_states, v.moved);
  perform set_config('lock_timeout', v_lock_timeout, true);
  return coalesce((select jsonb_agg(i.answer order by i.place) from unnest(v_items) as i), '[]');
end
$$;
comment on function tokenlimits.track_many(jsonb, bigint) is 'What track_generations does.';
revoke execute on function tokenlimits.track_many(jsonb, bigint) from public, anon, authenticated;
grant execute on function tokenlimits.track_many(jsonb, bigint) to service_role;

-- Each request is an object with the arguments of track_generation (without p_), and is answered at the same place. One
-- that track_generation would refuse with an error has the reason 'refused'. With p_max_wait, those whose group
-- somebody else holds for more than so many milliseconds have the reason 'busy', and may be asked again.
create or replace function public.track_generations(p_requests jsonb, p_max_wait bigint default null)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.track_many(tokenlimits.json_argument(p_requests), p_max_wait);
end
$$;
comment on function public.track_generations(jsonb, bigint)
is 'Tracks up to 1,000 generations in one transaction: each is judged by itself, in this order.';
revoke execute on function public.track_generations(jsonb, bigint) from public, anon, authenticated, service_role;
grant execute on function public.track_generations(jsonb, bigint) to service_role;
