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
