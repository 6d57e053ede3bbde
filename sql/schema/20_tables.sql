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
    {{ is_name('name') | indent(4) }}
  ),
  constraint user_groups_description_check check (char_length(description) <= 2000),
  constraint user_groups_anchor_at_check check (
    {{ is_moment('anchor_at') }}
  ),
  constraint user_groups_created_at_check check (
    {{ is_moment('created_at') }}
  ),
  constraint user_groups_updated_at_check check (
    {{ is_moment('updated_at') }}
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
  constraint group_limits_kind_check check ({{ is_kind('kind') }}),
  constraint group_limits_period_check check (
    {{ is_period('period') | indent(4) }}
  ),
  constraint group_limits_starts_check check (
    {{ is_start('starts', 'period') | indent(4) }}
  ),
  constraint group_limits_counts_check check (
    {{ is_counts('counts') | indent(4) }}
  ),
  constraint group_limits_in_flight_check check (counts is null or period <> 'in_flight'),
  constraint group_limits_mode_check check (mode in ('enforce', 'observe')),
  constraint group_limits_scope_check check ({{ is_scope('scope') }}),
  constraint group_limits_max_check check (max between 0 and {{ most_of_a_limit() }})
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
  constraint limit_overrides_kind_check check ({{ is_kind('kind') }}),
  constraint limit_overrides_period_check check (
    {{ is_period('period') | indent(4) }}
  ),
  constraint limit_overrides_starts_check check (
    {{ is_start('starts', 'period') | indent(4) }}
  ),
  constraint limit_overrides_scope_check check ({{ is_scope('scope') }}),
  constraint limit_overrides_subject_check check (scope <> 'group' or subject = group_id),
  constraint limit_overrides_max_check check (max between 0 and {{ most_of_a_limit() }}),
  constraint limit_overrides_until_check check (
    {{ is_moment('until') }}
  ),
  constraint limit_overrides_created_at_check check (
    {{ is_moment('created_at') }}
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
    {{ is_moment('joined_at') }}
  ),
  constraint group_memberships_anchor_at_check check (
    {{ is_moment('anchor_at') }}
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
  if {{ has_own_users() | indent(2) }} then
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
{{ search_path() }}
as $$
declare
  v_timezone text;
begin
  -- row-level security refuses an insert only afterwards; read nothing for such a caller before that
  perform tokenlimits.require_admin();
  new.name := {{ tidied('new.name') | indent(2) }};
  -- two changes never have the same moment, or the second editor would not notice the first; that it has got its first
  -- child is no edit of it
  new.updated_at := case
    when new.is_nested and not old.is_nested and new.parent_id is null then old.updated_at
    else greatest(tokenlimits.clock(), old.updated_at + interval '1 microsecond')
  end;
  if ({{ is_name('new.name') }}) is not true then
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
{{ private('check_group()', 'Trigger: normalizes and checks a group that is written.') }}

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
{{ search_path() }}
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
{{ comment_on_function('public.refuse_ledger_write()', 'Trigger: refuses direct writes to the ledger.') }}
revoke execute on function public.refuse_ledger_write() from public, anon, authenticated, service_role;

create or replace trigger generation_usage_refuse_write
before insert or update or delete or truncate on public.generation_usage
for each statement execute function public.refuse_ledger_write();
