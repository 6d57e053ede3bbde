-- Usage for users and admins, and history.
--
-- Invariants
--   * Numbers come from counters and the rollup, never from scanning the ledger, so they cost the same for ever.

create or replace function tokenlimits.user_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  return coalesce((
    select jsonb_agg(
      tokenlimits.limit_json(s.state) || jsonb_build_object('group', jsonb_build_object('id', g.id, 'name', g.name))
      order by p.place, s.place
    )
    from unnest(tokenlimits.paying_groups(p_user_id)) with ordinality as p (id, place)
    inner join public.user_groups as g on g.id = p.id
    cross join lateral (
      select row(u.*)::tokenlimits.limit_state as state, row_number() over () as place
      from unnest(tokenlimits.limit_states(p.id, array[p_user_id], null, v_now)) as u
    ) as s
  ), '[]');
end
$$;
comment on function tokenlimits.user_usage(uuid) is 'Every limit that binds a user, in the order in which groups pay.';
revoke execute on function tokenlimits.user_usage(uuid) from public, anon, authenticated;

create or replace function tokenlimits.usage_of(p_user_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = ''
as $$
begin
  if p_user_id is null then
    perform tokenlimits.refuse('TL001', 'user_id: is required', 'user_id');
  end if;
  return tokenlimits.user_usage(p_user_id);
end
$$;
comment on function tokenlimits.usage_of(uuid) is 'What user_generation_usage does.';
revoke execute on function tokenlimits.usage_of(uuid) from public, anon, authenticated;
grant execute on function tokenlimits.usage_of(uuid) to service_role;

create or replace function public.user_generation_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.usage_of(p_user_id);
end
$$;
comment on function public.user_generation_usage(uuid)
is 'Every limit that binds a user: group, kind, period, scope, max, used, remaining, reset_at.';
revoke execute on function public.user_generation_usage(uuid) from public, anon, authenticated, service_role;
grant execute on function public.user_generation_usage(uuid) to service_role;

create or replace function tokenlimits.my_usage()
returns jsonb
language plpgsql
stable
-- definer: counters are private; it answers for nobody but the caller
security definer
set search_path = ''
as $$
declare
  v_user_id uuid := (select auth.uid());
begin
  if v_user_id is null then
    raise exception using
      errcode = '42501', message = 'nobody is signed in', hint = 'Send the user''s access token.';
  end if;
  return tokenlimits.user_usage(v_user_id);
end
$$;
comment on function tokenlimits.my_usage() is 'What my_generation_usage does.';
revoke execute on function tokenlimits.my_usage() from public, anon, authenticated;
grant execute on function tokenlimits.my_usage() to authenticated;

create or replace function public.my_generation_usage()
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.my_usage();
end
$$;
comment on function public.my_generation_usage()
is 'Every limit that binds the signed-in user: group, kind, period, scope, max, used, remaining, reset_at.';
revoke execute on function public.my_generation_usage() from public, anon, authenticated, service_role;
grant execute on function public.my_generation_usage() to authenticated;

-- A member limit is shown for the group as a whole: what all members used, of max for each.
create or replace function tokenlimits.usage_of_groups(p_group_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  if p_group_id is not null then
    perform tokenlimits.require_group(p_group_id);
  end if;
  return coalesce((
    select jsonb_agg(
      jsonb_build_object(
        'group', jsonb_build_object('id', g.id, 'name', g.name),
        'member_count', m.members,
        'limits', l.limits
      )
      order by lower(g.name)
    )
    from public.user_groups as g
    cross join lateral (
      select count(*) as members
      from public.group_memberships as n
      where n.group_id = g.id
    ) as m
    cross join lateral (
      select coalesce(jsonb_agg(
        tokenlimits.limit_json(row(u.*)::tokenlimits.limit_state)
        || jsonb_build_object(
          'capacity', c.capacity,
          'remaining', case when c.capacity is not null then greatest(c.capacity - u.used, 0) end,
          'fraction', case
            when c.capacity > 0 then round(u.used::numeric / c.capacity, 6)
            -- a blocked limit is full; so is one of a group without members that has been used
            when c.capacity = 0 then 1
          end
        )
      ), '[]') as limits
      from unnest(tokenlimits.limit_states(g.id, array[null]::uuid[], null, v_now)) as u
      cross join lateral (
        select u.max * case u.scope when 'member' then m.members else 1 end as capacity
      ) as c
    ) as l
    where p_group_id is null or g.id = p_group_id
  ), '[]');
end
$$;
comment on function tokenlimits.usage_of_groups(uuid) is 'What group_usage does.';
revoke execute on function tokenlimits.usage_of_groups(uuid) from public, anon, authenticated;
grant execute on function tokenlimits.usage_of_groups(uuid) to authenticated, service_role;

create or replace function public.group_usage(p_group_id uuid default null)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.usage_of_groups(p_group_id);
end
$$;
comment on function public.group_usage(uuid)
is 'One group, or all when null: member count, and of each limit used, remaining, fraction of its capacity, reset_at.';
revoke execute on function public.group_usage(uuid) from public, anon, authenticated, service_role;
grant execute on function public.group_usage(uuid) to authenticated, service_role;

create or replace function tokenlimits.history(
  p_group_id uuid,
  p_kind text,
  p_bucket text,
  p_since timestamptz,
  p_until timestamptz
)
returns jsonb
language plpgsql
stable
-- definer: the rollup is private
security definer
set search_path = ''
as $$
declare
  v_timezone text := 'UTC';
  v_since timestamptz;
begin
  perform tokenlimits.require_admin();
  if p_bucket is null or p_bucket not in ('hour', 'day', 'week', 'month') then
    perform tokenlimits.refuse('TL001', 'bucket: must be hour, day, week or month', 'bucket');
  end if;
  if p_group_id is not null then
    v_timezone := (tokenlimits.require_group(p_group_id)).timezone;
  end if;
  -- whole buckets: the first is the one that p_since lies in
  v_since := lower(tokenlimits.period_of(p_bucket, v_timezone, p_since));
  return coalesce((
    select jsonb_agg(to_jsonb(points) order by points.bucket, points.kind)
    from (
      select
        lower(tokenlimits.period_of(p_bucket, v_timezone, r.bucket)) as bucket,
        r.kind,
        sum(r.cost) as used,
        sum(r.generations) as generations
      from (
        select q.bucket, q.kind, sum(q.cost) as cost, sum(q.generations) as generations
        from (
          select r.group_id, r.bucket, r.kind, r.cost, r.generations
          from tokenlimits.usage_rollup as r
          union all
          -- expired holds that nobody has swept yet
          select h.group_id, tokenlimits.rollup_bucket(h.created_at), h.kind, -h.cost, -1
          from tokenlimits.holds as h
          where h.expires_at <= tokenlimits.clock()
        ) as q
        where
          (p_group_id is null or q.group_id = p_group_id)
          and (p_kind is null or q.kind = p_kind)
          and q.bucket >= v_since
          and q.bucket < p_until
        group by q.bucket, q.kind
      ) as r
      group by 1, 2
      having sum(r.generations) > 0
    ) as points
  ), '[]');
end
$$;
comment on function tokenlimits.history(uuid, text, text, timestamptz, timestamptz) is 'What generation_history does.';
revoke execute on function tokenlimits.history(uuid, text, text, timestamptz, timestamptz)
from public, anon, authenticated;
grant execute on function tokenlimits.history(uuid, text, text, timestamptz, timestamptz)
to authenticated, service_role;

create or replace function public.generation_history(
  p_group_id uuid default null,
  p_kind text default null,
  p_bucket text default 'day',
  p_since timestamptz default null,
  p_until timestamptz default null
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.history(
    p_group_id, p_kind, p_bucket,
    coalesce(p_since, coalesce(p_until, now()) - interval '30 days'), coalesce(p_until, 'infinity')
  );
end
$$;
comment on function public.generation_history(uuid, text, text, timestamptz, timestamptz)
is 'Live usage per kind and bucket in a group''s time zone (of all groups, in UTC, when null); 30 days by default.';
revoke execute on function public.generation_history(uuid, text, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;
grant execute on function public.generation_history(uuid, text, text, timestamptz, timestamptz)
to authenticated, service_role;
