-- A model of the database of a hosted Supabase project, as far as SQL like ours can notice it.
--
-- Applied by the superuser supabase_admin, in one transaction, to an empty database; the roles are the
-- cluster's, and made where they are missing.  The setting hosted.default_grants says which kind of project:
--   old  what postgres makes in public is granted to anon, authenticated and service_role
--   new  it isn't (projects since May 2026)
-- In both kinds PostgreSQL lets PUBLIC execute a new function.
--
-- Read in supabase/postgres (init-scripts and migrations) and supabase/auth (migrations).  Stricter than the
-- platform in one point: postgres doesn't own the database, it has been granted all on it.

do $$
declare
   wanted record;
begin
   for wanted in
      select *
      from (values
         ('postgres', 'login createdb createrole replication bypassrls'),
         ('anon', 'nologin'),
         ('authenticated', 'nologin'),
         ('service_role', 'nologin bypassrls'),
         ('authenticator', 'login noinherit'),
         ('supabase_auth_admin', 'login noinherit createrole')
      ) as role (name, attributes)
      where not exists (select from pg_catalog.pg_roles where rolname = role.name)
   loop
      execute format('create role %I %s', wanted.name, wanted.attributes);
   end loop;

   grant anon, authenticated, service_role to authenticator;
   grant anon, authenticated, service_role to postgres with admin option;

   alter role postgres set search_path to "$user", public, extensions;
   alter role supabase_auth_admin set search_path to auth;
   alter role anon set statement_timeout = '3s';
   alter role authenticated set statement_timeout = '8s';
   alter role authenticator set statement_timeout = '8s';
   alter role authenticator set lock_timeout = '8s';
end $$;

-- The schemas, and who may do what with them.

do $$
begin
   execute format('grant all on database %I to postgres', current_database());
   execute format('grant create on database %I to supabase_auth_admin', current_database());
end $$;

grant all on schema public to postgres;
grant usage on schema public to anon, authenticated, service_role;

create schema extensions;
grant all on schema extensions to postgres;
grant usage on schema extensions to anon, authenticated, service_role;

create schema auth;
grant all on schema auth to supabase_auth_admin;
grant usage on schema auth to postgres, anon, authenticated, service_role;

do $$
declare
   object_type text;
begin
   foreach object_type in array array['tables', 'functions', 'sequences'] loop
      execute format('alter default privileges for role postgres in schema public grant all on %s to postgres', object_type);
      if current_setting('hosted.default_grants') = 'old' then
         execute format(
            'alter default privileges for role postgres in schema public grant all on %s to anon, authenticated, service_role',
            object_type
         );
      end if;
   end loop;
end $$;

-- Auth's tables are Auth's; postgres may read and write them, and refer to them.

create table auth.users (
   instance_id uuid,
   id uuid not null constraint users_pkey primary key,
   aud varchar(255),
   role varchar(255),
   email varchar(255),
   encrypted_password varchar(255),
   email_confirmed_at timestamptz,
   invited_at timestamptz,
   confirmation_token varchar(255),
   confirmation_sent_at timestamptz,
   recovery_token varchar(255),
   recovery_sent_at timestamptz,
   email_change_token_new varchar(255),
   email_change varchar(255),
   email_change_sent_at timestamptz,
   last_sign_in_at timestamptz,
   raw_app_meta_data jsonb,
   raw_user_meta_data jsonb,
   is_super_admin boolean,
   created_at timestamptz,
   updated_at timestamptz,
   phone text default null constraint users_phone_key unique,
   phone_confirmed_at timestamptz,
   phone_change text default '',
   phone_change_token varchar(255) default '',
   phone_change_sent_at timestamptz,
   confirmed_at timestamptz generated always as (least(email_confirmed_at, phone_confirmed_at)) stored,
   email_change_token_current varchar(255) default '',
   email_change_confirm_status smallint default 0
      constraint users_email_change_confirm_status_check check (email_change_confirm_status between 0 and 2),
   banned_until timestamptz,
   reauthentication_token varchar(255) default '',
   reauthentication_sent_at timestamptz,
   is_sso_user boolean not null default false,
   deleted_at timestamptz,
   is_anonymous boolean not null default false
);

create unique index users_email_partial_key on auth.users (email) where is_sso_user = false;
create index users_instance_id_idx on auth.users (instance_id);
create index users_instance_id_email_idx on auth.users (instance_id, lower(email));
create index users_is_anonymous_idx on auth.users (is_anonymous);

alter table auth.users owner to supabase_auth_admin;
alter table auth.users enable row level security;
grant select on auth.users to postgres with grant option;
grant insert, update, delete, truncate, references, trigger on auth.users to postgres;

-- What the API tells the database about the caller.

create function auth.uid() returns uuid language sql stable as $$
   select coalesce(
      nullif(current_setting('request.jwt.claim.sub', true), ''),
      nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
   )::uuid
$$;

create function auth.role() returns text language sql stable as $$
   select coalesce(
      nullif(current_setting('request.jwt.claim.role', true), ''),
      nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
   )
$$;

create function auth.email() returns text language sql stable as $$
   select coalesce(
      nullif(current_setting('request.jwt.claim.email', true), ''),
      nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'email'
   )
$$;

create function auth.jwt() returns jsonb language sql stable as $$
   select coalesce(
      nullif(current_setting('request.jwt.claim', true), ''),
      nullif(current_setting('request.jwt.claims', true), '')
   )::jsonb
$$;

alter function auth.uid() owner to supabase_auth_admin;
alter function auth.role() owner to supabase_auth_admin;
alter function auth.email() owner to supabase_auth_admin;
alter function auth.jwt() owner to supabase_auth_admin;
grant execute on function auth.uid(), auth.role(), auth.email(), auth.jwt() to postgres, anon, authenticated, service_role;
