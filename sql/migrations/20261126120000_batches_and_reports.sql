-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

-- Time-ordered (RFC 9562, version 7): new rows land at the right edge of the primary key, which keeps it in memory.
create or replace function tokenlimits.uuid_v7()
returns uuid
language plpgsql
volatile
set search_path = ''
as $$
begin
  -- the tail of a random one, from after its version: date_part, for extract counts in slow numerics
  return (
    lpad(to_hex((date_part('epoch', clock_timestamp()) * 1000)::bigint), 12, '0')
    || '7'
    || substr(gen_random_uuid()::text, 16)
  )::uuid;
end
$$;

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
set search_path = ''
as $$
  select jsonb_build_object('version', 2)
$$;

create or replace function tokenlimits.refuse_isolation()
returns void
language plpgsql
stable
set search_path = ''
as $$
begin
  perform tokenlimits.refuse(
    'TL009',
    'tokenlimits needs READ COMMITTED transactions',
    current_setting('transaction_isolation'),
    'Call it outside your transaction, or begin that with isolation level read committed.'
  );
end
$$;

comment on function tokenlimits.refuse_isolation() is 'Raises TL009: the transaction has another isolation level.';

revoke execute on function tokenlimits.refuse_isolation() from public, anon, authenticated;

create or replace function tokenlimits.lock_groups(p_group_ids uuid[], p_exclusive boolean default false)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
  -- 'tokl' in ASCII, so that our locks do not meet a project's own
  c_class constant integer := 1953459052;
  v_stripe integer;
begin
  -- what is read after a lock was waited for must be as it is then
  if current_setting('transaction_isolation') <> 'read committed' then
    perform tokenlimits.refuse_isolation();
  end if;
  if cardinality(p_group_ids) = 1 and not p_exclusive then
    -- what nearly every call needs, without a query
    perform pg_advisory_xact_lock_shared(c_class, ('x' || right(p_group_ids[1]::text, 2))::bit(8)::integer);
    return;
  end if;
  -- 256 stripes bound the number of locks that a bulk edit takes; sorted, or two of us could deadlock
  for v_stripe in
    select distinct ('x' || right(g.id::text, 2))::bit(8)::integer
    from unnest(p_group_ids) as g (id)
    order by 1
  loop
    if p_exclusive then
      perform pg_advisory_xact_lock(c_class, v_stripe);
    else
      perform pg_advisory_xact_lock_shared(c_class, v_stripe);
    end if;
  end loop;
end
$$;

-- the first version, which had no end
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.count_usage(uuid, uuid, text, timestamptz);

-- Counts afresh what a counter would hold. For a group: whole buckets from the rollup, and the parts of buckets before
-- and after them from the ledger, each by itself: joined to both, the planner may read all of the group's rows. For a
-- member: from the ledger, by their own rows.
create or replace function tokenlimits.count_usage(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz
)
returns bigint
language plpgsql
stable
set search_path = ''
as $$
declare
  -- least: a minute has no whole bucket
  v_whole timestamptz := least(tokenlimits.rollup_bucket(p_since + interval '15 minutes' - interval '1 us'), p_until);
  v_rest timestamptz := greatest(tokenlimits.rollup_bucket(p_until), v_whole);
begin
  if p_user_id is not null then
    return coalesce((
      select sum(u.cost)
      from public.generation_usage as u
      where
        u.user_id = p_user_id
        and u.created_at >= p_since
        and u.created_at < p_until
        and u.group_id = p_group_id
        and u.kind = p_kind
        and u.status in ('reserved', 'committed')
    ), 0);
  end if;
  return coalesce((
    select sum(r.cost)
    from tokenlimits.usage_rollup as r
    where r.group_id = p_group_id and r.kind = p_kind and r.bucket >= v_whole and r.bucket < v_rest
  ), 0) + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = p_group_id
      and u.created_at >= p_since
      and u.created_at < v_whole
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0) + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = p_group_id
      and u.created_at >= v_rest
      and u.created_at < p_until
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0);
end
$$;

comment on function tokenlimits.count_usage(uuid, uuid, text, timestamptz, timestamptz)
is 'Live usage of a kind between two moments, of a member of a group, or of the whole group when the user is null.';

revoke execute on function tokenlimits.count_usage(uuid, uuid, text, timestamptz, timestamptz)
from public, anon, authenticated;

-- What a group's limits are at a moment, and what happens when they are edited.
--
-- Invariants
--   * limit_states answers members' limits first, by member, then the group's: the order in which they are locked.
--   * Every edit of limits, by function or by an admin's plain update, passes the triggers below.

-- the first version, which looked at one user
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.limit_states(uuid, uuid, text, timestamptz);

-- Hot path: one query, and nothing else where all counters are open and no hold has expired.
create or replace function tokenlimits.limit_states(
  p_group_id uuid,
  p_user_ids uuid[],
  p_kind text,
  p_at timestamptz
)
returns tokenlimits.limit_state[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_states tokenlimits.limit_state[];
  v_are_open boolean;
  v_any_expired boolean;
  v_timezone text;
begin
  select
    array_agg(
      row(
        l.counter_id, l.subject, l.kind, l.period, l.scope, l.max, c.since, c.until, c.used, null, c.until > p_at
      )::tokenlimits.limit_state
      order by l.kind, l.scope = 'group', l.subject, l.counter_id
    ),
    bool_and(coalesce(c.until > p_at, false)),
    exists (
      select
      from tokenlimits.holds as h
      where h.group_id = p_group_id and (p_kind is null or h.kind = p_kind) and h.expires_at <= p_at
    ),
    min(l.timezone)
  into v_states, v_are_open, v_any_expired, v_timezone
  from (
    select
      i.counter_id, i.kind, i.period, i.scope, i.max, g.timezone,
      -- here and not in "from", where it costs more than all the rest
      unnest(case i.scope when 'group' then array[p_group_id] else p_user_ids end) as subject
    from public.group_limits as i
    inner join public.user_groups as g on g.id = i.group_id
    where i.group_id = p_group_id and (p_kind is null or i.kind = p_kind)
  ) as l
  left join lateral (
    select k.since, k.until, k.used
    from tokenlimits.counters as k
    where k.subject = l.subject and k.counter_id = l.counter_id
    -- a look-up for each, whatever the planner thinks of the size of an array
    offset 0
  ) as c on true;
  if v_are_open and not v_any_expired then
    return v_states;
  end if;
  return tokenlimits.present_states(coalesce(v_states, '{}'), p_group_id, v_timezone, p_at, v_any_expired);
end
$$;

comment on function tokenlimits.limit_states(uuid, uuid[], text, timestamptz)
is 'A group''s limits for users, of a kind or of all. Of a user that is null, a member limit counts all members.';

revoke execute on function tokenlimits.limit_states(uuid, uuid[], text, timestamptz) from public, anon, authenticated;

-- What costs more: a counter that is missing (a limit or a member that is new) or past, and holds that have expired.
create or replace function tokenlimits.present_states(
  p_states tokenlimits.limit_state[],
  p_group_id uuid,
  p_timezone text,
  p_at timestamptz,
  p_any_expired boolean
)
returns tokenlimits.limit_state[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_states tokenlimits.limit_state[] := '{}';
  v tokenlimits.limit_state;
  v_period tstzrange;
  v_sum record;
begin
  foreach v in array p_states loop
    if v.is_open is not true then
      v_period := tokenlimits.period_of(v.period, p_timezone, p_at);
      -- never before the past counter's end: when the server gets new rules of a time zone, it may lie in this period
      v.since := greatest(lower(v_period), v.until, (
        select max(r.reset_at)
        from tokenlimits.usage_resets as r
        where r.group_id = p_group_id and r.kind in (v.kind, '*')
      ));
      v.used := case
        when v.until is null then tokenlimits.count_usage(
          p_group_id, case v.scope when 'member' then v.subject end, v.kind, v.since, upper(v_period)
        )
        else 0
      end;
      v.until := upper(v_period);
    end if;
    v.expired := case when p_any_expired then 0 end;
    v_states := v_states || v;
  end loop;
  if p_any_expired then
    -- for all at once: a batch has a thousand members, and there may be thousands of holds
    for v_sum in
      select s.place, sum(h.cost)::bigint as cost
      from unnest(v_states) with ordinality as s (
        counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, place
      )
      inner join (
        select e.kind, e.created_at, e.cost, t.scope, t.subject
        from tokenlimits.holds as e
        cross join lateral (values ('member', e.user_id), ('group', e.group_id)) as t (scope, subject)
        where e.group_id = p_group_id and e.expires_at <= p_at
      ) as h
        on
          h.scope = case when s.subject is null then 'group' else s.scope end
          and h.subject = coalesce(s.subject, p_group_id)
          and h.kind = s.kind
          and h.created_at >= s.since
      group by s.place
    loop
      v_states[v_sum.place].expired := v_sum.cost;
      v_states[v_sum.place].used := v_states[v_sum.place].used - v_sum.cost;
    end loop;
  end if;
  return v_states;
end
$$;

comment on function tokenlimits.present_states(tokenlimits.limit_state[], uuid, text, timestamptz, boolean)
is 'Limits with what their counters would hold at this moment.';

revoke execute on function tokenlimits.present_states(
  tokenlimits.limit_state[], uuid, text, timestamptz, boolean
) from public, anon, authenticated;

-- Waits for the calls that judge by the old limits, then drops the group's counters that no limit uses any more and
-- counts the new ones, so that no worker has to. Members' counters are counted on their first call.
create or replace function tokenlimits.apply_limits()
returns trigger
language plpgsql
-- definer: counters are private
security definer
set search_path = ''
as $$
declare
  v_group_id uuid;
  v_group_ids uuid[];
begin
  if tg_op = 'INSERT' then
    v_group_ids := array(select distinct n.group_id from new_rows as n);
  elsif tg_op = 'DELETE' then
    v_group_ids := array(select distinct o.group_id from old_rows as o);
  else
    v_group_ids := array(
      select n.group_id from new_rows as n
      union
      select o.group_id from old_rows as o
    );
  end if;
  perform tokenlimits.lock_groups(v_group_ids, true);
  foreach v_group_id in array v_group_ids loop
    perform tokenlimits.drop_stale_counters(v_group_id);
    insert into tokenlimits.counters as c (subject, counter_id, since, until, used)
    select s.subject, s.counter_id, s.since, s.until, s.used + coalesce(s.expired, 0)
    from unnest(tokenlimits.limit_states(v_group_id, array[null]::uuid[], null, tokenlimits.clock())) as s
    where s.scope = 'group' and s.is_open is not true
    on conflict (subject, counter_id) do update
    set since = excluded.since, until = excluded.until, used = excluded.used;
  end loop;
  return null;
end
$$;

-- The verdict before any group was looked at.
create or replace function tokenlimits.unjudged(p_group_ids uuid[], p_at timestamptz)
returns tokenlimits.verdict
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.allowed := false;
  v_verdict.reason := case when p_group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end;
  v_verdict.at := p_at;
  return v_verdict;
end
$$;

comment on function tokenlimits.unjudged(uuid[], timestamptz) is 'The verdict while no group has been looked at.';

revoke execute on function tokenlimits.unjudged(uuid[], timestamptz) from public, anon, authenticated;

-- One group more in a verdict: whether it pays, or how long until it could.
create or replace function tokenlimits.weigh(
  p_verdict tokenlimits.verdict,
  p_group_id uuid,
  p_states tokenlimits.limit_state[],
  p_cost bigint
)
returns tokenlimits.verdict
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
begin
  if p_states = '{}' then
    return p_verdict;
  end if;
  foreach v_state in array p_states loop
    -- a counter may be ahead of a clock that was set back; the usage belongs to the counter's period then
    p_verdict.at := greatest(p_verdict.at, v_state.since);
    if v_state.used + p_cost > v_state.max then
      -- what can never fit, and a lifetime limit, wait for ever
      if p_cost > v_state.max then
        v_state.until := 'infinity';
      end if;
      if v_full is null or v_state.until > v_full.until then
        v_full := v_state;
      end if;
    end if;
  end loop;
  p_verdict.allowed := v_full is null;
  if p_verdict.allowed or p_verdict.reason <> 'limit_exceeded' or v_full.until < (p_verdict.denied_by).until then
    p_verdict.reason := case when not p_verdict.allowed then 'limit_exceeded' end;
    p_verdict.group_id := p_group_id;
    p_verdict.states := p_states;
    p_verdict.denied_by := v_full;
  end if;
  return p_verdict;
end
$$;

comment on function tokenlimits.weigh(tokenlimits.verdict, uuid, tokenlimits.limit_state[], bigint)
is 'A verdict with one more group looked at: it pays, or may have room before those that were looked at.';

revoke execute on function tokenlimits.weigh(tokenlimits.verdict, uuid, tokenlimits.limit_state[], bigint)
from public, anon, authenticated;

create or replace function tokenlimits.judge(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_group_ids uuid[],
  p_at timestamptz
)
returns tokenlimits.verdict
language plpgsql
stable
set search_path = ''
as $$
declare
  v_verdict tokenlimits.verdict := tokenlimits.unjudged(p_group_ids, p_at);
  v_group_id uuid;
begin
  foreach v_group_id in array p_group_ids loop
    v_verdict := tokenlimits.weigh(
      v_verdict, v_group_id, tokenlimits.limit_states(v_group_id, array[p_user_id], p_kind, p_at), p_cost
    );
    exit when v_verdict.allowed;
  end loop;
  return v_verdict;
end
$$;

-- Says it to people: "Image generation limit exceeded: 100 of 100 used this month, resets 2026-12-01 00:00 UTC".
create or replace function tokenlimits.denial_text(
  p_reason text,
  p_kind text,
  p_cost bigint,
  p_denied_by tokenlimits.limit_state,
  p_timezone text
)
returns text
language plpgsql
stable
set search_path = ''
as $$
declare
  v_kind text := replace(p_kind, '_', ' ');
begin
  if p_reason = 'not_in_group' then
    return 'The user is in no group that may pay for this';
  elsif p_reason = 'no_limit_for_kind' then
    return format('None of the user''s groups has a limit for %s generations, so none is allowed', v_kind);
  elsif p_reason = 'busy' then
    return 'Somebody else is changing what the group uses, or its limits, at this moment; ask again';
  end if;
  return upper(left(v_kind, 1)) || substr(v_kind, 2)
    || format(' generation limit exceeded: %s of %s used ', p_denied_by.used, p_denied_by.max)
    || case p_denied_by.scope when 'member' then 'by this user ' else '' end
    || case p_denied_by.period
      when 'day' then 'today'
      when 'lifetime' then 'in total'
      else 'this ' || p_denied_by.period
    end
    || case when p_cost > 1 then format(', %s more asked for', p_cost) else '' end
    || case
      when isfinite(p_denied_by.until)
        then ', resets ' || to_char(p_denied_by.until at time zone p_timezone, 'YYYY-MM-DD HH24:MI ') || p_timezone
      else ''
    end;
end
$$;

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

-- Many requests in one transaction, first step: reading them.
--
-- Invariants
--   * A bad request doesn't touch the others: what a single call raises is an answer here, of reason 'refused'.
--   * An item is open until it has an answer; what was answered is never judged, and writes nothing.
--   * The first place of a key stands for all the places that have it.

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

comment on function tokenlimits.read_requests(jsonb) is 'The requests of a batch.';

revoke execute on function tokenlimits.read_requests(jsonb) from public, anon, authenticated;

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

-- Many requests in one transaction, second step: judging them, in memory.
--
-- Invariants
--   * Each is judged by what those before it have left, as if it had come alone.
--   * Nothing is written here, and no counter is waited for. Each limit is read once, however many items it binds.

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
  cross join lateral (values ('group', g.id), ('member', i.user_id)) as w (scope, subject)
  left join rows from (unnest(p_states), unnest(p_group_ids)) with ordinality as s (
    counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, group_id, no
  ) on s.group_id = g.id and s.kind = i.kind and s.scope = w.scope and s.subject = w.subject
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

-- Many requests in one transaction: read (76), judged (77) and written (78), until a verdict holds.
--
-- Invariants
--   * The answers are those that single calls in that order would get, and a denial doesn't touch the others.
--   * The stripes of all groups are held, shared, before any limit is read.
--   * With p_max_wait, no lock is waited for longer: what somebody holds is answered 'busy', and the rest goes on.

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

-- the one before had no search
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.list_members(uuid, uuid, integer);

create or replace function tokenlimits.list_members(p_group_id uuid, p_after uuid, p_page_size integer, p_search text)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are in auth.users, which is not open to admins
security definer
set search_path = ''
as $$
declare
  v_search text := nullif(lower(btrim(p_search)), '');
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    select jsonb_agg(to_jsonb(page) order by page.user_id)
    from (
      select m.user_id, u.email, m.joined_at
      from public.group_memberships as m
      -- the offset: member by member, or a search may read all users of the project
      cross join lateral (select u.email from auth.users as u where u.id = m.user_id offset 0) as u
      where
        m.group_id = p_group_id
        and (p_after is null or m.user_id > p_after)
        and (v_search is null or strpos(lower(u.email), v_search) > 0)
      order by m.user_id
      limit least(greatest(p_page_size, 1), 1000)
    ) as page
  ), '[]');
end
$$;

comment on function tokenlimits.list_members(uuid, uuid, integer, text) is 'What group_members does.';

revoke execute on function tokenlimits.list_members(uuid, uuid, integer, text) from public, anon, authenticated;

grant execute on function tokenlimits.list_members(uuid, uuid, integer, text) to authenticated, service_role;

-- the one before had no search
-- squawk-ignore ban-drop-function
drop function if exists public.group_members(uuid, uuid, integer);

create or replace function public.group_members(
  p_group_id uuid,
  p_after uuid default null,
  p_page_size integer default 500,
  p_search text default null
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.list_members(p_group_id, p_after, p_page_size, p_search);
end
$$;

comment on function public.group_members(uuid, uuid, integer, text)
is 'A group''s members, or those whose e-mail address contains a text: the page after a user id, in the order of ids.';

revoke execute on function public.group_members(uuid, uuid, integer, text)
from public, anon, authenticated, service_role;

grant execute on function public.group_members(uuid, uuid, integer, text) to authenticated, service_role;

-- Usage for users and admins, and history.
--
-- Invariants
--   * Numbers come from counters and the rollup, never from scanning the ledger, so they cost the same for ever.

create or replace function tokenlimits.user_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  return coalesce((
    select jsonb_agg(
      tokenlimits.limit_json(s.state) || jsonb_build_object('group', jsonb_build_object('id', g.id, 'name', g.name))
      order by p.place, s.place
    )
    from unnest(tokenlimits.paying_groups(p_user_id)) with ordinality as p (id, place)
    inner join public.user_groups as g on g.id = p.id
    cross join lateral (
      select row(u.*)::tokenlimits.limit_state as state, row_number() over () as place
      from unnest(tokenlimits.limit_states(p.id, array[p_user_id], null, v_now)) as u
    ) as s
  ), '[]');
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
        coalesce(s.used, o.used, case
          when s.since = tokenlimits.rollup_bucket(s.since) and s.until = tokenlimits.rollup_bucket(s.until)
            then coalesce((
              select sum(r.cost)
              from tokenlimits.usage_rollup as r
              where r.group_id = s.group_id and r.kind = s.kind and r.bucket >= s.since and r.bucket < s.until
            ), 0)
          else tokenlimits.count_usage(s.group_id, null, s.kind, s.since, s.until)
        end)
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

create or replace function tokenlimits.check_bucket(p_bucket text)
returns void
language plpgsql
stable
set search_path = ''
as $$
begin
  if p_bucket is null or p_bucket not in ('hour', 'day', 'week', 'month') then
    perform tokenlimits.refuse('TL001', 'bucket: must be hour, day, week or month', 'bucket');
  end if;
end
$$;

comment on function tokenlimits.check_bucket(text) is 'Raises TL001 unless it is a step of the history.';

revoke execute on function tokenlimits.check_bucket(text) from public, anon, authenticated;

-- A group that was deleted since has lost its time zone too.
create or replace function tokenlimits.timezone_of(p_group_id uuid)
returns text
language plpgsql
stable
set search_path = ''
as $$
begin
  return coalesce((select g.timezone from public.user_groups as g where g.id = p_group_id), 'UTC');
end
$$;

comment on function tokenlimits.timezone_of(uuid) is 'The time zone in which a group''s periods begin.';

revoke execute on function tokenlimits.timezone_of(uuid) from public, anon, authenticated;

create or replace function tokenlimits.history(
  p_group_id uuid,
  p_kind text,
  p_bucket text,
  p_since timestamptz,
  p_until timestamptz
)
returns jsonb
language plpgsql
stable
-- definer: the rollup is private
security definer
set search_path = ''
as $$
declare
  v_timezone text := 'UTC';
  v_since timestamptz;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_bucket(p_bucket);
  if p_group_id is not null then
    v_timezone := (tokenlimits.require_group(p_group_id)).timezone;
  end if;
  -- whole buckets: the first is the one that p_since lies in
  v_since := lower(tokenlimits.period_of(p_bucket, v_timezone, p_since));
  return coalesce((
    select jsonb_agg(to_jsonb(points) order by points.bucket, points.kind)
    from (
      select
        lower(tokenlimits.period_of(p_bucket, v_timezone, r.bucket)) as bucket,
        r.kind,
        sum(r.cost) as used,
        sum(r.generations) as generations
      from (
        select q.bucket, q.kind, sum(q.cost) as cost, sum(q.generations) as generations
        from (
          select r.group_id, r.bucket, r.kind, r.cost, r.generations
          from tokenlimits.usage_rollup as r
          union all
          -- expired holds that nobody has swept yet
          select h.group_id, tokenlimits.rollup_bucket(h.created_at), h.kind, -h.cost, -1
          from tokenlimits.holds as h
          where h.expires_at <= tokenlimits.clock()
        ) as q
        where
          (p_group_id is null or q.group_id = p_group_id)
          and (p_kind is null or q.kind = p_kind)
          and q.bucket >= v_since
          and q.bucket < p_until
        group by q.bucket, q.kind
      ) as r
      group by 1, 2
      having sum(r.generations) > 0
    ) as points
  ), '[]');
end
$$;

-- Reading much of the ledger, or of its sums: page by page; and who used most.
--
-- Invariants
--   * A page reads a bounded number of rows, by an index, however rare what it looks for is: a short page is not the
--     end, a page without "next" is.
--   * Pages follow each other by columns that never change. What was committed before the first page, and created
--     before "until", is in exactly one of them, as a row or in a sum.

create or replace function tokenlimits.usage_json(p_usage public.generation_usage)
returns jsonb
language sql
stable
set search_path = ''
as $$
  select jsonb_build_object(
    'id', p_usage.id,
    'group', jsonb_build_object(
      'id', p_usage.group_id,
      'name', (select g.name from public.user_groups as g where g.id = p_usage.group_id)
    ),
    'user_id', p_usage.user_id,
    'email', (select u.email from auth.users as u where u.id = p_usage.user_id),
    'kind', p_usage.kind,
    'cost', p_usage.cost,
    'status', p_usage.status,
    'idempotency_key', p_usage.idempotency_key,
    'metadata', p_usage.metadata,
    'created_at', p_usage.created_at,
    'settled_at', p_usage.settled_at,
    'expires_at', p_usage.expires_at
  )
$$;

comment on function tokenlimits.usage_json(public.generation_usage) is 'A row of the ledger, as an export shows it.';

revoke execute on function tokenlimits.usage_json(public.generation_usage) from public, anon, authenticated;

-- Of one user by their own index, else of one group after the other by theirs: no index of its own, which every call
-- would have to keep. p_after is the "next" of the page before.
create or replace function tokenlimits.export_page(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_after jsonb,
  p_page_size integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are in auth.users, which is not open to admins
security definer
set search_path = ''
as $$
declare
  c_groups constant integer := 1000;
  v_after jsonb := tokenlimits.json_argument(p_after);
  v_since timestamptz := coalesce(p_since, '-infinity');
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, tokenlimits.clock() + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_group_id uuid := coalesce(p_group_id, (v_after ->> 'group_id')::uuid);
  v_at timestamptz := coalesce((v_after ->> 'created_at')::timestamptz, v_since);
  v_id uuid := coalesce((v_after ->> 'id')::uuid, '00000000-0000-0000-0000-000000000000');
  v_page public.generation_usage[];
  v_rows jsonb := '[]';
begin
  perform tokenlimits.require_admin();
  for i in 1..c_groups loop
    if p_user_id is not null then
      v_page := array(
        select u
        from public.generation_usage as u
        where u.user_id = p_user_id and (u.created_at, u.id) > (v_at, v_id) and u.created_at < v_until
        order by u.created_at, u.id
        limit v_left
      );
    else
      v_group_id := coalesce(v_group_id, (
        select u.group_id from public.generation_usage as u order by u.group_id limit 1
      ));
      v_page := array(
        select u
        from public.generation_usage as u
        where u.group_id = v_group_id and (u.created_at, u.id) > (v_at, v_id) and u.created_at < v_until
        order by u.created_at, u.id
        limit v_left
      );
    end if;
    v_rows := v_rows || coalesce((
      select jsonb_agg(tokenlimits.usage_json(row(p.*)::public.generation_usage) order by p.created_at, p.id)
      from unnest(v_page) as p
      where (p_kind is null or p.kind = p_kind) and (p_group_id is null or p.group_id = p_group_id)
    ), '[]');
    v_left := v_left - cardinality(v_page);
    if v_left = 0 then
      v_at := v_page[cardinality(v_page)].created_at;
      v_id := v_page[cardinality(v_page)].id;
      exit;
    end if;
    v_at := v_since;
    v_id := '00000000-0000-0000-0000-000000000000';
    v_group_id := case when p_group_id is null and p_user_id is null then (
      select u.group_id from public.generation_usage as u where u.group_id > v_group_id order by u.group_id limit 1
    ) end;
    exit when v_group_id is null;
  end loop;
  return jsonb_build_object(
    'rows', v_rows,
    'until', v_until,
    'next', case when v_left = 0 or v_group_id is not null then jsonb_build_object(
      'group_id', v_group_id, 'created_at', v_at, 'id', v_id
    ) end
  );
end
$$;

comment on function tokenlimits.export_page(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
is 'What export_usage does.';

revoke execute on function tokenlimits.export_page(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated;

grant execute on function tokenlimits.export_page(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

create or replace function public.export_usage(
  p_group_id uuid default null,
  p_user_id uuid default null,
  p_kind text default null,
  p_since timestamptz default null,
  p_until timestamptz default null,
  p_after jsonb default null,
  p_page_size integer default 1000
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.export_page(p_group_id, p_user_id, p_kind, p_since, p_until, p_after, p_page_size);
end
$$;

comment on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
is 'The ledger, page by page: ask again with p_after and p_until as the "next" and "until" of the page before.';

revoke execute on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

-- Sum after sum of each series (a group and a kind) of the rollup, in the order of its key: one look-up finds where the
-- next sum begins, another adds it up, so time in which nothing was used costs nothing. p_after is the "next" of the
-- page before.
create or replace function tokenlimits.export_sums(
  p_group_id uuid,
  p_kind text,
  p_bucket text,
  p_since timestamptz,
  p_until timestamptz,
  p_after jsonb,
  p_page_size integer
)
returns jsonb
language plpgsql
stable
-- definer: the rollup is private
security definer
set search_path = ''
as $$
declare
  -- what a page may read, in rows of the rollup (a month of one kind has up to 47,616), and what a look-up counts as
  c_rows constant integer := 100000;
  c_look_up constant integer := 50;
  v_after jsonb := tokenlimits.json_argument(p_after);
  v_now timestamptz := tokenlimits.clock();
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, v_now + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_rows_left integer := c_rows;
  v_group_id uuid := coalesce(
    (v_after ->> 'group_id')::uuid, p_group_id, '00000000-0000-0000-0000-000000000000'
  );
  v_kind text := coalesce(v_after ->> 'kind', '');
  v_timezone text := tokenlimits.timezone_of(v_group_id);
  -- from here on in this series; at infinity it is over
  v_at timestamptz := coalesce((v_after ->> 'bucket')::timestamptz, 'infinity');
  v_period tstzrange;
  v_sum record;
  v_rows jsonb[] := '{}';
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_bucket(p_bucket);
  while v_left > 0 and v_rows_left > 0 loop
    v_rows_left := v_rows_left - c_look_up;
    v_at := (
      select r.bucket
      from tokenlimits.usage_rollup as r
      where r.group_id = v_group_id and r.kind = v_kind and r.bucket >= v_at and r.bucket < v_until
      order by r.bucket
      limit 1
    );
    if v_at is null then
      select r.group_id, r.kind into v_group_id, v_kind
      from tokenlimits.usage_rollup as r
      where (r.group_id, r.kind) > (v_group_id, v_kind)
      order by r.group_id, r.kind
      limit 1;
      if v_group_id is null or v_group_id <> p_group_id then
        v_group_id := null;
        exit;
      end if;
      v_timezone := tokenlimits.timezone_of(v_group_id);
      v_at := case
        when v_kind <> p_kind then 'infinity'
        -- whole buckets: the first is the one that p_since lies in
        when isfinite(p_since) then lower(tokenlimits.period_of(p_bucket, v_timezone, p_since))
        else coalesce(p_since, '-infinity')
      end;
      continue;
    end if;
    v_period := tokenlimits.period_of(p_bucket, v_timezone, v_at);
    select sum(q.cost) as used, sum(q.generations) as generations, count(*) as rows into v_sum
    from (
      select r.bucket, r.cost, r.generations
      from tokenlimits.usage_rollup as r
      where r.group_id = v_group_id and r.kind = v_kind and r.bucket >= v_at and r.bucket < upper(v_period)
      union all
      -- expired holds that nobody has swept yet
      select tokenlimits.rollup_bucket(h.created_at), -h.cost, -1
      from tokenlimits.holds as h
      where h.group_id = v_group_id and h.kind = v_kind and h.expires_at <= v_now
    ) as q
    where q.bucket >= v_at and q.bucket < least(upper(v_period), v_until);
    if v_sum.generations > 0 then
      v_rows := v_rows || jsonb_build_object(
        'group', jsonb_build_object(
          'id', v_group_id,
          'name', (select g.name from public.user_groups as g where g.id = v_group_id)
        ),
        'timezone', v_timezone,
        'bucket', lower(v_period),
        'kind', v_kind,
        'used', v_sum.used,
        'generations', v_sum.generations
      );
      v_left := v_left - 1;
    end if;
    v_rows_left := v_rows_left - v_sum.rows::integer;
    v_at := upper(v_period);
  end loop;
  return jsonb_build_object(
    'rows', to_jsonb(v_rows),
    'until', v_until,
    'next', case when v_group_id is not null then jsonb_build_object(
      'group_id', v_group_id, 'kind', v_kind, 'bucket', v_at
    ) end
  );
end
$$;

comment on function tokenlimits.export_sums(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
is 'What export_history does.';

revoke execute on function tokenlimits.export_sums(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated;

grant execute on function tokenlimits.export_sums(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

create or replace function public.export_history(
  p_group_id uuid default null,
  p_kind text default null,
  p_bucket text default 'day',
  p_since timestamptz default null,
  p_until timestamptz default null,
  p_after jsonb default null,
  p_page_size integer default 1000
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.export_sums(p_group_id, p_kind, p_bucket, p_since, p_until, p_after, p_page_size);
end
$$;

comment on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
is 'Live usage per group, kind and bucket in the group''s time zone, page by page as export_usage.';

revoke execute on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

-- Counters forget past periods, so this reads the ledger: as long as the time is, not as the history is.
create or replace function tokenlimits.rank_members(
  p_group_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_count integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are in auth.users, which is not open to admins
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    select jsonb_agg(
      to_jsonb(top) || jsonb_build_object('email', (select a.email from auth.users as a where a.id = top.user_id))
      order by top.used desc, top.user_id
    )
    from (
      select u.user_id, sum(u.cost) as used, count(*) as generations
      from public.generation_usage as u
      where
        u.group_id = p_group_id
        and u.created_at >= coalesce(p_since, coalesce(p_until, v_now) - interval '30 days')
        and u.created_at < coalesce(p_until, 'infinity')
        and (p_kind is null or u.kind = p_kind)
        and (u.status = 'committed' or (u.status = 'reserved' and u.expires_at > v_now))
      group by u.user_id
      order by used desc, u.user_id
      limit least(greatest(p_count, 1), 1000)
    ) as top
  ), '[]');
end
$$;

comment on function tokenlimits.rank_members(uuid, text, timestamptz, timestamptz, integer)
is 'What top_members does.';

revoke execute on function tokenlimits.rank_members(uuid, text, timestamptz, timestamptz, integer)
from public, anon, authenticated;

grant execute on function tokenlimits.rank_members(uuid, text, timestamptz, timestamptz, integer)
to authenticated, service_role;

create or replace function public.top_members(
  p_group_id uuid,
  p_kind text default null,
  p_since timestamptz default null,
  p_until timestamptz default null,
  p_count integer default 10
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.rank_members(p_group_id, p_kind, p_since, p_until, p_count);
end
$$;

comment on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
is 'Who used most in a group, also those who left; in the last 30 days by default.';

revoke execute on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
from public, anon, authenticated, service_role;

grant execute on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
to authenticated, service_role;

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
      tokenlimits.count_usage(
        p_group_id, case c.scope when 'member' then c.subject end, c.kind, c.since, c.until
      ) as used
    from (
      select m.subject, m.counter_id, l.kind, l.period, l.scope, m.used, m.since, m.until
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

-- For those who run it: users by their addresses, and whether everything is as it should be.
--
-- Invariants
--   * Nothing here changes anything.
--   * tokenlimits_diagnosis answers facts; what they mean is said by `tokenlimits doctor`.

create or replace function tokenlimits.users_of_emails(p_emails text[])
returns jsonb
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
set search_path = ''
as $$
begin
  perform tokenlimits.require_admin();
  if cardinality(p_emails) > 5000 then
    perform tokenlimits.refuse('TL001', 'emails: are at most 5000 in one call', 'emails');
  end if;
  return coalesce((
    select jsonb_agg(jsonb_build_object('user_id', u.id, 'email', u.email) order by u.email, u.id)
    from auth.users as u
    where lower(u.email) in (select lower(btrim(e.email)) from unnest(p_emails) as e (email))
  ), '[]');
end
$$;

comment on function tokenlimits.users_of_emails(text[]) is 'What find_users_by_email does.';

revoke execute on function tokenlimits.users_of_emails(text[]) from public, anon, authenticated;

grant execute on function tokenlimits.users_of_emails(text[]) to authenticated, service_role;

create or replace function public.find_users_by_email(p_emails text[])
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.users_of_emails(p_emails);
end
$$;

comment on function public.find_users_by_email(text[])
is 'The users who have one of up to 5,000 e-mail addresses, whatever its case.';

revoke execute on function public.find_users_by_email(text[]) from public, anon, authenticated, service_role;

grant execute on function public.find_users_by_email(text[]) to authenticated, service_role;

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

comment on function tokenlimits.drift(uuid, timestamptz) is 'What usage_drift does.';

revoke execute on function tokenlimits.drift(uuid, timestamptz) from public, anon, authenticated;

grant execute on function tokenlimits.drift(uuid, timestamptz) to authenticated, service_role;

create or replace function public.usage_drift(p_group_id uuid, p_since timestamptz default null)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.drift(p_group_id, p_since);
end
$$;

comment on function public.usage_drift(uuid, timestamptz)
is 'Where a group''s counters and history differ from the ledger; changes nothing. The history of a day by default.';

revoke execute on function public.usage_drift(uuid, timestamptz) from public, anon, authenticated, service_role;

grant execute on function public.usage_drift(uuid, timestamptz) to authenticated, service_role;

-- Asks the project's rule about a caller who is made up, and puts the real one back.
create or replace function tokenlimits.would_be_admin(p_claims jsonb)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_claims text := current_setting('request.jwt.claims', true);
  v_answer boolean;
begin
  perform set_config('request.jwt.claims', p_claims::text, true);
  begin
    v_answer := tokenlimits.is_admin();
  exception when others then
    v_answer := null;
  end;
  perform set_config('request.jwt.claims', coalesce(v_claims, ''), true);
  return v_answer;
end
$$;

comment on function tokenlimits.would_be_admin(jsonb)
is 'Would a caller with these claims be an admin? Null: it failed.';

revoke execute on function tokenlimits.would_be_admin(jsonb) from public, anon, authenticated;

-- What the statistics know, and the sizes of files; no table is read. "needed" is what an index would take that was
-- built now: each row's columns at their average width, aligned, with header and pointer, in pages filled to nine
-- tenths. Rows are estimated as the planner does, or from what was written since, whichever are more: where that is
-- wrong, an index looks too small rather than too large, and where it is not known yet, "needed" is null.
create or replace function tokenlimits.storage()
returns jsonb
language plpgsql
stable
-- definer: statistics of columns are for who may read them
security definer
set search_path = ''
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'group_memberships', 'generation_usage'];
  c_unknown_width constant integer := 32;
begin
  perform tokenlimits.require_admin();
  return jsonb_build_object(
    'tables', (
      select jsonb_agg(jsonb_build_object(
        'name', format('%I.%I', s.schemaname, s.relname), 'live', s.n_live_tup, 'dead', s.n_dead_tup
      ) order by s.schemaname, s.relname)
      from pg_catalog.pg_stat_all_tables as s
      where s.schemaname = 'tokenlimits' or (s.schemaname = 'public' and s.relname = any(c_tables))
    ),
    'indexes', (
      select jsonb_agg(jsonb_build_object(
        'name', format('%I.%I', n.nspname, c.relname),
        'valid', i.indisvalid,
        'bytes', pg_relation_size(c.oid),
        'needed', ((r.rows * (4 + 8 * ceil((8 + w.width) / 8.0))) / 0.9)::bigint
      ) order by n.nspname, c.relname)
      from pg_catalog.pg_index as i
      inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
      inner join pg_catalog.pg_class as t on t.oid = i.indrelid
      inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
      cross join lateral (
        select case when t.reltuples >= 0 and t.relpages > 0 then greatest(
          pg_stat_get_live_tuples(t.oid),
          t.reltuples / t.relpages * pg_relation_size(t.oid) / current_setting('block_size')::integer
        ) end as rows
      ) as r
      cross join lateral (
        select sum(coalesce(s.avg_width, c_unknown_width)) as width
        from unnest(i.indkey) as k (attnum)
        left join pg_catalog.pg_attribute as a on a.attrelid = t.oid and a.attnum = k.attnum
        left join pg_catalog.pg_stats as s
          on s.schemaname = n.nspname and s.tablename = t.relname and s.attname = a.attname
      ) as w
      where
        t.relnamespace = 'tokenlimits'::regnamespace
        or (t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables))
    )
  );
end
$$;

comment on function tokenlimits.storage() is 'Dead rows, and how large indexes are and need to be.';

revoke execute on function tokenlimits.storage() from public, anon, authenticated;

create or replace function tokenlimits.diagnosis()
returns jsonb
language plpgsql
volatile
-- definer: auth.users is not open to admins
security definer
set search_path = ''
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'group_memberships', 'generation_usage'];
  c_user constant jsonb := '{"role": "authenticated", "sub": "00000000-0000-4000-8000-000000000000"}';
begin
  perform tokenlimits.require_admin();
  return jsonb_build_object(
    'version', (public.tokenlimits_version() ->> 'version')::integer,
    'postgres', current_setting('server_version'),
    'at', tokenlimits.clock(),
    'tables', (
      select jsonb_object_agg(t.relname, jsonb_build_object(
        'rls', t.relrowsecurity,
        'anon', has_table_privilege('anon', t.oid, 'select, insert, update, delete'),
        'authenticated', (
          select coalesce(jsonb_agg(a.name order by a.name), '[]')
          from unnest(array['select', 'insert', 'update', 'delete']) as a (name)
          where has_table_privilege('authenticated', t.oid, a.name)
        )
      ))
      from pg_catalog.pg_class as t
      where t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables)
    ),
    'policies', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'table', p.tablename, 'name', p.policyname, 'action', lower(p.cmd),
        'asks_is_admin', concat(p.qual, p.with_check) like '%is_admin()%'
      ) order by p.tablename, p.policyname), '[]')
      from pg_catalog.pg_policies as p
      where p.schemaname = 'public' and p.tablename = any(c_tables)
    ),
    'functions', (
      select jsonb_object_agg(f.proname, (
        select coalesce(jsonb_agg(r.name order by r.name), '[]')
        from unnest(array['anon', 'authenticated', 'service_role']) as r (name)
        where has_function_privilege(r.name, f.oid, 'execute')
      ))
      from pg_catalog.pg_proc as f
      where
        f.pronamespace = 'public'::regnamespace
        and (f.prosrc like '%tokenlimits.%' or f.proname = 'tokenlimits_version')
    ),
    'private_schema_open', has_schema_privilege('anon', 'tokenlimits', 'usage'),
    'triggers', (
      select coalesce(jsonb_agg(t.tgname order by t.tgname), '[]')
      from pg_catalog.pg_trigger as t
      inner join pg_catalog.pg_class as c on c.oid = t.tgrelid
      where
        c.relnamespace = 'public'::regnamespace
        and c.relname = any(c_tables) and not t.tgisinternal and t.tgenabled <> 'D'
    ),
    'indexes', (
      select coalesce(jsonb_agg(c.relname order by c.relname), '[]')
      from pg_catalog.pg_index as i
      inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
      inner join pg_catalog.pg_class as t on t.oid = i.indrelid
      where
        i.indisvalid
        and (t.relnamespace = 'tokenlimits'::regnamespace or (
          t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables)
        ))
    ),
    'storage', tokenlimits.storage(),
    'is_admin', jsonb_build_object(
      'nobody', tokenlimits.would_be_admin(c_user),
      'user_metadata', tokenlimits.would_be_admin(c_user || '{"user_metadata": {"role": "admin"}}'),
      'app_metadata', tokenlimits.would_be_admin(c_user || '{"app_metadata": {"role": "admin"}}')
    ),
    'groups', (select count(*) from public.user_groups),
    'default_group', (select g.name from public.user_groups as g where g.is_default),
    'groups_without_limits', (
      select count(*)
      from public.user_groups as g
      where not exists (select from public.group_limits as l where l.group_id = g.id)
    ),
    -- of many it is enough to know that they are many
    'users_in_no_group', (
      select count(*)
      from (
        select
        from auth.users as u
        where not exists (select from public.group_memberships as m where m.user_id = u.id)
        limit 1001
      ) as n
    ),
    'ledger_rows', (
      select greatest(c.reltuples, 0)::bigint
      from pg_catalog.pg_class as c
      where c.oid = 'public.generation_usage'::regclass
    )
  );
end
$$;

comment on function tokenlimits.diagnosis() is 'What tokenlimits_diagnosis does.';

revoke execute on function tokenlimits.diagnosis() from public, anon, authenticated;

grant execute on function tokenlimits.diagnosis() to authenticated, service_role;

create or replace function public.tokenlimits_diagnosis()
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.diagnosis();
end
$$;

comment on function public.tokenlimits_diagnosis()
is 'How tokenlimits is installed here: tables, policies, functions, triggers, indexes, who is an admin, users.';

revoke execute on function public.tokenlimits_diagnosis() from public, anon, authenticated, service_role;

grant execute on function public.tokenlimits_diagnosis() to authenticated, service_role;

-- PostgREST serves the new functions from now on.
notify pgrst, 'reload schema';
