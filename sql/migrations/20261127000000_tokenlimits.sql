-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

-- All or nothing, also where statements come one by one, as from psql.
-- squawk-ignore transaction-nesting
begin;
-- Who waits for a lock on a table in use makes everybody else wait behind it.
set local lock_timeout = '10s';

-- 05_names.sql

-- Whether tokenlimits can be installed here.
--
-- Invariants
--   * The comment of every object that we create begins with our mark. So dumps contain the mark, and a kept ledger
--     still has it when the schema tokenlimits is gone.
--   * If this refuses, nothing has changed. Tables and functions without our mark are never changed.

do $do$
declare
  v_elsewhere text;
  v_taken text[];
begin
  perform pg_advisory_xact_lock(1953459052, 257);
  select format('%I.%I', n.nspname, c.relname) into v_elsewhere
  from pg_catalog.pg_class as c
  inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
  where
    c.relname in ('user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage')
    and n.nspname <> 'public'
    -- anybody can create a temporary table
    and c.relpersistence = 'p'
    and coalesce(obj_description(c.oid, 'pg_class') like 'tokenlimits:%', false)
    -- a copy beside our own tables belongs to the project
    and not exists (
      select
      from pg_catalog.pg_class as h
      where
        h.relnamespace = to_regnamespace('public')
        and h.relname in ('user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage')
        and coalesce(obj_description(h.oid, 'pg_class') like 'tokenlimits:%', false)
    )
  limit 1;
  if found then
    raise exception using
      errcode = 'TL010',
      message = format('tokenlimits is already installed in another schema of this database: %s (TL010)', v_elsewhere),
      hint = 'Nothing was changed. Apply the SQL for that schema (tokenlimits sql --schema NAME), or uninstall it there '
        'first. To move a kept ledger, create the schema NEW, then: alter table OLD.generation_usage set schema NEW.';
  end if;

  -- the project may own the private schema, and two functions in it, which none of our lists has
  v_taken := array(
    select format(
      '%s %I.%I',
      case c.relkind
        when 'i' then 'index'
        when 'S' then 'sequence'
        when 'v' then 'view'
        when 'm' then 'materialized view'
        when 'c' then 'type'
        else 'table'
      end,
      'public', c.relname
    )
    from pg_catalog.pg_class as c
    left join pg_catalog.pg_index as i on i.indexrelid = c.oid
    left join pg_catalog.pg_depend as d
      on
        c.relkind = 'S' and d.objid = c.oid and d.deptype in ('a', 'i')
        and d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass
    where
      c.relnamespace = to_regnamespace('public')
      and c.relname in (
        'user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage',
        'generation_usage_group_id_idx',
        'generation_usage_key_key',
        'generation_usage_pkey',
        'generation_usage_user_id_idx',
        'group_limits_counter_id_key',
        'group_limits_counter_id_seq',
        'group_limits_key',
        'group_limits_pkey',
        'group_memberships_pkey',
        'group_memberships_user_id_idx',
        'limit_overrides_key',
        'limit_overrides_pkey',
        'user_groups_is_default_key',
        'user_groups_name_key',
        'user_groups_parent_id_idx',
        'user_groups_pkey'
      )
      -- an index and an identity's sequence belong to their table
      and not coalesce(obj_description(coalesce(i.indrelid, d.refobjid, c.oid), 'pg_class') like 'tokenlimits:%', false)
    union all
    select format('type %I.%I', 'public', t.typname)
    from pg_catalog.pg_type as t
    where
      t.typnamespace = to_regnamespace('public')
      and t.typname in (
        'user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage'
      )
      and t.typrelid = 0
    union all
    select format(
      '%s %I.%I(%s)',
      case p.prokind when 'p' then 'procedure' when 'a' then 'aggregate' else 'function' end,
      'public', p.proname, pg_get_function_identity_arguments(p.oid)
    )
    from pg_catalog.pg_proc as p
    where
      p.pronamespace = to_regnamespace('public')
      and p.proname in (
        'add_group_members',
        'check_generation',
        'commit_generation',
        'delete_group',
        'export_history',
        'export_usage',
        'extend_generation',
        'find_groups',
        'find_limit_overrides',
        'find_users',
        'find_users_by_email',
        'generation_history',
        'group_members',
        'group_usage',
        'limit_pressure',
        'move_group_member',
        'my_generation_usage',
        'reconcile_usage',
        'record_generation',
        'refund_generation',
        'refuse_ledger_write',
        'release_generation',
        'remove_group_limit',
        'remove_group_members',
        'remove_limit_override',
        'reserve_generation',
        'reset_group_usage',
        'save_group',
        'set_group_limit',
        'set_limit_override',
        'set_member_anchor',
        'tokenlimits_diagnosis',
        'tokenlimits_health',
        'tokenlimits_version',
        'top_members',
        'track_generation',
        'track_generations',
        'usage_drift',
        'user_generation_usage'
      )
      and not coalesce(obj_description(p.oid, 'pg_proc') like 'tokenlimits:%', false)
    union all
    select format(
      '%s %I.%I',
      case c.relkind
        when 'i' then 'index'
        when 'S' then 'sequence'
        when 'v' then 'view'
        when 'm' then 'materialized view'
        when 'c' then 'type'
        else 'table'
      end,
      'tokenlimits', c.relname
    )
    from pg_catalog.pg_class as c
    left join pg_catalog.pg_index as i on i.indexrelid = c.oid
    left join pg_catalog.pg_depend as d
      on
        c.relkind = 'S' and d.objid = c.oid and d.deptype in ('a', 'i')
        and d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass
    where
      c.relnamespace = to_regnamespace('tokenlimits')
      and c.relname in (
        'group_tree', 'counters', 'counter_parts', 'usage_rollup', 'holds', 'usage_resets'
      )
      -- an index and an identity's sequence belong to their table
      and not coalesce(obj_description(coalesce(i.indrelid, d.refobjid, c.oid), 'pg_class') like 'tokenlimits:%', false)
    union all
    select format('type %I.%I', 'tokenlimits', t.typname)
    from pg_catalog.pg_type as t
    where
      t.typnamespace = to_regnamespace('tokenlimits')
      and t.typname in (
        'group_tree', 'counters', 'counter_parts', 'usage_rollup', 'holds', 'usage_resets',
        'limit_state', 'usage_move', 'verdict', 'group_answer', 'limit_answer', 'generation_answer', 'batch_item', 'batch_charge', 'group_limit_answer', 'group_usage_answer'
      )
      and t.typrelid = 0
    union all
    select format(
      '%s %I.%I(%s)',
      case p.prokind when 'p' then 'procedure' when 'a' then 'aggregate' else 'function' end,
      'tokenlimits', p.proname, pg_get_function_identity_arguments(p.oid)
    )
    from pg_catalog.pg_proc as p
    where
      p.pronamespace = to_regnamespace('tokenlimits')
      and p.proname in (
        'add_group_members',
        'anchor_of',
        'anchored_period',
        'answer',
        'answer_busy',
        'answer_charges',
        'apply_limits',
        'apply_overrides',
        'check_bucket',
        'check_generation',
        'check_group',
        'check_limits',
        'check_parent',
        'child_pools',
        'clock',
        'commit_generation',
        'complete_state',
        'count_holds',
        'count_limit',
        'count_usage',
        'counter_differences',
        'denial_text',
        'deny_item',
        'drop_stale_counters',
        'end_of',
        'entitling',
        'expire_holds',
        'expired_cost',
        'expired_of_limit',
        'export_history',
        'export_usage',
        'extend_generation',
        'find_limit_overrides',
        'find_usage',
        'find_users',
        'find_users_by_email',
        'first_moment',
        'forget_groups',
        'free_slot',
        'generation_history',
        'group_json',
        'group_members',
        'group_usage',
        'groups_not_summed',
        'holders',
        'insert_group',
        'is_metadata',
        'judge_batch',
        'keep_tree',
        'length_of',
        'limit_pressure',
        'limit_states',
        'lock_batch',
        'lock_expired',
        'lock_expired_beside',
        'lock_groups',
        'missing_holds',
        'move_in_tree',
        'move_parts',
        'move_usage',
        'my_generation_usage',
        'next_leaving',
        'next_place_at',
        'open_counter',
        'opened_at',
        'override_json',
        'part_of',
        'period_of',
        'place_group',
        'quiet_members',
        'read_request',
        'read_requests',
        'reconcile_usage',
        'record_generation',
        'recorded_parts',
        'recording_group',
        'recount_above',
        'refund_generation',
        'refuse',
        'refuse_group',
        'refuse_id',
        'refuse_key',
        'refuse_parent',
        'refuse_pool',
        'refuse_request',
        'refuse_several',
        'refuse_transaction',
        'refused',
        'release_generation',
        'renew_anchors',
        'renew_counter',
        'renew_counters',
        'replace_limits',
        'replay',
        'replay_item',
        'require_admin',
        'require_child',
        'require_group',
        'require_one_subject',
        'require_room',
        'require_user',
        'reserve_generation',
        'reset_group_usage',
        'rolling_room_at',
        'rollup_differences',
        'room_at',
        'set_limit_override',
        'set_member_anchor',
        'settle',
        'settled_status',
        'skip_what_is_there',
        'squeeze',
        'states_at',
        'storage',
        'sweep',
        'tidy',
        'timezone_of',
        'tokenlimits_diagnosis',
        'tokenlimits_health',
        'top_members',
        'track_generation',
        'track_generations',
        'trial',
        'uncommon_usage',
        'usage_answer',
        'usage_drift',
        'usage_json',
        'usage_under_key',
        'used_before_resets',
        'used_parts',
        'user_generation_usage',
        'user_usage',
        'users',
        'users_in_no_group',
        'whole_limit',
        'window_of',
        'would_be_admin',
        'write_batch',
        'write_ledger'
      )
      and not coalesce(obj_description(p.oid, 'pg_proc') like 'tokenlimits:%', false)
    order by 1
  );
  if v_taken <> '{}' and coalesce(current_setting('tokenlimits.adopt', true), '') <> 'yes' then
    raise exception using
      errcode = 'TL010',
      message = format(
        'other objects, which tokenlimits did not create, have names that it needs: %s (TL010)',
        array_to_string(v_taken, ', ')
      ),
      hint = 'Nothing was changed. Rename them, or install in another schema: tokenlimits sql --schema NAME. Objects of '
        'tokenlimits have a comment that begins with "tokenlimits:". If a restored dump lost the comments, run this '
        'first, in the same session: set tokenlimits.adopt = ''yes''.';
  end if;
end
$do$;

-- 10_schema.sql

-- The private schema, the definition of an admin, and the clock.
--
-- Invariants
--   * Nothing in the schema tokenlimits is exposed through the API: it is not in PostgREST's list of schemas.
--   * A project's own tokenlimits.is_admin() and tokenlimits.known_users() survive when this file is applied again.
--   * Only known_users, searches for users by address, and the count of users in no group read auth.users.
--
-- SQLSTATEs that our functions raise (PostgREST passes them on as "code", with 400)
--   TL001  invalid request; DETAIL is the name of the field
--   TL002  group not found
--   TL003  a group of that name exists (whatever its case)
--   TL004  unknown user
--   TL005  usage not found
--   TL006  usage already settled differently
--   TL007  the hold has expired and its cost no longer fits
--   TL008  idempotency key used for another request
--   TL009  the transaction is not READ COMMITTED
--   TL010  names that tokenlimits needs are taken, or it is installed in another schema; raised when the SQL is applied
--   TL011  somebody else changed the group meanwhile; DETAIL is when
--   TL099  overtaken by another call; always caught internally
--   42501  the caller is not an admin

do $do$
begin
  -- if the project created it, for its own is_admin() or known_users(), it remains the project's
  if to_regnamespace('tokenlimits') is null then
    create schema tokenlimits;
    comment on schema tokenlimits is 'tokenlimits: Private parts: counters, rollup, helpers. Not for the API.';
  end if;
end
$do$;

revoke all on schema tokenlimits from public, anon, authenticated, service_role;

grant usage on schema tokenlimits to authenticated, service_role;

-- The schema of the public part: Supabase created "public"; we create another schema if it doesn't exist.
do $do$
begin
  if to_regnamespace('public') is null then
    create schema public;
    comment on schema public is 'tokenlimits: Limits on generations. Expose it in the API.';
  end if;
  if not has_schema_privilege('authenticated', 'public', 'usage')
    or not has_schema_privilege('service_role', 'public', 'usage')
  then
    grant usage on schema public to authenticated, service_role;
  end if;
end
$do$;

-- Signed-in users with app_metadata.role = 'admin' are admins; a user can write user_metadata, but never app_metadata.
-- Created only if it doesn't exist, so that a project can replace it with its own rule. A project's own function is
-- left unchanged, with its privileges.
do $do$
begin
  if to_regprocedure('tokenlimits.is_admin()') is null then
    create function tokenlimits.is_admin()
    returns boolean
    language sql
    stable
    set search_path = pg_catalog, pg_temp
    as $body$
      select coalesce((select auth.jwt()) -> 'app_metadata' ->> 'role' = 'admin', false)
    $body$;
    comment on function tokenlimits.is_admin()
    is 'tokenlimits: Is the caller an admin? Replace its body to use your own rule; applying the SQL again keeps it.';
    revoke execute on function tokenlimits.is_admin() from public, anon, authenticated;
    grant execute on function tokenlimits.is_admin() to authenticated, service_role;
  end if;
end
$do$;

-- Which users exist. Created only if it doesn't exist: a project that keeps its users elsewhere creates its own first,
-- and then memberships have no foreign key to auth.users.
do $do$
begin
  if to_regprocedure('tokenlimits.known_users(uuid[])') is null then
    create function tokenlimits.known_users(p_user_ids uuid[])
    returns table (id uuid, email text)
    language sql
    stable
    set search_path = pg_catalog, pg_temp
    as $body$
      select u.id, u.email
      from unnest(p_user_ids) as p (id)
      cross join lateral (select a.id, a.email::text from auth.users as a where a.id = p.id offset 0) as u
    $body$;
    comment on function tokenlimits.known_users(uuid[])
    is 'tokenlimits: Which of these users exist, with their e-mail addresses. Replace its body to keep users elsewhere.';
    revoke execute on function tokenlimits.known_users(uuid[]) from public, anon, authenticated, service_role;
  elsif pg_get_function_result('tokenlimits.known_users(uuid[])'::regprocedure) <> 'TABLE(id uuid, email text)' then
    raise exception using
      errcode = 'TL010',
      message = 'tokenlimits.known_users(uuid[]) must return table (id uuid, email text) (TL010)',
      hint = 'Nothing was changed. Create it again with these columns.';
  end if;
end
$do$;

-- Each known user once, even if a project's own rule returns duplicates. Never a nested loop: a cached plan assumes
-- that both sides are small.
create or replace function tokenlimits.users(p_user_ids uuid[])
returns table (id uuid, email text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
as $$
begin
  return query
  select distinct on (k.id) k.id, k.email
  from (select distinct u.id from unnest(p_user_ids) as u (id) where u.id is not null) as p
  inner join tokenlimits.known_users(p_user_ids) as k on k.id = p.id
  order by k.id;
end
$$;

comment on function tokenlimits.users(uuid[])
is 'tokenlimits: Which of these users exist, each once, with their e-mail addresses.';

revoke execute on function tokenlimits.users(uuid[])
from public, anon, authenticated, service_role;

-- Admin functions begin with this. Besides admins, it admits roles that may act as service_role: the service key and
-- the database's owner. Inside a definer function, the GUC "role" still names the caller; current_user does not.
create or replace function tokenlimits.require_admin()
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller text := coalesce(nullif(current_setting('role', true), 'none'), session_user);
begin
  if pg_has_role(v_caller, 'service_role', 'member') or tokenlimits.is_admin() then
    return;
  end if;
  raise exception using
    errcode = '42501',
    message = 'only an admin may do this',
    hint = 'Sign in as a user whose app_metadata.role is ''admin'', or use the secret key on the server.';
end
$$;

comment on function tokenlimits.require_admin()
is 'tokenlimits: Raises 42501 unless the caller is an admin or acts as service_role.';

revoke execute on function tokenlimits.require_admin()
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.require_admin()
to authenticated, service_role;

-- The only place that reads the time. The wall clock, not now(): a call that waited for a lock is recorded at the time
-- at which it got the lock.
create or replace function tokenlimits.clock()
returns timestamptz
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return clock_timestamp();
end
$$;

comment on function tokenlimits.clock()
is 'tokenlimits: The present moment, for every function of tokenlimits.';

revoke execute on function tokenlimits.clock()
from public, anon, authenticated, service_role;

-- The message contains the code too, since servers between us and the caller may drop the field.
create or replace function tokenlimits.refuse(
  p_code text,
  p_message text,
  p_detail text default null,
  p_hint text default 'Nothing was saved.'
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using
    errcode = p_code,
    message = format('%s (%s)', p_message, p_code),
    detail = coalesce(p_detail, ''),
    hint = p_hint;
end
$$;

comment on function tokenlimits.refuse(text, text, text, text)
is 'tokenlimits: Raises one of our errors.';

revoke execute on function tokenlimits.refuse(text, text, text, text)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.refuse(text, text, text, text)
to authenticated, service_role;

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('version', 1)
$$;

comment on function public.tokenlimits_version()
is 'tokenlimits: The version of the installed schema. Clients compare it with the least that they need.';

revoke execute on function public.tokenlimits_version()
from public, anon, authenticated, service_role;

grant execute on function public.tokenlimits_version()
to authenticated, service_role;

-- 20_tables.sql

-- Groups, their limits and members, and the ledger.
--
-- Invariants
--   * Only functions of tokenlimits write the ledger, and nothing deletes from it. It has no foreign keys: deleting a
--     group or a user must not touch millions of rows. It has no checks either: every call would parse each of them.
--   * A limit is identified by (group, kind, period, starts, scope), and keeps its id through every edit. Its
--     counter_id names its counters, and changes whenever they must be recounted.
--   * A group may be beneath another one. Who is beneath whom, deleted groups included, is in tokenlimits.group_tree.
--   * A time zone is one of pg_timezone_names: PostgreSQL itself would accept 'Foo/Bar5'.
--   * Every reader can represent every stored timestamp: no infinity, no year beyond four digits.
--   * A name looks like what it is: NFC, without invisible characters and without those that change text direction.

create table if not exists public.user_groups (
  id uuid not null default gen_random_uuid(),
  name text not null,
  description text not null default '',
  priority integer not null default 0,
  timezone text not null default 'UTC',
  is_default boolean not null default false,
  anchor_at timestamptz,
  parent_id uuid,
  is_spread boolean not null default false,
  is_nested boolean not null default false,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint user_groups_pkey primary key (id),
  constraint user_groups_parent_id_fkey foreign key (parent_id) references public.user_groups (id),
  constraint user_groups_name_check check (
    char_length(name) >= 1 and char_length(name) <= 200 and name = normalize(
      btrim(
        name,
        e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
      ),
      nfc
    )
    and name !~ '[\u0001-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e]'
    and name !~ '[\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0]'
  ),
  constraint user_groups_description_check check (char_length(description) <= 2000),
  constraint user_groups_anchor_at_check check (
    anchor_at >= '1970-01-01 00:00:00+00' and anchor_at < '9999-01-01 00:00:00+00'
  ),
  constraint user_groups_created_at_check check (
    created_at >= '1970-01-01 00:00:00+00' and created_at < '9999-01-01 00:00:00+00'
  ),
  constraint user_groups_updated_at_check check (
    updated_at >= '1970-01-01 00:00:00+00' and updated_at < '9999-01-01 00:00:00+00'
  )
);

comment on table public.user_groups is 'tokenlimits: Groups of users that share limits on generations.';

comment on column public.user_groups.priority is 'A user''s groups are tried from high to low.';

comment on column public.user_groups.timezone is 'IANA name; the periods of the group''s limits follow its calendar.';

comment on column public.user_groups.is_default is 'Applies to users who are in no group; at most one group.';

comment on column public.user_groups.anchor_at
is 'From when the periods of its anchored pools are counted; null: from created_at.';

comment on column public.user_groups.parent_id is 'The group above it, whose limits count its usage too; null: none.';

comment on column public.user_groups.is_spread
is 'Whether its usage is at home with its users: then it has member limits only. Chosen when it is created.';

comment on column public.user_groups.is_nested
is 'Whether it has, or had, a group above or beneath it: then its own limits alone don''t decide. Set by tokenlimits.';

create unique index if not exists user_groups_name_key on public.user_groups (lower(name));

create index if not exists user_groups_parent_id_idx on public.user_groups (parent_id);

create unique index if not exists user_groups_is_default_key on public.user_groups (is_default) where is_default;

create table if not exists public.group_limits (
  id uuid not null default gen_random_uuid(),
  group_id uuid not null,
  kind text not null,
  period text not null default 'lifetime',
  starts text not null default 'calendar',
  scope text not null default 'group',
  mode text not null default 'enforce',
  max bigint,
  counts jsonb,
  -- a call is fast where the group's limits are plain: none is observed, counts several kinds or holds, or needs more
  -- than its counter to say what is used
  is_plain boolean not null generated always as (
    counts is null and mode = 'enforce' and starts in ('calendar', 'anchor') and period <> 'in_flight'
    and scope <> 'child'
  ) stored,
  counter_id bigint generated always as identity,
  constraint group_limits_pkey primary key (id),
  constraint group_limits_key unique (group_id, kind, period, starts, scope),
  constraint group_limits_group_id_fkey foreign key (group_id) references public.user_groups (id) on delete cascade,
  constraint group_limits_counter_id_key unique (counter_id),
  constraint group_limits_kind_check check (kind ~ '^[a-z][a-z0-9_]{0,31}$'),
  constraint group_limits_period_check check (
    period in ('in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime')
    or period ~ '^([2-9]|[1-9][0-9]|[12][0-9]{2}|3[0-5][0-9]|36[0-6]) (minutes|hours|days|weeks)$'
    or period ~ '^([2-9]|1[0-9]|2[0-4]) months$'
  ),
  constraint group_limits_starts_check check (
    (starts = 'calendar' and period !~ ' ')
    or (starts = 'anchor' and period !~ '^(in_flight|lifetime)$')
    or (starts = 'first_use' and period !~ '^(in_flight|lifetime)$| months$')
    or (starts = 'rolling' and period !~ '^(in_flight|month|year|lifetime)$| months$')
  ),
  constraint group_limits_counts_check check (
    counts is null or (
      jsonb_typeof(counts) = 'object'
      and pg_column_size(counts) < 4096
      and jsonb_array_length(jsonb_path_query_array(counts, 'strict $.keyvalue()', '{}', true)) >= 1
      and jsonb_array_length(jsonb_path_query_array(counts, 'strict $.keyvalue()', '{}', true)) <= 50
      and not jsonb_path_exists(
        counts, 'strict $.keyvalue() ? (!(@.key like_regex "^[a-z][a-z0-9_]{0,31}$"))', '{}', true
      )
      and not jsonb_path_exists(counts, 'strict $.* ? (@.type() != "number")', '{}', true)
      and not jsonb_path_exists(counts, 'strict $.* ? (@ < 1 || @ > 1000000 || @.floor() != @)', '{}', true)
    )
  ),
  constraint group_limits_in_flight_check check (counts is null or period <> 'in_flight'),
  constraint group_limits_mode_check check (mode in ('enforce', 'observe')),
  constraint group_limits_scope_check check (scope in ('group', 'child', 'member')),
  constraint group_limits_max_check check (max between 0 and 1000000000000000)
);

comment on table public.group_limits
is 'tokenlimits: How much of a kind a group (or each of its members, or each group beneath it) may use in a period.';

comment on column public.group_limits.period
is 'How long usage counts: one unit, such as day, or several, such as 5 hours; in_flight: while holds are open.';

comment on column public.group_limits.starts
is 'Where periods begin: calendar, anchor (the subject''s own moment), first_use, or rolling (at every moment).';

comment on column public.group_limits.mode is 'enforce, or observe: it counts, but never denies.';

comment on column public.group_limits.max is 'Null: unlimited. 0: blocked.';

comment on column public.group_limits.counts
is 'The kinds that it counts, with their weights; null: its own kind alone, with weight 1.';

comment on column public.group_limits.counter_id is 'Names the limit''s counters; only tokenlimits sets it.';

-- By a limit's identity, not by its id: it sleeps while there is no such limit, and comes back with it.
create table if not exists public.limit_overrides (
  id uuid not null default gen_random_uuid(),
  group_id uuid not null,
  kind text not null,
  period text not null,
  starts text not null default 'calendar',
  scope text not null,
  subject uuid not null,
  max bigint,
  until timestamptz,
  created_at timestamptz not null default now(),
  constraint limit_overrides_pkey primary key (id),
  constraint limit_overrides_key unique (group_id, subject, kind, period, starts, scope),
  constraint limit_overrides_group_id_fkey foreign key (group_id) references public.user_groups (id) on delete cascade,
  constraint limit_overrides_kind_check check (kind ~ '^[a-z][a-z0-9_]{0,31}$'),
  constraint limit_overrides_period_check check (
    period in ('in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime')
    or period ~ '^([2-9]|[1-9][0-9]|[12][0-9]{2}|3[0-5][0-9]|36[0-6]) (minutes|hours|days|weeks)$'
    or period ~ '^([2-9]|1[0-9]|2[0-4]) months$'
  ),
  constraint limit_overrides_starts_check check (
    (starts = 'calendar' and period !~ ' ')
    or (starts = 'anchor' and period !~ '^(in_flight|lifetime)$')
    or (starts = 'first_use' and period !~ '^(in_flight|lifetime)$| months$')
    or (starts = 'rolling' and period !~ '^(in_flight|month|year|lifetime)$| months$')
  ),
  constraint limit_overrides_scope_check check (scope in ('group', 'child', 'member')),
  constraint limit_overrides_subject_check check (scope <> 'group' or subject = group_id),
  constraint limit_overrides_max_check check (max between 0 and 1000000000000000),
  constraint limit_overrides_until_check check (
    until >= '1970-01-01 00:00:00+00' and until < '9999-01-01 00:00:00+00'
  ),
  constraint limit_overrides_created_at_check check (
    created_at >= '1970-01-01 00:00:00+00' and created_at < '9999-01-01 00:00:00+00'
  )
);

comment on table public.limit_overrides
is 'tokenlimits: Another max of one limit for one member or child group, or of a group limit for a time.';

comment on column public.limit_overrides.subject
is 'The user of a member limit; the child group of a child limit; the group itself of a group limit.';

comment on column public.limit_overrides.max is 'Null: unlimited. 0: blocked.';

comment on column public.limit_overrides.until is 'From then on, the limit''s own max applies again; null: for good.';

create table if not exists public.group_memberships (
  group_id uuid not null,
  user_id uuid not null,
  joined_at timestamptz not null default now(),
  anchor_at timestamptz,
  constraint group_memberships_pkey primary key (group_id, user_id),
  constraint group_memberships_joined_at_check check (
    joined_at >= '1970-01-01 00:00:00+00' and joined_at < '9999-01-01 00:00:00+00'
  ),
  constraint group_memberships_anchor_at_check check (
    anchor_at >= '1970-01-01 00:00:00+00' and anchor_at < '9999-01-01 00:00:00+00'
  ),
  constraint group_memberships_group_id_fkey foreign key (group_id)
  references public.user_groups (id) on delete cascade
);

comment on table public.group_memberships is 'tokenlimits: Who is in which group.';

comment on column public.group_memberships.anchor_at
is 'From when the periods of the member''s anchored limits are counted; null: from joined_at.';

create index if not exists group_memberships_user_id_idx on public.group_memberships (user_id);

-- With a project's own known_users, members need not be in auth.users.
do $do$
begin
  if exists (
    select
    from pg_catalog.pg_proc as p
    where
      p.oid = to_regprocedure('tokenlimits.known_users(uuid[])')
      and not btrim(regexp_replace(p.prosrc, '\s+', ' ', 'g')) = 'select u.id, u.email from unnest(p_user_ids) as p (id) cross join lateral (select a.id, a.email::text from auth.users as a where a.id = p.id offset 0) as u'
  ) then
    alter table public.group_memberships drop constraint if exists group_memberships_user_id_fkey;
  elsif not exists (
    select
    from pg_catalog.pg_constraint as c
    where c.conrelid = 'public.group_memberships'::regclass and c.conname = 'group_memberships_user_id_fkey'
  ) then
    alter table public.group_memberships add constraint group_memberships_user_id_fkey
    foreign key (user_id) references auth.users (id) on delete cascade;
  end if;
end
$do$;

create table if not exists public.generation_usage (
  id uuid not null,
  group_id uuid not null,
  user_id uuid not null,
  kind text not null,
  cost bigint not null,
  reserved_cost bigint,
  status text not null,
  -- "C": compared byte by byte, which is enough for equality and cheaper than a language's collation
  idempotency_key text collate "C",
  fingerprint uuid,
  metadata jsonb not null default '{}',
  created_at timestamptz not null,
  settled_at timestamptz,
  expires_at timestamptz,
  constraint generation_usage_pkey primary key (id),
  constraint generation_usage_key_key unique (idempotency_key, user_id)
);

comment on table public.generation_usage
is 'tokenlimits: The ledger: one row per generation, kept for ever. Written by functions of tokenlimits alone.';

comment on column public.generation_usage.id
is 'A UUIDv7 of created_at; the last four hex digits are those of the group''s id, or of the user''s if it is spread.';

comment on column public.generation_usage.status is 'reserved, committed, released, refunded or expired.';

comment on column public.generation_usage.cost is 'What it takes from its limits while reserved or committed.';

comment on column public.generation_usage.reserved_cost
is 'The cost that was reserved, if it is or was a hold, whatever it was settled for.';

comment on column public.generation_usage.fingerprint
is 'What was requested under the idempotency key; a commit may lower the cost, but not this.';

comment on column public.generation_usage.created_at
is 'Determines the period that it belongs to, whenever it is settled.';

create index if not exists generation_usage_group_id_idx on public.generation_usage (group_id, created_at);

create index if not exists generation_usage_user_id_idx on public.generation_usage (user_id, created_at);

-- An admin's edits through the API arrive here as plain updates, so names and time zones are normalized and checked
-- here.
create or replace function tokenlimits.check_group()
returns trigger
language plpgsql
-- definer: it must work for callers who can't see other groups
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_timezone text;
begin
  -- row-level security refuses an insert only afterwards; read nothing for such a caller before that
  perform tokenlimits.require_admin();
  new.name := normalize(
    btrim(
      new.name,
      e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
    ),
    nfc
  );
  -- two changes never have the same moment, or the second editor would not notice the first; that it has got its first
  -- child is no edit of it
  new.updated_at := case
    when new.is_nested and not old.is_nested and new.parent_id is null then old.updated_at
    else greatest(tokenlimits.clock(), old.updated_at + interval '1 microsecond')
  end;
  if (char_length(new.name) >= 1 and char_length(new.name) <= 200 and new.name = normalize(
  btrim(
    new.name,
    e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
  ),
  nfc
)
and new.name !~ '[\u0001-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e]'
and new.name !~ '[\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0]') is not true then
    perform tokenlimits.refuse(
      'TL001', 'name: must have 1 to 200 characters, none of them a control, zero-width or direction character', 'name'
    );
  elsif char_length(new.description) > 2000 then
    perform tokenlimits.refuse('TL001', 'description: must have at most 2000 characters', 'description');
  elsif new.timezone <> 'UTC' and (tg_op = 'INSERT' or new.timezone is distinct from old.timezone) then
    select tz.name into v_timezone
    from pg_catalog.pg_timezone_names as tz
    where
      -- checked before anything is read: a megabyte would be compared with every name
      char_length(new.timezone) <= 64
      and lower(tz.name) = lower(new.timezone)
      and tz.name not like 'posix/%'
      -- "at time zone" takes the first for abbreviations, without daylight saving time; the others aren't places
      and tz.name not in ('CET', 'EET', 'MET', 'WET', 'Factory', 'localtime', 'posixrules');
    if v_timezone is null then
      perform tokenlimits.refuse(
        'TL001',
        format('timezone: %L is no IANA time zone', left(new.timezone, 100)),
        'timezone',
        'Use a name like ''Europe/Paris'' or ''UTC''.'
      );
    end if;
    new.timezone := v_timezone;
  end if;
  return new;
end
$$;

comment on function tokenlimits.check_group()
is 'tokenlimits: Trigger: normalizes and checks a group that is written.';

revoke execute on function tokenlimits.check_group()
from public, anon, authenticated, service_role;

create or replace trigger user_groups_check
before insert or update on public.user_groups
for each row execute function tokenlimits.check_group();

-- Only our functions write the ledger, and they run as its owner. This enforces it even where a dump was restored in a
-- project whose default privileges grant everything. It is in public, so that a dump of public alone includes it. It
-- costs 2 % of a call; as the trigger's condition, which every statement parses, it would cost 10 %.
create or replace function public.refuse_ledger_write()
returns trigger
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_user not in ('anon', 'authenticated', 'service_role') then
    return null;
  end if;
  raise exception using
    errcode = '42501',
    message = 'only the functions of tokenlimits may write the ledger',
    hint = 'Call track_generation, record_generation or refund_generation. Nothing was saved.';
end
$$;

comment on function public.refuse_ledger_write()
is 'tokenlimits: Trigger: refuses direct writes to the ledger.';

revoke execute on function public.refuse_ledger_write() from public, anon, authenticated, service_role;

create or replace trigger generation_usage_refuse_write
before insert or update or delete or truncate on public.generation_usage
for each statement execute function public.refuse_ledger_write();

-- 25_tree.sql

-- Groups beneath groups.
--
-- Invariants
--   * A usage in a group counts for the limits of the group and of all above it. A limit of a group counts what is used
--     in it and in all beneath it; one of scope child counts it for each group directly beneath it.
--   * A group that was deleted stays where it was, so its usage goes on counting above it; its id is never used again.
--   * A call holds the stripe of its own group alone. Whoever changes what judges it holds, in exclusive mode, the
--     stripes of the changed group and of all beneath it. So a call is judged by one state of all groups above it, at
--     no cost.
--   * So the groups beneath must not change meanwhile: whoever changes limits holds the lock on the tree in shared
--     mode, whoever adds or moves a group in exclusive mode. It comes after rows of groups, and before rows of limits
--     and stripes.

-- Every group that there ever was, with itself and each group above it.
create table if not exists tokenlimits.group_tree (
  group_id uuid not null,
  above_id uuid not null,
  -- the group below that one, on the way to it; null: it is the group itself
  child_id uuid,
  -- how many steps it is away, and how many there are from the root to it
  distance smallint not null,
  level smallint not null,
  constraint group_tree_pkey primary key (group_id, distance)
);

comment on table tokenlimits.group_tree is 'tokenlimits: Each group with all groups above it, deleted ones included.';

create unique index if not exists group_tree_above_id_key on tokenlimits.group_tree (above_id, group_id);

revoke all on tokenlimits.group_tree from public, anon, authenticated, service_role;

-- A dump of the public tables alone doesn't include it.
insert into tokenlimits.group_tree (group_id, above_id, child_id, distance, level)
with recursive paths as (
  select
    g.id as group_id,
    g.id as above_id,
    null::uuid as child_id,
    0 as distance,
    g.parent_id
  from public.user_groups as g
  union all
  select
    p.group_id,
    g.id as above_id,
    p.above_id as child_id,
    p.distance + 1 as distance,
    g.parent_id
  from paths as p
  inner join public.user_groups as g on p.parent_id = g.id
)

select
  p.group_id,
  p.above_id,
  p.child_id,
  p.distance,
  max(p.distance) over (partition by p.group_id) - p.distance as level
from paths as p
on conflict on constraint group_tree_pkey do nothing;

create or replace function tokenlimits.refuse_id(p_id uuid)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.refuse(
    'TL001', format('id: %s is or was the id of another group', p_id), 'id', 'Choose an id that was never used.'
  );
end
$$;

comment on function tokenlimits.refuse_id(uuid)
is 'tokenlimits: Raises TL001: a group has or had this id.';

revoke execute on function tokenlimits.refuse_id(uuid)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.refuse_parent(p_rule text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.refuse('TL001', 'parent_id: ' || p_rule, 'parent_id', 'Nothing was saved.');
end
$$;

comment on function tokenlimits.refuse_parent(text)
is 'tokenlimits: Raises TL001: a group can''t be beneath that one.';

revoke execute on function tokenlimits.refuse_parent(text)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.refuse_parent(text)
to authenticated, service_role;

-- Before a group is beneath another one: refuses what can't be, and keeps the tree as it is from now on.
create or replace function tokenlimits.check_parent()
returns trigger
language plpgsql
-- definer: the tree is private
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  c_levels constant integer := 5;
  v_height integer;
  v_is_spread boolean;
begin
  new.is_nested := new.parent_id is not null or (tg_op = 'UPDATE' and old.is_nested);
  if new.parent_id is not null then
    -- before the tree, as all rows of groups; if it isn't there, the foreign key says so: a dump may restore it later
    select g.is_spread into v_is_spread from public.user_groups as g where g.id = new.parent_id for no key update;
    if v_is_spread <> new.is_spread then
      -- what a user has used is in one place, and so is what a group has used
      perform tokenlimits.refuse_parent('a spread group is beneath spread groups only, and another one beneath none');
    end if;
  end if;
  perform pg_advisory_xact_lock(1953459052, 258);
  v_height := coalesce((
    select max(t.distance)
    from tokenlimits.group_tree as t
    inner join public.user_groups as g on g.id = t.group_id
    where t.above_id = new.id
  ), 0);
  if new.parent_id = new.id or exists (
    select from tokenlimits.group_tree as t where t.group_id = new.parent_id and t.above_id = new.id
  ) then
    perform tokenlimits.refuse_parent('would be beneath itself');
  elsif (
    select t.level + 2 + v_height from tokenlimits.group_tree as t where t.group_id = new.parent_id and t.distance = 0
  ) > c_levels then
    perform tokenlimits.refuse_parent(format('groups nest at most %s deep', c_levels));
  end if;
  return new;
end
$$;

comment on function tokenlimits.check_parent()
is 'tokenlimits: Trigger: checks where in the tree a group is to be.';

revoke execute on function tokenlimits.check_parent()
from public, anon, authenticated, service_role;

create or replace trigger user_groups_check_parent_insert
before insert on public.user_groups
for each row when (new.parent_id is not null)
execute function tokenlimits.check_parent();

create or replace trigger user_groups_check_parent_update
before update on public.user_groups
for each row when (old.parent_id is distinct from new.parent_id)
execute function tokenlimits.check_parent();

-- In the tree, rows are restored that the triggers of restored groups have made already.
create or replace function tokenlimits.skip_what_is_there()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from tokenlimits.group_tree as t where t.group_id = new.group_id and t.distance = new.distance
  ) then
    return null;
  end if;
  return new;
end
$$;

comment on function tokenlimits.skip_what_is_there()
is 'tokenlimits: Trigger: a group is in the tree once.';

revoke execute on function tokenlimits.skip_what_is_there()
from public, anon, authenticated, service_role;

create or replace trigger group_tree_skip_what_is_there
before insert on tokenlimits.group_tree
for each row execute function tokenlimits.skip_what_is_there();

alter table tokenlimits.group_tree enable always trigger group_tree_skip_what_is_there;

-- Takes a group, with all beneath it, from all above it, and puts it beneath a parent. A new group isn't there yet.
create or replace function tokenlimits.place_group(p_group_id uuid, p_parent_id uuid)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_beneath uuid[] := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id);
  v_level integer := coalesce((
    select t.level + 1 from tokenlimits.group_tree as t where t.group_id = p_parent_id and t.distance = 0
  ), 0);
begin
  if v_beneath = '{}' then
    insert into tokenlimits.group_tree (group_id, above_id, child_id, distance, level)
    values (p_group_id, p_group_id, null, 0, v_level);
    v_beneath := array[p_group_id];
  else
    delete from tokenlimits.group_tree as t
    where t.group_id = any(v_beneath) and t.above_id <> all(v_beneath);
    update tokenlimits.group_tree as t
    set level = t.level + v_level - (
      select s.level from tokenlimits.group_tree as s where s.group_id = p_group_id and s.distance = 0
    )
    where t.above_id = any(v_beneath);
  end if;
  insert into tokenlimits.group_tree (group_id, above_id, child_id, distance, level)
  select
    b.group_id, a.above_id, coalesce(a.child_id, p_group_id), b.distance + a.distance + 1, a.level
  from tokenlimits.group_tree as b
  cross join tokenlimits.group_tree as a
  where b.above_id = p_group_id and a.group_id = p_parent_id;
end
$$;

comment on function tokenlimits.place_group(uuid, uuid)
is 'tokenlimits: Puts a group and all beneath it beneath another group, or at the top.';

revoke execute on function tokenlimits.place_group(uuid, uuid)
from public, anon, authenticated, service_role;

-- Limits above a group that has moved count its usage no longer, or from now on too: they are counted afresh. All calls
-- that they judge wait meanwhile. p_before and p_after are its rows of the tree.
create or replace function tokenlimits.recount_above(
  p_before tokenlimits.group_tree[],
  p_after tokenlimits.group_tree[]
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- steps of the way up that are on one side alone
  with changed as (
    select s.above_id, s.child_id
    from unnest(p_before || p_after) as s
    where s.child_id is not null
    group by s.above_id, s.child_id
    having count(*) = 1
  ),

  dropped as (
    delete from tokenlimits.counters as c
    using changed as d, public.group_limits as l
    where
      l.group_id = d.above_id and l.scope = 'child' and c.counter_id = l.counter_id and c.subject = d.child_id
  )

  -- a group that was above it before and still is counts it as before, whoever is between them
  update public.group_limits as l
  set counter_id = default
  where
    l.scope <> 'child' and l.group_id in (select d.above_id from changed as d group by d.above_id having count(*) = 1);
end
$$;

comment on function tokenlimits.recount_above(tokenlimits.group_tree[], tokenlimits.group_tree[])
is 'tokenlimits: Counts limits above a moved group afresh.';

revoke execute on function tokenlimits.recount_above(tokenlimits.group_tree[], tokenlimits.group_tree[])
from public, anon, authenticated, service_role;

create or replace function tokenlimits.move_in_tree()
returns trigger
language plpgsql
-- definer: the tree is private
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_before tokenlimits.group_tree[] := array(
    select row(t.*)::tokenlimits.group_tree
    from tokenlimits.group_tree as t
    where t.group_id = any(array[new.id])
    order by t.distance
  );
  v_after tokenlimits.group_tree[];
  v_beneath uuid[] := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = new.id);
  -- restored by its owner, a deleted group brings its usage back
  v_is_move constant boolean := tg_op = 'UPDATE' or exists (
    select from public.generation_usage as u where u.group_id = any(v_beneath)
  );
begin
  if cardinality(v_before) > 0 and v_before[2].above_id is not distinct from new.parent_id then
    -- a dump has restored the tree first
    return null;
  elsif v_is_move then
    -- all calls that any of their limits judge
    perform tokenlimits.lock_groups(array(
      select t.above_id from tokenlimits.group_tree as t where t.group_id in (new.id, new.parent_id) and t.level = 0
    ), true);
  end if;
  perform tokenlimits.place_group(new.id, new.parent_id);
  update public.user_groups as g
  set is_nested = true
  where g.id = new.parent_id and not g.is_nested;
  if found then
    -- its own limits have decided alone until now
    perform tokenlimits.lock_groups(array[new.parent_id], true);
  end if;
  perform tokenlimits.place_group(g.id, new.id)
  from public.user_groups as g
  -- restored before their parent
  where g.parent_id = new.id and not exists (
    select from tokenlimits.group_tree as t where t.group_id = g.id and t.above_id = new.id
  );
  if v_is_move then
    v_after := array(
      select row(t.*)::tokenlimits.group_tree
      from tokenlimits.group_tree as t
      where t.group_id = any(array[new.id])
      order by t.distance
    );
    v_beneath := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = new.id);
    update tokenlimits.holds as h
    set root_id = v_after[cardinality(v_after)].above_id
    where h.group_id = any(v_beneath);
    -- also where nothing was used: members' anchored periods above depend on all who are beneath
    if exists (select from public.generation_usage as u where u.group_id = any(v_beneath))
      or exists (select from public.group_memberships as m where m.group_id = any(v_beneath))
    then
      perform tokenlimits.recount_above(v_before, v_after);
    end if;
  end if;
  return null;
end
$$;

comment on function tokenlimits.move_in_tree()
is 'tokenlimits: Trigger: puts a new or moved group into the tree.';

revoke execute on function tokenlimits.move_in_tree()
from public, anon, authenticated, service_role;

create or replace trigger user_groups_move_in_tree_insert
after insert on public.user_groups
for each row execute function tokenlimits.move_in_tree();

-- also where data is restored with the role "replica"
alter table public.user_groups enable always trigger user_groups_move_in_tree_insert;

create or replace trigger user_groups_move_in_tree_update
after update on public.user_groups
for each row when (old.parent_id is distinct from new.parent_id)
execute function tokenlimits.move_in_tree();

-- Before rows of limits are locked. Limits that a call would judge by can't be beneath another group meanwhile.
create or replace function tokenlimits.keep_tree()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  return null;
end
$$;

comment on function tokenlimits.keep_tree()
is 'tokenlimits: Trigger: the tree of groups stays as it is while limits change.';

revoke execute on function tokenlimits.keep_tree()
from public, anon, authenticated, service_role;

create or replace trigger group_limits_keep_tree
before insert or update or delete on public.group_limits
for each statement execute function tokenlimits.keep_tree();

-- 30_counters.sql

-- Counters, rollup, holds and resets: they make a call's cost independent of the history.
--
-- Invariants
--   * A counter that exists and whose period is current equals the sum of the live ledger rows of its limit and subject
--     in [since, until). Whoever writes a ledger row opens and moves every counter that it counts for, in the same
--     transaction. So a missing counter can be counted from the ledger, and one of a past period starts at zero.
--   * The rollup's sum over slots equals the live ledger rows of (group, kind, bucket).
--   * Locks are taken in one order over a whole transaction, also by batches and sweeps: group stripes, ledger rows by
--     id, keys, rollup rows by key, member counters, and then those of groups, the deepest first, by (subject,
--     counter_id). So a transaction merges all its moves before it makes the first. A sweep never waits for the ledger
--     rows that it locks.
--   * Whoever reads limits in order to write holds the group's stripe in shared mode. Whoever edits limits takes it,
--     and those of all groups beneath, in exclusive mode after the edit, and so waits for calls that judge by the old
--     limits, and blocks new ones.
--   * An expired hold counts as released from that moment on, but stays in counters and rollup until it is swept;

--     readers subtract it. A call that needs its room locks the counter first; a call that settles the hold in time
--     locks the counter too, and reads the clock again afterwards. So both agree on which came first.

-- One narrow row per limit and subject (the group, or a member), rolled over in place, so the table doesn't grow with
-- time. No foreign keys and no checks: they would cost more than 10 % of a call. subject comes first in the key: a plan
-- by limit would scan all members.
create table if not exists tokenlimits.counters (
  subject uuid not null,
  counter_id bigint not null,
  since timestamptz not null,
  until timestamptz not null,
  used bigint not null,
  -- the subject's own max, and until when it applies; null: there is none (limit_overrides)
  override_max bigint,
  overridden_until timestamptz,
  constraint counters_pkey primary key (subject, counter_id)
) with (fillfactor = 50);

comment on table tokenlimits.counters is 'tokenlimits: What a subject has used of a limit in [since, until).';

-- A rolling window is counted in sixtieths. Its counter is current for one of them; in the next, it has lost the
-- oldest. Only who has locked the counter writes its parts.
create table if not exists tokenlimits.counter_parts (
  subject uuid not null,
  counter_id bigint not null,
  part timestamptz not null,
  used bigint not null,
  constraint counter_parts_pkey primary key (subject, counter_id, part),
  constraint counter_parts_counter_fkey foreign key (subject, counter_id)
  references tokenlimits.counters (subject, counter_id) on delete cascade
);

comment on table tokenlimits.counter_parts
is 'tokenlimits: What was used in each part of a rolling window; their sum is the counter.';

-- Members of one group write different slots, so they don't wait for each other; readers sum the slots. A slot may be
-- negative (after a refund from another connection); their sum is not.
create table if not exists tokenlimits.usage_rollup (
  group_id uuid not null,
  kind text not null,
  bucket timestamptz not null,
  slot smallint not null,
  cost bigint not null,
  generations bigint not null,
  constraint usage_rollup_pkey primary key (group_id, kind, bucket, slot)
) with (fillfactor = 50);

comment on table tokenlimits.usage_rollup
is 'tokenlimits: Live usage in buckets of 15 minutes, with which the hours of every time zone align; 16 slots.';

-- A table of their own instead of an index on the ledger, so that settling a usage stays cheap. user_id comes first in
-- the key: it finds one member's holds, however many the group has.
create table if not exists tokenlimits.holds (
  usage_id uuid not null,
  group_id uuid not null,
  -- the group at the top of its tree: one look-up says whether anything in the tree has expired
  root_id uuid not null,
  user_id uuid not null,
  kind text not null,
  cost bigint not null,
  created_at timestamptz not null,
  expires_at timestamptz not null,
  constraint holds_pkey primary key (user_id, usage_id)
);

comment on table tokenlimits.holds is 'tokenlimits: Reserved usages that are neither settled nor swept yet.';

create index if not exists holds_expires_at_idx
on tokenlimits.holds (group_id, kind, expires_at) include (cost, created_at);

create index if not exists holds_root_id_idx
on tokenlimits.holds (root_id, kind, expires_at) where root_id <> group_id;

-- If an uninstallation kept the ledger, restore its holds and its history.
do $do$
begin
  insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
  select
    u.id, u.group_id, coalesce(
    (select t.above_id from tokenlimits.group_tree as t where t.group_id = u.group_id and t.level = 0), u.group_id
  ), u.user_id, u.kind, u.cost,
    u.created_at, u.expires_at
  from public.generation_usage as u
    where u.status = 'reserved' and not exists (select from tokenlimits.usage_rollup);
end
$do$;

insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
select
  u.group_id,
  u.kind,
  date_bin('15 minutes', u.created_at, '2000-01-01 00:00:00+00') as bucket,
  0 as slot,
  sum(u.cost) as cost,
  count(*) as generations
from public.generation_usage as u
where u.status in ('reserved', 'committed') and not exists (select from tokenlimits.usage_rollup)
group by u.group_id, u.kind, bucket;

-- kind '*' means every kind, including kinds that get their first limit later. The subject is the group, for all of its
-- counters, or one user.
create table if not exists tokenlimits.usage_resets (
  group_id uuid not null,
  kind text not null,
  subject uuid not null,
  reset_at timestamptz not null,
  constraint usage_resets_pkey primary key (group_id, kind, subject)
);

comment on table tokenlimits.usage_resets
is 'tokenlimits: When an admin last reset usage: the counters of the group, or of one member, count from then.';

revoke all on
tokenlimits.counters, tokenlimits.counter_parts, tokenlimits.usage_rollup, tokenlimits.usage_resets, tokenlimits.holds
from public, anon, authenticated, service_role;

do $do$
begin
  if to_regtype('tokenlimits.limit_state') is null then
    -- a limit, its period and what is used of it, as one call sees it
    create type tokenlimits.limit_state as (
      group_id uuid,
      counter_id bigint,
      subject uuid,
      kind text,
      period text,
      starts text,
      scope text,
      mode text,
      max bigint,
      -- the kinds that it counts, with their weights; null: its own kind
      counts jsonb,
      -- of the kind that was asked for; 1 if several were
      weight bigint,
      since timestamptz,
      until timestamptz,
      -- when there is room again, if that isn't the end of the period
      reset_at timestamptz,
      used bigint,
      -- the cost of expired holds that is still in the counter; null: not looked up
      expired bigint,
      -- null: there is no counter yet; false: it belongs to a past period
      is_open boolean,
      group_name text,
      timezone text,
      -- the limit's max, where the subject has its own until a moment
      own_max bigint,
      overridden_until timestamptz,
      -- how deep in its tree the group is whose usage it counts; null: it counts a member's
      level smallint,
      is_spread boolean
    );
    -- how creating, settling or sweeping a usage moves its counters; enforced: they must have room; holds: by how many
    -- there are more, null if it isn't a hold
    create type tokenlimits.usage_move as (
      group_id uuid,
      kind text,
      user_id uuid,
      created_at timestamptz,
      cost bigint,
      generations integer,
      enforced boolean,
      holds integer
    );
  end if;
end
$do$;

create or replace function tokenlimits.refuse_transaction()
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if pg_is_in_recovery() then
    -- PostgreSQL's own code for a write to a read-only database
    perform tokenlimits.refuse(
      '25006',
      'this database is a standby, and its usage is out of date',
      null,
      'Call the primary database; use a standby for reports only.'
    );
  end if;
  perform tokenlimits.refuse(
    'TL009',
    'tokenlimits needs READ COMMITTED transactions',
    current_setting('transaction_isolation'),
    'Call it outside your transaction, or begin the transaction with isolation level read committed.'
  );
end
$$;

comment on function tokenlimits.refuse_transaction()
is 'tokenlimits: Raises 25006 on a standby, otherwise TL009: READ COMMITTED is required.';

revoke execute on function tokenlimits.refuse_transaction()
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.refuse_transaction()
to authenticated, service_role;

create or replace function tokenlimits.lock_groups(p_group_ids uuid[], p_exclusive boolean default false)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group_ids uuid[] := p_group_ids;
  v_stripe integer;
begin
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  if p_exclusive then
    v_group_ids := v_group_ids || array(
      select t.group_id from tokenlimits.group_tree as t where t.above_id = any(p_group_ids)
    );
  end if;
  -- in one order, or two calls could deadlock
  for v_stripe in
    select distinct get_byte(uuid_send(g.id), 15)
    from unnest(v_group_ids) as g (id)
    order by 1
  loop
    if p_exclusive then
      perform pg_advisory_xact_lock(1953459052, v_stripe);
    else
      perform pg_advisory_xact_lock_shared(1953459052, v_stripe);
    end if;
  end loop;
end
$$;

comment on function tokenlimits.lock_groups(uuid[], boolean)
is 'tokenlimits: Until the transaction ends, keeps unchanged what judges calls of these groups (shared), or waits for '
'all calls that their limits judge (exclusive).';

revoke execute on function tokenlimits.lock_groups(uuid[], boolean)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.free_slot(p_group_id uuid)
returns integer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_slot integer := pg_backend_pid() % 16;
begin
  -- try, never wait: up to 16 calls of one group then write the rollup side by side
  for i in 0..15 loop
    exit when pg_try_advisory_xact_lock(1936486260, get_byte(uuid_send(p_group_id), 15) * 16 + v_slot);
    v_slot := (v_slot + 1) % 16;
  end loop;
  return v_slot;
end
$$;

comment on function tokenlimits.free_slot(uuid)
is 'tokenlimits: A slot of the rollup that no other open transaction writes for this group; any slot if all 16 are '
'taken.';

revoke execute on function tokenlimits.free_slot(uuid)
from public, anon, authenticated, service_role;

-- 40_periods.sql

-- Periods: of the calendar in a time zone, and those that begin elsewhere.
--
-- Invariants
--   * Periods of one length in one zone follow each other without gap or overlap, on daylight-saving days too.
--   * A day begins at the first moment with its date, even where midnight happens twice or not at all.
--   * Hours are counted from the beginning of the day, so that a repeated hour is a separate period.
--   * An anchored period begins a whole number of periods after the anchor: by the local calendar if it has days or
--     months, each counted from the anchor itself (31 January, 28 February, 31 March).
--   * A rolling window of 60 parts counts 61, the one that has just begun and 60 before it. So within any window of
--     that length, never more than the max is used, and room returns at most a sixtieth late.

-- PostgreSQL reads a time that happens twice as the later one, and a time that doesn't happen with the offset before
-- the gap, which is the gap's beginning for a midnight. So only the first case needs care: try the offset of the day
-- before, and use that moment if it has the same local time.
create or replace function tokenlimits.first_moment(p_local timestamp, p_timezone text)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_late timestamptz := p_local at time zone p_timezone;
  v_day_before timestamptz := v_late - interval '24 hours';
  v_early timestamptz := (
    p_local - ((v_day_before at time zone p_timezone) - (v_day_before at time zone 'UTC'))
  ) at time zone 'UTC';
begin
  if v_early < v_late and v_early at time zone p_timezone = p_local then
    return v_early;
  end if;
  return v_late;
end
$$;

comment on function tokenlimits.first_moment(timestamp, text)
is 'tokenlimits: The first moment with this local time in the zone.';

revoke execute on function tokenlimits.first_moment(timestamp, text)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.period_of(p_period text, p_timezone text, p_at timestamptz)
returns tstzrange
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_local timestamp;
  v_day tstzrange;
  v_since timestamptz;
begin
  if p_period in ('lifetime', 'in_flight') then
    return tstzrange('-infinity', 'infinity');
  elsif p_period = 'minute' then
    v_since := date_bin('1 minute', p_at, '2000-01-01 00:00:00+00');
    return tstzrange(v_since, v_since + interval '1 minute');
  elsif p_period = 'hour' then
    v_day := tokenlimits.period_of('day', p_timezone, p_at);
    v_since := date_bin('1 hour', p_at, lower(v_day));
    return tstzrange(v_since, least(v_since + interval '1 hour', upper(v_day)));
  end if;
  v_local := date_trunc(p_period, p_at at time zone p_timezone);
  return tstzrange(
    tokenlimits.first_moment(v_local, p_timezone),
    tokenlimits.first_moment(v_local + ('1 ' || p_period)::interval, p_timezone)
  );
end
$$;

comment on function tokenlimits.period_of(text, text, timestamptz)
is 'tokenlimits: The calendar period in a zone that contains a moment.';

revoke execute on function tokenlimits.period_of(text, text, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.length_of(p_period text)
returns interval
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  -- "hour" is one, "5 hours" says how many
  return case when p_period ~ '^[0-9]' then p_period::interval else ('1 ' || p_period)::interval end;
end
$$;

comment on function tokenlimits.length_of(text)
is 'tokenlimits: How long a period is.';

revoke execute on function tokenlimits.length_of(text)
from public, anon, authenticated, service_role;

-- Of a window that begins at a moment. A day is 24 hours here; a month ends on the same day of the next one.
create or replace function tokenlimits.end_of(p_period text, p_timezone text, p_since timestamptz)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_period in ('month', 'year') then
    return tokenlimits.first_moment(
      (p_since at time zone p_timezone) + tokenlimits.length_of(p_period), p_timezone
    );
  end if;
  return p_since + make_interval(secs => extract(epoch from tokenlimits.length_of(p_period))::float8);
end
$$;

comment on function tokenlimits.end_of(text, text, timestamptz)
is 'tokenlimits: When a window that begins at a moment ends.';

revoke execute on function tokenlimits.end_of(text, text, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.anchored_period(
  p_period text,
  p_timezone text,
  p_anchor timestamptz,
  p_at timestamptz
)
returns tstzrange
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_length interval := tokenlimits.length_of(p_period);
  v_anchor timestamp := p_anchor at time zone p_timezone;
  v_local timestamp := p_at at time zone p_timezone;
  v_since timestamptz;
  v_until timestamptz;
  -- how many periods after the anchor; days and months are first estimated, since they differ in length
  v_number integer;
begin
  if p_period ~ '(minute|hour)' then
    v_since := date_bin(v_length, p_at, p_anchor);
    return tstzrange(v_since, v_since + v_length);
  elsif p_period ~ '(month|year)' then
    v_number := 12 * (extract(year from v_local) - extract(year from v_anchor))
      + extract(month from v_local) - extract(month from v_anchor);
    v_number := v_number / (12 * extract(year from v_length) + extract(month from v_length))::integer;
  else
    v_number := (v_local::date - v_anchor::date) / extract(day from v_length)::integer;
  end if;
  -- one too many, so that only the way back is left
  v_number := v_number + 2;
  loop
    v_until := v_since;
    v_since := tokenlimits.first_moment(v_anchor + v_number * v_length, p_timezone);
    exit when v_since <= p_at and v_until is not null;
    v_number := v_number - 1;
  end loop;
  return tstzrange(v_since, v_until);
end
$$;

comment on function tokenlimits.anchored_period(text, text, timestamptz, timestamptz)
is 'tokenlimits: The period that contains a moment, where periods are counted from an anchor.';

revoke execute on function tokenlimits.anchored_period(text, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.part_of(p_period text)
returns interval
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return make_interval(secs => extract(epoch from tokenlimits.length_of(p_period))::float8 / 60);
end
$$;

comment on function tokenlimits.part_of(text)
is 'tokenlimits: How long a part of a rolling window is.';

revoke execute on function tokenlimits.part_of(text)
from public, anon, authenticated, service_role;

-- For rolling: from the oldest part that counts to the end of the part that has just begun, when the oldest leaves.
create or replace function tokenlimits.window_of(
  p_period text,
  p_starts text,
  p_timezone text,
  p_anchor timestamptz,
  p_at timestamptz
)
returns tstzrange
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part interval;
  v_since timestamptz;
begin
  if p_starts = 'calendar' then
    return tokenlimits.period_of(p_period, p_timezone, p_at);
  elsif p_starts = 'anchor' then
    return tokenlimits.anchored_period(p_period, p_timezone, p_anchor, p_at);
  elsif p_starts = 'first_use' then
    return tstzrange(p_at, tokenlimits.end_of(p_period, p_timezone, p_at));
  end if;
  v_part := tokenlimits.part_of(p_period);
  v_since := date_bin(v_part, p_at, '1970-01-01 00:00:00+00');
  return tstzrange(v_since - 60 * v_part, v_since + v_part);
end
$$;

comment on function tokenlimits.window_of(text, text, text, timestamptz, timestamptz)
is 'tokenlimits: The period of a limit that contains a moment; for first_use, one that begins then.';

revoke execute on function tokenlimits.window_of(text, text, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

-- 50_limits.sql

-- The state of limits at a moment: read from counters, or counted from rollup and ledger if there is none.
--
-- Invariants
--   * limit_states returns members' limits first, then those of groups, the deepest first: the order of locks.
--   * A plain limit's counter says what is used. Others need more: limit_states and open_counter know what.
--   * It reads everything in one snapshot, so the counters that it read include the expired holds that it subtracts.

-- Counts what a counter would contain. For groups: whole buckets from the rollup, and the partial buckets before and
-- after them from the ledger, in separate queries: with one query for both, the planner may read all rows of a group.
-- For a member: from the member's own rows of the ledger.
create or replace function tokenlimits.count_usage(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz
)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- least: a minute has no whole bucket
  v_whole timestamptz := least(date_bin('15 minutes', p_since + interval '15 minutes' - interval '1 us', '2000-01-01 00:00:00+00'), p_until);
  v_rest timestamptz := greatest(date_bin('15 minutes', p_until, '2000-01-01 00:00:00+00'), v_whole);
begin
  if p_user_id is not null then
    return coalesce((
      select sum(u.cost)
      from public.generation_usage as u
      where
        u.user_id = p_user_id
        and u.created_at >= p_since
        and u.created_at < p_until
        and u.group_id = any(p_group_ids)
        and u.kind = p_kind
        and u.status in ('reserved', 'committed')
    ), 0);
  end if;
  return coalesce((
    select sum(r.cost)
    from tokenlimits.usage_rollup as r
    where r.group_id = any(p_group_ids) and r.kind = p_kind and r.bucket >= v_whole and r.bucket < v_rest
  ), 0) + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = any(p_group_ids)
      and u.created_at >= p_since
      and u.created_at < v_whole
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0) + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = any(p_group_ids)
      and u.created_at >= v_rest
      and u.created_at < p_until
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0);
end
$$;

comment on function tokenlimits.count_usage(uuid[], uuid, text, timestamptz, timestamptz)
is 'tokenlimits: Live usage of a kind in some groups between two moments, of one user, or of all if the user is null.';

revoke execute on function tokenlimits.count_usage(uuid[], uuid, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.expired_cost(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_at timestamptz
)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_user_id is not null then
    return coalesce((
      select sum(h.cost)
      from tokenlimits.holds as h
      where
        h.user_id = p_user_id
        and h.group_id = any(p_group_ids)
        and h.kind = p_kind
        and h.expires_at <= p_at
        and h.created_at >= p_since
    ), 0);
  end if;
  return coalesce((
    select sum(h.cost)
    from tokenlimits.holds as h
    where h.group_id = any(p_group_ids) and h.kind = p_kind and h.expires_at <= p_at and h.created_at >= p_since
  ), 0);
end
$$;

comment on function tokenlimits.expired_cost(uuid[], uuid, text, timestamptz, timestamptz)
is 'tokenlimits: The cost of expired holds in some groups that counters since a moment contain, of one user, or of all '
'if null.';

revoke execute on function tokenlimits.expired_cost(uuid[], uuid, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.count_holds(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_expired_at timestamptz default 'infinity'
)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_user_id is not null then
    return (
      select count(*)
      from tokenlimits.holds as h
      where
        h.user_id = p_user_id and h.group_id = any(p_group_ids) and h.kind = p_kind and h.expires_at <= p_expired_at
    );
  end if;
  return (
    select count(*)
    from tokenlimits.holds as h
    where h.group_id = any(p_group_ids) and h.kind = p_kind and h.expires_at <= p_expired_at
  );
end
$$;

comment on function tokenlimits.count_holds(uuid[], uuid, text, timestamptz)
is 'tokenlimits: How many holds in some groups are unswept, or expired at a moment, of one user, or of all if the user '
'is null.';

revoke execute on function tokenlimits.count_holds(uuid[], uuid, text, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.count_limit(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_period text,
  p_counts jsonb,
  p_since timestamptz,
  p_until timestamptz
)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_period = 'in_flight' then
    return tokenlimits.count_holds(p_group_ids, p_user_id, p_kind);
  elsif p_counts is null then
    return tokenlimits.count_usage(p_group_ids, p_user_id, p_kind, p_since, p_until);
  end if;
  return (
    select sum(w.value::bigint * tokenlimits.count_usage(p_group_ids, p_user_id, w.key, p_since, p_until))::bigint
    from jsonb_each_text(p_counts) as w
  );
end
$$;

comment on function tokenlimits.count_limit(uuid[], uuid, text, text, jsonb, timestamptz, timestamptz)
is 'tokenlimits: What a limit counts between two moments, whether it counts a kind, the kinds of a pool, or holds: see '
'count_usage.';

revoke execute on function tokenlimits.count_limit(uuid[], uuid, text, text, jsonb, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.expired_of_limit(
  p_group_ids uuid[],
  p_user_id uuid,
  p_kind text,
  p_period text,
  p_counts jsonb,
  p_since timestamptz,
  p_at timestamptz
)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_period = 'in_flight' then
    return tokenlimits.count_holds(p_group_ids, p_user_id, p_kind, p_at);
  elsif p_counts is null then
    return tokenlimits.expired_cost(p_group_ids, p_user_id, p_kind, p_since, p_at);
  end if;
  return (
    select sum(w.value::bigint * tokenlimits.expired_cost(p_group_ids, p_user_id, w.key, p_since, p_at))::bigint
    from jsonb_each_text(p_counts) as w
  );
end
$$;

comment on function tokenlimits.expired_of_limit(uuid[], uuid, text, text, jsonb, timestamptz, timestamptz)
is 'tokenlimits: What expired holds take from a limit: see expired_cost.';

revoke execute on function tokenlimits.expired_of_limit(uuid[], uuid, text, text, jsonb, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.anchor_of(p_state tokenlimits.limit_state)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(
    (
      select min(coalesce(m.anchor_at, m.joined_at))
      from public.group_memberships as m
      inner join tokenlimits.group_tree as t on t.group_id = m.group_id
      where p_state.scope = 'member' and t.above_id = p_state.group_id and m.user_id = p_state.subject
    ),
    (
      select coalesce(g.anchor_at, g.created_at)
      from public.user_groups as g
      where g.id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end
    )
  );
end
$$;

comment on function tokenlimits.anchor_of(tokenlimits.limit_state)
is 'tokenlimits: From when anchored periods are counted: of a member since the earliest membership, otherwise of the '
'group.';

revoke execute on function tokenlimits.anchor_of(tokenlimits.limit_state)
from public, anon, authenticated, service_role;

-- When the window began that a usage has opened, of a limit whose counter is missing: at the oldest live usage whose
-- window has not ended. Usage that was recorded for the past opens none.
create or replace function tokenlimits.opened_at(p_state tokenlimits.limit_state, p_at timestamptz)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- two days more, since months differ; what is too old is left out below
  v_since timestamptz := greatest(
    p_at - tokenlimits.length_of(p_state.period) - interval '2 days',
    (
      select max(r.reset_at)
      from tokenlimits.usage_resets as r
      where r.group_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end and r.kind in (p_state.kind, '*') and r.subject in (case p_state.scope when 'child' then p_state.subject else p_state.group_id end, p_state.subject)
    )
  );
begin
  return (
    select u.created_at
    from (
      select l.created_at, l.kind, l.cost, l.reserved_cost, l.status, l.settled_at, l.expires_at
      from public.generation_usage as l
      where
        p_state.scope <> 'member' and l.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end))
        and (p_state.counts is null and p_state.kind = l.kind or p_state.counts ? l.kind) and l.created_at >= v_since and l.status in ('reserved', 'committed')
      union all
      select l.created_at, l.kind, l.cost, l.reserved_cost, l.status, l.settled_at, l.expires_at
      from public.generation_usage as l
      where
        p_state.scope = 'member' and l.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end)) and l.user_id = p_state.subject
        and (p_state.counts is null and p_state.kind = l.kind or p_state.counts ? l.kind) and l.created_at >= v_since and l.status in ('reserved', 'committed')
    ) as u
    where
      (u.reserved_cost is not null or u.settled_at = u.created_at)
      and not (u.status not in ('reserved', 'committed')
or (u.status = 'reserved' and u.expires_at <= p_at))
      and tokenlimits.end_of(p_state.period, p_state.timezone, u.created_at) > p_at
    order by u.created_at
    limit 1
  );
end
$$;

comment on function tokenlimits.opened_at(tokenlimits.limit_state, timestamptz)
is 'tokenlimits: When the current window of a limit was opened by a first use, if any is known from the ledger.';

revoke execute on function tokenlimits.opened_at(tokenlimits.limit_state, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.recorded_parts(p_state tokenlimits.limit_state)
returns table (part timestamptz, used bigint)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return query
  select date_bin(v_part, u.created_at, '1970-01-01 00:00:00+00'), sum(u.cost * case when p_state.counts is null then 1 else (p_state.counts ->> u.kind)::bigint end)::bigint
  from (
    select l.created_at, l.kind, l.cost, l.reserved_cost, l.status, l.settled_at, l.expires_at
    from public.generation_usage as l
    where
      p_state.scope <> 'member' and l.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end))
      and (p_state.counts is null and p_state.kind = l.kind or p_state.counts ? l.kind) and l.created_at >= p_state.since and l.status in ('reserved', 'committed')
    union all
    select l.created_at, l.kind, l.cost, l.reserved_cost, l.status, l.settled_at, l.expires_at
    from public.generation_usage as l
    where
      p_state.scope = 'member' and l.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end)) and l.user_id = p_state.subject
      and (p_state.counts is null and p_state.kind = l.kind or p_state.counts ? l.kind) and l.created_at >= p_state.since and l.status in ('reserved', 'committed')
  ) as u
  group by 1;
end
$$;

comment on function tokenlimits.recorded_parts(tokenlimits.limit_state)
is 'tokenlimits: What is used in each part of a rolling window, according to the ledger.';

revoke execute on function tokenlimits.recorded_parts(tokenlimits.limit_state)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.used_parts(p_state tokenlimits.limit_state, p_at timestamptz)
returns table (part timestamptz, used bigint)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return query
  select q.part, sum(q.used)::bigint
  from (
    select c.part, c.used
    from tokenlimits.counter_parts as c
    where c.subject = p_state.subject and c.counter_id = p_state.counter_id
    union all
    select r.part, r.used
    from tokenlimits.recorded_parts(p_state) as r
    where p_state.is_open is null
    union all
    select date_bin(v_part, h.created_at, '1970-01-01 00:00:00+00'), -h.cost * case when p_state.counts is null then 1 else (p_state.counts ->> h.kind)::bigint end
    from tokenlimits.holds as h
    where
      h.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end))
      and (p_state.counts is null and p_state.kind = h.kind or p_state.counts ? h.kind) and h.expires_at <= p_at
      and (p_state.scope <> 'member' or h.user_id = p_state.subject)
      and h.created_at >= p_state.since
  ) as q
  where q.part > p_state.since - v_part
  group by q.part;
end
$$;

comment on function tokenlimits.used_parts(tokenlimits.limit_state, timestamptz)
is 'tokenlimits: What is used in each part of a rolling window, less expired holds; from the ledger, if there is no '
'counter yet.';

revoke execute on function tokenlimits.used_parts(tokenlimits.limit_state, timestamptz)
from public, anon, authenticated, service_role;

-- A part that began at a moment leaves the window one length after its end.
create or replace function tokenlimits.rolling_room_at(p_state tokenlimits.limit_state, p_cost bigint)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return coalesce(
    (
      select q.part + 61 * v_part
      from (
        select p.part, sum(p.used) over (order by p.part) as gone
        from tokenlimits.used_parts(p_state, tokenlimits.clock()) as p
      ) as q
      where p_state.used - q.gone + p_cost <= p_state.max
      order by q.part
      limit 1
    ),
    -- what a batch is about to use is in no part yet
    p_state.until + 60 * v_part
  );
end
$$;

comment on function tokenlimits.rolling_room_at(tokenlimits.limit_state, bigint)
is 'tokenlimits: When a rolling window will have room for a cost.';

revoke execute on function tokenlimits.rolling_room_at(tokenlimits.limit_state, bigint)
from public, anon, authenticated, service_role;

-- When as many live holds of the subject have expired as are in the way of one more.
create or replace function tokenlimits.next_place_at(p_state tokenlimits.limit_state)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce((
    select h.expires_at
    from tokenlimits.holds as h
    where
      h.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end))
      and h.kind = p_state.kind and h.expires_at > tokenlimits.clock()
      and (p_state.scope <> 'member' or h.user_id = p_state.subject)
    order by h.expires_at
    offset greatest(p_state.used - p_state.max, 0)
    limit 1
  ), tokenlimits.clock());
end
$$;

comment on function tokenlimits.next_place_at(tokenlimits.limit_state)
is 'tokenlimits: When one more hold will have a place, if none ends before.';

revoke execute on function tokenlimits.next_place_at(tokenlimits.limit_state)
from public, anon, authenticated, service_role;

-- When a full limit will have room for a cost; infinity: never by itself. Under an override, that may be when it ends.
create or replace function tokenlimits.room_at(p_state tokenlimits.limit_state, p_cost bigint)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_until timestamptz := case
    when p_cost > p_state.max then 'infinity'
    when p_state.period = 'in_flight' then tokenlimits.next_place_at(p_state)
    when p_state.starts = 'rolling' then tokenlimits.rolling_room_at(p_state, p_cost)
    else p_state.until
  end;
  v_override_ends timestamptz := p_state.overridden_until;
begin
  if v_override_ends > tokenlimits.clock() and v_override_ends <= v_until and isfinite(v_override_ends) then
    p_state.max := p_state.own_max;
    p_state.overridden_until := null;
    return case
      when (p_state.max is null or p_state.used + p_cost <= p_state.max) then v_override_ends
      else greatest(v_override_ends, tokenlimits.room_at(p_state, p_cost))
    end;
  end if;
  return v_until;
end
$$;

comment on function tokenlimits.room_at(tokenlimits.limit_state, bigint)
is 'tokenlimits: When a full limit will have room for a cost.';

revoke execute on function tokenlimits.room_at(tokenlimits.limit_state, bigint)
from public, anon, authenticated, service_role;

-- Completes a state whose counter is missing, or belongs to another period, or doesn't say when there is room again.
create or replace function tokenlimits.complete_state(
  p_state tokenlimits.limit_state,
  p_window tstzrange,
  p_at timestamptz
)
returns tokenlimits.limit_state
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_user_id uuid := case p_state.scope when 'member' then p_state.subject end;
  v_opened_at timestamptz;
  v_override public.limit_overrides;
begin
  if p_state.is_open is null then
    -- a counter would have it
    select * into v_override
    from public.limit_overrides as o
    where o.group_id = p_state.group_id and o.kind = p_state.kind
    and o.period = p_state.period and o.starts = p_state.starts
    and o.scope = p_state.scope and o.subject = p_state.subject
    and (o.until is null or o.until > p_at);
    if found then
      p_state.max := v_override.max;
      p_state.overridden_until := coalesce(v_override.until, 'infinity');
    end if;
  end if;
  if p_state.is_open is not true then
    if p_window is null then
      p_window := tokenlimits.window_of(
        p_state.period, p_state.starts, p_state.timezone,
        case p_state.starts when 'anchor' then tokenlimits.anchor_of(p_state) end, p_at
      );
    end if;
    if p_state.starts = 'first_use' then
      v_opened_at := case when p_state.until is null then tokenlimits.opened_at(p_state, p_at) end;
      if v_opened_at is null then
        p_state.reset_at := 'infinity';
      else
        p_window := tstzrange(
          v_opened_at, tokenlimits.end_of(p_state.period, p_state.timezone, v_opened_at)
        );
      end if;
    end if;
    p_state.since := case
      -- a reset takes no hold away
      when p_state.period = 'in_flight' then lower(p_window)
      else greatest(lower(p_window), case when p_state.starts <> 'rolling' then p_state.until end, (
        select max(r.reset_at)
        from tokenlimits.usage_resets as r
        where r.group_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end and r.kind in (p_state.kind, '*') and r.subject in (case p_state.scope when 'child' then p_state.subject else p_state.group_id end, p_state.subject)
      ))
    end;
    -- statements of their own: a subquery costs time to set up, even where it isn't needed
    if p_state.until is null then
      p_state.used := tokenlimits.count_limit(
        array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end),
        v_user_id, p_state.kind, p_state.period, p_state.counts, p_state.since, upper(p_window)
      );
    elsif p_state.starts = 'rolling' then
      p_state.used := coalesce((
        select sum(c.used)
        from tokenlimits.counter_parts as c
        where
          c.subject = p_state.subject and c.counter_id = p_state.counter_id and c.part >= lower(p_window)
      ), 0);
    else
      p_state.used := 0;
    end if;
    p_state.until := upper(p_window);
  end if;
  return p_state;
end
$$;

comment on function tokenlimits.complete_state(tokenlimits.limit_state, tstzrange, timestamptz)
is 'tokenlimits: A state whose counter was not current, as of a moment.';

revoke execute on function tokenlimits.complete_state(tokenlimits.limit_state, tstzrange, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.next_leaving(p_state tokenlimits.limit_state, p_at timestamptz)
returns timestamptz
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  return coalesce((
    select min(q.part) + 61 * v_part
    from tokenlimits.used_parts(p_state, p_at) as q
    where q.used > 0
  ), 'infinity');
end
$$;

comment on function tokenlimits.next_leaving(tokenlimits.limit_state, timestamptz)
is 'tokenlimits: When the oldest usage leaves a rolling window; infinity if there is none.';

revoke execute on function tokenlimits.next_leaving(tokenlimits.limit_state, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.limit_states(
  p_group_id uuid,
  p_user_ids uuid[],
  p_kinds text[],
  p_at timestamptz,
  p_less_expired boolean default true,
  p_in_flight boolean default true
)
returns tokenlimits.limit_state[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states tokenlimits.limit_state[];
  v_is_plain boolean;
  v record;
  v_state tokenlimits.limit_state;
  v_any_expired boolean;
  -- a counter may be ahead of a clock that was set back; holds expire by the clock
  v_now timestamptz := least(p_at, tokenlimits.clock());
begin
  select
    array_agg(
      row(
        l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
        l.mode,
        case when c.overridden_until > p_at then c.override_max else l.max end,
        l.counts, l.weight,
        c.since, c.until, null, c.used, null, c.until > p_at, l.name, l.timezone, l.max, c.overridden_until,
        l.level, l.is_spread
      )::tokenlimits.limit_state
      order by l.kind, l.scope <> 'member', l.level desc, l.subject, l.counter_id
    ),
    bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= p_at and c.until > p_at)
    and not exists (
      select
      from (
        select distinct w.kind, r.above_id as root_id
        from tokenlimits.group_tree as o
        inner join public.group_limits as i on i.group_id = o.above_id
        inner join tokenlimits.group_tree as r on r.group_id = o.group_id and r.level = 0
        cross join lateral (
          select i.kind, 1::bigint as weight
          where i.counts is null
          union all
          select p.key, p.value::bigint
          from jsonb_each_text(i.counts) as p
        ) as w
        where o.group_id = p_group_id and (p_kinds is null or case
          when i.counts is null then i.kind = any(p_kinds)
          else i.counts ?| p_kinds
        end)
      ) as k
      where
        (
          select true
          from tokenlimits.holds as h
          where
            h.group_id = k.root_id
            and h.kind = k.kind and h.expires_at <= p_at
          order by h.expires_at
          limit 1
        ) is true
        or (
          select true
          from tokenlimits.holds as h
          where
            h.root_id = k.root_id and h.root_id <> h.group_id
            and h.kind = k.kind and h.expires_at <= p_at
          order by h.expires_at
          limit 1
        ) is true
    )
  into v_states, v_is_plain
  from (
    select
      i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
      g.is_nested, g.is_spread,
      i.mode, i.counts,
      case i.scope when 'group' then t.level when 'child' then t.level + 1 end as level,
      case when cardinality(p_kinds) = 1 then case when i.counts is null then 1 else (i.counts ->> p_kinds[1])::bigint end else 1 end as weight,
      unnest(case i.scope
        when 'group' then array[i.group_id]
        -- one that was deleted has no pool any more
        when 'child' then array(select c.id from public.user_groups as c where c.id = t.child_id)
        else p_user_ids
      end) as subject
    from tokenlimits.group_tree as t
    inner join public.group_limits as i on i.group_id = t.above_id
    inner join public.user_groups as g on g.id = i.group_id
    where
      t.group_id = p_group_id and (p_kinds is null or case
        when i.counts is null then i.kind = any(p_kinds)
        else i.counts ?| p_kinds
      end)
      and (i.period <> 'in_flight' or p_in_flight)
  ) as l
  left join lateral (
    select k.since, k.until, k.used, k.override_max, k.overridden_until
    from tokenlimits.counters as k
    where k.subject = l.subject and k.counter_id = l.counter_id
    -- one look-up per limit, whatever size the planner assumes for an array
    offset 0
  ) as c on true;
  if v_states is null then
    return '{}';
  elsif v_is_plain then
    return v_states;
  end if;
  v_any_expired := p_less_expired and exists (
    select
    from (
      select distinct w.kind, r.above_id as root_id
      from tokenlimits.group_tree as o
      inner join public.group_limits as i on i.group_id = o.above_id
      inner join tokenlimits.group_tree as r on r.group_id = o.group_id and r.level = 0
      cross join lateral (
        select i.kind, 1::bigint as weight
        where i.counts is null
        union all
        select p.key, p.value::bigint
        from jsonb_each_text(i.counts) as p
      ) as w
      where o.group_id = p_group_id and (p_kinds is null or case
        when i.counts is null then i.kind = any(p_kinds)
        else i.counts ?| p_kinds
      end)
    ) as k
    where
      (
        select true
        from tokenlimits.holds as h
        where
          h.group_id = k.root_id
          and h.kind = k.kind and h.expires_at <= v_now
        order by h.expires_at
        limit 1
      ) is true
      or (
        select true
        from tokenlimits.holds as h
        where
          h.root_id = k.root_id and h.root_id <> h.group_id
          and h.kind = k.kind and h.expires_at <= v_now
        order by h.expires_at
        limit 1
      ) is true
  );
  -- calendar periods are the same for all
  for v in
    select s.place, p.range
    from unnest(v_states) with ordinality as s (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
  used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, place)
    left join (
      select d.period, d.timezone, tokenlimits.period_of(d.period, d.timezone, p_at) as range
      from (
        select distinct o.period, o.timezone
        from unnest(v_states) as o
        where o.starts = 'calendar' and o.is_open is not true
      ) as d
    ) as p on p.period = s.period and p.timezone = s.timezone and s.starts = 'calendar'
    where s.is_open is not true
  loop
    v_states[v.place] := tokenlimits.complete_state(v_states[v.place], v.range, p_at);
  end loop;
  for i in 1..cardinality(v_states) loop
    continue when not v_any_expired and (v_states[i]).starts <> 'rolling';
    v_state := v_states[i];
    if v_any_expired then
      v_state.expired := tokenlimits.expired_of_limit(
        array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case v_state.scope when 'child' then v_state.subject else v_state.group_id end),
        case v_state.scope when 'member' then v_state.subject end, v_state.kind, v_state.period,
        v_state.counts, v_state.since, v_now
      );
      v_state.used := v_state.used - v_state.expired;
    end if;
    if v_state.starts = 'rolling' then
      v_state.reset_at := tokenlimits.next_leaving(v_state, v_now);
    end if;
    v_states[i] := v_state;
  end loop;
  return v_states;
end
$$;

comment on function tokenlimits.limit_states(uuid, uuid[], text[], timestamptz, boolean, boolean)
is 'tokenlimits: The limits of a group and of all above it, for users, that count some kinds or (null) any, with the '
'usage of each.';

revoke execute on function tokenlimits.limit_states(uuid, uuid[], text[], timestamptz, boolean, boolean)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.child_pools(p_group_ids uuid[], p_at timestamptz)
returns tokenlimits.limit_state[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states tokenlimits.limit_state[];
  v_is_plain boolean;
  v record;
  v_state tokenlimits.limit_state;
  v_any_expired boolean;
  -- a counter may be ahead of a clock that was set back; holds expire by the clock
  v_now timestamptz := least(p_at, tokenlimits.clock());
begin
  v_any_expired := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
  select
    array_agg(
      row(
        l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
        l.mode,
        case when c.overridden_until > p_at then c.override_max else l.max end,
        l.counts, l.weight,
        c.since, c.until, null, c.used, null, c.until > p_at, l.name, l.timezone, l.max, c.overridden_until,
        l.level, l.is_spread
      )::tokenlimits.limit_state
      order by l.kind, l.scope <> 'member', l.level desc, l.subject, l.counter_id
    ),
    bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= p_at and c.until > p_at)
    and not v_any_expired
  into v_states, v_is_plain
  from (
    select
      i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
      g.is_nested, g.is_spread,
      i.mode, i.counts,
      case i.scope when 'group' then t.level when 'child' then t.level + 1 end as level,
      case when cardinality((null::text[])) = 1 then case when i.counts is null then 1 else (i.counts ->> (null::text[])[1])::bigint end else 1 end as weight,
      t.child_id as subject
    from tokenlimits.group_tree as t
    inner join public.group_limits as i on i.group_id = t.above_id
    inner join public.user_groups as g on g.id = i.group_id
    where
      i.scope = 'child' and t.distance = 1 and t.group_id = any(array(
        select c.id
        from public.user_groups as c
        where c.id = any(p_group_ids) or c.parent_id = any(p_group_ids)
      )) and ((null::text[]) is null or case
        when i.counts is null then i.kind = any((null::text[]))
        else i.counts ?| (null::text[])
      end)
  ) as l
  left join lateral (
    select k.since, k.until, k.used, k.override_max, k.overridden_until
    from tokenlimits.counters as k
    where k.subject = l.subject and k.counter_id = l.counter_id
    -- one look-up per limit, whatever size the planner assumes for an array
    offset 0
  ) as c on true;
  if v_states is null then
    return '{}';
  elsif v_is_plain then
    return v_states;
  end if;
  -- calendar periods are the same for all
  for v in
    select s.place, p.range
    from unnest(v_states) with ordinality as s (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
  used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, place)
    left join (
      select d.period, d.timezone, tokenlimits.period_of(d.period, d.timezone, p_at) as range
      from (
        select distinct o.period, o.timezone
        from unnest(v_states) as o
        where o.starts = 'calendar' and o.is_open is not true
      ) as d
    ) as p on p.period = s.period and p.timezone = s.timezone and s.starts = 'calendar'
    where s.is_open is not true
  loop
    v_states[v.place] := tokenlimits.complete_state(v_states[v.place], v.range, p_at);
  end loop;
  for i in 1..cardinality(v_states) loop
    continue when not v_any_expired and (v_states[i]).starts <> 'rolling';
    v_state := v_states[i];
    if v_any_expired then
      v_state.expired := tokenlimits.expired_of_limit(
        array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case v_state.scope when 'child' then v_state.subject else v_state.group_id end),
        case v_state.scope when 'member' then v_state.subject end, v_state.kind, v_state.period,
        v_state.counts, v_state.since, v_now
      );
      v_state.used := v_state.used - v_state.expired;
    end if;
    if v_state.starts = 'rolling' then
      v_state.reset_at := tokenlimits.next_leaving(v_state, v_now);
    end if;
    v_states[i] := v_state;
  end loop;
  return v_states;
end
$$;

comment on function tokenlimits.child_pools(uuid[], timestamptz)
is 'tokenlimits: The pools of some groups and of their children in child limits, with the usage of each at a moment.';

revoke execute on function tokenlimits.child_pools(uuid[], timestamptz)
from public, anon, authenticated, service_role;

-- The state was read a moment ago. If another call has opened the counter since, that counter stays unchanged. Returns
-- whether it was counted from the ledger, with all of its parts. Otherwise a rolling counter keeps those that still
-- count: they are read again now, under its lock.
create or replace function tokenlimits.open_counter(p_state tokenlimits.limit_state)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_is_new boolean;
begin
  insert into tokenlimits.counters as c (
    subject, counter_id, since, until, used, override_max, overridden_until
  )
  values (
    p_state.subject, p_state.counter_id, p_state.since, p_state.until, p_state.used,
    case when p_state.overridden_until is not null then p_state.max end, p_state.overridden_until
  )
  on conflict on constraint counters_pkey do update
  set since = excluded.since, until = excluded.until, used = excluded.used
  where c.until <= excluded.since or (p_state.starts = 'rolling' and c.until < excluded.until)
  -- of a new row
  returning c.xmax = 0 into v_is_new;
  if p_state.starts = 'rolling' and v_is_new then
    insert into tokenlimits.counter_parts (subject, counter_id, part, used)
    select p_state.subject, p_state.counter_id, r.part, r.used
    from tokenlimits.recorded_parts(p_state) as r;
  elsif p_state.starts = 'rolling' and found then
    delete from tokenlimits.counter_parts as p
    where
      p.subject = p_state.subject and p.counter_id = p_state.counter_id
      and p.part <= p_state.since - tokenlimits.part_of(p_state.period);
    update tokenlimits.counters as c
    set used = coalesce((
      select sum(p.used)
      from tokenlimits.counter_parts as p
      where p.subject = c.subject and p.counter_id = c.counter_id
    ), 0)
    where c.subject = p_state.subject and c.counter_id = p_state.counter_id;
  end if;
  -- new counters are rare, so this is the time to drop those of removed limits, which would otherwise pile up
  if p_state.scope = 'member' then
    perform tokenlimits.drop_stale_counters(p_state.subject);
  end if;
  return v_is_new is true;
end
$$;

comment on function tokenlimits.open_counter(tokenlimits.limit_state)
is 'tokenlimits: Creates a counter, or rolls it over into its new period.';

revoke execute on function tokenlimits.open_counter(tokenlimits.limit_state)
from public, anon, authenticated, service_role;

-- The counter is locked: it has just been moved.
create or replace function tokenlimits.move_parts(
  p_state tokenlimits.limit_state,
  p_moves tokenlimits.usage_move[]
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part interval := tokenlimits.part_of(p_state.period);
begin
  insert into tokenlimits.counter_parts as p (subject, counter_id, part, used)
  select
    p_state.subject, p_state.counter_id, date_bin(v_part, m.created_at, '1970-01-01 00:00:00+00') as part,
    sum(m.cost * case when p_state.counts is null then 1 else (p_state.counts ->> m.kind)::bigint end)
  from unnest(p_moves) as m
  where
    m.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end)) and (p_state.counts is null and p_state.kind = m.kind or p_state.counts ? m.kind)
    and (p_state.scope <> 'member' or m.user_id = p_state.subject)
    and m.created_at >= p_state.since
  group by 3
  on conflict on constraint counter_parts_pkey do update
  set used = p.used + excluded.used;
end
$$;

comment on function tokenlimits.move_parts(tokenlimits.limit_state, tokenlimits.usage_move[])
is 'tokenlimits: Moves the parts of a rolling counter by the moves that it counts.';

revoke execute on function tokenlimits.move_parts(tokenlimits.limit_state, tokenlimits.usage_move[])
from public, anon, authenticated, service_role;

create or replace function tokenlimits.drop_stale_counters(p_subject uuid)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- skip those that another call is dropping: waiting for them would break the order of locks
  delete from tokenlimits.counters as c
  using (
    select s.subject, s.counter_id
    from tokenlimits.counters as s
    where
      s.subject = p_subject
      and not exists (select from public.group_limits as l where l.counter_id = s.counter_id)
    for update skip locked
  ) as d
  where c.subject = d.subject and c.counter_id = d.counter_id;
end
$$;

comment on function tokenlimits.drop_stale_counters(uuid)
is 'tokenlimits: Drops a subject''s counters of removed limits.';

revoke execute on function tokenlimits.drop_stale_counters(uuid)
from public, anon, authenticated, service_role;

-- 55_edits.sql

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
set search_path = pg_catalog, pg_temp
as $$
begin
  new.id := gen_random_uuid();
  new.counter_id := nextval(pg_get_serial_sequence('public.group_limits', 'counter_id'));
  return new;
end
$$;

comment on function tokenlimits.renew_counter()
is 'tokenlimits: Trigger: a limit that is turned into another one is recounted.';

revoke execute on function tokenlimits.renew_counter()
from public, anon, authenticated, service_role;

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
set search_path = pg_catalog, pg_temp
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

comment on function tokenlimits.refuse_pool()
is 'tokenlimits: Trigger: what a spread group has used is in no one place.';

revoke execute on function tokenlimits.refuse_pool()
from public, anon, authenticated, service_role;

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
set search_path = pg_catalog, pg_temp
as $$
declare
  v_changed public.group_limits[];
  v_group_id uuid;
  v_group_ids uuid[];
  v_state tokenlimits.limit_state;
begin
  if tg_op = 'INSERT' then
    v_changed := array(
      select row(r.*)::public.group_limits from new_rows as r
    );
  elsif tg_op = 'DELETE' then
    v_changed := array(
      select row(r.*)::public.group_limits from old_rows as r
    );
  elsif tg_op = 'UPDATE' then
    v_changed := array(
      select row(r.*)::public.group_limits from new_rows as r
      union all
      select row(r.*)::public.group_limits from old_rows as r
    );
  end if;
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

comment on function tokenlimits.apply_limits()
is 'tokenlimits: Trigger: opens the counters of edited limits while no call uses them.';

revoke execute on function tokenlimits.apply_limits()
from public, anon, authenticated, service_role;

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

-- Waits for the calls that judge by the old overrides. A subject without a counter finds its override when it gets one.
create or replace function tokenlimits.apply_overrides()
returns trigger
language plpgsql
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_changed public.limit_overrides[];
begin
  if tg_op = 'INSERT' then
    v_changed := array(
      select row(r.*)::public.limit_overrides from new_rows as r
    );
  elsif tg_op = 'DELETE' then
    v_changed := array(
      select row(r.*)::public.limit_overrides from old_rows as r
    );
  elsif tg_op = 'UPDATE' then
    v_changed := array(
      select row(r.*)::public.limit_overrides from new_rows as r
      union all
      select row(r.*)::public.limit_overrides from old_rows as r
    );
  end if;
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  perform tokenlimits.lock_groups(array(select case c.scope when 'child' then c.subject else c.group_id end from unnest(v_changed) as c), true);
  update tokenlimits.counters as k
  set override_max = f.max, overridden_until = f.until
  from (
    select distinct l.counter_id, c.subject, o.max, case when o.id is not null then coalesce(o.until, 'infinity') end as until
    from unnest(v_changed) as c
    inner join public.group_limits as l on l.group_id = c.group_id and l.kind = c.kind
    and l.period = c.period and l.starts = c.starts
    and l.scope = c.scope
    left join public.limit_overrides as o on o.group_id = l.group_id and o.kind = l.kind
    and o.period = l.period and o.starts = l.starts
    and o.scope = l.scope and o.subject = c.subject
    and (o.until is null or o.until > tokenlimits.clock())
  ) as f
  where k.counter_id = f.counter_id and k.subject = f.subject;
  return null;
end
$$;

comment on function tokenlimits.apply_overrides()
is 'tokenlimits: Trigger: tells the counters of edited overrides while no call uses them.';

revoke execute on function tokenlimits.apply_overrides()
from public, anon, authenticated, service_role;

create or replace trigger limit_overrides_apply_insert
after insert on public.limit_overrides
referencing new table as new_rows
for each statement execute function tokenlimits.apply_overrides();

create or replace trigger limit_overrides_apply_update
after update on public.limit_overrides
referencing old table as old_rows new table as new_rows
for each statement execute function tokenlimits.apply_overrides();

create or replace trigger limit_overrides_apply_delete
after delete on public.limit_overrides
referencing old table as old_rows
for each statement execute function tokenlimits.apply_overrides();

-- In a new time zone, every period of the group begins at a different moment; with a new anchor, every anchored one.
-- One statement for all groups, so that it takes their stripes in order.
create or replace function tokenlimits.renew_counters()
returns trigger
language plpgsql
-- definer: the limits' counters change even if the caller may not write limits
security definer
set search_path = pg_catalog, pg_temp
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

comment on function tokenlimits.renew_counters()
is 'tokenlimits: Trigger: a new time zone or anchor turns limits of the group into others.';

revoke execute on function tokenlimits.renew_counters()
from public, anon, authenticated, service_role;

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
set search_path = pg_catalog, pg_temp
as $$
declare
  v_changed public.group_memberships[];
  v_group_ids uuid[];
begin
  if tg_op = 'INSERT' then
    v_changed := array(
      select row(r.*)::public.group_memberships from new_rows as r
    );
  elsif tg_op = 'DELETE' then
    v_changed := array(
      select row(r.*)::public.group_memberships from old_rows as r
    );
  elsif tg_op = 'UPDATE' then
    v_changed := array(
      select row(r.*)::public.group_memberships from new_rows as r
      union all
      select row(r.*)::public.group_memberships from old_rows as r
    );
  end if;
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  v_group_ids := array(
    select distinct l.group_id
    from tokenlimits.group_tree as t
    inner join public.group_limits as l on l.group_id = t.above_id
    where t.group_id = any(array(select m.group_id from unnest(v_changed) as m)) and l.starts = 'anchor' and l.scope = 'member'
  );
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

comment on function tokenlimits.renew_anchors()
is 'tokenlimits: Trigger: a member''s anchored periods are those of their current membership.';

revoke execute on function tokenlimits.renew_anchors()
from public, anon, authenticated, service_role;

create or replace trigger group_memberships_renew_anchors_insert
after insert on public.group_memberships
referencing new table as new_rows
for each statement execute function tokenlimits.renew_anchors();

create or replace trigger group_memberships_renew_anchors_update
after update on public.group_memberships
referencing old table as old_rows new table as new_rows
for each statement execute function tokenlimits.renew_anchors();

create or replace trigger group_memberships_renew_anchors_delete
after delete on public.group_memberships
referencing old table as old_rows
for each statement execute function tokenlimits.renew_anchors();

-- Limits and members are deleted with their groups, and each takes stripes in a trigger of its own. All are taken here,
-- in one order, before those triggers and after all rows.
create or replace function tokenlimits.forget_groups()
returns trigger
language plpgsql
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group_ids uuid[] := array(select o.id from old_rows as o);
begin
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  perform tokenlimits.lock_groups(v_group_ids || array(
    select distinct l.group_id
    from tokenlimits.group_tree as t
    inner join public.group_limits as l on l.group_id = t.above_id
    where t.group_id = any(v_group_ids) and l.starts = 'anchor' and l.scope = 'member'
  ), true);
  -- nobody sees the pools any more that they had as children; what they have used goes on counting above
  delete from tokenlimits.counters as c
  where c.subject = any(v_group_ids);
  delete from public.limit_overrides as o
  where o.scope = 'child' and o.subject = any(v_group_ids);
  return null;
end
$$;

comment on function tokenlimits.forget_groups()
is 'tokenlimits: Trigger: deleted groups have no pools any more.';

revoke execute on function tokenlimits.forget_groups()
from public, anon, authenticated, service_role;

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
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  perform tokenlimits.lock_groups(array(
    select distinct l.group_id
    from tokenlimits.group_tree as t
    inner join public.group_limits as l on l.group_id = t.above_id
    where t.group_id = any(p_group_ids) and l.starts = 'anchor' and l.scope = 'member'
  ), true);
end
$$;

comment on function tokenlimits.quiet_members(uuid[])
is 'tokenlimits: Waits for all calls that anchored member limits of some groups, and of all above them, judge.';

revoke execute on function tokenlimits.quiet_members(uuid[])
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.quiet_members(uuid[])
to authenticated, service_role;

-- 60_answers.sql

-- Answers.
--
-- Invariants
--   * The same lines build every answer about a generation: of a single call, a batch and a settlement.

create or replace function tokenlimits.require_group(p_group_id uuid)
returns public.user_groups
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group public.user_groups;
begin
  select * into v_group from public.user_groups as g where g.id = p_group_id;
  if not found then
    perform tokenlimits.refuse(
      'TL002',
      format('there is no group %s', coalesce(p_group_id::text, 'null')),
      p_group_id::text,
      'It may have been deleted; list the groups to see which exist.'
    );
  end if;
  return v_group;
end
$$;

comment on function tokenlimits.require_group(uuid)
is 'tokenlimits: The group with that id; raises TL002 if there is none.';

revoke execute on function tokenlimits.require_group(uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.require_group(uuid)
to authenticated, service_role;

-- The groups that a call judges, and so locks: a user doesn't wait for a group that has no limit for the kind. Where
-- none does, the first is enough to say so. A group that gets its first limit for the kind at this very moment is left
-- out, as if the call had come a moment earlier; its counter is counted from its own usage, so it misses nothing.
create or replace function tokenlimits.entitling(p_group_ids uuid[], p_kind text)
returns uuid[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(
    nullif(array(
      select g.id
      from unnest(p_group_ids) with ordinality as g (id, place)
      where exists (
        select
        from tokenlimits.group_tree as t
        inner join public.group_limits as l on l.group_id = t.above_id
        where
          t.group_id = g.id and (l.counts is null and l.kind = p_kind or l.counts ? p_kind) and (l.scope <> 'child' or t.child_id is not null)
          and true
      )
      order by g.place
    ), '{}'),
    p_group_ids[1:1]
  );
end
$$;

comment on function tokenlimits.entitling(uuid[], text)
is 'tokenlimits: Those of some groups that have a limit for a kind, themselves or above them; the first, if none has.';

revoke execute on function tokenlimits.entitling(uuid[], text)
from public, anon, authenticated, service_role;

do $do$
begin
  if to_regtype('tokenlimits.verdict') is null then
    -- whether a request is allowed, for which group, and the limits by which it was judged
    create type tokenlimits.verdict as (
      allowed boolean,
      reason text,
      group_id uuid,
      states tokenlimits.limit_state[],
      denied_by tokenlimits.limit_state,
      -- the counters of observing limits that would have denied it
      observed bigint[]
    );
    -- as clients see it: row_to_json costs a fraction of building an object
    create type tokenlimits.group_answer as (id uuid, name text);
    create type tokenlimits.limit_answer as (
      kind text,
      period text,
      starts text,
      scope text,
      mode text,
      max bigint,
      used bigint,
      remaining bigint,
      reset_at timestamptz,
      weight bigint,
      "group" tokenlimits.group_answer
    );
    create type tokenlimits.generation_answer as (
      allowed boolean,
      reason text,
      error text,
      usage_id uuid,
      status text,
      expires_at timestamptz,
      "group" tokenlimits.group_answer,
      kind text,
      cost bigint,
      limits tokenlimits.limit_answer[],
      denied_by tokenlimits.limit_answer,
      would_deny tokenlimits.limit_answer[],
      remaining bigint,
      reset_at timestamptz,
      retry_after numeric,
      replayed boolean
    );
  end if;
end
$do$;

-- For people to read: "Image generation limit exceeded: 100 of 100 used this month, resets 2026-12-01 00:00 UTC".
create or replace function tokenlimits.denial_text(p_verdict tokenlimits.verdict, p_kind text, p_cost bigint)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kind text := replace(p_kind, '_', ' ');
  v_limit tokenlimits.limit_state := p_verdict.denied_by;
  v_until text := to_char(v_limit.until at time zone v_limit.timezone, 'YYYY-MM-DD HH24:MI ') || v_limit.timezone;
  v_error text;
  v_whose text := case
    when v_limit.scope = 'member' then 'by this user '
    when v_limit.scope = 'child' then 'by this customer '
    when v_limit.group_id <> p_verdict.group_id then format('in %s ', v_limit.group_name)
    else ''
  end;
begin
  if p_verdict.reason = 'not_in_group' then
    return 'The user is in no group that may pay for this';
  elsif p_verdict.reason = 'no_limit_for_kind' then
    return format('None of the user''s groups has a limit for %s generations, so none is allowed', v_kind);
  elsif p_verdict.reason = 'busy' then
    return 'The group is locked at the moment, because its usage or its limits are being changed; try again';
  end if;
  v_error := upper(left(v_kind, 1)) || substr(v_kind, 2) || ' generation limit exceeded: ';
  if v_limit.period = 'in_flight' then
    return v_error
      || rtrim(
        format('%s %s in progress ', v_limit.used, case v_limit.used when 1 then v_kind else v_kind || 's' end) || v_whose
      )
      || format(', at most %s at once', v_limit.max)
      || case when isfinite(v_limit.until) then ', next place ' || v_until else '' end;
  end if;
  return v_error
    || format('%s of %s ', v_limit.used, v_limit.max)
    || case when v_limit.counts is not null then replace(v_limit.kind, '_', ' ') || ' ' else '' end
    || 'used '
    || v_whose
    || case
      when v_limit.starts = 'rolling' then 'in the last ' || v_limit.period
      when v_limit.starts <> 'calendar' then 'since ' || to_char(
        v_limit.since at time zone v_limit.timezone, 'YYYY-MM-DD HH24:MI'
      )
      when v_limit.period = 'day' then 'today'
      when v_limit.period = 'lifetime' then 'in total'
      else 'this ' || v_limit.period
    end
    || case
      when p_cost * v_limit.weight > 1 then format(', %s more asked for', p_cost * v_limit.weight)
      else ''
    end
    || case
      when isfinite(v_limit.until)
        then case v_limit.starts when 'rolling' then ', room again ' else ', resets ' end || v_until
      else ''
    end;
end
$$;

comment on function tokenlimits.denial_text(tokenlimits.verdict, text, bigint)
is 'tokenlimits: The reason for a denial, as a sentence.';

revoke execute on function tokenlimits.denial_text(tokenlimits.verdict, text, bigint)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.answer(
  p_verdict tokenlimits.verdict,
  p_kind text,
  p_cost bigint,
  p_usage public.generation_usage,
  p_replayed boolean
)
returns json
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_limits tokenlimits.limit_answer[] := '{}';
  v_would_deny tokenlimits.limit_answer[] := '{}';
  v_tightest tokenlimits.limit_state;
  v_state tokenlimits.limit_state;
  v_denied_by tokenlimits.limit_answer;
  v_group_name text;
begin
  foreach v_state in array coalesce(p_verdict.states, '{}') loop
    v_limits := v_limits || row(
      v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
      v_state.used,
      case when v_state.max is not null then greatest((v_state.max - v_state.used - case
        when v_state.used > v_state.max then v_state.weight - 1
        else 0
      end) / v_state.weight, 0) end,
      nullif(coalesce(v_state.reset_at, v_state.until), 'infinity'), v_state.weight,
      case when v_state.group_id <> p_verdict.group_id then
        row(v_state.group_id, v_state.group_name)::tokenlimits.group_answer
      end
    )::tokenlimits.limit_answer;
    if v_state.mode = 'observe' then
      if v_state.counter_id = any(p_verdict.observed) then
        v_would_deny := v_would_deny || row(
      v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
      v_state.used,
      case when v_state.max is not null then greatest((v_state.max - v_state.used - case
        when v_state.used > v_state.max then v_state.weight - 1
        else 0
      end) / v_state.weight, 0) end,
      nullif(coalesce(v_state.reset_at, v_state.until), 'infinity'), v_state.weight,
      case when v_state.group_id <> p_verdict.group_id then
        row(v_state.group_id, v_state.group_name)::tokenlimits.group_answer
      end
    )::tokenlimits.limit_answer;
      end if;
    -- how many may run at once is in other units
    elsif v_state.period <> 'in_flight' and (
      (v_state.max - v_state.used - case
        when v_state.used > v_state.max then v_state.weight - 1
        else 0
      end) / v_state.weight < (v_tightest.max - v_tightest.used - case
        when v_tightest.used > v_tightest.max then v_tightest.weight - 1
        else 0
      end) / v_tightest.weight
      or (v_tightest.max is null and v_state.max is not null)
    ) then
      v_tightest := v_state;
    end if;
  end loop;
  v_group_name := v_state.group_name;
  if v_state.group_id is distinct from p_verdict.group_id then
    v_group_name := (select g.name from public.user_groups as g where g.id = p_verdict.group_id);
  end if;
  if p_verdict.reason is null then
    return row_to_json(row(
      true, null, null,
      p_usage.id, p_usage.status, p_usage.expires_at,
      case when p_verdict.group_id is not null then row(p_verdict.group_id, v_group_name)::tokenlimits.group_answer end,
      p_kind, p_cost, v_limits, null, v_would_deny,
      -- greatest() ignores nulls, and unlimited is null
      case when v_tightest.max is not null then greatest((v_tightest.max - v_tightest.used - case
      when v_tightest.used > v_tightest.max then v_tightest.weight - 1
      else 0
    end) / v_tightest.weight, 0) end,
      nullif(coalesce(v_tightest.reset_at, v_tightest.until), 'infinity'), null, p_replayed
    )::tokenlimits.generation_answer);
  end if;
  v_state := p_verdict.denied_by;
  if p_verdict.reason = 'limit_exceeded' then
    v_denied_by := row(
      v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
      v_state.used,
      case when v_state.max is not null then greatest((v_state.max - v_state.used - case
        when v_state.used > v_state.max then v_state.weight - 1
        else 0
      end) / v_state.weight, 0) end,
      nullif(coalesce(v_state.reset_at, v_state.until), 'infinity'), v_state.weight,
      case when v_state.group_id <> p_verdict.group_id then
        row(v_state.group_id, v_state.group_name)::tokenlimits.group_answer
      end
    )::tokenlimits.limit_answer;
  end if;
  return row_to_json(row(
    p_verdict.reason is null, p_verdict.reason, tokenlimits.denial_text(p_verdict, p_kind, p_cost),
    null, null, null,
    case when p_verdict.group_id is not null then row(p_verdict.group_id, v_group_name)::tokenlimits.group_answer end,
    p_kind, p_cost, v_limits, v_denied_by, v_would_deny,
    -- greatest() ignores nulls, and unlimited is null
    case when v_tightest.max is not null then greatest((v_tightest.max - v_tightest.used - case
    when v_tightest.used > v_tightest.max then v_tightest.weight - 1
    else 0
  end) / v_tightest.weight, 0) end,
    nullif(v_state.until, 'infinity'), ceil(extract(epoch from nullif(v_state.until, 'infinity') - tokenlimits.clock())), p_replayed
  )::tokenlimits.generation_answer);
end
$$;

comment on function tokenlimits.answer(tokenlimits.verdict, text, bigint, public.generation_usage, boolean)
is 'tokenlimits: A verdict, with the usage that it has led to, as workers see it.';

revoke execute on function tokenlimits.answer(tokenlimits.verdict, text, bigint, public.generation_usage, boolean)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.usage_answer(
  p_usage public.generation_usage,
  p_at timestamptz,
  p_replayed boolean,
  p_observed bigint[] default null
)
returns json
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.allowed := true;
  v_verdict.group_id := p_usage.group_id;
  v_verdict.states := tokenlimits.limit_states(
    p_usage.group_id, array[p_usage.user_id], array[p_usage.kind], p_at,
    p_in_flight => p_usage.reserved_cost is not null
  );
  v_verdict.observed := p_observed;
  return tokenlimits.answer(v_verdict, p_usage.kind, p_usage.cost, p_usage, p_replayed);
end
$$;

comment on function tokenlimits.usage_answer(public.generation_usage, timestamptz, boolean, bigint[])
is 'tokenlimits: A usage of the ledger as workers see it, with its limits at a moment.';

revoke execute on function tokenlimits.usage_answer(public.generation_usage, timestamptz, boolean, bigint[])
from public, anon, authenticated, service_role;

-- 70_track.sql

-- One request: judged and recorded in one step (track, reserve, record), or only judged (check).
--
-- Invariants
--   * Either the ledger row, the rollup and every counter move, or nothing is written.
--   * Here, only record takes a counter past its limit's max, and no call is denied while there is room: a verdict is
--     carried out only if every counter still has room when it is moved. Otherwise everything is rolled back and judged
--     again.
--   * One live usage per user and idempotency key.

-- Metadata is measured in its stored form before it is written out: a number of ten bytes may have 131,072 digits,
-- before or after the point. Numbers beyond the range of JSON readers are refused, so the rest can't grow.
create or replace function tokenlimits.is_metadata(p_metadata jsonb)
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if jsonb_typeof(p_metadata) <> 'object' or pg_column_size(p_metadata) > 32768 then
    return false;
  elsif jsonb_path_exists(p_metadata, '$.** ? (@.type() == "number" && (@ > 1.8e308 || @ < -1.8e308))') then
    return false;
  elsif pg_column_size(p_metadata) > 1024 and exists (
    select
    from jsonb_path_query(p_metadata, '$.** ? (@.type() == "number")') as n (value)
    where scale(n.value::numeric) > 400
  ) then
    return false;
  end if;
  return octet_length(p_metadata::text) <= 8192;
end
$$;

comment on function tokenlimits.is_metadata(jsonb)
is 'tokenlimits: Whether this can be stored as a usage''s metadata.';

revoke execute on function tokenlimits.is_metadata(jsonb)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.refuse_request(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text
)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_field text;
  v_rule text;
begin
  if p_user_id is null then
    v_field := 'user_id';
    v_rule := 'is required';
  elsif (p_kind ~ '^[a-z][a-z0-9_]{0,31}$') is not true then
    v_field := 'kind';
    v_rule := 'must be 1 to 32 of a-z, 0-9 and _, and begin with a letter';
  elsif (p_cost between 1 and 1000000000) is not true then
    v_field := 'cost';
    v_rule := 'must be a whole number from 1 to 1000000000';
  elsif not (char_length(p_idempotency_key) between 1 and 255) then
    v_field := 'idempotency_key';
    v_rule := 'must have 1 to 255 characters';
  else
    -- the only field left
    v_field := 'metadata';
    v_rule := 'must be a JSON object of at most 8192 bytes, with numbers below 1.8e308';
  end if;
  perform tokenlimits.refuse('TL001', v_field || ': ' || v_rule, v_field, 'Nothing was recorded.');
end
$$;

comment on function tokenlimits.refuse_request(uuid, text, bigint, text)
is 'tokenlimits: Raises TL001 with the name of the invalid field of a request.';

revoke execute on function tokenlimits.refuse_request(uuid, text, bigint, text)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.refuse_key(p_idempotency_key text, p_usage_id uuid)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.refuse(
    'TL008',
    format('idempotency_key %L was used for another request of this user', p_idempotency_key),
    p_usage_id::text,
    'Use one key per job: the same operation, kind, cost and group every time.'
  );
end
$$;

comment on function tokenlimits.refuse_key(text, uuid)
is 'tokenlimits: Raises TL008: an idempotency key is bound to another request.';

revoke execute on function tokenlimits.refuse_key(text, uuid)
from public, anon, authenticated, service_role;

-- The live usage that a key is bound to. A caller that is about to write may take the key of a dead usage. A denial
-- must leave the key where it is, since a late commit makes an expired usage live again.
create or replace function tokenlimits.usage_under_key(
  p_user_id uuid,
  p_idempotency_key text,
  p_fingerprint uuid,
  out live public.generation_usage,
  out dead_id uuid
)
returns record
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  select * into live
  from public.generation_usage as u
  where u.idempotency_key = p_idempotency_key and u.user_id = p_user_id;
  if (live.status not in ('reserved', 'committed')
or (live.status = 'reserved' and live.expires_at <= tokenlimits.clock())) then
    dead_id := live.id;
    live := null;
  elsif live.fingerprint <> p_fingerprint then
    perform tokenlimits.refuse_key(p_idempotency_key, live.id);
  end if;
end
$$;

comment on function tokenlimits.usage_under_key(uuid, text, uuid)
is 'tokenlimits: The live usage that has a key, or the id of a dead one that has it; raises TL008 if it belongs to '
'another request.';

revoke execute on function tokenlimits.usage_under_key(uuid, text, uuid)
from public, anon, authenticated, service_role;

-- Past usage is recorded for any group that is named, since people leave groups; otherwise for the first of the user's
-- groups that has a limit for the kind, or else for their first group.
create or replace function tokenlimits.recording_group(p_user_id uuid, p_kind text, p_group_id uuid)
returns uuid[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_group_id is not null then
    return array(select g.id from public.user_groups as g where g.id = p_group_id);
  end if;
  return array(
    select g.id
    from unnest(coalesce(
      nullif(array(
        select g.id
        from public.group_memberships as m
        inner join public.user_groups as g on g.id = m.group_id
        where m.user_id = p_user_id
        order by g.priority desc, m.joined_at, g.id
      ), '{}'),
      array(select d.id from public.user_groups as d where d.is_default)
    )) with ordinality as g (id, place)
    order by
      exists (
        select
        from tokenlimits.group_tree as t
        inner join public.group_limits as l on l.group_id = t.above_id
        where
          t.group_id = g.id and (l.counts is null and l.kind = p_kind or l.counts ? p_kind) and (l.scope <> 'child' or t.child_id is not null)
          and l.period <> 'in_flight'
      ) desc,
      g.place
    limit 1
  );
end
$$;

comment on function tokenlimits.recording_group(uuid, text, uuid)
is 'tokenlimits: The group for which past usage is recorded, if there is one.';

revoke execute on function tokenlimits.recording_group(uuid, text, uuid)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.refuse_group(p_operation text, p_group_id uuid)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_group_id is not null then
    perform tokenlimits.require_group(p_group_id);
  elsif p_operation = 'record' then
    perform tokenlimits.refuse(
      'TL001',
      'group_id: is required, since the user is in no group',
      'group_id',
      'Name the group that this usage belongs to.'
    );
  end if;
end
$$;

comment on function tokenlimits.refuse_group(text, uuid)
is 'tokenlimits: Raises TL002 if the group does not exist, and TL001 if record needs one.';

revoke execute on function tokenlimits.refuse_group(text, uuid)
from public, anon, authenticated, service_role;

-- Judges and writes, until a verdict holds: in every round but the last, another call was faster and succeeded. Rare
-- steps are separate functions: an invalid request, a counter to open, expired holds, a key that is taken. The build
-- generates a function for each operation, since a test for the operation at every step would cost as much as the step.
-- Only record never denies.

create or replace function tokenlimits.track_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb
)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states tokenlimits.limit_state[];
  v_is_plain boolean;
  v_group_ids uuid[];
  v_group_id uuid;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_observed bigint[];
  v_at timestamptz;
  v_verdict tokenlimits.verdict;
  v_fingerprint uuid := md5(concat_ws(' ', 'track', p_kind, p_cost, p_group_id))::uuid;
  v_usage public.generation_usage;
  v_under_key record;
  v_dead_id uuid;
  v_slot integer;
  v_limits tokenlimits.limit_answer[] := '{}';
  v_would_deny tokenlimits.limit_answer[] := '{}';
  v_tightest tokenlimits.limit_state;
begin
  if (p_user_id is not null and p_kind ~ '^[a-z][a-z0-9_]{0,31}$' and p_cost between 1 and 1000000000
  and (p_idempotency_key is null or char_length(p_idempotency_key) between 1 and 255)
  and (p_metadata is null or tokenlimits.is_metadata(p_metadata))) is not true then
    perform tokenlimits.refuse_request(p_user_id, p_kind, p_cost, p_idempotency_key);
  elsif current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  v_group_ids := array(select m.group_id from public.group_memberships as m where m.user_id = p_user_id);
  if cardinality(v_group_ids) <> 1 then
    v_group_ids := coalesce(
      nullif(array(
        select g.id
        from public.group_memberships as m
        inner join public.user_groups as g on g.id = m.group_id
        where m.user_id = p_user_id
        order by g.priority desc, m.joined_at, g.id
      ), '{}'),
      array(select d.id from public.user_groups as d where d.is_default)
    );
  end if;
  if p_group_id is not null then
    v_group_ids := case
      when p_group_id is null then v_group_ids
      when p_group_id = any(v_group_ids) then array[p_group_id]
      else '{}'
    end;
  elsif cardinality(v_group_ids) > 1 then
    v_group_ids := tokenlimits.entitling(v_group_ids, p_kind);
  end if;
  -- nearly every call has a single group: the condition itself locks it, at a tenth of the cost of a query
  if
    cardinality(v_group_ids) <> 1
    or pg_advisory_xact_lock_shared(1953459052, get_byte(uuid_send(v_group_ids[1]), 15)) is null
  then
    perform tokenlimits.lock_groups(v_group_ids);
  end if;
  loop
    -- never before the moment that an earlier round reached, or a clock that was set back would loop for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    v_verdict := row(
      false, case when v_group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null, null
    );
    foreach v_group_id in array v_group_ids loop
      select
        array_agg(
          row(
            l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
            'enforce',
            case when c.overridden_until > v_at then c.override_max else l.max end,
            null, 1,
            c.since, c.until, null, c.used, null, c.until > v_at, l.name, l.timezone, l.max, c.overridden_until,
            null, l.is_spread
          )::tokenlimits.limit_state
          order by l.scope = 'group', l.counter_id
        ),
        bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= v_at and c.until > v_at)
        and not (
          select true
          from tokenlimits.holds as h
          where
            h.group_id = v_group_id
            and h.kind = p_kind and h.expires_at <= v_at
          order by h.expires_at
          limit 1
        ) is true
      into v_states, v_is_plain
      from (
        select
          i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
          g.is_nested, g.is_spread,
          case i.scope when 'group' then i.group_id else p_user_id end as subject
        from public.group_limits as i
        inner join public.user_groups as g on g.id = i.group_id
        where
          i.group_id = v_group_id and (i.counts is null and i.kind = p_kind or i.counts ? p_kind)
          and i.period <> 'in_flight'
      ) as l
      left join lateral (
        select k.since, k.until, k.used, k.override_max, k.overridden_until
        from tokenlimits.counters as k
        where k.subject = l.subject and k.counter_id = l.counter_id
        -- one look-up per limit, whatever size the planner assumes for an array
        offset 0
      ) as c on true;
      if v_is_plain is not true then
        v_states := tokenlimits.limit_states(
          v_group_id, array[p_user_id], array[p_kind], v_at, p_in_flight => false
        );
        continue when cardinality(v_states) = 0;
      end if;
      v_full := null;
      v_observed := null;
      foreach v_state in array v_states loop
        if v_state.since > v_at then
          -- the clock was set back behind the counter's period; the usage then belongs to that period
          v_at := v_state.since;
        end if;
        if not (v_state.max is null or v_state.used + p_cost * v_state.weight <= v_state.max) then
          if v_state.mode = 'observe' then
            v_observed := v_observed || v_state.counter_id;
          else
            v_state.reset_at := null;
            if v_state.starts = 'rolling' or v_state.overridden_until > v_at then
              v_state.until := tokenlimits.room_at(v_state, p_cost * v_state.weight);
            elsif p_cost * v_state.weight > v_state.max then
              -- a cost that can never fit waits for ever, as under a full lifetime limit
              v_state.until := 'infinity';
            end if;
            if v_full is null or v_state.until > v_full.until then
              v_full := v_state;
            end if;
          end if;
        end if;
      end loop;
      if v_full is null then
        v_verdict := row(true, null, v_group_id, null, null, v_observed);
      elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
        v_verdict := row(false, 'limit_exceeded', v_group_id, v_states, v_full, v_observed);
      end if;
      exit when v_verdict.allowed;
    end loop;
    if v_verdict.allowed then
      v_usage := row(
        (
        lpad(to_hex((date_part('epoch', date_trunc('milliseconds', v_at)) * 1000)::bigint), 12, '0')
        || '7' || substr(gen_random_uuid()::text, 16, 17) || right(case when v_state.is_spread then p_user_id else v_verdict.group_id end::text, 4)
      )::uuid,
        v_verdict.group_id, p_user_id, p_kind, p_cost, null, 'committed',
        p_idempotency_key, v_fingerprint, coalesce(p_metadata, '{}'),
        v_at, v_at, null
      );
      begin
        if v_is_plain and v_dead_id is null then
          insert into public.generation_usage (
            id, group_id, user_id, kind, cost, reserved_cost, status,
            idempotency_key, fingerprint, metadata, created_at, settled_at, expires_at
          )
          select
            v_usage.id, v_usage.group_id, v_usage.user_id, v_usage.kind, v_usage.cost,
            v_usage.reserved_cost, v_usage.status, v_usage.idempotency_key, v_usage.fingerprint,
            v_usage.metadata, v_usage.created_at, v_usage.settled_at, v_usage.expires_at
          on conflict on constraint generation_usage_key_key do nothing;
          if found then
            v_slot := pg_backend_pid() % 16;
            if not pg_try_advisory_xact_lock(1936486260, get_byte(uuid_send(v_usage.group_id), 15) * 16 + v_slot) then
              v_slot := tokenlimits.free_slot(v_usage.group_id);
            end if;
            update tokenlimits.usage_rollup as r
            set cost = r.cost + v_usage.cost, generations = r.generations + 1
            where
              r.group_id = v_usage.group_id and r.kind = v_usage.kind
              and r.bucket = date_bin('15 minutes', v_usage.created_at, '2000-01-01 00:00:00+00') and r.slot = v_slot;
            if not found then
              insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
              select v_usage.group_id, v_usage.kind, date_bin('15 minutes', v_usage.created_at, '2000-01-01 00:00:00+00'), v_slot, v_usage.cost, 1
              on conflict on constraint usage_rollup_pkey do update
              set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;
            end if;
            -- the group's own counters, which all its members share, come last, so that they are locked for the
            -- shortest time
            foreach v_state in array v_states loop
              update tokenlimits.counters as c
              set used = c.used + p_cost
              where
                c.subject = v_state.subject
                and c.counter_id = v_state.counter_id
                and v_at >= c.since
                and v_at < c.until
                and (false or (v_state.max is null or c.used + p_cost <= v_state.max))
              returning c.used into v_state.used;
              if not found then
                raise sqlstate 'TL099';
              end if;
              v_limits := v_limits || row(
                v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
                v_state.used,
                case when v_state.max is not null then greatest(v_state.max - v_state.used, 0) end,
                nullif(v_state.until, 'infinity'), 1, null
              )::tokenlimits.limit_answer;
              if v_state.max - v_state.used < v_tightest.max - v_tightest.used
                or (v_tightest.max is null and v_state.max is not null)
              then
                v_tightest := v_state;
              end if;
            end loop;
            return row_to_json(row(
              true, null, null,
              v_usage.id, v_usage.status, v_usage.expires_at,
              case when v_usage.group_id is not null then row(v_usage.group_id, v_state.group_name)::tokenlimits.group_answer end,
              p_kind, p_cost, v_limits, null, v_would_deny,
              -- greatest() ignores nulls, and unlimited is null
              case when v_tightest.max is not null then greatest(v_tightest.max - v_tightest.used, 0) end,
              nullif(v_tightest.until, 'infinity'), null, false
            )::tokenlimits.generation_answer);
          end if;
          -- the key is taken; by which usage is looked up below
        else
          perform tokenlimits.move_usage(
            tokenlimits.write_ledger(
              array[v_usage], array[v_dead_id], true,
              array[v_usage.group_id], array[p_kind], v_at
            ),
            v_at
          );
          -- as of now: others may have reached a later moment already, and have taken the room of what expired by then
          return tokenlimits.usage_answer(
            v_usage, greatest(v_at, tokenlimits.clock()), p_replayed => false, p_observed => v_verdict.observed
          );
        end if;
      exception
        when sqlstate 'TL099' then
          -- everything is rolled back, to be judged again
          v_limits := '{}';
          v_tightest := null;
      end;
    end if;
    if p_idempotency_key is not null then
      v_under_key := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_fingerprint);
      if (v_under_key.live).id is not null then
        return tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
      end if;
      v_dead_id := v_under_key.dead_id;
    end if;
    if not v_verdict.allowed then
      if v_verdict.reason = 'not_in_group' then
        -- not earlier: a repeated call is answered even if its group was deleted
        perform tokenlimits.refuse_group('track', p_group_id);
      elsif v_verdict.states[1].expired is not null then
        perform tokenlimits.sweep(v_verdict.group_id, p_kind, v_at);
      end if;
      return tokenlimits.answer(v_verdict, p_kind, p_cost, null, p_replayed => false);
    end if;
  end loop;
end
$$;

create or replace function public.track_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_idempotency_key text default null,
  p_group_id uuid default null,
  p_metadata jsonb default null
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.track_generation(
    p_user_id,
    p_kind,
    p_cost,
    p_idempotency_key,
    p_group_id,
    case jsonb_typeof(p_metadata) when 'string' then (p_metadata #>> '{}')::jsonb else p_metadata end
  );
end
$$;

comment on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
is 'tokenlimits: Checks every limit and records the generation, in one step: whether it is allowed, what remains, when '
'it resets.';

revoke execute on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
to service_role;

comment on function tokenlimits.track_generation(uuid, text, bigint, text, uuid, jsonb)
is 'tokenlimits: The private half of public.track_generation.';

revoke execute on function tokenlimits.track_generation(uuid, text, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.track_generation(uuid, text, bigint, text, uuid, jsonb)
to service_role;

create or replace function tokenlimits.reserve_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_ttl bigint,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb
)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states tokenlimits.limit_state[];
  v_is_plain boolean;
  v_group_ids uuid[];
  v_group_id uuid;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_observed bigint[];
  v_at timestamptz;
  v_verdict tokenlimits.verdict;
  v_fingerprint uuid := md5(concat_ws(' ', 'reserve', p_kind, p_cost, p_group_id))::uuid;
  v_usage public.generation_usage;
  v_under_key record;
  v_dead_id uuid;
  v_slot integer;
  v_limits tokenlimits.limit_answer[] := '{}';
  v_would_deny tokenlimits.limit_answer[] := '{}';
  v_tightest tokenlimits.limit_state;
begin
  if (p_user_id is not null and p_kind ~ '^[a-z][a-z0-9_]{0,31}$' and p_cost between 1 and 1000000000
  and (p_idempotency_key is null or char_length(p_idempotency_key) between 1 and 255)
  and (p_metadata is null or tokenlimits.is_metadata(p_metadata))) is not true then
    perform tokenlimits.refuse_request(p_user_id, p_kind, p_cost, p_idempotency_key);
  elsif (p_ttl between 1 and 2592000) is not true then
    perform tokenlimits.refuse('TL001', 'ttl: must be from 1 second to 30 days, in seconds', 'ttl', 'Nothing was reserved.');
  elsif current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  v_group_ids := array(select m.group_id from public.group_memberships as m where m.user_id = p_user_id);
  if cardinality(v_group_ids) <> 1 then
    v_group_ids := coalesce(
      nullif(array(
        select g.id
        from public.group_memberships as m
        inner join public.user_groups as g on g.id = m.group_id
        where m.user_id = p_user_id
        order by g.priority desc, m.joined_at, g.id
      ), '{}'),
      array(select d.id from public.user_groups as d where d.is_default)
    );
  end if;
  if p_group_id is not null then
    v_group_ids := case
      when p_group_id is null then v_group_ids
      when p_group_id = any(v_group_ids) then array[p_group_id]
      else '{}'
    end;
  elsif cardinality(v_group_ids) > 1 then
    v_group_ids := tokenlimits.entitling(v_group_ids, p_kind);
  end if;
  -- nearly every call has a single group: the condition itself locks it, at a tenth of the cost of a query
  if
    cardinality(v_group_ids) <> 1
    or pg_advisory_xact_lock_shared(1953459052, get_byte(uuid_send(v_group_ids[1]), 15)) is null
  then
    perform tokenlimits.lock_groups(v_group_ids);
  end if;
  loop
    -- never before the moment that an earlier round reached, or a clock that was set back would loop for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    v_verdict := row(
      false, case when v_group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null, null
    );
    foreach v_group_id in array v_group_ids loop
      select
        array_agg(
          row(
            l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
            'enforce',
            case when c.overridden_until > v_at then c.override_max else l.max end,
            null, 1,
            c.since, c.until, null, c.used, null, c.until > v_at, l.name, l.timezone, l.max, c.overridden_until,
            null, l.is_spread
          )::tokenlimits.limit_state
          order by l.scope = 'group', l.counter_id
        ),
        bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= v_at and c.until > v_at)
        and not (
          select true
          from tokenlimits.holds as h
          where
            h.group_id = v_group_id
            and h.kind = p_kind and h.expires_at <= v_at
          order by h.expires_at
          limit 1
        ) is true
      into v_states, v_is_plain
      from (
        select
          i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
          g.is_nested, g.is_spread,
          case i.scope when 'group' then i.group_id else p_user_id end as subject
        from public.group_limits as i
        inner join public.user_groups as g on g.id = i.group_id
        where
          i.group_id = v_group_id and (i.counts is null and i.kind = p_kind or i.counts ? p_kind)
      ) as l
      left join lateral (
        select k.since, k.until, k.used, k.override_max, k.overridden_until
        from tokenlimits.counters as k
        where k.subject = l.subject and k.counter_id = l.counter_id
        -- one look-up per limit, whatever size the planner assumes for an array
        offset 0
      ) as c on true;
      if v_is_plain is not true then
        v_states := tokenlimits.limit_states(
          v_group_id, array[p_user_id], array[p_kind], v_at, p_in_flight => true
        );
        continue when cardinality(v_states) = 0;
      end if;
      v_full := null;
      v_observed := null;
      foreach v_state in array v_states loop
        if v_state.since > v_at then
          -- the clock was set back behind the counter's period; the usage then belongs to that period
          v_at := v_state.since;
        end if;
        if not (v_state.max is null or v_state.used + (case when v_state.period = 'in_flight' then 1 else p_cost * v_state.weight end) <= v_state.max) then
          if v_state.mode = 'observe' then
            v_observed := v_observed || v_state.counter_id;
          else
            v_state.reset_at := null;
            if v_state.starts = 'rolling' or v_state.period = 'in_flight' or v_state.overridden_until > v_at then
              v_state.until := tokenlimits.room_at(v_state, (case when v_state.period = 'in_flight' then 1 else p_cost * v_state.weight end));
            elsif (case when v_state.period = 'in_flight' then 1 else p_cost * v_state.weight end) > v_state.max then
              -- a cost that can never fit waits for ever, as under a full lifetime limit
              v_state.until := 'infinity';
            end if;
            if v_full is null or v_state.until > v_full.until then
              v_full := v_state;
            end if;
          end if;
        end if;
      end loop;
      if v_full is null then
        v_verdict := row(true, null, v_group_id, null, null, v_observed);
      elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
        v_verdict := row(false, 'limit_exceeded', v_group_id, v_states, v_full, v_observed);
      end if;
      exit when v_verdict.allowed;
    end loop;
    if v_verdict.allowed then
      v_usage := row(
        (
        lpad(to_hex((date_part('epoch', date_trunc('milliseconds', v_at)) * 1000)::bigint), 12, '0')
        || '7' || substr(gen_random_uuid()::text, 16, 17) || right(case when v_state.is_spread then p_user_id else v_verdict.group_id end::text, 4)
      )::uuid,
        v_verdict.group_id, p_user_id, p_kind, p_cost, p_cost, 'reserved',
        p_idempotency_key, v_fingerprint, coalesce(p_metadata, '{}'),
        v_at, null, v_at + make_interval(secs => p_ttl)
      );
      begin
        if v_is_plain and v_dead_id is null then
          insert into public.generation_usage (
            id, group_id, user_id, kind, cost, reserved_cost, status,
            idempotency_key, fingerprint, metadata, created_at, settled_at, expires_at
          )
          select
            v_usage.id, v_usage.group_id, v_usage.user_id, v_usage.kind, v_usage.cost,
            v_usage.reserved_cost, v_usage.status, v_usage.idempotency_key, v_usage.fingerprint,
            v_usage.metadata, v_usage.created_at, v_usage.settled_at, v_usage.expires_at
          on conflict on constraint generation_usage_key_key do nothing;
          if found then
            insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
            select
              v_usage.id, v_usage.group_id, v_usage.group_id, v_usage.user_id, v_usage.kind, v_usage.cost,
              v_usage.created_at, v_usage.expires_at;
            v_slot := pg_backend_pid() % 16;
            if not pg_try_advisory_xact_lock(1936486260, get_byte(uuid_send(v_usage.group_id), 15) * 16 + v_slot) then
              v_slot := tokenlimits.free_slot(v_usage.group_id);
            end if;
            update tokenlimits.usage_rollup as r
            set cost = r.cost + v_usage.cost, generations = r.generations + 1
            where
              r.group_id = v_usage.group_id and r.kind = v_usage.kind
              and r.bucket = date_bin('15 minutes', v_usage.created_at, '2000-01-01 00:00:00+00') and r.slot = v_slot;
            if not found then
              insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
              select v_usage.group_id, v_usage.kind, date_bin('15 minutes', v_usage.created_at, '2000-01-01 00:00:00+00'), v_slot, v_usage.cost, 1
              on conflict on constraint usage_rollup_pkey do update
              set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;
            end if;
            -- the group's own counters, which all its members share, come last, so that they are locked for the
            -- shortest time
            foreach v_state in array v_states loop
              update tokenlimits.counters as c
              set used = c.used + p_cost
              where
                c.subject = v_state.subject
                and c.counter_id = v_state.counter_id
                and v_at >= c.since
                and v_at < c.until
                and (false or (v_state.max is null or c.used + p_cost <= v_state.max))
              returning c.used into v_state.used;
              if not found then
                raise sqlstate 'TL099';
              end if;
              v_limits := v_limits || row(
                v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
                v_state.used,
                case when v_state.max is not null then greatest(v_state.max - v_state.used, 0) end,
                nullif(v_state.until, 'infinity'), 1, null
              )::tokenlimits.limit_answer;
              if v_state.max - v_state.used < v_tightest.max - v_tightest.used
                or (v_tightest.max is null and v_state.max is not null)
              then
                v_tightest := v_state;
              end if;
            end loop;
            return row_to_json(row(
              true, null, null,
              v_usage.id, v_usage.status, v_usage.expires_at,
              case when v_usage.group_id is not null then row(v_usage.group_id, v_state.group_name)::tokenlimits.group_answer end,
              p_kind, p_cost, v_limits, null, v_would_deny,
              -- greatest() ignores nulls, and unlimited is null
              case when v_tightest.max is not null then greatest(v_tightest.max - v_tightest.used, 0) end,
              nullif(v_tightest.until, 'infinity'), null, false
            )::tokenlimits.generation_answer);
          end if;
          -- the key is taken; by which usage is looked up below
        else
          perform tokenlimits.move_usage(
            tokenlimits.write_ledger(
              array[v_usage], array[v_dead_id], true,
              array[v_usage.group_id], array[p_kind], v_at
            ),
            v_at
          );
          -- as of now: others may have reached a later moment already, and have taken the room of what expired by then
          return tokenlimits.usage_answer(
            v_usage, greatest(v_at, tokenlimits.clock()), p_replayed => false, p_observed => v_verdict.observed
          );
        end if;
      exception
        when sqlstate 'TL099' then
          -- everything is rolled back, to be judged again
          v_limits := '{}';
          v_tightest := null;
      end;
    end if;
    if p_idempotency_key is not null then
      v_under_key := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_fingerprint);
      if (v_under_key.live).id is not null then
        return tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
      end if;
      v_dead_id := v_under_key.dead_id;
    end if;
    if not v_verdict.allowed then
      if v_verdict.reason = 'not_in_group' then
        -- not earlier: a repeated call is answered even if its group was deleted
        perform tokenlimits.refuse_group('reserve', p_group_id);
      elsif v_verdict.states[1].expired is not null then
        perform tokenlimits.sweep(v_verdict.group_id, p_kind, v_at);
      end if;
      return tokenlimits.answer(v_verdict, p_kind, p_cost, null, p_replayed => false);
    end if;
  end loop;
end
$$;

create or replace function public.reserve_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_ttl bigint default 3600,
  p_idempotency_key text default null,
  p_group_id uuid default null,
  p_metadata jsonb default null
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.reserve_generation(
    p_user_id,
    p_kind,
    p_cost,
    p_ttl,
    p_idempotency_key,
    p_group_id,
    case jsonb_typeof(p_metadata) when 'string' then (p_metadata #>> '{}')::jsonb else p_metadata end
  );
end
$$;

comment on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
is 'tokenlimits: Holds a generation''s cost for p_ttl seconds, or until it is committed or released; answers like '
'track_generation.';

revoke execute on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function public.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
to service_role;

comment on function tokenlimits.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
is 'tokenlimits: The private half of public.reserve_generation.';

revoke execute on function tokenlimits.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.reserve_generation(uuid, text, bigint, bigint, text, uuid, jsonb)
to service_role;

create or replace function tokenlimits.record_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_created_at timestamptz,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb
)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states tokenlimits.limit_state[];
  v_is_plain boolean;
  v_group_ids uuid[];
  v_group_id uuid;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_observed bigint[];
  v_at timestamptz;
  v_verdict tokenlimits.verdict;
  v_fingerprint uuid := md5(concat_ws(' ', 'record', p_kind, p_cost, p_group_id))::uuid;
  v_usage public.generation_usage;
  v_under_key record;
  v_dead_id uuid;
begin
  if (p_user_id is not null and p_kind ~ '^[a-z][a-z0-9_]{0,31}$' and p_cost between 1 and 1000000000
  and (p_idempotency_key is null or char_length(p_idempotency_key) between 1 and 255)
  and (p_metadata is null or tokenlimits.is_metadata(p_metadata))) is not true then
    perform tokenlimits.refuse_request(p_user_id, p_kind, p_cost, p_idempotency_key);
  elsif p_created_at > tokenlimits.clock() + interval '1 minute' then
    -- clocks may differ by a minute
    perform tokenlimits.refuse('TL001', 'created_at: must not be in the future', 'created_at', 'Nothing was recorded.');
  elsif not (p_created_at >= '1970-01-01 00:00:00+00' and p_created_at < '9999-01-01 00:00:00+00') then
    perform tokenlimits.refuse('TL001', 'created_at: must not be before 1970', 'created_at', 'Nothing was recorded.');
  elsif current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  v_group_ids := tokenlimits.recording_group(p_user_id, p_kind, p_group_id);
  -- nearly every call has a single group: the condition itself locks it, at a tenth of the cost of a query
  if
    cardinality(v_group_ids) <> 1
    or pg_advisory_xact_lock_shared(1953459052, get_byte(uuid_send(v_group_ids[1]), 15)) is null
  then
    perform tokenlimits.lock_groups(v_group_ids);
  end if;
  loop
    -- never before the moment that an earlier round reached, or a clock that was set back would loop for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    v_verdict := row(
      false, case when v_group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null, null
    );
    foreach v_group_id in array v_group_ids loop
      select
        array_agg(
          row(
            l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
            'enforce',
            case when c.overridden_until > v_at then c.override_max else l.max end,
            null, 1,
            c.since, c.until, null, c.used, null, c.until > v_at, l.name, l.timezone, l.max, c.overridden_until,
            null, l.is_spread
          )::tokenlimits.limit_state
          order by l.scope = 'group', l.counter_id
        ),
        bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= v_at and c.until > v_at)
        and not (
          select true
          from tokenlimits.holds as h
          where
            h.group_id = v_group_id
            and h.kind = p_kind and h.expires_at <= v_at
          order by h.expires_at
          limit 1
        ) is true
      into v_states, v_is_plain
      from (
        select
          i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
          g.is_nested, g.is_spread,
          case i.scope when 'group' then i.group_id else p_user_id end as subject
        from public.group_limits as i
        inner join public.user_groups as g on g.id = i.group_id
        where
          i.group_id = v_group_id and (i.counts is null and i.kind = p_kind or i.counts ? p_kind)
          and i.period <> 'in_flight'
      ) as l
      left join lateral (
        select k.since, k.until, k.used, k.override_max, k.overridden_until
        from tokenlimits.counters as k
        where k.subject = l.subject and k.counter_id = l.counter_id
        -- one look-up per limit, whatever size the planner assumes for an array
        offset 0
      ) as c on true;
      if v_is_plain is not true then
        v_states := tokenlimits.limit_states(
          v_group_id, array[p_user_id], array[p_kind], v_at, p_in_flight => false
        );
        continue when cardinality(v_states) = 0;
      end if;
      v_full := null;
      v_observed := null;
      foreach v_state in array v_states loop
        if v_state.since > v_at then
          -- the clock was set back behind the counter's period; the usage then belongs to that period
          v_at := v_state.since;
        end if;
        if not (v_state.max is null or v_state.used + p_cost * v_state.weight <= v_state.max) then
          if v_state.mode = 'observe' then
            v_observed := v_observed || v_state.counter_id;
          else
            v_state.reset_at := null;
            if v_state.starts = 'rolling' or v_state.overridden_until > v_at then
              v_state.until := tokenlimits.room_at(v_state, p_cost * v_state.weight);
            elsif p_cost * v_state.weight > v_state.max then
              -- a cost that can never fit waits for ever, as under a full lifetime limit
              v_state.until := 'infinity';
            end if;
            if v_full is null or v_state.until > v_full.until then
              v_full := v_state;
            end if;
          end if;
        end if;
      end loop;
      if v_full is null then
        v_verdict := row(true, null, v_group_id, null, null, v_observed);
      elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
        v_verdict := row(false, 'limit_exceeded', v_group_id, v_states, v_full, v_observed);
      end if;
      exit when v_verdict.allowed;
    end loop;
    -- judged only to find the moment that its counters have reached; record is never denied
    v_verdict.allowed := v_group_ids <> '{}';
    v_verdict.group_id := v_group_ids[1];
    v_verdict.observed := null;
    v_state.is_spread := (select g.is_spread from public.user_groups as g where g.id = v_group_ids[1]);
    if v_verdict.allowed then
      v_usage := row(
        (
        lpad(to_hex((date_part('epoch', date_trunc('milliseconds', coalesce(least(p_created_at, v_at), v_at))) * 1000)::bigint), 12, '0')
        || '7' || substr(gen_random_uuid()::text, 16, 17) || right(case when v_state.is_spread then p_user_id else v_verdict.group_id end::text, 4)
      )::uuid,
        v_verdict.group_id, p_user_id, p_kind, p_cost, null, 'committed',
        p_idempotency_key, v_fingerprint, coalesce(p_metadata, '{}'),
        coalesce(least(p_created_at, v_at), v_at), v_at, null
      );
      begin
        perform tokenlimits.move_usage(
          tokenlimits.write_ledger(
            array[v_usage], array[v_dead_id], false,
            array[v_usage.group_id], array[p_kind], v_at
          ),
          v_at
        );
        -- as of now: others may have reached a later moment already, and have taken the room of what expired by then
        return tokenlimits.usage_answer(
          v_usage, greatest(v_at, tokenlimits.clock()), p_replayed => false, p_observed => v_verdict.observed
        );
      exception
        when sqlstate 'TL099' then
          -- everything is rolled back, to be judged again
          null;
      end;
    end if;
    if p_idempotency_key is not null then
      v_under_key := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_fingerprint);
      if (v_under_key.live).id is not null then
        return tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
      end if;
      v_dead_id := v_under_key.dead_id;
    end if;
    if not v_verdict.allowed then
      if v_verdict.reason = 'not_in_group' then
        -- not earlier: a repeated call is answered even if its group was deleted
        perform tokenlimits.refuse_group('record', p_group_id);
      end if;
      return tokenlimits.answer(v_verdict, p_kind, p_cost, null, p_replayed => false);
    end if;
  end loop;
end
$$;

create or replace function public.record_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_created_at timestamptz default null,
  p_idempotency_key text default null,
  p_group_id uuid default null,
  p_metadata jsonb default null
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.record_generation(
    p_user_id,
    p_kind,
    p_cost,
    p_created_at,
    p_idempotency_key,
    p_group_id,
    case jsonb_typeof(p_metadata) when 'string' then (p_metadata #>> '{}')::jsonb else p_metadata end
  );
end
$$;

comment on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
is 'tokenlimits: Records past usage, or usage from elsewhere: moves the counters of its period and never denies.';

revoke execute on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
to service_role;

comment on function tokenlimits.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
is 'tokenlimits: The private half of public.record_generation.';

revoke execute on function tokenlimits.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
to service_role;

create or replace function tokenlimits.check_generation(p_user_id uuid, p_kind text, p_cost bigint, p_group_id uuid)
returns json
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states tokenlimits.limit_state[];
  v_is_plain boolean;
  v_group_ids uuid[];
  v_group_id uuid;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_observed bigint[];
  v_at timestamptz;
  v_verdict tokenlimits.verdict;
begin
  if (p_user_id is not null and p_kind ~ '^[a-z][a-z0-9_]{0,31}$' and p_cost between 1 and 1000000000
  and (null is null or char_length(null) between 1 and 255)
  and (null::jsonb is null or tokenlimits.is_metadata(null::jsonb))) is not true then
    perform tokenlimits.refuse_request(p_user_id, p_kind, p_cost, null);
  elsif current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  v_at := tokenlimits.clock();
  v_group_ids := array(select m.group_id from public.group_memberships as m where m.user_id = p_user_id);
  if cardinality(v_group_ids) <> 1 then
    v_group_ids := coalesce(
      nullif(array(
        select g.id
        from public.group_memberships as m
        inner join public.user_groups as g on g.id = m.group_id
        where m.user_id = p_user_id
        order by g.priority desc, m.joined_at, g.id
      ), '{}'),
      array(select d.id from public.user_groups as d where d.is_default)
    );
  end if;
  if p_group_id is not null then
    v_group_ids := case
      when p_group_id is null then v_group_ids
      when p_group_id = any(v_group_ids) then array[p_group_id]
      else '{}'
    end;
  elsif cardinality(v_group_ids) > 1 then
    v_group_ids := tokenlimits.entitling(v_group_ids, p_kind);
  end if;
  v_verdict := row(
    false, case when v_group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null, null
  );
  foreach v_group_id in array v_group_ids loop
    select
      array_agg(
        row(
          l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
          'enforce',
          case when c.overridden_until > v_at then c.override_max else l.max end,
          null, 1,
          c.since, c.until, null, c.used, null, c.until > v_at, l.name, l.timezone, l.max, c.overridden_until,
          null, l.is_spread
        )::tokenlimits.limit_state
        order by l.scope = 'group', l.counter_id
      ),
      bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= v_at and c.until > v_at)
      and not (
        select true
        from tokenlimits.holds as h
        where
          h.group_id = v_group_id
          and h.kind = p_kind and h.expires_at <= v_at
        order by h.expires_at
        limit 1
      ) is true
    into v_states, v_is_plain
    from (
      select
        i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
        g.is_nested, g.is_spread,
        case i.scope when 'group' then i.group_id else p_user_id end as subject
      from public.group_limits as i
      inner join public.user_groups as g on g.id = i.group_id
      where
        i.group_id = v_group_id and (i.counts is null and i.kind = p_kind or i.counts ? p_kind)
        and i.period <> 'in_flight'
    ) as l
    left join lateral (
      select k.since, k.until, k.used, k.override_max, k.overridden_until
      from tokenlimits.counters as k
      where k.subject = l.subject and k.counter_id = l.counter_id
      -- one look-up per limit, whatever size the planner assumes for an array
      offset 0
    ) as c on true;
    if v_is_plain is not true then
      v_states := tokenlimits.limit_states(
        v_group_id, array[p_user_id], array[p_kind], v_at, p_in_flight => false
      );
      continue when cardinality(v_states) = 0;
    end if;
    v_full := null;
    v_observed := null;
    foreach v_state in array v_states loop
      if v_state.since > v_at then
        -- the clock was set back behind the counter's period; the usage then belongs to that period
        v_at := v_state.since;
      end if;
      if not (v_state.max is null or v_state.used + p_cost * v_state.weight <= v_state.max) then
        if v_state.mode = 'observe' then
          v_observed := v_observed || v_state.counter_id;
        else
          v_state.reset_at := null;
          if v_state.starts = 'rolling' or v_state.overridden_until > v_at then
            v_state.until := tokenlimits.room_at(v_state, p_cost * v_state.weight);
          elsif p_cost * v_state.weight > v_state.max then
            -- a cost that can never fit waits for ever, as under a full lifetime limit
            v_state.until := 'infinity';
          end if;
          if v_full is null or v_state.until > v_full.until then
            v_full := v_state;
          end if;
        end if;
      end if;
    end loop;
    if v_full is null then
      v_verdict := row(true, null, v_group_id, null, null, v_observed);
    elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
      v_verdict := row(false, 'limit_exceeded', v_group_id, v_states, v_full, v_observed);
    end if;
    exit when v_verdict.allowed;
  end loop;
  if v_verdict.reason = 'not_in_group' then
    perform tokenlimits.refuse_group('check', p_group_id);
  elsif v_verdict.allowed then
    v_verdict.states := v_states;
  end if;
  return tokenlimits.answer(v_verdict, p_kind, p_cost, null, p_replayed => false);
end
$$;

create or replace function public.check_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_group_id uuid default null
)
returns json
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.check_generation(
    p_user_id,
    p_kind,
    p_cost,
    p_group_id
  );
end
$$;

comment on function public.check_generation(uuid, text, bigint, uuid)
is 'tokenlimits: Returns what track_generation would answer now; records nothing.';

revoke execute on function public.check_generation(uuid, text, bigint, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.check_generation(uuid, text, bigint, uuid)
to service_role;

comment on function tokenlimits.check_generation(uuid, text, bigint, uuid)
is 'tokenlimits: The private half of public.check_generation.';

revoke execute on function tokenlimits.check_generation(uuid, text, bigint, uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.check_generation(uuid, text, bigint, uuid)
to service_role;

-- 72_moves.sql

-- Many moves at once: usages that are written, expired holds that are swept, and the changes of a settlement.
--
-- Invariants
--   * The ledger is written first, so a counter that is counted afterwards already includes the moves to come.
--   * A sweep takes a bounded number of holds, and waits for none of them. Readers keep subtracting the rest.
--   * No call is denied because of unswept holds: a counter that looks full is locked, and judged again without what
--     has expired.

-- The room that a counter has without expired holds. Once it is locked, nobody else moves it. So it still contains
-- every unswept hold that had expired by then; a call that settles such a hold waits for the lock, or came before it.
create or replace function tokenlimits.squeeze(
  p_state tokenlimits.limit_state,
  p_cost bigint,
  p_last timestamptz,
  p_at timestamptz
)
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_expired bigint;
begin
  perform
  from tokenlimits.counters as c
  where c.subject = p_state.subject and c.counter_id = p_state.counter_id
  for no key update;
  -- read only now, under the lock: each statement has a new snapshot, so this sees what others committed meanwhile
  v_expired := tokenlimits.expired_of_limit(
    array(select t.group_id from tokenlimits.group_tree as t where t.above_id = case p_state.scope when 'child' then p_state.subject else p_state.group_id end),
    case p_state.scope when 'member' then p_state.subject end, p_state.kind, p_state.period,
    p_state.counts, p_state.since, least(p_at, tokenlimits.clock())
  );
  update tokenlimits.counters as c
  set used = c.used + p_cost
  where
    c.subject = p_state.subject
    and c.counter_id = p_state.counter_id
    and p_last >= c.since
    and p_last < c.until
    and (false or (p_state.max is null or c.used - v_expired + p_cost <= p_state.max))
  returning c.used into p_state.used;
  if not found then
    raise sqlstate 'TL099';
  end if;
  return p_state.used;
end
$$;

comment on function tokenlimits.squeeze(tokenlimits.limit_state, bigint, timestamptz, timestamptz)
is 'tokenlimits: Moves a counter that looks full, if expired holds leave enough room; otherwise raises TL099.';

revoke execute on function tokenlimits.squeeze(tokenlimits.limit_state, bigint, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.move_usage(
  p_moves tokenlimits.usage_move[],
  p_at timestamptz,
  p_judges bigint[] default null
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ways tokenlimits.group_tree[];
  v_move record;
  v_is_counted boolean;
  v_moving uuid;
  v_states tokenlimits.limit_state[];
  v_state tokenlimits.limit_state;
  v_moved tokenlimits.limit_state[] := '{}';
begin
  insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
  select
    g.group_id, g.kind, g.bucket, tokenlimits.free_slot(g.group_id), g.cost, g.generations
  from (
    select
      m.group_id, m.kind, date_bin('15 minutes', m.created_at, '2000-01-01 00:00:00+00') as bucket,
      sum(m.cost)::bigint as cost, sum(m.generations)::bigint as generations
    from unnest(p_moves) as m
    group by m.group_id, m.kind, bucket
    order by m.group_id, m.kind, bucket
  ) as g
  on conflict on constraint usage_rollup_pkey do update
  set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;
  v_states := array(
    -- several groups may have the same above them
    select distinct on (l.subject, l.counter_id) row(l.*)::tokenlimits.limit_state
    from (
      select m.group_id, array_agg(distinct m.kind) as kinds, array_agg(distinct m.user_id) as user_ids
      from unnest(p_moves) as m
      group by m.group_id
    ) as p
    cross join lateral unnest(tokenlimits.limit_states(p.group_id, p.user_ids, p.kinds, p_at, false)) as l
    order by l.subject, l.counter_id
  );
  v_ways := array(
      select row(t.*)::tokenlimits.group_tree
      from tokenlimits.group_tree as t
      where t.group_id = any(array(select m.group_id from unnest(p_moves) as m))
      order by t.distance
    );
  for v_move in
    select
      s.place,
      sum(case when s.period = 'in_flight' then m.holds else m.cost * case when s.counts is null then 1 else (s.counts ->> m.kind)::bigint end end)::bigint as cost,
      max(m.created_at) as last,
      bool_or(m.enforced) and s.mode = 'enforce' and (p_judges is null or s.counter_id = any(p_judges)) as enforced, bool_or(m.created_at < s.since) as is_over
    from unnest(v_states) with ordinality as s (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
  used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, place)
    inner join (
      select g.*, t.above_id, w.scope, w.subject
      from unnest(p_moves) as g
      inner join unnest(v_ways) as t on t.group_id = g.group_id
      cross join lateral (values ('group', t.above_id), ('child', t.child_id), ('member', g.user_id)) as w (scope, subject)
      -- worked out before it is joined, or all moves of a group would be compared with all of its members' states
      offset 0
    ) as m
      on
        m.above_id = s.group_id and m.subject = s.subject and m.scope = s.scope and (s.counts is null and s.kind = m.kind or s.counts ? m.kind)
        -- an enforced move can't be skipped: its period ended after it was judged
        and (m.created_at >= s.since or (m.enforced and s.mode = 'enforce' and (p_judges is null or s.counter_id = any(p_judges))))
        and (m.holds is not null or s.period <> 'in_flight')
    group by s.place, s.scope, s.subject, s.counter_id, s.mode, s.level
    order by s.scope <> 'member', s.level desc, s.subject, s.counter_id
  loop
    v_state := v_states[v_move.place];
    v_moving := v_state.group_id;
    if v_move.is_over then
      raise sqlstate 'TL099';
    end if;
    -- counted from the ledger, which includes this move already
    if v_state.is_open is null then
      v_state.used := v_state.used - v_move.cost;
    end if;
    v_is_counted := false;
    if v_state.is_open is not true then
      v_is_counted := tokenlimits.open_counter(v_state);
    end if;
    update tokenlimits.counters as c
    set used = c.used + v_move.cost
    where
      c.subject = v_state.subject
      and c.counter_id = v_state.counter_id
      and v_move.last >= c.since
      and v_move.last < c.until
      and (not v_move.enforced or (v_state.max is null or c.used + v_move.cost <= v_state.max))
    returning c.used into v_state.used;
    if not found then
      v_state.used := tokenlimits.squeeze(v_state, v_move.cost, v_move.last, p_at);
    end if;
    if v_state.starts = 'rolling' and not v_is_counted then
      perform tokenlimits.move_parts(v_state, p_moves);
    end if;
    v_moved := v_moved || v_state;
  end loop;
end
$$;

comment on function tokenlimits.move_usage(tokenlimits.usage_move[], timestamptz, bigint[])
is 'tokenlimits: Moves rollup and counters by many moves at once, or raises TL099.';

revoke execute on function tokenlimits.move_usage(tokenlimits.usage_move[], timestamptz, bigint[])
from public, anon, authenticated, service_role;

-- Locks some expired holds of a group and kind, the oldest first. Skips those that another call has locked, to settle
-- or to sweep them: waiting for one would break the order of locks.
create or replace function tokenlimits.lock_expired(
  p_group_id uuid,
  p_kind text,
  p_at timestamptz,
  p_most integer
)
returns uuid[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select u.id
    from tokenlimits.holds as h
    inner join public.generation_usage as u on u.id = h.usage_id
    where h.group_id = p_group_id and h.kind = p_kind and h.expires_at <= p_at
    order by h.expires_at
    limit p_most
    for update of u skip locked
  );
end
$$;

comment on function tokenlimits.lock_expired(uuid, text, timestamptz, integer)
is 'tokenlimits: Expired holds of a group and kind, locked to be swept.';

revoke execute on function tokenlimits.lock_expired(uuid, text, timestamptz, integer)
from public, anon, authenticated, service_role;

-- The same of groups that share a pool with this one: nobody else may call for them, and the pool's readers would
-- subtract theirs for ever. The stripe of each is taken if it is free: waiting for one would break the order of locks.
create or replace function tokenlimits.lock_expired_beside(
  p_group_id uuid,
  p_kind text,
  p_at timestamptz,
  p_most integer
)
returns uuid[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select u.id
    from tokenlimits.group_tree as t
    inner join tokenlimits.holds as h on h.root_id = t.above_id and h.root_id <> h.group_id
    inner join public.generation_usage as u on u.id = h.usage_id
    where
      t.group_id = p_group_id and t.level = 0 and t.distance > 0 and h.kind = p_kind and h.expires_at <= p_at
      and h.group_id <> p_group_id
      and pg_try_advisory_xact_lock_shared(1953459052, get_byte(uuid_send(h.group_id), 15))
    order by h.expires_at
    limit p_most
    for update of u skip locked
  );
end
$$;

comment on function tokenlimits.lock_expired_beside(uuid, text, timestamptz, integer)
is 'tokenlimits: Expired holds of other groups in the tree of a group, of a kind, locked to be swept.';

revoke execute on function tokenlimits.lock_expired_beside(uuid, text, timestamptz, integer)
from public, anon, authenticated, service_role;

-- Marks those of the locked usages that are expired holds, and returns the moves that take back their cost.
create or replace function tokenlimits.expire_holds(p_usage_ids uuid[], p_at timestamptz)
returns tokenlimits.usage_move[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_moves tokenlimits.usage_move[];
begin
  with expired as (
    update public.generation_usage as u
    set status = 'expired', settled_at = u.expires_at
    where u.id = any(p_usage_ids) and u.status = 'reserved' and u.expires_at <= p_at
    returning u.id, u.group_id, u.kind, u.user_id, u.created_at, u.cost
  ),

  forgotten as (
    delete from tokenlimits.holds as h
    using expired as e
    where h.user_id = e.user_id and h.usage_id = e.id
  )

  select array_agg(
    row(e.group_id, e.kind, e.user_id, e.created_at, -e.cost, -1, false, -1)::tokenlimits.usage_move
  )
  into v_moves
  from expired as e;
  return coalesce(v_moves, '{}');
end
$$;

comment on function tokenlimits.expire_holds(uuid[], timestamptz)
is 'tokenlimits: Marks holds as expired; returns the moves that take back their cost.';

revoke execute on function tokenlimits.expire_holds(uuid[], timestamptz)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.sweep(p_group_id uuid, p_kind text, p_at timestamptz)
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  c_swept constant integer := 500;
  v_at timestamptz := least(p_at, tokenlimits.clock());
  v_moves tokenlimits.usage_move[];
begin
  loop
    -- a block of its own: if a counter has rolled over since it was read (TL099), the marks are rolled back too
    begin
      v_moves := tokenlimits.expire_holds(
        tokenlimits.lock_expired(p_group_id, p_kind, v_at, c_swept)
        || tokenlimits.lock_expired_beside(p_group_id, p_kind, v_at, c_swept),
        v_at
      );
      perform tokenlimits.move_usage(v_moves, v_at);
      return cardinality(v_moves);
    exception
      when sqlstate 'TL099' then
        v_at := greatest(v_at, tokenlimits.clock());
    end;
  end loop;
end
$$;

comment on function tokenlimits.sweep(uuid, text, timestamptz)
is 'tokenlimits: Sweeps some expired holds of a group and kind, and returns how many.';

revoke execute on function tokenlimits.sweep(uuid, text, timestamptz)
from public, anon, authenticated, service_role;

-- For an optional job (sql/optional/pg_cron.sql); correctness never depends on it.
create or replace function tokenlimits.tidy()
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_at timestamptz := tokenlimits.clock();
  v_oldest tokenlimits.holds;
begin
  select * into v_oldest
  from tokenlimits.holds as h
  where h.expires_at <= v_at
  order by h.expires_at
  limit 1;
  if not found then
    return 0;
  end if;
  -- a sweep reads limits in order to write, like every call
  perform tokenlimits.lock_groups(array[v_oldest.group_id]);
  return tokenlimits.sweep(v_oldest.group_id, v_oldest.kind, v_at);
end
$$;

comment on function tokenlimits.tidy()
is 'tokenlimits: Sweeps some expired holds of the group and kind with the oldest one, and returns how many.';

revoke execute on function tokenlimits.tidy()
from public, anon, authenticated, service_role;

-- Writes usages into the ledger, each under its key (p_dead_ids: the dead usage that has the key, if any), sweeps some
-- expired holds of these groups and kinds too, and returns all moves of counters. Raises TL099 if another call has
-- taken a key in the meantime.
create or replace function tokenlimits.write_ledger(
  p_usages public.generation_usage[],
  p_dead_ids uuid[],
  p_enforced boolean,
  p_group_ids uuid[],
  p_kinds text[],
  p_at timestamptz
)
returns tokenlimits.usage_move[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  c_swept constant integer := 500;
  v_dead uuid[] := array_remove(p_dead_ids, null);
  v_expired uuid[] := '{}';
  v_claims public.generation_usage[] := p_usages;
  v_late_claims public.generation_usage[] := '{}';
  v_written bigint;
  v record;
begin
  if v_dead <> '{}' then
    -- before anything else in the ledger, in the order of locks: a late commit could still make one of them live again
    perform
    from public.generation_usage as u
    where u.id = any(v_dead)
    order by u.id
    for update;
    v_claims := '{}';
    for i in 1..cardinality(p_usages) loop
      if p_dead_ids[i] is null then
        v_claims := v_claims || p_usages[i];
      else
        v_late_claims := v_late_claims || p_usages[i];
      end if;
    end loop;
  end if;
  for v in
    select distinct p.group_id, p.kind
    from unnest(p_group_ids, p_kinds) as p (group_id, kind)
    -- not if the clock was set back: the holds and counters of other members haven't reached that moment yet
    where p_at <= tokenlimits.clock()
  loop
    v_expired := v_expired || tokenlimits.lock_expired(
      v.group_id, v.kind, p_at, c_swept - cardinality(v_expired)
    );
  end loop;
  for v in
    -- one group for each tree
    select distinct on (r.above_id, p.kind) p.group_id, p.kind
    from unnest(p_group_ids, p_kinds) as p (group_id, kind)
    inner join tokenlimits.group_tree as r on r.group_id = p.group_id and r.level = 0 and r.distance > 0
    where p_at <= tokenlimits.clock()
    order by r.above_id, p.kind
  loop
    v_expired := v_expired || tokenlimits.lock_expired_beside(
      v.group_id, v.kind, p_at, c_swept - cardinality(v_expired)
    );
  end loop;

  -- the keys of dead usages last: until they are freed, another call that wants one finds it taken and doesn't wait, so
  -- no call can have taken it
  for step in 1..2 loop
    if step = 2 and v_dead <> '{}' then
      update public.generation_usage as u
      set idempotency_key = null
      where u.id = any(v_dead) and (u.status not in ('reserved', 'committed')
or (u.status = 'reserved' and u.expires_at <= p_at));
      v_claims := v_late_claims;
    end if;
    exit when step = 2 and v_dead = '{}';
    insert into public.generation_usage (
      id, group_id, user_id, kind, cost, reserved_cost, status,
      idempotency_key, fingerprint, metadata, created_at, settled_at, expires_at
    )
    select
      n.id, n.group_id, n.user_id, n.kind, n.cost,
      n.reserved_cost, n.status, n.idempotency_key, n.fingerprint,
      n.metadata, n.created_at, n.settled_at, n.expires_at
    from unnest(v_claims) as n
    order by n.idempotency_key, n.user_id
    on conflict on constraint generation_usage_key_key do nothing;
    get diagnostics v_written = row_count;
    -- a key is taken, so its row was left out
    if v_written < cardinality(v_claims) then
      raise sqlstate 'TL099';
    end if;
  end loop;
  insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
  select
    n.id, n.group_id, coalesce(
    (select t.above_id from tokenlimits.group_tree as t where t.group_id = n.group_id and t.level = 0), n.group_id
  ), n.user_id, n.kind, n.cost,
    n.created_at, n.expires_at
  from unnest(p_usages) as n
  where n.status = 'reserved';
  return tokenlimits.expire_holds(v_expired, p_at) || array(
    select row(
      n.group_id, n.kind, n.user_id, n.created_at, n.cost, 1, p_enforced, case n.status when 'reserved' then 1 end
    )::tokenlimits.usage_move
    from unnest(p_usages) as n
  );
end
$$;

comment on function tokenlimits.write_ledger(
  public.generation_usage[],
  uuid[],
  boolean,
  uuid[],
  text[],
  timestamptz
)
is 'tokenlimits: Writes usages into the ledger, sweeps, and returns all moves of counters.';

revoke execute on function tokenlimits.write_ledger(
  public.generation_usage[],
  uuid[],
  boolean,
  uuid[],
  text[],
  timestamptz
)
from public, anon, authenticated, service_role;

-- 74_settle.sql

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
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_action = 'commit' and p_usage.reserved_cost is not null then
    if p_charges and p_cost not between 0 and 1000000000 then
      perform tokenlimits.refuse(
        'TL001', 'cost: must be from 0 to 1000000000', 'cost', 'The hold is unchanged.'
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

comment on function tokenlimits.settled_status(public.generation_usage, text, bigint, boolean, timestamptz)
is 'tokenlimits: The status after a settlement; null if the usage was already settled so.';

revoke execute on function tokenlimits.settled_status(public.generation_usage, text, bigint, boolean, timestamptz)
from public, anon, authenticated, service_role;

-- A commit after the hold expired counts as a new usage at the old moment. It needs room in the limits whose period
-- still contains that moment, which are returned; the other limits no longer count it.
create or replace function tokenlimits.require_room(p_usage public.generation_usage, p_cost bigint, p_at timestamptz)
returns bigint[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
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
      v_has_room := v_has_room and (v_state.max is null or v_state.used + p_cost * v_state.weight <= v_state.max);
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

comment on function tokenlimits.require_room(public.generation_usage, bigint, timestamptz)
is 'tokenlimits: The limits that judge the commit of an expired hold; raises TL007 unless it may still be committed.';

revoke execute on function tokenlimits.require_room(public.generation_usage, bigint, timestamptz)
from public, anon, authenticated, service_role;

-- Finds a usage, and keeps the limits of its group unchanged. What was read may be out of date once its row is locked.
create or replace function tokenlimits.find_usage(p_usage_id uuid)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
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

comment on function tokenlimits.find_usage(uuid)
is 'tokenlimits: Keeps the limits of a usage''s group unchanged until the transaction ends; raises TL005 if there is '
'no such usage.';

revoke execute on function tokenlimits.find_usage(uuid)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.settle(
  p_usage_id uuid,
  p_action text,
  p_cost bigint default null,
  p_charges boolean default false
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
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
        v_needs_room := v_status = 'committed' and (v_usage.status not in ('reserved', 'committed')
or (v_usage.status = 'reserved' and v_usage.expires_at <= v_at)) and not p_charges;
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

comment on function tokenlimits.settle(uuid, text, bigint, boolean)
is 'tokenlimits: What commit, release and refund have in common.';

revoke execute on function tokenlimits.settle(uuid, text, bigint, boolean)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.commit_generation(p_usage_id uuid, p_cost bigint, p_overage text)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if (p_overage in ('reject', 'charge')) is not true then
    perform tokenlimits.refuse(
      'TL001', 'overage: must be "reject" or "charge"', 'overage', 'The hold is unchanged.'
    );
  end if;
  return tokenlimits.settle(p_usage_id, 'commit', p_cost, p_overage = 'charge');
end
$$;

create or replace function tokenlimits.release_generation(p_usage_id uuid)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.settle(p_usage_id, 'release');
end
$$;

create or replace function tokenlimits.refund_generation(p_usage_id uuid)
returns json
language plpgsql
volatile
-- definer: an admin may refund, but not settle in other ways
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  return tokenlimits.settle(p_usage_id, 'refund');
end
$$;

create or replace function public.commit_generation(
  p_usage_id uuid,
  p_cost bigint default null,
  p_overage text default 'reject'
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.commit_generation(
    p_usage_id,
    p_cost,
    p_overage
  );
end
$$;

comment on function public.commit_generation(uuid, bigint, text)
is 'tokenlimits: Commits a hold: charges the reserved cost, or less; with the overage ''charge'' also more, past the '
'limits'' max.';

revoke execute on function public.commit_generation(uuid, bigint, text)
from public, anon, authenticated, service_role;

grant execute on function public.commit_generation(uuid, bigint, text)
to service_role;

comment on function tokenlimits.commit_generation(uuid, bigint, text)
is 'tokenlimits: The private half of public.commit_generation.';

revoke execute on function tokenlimits.commit_generation(uuid, bigint, text)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.commit_generation(uuid, bigint, text)
to service_role;

create or replace function public.release_generation(
  p_usage_id uuid
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.release_generation(
    p_usage_id
  );
end
$$;

comment on function public.release_generation(uuid)
is 'tokenlimits: Releases a hold: gives back its whole cost.';

revoke execute on function public.release_generation(uuid)
from public, anon, authenticated, service_role;

grant execute on function public.release_generation(uuid)
to service_role;

comment on function tokenlimits.release_generation(uuid)
is 'tokenlimits: The private half of public.release_generation.';

revoke execute on function tokenlimits.release_generation(uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.release_generation(uuid)
to service_role;

create or replace function public.refund_generation(
  p_usage_id uuid
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.refund_generation(
    p_usage_id
  );
end
$$;

comment on function public.refund_generation(uuid)
is 'tokenlimits: Gives back the cost of a committed usage.';

revoke execute on function public.refund_generation(uuid)
from public, anon, authenticated, service_role;

grant execute on function public.refund_generation(uuid)
to authenticated, service_role;

comment on function tokenlimits.refund_generation(uuid)
is 'tokenlimits: The private half of public.refund_generation.';

revoke execute on function tokenlimits.refund_generation(uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.refund_generation(uuid)
to authenticated, service_role;

-- Moves the expiry of a hold to p_ttl seconds from now, not to an earlier moment, and not beyond 30 days after the hold
-- was made.
create or replace function tokenlimits.extend_generation(p_usage_id uuid, p_ttl bigint)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_at timestamptz;
  v_usage public.generation_usage;
  v_expires_at timestamptz;
begin
  if (p_ttl between 1 and 2592000) is not true then
    perform tokenlimits.refuse('TL001', 'ttl: must be from 1 second to 30 days, in seconds', 'ttl', 'The hold is unchanged.');
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

create or replace function public.extend_generation(
  p_usage_id uuid,
  p_ttl bigint default 3600
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.extend_generation(
    p_usage_id,
    p_ttl
  );
end
$$;

comment on function public.extend_generation(uuid, bigint)
is 'tokenlimits: Lets a hold expire p_ttl seconds from now, but not earlier than before, nor over 30 days after it was '
'made.';

revoke execute on function public.extend_generation(uuid, bigint)
from public, anon, authenticated, service_role;

grant execute on function public.extend_generation(uuid, bigint)
to service_role;

comment on function tokenlimits.extend_generation(uuid, bigint)
is 'tokenlimits: The private half of public.extend_generation.';

revoke execute on function tokenlimits.extend_generation(uuid, bigint)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.extend_generation(uuid, bigint)
to service_role;

-- 76_batch_requests.sql

-- Many requests in one transaction, first step: reading them.
--
-- Invariants
--   * An invalid request doesn't affect the others: an error of a single call is an answer here, with reason 'refused'.
--   * An item is open until it has an answer; an answered item is never judged, and writes nothing.
--   * The first place of a key stands for all places that have this key.

do $do$
begin
  if to_regtype('tokenlimits.batch_item') is null then
    -- one request; nothing more happens to it once it has an answer
    create type tokenlimits.batch_item as (
      place integer,
      user_id uuid,
      kind text,
      cost bigint,
      idempotency_key text,
      group_id uuid,
      metadata jsonb,
      -- the first place with the same key
      first_place integer,
      -- the groups that may pay, in the order in which they are tried
      group_ids uuid[],
      -- the dead usage that has the key
      dead_id uuid,
      answer json
    );
    -- the charge of an item: the place of its usage among those to be written, the places of its limits among those of
    -- the batch, and what was used of each right after it; a repeated key has the same usage, replayed
    create type tokenlimits.batch_charge as (
      place integer,
      usage integer,
      states integer[],
      used bigint[],
      -- the counters of observing limits that would have denied it
      observed bigint[],
      replayed boolean
    );
  end if;
end
$do$;

-- The answer to a request for which a single call would raise an error.
create or replace function tokenlimits.refused(
  p_item tokenlimits.batch_item,
  p_code text,
  p_message text,
  p_detail text,
  p_hint text
)
returns json
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.reason := 'refused';
  return (
    tokenlimits.answer(v_verdict, p_item.kind, p_item.cost, null, p_replayed => false)::jsonb
    || jsonb_build_object(
      'error', concat_ws('. ', p_message, nullif(p_hint, '')), 'code', p_code, 'detail', nullif(p_detail, '')
    )
  )::json;
end
$$;

comment on function tokenlimits.refused(tokenlimits.batch_item, text, text, text, text)
is 'tokenlimits: The answer to a request of a batch that a single call would refuse with this error.';

revoke execute on function tokenlimits.refused(tokenlimits.batch_item, text, text, text, text)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.read_request(p_request jsonb, p_place integer)
returns tokenlimits.batch_item
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_item tokenlimits.batch_item;
  v_message text;
  v_detail text;
  v_hint text;
begin
  v_item.place := p_place;
  v_item.kind := p_request ->> 'kind';
  v_item.user_id := (p_request ->> 'user_id')::uuid;
  v_item.cost := case when p_request ? 'cost' then (p_request ->> 'cost')::bigint else 1 end;
  v_item.idempotency_key := p_request ->> 'idempotency_key';
  v_item.group_id := (p_request ->> 'group_id')::uuid;
  v_item.metadata := nullif(p_request -> 'metadata', 'null');
  if (v_item.user_id is not null and v_item.kind ~ '^[a-z][a-z0-9_]{0,31}$' and v_item.cost between 1 and 1000000000
  and (v_item.idempotency_key is null or char_length(v_item.idempotency_key) between 1 and 255)
  and (v_item.metadata is null or tokenlimits.is_metadata(v_item.metadata))) is not true then
    perform tokenlimits.refuse_request(v_item.user_id, v_item.kind, v_item.cost, v_item.idempotency_key);
  end if;
  return v_item;
exception
  when sqlstate 'TL001' or data_exception then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    v_item.answer := tokenlimits.refused(v_item, sqlstate, v_message, v_detail, v_hint);
    return v_item;
end
$$;

comment on function tokenlimits.read_request(jsonb, integer)
is 'tokenlimits: One request of a batch; an invalid one is answered.';

revoke execute on function tokenlimits.read_request(jsonb, integer)
from public, anon, authenticated, service_role;

-- In one query if all are valid, since a block with an exception handler costs as much as reading ten requests.
create or replace function tokenlimits.read_requests(p_requests jsonb)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_items tokenlimits.batch_item[];
  v_default uuid[] := array(select d.id from public.user_groups as d where d.is_default);
  v record;
begin
  if jsonb_typeof(p_requests) is distinct from 'array' or jsonb_array_length(p_requests) > 1000 then
    perform tokenlimits.refuse(
      'TL001', 'requests: must be a JSON array of at most 1000 requests', 'requests', 'Nothing was recorded.'
    );
  end if;
  begin
    select
      array_agg(
        row(
          r.place,
          (r.request ->> 'user_id')::uuid,
          r.request ->> 'kind',
          case when r.request ? 'cost' then (r.request ->> 'cost')::bigint else 1 end,
          r.request ->> 'idempotency_key',
          (r.request ->> 'group_id')::uuid,
          nullif(r.request -> 'metadata', 'null'),
          null, null, null, null
        )::tokenlimits.batch_item
        order by r.place
      )
    into v_items
    from jsonb_array_elements(p_requests) with ordinality as r (request, place);
    for v in
      select i.place
      from unnest(v_items) as i
      where (i.user_id is not null and i.kind ~ '^[a-z][a-z0-9_]{0,31}$' and i.cost between 1 and 1000000000
      and (i.idempotency_key is null or char_length(i.idempotency_key) between 1 and 255)
      and (i.metadata is null or tokenlimits.is_metadata(i.metadata))) is not true
    loop
      v_items[v.place] := tokenlimits.read_request(p_requests -> (v.place - 1), v.place);
    end loop;
  exception
    when data_exception then
      select array_agg(tokenlimits.read_request(r.request, r.place::integer) order by r.place) into v_items
      from jsonb_array_elements(p_requests) with ordinality as r (request, place);
  end;
  return array(
    select
      row(
        i.place, i.user_id, i.kind, i.cost, i.idempotency_key, i.group_id, i.metadata,
        case when i.idempotency_key is not null and i.answer is null then
          min(i.place) filter (where i.answer is null) over (partition by i.user_id, i.idempotency_key)
        end,
        case
          when i.answer is not null then null
          when cardinality(p.ids) > 1 then tokenlimits.entitling(p.ids, i.kind)
          else p.ids
        end,
        null,
        i.answer
      )::tokenlimits.batch_item
    from unnest(v_items) as i
    left join (
      select m.user_id, array_agg(g.id order by g.priority desc, m.joined_at, g.id) as ids
      from public.group_memberships as m
      inner join public.user_groups as g on g.id = m.group_id
      where m.user_id = any(array(select u.user_id from unnest(v_items) as u where u.answer is null))
      group by m.user_id
    ) as o on o.user_id = i.user_id
    cross join lateral (
      select case
        when i.group_id is null then coalesce(o.ids, v_default)
        when i.group_id = any(coalesce(o.ids, v_default)) then array[i.group_id]
        else '{}'
      end as ids
    ) as p
    order by i.place
  );
end
$$;

comment on function tokenlimits.read_requests(jsonb)
is 'tokenlimits: The requests of a batch.';

revoke execute on function tokenlimits.read_requests(jsonb)
from public, anon, authenticated, service_role;

-- Answers the items whose key has a live usage, and notes the dead usages that have a key.
create or replace function tokenlimits.replay(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v record;
begin
  for v in
    select i.place
    from unnest(p_items) as i
    inner join public.generation_usage as u on u.idempotency_key = i.idempotency_key and u.user_id = i.user_id
    where i.answer is null
  loop
    p_items[v.place] := tokenlimits.replay_item(p_items[v.place]);
  end loop;
  return p_items;
end
$$;

comment on function tokenlimits.replay(tokenlimits.batch_item[])
is 'tokenlimits: A batch, with those items answered whose idempotency key is taken.';

revoke execute on function tokenlimits.replay(tokenlimits.batch_item[])
from public, anon, authenticated, service_role;

create or replace function tokenlimits.replay_item(p_item tokenlimits.batch_item)
returns tokenlimits.batch_item
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_under_key record;
  v_message text;
  v_detail text;
  v_hint text;
begin
  v_under_key := tokenlimits.usage_under_key(
    p_item.user_id, p_item.idempotency_key,
    md5(concat_ws(' ', 'track', p_item.kind, p_item.cost, p_item.group_id))::uuid
  );
  p_item.dead_id := v_under_key.dead_id;
  if (v_under_key.live).id is not null then
    p_item.answer := tokenlimits.usage_answer(v_under_key.live, tokenlimits.clock(), p_replayed => true);
  end if;
  return p_item;
exception
  when sqlstate 'TL008' then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    p_item.answer := tokenlimits.refused(p_item, sqlstate, v_message, v_detail, v_hint);
    return p_item;
end
$$;

comment on function tokenlimits.replay_item(tokenlimits.batch_item)
is 'tokenlimits: An item, answered if its idempotency key is taken.';

revoke execute on function tokenlimits.replay_item(tokenlimits.batch_item)
from public, anon, authenticated, service_role;

-- The answer to an item that isn't charged: another item has its key, its group doesn't exist, or it is denied. First
-- its key is looked up again, as in a single call: whoever took the last room may have done so under the same key.
create or replace function tokenlimits.deny_item(
  p_item tokenlimits.batch_item,
  p_verdict tokenlimits.verdict,
  p_holder_id uuid
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer json;
  v_message text;
  v_detail text;
  v_hint text;
begin
  if p_holder_id is not null then
    perform tokenlimits.refuse_key(p_item.idempotency_key, p_holder_id);
  elsif p_item.idempotency_key is not null then
    p_item := tokenlimits.replay_item(p_item);
  end if;
  if p_item.answer is null and p_verdict.reason = 'not_in_group' then
    perform tokenlimits.refuse_group('track', p_item.group_id);
  end if;
  return coalesce(
    p_item.answer, tokenlimits.answer(p_verdict, p_item.kind, p_item.cost, null, p_replayed => false)
  );
exception
  when sqlstate 'TL002' or sqlstate 'TL008' then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    v_answer := tokenlimits.refused(p_item, sqlstate, v_message, v_detail, v_hint);
    return v_answer;
end
$$;

comment on function tokenlimits.deny_item(tokenlimits.batch_item, tokenlimits.verdict, uuid)
is 'tokenlimits: The answer to an item that isn''t charged.';

revoke execute on function tokenlimits.deny_item(tokenlimits.batch_item, tokenlimits.verdict, uuid)
from public, anon, authenticated, service_role;

-- 77_batch_judging.sql

-- Many requests in one transaction, second step: judging them, in memory.
--
-- Invariants
--   * Each item is judged by the room that those before it have left, as if it had come alone.
--   * Nothing is written here, and no lock is waited for. Each limit is read once, however many items it applies to.

create or replace function tokenlimits.states_at(
  p_states tokenlimits.limit_state[],
  p_places integer[],
  p_kind text
)
returns tokenlimits.limit_state[]
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_no integer;
  v_state tokenlimits.limit_state;
  v_states tokenlimits.limit_state[] := '{}';
begin
  foreach v_no in array p_places loop
    v_state := p_states[v_no];
    v_state.weight := case when v_state.counts is null then 1 else (v_state.counts ->> p_kind)::bigint end;
    v_states := v_states || v_state;
  end loop;
  return v_states;
end
$$;

comment on function tokenlimits.states_at(tokenlimits.limit_state[], integer[], text)
is 'tokenlimits: The states at some places, as those of a kind.';

revoke execute on function tokenlimits.states_at(tokenlimits.limit_state[], integer[], text)
from public, anon, authenticated, service_role;

-- Judges the open items in their order, each by the room that those before it have left. Denied items are answered; the
-- others become charges for usages. Also returns the limits by which they were judged, with all charges included.
create or replace function tokenlimits.judge_batch(
  p_at timestamptz,
  inout items tokenlimits.batch_item[],
  out states tokenlimits.limit_state[],
  out usages public.generation_usage[],
  out charges tokenlimits.batch_charge[]
)
returns record
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ways tokenlimits.group_tree[];
  v record;
  v_item tokenlimits.batch_item;
  v_usage public.generation_usage;
  v_charge tokenlimits.batch_charge;
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
  v_observed bigint[];
  v_verdict tokenlimits.verdict;
  v_at timestamptz;
  v_no integer;
  -- the charge that has a key, by the first place of the key
  v_holders integer[] := array_fill(null::integer, array[cardinality(items)]);
  v_holder tokenlimits.batch_charge;
  v_fingerprint uuid;
begin
  states := array(
    -- several groups may have the same above them
    select distinct on (s.subject, s.counter_id) row(s.*)::tokenlimits.limit_state
    from (select g.id as group_id, array_agg(distinct i.kind) as kinds, array_agg(distinct i.user_id) as user_ids
    from unnest(items) as i
    cross join lateral unnest(i.group_ids) as g (id)
    where i.answer is null
    group by g.id) as p
    cross join lateral unnest(tokenlimits.limit_states(
      p.group_id, p.user_ids, p.kinds, p_at, p_in_flight => false
    )) as s
    order by s.subject, s.counter_id
  );
  v_ways := array(
    select row(t.*)::tokenlimits.group_tree
    from tokenlimits.group_tree as t
    where t.group_id = any(array(select g.id from unnest(items) as i cross join lateral unnest(i.group_ids) as g (id)))
    order by t.distance
  );
  usages := '{}';
  charges := '{}';
  -- the groups that may pay for each open item, in the order in which they are tried, with the places of their limits;
  -- a row of nulls if none may
  for v in
    select
      i.place,
      g.id as group_id,
      array_agg(
        s.no::integer order by s.kind, s.scope <> 'member', s.level desc, s.counter_id
      ) filter (where s.no is not null) as states,
      coalesce(g.rank = 1, true) as is_first,
      coalesce(g.rank = cardinality(i.group_ids), true) as is_last
    from unnest(items) as i
    left join lateral unnest(i.group_ids) with ordinality as g (id, rank) on true
    left join unnest(v_ways) as t on t.group_id = g.id
    cross join lateral (
      values ('group', t.above_id), ('child', t.child_id), ('member', i.user_id)
    ) as w (scope, subject)
    left join unnest(states) with ordinality as s (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, no)
      on s.group_id = t.above_id and s.scope = w.scope and s.subject = w.subject and (s.counts is null and s.kind = i.kind or s.counts ? i.kind)
    where i.answer is null
    group by i.place, i.group_ids, g.id, g.rank
    order by i.place, g.rank
  loop
    if v.is_first then
      v_item := items[v.place];
      v_at := p_at;
      v_verdict := row(
        false, case when v_item.group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null, null
      );
    end if;
    if not v_verdict.allowed and v.states is not null then
      v_full := null;
      v_observed := null;
      foreach v_no in array v.states loop
        v_state := states[v_no];
        v_state.weight := case when v_state.counts is null then 1 else (v_state.counts ->> v_item.kind)::bigint end;
        if v_state.since > v_at then
          -- the clock was set back behind the counter's period; the usage then belongs to that period
          v_at := v_state.since;
        end if;
        if not (v_state.max is null or v_state.used + v_item.cost * v_state.weight <= v_state.max) then
          if v_state.mode = 'observe' then
            v_observed := v_observed || v_state.counter_id;
          else
            v_state.reset_at := null;
            if v_state.starts = 'rolling' or v_state.overridden_until > v_at then
              v_state.until := tokenlimits.room_at(v_state, v_item.cost * v_state.weight);
            elsif v_item.cost * v_state.weight > v_state.max then
              -- a cost that can never fit waits for ever, as under a full lifetime limit
              v_state.until := 'infinity';
            end if;
            if v_full is null or v_state.until > v_full.until then
              v_full := v_state;
            end if;
          end if;
        end if;
      end loop;
      if v_full is null then
        v_verdict := row(true, null, v.group_id, null, null, v_observed);
      elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
        v_verdict := row(false, 'limit_exceeded', v.group_id, tokenlimits.states_at(states, v.states, v_item.kind), v_full, v_observed);
      end if;
      v_charge.states := v.states;
    end if;
    continue when not v.is_last;

    v_fingerprint := md5(concat_ws(' ', 'track', v_item.kind, v_item.cost, v_item.group_id))::uuid;
    v_holder := charges[v_holders[v_item.first_place]];
    -- null unless an earlier item of this batch was charged under the key; the same request is then a replay
    if usages[v_holder.usage].fingerprint = v_fingerprint then
      v_holder.place := v.place;
      v_holder.replayed := true;
      v_holder.observed := null;
      charges := charges || v_holder;
    elsif v_holder is null and v_verdict.allowed then
      v_usage := row(
        (
        lpad(to_hex((date_part('epoch', date_trunc('milliseconds', v_at)) * 1000)::bigint), 12, '0')
        || '7' || substr(gen_random_uuid()::text, 16, 17) || right(case when v_state.is_spread then v_item.user_id else v_verdict.group_id end::text, 4)
      )::uuid,
        v_verdict.group_id, v_item.user_id, v_item.kind, v_item.cost, null, 'committed',
        v_item.idempotency_key, v_fingerprint, coalesce(v_item.metadata, '{}'),
        v_at, v_at, null
      );
      usages := usages || v_usage;
      v_charge.place := v.place;
      v_charge.usage := cardinality(usages);
      v_charge.used := '{}';
      v_charge.observed := v_verdict.observed;
      v_charge.replayed := false;
      -- in memory only: the items to come find less room
      foreach v_no in array v_charge.states loop
        v_state := states[v_no];
        v_state.used := v_state.used + v_item.cost * case when v_state.counts is null then 1 else (v_state.counts ->> v_item.kind)::bigint end;
        if v_state.reset_at = 'infinity' then
          -- it is the first use in this window
          v_state.reset_at := case v_state.starts
            when 'rolling' then v_state.until + 60 * tokenlimits.part_of(v_state.period)
          end;
        end if;
        states[v_no] := v_state;
        v_charge.used := v_charge.used || v_state.used;
      end loop;
      charges := charges || v_charge;
      if v_item.first_place is not null then
        v_holders[v_item.first_place] := cardinality(charges);
      end if;
    else
      items[v.place].answer := tokenlimits.deny_item(v_item, v_verdict, usages[v_holder.usage].id);
    end if;
  end loop;
end
$$;

comment on function tokenlimits.judge_batch(timestamptz, tokenlimits.batch_item[])
is 'tokenlimits: Judges the items of a batch in order; writes nothing.';

revoke execute on function tokenlimits.judge_batch(timestamptz, tokenlimits.batch_item[])
from public, anon, authenticated, service_role;

-- 78_batches.sql

-- Many requests in one transaction: read (76), judged (77), written, and judged again until a verdict holds.
--
-- Invariants
--   * The answers are those that single calls in that order would get, and a denial doesn't affect the others.
--   * All groups' stripes are held in shared mode before any limit is read. Each counter is moved once.
--   * With p_max_wait, no lock is waited for longer: items of a locked group are answered 'busy', and the rest
--     continues.

-- Writes the usages of a batch, and sweeps. Returns the moved counters with their new values. If a counter has changed
-- since it was read, nothing is written, and moved is null; likewise if a row was locked for too long: then is_held is
-- true, and held_group_id names the group, if it is known.
--
-- This block contains no inner block: whoever waits for a row of an inner block that has ended waits for the whole
-- transaction, and keeps waiting even after the outer block is rolled back. Two batches would block each other.
create or replace function tokenlimits.write_batch(
  p_items tokenlimits.batch_item[],
  p_usages public.generation_usage[],
  p_charges tokenlimits.batch_charge[],
  p_at timestamptz,
  out moved tokenlimits.limit_state[],
  out is_held boolean,
  out held_group_id uuid
)
returns record
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group_ids uuid[];
  v_kinds text[];
  v_moves tokenlimits.usage_move[];
  v_ways tokenlimits.group_tree[];
  v_move record;
  v_is_counted boolean;
  v_moving uuid;
  v_states tokenlimits.limit_state[];
  v_state tokenlimits.limit_state;
  v_moved tokenlimits.limit_state[] := '{}';
begin
  is_held := false;
  select array_agg(p.group_id), array_agg(k.kind) into v_group_ids, v_kinds
  from (select g.id as group_id, array_agg(distinct i.kind) as kinds, array_agg(distinct i.user_id) as user_ids
  from unnest(p_items) as i
  cross join lateral unnest(i.group_ids) as g (id)
  where i.answer is null
  group by g.id) as p
  cross join lateral unnest(p.kinds) as k (kind);
  v_moves := tokenlimits.write_ledger(
    p_usages,
    array(
      select i.dead_id
      from unnest(p_charges) as c
      inner join unnest(p_items) as i on i.place = c.place
      where not c.replayed
      order by c.usage
    ),
    true,
    v_group_ids,
    v_kinds,
    p_at
  );
  insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
  select
    g.group_id, g.kind, g.bucket, tokenlimits.free_slot(g.group_id), g.cost, g.generations
  from (
    select
      m.group_id, m.kind, date_bin('15 minutes', m.created_at, '2000-01-01 00:00:00+00') as bucket,
      sum(m.cost)::bigint as cost, sum(m.generations)::bigint as generations
    from unnest(v_moves) as m
    group by m.group_id, m.kind, bucket
    order by m.group_id, m.kind, bucket
  ) as g
  on conflict on constraint usage_rollup_pkey do update
  set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;
  v_states := array(
    -- several groups may have the same above them
    select distinct on (l.subject, l.counter_id) row(l.*)::tokenlimits.limit_state
    from (
      select m.group_id, array_agg(distinct m.kind) as kinds, array_agg(distinct m.user_id) as user_ids
      from unnest(v_moves) as m
      group by m.group_id
    ) as p
    cross join lateral unnest(tokenlimits.limit_states(p.group_id, p.user_ids, p.kinds, p_at, false)) as l
    order by l.subject, l.counter_id
  );
  v_ways := array(
      select row(t.*)::tokenlimits.group_tree
      from tokenlimits.group_tree as t
      where t.group_id = any(array(select m.group_id from unnest(v_moves) as m))
      order by t.distance
    );
  for v_move in
    select
      s.place,
      sum(case when s.period = 'in_flight' then m.holds else m.cost * case when s.counts is null then 1 else (s.counts ->> m.kind)::bigint end end)::bigint as cost,
      max(m.created_at) as last,
      bool_or(m.enforced) and s.mode = 'enforce' as enforced, bool_or(m.created_at < s.since) as is_over
    from unnest(v_states) with ordinality as s (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
  used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, place)
    inner join (
      select g.*, t.above_id, w.scope, w.subject
      from unnest(v_moves) as g
      inner join unnest(v_ways) as t on t.group_id = g.group_id
      cross join lateral (values ('group', t.above_id), ('child', t.child_id), ('member', g.user_id)) as w (scope, subject)
      -- worked out before it is joined, or all moves of a group would be compared with all of its members' states
      offset 0
    ) as m
      on
        m.above_id = s.group_id and m.subject = s.subject and m.scope = s.scope and (s.counts is null and s.kind = m.kind or s.counts ? m.kind)
        -- an enforced move can't be skipped: its period ended after it was judged
        and (m.created_at >= s.since or (m.enforced and s.mode = 'enforce'))
        and (m.holds is not null or s.period <> 'in_flight')
    group by s.place, s.scope, s.subject, s.counter_id, s.mode, s.level
    order by s.scope <> 'member', s.level desc, s.subject, s.counter_id
  loop
    v_state := v_states[v_move.place];
    v_moving := v_state.group_id;
    if v_move.is_over then
      raise sqlstate 'TL099';
    end if;
    -- counted from the ledger, which includes this move already
    if v_state.is_open is null then
      v_state.used := v_state.used - v_move.cost;
    end if;
    v_is_counted := false;
    if v_state.is_open is not true then
      v_is_counted := tokenlimits.open_counter(v_state);
    end if;
    update tokenlimits.counters as c
    set used = c.used + v_move.cost
    where
      c.subject = v_state.subject
      and c.counter_id = v_state.counter_id
      and v_move.last >= c.since
      and v_move.last < c.until
      and (not v_move.enforced or (v_state.max is null or c.used + v_move.cost <= v_state.max))
    returning c.used into v_state.used;
    if not found then
      v_state.used := tokenlimits.squeeze(v_state, v_move.cost, v_move.last, p_at);
    end if;
    if v_state.starts = 'rolling' and not v_is_counted then
      perform tokenlimits.move_parts(v_state, v_moves);
    end if;
    v_moved := v_moved || v_state;
  end loop;
  moved := v_moved;
exception
  when sqlstate 'TL099' then
    moved := null;
  when lock_not_available then
    -- what was written is rolled back, so the locks are free while the rest is judged again
    moved := null;
    is_held := true;
    held_group_id := v_moving;
end
$$;

comment on function tokenlimits.write_batch(
  tokenlimits.batch_item[],
  public.generation_usage[],
  tokenlimits.batch_charge[],
  timestamptz
)
is 'tokenlimits: Writes the usages of a batch, and sweeps.';

revoke execute on function tokenlimits.write_batch(
  tokenlimits.batch_item[],
  public.generation_usage[],
  tokenlimits.batch_charge[],
  timestamptz
)
from public, anon, authenticated, service_role;

-- Answers the charged items. Each answer has the counters as they were right after its item, including what others have
-- moved since the counters were read. With expired holds, the verdict, not the counter, says what is used.
create or replace function tokenlimits.answer_charges(
  p_items tokenlimits.batch_item[],
  p_states tokenlimits.limit_state[],
  p_usages public.generation_usage[],
  p_charges tokenlimits.batch_charge[],
  p_moved tokenlimits.limit_state[]
)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_others bigint[] := array_fill(0::bigint, array[cardinality(p_states)]);
  v record;
  v_charge tokenlimits.batch_charge;
  v_usage public.generation_usage;
  v_state tokenlimits.limit_state;
  v_group_name text;
  v_limits tokenlimits.limit_answer[] := '{}';
  v_would_deny tokenlimits.limit_answer[] := '{}';
  v_tightest tokenlimits.limit_state;
begin
  for v in
    select s.no, m.used - s.used as others
    from unnest(p_states) with ordinality as s (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, no)
    inner join unnest(p_moved) as m on m.counter_id = s.counter_id and m.subject = s.subject
    where s.expired is null and m.used <> s.used
  loop
    v_others[v.no] := v.others;
  end loop;
  foreach v_charge in array p_charges loop
    v_usage := p_usages[v_charge.usage];
    v_limits := '{}';
    v_would_deny := '{}';
    v_tightest := null;
    for i in 1..cardinality(v_charge.states) loop
      v_state := p_states[v_charge.states[i]];
      v_state.used := v_charge.used[i] + v_others[v_charge.states[i]];
      v_state.weight := case when v_state.counts is null then 1 else (v_state.counts ->> v_usage.kind)::bigint end;
      v_limits := v_limits || row(
        v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
        v_state.used,
        case when v_state.max is not null then greatest((v_state.max - v_state.used - case
          when v_state.used > v_state.max then v_state.weight - 1
          else 0
        end) / v_state.weight, 0) end,
        nullif(coalesce(v_state.reset_at, v_state.until), 'infinity'), v_state.weight,
        case when v_state.group_id <> v_usage.group_id then
          row(v_state.group_id, v_state.group_name)::tokenlimits.group_answer
        end
      )::tokenlimits.limit_answer;
      if v_state.mode = 'observe' then
        if v_state.counter_id = any(v_charge.observed) then
          v_would_deny := v_would_deny || row(
        v_state.kind, v_state.period, v_state.starts, v_state.scope, v_state.mode, v_state.max,
        v_state.used,
        case when v_state.max is not null then greatest((v_state.max - v_state.used - case
          when v_state.used > v_state.max then v_state.weight - 1
          else 0
        end) / v_state.weight, 0) end,
        nullif(coalesce(v_state.reset_at, v_state.until), 'infinity'), v_state.weight,
        case when v_state.group_id <> v_usage.group_id then
          row(v_state.group_id, v_state.group_name)::tokenlimits.group_answer
        end
      )::tokenlimits.limit_answer;
        end if;
      -- how many may run at once is in other units
      elsif v_state.period <> 'in_flight' and (
        (v_state.max - v_state.used - case
          when v_state.used > v_state.max then v_state.weight - 1
          else 0
        end) / v_state.weight < (v_tightest.max - v_tightest.used - case
          when v_tightest.used > v_tightest.max then v_tightest.weight - 1
          else 0
        end) / v_tightest.weight
        or (v_tightest.max is null and v_state.max is not null)
      ) then
        v_tightest := v_state;
      end if;
    end loop;
    v_group_name := v_state.group_name;
    if v_state.group_id is distinct from v_usage.group_id then
      v_group_name := (select g.name from public.user_groups as g where g.id = v_usage.group_id);
    end if;
    p_items[v_charge.place].answer := row_to_json(row(
      true, null, null,
      v_usage.id, v_usage.status, v_usage.expires_at,
      case when v_usage.group_id is not null then row(v_usage.group_id, v_group_name)::tokenlimits.group_answer end,
      v_usage.kind, v_usage.cost, v_limits, null, v_would_deny,
      -- greatest() ignores nulls, and unlimited is null
      case when v_tightest.max is not null then greatest((v_tightest.max - v_tightest.used - case
      when v_tightest.used > v_tightest.max then v_tightest.weight - 1
      else 0
    end) / v_tightest.weight, 0) end,
      nullif(coalesce(v_tightest.reset_at, v_tightest.until), 'infinity'), null, v_charge.replayed
    )::tokenlimits.generation_answer);
  end loop;
  return p_items;
end
$$;

comment on function tokenlimits.answer_charges(
  tokenlimits.batch_item[],
  tokenlimits.limit_state[],
  public.generation_usage[],
  tokenlimits.batch_charge[],
  tokenlimits.limit_state[]
)
is 'tokenlimits: A batch, with its charged items answered.';

revoke execute on function tokenlimits.answer_charges(
  tokenlimits.batch_item[],
  tokenlimits.limit_state[],
  public.generation_usage[],
  tokenlimits.batch_charge[],
  tokenlimits.limit_state[]
)
from public, anon, authenticated, service_role;

-- Answers 'busy' to the open items that one of some groups may pay for; to all open items if they are null.
create or replace function tokenlimits.answer_busy(p_items tokenlimits.batch_item[], p_group_ids uuid[])
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_item tokenlimits.batch_item;
  v_verdict tokenlimits.verdict;
begin
  v_verdict.reason := 'busy';
  foreach v_item in array p_items loop
    if v_item.answer is null and (p_group_ids is null or p_group_ids && v_item.group_ids) then
      v_verdict.group_id := (
        select g.id
        from unnest(v_item.group_ids) with ordinality as g (id, place)
        where g.id = any(p_group_ids)
        order by g.place
        limit 1
      );
      p_items[v_item.place].answer := tokenlimits.answer(
        v_verdict, v_item.kind, v_item.cost, null, p_replayed => false
      );
    end if;
  end loop;
  return p_items;
end
$$;

comment on function tokenlimits.answer_busy(tokenlimits.batch_item[], uuid[])
is 'tokenlimits: A batch, with those items answered whose group is locked by another transaction.';

revoke execute on function tokenlimits.answer_busy(tokenlimits.batch_item[], uuid[])
from public, anon, authenticated, service_role;

-- Takes the stripes of all groups; answers the items of those groups whose stripe was not free in time.
create or replace function tokenlimits.lock_batch(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- in the order of their stripes
  v_group_ids uuid[] := array(
    select p.group_id
    from (select g.id as group_id, array_agg(distinct i.kind) as kinds, array_agg(distinct i.user_id) as user_ids
    from unnest(p_items) as i
    cross join lateral unnest(i.group_ids) as g (id)
    where i.answer is null
    group by g.id) as p
    order by get_byte(uuid_send(p.group_id), 15), p.group_id
  );
  v_group_id uuid;
begin
  perform tokenlimits.lock_groups(v_group_ids);
  return p_items;
exception
  when lock_not_available then
    -- at least one stripe is taken, and all others were given back: one by one, in the same order, to find out which
    foreach v_group_id in array v_group_ids loop
      begin
        perform tokenlimits.lock_groups(array[v_group_id]);
      exception
        when lock_not_available then
          p_items := tokenlimits.answer_busy(p_items, array[v_group_id]);
      end;
    end loop;
    return p_items;
end
$$;

comment on function tokenlimits.lock_batch(tokenlimits.batch_item[])
is 'tokenlimits: Keeps the limits of a batch''s groups unchanged.';

revoke execute on function tokenlimits.lock_batch(tokenlimits.batch_item[])
from public, anon, authenticated, service_role;

create or replace function tokenlimits.track_generations(p_requests jsonb, p_max_wait bigint)
returns json
language plpgsql
volatile
-- definer: counters are private, and only these functions write the ledger
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_lock_timeout text := current_setting('lock_timeout');
  v_items tokenlimits.batch_item[] := tokenlimits.read_requests(p_requests);
  v_at timestamptz;
  v_judged record;
  v_written record;
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
    -- never before the moment that an earlier round reached, or a clock that was set back would loop for ever
    v_at := greatest(tokenlimits.clock(), v_at);
    v_items := tokenlimits.replay(v_items);
    v_judged := tokenlimits.judge_batch(v_at, v_items);
    v_written := tokenlimits.write_batch(v_items, v_judged.usages, v_judged.charges, v_at);
    exit when v_written.moved is not null;
    v_at := greatest(v_at, (select max(u.created_at) from unnest(v_judged.usages) as u));
    if v_written.is_held then
      -- a counter of that group: it counts for all beneath it
      v_items := tokenlimits.answer_busy(
        v_items, case when v_written.held_group_id is not null then array(select t.group_id from tokenlimits.group_tree as t where t.above_id = v_written.held_group_id) end
      );
    end if;
  end loop;
  v_items := tokenlimits.answer_charges(
    v_judged.items, v_judged.states, v_judged.usages, v_judged.charges, v_written.moved
  );
  perform set_config('lock_timeout', v_lock_timeout, true);
  return coalesce((select json_agg(i.answer order by i.place) from unnest(v_items) as i), '[]');
end
$$;

-- Each request is an object with the arguments of track_generation (without p_), and is answered at the same place. One
-- for which track_generation would raise an error has the reason 'refused'. With p_max_wait, requests whose group is
-- locked for more than that many milliseconds have the reason 'busy', and may be sent again.
create or replace function public.track_generations(
  p_requests jsonb,
  p_max_wait bigint default null
)
returns json
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.track_generations(
    case jsonb_typeof(p_requests) when 'string' then (p_requests #>> '{}')::jsonb else p_requests end,
    p_max_wait
  );
end
$$;

comment on function public.track_generations(jsonb, bigint)
is 'tokenlimits: Tracks up to 1,000 generations in one transaction: each is judged separately, in this order.';

revoke execute on function public.track_generations(jsonb, bigint)
from public, anon, authenticated, service_role;

grant execute on function public.track_generations(jsonb, bigint)
to service_role;

comment on function tokenlimits.track_generations(jsonb, bigint)
is 'tokenlimits: The private half of public.track_generations.';

revoke execute on function tokenlimits.track_generations(jsonb, bigint)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.track_generations(jsonb, bigint)
to service_role;

-- 80_admin.sql

-- For admins: groups with their limits, members, resets.
--
-- Invariants
--   * Each function begins with require_admin. Functions run as their caller where they can, so that row-level security
--     decides too.
--   * One function, one transaction: after an error, nothing is half done.
--   * Edits lock in one order, so that they wait for each other, but never in a circle: the group's row (and its
--     parent's), the tree of groups, its limits' rows (all at once, if there are several), and then, in a trigger, its
--     stripe and those of all groups beneath it.

create or replace function tokenlimits.group_json(p_group public.user_groups)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return to_jsonb(p_group) - 'is_nested' || jsonb_build_object('limits', coalesce((
    select jsonb_agg(
      jsonb_build_object(
        'kind', l.kind, 'period', l.period, 'starts', l.starts, 'scope', l.scope, 'mode', l.mode, 'max', l.max,
        'counts', l.counts
      )
      order by l.kind, l.scope, array_position(
        array['in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime'], regexp_replace(l.period, '^[0-9]+ |s$', '', 'g')
      ), length(l.period), l.period, l.starts
    )
    from public.group_limits as l
    where l.group_id = p_group.id
  ), '[]'));
end
$$;

comment on function tokenlimits.group_json(public.user_groups)
is 'tokenlimits: A group with its limits, as clients see it.';

revoke execute on function tokenlimits.group_json(public.user_groups)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.group_json(public.user_groups)
to authenticated, service_role;

-- A limit as it came, with what it leaves out.
create or replace function tokenlimits.whole_limit(p_limit jsonb)
returns jsonb
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return '{"starts": "calendar", "mode": "enforce", "counts": null}' || p_limit;
end
$$;

comment on function tokenlimits.whole_limit(jsonb)
is 'tokenlimits: A limit with its defaults.';

revoke execute on function tokenlimits.whole_limit(jsonb)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.whole_limit(jsonb)
to authenticated, service_role;

-- Refuses an invalid set of limits with the path of the field, like limits[2].max.
create or replace function tokenlimits.check_limits(p_limits jsonb)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_limit jsonb;
  v_seen jsonb := '{}';
  v_identity text;
  v_index integer := -1;
  -- the field, and what it must be
  v_wrong text[];
  v_field text;
begin
  if jsonb_typeof(p_limits) <> 'array' then
    perform tokenlimits.refuse('TL001', 'limits: must be an array', 'limits');
  end if;
  for v_limit in select e.value from jsonb_array_elements(p_limits) as e loop
    v_index := v_index + 1;
    if jsonb_typeof(v_limit) = 'object' then
      v_limit := tokenlimits.whole_limit(v_limit);
    end if;
    v_wrong := case
      when jsonb_typeof(v_limit) <> 'object' then array['', 'must be an object']
      when (v_limit ->> 'kind' ~ '^[a-z][a-z0-9_]{0,31}$') is not true then
        array['.kind', 'must be lower-case letters, digits and underscores, at most 32, a letter first']
      when (v_limit ->> 'period' in ('in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime')
      or v_limit ->> 'period' ~ '^([2-9]|[1-9][0-9]|[12][0-9]{2}|3[0-5][0-9]|36[0-6]) (minutes|hours|days|weeks)$'
      or v_limit ->> 'period' ~ '^([2-9]|1[0-9]|2[0-4]) months$') is not true then array[
        '.period',
        'must be in_flight, minute, hour, day, week, month, year, lifetime, or 2 to 366 minutes, hours, days or weeks, or 2 to 24 months, '
        'like "5 hours"'
      ]
      when coalesce(v_limit ->> 'starts', '') not in ('calendar', 'anchor', 'first_use', 'rolling') then
        array['.starts', 'must be calendar, anchor, first_use or rolling']
      when (((v_limit ->> 'starts') = 'calendar' and (v_limit ->> 'period') !~ ' ')
      or ((v_limit ->> 'starts') = 'anchor' and (v_limit ->> 'period') !~ '^(in_flight|lifetime)$')
      or ((v_limit ->> 'starts') = 'first_use' and (v_limit ->> 'period') !~ '^(in_flight|lifetime)$| months$')
      or ((v_limit ->> 'starts') = 'rolling' and (v_limit ->> 'period') !~ '^(in_flight|month|year|lifetime)$| months$')) is not true then array[
        '.starts',
        case
          when v_limit ->> 'period' in ('in_flight', 'lifetime') then
            'must be calendar where the period never begins again'
          when v_limit ->> 'period' ~ ' months$' then 'must be anchor where the period is several months'
          when v_limit ->> 'starts' = 'calendar' then
            'must be anchor, first_use or rolling where the period is several units'
          else 'must not be rolling where the period is a month or a year; use "30 days", for example'
        end
      ]
      when coalesce(v_limit ->> 'mode', '') not in ('enforce', 'observe') then
        array['.mode', 'must be enforce or observe']
      when (nullif(v_limit -> 'counts', 'null') is null or (
        jsonb_typeof(nullif(v_limit -> 'counts', 'null')) = 'object'
        and pg_column_size(nullif(v_limit -> 'counts', 'null')) < 4096
        and jsonb_array_length(jsonb_path_query_array(nullif(v_limit -> 'counts', 'null'), 'strict $.keyvalue()', '{}', true)) >= 1
        and jsonb_array_length(jsonb_path_query_array(nullif(v_limit -> 'counts', 'null'), 'strict $.keyvalue()', '{}', true)) <= 50
        and not jsonb_path_exists(
          nullif(v_limit -> 'counts', 'null'), 'strict $.keyvalue() ? (!(@.key like_regex "^[a-z][a-z0-9_]{0,31}$"))', '{}', true
        )
        and not jsonb_path_exists(nullif(v_limit -> 'counts', 'null'), 'strict $.* ? (@.type() != "number")', '{}', true)
        and not jsonb_path_exists(nullif(v_limit -> 'counts', 'null'), 'strict $.* ? (@ < 1 || @ > 1000000 || @.floor() != @)', '{}', true)
      )) is not true then array[
        '.counts',
        'must name 1 to 50 kinds with whole weights from 1 to 1000000, like {"image": 1, "video": 8}; null: no pool'
      ]
      when v_limit ->> 'period' = 'in_flight' and v_limit -> 'counts' <> 'null' then
        array['.counts', 'must be null where the period is in_flight, which counts the holds of its own kind']
      when (v_limit ->> 'scope' in ('group', 'child', 'member')) is not true then array['.scope', 'must be group, child or member']
      when jsonb_typeof(v_limit -> 'max') = 'null' then null
      when
        case
          when jsonb_typeof(v_limit -> 'max') <> 'number' then false
          else (v_limit ->> 'max')::numeric between 0 and 1000000000000000
            and (v_limit ->> 'max')::numeric = trunc((v_limit ->> 'max')::numeric)
        end is not true
        then array['.max', 'must be a whole number from 0 to 1000000000000000, or null: unlimited']
    end;
    v_identity := concat_ws(
      ' ', v_limit ->> 'kind', v_limit ->> 'period', v_limit ->> 'starts', v_limit ->> 'scope'
    );
    if v_wrong is null and v_seen ? v_identity then
      v_wrong := array['', 'must be there once'];
    end if;
    if v_wrong is not null then
      v_field := format('limits[%s]%s', v_index, v_wrong[1]);
      perform tokenlimits.refuse(
        'TL001',
        format('%s: %s: %s', v_field, v_wrong[2], left(v_limit::text, 200)),
        v_field,
        'A limit is {"kind": "image", "period": "day", "scope": "member", "max": 50}; max may be null. Nothing was saved.'
      );
    end if;
    v_seen := v_seen || jsonb_build_object(v_identity, true);
  end loop;
end
$$;

comment on function tokenlimits.check_limits(jsonb)
is 'tokenlimits: Refuses limits that are not valid, before anything is written.';

revoke execute on function tokenlimits.check_limits(jsonb)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.check_limits(jsonb)
to authenticated, service_role;

-- Writes only what differs, so that unchanged limits keep their counters.
create or replace function tokenlimits.replace_limits(p_group_id uuid, p_limits jsonb)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  perform
  from public.group_limits as l
  where l.group_id = p_group_id
  order by l.kind, l.period, l.starts, l.scope
  for update;
  delete from public.group_limits as l
  where
    l.group_id = p_group_id
    and not exists (
      select
      from jsonb_array_elements(p_limits) as e
      cross join lateral jsonb_to_record(tokenlimits.whole_limit(e.value)) as n (kind text, period text, starts text, scope text, mode text, max numeric, counts jsonb)
      where (n.kind, n.period, n.starts, n.scope) = (l.kind, l.period, l.starts, l.scope)
    );
  insert into public.group_limits as l (group_id, kind, period, starts, scope, mode, max, counts)
  select p_group_id, n.kind, n.period, n.starts, n.scope, n.mode, n.max::bigint, nullif(n.counts, 'null')
  from jsonb_array_elements(p_limits) as e
  cross join lateral jsonb_to_record(tokenlimits.whole_limit(e.value)) as n (kind text, period text, starts text, scope text, mode text, max numeric, counts jsonb)
  on conflict on constraint group_limits_key do update
  set max = excluded.max, mode = excluded.mode, counts = excluded.counts
  where (l.max, l.mode, l.counts) is distinct from (excluded.max, excluded.mode, excluded.counts);
end
$$;

comment on function tokenlimits.replace_limits(uuid, jsonb)
is 'tokenlimits: Makes a group''s limits these.';

revoke execute on function tokenlimits.replace_limits(uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.replace_limits(uuid, jsonb)
to authenticated, service_role;

create or replace function tokenlimits.insert_group(
  p_id uuid,
  p_name text,
  p_description text,
  p_priority integer,
  p_timezone text,
  p_is_default boolean,
  p_anchor_at timestamptz,
  p_parent_id uuid,
  p_is_spread boolean
)
returns public.user_groups
language plpgsql
volatile
-- definer: callers may not set ids
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group public.user_groups;
  v_constraint text;
begin
  perform tokenlimits.require_admin();
  -- pages begin after the nil UUID, so they would leave this group out
  if p_id = '00000000-0000-0000-0000-000000000000' then
    perform tokenlimits.refuse('TL001', 'id: must not be the nil UUID', 'id', 'Choose an id that was never used.');
  end if;
  if p_parent_id is not null and not exists (select from public.user_groups as g where g.id = p_parent_id) then
    perform tokenlimits.refuse_parent(format('there is no group %s', p_parent_id));
  end if;
  if p_id is not null then
    -- whoever has or had this id is in the tree; who is about to use it is waited for
    insert into tokenlimits.group_tree (group_id, above_id, distance, level)
    values (p_id, p_id, 0, 0);
    if not found then
      perform tokenlimits.refuse_id(p_id);
    end if;
  end if;
  insert into public.user_groups as g (
    id, name, description, priority, timezone, is_default, anchor_at, parent_id, is_spread,
    created_at
  )
  values (
    coalesce(p_id, gen_random_uuid()), p_name, coalesce(p_description, ''), coalesce(p_priority, 0),
    coalesce(p_timezone, 'UTC'), coalesce(p_is_default, false), p_anchor_at, p_parent_id,
    coalesce(p_is_spread, false), tokenlimits.clock()
  )
  returning * into v_group;
  -- the ledger may be older than this installation; its rows would become this group's usage
  if p_id is not null and exists (select from public.generation_usage as u where u.group_id = p_id) then
    perform tokenlimits.refuse_id(p_id);
  end if;
  return v_group;
exception
  when unique_violation then
    get stacked diagnostics v_constraint = constraint_name;
    if v_constraint = 'group_tree_pkey' then
      perform tokenlimits.refuse_id(p_id);
    end if;
    raise;
end
$$;

comment on function tokenlimits.insert_group(
  uuid,
  text,
  text,
  integer,
  text,
  boolean,
  timestamptz,
  uuid,
  boolean
)
is 'tokenlimits: Makes a group, with an id of its own where none is given.';

revoke execute on function tokenlimits.insert_group(
  uuid,
  text,
  text,
  integer,
  text,
  boolean,
  timestamptz,
  uuid,
  boolean
)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.insert_group(
  uuid,
  text,
  text,
  integer,
  text,
  boolean,
  timestamptz,
  uuid,
  boolean
)
to authenticated, service_role;

create or replace function public.save_group(
  p_group_id uuid default null,
  p_name text default null,
  p_description text default null,
  p_priority integer default null,
  p_timezone text default null,
  p_is_default boolean default null,
  p_limits jsonb default null,
  p_id uuid default null,
  p_updated_at timestamptz default null,
  p_anchor_at timestamptz default null,
  p_no_anchor boolean default false,
  p_parent_id uuid default null,
  p_no_parent boolean default false,
  p_is_spread boolean default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group public.user_groups;
  v_limits jsonb := case jsonb_typeof(p_limits) when 'string' then (p_limits #>> '{}')::jsonb else p_limits end;
begin
  perform tokenlimits.require_admin();
  if v_limits is not null then
    perform tokenlimits.check_limits(v_limits);
  end if;
  if p_no_anchor and p_anchor_at is not null then
    perform tokenlimits.refuse('TL001', 'anchor_at: pass an anchor, or p_no_anchor, not both', 'anchor_at');
  elsif p_no_parent and p_parent_id is not null then
    perform tokenlimits.refuse('TL001', 'parent_id: pass a parent, or p_no_parent, not both', 'parent_id');
  end if;
  if p_group_id is not null then
    if p_id is not null then
      perform tokenlimits.refuse('TL001', 'id: is for a new group; group_id names an existing one', 'id');
    end if;
    v_group := tokenlimits.require_group(p_group_id);
    if v_group.is_spread <> p_is_spread then
      perform tokenlimits.refuse(
        'TL001', 'is_spread: is chosen when a group is created', 'is_spread', 'Create another group. Nothing was saved.'
      );
    end if;
    if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
      perform tokenlimits.refuse_transaction();
    end if;
    if p_parent_id is not null and not exists (select from public.user_groups as g where g.id = p_parent_id) then
      perform tokenlimits.refuse_parent(format('there is no group %s', p_parent_id));
    end if;
    if p_parent_id is not null or p_no_parent then
      -- in one order, or two moves could deadlock; and before the tree
      perform
      from public.user_groups as g
      where g.id in (p_group_id, p_parent_id)
      order by g.id
      for no key update;
    end if;
    if p_updated_at is not null then
      -- locked first, or two who read the same could both pass
      select g.* into v_group
      from public.user_groups as g
      where g.id = p_group_id
      for no key update;
      if v_group.updated_at is distinct from p_updated_at then
        perform tokenlimits.refuse(
          'TL011',
          format('the group %L was changed meanwhile', v_group.name),
          to_json(v_group.updated_at) #>> '{}',
          'Read it again, and decide whether your change still fits. Nothing was saved.'
        );
      end if;
    end if;
  end if;
  if p_is_default then
    -- one default group at a time; the stripes of groups are 0 to 255
    perform pg_advisory_xact_lock(1953459052, 256);
    update public.user_groups as g
    set is_default = false
    where g.is_default and g.id is distinct from p_group_id;
  end if;
  begin
    if p_group_id is null then
      v_group := tokenlimits.insert_group(
        p_id, p_name, p_description, p_priority, p_timezone, p_is_default, p_anchor_at, p_parent_id,
        p_is_spread
      );
    else
      update public.user_groups as g
      set
        name = coalesce(p_name, g.name),
        description = coalesce(p_description, g.description),
        priority = coalesce(p_priority, g.priority),
        timezone = coalesce(p_timezone, g.timezone),
        is_default = coalesce(p_is_default, g.is_default),
        anchor_at = case when p_no_anchor then null else coalesce(p_anchor_at, g.anchor_at) end,
        parent_id = case when p_no_parent then null else coalesce(p_parent_id, g.parent_id) end
      where g.id = p_group_id
      returning * into v_group;
    end if;
  exception
    when unique_violation then
      perform tokenlimits.refuse(
        'TL003',
        format('a group named %L already exists', normalize(
          btrim(
            p_name,
            e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
          ),
          nfc
        )),
        normalize(
          btrim(
            p_name,
            e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
          ),
          nfc
        ),
        'Names are unique regardless of case. Nothing was saved.'
      );
  end;
  if v_limits is not null then
    perform tokenlimits.replace_limits(v_group.id, v_limits);
  end if;
  return tokenlimits.group_json(v_group);
end
$$;

comment on function public.save_group(
  uuid,
  text,
  text,
  integer,
  text,
  boolean,
  jsonb,
  uuid,
  timestamptz,
  timestamptz,
  boolean,
  uuid,
  boolean,
  boolean
)
is 'tokenlimits: Creates a group (with the id p_id, which was never used before; with p_is_spread, its usage is at '
'home with its users), or changes the non-null fields of an existing group, with its whole set of limits, in one '
'step. With p_parent_id, it is beneath that group, with all beneath it; with p_no_parent, beneath none. With '
'p_no_anchor, it has no anchor any more. With p_updated_at, only if nobody has changed it since.';

revoke execute on function public.save_group(
  uuid,
  text,
  text,
  integer,
  text,
  boolean,
  jsonb,
  uuid,
  timestamptz,
  timestamptz,
  boolean,
  uuid,
  boolean,
  boolean
)
from public, anon, authenticated, service_role;

grant execute on function public.save_group(
  uuid,
  text,
  text,
  integer,
  text,
  boolean,
  jsonb,
  uuid,
  timestamptz,
  timestamptz,
  boolean,
  uuid,
  boolean,
  boolean
)
to authenticated, service_role;

create or replace function public.set_group_limit(p_group_id uuid, p_limit jsonb)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_limit jsonb := case jsonb_typeof(p_limit) when 'string' then (p_limit #>> '{}')::jsonb else p_limit end;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_limits(jsonb_build_array(v_limit));
  perform tokenlimits.require_group(p_group_id);
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  update public.user_groups as g
  set name = g.name
  where g.id = p_group_id;
  insert into public.group_limits as l (group_id, kind, period, starts, scope, mode, max, counts)
  select p_group_id, n.kind, n.period, n.starts, n.scope, n.mode, n.max::bigint, nullif(n.counts, 'null')
  from jsonb_array_elements(jsonb_build_array(v_limit)) as e
  cross join lateral jsonb_to_record(tokenlimits.whole_limit(e.value)) as n (kind text, period text, starts text, scope text, mode text, max numeric, counts jsonb)
  on conflict on constraint group_limits_key do update
  set max = excluded.max, mode = excluded.mode, counts = excluded.counts
  where (l.max, l.mode, l.counts) is distinct from (excluded.max, excluded.mode, excluded.counts);
  return tokenlimits.group_json(tokenlimits.require_group(p_group_id));
end
$$;

comment on function public.set_group_limit(uuid, jsonb)
is 'tokenlimits: Adds one limit to a group, or changes its max, its mode or what it counts.';

revoke execute on function public.set_group_limit(uuid, jsonb)
from public, anon, authenticated, service_role;

grant execute on function public.set_group_limit(uuid, jsonb)
to authenticated, service_role;

create or replace function tokenlimits.refuse_several(p_scope text, p_kind text, p_fitting text[])
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(p_fitting) > 1 then
    perform tokenlimits.refuse(
      'TL001',
      format('period: %s has several limits on %s: %s', p_scope, p_kind, array_to_string(p_fitting, ', ')),
      'period',
      'Say which one by its period and starts. Nothing was changed.'
    );
  end if;
end
$$;

comment on function tokenlimits.refuse_several(text, text, text[])
is 'tokenlimits: Raises TL001 if a limit is named that could be one of several, each given by its period and where it '
'starts.';

revoke execute on function tokenlimits.refuse_several(text, text, text[])
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.refuse_several(text, text, text[])
to authenticated, service_role;

create or replace function tokenlimits.require_user(p_user_id uuid)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_user_id is not null and not exists (select from tokenlimits.users(array[p_user_id])) then
    perform tokenlimits.refuse(
      'TL004', format('there is no user %s', p_user_id), p_user_id::text, 'Find the id with find_users.'
    );
  end if;
end
$$;

comment on function tokenlimits.require_user(uuid)
is 'tokenlimits: Raises TL004 if there is no such user.';

revoke execute on function tokenlimits.require_user(uuid)
from public, anon, authenticated, service_role;

create or replace function public.remove_group_limit(
  p_group_id uuid,
  p_kind text,
  p_period text default null,
  p_scope text default 'group',
  p_starts text default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fitting text[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  update public.user_groups as g
  set name = g.name
  where g.id = p_group_id;
  select array_agg(l.period || ' ' || l.starts order by array_position(
    array['in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime'], regexp_replace(l.period, '^[0-9]+ |s$', '', 'g')
  ), length(l.period), l.period, l.starts) into v_fitting
  from public.group_limits as l
  where l.group_id = p_group_id and l.kind = p_kind and l.scope = p_scope
    and (p_period is null or l.period = p_period)
    and (p_starts is null or l.starts = p_starts);
  perform tokenlimits.refuse_several(p_scope, p_kind, v_fitting);
  delete from public.group_limits as l
  where l.group_id = p_group_id and l.kind = p_kind and l.scope = p_scope
    and (p_period is null or l.period = p_period)
    and (p_starts is null or l.starts = p_starts);
  return tokenlimits.group_json(tokenlimits.require_group(p_group_id));
end
$$;

comment on function public.remove_group_limit(uuid, text, text, text, text)
is 'tokenlimits: Removes one limit of a group, named by as much as tells it from others; a missing limit is no error.';

revoke execute on function public.remove_group_limit(uuid, text, text, text, text)
from public, anon, authenticated, service_role;

grant execute on function public.remove_group_limit(uuid, text, text, text, text)
to authenticated, service_role;

create or replace function public.delete_group(p_group_id uuid)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group jsonb;
  v_children bigint;
begin
  perform tokenlimits.require_admin();
  v_group := tokenlimits.group_json(tokenlimits.require_group(p_group_id));
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  -- a group that is just put beneath it is waited for
  perform from public.user_groups as g where g.id = p_group_id for update;
  v_children := (select count(*) from public.user_groups as g where g.parent_id = p_group_id);
  if v_children > 0 then
    perform tokenlimits.refuse(
      'TL001',
      format('group_id: has %s child %s', v_children, case v_children when 1 then 'group' else 'groups' end),
      'group_id',
      'Delete or move them first. Nothing was deleted.'
    );
  end if;
  delete from public.user_groups as g where g.id = p_group_id;
  return v_group;
end
$$;

comment on function public.delete_group(uuid)
is 'tokenlimits: Deletes a group that has none beneath it, with its limits and memberships; the ledger stays.';

revoke execute on function public.delete_group(uuid)
from public, anon, authenticated, service_role;

grant execute on function public.delete_group(uuid)
to authenticated, service_role;

create or replace function public.find_groups(
  p_group_id uuid default null,
  p_name text default null,
  p_search text default null,
  p_after text default null,
  p_page_size integer default 200,
  p_parent_id uuid default null
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  return coalesce((
    select jsonb_agg(tokenlimits.group_json(page.g) order by lower((page.g).name))
    from (
      select g
      from public.user_groups as g
      where
        (p_group_id is null or g.id = p_group_id)
        and (p_parent_id is null or g.parent_id = p_parent_id)
        and (p_name is null or lower(g.name) = lower(normalize(
          btrim(
            p_name,
            e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
          ),
          nfc
        )))
        and (p_search is null or strpos(lower(g.name), lower(normalize(
          btrim(
            p_search,
            e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
          ),
          nfc
        ))) > 0)
        -- no name is empty; "p_after is null or" would read the earlier pages too
        and lower(g.name) > lower(coalesce(p_after, ''))
      order by lower(g.name)
      limit least(greatest(p_page_size, 1), 500)
    ) as page
  ), '[]');
end
$$;

comment on function public.find_groups(uuid, text, text, text, integer, uuid)
is 'tokenlimits: Groups with their limits: by id, by name, or all whose name contains a text, or that are directly '
'beneath a group; the page after a name, ordered by name.';

revoke execute on function public.find_groups(uuid, text, text, text, integer, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.find_groups(uuid, text, text, text, integer, uuid)
to authenticated, service_role;

create or replace function tokenlimits.add_group_members(
  p_group_id uuid,
  p_user_ids uuid[],
  p_anchor_at timestamptz
)
returns jsonb
language plpgsql
volatile
-- definer: users are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_known uuid[];
  v_added bigint;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  if p_user_ids is null or array_position(p_user_ids, null) is not null then
    perform tokenlimits.refuse('TL001', 'user_ids: must be an array of ids', 'user_ids');
  end if;
  v_known := array(select u.id from tokenlimits.users(p_user_ids) as u order by u.id);
  insert into public.group_memberships as m (group_id, user_id, joined_at, anchor_at)
  select p_group_id, k.id, tokenlimits.clock(), p_anchor_at
  from unnest(v_known) as k (id)
  on conflict on constraint group_memberships_pkey do nothing;
  get diagnostics v_added = row_count;
  return jsonb_build_object(
    'added', v_added,
    'already', cardinality(v_known) - v_added,
    'unknown', to_jsonb(array(
      select distinct p.id
      from unnest(p_user_ids) as p (id)
      where p.id <> all(v_known)
    ))
  );
end
$$;

create or replace function public.add_group_members(
  p_group_id uuid,
  p_user_ids uuid[],
  p_anchor_at timestamptz default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.add_group_members(
    p_group_id,
    p_user_ids,
    p_anchor_at
  );
end
$$;

comment on function public.add_group_members(uuid, uuid[], timestamptz)
is 'tokenlimits: Adds users to a group, their anchored periods counted from a moment; returns how many were added, how '
'many were already members, and which ids are unknown.';

revoke execute on function public.add_group_members(uuid, uuid[], timestamptz)
from public, anon, authenticated, service_role;

grant execute on function public.add_group_members(uuid, uuid[], timestamptz)
to authenticated, service_role;

comment on function tokenlimits.add_group_members(uuid, uuid[], timestamptz)
is 'tokenlimits: The private half of public.add_group_members.';

revoke execute on function tokenlimits.add_group_members(uuid, uuid[], timestamptz)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.add_group_members(uuid, uuid[], timestamptz)
to authenticated, service_role;

create or replace function tokenlimits.set_member_anchor(p_group_id uuid, p_user_id uuid, p_anchor_at timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: no client may update memberships
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  update public.group_memberships as m
  set anchor_at = p_anchor_at
  where m.group_id = p_group_id and m.user_id = p_user_id;
  return jsonb_build_object('set', found);
end
$$;

create or replace function public.set_member_anchor(
  p_group_id uuid,
  p_user_id uuid,
  p_anchor_at timestamptz default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.set_member_anchor(
    p_group_id,
    p_user_id,
    p_anchor_at
  );
end
$$;

comment on function public.set_member_anchor(uuid, uuid, timestamptz)
is 'tokenlimits: Sets the moment from which a member''s anchored periods are counted; null: from joined_at. False when '
'the user is not in the group.';

revoke execute on function public.set_member_anchor(uuid, uuid, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function public.set_member_anchor(uuid, uuid, timestamptz)
to authenticated, service_role;

comment on function tokenlimits.set_member_anchor(uuid, uuid, timestamptz)
is 'tokenlimits: The private half of public.set_member_anchor.';

revoke execute on function tokenlimits.set_member_anchor(uuid, uuid, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.set_member_anchor(uuid, uuid, timestamptz)
to authenticated, service_role;

create or replace function public.remove_group_members(p_group_id uuid, p_user_ids uuid[])
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_removed bigint;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  delete from public.group_memberships as m
  where m.group_id = p_group_id and m.user_id = any(p_user_ids);
  get diagnostics v_removed = row_count;
  return jsonb_build_object('removed', v_removed);
end
$$;

comment on function public.remove_group_members(uuid, uuid[])
is 'tokenlimits: Removes users from a group, and says how many were in it; their usage stays.';

revoke execute on function public.remove_group_members(uuid, uuid[])
from public, anon, authenticated, service_role;

grant execute on function public.remove_group_members(uuid, uuid[])
to authenticated, service_role;

create or replace function public.move_group_member(p_user_id uuid, p_from uuid, p_to uuid)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_moved boolean;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_from);
  perform tokenlimits.require_group(p_to);
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  -- in one order, not one group after the other
  perform tokenlimits.quiet_members(array[p_from, p_to]);
  delete from public.group_memberships as m
  where m.group_id = p_from and m.user_id = p_user_id and p_from <> p_to;
  v_moved := found;
  if v_moved then
    insert into public.group_memberships as m (group_id, user_id)
    values (p_to, p_user_id)
    on conflict on constraint group_memberships_pkey do nothing;
  end if;
  return jsonb_build_object('moved', v_moved);
end
$$;

comment on function public.move_group_member(uuid, uuid, uuid)
is 'tokenlimits: Moves a user from one group to another in one step; false when the user was not in the first.';

revoke execute on function public.move_group_member(uuid, uuid, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.move_group_member(uuid, uuid, uuid)
to authenticated, service_role;

create or replace function tokenlimits.reset_group_usage(p_group_id uuid, p_kind text, p_user_id uuid)
returns jsonb
language plpgsql
volatile
-- definer: resets are in a private table
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_at timestamptz;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  if not p_kind ~ '^[a-z][a-z0-9_]{0,31}$' then
    perform tokenlimits.refuse('TL001', 'kind: is not a kind of generation', 'kind');
  end if;
  perform tokenlimits.require_user(p_user_id);
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  perform from public.user_groups as g where g.id = p_group_id for no key update;
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  perform
  from public.group_limits as l
  where l.group_id = p_group_id
  order by l.kind, l.period, l.starts, l.scope
  for update;
  -- no call is between being judged and being recorded now, so each usage is recorded either before the reset or after
  perform tokenlimits.lock_groups(array[p_group_id], true);
  v_at := greatest(
    tokenlimits.clock(),
    (
      select max(l.created_at) + interval '1 microsecond'
      from unnest(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id)) as b (id)
      -- one look-up each
      cross join lateral (
        select u.created_at
        from public.generation_usage as u
        where u.group_id = b.id
        order by u.created_at desc
        limit 1
      ) as l
    )
  );
  insert into tokenlimits.usage_resets as r (group_id, kind, subject, reset_at)
  values (p_group_id, coalesce(p_kind, '*'), coalesce(p_user_id, p_group_id), v_at)
  on conflict on constraint usage_resets_pkey do update
  set reset_at = excluded.reset_at;
  if p_user_id is null then
    update public.group_limits as l
    set counter_id = default
    where l.group_id = p_group_id and l.scope <> 'child' and (p_kind is null or l.kind = p_kind);
    delete from tokenlimits.counters as c
    using public.group_limits as l, public.user_groups as g
    where
      g.id = p_group_id and l.group_id = g.parent_id and l.scope = 'child' and l.period <> 'in_flight'
      and (p_kind is null or l.kind = p_kind) and c.counter_id = l.counter_id and c.subject = p_group_id;
  else
    delete from tokenlimits.counters as c
    using public.group_limits as l
    where
      l.group_id = p_group_id and (p_kind is null or l.kind = p_kind)
      and l.scope = 'member' and c.counter_id = l.counter_id and c.subject = p_user_id;
  end if;
  return jsonb_build_object('reset_at', v_at);
end
$$;

create or replace function public.reset_group_usage(
  p_group_id uuid,
  p_kind text default null,
  p_user_id uuid default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.reset_group_usage(
    p_group_id,
    p_kind,
    p_user_id
  );
end
$$;

comment on function public.reset_group_usage(uuid, text, uuid)
is 'tokenlimits: Resets usage in the current periods of a group''s limits, and of its pools in limits of its parent, '
'of one kind or of all; with a user, of that member''s alone. The ledger keeps everything.';

revoke execute on function public.reset_group_usage(uuid, text, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.reset_group_usage(uuid, text, uuid)
to authenticated, service_role;

comment on function tokenlimits.reset_group_usage(uuid, text, uuid)
is 'tokenlimits: The private half of public.reset_group_usage.';

revoke execute on function tokenlimits.reset_group_usage(uuid, text, uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.reset_group_usage(uuid, text, uuid)
to authenticated, service_role;

create or replace function tokenlimits.group_members(p_group_id uuid, p_after uuid, p_page_size integer, p_search text)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search text := nullif(lower(btrim(p_search)), '');
  v_page_size integer := least(greatest(p_page_size, 1), 1000);
  v_user_ids uuid[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  v_user_ids := array(
    select m.user_id
    from public.group_memberships as m
    where
      m.group_id = p_group_id
      -- "p_after is null or" would read the earlier pages too
      and m.user_id >= coalesce(p_after, '00000000-0000-0000-0000-000000000000')
      and m.user_id is distinct from p_after
    order by m.user_id
    -- a search may have to read more than a page
    limit case when v_search is null then v_page_size end
  );
  if v_search is not null then
    -- a query of its own: joined to all members at once, a cached plan would compare each with each
    v_user_ids := array(
      select u.id
      from tokenlimits.users(v_user_ids) as u
      where strpos(lower(u.email), v_search) > 0
      order by u.id
      limit v_page_size
    );
  end if;
  return coalesce((
    select jsonb_agg(to_jsonb(page) order by page.user_id)
    from (
      select m.user_id, u.email, m.joined_at, m.anchor_at
      from public.group_memberships as m
      left join tokenlimits.users(v_user_ids) as u on u.id = m.user_id
      where
        m.group_id = p_group_id
        and m.user_id = any(v_user_ids)
      order by m.user_id
    ) as page
  ), '[]');
end
$$;

create or replace function public.group_members(
  p_group_id uuid,
  p_after uuid default null,
  p_page_size integer default 500,
  p_search text default null
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.group_members(
    p_group_id,
    p_after,
    p_page_size,
    p_search
  );
end
$$;

comment on function public.group_members(uuid, uuid, integer, text)
is 'tokenlimits: A group''s members, or those whose e-mail address contains a text: the page after a user id, ordered '
'by id.';

revoke execute on function public.group_members(uuid, uuid, integer, text)
from public, anon, authenticated, service_role;

grant execute on function public.group_members(uuid, uuid, integer, text)
to authenticated, service_role;

comment on function tokenlimits.group_members(uuid, uuid, integer, text)
is 'tokenlimits: The private half of public.group_members.';

revoke execute on function tokenlimits.group_members(uuid, uuid, integer, text)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.group_members(uuid, uuid, integer, text)
to authenticated, service_role;

create or replace function tokenlimits.find_users(p_email text, p_page_size integer)
returns jsonb
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  return coalesce((
    select jsonb_agg(to_jsonb(page) order by page.email)
    from (
      select u.id as user_id, u.email
      from auth.users as u
      where strpos(lower(u.email), lower(btrim(p_email))) > 0
      order by u.email
      limit least(greatest(p_page_size, 1), 200)
    ) as page
  ), '[]');
end
$$;

create or replace function public.find_users(
  p_email text,
  p_page_size integer default 20
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.find_users(
    p_email,
    p_page_size
  );
end
$$;

comment on function public.find_users(text, integer)
is 'tokenlimits: Users whose e-mail address contains a text, regardless of case.';

revoke execute on function public.find_users(text, integer)
from public, anon, authenticated, service_role;

grant execute on function public.find_users(text, integer)
to authenticated, service_role;

comment on function tokenlimits.find_users(text, integer)
is 'tokenlimits: The private half of public.find_users.';

revoke execute on function tokenlimits.find_users(text, integer)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.find_users(text, integer)
to authenticated, service_role;

-- 82_overrides.sql

-- Overrides: another max of one limit for one member or child group, or of a group limit, perhaps until a moment.
--
-- Invariants
--   * An override names its limit by (kind, period, starts, scope). While there is no such limit, it sleeps.
--   * Usage doesn't change. What is in force is computed from the time alone: when an override ends, no job runs.
--   * The subject's counter says it too, so a call reads nothing else. A trigger keeps both equal, also if an admin
--     edits the table.
create or replace function tokenlimits.override_json(p_override public.limit_overrides, p_email text)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object(
    'id', p_override.id,
    'group_id', p_override.group_id,
    'kind', p_override.kind,
    'period', p_override.period,
    'starts', p_override.starts,
    'scope', p_override.scope,
    'user_id', case p_override.scope when 'member' then p_override.subject end,
    'email', p_email,
    'child_id', case p_override.scope when 'child' then p_override.subject end,
    'child_name', (
      select g.name from public.user_groups as g where g.id = p_override.subject and p_override.scope = 'child'
    ),
    'max', p_override.max,
    'until', p_override.until,
    'status', case
      when p_override.until <= tokenlimits.clock() then 'ended'
      when exists (
        select
        from public.group_limits as l
        where l.group_id = p_override.group_id and l.kind = p_override.kind
        and l.period = p_override.period and l.starts = p_override.starts
        and l.scope = p_override.scope
      ) and (p_override.scope <> 'child' or exists (
        select from public.user_groups as g where g.id = p_override.subject and g.parent_id = p_override.group_id
      )) then 'active'
      else 'sleeping'
    end,
    'created_at', p_override.created_at
  );
end
$$;

comment on function tokenlimits.override_json(public.limit_overrides, text)
is 'tokenlimits: An override, as clients see it.';

revoke execute on function tokenlimits.override_json(public.limit_overrides, text)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.require_one_subject(p_user_id uuid, p_child_id uuid)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_user_id is not null and p_child_id is not null then
    perform tokenlimits.refuse('TL001', 'child_id: name a user or a child group, not both', 'child_id');
  end if;
end
$$;

comment on function tokenlimits.require_one_subject(uuid, uuid)
is 'tokenlimits: Raises TL001 if both a user and a child group are named.';

revoke execute on function tokenlimits.require_one_subject(uuid, uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.require_one_subject(uuid, uuid)
to authenticated, service_role;

create or replace function tokenlimits.require_child(p_group_id uuid, p_user_id uuid, p_child_id uuid)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_one_subject(p_user_id, p_child_id);
  if p_child_id is not null and (tokenlimits.require_group(p_child_id)).parent_id is distinct from p_group_id then
    perform tokenlimits.refuse(
      'TL001', format('child_id: %s is not directly beneath the group', p_child_id), 'child_id', 'Nothing was saved.'
    );
  end if;
end
$$;

comment on function tokenlimits.require_child(uuid, uuid, uuid)
is 'tokenlimits: Raises TL001 or TL002 unless a child group, if named, is a group''s.';

revoke execute on function tokenlimits.require_child(uuid, uuid, uuid)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.set_limit_override(
  p_group_id uuid,
  p_kind text,
  p_max bigint,
  p_user_id uuid,
  p_period text,
  p_starts text,
  p_until timestamptz,
  p_child_id uuid
)
returns jsonb
language plpgsql
volatile
-- definer: users are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_scope constant text := case when p_child_id is not null then 'child' when p_user_id is not null then 'member' else 'group' end;
  v_limits public.group_limits[];
  v_override public.limit_overrides;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.require_user(p_user_id);
  perform tokenlimits.require_child(p_group_id, p_user_id, p_child_id);
  if p_max not between 0 and 1000000000000000 then
    perform tokenlimits.refuse(
      'TL001', 'max: must be from 0 to 1000000000000000, or null', 'max', 'Nothing was saved.'
    );
  elsif p_until <= tokenlimits.clock() or not (p_until >= '1970-01-01 00:00:00+00' and p_until < '9999-01-01 00:00:00+00') then
    perform tokenlimits.refuse('TL001', 'until: must be in the future', 'until', 'Nothing was saved.');
  end if;
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  update public.user_groups as g
  set name = g.name
  where g.id = p_group_id;
  v_limits := array(
    select row(l.*)::public.group_limits
    from public.group_limits as l
    where l.group_id = p_group_id and l.kind = p_kind and l.scope = v_scope
    and (p_period is null or l.period = p_period)
    and (p_starts is null or l.starts = p_starts)
    order by array_position(
      array['in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime'], regexp_replace(l.period, '^[0-9]+ |s$', '', 'g')
    ), length(l.period), l.period, l.starts
  );
  if v_limits = '{}' then
    perform tokenlimits.refuse(
      'TL001',
      format('kind: there is no such %s limit on %s', v_scope, p_kind),
      'kind',
      case when v_scope = 'group' then 'For a member limit, name the user; for a child limit, the child. ' else '' end
      || 'Nothing was saved.'
    );
  end if;
  perform tokenlimits.refuse_several(
    v_scope, p_kind, array(select l.period || ' ' || l.starts from unnest(v_limits) as l)
  );
  insert into public.limit_overrides as o (
    group_id, kind, period, starts, scope, subject, max, until, created_at
  )
  values (
    p_group_id, p_kind, v_limits[1].period, v_limits[1].starts, v_scope,
    coalesce(p_child_id, p_user_id, p_group_id), p_max, p_until, tokenlimits.clock()
  )
  on conflict on constraint limit_overrides_key do update
  set max = excluded.max, until = excluded.until, created_at = excluded.created_at
  returning * into v_override;
  return tokenlimits.override_json(
    v_override, (select u.email from tokenlimits.users(array[p_user_id]) as u)
  );
end
$$;

create or replace function public.set_limit_override(
  p_group_id uuid,
  p_kind text,
  p_max bigint,
  p_user_id uuid default null,
  p_period text default null,
  p_starts text default null,
  p_until timestamptz default null,
  p_child_id uuid default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.set_limit_override(
    p_group_id,
    p_kind,
    p_max,
    p_user_id,
    p_period,
    p_starts,
    p_until,
    p_child_id
  );
end
$$;

comment on function public.set_limit_override(uuid, text, bigint, uuid, text, text, timestamptz, uuid)
is 'tokenlimits: Replaces the max of one limit for one member or child group, or of a group limit, perhaps until a '
'moment; null: unlimited.';

revoke execute on function public.set_limit_override(uuid, text, bigint, uuid, text, text, timestamptz, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.set_limit_override(uuid, text, bigint, uuid, text, text, timestamptz, uuid)
to authenticated, service_role;

comment on function tokenlimits.set_limit_override(uuid, text, bigint, uuid, text, text, timestamptz, uuid)
is 'tokenlimits: The private half of public.set_limit_override.';

revoke execute on function tokenlimits.set_limit_override(uuid, text, bigint, uuid, text, text, timestamptz, uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.set_limit_override(uuid, text, bigint, uuid, text, text, timestamptz, uuid)
to authenticated, service_role;

create or replace function public.remove_limit_override(
  p_group_id uuid,
  p_kind text,
  p_user_id uuid default null,
  p_period text default null,
  p_starts text default null,
  p_child_id uuid default null
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_scope constant text := case when p_child_id is not null then 'child' when p_user_id is not null then 'member' else 'group' end;
  v_fitting text[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.require_one_subject(p_user_id, p_child_id);
  if current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery() then
    perform tokenlimits.refuse_transaction();
  end if;
  update public.user_groups as g
  set name = g.name
  where g.id = p_group_id;
  select array_agg(o.period || ' ' || o.starts order by array_position(
    array['in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime'], regexp_replace(o.period, '^[0-9]+ |s$', '', 'g')
  ), length(o.period), o.period, o.starts) into v_fitting
  from public.limit_overrides as o
  where o.group_id = p_group_id and o.kind = p_kind and o.scope = v_scope
    and (p_period is null or o.period = p_period)
    and (p_starts is null or o.starts = p_starts) and o.subject = coalesce(p_child_id, p_user_id, p_group_id);
  perform tokenlimits.refuse_several(v_scope, p_kind, v_fitting);
  delete from public.limit_overrides as o
  where o.group_id = p_group_id and o.kind = p_kind and o.scope = v_scope
    and (p_period is null or o.period = p_period)
    and (p_starts is null or o.starts = p_starts) and o.subject = coalesce(p_child_id, p_user_id, p_group_id);
  return jsonb_build_object('removed', found);
end
$$;

comment on function public.remove_limit_override(uuid, text, uuid, text, text, uuid)
is 'tokenlimits: Ends an override, so that the limit''s own max applies again; says whether there was one.';

revoke execute on function public.remove_limit_override(uuid, text, uuid, text, text, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.remove_limit_override(uuid, text, uuid, text, text, uuid)
to authenticated, service_role;

create or replace function tokenlimits.find_limit_overrides(
  p_group_id uuid,
  p_user_id uuid,
  p_after uuid,
  p_page_size integer,
  p_child_id uuid
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_overrides public.limit_overrides[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.require_one_subject(p_user_id, p_child_id);
  v_overrides := array(
    select row(o.*)::public.limit_overrides
    from public.limit_overrides as o
    where
      o.group_id = p_group_id
      and (p_user_id is null or (o.scope = 'member' and o.subject = p_user_id))
      and (p_child_id is null or (o.scope = 'child' and o.subject = p_child_id))
      and (p_after is null or o.id > p_after)
    order by o.id
    limit least(greatest(p_page_size, 1), 1000)
  );
  return coalesce((
    select jsonb_agg(tokenlimits.override_json(row(o.*)::public.limit_overrides, u.email) order by o.id)
    from unnest(v_overrides) as o
    left join tokenlimits.users(
      array(select s.subject from unnest(v_overrides) as s where s.scope = 'member')
    ) as u on u.id = o.subject
  ), '[]');
end
$$;

create or replace function public.find_limit_overrides(
  p_group_id uuid,
  p_user_id uuid default null,
  p_after uuid default null,
  p_page_size integer default 500,
  p_child_id uuid default null
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.find_limit_overrides(
    p_group_id,
    p_user_id,
    p_after,
    p_page_size,
    p_child_id
  );
end
$$;

comment on function public.find_limit_overrides(uuid, uuid, uuid, integer, uuid)
is 'tokenlimits: The overrides of a group''s limits, or those of one user or child group: the page after an id, '
'ordered by id.';

revoke execute on function public.find_limit_overrides(uuid, uuid, uuid, integer, uuid)
from public, anon, authenticated, service_role;

grant execute on function public.find_limit_overrides(uuid, uuid, uuid, integer, uuid)
to authenticated, service_role;

comment on function tokenlimits.find_limit_overrides(uuid, uuid, uuid, integer, uuid)
is 'tokenlimits: The private half of public.find_limit_overrides.';

revoke execute on function tokenlimits.find_limit_overrides(uuid, uuid, uuid, integer, uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.find_limit_overrides(uuid, uuid, uuid, integer, uuid)
to authenticated, service_role;

-- 85_reports.sql

-- Usage for users and admins, and history.
--
-- Invariants
--   * Numbers come from counters and the rollup, never from scanning the ledger, so their cost doesn't grow.

create or replace function tokenlimits.user_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  return coalesce((
    select jsonb_agg(
      to_jsonb(row(
        s.kind, s.period, s.starts, s.scope, s.mode, s.max,
        s.used,
        case when s.max is not null then greatest((s.max - s.used - case
          when s.used > s.max then s.weight - 1
          else 0
        end) / s.weight, 0) end,
        nullif(coalesce(s.reset_at, s.until), 'infinity'), s.weight,
        case when s.group_id <> '00000000-0000-0000-0000-000000000000' then
          row(s.group_id, s.group_name)::tokenlimits.group_answer
        end
      )::tokenlimits.limit_answer)
      order by s.group_place, s.place
    )
    from (
      -- what two groups have above them is there once
      select distinct on (l.subject, l.counter_id) l.*, p.place as group_place
      from unnest(coalesce(
        nullif(array(
          select g.id
          from public.group_memberships as m
          inner join public.user_groups as g on g.id = m.group_id
          where m.user_id = p_user_id
          order by g.priority desc, m.joined_at, g.id
        ), '{}'),
        array(select d.id from public.user_groups as d where d.is_default)
      )) with ordinality as p (id, place)
      cross join lateral unnest(tokenlimits.limit_states(p.id, array[p_user_id], null, v_now))
      with ordinality as l (group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread, place)
      order by l.subject, l.counter_id, p.place
    ) as s
  ), '[]');
end
$$;

comment on function tokenlimits.user_usage(uuid)
is 'tokenlimits: Every limit that applies to a user, of their groups and those above, in the order in which groups '
'pay.';

revoke execute on function tokenlimits.user_usage(uuid)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.user_generation_usage(p_user_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_user_id is null then
    perform tokenlimits.refuse('TL001', 'user_id: is required', 'user_id');
  end if;
  return tokenlimits.user_usage(p_user_id);
end
$$;

create or replace function public.user_generation_usage(
  p_user_id uuid
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.user_generation_usage(
    p_user_id
  );
end
$$;

comment on function public.user_generation_usage(uuid)
is 'tokenlimits: Every limit that applies to a user: group, kind, period, scope, max, used, remaining, reset_at.';

revoke execute on function public.user_generation_usage(uuid)
from public, anon, authenticated, service_role;

grant execute on function public.user_generation_usage(uuid)
to service_role;

comment on function tokenlimits.user_generation_usage(uuid)
is 'tokenlimits: The private half of public.user_generation_usage.';

revoke execute on function tokenlimits.user_generation_usage(uuid)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.user_generation_usage(uuid)
to service_role;

create or replace function tokenlimits.my_generation_usage()
returns jsonb
language plpgsql
stable
-- definer: counters are private; it returns only the caller's own usage
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_user_id uuid := (select auth.uid());
begin
  if v_user_id is null then
    raise exception using
      errcode = '42501', message = 'no user is signed in', hint = 'Send the user''s access token.';
  end if;
  return tokenlimits.user_usage(v_user_id);
end
$$;

create or replace function public.my_generation_usage()
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.my_generation_usage();
end
$$;

comment on function public.my_generation_usage()
is 'tokenlimits: Every limit that applies to the signed-in user: group, kind, period, scope, max, used, remaining, '
'reset_at.';

revoke execute on function public.my_generation_usage()
from public, anon, authenticated, service_role;

grant execute on function public.my_generation_usage()
to authenticated;

comment on function tokenlimits.my_generation_usage()
is 'tokenlimits: The private half of public.my_generation_usage.';

revoke execute on function tokenlimits.my_generation_usage()
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.my_generation_usage()
to authenticated;

do $do$
begin
  if to_regtype('tokenlimits.group_usage_answer') is null then
    -- as clients see it
    create type tokenlimits.group_limit_answer as (
      kind text,
      period text,
      starts text,
      scope text,
      mode text,
      max bigint,
      used numeric,
      remaining numeric,
      reset_at timestamptz,
      weight bigint,
      capacity numeric,
      fraction numeric,
      "group" tokenlimits.group_answer
    );
    create type tokenlimits.group_usage_answer as (
      "group" tokenlimits.group_answer,
      member_count bigint,
      limits json,
      parent_id uuid,
      child_count bigint
    );
  end if;
end
$do$;

-- What is used of a group's limits that don't start by the calendar: its own, and those of its members and of members
-- beneath it, each in their own window, added up.
create or replace function tokenlimits.uncommon_usage(p_group_id uuid, p_at timestamptz)
returns table (counter_id bigint, used numeric, until timestamptz)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
  select s.counter_id, sum(s.used), case s.scope when 'group' then max(coalesce(s.reset_at, s.until)) end
  from unnest(tokenlimits.limit_states(
    p_group_id,
    array(
      select distinct m.user_id
      from tokenlimits.group_tree as t
      inner join public.group_memberships as m on m.group_id = t.group_id
      where t.above_id = p_group_id
    ),
    null,
    p_at
  )) as s
  where s.starts <> 'calendar' and s.group_id = p_group_id and s.scope <> 'child'
  group by s.counter_id, s.scope;
end
$$;

comment on function tokenlimits.uncommon_usage(uuid, timestamptz)
is 'tokenlimits: What is used of a group''s limits that don''t start by the calendar.';

revoke execute on function tokenlimits.uncommon_usage(uuid, timestamptz)
from public, anon, authenticated, service_role;

-- What members had used of a limit when their usage was reset, which their own counters no longer contain. Expired
-- holds among it were subtracted with all others.
create or replace function tokenlimits.used_before_resets(
  p_group_id uuid,
  p_kind text,
  p_counts jsonb,
  p_since timestamptz,
  p_at timestamptz
)
returns numeric
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group_ids uuid[] := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id);
begin
  return coalesce((
    select sum(
      tokenlimits.count_limit(v_group_ids, r.subject, p_kind, null, p_counts, p_since, r.reset_at)
      - tokenlimits.expired_of_limit(v_group_ids, r.subject, p_kind, null, p_counts, p_since, p_at)
      + tokenlimits.expired_of_limit(v_group_ids, r.subject, p_kind, null, p_counts, r.reset_at, p_at)
    )
    from (
      select q.subject, max(q.reset_at) as reset_at
      from tokenlimits.usage_resets as q
      where q.group_id = p_group_id and q.kind in (p_kind, '*') and q.subject <> p_group_id
      group by q.subject
    ) as r
    where r.reset_at > p_since
  ), 0);
end
$$;

comment on function tokenlimits.used_before_resets(uuid, text, jsonb, timestamptz, timestamptz)
is 'tokenlimits: What members had used of a limit in its current period when their usage was reset.';

revoke execute on function tokenlimits.used_before_resets(uuid, text, jsonb, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

-- A member limit is shown for the whole group: what all members used, of max times the number of members. All groups of
-- a page at once, since a dashboard asks for a thousand: what limit_states computes for one group, this computes for
-- all in one query. It returns json, which is only concatenated; jsonb would be rebuilt at every level.
create or replace function tokenlimits.group_usage(p_group_id uuid, p_after text, p_page_size integer)
returns json
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
-- the planner assumes that each step returns few rows, and would choose nested loops
set enable_nestloop = off
-- a plan for specific ids would read the statistics of each: half of the time for a thousand
set plan_cache_mode = force_generic_plan
-- the estimates are high, and compiling such a query for each call would take seconds
set jit = off
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_group_ids uuid[];
  v_nested_ids uuid[];
  v_any_expired boolean := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
  v_any_reset boolean := exists (select from tokenlimits.usage_resets as r where r.subject <> r.group_id);
begin
  perform tokenlimits.require_admin();
  if p_group_id is not null then
    v_group_ids := array[(tokenlimits.require_group(p_group_id)).id];
  else
    v_group_ids := array(
      select g.id
      from public.user_groups as g
      -- no name is empty; "p_after is null or" would read the earlier pages too
      where lower(g.name) > lower(coalesce(p_after, ''))
      order by lower(g.name)
      -- null: all
      limit case when p_page_size is not null then greatest(p_page_size, 1) end
    );
  end if;
  v_nested_ids := array(select g.id from public.user_groups as g where g.id = any(v_group_ids) and g.is_nested);
  return coalesce((
    -- "= any" in every step: each reads only these groups, not all
    with groups as materialized (
      select g.id, g.name, g.timezone, g.parent_id, p.place
      from public.user_groups as g
      inner join unnest(v_group_ids) with ordinality as p (id, place) on p.id = g.id
      where g.id = any(v_group_ids)
    ),

    members as materialized (
      select m.group_id, count(*) as members
      from public.group_memberships as m
      where m.group_id = any(v_group_ids)
      group by m.group_id
    ),

    children as materialized (
      select c.parent_id as group_id, count(*) as children
      from public.user_groups as c
      where c.parent_id = any(v_nested_ids)
      group by c.parent_id
    ),

    -- whom member limits of a group with others beneath it count
    reached as materialized (
      select t.above_id as group_id, count(distinct m.user_id) as members
      from tokenlimits.group_tree as t
      inner join public.group_memberships as m on m.group_id = t.group_id
      where t.above_id = any(v_nested_ids)
      group by t.above_id
    ),

    -- of the groups themselves, and of those who are members now
    overrides as materialized (
      select
        o.group_id, o.kind, o.period, o.starts, o.scope,
        count(*) as subjects, sum(o.max) as max, bool_or(o.max is null) as is_unlimited
      from public.limit_overrides as o
      where
        o.group_id = any(v_group_ids) and (o.until is null or o.until > v_now) and o.scope <> 'child'
        and (o.scope = 'group' or exists (
          select
          from tokenlimits.group_tree as t
          inner join public.group_memberships as m on m.group_id = t.group_id
          where t.above_id = o.group_id and m.user_id = o.subject
        ))
      group by o.group_id, o.kind, o.period, o.starts, o.scope
    ),

    limits as materialized (
      select
        l.group_id, l.kind, l.period, l.starts, l.scope, l.mode, l.counts, l.counter_id, g.timezone,
        case when l.scope = 'group' and o.subjects > 0 then o.max else l.max end as max,
        -- numeric: for many members, it exceeds a bigint
        case
          when o.is_unlimited then null
          when o.subjects = case l.scope when 'member' then coalesce(h.members, m.members) else 1 end then o.max
          else l.max::numeric * (
            case l.scope when 'member' then coalesce(h.members, m.members, 0) else 1 end - coalesce(o.subjects, 0)
          ) + coalesce(o.max, 0)
        end as capacity
      from public.group_limits as l
      inner join groups as g on g.id = l.group_id
      left join members as m on m.group_id = l.group_id
      left join reached as h on h.group_id = l.group_id
      left join overrides as o on o.group_id = l.group_id and o.kind = l.kind
      and o.period = l.period and o.starts = l.starts
      and o.scope = l.scope
      where l.group_id = any(v_group_ids) and l.scope <> 'child'
    ),

    periods as materialized (
      select k.period, k.timezone, tokenlimits.period_of(k.period, k.timezone, v_now) as range
      from (select distinct l.period, l.timezone from limits as l where l.starts = 'calendar') as k
    ),

    -- as in limit_states: an open counter says what is used; if a new period has begun since, nothing is used; null
    -- means that there is no counter. A group limit of the same period, if there is one, has counted what all members
    -- used together.
    states as (
      select
        l.*,
        case
          when c.until > v_now then c.since
          else greatest(lower(p.range), c.until, (
            select max(r.reset_at)
            from tokenlimits.usage_resets as r
            where r.group_id = l.group_id and r.kind in (l.kind, '*') and r.subject in (l.group_id, l.group_id)
          ))
        end as since,
        case when c.until > v_now then c.until else upper(p.range) end as until,
        case when c.until > v_now then c.used when c.until is not null then 0 end as used
      from limits as l
      inner join periods as p on p.period = l.period and p.timezone = l.timezone
      left join (
        select o.group_id, o.kind, o.period, o.counts, k.since, k.until, k.used
        from limits as o
        inner join tokenlimits.counters as k on k.subject = o.group_id and k.counter_id = o.counter_id
        where k.subject = any(v_group_ids) and o.scope = 'group' and o.starts = 'calendar'
      ) as c
        on c.group_id = l.group_id and c.kind = l.kind and c.period = l.period and c.counts is not distinct from l.counts
      where l.starts = 'calendar'
      -- each is worked out once, not wherever it is named below; to keep them all, as materialized does, costs more
      offset 0
    ),

    pools as materialized (
      select p.*, coalesce(p.reset_at, p.until) as ends_at
      from unnest(case when v_nested_ids <> '{}' then tokenlimits.child_pools(v_nested_ids, v_now) end) as p
    ),

    shown as (
      select
        c.group_id,
        json_agg(
          row(
            c.kind, c.period, c.starts, c.scope, c.mode, c.max, c.used,
            case when c.capacity is not null then greatest(c.capacity - c.used, 0) end,
            nullif(c.until, 'infinity'), 1, c.capacity,
            case
              when c.capacity > 0 then round(c.used / c.capacity, 6)
              -- a blocked limit is full; so is a member limit that was used in a group that has no members now
              when c.capacity = 0 then 1
            end,
            c.owner
          )::tokenlimits.group_limit_answer
          order by c.kind, c.scope = 'group', c.counter_id
        ) as limits
      from (
        select
          s.group_id, s.kind, s.period, s.starts, s.scope, s.mode, s.max, s.counter_id, s.capacity, s.until,
          null::tokenlimits.group_answer as owner,
          -- without a counter, the sum is computed as in count_usage; here, if the period consists of whole buckets
          coalesce(s.used, case
            when
              s.counts is null and s.period <> 'in_flight' and s.since = date_bin('15 minutes', s.since, '2000-01-01 00:00:00+00') and s.until = date_bin('15 minutes', s.until, '2000-01-01 00:00:00+00')
              and s.group_id <> all(v_nested_ids)
            then coalesce((
              select sum(r.cost)
              from tokenlimits.usage_rollup as r
              where r.group_id = s.group_id and r.kind = s.kind and r.bucket >= s.since and r.bucket < s.until
            ), 0)
            else tokenlimits.count_limit(
              array(select t.group_id from tokenlimits.group_tree as t where t.above_id = s.group_id), null, s.kind, s.period, s.counts, s.since, s.until
            )
          end)
          - case when v_any_expired
            then tokenlimits.expired_of_limit(
              array(select t.group_id from tokenlimits.group_tree as t where t.above_id = s.group_id), null, s.kind, s.period, s.counts, s.since, v_now
            )
            else 0
          end
          - case when v_any_reset and s.scope = 'member' and s.period <> 'in_flight'
            then tokenlimits.used_before_resets(s.group_id, s.kind, s.counts, s.since, v_now)
            else 0
          end as used
        from states as s
        union all
        select
          l.group_id, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counter_id, l.capacity, u.until, null,
          coalesce(u.used, 0)
        from (select distinct o.group_id from limits as o where o.starts <> 'calendar') as g
        inner join limits as l on l.group_id = g.group_id and l.starts <> 'calendar'
        left join lateral tokenlimits.uncommon_usage(g.group_id, v_now) as u on u.counter_id = l.counter_id
        union all
        -- a child's pool, as the child sees it
        select
          p.subject, p.kind, p.period, p.starts, p.scope, p.mode, p.max, p.counter_id, p.max, p.ends_at,
          row(p.group_id, p.group_name)::tokenlimits.group_answer, p.used
        from pools as p
        where p.subject = any(v_nested_ids)
        union all
        -- all pools, as the parent sees them
        select
          l.group_id, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counter_id,
          case when bool_and(p.max is not null or p.subject is null) then coalesce(sum(p.max), 0) end,
          case when l.starts = 'calendar' then max(p.until) end, null, coalesce(sum(p.used), 0)
        from public.group_limits as l
        left join pools as p on p.counter_id = l.counter_id
        where l.group_id = any(v_group_ids) and l.scope = 'child'
        group by l.id
      ) as c
      group by c.group_id
    )

    select json_agg(
      row(
        row(g.id, g.name)::tokenlimits.group_answer,
        coalesce(m.members, 0),
        coalesce(s.limits, '[]'),
        g.parent_id,
        coalesce(c.children, 0)
      )::tokenlimits.group_usage_answer
      order by g.place
    )
    from groups as g
    left join members as m on m.group_id = g.id
    left join children as c on c.group_id = g.id
    left join shown as s on s.group_id = g.id
  ), '[]');
end
$$;

create or replace function public.group_usage(
  p_group_id uuid default null,
  p_after text default null,
  p_page_size integer default null
)
returns json
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.group_usage(
    p_group_id,
    p_after,
    p_page_size
  );
end
$$;

comment on function public.group_usage(uuid, text, integer)
is 'tokenlimits: Usage of one group, of all, or of the page of groups after a name: used, capacity and reset_at of '
'each limit.';

revoke execute on function public.group_usage(uuid, text, integer)
from public, anon, authenticated, service_role;

grant execute on function public.group_usage(uuid, text, integer)
to authenticated, service_role;

comment on function tokenlimits.group_usage(uuid, text, integer)
is 'tokenlimits: The private half of public.group_usage.';

revoke execute on function tokenlimits.group_usage(uuid, text, integer)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.group_usage(uuid, text, integer)
to authenticated, service_role;

create or replace function tokenlimits.check_bucket(p_bucket text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_bucket is null or p_bucket not in ('hour', 'day', 'week', 'month') then
    perform tokenlimits.refuse('TL001', 'bucket: must be hour, day, week or month', 'bucket');
  end if;
end
$$;

comment on function tokenlimits.check_bucket(text)
is 'tokenlimits: Raises TL001 unless it is a step of the history.';

revoke execute on function tokenlimits.check_bucket(text)
from public, anon, authenticated, service_role;

-- A group that was deleted has lost its time zone too.
create or replace function tokenlimits.timezone_of(p_group_id uuid)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce((select g.timezone from public.user_groups as g where g.id = p_group_id), 'UTC');
end
$$;

comment on function tokenlimits.timezone_of(uuid)
is 'tokenlimits: The time zone in which a group''s periods begin.';

revoke execute on function tokenlimits.timezone_of(uuid)
from public, anon, authenticated, service_role;

create or replace function tokenlimits.generation_history(
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
set search_path = pg_catalog, pg_temp
as $$
declare
  v_timezone text := 'UTC';
  v_now timestamptz := tokenlimits.clock();
  v_until timestamptz := coalesce(p_until, 'infinity');
  v_since timestamptz := coalesce(p_since, coalesce(p_until, v_now) - interval '30 days');
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_bucket(p_bucket);
  if p_group_id is not null then
    v_timezone := (tokenlimits.require_group(p_group_id)).timezone;
  end if;
  -- whole buckets: the first is the one that contains p_since
  v_since := lower(tokenlimits.period_of(p_bucket, v_timezone, v_since));
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
        from (select r.group_id, r.kind, r.bucket, r.cost, r.generations
        from tokenlimits.usage_rollup as r
        union all
        select h.group_id, h.kind, date_bin('15 minutes', h.created_at, '2000-01-01 00:00:00+00'), -h.cost, -1
        from tokenlimits.holds as h
        where h.expires_at <= v_now) as q
        where
          (p_group_id is null or q.group_id = p_group_id)
          and (p_kind is null or q.kind = p_kind)
          and q.bucket >= v_since
          and q.bucket < v_until
        group by q.bucket, q.kind
      ) as r
      group by 1, 2
      having sum(r.generations) > 0
    ) as points
  ), '[]');
end
$$;

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
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.generation_history(
    p_group_id,
    p_kind,
    p_bucket,
    p_since,
    p_until
  );
end
$$;

comment on function public.generation_history(uuid, text, text, timestamptz, timestamptz)
is 'tokenlimits: Live usage per kind and bucket in a group''s time zone (of all groups, in UTC, if null); 30 days by '
'default.';

revoke execute on function public.generation_history(uuid, text, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function public.generation_history(uuid, text, text, timestamptz, timestamptz)
to authenticated, service_role;

comment on function tokenlimits.generation_history(uuid, text, text, timestamptz, timestamptz)
is 'tokenlimits: The private half of public.generation_history.';

revoke execute on function tokenlimits.generation_history(uuid, text, text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.generation_history(uuid, text, text, timestamptz, timestamptz)
to authenticated, service_role;

-- 86_export.sql

-- Export of the ledger or of its sums, page by page; top members.
--
-- Invariants
--   * A page reads a bounded number of rows, by an index, however rare the matching rows are: a short page is not the
--     end; a page without "next" is.
--   * Pages are ordered by columns that never change. Each usage that was committed before the first page, and created
--     before "until", is in exactly one page, as a row or in a sum.
-- A hold whose time is over has expired, whether it has been swept or not.
create or replace function tokenlimits.usage_json(p_usage public.generation_usage, p_email text)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object(
    'id', p_usage.id,
    'group', jsonb_build_object(
      'id', p_usage.group_id,
      'name', (select g.name from public.user_groups as g where g.id = p_usage.group_id)
    ),
    'user_id', p_usage.user_id,
    'email', p_email,
    'kind', p_usage.kind,
    'cost', p_usage.cost,
    'status', case when p_usage.status = 'reserved' and p_usage.expires_at <= tokenlimits.clock() then 'expired' else p_usage.status end,
    'idempotency_key', p_usage.idempotency_key,
    'metadata', p_usage.metadata,
    'created_at', p_usage.created_at,
    'settled_at', case when p_usage.status = 'reserved' and p_usage.expires_at <= tokenlimits.clock() then p_usage.expires_at else p_usage.settled_at end,
    'expires_at', p_usage.expires_at
  )
$$;

comment on function tokenlimits.usage_json(public.generation_usage, text)
is 'tokenlimits: A row of the ledger and the user''s e-mail address, as an export shows them.';

revoke execute on function tokenlimits.usage_json(public.generation_usage, text)
from public, anon, authenticated, service_role;

-- Reads one user's rows by the user's index, or otherwise one group after the other by the group's index: another index
-- would cost every call. p_after is the "next" of the previous page.
create or replace function tokenlimits.export_usage(
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
-- definer: e-mail addresses are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  c_groups constant integer := 1000;
  v_since timestamptz := coalesce(p_since, '-infinity');
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, tokenlimits.clock() + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_group_id uuid := coalesce(p_group_id, (p_after ->> 'group_id')::uuid);
  v_at timestamptz := coalesce((p_after ->> 'created_at')::timestamptz, v_since);
  v_id uuid := coalesce((p_after ->> 'id')::uuid, '00000000-0000-0000-0000-000000000000');
  v_page public.generation_usage[];
  v_emails jsonb;
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
    -- looked up, not joined: a cached plan would compare each row with each user
    v_emails := (
      select jsonb_object_agg(k.id, k.email)
      from tokenlimits.users(array(select distinct p.user_id from unnest(v_page) as p)) as k
    );
    v_rows := v_rows || coalesce((
      select jsonb_agg(
        tokenlimits.usage_json(row(p.*)::public.generation_usage, v_emails ->> p.user_id::text)
        order by p.created_at, p.id
      )
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
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.export_usage(
    p_group_id,
    p_user_id,
    p_kind,
    p_since,
    p_until,
    case jsonb_typeof(p_after) when 'string' then (p_after #>> '{}')::jsonb else p_after end,
    p_page_size
  );
end
$$;

comment on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
is 'tokenlimits: The ledger, page by page: for the next page, pass this page''s ''next'' and ''until'' as p_after and '
'p_until.';

revoke execute on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function public.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

comment on function tokenlimits.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
is 'tokenlimits: The private half of public.export_usage.';

revoke execute on function tokenlimits.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.export_usage(uuid, uuid, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

-- The sums of each series (a group and a kind) of the rollup, in the order of its key: one look-up finds where the next
-- sum begins, another one adds it up, so unused time costs nothing. p_after is the "next" of the previous page.
create or replace function tokenlimits.export_history(
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
set search_path = pg_catalog, pg_temp
as $$
declare
  -- how many rows of the rollup a page may read (a month of one kind has up to 47,616), and what a look-up counts as
  c_rows constant integer := 100000;
  c_look_up constant integer := 50;
  v_now timestamptz := tokenlimits.clock();
  -- also what was recorded at this very moment
  v_until timestamptz := least(p_until, v_now + interval '1 microsecond');
  v_left integer := least(greatest(p_page_size, 1), 5000);
  v_rows_left integer := c_rows;
  v_group_id uuid := coalesce(
    (p_after ->> 'group_id')::uuid, p_group_id, '00000000-0000-0000-0000-000000000000'
  );
  v_kind text := coalesce(p_after ->> 'kind', '');
  v_timezone text := tokenlimits.timezone_of(v_group_id);
  -- where the next sum of this series begins; infinity: the series is finished
  v_at timestamptz := coalesce((p_after ->> 'bucket')::timestamptz, 'infinity');
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
        -- whole buckets: the first is the one that contains p_since
        when isfinite(p_since) then lower(tokenlimits.period_of(p_bucket, v_timezone, p_since))
        else coalesce(p_since, '-infinity')
      end;
      continue;
    end if;
    v_period := tokenlimits.period_of(p_bucket, v_timezone, v_at);
    select sum(q.cost) as used, sum(q.generations) as generations, count(*) as rows into v_sum
    from (select r.group_id, r.kind, r.bucket, r.cost, r.generations
    from tokenlimits.usage_rollup as r
    union all
    select h.group_id, h.kind, date_bin('15 minutes', h.created_at, '2000-01-01 00:00:00+00'), -h.cost, -1
    from tokenlimits.holds as h
    where h.expires_at <= v_now) as q
    where
      q.group_id = v_group_id and q.kind = v_kind and q.bucket >= v_at and q.bucket < least(upper(v_period), v_until);
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
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.export_history(
    p_group_id,
    p_kind,
    p_bucket,
    p_since,
    p_until,
    case jsonb_typeof(p_after) when 'string' then (p_after #>> '{}')::jsonb else p_after end,
    p_page_size
  );
end
$$;

comment on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
is 'tokenlimits: Live usage per group, kind and bucket in the group''s time zone, page by page as export_usage.';

revoke execute on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function public.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

comment on function tokenlimits.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
is 'tokenlimits: The private half of public.export_history.';

revoke execute on function tokenlimits.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.export_history(uuid, text, text, timestamptz, timestamptz, jsonb, integer)
to authenticated, service_role;

-- Reads one counter per member and member limit: the cost grows with the group, so it isn't part of group_usage.
create or replace function tokenlimits.limit_pressure(p_group_id uuid, p_at_least integer, p_count integer)
returns jsonb
language plpgsql
stable
-- definer: counters are private, and e-mail addresses are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_at_least integer := least(greatest(p_at_least, 1), 100);
  v_any_expired boolean := exists (select from tokenlimits.holds as h where h.expires_at <= v_now);
  v_group_ids uuid[] := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id);
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    with limits as materialized (
      select
        l.group_id, l.kind, l.period, l.starts, l.scope, l.max, l.counts, l.counter_id, upper(p.range) as until,
        greatest(lower(p.range), null, (
          select max(r.reset_at)
          from tokenlimits.usage_resets as r
          where r.group_id = p_group_id and r.kind in (l.kind, '*') and r.subject in (p_group_id, p_group_id)
        )) as since
      from public.group_limits as l
      inner join public.user_groups as g on g.id = l.group_id
      -- a case, since a join's condition may be looked at only after the function has refused a period
      cross join lateral (
        select case when l.starts = 'calendar' then tokenlimits.period_of(l.period, g.timezone, v_now) end as range
      ) as p
      where l.group_id = p_group_id and l.scope = 'member'
    ),

    members as materialized (
      select m.user_id
      from unnest(array(
        select distinct m.user_id
        from tokenlimits.group_tree as t
        inner join public.group_memberships as m on m.group_id = t.group_id
        where t.above_id = p_group_id
      )) as m (user_id)
    ),

    -- as in limit_states: an open counter says what is used; if a new period has begun since, nothing is used; null
    -- means that there is no counter
    states as (
      select
        l.kind, l.period, l.counts, l.counter_id, m.user_id, l.until,
        case when o.id is not null then o.max else l.max end as max,
        case
          when c.until > v_now then c.since
          else greatest(l.since, c.until, (
            select max(r.reset_at)
            from tokenlimits.usage_resets as r
            where r.group_id = p_group_id and r.kind in (l.kind, '*') and r.subject in (p_group_id, m.user_id)
          ))
        end as since,
        case when c.until > v_now then c.used when c.until is not null then 0 end as used
      from limits as l
      cross join members as m
      left join lateral (
        select k.since, k.until, k.used
        from tokenlimits.counters as k
        where k.subject = m.user_id and k.counter_id = l.counter_id
        offset 0
      ) as c on true
      left join public.limit_overrides as o on o.group_id = l.group_id and o.kind = l.kind
      and o.period = l.period and o.starts = l.starts
      and o.scope = l.scope and o.subject = m.user_id
      and (o.until is null or o.until > v_now)
      where l.starts = 'calendar'
    ),

    counted as (
      select
        s.kind, s.period, s.counts, s.max, s.counter_id, s.user_id, s.since,
        coalesce(
          s.used, tokenlimits.count_limit(v_group_ids, s.user_id, s.kind, s.period, s.counts, s.since, s.until)
        ) as used
      from states as s
      where s.max > 0
    ),

    pressed as materialized (
      select p.max, p.counter_id, p.user_id, p.used, row_number() over (
        partition by p.counter_id order by p.used desc, p.user_id
      ) as place
      from (
        select
          c.max, c.counter_id, c.user_id,
          c.used - case
            when v_any_expired
              then tokenlimits.expired_of_limit(
                v_group_ids, c.user_id, c.kind, c.period, c.counts, c.since, v_now
              )
            else 0
          end as used
        from counted as c
        where c.used * 100::numeric >= c.max * v_at_least::numeric
        union all
        select s.max, s.counter_id, s.subject, s.used
        from unnest(case when exists (select from limits as l where l.starts <> 'calendar') then
          tokenlimits.limit_states(
            p_group_id,
            array(select m.user_id from members as m),
            null,
            v_now
          )
        end) as s
        where s.group_id = p_group_id and s.scope = 'member' and s.starts <> 'calendar' and s.max > 0
      ) as p
      where p.used * 100::numeric >= p.max * v_at_least::numeric
    ),

    shown as materialized (
      select p.counter_id, p.user_id, p.used, p.place
      from pressed as p
      where p.place <= least(greatest(p_count, 0), 1000)
    )

    select jsonb_agg(
      jsonb_build_object(
        'kind', l.kind,
        'period', l.period,
        'starts', l.starts,
        'max', l.max,
        'full', (select count(*) from pressed as p where p.counter_id = l.counter_id and p.used >= p.max),
        'near', (select count(*) from pressed as p where p.counter_id = l.counter_id),
        'members', coalesce((
          select jsonb_agg(
            jsonb_build_object('user_id', s.user_id, 'email', k.email, 'used', s.used)
            order by s.place
          )
          from shown as s
          left join tokenlimits.users(array(select t.user_id from shown as t)) as k on k.id = s.user_id
          where s.counter_id = l.counter_id
        ), '[]')
      )
      order by l.kind, l.counter_id
    )
    from limits as l
    where l.max > 0 or exists (select from pressed as p where p.counter_id = l.counter_id)
  ), '[]');
end
$$;

create or replace function public.limit_pressure(
  p_group_id uuid,
  p_at_least integer default 90,
  p_count integer default 100
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.limit_pressure(
    p_group_id,
    p_at_least,
    p_count
  );
end
$$;

comment on function public.limit_pressure(uuid, integer, integer)
is 'tokenlimits: How many members have used all, or a percentage, of each member limit of a group, and the first of '
'them.';

revoke execute on function public.limit_pressure(uuid, integer, integer)
from public, anon, authenticated, service_role;

grant execute on function public.limit_pressure(uuid, integer, integer)
to authenticated, service_role;

comment on function tokenlimits.limit_pressure(uuid, integer, integer)
is 'tokenlimits: The private half of public.limit_pressure.';

revoke execute on function tokenlimits.limit_pressure(uuid, integer, integer)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.limit_pressure(uuid, integer, integer)
to authenticated, service_role;

-- Counters don't keep past periods, so this reads the ledger: the cost grows with the requested time, not with the
-- history.
create or replace function tokenlimits.top_members(
  p_group_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz,
  p_count integer
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := tokenlimits.clock();
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    with top as materialized (
      select u.user_id, sum(u.cost) as used, count(*) as generations
      from public.generation_usage as u
      where
        u.group_id = p_group_id
        and u.created_at >= coalesce(p_since, coalesce(p_until, v_now) - interval '30 days')
        and u.created_at < coalesce(p_until, 'infinity')
        and (p_kind is null or u.kind = p_kind)
        and not (u.status not in ('reserved', 'committed')
or (u.status = 'reserved' and u.expires_at <= v_now))
      group by u.user_id
      order by used desc, u.user_id
      limit least(greatest(p_count, 1), 1000)
    )

    select jsonb_agg(to_jsonb(top) || jsonb_build_object('email', k.email) order by top.used desc, top.user_id)
    from top
    left join tokenlimits.users(array(select t.user_id from top as t)) as k on k.id = top.user_id
  ), '[]');
end
$$;

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
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.top_members(
    p_group_id,
    p_kind,
    p_since,
    p_until,
    p_count
  );
end
$$;

comment on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
is 'tokenlimits: The users with the most usage in a group, including former members; in the last 30 days by default.';

revoke execute on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
from public, anon, authenticated, service_role;

grant execute on function public.top_members(uuid, text, timestamptz, timestamptz, integer)
to authenticated, service_role;

comment on function tokenlimits.top_members(uuid, text, timestamptz, timestamptz, integer)
is 'tokenlimits: The private half of public.top_members.';

revoke execute on function tokenlimits.top_members(uuid, text, timestamptz, timestamptz, integer)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.top_members(uuid, text, timestamptz, timestamptz, integer)
to authenticated, service_role;

-- 87_reconcile.sql

-- Recounting everything, in case the numbers are in doubt.
--
-- Invariants
--   * The ledger is right by definition: counters and rollup are made to agree with it, never the other way round.
--   * Usage older than p_since isn't recounted: there, the rollup is trusted.
--   * No call is recorded for the group, or for one beneath it, meanwhile: their stripes are held in exclusive mode.

-- Whole buckets, or the beginning of the first one would be missed.
create or replace function tokenlimits.rollup_differences(p_group_id uuid, p_since timestamptz)
returns table (
  group_id uuid, kind text, bucket timestamptz, was numeric, used numeric, generations numeric
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_since timestamptz := date_bin('15 minutes', p_since, '2000-01-01 00:00:00+00');
  v_group_ids uuid[] := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id);
begin
  return query
  select d.group_id, d.kind, d.bucket, d.was, d.used, d.generations
  from (
    select
      coalesce(r.group_id, u.group_id) as group_id, coalesce(r.kind, u.kind) as kind, coalesce(r.bucket, u.bucket) as bucket,
      coalesce(r.cost, 0) as was, coalesce(u.cost, 0) as used,
      coalesce(u.generations, 0) - coalesce(r.generations, 0) as generations
    from (
      select s.group_id, s.kind, s.bucket, sum(s.cost) as cost, sum(s.generations) as generations
      from tokenlimits.usage_rollup as s
      where s.group_id = any(v_group_ids) and s.bucket >= v_since
      group by s.group_id, s.kind, s.bucket
    ) as r
    full join (
      select s.group_id, s.kind, s.bucket, sum(s.cost) as cost, count(*) as generations
      from (
        select l.group_id, l.kind, date_bin('15 minutes', l.created_at, '2000-01-01 00:00:00+00') as bucket, l.cost
        from public.generation_usage as l
        where l.group_id = any(v_group_ids) and l.created_at >= v_since and l.status in ('reserved', 'committed')
      ) as s
      group by s.group_id, s.kind, s.bucket
    ) as u on u.group_id = r.group_id and u.kind = r.kind and u.bucket = r.bucket
  ) as d
  where d.was <> d.used or d.generations <> 0;
end
$$;

comment on function tokenlimits.rollup_differences(uuid, timestamptz)
is 'tokenlimits: Where the history of a group, and of all beneath it, differs from the ledger since a moment.';

revoke execute on function tokenlimits.rollup_differences(uuid, timestamptz)
from public, anon, authenticated, service_role;

-- The group's own counters come first, so that p_most leaves out members. A rolling counter may be right while its
-- parts are not: both numbers are equal then.
create or replace function tokenlimits.counter_differences(
  p_group_id uuid,
  p_at timestamptz,
  p_most integer default null
)
returns table (
  subject uuid, counter_id bigint, kind text, period text, starts text, scope text, was bigint, used bigint
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_group_ids uuid[] := array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id);
begin
  return query
  select d.subject, d.counter_id, d.kind, d.period, d.starts, d.scope, d.was, d.used
  from (
    select
      c.subject, c.counter_id, c.kind, c.period, c.starts, c.scope, c.used as was,
      tokenlimits.count_limit(
        case c.scope when 'child' then array(select t.group_id from tokenlimits.group_tree as t where t.above_id = c.subject) else v_group_ids end,
        case c.scope when 'member' then c.subject end, c.kind, c.period, c.counts, c.since, c.until
      ) as used,
      c.starts = 'rolling' and exists (
        select
        from (
          select p.part, p.used
          from tokenlimits.counter_parts as p
          where p.subject = c.subject and p.counter_id = c.counter_id
          union all
          select r.part, -r.used
          from tokenlimits.recorded_parts(row(
            p_group_id, c.counter_id, c.subject, c.kind, c.period, c.starts, c.scope, c.mode, c.max, c.counts, 1,
            c.since, c.until, null, c.used, null, true, null, null, null, null, null, null
          )::tokenlimits.limit_state) as r
        ) as q
        group by q.part
        having sum(q.used) <> 0
      ) as has_other_parts
    from (
      select
        m.subject, m.counter_id, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counts, m.used, m.since, m.until
      from public.group_limits as l
      inner join tokenlimits.counters as m on m.counter_id = l.counter_id
      where l.group_id = p_group_id and m.until > p_at
      order by l.scope, m.subject
      limit p_most
    ) as c
  ) as d
  where d.was <> d.used or d.has_other_parts;
end
$$;

comment on function tokenlimits.counter_differences(uuid, timestamptz, integer)
is 'tokenlimits: Where a group''s counters differ from the ledger.';

revoke execute on function tokenlimits.counter_differences(uuid, timestamptz, integer)
from public, anon, authenticated, service_role;

-- Holds can be missing after a dump of the ledger alone was restored.
create or replace function tokenlimits.missing_holds(p_group_id uuid, p_since timestamptz)
returns setof public.generation_usage
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
  select u.*
  from public.generation_usage as u
  where
    u.group_id = any(array(select t.group_id from tokenlimits.group_tree as t where t.above_id = p_group_id))
    and u.created_at >= p_since
    and u.status = 'reserved'
    and not exists (select from tokenlimits.holds as h where h.user_id = u.user_id and h.usage_id = u.id);
end
$$;

comment on function tokenlimits.missing_holds(uuid, timestamptz)
is 'tokenlimits: Reserved usages without a row in holds, which would never be found when they expire.';

revoke execute on function tokenlimits.missing_holds(uuid, timestamptz)
from public, anon, authenticated, service_role;

-- One group at a time, and from a moment on, since a statement ends after 8 s. Its counters include what is used
-- beneath it, so the history there is corrected too. Returns what differed: the old and the new values.
create or replace function tokenlimits.reconcile_usage(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: counters and rollup are private
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_counters jsonb;
  v_rollup jsonb;
  v_holds bigint;
  v_state tokenlimits.limit_state;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform pg_advisory_xact_lock_shared(1953459052, 258);
  perform tokenlimits.lock_groups(array[p_group_id], true);

  insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
  select
    u.id, u.group_id, coalesce(
    (select t.above_id from tokenlimits.group_tree as t where t.group_id = u.group_id and t.level = 0), u.group_id
  ), u.user_id, u.kind, u.cost,
    u.created_at, u.expires_at
  from tokenlimits.missing_holds(p_group_id, coalesce(p_since, '-infinity')) as u;
  get diagnostics v_holds = row_count;

  -- the rollup first, since the group's counters are counted from it
  with differences as (
    select d.group_id, d.kind, d.bucket, d.was, d.used, d.generations
    from tokenlimits.rollup_differences(p_group_id, coalesce(p_since, '-infinity')) as d
  ),

  repaired as (
    insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
    select d.group_id, d.kind, d.bucket, 0, d.used - d.was, d.generations
    from differences as d
    on conflict on constraint usage_rollup_pkey do update
    set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations
  )

  select jsonb_agg(to_jsonb(d) - 'generations' order by d.group_id, d.kind, d.bucket) into v_rollup
  from differences as d;

  with differences as (
    select d.subject, d.counter_id, d.kind, d.period, d.starts, d.scope, d.was, d.used
    from tokenlimits.counter_differences(p_group_id, tokenlimits.clock()) as d
  ),

  repaired as (
    update tokenlimits.counters as c
    set used = d.used
    from differences as d
    where c.subject = d.subject and c.counter_id = d.counter_id
  )

  select jsonb_agg(to_jsonb(d) - 'counter_id' order by d.kind, d.period, d.subject) into v_counters
  from differences as d;

  for v_state in
    select
      l.group_id, l.counter_id, c.subject, l.kind, l.period, l.starts, l.scope, l.mode, l.max, l.counts, 1 as weight,
      c.since, c.until, null as reset_at, c.used, null as expired, true as is_open, null as group_name, null as timezone,
      null as own_max, null as overridden_until, null as level,
      null as is_spread
    from public.group_limits as l
    inner join tokenlimits.counters as c on c.counter_id = l.counter_id
    where l.group_id = p_group_id and l.starts = 'rolling' and c.until > tokenlimits.clock()
  loop
    delete from tokenlimits.counter_parts as p
    where p.subject = v_state.subject and p.counter_id = v_state.counter_id;
    insert into tokenlimits.counter_parts (subject, counter_id, part, used)
    select v_state.subject, v_state.counter_id, r.part, r.used
    from tokenlimits.recorded_parts(v_state) as r;
  end loop;

  return jsonb_build_object(
    'counters', coalesce(v_counters, '[]'), 'rollup', coalesce(v_rollup, '[]'), 'holds', v_holds
  );
end
$$;

create or replace function public.reconcile_usage(
  p_group_id uuid,
  p_since timestamptz default '-infinity'
)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.reconcile_usage(
    p_group_id,
    p_since
  );
end
$$;

comment on function public.reconcile_usage(uuid, timestamptz)
is 'tokenlimits: Recounts the usage of a group, and of all beneath it, from the ledger; corrects its counters and the '
'rollup, and returns what differed.';

revoke execute on function public.reconcile_usage(uuid, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function public.reconcile_usage(uuid, timestamptz)
to authenticated, service_role;

comment on function tokenlimits.reconcile_usage(uuid, timestamptz)
is 'tokenlimits: The private half of public.reconcile_usage.';

revoke execute on function tokenlimits.reconcile_usage(uuid, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.reconcile_usage(uuid, timestamptz)
to authenticated, service_role;

-- 88_operate.sql

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
set search_path = pg_catalog, pg_temp
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

create or replace function public.find_users_by_email(
  p_emails text[]
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.find_users_by_email(
    p_emails
  );
end
$$;

comment on function public.find_users_by_email(text[])
is 'tokenlimits: The users with one of up to 5,000 e-mail addresses, regardless of case.';

revoke execute on function public.find_users_by_email(text[])
from public, anon, authenticated, service_role;

grant execute on function public.find_users_by_email(text[])
to authenticated, service_role;

comment on function tokenlimits.find_users_by_email(text[])
is 'tokenlimits: The private half of public.find_users_by_email.';

revoke execute on function tokenlimits.find_users_by_email(text[])
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.find_users_by_email(text[])
to authenticated, service_role;

-- Like reconcile, but without locks: a stable function sees one moment, at which counters and ledger agree. It checks
-- only as many members as a statement has time for.
create or replace function tokenlimits.usage_drift(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
stable
-- definer: counters and rollup are private
security definer
set search_path = pg_catalog, pg_temp
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

create or replace function public.usage_drift(
  p_group_id uuid,
  p_since timestamptz default null
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.usage_drift(
    p_group_id,
    p_since
  );
end
$$;

comment on function public.usage_drift(uuid, timestamptz)
is 'tokenlimits: Where a group''s counters and history differ from the ledger; changes nothing. By default, one day of '
'history.';

revoke execute on function public.usage_drift(uuid, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function public.usage_drift(uuid, timestamptz)
to authenticated, service_role;

comment on function tokenlimits.usage_drift(uuid, timestamptz)
is 'tokenlimits: The private half of public.usage_drift.';

revoke execute on function tokenlimits.usage_drift(uuid, timestamptz)
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.usage_drift(uuid, timestamptz)
to authenticated, service_role;

-- Asks the project's rule about a made-up caller, and restores the real one.
create or replace function tokenlimits.would_be_admin(p_claims jsonb)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
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

comment on function tokenlimits.would_be_admin(jsonb)
is 'tokenlimits: Would a caller with these claims be an admin? Null: it failed.';

revoke execute on function tokenlimits.would_be_admin(jsonb)
from public, anon, authenticated, service_role;

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
set search_path = pg_catalog, pg_temp
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage'];
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

comment on function tokenlimits.storage()
is 'tokenlimits: Dead rows, and how large indexes are and need to be.';

revoke execute on function tokenlimits.storage()
from public, anon, authenticated, service_role;

create or replace function tokenlimits.users_in_no_group()
returns bigint
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  if exists (
    select
    from pg_catalog.pg_proc as p
    where
      p.oid = to_regprocedure('tokenlimits.known_users(uuid[])')
      and not btrim(regexp_replace(p.prosrc, '\s+', ' ', 'g')) = 'select u.id, u.email from unnest(p_user_ids) as p (id) cross join lateral (select a.id, a.email::text from auth.users as a where a.id = p.id offset 0) as u'
  ) then
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

comment on function tokenlimits.users_in_no_group()
is 'tokenlimits: How many users are in no group, up to 1,001; null for a project''s own users.';

revoke execute on function tokenlimits.users_in_no_group()
from public, anon, authenticated, service_role;

-- After the ledger alone was restored, its rows are in none of the sums. Usually this shows at both ends of a group's
-- history; only reconcile finds every case.
create or replace function tokenlimits.groups_not_summed()
returns bigint
language plpgsql
stable
-- definer: the rollup is private
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform tokenlimits.require_admin();
  return (
    select count(*)
    from public.user_groups as g
    where exists (
      select
      from (
        (
          select l.kind, l.created_at
          from public.generation_usage as l
          where l.group_id = g.id and l.status in ('reserved', 'committed')
          order by l.created_at
          limit 1
        )
        union all
        (
          select l.kind, l.created_at
          from public.generation_usage as l
          where l.group_id = g.id and l.status in ('reserved', 'committed')
          order by l.created_at desc
          limit 1
        )
      ) as u
      where not exists (
        select
        from tokenlimits.usage_rollup as r
        where r.group_id = g.id and r.kind = u.kind and r.bucket = date_bin('15 minutes', u.created_at, '2000-01-01 00:00:00+00')
      )
    )
  );
end
$$;

comment on function tokenlimits.groups_not_summed()
is 'tokenlimits: How many groups have usage in the ledger that is missing in the sums.';

revoke execute on function tokenlimits.groups_not_summed()
from public, anon, authenticated, service_role;

-- What a call would do now. A lock shows only to those who need it, a full disk only to those who write.
create or replace function tokenlimits.trial()
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
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
    cross join lateral (
      select l.kind, 1::bigint as weight
      where l.counts is null
      union all
      select p.key, p.value::bigint
      from jsonb_each_text(l.counts) as p
    ) as k
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

comment on function tokenlimits.trial()
is 'tokenlimits: Tracks a generation and rolls it back: what came of it.';

revoke execute on function tokenlimits.trial()
from public, anon, authenticated, service_role;

-- Who has or awaits a lock that calls need, or keeps somebody from one, for longer than a second. Of a query, only what
-- comes before the first text or comment, which may be a secret. Other roles' sessions have neither age nor query here,
-- unless our owner is in pg_read_all_stats.
create or replace function tokenlimits.holders()
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage'];
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
          (l.locktype = 'advisory' and l.classid = 1953459052)
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

comment on function tokenlimits.holders()
is 'tokenlimits: The sessions that have had locks for long that calls need.';

revoke execute on function tokenlimits.holders()
from public, anon, authenticated, service_role;

create or replace function tokenlimits.tokenlimits_health()
returns jsonb
language plpgsql
volatile
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
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

create or replace function public.tokenlimits_health()
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.tokenlimits_health();
end
$$;

comment on function public.tokenlimits_health()
is 'tokenlimits: Tracks a generation and rolls it back, within a second per lock; says who holds locks, and how full '
'it is.';

revoke execute on function public.tokenlimits_health()
from public, anon, authenticated, service_role;

grant execute on function public.tokenlimits_health()
to service_role;

comment on function tokenlimits.tokenlimits_health()
is 'tokenlimits: The private half of public.tokenlimits_health.';

revoke execute on function tokenlimits.tokenlimits_health()
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.tokenlimits_health()
to service_role;

create or replace function tokenlimits.tokenlimits_diagnosis()
returns jsonb
language plpgsql
volatile
-- definer: counters are private
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
  c_tables constant text[] := array['user_groups', 'group_limits', 'limit_overrides', 'group_memberships', 'generation_usage'];
  c_functions constant text[] := array[
    'add_group_members',
    'check_generation',
    'commit_generation',
    'delete_group',
    'export_history',
    'export_usage',
    'extend_generation',
    'find_groups',
    'find_limit_overrides',
    'find_users',
    'find_users_by_email',
    'generation_history',
    'group_members',
    'group_usage',
    'limit_pressure',
    'move_group_member',
    'my_generation_usage',
    'reconcile_usage',
    'record_generation',
    'refund_generation',
    'refuse_ledger_write',
    'release_generation',
    'remove_group_limit',
    'remove_group_members',
    'remove_limit_override',
    'reserve_generation',
    'reset_group_usage',
    'save_group',
    'set_group_limit',
    'set_limit_override',
    'set_member_anchor',
    'tokenlimits_diagnosis',
    'tokenlimits_health',
    'tokenlimits_version',
    'top_members',
    'track_generation',
    'track_generations',
    'usage_drift',
    'user_generation_usage'
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
        'authenticated', (
          select coalesce(jsonb_agg(a.name order by a.name), '[]')
          from unnest(array['select', 'insert', 'update', 'delete']) as a (name)
          where has_table_privilege('authenticated', t.oid, a.name)
        ),
        'service_role', (
          select coalesce(jsonb_agg(a.name order by a.name), '[]')
          from unnest(array['select', 'insert', 'update', 'delete']) as a (name)
          where has_table_privilege('service_role', t.oid, a.name)
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
          and not coalesce(obj_description(f.oid, 'pg_proc') like 'tokenlimits:%', false)
        union all
        select t.relname
        from pg_catalog.pg_class as t
        where
          t.relnamespace = 'public'::regnamespace and t.relname = any(c_tables)
          and not coalesce(obj_description(t.oid, 'pg_class') like 'tokenlimits:%', false)
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

create or replace function public.tokenlimits_diagnosis()
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return tokenlimits.tokenlimits_diagnosis();
end
$$;

comment on function public.tokenlimits_diagnosis()
is 'tokenlimits: The state of the installation: tables, policies, functions, triggers, indexes, the admin rule, users.';

revoke execute on function public.tokenlimits_diagnosis()
from public, anon, authenticated, service_role;

grant execute on function public.tokenlimits_diagnosis()
to authenticated, service_role;

comment on function tokenlimits.tokenlimits_diagnosis()
is 'tokenlimits: The private half of public.tokenlimits_diagnosis.';

revoke execute on function tokenlimits.tokenlimits_diagnosis()
from public, anon, authenticated, service_role;

grant execute on function tokenlimits.tokenlimits_diagnosis()
to authenticated, service_role;

-- 90_security.sql

-- Access to the tables: for admins through row-level security, for the service key, and for nobody else.
--
-- Invariants
--   * One permissive policy per table, action and role.
--   * Through the API, nobody writes the ledger, or the ids, counters and timestamps of the other tables: only definer
--     functions do.
--   * This holds in projects whose default privileges grant everything in public, and in those that grant nothing.

alter table public.user_groups enable row level security;

alter table public.group_limits enable row level security;

alter table public.group_memberships enable row level security;

alter table public.limit_overrides enable row level security;

alter table public.generation_usage enable row level security;

revoke all on
public.user_groups, public.group_limits, public.group_memberships, public.limit_overrides, public.generation_usage
from public, anon, authenticated, service_role;

grant select, delete on public.user_groups, public.group_limits, public.group_memberships, public.limit_overrides
to authenticated, service_role;

-- only our functions set ids, counters and timestamps, even if an admin edits a table
grant insert (name, description, priority, timezone, is_default, anchor_at, parent_id, is_spread),
update (name, description, priority, timezone, is_default, anchor_at, parent_id)
on public.user_groups to authenticated, service_role;

grant insert (group_id, kind, period, starts, scope, mode, max, counts),
update (kind, period, starts, scope, mode, max, counts)
on public.group_limits to authenticated, service_role;

grant insert (group_id, kind, period, starts, scope, subject, max, until), update (max, until)
on public.limit_overrides to authenticated, service_role;

grant insert (group_id, user_id) on public.group_memberships to authenticated, service_role;

grant select on public.generation_usage to authenticated, service_role;

-- an identity column needs no privilege on its sequence; old projects grant it to everybody
revoke all on sequence public.group_limits_counter_id_seq from public, anon, authenticated, service_role;

do $do$
declare
  v_table text;
  v_action text;
  v_name text;
begin
  foreach v_table in array array[
    'user_groups', 'group_limits', 'group_memberships', 'limit_overrides', 'generation_usage'
  ] loop
    foreach v_action in array array['select', 'insert', 'update', 'delete'] loop
      continue when v_table = 'generation_usage' and v_action <> 'select';
      continue when v_table = 'group_memberships' and v_action = 'update';
      v_name := format('admins may %s', v_action);
      execute format('drop policy if exists %I on public.%I', v_name, v_table);
      execute format(
        'create policy %I on public.%I for %s to authenticated %s %s', v_name, v_table, v_action,
        case when v_action <> 'insert' then 'using ((select tokenlimits.is_admin()))' end,
        case when v_action in ('insert', 'update') then 'with check ((select tokenlimits.is_admin()))' end
      );
    end loop;
  end loop;
end
$do$;

-- Makes PostgREST serve the new functions.
notify pgrst, 'reload schema';

-- squawk-ignore transaction-nesting
commit;
