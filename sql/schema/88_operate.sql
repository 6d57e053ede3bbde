-- For operators: users by e-mail address, and diagnosis.
--
-- Invariants
--   * Nothing here changes anything: the health check's generation is rolled back. Neither waits for locks for long.
--   * tokenlimits_diagnosis and tokenlimits_health return facts; `tokenlimits doctor` interprets them.

create or replace function tokenlimits.find_users_by_email(p_emails text[])
returns jsonb
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
{{ search_path() }}
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
{{ rpc(
  'find_users_by_email',
  ['p_emails text[]'],
  to='authenticated, service_role',
  comment="The users with one of up to 5,000 e-mail addresses, regardless of case.",
  volatility='stable'
) }}

-- Like reconcile, but without locks: a stable function sees one moment, at which counters and ledger agree. It checks
-- only as many members as a statement has time for.
create or replace function tokenlimits.usage_drift(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
stable
-- definer: counters and rollup are private
security definer
{{ search_path() }}
as $$
declare
  c_counters constant integer := 2000;
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return jsonb_build_object(
    'counters', coalesce((
      select jsonb_agg(to_jsonb(d) - 'counter_id' order by d.kind, d.period, d.subject)
      from tokenlimits.counter_differences(p_group_id, v_now, c_counters) as d
    ), '[]'),
    'rollup', coalesce((
      select jsonb_agg(to_jsonb(d) - 'generations' order by d.kind, d.bucket)
      from tokenlimits.rollup_differences(p_group_id, coalesce(p_since, v_now - interval '1 day')) as d
    ), '[]'),
    'holds', (
      select count(*)
      -- a hold lives for 30 days at most
      from tokenlimits.missing_holds(p_group_id, coalesce(p_since, v_now - interval '31 days')) as m
    )
  );
end
$$;
{{ rpc(
  'usage_drift',
  ['p_group_id uuid', 'p_since timestamptz default null'],
  to='authenticated, service_role',
  comment="Where a group's counters and history differ from the ledger; changes nothing. By default, one day of history.",
  volatility='stable'
) }}

-- Asks the project's rule about a made-up caller, and restores the real one.
create or replace function tokenlimits.would_be_admin(p_claims jsonb)
returns boolean
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_claims text := current_setting('request.jwt.claims', true);
  v_answer boolean;
begin
  perform set_config('request.jwt.claims', p_claims::text, true);
  begin
    -- null means no, as in row-level security
    v_answer := coalesce(tokenlimits.is_admin(), false);
  exception when others then
    v_answer := null;
  end;
  perform set_config('request.jwt.claims', coalesce(v_claims, ''), true);
  return v_answer;
end
$$;
{{ private(
  'would_be_admin(jsonb)',
  "Would a caller with these claims be an admin? Null: it failed."
) }}

-- From statistics and file sizes; no table is read. "needed" is the size that an index would have if it were built now:
-- each row's columns at their average width, aligned, with header and pointer, in pages filled to 90 %. The number of
-- rows is the planner's estimate, or what was written since, whichever is larger. If it is wrong, an index looks too
-- small rather than too large; if it isn't known yet, "needed" is null.
create or replace function tokenlimits.storage()
returns jsonb
language plpgsql
stable
-- definer: only roles that may read a column see its statistics
security definer
{{ search_path() }}
as $$
declare
  c_tables constant text[] := array[{{ table_names }}];
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
{{ private(
  'storage()',
  "Dead rows, and how large indexes are and need to be."
) }}

create or replace function tokenlimits.users_in_no_group()
returns bigint
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
{{ search_path() }}
as $$
begin
  perform tokenlimits.require_admin();
  if {{ has_own_users() | indent(2) }} then
    return null;
  end if;
  -- an exact count of many users isn't needed
  return (
    select count(*)
    from (
      select
      from auth.users as u
      where not exists (select from public.group_memberships as m where m.user_id = u.id)
      limit 1001
    ) as n
  );
end
$$;
{{ private('users_in_no_group()', "How many users are in no group, up to 1,001; null for a project's own users.") }}

-- After the ledger alone was restored, its rows are in none of the sums. Usually this shows at both ends of a group's
-- history; only reconcile finds every case.
create or replace function tokenlimits.groups_not_summed()
returns bigint
language plpgsql
stable
-- definer: the rollup is private
security definer
{{ search_path() }}
as $$
begin
  perform tokenlimits.require_admin();
  return (
    select count(*)
    from public.user_groups as g
    where exists (
      select
      from (
{%- for direction in ['', ' desc'] %}
        (
          select l.kind, l.created_at
          from public.generation_usage as l
          where l.group_id = g.id and l.status in ('reserved', 'committed')
          order by l.created_at{{ direction }}
          limit 1
        )
{{- '\n        union all' if not loop.last }}
{%- endfor %}
      ) as u
      where not exists (
        select
        from tokenlimits.usage_rollup as r
        where r.group_id = g.id and r.kind = u.kind and r.bucket = {{ bucket('u.created_at') }}
      )
    )
  );
end
$$;
{{ private('groups_not_summed()', "How many groups have usage in the ledger that is missing in the sums.") }}

-- What a call would do now. A lock shows only to those who need it, a full disk only to those who write.
create or replace function tokenlimits.trial()
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_caller record;
  v_answer json;
  v_code text;
  v_message text;
begin
  for v_caller in
    -- the latest callers, whose counters exist; where there are none, anybody who may call
    (select distinct u.user_id, u.kind
    from (select l.user_id, l.kind from public.generation_usage as l order by l.id desc limit 10) as u)
    union all
    (select m.user_id, k.kind
    from public.group_memberships as m
    inner join tokenlimits.group_tree as t on t.group_id = m.group_id
    inner join public.group_limits as l on l.group_id = t.above_id and l.period <> 'in_flight'
    cross join lateral {{ kinds_of('l') | indent(4) }} as k
    limit 10)
  loop
    begin
      v_answer := tokenlimits.track_generation(v_caller.user_id, v_caller.kind, 1, null, null, null);
      raise sqlstate 'TL099';
    exception
      when sqlstate 'TL099' then
        -- everything is rolled back
        null;
    end;
    exit when (v_answer ->> 'allowed')::boolean;
  end loop;
  return jsonb_build_object(
    'outcome', case v_answer ->> 'allowed' when 'true' then 'allowed' when 'false' then 'denied' else 'untried' end,
    'reason', v_answer ->> 'reason'
  );
exception when others then
  get stacked diagnostics v_code = returned_sqlstate, v_message = message_text;
  return jsonb_build_object('outcome', 'failed', 'code', v_code, 'reason', v_message);
end
$$;
{{ private('trial()', "Tracks a generation and rolls it back: what came of it.") }}

-- Who has or awaits a lock that calls need, or keeps somebody from one, for longer than a second. Of a query, only what
-- comes before the first text or comment, which may be a secret. Other roles' sessions have neither age nor query here,
-- unless our owner is in pg_read_all_stats.
create or replace function tokenlimits.holders()
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  c_tables constant text[] := array[{{ table_names }}];
begin
  return (
    with ours as (
      select l.pid, l.granted
      from pg_catalog.pg_locks as l
      left join pg_catalog.pg_class as c on c.oid = l.relation
      where
        l.database = (select d.oid from pg_catalog.pg_database as d where d.datname = current_database())
        and l.pid <> pg_backend_pid()
        and (
          (l.locktype = 'advisory' and l.classid = {{ stripe_class() }})
          or (l.mode <> 'AccessShareLock' and (
            c.relnamespace = 'tokenlimits'::regnamespace
            or (c.relnamespace = 'public'::regnamespace and c.relname = any(c_tables))
          ))
        )
    ),
    waiting as (
      select w.pid, pg_blocking_pids(w.pid) as for_pids
      from (select distinct l.pid from pg_catalog.pg_locks as l where not l.granted) as w
    ),
    sessions as (
      select
        a.pid, a.usename, a.state,
        extract(epoch from clock_timestamp() - a.xact_start)::bigint as seconds,
        left(regexp_replace(regexp_replace(
          nullif(a.query, '<insufficient privilege>'), '(''|\$([^0-9]|$)|--|/\*).*', '…'
        ), '\s+', ' ', 'g'), 120) as query,
        (select count(*) from waiting as w where a.pid = any(w.for_pids)) as blocks
      from pg_catalog.pg_stat_activity as a
      where
        a.pid in (
          select o.pid from ours as o
          union
          select unnest(w.for_pids) from waiting as w inner join ours as o on o.pid = w.pid
        )
        and coalesce(a.xact_start < clock_timestamp() - interval '1 second', true)
      order by a.xact_start
      limit 10
    )
    select coalesce(jsonb_agg(jsonb_build_object(
      'pid', s.pid, 'role', s.usename, 'state', s.state, 'seconds', s.seconds, 'query', s.query, 'blocks', s.blocks
    ) order by s.seconds desc nulls last, s.pid), '[]')
    from sessions as s
  );
end
$$;
{{ private('holders()', "The sessions that have had locks for long that calls need.") }}

create or replace function tokenlimits.tokenlimits_health()
returns jsonb
language plpgsql
volatile
-- definer: counters are private
security definer
{{ search_path() }}
set lock_timeout = '1s'
as $$
declare
  v_trial jsonb;
begin
  perform tokenlimits.require_admin();
  v_trial := tokenlimits.trial();
  return jsonb_build_object(
    'trial', v_trial,
    'standby', pg_is_in_recovery(),
    'read_only', current_setting('transaction_read_only')::boolean,
    'read_only_by_default', current_setting('default_transaction_read_only')::boolean,
    'database', current_database(),
    'holders', tokenlimits.holders(),
    'connections', (select sum(d.numbackends) from pg_catalog.pg_stat_database as d),
    'most_connections',
    current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer,
    'bytes', pg_database_size(current_database())
  );
end
$$;
{{ rpc(
  'tokenlimits_health',
  [],
  to='service_role',
  comment="Tracks a generation and rolls it back, within a second per lock; says who holds locks, and how full it is."
) }}

create or replace function tokenlimits.tokenlimits_diagnosis()
returns jsonb
language plpgsql
volatile
-- definer: counters are private
security definer
{{ search_path() }}
set lock_timeout = '1s'
as $$
declare
  c_tables constant text[] := array[{{ table_names }}];
  c_functions constant text[] := array[
    {{ function_names | indent(4) }}
  ];
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
        'anon', has_any_column_privilege('anon', t.oid, 'select, insert, update')
        or has_table_privilege('anon', t.oid, 'delete'),
        -- of the whole table: column grants are intended
{%- for role in ['authenticated', 'service_role'] %}
        '{{ role }}', (
          select coalesce(jsonb_agg(a.name order by a.name), '[]')
          from unnest(array['select', 'insert', 'update', 'delete']) as a (name)
          where has_table_privilege('{{ role }}', t.oid, a.name)
        ){{ ',' if not loop.last }}
{%- endfor %}
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
      select coalesce(jsonb_object_agg(f.proname, (
        select coalesce(jsonb_agg(r.name order by r.name), '[]')
        from unnest(array['anon', 'authenticated', 'service_role']) as r (name)
        where has_function_privilege(r.name, f.oid, 'execute')
      )), '{}')
      from pg_catalog.pg_proc as f
      where f.pronamespace = 'public'::regnamespace and f.proname = any(c_functions)
    ),
    -- lost their comments, for instance in a restored dump: the SQL doesn't recognize them as its own
    'unmarked', (
      select coalesce(jsonb_agg(o.name order by o.name), '[]')
      from (
        select f.proname as name
        from pg_catalog.pg_proc as f
        where
          f.pronamespace = 'public'::regnamespace and f.proname = any(c_functions)
          and not {{ is_marked('f.oid', 'pg_proc') }}
        union all
        select t.relname
        from pg_catalog.pg_class as t
        where
          t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables)
          and not {{ is_marked('t.oid', 'pg_class') }}
      ) as o
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
      where not exists (
        select
        from tokenlimits.group_tree as t
        inner join public.group_limits as l on l.group_id = t.above_id
        where t.group_id = g.id
      )
    ),
    'users_in_no_group', tokenlimits.users_in_no_group(),
    'groups_not_summed', tokenlimits.groups_not_summed(),
    'ledger_rows', (
      select greatest(c.reltuples, 0)::bigint
      from pg_catalog.pg_class as c
      where c.oid = 'public.generation_usage'::regclass
    )
  );
end
$$;
{{ rpc(
  'tokenlimits_diagnosis',
  [],
  to='authenticated, service_role',
  comment="The state of the installation: tables, policies, functions, triggers, indexes, the admin rule, users."
) }}
