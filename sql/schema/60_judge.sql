-- Judging a request, and putting the verdict into an answer.
--
-- Invariants
--   * judge writes nothing and waits for no counter, so a denial is cheap.
--   * Of several groups without room, the answer is about the one that will have room first.

create or replace function tokenlimits.require_group(p_group_id uuid)
returns public.user_groups
language plpgsql
stable
set search_path = ''
as $$
declare
  v_group public.user_groups;
begin
  select * into v_group from public.user_groups as g where g.id = p_group_id;
  if not found then
    perform tokenlimits.refuse(
      'TL002',
      format('there is no group %s', coalesce(p_group_id::text, 'null')),
      p_group_id::text,
      'It may have been deleted; list the groups to see which there are.'
    );
  end if;
  return v_group;
end
$$;
comment on function tokenlimits.require_group(uuid) is 'The group of that id; raises TL002 when there is none.';
revoke execute on function tokenlimits.require_group(uuid) from public, anon, authenticated;
grant execute on function tokenlimits.require_group(uuid) to authenticated, service_role;

-- The groups that may pay for a user, in the order in which they are tried.
create or replace function tokenlimits.paying_groups(p_user_id uuid, p_group_id uuid default null)
returns uuid[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_ids uuid[] := array(
    select g.id
    from public.group_memberships as m
    inner join public.user_groups as g on g.id = m.group_id
    where m.user_id = p_user_id
    order by g.priority desc, m.joined_at, g.id
  );
begin
  if v_ids = '{}' then
    v_ids := array(select g.id from public.user_groups as g where g.is_default);
  end if;
  if p_group_id is null then
    return v_ids;
  elsif p_group_id = any(v_ids) then
    return array[p_group_id];
  end if;
  return '{}';
end
$$;
comment on function tokenlimits.paying_groups(uuid, uuid)
is 'A user''s groups by priority, then by when they joined; the default group for a user in none; or the pinned one.';
revoke execute on function tokenlimits.paying_groups(uuid, uuid) from public, anon, authenticated;

do $do$
begin
  if to_regtype('tokenlimits.verdict') is null then
    create type tokenlimits.verdict as (
      allowed boolean,
      reason text,
      group_id uuid,
      states tokenlimits.limit_state[],
      denied_by tokenlimits.limit_state,
      at timestamptz
    );
  end if;
end
$do$;

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
comment on function tokenlimits.judge(uuid, text, bigint, uuid[], timestamptz)
is 'Which of the groups pays for a request at a moment, or why none does.';
revoke execute on function tokenlimits.judge(uuid, text, bigint, uuid[], timestamptz) from public, anon, authenticated;

create or replace function tokenlimits.limit_json(p_state tokenlimits.limit_state)
returns jsonb
language plpgsql
immutable
set search_path = ''
as $$
begin
  return jsonb_build_object(
    'kind', p_state.kind,
    'period', p_state.period,
    'scope', p_state.scope,
    'max', p_state.max,
    'used', p_state.used,
    -- greatest() passes over nulls, and unlimited is null
    'remaining', case when p_state.max is not null then greatest(p_state.max - p_state.used, 0) end,
    'reset_at', nullif(p_state.until, 'infinity')
  );
end
$$;
comment on function tokenlimits.limit_json(tokenlimits.limit_state) is 'A limit as clients see it.';
revoke execute on function tokenlimits.limit_json(tokenlimits.limit_state) from public, anon, authenticated;

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
comment on function tokenlimits.denial_text(text, text, bigint, tokenlimits.limit_state, text)
is 'Why a request was denied, in a sentence.';
revoke execute on function tokenlimits.denial_text(text, text, bigint, tokenlimits.limit_state, text)
from public, anon, authenticated;

-- The object that workers get. Of an allowed request, remaining and reset_at are those of the limit with the least
-- room; of a denied one, reset_at is when the limit that denied it will have room (null: never by itself).
create or replace function tokenlimits.answer(
  p_kind text,
  p_cost bigint,
  p_reason text,
  p_group_id uuid,
  p_states tokenlimits.limit_state[],
  p_denied_by tokenlimits.limit_state,
  p_usage public.generation_usage,
  p_replayed boolean
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
declare
  v_group record;
  v_state tokenlimits.limit_state;
  v_limits jsonb := '[]';
  v_remaining bigint;
  v_reset_at timestamptz;
begin
  select g.name, g.timezone into v_group
  from public.user_groups as g
  where g.id = p_group_id;
  foreach v_state in array coalesce(p_states, '{}') loop
    v_limits := v_limits || tokenlimits.limit_json(v_state);
    if v_state.max is not null and (v_remaining is null or v_state.max - v_state.used < v_remaining) then
      v_remaining := v_state.max - v_state.used;
      v_reset_at := v_state.until;
    end if;
  end loop;
  if p_reason is not null then
    v_reset_at := p_denied_by.until;
  end if;
  return jsonb_build_object(
    'allowed', p_reason is null,
    'reason', p_reason,
    'error', case
      when p_reason is not null
        then tokenlimits.denial_text(p_reason, p_kind, p_cost, p_denied_by, coalesce(v_group.timezone, 'UTC'))
    end,
    'usage_id', p_usage.id,
    'status', p_usage.status,
    'expires_at', p_usage.expires_at,
    'group', case when p_group_id is not null then jsonb_build_object('id', p_group_id, 'name', v_group.name) end,
    'kind', p_kind,
    'cost', p_cost,
    'limits', v_limits,
    'denied_by', case when p_reason = 'limit_exceeded' then tokenlimits.limit_json(p_denied_by) end,
    'remaining', case when v_remaining is not null then greatest(v_remaining, 0) end,
    'reset_at', nullif(v_reset_at, 'infinity'),
    'retry_after', case
      when p_reason is not null
        then ceil(extract(epoch from nullif(v_reset_at, 'infinity') - tokenlimits.clock()))
    end,
    'replayed', p_replayed
  );
end
$$;
comment on function tokenlimits.answer(
  text, bigint, text, uuid, tokenlimits.limit_state[], tokenlimits.limit_state, public.generation_usage, boolean
) is 'A verdict or a recorded usage as workers see it.';
revoke execute on function tokenlimits.answer(
  text, bigint, text, uuid, tokenlimits.limit_state[], tokenlimits.limit_state, public.generation_usage, boolean
) from public, anon, authenticated;
