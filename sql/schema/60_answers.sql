-- Who may pay, and what is answered.
--
-- Invariants
--   * A user's groups are tried by priority, then by when they joined; the default group is for users in none.
--   * Every answer about a generation is made by tokenlimits.answer: a single call's, a batch's and a settlement's.

create or replace view tokenlimits.paying_groups as
select
  m.user_id,
  array_agg(g.id order by g.priority desc, m.joined_at asc, g.id asc) as group_ids
from public.group_memberships as m
inner join public.user_groups as g on m.group_id = g.id
group by m.user_id;
comment on view tokenlimits.paying_groups is 'Each user''s own groups, in the order in which they are tried.';
revoke all on tokenlimits.paying_groups from public, anon, authenticated, service_role;

create or replace function tokenlimits.require_group(p_group_id uuid)
returns public.user_groups
language plpgsql
stable
{{ search_path() }}
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
{{ private(
  'require_group(uuid)',
  "The group of that id; raises TL002 when there is none.",
  to='authenticated, service_role'
) }}

do $do$
begin
  if to_regtype('tokenlimits.verdict') is null then
    -- whether a request is allowed, which group it is about, and by which limits it was judged
    create type tokenlimits.verdict as (
      allowed boolean,
      reason text,
      group_id uuid,
      group_name text,
      timezone text,
      states tokenlimits.limit_state[],
      denied_by tokenlimits.limit_state,
      at timestamptz
    );
    -- as clients see it: to_jsonb of a row costs a third of what building an object does
    create type tokenlimits.limit_answer as (
      kind text,
      period text,
      scope text,
      max bigint,
      used bigint,
      remaining bigint,
      reset_at timestamptz
    );
    create type tokenlimits.group_answer as (id uuid, name text);
    create type tokenlimits.generation_answer as (
      allowed boolean,
      reason text,
      error text,
      usage_id uuid,
      status text,
      expires_at timestamptz,
      "group" tokenlimits.group_answer,
      kind text,
      cost bigint,
      limits tokenlimits.limit_answer[],
      denied_by tokenlimits.limit_answer,
      remaining bigint,
      reset_at timestamptz,
      retry_after numeric,
      replayed boolean
    );
  end if;
end
$do$;

-- Says it to people: "Image generation limit exceeded: 100 of 100 used this month, resets 2026-12-01 00:00 UTC".
create or replace function tokenlimits.denial_text(p_verdict tokenlimits.verdict, p_kind text, p_cost bigint)
returns text
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_kind text := replace(p_kind, '_', ' ');
  v_limit tokenlimits.limit_state := p_verdict.denied_by;
begin
  if p_verdict.reason = 'not_in_group' then
    return 'The user is in no group that may pay for this';
  elsif p_verdict.reason = 'no_limit_for_kind' then
    return format('None of the user''s groups has a limit for %s generations, so none is allowed', v_kind);
  elsif p_verdict.reason = 'busy' then
    return 'Somebody else is changing what the group uses, or its limits, at this moment; ask again';
  end if;
  return upper(left(v_kind, 1)) || substr(v_kind, 2)
    || format(' generation limit exceeded: %s of %s used ', v_limit.used, v_limit.max)
    || case v_limit.scope when 'member' then 'by this user ' else '' end
    || case v_limit.period
      when 'day' then 'today'
      when 'lifetime' then 'in total'
      else 'this ' || v_limit.period
    end
    || case when p_cost > 1 then format(', %s more asked for', p_cost) else '' end
    || case
      when isfinite(v_limit.until)
        then ', resets ' || to_char(v_limit.until at time zone p_verdict.timezone, 'YYYY-MM-DD HH24:MI ')
          || p_verdict.timezone
      else ''
    end;
end
$$;
{{ private('denial_text(tokenlimits.verdict, text, bigint)', "Why a request was denied, in a sentence.") }}

-- The object that workers get. Of an allowed request, remaining and reset_at are those of the limit with the least
-- room; of a denied one, reset_at is when the limit that denied it will have room (null: never by itself).
create or replace function tokenlimits.answer(
  p_verdict tokenlimits.verdict,
  p_kind text,
  p_cost bigint,
  p_usage public.generation_usage,
  p_replayed boolean
)
returns jsonb
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_state tokenlimits.limit_state;
  v_limits tokenlimits.limit_answer[] := '{}';
  v_denied_by tokenlimits.limit_answer;
  v_group tokenlimits.group_answer;
  v_remaining bigint;
  v_reset_at timestamptz;
  v_error text;
  v_retry_after numeric;
begin
  foreach v_state in array coalesce(p_verdict.states, '{}') loop
    v_limits := v_limits || {{ limit_answer('v_state') | indent(4) }};
    if v_state.max is not null and (v_remaining is null or v_state.max - v_state.used < v_remaining) then
      v_remaining := greatest(v_state.max - v_state.used, 0);
      v_reset_at := nullif(v_state.until, 'infinity');
    end if;
  end loop;
  if p_verdict.group_id is not null then
    v_group := row(p_verdict.group_id, p_verdict.group_name);
  end if;
  if p_verdict.reason is not null then
    v_error := tokenlimits.denial_text(p_verdict, p_kind, p_cost);
    v_state := p_verdict.denied_by;
    v_reset_at := nullif(v_state.until, 'infinity');
    v_retry_after := ceil(extract(epoch from v_reset_at - tokenlimits.clock()));
    if p_verdict.reason = 'limit_exceeded' then
      v_denied_by := {{ limit_answer('v_state') | indent(6) }};
    end if;
  end if;
  return to_jsonb(row(
    p_verdict.reason is null, p_verdict.reason, v_error, p_usage.id, p_usage.status, p_usage.expires_at,
    v_group, p_kind, p_cost, v_limits, v_denied_by, v_remaining, v_reset_at, v_retry_after, p_replayed
  )::tokenlimits.generation_answer);
end
$$;
{{ private(
  'answer(tokenlimits.verdict, text, bigint, public.generation_usage, boolean)',
  "A verdict, with the usage that it has led to, as workers see it."
) }}

create or replace function tokenlimits.usage_answer(p_usage public.generation_usage, p_at timestamptz, p_replayed boolean)
returns jsonb
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.allowed := true;
  v_verdict.group_id := p_usage.group_id;
  v_verdict.group_name := (select g.name from public.user_groups as g where g.id = p_usage.group_id);
  v_verdict.states := tokenlimits.limit_states(p_usage.group_id, array[p_usage.user_id], p_usage.kind, p_at);
  return tokenlimits.answer(v_verdict, p_usage.kind, p_usage.cost, p_usage, p_replayed);
end
$$;
{{ private(
  'usage_answer(public.generation_usage, timestamptz, boolean)',
  "A usage of the ledger as workers see it, with its limits at a moment."
) }}
