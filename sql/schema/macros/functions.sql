{#
What every function needs besides its body. In old projects, Supabase grants execute to everybody by default, so each
function first revokes it and then grants it by name.
#}

{# Pinned, or a caller's own types and operators would be found first: pg_temp comes first unless it is named. #}
{% macro search_path() -%}
set search_path = pg_catalog, pg_temp
{%- endmacro %}

{# A name with the types of its arguments, which may be too long for a line. #}
{% macro signed(signature) -%}
{{ signature | replace('(', '(\n  ') | replace(', ', ',\n  ') | replace(')', '\n)') if signature | length > 90 else signature }}
{%- endmacro %}

{% macro comment_on_function(signature, comment) -%}
comment on function {{ signed(signature) }}
is '{{ ('tokenlimits: ' ~ comment) | replace("'", "''") | wordwrap(114, wrapstring=" '\n'") }}';
{%- endmacro %}

{# Whether tokenlimits created an object: its comment begins with the mark, even in a restored dump. #}
{% macro is_marked(oid, catalog) -%}
coalesce(obj_description({{ oid }}, '{{ catalog }}') like 'tokenlimits:%', false)
{%- endmacro %}

{# The default bodies of the two functions that a project may replace. #}
{% macro default_is_admin() %}
      select coalesce((select auth.jwt()) -> 'app_metadata' ->> 'role' = 'admin', false)
    {% endmacro %}

{# One by one, by the primary key: a search among members must not read all users. #}
{% macro default_known_users() %}
      select u.id, u.email
      from unnest(p_user_ids) as p (id)
      cross join lateral (select a.id, a.email::text from auth.users as a where a.id = p.id offset 0) as u
    {% endmacro %}

{# Whether a function has its default body, ignoring white space. #}
{% macro is_default(prosrc, body) -%}
btrim(regexp_replace({{ prosrc }}, '\s+', ' ', 'g')) = '{{ body.split() | join(' ') | replace("'", "''") }}'
{%- endmacro %}

{# Whether a project has its own rule for which users exist. #}
{% macro has_own_users() -%}
exists (
  select
  from pg_catalog.pg_proc as p
  where
    p.oid = to_regprocedure('tokenlimits.known_users(uuid[])')
    and not {{ is_default('p.prosrc', default_known_users()) }}
)
{%- endmacro %}

{# For a private function: its comment, and who may execute it. #}
{% macro private(signature, comment, to='') -%}
{{ comment_on_function('tokenlimits.' ~ signature, comment) }}
revoke execute on function {{ signed('tokenlimits.' ~ signature) }}
from public, anon, authenticated, service_role;
{%- if to %}
grant execute on function {{ signed('tokenlimits.' ~ signature) }}
to {{ to }};
{%- endif %}
{%- endmacro %}

{# The same for a function of the API. #}
{% macro opened(signature, comment, to) -%}
{{ comment_on_function('public.' ~ signature, comment) }}
revoke execute on function {{ signed('public.' ~ signature) }}
from public, anon, authenticated, service_role;
grant execute on function {{ signed('public.' ~ signature) }}
to {{ to }};
{%- endmacro %}

{# A JSON argument; some servers send it as text in JSON. #}
{% macro json_argument(name) -%}
case jsonb_typeof({{ name }}) when 'string' then ({{ name }} #>> '{}')::jsonb else {{ name }} end
{%- endmacro %}

{#
A function of the API: passes its arguments (each 'name type', or 'name type default value') to its private half, which
has the same name and arguments and gets its comment and grants here too; or to another call. It runs as its caller:
whatever needs more privileges is in the private half.
#}
{% macro rpc(name, arguments, to, comment, volatility='volatile', returns='jsonb', calls='') -%}
{%- set parameters = [] -%}
{%- set types = [] -%}
{%- set passed = [] -%}
{%- for argument in arguments -%}
{%- set words = argument.split(' default ')[0].split(' ', 1) -%}
{%- do parameters.append(argument) -%}
{%- do types.append(words[1]) -%}
{%- do passed.append(json_argument(words[0]) if words[1] == 'jsonb' else words[0]) -%}
{%- endfor -%}
create or replace function public.{{ name }}(
  {{- '\n  ' ~ parameters | join(',\n  ') ~ '\n' if parameters }})
returns {{ returns }}
language plpgsql
{{ volatility }}
{{ search_path() }}
as $$
begin
  return {{ calls or 'tokenlimits.' ~ name ~ '(' ~ ('\n    ' ~ passed | join(',\n    ') ~ '\n  ' if passed else '') ~ ')' }};
end
$$;
{{ opened(name ~ '(' ~ types | join(', ') ~ ')', comment, to) }}
{%- if not calls %}

{{ private(name ~ '(' ~ types | join(', ') ~ ')', 'The private half of public.' ~ name ~ '.', to) }}
{%- endif %}
{%- endmacro %}
