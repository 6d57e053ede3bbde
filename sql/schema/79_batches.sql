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
