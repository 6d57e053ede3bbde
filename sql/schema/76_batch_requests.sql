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
