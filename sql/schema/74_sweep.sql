-- What has expired is taken back: many usages at once move rollup and counters.
--
-- Invariants
--   * A hold that has expired counts as released from that moment on. Nobody has to sweep it for that: readers subtract
--     it, and whoever writes for its group and kind sweeps it on the way.
--   * The ledger is written first: a counter that is counted afresh afterwards has all that is about to be moved.
--   * Locks in the order of 30_counters.sql: ledger rows by id before the own key, then rollup, members by id, group.

do $do$
begin
  if to_regtype('tokenlimits.usage_move') is null then
    create type tokenlimits.usage_move as (
      user_id uuid,
      created_at timestamptz,
      cost bigint,
      generations integer
    );
  end if;
end
$do$;

-- the first version, which locked too
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.lock_expired(uuid, text, timestamptz, uuid);

create or replace function tokenlimits.expired_holds(p_group_id uuid, p_kind text, p_at timestamptz)
returns uuid[]
language plpgsql
stable
set search_path = ''
as $$
begin
  return array(
    select h.usage_id
    from tokenlimits.holds as h
    where h.group_id = p_group_id and h.kind = p_kind and h.expires_at <= p_at
  );
end
$$;
comment on function tokenlimits.expired_holds(uuid, text, timestamptz)
is 'The holds of a group and kind that have expired, and that nobody has swept yet.';
revoke execute on function tokenlimits.expired_holds(uuid, text, timestamptz) from public, anon, authenticated;

create or replace function tokenlimits.lock_usages(p_usage_ids uuid[])
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  perform
  from public.generation_usage as u
  where u.id = any(p_usage_ids)
  order by u.id
  for update;
end
$$;
comment on function tokenlimits.lock_usages(uuid[]) is 'Locks rows of the ledger, in one order.';
revoke execute on function tokenlimits.lock_usages(uuid[]) from public, anon, authenticated;

-- Takes the keys from those of the locked usages that are dead. By id: a key that has gone to another row meanwhile is
-- that one's, which was not locked in the one order.
create or replace function tokenlimits.free_keys(p_usage_ids uuid[], p_at timestamptz)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  update public.generation_usage as u
  set idempotency_key = null
  where u.id = any(p_usage_ids) and tokenlimits.is_dead(u.status, u.expires_at, p_at);
end
$$;
comment on function tokenlimits.free_keys(uuid[], timestamptz) is 'Takes the keys from dead usages.';
revoke execute on function tokenlimits.free_keys(uuid[], timestamptz) from public, anon, authenticated;

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

-- the first versions
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.move_usage(uuid, text, tokenlimits.usage_move[], timestamptz, uuid);
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.move_counter(
  tokenlimits.limit_state, tokenlimits.usage_move[], uuid, boolean
);

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
comment on function tokenlimits.move_usage(uuid, text, tokenlimits.usage_move[], timestamptz, boolean)
is 'Moves rollup and counters by many moves at once, or raises TL099.';
revoke execute on function tokenlimits.move_usage(uuid, text, tokenlimits.usage_move[], timestamptz, boolean)
from public, anon, authenticated;

create or replace function tokenlimits.move_counter(
  p_state tokenlimits.limit_state,
  p_cost bigint,
  p_last timestamptz,
  p_enforce boolean
)
returns bigint
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_used bigint;
begin
  if p_state.is_open is null then
    p_state.used := p_state.used - p_cost;
  end if;
  if p_state.is_open is not true then
    perform tokenlimits.open_counter(p_state);
  end if;
  update tokenlimits.counters as c
  set used = c.used + p_cost
  where
    c.subject = p_state.subject
    and c.counter_id = p_state.counter_id
    and p_last >= c.since
    and p_last < c.until
    and (not p_enforce or p_state.max is null or c.used + p_cost <= p_state.max)
  returning c.used into v_used;
  if not found then
    raise sqlstate 'TL099';
  end if;
  return v_used;
end
$$;
comment on function tokenlimits.move_counter(tokenlimits.limit_state, bigint, timestamptz, boolean)
is 'Moves one counter and answers what it holds then, or raises TL099.';
revoke execute on function tokenlimits.move_counter(tokenlimits.limit_state, bigint, timestamptz, boolean)
from public, anon, authenticated;

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
comment on function tokenlimits.write_and_sweep(public.generation_usage, boolean)
is 'Writes a usage, and sweeps the expired holds of its group and kind.';
revoke execute on function tokenlimits.write_and_sweep(public.generation_usage, boolean)
from public, anon, authenticated;

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
comment on function tokenlimits.sweep(uuid, text, timestamptz)
is 'Takes back what expired holds of a group and kind held, and says how many there were.';
revoke execute on function tokenlimits.sweep(uuid, text, timestamptz) from public, anon, authenticated;

-- For a job that likes tidiness (sql/optional/pg_cron.sql): correctness never needs it. One group and kind in one
-- transaction, since the rows of two would be locked in an order that nobody else follows.
create or replace function tokenlimits.tidy()
returns bigint
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_at timestamptz := tokenlimits.clock();
  v_oldest tokenlimits.holds;
begin
  select * into v_oldest
  from tokenlimits.holds as h
  where h.expires_at <= v_at
  order by h.expires_at
  limit 1;
  if not found then
    return 0;
  end if;
  perform tokenlimits.lock_groups(array[v_oldest.group_id]);
  return tokenlimits.sweep(v_oldest.group_id, v_oldest.kind, v_at);
end
$$;
comment on function tokenlimits.tidy()
is 'Sweeps the expired holds of the group and kind with the oldest one, and says how many there were.';
revoke execute on function tokenlimits.tidy() from public, anon, authenticated;
