-- Counters, rollup, holds and resets: what makes a call's cost independent of history.
--
-- Invariants
--   * A counter that exists and whose period is current equals the sum of the live ledger rows of its limit and subject
--     in [since, until). Whoever writes a ledger row opens and moves every counter that it counts for, in the same
--     transaction, so a counter that does not exist can be counted from the ledger, and a past one starts at zero.
--   * The rollup's sum over slots equals the live ledger rows of (group, kind, bucket).
--   * Locks are taken in one order over a whole transaction, batches and sweeps too: group stripes, ledger rows by id,
--     keys, rollup rows by key, member counters and then group counters, by (subject, counter_id). So all that a
--     transaction moves is merged before the first is moved. What a sweep locks in the ledger it never waits for.
--   * Whoever reads limits in order to write holds its group's stripe shared; whoever edits limits takes it exclusively
--     after the edit, and so waits for calls that judge by the old limits and holds back those to come.
--   * A hold that has expired counts as released from that moment on, but stays in counters and rollup until somebody
--     sweeps it; readers subtract it. Who needs that room locks the counter before; who settles a hold in time locks
--     the counter too, and looks at the clock again afterwards. So the two agree on which of them was first.

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
comment on table tokenlimits.counters is 'tokenlimits: What is used of a limit by a subject in [since, until).';

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
is 'tokenlimits: Live usage in buckets of 15 minutes UTC, on which every time zone''s hours begin; 16 slots.';

-- Holds are not in the ledger's indexes, so that settling a usage stays cheap. user_id first in the key: the holds of
-- one member are found by it, whatever the group holds.
create table if not exists tokenlimits.holds (
  usage_id uuid not null,
  group_id uuid not null,
  user_id uuid not null,
  kind text not null,
  cost bigint not null,
  created_at timestamptz not null,
  expires_at timestamptz not null,
  constraint holds_pkey primary key (user_id, usage_id)
);
comment on table tokenlimits.holds is 'tokenlimits: Reserved usages that nobody has settled or swept yet.';
create index if not exists holds_expires_at_idx
on tokenlimits.holds (group_id, kind, expires_at) include (cost, created_at);

-- After an uninstallation that kept the ledger, its holds and its history come back.
do $do$
begin
  {{ into_holds('u', "from public.generation_usage as u
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

-- kind '*' is every kind, also one that gets its first limit later.
create table if not exists tokenlimits.usage_resets (
  group_id uuid not null,
  kind text not null,
  reset_at timestamptz not null,
  constraint usage_resets_pkey primary key (group_id, kind)
);
comment on table tokenlimits.usage_resets
is 'tokenlimits: When an admin last gave a group a fresh start: counters count from then.';

revoke all on tokenlimits.counters, tokenlimits.usage_rollup, tokenlimits.usage_resets, tokenlimits.holds
from public, anon, authenticated, service_role;

do $do$
begin
  if to_regtype('tokenlimits.limit_state') is null then
    -- a limit, its period and what is used of it, as one call sees them
    create type tokenlimits.limit_state as (
      group_id uuid,
      counter_id bigint,
      subject uuid,
      kind text,
      period text,
      scope text,
      max bigint,
      since timestamptz,
      until timestamptz,
      used bigint,
      -- what the counter holds besides, of holds that have expired; null where nobody asked
      expired bigint,
      -- null: there is no counter yet; false: it is of a past period
      is_open boolean,
      group_name text,
      timezone text
    );
    -- what a usage that is made, settled or swept does to the counters that it counts for; enforced: they must have room
    create type tokenlimits.usage_move as (
      group_id uuid,
      kind text,
      user_id uuid,
      created_at timestamptz,
      cost bigint,
      generations integer,
      enforced boolean
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
    -- PostgreSQL's own code for what a standby can't do
    perform tokenlimits.refuse(
      '25006',
      'this database is a standby, and its usage is out of date',
      null,
      'Call the primary database; a standby is for reports.'
    );
  end if;
  perform tokenlimits.refuse(
    'TL009',
    'tokenlimits needs READ COMMITTED transactions',
    current_setting('transaction_isolation'),
    'Call it outside your transaction, or begin that with isolation level read committed.'
  );
end
$$;
{{ private('refuse_transaction()', 'Raises 25006 on a standby, else TL009: it needs READ COMMITTED.') }}

create or replace function tokenlimits.lock_groups(p_group_ids uuid[], p_exclusive boolean default false)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_stripe integer;
begin
  if {{ in_wrong_transaction() }} then
    perform tokenlimits.refuse_transaction();
  end if;
  -- sorted, or two of us could deadlock
  for v_stripe in
    select distinct {{ stripe('g.id') }}
    from unnest(p_group_ids) as g (id)
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
  "Holds these groups' limits still (shared), or waits for all who use them (exclusive), until the transaction ends."
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
  for i in 0..15 loop
    exit when {{ try_slot('v_slot', 'p_group_id') }};
    v_slot := (v_slot + 1) % 16;
  end loop;
  return v_slot;
end
$$;
{{ private(
  'free_slot(uuid)',
  'A slot of the rollup that no other open transaction writes for this group; any, when all 16 are taken.'
) }}
