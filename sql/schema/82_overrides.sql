-- Overrides: another max of one limit for one member or child group, or of a group limit, perhaps until a moment.
--
-- Invariants
--   * An override names its limit by (kind, period, starts, scope). While there is no such limit, it sleeps.
--   * Usage doesn't change. What is in force is computed from the time alone: when an override ends, no job runs.
--   * The subject's counter says it too, so a call reads nothing else. A trigger keeps both equal, also if an admin
--     edits the table.

{%- macro scope_of_subject() -%}
case when p_child_id is not null then 'child' when p_user_id is not null then 'member' else 'group' end
{%- endmacro %}
{%- macro subject() -%}
coalesce(p_child_id, p_user_id, p_group_id)
{%- endmacro %}
create or replace function tokenlimits.override_json(p_override public.limit_overrides, p_email text)
returns jsonb
language plpgsql
stable
{{ search_path() }}
as $$
begin
  return jsonb_build_object(
    'id', p_override.id,
    'group_id', p_override.group_id,
    'kind', p_override.kind,
    'period', p_override.period,
    'starts', p_override.starts,
    'scope', p_override.scope,
    'user_id', case p_override.scope when 'member' then p_override.subject end,
    'email', p_email,
    'child_id', case p_override.scope when 'child' then p_override.subject end,
    'child_name', (
      select g.name from public.user_groups as g where g.id = p_override.subject and p_override.scope = 'child'
    ),
    'max', p_override.max,
    'until', p_override.until,
    'status', case
      when p_override.until <= tokenlimits.clock() then 'ended'
      when exists (
        select
        from public.group_limits as l
        where {{ same_limit('l', 'p_override') | indent(8) }}
      ) and (p_override.scope <> 'child' or exists (
        select from public.user_groups as g where g.id = p_override.subject and g.parent_id = p_override.group_id
      )) then 'active'
      else 'sleeping'
    end,
    'created_at', p_override.created_at
  );
end
$$;
{{ private('override_json(public.limit_overrides, text)', "An override, as clients see it.") }}

create or replace function tokenlimits.require_one_subject(p_user_id uuid, p_child_id uuid)
returns void
language plpgsql
immutable
{{ search_path() }}
as $$
begin
  if p_user_id is not null and p_child_id is not null then
    perform tokenlimits.refuse('TL001', 'child_id: name a user or a child group, not both', 'child_id');
  end if;
end
$$;
{{ private(
  'require_one_subject(uuid, uuid)',
  "Raises TL001 if both a user and a child group are named.",
  to='authenticated, service_role'
) }}

create or replace function tokenlimits.require_child(p_group_id uuid, p_user_id uuid, p_child_id uuid)
returns void
language plpgsql
stable
{{ search_path() }}
as $$
begin
  perform tokenlimits.require_one_subject(p_user_id, p_child_id);
  if p_child_id is not null and (tokenlimits.require_group(p_child_id)).parent_id is distinct from p_group_id then
    perform tokenlimits.refuse(
      'TL001', format('child_id: %s is not directly beneath the group', p_child_id), 'child_id', 'Nothing was saved.'
    );
  end if;
end
$$;
{{ private('require_child(uuid, uuid, uuid)', "Raises TL001 or TL002 unless a child group, if named, is a group's.") }}

create or replace function tokenlimits.set_limit_override(
  p_group_id uuid,
  p_kind text,
  p_max bigint,
  p_user_id uuid,
  p_period text,
  p_starts text,
  p_until timestamptz,
  p_child_id uuid
)
returns jsonb
language plpgsql
volatile
-- definer: users are not open to admins
security definer
{{ search_path() }}
as $$
declare
  v_scope constant text := {{ scope_of_subject() }};
  v_limits public.group_limits[];
  v_override public.limit_overrides;
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.require_user(p_user_id);
  perform tokenlimits.require_child(p_group_id, p_user_id, p_child_id);
  if p_max not between 0 and {{ most_of_a_limit() }} then
    perform tokenlimits.refuse(
      'TL001', 'max: must be from 0 to {{ most_of_a_limit() }}, or null', 'max', 'Nothing was saved.'
    );
  elsif p_until <= tokenlimits.clock() or not ({{ is_moment('p_until') }}) then
    perform tokenlimits.refuse('TL001', 'until: must be in the future', 'until', 'Nothing was saved.');
  end if;
  {{ touch_group('p_group_id') | indent(2) }}
  v_limits := array(
    select row(l.*)::public.group_limits
    from public.group_limits as l
    where {{ named_limit('l', 'v_scope') | indent(4) }}
    order by {{ by_length('l') | indent(4) }}
  );
  if v_limits = '{}' then
    perform tokenlimits.refuse(
      'TL001',
      format('kind: there is no such %s limit on %s', v_scope, p_kind),
      'kind',
      case when v_scope = 'group' then 'For a member limit, name the user; for a child limit, the child. ' else '' end
      || 'Nothing was saved.'
    );
  end if;
  perform tokenlimits.refuse_several(
    v_scope, p_kind, array(select l.period || ' ' || l.starts from unnest(v_limits) as l)
  );
  insert into public.limit_overrides as o (
    group_id, kind, period, starts, scope, subject, max, until, created_at
  )
  values (
    p_group_id, p_kind, v_limits[1].period, v_limits[1].starts, v_scope,
    {{ subject() }}, p_max, p_until, tokenlimits.clock()
  )
  on conflict on constraint limit_overrides_key do update
  set max = excluded.max, until = excluded.until, created_at = excluded.created_at
  returning * into v_override;
  return tokenlimits.override_json(
    v_override, (select u.email from tokenlimits.users(array[p_user_id]) as u)
  );
end
$$;
{{ rpc(
  'set_limit_override',
  [
    'p_group_id uuid', 'p_kind text', 'p_max bigint', 'p_user_id uuid default null', 'p_period text default null',
    'p_starts text default null', 'p_until timestamptz default null', 'p_child_id uuid default null'
  ],
  to='authenticated, service_role',
  comment="Replaces the max of one limit for one member or child group, or of a group limit, perhaps until a moment; null: unlimited."
) }}

create or replace function public.remove_limit_override(
  p_group_id uuid,
  p_kind text,
  p_user_id uuid default null,
  p_period text default null,
  p_starts text default null,
  p_child_id uuid default null
)
returns jsonb
language plpgsql
volatile
{{ search_path() }}
as $$
declare
  v_scope constant text := {{ scope_of_subject() }};
  v_fitting text[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.require_one_subject(p_user_id, p_child_id);
  {{ touch_group('p_group_id') | indent(2) }}
  select array_agg(o.period || ' ' || o.starts order by {{ by_length('o') | indent(2) }}) into v_fitting
  from public.limit_overrides as o
  where {{ named_limit('o', 'v_scope') | indent(4) }} and o.subject = {{ subject() }};
  perform tokenlimits.refuse_several(v_scope, p_kind, v_fitting);
  delete from public.limit_overrides as o
  where {{ named_limit('o', 'v_scope') | indent(4) }} and o.subject = {{ subject() }};
  return jsonb_build_object('removed', found);
end
$$;
{{ opened(
  'remove_limit_override(uuid, text, uuid, text, text, uuid)',
  "Ends an override, so that the limit's own max applies again; says whether there was one.",
  to='authenticated, service_role'
) }}

create or replace function tokenlimits.find_limit_overrides(
  p_group_id uuid,
  p_user_id uuid,
  p_after uuid,
  p_page_size integer,
  p_child_id uuid
)
returns jsonb
language plpgsql
stable
-- definer: e-mail addresses are not open to admins
security definer
{{ search_path() }}
as $$
declare
  v_overrides public.limit_overrides[];
begin
  perform tokenlimits.require_admin();
  perform tokenlimits.require_group(p_group_id);
  perform tokenlimits.require_one_subject(p_user_id, p_child_id);
  v_overrides := array(
    select row(o.*)::public.limit_overrides
    from public.limit_overrides as o
    where
      o.group_id = p_group_id
      and (p_user_id is null or (o.scope = 'member' and o.subject = p_user_id))
      and (p_child_id is null or (o.scope = 'child' and o.subject = p_child_id))
      and (p_after is null or o.id > p_after)
    order by o.id
    limit least(greatest(p_page_size, 1), 1000)
  );
  return coalesce((
    select jsonb_agg(tokenlimits.override_json(row(o.*)::public.limit_overrides, u.email) order by o.id)
    from unnest(v_overrides) as o
    left join tokenlimits.users(
      array(select s.subject from unnest(v_overrides) as s where s.scope = 'member')
    ) as u on u.id = o.subject
  ), '[]');
end
$$;
{{ rpc(
  'find_limit_overrides',
  [
    'p_group_id uuid', 'p_user_id uuid default null', 'p_after uuid default null', 'p_page_size integer default 500',
    'p_child_id uuid default null'
  ],
  to='authenticated, service_role',
  comment="The overrides of a group's limits, or those of one user or child group: the page after an id, ordered by id.",
  volatility='stable'
) }}
