-- Access to the tables: for admins through row-level security, for the service key, and for nobody else.
--
-- Invariants
--   * One permissive policy per table, action and role.
--   * Through the API, nobody writes the ledger, or the ids, counters and timestamps of the other tables: only definer
--     functions do.
--   * This holds in projects whose default privileges grant everything in public, and in those that grant nothing.

alter table public.user_groups enable row level security;
alter table public.group_limits enable row level security;
alter table public.group_memberships enable row level security;
alter table public.limit_overrides enable row level security;
alter table public.generation_usage enable row level security;

revoke all on
public.user_groups, public.group_limits, public.group_memberships, public.limit_overrides, public.generation_usage
from public, anon, authenticated, service_role;
grant select, delete on public.user_groups, public.group_limits, public.group_memberships, public.limit_overrides
to authenticated, service_role;
-- only our functions set ids, counters and timestamps, even if an admin edits a table
grant insert (name, description, priority, timezone, is_default, anchor_at, parent_id, is_spread),
update (name, description, priority, timezone, is_default, anchor_at, parent_id)
on public.user_groups to authenticated, service_role;
grant insert (group_id, kind, period, starts, scope, mode, max, counts),
update (kind, period, starts, scope, mode, max, counts)
on public.group_limits to authenticated, service_role;
grant insert (group_id, kind, period, starts, scope, subject, max, until), update (max, until)
on public.limit_overrides to authenticated, service_role;
grant insert (group_id, user_id) on public.group_memberships to authenticated, service_role;
grant select on public.generation_usage to authenticated, service_role;
-- an identity column needs no privilege on its sequence; old projects grant it to everybody
revoke all on sequence public.group_limits_counter_id_seq from public, anon, authenticated, service_role;

do $do$
declare
  v_table text;
  v_action text;
  v_name text;
begin
  foreach v_table in array array[
    'user_groups', 'group_limits', 'group_memberships', 'limit_overrides', 'generation_usage'
  ] loop
    foreach v_action in array array['select', 'insert', 'update', 'delete'] loop
      continue when v_table = 'generation_usage' and v_action <> 'select';
      continue when v_table = 'group_memberships' and v_action = 'update';
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

-- Makes PostgREST serve the new functions.
notify pgrst, 'reload schema';
