-- Settling: commit or release a hold, refund a committed usage.
--
-- Invariants
--   * Each usage settles at most once; repeating the same settlement changes nothing and returns the same answer.
--   * Settling needs only the usage's id: not the member, not the group, not the limit.
--   * An expired hold may be committed while its periods last, if there is room.

-- The new status of a usage after a settlement; null if it already has it. Raises an error if the settlement is
-- invalid.
create or replace function tokenlimits.settled_status(
  p_usage public.generation_usage,
  p_action text,
  p_cost bigint,
  p_at timestamptz
)
returns text
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_action = 'commit' and p_usage.reserved_cost is not null then
    if p_cost not between 0 and p_usage.reserved_cost then
      perform tokenlimits.refuse(
        'TL001', format('cost: must be from 0 to the reserved cost of %s', p_usage.reserved_cost), 'cost',
        'The hold is unchanged.'
      );
    elsif p_usage.status in ('reserved', 'expired') then
      return 'committed';
    elsif p_usage.status = 'committed' and p_usage.cost = p_cost then
      return null;
    end if;
  elsif p_action = 'release' and p_usage.status in ('reserved', 'released', 'expired') then
    return case
      when p_usage.status <> 'reserved' then null
      when p_usage.expires_at <= p_at then 'expired'
      else 'released'
    end;
  elsif p_action = 'refund' and p_usage.status in ('committed', 'refunded') then
    return case p_usage.status when 'committed' then 'refunded' end;
  elsif p_action = 'refund' and p_usage.status = 'reserved' and p_usage.expires_at > p_at then
    perform tokenlimits.refuse(
      'TL001', 'usage_id: it is reserved; nothing was charged yet', 'usage_id', 'Release it instead.'
    );
  end if;
  -- an expired hold counts as expired, swept or not
  if p_usage.status = 'reserved' and p_usage.expires_at <= p_at then
    p_usage.status := 'expired';
  end if;
  perform tokenlimits.refuse(
    'TL006',
    format('usage %s is already %s with a cost of %s, so it can''t be settled by %s', p_usage.id, p_usage.status,
      p_usage.cost, p_action),
    p_usage.status,
    'Each usage settles once; only the same settlement may be repeated.'
  );
  return null;
end
$$;
{{ private(
  'settled_status(public.generation_usage, text, bigint, timestamptz)',
  "The status after a settlement; null if the usage was already settled so."
) }}

-- A commit after the hold expired counts as a new usage at the old moment: only while all its periods last, and only if
-- there is room.
create or replace function tokenlimits.require_room(p_usage public.generation_usage, p_cost bigint, p_at timestamptz)
returns void
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_state tokenlimits.limit_state;
begin
  foreach v_state in array tokenlimits.limit_states(p_usage.group_id, array[p_usage.user_id], array[p_usage.kind], p_at) loop
    continue when v_state.mode = 'observe';
    if p_usage.created_at < v_state.since or not {{ has_room('v_state.max', 'v_state.used', 'p_cost * v_state.weight') }} then
      perform tokenlimits.refuse(
        'TL007',
        format('hold %s expired at %s, and its cost of %s no longer fits', p_usage.id, p_usage.expires_at, p_cost),
        p_usage.id::text,
        'Nothing was charged. Reserve for longer, or charge it anyway with record_generation.'
      );
    end if;
  end loop;
end
$$;
{{ private(
  'require_room(public.generation_usage, bigint, timestamptz)',
  "Raises TL007 unless an expired hold may still be committed."
) }}

create or replace function tokenlimits.settle(p_usage_id uuid, p_action text, p_cost bigint default null)
returns json
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_at timestamptz;
  v_usage public.generation_usage;
  v_move tokenlimits.usage_move;
  v_cost bigint;
  v_status text;
  v_is_late boolean;
begin
  select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
  if not found then
    perform tokenlimits.refuse(
      'TL005', format('there is no usage %s', coalesce(p_usage_id::text, 'null')), p_usage_id::text,
      'Pass the usage_id of an allowed answer.'
    );
  end if;
  perform tokenlimits.lock_groups(array[v_usage.group_id]);
  loop
    begin
      select * into v_usage from public.generation_usage as u where u.id = p_usage_id for update;
      -- read the time after the lock, which may have taken a while; never before the usage was recorded, or a clock
      -- that was set back would loop for ever
      v_at := greatest(tokenlimits.clock(), v_usage.created_at, v_at);
      v_cost := case p_action when 'commit' then coalesce(p_cost, v_usage.reserved_cost) else v_usage.cost end;
      v_status := tokenlimits.settled_status(v_usage, p_action, v_cost, v_at);
      if v_status is not null then
        v_is_late := v_status = 'committed' and {{ is_dead('v_usage', 'v_at') }};
        if v_is_late then
          perform tokenlimits.require_room(v_usage, v_cost, v_at);
        end if;
        v_move := row(v_usage.group_id, v_usage.kind, v_usage.user_id, v_usage.created_at, 0, 0, v_is_late);
        if v_status = 'committed' then
          v_move.cost := v_cost;
          v_move.generations := 1;
        end if;
        if v_usage.status in ('reserved', 'committed') then
          v_move.cost := v_move.cost - v_usage.cost;
          v_move.generations := v_move.generations - 1;
        end if;
        delete from tokenlimits.holds as h where h.user_id = v_usage.user_id and h.usage_id = p_usage_id;
        update public.generation_usage as u
        set
          status = v_status,
          cost = v_cost,
          settled_at = case v_status when 'expired' then u.expires_at else v_at end
        where u.id = p_usage_id
        returning * into v_usage;
        perform tokenlimits.move_usage(array[v_move], v_at);
        if v_status = 'committed' and not v_is_late and v_usage.expires_at <= tokenlimits.clock() then
          -- it expired before its counters were locked: another call may have taken its room
          raise sqlstate 'TL099';
        end if;
      end if;
      return tokenlimits.usage_answer(
        v_usage,
        -- as of now: others may have reached a later moment already, and have taken the room of what expired by then
        greatest(v_at, tokenlimits.clock()),
        -- an expired hold had ended before it was released, swept or not
        p_replayed => v_status is null or v_status = 'expired'
      );
    exception
      when sqlstate 'TL099' then
        -- everything is rolled back, to be settled again
        null;
    end;
  end loop;
end
$$;
{{ private('settle(uuid, text, bigint)', "What commit, release and refund have in common.") }}

{%- set settlements = [
  ('commit', ', p_cost bigint', ', p_cost', 'definer: counters are private, and only these functions write the ledger'),
  ('release', '', '', 'definer: counters are private, and only these functions write the ledger'),
  ('refund', '', '', 'definer: an admin may refund, but not settle in other ways'),
] %}
{%- for action, parameter, argument, reason in settlements %}

create or replace function tokenlimits.{{ action }}_generation(p_usage_id uuid{{ parameter }})
returns json
language plpgsql
volatile
-- {{ reason }}
security definer
{{ search_path() }}
as $$
begin
  {%- if action == 'refund' %}
  perform tokenlimits.require_admin();
  {%- endif %}
  return tokenlimits.settle(p_usage_id, '{{ action }}'{{ argument }});
end
$$;
{%- endfor %}

{{ rpc(
  'commit_generation',
  ['p_usage_id uuid', 'p_cost bigint default null'],
  to='service_role',
  comment="Commits a hold: charges the reserved cost, or less.",
  returns='json'
) }}

{{ rpc(
  'release_generation',
  ['p_usage_id uuid'],
  to='service_role',
  comment="Releases a hold: gives back its whole cost.",
  returns='json'
) }}

{{ rpc(
  'refund_generation',
  ['p_usage_id uuid'],
  to='authenticated, service_role',
  comment="Gives back the cost of a committed usage.",
  returns='json'
) }}
