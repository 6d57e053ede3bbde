-- Many moves at once: usages that are written, expired holds that are swept, and the changes of a settlement.
--
-- Invariants
--   * The ledger is written first, so a counter that is counted afterwards already includes the moves to come.
--   * A sweep takes a bounded number of holds, and waits for none of them. Readers keep subtracting the rest.
--   * No call is denied because of unswept holds: a counter that looks full is locked, and judged again without what
--     has expired.

-- The room that a counter has without expired holds. Once it is locked, nobody else moves it. So it still contains
-- every unswept hold that had expired by then; a call that settles such a hold waits for the lock, or came before it.
create or replace function tokenlimits.squeeze(
  p_state tokenlimits.limit_state,
  p_cost bigint,
  p_last timestamptz,
  p_at timestamptz
)
returns bigint
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_expired bigint;
begin
  perform
  from tokenlimits.counters as c
  where c.subject = p_state.subject and c.counter_id = p_state.counter_id
  for no key update;
  -- read only now, under the lock: each statement has a new snapshot, so this sees what others committed meanwhile
  v_expired := tokenlimits.expired_of_limit(
    {{ counted_groups('p_state') }},
    case p_state.scope when 'member' then p_state.subject end, p_state.kind, p_state.period,
    p_state.counts, p_state.since, least(p_at, tokenlimits.clock())
  );
  {{ move_counter('p_state', 'p_cost', 'p_last', 'false', used='c.used - v_expired') | indent(2) }}
  if not found then
    raise sqlstate 'TL099';
  end if;
  return p_state.used;
end
$$;
{{ private(
  'squeeze(tokenlimits.limit_state, bigint, timestamptz, timestamptz)',
  "Moves a counter that looks full, if expired holds leave enough room; otherwise raises TL099."
) }}

create or replace function tokenlimits.move_usage(
  p_moves tokenlimits.usage_move[],
  p_at timestamptz,
  p_judges bigint[] default null
)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  {{ variables_of_moves() | indent(2) }}
begin
  {{ move_all('p_moves', 'p_at', judges='p_judges') | indent(2) }}
end
$$;
{{ private(
  'move_usage(tokenlimits.usage_move[], timestamptz, bigint[])',
  "Moves rollup and counters by many moves at once, or raises TL099."
) }}

-- Locks some expired holds of a group and kind, the oldest first. Skips those that another call has locked, to settle
-- or to sweep them: waiting for one would break the order of locks.
create or replace function tokenlimits.lock_expired(
  p_group_id uuid,
  p_kind text,
  p_at timestamptz,
  p_most integer
)
returns uuid[]
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  return array(
    select u.id
    from tokenlimits.holds as h
    inner join public.generation_usage as u on u.id = h.usage_id
    where h.group_id = p_group_id and h.kind = p_kind and h.expires_at <= p_at
    order by h.expires_at
    limit p_most
    for update of u skip locked
  );
end
$$;
{{ private(
  'lock_expired(uuid, text, timestamptz, integer)',
  "Expired holds of a group and kind, locked to be swept."
) }}

-- The same of groups that share a pool with this one: nobody else may call for them, and the pool's readers would
-- subtract theirs for ever. The stripe of each is taken if it is free: waiting for one would break the order of locks.
create or replace function tokenlimits.lock_expired_beside(
  p_group_id uuid,
  p_kind text,
  p_at timestamptz,
  p_most integer
)
returns uuid[]
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  return array(
    select u.id
    from tokenlimits.group_tree as t
    inner join tokenlimits.holds as h on h.root_id = t.above_id and h.root_id <> h.group_id
    inner join public.generation_usage as u on u.id = h.usage_id
    where
      t.group_id = p_group_id and t.level = 0 and t.distance > 0 and h.kind = p_kind and h.expires_at <= p_at
      and h.group_id <> p_group_id
      and pg_try_advisory_xact_lock_shared({{ stripe_class() }}, {{ stripe('h.group_id') }})
    order by h.expires_at
    limit p_most
    for update of u skip locked
  );
end
$$;
{{ private(
  'lock_expired_beside(uuid, text, timestamptz, integer)',
  "Expired holds of other groups in the tree of a group, of a kind, locked to be swept."
) }}

-- Marks those of the locked usages that are expired holds, and returns the moves that take back their cost.
create or replace function tokenlimits.expire_holds(p_usage_ids uuid[], p_at timestamptz)
returns tokenlimits.usage_move[]
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_moves tokenlimits.usage_move[];
begin
  with expired as (
    update public.generation_usage as u
    set status = 'expired', settled_at = u.expires_at
    where u.id = any(p_usage_ids) and u.status = 'reserved' and u.expires_at <= p_at
    returning u.id, u.group_id, u.kind, u.user_id, u.created_at, u.cost
  ),

  forgotten as (
    delete from tokenlimits.holds as h
    using expired as e
    where h.user_id = e.user_id and h.usage_id = e.id
  )

  select array_agg(
    row(e.group_id, e.kind, e.user_id, e.created_at, -e.cost, -1, false, -1)::tokenlimits.usage_move
  )
  into v_moves
  from expired as e;
  return coalesce(v_moves, '{}');
end
$$;
{{ private(
  'expire_holds(uuid[], timestamptz)',
  "Marks holds as expired; returns the moves that take back their cost."
) }}

create or replace function tokenlimits.sweep(p_group_id uuid, p_kind text, p_at timestamptz)
returns bigint
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  c_swept constant integer := 500;
  v_at timestamptz := least(p_at, tokenlimits.clock());
  v_moves tokenlimits.usage_move[];
begin
  loop
    -- a block of its own: if a counter has rolled over since it was read (TL099), the marks are rolled back too
    begin
      v_moves := tokenlimits.expire_holds(
        tokenlimits.lock_expired(p_group_id, p_kind, v_at, c_swept)
        || tokenlimits.lock_expired_beside(p_group_id, p_kind, v_at, c_swept),
        v_at
      );
      perform tokenlimits.move_usage(v_moves, v_at);
      return cardinality(v_moves);
    exception
      when sqlstate 'TL099' then
        v_at := greatest(v_at, tokenlimits.clock());
    end;
  end loop;
end
$$;
{{ private(
  'sweep(uuid, text, timestamptz)',
  "Sweeps some expired holds of a group and kind, and returns how many."
) }}

-- For an optional job (sql/optional/pg_cron.sql); correctness never depends on it.
create or replace function tokenlimits.tidy()
returns bigint
language plpgsql
volatile
{{ search_path() }}
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
  -- a sweep reads limits in order to write, like every call
  perform tokenlimits.lock_groups(array[v_oldest.group_id]);
  return tokenlimits.sweep(v_oldest.group_id, v_oldest.kind, v_at);
end
$$;
{{ private(
  'tidy()',
  "Sweeps some expired holds of the group and kind with the oldest one, and returns how many."
) }}

-- Writes usages into the ledger, each under its key (p_dead_ids: the dead usage that has the key, if any), sweeps some
-- expired holds of these groups and kinds too, and returns all moves of counters. Raises TL099 if another call has
-- taken a key in the meantime.
create or replace function tokenlimits.write_ledger(
  p_usages public.generation_usage[],
  p_dead_ids uuid[],
  p_enforced boolean,
  p_group_ids uuid[],
  p_kinds text[],
  p_at timestamptz
)
returns tokenlimits.usage_move[]
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  c_swept constant integer := 500;
  v_dead uuid[] := array_remove(p_dead_ids, null);
  v_expired uuid[] := '{}';
  v_claims public.generation_usage[] := p_usages;
  v_late_claims public.generation_usage[] := '{}';
  v_written bigint;
  v record;
begin
  if v_dead <> '{}' then
    -- before anything else in the ledger, in the order of locks: a late commit could still make one of them live again
    perform
    from public.generation_usage as u
    where u.id = any(v_dead)
    order by u.id
    for update;
    v_claims := '{}';
    for i in 1..cardinality(p_usages) loop
      if p_dead_ids[i] is null then
        v_claims := v_claims || p_usages[i];
      else
        v_late_claims := v_late_claims || p_usages[i];
      end if;
    end loop;
  end if;
  for v in
    select distinct p.group_id, p.kind
    from unnest(p_group_ids, p_kinds) as p (group_id, kind)
    -- not if the clock was set back: the holds and counters of other members haven't reached that moment yet
    where p_at <= tokenlimits.clock()
  loop
    v_expired := v_expired || tokenlimits.lock_expired(
      v.group_id, v.kind, p_at, c_swept - cardinality(v_expired)
    );
  end loop;
  for v in
    -- one group for each tree
    select distinct on (r.above_id, p.kind) p.group_id, p.kind
    from unnest(p_group_ids, p_kinds) as p (group_id, kind)
    inner join tokenlimits.group_tree as r on r.group_id = p.group_id and r.level = 0 and r.distance > 0
    where p_at <= tokenlimits.clock()
    order by r.above_id, p.kind
  loop
    v_expired := v_expired || tokenlimits.lock_expired_beside(
      v.group_id, v.kind, p_at, c_swept - cardinality(v_expired)
    );
  end loop;

  -- the keys of dead usages last: until they are freed, another call that wants one finds it taken and doesn't wait, so
  -- no call can have taken it
  for step in 1..2 loop
    if step = 2 and v_dead <> '{}' then
      update public.generation_usage as u
      set idempotency_key = null
      where u.id = any(v_dead) and {{ is_dead('u', 'p_at') }};
      v_claims := v_late_claims;
    end if;
    exit when step = 2 and v_dead = '{}';
    {{ into_ledger('n', 'from unnest(v_claims) as n\norder by n.idempotency_key, n.user_id') | indent(4) }}
    get diagnostics v_written = row_count;
    -- a key is taken, so its row was left out
    if v_written < cardinality(v_claims) then
      raise sqlstate 'TL099';
    end if;
  end loop;
  {{ into_holds(
    'n', root_id=root_of('n.group_id'), source="from unnest(p_usages) as n\nwhere n.status = 'reserved'"
  ) | indent(2) }}
  return tokenlimits.expire_holds(v_expired, p_at) || array(
    select row(
      n.group_id, n.kind, n.user_id, n.created_at, n.cost, 1, p_enforced, case n.status when 'reserved' then 1 end
    )::tokenlimits.usage_move
    from unnest(p_usages) as n
  );
end
$$;
{{ private(
  'write_ledger(public.generation_usage[], uuid[], boolean, uuid[], text[], timestamptz)',
  "Writes usages into the ledger, sweeps, and returns all moves of counters."
) }}
