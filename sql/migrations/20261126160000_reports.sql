-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
set search_path = ''
as $$
  select jsonb_build_object('version', 4)
$$;

create or replace function tokenlimits.check_bucket(p_bucket text)
returns void
language plpgsql
stable
set search_path = ''
as $$
begin
  if p_bucket is null or p_bucket not in ('hour', 'day', 'week', 'month') then
    perform tokenlimits.refuse('TL001', 'bucket: must be hour, day, week or month', 'bucket');
  end if;
end
$$;

comment on function tokenlimits.check_bucket(text) is 'Raises TL001 unless it is a step of the history.';

revoke execute on function tokenlimits.check_bucket(text) from public, anon, authenticated;

-- A group that was deleted since has lost its time zone too.
create or replace function tokenlimits.timezone_of(p_group_id uuid)
returns text
language plpgsql
stable
set search_path = ''
as $$
begin
  return coalesce((select g.timezone from public.user_groups as g where g.id = p_group_id), 'UTC');
end
$$;

comment on function tokenlimits.timezone_of(uuid) is 'The time zone in which a group''s periods begin.';

revoke execute on function tokenlimits.timezone_of(uuid) from public, anon, authenticated;

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
  perform tokenlimits.check_bucket(p_bucket);
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

-- Sum after sum of each series (a group and a kind) of the rollup, in the order of its key: one look-up finds where the
-- next sum begins, another adds it up, so time in which nothing was used costs nothing. p_after is the "next" of the
-- page before.
create or replace function tokenlimits.export_sums(
  p_group_id uuid,
  p_kind text,
  p_bucket text,
  p_since timestamptz,
  p_until timestamptz,
  p_after jsonb,
  p_page_size integer
)
returns jsonb
language plpgsql
stable
-- definer: the rollup is private
security definer
set search_path = ''
as $$
declare
  -- what a page may read, in rows of the rollup (a month of one kind has up to 47,616), and what a look-up counts as
  c_rows constant integer := 100000;
  c_look_up constant integer := 50;
  v_after jsonb := tokenlimits.json_argument(p_after);
  v_now timestamptz := tokenlimits.clock();
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, v_now + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_rows_left integer := c_rows;
  v_group_id uuid := coalesce(
    (v_after ->> 'group_id')::uuid, p_group_id, '00000000-0000-0000-0000-000000000000'
  );
  v_kind text := coalesce(v_after ->> 'kind', '');
  v_timezone text := tokenlimits.timezone_of(v_group_id);
  -- from here on in this series; at infinity it is over
  v_at timestamptz := coalesce((v_after ->> 'bucket')::timestamptz, 'infinity');
  v_period tstzrange;
  v_sum record;
  v_rows jsonb[] := '{}';
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_bucket(p_bucket);
  while v_left > 0 and v_rows_left > 0 loop
    v_rows_left := v_rows_left - c_look_up;
    v_at := (
      select r.bucket
      from tokenlimits.usage_rollup as r
      where r.group_id = v_group_id and r.kind = v_kind and r.bucket >= v_at and r.bucket < v_until
      order by r.bucket
      limit 1
    );
    if v_at is null then
      select r.group_id, r.kind into v_group_id, v_kind
      from tokenlimits.usage_rollup as r
      where (r.group_id, r.kind) > (v_group_id, v_kind)
      order by r.group_id, r.kind
      limit 1;
      if v_group_id is null or v_group_id <> p_group_id then
        v_group_id := null;
        exit;
      end if;
      v_timezone := tokenlimits.timezone_of(v_group_id);
      v_at := case
        when v_kind <> p_kind then 'infinity'
        -- whole buckets: the first is the one that p_since lies in
        when isfinite(p_since) then lower(tokenlimits.period_of(p_bucket, v_timezone, p_since))
        else coalesce(p_since, '-infinity')
      end;
      continue;
    end if;
    v_period := tokenlimits.period_of(p_bucket, v_timezone, v_at);
    select sum(q.cost) as used, sum(q.generations) as generations, count(*) as rows into v_sum
    from (
      select r.bucket, r.cost, r.generations
      from tokenlimits.usage_rollup as r
      where r.group_id = v_group_id and r.kind = v_kind and r.bucket >= v_at and r.bucket < upper(v_period)
      union all
      -- expired holds that nobody has swept yet
      select tokenlimits.rollup_bucket(h.created_at), -h.cost, -1
      from tokenlimits.holds as h
      where h.group_id = v_group_id and h.kind = v_kind and h.expires_at <= v_now
    ) as q
    where q.bucket >= v_at and q.bucket < least(upper(v_period), v_until);
    if v_sum.generations > 0 then
      v_rows := v_rows || jsonb_build_object(
        'group', jsonb_build_object(
          'id', v_group_id,
          'name', (select g.name from public.user_groups as g where g.id = v_group_id)
        ),
        'timezone', v_timezone,
        'bucket', lower(v_period),
        'kind', v_kind,
        'used', v_sum.used,
        'generations', v_sum.generations
      );
      v_left := v_left - 1;
    end if;
    v_rows_left := v_rows_left - v_sum.rows::integer;
    v_at := upper(v_period);
  end loop;
  return jsonb_build_object(
    'rows', to_jsonb(v_rows),
    'until', v_until,
    'next', case when v_group_id is not null then jsonb_build_object(
      'group_id', v_group_id, 'kind', v_kind, 'bucket', v_at
    ) end
  );
end
$$;

comment on function tokenlimits.export_sums(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
is 'What export_history does.';

revoke execute on function tokenlimits.export_sums(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated;

grant execute on function tokenlimits.export_sums(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

create or replace function public.export_history(
  p_group_id uuid default null,
  p_kind text default null,
  p_bucket text default 'day',
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
  return tokenlimits.export_sums(p_group_id, p_kind, p_bucket, p_since, p_until, p_after, p_page_size);
end
$$;

comment on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
is 'Live usage per group, kind and bucket in the group''s time zone, page by page as export_usage.';

revoke execute on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

-- What the statistics know, and the sizes of files; no table is read. "needed" is what an index would take that was
-- built now: each row's columns at their average width, aligned, with header and pointer, in pages filled to nine
-- tenths. Rows are estimated as the planner does, or from what was written since, whichever are more: where that is
-- wrong, an index looks too small rather than too large, and where it is not known yet, "needed" is null.
create or replace function tokenlimits.storage()
returns jsonb
language plpgsql
stable
-- definer: statistics of columns are for who may read them
security definer
set search_path = ''
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'group_memberships', 'generation_usage'];
  c_unknown_width constant integer := 32;
begin
  perform tokenlimits.require_admin();
  return jsonb_build_object(
    'tables', (
      select jsonb_agg(jsonb_build_object(
        'name', format('%I.%I', s.schemaname, s.relname), 'live', s.n_live_tup, 'dead', s.n_dead_tup
      ) order by s.schemaname, s.relname)
      from pg_catalog.pg_stat_all_tables as s
      where s.schemaname = 'tokenlimits' or (s.schemaname = 'public' and s.relname = any(c_tables))
    ),
    'indexes', (
      select jsonb_agg(jsonb_build_object(
        'name', format('%I.%I', n.nspname, c.relname),
        'valid', i.indisvalid,
        'bytes', pg_relation_size(c.oid),
        'needed', ((r.rows * (4 + 8 * ceil((8 + w.width) / 8.0))) / 0.9)::bigint
      ) order by n.nspname, c.relname)
      from pg_catalog.pg_index as i
      inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
      inner join pg_catalog.pg_class as t on t.oid = i.indrelid
      inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
      cross join lateral (
        select case when t.reltuples >= 0 and t.relpages > 0 then greatest(
          pg_stat_get_live_tuples(t.oid),
          t.reltuples / t.relpages * pg_relation_size(t.oid) / current_setting('block_size')::integer
        ) end as rows
      ) as r
      cross join lateral (
        select sum(coalesce(s.avg_width, c_unknown_width)) as width
        from unnest(i.indkey) as k (attnum)
        left join pg_catalog.pg_attribute as a on a.attrelid = t.oid and a.attnum = k.attnum
        left join pg_catalog.pg_stats as s
          on s.schemaname = n.nspname and s.tablename = t.relname and s.attname = a.attname
      ) as w
      where
        t.relnamespace = 'tokenlimits'::regnamespace
        or (t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables))
    )
  );
end
$$;

comment on function tokenlimits.storage() is 'Dead rows, and how large indexes are and need to be.';

revoke execute on function tokenlimits.storage() from public, anon, authenticated;

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
    'storage', tokenlimits.storage(),
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

-- PostgREST serves the new functions from now on.
notify pgrst, 'reload schema';
