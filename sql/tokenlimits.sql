-- tokenlimits: exact limits on generations. Apply it in Supabase's SQL editor, or as a migration.
-- It can be applied again without harm: data, and your own tokenlimits.is_admin(), stay.
-- Generated from sql/schema/ by `make sql`; edit it there.

-- The private schema, who is an admin, and the clock.
--
-- Invariants
--   * Nothing in the schema tokenlimits is exposed through the API: it is not in PostgREST's list of schemas.
--   * A project's own tokenlimits.is_admin() survives another application of this file.
--
-- SQLSTATEs that our functions raise (PostgREST passes them on as "code", with 400)
--   TL001  invalid request; DETAIL is the name of the field
--   TL002  group not found
--   TL003  a group of that name exists (whatever its case)
--   TL004  unknown user
--   TL005  usage not found
--   TL006  usage already settled in another way
--   TL007  the hold has expired and its cost no longer fits
--   TL008  idempotency key used for another request
--   TL009  the transaction is not READ COMMITTED
--   TL099  overtaken by another call; caught inside, never leaves
--   42501  the caller is no admin

create schema if not exists tokenlimits;
comment on schema tokenlimits is 'Private parts of tokenlimits: counters, rollup, helpers. Not for the API.';

revoke all on schema tokenlimits from public, anon, authenticated, service_role;
grant usage on schema tokenlimits to authenticated, service_role;

-- Signed-in users with app_metadata.role = 'admin' are admins; a user can write user_metadata, but never app_metadata.
-- Made only if it is not there, so that a project can put its own rule in its place.
do $do$
begin
  if to_regprocedure('tokenlimits.is_admin()') is null then
    create function tokenlimits.is_admin()
    returns boolean
    language sql
    stable
    set search_path = ''
    as $body$
      select coalesce((select auth.jwt()) -> 'app_metadata' ->> 'role' = 'admin', false)
    $body$;
    comment on function tokenlimits.is_admin() is
      'Is the caller an admin? Replace its body to use your own rule; applying tokenlimits again keeps it.';
  end if;
end
$do$;

revoke execute on function tokenlimits.is_admin() from public, anon, authenticated;
grant execute on function tokenlimits.is_admin() to authenticated, service_role;

-- Admin functions open with this. Besides admins it lets pass whoever may act as service_role: the service key and the
-- database's owner. The GUC "role" still names the caller inside a definer function, where current_user does not.
create or replace function tokenlimits.require_admin()
returns void
language plpgsql
stable
set search_path = ''
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
is 'Raises 42501 unless the caller is an admin or acts as service_role.';
revoke execute on function tokenlimits.require_admin() from public, anon, authenticated;
grant execute on function tokenlimits.require_admin() to authenticated, service_role;

-- The one place that reads the time. Wall clock, not now(): a call that waited for a lock is recorded when it got it.
create or replace function tokenlimits.clock()
returns timestamptz
language plpgsql
volatile
set search_path = ''
as $$
begin
  return clock_timestamp();
end
$$;
comment on function tokenlimits.clock() is 'The present moment, for every function of tokenlimits.';
revoke execute on function tokenlimits.clock() from public, anon, authenticated;

-- Time-ordered (RFC 9562, version 7): new rows land at the right edge of the primary key, which keeps it in memory.
create or replace function tokenlimits.uuid_v7()
returns uuid
language plpgsql
volatile
set search_path = ''
as $$
begin
  -- the tail of a random one, from after its version: date_part, for extract counts in slow numerics
  return (
    lpad(to_hex((date_part('epoch', clock_timestamp()) * 1000)::bigint), 12, '0')
    || '7'
    || substr(gen_random_uuid()::text, 16)
  )::uuid;
end
$$;
comment on function tokenlimits.uuid_v7() is 'A new time-ordered UUID.';
revoke execute on function tokenlimits.uuid_v7() from public, anon, authenticated;

-- The code is in the message too, for servers between us and the caller that drop it.
create or replace function tokenlimits.refuse(
  p_code text,
  p_message text,
  p_detail text default null,
  p_hint text default 'Nothing was saved.'
)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  raise exception using
    errcode = p_code,
    message = format('%s (%s)', p_message, p_code),
    detail = coalesce(p_detail, ''),
    hint = p_hint;
end
$$;
comment on function tokenlimits.refuse(text, text, text, text) is 'Raises one of our errors.';
revoke execute on function tokenlimits.refuse(text, text, text, text) from public, anon, authenticated;
grant execute on function tokenlimits.refuse(text, text, text, text) to authenticated, service_role;

-- Some servers send a JSON argument as text in JSON; this is what was meant.
create or replace function tokenlimits.json_argument(p_value jsonb)
returns jsonb
language plpgsql
immutable
set search_path = ''
as $$
begin
  return case jsonb_typeof(p_value) when 'string' then (p_value #>> '{}')::jsonb else p_value end;
end
$$;
comment on function tokenlimits.json_argument(jsonb) is 'A JSON argument, also when it was sent as text.';
revoke execute on function tokenlimits.json_argument(jsonb) from public, anon, authenticated;
grant execute on function tokenlimits.json_argument(jsonb) to authenticated, service_role;

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
set search_path = ''
as $$
  select jsonb_build_object('version', 2)
$$;
comment on function public.tokenlimits_version()
is 'The version of the installed schema. Clients compare it with the least that they need.';
revoke execute on function public.tokenlimits_version() from public, anon, authenticated, service_role;
grant execute on function public.tokenlimits_version() to authenticated, service_role;

-- Groups, their limits and members, and the ledger.
--
-- Invariants
--   * Only functions of tokenlimits write the ledger; nothing deletes from it, and it has no foreign keys: deleting a
--     group or a user must not touch millions of rows.
--   * A limit is its (group, kind, period, scope). Its counter_id names the counters that count for it, and is a new
--     one whenever they have to be counted afresh.
--   * A time zone is one of pg_timezone_names: PostgreSQL itself would take 'Foo/Bar5'.

create table if not exists public.user_groups (
  id uuid not null default gen_random_uuid(),
  name text not null,
  description text not null default '',
  priority integer not null default 0,
  timezone text not null default 'UTC',
  is_default boolean not null default false,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint user_groups_pkey primary key (id),
  constraint user_groups_name_check check (char_length(name) between 1 and 200 and name = btrim(name)),
  constraint user_groups_description_check check (char_length(description) <= 2000)
);
comment on table public.user_groups is 'Groups of users that share limits on generations.';
comment on column public.user_groups.priority is 'A user''s groups are tried from high to low.';
comment on column public.user_groups.timezone is 'IANA name; calendar periods of the group''s limits begin in it.';
comment on column public.user_groups.is_default is 'Judges the users who are in no group at all; one group at most.';

create unique index if not exists user_groups_name_key on public.user_groups (lower(name));
create unique index if not exists user_groups_is_default_key on public.user_groups (is_default) where is_default;

create table if not exists public.group_limits (
  group_id uuid not null,
  kind text not null,
  period text not null,
  scope text not null,
  max bigint,
  counter_id bigint generated always as identity,
  constraint group_limits_pkey primary key (group_id, kind, period, scope),
  constraint group_limits_group_id_fkey foreign key (group_id) references public.user_groups (id) on delete cascade,
  constraint group_limits_counter_id_key unique (counter_id),
  constraint group_limits_kind_check check (kind ~ '^[a-z][a-z0-9_]{0,31}$'),
  constraint group_limits_period_check check (period in ('minute', 'hour', 'day', 'week', 'month', 'lifetime')),
  constraint group_limits_scope_check check (scope in ('group', 'member')),
  -- 10^15 stays exact in JavaScript's numbers
  constraint group_limits_max_check check (max between 0 and 1000000000000000)
);
comment on table public.group_limits is 'How much of a kind a group (or each of its members) may use in a period.';
comment on column public.group_limits.max is 'Null: unlimited. 0: blocked.';
comment on column public.group_limits.counter_id is 'Names the limit''s counters; set by tokenlimits alone.';

create table if not exists public.group_memberships (
  group_id uuid not null,
  user_id uuid not null,
  joined_at timestamptz not null default now(),
  constraint group_memberships_pkey primary key (group_id, user_id),
  constraint group_memberships_group_id_fkey foreign key (group_id)
  references public.user_groups (id) on delete cascade,
  constraint group_memberships_user_id_fkey foreign key (user_id) references auth.users (id) on delete cascade
);
comment on table public.group_memberships is 'Who is in which group.';
create index if not exists group_memberships_user_id_idx on public.group_memberships (user_id);

create table if not exists public.generation_usage (
  id uuid not null,
  group_id uuid not null,
  user_id uuid not null,
  kind text not null,
  cost bigint not null,
  reserved_cost bigint,
  status text not null,
  idempotency_key text,
  fingerprint uuid,
  metadata jsonb not null default '{}',
  created_at timestamptz not null,
  settled_at timestamptz,
  expires_at timestamptz,
  constraint generation_usage_pkey primary key (id),
  constraint generation_usage_key_key unique (idempotency_key, user_id),
  constraint generation_usage_cost_check check (cost >= 0),
  constraint generation_usage_status_check
  check (status in ('reserved', 'committed', 'released', 'refunded', 'expired'))
);
comment on table public.generation_usage
is 'The ledger: one row per generation, kept for ever. Written by functions of tokenlimits alone.';
comment on column public.generation_usage.cost is 'What it takes from the limits while reserved or committed.';
comment on column public.generation_usage.reserved_cost
is 'Of a hold, or what was one: what was held, whatever it was settled for.';
comment on column public.generation_usage.fingerprint
is 'What was asked for under the idempotency key, since a commit may lower the cost.';
comment on column public.generation_usage.created_at
is 'Decides the period that it belongs to, whenever it is settled.';

create index if not exists generation_usage_group_id_idx on public.generation_usage (group_id, created_at);
create index if not exists generation_usage_user_id_idx on public.generation_usage (user_id, created_at);

-- What an admin edits through the API arrives here as plain updates: names are trimmed, time zones are checked.
create or replace function tokenlimits.check_group()
returns trigger
language plpgsql
-- definer: it must work whatever the caller may see
security definer
set search_path = ''
as $$
declare
  v_timezone text;
begin
  new.name := btrim(new.name);
  new.updated_at := tokenlimits.clock();
  if new.timezone <> 'UTC' and (tg_op = 'INSERT' or new.timezone is distinct from old.timezone) then
    select tz.name into v_timezone
    from pg_catalog.pg_timezone_names as tz
    where
      -- decided before anything is read: a megabyte would be compared with every name
      char_length(new.timezone) <= 64
      and lower(tz.name) = lower(new.timezone)
      and tz.name not like 'posix/%'
      -- "at time zone" reads these as abbreviations, which know no daylight saving
      and tz.name not in ('CET', 'EET', 'MET', 'WET');
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
comment on function tokenlimits.check_group() is 'Trigger: tidies and checks a group that is written.';
revoke execute on function tokenlimits.check_group() from public, anon, authenticated;

create or replace trigger user_groups_check
before insert or update on public.user_groups
for each row execute function tokenlimits.check_group();

-- Counters, rollup and resets: what makes a call's cost independent of history.
--
-- Invariants
--   * A counter that exists and whose period is current equals the sum of the live ledger rows of its limit and subject
--     in [since, until). Whoever writes a ledger row opens and moves every counter that it counts for, in the same
--     transaction, so a counter that does not exist can be counted from the ledger, and a past one starts at zero.
--   * The rollup's sum over slots equals the live ledger rows of (group, kind, bucket).
--   * Locks are taken in one order: group stripes, ledger row or key, rollup row, member counters, group counters; by
--     counter_id within a class.
--   * Whoever reads limits in order to write holds its group's stripe shared; whoever edits limits takes it exclusively
--     after the edit, and so waits for calls that judge by the old limits and holds back those to come.

-- One narrow row per limit and subject (the group, or a member), rolled over in place: it never grows with time.
-- No foreign keys and no checks: they cost more than a tenth of a call. subject first: a plan by limit would scan all
-- its members.
create table if not exists tokenlimits.counters (
  subject uuid not null,
  counter_id bigint not null,
  since timestamptz not null,
  until timestamptz not null,
  used bigint not null,
  constraint counters_pkey primary key (subject, counter_id)
) with (fillfactor = 50);
comment on table tokenlimits.counters is 'What is used of a limit by a subject in [since, until).';

-- Members of one group write different slots, so they do not wait for each other; readers sum the slots. A slot may be
-- negative (a refund from another connection); their sum is not.
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
is 'Live usage in buckets of 15 minutes UTC, on which every time zone''s hours begin; 16 slots.';

-- Two transactions that are open at once write different slots, as long as no more than 16 do.
create or replace function tokenlimits.free_slot(p_group_id uuid)
returns smallint
language plpgsql
volatile
set search_path = ''
as $$
declare
  -- 'slot' in ASCII
  c_class constant integer := 1936486260;
  v_group integer := ('x' || right(p_group_id::text, 6))::bit(24)::integer;
  v_slot integer;
begin
  for i in 0..15 loop
    v_slot := (pg_backend_pid() + i) % 16;
    exit when pg_try_advisory_xact_lock(c_class, v_group * 16 + v_slot);
  end loop;
  return v_slot;
end
$$;
comment on function tokenlimits.free_slot(uuid)
is 'A slot of the rollup that no other open transaction writes for this group; any, when all are taken.';
revoke execute on function tokenlimits.free_slot(uuid) from public, anon, authenticated;

-- A hold that has expired counts as released from that moment on, but stays in counters and rollup until somebody
-- sweeps it; readers subtract it. It is not in the ledger's indexes, so that settling a usage stays cheap.
create table if not exists tokenlimits.holds (
  usage_id uuid not null,
  group_id uuid not null,
  user_id uuid not null,
  kind text not null,
  cost bigint not null,
  created_at timestamptz not null,
  expires_at timestamptz not null,
  constraint holds_pkey primary key (usage_id)
);
comment on table tokenlimits.holds is 'Reserved usages that nobody has settled or swept yet.';
create index if not exists holds_expires_at_idx on tokenlimits.holds (group_id, kind, expires_at);

-- After an uninstallation that kept the ledger, its holds and its history come back.
insert into tokenlimits.holds (usage_id, group_id, user_id, kind, cost, created_at, expires_at)
select
  u.id,
  u.group_id,
  u.user_id,
  u.kind,
  u.cost,
  u.created_at,
  u.expires_at
from public.generation_usage as u
where u.status = 'reserved' and not exists (select from tokenlimits.usage_rollup);

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

-- kind '*' is every kind, also one that gets its first limit later.
create table if not exists tokenlimits.usage_resets (
  group_id uuid not null,
  kind text not null,
  reset_at timestamptz not null,
  constraint usage_resets_pkey primary key (group_id, kind)
);
comment on table tokenlimits.usage_resets is 'When an admin last gave a group a fresh start: counters count from then.';

revoke all on tokenlimits.counters, tokenlimits.usage_rollup, tokenlimits.usage_resets, tokenlimits.holds
from public, anon, authenticated, service_role;

-- A limit, its period and what is used of it, as one call sees them.
do $do$
begin
  if to_regtype('tokenlimits.limit_state') is null then
    create type tokenlimits.limit_state as (
      counter_id bigint,
      subject uuid,
      kind text,
      period text,
      scope text,
      max bigint,
      since timestamptz,
      until timestamptz,
      used bigint,
      -- what the counter holds besides, of holds that have expired; null when there are none of the kind at all
      expired bigint,
      -- null: there is no counter yet; false: it is of a past period
      is_open boolean
    );
  end if;
end
$do$;

create or replace function tokenlimits.refuse_isolation()
returns void
language plpgsql
stable
set search_path = ''
as $$
begin
  perform tokenlimits.refuse(
    'TL009',
    'tokenlimits needs READ COMMITTED transactions',
    current_setting('transaction_isolation'),
    'Call it outside your transaction, or begin that with isolation level read committed.'
  );
end
$$;
comment on function tokenlimits.refuse_isolation() is 'Raises TL009: the transaction has another isolation level.';
revoke execute on function tokenlimits.refuse_isolation() from public, anon, authenticated;

create or replace function tokenlimits.lock_groups(p_group_ids uuid[], p_exclusive boolean default false)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
  -- 'tokl' in ASCII, so that our locks do not meet a project's own
  c_class constant integer := 1953459052;
  v_stripe integer;
begin
  -- what is read after a lock was waited for must be as it is then
  if current_setting('transaction_isolation') <> 'read committed' then
    perform tokenlimits.refuse_isolation();
  end if;
  if cardinality(p_group_ids) = 1 and not p_exclusive then
    -- what nearly every call needs, without a query
    perform pg_advisory_xact_lock_shared(c_class, ('x' || right(p_group_ids[1]::text, 2))::bit(8)::integer);
    return;
  end if;
  -- 256 stripes bound the number of locks that a bulk edit takes; sorted, or two of us could deadlock
  for v_stripe in
    select distinct ('x' || right(g.id::text, 2))::bit(8)::integer
    from unnest(p_group_ids) as g (id)
    order by 1
  loop
    if p_exclusive then
      perform pg_advisory_xact_lock(c_class, v_stripe);
    else
      perform pg_advisory_xact_lock_shared(c_class, v_stripe);
    end if;
  end loop;
end
$$;
comment on function tokenlimits.lock_groups(uuid[], boolean)
is 'Holds these groups'' limits still (shared), or waits for all who use them (exclusive), until the transaction ends.';
revoke execute on function tokenlimits.lock_groups(uuid[], boolean) from public, anon, authenticated;

create or replace function tokenlimits.rollup_bucket(p_at timestamptz)
returns timestamptz
language plpgsql
immutable
set search_path = ''
as $$
begin
  return date_bin('15 minutes', p_at, '2000-01-01 00:00:00+00');
end
$$;
comment on function tokenlimits.rollup_bucket(timestamptz)
is 'The beginning of the rollup bucket that a moment lies in.';
revoke execute on function tokenlimits.rollup_bucket(timestamptz) from public, anon, authenticated;

-- the first version, which had no end
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.count_usage(uuid, uuid, text, timestamptz);

-- Counts afresh what a counter would hold. For a group: whole buckets from the rollup, and the parts of buckets before
-- and after them from the ledger, each by itself: joined to both, the planner may read all of the group's rows. For a
-- member: from the ledger, by their own rows.
create or replace function tokenlimits.count_usage(
  p_group_id uuid,
  p_user_id uuid,
  p_kind text,
  p_since timestamptz,
  p_until timestamptz
)
returns bigint
language plpgsql
stable
set search_path = ''
as $$
declare
  -- least: a minute has no whole bucket
  v_whole timestamptz := least(tokenlimits.rollup_bucket(p_since + interval '15 minutes' - interval '1 us'), p_until);
  v_rest timestamptz := greatest(tokenlimits.rollup_bucket(p_until), v_whole);
begin
  if p_user_id is not null then
    return coalesce((
      select sum(u.cost)
      from public.generation_usage as u
      where
        u.user_id = p_user_id
        and u.created_at >= p_since
        and u.created_at < p_until
        and u.group_id = p_group_id
        and u.kind = p_kind
        and u.status in ('reserved', 'committed')
    ), 0);
  end if;
  return coalesce((
    select sum(r.cost)
    from tokenlimits.usage_rollup as r
    where r.group_id = p_group_id and r.kind = p_kind and r.bucket >= v_whole and r.bucket < v_rest
  ), 0) + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = p_group_id
      and u.created_at >= p_since
      and u.created_at < v_whole
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0) + coalesce((
    select sum(u.cost)
    from public.generation_usage as u
    where
      u.group_id = p_group_id
      and u.created_at >= v_rest
      and u.created_at < p_until
      and u.kind = p_kind
      and u.status in ('reserved', 'committed')
  ), 0);
end
$$;
comment on function tokenlimits.count_usage(uuid, uuid, text, timestamptz, timestamptz)
is 'Live usage of a kind between two moments, of a member of a group, or of the whole group when the user is null.';
revoke execute on function tokenlimits.count_usage(uuid, uuid, text, timestamptz, timestamptz)
from public, anon, authenticated;

-- Calendar periods in a time zone.
--
-- Invariants
--   * Periods of one length in one zone follow each other without gap or overlap, on daylight-saving days too.
--   * A day begins at the first moment that reads its date, also where midnight happens twice or not at all.
--   * Hours are counted from the beginning of the day, so that a repeated hour is a period of its own.

-- PostgreSQL reads a time that happens twice as the later one, and a time that does not happen with the offset before
-- the gap, which is the gap's beginning for a midnight. So only the first case needs care: try the offset of the day
-- before, and take that moment if it reads the same.
create or replace function tokenlimits.first_moment(p_local timestamp, p_timezone text)
returns timestamptz
language plpgsql
stable
set search_path = ''
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
is 'The first moment at which clocks of the zone read this.';
revoke execute on function tokenlimits.first_moment(timestamp, text) from public, anon, authenticated;

create or replace function tokenlimits.period_of(p_period text, p_timezone text, p_at timestamptz)
returns tstzrange
language plpgsql
stable
set search_path = ''
as $$
declare
  v_local timestamp;
  v_day tstzrange;
  v_since timestamptz;
begin
  if p_period = 'lifetime' then
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
is 'The calendar period in a zone that a moment lies in.';
revoke execute on function tokenlimits.period_of(text, text, timestamptz) from public, anon, authenticated;

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

-- Judging a request, and putting the verdict into an answer.
--
-- Invariants
--   * judge writes nothing and waits for no counter, so a denial is cheap.
--   * Of several groups without room, the answer is about the one that will have room first.

create or replace function tokenlimits.require_group(p_group_id uuid)
returns public.user_groups
language plpgsql
stable
set search_path = ''
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
      'It may have been deleted; list the groups to see which there are.'
    );
  end if;
  return v_group;
end
$$;
comment on function tokenlimits.require_group(uuid) is 'The group of that id; raises TL002 when there is none.';
revoke execute on function tokenlimits.require_group(uuid) from public, anon, authenticated;
grant execute on function tokenlimits.require_group(uuid) to authenticated, service_role;

-- The groups that may pay for a user, in the order in which they are tried.
create or replace function tokenlimits.paying_groups(p_user_id uuid, p_group_id uuid default null)
returns uuid[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_ids uuid[] := array(
    select g.id
    from public.group_memberships as m
    inner join public.user_groups as g on g.id = m.group_id
    where m.user_id = p_user_id
    order by g.priority desc, m.joined_at, g.id
  );
begin
  if v_ids = '{}' then
    v_ids := array(select g.id from public.user_groups as g where g.is_default);
  end if;
  if p_group_id is null then
    return v_ids;
  elsif p_group_id = any(v_ids) then
    return array[p_group_id];
  end if;
  return '{}';
end
$$;
comment on function tokenlimits.paying_groups(uuid, uuid)
is 'A user''s groups by priority, then by when they joined; the default group for a user in none; or the pinned one.';
revoke execute on function tokenlimits.paying_groups(uuid, uuid) from public, anon, authenticated;

do $do$
begin
  if to_regtype('tokenlimits.verdict') is null then
    create type tokenlimits.verdict as (
      allowed boolean,
      reason text,
      group_id uuid,
      states tokenlimits.limit_state[],
      denied_by tokenlimits.limit_state,
      at timestamptz
    );
  end if;
end
$do$;

-- The verdict before any group was looked at.
create or replace function tokenlimits.unjudged(p_group_ids uuid[], p_at timestamptz)
returns tokenlimits.verdict
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  v_verdict.allowed := false;
  v_verdict.reason := case when p_group_ids = '{}' then 'not_in_group' else 'no_limit_for_kind' end;
  v_verdict.at := p_at;
  return v_verdict;
end
$$;
comment on function tokenlimits.unjudged(uuid[], timestamptz) is 'The verdict while no group has been looked at.';
revoke execute on function tokenlimits.unjudged(uuid[], timestamptz) from public, anon, authenticated;

-- One group more in a verdict: whether it pays, or how long until it could.
create or replace function tokenlimits.weigh(
  p_verdict tokenlimits.verdict,
  p_group_id uuid,
  p_states tokenlimits.limit_state[],
  p_cost bigint
)
returns tokenlimits.verdict
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_state tokenlimits.limit_state;
  v_full tokenlimits.limit_state;
begin
  if p_states = '{}' then
    return p_verdict;
  end if;
  foreach v_state in array p_states loop
    -- a counter may be ahead of a clock that was set back; the usage belongs to the counter's period then
    p_verdict.at := greatest(p_verdict.at, v_state.since);
    if v_state.used + p_cost > v_state.max then
      -- what can never fit, and a lifetime limit, wait for ever
      if p_cost > v_state.max then
        v_state.until := 'infinity';
      end if;
      if v_full is null or v_state.until > v_full.until then
        v_full := v_state;
      end if;
    end if;
  end loop;
  p_verdict.allowed := v_full is null;
  if p_verdict.allowed or p_verdict.reason <> 'limit_exceeded' or v_full.until < (p_verdict.denied_by).until then
    p_verdict.reason := case when not p_verdict.allowed then 'limit_exceeded' end;
    p_verdict.group_id := p_group_id;
    p_verdict.states := p_states;
    p_verdict.denied_by := v_full;
  end if;
  return p_verdict;
end
$$;
comment on function tokenlimits.weigh(tokenlimits.verdict, uuid, tokenlimits.limit_state[], bigint)
is 'A verdict with one more group looked at: it pays, or may have room before those that were looked at.';
revoke execute on function tokenlimits.weigh(tokenlimits.verdict, uuid, tokenlimits.limit_state[], bigint)
from public, anon, authenticated;

create or replace function tokenlimits.judge(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_group_ids uuid[],
  p_at timestamptz
)
returns tokenlimits.verdict
language plpgsql
stable
set search_path = ''
as $$
declare
  v_verdict tokenlimits.verdict := tokenlimits.unjudged(p_group_ids, p_at);
  v_group_id uuid;
begin
  foreach v_group_id in array p_group_ids loop
    v_verdict := tokenlimits.weigh(
      v_verdict, v_group_id, tokenlimits.limit_states(v_group_id, array[p_user_id], p_kind, p_at), p_cost
    );
    exit when v_verdict.allowed;
  end loop;
  return v_verdict;
end
$$;
comment on function tokenlimits.judge(uuid, text, bigint, uuid[], timestamptz)
is 'Which of the groups pays for a request at a moment, or why none does.';
revoke execute on function tokenlimits.judge(uuid, text, bigint, uuid[], timestamptz) from public, anon, authenticated;

create or replace function tokenlimits.limit_json(p_state tokenlimits.limit_state)
returns jsonb
language plpgsql
immutable
set search_path = ''
as $$
begin
  return jsonb_build_object(
    'kind', p_state.kind,
    'period', p_state.period,
    'scope', p_state.scope,
    'max', p_state.max,
    'used', p_state.used,
    -- greatest() passes over nulls, and unlimited is null
    'remaining', case when p_state.max is not null then greatest(p_state.max - p_state.used, 0) end,
    'reset_at', nullif(p_state.until, 'infinity')
  );
end
$$;
comment on function tokenlimits.limit_json(tokenlimits.limit_state) is 'A limit as clients see it.';
revoke execute on function tokenlimits.limit_json(tokenlimits.limit_state) from public, anon, authenticated;

-- Says it to people: "Image generation limit exceeded: 100 of 100 used this month, resets 2026-12-01 00:00 UTC".
create or replace function tokenlimits.denial_text(
  p_reason text,
  p_kind text,
  p_cost bigint,
  p_denied_by tokenlimits.limit_state,
  p_timezone text
)
returns text
language plpgsql
stable
set search_path = ''
as $$
declare
  v_kind text := replace(p_kind, '_', ' ');
begin
  if p_reason = 'not_in_group' then
    return 'The user is in no group that may pay for this';
  elsif p_reason = 'no_limit_for_kind' then
    return format('None of the user''s groups has a limit for %s generations, so none is allowed', v_kind);
  elsif p_reason = 'busy' then
    return 'Somebody else is changing what the group uses, or its limits, at this moment; ask again';
  end if;
  return upper(left(v_kind, 1)) || substr(v_kind, 2)
    || format(' generation limit exceeded: %s of %s used ', p_denied_by.used, p_denied_by.max)
    || case p_denied_by.scope when 'member' then 'by this user ' else '' end
    || case p_denied_by.period
      when 'day' then 'today'
      when 'lifetime' then 'in total'
      else 'this ' || p_denied_by.period
    end
    || case when p_cost > 1 then format(', %s more asked for', p_cost) else '' end
    || case
      when isfinite(p_denied_by.until)
        then ', resets ' || to_char(p_denied_by.until at time zone p_timezone, 'YYYY-MM-DD HH24:MI ') || p_timezone
      else ''
    end;
end
$$;
comment on function tokenlimits.denial_text(text, text, bigint, tokenlimits.limit_state, text)
is 'Why a request was denied, in a sentence.';
revoke execute on function tokenlimits.denial_text(text, text, bigint, tokenlimits.limit_state, text)
from public, anon, authenticated;

-- The object that workers get. Of an allowed request, remaining and reset_at are those of the limit with the least
-- room; of a denied one, reset_at is when the limit that denied it will have room (null: never by itself).
create or replace function tokenlimits.answer(
  p_kind text,
  p_cost bigint,
  p_reason text,
  p_group_id uuid,
  p_states tokenlimits.limit_state[],
  p_denied_by tokenlimits.limit_state,
  p_usage public.generation_usage,
  p_replayed boolean
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
declare
  v_group record;
  v_state tokenlimits.limit_state;
  v_limits jsonb := '[]';
  v_remaining bigint;
  v_reset_at timestamptz;
begin
  select g.name, g.timezone into v_group
  from public.user_groups as g
  where g.id = p_group_id;
  foreach v_state in array coalesce(p_states, '{}') loop
    v_limits := v_limits || tokenlimits.limit_json(v_state);
    if v_state.max is not null and (v_remaining is null or v_state.max - v_state.used < v_remaining) then
      v_remaining := v_state.max - v_state.used;
      v_reset_at := v_state.until;
    end if;
  end loop;
  if p_reason is not null then
    v_reset_at := p_denied_by.until;
  end if;
  return jsonb_build_object(
    'allowed', p_reason is null,
    'reason', p_reason,
    'error', case
      when p_reason is not null
        then tokenlimits.denial_text(p_reason, p_kind, p_cost, p_denied_by, coalesce(v_group.timezone, 'UTC'))
    end,
    'usage_id', p_usage.id,
    'status', p_usage.status,
    'expires_at', p_usage.expires_at,
    'group', case when p_group_id is not null then jsonb_build_object('id', p_group_id, 'name', v_group.name) end,
    'kind', p_kind,
    'cost', p_cost,
    'limits', v_limits,
    'denied_by', case when p_reason = 'limit_exceeded' then tokenlimits.limit_json(p_denied_by) end,
    'remaining', case when v_remaining is not null then greatest(v_remaining, 0) end,
    'reset_at', nullif(v_reset_at, 'infinity'),
    'retry_after', case
      when p_reason is not null
        then ceil(extract(epoch from nullif(v_reset_at, 'infinity') - tokenlimits.clock()))
    end,
    'replayed', p_replayed
  );
end
$$;
comment on function tokenlimits.answer(
  text, bigint, text, uuid, tokenlimits.limit_state[], tokenlimits.limit_state, public.generation_usage, boolean
) is 'A verdict or a recorded usage as workers see it.';
revoke execute on function tokenlimits.answer(
  text, bigint, text, uuid, tokenlimits.limit_state[], tokenlimits.limit_state, public.generation_usage, boolean
) from public, anon, authenticated;

-- For workers: check-and-record in one step, a look without recording, and what happened elsewhere.
--
-- Invariants
--   * Either the ledger row, the rollup and every counter move, or nothing is written.
--   * No counter passes its limit's max here, and nobody is denied while there is room: a verdict is only carried out
--     if every counter still has room when it is moved, else everything is taken back and judged again.
--   * One live usage per user and idempotency key.

create or replace function tokenlimits.check_request(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text default null,
  p_metadata jsonb default null
)
returns void
language plpgsql
stable
set search_path = ''
as $$
declare
  v_field text;
  v_rule text;
begin
  if p_user_id is null then
    v_field := 'user_id';
    v_rule := 'is required';
  elsif p_kind is null or p_kind !~ '^[a-z][a-z0-9_]{0,31}$' then
    v_field := 'kind';
    v_rule := 'must be 1 to 32 of a-z, 0-9 and _, and begin with a letter';
  elsif p_cost is null or p_cost not between 1 and 1000000000 then
    v_field := 'cost';
    v_rule := 'must be a whole number from 1 to 1000000000';
  elsif char_length(p_idempotency_key) not between 1 and 255 then
    v_field := 'idempotency_key';
    v_rule := 'must have 1 to 255 characters';
  elsif jsonb_typeof(p_metadata) <> 'object' or octet_length(p_metadata::text) > 8192 then
    v_field := 'metadata';
    v_rule := 'must be a JSON object of at most 8192 bytes';
  else
    return;
  end if;
  perform tokenlimits.refuse('TL001', v_field || ': ' || v_rule, v_field, 'Nothing was recorded.');
end
$$;
comment on function tokenlimits.check_request(uuid, text, bigint, text, jsonb)
is 'Refuses a bad request with the field''s name before anything is touched.';
revoke execute on function tokenlimits.check_request(uuid, text, bigint, text, jsonb) from public, anon, authenticated;

create or replace function tokenlimits.is_dead(p_status text, p_expires_at timestamptz, p_at timestamptz)
returns boolean
language plpgsql
immutable
set search_path = ''
as $$
begin
  return p_status not in ('reserved', 'committed') or (p_status = 'reserved' and p_expires_at <= p_at);
end
$$;
comment on function tokenlimits.is_dead(text, timestamptz, timestamptz)
is 'Whether a usage counts no more, so that its key is free.';
revoke execute on function tokenlimits.is_dead(text, timestamptz, timestamptz) from public, anon, authenticated;

create or replace function tokenlimits.refuse_key(p_idempotency_key text, p_usage_id uuid)
returns void
language plpgsql
volatile
set search_path = ''
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
is 'Raises TL008: an idempotency key is bound to another request.';
revoke execute on function tokenlimits.refuse_key(text, uuid) from public, anon, authenticated;

-- The live usage under a key, if any. A key that was used for another request is an error.
create or replace function tokenlimits.usage_under_key(p_user_id uuid, p_idempotency_key text, p_fingerprint uuid)
returns public.generation_usage
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_usage public.generation_usage;
begin
  select * into v_usage
  from public.generation_usage as u
  where u.idempotency_key = p_idempotency_key and u.user_id = p_user_id;
  if not found or tokenlimits.is_dead(v_usage.status, v_usage.expires_at, tokenlimits.clock()) then
    return null;
  elsif v_usage.fingerprint is distinct from p_fingerprint then
    perform tokenlimits.refuse_key(p_idempotency_key, v_usage.id);
  end if;
  return v_usage;
end
$$;
comment on function tokenlimits.usage_under_key(uuid, text, uuid)
is 'The live usage that an idempotency key is bound to.';
revoke execute on function tokenlimits.usage_under_key(uuid, text, uuid) from public, anon, authenticated;

-- Takes a key from a dead usage. Only for somebody who is about to write: a denial must leave the key where it is,
-- since a late commit brings an expired usage back to life.
create or replace function tokenlimits.free_key(p_usage public.generation_usage)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
begin
  update public.generation_usage as u
  set idempotency_key = null
  where
    u.idempotency_key = p_usage.idempotency_key
    and u.user_id = p_usage.user_id
    and tokenlimits.is_dead(u.status, u.expires_at, coalesce(p_usage.settled_at, p_usage.created_at));
  return found;
end
$$;
comment on function tokenlimits.free_key(public.generation_usage)
is 'Takes a usage''s key from a dead one; false when none has it.';
revoke execute on function tokenlimits.free_key(public.generation_usage) from public, anon, authenticated;

-- Puts a usage into the ledger, under its key; false, with nothing written, when the key is taken.
create or replace function tokenlimits.claim(p_usage public.generation_usage)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
begin
  insert into public.generation_usage as u (
    id, group_id, user_id, kind, cost, reserved_cost, status,
    idempotency_key, fingerprint, metadata, created_at, settled_at, expires_at
  )
  values (
    p_usage.id, p_usage.group_id, p_usage.user_id, p_usage.kind, p_usage.cost, p_usage.reserved_cost, p_usage.status,
    p_usage.idempotency_key, p_usage.fingerprint, p_usage.metadata,
    p_usage.created_at, p_usage.settled_at, p_usage.expires_at
  )
  on conflict on constraint generation_usage_key_key do nothing;
  if not found then
    return false;
  end if;
  if p_usage.status = 'reserved' then
    insert into tokenlimits.holds (usage_id, group_id, user_id, kind, cost, created_at, expires_at)
    values (
      p_usage.id, p_usage.group_id, p_usage.user_id, p_usage.kind, p_usage.cost,
      p_usage.created_at, p_usage.expires_at
    );
  end if;
  return true;
end
$$;
comment on function tokenlimits.claim(public.generation_usage)
is 'Puts a usage into the ledger unless its key is taken.';
revoke execute on function tokenlimits.claim(public.generation_usage) from public, anon, authenticated;

-- Writes one usage: claims the key, then the rollup, then the counters, the group's (which all its members share) last,
-- so that they are held for the shortest time. Raises TL099 when a counter has moved on or has no room any more.
-- Answers the counters as they are then; null when the key is taken.
create or replace function tokenlimits.write_usage(
  p_usage public.generation_usage,
  p_states tokenlimits.limit_state[],
  p_enforce boolean
)
returns tokenlimits.limit_state[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_bucket timestamptz := tokenlimits.rollup_bucket(p_usage.created_at);
  v_slot smallint := tokenlimits.free_slot(p_usage.group_id);
  v_state tokenlimits.limit_state;
  v_states tokenlimits.limit_state[] := '{}';
begin
  if p_states[1].expired is not null then
    return tokenlimits.write_and_sweep(p_usage, p_enforce);
  elsif not tokenlimits.claim(p_usage) and not (tokenlimits.free_key(p_usage) and tokenlimits.claim(p_usage)) then
    return null;
  end if;

  -- nearly always there: a plain update costs half of an upsert
  update tokenlimits.usage_rollup as r
  set cost = r.cost + p_usage.cost, generations = r.generations + 1
  where r.group_id = p_usage.group_id and r.kind = p_usage.kind and r.bucket = v_bucket and r.slot = v_slot;
  if not found then
    insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
    values (p_usage.group_id, p_usage.kind, v_bucket, v_slot, p_usage.cost, 1)
    on conflict on constraint usage_rollup_pkey do update
    set cost = r.cost + excluded.cost, generations = r.generations + 1;
  end if;

  foreach v_state in array p_states loop
    -- what was recorded for an earlier period counts for none of the current one
    if p_usage.created_at >= v_state.since then
      if v_state.is_open is not true then
        perform tokenlimits.open_counter(v_state);
      end if;
      update tokenlimits.counters as c
      set used = c.used + p_usage.cost
      where
        c.subject = v_state.subject
        and c.counter_id = v_state.counter_id
        and p_usage.created_at >= c.since
        and p_usage.created_at < c.until
        and (not p_enforce or v_state.max is null or c.used + p_usage.cost <= v_state.max)
      returning c.used into v_state.used;
      if not found then
        raise sqlstate 'TL099';
      end if;
    end if;
    v_states := v_states || v_state;
  end loop;
  return v_states;
end
$$;
comment on function tokenlimits.write_usage(public.generation_usage, tokenlimits.limit_state[], boolean)
is 'Writes a usage to ledger, rollup and counters, or raises TL099.';
revoke execute on function tokenlimits.write_usage(public.generation_usage, tokenlimits.limit_state[], boolean)
from public, anon, authenticated;

-- The state was read a moment ago. If somebody has written since, they have opened the counter, and it stays theirs.
create or replace function tokenlimits.open_counter(p_state tokenlimits.limit_state)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  insert into tokenlimits.counters as c (subject, counter_id, since, until, used)
  values (
    p_state.subject, p_state.counter_id, p_state.since, p_state.until, p_state.used + coalesce(p_state.expired, 0)
  )
  on conflict on constraint counters_pkey do update
  set since = excluded.since, until = excluded.until, used = excluded.used
  where c.until <= excluded.since;
  -- new counters are rare: the moment to drop those of limits that are gone, so that they never pile up
  if p_state.scope = 'member' then
    perform tokenlimits.drop_stale_counters(p_state.subject);
  end if;
end
$$;
comment on function tokenlimits.open_counter(tokenlimits.limit_state)
is 'Makes a counter, or rolls it into its new period.';
revoke execute on function tokenlimits.open_counter(tokenlimits.limit_state) from public, anon, authenticated;

-- Judges and writes, until a verdict holds. Every round but the last was overtaken by another call that got through.
create or replace function tokenlimits.track(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb,
  p_ttl interval default null
)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_group_ids uuid[];
  v_verdict tokenlimits.verdict;
  v_usage public.generation_usage;
  v_live public.generation_usage;
  v_states tokenlimits.limit_state[];
  v_taken boolean;
begin
  perform tokenlimits.check_request(p_user_id, p_kind, p_cost, p_idempotency_key, p_metadata);
  v_usage.user_id := p_user_id;
  v_usage.kind := p_kind;
  v_usage.cost := p_cost;
  v_usage.reserved_cost := case when p_ttl is not null then p_cost end;
  v_usage.status := case when p_ttl is null then 'committed' else 'reserved' end;
  v_usage.idempotency_key := p_idempotency_key;
  v_usage.fingerprint := md5(
    concat_ws(' ', case when p_ttl is null then 'track' else 'reserve' end, p_kind, p_cost, p_group_id)
  )::uuid;
  v_usage.metadata := coalesce(p_metadata, '{}');
  v_usage.created_at := '-infinity';

  v_group_ids := tokenlimits.paying_groups(p_user_id, p_group_id);
  perform tokenlimits.lock_groups(v_group_ids);
  loop
    -- never before the moment that an earlier round came to, or a clock that was set back would go round for ever
    v_verdict := tokenlimits.judge(
      p_user_id, p_kind, p_cost, v_group_ids, greatest(tokenlimits.clock(), v_usage.created_at)
    );
    if v_verdict.allowed then
      v_usage.id := tokenlimits.uuid_v7();
      v_usage.group_id := v_verdict.group_id;
      v_usage.created_at := v_verdict.at;
      v_usage.settled_at := case when p_ttl is null then v_verdict.at end;
      v_usage.expires_at := v_verdict.at + p_ttl;
      v_taken := false;
      begin
        v_states := tokenlimits.write_usage(v_usage, v_verdict.states, p_enforce => true);
        v_taken := v_states is null;
        if v_taken then
          -- lets go of the rows that it has locked: another round may lock them in another order
          raise sqlstate 'TL099';
        end if;
      exception
        when sqlstate 'TL099' then
          continue when not v_taken;
      end;
      if v_states is not null then
        return tokenlimits.answer(
          p_kind, p_cost, null, v_usage.group_id, v_states, null, v_usage, p_replayed => false
        );
      end if;
    end if;
    if p_idempotency_key is not null then
      v_live := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_usage.fingerprint);
      if v_live.id is not null then
        v_states := tokenlimits.limit_states(v_live.group_id, array[p_user_id], p_kind, tokenlimits.clock());
        return tokenlimits.answer(
          p_kind, v_live.cost, null, v_live.group_id, v_states, null, v_live, p_replayed => true
        );
      end if;
    end if;
    if not v_verdict.allowed then
      if v_verdict.reason = 'not_in_group' and p_group_id is not null then
        -- not before: a repeated call is answered also when its group is gone
        perform tokenlimits.require_group(p_group_id);
      end if;
      if v_verdict.states[1].expired is not null then
        perform tokenlimits.sweep(v_verdict.group_id, p_kind, v_verdict.at);
      end if;
      return tokenlimits.answer(
        p_kind, p_cost, v_verdict.reason, v_verdict.group_id, v_verdict.states, v_verdict.denied_by, null,
        p_replayed => false
      );
    end if;
  end loop;
end
$$;
comment on function tokenlimits.track(uuid, text, bigint, text, uuid, jsonb, interval) is 'What track_generation does.';
revoke execute on function tokenlimits.track(uuid, text, bigint, text, uuid, jsonb, interval)
from public, anon, authenticated;
grant execute on function tokenlimits.track(uuid, text, bigint, text, uuid, jsonb, interval) to service_role;

create or replace function public.track_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
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
  return tokenlimits.track(
    p_user_id, p_kind, p_cost, p_idempotency_key, p_group_id, tokenlimits.json_argument(p_metadata)
  );
end
$$;
comment on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
is 'Checks every limit and records the generation, in one step: is it allowed, what remains, when does it reset.';
revoke execute on function public.track_generation(uuid, text, bigint, text, uuid, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.track_generation(uuid, text, bigint, text, uuid, jsonb) to service_role;

create or replace function tokenlimits.look(p_user_id uuid, p_kind text, p_cost bigint, p_group_id uuid)
returns jsonb
language plpgsql
stable
-- definer: counters are private
security definer
set search_path = ''
as $$
declare
  v_verdict tokenlimits.verdict;
begin
  perform tokenlimits.check_request(p_user_id, p_kind, p_cost);
  if current_setting('transaction_isolation') <> 'read committed' then
    perform tokenlimits.refuse_isolation();
  end if;
  v_verdict := tokenlimits.judge(
    p_user_id, p_kind, p_cost, tokenlimits.paying_groups(p_user_id, p_group_id), tokenlimits.clock()
  );
  if v_verdict.reason = 'not_in_group' and p_group_id is not null then
    perform tokenlimits.require_group(p_group_id);
  end if;
  return tokenlimits.answer(
    p_kind, p_cost, v_verdict.reason, v_verdict.group_id, v_verdict.states, v_verdict.denied_by, null,
    p_replayed => false
  );
end
$$;
comment on function tokenlimits.look(uuid, text, bigint, uuid) is 'What check_generation does.';
revoke execute on function tokenlimits.look(uuid, text, bigint, uuid) from public, anon, authenticated;
grant execute on function tokenlimits.look(uuid, text, bigint, uuid) to service_role;

create or replace function public.check_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_group_id uuid default null
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.look(p_user_id, p_kind, p_cost, p_group_id);
end
$$;
comment on function public.check_generation(uuid, text, bigint, uuid)
is 'What track_generation would answer now; records nothing.';
revoke execute on function public.check_generation(uuid, text, bigint, uuid)
from public, anon, authenticated, service_role;
grant execute on function public.check_generation(uuid, text, bigint, uuid) to service_role;

-- Past or outside usage: it has happened, so it is never denied, and counters may pass their max.
create or replace function tokenlimits.record(
  p_user_id uuid,
  p_kind text,
  p_cost bigint,
  p_created_at timestamptz,
  p_idempotency_key text,
  p_group_id uuid,
  p_metadata jsonb
)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := tokenlimits.clock();
  v_usage public.generation_usage;
  v_live public.generation_usage;
  v_states tokenlimits.limit_state[];
  v_taken boolean;
begin
  perform tokenlimits.check_request(p_user_id, p_kind, p_cost, p_idempotency_key, p_metadata);
  -- a minute for clocks that differ
  if p_created_at > v_now + interval '1 minute' or not isfinite(p_created_at) then
    perform tokenlimits.refuse(
      'TL001',
      'created_at: must not lie in the future',
      'created_at',
      'Nothing was recorded.'
    );
  end if;
  v_usage.user_id := p_user_id;
  v_usage.kind := p_kind;
  v_usage.cost := p_cost;
  v_usage.status := 'committed';
  v_usage.idempotency_key := p_idempotency_key;
  v_usage.fingerprint := md5(concat_ws(' ', 'record', p_kind, p_cost, p_group_id))::uuid;
  v_usage.metadata := coalesce(p_metadata, '{}');
  if p_idempotency_key is not null then
    -- first: a repeated call is answered also when the user has left or the group is gone
    v_live := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_usage.fingerprint);
  end if;
  if v_live.id is null then
    v_usage.group_id := tokenlimits.recording_group(p_user_id, p_kind, p_group_id);
    perform tokenlimits.lock_groups(array[v_usage.group_id]);
  end if;
  while v_live.id is null loop
    v_now := greatest(tokenlimits.clock(), v_now);
    v_states := tokenlimits.limit_states(v_usage.group_id, array[p_user_id], p_kind, v_now);
    v_now := greatest(v_now, (select max(s.since) from unnest(v_states) as s));
    v_usage.id := tokenlimits.uuid_v7();
    v_usage.created_at := coalesce(least(p_created_at, v_now), v_now);
    v_usage.settled_at := v_now;
    v_taken := false;
    begin
      v_states := tokenlimits.write_usage(v_usage, v_states, p_enforce => false);
      v_taken := v_states is null;
      if v_taken then
        raise sqlstate 'TL099';
      end if;
    exception
      when sqlstate 'TL099' then
        continue when not v_taken;
    end;
    if v_states is not null then
      return tokenlimits.answer(p_kind, p_cost, null, v_usage.group_id, v_states, null, v_usage, p_replayed => false);
    end if;
    v_live := tokenlimits.usage_under_key(p_user_id, p_idempotency_key, v_usage.fingerprint);
  end loop;
  v_states := tokenlimits.limit_states(v_live.group_id, array[p_user_id], p_kind, v_now);
  return tokenlimits.answer(p_kind, v_live.cost, null, v_live.group_id, v_states, null, v_live, p_replayed => true);
end
$$;
comment on function tokenlimits.record(uuid, text, bigint, timestamptz, text, uuid, jsonb)
is 'What record_generation does.';
revoke execute on function tokenlimits.record(uuid, text, bigint, timestamptz, text, uuid, jsonb)
from public, anon, authenticated;
grant execute on function tokenlimits.record(uuid, text, bigint, timestamptz, text, uuid, jsonb) to service_role;

-- Any group when named, for people leave; else the first of the user's that has a limit for the kind, else their first.
create or replace function tokenlimits.recording_group(p_user_id uuid, p_kind text, p_group_id uuid)
returns uuid
language plpgsql
stable
set search_path = ''
as $$
declare
  v_group_id uuid;
begin
  if p_group_id is not null then
    return (tokenlimits.require_group(p_group_id)).id;
  end if;
  select g.id into v_group_id
  from unnest(tokenlimits.paying_groups(p_user_id)) with ordinality as g (id, place)
  order by
    exists (select from public.group_limits as l where l.group_id = g.id and l.kind = p_kind) desc,
    g.place
  limit 1;
  if v_group_id is null then
    perform tokenlimits.refuse(
      'TL001',
      'group_id: is required, since the user is in no group',
      'group_id',
      'Name the group that this usage belongs to.'
    );
  end if;
  return v_group_id;
end
$$;
comment on function tokenlimits.recording_group(uuid, text, uuid) is 'The group that past usage is booked on.';
revoke execute on function tokenlimits.recording_group(uuid, text, uuid) from public, anon, authenticated;

create or replace function public.record_generation(
  p_user_id uuid,
  p_kind text,
  p_cost bigint default 1,
  p_created_at timestamptz default null,
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
  return tokenlimits.record(
    p_user_id, p_kind, p_cost, p_created_at, p_idempotency_key, p_group_id, tokenlimits.json_argument(p_metadata)
  );
end
$$;
comment on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
is 'Records past or outside usage: moves the counters of its period, never denies.';
revoke execute on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.record_generation(uuid, text, bigint, timestamptz, text, uuid, jsonb) to service_role;

-- What has expired is taken back: many usages at once move rollup and counters.
--
-- Invariants
--   * A hold that has expired counts as released from that moment on. Nobody has to sweep it for that: readers subtract
--     it, and whoever writes for its group and kind sweeps it on the way.
--   * The ledger is written first: a counter that is counted afresh afterwards has all that is about to be moved.
--   * Locks in the order of 30_counters.sql: ledger rows by id before the own key, then rollup, members by id, group.

do $do$
begin
  if to_regtype('tokenlimits.usage_move') is null then
    create type tokenlimits.usage_move as (
      user_id uuid,
      created_at timestamptz,
      cost bigint,
      generations integer
    );
  end if;
end
$do$;

-- the first version, which locked too
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.lock_expired(uuid, text, timestamptz, uuid);

create or replace function tokenlimits.expired_holds(p_group_id uuid, p_kind text, p_at timestamptz)
returns uuid[]
language plpgsql
stable
set search_path = ''
as $$
begin
  return array(
    select h.usage_id
    from tokenlimits.holds as h
    where h.group_id = p_group_id and h.kind = p_kind and h.expires_at <= p_at
  );
end
$$;
comment on function tokenlimits.expired_holds(uuid, text, timestamptz)
is 'The holds of a group and kind that have expired, and that nobody has swept yet.';
revoke execute on function tokenlimits.expired_holds(uuid, text, timestamptz) from public, anon, authenticated;

create or replace function tokenlimits.lock_usages(p_usage_ids uuid[])
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  perform
  from public.generation_usage as u
  where u.id = any(p_usage_ids)
  order by u.id
  for update;
end
$$;
comment on function tokenlimits.lock_usages(uuid[]) is 'Locks rows of the ledger, in one order.';
revoke execute on function tokenlimits.lock_usages(uuid[]) from public, anon, authenticated;

-- Takes the keys from those of the locked usages that are dead. By id: a key that has gone to another row meanwhile is
-- that one's, which was not locked in the one order.
create or replace function tokenlimits.free_keys(p_usage_ids uuid[], p_at timestamptz)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  update public.generation_usage as u
  set idempotency_key = null
  where u.id = any(p_usage_ids) and tokenlimits.is_dead(u.status, u.expires_at, p_at);
end
$$;
comment on function tokenlimits.free_keys(uuid[], timestamptz) is 'Takes the keys from dead usages.';
revoke execute on function tokenlimits.free_keys(uuid[], timestamptz) from public, anon, authenticated;

-- the first version, which was for one group and kind
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.expire(uuid[], timestamptz);

-- Marks those of the locked usages that are expired holds, and answers what that takes back.
create or replace function tokenlimits.expire_holds(p_usage_ids uuid[], p_at timestamptz)
returns table (group_id uuid, kind text, move tokenlimits.usage_move)
language plpgsql
volatile
set search_path = ''
as $$
begin
  return query
  with expired as (
    update public.generation_usage as u
    set status = 'expired', settled_at = u.expires_at
    where u.id = any(p_usage_ids) and u.status = 'reserved' and u.expires_at <= p_at
    returning u.id, u.group_id, u.kind, u.user_id, u.created_at, u.cost
  ),

  forgotten as (
    delete from tokenlimits.holds as h
    where h.usage_id in (select e.id from expired as e)
  )

  select e.group_id, e.kind, row(e.user_id, e.created_at, -e.cost, -1)::tokenlimits.usage_move
  from expired as e;
end
$$;
comment on function tokenlimits.expire_holds(uuid[], timestamptz)
is 'Marks holds as expired; answers what is to be taken back.';
revoke execute on function tokenlimits.expire_holds(uuid[], timestamptz) from public, anon, authenticated;

-- the first versions
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.move_usage(uuid, text, tokenlimits.usage_move[], timestamptz, uuid);
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.move_counter(
  tokenlimits.limit_state, tokenlimits.usage_move[], uuid, boolean
);

-- Moves the rollup and every counter of a group and kind by many moves at once, and answers the counters as they are
-- then. The ledger is as it will be: a counter that is counted afresh here has the moves in it already, so it is opened
-- without them. Raises TL099 when a counter has moved on, or has no room for what p_enforce puts into it; what is only
-- taken back is never too much, even where a limit was lowered below what is used.
create or replace function tokenlimits.move_usage(
  p_group_id uuid,
  p_kind text,
  p_moves tokenlimits.usage_move[],
  p_at timestamptz,
  p_enforce boolean
)
returns tokenlimits.limit_state[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_slot smallint := tokenlimits.free_slot(p_group_id);
  v_states tokenlimits.limit_state[] := tokenlimits.limit_states(
    p_group_id, array(select distinct m.user_id from unnest(p_moves) as m), p_kind, p_at
  );
  v record;
begin
  insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
  select
    p_group_id, p_kind, tokenlimits.rollup_bucket(m.created_at) as bucket, v_slot, sum(m.cost), sum(m.generations)
  from unnest(p_moves) as m
  group by bucket
  order by bucket
  on conflict on constraint usage_rollup_pkey do update
  set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations;

  for v in
    select s.place, sum(m.cost)::bigint as cost, max(m.created_at) as last, bool_or(m.cost > 0) as adds
    from unnest(v_states) with ordinality as s (
      counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, place
    )
    inner join (
      select 'member' as scope, n.user_id as subject, n.created_at, n.cost
      from unnest(p_moves) as n
      union all
      select 'group' as scope, p_group_id as subject, n.created_at, n.cost
      from unnest(p_moves) as n
    ) as m on m.scope = s.scope and m.subject = s.subject and m.created_at >= s.since
    group by s.place
    order by s.place
  loop
    v_states[v.place].used := tokenlimits.move_counter(v_states[v.place], v.cost, v.last, p_enforce and v.adds);
  end loop;
  return v_states;
end
$$;
comment on function tokenlimits.move_usage(uuid, text, tokenlimits.usage_move[], timestamptz, boolean)
is 'Moves rollup and counters by many moves at once, or raises TL099.';
revoke execute on function tokenlimits.move_usage(uuid, text, tokenlimits.usage_move[], timestamptz, boolean)
from public, anon, authenticated;

create or replace function tokenlimits.move_counter(
  p_state tokenlimits.limit_state,
  p_cost bigint,
  p_last timestamptz,
  p_enforce boolean
)
returns bigint
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_used bigint;
begin
  if p_state.is_open is null then
    p_state.used := p_state.used - p_cost;
  end if;
  if p_state.is_open is not true then
    perform tokenlimits.open_counter(p_state);
  end if;
  update tokenlimits.counters as c
  set used = c.used + p_cost
  where
    c.subject = p_state.subject
    and c.counter_id = p_state.counter_id
    and p_last >= c.since
    and p_last < c.until
    and (not p_enforce or p_state.max is null or c.used + p_cost <= p_state.max)
  returning c.used into v_used;
  if not found then
    raise sqlstate 'TL099';
  end if;
  return v_used;
end
$$;
comment on function tokenlimits.move_counter(tokenlimits.limit_state, bigint, timestamptz, boolean)
is 'Moves one counter and answers what it holds then, or raises TL099.';
revoke execute on function tokenlimits.move_counter(tokenlimits.limit_state, bigint, timestamptz, boolean)
from public, anon, authenticated;

-- What write_usage does when there are expired holds: their cost is taken back in the same step.
create or replace function tokenlimits.write_and_sweep(p_usage public.generation_usage, p_enforce boolean)
returns tokenlimits.limit_state[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_at timestamptz := coalesce(p_usage.settled_at, p_usage.created_at);
  v_dead public.generation_usage;
  v_expired uuid[];
begin
  -- a dead usage under the same key may be of another group or kind, and is locked in one order with the rest
  select * into v_dead
  from public.generation_usage as u
  where
    u.idempotency_key = p_usage.idempotency_key
    and u.user_id = p_usage.user_id
    and tokenlimits.is_dead(u.status, u.expires_at, v_at);
  v_expired := tokenlimits.expired_holds(p_usage.group_id, p_usage.kind, v_at);
  perform tokenlimits.lock_usages(v_expired || v_dead.id);
  perform tokenlimits.free_keys(array[v_dead.id], v_at);
  if not tokenlimits.claim(p_usage) then
    return null;
  end if;
  perform tokenlimits.move_usage(
    p_usage.group_id, p_usage.kind,
    array(select e.move from tokenlimits.expire_holds(v_expired, v_at) as e)
    || row(p_usage.user_id, p_usage.created_at, p_usage.cost, 1)::tokenlimits.usage_move,
    v_at, p_enforce
  );
  return tokenlimits.limit_states(p_usage.group_id, array[p_usage.user_id], p_usage.kind, v_at);
end
$$;
comment on function tokenlimits.write_and_sweep(public.generation_usage, boolean)
is 'Writes a usage, and sweeps the expired holds of its group and kind.';
revoke execute on function tokenlimits.write_and_sweep(public.generation_usage, boolean)
from public, anon, authenticated;

create or replace function tokenlimits.sweep(p_group_id uuid, p_kind text, p_at timestamptz)
returns bigint
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_at timestamptz := p_at;
  v_expired uuid[];
  v_moves tokenlimits.usage_move[];
begin
  loop
    begin
      v_expired := tokenlimits.expired_holds(p_group_id, p_kind, v_at);
      perform tokenlimits.lock_usages(v_expired);
      v_moves := array(select e.move from tokenlimits.expire_holds(v_expired, v_at) as e);
      if v_moves <> '{}' then
        perform tokenlimits.move_usage(p_group_id, p_kind, v_moves, v_at, p_enforce => false);
      end if;
      return cardinality(v_moves);
    exception
      when sqlstate 'TL099' then
        v_at := greatest(v_at, tokenlimits.clock());
    end;
  end loop;
end
$$;
comment on function tokenlimits.sweep(uuid, text, timestamptz)
is 'Takes back what expired holds of a group and kind held, and says how many there were.';
revoke execute on function tokenlimits.sweep(uuid, text, timestamptz) from public, anon, authenticated;

-- For a job that likes tidiness (sql/optional/pg_cron.sql): correctness never needs it. One group and kind in one
-- transaction, since the rows of two would be locked in an order that nobody else follows.
create or replace function tokenlimits.tidy()
returns bigint
language plpgsql
volatile
set search_path = ''
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
  perform tokenlimits.lock_groups(array[v_oldest.group_id]);
  return tokenlimits.sweep(v_oldest.group_id, v_oldest.kind, v_at);
end
$$;
comment on function tokenlimits.tidy()
is 'Sweeps the expired holds of the group and kind with the oldest one, and says how many there were.';
revoke execute on function tokenlimits.tidy() from public, anon, authenticated;

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

-- Many requests in one transaction, first step: reading them.
--
-- Invariants
--   * A bad request doesn't touch the others: what a single call raises is an answer here, of reason 'refused'.
--   * An item is open until it has an answer; what was answered is never judged, and writes nothing.
--   * The first place of a key stands for all the places that have it.

-- One request. It needs nothing more once it has an answer.
do $do$
begin
  if to_regtype('tokenlimits.batch_item') is null then
    create type tokenlimits.batch_item as (
      place integer,
      user_id uuid,
      kind text,
      cost bigint,
      idempotency_key text,
      group_id uuid,
      metadata jsonb,
      fingerprint uuid,
      -- the first place with the same key
      first_place integer,
      -- those that may pay, in the order in which they are tried
      group_ids uuid[],
      -- the usage that had the key before, and counts no more
      dead_id uuid,
      answer jsonb
    );
  end if;
end
$do$;

-- Answers what a single call would raise.
create or replace function tokenlimits.refused(
  p_item tokenlimits.batch_item,
  p_code text,
  p_message text,
  p_detail text,
  p_hint text
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.answer(p_item.kind, p_item.cost, 'refused', null, '{}', null, null, p_replayed => false)
    || jsonb_build_object(
      'error', concat_ws('. ', p_message, nullif(p_hint, '')), 'code', p_code, 'detail', nullif(p_detail, '')
    );
end
$$;
comment on function tokenlimits.refused(tokenlimits.batch_item, text, text, text, text)
is 'The answer to a request of a batch that a single call would refuse with this error.';
revoke execute on function tokenlimits.refused(tokenlimits.batch_item, text, text, text, text)
from public, anon, authenticated;

create or replace function tokenlimits.read_request(p_request jsonb, p_place integer)
returns tokenlimits.batch_item
language plpgsql
stable
set search_path = ''
as $$
declare
  v_item tokenlimits.batch_item;
  v_message text;
  v_detail text;
  v_hint text;
begin
  v_item.place := p_place;
  v_item.kind := p_request ->> 'kind';
  v_item.user_id := p_request ->> 'user_id';
  v_item.cost := case when p_request ? 'cost' then p_request ->> 'cost' else '1' end;
  v_item.idempotency_key := p_request ->> 'idempotency_key';
  v_item.group_id := p_request ->> 'group_id';
  v_item.metadata := nullif(p_request -> 'metadata', 'null');
  perform tokenlimits.check_request(
    v_item.user_id, v_item.kind, v_item.cost, v_item.idempotency_key, v_item.metadata
  );
  v_item.fingerprint := md5(concat_ws(' ', 'track', v_item.kind, v_item.cost, v_item.group_id))::uuid;
  return v_item;
exception
  when sqlstate 'TL001' or data_exception then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    v_item.answer := tokenlimits.refused(v_item, sqlstate, v_message, v_detail, v_hint);
    return v_item;
end
$$;
comment on function tokenlimits.read_request(jsonb, integer) is 'One request of a batch; a bad one is answered.';
revoke execute on function tokenlimits.read_request(jsonb, integer) from public, anon, authenticated;

create or replace function tokenlimits.read_requests(p_requests jsonb)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_items tokenlimits.batch_item[];
  v_group_ids uuid[];
  v_place integer;
  v record;
begin
  if jsonb_typeof(p_requests) is distinct from 'array' or jsonb_array_length(p_requests) > 1000 then
    perform tokenlimits.refuse(
      'TL001', 'requests: must be a JSON array of at most 1000 requests', 'requests', 'Nothing was recorded.'
    );
  end if;
  select array_agg(tokenlimits.read_request(r.request, r.place::integer) order by r.place) into v_items
  from jsonb_array_elements(p_requests) with ordinality as r (request, place);
  for v in
    select i.place, min(i.place) over (partition by i.user_id, i.idempotency_key) as first_place
    from unnest(v_items) as i
    where i.idempotency_key is not null and i.answer is null
  loop
    v_items[v.place].first_place := v.first_place;
  end loop;
  for v in
    select i.user_id, i.group_id, array_agg(i.place) as places
    from unnest(v_items) as i
    where i.answer is null
    group by i.user_id, i.group_id
  loop
    v_group_ids := tokenlimits.paying_groups(v.user_id, v.group_id);
    foreach v_place in array v.places loop
      v_items[v_place].group_ids := v_group_ids;
    end loop;
  end loop;
  return coalesce(v_items, '{}');
end
$$;
comment on function tokenlimits.read_requests(jsonb) is 'The requests of a batch.';
revoke execute on function tokenlimits.read_requests(jsonb) from public, anon, authenticated;

create or replace function tokenlimits.replayed(p_item tokenlimits.batch_item, p_usage public.generation_usage)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.answer(
    p_item.kind, p_usage.cost, null, p_usage.group_id,
    tokenlimits.limit_states(p_usage.group_id, array[p_item.user_id], p_item.kind, tokenlimits.clock()),
    null, p_usage, p_replayed => true
  );
end
$$;
comment on function tokenlimits.replayed(tokenlimits.batch_item, public.generation_usage)
is 'The answer to an item whose key has a live usage.';
revoke execute on function tokenlimits.replayed(tokenlimits.batch_item, public.generation_usage)
from public, anon, authenticated;

-- Answers the items whose keys have a live usage, and notes which keys a dead one has.
create or replace function tokenlimits.replay(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  v record;
  v_item tokenlimits.batch_item;
  v_live public.generation_usage;
  v_message text;
  v_detail text;
  v_hint text;
begin
  for v in
    select i.place, u.id
    from unnest(p_items) as i
    inner join public.generation_usage as u on u.idempotency_key = i.idempotency_key and u.user_id = i.user_id
    where i.answer is null
  loop
    v_item := p_items[v.place];
    begin
      v_live := tokenlimits.usage_under_key(v_item.user_id, v_item.idempotency_key, v_item.fingerprint);
      if v_live.id is null then
        v_item.dead_id := v.id;
      else
        v_item.answer := tokenlimits.replayed(v_item, v_live);
      end if;
    exception
      when sqlstate 'TL008' then
        get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
        v_item.answer := tokenlimits.refused(v_item, sqlstate, v_message, v_detail, v_hint);
    end;
    p_items[v.place] := v_item;
  end loop;
  return p_items;
end
$$;
comment on function tokenlimits.replay(tokenlimits.batch_item[])
is 'A batch with the items answered whose idempotency keys are taken.';
revoke execute on function tokenlimits.replay(tokenlimits.batch_item[]) from public, anon, authenticated;

create or replace function tokenlimits.batch_pairs(p_items tokenlimits.batch_item[])
returns table (group_id uuid, kind text, user_ids uuid[])
language plpgsql
immutable
set search_path = ''
as $$
begin
  return query
  select g.id, i.kind, array_agg(distinct i.user_id)
  from unnest(p_items) as i
  cross join lateral unnest(i.group_ids) as g (id)
  where i.answer is null
  group by g.id, i.kind;
end
$$;
comment on function tokenlimits.batch_pairs(tokenlimits.batch_item[])
is 'The groups and kinds that the open items of a batch are about, and the users of each.';
revoke execute on function tokenlimits.batch_pairs(tokenlimits.batch_item[]) from public, anon, authenticated;

-- Many requests in one transaction, second step: judging them, in memory.
--
-- Invariants
--   * Each is judged by what those before it have left, as if it had come alone.
--   * Nothing is written here, and no counter is waited for. Each limit is read once, however many items it binds.

-- What an item is charged for, and the places of its limits among those that the batch is about. A repeated key in one
-- batch is a charge of the same usage, replayed.
do $do$
begin
  if to_regtype('tokenlimits.batch_charge') is null then
    create type tokenlimits.batch_charge as (
      place integer,
      usage public.generation_usage,
      states integer[],
      replayed boolean
    );
  end if;
end
$do$;

-- Every limit that the open items are about, once, and the group that each belongs to.
create or replace function tokenlimits.batch_states(
  p_items tokenlimits.batch_item[],
  p_at timestamptz,
  out states tokenlimits.limit_state[],
  out group_ids uuid[]
)
returns record
language plpgsql
stable
set search_path = ''
as $$
begin
  select
    coalesce(array_agg(
      row(
        s.counter_id, s.subject, s.kind, s.period, s.scope, s.max, s.since, s.until, s.used, s.expired, s.is_open
      )::tokenlimits.limit_state
      order by p.group_id, p.kind, s.place
    ), '{}'),
    coalesce(array_agg(p.group_id order by p.group_id, p.kind, s.place), '{}')
  into states, group_ids
  from tokenlimits.batch_pairs(p_items) as p
  cross join lateral unnest(
    tokenlimits.limit_states(p.group_id, p.user_ids, p.kind, p_at)
  ) with ordinality as s (
    counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, place
  );
end
$$;
comment on function tokenlimits.batch_states(tokenlimits.batch_item[], timestamptz)
is 'The limits that a batch is about, and their groups.';
revoke execute on function tokenlimits.batch_states(tokenlimits.batch_item[], timestamptz)
from public, anon, authenticated;

-- The groups that may pay for each open item, in the order in which they are tried, with the places of their limits; a
-- row of nulls where no group may.
create or replace function tokenlimits.batch_options(
  p_items tokenlimits.batch_item[],
  p_states tokenlimits.limit_state[],
  p_group_ids uuid[]
)
returns table (place integer, group_id uuid, states integer[], is_first boolean, is_last boolean)
language plpgsql
immutable
set search_path = ''
as $$
begin
  return query
  select
    i.place,
    g.id,
    array_agg(s.no::integer order by s.no) filter (where s.no is not null),
    coalesce(g.rank = 1, true),
    coalesce(g.rank = cardinality(i.group_ids), true)
  from unnest(p_items) as i
  left join lateral unnest(i.group_ids) with ordinality as g (id, rank) on true
  cross join lateral (values ('group', g.id), ('member', i.user_id)) as w (scope, subject)
  left join rows from (unnest(p_states), unnest(p_group_ids)) with ordinality as s (
    counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, group_id, no
  ) on s.group_id = g.id and s.kind = i.kind and s.scope = w.scope and s.subject = w.subject
  where i.answer is null
  group by i.place, i.group_ids, g.id, g.rank
  order by i.place, g.rank;
end
$$;
comment on function tokenlimits.batch_options(tokenlimits.batch_item[], tokenlimits.limit_state[], uuid[])
is 'Who may pay for which item of a batch.';
revoke execute on function tokenlimits.batch_options(tokenlimits.batch_item[], tokenlimits.limit_state[], uuid[])
from public, anon, authenticated;

create or replace function tokenlimits.states_at(p_states tokenlimits.limit_state[], p_places integer[])
returns tokenlimits.limit_state[]
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_states tokenlimits.limit_state[] := '{}';
  v_place integer;
begin
  foreach v_place in array coalesce(p_places, '{}') loop
    v_states := v_states || p_states[v_place];
  end loop;
  return v_states;
end
$$;
comment on function tokenlimits.states_at(tokenlimits.limit_state[], integer[]) is 'Those of some states.';
revoke execute on function tokenlimits.states_at(tokenlimits.limit_state[], integer[])
from public, anon, authenticated;

create or replace function tokenlimits.batch_usage(p_item tokenlimits.batch_item, p_verdict tokenlimits.verdict)
returns public.generation_usage
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_usage public.generation_usage;
begin
  v_usage.id := tokenlimits.uuid_v7();
  v_usage.group_id := p_verdict.group_id;
  v_usage.user_id := p_item.user_id;
  v_usage.kind := p_item.kind;
  v_usage.cost := p_item.cost;
  v_usage.status := 'committed';
  v_usage.idempotency_key := p_item.idempotency_key;
  v_usage.fingerprint := p_item.fingerprint;
  v_usage.metadata := coalesce(p_item.metadata, '{}');
  v_usage.created_at := p_verdict.at;
  v_usage.settled_at := p_verdict.at;
  return v_usage;
end
$$;
comment on function tokenlimits.batch_usage(tokenlimits.batch_item, tokenlimits.verdict)
is 'What an allowed item writes into the ledger.';
revoke execute on function tokenlimits.batch_usage(tokenlimits.batch_item, tokenlimits.verdict)
from public, anon, authenticated;

-- Why an item is not charged: its key is another one's, its group doesn't exist, or it is denied. Before that its key
-- is looked at again, as track does: who took the last room since replay may have done so under this very key.
create or replace function tokenlimits.batch_denial(
  p_item tokenlimits.batch_item,
  p_verdict tokenlimits.verdict,
  p_holder_id uuid
)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_live public.generation_usage;
  v_message text;
  v_detail text;
  v_hint text;
begin
  if p_holder_id is not null then
    perform tokenlimits.refuse_key(p_item.idempotency_key, p_holder_id);
  elsif p_item.idempotency_key is not null then
    v_live := tokenlimits.usage_under_key(p_item.user_id, p_item.idempotency_key, p_item.fingerprint);
    if v_live.id is not null then
      return tokenlimits.replayed(p_item, v_live);
    end if;
  end if;
  if p_verdict.reason = 'not_in_group' and p_item.group_id is not null then
    perform tokenlimits.require_group(p_item.group_id);
  end if;
  return tokenlimits.answer(
    p_item.kind, p_item.cost, p_verdict.reason, p_verdict.group_id, p_verdict.states, p_verdict.denied_by, null,
    p_replayed => false
  );
exception
  when sqlstate 'TL002' or sqlstate 'TL008' then
    get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    return tokenlimits.refused(p_item, sqlstate, v_message, v_detail, v_hint);
end
$$;
comment on function tokenlimits.batch_denial(tokenlimits.batch_item, tokenlimits.verdict, uuid)
is 'The answer to an item that is not charged.';
revoke execute on function tokenlimits.batch_denial(tokenlimits.batch_item, tokenlimits.verdict, uuid)
from public, anon, authenticated;

-- Judges the open items one after another, each by what those before it have left. Denied ones are answered; the others
-- become charges. Answers also the limits that they were judged by, with all charges in them.
create or replace function tokenlimits.judge_batch(
  p_at timestamptz,
  inout items tokenlimits.batch_item[],
  out states tokenlimits.limit_state[],
  out charges tokenlimits.batch_charge[]
)
returns record
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_group_ids uuid[];
  v record;
  v_item tokenlimits.batch_item;
  v_verdict tokenlimits.verdict;
  v_charge tokenlimits.batch_charge;
  v_no integer;
  -- by the first place of a key: which charge has it
  v_holders integer[] := array_fill(null::integer, array[cardinality(items)]);
  v_holder integer;
begin
  select b.states, b.group_ids into states, v_group_ids
  from tokenlimits.batch_states(items, p_at) as b;
  charges := '{}';
  for v in
    select *
    from tokenlimits.batch_options(items, states, v_group_ids)
  loop
    if v.is_first then
      v_item := items[v.place];
      v_verdict := tokenlimits.unjudged(v_item.group_ids, p_at);
    end if;
    if not v_verdict.allowed and v.states is not null then
      v_verdict := tokenlimits.weigh(
        v_verdict, v.group_id, tokenlimits.states_at(states, v.states), v_item.cost
      );
      v_charge.states := v.states;
    end if;
    continue when not v.is_last;

    v_holder := v_holders[v_item.first_place];
    if v_holder is not null and (charges[v_holder].usage).fingerprint = v_item.fingerprint then
      v_charge := charges[v_holder];
      v_charge.place := v.place;
      v_charge.replayed := true;
      charges := charges || v_charge;
    elsif v_holder is null and v_verdict.allowed then
      v_charge.place := v.place;
      v_charge.usage := tokenlimits.batch_usage(v_item, v_verdict);
      v_charge.replayed := false;
      charges := charges || v_charge;
      foreach v_no in array v_charge.states loop
        states[v_no].used := states[v_no].used + v_item.cost;
      end loop;
      if v_item.first_place is not null then
        v_holders[v_item.first_place] := cardinality(charges);
      end if;
    else
      items[v.place].answer := tokenlimits.batch_denial(v_item, v_verdict, (charges[v_holder].usage).id);
    end if;
  end loop;
end
$$;
comment on function tokenlimits.judge_batch(timestamptz, tokenlimits.batch_item[])
is 'Judges the items of a batch in their order; writes nothing.';
revoke execute on function tokenlimits.judge_batch(timestamptz, tokenlimits.batch_item[])
from public, anon, authenticated;

-- Many requests in one transaction, third step: writing what they are charged for.
--
-- Invariants
--   * All is written or nothing: if a counter has no room any more, all is taken back, to be judged again.
--   * Locks in the order of 30_counters.sql, over the whole batch: ledger rows by id, keys in order (those of dead
--     usages last), then by group and kind the rollup and the counters. So batches that overlap never deadlock.

-- Puts those of the charges into the ledger that are at these places, or those that are not, by the order of their
-- keys.
create or replace function tokenlimits.claim_batch(
  p_charges tokenlimits.batch_charge[],
  p_places integer[],
  p_at_places boolean
)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_usages public.generation_usage[] := array(
    select c.usage
    from unnest(p_charges) as c
    where not c.replayed and (c.place = any(p_places)) = p_at_places
  );
  v_written bigint;
begin
  insert into public.generation_usage as u (
    id, group_id, user_id, kind, cost, status, idempotency_key, fingerprint, metadata, created_at, settled_at
  )
  select
    n.id, n.group_id, n.user_id, n.kind, n.cost, n.status,
    n.idempotency_key, n.fingerprint, n.metadata, n.created_at, n.settled_at
  from unnest(v_usages) as n
  order by n.idempotency_key, n.user_id
  on conflict on constraint generation_usage_key_key do nothing;
  get diagnostics v_written = row_count;
  if v_written < cardinality(v_usages) then
    -- somebody has taken a key since it was looked at
    raise sqlstate 'TL099';
  end if;
end
$$;
comment on function tokenlimits.claim_batch(tokenlimits.batch_charge[], integer[], boolean)
is 'Puts charges into the ledger, or raises TL099 when one''s key is taken.';
revoke execute on function tokenlimits.claim_batch(tokenlimits.batch_charge[], integer[], boolean)
from public, anon, authenticated;

-- Writes the usages of a batch, and sweeps the expired holds of every group and kind that it is about. Answers the
-- counters that were moved as they are then; null, with nothing written, when they have moved on meanwhile, or when
-- somebody held a row for too long: is_held, and by which group it was, if that is known.
--
-- This block has no other in it: who waits for a row of an inner one that was ended waits for the whole transaction,
-- and goes on doing so when the outer one is taken back. They would block each other.
create or replace function tokenlimits.write_batch(
  p_items tokenlimits.batch_item[],
  p_charges tokenlimits.batch_charge[],
  p_at timestamptz,
  out moved tokenlimits.limit_state[],
  out is_held boolean,
  out held_group_id uuid
)
returns record
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_dead uuid[];
  v_dead_places integer[];
  v_expired uuid[] := array(
    select unnest(tokenlimits.expired_holds(p.group_id, p.kind, p_at))
    from tokenlimits.batch_pairs(p_items) as p
  );
  v record;
begin
  is_held := false;
  moved := '{}';
  select array_agg(i.dead_id), array_agg(i.place) into v_dead, v_dead_places
  from unnest(p_items) as i
  inner join unnest(p_charges) as c on c.place = i.place
  where i.dead_id is not null;
  perform tokenlimits.lock_usages(v_dead || v_expired);
  -- the keys of dead usages last: until they are freed, whoever wants one finds it taken and does not wait, and nobody
  -- can have taken it
  perform tokenlimits.claim_batch(p_charges, coalesce(v_dead_places, '{}'), false);
  if v_dead is not null then
    perform tokenlimits.free_keys(v_dead, p_at);
    perform tokenlimits.claim_batch(p_charges, v_dead_places, true);
  end if;

  for v in
    select m.group_id, m.kind, array_agg(m.move) as moves
    from (
      select e.group_id, e.kind, e.move
      from tokenlimits.expire_holds(v_expired, p_at) as e
      union all
      select
        (c.usage).group_id,
        (c.usage).kind,
        row((c.usage).user_id, (c.usage).created_at, (c.usage).cost, 1)::tokenlimits.usage_move as move
      from unnest(p_charges) as c
      where not c.replayed
    ) as m
    group by m.group_id, m.kind
    order by m.group_id, m.kind
  loop
    held_group_id := v.group_id;
    moved := moved || tokenlimits.move_usage(v.group_id, v.kind, v.moves, p_at, p_enforce => true);
  end loop;
exception
  when sqlstate 'TL099' then
    moved := null;
  when lock_not_available then
    moved := null;
    is_held := true;
end
$$;
comment on function tokenlimits.write_batch(tokenlimits.batch_item[], tokenlimits.batch_charge[], timestamptz)
is 'Writes what a batch is charged for, and sweeps.';
revoke execute on function tokenlimits.write_batch(
  tokenlimits.batch_item[], tokenlimits.batch_charge[], timestamptz
) from public, anon, authenticated;

-- Answers what was charged, from the last to the first: each sees the counters as they were right after it.
create or replace function tokenlimits.batch_answers(
  p_items tokenlimits.batch_item[],
  p_charges tokenlimits.batch_charge[],
  p_states tokenlimits.limit_state[],
  p_moved tokenlimits.limit_state[]
)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v record;
  v_charge tokenlimits.batch_charge;
  v_no integer;
begin
  for v in
    select s.no, m.used
    from unnest(p_states) with ordinality as s (
      counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open, no
    )
    inner join unnest(p_moved) as m on m.counter_id = s.counter_id and m.subject = s.subject
  loop
    p_states[v.no].used := v.used;
  end loop;
  for i in reverse cardinality(p_charges)..1 loop
    v_charge := p_charges[i];
    p_items[v_charge.place].answer := tokenlimits.answer(
      (v_charge.usage).kind, (v_charge.usage).cost, null, (v_charge.usage).group_id,
      tokenlimits.states_at(p_states, v_charge.states), null, v_charge.usage, v_charge.replayed
    );
    continue when v_charge.replayed;
    foreach v_no in array v_charge.states loop
      p_states[v_no].used := p_states[v_no].used - (v_charge.usage).cost;
    end loop;
  end loop;
  return p_items;
end
$$;
comment on function tokenlimits.batch_answers(
  tokenlimits.batch_item[], tokenlimits.batch_charge[], tokenlimits.limit_state[], tokenlimits.limit_state[]
) is 'A batch with its charges answered.';
revoke execute on function tokenlimits.batch_answers(
  tokenlimits.batch_item[], tokenlimits.batch_charge[], tokenlimits.limit_state[], tokenlimits.limit_state[]
) from public, anon, authenticated;

-- Many requests in one transaction: read (76), judged (77) and written (78), until a verdict holds.
--
-- Invariants
--   * The answers are those that single calls in that order would get, and a denial doesn't touch the others.
--   * The stripes of all groups are held, shared, before any limit is read.
--   * With p_max_wait, no lock is waited for longer: what somebody holds is answered 'busy', and the rest goes on.

-- Answers the open items that a group may pay for; all when it is null.
create or replace function tokenlimits.answer_busy(p_items tokenlimits.batch_item[], p_group_id uuid)
returns tokenlimits.batch_item[]
language plpgsql
stable
set search_path = ''
as $$
declare
  v_item tokenlimits.batch_item;
begin
  foreach v_item in array p_items loop
    if v_item.answer is null and (p_group_id is null or p_group_id = any(v_item.group_ids)) then
      p_items[v_item.place].answer := tokenlimits.answer(
        v_item.kind, v_item.cost, 'busy', p_group_id, '{}', null, null, p_replayed => false
      );
    end if;
  end loop;
  return p_items;
end
$$;
comment on function tokenlimits.answer_busy(tokenlimits.batch_item[], uuid)
is 'A batch with the items answered whose group is held by somebody else.';
revoke execute on function tokenlimits.answer_busy(tokenlimits.batch_item[], uuid) from public, anon, authenticated;

-- Takes the stripes of all groups; answers the items of those that could not be had in time.
create or replace function tokenlimits.lock_batch(p_items tokenlimits.batch_item[])
returns tokenlimits.batch_item[]
language plpgsql
volatile
set search_path = ''
as $$
declare
  -- in the order of their stripes, which are the last bytes of the ids
  v_group_ids uuid[] := array(
    select p.group_id
    from tokenlimits.batch_pairs(p_items) as p
    group by p.group_id
    order by right(p.group_id::text, 2), p.group_id
  );
  v_group_id uuid;
begin
  perform tokenlimits.lock_groups(v_group_ids);
  return p_items;
exception
  when lock_not_available then
    foreach v_group_id in array v_group_ids loop
      begin
        perform tokenlimits.lock_groups(array[v_group_id]);
      exception
        when lock_not_available then
          p_items := tokenlimits.answer_busy(p_items, v_group_id);
      end;
    end loop;
    return p_items;
end
$$;
comment on function tokenlimits.lock_batch(tokenlimits.batch_item[])
is 'Holds the limits of a batch''s groups still.';
revoke execute on function tokenlimits.lock_batch(tokenlimits.batch_item[]) from public, anon, authenticated;

create or replace function tokenlimits.track_many(p_requests jsonb, p_max_wait bigint)
returns jsonb
language plpgsql
volatile
-- definer: counters are private, and nobody else writes the ledger
security definer
set search_path = ''
as $$
declare
  v_lock_timeout text := current_setting('lock_timeout');
  v_items tokenlimits.batch_item[] := tokenlimits.read_requests(p_requests);
  v_judged tokenlimits.batch_item[];
  v_states tokenlimits.limit_state[];
  v_charges tokenlimits.batch_charge[];
  v_at timestamptz;
  v record;
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
    -- never before the moment that an earlier round came to, or a clock that was set back would go round for ever
    v_at := greatest(tokenlimits.clock(), v_at, (select max((c.usage).created_at) from unnest(v_charges) as c));
    v_items := tokenlimits.replay(v_items);
    select j.items, j.states, j.charges into v_judged, v_states, v_charges
    from tokenlimits.judge_batch(v_at, v_items) as j;
    select w.moved, w.is_held, w.held_group_id into v
    from tokenlimits.write_batch(v_items, v_charges, v_at) as w;
    exit when v.moved is not null;
    if v.is_held then
      v_items := tokenlimits.answer_busy(v_items, v.held_group_id);
    end if;
  end loop;
  v_items := tokenlimits.batch_answers(v_judged, v_charges, v_states, v.moved);
  perform set_config('lock_timeout', v_lock_timeout, true);
  return coalesce((select jsonb_agg(i.answer order by i.place) from unnest(v_items) as i), '[]');
end
$$;
comment on function tokenlimits.track_many(jsonb, bigint) is 'What track_generations does.';
revoke execute on function tokenlimits.track_many(jsonb, bigint) from public, anon, authenticated;
grant execute on function tokenlimits.track_many(jsonb, bigint) to service_role;

-- Each request is an object with the arguments of track_generation (without p_), and is answered at the same place. One
-- that track_generation would refuse with an error has the reason 'refused'. With p_max_wait, those whose group
-- somebody else holds for more than so many milliseconds have the reason 'busy', and may be asked again.
create or replace function public.track_generations(p_requests jsonb, p_max_wait bigint default null)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.track_many(tokenlimits.json_argument(p_requests), p_max_wait);
end
$$;
comment on function public.track_generations(jsonb, bigint)
is 'Tracks up to 1,000 generations in one transaction: each is judged by itself, in this order.';
revoke execute on function public.track_generations(jsonb, bigint) from public, anon, authenticated, service_role;
grant execute on function public.track_generations(jsonb, bigint) to service_role;

-- For admins: groups with their limits, members, a fresh start.
--
-- Invariants
--   * Each function opens with require_admin; those that can, run as their caller, so that row-level security decides
--     too.
--   * One function, one transaction: an error leaves nothing half-made.
--   * Edits lock in one order, so that they wait for each other and never in a circle: the group's row, its limits'
--     rows (all at once, where there are several), and then, in a trigger, its stripe.

create or replace function tokenlimits.group_json(p_group public.user_groups)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return to_jsonb(p_group) || jsonb_build_object('limits', coalesce((
    select jsonb_agg(
      jsonb_build_object('kind', l.kind, 'period', l.period, 'scope', l.scope, 'max', l.max)
      order by l.kind, l.scope, array_position(array['minute', 'hour', 'day', 'week', 'month', 'lifetime'], l.period)
    )
    from public.group_limits as l
    where l.group_id = p_group.id
  ), '[]'));
end
$$;
comment on function tokenlimits.group_json(public.user_groups) is 'A group with its limits, as clients see it.';
revoke execute on function tokenlimits.group_json(public.user_groups) from public, anon, authenticated;
grant execute on function tokenlimits.group_json(public.user_groups) to authenticated, service_role;

-- Refuses a bad set of limits with the path of the field, like limits[2].max.
create or replace function tokenlimits.check_limits(p_limits jsonb)
returns void
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_limit jsonb;
  v_seen jsonb := '{}';
  v_identity text;
  v_index integer := -1;
  v_field text;
begin
  if jsonb_typeof(p_limits) <> 'array' then
    perform tokenlimits.refuse('TL001', 'limits: must be an array', 'limits');
  end if;
  for v_limit in select e.value from jsonb_array_elements(p_limits) as e loop
    v_index := v_index + 1;
    v_field := case
      when jsonb_typeof(v_limit) <> 'object' then ''
      when coalesce(v_limit ->> 'kind', '') !~ '^[a-z][a-z0-9_]{0,31}$' then '.kind'
      when coalesce(v_limit ->> 'period', '')
        not in ('minute', 'hour', 'day', 'week', 'month', 'lifetime') then '.period'
      when coalesce(v_limit ->> 'scope', '') not in ('group', 'member') then '.scope'
      when not v_limit ? 'max' then '.max'
      when jsonb_typeof(v_limit -> 'max') = 'null' then null
      when jsonb_typeof(v_limit -> 'max') <> 'number' then '.max'
      when (v_limit ->> 'max')::numeric not between 0 and 1000000000000000 then '.max'
      when (v_limit ->> 'max')::numeric <> trunc((v_limit ->> 'max')::numeric) then '.max'
    end;
    v_identity := concat_ws(' ', v_limit ->> 'kind', v_limit ->> 'period', v_limit ->> 'scope');
    if v_field is null and v_seen ? v_identity then
      v_field := '';
    end if;
    if v_field is not null then
      perform tokenlimits.refuse(
        'TL001',
        format('limits[%s]%s: not a valid limit, or there twice: %s', v_index, v_field, left(v_limit::text, 200)),
        format('limits[%s]%s', v_index, v_field),
        'A limit is {"kind": "image", "period": "day", "scope": "member", "max": 50}; max may be null. Nothing was saved.'
      );
    end if;
    v_seen := v_seen || jsonb_build_object(v_identity, true);
  end loop;
end
$$;
comment on function tokenlimits.check_limits(jsonb) is 'Refuses limits that are not valid, before anything is written.';
revoke execute on function tokenlimits.check_limits(jsonb) from public, anon, authenticated;
grant execute on function tokenlimits.check_limits(jsonb) to authenticated, service_role;

-- What stays the same keeps its counters: only what differs is written.
create or replace function tokenlimits.replace_limits(p_group_id uuid, p_limits jsonb)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
  perform
  from public.group_limits as l
  where l.group_id = p_group_id
  order by l.kind, l.period, l.scope
  for update;
  delete from public.group_limits as l
  where
    l.group_id = p_group_id
    and not exists (
      select
      from jsonb_to_recordset(p_limits) as n (kind text, period text, scope text)
      where (n.kind, n.period, n.scope) = (l.kind, l.period, l.scope)
    );
  insert into public.group_limits as l (group_id, kind, period, scope, max)
  select p_group_id, n.kind, n.period, n.scope, n.max::bigint
  from jsonb_to_recordset(p_limits) as n (kind text, period text, scope text, max numeric)
  on conflict on constraint group_limits_pkey do update
  set max = excluded.max
  where l.max is distinct from excluded.max;
end
$$;
comment on function tokenlimits.replace_limits(uuid, jsonb) is 'Makes a group''s limits these.';
revoke execute on function tokenlimits.replace_limits(uuid, jsonb) from public, anon, authenticated;
grant execute on function tokenlimits.replace_limits(uuid, jsonb) to authenticated, service_role;

create or replace function public.save_group(
  p_group_id uuid default null,
  p_name text default null,
  p_description text default null,
  p_priority integer default null,
  p_timezone text default null,
  p_is_default boolean default null,
  p_limits jsonb default null
)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_group public.user_groups;
  v_limits jsonb := tokenlimits.json_argument(p_limits);
begin
  perform tokenlimits.require_admin();
  if v_limits is not null then
    perform tokenlimits.check_limits(v_limits);
  end if;
  if p_group_id is not null then
    v_group := tokenlimits.require_group(p_group_id);
  end if;
  if char_length(btrim(coalesce(p_name, v_group.name, ''))) not between 1 and 200 then
    perform tokenlimits.refuse('TL001', 'name: must have 1 to 200 characters', 'name', 'Nothing was saved.');
  elsif char_length(p_description) > 2000 then
    perform tokenlimits.refuse(
      'TL001',
      'description: must have at most 2000 characters',
      'description',
      'Nothing was saved.'
    );
  end if;
  if p_is_default then
    -- 'tokl' in ASCII; the stripes of groups are 0 to 255
    perform pg_advisory_xact_lock(1953459052, 256);
    update public.user_groups as g
    set is_default = false
    where g.is_default and g.id is distinct from p_group_id;
  end if;
  begin
    if p_group_id is null then
      insert into public.user_groups as g (name, description, priority, timezone, is_default)
      values (
        p_name, coalesce(p_description, ''), coalesce(p_priority, 0),
        coalesce(p_timezone, 'UTC'), coalesce(p_is_default, false)
      )
      returning * into v_group;
    else
      update public.user_groups as g
      set
        name = coalesce(p_name, g.name),
        description = coalesce(p_description, g.description),
        priority = coalesce(p_priority, g.priority),
        timezone = coalesce(p_timezone, g.timezone),
        is_default = coalesce(p_is_default, g.is_default)
      where g.id = p_group_id
      returning * into v_group;
    end if;
  exception
    when unique_violation then
      perform tokenlimits.refuse(
        'TL003',
        format('there is a group named %L already', btrim(p_name)),
        btrim(p_name),
        'Names are unique whatever their case; nothing was saved.'
      );
  end;
  if v_limits is not null then
    perform tokenlimits.replace_limits(v_group.id, v_limits);
  end if;
  return tokenlimits.group_json(v_group);
end
$$;
comment on function public.save_group(uuid, text, text, integer, text, boolean, jsonb)
is 'Makes a group, or changes what is not null of an existing one, with its whole set of limits, in one step.';
revoke execute on function public.save_group(uuid, text, text, integer, text, boolean, jsonb)
from public, anon, authenticated, service_role;
grant execute on function public.save_group(uuid, text, text, integer, text, boolean, jsonb)
to authenticated, service_role;

create or replace function public.set_group_limit(p_group_id uuid, p_limit jsonb)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_limit jsonb := tokenlimits.json_argument(p_limit);
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_limits(jsonb_build_array(v_limit));
  perform tokenlimits.require_group(p_group_id);
  perform from public.user_groups as g where g.id = p_group_id for no key update;
  insert into public.group_limits as l (group_id, kind, period, scope, max)
  values (
    p_group_id, v_limit ->> 'kind', v_limit ->> 'period', v_limit ->> 'scope', (v_limit ->> 'max')::numeric::bigint
  )
  on conflict on constraint group_limits_pkey do update
  set max = excluded.max;
  return tokenlimits.group_json(tokenlimits.require_group(p_group_id));
end
$$;
comment on function public.set_group_limit(uuid, jsonb) is 'Adds one limit to a group, or changes its max.';
revoke execute on function public.set_group_limit(uuid, jsonb) from public, anon, authenticated, service_role;
grant execute on function public.set_group_limit(uuid, jsonb) to authenticated, service_role;

create or replace function public.remove_group_limit(p_group_id uuid, p_kind text, p_period text, p_scope text)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  delete from public.group_limits as l
  where l.group_id = p_group_id and l.kind = p_kind and l.period = p_period and l.scope = p_scope;
  return tokenlimits.group_json(tokenlimits.require_group(p_group_id));
end
$$;
comment on function public.remove_group_limit(uuid, text, text, text)
is 'Removes one limit of a group; without the limit that is no error.';
revoke execute on function public.remove_group_limit(uuid, text, text, text)
from public, anon, authenticated, service_role;
grant execute on function public.remove_group_limit(uuid, text, text, text) to authenticated, service_role;

create or replace function public.delete_group(p_group_id uuid)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_group jsonb;
begin
  perform tokenlimits.require_admin();
  v_group := tokenlimits.group_json(tokenlimits.require_group(p_group_id));
  delete from public.user_groups as g where g.id = p_group_id;
  return v_group;
end
$$;
comment on function public.delete_group(uuid) is 'Deletes a group with its limits and memberships; the ledger stays.';
revoke execute on function public.delete_group(uuid) from public, anon, authenticated, service_role;
grant execute on function public.delete_group(uuid) to authenticated, service_role;

create or replace function public.find_groups(
  p_group_id uuid default null,
  p_name text default null,
  p_search text default null,
  p_after text default null,
  p_page_size integer default 200
)
returns jsonb
language plpgsql
stable
set search_path = ''
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
        and (p_name is null or lower(g.name) = lower(btrim(p_name)))
        and (p_search is null or strpos(lower(g.name), lower(btrim(p_search))) > 0)
        and (p_after is null or lower(g.name) > lower(p_after))
      order by lower(g.name)
      limit least(greatest(p_page_size, 1), 500)
    ) as page
  ), '[]');
end
$$;
comment on function public.find_groups(uuid, text, text, text, integer)
is 'Groups with their limits: by id, by name, or all whose name contains a text; the page after a name, in order.';
revoke execute on function public.find_groups(uuid, text, text, text, integer)
from public, anon, authenticated, service_role;
grant execute on function public.find_groups(uuid, text, text, text, integer) to authenticated, service_role;

create or replace function tokenlimits.add_members(p_group_id uuid, p_user_ids uuid[])
returns jsonb
language plpgsql
volatile
-- definer: auth.users is not open to admins
security definer
set search_path = ''
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
  v_known := array(select u.id from auth.users as u where u.id = any(p_user_ids) order by u.id);
  insert into public.group_memberships as m (group_id, user_id)
  select p_group_id, k.id
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
comment on function tokenlimits.add_members(uuid, uuid[]) is 'What add_group_members does.';
revoke execute on function tokenlimits.add_members(uuid, uuid[]) from public, anon, authenticated;
grant execute on function tokenlimits.add_members(uuid, uuid[]) to authenticated, service_role;

create or replace function public.add_group_members(p_group_id uuid, p_user_ids uuid[])
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.add_members(p_group_id, p_user_ids);
end
$$;
comment on function public.add_group_members(uuid, uuid[])
is 'Adds users to a group: how many were added, how many were there already, and which ids are of no user.';
revoke execute on function public.add_group_members(uuid, uuid[]) from public, anon, authenticated, service_role;
grant execute on function public.add_group_members(uuid, uuid[]) to authenticated, service_role;

create or replace function public.remove_group_members(p_group_id uuid, p_user_ids uuid[])
returns jsonb
language plpgsql
volatile
set search_path = ''
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
is 'Removes users from a group, and says how many were in it; their usage stays.';
revoke execute on function public.remove_group_members(uuid, uuid[]) from public, anon, authenticated, service_role;
grant execute on function public.remove_group_members(uuid, uuid[]) to authenticated, service_role;

create or replace function public.move_group_member(p_user_id uuid, p_from uuid, p_to uuid)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_moved boolean;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_from);
  perform tokenlimits.require_group(p_to);
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
is 'Moves a user from one group to another in one step; false when the user was not in the first.';
revoke execute on function public.move_group_member(uuid, uuid, uuid) from public, anon, authenticated, service_role;
grant execute on function public.move_group_member(uuid, uuid, uuid) to authenticated, service_role;

create or replace function tokenlimits.reset_usage(p_group_id uuid, p_kind text)
returns jsonb
language plpgsql
volatile
-- definer: resets are private
security definer
set search_path = ''
as $$
declare
  v_at timestamptz;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  if p_kind !~ '^[a-z][a-z0-9_]{0,31}$' then
    perform tokenlimits.refuse('TL001', 'kind: is not a kind of generation', 'kind');
  end if;
  perform from public.user_groups as g where g.id = p_group_id for no key update;
  perform
  from public.group_limits as l
  where l.group_id = p_group_id
  order by l.kind, l.period, l.scope
  for update;
  -- nobody is between being judged and being recorded now: what was recorded before is before, what comes is after
  perform tokenlimits.lock_groups(array[p_group_id], true);
  v_at := greatest(
    tokenlimits.clock(),
    (
      select max(u.created_at) + interval '1 microsecond'
      from public.generation_usage as u
      where u.group_id = p_group_id
    )
  );
  insert into tokenlimits.usage_resets as r (group_id, kind, reset_at)
  values (p_group_id, coalesce(p_kind, '*'), v_at)
  on conflict on constraint usage_resets_pkey do update
  set reset_at = excluded.reset_at;
  update public.group_limits as l
  set counter_id = default
  where l.group_id = p_group_id and (p_kind is null or l.kind = p_kind);
  return jsonb_build_object('reset_at', v_at);
end
$$;
comment on function tokenlimits.reset_usage(uuid, text) is 'What reset_group_usage does.';
revoke execute on function tokenlimits.reset_usage(uuid, text) from public, anon, authenticated;
grant execute on function tokenlimits.reset_usage(uuid, text) to authenticated, service_role;

create or replace function public.reset_group_usage(p_group_id uuid, p_kind text default null)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.reset_usage(p_group_id, p_kind);
end
$$;
comment on function public.reset_group_usage(uuid, text)
is 'A fresh start for a group''s current periods, of a kind or of all; the ledger keeps everything.';
revoke execute on function public.reset_group_usage(uuid, text) from public, anon, authenticated, service_role;
grant execute on function public.reset_group_usage(uuid, text) to authenticated, service_role;

-- the one before had no search
-- squawk-ignore ban-drop-function
drop function if exists tokenlimits.list_members(uuid, uuid, integer);

create or replace function tokenlimits.list_members(p_group_id uuid, p_after uuid, p_page_size integer, p_search text)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are in auth.users, which is not open to admins
security definer
set search_path = ''
as $$
declare
  v_search text := nullif(lower(btrim(p_search)), '');
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  return coalesce((
    select jsonb_agg(to_jsonb(page) order by page.user_id)
    from (
      select m.user_id, u.email, m.joined_at
      from public.group_memberships as m
      -- the offset: member by member, or a search may read all users of the project
      cross join lateral (select u.email from auth.users as u where u.id = m.user_id offset 0) as u
      where
        m.group_id = p_group_id
        and (p_after is null or m.user_id > p_after)
        and (v_search is null or strpos(lower(u.email), v_search) > 0)
      order by m.user_id
      limit least(greatest(p_page_size, 1), 1000)
    ) as page
  ), '[]');
end
$$;
comment on function tokenlimits.list_members(uuid, uuid, integer, text) is 'What group_members does.';
revoke execute on function tokenlimits.list_members(uuid, uuid, integer, text) from public, anon, authenticated;
grant execute on function tokenlimits.list_members(uuid, uuid, integer, text) to authenticated, service_role;

-- the one before had no search
-- squawk-ignore ban-drop-function
drop function if exists public.group_members(uuid, uuid, integer);

create or replace function public.group_members(
  p_group_id uuid,
  p_after uuid default null,
  p_page_size integer default 500,
  p_search text default null
)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.list_members(p_group_id, p_after, p_page_size, p_search);
end
$$;
comment on function public.group_members(uuid, uuid, integer, text)
is 'A group''s members, or those whose e-mail address contains a text: the page after a user id, in the order of ids.';
revoke execute on function public.group_members(uuid, uuid, integer, text)
from public, anon, authenticated, service_role;
grant execute on function public.group_members(uuid, uuid, integer, text) to authenticated, service_role;

create or replace function tokenlimits.search_users(p_email text, p_page_size integer)
returns jsonb
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
set search_path = ''
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
comment on function tokenlimits.search_users(text, integer) is 'What find_users does.';
revoke execute on function tokenlimits.search_users(text, integer) from public, anon, authenticated;
grant execute on function tokenlimits.search_users(text, integer) to authenticated, service_role;

create or replace function public.find_users(p_email text, p_page_size integer default 20)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
  return tokenlimits.search_users(p_email, p_page_size);
end
$$;
comment on function public.find_users(text, integer)
is 'Users whose e-mail address contains a text, whatever its case.';
revoke execute on function public.find_users(text, integer) from public, anon, authenticated, service_role;
grant execute on function public.find_users(text, integer) to authenticated, service_role;

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
        coalesce(s.used, o.used, case
          when s.since = tokenlimits.rollup_bucket(s.since) and s.until = tokenlimits.rollup_bucket(s.until)
            then coalesce((
              select sum(r.cost)
              from tokenlimits.usage_rollup as r
              where r.group_id = s.group_id and r.kind = s.kind and r.bucket >= s.since and r.bucket < s.until
            ), 0)
          else tokenlimits.count_usage(s.group_id, null, s.kind, s.since, s.until)
        end)
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

-- Reading much of the ledger, or of its sums: page by page; and who used most.
--
-- Invariants
--   * A page reads a bounded number of rows, by an index, however rare what it looks for is: a short page is not the
--     end, a page without "next" is.
--   * Pages follow each other by columns that never change. What was committed before the first page, and created
--     before "until", is in exactly one of them, as a row or in a sum.

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

-- Counting everything again, for the day on which somebody doubts the numbers.
--
-- Invariants
--   * The ledger is right by definition: counters and rollup are made to agree with it, never the other way round.
--   * What is older than p_since is not looked at again: there the rollup's word is taken.
--   * Nobody tracks for the group while it is mended: its limits are held exclusively.

-- Whole buckets, or the first one's beginning would be missed.
create or replace function tokenlimits.rollup_differences(p_group_id uuid, p_since timestamptz)
returns table (kind text, bucket timestamptz, was numeric, used numeric, generations numeric)
language plpgsql
stable
set search_path = ''
as $$
declare
  v_since timestamptz := tokenlimits.rollup_bucket(p_since);
begin
  return query
  select d.kind, d.bucket, d.was, d.used, d.generations
  from (
    select
      coalesce(r.kind, u.kind) as kind, coalesce(r.bucket, u.bucket) as bucket,
      coalesce(r.cost, 0) as was, coalesce(u.cost, 0) as used,
      coalesce(u.generations, 0) - coalesce(r.generations, 0) as generations
    from (
      select s.kind, s.bucket, sum(s.cost) as cost, sum(s.generations) as generations
      from tokenlimits.usage_rollup as s
      where s.group_id = p_group_id and s.bucket >= v_since
      group by s.kind, s.bucket
    ) as r
    full join (
      select s.kind, s.bucket, sum(s.cost) as cost, count(*) as generations
      from (
        select l.kind, tokenlimits.rollup_bucket(l.created_at) as bucket, l.cost
        from public.generation_usage as l
        where l.group_id = p_group_id and l.created_at >= v_since and l.status in ('reserved', 'committed')
      ) as s
      group by s.kind, s.bucket
    ) as u on u.kind = r.kind and u.bucket = r.bucket
  ) as d
  where d.was <> d.used or d.generations <> 0;
end
$$;
comment on function tokenlimits.rollup_differences(uuid, timestamptz)
is 'Where the history since a moment differs from the ledger, and by how many generations.';
revoke execute on function tokenlimits.rollup_differences(uuid, timestamptz) from public, anon, authenticated;

-- The group's own counters come first, so that p_most leaves out members.
create or replace function tokenlimits.counter_differences(
  p_group_id uuid,
  p_at timestamptz,
  p_most integer default null
)
returns table (subject uuid, counter_id bigint, kind text, period text, scope text, was bigint, used bigint)
language plpgsql
stable
set search_path = ''
as $$
begin
  return query
  select d.*
  from (
    select
      c.subject, c.counter_id, c.kind, c.period, c.scope, c.used as was,
      tokenlimits.count_usage(
        p_group_id, case c.scope when 'member' then c.subject end, c.kind, c.since, c.until
      ) as used
    from (
      select m.subject, m.counter_id, l.kind, l.period, l.scope, m.used, m.since, m.until
      from public.group_limits as l
      inner join tokenlimits.counters as m on m.counter_id = l.counter_id
      where l.group_id = p_group_id and m.until > p_at
      order by l.scope, m.subject
      limit p_most
    ) as c
  ) as d
  where d.was <> d.used;
end
$$;
comment on function tokenlimits.counter_differences(uuid, timestamptz, integer)
is 'Where a group''s counters differ from the ledger.';
revoke execute on function tokenlimits.counter_differences(uuid, timestamptz, integer)
from public, anon, authenticated;

-- One group at a time, and since a moment, for a statement ends after 8 s. Answers what differed, as it was and as it
-- is now.
create or replace function tokenlimits.reconcile(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: counters and rollup are private
security definer
set search_path = ''
as $$
declare
  v_counters jsonb;
  v_rollup jsonb;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.lock_groups(array[p_group_id], true);

  -- first, for the group's counters are counted from it
  with differences as (
    select d.kind, d.bucket, d.was, d.used, d.generations
    from tokenlimits.rollup_differences(p_group_id, coalesce(p_since, '-infinity')) as d
  ),

  repaired as (
    insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
    select p_group_id, d.kind, d.bucket, 0, d.used - d.was, d.generations
    from differences as d
    on conflict on constraint usage_rollup_pkey do update
    set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations
  )

  select jsonb_agg(to_jsonb(d) - 'generations' order by d.kind, d.bucket) into v_rollup
  from differences as d;

  with differences as (
    select d.subject, d.counter_id, d.kind, d.period, d.scope, d.was, d.used
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

  return jsonb_build_object('counters', coalesce(v_counters, '[]'), 'rollup', coalesce(v_rollup, '[]'));
end
$$;
comment on function tokenlimits.reconcile(uuid, timestamptz)
is 'What reconcile_usage does.';
revoke execute on function tokenlimits.reconcile(uuid, timestamptz) from public, anon, authenticated;
grant execute on function tokenlimits.reconcile(uuid, timestamptz) to authenticated, service_role;

create or replace function public.reconcile_usage(p_group_id uuid, p_since timestamptz default '-infinity')
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
begin
  return tokenlimits.reconcile(p_group_id, p_since);
end
$$;
comment on function public.reconcile_usage(uuid, timestamptz)
is 'Counts a group''s usage again from the ledger, mends counters and rollup, and answers what differed.';
revoke execute on function public.reconcile_usage(uuid, timestamptz) from public, anon, authenticated, service_role;
grant execute on function public.reconcile_usage(uuid, timestamptz) to authenticated, service_role;

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
-- looks at no more members than a statement has time for.
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

-- Who may touch the tables: admins through row-level security, the service key, and nobody else.
--
-- Invariants
--   * One permissive policy per table, action and role.
--   * Nobody writes the ledger through the API: only definer functions do.
--   * It holds on projects whose default privileges grant everything in public, and on those that grant nothing.

alter table public.user_groups enable row level security;
alter table public.group_limits enable row level security;
alter table public.group_memberships enable row level security;
alter table public.generation_usage enable row level security;

revoke all on public.user_groups, public.group_limits, public.group_memberships, public.generation_usage
from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.user_groups, public.group_limits, public.group_memberships
to authenticated, service_role;
grant select on public.generation_usage to authenticated, service_role;
-- an identity column needs no right to its sequence; old projects grant it to everybody
revoke all on sequence public.group_limits_counter_id_seq from public, anon, authenticated, service_role;

do $do$
declare
  v_table text;
  v_action text;
  v_name text;
begin
  foreach v_table in array array['user_groups', 'group_limits', 'group_memberships', 'generation_usage'] loop
    foreach v_action in array array['select', 'insert', 'update', 'delete'] loop
      continue when v_table = 'generation_usage' and v_action <> 'select';
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

-- PostgREST serves the new functions from now on.
notify pgrst, 'reload schema';
