-- Many requests in one transaction, first step: reading them.
--
-- Invariants
--   * An invalid request doesn't affect the others: an error of a single call is an answer here, with reason 'refused'.
--   * An item is open until it has an answer; an answered item is never judged, and writes nothing.
--   * The first place of a key stands for all places that have this key.

do $do$
begin
  if to_regtype('tokenlimits.batch_item') is null then
    -- one request; nothing more happens to it once it has an answer
    create type tokenlimits.batch_item as (
      place integer,
      user_id uuid,
      kind text,
      cost bigint,
      idempotency_key text,
      group_id uuid,
      metadata jsonb,
      -- the first place with the same key
      first_place integer,
      -- the groups that may pay, in the order in which they are tried
      group_ids uuid[],
      -- the dead usage that has the key
      dead_id uuid,
      answer json
    );
    -- the charge of an item: the place of its usage among those to be written, the places of its limits among those of
    -- the batch, and what was used of each right after it; a repeated key has the same usage, replayed
    create type tokenlimits.batch_charge as (
      place integer,
      usage integer,
      states integer[],
      used bigint[],
      -- the counters of observing limits that would have denied it
      observed bigint[],
      replayed boolean
    );
  end if;
end
$do$;

-- The answer to a request for which a single call would raise an error.
create or replace function tokenlimits.refused(
  p_item tokenlimits.batch_item,
  p_code text,
  p_message text,
  p_detail text,
  p_hint text
)
returns json
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.reason := 'refused';
  return (
    tokenlimits.answer(v_verdict, p_item.kind, p_item.cost, null, p_replayed => false)::jsonb
    || jsonb_build_object(
      'error', concat_ws('. ', p_message, nullif(p_hint, '')), 'code', p_code, 'detail', nullif(p_detail, '')
    )
  )::json;
end
$$;
{{ private(
  'refused(tokenlimits.batch_item, text, text, text, text)',
  "The answer to a request of a batch that a single call would refuse with this error."
) }}

create or replace function tokenlimits.read_request(p_request jsonb, p_place integer)
returns tokenlimits.batch_item
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_item tokenlimits.batch_item;
  {{ variables_of_an_error() | indent(2) }}
begin
  v_item.place := p_place;
  v_item.kind := {{ request_field('p_request', 'kind') }};
  v_item.user_id := {{ request_field('p_request', 'user_id') }};
  v_item.cost := {{ request_field('p_request', 'cost') }};
  v_item.idempotency_key := {{ request_field('p_request', 'idempotency_key') }};
  v_item.group_id := {{ request_field('p_request', 'group_id') }};
  v_item.metadata := {{ request_field('p_request', 'metadata') }};
  if ({{ is_item('v_item') | indent(2) }}) is not true then
    perform tokenlimits.refuse_request(v_item.user_id, v_item.kind, v_item.cost, v_item.idempotency_key);
  end if;
  return v_item;
exception
  when sqlstate 'TL001' or data_exception then
    {{ answer_error('v_item', 'v_item.answer') | indent(4) }}
    return v_item;
end
$$;
{{ private('read_request(jsonb, integer)', "One request of a batch; an invalid one is answered.") }}

-- In one query if all are valid, since a block with an exception handler costs as much as reading ten requests.
create or replace function tokenlimits.read_requests(p_requests jsonb)
returns tokenlimits.batch_item[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_items tokenlimits.batch_item[];
  v_default uuid[] := {{ default_group() }};
  v record;
begin
  if jsonb_typeof(p_requests) is distinct from 'array' or jsonb_array_length(p_requests) > 1000 then
    perform tokenlimits.refuse(
      'TL001', 'requests: must be a JSON array of at most 1000 requests', 'requests', 'Nothing was recorded.'
    );
  end if;
  begin
    select
      array_agg(
        row(
          r.place,
          {{ request_field('r.request', 'user_id') }},
          {{ request_field('r.request', 'kind') }},
          {{ request_field('r.request', 'cost') }},
          {{ request_field('r.request', 'idempotency_key') }},
          {{ request_field('r.request', 'group_id') }},
          {{ request_field('r.request', 'metadata') }},
          null, null, null, null
        )::tokenlimits.batch_item
        order by r.place
      )
    into v_items
    from jsonb_array_elements(p_requests) with ordinality as r (request, place);
    for v in
      select i.place
      from unnest(v_items) as i
      where ({{ is_item('i') | indent(6) }}) is not true
    loop
      v_items[v.place] := tokenlimits.read_request(p_requests -> (v.place - 1), v.place);
    end loop;
  exception
    when data_exception then
      select array_agg(tokenlimits.read_request(r.request, r.place::integer) order by r.place) into v_items
      from jsonb_array_elements(p_requests) with ordinality as r (request, place);
  end;
  return array(
    select
      row(
        i.place, i.user_id, i.kind, i.cost, i.idempotency_key, i.group_id, i.metadata,
        case when i.idempotency_key is not null and i.answer is null then
          min(i.place) filter (where i.answer is null) over (partition by i.user_id, i.idempotency_key)
        end,
        case
          when i.answer is not null then null
          when cardinality(p.ids) > 1 then tokenlimits.entitling(p.ids, i.kind)
          else p.ids
        end,
        null,
        i.answer
      )::tokenlimits.batch_item
    from unnest(v_items) as i
    left join (
      select m.user_id, array_agg(g.id order by {{ paying_order() }}) as ids
      from public.group_memberships as m
      inner join public.user_groups as g on g.id = m.group_id
      where m.user_id = any(array(select u.user_id from unnest(v_items) as u where u.answer is null))
      group by m.user_id
    ) as o on o.user_id = i.user_id
    cross join lateral (
      select {{ pinned('coalesce(o.ids, v_default)', 'i.group_id') | indent(6) }} as ids
    ) as p
    order by i.place
  );
end
$$;
{{ private('read_requests(jsonb)', "The requests of a batch.") }}

-- Answers the items whose key has a live usage, and notes the dead usages that have a key.
create or replace function tokenlimits.replay(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v record;
begin
  for v in
    select i.place
    from unnest(p_items) as i
    inner join public.generation_usage as u on u.idempotency_key = i.idempotency_key and u.user_id = i.user_id
    where i.answer is null
  loop
    p_items[v.place] := tokenlimits.replay_item(p_items[v.place]);
  end loop;
  return p_items;
end
$$;
{{ private(
  'replay(tokenlimits.batch_item[])',
  "A batch, with those items answered whose idempotency key is taken."
) }}

create or replace function tokenlimits.replay_item(p_item tokenlimits.batch_item)
returns tokenlimits.batch_item
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_under_key record;
  {{ variables_of_an_error() | indent(2) }}
begin
  v_under_key := tokenlimits.usage_under_key(
    p_item.user_id, p_item.idempotency_key,
    {{ fingerprint("'track'", 'p_item.kind', 'p_item.cost', 'p_item.group_id') }}
  );
  p_item.dead_id := v_under_key.dead_id;
  if (v_under_key.live).id is not null then
    p_item.answer := tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
  end if;
  return p_item;
exception
  when sqlstate 'TL008' then
    {{ answer_error('p_item', 'p_item.answer') | indent(4) }}
    return p_item;
end
$$;
{{ private(
  'replay_item(tokenlimits.batch_item)',
  "An item, answered if its idempotency key is taken."
) }}

-- The answer to an item that isn't charged: another item has its key, its group doesn't exist, or it is denied. First
-- its key is looked up again, as in a single call: whoever took the last room may have done so under the same key.
create or replace function tokenlimits.deny_item(
  p_item tokenlimits.batch_item,
  p_verdict tokenlimits.verdict,
  p_holder_id uuid
)
returns json
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_answer json;
  {{ variables_of_an_error() | indent(2) }}
begin
  if p_holder_id is not null then
    perform tokenlimits.refuse_key(p_item.idempotency_key, p_holder_id);
  elsif p_item.idempotency_key is not null then
    p_item := tokenlimits.replay_item(p_item);
  end if;
  if p_item.answer is null and p_verdict.reason = 'not_in_group' then
    perform tokenlimits.refuse_group('track', p_item.group_id);
  end if;
  return coalesce(
    p_item.answer, tokenlimits.answer(p_verdict, p_item.kind, p_item.cost, null, p_replayed => false)
  );
exception
  when sqlstate 'TL002' or sqlstate 'TL008' then
    {{ answer_error('p_item', 'v_answer') | indent(4) }}
    return v_answer;
end
$$;
{{ private(
  'deny_item(tokenlimits.batch_item, tokenlimits.verdict, uuid)',
  "The answer to an item that isn't charged."
) }}
