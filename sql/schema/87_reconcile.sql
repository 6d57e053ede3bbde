-- Counting everything again, for the day on which somebody doubts the numbers.
--
-- Invariants
--   * The ledger is right by definition: counters and rollup are made to agree with it, never the other way round.
--   * Nobody tracks for the group meanwhile: its limits are held exclusively.

-- One group at a time, since a statement ends after 8 s. Answers what differed, as it was and as it is now.
create or replace function tokenlimits.reconcile(p_group_id uuid, p_since timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: counters and rollup are private
security definer
set search_path = ''
as $$
declare
  v_at timestamptz;
  v_counters jsonb;
  v_rollup jsonb;
  -- whole buckets, or the first one's beginning would be missed
  v_since timestamptz := case
    when isfinite(p_since) then tokenlimits.rollup_bucket(p_since)
    else coalesce(p_since, '-infinity')
  end;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.lock_groups(array[p_group_id], true);
  v_at := tokenlimits.clock();

  with counted as (
    select
      c.subject, c.counter_id, l.kind, l.period, l.scope, c.used as was,
      coalesce((
        select sum(u.cost)
        from public.generation_usage as u
        where
          (case l.scope when 'member' then u.user_id = c.subject else u.group_id = c.subject end)
          and u.group_id = p_group_id
          and u.created_at >= c.since
          and u.created_at < c.until
          and u.kind = l.kind
          and u.status in ('reserved', 'committed')
      ), 0) as used
    from public.group_limits as l
    inner join tokenlimits.counters as c on c.counter_id = l.counter_id
    where l.group_id = p_group_id and c.until > v_at
  ),

  repaired as (
    update tokenlimits.counters as c
    set used = n.used
    from counted as n
    where c.subject = n.subject and c.counter_id = n.counter_id and n.used <> n.was
    returning n.subject, n.kind, n.period, n.scope, n.was, n.used
  )

  select jsonb_agg(to_jsonb(r) order by r.kind, r.period, r.subject) into v_counters
  from repaired as r;

  with counted as (
    select
      coalesce(r.kind, u.kind) as kind, coalesce(r.bucket, u.bucket) as bucket,
      coalesce(r.cost, 0) as was, coalesce(u.cost, 0) as used,
      coalesce(u.cost, 0) - coalesce(r.cost, 0) as cost,
      coalesce(u.generations, 0) - coalesce(r.generations, 0) as generations
    from (
      select s.kind, s.bucket, sum(s.cost) as cost, sum(s.generations) as generations
      from tokenlimits.usage_rollup as s
      where s.group_id = p_group_id and s.bucket >= v_since
      group by s.kind, s.bucket
    ) as r
    full join (
      select s.kind, tokenlimits.rollup_bucket(s.created_at) as bucket, sum(s.cost) as cost, count(*) as generations
      from public.generation_usage as s
      where s.group_id = p_group_id and s.created_at >= v_since and s.status in ('reserved', 'committed')
      group by s.kind, bucket
    ) as u on u.kind = r.kind and u.bucket = r.bucket
  ),

  repaired as (
    insert into tokenlimits.usage_rollup as s (group_id, kind, bucket, slot, cost, generations)
    select p_group_id, c.kind, c.bucket, 0, c.cost, c.generations
    from counted as c
    where c.cost <> 0 or c.generations <> 0
    on conflict on constraint usage_rollup_pkey do update
    set cost = s.cost + excluded.cost, generations = s.generations + excluded.generations
    returning s.kind, s.bucket
  )

  select jsonb_agg(
    jsonb_build_object('kind', c.kind, 'bucket', c.bucket, 'was', c.was, 'used', c.used)
    order by c.kind, c.bucket
  ) into v_rollup
  from repaired as r
  inner join counted as c on c.kind = r.kind and c.bucket = r.bucket;

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
