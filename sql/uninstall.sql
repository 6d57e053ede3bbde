-- Removes tokenlimits: groups, limits, memberships, counters and every function.
-- Keeps the ledger (public.generation_usage), which the service key may go on reading; installing tokenlimits again
-- takes it up. To drop it too, run this first, in the same session:  set tokenlimits.drop_ledger = 'yes';

do $do$
declare
  v_function regprocedure;
begin
  -- only functions that are made of tokenlimits' own, so that a project's function of the same name stays
  for v_function in
    select p.oid::regprocedure
    from pg_catalog.pg_proc as p
    where
      p.pronamespace = 'public'::regnamespace
      and (p.prosrc like '%tokenlimits.%' or p.proname = 'tokenlimits_version')
      and p.proname in (
        'tokenlimits_version', 'track_generation', 'track_generations', 'check_generation', 'record_generation',
        'reserve_generation', 'commit_generation', 'release_generation', 'refund_generation', 'reconcile_usage',
        'user_generation_usage', 'my_generation_usage', 'save_group', 'set_group_limit', 'remove_group_limit',
        'delete_group', 'find_groups', 'add_group_members', 'remove_group_members', 'move_group_member',
        'reset_group_usage', 'group_members', 'find_users', 'find_users_by_email', 'export_usage', 'export_history',
        'top_members', 'usage_drift', 'tokenlimits_diagnosis', 'group_usage', 'generation_history'
      )
  loop
    execute format('drop function %s', v_function);
  end loop;
end
$do$;

-- with its functions go the triggers and policies that use them
-- squawk-ignore ban-drop-schema
drop schema if exists tokenlimits cascade;
-- squawk-ignore ban-drop-table
drop table if exists public.group_memberships;
-- squawk-ignore ban-drop-table
drop table if exists public.group_limits;
-- squawk-ignore ban-drop-table
drop table if exists public.user_groups;

do $do$
begin
  if current_setting('tokenlimits.drop_ledger', true) = 'yes' then
    drop table if exists public.generation_usage;
  end if;
end
$do$;

notify pgrst, 'reload schema';
