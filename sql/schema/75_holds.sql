-- Two steps, where the work can fail: reserve, then commit, release or refund.
--
-- Invariants
--   * A hold that has expired counts as released from that moment on. Nobody has to sweep it for that: readers subtract
--     it, and whoever writes for its group and kind sweeps it on the way.
--   * Each usage settles at most once; the same settlement again changes nothing and answers the same.
--   * Settling needs nothing but the usage's id: not the member, not the group, not the limit.
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

create or replace function public.reserve_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_ttl bigint default 3600,
  p_idempotency_key text default null,
  p_group_id uuid default null,
  p_metadata jsonb default null
)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  if p_ttl is null or p_ttl not between 1 and 2592000 then
    perform tokenlimits.refuse(
      'TL001', 'ttl: must be from 1 second to 30 days, in seconds', 'ttl', 'Nothing was reserved.'
    );
  end if;
  return tokenlimits.track(
    p_user_id, p_kind, p_cost, p_idempotency_key, p_group_id, tokenlimits.json_argument(p_metadata),
    make_interval(secs => p_ttl)
  );
end
$$;
comment on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
is 'Holds a generation''s cost for p_ttl seconds, until it is committed or released; answers like track_generation.';
revoke execute on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb) to service_role;

-- What a settlement makes of a usage: its new status, or null when it is so already. Raises what can't be.
create or replace function tokenlimits.settled_status(
  p_usage public.generation_usage,
  p_action text,
  p_cost bigint,
  p_at timestamptz
)
returns text
language plpgsql
stable
set search_path = ''
as $$
begin
  if p_action = 'commit' and p_usage.reserved_cost is not null then
    if p_cost not between 0 and p_usage.reserved_cost then
      perform tokenlimits.refuse(
        'TL001', format('cost: must be from 0 to the %s that were reserved', p_usage.reserved_cost), 'cost',
        'The hold is as it was.'
      );
    elsif p_usage.status in ('reserved', 'expired') then
      return 'committed';
    elsif p_usage.status = 'committed' and p_usage.cost = p_cost then
      return null;
    end if;
  elsif p_action = 'release' and p_usage.status in ('reserved', 'released', 'expired') then
    return case
      when p_usage.status <> 'reserved' then null
      when p_usage.expires_at <= p_at then 'expired'
      else 'released'
    end;
  elsif p_action = 'refund' and p_usage.status in ('committed', 'refunded') then
    return case p_usage.status when 'committed' then 'refunded' end;
  elsif p_action = 'refund' and p_usage.status = 'reserved' and p_usage.expires_at > p_at then
    perform tokenlimits.refuse(
      'TL001', 'usage_id: it is reserved, and nothing was charged yet', 'usage_id', 'Release it instead.'
    );
  end if;
  -- swept or not
  if p_usage.status = 'reserved' and p_usage.expires_at <= p_at then
    p_usage.status := 'expired';
  end if;
  perform tokenlimits.refuse(
    'TL006',
    format('usage %s is %s already, for %s, so it can''t be settled by %s', p_usage.id, p_usage.status,
      p_usage.cost, p_action),
    p_usage.status,
    'Each usage settles once; only the same settlement may be repeated.'
  );
  return null;
end
$$;
comment on function tokenlimits.settled_status(public.generation_usage, text, bigint, timestamptz)
is 'The status that a settlement leads to; null when it was made before.';
revoke execute on function tokenlimits.settled_status(public.generation_usage, text, bigint, timestamptz)
from public, anon, authenticated;

-- A commit after the hold's end counts as a new usage of the old moment: only while all its periods last, and in the
-- room that is left.
create or replace function tokenlimits.require_room(p_usage public.generation_usage, p_cost bigint, p_at timestamptz)
returns void
language plpgsql
stable
set search_path = ''
as $$
declare
  v_state tokenlimits.limit_state;
begin
  foreach v_state in array tokenlimits.limit_states(p_usage.group_id, array[p_usage.user_id], p_usage.kind, p_at) loop
    if p_usage.created_at < v_state.since or v_state.used + p_cost > v_state.max then
      perform tokenlimits.refuse(
        'TL007',
        format('hold %s expired at %s, and its %s no longer fit', p_usage.id, p_usage.expires_at, p_cost),
        p_usage.id::text,
        'Nothing was charged. Reserve for longer, or record_generation what was used all the same.'
      );
    end if;
  end loop;
end
$$;
comment on function tokenlimits.require_room(public.generation_usage, bigint, timestamptz)
is 'Raises TL007 unless an expired hold may still be committed.';
revoke execute on function tokenlimits.require_room(public.generation_usage, bigint, timestamptz)
from public, anon, authenticated;

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
comment on function tokenlimits.settle(uuid, text, bigint)
is 'What commit_generation, release_generation and refund_generation do.';
revoke execute on function tokenlimits.settle(uuid, text, bigint) from public, anon, authenticated;
grant execute on function tokenlimits.settle(uuid, text, bigint) to service_role;

create or replace function public.commit_generation(p_usage_id uuid, p_cost bigint default null)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.settle(p_usage_id, 'commit', p_cost);
end
$$;
comment on function public.commit_generation(uuid, bigint)
is 'Settles a hold for what was reserved, or for less.';
revoke execute on function public.commit_generation(uuid, bigint) from public, anon, authenticated, service_role;
grant execute on function public.commit_generation(uuid, bigint) to service_role;

create or replace function public.release_generation(p_usage_id uuid)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.settle(p_usage_id, 'release');
end
$$;
comment on function public.release_generation(uuid)
is 'Gives back all that a hold holds.';
revoke execute on function public.release_generation(uuid) from public, anon, authenticated, service_role;
grant execute on function public.release_generation(uuid) to service_role;

create or replace function tokenlimits.refund(p_usage_id uuid)
returns jsonb
language plpgsql
volatile
-- definer: an admin may refund, and do nothing else that settle does
security definer
set search_path = ''
as $$
begin
  perform tokenlimits.require_admin();
  return tokenlimits.settle(p_usage_id, 'refund');
end
$$;
comment on function tokenlimits.refund(uuid)
is 'What refund_generation does.';
revoke execute on function tokenlimits.refund(uuid) from public, anon, authenticated;
grant execute on function tokenlimits.refund(uuid) to authenticated, service_role;

create or replace function public.refund_generation(p_usage_id uuid)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.refund(p_usage_id);
end
$$;
comment on function public.refund_generation(uuid)
is 'Gives back what a committed usage cost.';
revoke execute on function public.refund_generation(uuid) from public, anon, authenticated, service_role;
grant execute on function public.refund_generation(uuid) to authenticated, service_role;

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
