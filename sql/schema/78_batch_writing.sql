-- Many requests in one transaction, third step: writing what they are charged for.
--
-- Invariants
--   * All is written or nothing: if a counter has no room any more, all is taken back, to be judged again.
--   * Locks in the order of 30_counters.sql, over the whole batch: ledger rows by id, keys in order (those of dead
--     usages last), then by group and kind the rollup and the counters. So batches that overlap never deadlock.

-- Puts those of the charges into the ledger that are at these places, or those that are not, by the order of their
-- keys.
create or replace function tokenlimits.claim_batch(
  p_charges tokenlimits.batch_charge[],
  p_places integer[],
  p_at_places boolean
)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_usages public.generation_usage[] := array(
    select c.usage
    from unnest(p_charges) as c
    where not c.replayed and (c.place = any(p_places)) = p_at_places
  );
  v_written bigint;
begin
  insert into public.generation_usage as u (
    id, group_id, user_id, kind, cost, status, idempotency_key, fingerprint, metadata, created_at, settled_at
  )
  select
    n.id, n.group_id, n.user_id, n.kind, n.cost, n.status,
    n.idempotency_key, n.fingerprint, n.metadata, n.created_at, n.settled_at
  from unnest(v_usages) as n
  order by n.idempotency_key, n.user_id
  on conflict on constraint generation_usage_key_key do nothing;
  get diagnostics v_written = row_count;
  if v_written < cardinality(v_usages) then
    -- somebody has taken a key since it was looked at
    raise sqlstate 'TL099';
  end if;
end
$$;
comment on function tokenlimits.claim_batch(tokenlimits.batch_charge[], integer[], boolean)
is 'Puts charges into the ledger, or raises TL099 when one''s key is taken.';
revoke execute on function tokenlimits.claim_batch(tokenlimits.batch_charge[], integer[], boolean)
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
  v_dead uuid[];
  v_dead_places integer[];
  v_expired uuid[] := array(
    select unnest(tokenlimits.expired_holds(p.group_id, p.kind, p_at))
    from tokenlimits.batch_pairs(p_items) as p
  );
  v record;
begin
  is_held := false;
  moved := '{}';
  select array_agg(i.dead_id), array_agg(i.place) into v_dead, v_dead_places
  from unnest(p_items) as i
  inner join unnest(p_charges) as c on c.place = i.place
  where i.dead_id is not null;
  perform tokenlimits.lock_usages(v_dead || v_expired);
  -- the keys of dead usages last: until they are freed, whoever wants one finds it taken and does not wait, and nobody
  -- can have taken it
  perform tokenlimits.claim_batch(p_charges, coalesce(v_dead_places, '{}'), false);
  if v_dead is not null then
    perform tokenlimits.free_keys(v_dead, p_at);
    perform tokenlimits.claim_batch(p_charges, v_dead_places, true);
  end if;

  for v in
    select m.group_id, m.kind, array_agg(m.move) as moves
    from (
      select e.group_id, e.kind, e.move
      from tokenlimits.expire_holds(v_expired, p_at) as e
      union all
      select
        (c.usage).group_id,
        (c.usage).kind,
        row((c.usage).user_id, (c.usage).created_at, (c.usage).cost, 1)::tokenlimits.usage_move as move
      from unnest(p_charges) as c
      where not c.replayed
    ) as m
    group by m.group_id, m.kind
    order by m.group_id, m.kind
  loop
    held_group_id := v.group_id;
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
