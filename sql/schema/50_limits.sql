-- What a group's limits are at a moment, and what happens when they are edited.
--
-- Invariants
--   * limit_states answers members' limits first, by member, then the group's: the order in which they are locked.
--   * Every edit of limits, by function or by an admin's plain update, passes the triggers below.

-- the first version, which looked at one user
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.limit_states(uuid, uuid, text, timestamptz);

-- Hot path: one query, and nothing else where all counters are open and no hold has expired.
create or replace function tokenlimits.limit_states(
  p_group_id uuid,
  p_user_ids uuid[],
  p_kind text,
  p_at timestamptz
)
returns tokenlimits.limit_state[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_states tokenlimits.limit_state[];
  v_are_open boolean;
  v_any_expired boolean;
  v_timezone text;
begin
  select
    array_agg(
      row(
        l.counter_id, l.subject, l.kind, l.period, l.scope, l.max, c.since, c.until, c.used, null, c.until > p_at
      )::tokenlimits.limit_state
      order by l.kind, l.scope = 'group', l.subject, l.counter_id
    ),
    bool_and(coalesce(c.until > p_at, false)),
    exists (
      select
      from tokenlimits.holds as h
      where h.group_id = p_group_id and (p_kind is null or h.kind = p_kind) and h.expires_at <= p_at
    ),
    min(l.timezone)
  into v_states, v_are_open, v_any_expired, v_timezone
  from (
    select
      i.counter_id, i.kind, i.period, i.scope, i.max, g.timezone,
      -- here and not in "from", where it costs more than all the rest
      unnest(case i.scope when 'group' then array[p_group_id] else p_user_ids end) as subject
    from public.group_limits as i
    inner join public.user_groups as g on g.id = i.group_id
    where i.group_id = p_group_id and (p_kind is null or i.kind = p_kind)
  ) as l
  left join lateral (
    select k.since, k.until, k.used
    from tokenlimits.counters as k
    where k.subject = l.subject and k.counter_id = l.counter_id
    -- a look-up for each, whatever the planner thinks of the size of an array
    offset 0
  ) as c on true;
  if v_are_open and not v_any_expired then
    return v_states;
  end if;
  return tokenlimits.present_states(coalesce(v_states, '{}'), p_group_id, v_timezone, p_at, v_any_expired);
end
$$;
comment on function tokenlimits.limit_states(uuid, uuid[], text, timestamptz)
is 'A group''s limits for users, of a kind or of all. Of a user that is null, a member limit counts all members.';
revoke execute on function tokenlimits.limit_states(uuid, uuid[], text, timestamptz) from public, anon, authenticated;

-- What costs more: a counter that is missing (a limit or a member that is new) or past, and holds that have expired.
create or replace function tokenlimits.present_states(
  p_states tokenlimits.limit_state[],
  p_group_id uuid,
  p_timezone text,
  p_at timestamptz,
  p_any_expired boolean
)
returns tokenlimits.limit_state[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_states tokenlimits.limit_state[] := '{}';
  v tokenlimits.limit_state;
  v_period tstzrange;
  v_sum record;
begin
  foreach v in array p_states loop
    if v.is_open is not true then
      v_period := tokenlimits.period_of(v.period, p_timezone, p_at);
      -- never before the past counter's end: when the server gets new rules of a time zone, it may lie in this period
      v.since := greatest(lower(v_period), v.until, (
        select max(r.reset_at)
        from tokenlimits.usage_resets as r
        where r.group_id = p_group_id and r.kind in (v.kind, '*')
      ));
      v.used := case
        when v.until is null then tokenlimits.count_usage(
          p_group_id, case v.scope when 'member' then v.subject end, v.kind, v.since, upper(v_period)
        )
        else 0
      end;
      v.until := upper(v_period);
    end if;
    v.expired := case when p_any_expired then 0 end;
    v_states := v_states || v;
  end loop;
  if p_any_expired then
    -- for all at once: a batch has a thousand members, and there may be thousands of holds
    for v_sum in
      select s.place, sum(h.cost)::bigint as cost
      from unnest(v_states) with ordinality as s (
        counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, place
      )
      inner join (
        select e.kind, e.created_at, e.cost, t.scope, t.subject
        from tokenlimits.holds as e
        cross join lateral (values ('member', e.user_id), ('group', e.group_id)) as t (scope, subject)
        where e.group_id = p_group_id and e.expires_at <= p_at
      ) as h
        on
          h.scope = case when s.subject is null then 'group' else s.scope end
          and h.subject = coalesce(s.subject, p_group_id)
          and h.kind = s.kind
          and h.created_at >= s.since
      group by s.place
    loop
      v_states[v_sum.place].expired := v_sum.cost;
      v_states[v_sum.place].used := v_states[v_sum.place].used - v_sum.cost;
    end loop;
  end if;
  return v_states;
end
$$;
comment on function tokenlimits.present_states(tokenlimits.limit_state[], uuid, text, timestamptz, boolean)
is 'Limits with what their counters would hold at this moment.';
revoke execute on function tokenlimits.present_states(
  tokenlimits.limit_state[], uuid, text, timestamptz, boolean
) from public, anon, authenticated;

-- A limit that is another one from now on gets another counter.
create or replace function tokenlimits.renew_counter()
returns trigger
language plpgsql
-- definer: an admin has no right to the sequence
security definer
set search_path = ''
as $$
begin
  new.counter_id := nextval(pg_get_serial_sequence('public.group_limits', 'counter_id'));
  return new;
end
$$;
comment on function tokenlimits.renew_counter() is 'Trigger: a changed limit is counted afresh.';
revoke execute on function tokenlimits.renew_counter() from public, anon, authenticated;

create or replace trigger group_limits_renew_counter
before update on public.group_limits
for each row
when ((old.group_id, old.kind, old.period, old.scope) is distinct from (new.group_id, new.kind, new.period, new.scope))
execute function tokenlimits.renew_counter();

-- Waits for the calls that judge by the old limits, then drops the group's counters that no limit uses any more and
-- counts the new ones, so that no worker has to. Members' counters are counted on their first call.
create or replace function tokenlimits.apply_limits()
returns trigger
language plpgsql
-- definer: counters are private
security definer
set search_path = ''
as $$
declare
  v_group_id uuid;
  v_group_ids uuid[];
begin
  if tg_op = 'INSERT' then
    v_group_ids := array(select distinct n.group_id from new_rows as n);
  elsif tg_op = 'DELETE' then
    v_group_ids := array(select distinct o.group_id from old_rows as o);
  else
    v_group_ids := array(
      select n.group_id from new_rows as n
      union
      select o.group_id from old_rows as o
    );
  end if;
  perform tokenlimits.lock_groups(v_group_ids, true);
  foreach v_group_id in array v_group_ids loop
    perform tokenlimits.drop_stale_counters(v_group_id);
    insert into tokenlimits.counters as c (subject, counter_id, since, until, used)
    select s.subject, s.counter_id, s.since, s.until, s.used + coalesce(s.expired, 0)
    from unnest(tokenlimits.limit_states(v_group_id, array[null]::uuid[], null, tokenlimits.clock())) as s
    where s.scope = 'group' and s.is_open is not true
    on conflict (subject, counter_id) do update
    set since = excluded.since, until = excluded.until, used = excluded.used;
  end loop;
  return null;
end
$$;
comment on function tokenlimits.apply_limits()
is 'Trigger: opens the counters of edited limits when nobody is using them.';
revoke execute on function tokenlimits.apply_limits() from public, anon, authenticated;

create or replace function tokenlimits.drop_stale_counters(p_subject uuid)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  delete from tokenlimits.counters as c
  where
    c.subject = p_subject
    and not exists (select from public.group_limits as l where l.counter_id = c.counter_id);
end
$$;
comment on function tokenlimits.drop_stale_counters(uuid) is 'Drops a subject''s counters of limits that are gone.';
revoke execute on function tokenlimits.drop_stale_counters(uuid) from public, anon, authenticated;

create or replace trigger group_limits_apply_insert
after insert on public.group_limits
referencing new table as new_rows
for each statement execute function tokenlimits.apply_limits();

create or replace trigger group_limits_apply_update
after update on public.group_limits
referencing old table as old_rows new table as new_rows
for each statement execute function tokenlimits.apply_limits();

create or replace trigger group_limits_apply_delete
after delete on public.group_limits
referencing old table as old_rows
for each statement execute function tokenlimits.apply_limits();

-- Every period of a group in another time zone begins at another moment now. One statement for all groups, for then it
-- takes their stripes in order.
create or replace function tokenlimits.renew_counters()
returns trigger
language plpgsql
-- definer: the limits' counters change whatever the caller may write
security definer
set search_path = ''
as $$
begin
  update public.group_limits as l
  set counter_id = default
  from new_rows as n
  inner join old_rows as o on o.id = n.id
  where l.group_id = n.id and n.timezone is distinct from o.timezone;
  return null;
end
$$;
comment on function tokenlimits.renew_counters() is 'Trigger: in another time zone all limits of the group are others.';
revoke execute on function tokenlimits.renew_counters() from public, anon, authenticated;

create or replace trigger user_groups_renew_counters
after update on public.user_groups
referencing old table as old_rows new table as new_rows
for each statement execute function tokenlimits.renew_counters();
