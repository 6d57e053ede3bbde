-- Removes tokenlimits: groups, limits, memberships, counters and every function, and nothing that it did not make.
-- Keeps the ledger (generation_usage), which the service key may go on reading; installing tokenlimits again takes it
-- up. To drop it too, run this first, in the same session:  set tokenlimits.drop_ledger = 'yes';
-- Keeps tokenlimits.is_admin() and tokenlimits.known_users() where they are the project's own.

do $do$
declare
  v_object text;
begin
  -- what tokenlimits made says so in its comment; where the body of a function was replaced, it is the project's
  for v_object in
    select p.oid::regprocedure
    from pg_catalog.pg_proc as p
    where
      obj_description(p.oid, 'pg_proc') like 'tokenlimits:%'
      and (p.proname not in ('is_admin', 'known_users') or p.prosrc like '%the default of tokenlimits%')
  loop
    -- with functions go the triggers and policies that use them
    execute format('drop function if exists %s cascade', v_object);
  end loop;
  for v_object in
    select c.oid::regclass
    from pg_catalog.pg_class as c
    where
      c.relkind = 'r'
      and obj_description(c.oid, 'pg_class') like 'tokenlimits:%'
      and (c.relname <> 'generation_usage' or current_setting('tokenlimits.drop_ledger', true) = 'yes')
  loop
    execute format('drop table if exists %s cascade', v_object);
  end loop;
  for v_object in
    select c.oid::regclass
    from pg_catalog.pg_class as c
    where c.relnamespace = to_regnamespace('tokenlimits') and c.relkind = 'c'
  loop
    execute format('drop type if exists %s cascade', v_object);
  end loop;
  -- schemas that it made, unless something else is in them by now
  for v_object in
    select n.oid::regnamespace
    from pg_catalog.pg_namespace as n
    where
      obj_description(n.oid, 'pg_namespace') like 'tokenlimits:%'
      and not exists (select from pg_catalog.pg_class as c where c.relnamespace = n.oid)
      and not exists (select from pg_catalog.pg_proc as p where p.pronamespace = n.oid)
      and not exists (select from pg_catalog.pg_type as t where t.typnamespace = n.oid)
  loop
    execute format('drop schema %s', v_object);
  end loop;
end
$do$;

notify pgrst, 'reload schema';
