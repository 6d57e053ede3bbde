-- Answers.
--
-- Invariants
--   * The same lines build every answer about a generation: of a single call, a batch and a settlement.

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
      'It may have been deleted; list the groups to see which exist.'
    );
  end if;
  return v_group;
end
$$;
{{ private(
  'require_group(uuid)',
  "The group with that id; raises TL002 if there is none.",
  to='authenticated, service_role'
) }}

-- The groups that a call judges, and so locks: a user doesn't wait for a group that has no limit for the kind. Where
-- none does, the first is enough to say so. A group that gets its first limit for the kind at this very moment is left
-- out, as if the call had come a moment earlier; its counter is counted from its own usage, so it misses nothing.
create or replace function tokenlimits.entitling(p_group_ids uuid[], p_kind text)
returns uuid[]
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return coalesce(
    nullif(array(
      select g.id
      from unnest(p_group_ids) with ordinality as g (id, place)
      where {{ is_limited('g.id', 'p_kind') | indent(6) }}
      order by g.place
    ), '{}'),
    p_group_ids[1:1]
  );
end
$$;
{{ private(
  'entitling(uuid[], text)',
  "Those of some groups that have a limit for a kind, themselves or above them; the first, if none has."
) }}

do $do$
begin
  if to_regtype('tokenlimits.verdict') is null then
    -- whether a request is allowed, for which group, and the limits by which it was judged
    create type tokenlimits.verdict as (
      allowed boolean,
      reason text,
      group_id uuid,
      states tokenlimits.limit_state[],
      denied_by tokenlimits.limit_state,
      -- the counters of observing limits that would have denied it
      observed bigint[]
    );
    -- as clients see it: row_to_json costs a fraction of building an object
    create type tokenlimits.group_answer as (id uuid, name text);
    create type tokenlimits.limit_answer as (
      kind text,
      period text,
      starts text,
      scope text,
      mode text,
      max bigint,
      used bigint,
      remaining bigint,
      reset_at timestamptz,
      weight bigint,
      "group" tokenlimits.group_answer
    );
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
      would_deny tokenlimits.limit_answer[],
      remaining bigint,
      reset_at timestamptz,
      retry_after numeric,
      replayed boolean
    );
  end if;
end
$do$;

-- For people to read: "Image generation limit exceeded: 100 of 100 used this month, resets 2026-12-01 00:00 UTC".
create or replace function tokenlimits.denial_text(p_verdict tokenlimits.verdict, p_kind text, p_cost bigint)
returns text
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_kind text := replace(p_kind, '_', ' ');
  v_limit tokenlimits.limit_state := p_verdict.denied_by;
  v_until text := to_char(v_limit.until at time zone v_limit.timezone, 'YYYY-MM-DD HH24:MI ') || v_limit.timezone;
  v_error text;
  v_whose text := case
    when v_limit.scope = 'member' then 'by this user '
    when v_limit.scope = 'child' then 'by this customer '
    when v_limit.group_id <> p_verdict.group_id then format('in %s ', v_limit.group_name)
    else ''
  end;
begin
  if p_verdict.reason = 'not_in_group' then
    return 'The user is in no group that may pay for this';
  elsif p_verdict.reason = 'no_limit_for_kind' then
    return format('None of the user''s groups has a limit for %s generations, so none is allowed', v_kind);
  elsif p_verdict.reason = 'busy' then
    return 'The group is locked at the moment, because its usage or its limits are being changed; try again';
  end if;
  v_error := upper(left(v_kind, 1)) || substr(v_kind, 2) || ' generation limit exceeded: ';
  if v_limit.period = 'in_flight' then
    return v_error
      || rtrim(
        format('%s %s in progress ', v_limit.used, case v_limit.used when 1 then v_kind else v_kind || 's' end) || v_whose
      )
      || format(', at most %s at once', v_limit.max)
      || case when isfinite(v_limit.until) then ', next place ' || v_until else '' end;
  end if;
  return v_error
    || format('%s of %s ', v_limit.used, v_limit.max)
    || case when v_limit.counts is not null then replace(v_limit.kind, '_', ' ') || ' ' else '' end
    || 'used '
    || v_whose
    || case
      when v_limit.starts = 'rolling' then 'in the last ' || v_limit.period
      when v_limit.starts <> 'calendar' then 'since ' || to_char(
        v_limit.since at time zone v_limit.timezone, 'YYYY-MM-DD HH24:MI'
      )
      when v_limit.period = 'day' then 'today'
      when v_limit.period = 'lifetime' then 'in total'
      else 'this ' || v_limit.period
    end
    || case
      when p_cost * v_limit.weight > 1 then format(', %s more asked for', p_cost * v_limit.weight)
      else ''
    end
    || case
      when isfinite(v_limit.until)
        then case v_limit.starts when 'rolling' then ', room again ' else ', resets ' end || v_until
      else ''
    end;
end
$$;
{{ private('denial_text(tokenlimits.verdict, text, bigint)', "The reason for a denial, as a sentence.") }}

create or replace function tokenlimits.answer(
  p_verdict tokenlimits.verdict,
  p_kind text,
  p_cost bigint,
  p_usage public.generation_usage,
  p_replayed boolean
)
returns json
language plpgsql
stable
{{ search_path() }}
as $$
declare
  {{ variables_of_answer() | indent(2) }}
  v_state tokenlimits.limit_state;
  v_denied_by tokenlimits.limit_answer;
  v_group_name text;
begin
  foreach v_state in array coalesce(p_verdict.states, '{}') loop
    {{ add_limit('v_state', observed='p_verdict.observed', payer='p_verdict.group_id') | indent(4) }}
  end loop;
  {{ read_name('v_state', 'p_verdict.group_id') | indent(2) }}
  if p_verdict.reason is null then
    return {{ answer(
      kind='p_kind', cost='p_cost', group_id='p_verdict.group_id', group_name='v_group_name', usage_id='p_usage.id',
      status='p_usage.status', expires_at='p_usage.expires_at', replayed='p_replayed'
    ) | indent(4) }};
  end if;
  v_state := p_verdict.denied_by;
  if p_verdict.reason = 'limit_exceeded' then
    v_denied_by := {{ limit_answer('v_state', payer='p_verdict.group_id') | indent(4) }};
  end if;
  return {{ answer(
    kind='p_kind', cost='p_cost', group_id='p_verdict.group_id', group_name='v_group_name', usage_id='null',
    status='null', expires_at='null', replayed='p_replayed', reason='p_verdict.reason',
    error='tokenlimits.denial_text(p_verdict, p_kind, p_cost)', denied_by='v_denied_by', reset_at='v_state.until',
    retry_after="ceil(extract(epoch from nullif(v_state.until, 'infinity') - tokenlimits.clock()))"
  ) | indent(2) }};
end
$$;
{{ private(
  'answer(tokenlimits.verdict, text, bigint, public.generation_usage, boolean)',
  "A verdict, with the usage that it has led to, as workers see it."
) }}

create or replace function tokenlimits.usage_answer(
  p_usage public.generation_usage,
  p_at timestamptz,
  p_replayed boolean,
  p_observed bigint[] default null
)
returns json
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.allowed := true;
  v_verdict.group_id := p_usage.group_id;
  v_verdict.states := tokenlimits.limit_states(
    p_usage.group_id, array[p_usage.user_id], array[p_usage.kind], p_at,
    p_in_flight => p_usage.reserved_cost is not null
  );
  v_verdict.observed := p_observed;
  return tokenlimits.answer(v_verdict, p_usage.kind, p_usage.cost, p_usage, p_replayed);
end
$$;
{{ private(
  'usage_answer(public.generation_usage, timestamptz, boolean, bigint[])',
  "A usage of the ledger as workers see it, with its limits at a moment."
) }}
