-- Removes tokenlimits: groups, limits, memberships, counters and every function, and nothing that it didn't create.
-- If objects of the project depend on it, it names them and changes nothing.
-- Keeps the ledger (generation_usage), which the service key may still read. Installing tokenlimits again picks up its
-- history, holds and keys. To drop the ledger too, run this first, in the same session:
--   set tokenlimits.drop_ledger = 'yes';
-- Keeps tokenlimits.is_admin() and tokenlimits.known_users() if the project replaced them.
-- Generated from sql/schema/ by `make sql`; edit it there.

do $do$
declare
  v_home regnamespace;
  v_private regnamespace := to_regnamespace('tokenlimits');
  v_ours text[];
  v_object record;
  v_detail text;
begin
  {{ lock_installation() }}
  -- the schema of the public part, found by the marks of its tables; temporary tables are never ours
  select c.relnamespace into v_home
  from pg_catalog.pg_class as c
  where
    c.relname in ({{ table_names }})
    and c.relpersistence = 'p'
    and {{ is_marked('c.oid', 'pg_class') }}
  -- a copy in another schema has none of our triggers
  order by c.relhastriggers desc, c.oid
  limit 1;

  begin
    -- policies and triggers that use our functions are ours, and are found by name
    for v_object in
      select p.polname as name, p.polrelid::regclass as relation, 'policy' as sort
      from pg_catalog.pg_policy as p
      inner join pg_catalog.pg_class as c on c.oid = p.polrelid
      -- even if the table was renamed
      where c.relnamespace = v_home and {{ is_marked('c.oid', 'pg_class') }} and p.polname like 'admins may %'
      union all
      select t.tgname, t.tgrelid::regclass, 'trigger'
      from pg_catalog.pg_trigger as t
      inner join pg_catalog.pg_class as c on c.oid = t.tgrelid
      inner join pg_catalog.pg_proc as f on f.oid = t.tgfoid
      where
        c.relnamespace in (v_home, v_private) and {{ is_marked('c.oid', 'pg_class') }}
        and not t.tgisinternal and {{ is_marked('f.oid', 'pg_proc') }}
    loop
      execute format('drop %s %I on %s', v_object.sort, v_object.name, v_object.relation);
    end loop;
    -- all at once, since some depend on others; never by cascade, which would drop the project's own objects
    v_ours := array(
      select p.oid::regprocedure
      from pg_catalog.pg_proc as p
      where
        p.prokind = 'f'
        and {{ is_marked('p.oid', 'pg_proc') }}
        and (
          p.pronamespace = v_private
          or (p.pronamespace = v_home and p.proname in (
            {{ function_names | indent(12) }}
          ))
        )
        and case p.proname
          when 'is_admin' then {{ is_default('p.prosrc', default_is_admin()) }}
          when 'known_users' then {{ is_default('p.prosrc', default_known_users()) }}
          else true
        end
    );
    if v_ours <> '{}' then
      execute 'drop function ' || array_to_string(v_ours, ', ');
    end if;
    v_ours := array(
      select c.oid::regclass
      from pg_catalog.pg_class as c
      where c.relnamespace = v_private and c.relkind = 'c' and c.relname in ({{ type_names }})
    );
    if v_ours <> '{}' then
      execute 'drop type ' || array_to_string(v_ours, ', ');
    end if;
    v_ours := array(
      select c.oid::regclass
      from pg_catalog.pg_class as c
      where
        c.relkind = 'r'
        and {{ is_marked('c.oid', 'pg_class') }}
        and (c.relnamespace = v_private or (c.relnamespace = v_home and c.relname in ({{ table_names }})))
        and (c.relname <> 'generation_usage' or current_setting('tokenlimits.drop_ledger', true) = 'yes')
    );
    if v_ours <> '{}' then
      execute 'drop table ' || array_to_string(v_ours, ', ');
    end if;
  exception
    when dependent_objects_still_exist then
      get stacked diagnostics v_detail = pg_exception_detail;
      raise exception using
        errcode = 'TL010',
        message = 'objects of the project depend on tokenlimits (TL010)',
        detail = v_detail,
        hint = 'Nothing was changed. Drop or change them first.';
  end;

  -- schemas that tokenlimits created, unless they contain something else by now
  for v_object in
    select n.oid::regnamespace as name
    from pg_catalog.pg_namespace as n
    where n.oid in (v_private, v_home) and {{ is_marked('n.oid', 'pg_namespace') }}
  loop
    begin
      execute format('drop schema %s', v_object.name);
    exception
      when dependent_objects_still_exist then
        null;
    end;
  end loop;
  -- it applies to this run only
  perform set_config('tokenlimits.drop_ledger', '', false);
end
$do$;

notify pgrst, 'reload schema';
