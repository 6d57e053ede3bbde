-- Two steps, where the work can fail: reserve, then commit, release or refund.
--
-- Invariants
--   * Each usage settles at most once; the same settlement again changes nothing and answers the same.
--   * Settling needs nothing but the usage's id: not the member, not the group, not the limit.
--   * An expired hold may be committed while its periods last, in the room that is left, and then sweeps the others.

create or replace function public.reserve_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_ttl bigint default 3600,
  p_idempotency_key text default null,
  p_group_id uuid default null,
  p_metadata jsonb default null
)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  if p_ttl is null or p_ttl not between 1 and 2592000 then
    perform tokenlimits.refuse(
      'TL001', 'ttl: must be from 1 second to 30 days, in seconds', 'ttl', 'Nothing was reserved.'
    );
  end if;
  return tokenlimits.track(
    p_user_id, p_kind, p_cost, p_idempotency_key, p_group_id, tokenlimits.json_argument(p_metadata),
    make_interval(secs => p_ttl)
  );
end
$$;
comment on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
is 'Holds a generation''s cost for p_ttl seconds, until it is committed or released; answers like track_generation.';
revoke execute on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb) to service_role;

-- What a settlement makes of a usage: its new status, or null when it is so already. Raises what can't be.
create or replace function tokenlimits.settled_status(
  p_usage public.generation_usage,
  p_action text,
  p_cost bigint,
  p_at timestamptz
)
returns text
language plpgsql
stable
set search_path = ''
as $$
begin
  if p_action = 'commit' and p_usage.reserved_cost is not null then
    if p_cost not between 0 and p_usage.reserved_cost then
      perform tokenlimits.refuse(
        'TL001', format('cost: must be from 0 to the %s that were reserved', p_usage.reserved_cost), 'cost',
        'The hold is as it was.'
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
      'TL001', 'usage_id: it is reserved, and nothing was charged yet', 'usage_id', 'Release it instead.'
    );
  end if;
  -- swept or not
  if p_usage.status = 'reserved' and p_usage.expires_at <= p_at then
    p_usage.status := 'expired';
  end if;
  perform tokenlimits.refuse(
    'TL006',
    format('usage %s is %s already, for %s, so it can''t be settled by %s', p_usage.id, p_usage.status,
      p_usage.cost, p_action),
    p_usage.status,
    'Each usage settles once; only the same settlement may be repeated.'
  );
  return null;
end
$$;
comment on function tokenlimits.settled_status(public.generation_usage, text, bigint, timestamptz)
is 'The status that a settlement leads to; null when it was made before.';
revoke execute on function tokenlimits.settled_status(public.generation_usage, text, bigint, timestamptz)
from public, anon, authenticated;

-- A commit after the hold's end counts as a new usage of the old moment: only while all its periods last, and in the
-- room that is left.
create or replace function tokenlimits.require_room(p_usage public.generation_usage, p_cost bigint, p_at timestamptz)
returns void
language plpgsql
stable
set search_path = ''
as $$
declare
  v_state tokenlimits.limit_state;
begin
  foreach v_state in array tokenlimits.limit_states(p_usage.group_id, array[p_usage.user_id], p_usage.kind, p_at) loop
    if p_usage.created_at < v_state.since or v_state.used + p_cost > v_state.max then
      perform tokenlimits.refuse(
        'TL007',
        format('hold %s expired at %s, and its %s no longer fit', p_usage.id, p_usage.expires_at, p_cost),
        p_usage.id::text,
        'Nothing was charged. Reserve for longer, or record_generation what was used all the same.'
      );
    end if;
  end loop;
end
$$;
comment on function tokenlimits.require_room(public.generation_usage, bigint, timestamptz)
is 'Raises TL007 unless an expired hold may still be committed.';
revoke execute on function tokenlimits.require_room(public.generation_usage, bigint, timestamptz)
from public, anon, authenticated;

create or replace function tokenlimits.settle(p_usage_id uuid, p_action text, p_cost bigint default null)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_at timestamptz := tokenlimits.clock();
  v_usage public.generation_usage;
  v_expired uuid[];
  v_moves tokenlimits.usage_move[];
  v_cost bigint;
  v_status text;
  v_late boolean;
begin
  select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
  if not found then
    perform tokenlimits.refuse(
      'TL005', format('there is no usage %s', coalesce(p_usage_id::text, 'null')), p_usage_id::text,
      'Pass the usage_id of an allowed answer.'
    );
  end if;
  -- never before it was recorded, or a clock that was set back would go round for ever
  v_at := greatest(v_at, v_usage.created_at);
  perform tokenlimits.lock_groups(array[v_usage.group_id]);
  loop
    v_late := p_action = 'commit'
      and (v_usage.status = 'expired' or (v_usage.status = 'reserved' and v_usage.expires_at <= v_at));
    begin
      v_expired := case
        when v_late then tokenlimits.expired_holds(v_usage.group_id, v_usage.kind, v_at)
        else '{}'
      end;
      perform tokenlimits.lock_usages(v_expired || p_usage_id);
      select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
      v_cost := case p_action when 'commit' then coalesce(p_cost, v_usage.reserved_cost) else v_usage.cost end;
      v_status := tokenlimits.settled_status(v_usage, p_action, v_cost, v_at);
      if v_status is not null then
        if v_late is distinct from (
          p_action = 'commit'
          and (v_usage.status = 'expired' or (v_usage.status = 'reserved' and v_usage.expires_at <= v_at))
        ) then
          raise sqlstate 'TL099';
        end if;
        if v_late then
          -- first, while what has expired is still known as such, and subtracted
          perform tokenlimits.require_room(v_usage, v_cost, v_at);
          v_moves := array(select e.move from tokenlimits.expire_holds(v_expired, v_at) as e);
          v_moves := v_moves || row(v_usage.user_id, v_usage.created_at, v_cost, 1)::tokenlimits.usage_move;
        elsif v_status = 'committed' then
          v_moves := array[row(v_usage.user_id, v_usage.created_at, v_cost - v_usage.cost, 0)::tokenlimits.usage_move];
        else
          v_moves := array[row(v_usage.user_id, v_usage.created_at, -v_usage.cost, -1)::tokenlimits.usage_move];
        end if;
        update public.generation_usage as u
        set
          status = v_status,
          cost = v_cost,
          settled_at = case v_status when 'expired' then u.expires_at else v_at end
        where u.id = p_usage_id
        returning * into v_usage;
        delete from tokenlimits.holds as h where h.usage_id = p_usage_id;
        perform tokenlimits.move_usage(
          v_usage.group_id, v_usage.kind, v_moves, v_at, p_enforce => v_late
        );
      end if;
      return tokenlimits.answer(
        v_usage.kind, v_usage.cost, null, v_usage.group_id,
        tokenlimits.limit_states(v_usage.group_id, array[v_usage.user_id], v_usage.kind, v_at), null, v_usage,
        -- an expired hold was over before it was released, swept or not
        p_replayed => v_status is null or v_status = 'expired'
      );
    exception
      when sqlstate 'TL099' then
        v_at := greatest(v_at, tokenlimits.clock());
        select * into v_usage from public.generation_usage as u where u.id = p_usage_id;
    end;
  end loop;
end
$$;
comment on function tokenlimits.settle(uuid, text, bigint)
is 'What commit_generation, release_generation and refund_generation do.';
revoke execute on function tokenlimits.settle(uuid, text, bigint) from public, anon, authenticated;
grant execute on function tokenlimits.settle(uuid, text, bigint) to service_role;

create or replace function public.commit_generation(p_usage_id uuid, p_cost bigint default null)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.settle(p_usage_id, 'commit', p_cost);
end
$$;
comment on function public.commit_generation(uuid, bigint)
is 'Settles a hold for what was reserved, or for less.';
revoke execute on function public.commit_generation(uuid, bigint) from public, anon, authenticated, service_role;
grant execute on function public.commit_generation(uuid, bigint) to service_role;

create or replace function public.release_generation(p_usage_id uuid)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.settle(p_usage_id, 'release');
end
$$;
comment on function public.release_generation(uuid)
is 'Gives back all that a hold holds.';
revoke execute on function public.release_generation(uuid) from public, anon, authenticated, service_role;
grant execute on function public.release_generation(uuid) to service_role;

create or replace function tokenlimits.refund(p_usage_id uuid)
returns jsonb
language plpgsql
volatile
-- definer: an admin may refund, and do nothing else that settle does
security definer
set search_path = ''
as $$
begin
  perform tokenlimits.require_admin();
  return tokenlimits.settle(p_usage_id, 'refund');
end
$$;
comment on function tokenlimits.refund(uuid)
is 'What refund_generation does.';
revoke execute on function tokenlimits.refund(uuid) from public, anon, authenticated;
grant execute on function tokenlimits.refund(uuid) to authenticated, service_role;

create or replace function public.refund_generation(p_usage_id uuid)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.refund(p_usage_id);
end
$$;
comment on function public.refund_generation(uuid)
is 'Gives back what a committed usage cost.';
revoke execute on function public.refund_generation(uuid) from public, anon, authenticated, service_role;
grant execute on function public.refund_generation(uuid) to authenticated, service_role;
