-- For workers: check-and-record in one step, a look without recording, and what happened elsewhere.
--
-- Invariants
--   * Either the ledger row, the rollup and every counter move, or nothing is written.
--   * No counter passes its limit's max here, and nobody is denied while there is room: a verdict is only carried out
--     if every counter still has room when it is moved, else everything is taken back and judged again.
--   * One live usage per user and idempotency key.

create or replace function tokenlimits.check_request(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text default null,
  p_metadata jsonb default null
)
returns void
language plpgsql
stable
set search_path = ''
as $$
declare
  v_field text;
  v_rule text;
begin
  if p_user_id is null then
    v_field := 'user_id';
    v_rule := 'is required';
  elsif p_kind is null or p_kind !~ '^[a-z][a-z0-9_]{0,31}$' then
    v_field := 'kind';
    v_rule := 'must be 1 to 32 of a-z, 0-9 and _, and begin with a letter';
  elsif p_cost is null or p_cost not between 1 and 1000000000 then
    v_field := 'cost';
    v_rule := 'must be a whole number from 1 to 1000000000';
  elsif char_length(p_idempotency_key) not between 1 and 255 then
    v_field := 'idempotency_key';
    v_rule := 'must have 1 to 255 characters';
  elsif jsonb_typeof(p_metadata) <> 'object' or octet_length(p_metadata::text) > 8192 then
    v_field := 'metadata';
    v_rule := 'must be a JSON object of at most 8192 bytes';
  else
    return;
  end if;
  perform tokenlimits.refuse('TL001', v_field || ': ' || v_rule, v_field, 'Nothing was recorded.');
end
$$;
comment on function tokenlimits.check_request(uuid, text, bigint, text, jsonb)
is 'Refuses a bad request with the field''s name before anything is touched.';
revoke execute on function tokenlimits.check_request(uuid, text, bigint, text, jsonb) from public, anon, authenticated;

create or replace function tokenlimits.is_dead(p_status text, p_expires_at timestamptz, p_at timestamptz)
returns boolean
language plpgsql
immutable
set search_path = ''
as $$
begin
  return p_status not in ('reserved', 'committed') or (p_status = 'reserved' and p_expires_at <= p_at);
end
$$;
comment on function tokenlimits.is_dead(text, timestamptz, timestamptz)
is 'Whether a usage counts no more, so that its key is free.';
revoke execute on function tokenlimits.is_dead(text, timestamptz, timestamptz) from public, anon, authenticated;

create or replace function tokenlimits.refuse_key(p_idempotency_key text, p_usage_id uuid)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  perform tokenlimits.refuse(
    'TL008',
    format('idempotency_key %L was used for another request of this user', p_idempotency_key),
    p_usage_id::text,
    'Use one key per job: the same operation, kind, cost and group every time.'
  );
end
$$;
comment on function tokenlimits.refuse_key(text, uuid)
is 'Raises TL008: an idempotency key is bound to another request.';
revoke execute on function tokenlimits.refuse_key(text, uuid) from public, anon, authenticated;

-- The live usage under a key, if any. A key that was used for another request is an error.
create or replace function tokenlimits.usage_under_key(p_user_id uuid, p_idempotency_key text, p_fingerprint uuid)
returns public.generation_usage
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_usage public.generation_usage;
begin
  select * into v_usage
  from public.generation_usage as u
  where u.idempotency_key = p_idempotency_key and u.user_id = p_user_id;
  if not found or tokenlimits.is_dead(v_usage.status, v_usage.expires_at, tokenlimits.clock()) then
    return null;
  elsif v_usage.fingerprint is distinct from p_fingerprint then
    perform tokenlimits.refuse_key(p_idempotency_key, v_usage.id);
  end if;
  return v_usage;
end
$$;
comment on function tokenlimits.usage_under_key(uuid, text, uuid)
is 'The live usage that an idempotency key is bound to.';
revoke execute on function tokenlimits.usage_under_key(uuid, text, uuid) from public, anon, authenticated;

-- Takes a key from a dead usage. Only for somebody who is about to write: a denial must leave the key where it is,
-- since a late commit brings an expired usage back to life.
create or replace function tokenlimits.free_key(p_usage public.generation_usage)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
begin
  update public.generation_usage as u
  set idempotency_key = null
  where
    u.idempotency_key = p_usage.idempotency_key
    and u.user_id = p_usage.user_id
    and tokenlimits.is_dead(u.status, u.expires_at, coalesce(p_usage.settled_at, p_usage.created_at));
  return found;
end
$$;
comment on function tokenlimits.free_key(public.generation_usage)
is 'Takes a usage''s key from a dead one; false when none has it.';
revoke execute on function tokenlimits.free_key(public.generation_usage) from public, anon, authenticated;

-- Puts a usage into the ledger, under its key; false, with nothing written, when the key is taken.
create or replace function tokenlimits.claim(p_usage public.generation_usage)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
begin
  insert into public.generation_usage as u (
    id, group_id, user_id, kind, cost, reserved_cost, status,
    idempotency_key, fingerprint, metadata, created_at, settled_at, expires_at
  )
  values (
    p_usage.id, p_usage.group_id, p_usage.user_id, p_usage.kind, p_usage.cost, p_usage.reserved_cost, p_usage.status,
    p_usage.idempotency_key, p_usage.fingerprint, p_usage.metadata,
    p_usage.created_at, p_usage.settled_at, p_usage.expires_at
  )
  on conflict on constraint generation_usage_key_key do nothing;
  if not found then
    return false;
  end if;
  if p_usage.status = 'reserved' then
    insert into tokenlimits.holds (usage_id, group_id, user_id, kind, cost, created_at, expires_at)
    values (
      p_usage.id, p_usage.group_id, p_usage.user_id, p_usage.kind, p_usage.cost,
      p_usage.created_at, p_usage.expires_at
    );
  end if;
  return true;
end
$$;
comment on function tokenlimits.claim(public.generation_usage)
is 'Puts a usage into the ledger unless its key is taken.';
revoke execute on function tokenlimits.claim(public.generation_usage) from public, anon, authenticated;

-- Writes one usage: claims the key, then the rollup, then the counters, the group's (which all its members share) last,
-- so that they are held for the shortest time. Raises TL099 when a counter has moved on or has no room any more.
-- Answers the counters as they are then; null when the key is taken.
create or replace function tokenlimits.write_usage(
  p_usage public.generation_usage,
  p_states tokenlimits.limit_state[],
  p_enforce boolean
)
returns tokenlimits.limit_state[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_bucket timestamptz := tokenlimits.rollup_bucket(p_usage.created_at);
  v_slot smallint := tokenlimits.free_slot(p_usage.group_id);
  v_state tokenlimits.limit_state;
  v_states tokenlimits.limit_state[] := '{}';
begin
  if p_states[1].expired is not null then
    return tokenlimits.write_and_sweep(p_usage, p_enforce);
  elsif not tokenlimits.claim(p_usage) and not (tokenlimits.free_key(p_usage) and tokenlimits.claim(p_usage)) then
    return null;
  end if;

  -- nearly always there: a plain update costs half of an upsert
  update tokenlimits.usage_rollup as r
  set cost = r.cost + p_usage.cost, generations = r.generations + 1
  where r.group_id = p_usage.group_id and r.kind = p_usage.kind and r.bucket = v_bucket and r.slot = v_slot;
  if not found then
    insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
    values (p_usage.group_id, p_usage.kind, v_bucket, v_slot, p_usage.cost, 1)
    on conflict on constraint usage_rollup_pkey do update
    set cost = r.cost + excluded.cost, generations = r.generations + 1;
  end if;

  foreach v_state in array p_states loop
    -- what was recorded for an earlier period counts for none of the current one
    if p_usage.created_at >= v_state.since then
      if v_state.is_open is not true then
        perform tokenlimits.open_counter(v_state);
      end if;
      update tokenlimits.counters as c
      set used = c.used + p_usage.cost
      where
        c.subject = v_state.subject
        and c.counter_id = v_state.counter_id
        and p_usage.created_at >= c.since
        and p_usage.created_at < c.until
        and (not p_enforce or v_state.max is null or c.used + p_usage.cost <= v_state.max)
      returning c.used into v_state.used;
      if not found then
        raise sqlstate 'TL099';
      end if;
    end if;
    v_states := v_states || v_state;
  end loop;
  return v_states;
end
$$;
comment on function tokenlimits.write_usage(public.generation_usage, tokenlimits.limit_state[], boolean)
is 'Writes a usage to ledger, rollup and counters, or raises TL099.';
revoke execute on function tokenlimits.write_usage(public.generation_usage, tokenlimits.limit_state[], boolean)
from public, anon, authenticated;

-- The state was read a moment ago. If somebody has written since, they have opened the counter, and it stays theirs.
create or replace function tokenlimits.open_counter(p_state tokenlimits.limit_state)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  insert into tokenlimits.counters as c (subject, counter_id, since, until, used)
  values (
    p_state.subject, p_state.counter_id, p_state.since, p_state.until, p_state.used + coalesce(p_state.expired, 0)
  )
  on conflict on constraint counters_pkey do update
  set since = excluded.since, until = excluded.until, used = excluded.used
  where c.until <= excluded.since;
  -- new counters are rare: the moment to drop those of limits that are gone, so that they never pile up
  if p_state.scope = 'member' then
    perform tokenlimits.drop_stale_counters(p_state.subject);
  end if;
end
$$;
comment on function tokenlimits.open_counter(tokenlimits.limit_state)
is 'Makes a counter, or rolls it into its new period.';
revoke execute on function tokenlimits.open_counter(tokenlimits.limit_state) from public, anon, authenticated;

-- Judges and writes, until a verdict holds. Every round but the last was overtaken by another call that got through.
create or replace function tokenlimits.track(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb,
  p_ttl interval default null
)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_group_ids uuid[];
  v_verdict tokenlimits.verdict;
  v_usage public.generation_usage;
  v_live public.generation_usage;
  v_states tokenlimits.limit_state[];
  v_taken boolean;
begin
  perform tokenlimits.check_request(p_user_id, p_kind, p_cost, p_idempotency_key, p_metadata);
  v_usage.user_id := p_user_id;
  v_usage.kind := p_kind;
  v_usage.cost := p_cost;
  v_usage.reserved_cost := case when p_ttl is not null then p_cost end;
  v_usage.status := case when p_ttl is null then 'committed' else 'reserved' end;
  v_usage.idempotency_key := p_idempotency_key;
  v_usage.fingerprint := md5(
    concat_ws(' ', case when p_ttl is null then 'track' else 'reserve' end, p_kind, p_cost, p_group_id)
  )::uuid;
  v_usage.metadata := coalesce(p_metadata, '{}');
  v_usage.created_at := '-infinity';

  v_group_ids := tokenlimits.paying_groups(p_user_id, p_group_id);
  perform tokenlimits.lock_groups(v_group_ids);
  loop
    -- never before the moment that an earlier round came to, or a clock that was set back would go round for ever
    v_verdict := tokenlimits.judge(
      p_user_id, p_kind, p_cost, v_group_ids, greatest(tokenlimits.clock(), v_usage.created_at)
    );
    if v_verdict.allowed then
      v_usage.id := tokenlimits.uuid_v7();
      v_usage.group_id := v_verdict.group_id;
      v_usage.created_at := v_verdict.at;
      v_usage.settled_at := case when p_ttl is null then v_verdict.at end;
      v_usage.expires_at := v_verdict.at + p_ttl;
      v_taken := false;
      begin
        v_states := tokenlimits.write_usage(v_usage, v_verdict.states, p_enforce => true);
        v_taken := v_states is null;
        if v_taken then
          -- lets go of the rows that it has locked: another round may lock them in another order
          raise sqlstate 'TL099';
        end if;
      exception
        when sqlstate 'TL099' then
          continue when not v_taken;
      end;
      if v_states is not null then
        return tokenlimits.answer(
          p_kind, p_cost, null, v_usage.group_id, v_states, null, v_usage, p_replayed => false
        );
      end if;
    end if;
    if p_idempotency_key is not null then
      v_live := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_usage.fingerprint);
      if v_live.id is not null then
        v_states := tokenlimits.limit_states(v_live.group_id, array[p_user_id], p_kind, tokenlimits.clock());
        return tokenlimits.answer(
          p_kind, v_live.cost, null, v_live.group_id, v_states, null, v_live, p_replayed => true
        );
      end if;
    end if;
    if not v_verdict.allowed then
      if v_verdict.reason = 'not_in_group' and p_group_id is not null then
        -- not before: a repeated call is answered also when its group is gone
        perform tokenlimits.require_group(p_group_id);
      end if;
      if v_verdict.states[1].expired is not null then
        perform tokenlimits.sweep(v_verdict.group_id, p_kind, v_verdict.at);
      end if;
      return tokenlimits.answer(
        p_kind, p_cost, v_verdict.reason, v_verdict.group_id, v_verdict.states, v_verdict.denied_by, null,
        p_replayed => false
      );
    end if;
  end loop;
end
$$;
comment on function tokenlimits.track(uuid, text, bigint, text, uuid, jsonb, interval) is 'What track_generation does.';
revoke execute on function tokenlimits.track(uuid, text, bigint, text, uuid, jsonb, interval)
from public, anon, authenticated;
grant execute on function tokenlimits.track(uuid, text, bigint, text, uuid, jsonb, interval) to service_role;

create or replace function public.track_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
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
  return tokenlimits.track(
    p_user_id, p_kind, p_cost, p_idempotency_key, p_group_id, tokenlimits.json_argument(p_metadata)
  );
end
$$;
comment on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
is 'Checks every limit and records the generation, in one step: is it allowed, what remains, when does it reset.';
revoke execute on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.track_generation(uuid, text, bigint, text, uuid, jsonb) to service_role;

create or replace function tokenlimits.look(p_user_id uuid, p_kind text, p_cost bigint, p_group_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = ''
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  perform tokenlimits.check_request(p_user_id, p_kind, p_cost);
  if current_setting('transaction_isolation') <> 'read committed' then
    perform tokenlimits.refuse_isolation();
  end if;
  v_verdict := tokenlimits.judge(
    p_user_id, p_kind, p_cost, tokenlimits.paying_groups(p_user_id, p_group_id), tokenlimits.clock()
  );
  if v_verdict.reason = 'not_in_group' and p_group_id is not null then
    perform tokenlimits.require_group(p_group_id);
  end if;
  return tokenlimits.answer(
    p_kind, p_cost, v_verdict.reason, v_verdict.group_id, v_verdict.states, v_verdict.denied_by, null,
    p_replayed => false
  );
end
$$;
comment on function tokenlimits.look(uuid, text, bigint, uuid) is 'What check_generation does.';
revoke execute on function tokenlimits.look(uuid, text, bigint, uuid) from public, anon, authenticated;
grant execute on function tokenlimits.look(uuid, text, bigint, uuid) to service_role;

create or replace function public.check_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_group_id uuid default null
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.look(p_user_id, p_kind, p_cost, p_group_id);
end
$$;
comment on function public.check_generation(uuid, text, bigint, uuid)
is 'What track_generation would answer now; records nothing.';
revoke execute on function public.check_generation(uuid, text, bigint, uuid)
from public, anon, authenticated, service_role;
grant execute on function public.check_generation(uuid, text, bigint, uuid) to service_role;

-- Past or outside usage: it has happened, so it is never denied, and counters may pass their max.
create or replace function tokenlimits.record(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_created_at timestamptz,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb
)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_usage public.generation_usage;
  v_live public.generation_usage;
  v_states tokenlimits.limit_state[];
  v_taken boolean;
begin
  perform tokenlimits.check_request(p_user_id, p_kind, p_cost, p_idempotency_key, p_metadata);
  -- a minute for clocks that differ
  if p_created_at > v_now + interval '1 minute' or not isfinite(p_created_at) then
    perform tokenlimits.refuse(
      'TL001',
      'created_at: must not lie in the future',
      'created_at',
      'Nothing was recorded.'
    );
  end if;
  v_usage.user_id := p_user_id;
  v_usage.kind := p_kind;
  v_usage.cost := p_cost;
  v_usage.status := 'committed';
  v_usage.idempotency_key := p_idempotency_key;
  v_usage.fingerprint := md5(concat_ws(' ', 'record', p_kind, p_cost, p_group_id))::uuid;
  v_usage.metadata := coalesce(p_metadata, '{}');
  if p_idempotency_key is not null then
    -- first: a repeated call is answered also when the user has left or the group is gone
    v_live := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_usage.fingerprint);
  end if;
  if v_live.id is null then
    v_usage.group_id := tokenlimits.recording_group(p_user_id, p_kind, p_group_id);
    perform tokenlimits.lock_groups(array[v_usage.group_id]);
  end if;
  while v_live.id is null loop
    v_now := greatest(tokenlimits.clock(), v_now);
    v_states := tokenlimits.limit_states(v_usage.group_id, array[p_user_id], p_kind, v_now);
    v_now := greatest(v_now, (select max(s.since) from unnest(v_states) as s));
    v_usage.id := tokenlimits.uuid_v7();
    v_usage.created_at := coalesce(least(p_created_at, v_now), v_now);
    v_usage.settled_at := v_now;
    v_taken := false;
    begin
      v_states := tokenlimits.write_usage(v_usage, v_states, p_enforce => false);
      v_taken := v_states is null;
      if v_taken then
        raise sqlstate 'TL099';
      end if;
    exception
      when sqlstate 'TL099' then
        continue when not v_taken;
    end;
    if v_states is not null then
      return tokenlimits.answer(p_kind, p_cost, null, v_usage.group_id, v_states, null, v_usage, p_replayed => false);
    end if;
    v_live := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_usage.fingerprint);
  end loop;
  v_states := tokenlimits.limit_states(v_live.group_id, array[p_user_id], p_kind, v_now);
  return tokenlimits.answer(p_kind, v_live.cost, null, v_live.group_id, v_states, null, v_live, p_replayed => true);
end
$$;
comment on function tokenlimits.record(uuid, text, bigint, timestamptz, text, uuid, jsonb)
is 'What record_generation does.';
revoke execute on function tokenlimits.record(uuid, text, bigint, timestamptz, text, uuid, jsonb)
from public, anon, authenticated;
grant execute on function tokenlimits.record(uuid, text, bigint, timestamptz, text, uuid, jsonb) to service_role;

-- Any group when named, for people leave; else the first of the user's that has a limit for the kind, else their first.
create or replace function tokenlimits.recording_group(p_user_id uuid, p_kind text, p_group_id uuid)
returns uuid
language plpgsql
stable
set search_path = ''
as $$
declare
  v_group_id uuid;
begin
  if p_group_id is not null then
    return (tokenlimits.require_group(p_group_id)).id;
  end if;
  select g.id into v_group_id
  from unnest(tokenlimits.paying_groups(p_user_id)) with ordinality as g (id, place)
  order by
    exists (select from public.group_limits as l where l.group_id = g.id and l.kind = p_kind) desc,
    g.place
  limit 1;
  if v_group_id is null then
    perform tokenlimits.refuse(
      'TL001',
      'group_id: is required, since the user is in no group',
      'group_id',
      'Name the group that this usage belongs to.'
    );
  end if;
  return v_group_id;
end
$$;
comment on function tokenlimits.recording_group(uuid, text, uuid) is 'The group that past usage is booked on.';
revoke execute on function tokenlimits.recording_group(uuid, text, uuid) from public, anon, authenticated;

create or replace function public.record_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_created_at timestamptz default null,
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
  return tokenlimits.record(
    p_user_id, p_kind, p_cost, p_created_at, p_idempotency_key, p_group_id, tokenlimits.json_argument(p_metadata)
  );
end
$$;
comment on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
is 'Records past or outside usage: moves the counters of its period, never denies.';
revoke execute on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb) to service_role;
