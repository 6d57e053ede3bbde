-- Whether tokenlimits can be installed here.
--
-- Invariants
--   * The comment of every object that we create begins with our mark. So dumps contain the mark, and a kept ledger
--     still has it when the schema tokenlimits is gone.
--   * If this refuses, nothing has changed. Tables and functions without our mark are never changed.

do $do$
declare
  v_elsewhere text;
  v_taken text[];
begin
  {{ lock_installation() }}
  select format('%I.%I', n.nspname, c.relname) into v_elsewhere
  from pg_catalog.pg_class as c
  inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
  where
    c.relname in ({{ table_names }})
    and n.nspname <> 'public'
    -- anybody can create a temporary table
    and c.relpersistence = 'p'
    and {{ is_marked('c.oid', 'pg_class') }}
    -- a copy beside our own tables belongs to the project
    and not exists (
      select
      from pg_catalog.pg_class as h
      where
        h.relnamespace = to_regnamespace('public')
        and h.relname in ({{ table_names }})
        and {{ is_marked('h.oid', 'pg_class') }}
    )
  limit 1;
  if found then
    raise exception using
      errcode = 'TL010',
      message = format('tokenlimits is already installed in another schema of this database: %s (TL010)', v_elsewhere),
      hint = 'Nothing was changed. Apply the SQL for that schema (tokenlimits sql --schema NAME), or uninstall it there '
        'first. To move a kept ledger, create the schema NEW, then: alter table OLD.generation_usage set schema NEW.';
  end if;

  -- the project may own the private schema, and two functions in it, which none of our lists has
  v_taken := array(
{%- for place, relations, types, functions in [
  ('public', table_names ~ ',\n' ~ index_names, table_names, function_names),
  ('tokenlimits', private_table_names, private_table_names ~ ',\n' ~ type_names, private_function_names)
] %}
    select format(
      '%s %I.%I',
      case c.relkind
        when 'i' then 'index'
        when 'S' then 'sequence'
        when 'v' then 'view'
        when 'm' then 'materialized view'
        when 'c' then 'type'
        else 'table'
      end,
      '{{ place }}', c.relname
    )
    from pg_catalog.pg_class as c
    left join pg_catalog.pg_index as i on i.indexrelid = c.oid
    left join pg_catalog.pg_depend as d
      on
        c.relkind = 'S' and d.objid = c.oid and d.deptype in ('a', 'i')
        and d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass
    where
      c.relnamespace = to_regnamespace('{{ place }}')
      and c.relname in (
        {{ relations | indent(8) }}
      )
      -- an index and an identity's sequence belong to their table
      and not {{ is_marked('coalesce(i.indrelid, d.refobjid, c.oid)', 'pg_class') }}
    union all
    select format('type %I.%I', '{{ place }}', t.typname)
    from pg_catalog.pg_type as t
    where
      t.typnamespace = to_regnamespace('{{ place }}')
      and t.typname in (
        {{ types | indent(8) }}
      )
      and t.typrelid = 0
    union all
    select format(
      '%s %I.%I(%s)',
      case p.prokind when 'p' then 'procedure' when 'a' then 'aggregate' else 'function' end,
      '{{ place }}', p.proname, pg_get_function_identity_arguments(p.oid)
    )
    from pg_catalog.pg_proc as p
    where
      p.pronamespace = to_regnamespace('{{ place }}')
      and p.proname in (
        {{ functions | indent(8) }}
      )
      and not {{ is_marked('p.oid', 'pg_proc') }}
    {{ 'union all' if not loop.last else 'order by 1' }}
{%- endfor %}
  );
  if v_taken <> '{}' and coalesce(current_setting('tokenlimits.adopt', true), '') <> 'yes' then
    raise exception using
      errcode = 'TL010',
      message = format(
        'other objects, which tokenlimits did not create, have names that it needs: %s (TL010)',
        array_to_string(v_taken, ', ')
      ),
      hint = 'Nothing was changed. Rename them, or install in another schema: tokenlimits sql --schema NAME. Objects of '
        'tokenlimits have a comment that begins with "tokenlimits:". If a restored dump lost the comments, run this '
        'first, in the same session: set tokenlimits.adopt = ''yes''.';
  end if;
end
$do$;
