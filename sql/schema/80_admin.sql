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
{{ search_path() }}
as $$
begin
  return to_jsonb(p_group) - 'is_nested' || jsonb_build_object('limits', coalesce((
    select jsonb_agg(
      jsonb_build_object(
        'kind', l.kind, 'period', l.period, 'starts', l.starts, 'scope', l.scope, 'mode', l.mode, 'max', l.max,
        'counts', l.counts
      )
      order by l.kind, l.scope, {{ by_length('l') | indent(6) }}
    )
    from public.group_limits as l
    where l.group_id = p_group.id
  ), '[]'));
end
$$;
{{ private(
  'group_json(public.user_groups)',
  "A group with its limits, as clients see it.",
  to='authenticated, service_role'
) }}

-- A limit as it came, with what it leaves out.
create or replace function tokenlimits.whole_limit(p_limit jsonb)
returns jsonb
language plpgsql
immutable
{{ search_path() }}
as $$
begin
  return '{"starts": "calendar", "mode": "enforce", "counts": null}' || p_limit;
end
$$;
{{ private('whole_limit(jsonb)', "A limit with its defaults.", to='authenticated, service_role') }}

-- Refuses an invalid set of limits with the path of the field, like limits[2].max.
create or replace function tokenlimits.check_limits(p_limits jsonb)
returns void
language plpgsql
immutable
{{ search_path() }}
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
      when ({{ is_kind("v_limit ->> 'kind'") }}) is not true then
        array['.kind', 'must be lower-case letters, digits and underscores, at most 32, a letter first']
      when ({{ is_period("v_limit ->> 'period'") | indent(6) }}) is not true then array[
        '.period',
        'must be {{ periods()[1:-1] | replace("'", "") }}, or 2 to 366 minutes, hours, days or weeks, or 2 to 24 months, '
        'like "5 hours"'
      ]
      when coalesce(v_limit ->> 'starts', '') not in ('calendar', 'anchor', 'first_use', 'rolling') then
        array['.starts', 'must be calendar, anchor, first_use or rolling']
      when ({{ is_start("(v_limit ->> 'starts')", "(v_limit ->> 'period')") | indent(6) }}) is not true then array[
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
      when ({{ is_counts("nullif(v_limit -> 'counts', 'null')") | indent(6) }}) is not true then array[
        '.counts',
        'must name 1 to 50 kinds with whole weights from 1 to 1000000, like {"image": 1, "video": 8}; null: no pool'
      ]
      when v_limit ->> 'period' = 'in_flight' and v_limit -> 'counts' <> 'null' then
        array['.counts', 'must be null where the period is in_flight, which counts the holds of its own kind']
      when ({{ is_scope("v_limit ->> 'scope'") }}) is not true then array['.scope', 'must be group, child or member']
      when jsonb_typeof(v_limit -> 'max') = 'null' then null
      when
        case
          when jsonb_typeof(v_limit -> 'max') <> 'number' then false
          else (v_limit ->> 'max')::numeric between 0 and {{ most_of_a_limit() }}
            and (v_limit ->> 'max')::numeric = trunc((v_limit ->> 'max')::numeric)
        end is not true
        then array['.max', 'must be a whole number from 0 to {{ most_of_a_limit() }}, or null: unlimited']
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
{{ private(
  'check_limits(jsonb)',
  "Refuses limits that are not valid, before anything is written.",
  to='authenticated, service_role'
) }}

-- Writes only what differs, so that unchanged limits keep their counters.
create or replace function tokenlimits.replace_limits(p_group_id uuid, p_limits jsonb)
returns void
language plpgsql
volatile
{{ search_path() }}
as $$
begin
  {{ lock_limits('p_group_id') | indent(2) }}
  delete from public.group_limits as l
  where
    l.group_id = p_group_id
    and not exists (
      select
      from jsonb_array_elements(p_limits) as e
      cross join lateral jsonb_to_record(tokenlimits.whole_limit(e.value)) as n ({{ fields_of_limit() }})
      where (n.kind, n.period, n.starts, n.scope) = (l.kind, l.period, l.starts, l.scope)
    );
  {{ upsert_limits('p_limits') | indent(2) }}
end
$$;
{{ private(
  'replace_limits(uuid, jsonb)',
  "Makes a group's limits these.",
  to='authenticated, service_role'
) }}

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
{{ search_path() }}
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
{{ private(
  'insert_group(uuid, text, text, integer, text, boolean, timestamptz, uuid, boolean)',
  "Makes a group, with an id of its own where none is given.",
  to='authenticated, service_role'
) }}

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
{{ search_path() }}
as $$
declare
  v_group public.user_groups;
  v_limits jsonb := {{ json_argument('p_limits') }};
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
    {{ insist_on_transaction() | indent(4) }}
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
    perform pg_advisory_xact_lock({{ stripe_class() }}, 256);
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
        format('a group named %L already exists', {{ tidied('p_name') | indent(8) }}),
        {{ tidied('p_name') | indent(8) }},
        'Names are unique regardless of case. Nothing was saved.'
      );
  end;
  if v_limits is not null then
    perform tokenlimits.replace_limits(v_group.id, v_limits);
  end if;
  return tokenlimits.group_json(v_group);
end
$$;
{{ opened(
  'save_group(uuid, text, text, integer, text, boolean, jsonb, uuid, timestamptz, timestamptz, boolean, uuid, boolean, boolean)',
  "Creates a group (with the id p_id, which was never used before; with p_is_spread, its usage is at home with its users), or changes the non-null fields of an existing group, with its whole set of limits, in one step. With p_parent_id, it is beneath that group, with all beneath it; with p_no_parent, beneath none. With p_no_anchor, it has no anchor any more. With p_updated_at, only if nobody has changed it since.",
  to='authenticated, service_role'
) }}

create or replace function public.set_group_limit(p_group_id uuid, p_limit jsonb)
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_limit jsonb := {{ json_argument('p_limit') }};
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.check_limits(jsonb_build_array(v_limit));
  perform tokenlimits.require_group(p_group_id);
  {{ touch_group('p_group_id') | indent(2) }}
  {{ upsert_limits('jsonb_build_array(v_limit)') | indent(2) }}
  return tokenlimits.group_json(tokenlimits.require_group(p_group_id));
end
$$;
{{ opened(
  'set_group_limit(uuid, jsonb)',
  "Adds one limit to a group, or changes its max, its mode or what it counts.",
  to='authenticated, service_role'
) }}

create or replace function tokenlimits.refuse_several(p_scope text, p_kind text, p_fitting text[])
returns void
language plpgsql
immutable
{{ search_path() }}
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
{{ private(
  'refuse_several(text, text, text[])',
  "Raises TL001 if a limit is named that could be one of several, each given by its period and where it starts.",
  to='authenticated, service_role'
) }}

create or replace function tokenlimits.require_user(p_user_id uuid)
returns void
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_user_id is not null and not exists (select from tokenlimits.users(array[p_user_id])) then
    perform tokenlimits.refuse(
      'TL004', format('there is no user %s', p_user_id), p_user_id::text, 'Find the id with find_users.'
    );
  end if;
end
$$;
{{ private('require_user(uuid)', "Raises TL004 if there is no such user.") }}

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
{{ search_path() }}
as $$
declare
  v_fitting text[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  {{ touch_group('p_group_id') | indent(2) }}
  select array_agg(l.period || ' ' || l.starts order by {{ by_length('l') | indent(2) }}) into v_fitting
  from public.group_limits as l
  where {{ named_limit('l') | indent(4) }};
  perform tokenlimits.refuse_several(p_scope, p_kind, v_fitting);
  delete from public.group_limits as l
  where {{ named_limit('l') | indent(4) }};
  return tokenlimits.group_json(tokenlimits.require_group(p_group_id));
end
$$;
{{ opened(
  'remove_group_limit(uuid, text, text, text, text)',
  "Removes one limit of a group, named by as much as tells it from others; a missing limit is no error.",
  to='authenticated, service_role'
) }}

create or replace function public.delete_group(p_group_id uuid)
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_group jsonb;
  v_children bigint;
begin
  perform tokenlimits.require_admin();
  v_group := tokenlimits.group_json(tokenlimits.require_group(p_group_id));
  {{ insist_on_transaction() | indent(2) }}
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
{{ opened(
  'delete_group(uuid)',
  "Deletes a group that has none beneath it, with its limits and memberships; the ledger stays.",
  to='authenticated, service_role'
) }}

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
{{ search_path() }}
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
        and (p_name is null or lower(g.name) = lower({{ tidied('p_name') | indent(8) }}))
        and (p_search is null or strpos(lower(g.name), lower({{ tidied('p_search') | indent(8) }})) > 0)
        -- no name is empty; "p_after is null or" would read the earlier pages too
        and lower(g.name) > lower(coalesce(p_after, ''))
      order by lower(g.name)
      limit least(greatest(p_page_size, 1), 500)
    ) as page
  ), '[]');
end
$$;
{{ opened(
  'find_groups(uuid, text, text, text, integer, uuid)',
  "Groups with their limits: by id, by name, or all whose name contains a text, or that are directly beneath a group; the page after a name, ordered by name.",
  to='authenticated, service_role'
) }}

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
{{ search_path() }}
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
{{ rpc(
  'add_group_members',
  ['p_group_id uuid', 'p_user_ids uuid[]', 'p_anchor_at timestamptz default null'],
  to='authenticated, service_role',
  comment="Adds users to a group, their anchored periods counted from a moment; returns how many were added, how many were already members, and which ids are unknown."
) }}

create or replace function tokenlimits.set_member_anchor(p_group_id uuid, p_user_id uuid, p_anchor_at timestamptz)
returns jsonb
language plpgsql
volatile
-- definer: no client may update memberships
security definer
{{ search_path() }}
as $$
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  {{ insist_on_transaction() | indent(2) }}
  update public.group_memberships as m
  set anchor_at = p_anchor_at
  where m.group_id = p_group_id and m.user_id = p_user_id;
  return jsonb_build_object('set', found);
end
$$;
{{ rpc(
  'set_member_anchor',
  ['p_group_id uuid', 'p_user_id uuid', 'p_anchor_at timestamptz default null'],
  to='authenticated, service_role',
  comment="Sets the moment from which a member's anchored periods are counted; null: from joined_at. False when the user is not in the group."
) }}

create or replace function public.remove_group_members(p_group_id uuid, p_user_ids uuid[])
returns jsonb
language plpgsql
volatile
{{ search_path() }}
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
{{ opened(
  'remove_group_members(uuid, uuid[])',
  "Removes users from a group, and says how many were in it; their usage stays.",
  to='authenticated, service_role'
) }}

create or replace function public.move_group_member(p_user_id uuid, p_from uuid, p_to uuid)
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_moved boolean;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_from);
  perform tokenlimits.require_group(p_to);
  {{ insist_on_transaction() | indent(2) }}
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
{{ opened(
  'move_group_member(uuid, uuid, uuid)',
  "Moves a user from one group to another in one step; false when the user was not in the first.",
  to='authenticated, service_role'
) }}

create or replace function tokenlimits.reset_group_usage(p_group_id uuid, p_kind text, p_user_id uuid)
returns jsonb
language plpgsql
volatile
-- definer: resets are in a private table
security definer
{{ search_path() }}
as $$
declare
  v_at timestamptz;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  if not {{ is_kind('p_kind') }} then
    perform tokenlimits.refuse('TL001', 'kind: is not a kind of generation', 'kind');
  end if;
  perform tokenlimits.require_user(p_user_id);
  {{ insist_on_transaction() | indent(2) }}
  perform from public.user_groups as g where g.id = p_group_id for no key update;
  {{ lock_limits('p_group_id') | indent(2) }}
  -- no call is between being judged and being recorded now, so each usage is recorded either before the reset or after
  perform tokenlimits.lock_groups(array[p_group_id], true);
  v_at := greatest(
    tokenlimits.clock(),
    (
      select max(l.created_at) + interval '1 microsecond'
      from unnest({{ beneath('p_group_id') }}) as b (id)
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
{{ rpc(
  'reset_group_usage',
  ['p_group_id uuid', 'p_kind text default null', 'p_user_id uuid default null'],
  to='authenticated, service_role',
  comment="Resets usage in the current periods of a group's limits, and of its pools in limits of its parent, of one kind or of all; with a user, of that member's alone. The ledger keeps everything."
) }}

create or replace function tokenlimits.group_members(p_group_id uuid, p_after uuid, p_page_size integer, p_search text)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
{{ search_path() }}
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
{{ rpc(
  'group_members',
  ['p_group_id uuid', 'p_after uuid default null', 'p_page_size integer default 500', 'p_search text default null'],
  to='authenticated, service_role',
  comment="A group's members, or those whose e-mail address contains a text: the page after a user id, ordered by id.",
  volatility='stable'
) }}

create or replace function tokenlimits.find_users(p_email text, p_page_size integer)
returns jsonb
language plpgsql
stable
-- definer: auth.users is not open to admins
security definer
{{ search_path() }}
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
{{ rpc(
  'find_users',
  ['p_email text', 'p_page_size integer default 20'],
  to='authenticated, service_role',
  comment="Users whose e-mail address contains a text, regardless of case.",
  volatility='stable'
) }}
