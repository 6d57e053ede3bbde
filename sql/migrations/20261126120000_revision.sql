-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

-- the first version, which was for one group and kind
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.expire(uuid[], timestamptz);

-- Marks those of the locked usages that are expired holds, and answers what that takes back.
create or replace function tokenlimits.expire_holds(p_usage_ids uuid[], p_at timestamptz)
returns table (group_id uuid, kind text, move tokenlimits.usage_move)
language plpgsql
volatile
set search_path = ''
as $$
begin
  return query
  with expired as (
    update public.generation_usage as u
    set status = 'expired', settled_at = u.expires_at
    where u.id = any(p_usage_ids) and u.status = 'reserved' and u.expires_at <= p_at
    returning u.id, u.group_id, u.kind, u.user_id, u.created_at, u.cost
  ),

  forgotten as (
    delete from tokenlimits.holds as h
    where h.usage_id in (select e.id from expired as e)
  )

  select e.group_id, e.kind, row(e.user_id, e.created_at, -e.cost, -1)::tokenlimits.usage_move
  from expired as e;
end
$$;

comment on function tokenlimits.expire_holds(uuid[], timestamptz)
is 'Marks holds as expired; answers what is to be taken back.';

revoke execute on function tokenlimits.expire_holds(uuid[], timestamptz) from public, anon, authenticated;

-- Moves the rollup and every counter of a group and kind by many moves at once, and answers the counters as they are
-- then. The ledger is as it will be: a counter that is counted afresh here has the moves in it already, so it is opened
-- without them. Raises TL099 when a counter has moved on, or has no room for what p_enforce puts into it; what is only
-- taken back is never too much, even where a limit was lowered below what is used.
create or replace function tokenlimits.move_usage(
  p_group_id uuid,
  p_kind text,
  p_moves tokenlimits.usage_move[],
  p_at timestamptz,
  p_enforce boolean
)
returns tokenlimits.limit_state[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_slot smallint := tokenlimits.free_slot(p_group_id);
  v_states tokenlimits.limit_state[] := tokenlimits.limit_states(
    p_group_id, array(select distinct m.user_id from unnest(p_moves) as m), p_kind, p_at
  );
  v record;
begin
  insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
  select
    p_group_id, p_kind, tokenlimits.rollup_bucket(m.created_at) as bucket, v_slot, sum(m.cost), sum(m.generations)
  from unnest(p_moves) as m
  group by bucket
  order by bucket
  on conflict on constraint usage_rollup_pkey do update
  set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;

  for v in
    select s.place, sum(m.cost)::bigint as cost, max(m.created_at) as last, bool_or(m.cost > 0) as adds
    from unnest(v_states) with ordinality as s (
      counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, place
    )
    inner join (
      select 'member' as scope, n.user_id as subject, n.created_at, n.cost
      from unnest(p_moves) as n
      union all
      select 'group' as scope, p_group_id as subject, n.created_at, n.cost
      from unnest(p_moves) as n
    ) as m on m.scope = s.scope and m.subject = s.subject and m.created_at >= s.since
    group by s.place
    order by s.place
  loop
    v_states[v.place].used := tokenlimits.move_counter(v_states[v.place], v.cost, v.last, p_enforce and v.adds);
  end loop;
  return v_states;
end
$$;

-- What write_usage does when there are expired holds: their cost is taken back in the same step.
create or replace function tokenlimits.write_and_sweep(p_usage public.generation_usage, p_enforce boolean)
returns tokenlimits.limit_state[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_at timestamptz := coalesce(p_usage.settled_at, p_usage.created_at);
  v_dead public.generation_usage;
  v_expired uuid[];
begin
  -- a dead usage under the same key may be of another group or kind, and is locked in one order with the rest
  select * into v_dead
  from public.generation_usage as u
  where
    u.idempotency_key = p_usage.idempotency_key
    and u.user_id = p_usage.user_id
    and tokenlimits.is_dead(u.status, u.expires_at, v_at);
  v_expired := tokenlimits.expired_holds(p_usage.group_id, p_usage.kind, v_at);
  perform tokenlimits.lock_usages(v_expired || v_dead.id);
  perform tokenlimits.free_keys(array[v_dead.id], v_at);
  if not tokenlimits.claim(p_usage) then
    return null;
  end if;
  perform tokenlimits.move_usage(
    p_usage.group_id, p_usage.kind,
    array(select e.move from tokenlimits.expire_holds(v_expired, v_at) as e)
    || row(p_usage.user_id, p_usage.created_at, p_usage.cost, 1)::tokenlimits.usage_move,
    v_at, p_enforce
  );
  return tokenlimits.limit_states(p_usage.group_id, array[p_usage.user_id], p_usage.kind, v_at);
end
$$;

create or replace function tokenlimits.sweep(p_group_id uuid, p_kind text, p_at timestamptz)
returns bigint
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_at timestamptz := p_at;
  v_expired uuid[];
  v_moves tokenlimits.usage_move[];
begin
  loop
    begin
      v_expired := tokenlimits.expired_holds(p_group_id, p_kind, v_at);
      perform tokenlimits.lock_usages(v_expired);
      v_moves := array(select e.move from tokenlimits.expire_holds(v_expired, v_at) as e);
      if v_moves <> '{}' then
        perform tokenlimits.move_usage(p_group_id, p_kind, v_moves, v_at, p_enforce => false);
      end if;
      return cardinality(v_moves);
    exception
      when sqlstate 'TL099' then
        v_at := greatest(v_at, tokenlimits.clock());
    end;
  end loop;
end
$$;

create or replace function tokenlimits.settle(p_usage_id uuid, p_action text, p_cost bigint default null)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_at timestamptz := tokenlimits.clock();
  v_usage public.generation_usage;
  v_expired uuid[];
  v_moves tokenlimits.usage_move[];
  v_cost bigint;
  v_status text;
  v_late boolean;
begin
  select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
  if not found then
    perform tokenlimits.refuse(
      'TL005', format('there is no usage %s', coalesce(p_usage_id::text, 'null')), p_usage_id::text,
      'Pass the usage_id of an allowed answer.'
    );
  end if;
  -- never before it was recorded, or a clock that was set back would go round for ever
  v_at := greatest(v_at, v_usage.created_at);
  perform tokenlimits.lock_groups(array[v_usage.group_id]);
  loop
    v_late := p_action = 'commit'
      and (v_usage.status = 'expired' or (v_usage.status = 'reserved' and v_usage.expires_at <= v_at));
    begin
      v_expired := case
        when v_late then tokenlimits.expired_holds(v_usage.group_id, v_usage.kind, v_at)
        else '{}'
      end;
      perform tokenlimits.lock_usages(v_expired || p_usage_id);
      select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
      v_cost := case p_action when 'commit' then coalesce(p_cost, v_usage.reserved_cost) else v_usage.cost end;
      v_status := tokenlimits.settled_status(v_usage, p_action, v_cost, v_at);
      if v_status is not null then
        if v_late is distinct from (
          p_action = 'commit'
          and (v_usage.status = 'expired' or (v_usage.status = 'reserved' and v_usage.expires_at <= v_at))
        ) then
          raise sqlstate 'TL099';
        end if;
        if v_late then
          -- first, while what has expired is still known as such, and subtracted
          perform tokenlimits.require_room(v_usage, v_cost, v_at);
          v_moves := array(select e.move from tokenlimits.expire_holds(v_expired, v_at) as e);
          v_moves := v_moves || row(v_usage.user_id, v_usage.created_at, v_cost, 1)::tokenlimits.usage_move;
        elsif v_status = 'committed' then
          v_moves := array[row(v_usage.user_id, v_usage.created_at, v_cost - v_usage.cost, 0)::tokenlimits.usage_move];
        else
          v_moves := array[row(v_usage.user_id, v_usage.created_at, -v_usage.cost, -1)::tokenlimits.usage_move];
        end if;
        update public.generation_usage as u
        set
          status = v_status,
          cost = v_cost,
          settled_at = case v_status when 'expired' then u.expires_at else v_at end
        where u.id = p_usage_id
        returning * into v_usage;
        delete from tokenlimits.holds as h where h.usage_id = p_usage_id;
        perform tokenlimits.move_usage(
          v_usage.group_id, v_usage.kind, v_moves, v_at, p_enforce => v_late
        );
      end if;
      return tokenlimits.answer(
        v_usage.kind, v_usage.cost, null, v_usage.group_id,
        tokenlimits.limit_states(v_usage.group_id, array[v_usage.user_id], v_usage.kind, v_at), null, v_usage,
        -- an expired hold was over before it was released, swept or not
        p_replayed => v_status is null or v_status = 'expired'
      );
    exception
      when sqlstate 'TL099' then
        v_at := greatest(v_at, tokenlimits.clock());
        select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
    end;
  end loop;
end
$$;

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
  return v_item;
exception
  when sqlstate 'TL001' or data_exception then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    v_item.answer := tokenlimits.refused(v_item, sqlstate, v_message, v_detail, v_hint);
    return v_item;
end
$$;

create or replace function tokenlimits.read_requests(p_requests jsonb)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_items tokenlimits.batch_item[];
  v_group_ids uuid[];
  v_place integer;
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
  for v in
    select i.user_id, i.group_id, array_agg(i.place) as places
    from unnest(v_items) as i
    where i.answer is null
    group by i.user_id, i.group_id
  loop
    v_group_ids := tokenlimits.paying_groups(v.user_id, v.group_id);
    foreach v_place in array v.places loop
      v_items[v_place].group_ids := v_group_ids;
    end loop;
  end loop;
  return coalesce(v_items, '{}');
end
$$;

create or replace function tokenlimits.replayed(p_item tokenlimits.batch_item, p_usage public.generation_usage)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.answer(
    p_item.kind, p_usage.cost, null, p_usage.group_id,
    tokenlimits.limit_states(p_usage.group_id, array[p_item.user_id], p_item.kind, tokenlimits.clock()),
    null, p_usage, p_replayed => true
  );
end
$$;

comment on function tokenlimits.replayed(tokenlimits.batch_item, public.generation_usage)
is 'The answer to an item whose key has a live usage.';

revoke execute on function tokenlimits.replayed(tokenlimits.batch_item, public.generation_usage)
from public, anon, authenticated;

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
        v_item.answer := tokenlimits.replayed(v_item, v_live);
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
  cross join lateral (values ('group', g.id), ('member', i.user_id)) as w (scope, subject)
  left join rows from (unnest(p_states), unnest(p_group_ids)) with ordinality as s (
    counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, group_id, no
  ) on s.group_id = g.id and s.kind = i.kind and s.scope = w.scope and s.subject = w.subject
  where i.answer is null
  group by i.place, i.group_ids, g.id, g.rank
  order by i.place, g.rank;
end
$$;

-- Why an item is not charged: its key is another one's, its group doesn't exist, or it is denied. Before that its key
-- is looked at again, as track does: who took the last room since replay may have done so under this very key.
create or replace function tokenlimits.batch_denial(
  p_item tokenlimits.batch_item,
  p_verdict tokenlimits.verdict,
  p_holder_id uuid
)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_live public.generation_usage;
  v_message text;
  v_detail text;
  v_hint text;
begin
  if p_holder_id is not null then
    perform tokenlimits.refuse_key(p_item.idempotency_key, p_holder_id);
  elsif p_item.idempotency_key is not null then
    v_live := tokenlimits.usage_under_key(p_item.user_id, p_item.idempotency_key, p_item.fingerprint);
    if v_live.id is not null then
      return tokenlimits.replayed(p_item, v_live);
    end if;
  end if;
  if p_verdict.reason = 'not_in_group' and p_item.group_id is not null then
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

-- Takes the stripes of all groups; answers the items of those that could not be had in time.
create or replace function tokenlimits.lock_batch(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  -- in the order of their stripes, which are the last bytes of the ids
  v_group_ids uuid[] := array(
    select p.group_id
    from tokenlimits.batch_pairs(p_items) as p
    group by p.group_id
    order by right(p.group_id::text, 2), p.group_id
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
    -- never before the moment that an earlier round came to, or a clock that was set back would go round for ever
    v_at := greatest(tokenlimits.clock(), v_at, (select max((c.usage).created_at) from unnest(v_charges) as c));
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

-- A member limit is shown for the group as a whole: what all members used, of max for each. All groups at once, since a
-- dashboard asks for a thousand: what limit_states works out for one group, this does for all of them in one query.
create or replace function tokenlimits.usage_of_groups(p_group_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_group_ids uuid[];
  v_any_expired boolean := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
begin
  perform tokenlimits.require_admin();
  if p_group_id is not null then
    v_group_ids := array[(tokenlimits.require_group(p_group_id)).id];
  else
    v_group_ids := array(select g.id from public.user_groups as g);
  end if;
  return coalesce((
    with periods as materialized (
      select d.period, d.timezone, lower(d.range) as since, upper(d.range) as until
      from (
        select k.period, k.timezone, tokenlimits.period_of(k.period, k.timezone, v_now) as range
        from (
          select distinct l.period, g.timezone
          from public.group_limits as l
          inner join public.user_groups as g on g.id = l.group_id
          where l.group_id = any(v_group_ids)
        ) as k
      ) as d
    ),

    -- as limit_states: an open counter says what is used, and nothing is when a period has begun since; where used
    -- is null there is no counter
    states as materialized (
      select
        l.group_id, l.kind, l.period, l.scope, l.max, l.counter_id,
        case when c.until > v_now then c.since else greatest(p.since, c.until, r.reset_at) end as since,
        case when c.until > v_now then c.until else p.until end as until,
        case when c.until > v_now then c.used when c.until is not null then 0 end as used
      from public.group_limits as l
      inner join public.user_groups as g on g.id = l.group_id
      inner join periods as p on p.period = l.period and p.timezone = g.timezone
      left join tokenlimits.counters as c
        on l.scope = 'group' and c.subject = l.group_id and c.counter_id = l.counter_id
      left join lateral (
        select max(u.reset_at) as reset_at
        from tokenlimits.usage_resets as u
        where u.group_id = l.group_id and u.kind in (l.kind, '*')
      ) as r on true
      where l.group_id = any(v_group_ids)
    ),

    members as materialized (
      select m.group_id, count(*) as members
      from public.group_memberships as m
      where m.group_id = any(v_group_ids)
      group by m.group_id
    ),

    -- what all members used together the group's own counter of that period knows, if there is one; else it is added
    -- up from the rollup, as count_usage does
    counted as materialized (
      select
        s.group_id, s.kind, s.period, s.scope, s.max, s.counter_id, s.until,
        coalesce(s.used, o.used, case when s.since = (
          case when isfinite(s.since) then tokenlimits.rollup_bucket(s.since) else s.since end
        ) then coalesce((
          select sum(r.cost)
          from tokenlimits.usage_rollup as r
          where r.group_id = s.group_id and r.kind = s.kind and r.bucket >= s.since
        ), 0) else tokenlimits.count_usage(s.group_id, null, s.kind, s.since) end)
        - case when v_any_expired then coalesce((
          select sum(h.cost)
          from tokenlimits.holds as h
          where h.group_id = s.group_id and h.kind = s.kind and h.expires_at <= v_now and h.created_at >= s.since
        ), 0) else 0 end as used,
        -- numeric: of many members it is more than a bigint holds
        s.max::numeric * case s.scope when 'member' then coalesce(m.members, 0) else 1 end as capacity
      from states as s
      left join states as o
        on
          s.scope = 'member' and o.scope = 'group'
          and (o.group_id, o.kind, o.period, o.since) = (s.group_id, s.kind, s.period, s.since)
      left join members as m on m.group_id = s.group_id
    ),

    -- json is only put together; jsonb would be built anew at every level
    shown as (
      select
        c.group_id,
        json_agg(
          json_build_object(
            'kind', c.kind,
            'period', c.period,
            'scope', c.scope,
            'max', c.max,
            'used', c.used,
            'reset_at', nullif(c.until, 'infinity'),
            'capacity', c.capacity,
            'remaining', case when c.capacity is not null then greatest(c.capacity - c.used, 0) end,
            'fraction', case
              when c.capacity > 0 then round(c.used::numeric / c.capacity, 6)
              -- a blocked limit is full; so is one of a group without members that has been used
              when c.capacity = 0 then 1
            end
          )
          order by c.kind, c.scope = 'group', c.counter_id
        ) as limits
      from counted as c
      group by c.group_id
    )

    select json_agg(
      json_build_object(
        'group', json_build_object('id', g.id, 'name', g.name),
        'member_count', coalesce(m.members, 0),
        'limits', coalesce(s.limits, '[]')
      )
      order by lower(g.name)
    )
    from public.user_groups as g
    left join members as m on m.group_id = g.id
    left join shown as s on s.group_id = g.id
    where g.id = any(v_group_ids)
  )::jsonb, '[]');
end
$$;

-- Counting everything again, for the day on which somebody doubts the numbers.
--
-- Invariants
--   * The ledger is right by definition: counters and rollup are made to agree with it, never the other way round.
--   * What is older than p_since is not looked at again: there the rollup's word is taken.
--   * Nobody tracks for the group while it is mended: its limits are held exclusively.

-- Whole buckets, or the first one's beginning would be missed.
create or replace function tokenlimits.rollup_differences(p_group_id uuid, p_since timestamptz)
returns table (kind text, bucket timestamptz, was numeric, used numeric, generations numeric)
language plpgsql
stable
set search_path = ''
as $$
declare
  v_since timestamptz := tokenlimits.rollup_bucket(p_since);
begin
  return query
  select d.kind, d.bucket, d.was, d.used, d.generations
  from (
    select
      coalesce(r.kind, u.kind) as kind, coalesce(r.bucket, u.bucket) as bucket,
      coalesce(r.cost, 0) as was, coalesce(u.cost, 0) as used,
      coalesce(u.generations, 0) - coalesce(r.generations, 0) as generations
    from (
      select s.kind, s.bucket, sum(s.cost) as cost, sum(s.generations) as generations
      from tokenlimits.usage_rollup as s
      where s.group_id = p_group_id and s.bucket >= v_since
      group by s.kind, s.bucket
    ) as r
    full join (
      select s.kind, s.bucket, sum(s.cost) as cost, count(*) as generations
      from (
        select l.kind, tokenlimits.rollup_bucket(l.created_at) as bucket, l.cost
        from public.generation_usage as l
        where l.group_id = p_group_id and l.created_at >= v_since and l.status in ('reserved', 'committed')
      ) as s
      group by s.kind, s.bucket
    ) as u on u.kind = r.kind and u.bucket = r.bucket
  ) as d
  where d.was <> d.used or d.generations <> 0;
end
$$;

comment on function tokenlimits.rollup_differences(uuid, timestamptz)
is 'Where the history since a moment differs from the ledger, and by how many generations.';

revoke execute on function tokenlimits.rollup_differences(uuid, timestamptz) from public, anon, authenticated;

-- The group's own counters come first, so that p_most leaves out members.
create or replace function tokenlimits.counter_differences(
  p_group_id uuid,
  p_at timestamptz,
  p_most integer default null
)
returns table (subject uuid, counter_id bigint, kind text, period text, scope text, was bigint, used bigint)
language plpgsql
stable
set search_path = ''
as $$
begin
  return query
  select d.*
  from (
    select
      c.subject, c.counter_id, c.kind, c.period, c.scope, c.used as was,
      tokenlimits.count_usage(p_group_id, case c.scope when 'member' then c.subject end, c.kind, c.since) as used
    from (
      select m.subject, m.counter_id, l.kind, l.period, l.scope, m.used, m.since
      from public.group_limits as l
      inner join tokenlimits.counters as m on m.counter_id = l.counter_id
      where l.group_id = p_group_id and m.until > p_at
      order by l.scope, m.subject
      limit p_most
    ) as c
  ) as d
  where d.was <> d.used;
end
$$;

comment on function tokenlimits.counter_differences(uuid, timestamptz, integer)
is 'Where a group''s counters differ from the ledger.';

revoke execute on function tokenlimits.counter_differences(uuid, timestamptz, integer)
from public, anon, authenticated;

-- One group at a time, and since a moment, for a statement ends after 8 s. Answers what differed, as it was and as it
-- is now.
create or replace function tokenlimits.reconcile(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: counters and rollup are private
security definer
set search_path = ''
as $$
declare
  v_counters jsonb;
  v_rollup jsonb;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.lock_groups(array[p_group_id], true);

  -- first, for the group's counters are counted from it
  with differences as (
    select d.kind, d.bucket, d.was, d.used, d.generations
    from tokenlimits.rollup_differences(p_group_id, coalesce(p_since, '-infinity')) as d
  ),

  repaired as (
    insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
    select p_group_id, d.kind, d.bucket, 0, d.used - d.was, d.generations
    from differences as d
    on conflict on constraint usage_rollup_pkey do update
    set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations
  )

  select jsonb_agg(to_jsonb(d) - 'generations' order by d.kind, d.bucket) into v_rollup
  from differences as d;

  with differences as (
    select d.subject, d.counter_id, d.kind, d.period, d.scope, d.was, d.used
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

  return jsonb_build_object('counters', coalesce(v_counters, '[]'), 'rollup', coalesce(v_rollup, '[]'));
end
$$;

-- As reconcile, but it waits for nobody: a stable function sees one moment, at which counters and ledger agree. It
-- looks at no more members than a statement has time for.
create or replace function tokenlimits.drift(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
stable
-- definer: counters and rollup are private
security definer
set search_path = ''
as $$
declare
  c_counters constant integer := 2000;
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return jsonb_build_object(
    'counters', coalesce((
      select jsonb_agg(to_jsonb(d) - 'counter_id' order by d.kind, d.period, d.subject)
      from tokenlimits.counter_differences(p_group_id, v_now, c_counters) as d
    ), '[]'),
    'rollup', coalesce((
      select jsonb_agg(to_jsonb(d) - 'generations' order by d.kind, d.bucket)
      from tokenlimits.rollup_differences(p_group_id, coalesce(p_since, v_now - interval '1 day')) as d
    ), '[]')
  );
end
$$;

-- PostgREST serves the new functions from now on.
notify pgrst, 'reload schema';
