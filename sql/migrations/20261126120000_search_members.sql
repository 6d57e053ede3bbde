-- tokenlimits: what is new since the migration before this one.
-- Generated from sql/schema/ by `make sql`; edit it there.

create or replace function public.tokenlimits_version()
returns jsonb
language sql
immutable
set search_path = ''
as $$
  select jsonb_build_object('version', 4)
$$;

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

-- PostgREST serves the new functions from now on.
notify pgrst, 'reload schema';
