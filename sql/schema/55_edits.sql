-- What happens when limits are edited.
--
-- Invariants
--   * Every edit of limits, by function or by an admin's direct update, fires these triggers.
--   * Whatever turns a limit into another one (its group, kind, period, starts, scope or counts; its group's time zone
--     or anchor) gives it a new counter_id, so that it is recounted from the ledger: no edit is a free refill.

-- A limit that is turned into another one gets a new id and a new counter.
create or replace function tokenlimits.renew_counter()
returns trigger
language plpgsql
-- definer: an admin has no privilege on the sequence
security definer
{{ search_path() }}
as $$
begin
  new.id := gen_random_uuid();
  new.counter_id := nextval(pg_get_serial_sequence('public.group_limits', 'counter_id'));
  return new;
end
$$;
{{ private('renew_counter()', "Trigger: a limit that is turned into another one is recounted.") }}

create or replace trigger group_limits_renew_counter
before update on public.group_limits
for each row
-- column by column: a restored dump would have a different expression for whole rows
when (
  old.group_id is distinct from new.group_id or old.kind is distinct from new.kind
  or old.period is distinct from new.period or old.starts is distinct from new.starts
  or old.scope is distinct from new.scope or old.counts is distinct from new.counts
)
execute function tokenlimits.renew_counter();

create or replace function tokenlimits.refuse_pool()
returns trigger
language plpgsql
-- definer: an admin may write limits without the right to read groups
security definer
{{ search_path() }}
as $$
begin
  if (select g.is_spread from public.user_groups as g where g.id = new.group_id) then
    perform tokenlimits.refuse(
      'TL001',
      format('scope: must be member in a spread group: a %s limit on %s would need one place', new.scope, new.kind),
      'scope',
      'Nothing was saved.'
    );
  end if;
  return new;
end
$$;
{{ private('refuse_pool()', "Trigger: what a spread group has used is in no one place.") }}

create or replace trigger group_limits_refuse_pool
before insert or update on public.group_limits
for each row when (new.scope <> 'member')
execute function tokenlimits.refuse_pool();

-- Waits for the calls that judge by the old limits. Then drops the group's counters that no limit uses any more, and
-- counts the new ones, so that no worker has to. A member's counters are counted on the member's first call.
create or replace function tokenlimits.apply_limits()
returns trigger
language plpgsql
-- definer: counters are private
security definer
{{ search_path() }}
as $$
declare
  v_changed public.group_limits[];
  v_group_id uuid;
  v_group_ids uuid[];
  v_state tokenlimits.limit_state;
begin
  {{ read_changed('group_limits') | indent(2) }}
  v_group_ids := array(select distinct c.group_id from unnest(v_changed) as c);
  perform tokenlimits.lock_groups(v_group_ids, true);
  foreach v_group_id in array v_group_ids loop
    perform tokenlimits.drop_stale_counters(v_group_id);
    foreach v_state in array tokenlimits.limit_states(
      v_group_id, '{}', null, tokenlimits.clock(), p_less_expired => false
    ) loop
      -- a window that no use has opened has no counter
      if
        v_state.subject = v_group_id and v_state.scope = 'group' and v_state.is_open is not true
        and (v_state.starts <> 'first_use' or v_state.reset_at is null)
      then
        perform tokenlimits.open_counter(v_state);
      end if;
    end loop;
  end loop;
  return null;
end
$$;
{{ private('apply_limits()', "Trigger: opens the counters of edited limits while no call uses them.") }}

{{ after_changes('group_limits', 'apply', 'apply_limits') }}

-- Waits for the calls that judge by the old overrides. A subject without a counter finds its override when it gets one.
create or replace function tokenlimits.apply_overrides()
returns trigger
language plpgsql
-- definer: counters are private
security definer
{{ search_path() }}
as $$
declare
  v_changed public.limit_overrides[];
begin
  {{ read_changed('limit_overrides') | indent(2) }}
  {{ lock_tree() }}
  perform tokenlimits.lock_groups(array(select {{ home_of('c') }} from unnest(v_changed) as c), true);
  update tokenlimits.counters as k
  set override_max = f.max, overridden_until = f.until
  from (
    select distinct l.counter_id, c.subject, o.max, case when o.id is not null then coalesce(o.until, 'infinity') end as until
    from unnest(v_changed) as c
    inner join public.group_limits as l on {{ same_limit('l', 'c') | indent(4) }}
    left join public.limit_overrides as o on {{ overrides_now('o', 'l', 'c.subject', 'tokenlimits.clock()') | indent(4) }}
  ) as f
  where k.counter_id = f.counter_id and k.subject = f.subject;
  return null;
end
$$;
{{ private('apply_overrides()', "Trigger: tells the counters of edited overrides while no call uses them.") }}

{{ after_changes('limit_overrides', 'apply', 'apply_overrides') }}

-- In a new time zone, every period of the group begins at a different moment; with a new anchor, every anchored one.
-- One statement for all groups, so that it takes their stripes in order.
create or replace function tokenlimits.renew_counters()
returns trigger
language plpgsql
-- definer: the limits' counters change even if the caller may not write limits
security definer
{{ search_path() }}
as $$
begin
  update public.group_limits as l
  set counter_id = default
  from new_rows as n
  inner join old_rows as o on o.id = n.id
  where
    l.group_id = n.id
    and (n.timezone is distinct from o.timezone or (l.starts = 'anchor' and n.anchor_at is distinct from o.anchor_at));
  if exists (
    select
    from new_rows as n
    inner join old_rows as o on o.id = n.id
    where n.parent_id is not null and n.anchor_at is distinct from o.anchor_at
  ) then
    -- as children, in pools of their parents
    perform tokenlimits.lock_groups(array(
      select n.id
      from new_rows as n
      inner join old_rows as o on o.id = n.id
      where n.anchor_at is distinct from o.anchor_at
    ), true);
    delete from tokenlimits.counters as c
    using public.group_limits as l, new_rows as n, old_rows as o
    where
      o.id = n.id and n.anchor_at is distinct from o.anchor_at
      and l.group_id = n.parent_id and l.scope = 'child' and l.starts = 'anchor'
      and c.counter_id = l.counter_id and c.subject = n.id;
  end if;
  return null;
end
$$;
{{ private('renew_counters()', "Trigger: a new time zone or anchor turns limits of the group into others.") }}

create or replace trigger user_groups_renew_counters
after update on public.user_groups
referencing old table as old_rows new table as new_rows
for each statement execute function tokenlimits.renew_counters();

-- Who joins, leaves, or gets another anchor has other anchored periods: their counters are counted afresh. While a call
-- uses the old ones, this waits, or the call would open a counter in a period that is gone.
create or replace function tokenlimits.renew_anchors()
returns trigger
language plpgsql
-- definer: counters are private
security definer
{{ search_path() }}
as $$
declare
  v_changed public.group_memberships[];
  v_group_ids uuid[];
begin
  {{ read_changed('group_memberships') | indent(2) }}
  {{ lock_tree() }}
  v_group_ids := {{ anchoring('array(select m.group_id from unnest(v_changed) as m)') | indent(2) }};
  if v_group_ids <> '{}' then
    perform tokenlimits.lock_groups(v_group_ids, true);
    delete from tokenlimits.counters as c
    using public.group_limits as l, tokenlimits.group_tree as t, unnest(v_changed) as m
    where
      t.group_id = m.group_id and l.group_id = t.above_id and l.starts = 'anchor' and l.scope = 'member'
      and c.counter_id = l.counter_id and c.subject = m.user_id;
  end if;
  return null;
end
$$;
{{ private('renew_anchors()', "Trigger: a member's anchored periods are those of their current membership.") }}

{{ after_changes('group_memberships', 'renew_anchors', 'renew_anchors') }}

-- Limits and members are deleted with their groups, and each takes stripes in a trigger of its own. All are taken here,
-- in one order, before those triggers and after all rows.
create or replace function tokenlimits.forget_groups()
returns trigger
language plpgsql
-- definer: counters are private
security definer
{{ search_path() }}
as $$
declare
  v_group_ids uuid[] := array(select o.id from old_rows as o);
begin
  {{ lock_tree() }}
  perform tokenlimits.lock_groups(v_group_ids || {{ anchoring('v_group_ids') | indent(2) }}, true);
  -- nobody sees the pools any more that they had as children; what they have used goes on counting above
  delete from tokenlimits.counters as c
  where c.subject = any(v_group_ids);
  delete from public.limit_overrides as o
  where o.scope = 'child' and o.subject = any(v_group_ids);
  return null;
end
$$;
{{ private('forget_groups()', "Trigger: deleted groups have no pools any more.") }}

create or replace trigger user_groups_forget
after delete on public.user_groups
referencing old table as old_rows
for each statement execute function tokenlimits.forget_groups();

create or replace function tokenlimits.quiet_members(p_group_ids uuid[])
returns void
language plpgsql
volatile
-- definer: locks are private
security definer
{{ search_path() }}
as $$
begin
  perform tokenlimits.require_admin();
  {{ lock_tree() }}
  perform tokenlimits.lock_groups({{ anchoring('p_group_ids') | indent(2) }}, true);
end
$$;
{{ private(
  'quiet_members(uuid[])',
  "Waits for all calls that anchored member limits of some groups, and of all above them, judge.",
  to='authenticated, service_role'
) }}
