-- Settling: commit or release a hold, refund a committed usage; and extending a hold.
--
-- Invariants
--   * Each usage settles at most once; repeating the same settlement changes nothing and returns the same answer.
--   * Settling needs only the usage's id: not the member, not the group, not the limit.
--   * An expired hold may be committed if it has room in those limits whose period still contains it, and there is one.
--   * A commit that charges an overage is never refused for lack of room: like record, it may take counters past max.
--   * A hold's counters are locked whenever it ends or goes on, and the clock is read again afterwards: a call that has
--     taken the room of an expired hold came before or after that.

-- The new status of a usage after a settlement; null if it already has it. Raises an error if the settlement is
-- invalid.
create or replace function tokenlimits.settled_status(
  p_usage public.generation_usage,
  p_action text,
  p_cost bigint,
  p_charges boolean,
  p_at timestamptz
)
returns text
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_action = 'commit' and p_usage.reserved_cost is not null then
    if p_charges and p_cost not between 0 and {{ most_of_a_cost() }} then
      perform tokenlimits.refuse(
        'TL001', 'cost: must be from 0 to {{ most_of_a_cost() }}', 'cost', 'The hold is unchanged.'
      );
    elsif not p_charges and p_cost not between 0 and p_usage.reserved_cost then
      perform tokenlimits.refuse(
        'TL001', format('cost: must be from 0 to the reserved cost of %s', p_usage.reserved_cost), 'cost',
        'The hold is unchanged. To charge more than was reserved, pass the overage "charge".'
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
  'settled_status(public.generation_usage, text, bigint, boolean, timestamptz)',
  "The status after a settlement; null if the usage was already settled so."
) }}

-- A commit after the hold expired counts as a new usage at the old moment. It needs room in the limits whose period
-- still contains that moment, which are returned; the other limits no longer count it.
create or replace function tokenlimits.require_room(p_usage public.generation_usage, p_cost bigint, p_at timestamptz)
returns bigint[]
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_state tokenlimits.limit_state;
  v_is_limited boolean := false;
  v_has_room boolean := true;
  v_judges bigint[] := '{}';
begin
  foreach v_state in array
    -- it needs no place among those in flight: its work is done
    tokenlimits.limit_states(
      p_usage.group_id, array[p_usage.user_id], array[p_usage.kind], p_at, p_in_flight => false
    )
  loop
    continue when v_state.mode <> 'enforce';
    v_is_limited := true;
    if p_usage.created_at >= v_state.since then
      v_judges := v_judges || v_state.counter_id;
      v_has_room := v_has_room and {{ has_room('v_state.max', 'v_state.used', 'p_cost * v_state.weight') }};
    end if;
  end loop;
  if not v_has_room or (v_is_limited and v_judges = '{}') then
    perform tokenlimits.refuse(
      'TL007',
      format('hold %s expired at %s, and its cost of %s no longer fits', p_usage.id, p_usage.expires_at, p_cost),
      p_usage.id::text,
      'Nothing was charged. Reserve for longer or extend the hold in time, or charge it anyway with the overage "charge".'
    );
  end if;
  return v_judges;
end
$$;
{{ private(
  'require_room(public.generation_usage, bigint, timestamptz)',
  "The limits that judge the commit of an expired hold; raises TL007 unless it may still be committed."
) }}

-- Finds a usage, and keeps the limits of its group unchanged. What was read may be out of date once its row is locked.
create or replace function tokenlimits.find_usage(p_usage_id uuid)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_group_id uuid;
begin
  select u.group_id into v_group_id from public.generation_usage as u where u.id = p_usage_id;
  if not found then
    perform tokenlimits.refuse(
      'TL005', format('there is no usage %s', coalesce(p_usage_id::text, 'null')), p_usage_id::text,
      'Pass the usage_id of an allowed answer.'
    );
  end if;
  perform tokenlimits.lock_groups(array[v_group_id]);
end
$$;
{{ private(
  'find_usage(uuid)',
  "Keeps the limits of a usage's group unchanged until the transaction ends; raises TL005 if there is no such usage."
) }}

create or replace function tokenlimits.settle(
  p_usage_id uuid,
  p_action text,
  p_cost bigint default null,
  p_charges boolean default false
)
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
  v_needs_room boolean;
  v_judges bigint[];
begin
  perform tokenlimits.find_usage(p_usage_id);
  loop
    begin
      select * into v_usage from public.generation_usage as u where u.id = p_usage_id for update;
      -- read the time after the lock, which may have taken a while; never before the usage was recorded, or a clock
      -- that was set back would loop for ever
      v_at := greatest(tokenlimits.clock(), v_usage.created_at, v_at);
      v_cost := case p_action when 'commit' then coalesce(p_cost, v_usage.reserved_cost) else v_usage.cost end;
      v_status := tokenlimits.settled_status(v_usage, p_action, v_cost, p_charges, v_at);
      if v_status is not null then
        v_needs_room := v_status = 'committed' and {{ is_dead('v_usage', 'v_at') }} and not p_charges;
        v_judges := case when v_needs_room then tokenlimits.require_room(v_usage, v_cost, v_at) end;
        v_move := row(v_usage.group_id, v_usage.kind, v_usage.user_id, v_usage.created_at, 0, 0, v_needs_room, null);
        if v_status = 'committed' then
          v_move.cost := v_cost;
          v_move.generations := 1;
        end if;
        if v_usage.status in ('reserved', 'committed') then
          v_move.cost := v_move.cost - v_usage.cost;
          v_move.generations := v_move.generations - 1;
        end if;
        delete from tokenlimits.holds as h where h.user_id = v_usage.user_id and h.usage_id = p_usage_id;
        if found then
          v_move.holds := -1;
        end if;
        update public.generation_usage as u
        set
          status = v_status,
          cost = v_cost,
          settled_at = case v_status when 'expired' then u.expires_at else v_at end
        where u.id = p_usage_id
        returning * into v_usage;
        perform tokenlimits.move_usage(array[v_move], v_at, v_judges);
        if
          v_status = 'committed' and not v_needs_room and not p_charges
          and v_usage.expires_at <= tokenlimits.clock()
        then
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
{{ private('settle(uuid, text, bigint, boolean)', "What commit, release and refund have in common.") }}

{%- set settlements = [
  ('commit', ', p_cost bigint, p_overage text', ", p_cost, p_overage = 'charge'", 'definer: counters are private, and only these functions write the ledger'),
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
  {%- elif action == 'commit' %}
  if (p_overage in ('reject', 'charge')) is not true then
    perform tokenlimits.refuse(
      'TL001', 'overage: must be "reject" or "charge"', 'overage', 'The hold is unchanged.'
    );
  end if;
  {%- endif %}
  return tokenlimits.settle(p_usage_id, '{{ action }}'{{ argument }});
end
$$;
{%- endfor %}

{{ rpc(
  'commit_generation',
  ['p_usage_id uuid', 'p_cost bigint default null', "p_overage text default 'reject'"],
  to='service_role',
  comment="Commits a hold: charges the reserved cost, or less; with the overage 'charge' also more, past the limits' max.",
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

-- Moves the expiry of a hold to p_ttl seconds from now, not to an earlier moment, and not beyond 30 days after the hold
-- was made.
create or replace function tokenlimits.extend_generation(p_usage_id uuid, p_ttl bigint)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
{{ search_path() }}
as $$
declare
  v_at timestamptz;
  v_usage public.generation_usage;
  v_expires_at timestamptz;
begin
  if ({{ is_ttl('p_ttl') }}) is not true then
    {{ refuse_ttl('The hold is unchanged.') | indent(4) }}
  end if;
  perform tokenlimits.find_usage(p_usage_id);
  loop
    begin
      select * into v_usage from public.generation_usage as u where u.id = p_usage_id for update;
      v_at := greatest(tokenlimits.clock(), v_usage.created_at, v_at);
      if v_usage.status not in ('reserved', 'expired') then
        perform tokenlimits.refuse(
          'TL006',
          format('usage %s is already %s with a cost of %s, so it can''t be extended', v_usage.id, v_usage.status,
            v_usage.cost),
          v_usage.status,
          'Only a hold that is neither settled nor expired can be extended.'
        );
      elsif v_usage.status = 'expired' or v_usage.expires_at <= v_at then
        perform tokenlimits.refuse(
          'TL007',
          format('hold %s expired at %s, so it can''t be extended', v_usage.id, v_usage.expires_at),
          v_usage.id::text,
          'Extend a hold before it expires, or reserve for longer. It may still be committed if there is room.'
        );
      end if;
      v_expires_at := v_usage.expires_at;
      update public.generation_usage as u
      set
        expires_at = greatest(
          u.expires_at, least(v_at + make_interval(secs => p_ttl), u.created_at + interval '30 days')
        )
      where u.id = p_usage_id
      returning * into v_usage;
      update tokenlimits.holds as h
      set expires_at = v_usage.expires_at
      where h.user_id = v_usage.user_id and h.usage_id = p_usage_id;
      -- moves nothing, but locks the counters
      perform tokenlimits.move_usage(
        array[row(
          v_usage.group_id, v_usage.kind, v_usage.user_id, v_usage.created_at, 0, 0, false, 0
        )::tokenlimits.usage_move],
        v_at
      );
      if v_expires_at <= tokenlimits.clock() then
        -- it expired before its counters were locked: another call may have taken its room
        raise sqlstate 'TL099';
      end if;
      return tokenlimits.usage_answer(v_usage, greatest(v_at, tokenlimits.clock()), p_replayed => false);
    exception
      when sqlstate 'TL099' then
        -- everything is rolled back, to be judged again
        null;
    end;
  end loop;
end
$$;
{{ rpc(
  'extend_generation',
  ['p_usage_id uuid', 'p_ttl bigint default 3600'],
  to='service_role',
  comment="Lets a hold expire p_ttl seconds from now, but not earlier than before, nor over 30 days after it was made.",
  returns='json'
) }}
