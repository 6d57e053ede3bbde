-- One request: judged and recorded in one step (track, reserve, record), or only judged (check).
--
-- Invariants
--   * Either the ledger row, the rollup and every counter move, or nothing is written.
--   * Here, only record takes a counter past its limit's max, and no call is denied while there is room: a verdict is
--     carried out only if every counter still has room when it is moved. Otherwise everything is rolled back and judged
--     again.
--   * One live usage per user and idempotency key.

-- Metadata is measured in its stored form before it is written out: a number of ten bytes may have 131,072 digits,
-- before or after the point. Numbers beyond the range of JSON readers are refused, so the rest can't grow.
create or replace function tokenlimits.is_metadata(p_metadata jsonb)
returns boolean
language plpgsql
immutable
{{ search_path() }}
as $$
begin
  if jsonb_typeof(p_metadata) <> 'object' or pg_column_size(p_metadata) > 32768 then
    return false;
  elsif jsonb_path_exists(p_metadata, '$.** ? (@.type() == "number" && (@ > 1.8e308 || @ < -1.8e308))') then
    return false;
  elsif pg_column_size(p_metadata) > 1024 and exists (
    select
    from jsonb_path_query(p_metadata, '$.** ? (@.type() == "number")') as n (value)
    where scale(n.value::numeric) > 400
  ) then
    return false;
  end if;
  return octet_length(p_metadata::text) <= 8192;
end
$$;
{{ private('is_metadata(jsonb)', "Whether this can be stored as a usage's metadata.") }}

create or replace function tokenlimits.refuse_request(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text
)
returns void
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_field text;
  v_rule text;
begin
  if p_user_id is null then
    v_field := 'user_id';
    v_rule := 'is required';
  elsif ({{ is_kind('p_kind') }}) is not true then
    v_field := 'kind';
    v_rule := 'must be 1 to 32 of a-z, 0-9 and _, and begin with a letter';
  elsif ({{ is_cost('p_cost') }}) is not true then
    v_field := 'cost';
    v_rule := 'must be a whole number from 1 to {{ most_of_a_cost() }}';
  elsif not ({{ is_key('p_idempotency_key') }}) then
    v_field := 'idempotency_key';
    v_rule := 'must have 1 to 255 characters';
  else
    -- the only field left
    v_field := 'metadata';
    v_rule := 'must be a JSON object of at most 8192 bytes, with numbers below 1.8e308';
  end if;
  perform tokenlimits.refuse('TL001', v_field || ': ' || v_rule, v_field, 'Nothing was recorded.');
end
$$;
{{ private(
  'refuse_request(uuid, text, bigint, text)',
  "Raises TL001 with the name of the invalid field of a request."
) }}

create or replace function tokenlimits.refuse_key(p_idempotency_key text, p_usage_id uuid)
returns void
language plpgsql
volatile
{{ search_path() }}
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
{{ private('refuse_key(text, uuid)', "Raises TL008: an idempotency key is bound to another request.") }}

-- The live usage that a key is bound to. A caller that is about to write may take the key of a dead usage. A denial
-- must leave the key where it is, since a late commit makes an expired usage live again.
create or replace function tokenlimits.usage_under_key(
  p_user_id uuid,
  p_idempotency_key text,
  p_fingerprint uuid,
  out live public.generation_usage,
  out dead_id uuid
)
returns record
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  select * into live
  from public.generation_usage as u
  where u.idempotency_key = p_idempotency_key and u.user_id = p_user_id;
  if {{ is_dead('live', 'tokenlimits.clock()') }} then
    dead_id := live.id;
    live := null;
  elsif live.fingerprint <> p_fingerprint then
    perform tokenlimits.refuse_key(p_idempotency_key, live.id);
  end if;
end
$$;
{{ private(
  'usage_under_key(uuid, text, uuid)',
  "The live usage that has a key, or the id of a dead one that has it; raises TL008 if it belongs to another request."
) }}

-- Past usage is recorded for any group that is named, since people leave groups; otherwise for the first of the user's
-- groups that has a limit for the kind, or else for their first group.
create or replace function tokenlimits.recording_group(p_user_id uuid, p_kind text, p_group_id uuid)
returns uuid[]
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_group_id is not null then
    return array(select g.id from public.user_groups as g where g.id = p_group_id);
  end if;
  return array(
    select g.id
    from unnest({{ payers('p_user_id') | indent(4) }}) with ordinality as g (id, place)
    order by
      {{ is_limited('g.id', 'p_kind', only="l.period <> 'in_flight'") | indent(6) }} desc,
      g.place
    limit 1
  );
end
$$;
{{ private('recording_group(uuid, text, uuid)', "The group for which past usage is recorded, if there is one.") }}

create or replace function tokenlimits.refuse_group(p_operation text, p_group_id uuid)
returns void
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_group_id is not null then
    perform tokenlimits.require_group(p_group_id);
  elsif p_operation = 'record' then
    perform tokenlimits.refuse(
      'TL001',
      'group_id: is required, since the user is in no group',
      'group_id',
      'Name the group that this usage belongs to.'
    );
  end if;
end
$$;
{{ private(
  'refuse_group(text, uuid)',
  "Raises TL002 if the group does not exist, and TL001 if record needs one."
) }}

-- Judges and writes, until a verdict holds: in every round but the last, another call was faster and succeeded. Rare
-- steps are separate functions: an invalid request, a counter to open, expired holds, a key that is taken. The build
-- generates a function for each operation, since a test for the operation at every step would cost as much as the step.
-- Only record never denies.
{%- set keyed = [
  'p_idempotency_key text default null', 'p_group_id uuid default null', 'p_metadata jsonb default null'
] %}
{%- set request = ['p_user_id uuid', 'p_kind text', 'p_cost bigint default 1'] %}
{%- for operation, parameters, comment in [
  (
    'track', request + keyed,
    'Checks every limit and records the generation, in one step: whether it is allowed, what remains, when it resets.'
  ),
  (
    'reserve', request + ['p_ttl bigint default 3600'] + keyed,
    'Holds a generation\'s cost for p_ttl seconds, or until it is committed or released; answers like track_generation.'
  ),
  (
    'record', request + ['p_created_at timestamptz default null'] + keyed,
    'Records past usage, or usage from elsewhere: moves the counters of its period and never denies.'
  ),
] %}

create or replace function tokenlimits.{{ operation }}_generation(
{%- for parameter in parameters %}
  {{ parameter.split(' default ')[0] }}{{ ',' if not loop.last }}
{%- endfor %}
)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
{{ search_path() }}
as $$
declare
  {{ variables_of_verdict() | indent(2) }}
  v_fingerprint uuid := {{ fingerprint("'" ~ operation ~ "'", 'p_kind', 'p_cost', 'p_group_id') }};
  v_usage public.generation_usage;
  v_under_key record;
  v_dead_id uuid;
  {%- if operation != 'record' %}
  v_slot integer;
  {{ variables_of_answer() | indent(2) }}
  {%- endif %}
begin
  if ({{ is_request('p_user_id', 'p_kind', 'p_cost', 'p_idempotency_key', 'p_metadata') | indent(2) }}) is not true then
    perform tokenlimits.refuse_request(p_user_id, p_kind, p_cost, p_idempotency_key);
  {%- if operation == 'reserve' %}
  elsif ({{ is_ttl('p_ttl') }}) is not true then
    {{ refuse_ttl('Nothing was reserved.') | indent(4) }}
  {%- elif operation == 'record' %}
  elsif p_created_at > tokenlimits.clock() + interval '1 minute' then
    -- clocks may differ by a minute
    perform tokenlimits.refuse('TL001', 'created_at: must not be in the future', 'created_at', 'Nothing was recorded.');
  elsif not ({{ is_moment('p_created_at') }}) then
    perform tokenlimits.refuse('TL001', 'created_at: must not be before 1970', 'created_at', 'Nothing was recorded.');
  {%- endif %}
  elsif {{ in_wrong_transaction() }} then
    perform tokenlimits.refuse_transaction();
  end if;

  {%- if operation == 'record' %}
  v_group_ids := tokenlimits.recording_group(p_user_id, p_kind, p_group_id);
  {%- else %}
  {{ read_payers('v_group_ids', 'p_user_id', 'p_kind', 'p_group_id') | indent(2) }}
  {%- endif %}
  -- nearly every call has a single group: the condition itself locks it, at a tenth of the cost of a query
  if
    cardinality(v_group_ids) <> 1
    or pg_advisory_xact_lock_shared({{ stripe_class() }}, {{ stripe('v_group_ids[1]') }}) is null
  then
    perform tokenlimits.lock_groups(v_group_ids);
  end if;
  loop
    -- never before the moment that an earlier round reached, or a clock that was set back would loop for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    {{ judge('p_user_id', 'p_kind', 'p_cost', is_hold=operation == 'reserve') | indent(4) }}
    {%- if operation == 'record' %}
    -- judged only to find the moment that its counters have reached; record is never denied
    v_verdict.allowed := v_group_ids <> '{}';
    v_verdict.group_id := v_group_ids[1];
    v_verdict.observed := null;
    v_state.is_spread := (select g.is_spread from public.user_groups as g where g.id = v_group_ids[1]);
    {%- endif %}
    if v_verdict.allowed then
      {%- set created_at = 'coalesce(least(p_created_at, v_at), v_at)' if operation == 'record' else 'v_at' %}
      {%- set usage_of = {
        'id': usage_id(created_at, home('v_state', 'v_verdict.group_id', 'p_user_id')), 'group_id': 'v_verdict.group_id', 'user_id': 'p_user_id',
        'kind': 'p_kind', 'cost': 'p_cost', 'idempotency_key': 'p_idempotency_key', 'fingerprint': 'v_fingerprint',
        'metadata': 'p_metadata', 'created_at': created_at
      } %}
      {%- if operation == 'reserve' %}
      v_usage := {{ usage(
        status="'reserved'", reserved_cost='p_cost', expires_at='v_at + make_interval(secs => p_ttl)', **usage_of
      ) | indent(6) }};
      {%- else %}
      v_usage := {{ usage(status="'committed'", settled_at='v_at', **usage_of) | indent(6) }};
      {%- endif %}
      begin
        {%- if operation != 'record' %}
        if v_is_plain and v_dead_id is null then
          {{ into_ledger('v_usage') | indent(10) }}
          if found then
            {%- if operation == 'reserve' %}
            {{ into_holds('v_usage', root_id='v_usage.group_id') | indent(12) }}
            {%- endif %}
            v_slot := {{ own_slot() }};
            if not {{ try_slot('v_slot', 'v_usage.group_id') }} then
              v_slot := tokenlimits.free_slot(v_usage.group_id);
            end if;
            {{ add_to_rollup('v_usage', 'v_slot') | indent(12) }}
            -- the group's own counters, which all its members share, come last, so that they are locked for the
            -- shortest time
            foreach v_state in array v_states loop
              {{ move_counter('v_state', 'p_cost', 'v_at', 'false') | indent(14) }}
              if not found then
                raise sqlstate 'TL099';
              end if;
              {{ add_limit('v_state', plain=true) | indent(14) }}
            end loop;
            return {{ answer(
              kind='p_kind', cost='p_cost', group_id='v_usage.group_id', group_name='v_state.group_name',
              usage_id='v_usage.id', status='v_usage.status', expires_at='v_usage.expires_at', replayed='false',
              reset_at='v_tightest.until', left='v_tightest.max - v_tightest.used'
            ) | indent(12) }};
          end if;
          -- the key is taken; by which usage is looked up below
        else
          {{ write_and_return('true') | indent(10) }}
        end if;
        {%- else %}
        {{ write_and_return('false') | indent(8) }}
        {%- endif %}
      exception
        when sqlstate 'TL099' then
          -- everything is rolled back, to be judged again
          {%- if operation == 'record' %}
          null;
          {%- else %}
          v_limits := '{}';
          v_tightest := null;
          {%- endif %}
      end;
    end if;
    if p_idempotency_key is not null then
      v_under_key := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_fingerprint);
      if (v_under_key.live).id is not null then
        return tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
      end if;
      v_dead_id := v_under_key.dead_id;
    end if;
    if not v_verdict.allowed then
      if v_verdict.reason = 'not_in_group' then
        -- not earlier: a repeated call is answered even if its group was deleted
        perform tokenlimits.refuse_group('{{ operation }}', p_group_id);
      {%- if operation != 'record' %}
      elsif v_verdict.states[1].expired is not null then
        perform tokenlimits.sweep(v_verdict.group_id, p_kind, v_at);
      {%- endif %}
      end if;
      return tokenlimits.answer(v_verdict, p_kind, p_cost, null, p_replayed => false);
    end if;
  end loop;
end
$$;
{{ rpc(operation ~ '_generation', parameters, to='service_role', comment=comment, returns='json') }}
{%- endfor %}

create or replace function tokenlimits.check_generation(p_user_id uuid, p_kind text, p_cost bigint, p_group_id uuid)
returns json
language plpgsql
stable
-- definer: counters are private
security definer
{{ search_path() }}
as $$
declare
  {{ variables_of_verdict() | indent(2) }}
begin
  if ({{ is_request('p_user_id', 'p_kind', 'p_cost', 'null', 'null::jsonb') | indent(2) }}) is not true then
    perform tokenlimits.refuse_request(p_user_id, p_kind, p_cost, null);
  elsif {{ in_wrong_transaction() }} then
    perform tokenlimits.refuse_transaction();
  end if;
  v_at := tokenlimits.clock();
  {{ read_payers('v_group_ids', 'p_user_id', 'p_kind', 'p_group_id') | indent(2) }}
  {{ judge('p_user_id', 'p_kind', 'p_cost') | indent(2) }}
  if v_verdict.reason = 'not_in_group' then
    perform tokenlimits.refuse_group('check', p_group_id);
  elsif v_verdict.allowed then
    v_verdict.states := v_states;
  end if;
  return tokenlimits.answer(v_verdict, p_kind, p_cost, null, p_replayed => false);
end
$$;
{{ rpc(
  'check_generation',
  ['p_user_id uuid', 'p_kind text', 'p_cost bigint default 1', 'p_group_id uuid default null'],
  to='service_role',
  comment="Returns what track_generation would answer now; records nothing.",
  volatility='stable',
  returns='json'
) }}
