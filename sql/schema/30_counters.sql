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
  {{ into_holds('u', root_id=root_of('u.group_id'), source="from public.generation_usage as u
  where u.status = 'reserved' and not exists (select from tokenlimits.usage_rollup)") | indent(2) }}
end
$do$;

insert into tokenlimits.usage_rollup (group_id, kind, bucket, slot, cost, generations)
select
  u.group_id,
  u.kind,
  {{ bucket('u.created_at') }} as bucket,
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
{{ search_path() }}
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
{{ private(
  'refuse_transaction()',
  'Raises 25006 on a standby, otherwise TL009: READ COMMITTED is required.',
  to='authenticated, service_role'
) }}

create or replace function tokenlimits.lock_groups(p_group_ids uuid[], p_exclusive boolean default false)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_group_ids uuid[] := p_group_ids;
  v_stripe integer;
begin
  {{ insist_on_transaction() | indent(2) }}
  if p_exclusive then
    v_group_ids := v_group_ids || array(
      select t.group_id from tokenlimits.group_tree as t where t.above_id = any(p_group_ids)
    );
  end if;
  -- in one order, or two calls could deadlock
  for v_stripe in
    select distinct {{ stripe('g.id') }}
    from unnest(v_group_ids) as g (id)
    order by 1
  loop
    if p_exclusive then
      perform pg_advisory_xact_lock({{ stripe_class() }}, v_stripe);
    else
      perform pg_advisory_xact_lock_shared({{ stripe_class() }}, v_stripe);
    end if;
  end loop;
end
$$;
{{ private(
  'lock_groups(uuid[], boolean)',
  "Until the transaction ends, keeps unchanged what judges calls of these groups (shared), or waits for all calls that their limits judge (exclusive)."
) }}

create or replace function tokenlimits.free_slot(p_group_id uuid)
returns integer
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_slot integer := {{ own_slot() }};
begin
  -- try, never wait: up to 16 calls of one group then write the rollup side by side
  for i in 0..15 loop
    exit when {{ try_slot('v_slot', 'p_group_id') }};
    v_slot := (v_slot + 1) % 16;
  end loop;
  return v_slot;
end
$$;
{{ private(
  'free_slot(uuid)',
  'A slot of the rollup that no other open transaction writes for this group; any slot if all 16 are taken.'
) }}
