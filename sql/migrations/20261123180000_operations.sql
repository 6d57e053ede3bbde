-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
set search_path = ''
as $$
  select jsonb_build_object('version', 3)
$$;

-- A member limit is shown for the group as a whole: what all members used, of max for each. All groups at once, since a
-- dashboard asks for a thousand: what limit_states works out for one group, this does for all of them in one query.
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
  v_group_ids uuid[];
  v_any_expired boolean := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
begin
  perform tokenlimits.require_admin();
  if p_group_id is not null then
    v_group_ids := array[(tokenlimits.require_group(p_group_id)).id];
  else
    v_group_ids := array(select g.id from public.user_groups as g);
  end if;
  return coalesce((
    with periods as materialized (
      select d.period, d.timezone, lower(d.range) as since, upper(d.range) as until
      from (
        select k.period, k.timezone, tokenlimits.period_of(k.period, k.timezone, v_now) as range
        from (
          select distinct l.period, g.timezone
          from public.group_limits as l
          inner join public.user_groups as g on g.id = l.group_id
          where l.group_id = any(v_group_ids)
        ) as k
      ) as d
    ),

    -- as limit_states: an open counter says what is used, and nothing is when a period has begun since; where used
    -- is null there is no counter
    states as materialized (
      select
        l.group_id, l.kind, l.period, l.scope, l.max, l.counter_id,
        case when c.until > v_now then c.since else greatest(p.since, c.until, r.reset_at) end as since,
        case when c.until > v_now then c.until else p.until end as until,
        case when c.until > v_now then c.used when c.until is not null then 0 end as used
      from public.group_limits as l
      inner join public.user_groups as g on g.id = l.group_id
      inner join periods as p on p.period = l.period and p.timezone = g.timezone
      left join tokenlimits.counters as c
        on l.scope = 'group' and c.subject = l.group_id and c.counter_id = l.counter_id
      left join lateral (
        select max(u.reset_at) as reset_at
        from tokenlimits.usage_resets as u
        where u.group_id = l.group_id and u.kind in (l.kind, '*')
      ) as r on true
      where l.group_id = any(v_group_ids)
    ),

    members as materialized (
      select m.group_id, count(*) as members
      from public.group_memberships as m
      where m.group_id = any(v_group_ids)
      group by m.group_id
    ),

    -- what all members used together the group's own counter of that period knows, if there is one; else it is added
    -- up from the rollup, as count_usage does
    counted as materialized (
      select
        s.group_id, s.kind, s.period, s.scope, s.max, s.counter_id, s.until,
        coalesce(s.used, o.used, case when s.since = (
          case when isfinite(s.since) then tokenlimits.rollup_bucket(s.since) else s.since end
        ) then coalesce((
          select sum(r.cost)
          from tokenlimits.usage_rollup as r
          where r.group_id = s.group_id and r.kind = s.kind and r.bucket >= s.since
        ), 0) else tokenlimits.count_usage(s.group_id, null, s.kind, s.since) end)
        - case when v_any_expired then coalesce((
          select sum(h.cost)
          from tokenlimits.holds as h
          where h.group_id = s.group_id and h.kind = s.kind and h.expires_at <= v_now and h.created_at >= s.since
        ), 0) else 0 end as used,
        -- numeric: of many members it is more than a bigint holds
        s.max::numeric * case s.scope when 'member' then coalesce(m.members, 0) else 1 end as capacity
      from states as s
      left join states as o
        on
          s.scope = 'member' and o.scope = 'group'
          and (o.group_id, o.kind, o.period, o.since) = (s.group_id, s.kind, s.period, s.since)
      left join members as m on m.group_id = s.group_id
    ),

    -- json is only put together; jsonb would be built anew at every level
    shown as (
      select
        c.group_id,
        json_agg(
          json_build_object(
            'kind', c.kind,
            'period', c.period,
            'scope', c.scope,
            'max', c.max,
            'used', c.used,
            'reset_at', nullif(c.until, 'infinity'),
            'capacity', c.capacity,
            'remaining', case when c.capacity is not null then greatest(c.capacity - c.used, 0) end,
            'fraction', case
              when c.capacity > 0 then round(c.used::numeric / c.capacity, 6)
              -- a blocked limit is full; so is one of a group without members that has been used
              when c.capacity = 0 then 1
            end
          )
          order by c.kind, c.scope = 'group', c.counter_id
        ) as limits
      from counted as c
      group by c.group_id
    )

    select json_agg(
      json_build_object(
        'group', json_build_object('id', g.id, 'name', g.name),
        'member_count', coalesce(m.members, 0),
        'limits', coalesce(s.limits, '[]')
      )
      order by lower(g.name)
    )
    from public.user_groups as g
    left join members as m on m.group_id = g.id
    left join shown as s on s.group_id = g.id
    where g.id = any(v_group_ids)
  )::jsonb, '[]');
end
$$;

-- Reading much of the ledger: page by page, and who used most.
--
-- Invariants
--   * A page reads a bounded number of rows, by an index, however rare what it looks for is: a short page is not the
--     end, a page without "next" is.
--   * Pages follow each other by columns of the ledger that never change. What was committed before the first page, and
--     created before "until", is in exactly one of them.

create or replace function tokenlimits.usage_json(p_usage public.generation_usage)
returns jsonb
language sql
stable
set search_path = ''
as $$
  select jsonb_build_object(
    'id', p_usage.id,
    'group', jsonb_build_object(
      'id', p_usage.group_id,
      'name', (select g.name from public.user_groups as g where g.id = p_usage.group_id)
    ),
    'user_id', p_usage.user_id,
    'email', (select u.email from auth.users as u where u.id = p_usage.user_id),
    'kind', p_usage.kind,
    'cost', p_usage.cost,
    'status', p_usage.status,
    'idempotency_key', p_usage.idempotency_key,
    'metadata', p_usage.metadata,
    'created_at', p_usage.created_at,
    'settled_at', p_usage.settled_at,
    'expires_at', p_usage.expires_at
  )
$$;

comment on function tokenlimits.usage_json(public.generation_usage) is 'A row of the ledger, as an export shows it.';

revoke execute on function tokenlimits.usage_json(public.generation_usage) from public, anon, authenticated;

-- Of one user by their own index, else of one group after the other by theirs: no index of its own, which every call
-- would have to keep. p_after is the "next" of the page before.
create or replace function tokenlimits.export_page(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_after jsonb,
  p_page_size integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are in auth.users, which is not open to admins
security definer
set search_path = ''
as $$
declare
  c_groups constant integer := 1000;
  v_after jsonb := tokenlimits.json_argument(p_after);
  v_since timestamptz := coalesce(p_since, '-infinity');
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, tokenlimits.clock() + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_group_id uuid := coalesce(p_group_id, (v_after ->> 'group_id')::uuid);
  v_at timestamptz := coalesce((v_after ->> 'created_at')::timestamptz, v_since);
  v_id uuid := coalesce((v_after ->> 'id')::uuid, '00000000-0000-0000-0000-000000000000');
  v_page public.generation_usage[];
  v_rows jsonb := '[]';
begin
  perform tokenlimits.require_admin();
  for i in 1..c_groups loop
    if p_user_id is not null then
      v_page := array(
        select u
        from public.generation_usage as u
        where u.user_id = p_user_id and (u.created_at, u.id) > (v_at, v_id) and u.created_at < v_until
        order by u.created_at, u.id
        limit v_left
      );
    else
      v_group_id := coalesce(v_group_id, (
        select u.group_id from public.generation_usage as u order by u.group_id limit 1
      ));
      v_page := array(
        select u
        from public.generation_usage as u
        where u.group_id = v_group_id and (u.created_at, u.id) > (v_at, v_id) and u.created_at < v_until
        order by u.created_at, u.id
        limit v_left
      );
    end if;
    v_rows := v_rows || coalesce((
      select jsonb_agg(tokenlimits.usage_json(row(p.*)::public.generation_usage) order by p.created_at, p.id)
      from unnest(v_page) as p
      where (p_kind is null or p.kind = p_kind) and (p_group_id is null or p.group_id = p_group_id)
    ), '[]');
    v_left := v_left - cardinality(v_page);
    if v_left = 0 then
      v_at := v_page[cardinality(v_page)].created_at;
      v_id := v_page[cardinality(v_page)].id;
      exit;
    end if;
    v_at := v_since;
    v_id := '00000000-0000-0000-0000-000000000000';
    v_group_id := case when p_group_id is null and p_user_id is null then (
      select u.group_id from public.generation_usage as u where u.group_id > v_group_id order by u.group_id limit 1
    ) end;
    exit when v_group_id is null;
  end loop;
  return jsonb_build_object(
    'rows', v_rows,
    'until', v_until,
    'next', case when v_left = 0 or v_group_id is not null then jsonb_build_object(
      'group_id', v_group_id, 'created_at', v_at, 'id', v_id
    ) end
  );
end
$$;

comment on function tokenlimits.export_page(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
is 'What export_usage does.';

revoke execute on function tokenlimits.export_page(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated;

grant execute on function tokenlimits.export_page(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

create or replace function public.export_usage(
  p_group_id uuid default null,
  p_user_id uuid default null,
  p_kind text default null,
  p_since timestamptz default null,
  p_until timestamptz default null,
  p_after jsonb default null,
  p_page_size integer default 1000
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.export_page(p_group_id, p_user_id, p_kind, p_since, p_until, p_after, p_page_size);
end
$$;

comment on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
is 'The ledger, page by page: ask again with p_after and p_until as the "next" and "until" of the page before.';

revoke execute on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

-- Counters forget past periods, so this reads the ledger: as long as the time is, not as the history is.
create or replace function tokenlimits.rank_members(
  p_group_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_count integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are in auth.users, which is not open to admins
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    select jsonb_agg(
      to_jsonb(top) || jsonb_build_object('email', (select a.email from auth.users as a where a.id = top.user_id))
      order by top.used desc, top.user_id
    )
    from (
      select u.user_id, sum(u.cost) as used, count(*) as generations
      from public.generation_usage as u
      where
        u.group_id = p_group_id
        and u.created_at >= coalesce(p_since, coalesce(p_until, v_now) - interval '30 days')
        and u.created_at < coalesce(p_until, 'infinity')
        and (p_kind is null or u.kind = p_kind)
        and (u.status = 'committed' or (u.status = 'reserved' and u.expires_at > v_now))
      group by u.user_id
      order by used desc, u.user_id
      limit least(greatest(p_count, 1), 1000)
    ) as top
  ), '[]');
end
$$;

comment on function tokenlimits.rank_members(uuid, text, timestamptz, timestamptz, integer)
is 'What top_members does.';

revoke execute on function tokenlimits.rank_members(uuid, text, timestamptz, timestamptz, integer)
from public, anon, authenticated;

grant execute on function tokenlimits.rank_members(uuid, text, timestamptz, timestamptz, integer)
to authenticated, service_role;

create or replace function public.top_members(
  p_group_id uuid,
  p_kind text default null,
  p_since timestamptz default null,
  p_until timestamptz default null,
  p_count integer default 10
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.rank_members(p_group_id, p_kind, p_since, p_until, p_count);
end
$$;

comment on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
is 'Who used most in a group, also those who left; in the last 30 days by default.';

revoke execute on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
from public, anon, authenticated, service_role;

grant execute on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
to authenticated, service_role;

-- For those who run it: users by their addresses, and whether everything is as it should be.
--
-- Invariants
--   * Nothing here changes anything.
--   * tokenlimits_diagnosis answers facts; what they mean is said by `tokenlimits doctor`.

create or replace function tokenlimits.users_of_emails(p_emails text[])
returns jsonb
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
set search_path = ''
as $$
begin
  perform tokenlimits.require_admin();
  if cardinality(p_emails) > 5000 then
    perform tokenlimits.refuse('TL001', 'emails: are at most 5000 in one call', 'emails');
  end if;
  return coalesce((
    select jsonb_agg(jsonb_build_object('user_id', u.id, 'email', u.email) order by u.email, u.id)
    from auth.users as u
    where lower(u.email) in (select lower(btrim(e.email)) from unnest(p_emails) as e (email))
  ), '[]');
end
$$;

comment on function tokenlimits.users_of_emails(text[]) is 'What find_users_by_email does.';

revoke execute on function tokenlimits.users_of_emails(text[]) from public, anon, authenticated;

grant execute on function tokenlimits.users_of_emails(text[]) to authenticated, service_role;

create or replace function public.find_users_by_email(p_emails text[])
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.users_of_emails(p_emails);
end
$$;

comment on function public.find_users_by_email(text[])
is 'The users who have one of up to 5,000 e-mail addresses, whatever its case.';

revoke execute on function public.find_users_by_email(text[]) from public, anon, authenticated, service_role;

grant execute on function public.find_users_by_email(text[]) to authenticated, service_role;

-- As reconcile, but it waits for nobody: a stable function sees one moment, at which counters and ledger agree. It
-- takes the rollup's word for what is older than p_since, and looks at no more members than a statement has time for.
create or replace function tokenlimits.drift(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
stable
-- definer: counters and rollup are private
security definer
set search_path = ''
as $$
declare
  c_counters constant integer := 2000;
  v_now timestamptz := tokenlimits.clock();
  v_since timestamptz := tokenlimits.rollup_bucket(coalesce(p_since, v_now - interval '1 day'));
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return jsonb_build_object(
    'counters', coalesce((
      select jsonb_agg(to_jsonb(d) order by d.kind, d.period, d.subject)
      from (
        select
          l.kind, l.period, l.scope, c.subject, c.used as was,
          tokenlimits.count_usage(
            p_group_id, case l.scope when 'member' then c.subject end, l.kind, c.since
          ) as used
        from (
          select m.subject, m.counter_id, m.since, m.used
          from public.group_limits as l
          inner join tokenlimits.counters as m on m.counter_id = l.counter_id
          where l.group_id = p_group_id and m.until > v_now
          order by l.scope, m.subject
          limit c_counters
        ) as c
        inner join public.group_limits as l on l.counter_id = c.counter_id
      ) as d
      where d.was <> d.used
    ), '[]'),
    'rollup', coalesce((
      select jsonb_agg(to_jsonb(d) order by d.kind, d.bucket)
      from (
        select
          coalesce(r.kind, u.kind) as kind, coalesce(r.bucket, u.bucket) as bucket,
          coalesce(r.cost, 0) as was, coalesce(u.cost, 0) as used
        from (
          select s.kind, s.bucket, sum(s.cost) as cost
          from tokenlimits.usage_rollup as s
          where s.group_id = p_group_id and s.bucket >= v_since
          group by s.kind, s.bucket
        ) as r
        full join (
          select s.kind, tokenlimits.rollup_bucket(s.created_at) as bucket, sum(s.cost) as cost
          from public.generation_usage as s
          where s.group_id = p_group_id and s.created_at >= v_since and s.status in ('reserved', 'committed')
          group by s.kind, bucket
        ) as u on u.kind = r.kind and u.bucket = r.bucket
      ) as d
      where d.was <> d.used
    ), '[]')
  );
end
$$;

comment on function tokenlimits.drift(uuid, timestamptz) is 'What usage_drift does.';

revoke execute on function tokenlimits.drift(uuid, timestamptz) from public, anon, authenticated;

grant execute on function tokenlimits.drift(uuid, timestamptz) to authenticated, service_role;

create or replace function public.usage_drift(p_group_id uuid, p_since timestamptz default null)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.drift(p_group_id, p_since);
end
$$;

comment on function public.usage_drift(uuid, timestamptz)
is 'Where a group''s counters and history differ from the ledger; changes nothing. The history of a day by default.';

revoke execute on function public.usage_drift(uuid, timestamptz) from public, anon, authenticated, service_role;

grant execute on function public.usage_drift(uuid, timestamptz) to authenticated, service_role;

-- Asks the project's rule about a caller who is made up, and puts the real one back.
create or replace function tokenlimits.would_be_admin(p_claims jsonb)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_claims text := current_setting('request.jwt.claims', true);
  v_answer boolean;
begin
  perform set_config('request.jwt.claims', p_claims::text, true);
  begin
    v_answer := tokenlimits.is_admin();
  exception when others then
    v_answer := null;
  end;
  perform set_config('request.jwt.claims', coalesce(v_claims, ''), true);
  return v_answer;
end
$$;

comment on function tokenlimits.would_be_admin(jsonb)
is 'Would a caller with these claims be an admin? Null: it failed.';

revoke execute on function tokenlimits.would_be_admin(jsonb) from public, anon, authenticated;

create or replace function tokenlimits.diagnosis()
returns jsonb
language plpgsql
volatile
-- definer: auth.users is not open to admins
security definer
set search_path = ''
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'group_memberships', 'generation_usage'];
  c_user constant jsonb := '{"role": "authenticated", "sub": "00000000-0000-4000-8000-000000000000"}';
begin
  perform tokenlimits.require_admin();
  return jsonb_build_object(
    'version', (public.tokenlimits_version() ->> 'version')::integer,
    'postgres', current_setting('server_version'),
    'at', tokenlimits.clock(),
    'tables', (
      select jsonb_object_agg(t.relname, jsonb_build_object(
        'rls', t.relrowsecurity,
        'anon', has_table_privilege('anon', t.oid, 'select, insert, update, delete'),
        'authenticated', (
          select coalesce(jsonb_agg(a.name order by a.name), '[]')
          from unnest(array['select', 'insert', 'update', 'delete']) as a (name)
          where has_table_privilege('authenticated', t.oid, a.name)
        )
      ))
      from pg_catalog.pg_class as t
      where t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables)
    ),
    'policies', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'table', p.tablename, 'name', p.policyname, 'action', lower(p.cmd),
        'asks_is_admin', concat(p.qual, p.with_check) like '%is_admin()%'
      ) order by p.tablename, p.policyname), '[]')
      from pg_catalog.pg_policies as p
      where p.schemaname = 'public' and p.tablename = any(c_tables)
    ),
    'functions', (
      select jsonb_object_agg(f.proname, (
        select coalesce(jsonb_agg(r.name order by r.name), '[]')
        from unnest(array['anon', 'authenticated', 'service_role']) as r (name)
        where has_function_privilege(r.name, f.oid, 'execute')
      ))
      from pg_catalog.pg_proc as f
      where
        f.pronamespace = 'public'::regnamespace
        and (f.prosrc like '%tokenlimits.%' or f.proname = 'tokenlimits_version')
    ),
    'private_schema_open', has_schema_privilege('anon', 'tokenlimits', 'usage'),
    'triggers', (
      select coalesce(jsonb_agg(t.tgname order by t.tgname), '[]')
      from pg_catalog.pg_trigger as t
      inner join pg_catalog.pg_class as c on c.oid = t.tgrelid
      where
        c.relnamespace = 'public'::regnamespace
        and c.relname = any(c_tables) and not t.tgisinternal and t.tgenabled <> 'D'
    ),
    'indexes', (
      select coalesce(jsonb_agg(c.relname order by c.relname), '[]')
      from pg_catalog.pg_index as i
      inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
      inner join pg_catalog.pg_class as t on t.oid = i.indrelid
      where
        i.indisvalid
        and (t.relnamespace = 'tokenlimits'::regnamespace or (
          t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables)
        ))
    ),
    'is_admin', jsonb_build_object(
      'nobody', tokenlimits.would_be_admin(c_user),
      'user_metadata', tokenlimits.would_be_admin(c_user || '{"user_metadata": {"role": "admin"}}'),
      'app_metadata', tokenlimits.would_be_admin(c_user || '{"app_metadata": {"role": "admin"}}')
    ),
    'groups', (select count(*) from public.user_groups),
    'default_group', (select g.name from public.user_groups as g where g.is_default),
    'groups_without_limits', (
      select count(*)
      from public.user_groups as g
      where not exists (select from public.group_limits as l where l.group_id = g.id)
    ),
    -- of many it is enough to know that they are many
    'users_in_no_group', (
      select count(*)
      from (
        select
        from auth.users as u
        where not exists (select from public.group_memberships as m where m.user_id = u.id)
        limit 1001
      ) as n
    ),
    'ledger_rows', (
      select greatest(c.reltuples, 0)::bigint
      from pg_catalog.pg_class as c
      where c.oid = 'public.generation_usage'::regclass
    )
  );
end
$$;

comment on function tokenlimits.diagnosis() is 'What tokenlimits_diagnosis does.';

revoke execute on function tokenlimits.diagnosis() from public, anon, authenticated;

grant execute on function tokenlimits.diagnosis() to authenticated, service_role;

create or replace function public.tokenlimits_diagnosis()
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.diagnosis();
end
$$;

comment on function public.tokenlimits_diagnosis()
is 'How tokenlimits is installed here: tables, policies, functions, triggers, indexes, who is an admin, users.';

revoke execute on function public.tokenlimits_diagnosis() from public, anon, authenticated, service_role;

grant execute on function public.tokenlimits_diagnosis() to authenticated, service_role;

-- PostgREST serves the new functions from now on.
notify pgrst, 'reload schema';
