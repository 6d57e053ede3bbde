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
    {{ search_path() }}
    as $body${{ default_is_admin() }}$body$;
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
    {{ search_path() }}
    as $body${{ default_known_users() }}$body$;
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
{{ search_path() }}
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
{{ private('users(uuid[])', 'Which of these users exist, each once, with their e-mail addresses.') }}

-- Admin functions begin with this. Besides admins, it admits roles that may act as service_role: the service key and
-- the database's owner. Inside a definer function, the GUC "role" still names the caller; current_user does not.
create or replace function tokenlimits.require_admin()
returns void
language plpgsql
stable
{{ search_path() }}
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
{{ private(
  'require_admin()',
  "Raises 42501 unless the caller is an admin or acts as service_role.",
  to='authenticated, service_role'
) }}

-- The only place that reads the time. The wall clock, not now(): a call that waited for a lock is recorded at the time
-- at which it got the lock.
create or replace function tokenlimits.clock()
returns timestamptz
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  return clock_timestamp();
end
$$;
{{ private(
  'clock()',
  "The present moment, for every function of tokenlimits."
) }}

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
{{ search_path() }}
as $$
begin
  raise exception using
    errcode = p_code,
    message = format('%s (%s)', p_message, p_code),
    detail = coalesce(p_detail, ''),
    hint = p_hint;
end
$$;
{{ private(
  'refuse(text, text, text, text)',
  "Raises one of our errors.",
  to='authenticated, service_role'
) }}

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
{{ search_path() }}
as $$
  select jsonb_build_object('version', 1)
$$;
{{ opened(
  'tokenlimits_version()',
  "The version of the installed schema. Clients compare it with the least that they need.",
  to='authenticated, service_role'
) }}
