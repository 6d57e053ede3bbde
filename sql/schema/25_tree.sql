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
{{ search_path() }}
as $$
begin
  perform tokenlimits.refuse(
    'TL001', format('id: %s is or was the id of another group', p_id), 'id', 'Choose an id that was never used.'
  );
end
$$;
{{ private('refuse_id(uuid)', 'Raises TL001: a group has or had this id.') }}

create or replace function tokenlimits.refuse_parent(p_rule text)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  perform tokenlimits.refuse('TL001', 'parent_id: ' || p_rule, 'parent_id', 'Nothing was saved.');
end
$$;
{{ private(
  'refuse_parent(text)',
  "Raises TL001: a group can't be beneath that one.",
  to='authenticated, service_role'
) }}

-- Before a group is beneath another one: refuses what can't be, and keeps the tree as it is from now on.
create or replace function tokenlimits.check_parent()
returns trigger
language plpgsql
-- definer: the tree is private
security definer
{{ search_path() }}
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
  {{ lock_tree(exclusive=true) }}
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
{{ private('check_parent()', 'Trigger: checks where in the tree a group is to be.') }}

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
{{ search_path() }}
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
{{ private('skip_what_is_there()', 'Trigger: a group is in the tree once.') }}

create or replace trigger group_tree_skip_what_is_there
before insert on tokenlimits.group_tree
for each row execute function tokenlimits.skip_what_is_there();
alter table tokenlimits.group_tree enable always trigger group_tree_skip_what_is_there;

-- Takes a group, with all beneath it, from all above it, and puts it beneath a parent. A new group isn't there yet.
create or replace function tokenlimits.place_group(p_group_id uuid, p_parent_id uuid)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_beneath uuid[] := {{ beneath('p_group_id') }};
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
{{ private('place_group(uuid, uuid)', 'Puts a group and all beneath it beneath another group, or at the top.') }}

-- Limits above a group that has moved count its usage no longer, or from now on too: they are counted afresh. All calls
-- that they judge wait meanwhile. p_before and p_after are its rows of the tree.
create or replace function tokenlimits.recount_above(
  p_before tokenlimits.group_tree[],
  p_after tokenlimits.group_tree[]
)
returns void
language plpgsql
volatile
{{ search_path() }}
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
{{ private(
  'recount_above(tokenlimits.group_tree[], tokenlimits.group_tree[])',
  'Counts limits above a moved group afresh.'
) }}

create or replace function tokenlimits.move_in_tree()
returns trigger
language plpgsql
-- definer: the tree is private
security definer
{{ search_path() }}
as $$
declare
  v_before tokenlimits.group_tree[] := {{ ways_up('array[new.id]') | indent(2) }};
  v_after tokenlimits.group_tree[];
  v_beneath uuid[] := {{ beneath('new.id') }};
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
    v_after := {{ ways_up('array[new.id]') | indent(4) }};
    v_beneath := {{ beneath('new.id') }};
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
{{ private('move_in_tree()', 'Trigger: puts a new or moved group into the tree.') }}

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
{{ search_path() }}
as $$
begin
  {{ lock_tree() }}
  return null;
end
$$;
{{ private('keep_tree()', "Trigger: the tree of groups stays as it is while limits change.") }}

create or replace trigger group_limits_keep_tree
before insert or update or delete on public.group_limits
for each statement execute function tokenlimits.keep_tree();
