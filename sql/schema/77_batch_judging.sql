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
