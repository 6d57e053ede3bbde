{#
The rules of a call. Each is written here once, and the build inserts it wherever it is needed: calling a function would
add a tenth to the cost of these lines. A macro takes expressions, and the names of variables.
#}

{# A moment that every reader can represent: Python, JavaScript, and a UUIDv7. #}
{% macro is_moment(at) -%}
{{ at }} >= '1970-01-01 00:00:00+00' and {{ at }} < '9999-01-01 00:00:00+00'
{%- endmacro %}

{# The groups whose anchored limits count members of some groups: those themselves, or above them. #}
{% macro anchoring(group_ids) -%}
array(
  select distinct l.group_id
  from tokenlimits.group_tree as t
  inner join public.group_limits as l on l.group_id = t.above_id
  where t.group_id = any({{ group_ids }}) and l.starts = 'anchor' and l.scope = 'member'
)
{%- endmacro %}

{# All who are in a group or in one beneath it. #}
{% macro members_beneath(group_id) -%}
array(
  select distinct m.user_id
  from tokenlimits.group_tree as t
  inner join public.group_memberships as m on m.group_id = t.group_id
  where t.above_id = {{ group_id }}
)
{%- endmacro %}

{# A name as it is stored: composed, without leading or trailing blanks, of which Unicode has many. #}
{% macro tidied(name) -%}
normalize(
  btrim(
    {{ name }},
    e' \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000'
  ),
  nfc
)
{%- endmacro %}

{#
A name has no control characters, no invisible ones, and none that change the direction of text. Without "between": a
check constraint nests it within "and", a restored dump flattens it, and the two would always differ.
#}
{% macro is_name(name) -%}
char_length({{ name }}) >= 1 and char_length({{ name }}) <= 200 and {{ name }} = {{ tidied(name) }}
and {{ name }} !~ '[\u0001-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e]'
and {{ name }} !~ '[\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0]'
{%- endmacro %}

{# The periods, from the shortest to the longest; in flight is the present moment. #}
{% macro periods() -%}
('in_flight', 'minute', 'hour', 'day', 'week', 'month', 'year', 'lifetime')
{%- endmacro %}

{# A period: a single one, or several units, such as "5 hours": 2 to 366, or 2 to 24 months. #}
{% macro is_period(period) -%}
{{ period }} in {{ periods() }}
or {{ period }} ~ '^([2-9]|[1-9][0-9]|[12][0-9]{2}|3[0-5][0-9]|36[0-6]) (minutes|hours|days|weeks)$'
or {{ period }} ~ '^([2-9]|1[0-9]|2[0-4]) months$'
{%- endmacro %}

{# Whether periods of that length can begin there. Conditions are flat, as a restored dump writes them. #}
{% macro is_start(starts, period) -%}
({{ starts }} = 'calendar' and {{ period }} !~ ' ')
or ({{ starts }} = 'anchor' and {{ period }} !~ '^(in_flight|lifetime)$')
or ({{ starts }} = 'first_use' and {{ period }} !~ '^(in_flight|lifetime)$| months$')
or ({{ starts }} = 'rolling' and {{ period }} !~ '^(in_flight|month|year|lifetime)$| months$')
{%- endmacro %}

{# Whose usage a limit counts. #}
{% macro is_scope(scope) -%}
{{ scope }} in ('group', 'child', 'member')
{%- endmacro %}

{# In which order periods of a limit are listed: by their length. #}
{% macro by_length(limit) -%}
array_position(
  array[{{ periods()[1:-1] }}], regexp_replace({{ limit }}.period, '^[0-9]+ |s$', '', 'g')
), length({{ limit }}.period), {{ limit }}.period, {{ limit }}.starts
{%- endmacro %}

{# How a kind is written. #}
{% macro kind_pattern() -%}
^[a-z][a-z0-9_]{0,31}$
{%- endmacro %}

{#
The kinds and weights of a pool: 1 to 50 kinds, whole weights to a million. Null is an ordinary limit. Strict, or a path
would look into arrays; silent, so that what isn't an object is refused whatever is evaluated first.
#}
{% macro is_counts(counts) -%}
{{ counts }} is null or (
  jsonb_typeof({{ counts }}) = 'object'
  and pg_column_size({{ counts }}) < 4096
  and jsonb_array_length(jsonb_path_query_array({{ counts }}, 'strict $.keyvalue()', '{}', true)) >= 1
  and jsonb_array_length(jsonb_path_query_array({{ counts }}, 'strict $.keyvalue()', '{}', true)) <= 50
  and not jsonb_path_exists(
    {{ counts }}, 'strict $.keyvalue() ? (!(@.key like_regex "{{ kind_pattern() }}"))', '{}', true
  )
  and not jsonb_path_exists({{ counts }}, 'strict $.* ? (@.type() != "number")', '{}', true)
  and not jsonb_path_exists({{ counts }}, 'strict $.* ? (@ < 1 || @ > 1000000 || @.floor() != @)', '{}', true)
)
{%- endmacro %}

{# 10^15 is exact in JavaScript. #}
{% macro most_of_a_limit() -%}
1000000000000000
{%- endmacro %}

{# Whether a cost fits. #}
{% macro has_room(max, used, cost) -%}
({{ max }} is null or {{ used }} + {{ cost }} <= {{ max }})
{%- endmacro %}

{# What must be the same in a repeated call. #}
{% macro fingerprint(operation, kind, cost, group_id) -%}
md5(concat_ws(' ', {{ operation }}, {{ kind }}, {{ cost }}, {{ group_id }}))::uuid
{%- endmacro %}

{# A kind of generation. #}
{% macro is_kind(kind) -%}
{{ kind }} ~ '{{ kind_pattern() }}'
{%- endmacro %}

{% macro most_of_a_cost() -%}
1000000000
{%- endmacro %}

{% macro is_cost(cost) -%}
{{ cost }} between 1 and {{ most_of_a_cost() }}
{%- endmacro %}

{# For how many seconds a hold may be made or extended: 30 days. #}
{% macro is_ttl(ttl) -%}
{{ ttl }} between 1 and 2592000
{%- endmacro %}

{% macro refuse_ttl(hint) -%}
perform tokenlimits.refuse('TL001', 'ttl: must be from 1 second to 30 days, in seconds', 'ttl', '{{ hint }}');
{%- endmacro %}

{% macro is_key(idempotency_key) -%}
char_length({{ idempotency_key }}) between 1 and 255
{%- endmacro %}

{# Whether a request is valid; refuse_request names the invalid field. #}
{% macro is_request(user_id, kind, cost, idempotency_key, metadata) -%}
{{ user_id }} is not null and {{ is_kind(kind) }} and {{ is_cost(cost) }}
and ({{ idempotency_key }} is null or {{ is_key(idempotency_key) }})
and ({{ metadata }} is null or tokenlimits.is_metadata({{ metadata }}))
{%- endmacro %}

{# Whether a usage no longer counts, so that its key is free. #}
{% macro is_dead(usage, at) -%}
({{ usage }}.status not in ('reserved', 'committed')
or ({{ usage }}.status = 'reserved' and {{ usage }}.expires_at <= {{ at }}))
{%- endmacro %}

{# The stripe of a group: one of 256, so that a bulk edit takes a bounded number of locks; the last byte of its id. #}
{% macro stripe(group_id) -%}
get_byte(uuid_send({{ group_id }}), 15)
{%- endmacro %}

{#
Where no verdict is safe: after waiting for a lock, a call must see what others have committed meanwhile, and a standby
lags behind, so a denial there may already be wrong.
#}
{% macro in_wrong_transaction() -%}
current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery()
{%- endmacro %}

{# A statement that refuses such a transaction, before it waits for a row that another one has changed (40001). #}
{% macro insist_on_transaction() -%}
if {{ in_wrong_transaction() }} then
  perform tokenlimits.refuse_transaction();
end if;
{%- endmacro %}

{# Locks a group's row before its limits are, and changes its updated_at, by which editors notice each other. #}
{% macro touch_group(group_id) -%}
{{ insist_on_transaction() }}
update public.user_groups as g
set name = g.name
where g.id = {{ group_id }};
{%- endmacro %}

{#
The class of advisory locks on stripes: 'tokl' in ASCII, so that they don't collide with a project's own. 256: which
group is the default. 257: installation and uninstallation. 258: which group is beneath which.
#}
{% macro stripe_class() -%}
1953459052
{%- endmacro %}

{# The groups beneath a group, and itself, deleted ones included. #}
{% macro beneath(group_id) -%}
array(select t.group_id from tokenlimits.group_tree as t where t.above_id = {{ group_id }})
{%- endmacro %}

{#
The rows of the tree of some groups: each itself, and all above it. Read before they are joined with many rows: of an
array, the planner knows the length, while it may take the tree for empty.
#}
{% macro ways_up(group_ids) -%}
array(
  select row(t.*)::tokenlimits.group_tree
  from tokenlimits.group_tree as t
  where t.group_id = any({{ group_ids }})
  order by t.distance
)
{%- endmacro %}

{# The group at the top of a group's tree. #}
{% macro root_of(group_id) -%}
coalesce(
  (select t.above_id from tokenlimits.group_tree as t where t.group_id = {{ group_id }} and t.level = 0), {{ group_id }}
)
{%- endmacro %}

{# The groups whose usage a limit counts for a subject, given its state. #}
{% macro counted_groups(state) -%}
{{ beneath(home_of(state)) }}
{%- endmacro %}

{# The group that a limit counts for a subject, with all beneath it; its resets are the counter's too. #}
{% macro home_of(state) -%}
case {{ state }}.scope when 'child' then {{ state }}.subject else {{ state }}.group_id end
{%- endmacro %}

{# Keeps the tree of groups as it is until the transaction ends; exclusive: to change it. #}
{% macro lock_tree(exclusive=false) -%}
perform pg_advisory_xact_lock{{ '' if exclusive else '_shared' }}({{ stripe_class() }}, 258);
{%- endmacro %}

{# Locks the rows of a group's limits, in the order in which all do, and before them the tree. #}
{% macro lock_limits(group_id) -%}
{{ lock_tree() }}
perform
from public.group_limits as l
where l.group_id = {{ group_id }}
order by l.kind, l.period, l.starts, l.scope
for update;
{%- endmacro %}

{# Installations and uninstallations wait for each other. #}
{% macro lock_installation() -%}
perform pg_advisory_xact_lock({{ stripe_class() }}, 257);
{%- endmacro %}

{# The beginning of the rollup bucket that contains a moment. #}
{% macro bucket(at) -%}
date_bin('15 minutes', {{ at }}, '2000-01-01 00:00:00+00')
{%- endmacro %}

{# Whether a period consists of whole buckets of the rollup; a lifetime does. #}
{% macro is_whole(since, until) -%}
{{ since }} = {{ bucket(since) }} and {{ until }} = {{ bucket(until) }}
{%- endmacro %}

{# The part of a rolling window that contains a moment. #}
{% macro part_at(part, at) -%}
date_bin({{ part }}, {{ at }}, '1970-01-01 00:00:00+00')
{%- endmacro %}

{# Whether a limit counts a kind. #}
{% macro counts_kind(limit, kind) -%}
({{ limit }}.counts is null and {{ limit }}.kind = {{ kind }} or {{ limit }}.counts ? {{ kind }})
{%- endmacro %}

{# How much one unit of a kind takes from a limit that counts it. #}
{% macro weight_of(limit, kind) -%}
case when {{ limit }}.counts is null then 1 else ({{ limit }}.counts ->> {{ kind }})::bigint end
{%- endmacro %}

{# How much a hold takes from a limit: one place if it counts holds. #}
{% macro taken_by(limit, cost) -%}
(case when {{ limit }}.period = 'in_flight' then 1 else {{ cost }} * {{ limit }}.weight end)
{%- endmacro %}

{# The live usage since a moment that counts for a limit, given its state: a table. Only one half is ever read. #}
{% macro live_usage_of(state, since) -%}
(
  {%- for is_member in [false, true] %}
  select l.created_at, l.kind, l.cost, l.reserved_cost, l.status, l.settled_at, l.expires_at
  from public.generation_usage as l
  where
    {{ state }}.scope {{ '=' if is_member else '<>' }} 'member' and l.group_id = any({{ counted_groups(state) }})
    {%- if is_member %} and l.user_id = {{ state }}.subject{% endif %}
    and {{ counts_kind(state, 'l.kind') }} and l.created_at >= {{ since }} and l.status in ('reserved', 'committed')
  {%- if not loop.last %}
  union all
  {%- endif %}
  {%- endfor %}
)
{%- endmacro %}

{# The kinds that a limit counts, with their weights: a table. #}
{% macro kinds_of(limit) -%}
(
  select {{ limit }}.kind, 1::bigint as weight
  where {{ limit }}.counts is null
  union all
  select p.key, p.value::bigint
  from jsonb_each_text({{ limit }}.counts) as p
)
{%- endmacro %}

{#
The id of a usage: a UUIDv7 (RFC 9562) of its moment, so that new rows go to the right edge of the primary key, and only
that edge needs memory. Its last four hex digits are those of its home. date_part, since extract computes in slow
numerics.
#}
{% macro usage_id(at, home) -%}
(
  lpad(to_hex((date_part('epoch', date_trunc('milliseconds', {{ at }})) * 1000)::bigint), 12, '0')
  || '7' || substr(gen_random_uuid()::text, 16, 17) || right({{ home }}::text, 4)
)::uuid
{%- endmacro %}

{# Reads the name of the group that pays into v_group_name, given one of the limits that judged. #}
{% macro read_name(state, group_id) -%}
v_group_name := {{ state }}.group_name;
if {{ state }}.group_id is distinct from {{ group_id }} then
  v_group_name := (select g.name from public.user_groups as g where g.id = {{ group_id }});
end if;
{%- endmacro %}

{# Whether any limit would count what is used of a kind in a group; `only` is a condition on a limit l. #}
{% macro is_limited(group_id, kind, only='true') -%}
exists (
  select
  from tokenlimits.group_tree as t
  inner join public.group_limits as l on l.group_id = t.above_id
  where
    t.group_id = {{ group_id }} and {{ counts_kind('l', kind) }} and (l.scope <> 'child' or t.child_id is not null)
    and {{ only }}
)
{%- endmacro %}

{# Where a usage is at home, given a limit that judged it: with its group, or with its user if the group is spread. #}
{% macro home(state, group_id, user_id) -%}
case when {{ state }}.is_spread then {{ user_id }} else {{ group_id }} end
{%- endmacro %}

{# The columns of limit_state, to unnest an array of states with ordinality. #}
{% macro state_columns() -%}
group_id, counter_id, subject, kind, period, starts, scope, mode, max, counts, weight, since, until, reset_at,
used, expired, is_open, group_name, timezone, own_max, overridden_until, level, is_spread
{%- endmacro %}

{#
Whether a group has unswept expired holds of a kind. Not "exists": the planner expects to find one soon wherever it looks,
and reads all live holds; the order is the index's. `beneath`: the groups beneath it, where it is a root.
#}
{% macro any_expired(group_id, kind, at, beneath=false) -%}
(
  select true
  from tokenlimits.holds as h
  where
    {{ 'h.root_id' if beneath else 'h.group_id' }} = {{ group_id }}
    {%- if beneath %} and h.root_id <> h.group_id{% endif %}
    and h.kind = {{ kind }} and h.expires_at <= {{ at }}
  order by h.expires_at
  limit 1
) is true
{%- endmacro %}

{# Whether a limit counts one of several kinds; null asks for all. #}
{% macro counts_any(limit, kinds) -%}
({{ kinds }} is null or case
  when {{ limit }}.counts is null then {{ limit }}.kind = any({{ kinds }})
  else {{ limit }}.counts ?| {{ kinds }}
end)
{%- endmacro %}

{#
Whether any of a group's tree have expired, of the kinds that count for limits of the group, and of all above it, on some
kinds; null: on all.
#}
{% macro any_expired_of_all(group_id, kinds, at) -%}
exists (
  select
  from (
    select distinct w.kind, r.above_id as root_id
    from tokenlimits.group_tree as o
    inner join public.group_limits as i on i.group_id = o.above_id
    inner join tokenlimits.group_tree as r on r.group_id = o.group_id and r.level = 0
    cross join lateral {{ kinds_of('i') | indent(4) }} as w
    where o.group_id = {{ group_id }} and {{ counts_any('i', kinds) | indent(4) }}
  ) as k
  where
    {{ any_expired('k.root_id', 'k.kind', at) | indent(4) }}
    or {{ any_expired('k.root_id', 'k.kind', at, beneath=true) | indent(4) }}
)
{%- endmacro %}

{#
The limits that judge what is used in a group, in the order in which counters are locked: members' first, then those of
groups, the deepest first. One request of a group that is alone reads the group's own; `subject` is the subject of a limit
i. With `of_many`, there may be groups above (t), and several users: `subject` is an expression that returns a row for
each (in "from", it would cost more than all the rest), and `kind` a list of kinds (null: all); or `which` of t and i is
another condition than "those of a group", and `expired` says whether any hold has expired that they count. `in_flight`:
whether those are read that count holds, since only a hold is judged by them. v_is_plain: every limit is plain, the group is alone, every
counter is current, and there is no expired hold to subtract, so the states can be used as they are; null: there are none.
#}
{% macro read_limits(group_id, subject, kind, at, in_flight, of_many=false, which='', expired='') -%}
select
  array_agg(
    row(
      l.group_id, l.counter_id, l.subject, l.kind, l.period, l.starts, l.scope,
      {{ 'l.mode' if of_many else "'enforce'" }},
      case when c.overridden_until > {{ at }} then c.override_max else l.max end,
      {{ 'l.counts, l.weight' if of_many else 'null, 1' }},
      c.since, c.until, null, c.used, null, c.until > {{ at }}, l.name, l.timezone, l.max, c.overridden_until,
      {{ 'l.level' if of_many else 'null' }}, l.is_spread
    )::tokenlimits.limit_state
    order by {{
      "l.kind, l.scope <> 'member', l.level desc, l.subject" if of_many else "l.scope = 'group'"
    }}, l.counter_id
  ),
  bool_and(l.is_plain and not l.is_nested and c.since is not null and c.since <= {{ at }} and c.until > {{ at }})
  and not {{ expired or (any_expired_of_all if of_many else any_expired)(group_id, kind, at) | indent(2) }}
into v_states, v_is_plain
from (
  select
    i.group_id, i.counter_id, i.kind, i.period, i.starts, i.scope, i.max, i.is_plain, g.name, g.timezone,
    g.is_nested, g.is_spread,
    {%- if of_many %}
    i.mode, i.counts,
    case i.scope when 'group' then t.level when 'child' then t.level + 1 end as level,
    case when cardinality({{ kind }}) = 1 then {{ weight_of('i', kind ~ '[1]') }} else 1 end as weight,
    {%- endif %}
    {{ subject }} as subject
  {%- if of_many %}
  from tokenlimits.group_tree as t
  inner join public.group_limits as i on i.group_id = t.above_id
  {%- else %}
  from public.group_limits as i
  {%- endif %}
  inner join public.user_groups as g on g.id = i.group_id
  where
    {{ which or ('t' if of_many else 'i') ~ '.group_id = ' ~ group_id }} and {{ counts_any('i', kind) | indent(4) if of_many else counts_kind('i', kind) }}
    {%- if in_flight != 'true' %}
    and {{ 'i.period <> \'in_flight\'' if in_flight == 'false' else "(i.period <> 'in_flight' or " ~ in_flight ~ ')' }}
    {%- endif %}
) as l
left join lateral (
  select k.since, k.until, k.used, k.override_max, k.overridden_until
  from tokenlimits.counters as k
  where k.subject = l.subject and k.counter_id = l.counter_id
  -- one look-up per limit, whatever size the planner assumes for an array
  offset 0
) as c on true;
{%- endmacro %}

{% macro variables_of_limits() -%}
v_states tokenlimits.limit_state[];
v_is_plain boolean;
{%- endmacro %}

{# The verdict before any group is judged. #}
{% macro unjudged(group_ids) -%}
v_verdict := row(
  false, case when {{ group_ids }} = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null, null
);
{%- endmacro %}

{#
Adds one group to the verdict: it pays, or it may have room before the groups judged so far. `each` loops over its limits
as v_state; `states` are all of them, for an answer; only a hold is judged by limits that count holds. Uses v_full,
v_observed and v_at.
#}
{% macro weigh(group_id, cost, each, states, is_hold=false) -%}
{%- set taken = taken_by('v_state', cost) if is_hold else cost ~ ' * v_state.weight' -%}
v_full := null;
v_observed := null;
{{ each }}
  if v_state.since > v_at then
    -- the clock was set back behind the counter's period; the usage then belongs to that period
    v_at := v_state.since;
  end if;
  if not {{ has_room('v_state.max', 'v_state.used', taken) }} then
    if v_state.mode = 'observe' then
      v_observed := v_observed || v_state.counter_id;
    else
      v_state.reset_at := null;
      if v_state.starts = 'rolling'{{ " or v_state.period = 'in_flight'" if is_hold }} or v_state.overridden_until > v_at then
        v_state.until := tokenlimits.room_at(v_state, {{ taken }});
      elsif {{ taken }} > v_state.max then
        -- a cost that can never fit waits for ever, as under a full lifetime limit
        v_state.until := 'infinity';
      end if;
      if v_full is null or v_state.until > v_full.until then
        v_full := v_state;
      end if;
    end if;
  end if;
end loop;
if v_full is null then
  v_verdict := row(true, null, {{ group_id }}, null, null, v_observed);
elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
  v_verdict := row(false, 'limit_exceeded', {{ group_id }}, {{ states }}, v_full, v_observed);
end if;
{%- endmacro %}

{#
Which of v_group_ids pays for a user's request at v_at, or why none does. Writes nothing and waits for nothing, so a
denial is cheap. The verdict is right at the moment of the one snapshot in which the group's counters and holds were
read.
#}
{% macro judge(user_id, kind, cost, is_hold=false) -%}
{{ unjudged('v_group_ids') }}
foreach v_group_id in array v_group_ids loop
  {{ read_limits(
    'v_group_id', "case i.scope when 'group' then i.group_id else " ~ user_id ~ " end", kind, 'v_at',
    in_flight='true' if is_hold else 'false'
  ) | indent(2) }}
  if v_is_plain is not true then
    v_states := tokenlimits.limit_states(
      v_group_id, array[{{ user_id }}], array[{{ kind }}], v_at, p_in_flight => {{ 'true' if is_hold else 'false' }}
    );
    continue when cardinality(v_states) = 0;
  end if;
  {{ weigh(
    'v_group_id', cost, each='foreach v_state in array v_states loop', states='v_states', is_hold=is_hold
  ) | indent(2) }}
  exit when v_verdict.allowed;
end loop;
{%- endmacro %}

{% macro variables_of_verdict() -%}
{{ variables_of_limits() }}
v_group_ids uuid[];
v_group_id uuid;
v_state tokenlimits.limit_state;
v_full tokenlimits.limit_state;
v_observed bigint[];
v_at timestamptz;
v_verdict tokenlimits.verdict;
{%- endmacro %}

{# A row of the ledger, by the names of its columns. #}
{% macro usage(id, group_id, user_id, kind, cost, status, idempotency_key, fingerprint, metadata, created_at,
  settled_at='null', reserved_cost='null', expires_at='null') -%}
row(
  {{ id }},
  {{ group_id }}, {{ user_id }}, {{ kind }}, {{ cost }}, {{ reserved_cost }}, {{ status }},
  {{ idempotency_key }}, {{ fingerprint }}, coalesce({{ metadata }}, '{}'),
  {{ created_at }}, {{ settled_at }}, {{ expires_at }}
)
{%- endmacro %}

{# Writes usages into the ledger, each under its key; leaves out those whose key is taken. #}
{% macro into_ledger(usage, source='') -%}
insert into public.generation_usage (
  id, group_id, user_id, kind, cost, reserved_cost, status,
  idempotency_key, fingerprint, metadata, created_at, settled_at, expires_at
)
select
  {{ usage }}.id, {{ usage }}.group_id, {{ usage }}.user_id, {{ usage }}.kind, {{ usage }}.cost,
  {{ usage }}.reserved_cost, {{ usage }}.status, {{ usage }}.idempotency_key, {{ usage }}.fingerprint,
  {{ usage }}.metadata, {{ usage }}.created_at, {{ usage }}.settled_at, {{ usage }}.expires_at
{%- if source %}
{{ source }}
{%- endif %}
on conflict on constraint generation_usage_key_key do nothing;
{%- endmacro %}

{# Writes reserved usages into holds, where they are found when they expire. #}
{% macro into_holds(usage, root_id, source='') -%}
insert into tokenlimits.holds (usage_id, group_id, root_id, user_id, kind, cost, created_at, expires_at)
select
  {{ usage }}.id, {{ usage }}.group_id, {{ root_id }}, {{ usage }}.user_id, {{ usage }}.kind, {{ usage }}.cost,
  {{ usage }}.created_at, {{ usage }}.expires_at
{%- if source %}
{{ source }}
{%- endif %};
{%- endmacro %}

{#
Tries to take a slot of the rollup, so that no other open transaction writes it for this group or for another group with
its stripe. The class of the locks is 'slot' in ASCII.
#}
{% macro try_slot(slot, group_id) -%}
pg_try_advisory_xact_lock(1936486260, {{ stripe(group_id) }} * 16 + {{ slot }})
{%- endmacro %}

{# The slot that a connection tries first. #}
{% macro own_slot() -%}
pg_backend_pid() % 16
{%- endmacro %}

{# Adds one usage to the rollup. Its row nearly always exists, and a plain update costs half of an upsert. #}
{% macro add_to_rollup(usage, slot) -%}
update tokenlimits.usage_rollup as r
set cost = r.cost + {{ usage }}.cost, generations = r.generations + 1
where
  r.group_id = {{ usage }}.group_id and r.kind = {{ usage }}.kind
  and r.bucket = {{ bucket(usage ~ '.created_at') }} and r.slot = {{ slot }};
if not found then
  {{ merge_into_rollup(
    'select ' ~ usage ~ '.group_id, ' ~ usage ~ '.kind, ' ~ bucket(usage ~ '.created_at') ~ ', '
    ~ slot ~ ', ' ~ usage ~ '.cost, 1'
  ) | indent(2) }};
end if;
{%- endmacro %}

{# Adds sums to the rollup; `source` is a query with its columns. #}
{% macro merge_into_rollup(source) -%}
insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
{{ source }}
on conflict on constraint usage_rollup_pkey do update
set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations
{%- endmacro %}

{# The rollup without unswept expired holds. #}
{% macro live_sums(at) -%}
select r.group_id, r.kind, r.bucket, r.cost, r.generations
from tokenlimits.usage_rollup as r
union all
select h.group_id, h.kind, {{ bucket('h.created_at') }}, -h.cost, -1
from tokenlimits.holds as h
where h.expires_at <= {{ at }}
{%- endmacro %}

{#
Moves the counter of a limit by a cost, if its period contains the moment `at` and it has room, or `unless` says that
room doesn't matter; `used` is what counts as used of it. Otherwise nothing moves, and "found" is false.
#}
{% macro move_counter(state, cost, at, unless, used='c.used') -%}
update tokenlimits.counters as c
set used = c.used + {{ cost }}
where
  c.subject = {{ state }}.subject
  and c.counter_id = {{ state }}.counter_id
  and {{ at }} >= c.since
  and {{ at }} < c.until
  and ({{ unless }} or {{ has_room(state ~ '.max', used, cost) }})
returning c.used into {{ state }}.used;
{%- endmacro %}

{#
Moves rollup and counters by `moves` (usage_move[]), all at once: the rollup's rows first, then members' counters, then
the groups', the deepest first, each class in one order across all groups and kinds. The ledger has already been written: a counter that is
recounted includes the moves, so it is opened without them. Raises TL099 if a counter has entered another period, or has
no room for an enforced move. A move that only gives back always fits, even if the limit was lowered below what is used.
v_moved are the moved counters, v_moving is the group whose counter is being moved. `judges` are the limits in which an
enforced move needs room; without them, all limits that may deny.
#}
{% macro move_all(moves, at, judges='') -%}
{%- set enforcing = "s.mode = 'enforce'" ~ (' and (' ~ judges ~ ' is null or s.counter_id = any(' ~ judges ~ '))' if judges else '') -%}
{{ merge_into_rollup("select
  g.group_id, g.kind, g.bucket, tokenlimits.free_slot(g.group_id), g.cost, g.generations
from (
  select
    m.group_id, m.kind, " ~ bucket('m.created_at') ~ " as bucket,
    sum(m.cost)::bigint as cost, sum(m.generations)::bigint as generations
  from unnest(" ~ moves ~ ") as m
  group by m.group_id, m.kind, bucket
  order by m.group_id, m.kind, bucket
) as g") }};
v_states := array(
  -- several groups may have the same above them
  select distinct on (l.subject, l.counter_id) row(l.*)::tokenlimits.limit_state
  from (
    select m.group_id, array_agg(distinct m.kind) as kinds, array_agg(distinct m.user_id) as user_ids
    from unnest({{ moves }}) as m
    group by m.group_id
  ) as p
  cross join lateral unnest(tokenlimits.limit_states(p.group_id, p.user_ids, p.kinds, {{ at }}, false)) as l
  order by l.subject, l.counter_id
);
v_ways := {{ ways_up("array(select m.group_id from unnest(" ~ moves ~ ") as m)") | indent(2) }};
for v_move in
  select
    s.place,
    sum(case when s.period = 'in_flight' then m.holds else m.cost * {{ weight_of('s', 'm.kind') }} end)::bigint as cost,
    max(m.created_at) as last,
    bool_or(m.enforced) and {{ enforcing }} as enforced, bool_or(m.created_at < s.since) as is_over
  from unnest(v_states) with ordinality as s ({{ state_columns() }}, place)
  inner join (
    select g.*, t.above_id, w.scope, w.subject
    from unnest({{ moves }}) as g
    inner join unnest(v_ways) as t on t.group_id = g.group_id
    cross join lateral (values ('group', t.above_id), ('child', t.child_id), ('member', g.user_id)) as w (scope, subject)
    -- worked out before it is joined, or all moves of a group would be compared with all of its members' states
    offset 0
  ) as m
    on
      m.above_id = s.group_id and m.subject = s.subject and m.scope = s.scope and {{ counts_kind('s', 'm.kind') }}
      -- an enforced move can't be skipped: its period ended after it was judged
      and (m.created_at >= s.since or (m.enforced and {{ enforcing }}))
      and (m.holds is not null or s.period <> 'in_flight')
  group by s.place, s.scope, s.subject, s.counter_id, s.mode, s.level
  order by s.scope <> 'member', s.level desc, s.subject, s.counter_id
loop
  v_state := v_states[v_move.place];
  v_moving := v_state.group_id;
  if v_move.is_over then
    raise sqlstate 'TL099';
  end if;
  -- counted from the ledger, which includes this move already
  if v_state.is_open is null then
    v_state.used := v_state.used - v_move.cost;
  end if;
  v_is_counted := false;
  if v_state.is_open is not true then
    v_is_counted := tokenlimits.open_counter(v_state);
  end if;
  {{ move_counter('v_state', 'v_move.cost', 'v_move.last', 'not v_move.enforced') | indent(2) }}
  if not found then
    v_state.used := tokenlimits.squeeze(v_state, v_move.cost, v_move.last, {{ at }});
  end if;
  if v_state.starts = 'rolling' and not v_is_counted then
    perform tokenlimits.move_parts(v_state, {{ moves }});
  end if;
  v_moved := v_moved || v_state;
end loop;
{%- endmacro %}

{% macro variables_of_moves() -%}
v_ways tokenlimits.group_tree[];
v_move record;
v_is_counted boolean;
v_moving uuid;
v_states tokenlimits.limit_state[];
v_state tokenlimits.limit_state;
v_moved tokenlimits.limit_state[] := '{}';
{%- endmacro %}

{#
Writes v_usage (under the key of v_dead_id, if a dead usage has it) if more than its own counters may move, or a counter
may have to be opened; returns its answer.
#}
{% macro write_and_return(may_deny) -%}
perform tokenlimits.move_usage(
  tokenlimits.write_ledger(
    array[v_usage], array[v_dead_id], {{ may_deny }},
    array[v_usage.group_id], array[p_kind], v_at
  ),
  v_at
);
-- as of now: others may have reached a later moment already, and have taken the room of what expired by then
return tokenlimits.usage_answer(
  v_usage, greatest(v_at, tokenlimits.clock()), p_replayed => false, p_observed => v_verdict.observed
);
{%- endmacro %}

{#
Adds a limit to an answer: to v_limits, to v_would_deny if it only observes that it is full, and to v_tightest, the one
with the least room. A plain one does the same with less.
#}
{% macro add_limit(state, plain=false, observed='null', payer='null') -%}
v_limits := v_limits || {{ limit_answer(state, plain, payer) }};
{%- if plain %}
if {{ state }}.max - {{ state }}.used < v_tightest.max - v_tightest.used
  or (v_tightest.max is null and {{ state }}.max is not null)
then
  v_tightest := {{ state }};
end if;
{%- else %}
if {{ state }}.mode = 'observe' then
  if {{ state }}.counter_id = any({{ observed }}) then
    v_would_deny := v_would_deny || {{ limit_answer(state, payer=payer) }};
  end if;
-- how many may run at once is in other units
elsif {{ state }}.period <> 'in_flight' and (
  {{ units_left(state) | indent(2) }} < {{ units_left('v_tightest') | indent(2) }}
  or (v_tightest.max is null and {{ state }}.max is not null)
) then
  v_tightest := {{ state }};
end if;
{%- endif %}
{%- endmacro %}

{# How many units of the kind that was asked for fit; rounded down, so negative if more is used than allowed. #}
{% macro units_left(state) -%}
({{ state }}.max - {{ state }}.used - case
  when {{ state }}.used > {{ state }}.max then {{ state }}.weight - 1
  else 0
end) / {{ state }}.weight
{%- endmacro %}

{% macro variables_of_answer() -%}
v_limits tokenlimits.limit_answer[] := '{}';
v_would_deny tokenlimits.limit_answer[] := '{}';
v_tightest tokenlimits.limit_state;
{%- endmacro %}

{#
The answer that workers get. For an allowed request, remaining and reset_at are those of the limit with the least room;
for a denied one, reset_at is when the limit that denied it will have room (null: never by itself).
#}
{% macro answer(kind, cost, group_id, group_name, usage_id, status, expires_at, replayed,
  reason='null', error='null', denied_by='null', reset_at='coalesce(v_tightest.reset_at, v_tightest.until)',
  retry_after='null', left=units_left('v_tightest')) -%}
row_to_json(row(
  {{ 'true' if reason == 'null' else reason ~ ' is null' }}, {{ reason }}, {{ error }},
  {{ usage_id }}, {{ status }}, {{ expires_at }},
  case when {{ group_id }} is not null then row({{ group_id }}, {{ group_name }})::tokenlimits.group_answer end,
  {{ kind }}, {{ cost }}, v_limits, {{ denied_by }}, v_would_deny,
  -- greatest() ignores nulls, and unlimited is null
  case when v_tightest.max is not null then greatest({{ left }}, 0) end,
  nullif({{ reset_at }}, 'infinity'), {{ retry_after }}, {{ replayed }}
)::tokenlimits.generation_answer)
{%- endmacro %}

{# A limit, as clients see it: with its group, unless that is the one that pays. #}
{% macro limit_answer(state, plain=false, payer='null') -%}
row(
  {{ state }}.kind, {{ state }}.period, {{ state }}.starts, {{ state }}.scope, {{ state }}.mode, {{ state }}.max,
  {{ state }}.used,
  {%- if plain %}
  case when {{ state }}.max is not null then greatest({{ state }}.max - {{ state }}.used, 0) end,
  nullif({{ state }}.until, 'infinity'), 1, null
  {%- else %}
  case when {{ state }}.max is not null then greatest({{ units_left(state) | indent(2) }}, 0) end,
  nullif(coalesce({{ state }}.reset_at, {{ state }}.until), 'infinity'), {{ state }}.weight,
  case when {{ state }}.group_id <> {{ payer }} then
    row({{ state }}.group_id, {{ state }}.group_name)::tokenlimits.group_answer
  end
  {%- endif %}
)::tokenlimits.limit_answer
{%- endmacro %}

{# The order in which a user's groups g are tried, given the memberships m. #}
{% macro paying_order() -%}
g.priority desc, m.joined_at, g.id
{%- endmacro %}

{# The default group, which applies to users in no group. #}
{% macro default_group() -%}
array(select d.id from public.user_groups as d where d.is_default)
{%- endmacro %}

{# The groups that may pay for a user. #}
{% macro payers(user_id) -%}
coalesce(
  nullif(array(
    select g.id
    from public.group_memberships as m
    inner join public.user_groups as g on g.id = m.group_id
    where m.user_id = {{ user_id }}
    order by {{ paying_order() }}
  ), '{}'),
  {{ default_group() }}
)
{%- endmacro %}

{# Those of them that remain if the request names a group. #}
{% macro pinned(group_ids, group_id) -%}
case
  when {{ group_id }} is null then {{ group_ids }}
  when {{ group_id }} = any({{ group_ids }}) then array[{{ group_id }}]
  else '{}'
end
{%- endmacro %}

{#
Reads the groups that may pay for one request into a variable. Nearly every user is in one group, which needs no order.
Even an expression that isn't needed costs time to set up.
#}
{% macro read_payers(group_ids, user_id, kind, group_id) -%}
{{ group_ids }} := array(select m.group_id from public.group_memberships as m where m.user_id = {{ user_id }});
if cardinality({{ group_ids }}) <> 1 then
  {{ group_ids }} := {{ payers(user_id) | indent(2) }};
end if;
if {{ group_id }} is not null then
  {{ group_ids }} := {{ pinned(group_ids, group_id) | indent(2) }};
elsif cardinality({{ group_ids }}) > 1 then
  {{ group_ids }} := tokenlimits.entitling({{ group_ids }}, {{ kind }});
end if;
{%- endmacro %}

{# A field of a request in a batch. #}
{% macro request_field(request, name) -%}
{%- if name in ('user_id', 'group_id') -%}
({{ request }} ->> '{{ name }}')::uuid
{%- elif name == 'cost' -%}
case when {{ request }} ? 'cost' then ({{ request }} ->> 'cost')::bigint else 1 end
{%- elif name == 'metadata' -%}
nullif({{ request }} -> 'metadata', 'null')
{%- else -%}
{{ request }} ->> '{{ name }}'
{%- endif -%}
{%- endmacro %}

{# Whether an item of a batch is a valid request. #}
{% macro is_item(item) -%}
{{ is_request(item ~ '.user_id', item ~ '.kind', item ~ '.cost', item ~ '.idempotency_key', item ~ '.metadata') }}
{%- endmacro %}

{# The groups that may pay for the open items of a batch, with the kinds and users of each. #}
{% macro groups_of(items) -%}
select g.id as group_id, array_agg(distinct i.kind) as kinds, array_agg(distinct i.user_id) as user_ids
from unnest({{ items }}) as i
cross join lateral unnest(i.group_ids) as g (id)
where i.answer is null
group by g.id
{%- endmacro %}

{% macro variables_of_an_error() -%}
v_message text;
v_detail text;
v_hint text;
{%- endmacro %}

{# In the handler of an error that a single call would raise: turns it into an answer. #}
{% macro answer_error(item, answer) -%}
get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
{{ answer }} := tokenlimits.refused({{ item }}, sqlstate, v_message, v_detail, v_hint);
{%- endmacro %}

{#
Where a counter that is opened in a period begins: not before the end of its past period, which new time zone rules may
move into this one, and not before a reset. The windows of a rolling limit overlap; for one, pass null as the past.
#}
{% macro new_since(period, past_until, group_id, kind, subject) -%}
greatest(lower({{ period }}), {{ past_until }}, {{ last_reset(group_id, kind, subject) }})
{%- endmacro %}

{#
When an admin last reset what a subject (a member, or the group itself) has used of a group's limits on a kind; null:
never.
#}
{% macro last_reset(group_id, kind, subject) -%}
(
  select max(r.reset_at)
  from tokenlimits.usage_resets as r
  where r.group_id = {{ group_id }} and r.kind in ({{ kind }}, '*') and r.subject in ({{ group_id }}, {{ subject }})
)
{%- endmacro %}

{# What identifies a limit. #}
{% macro same_limit(one, other) -%}
{{ one }}.group_id = {{ other }}.group_id and {{ one }}.kind = {{ other }}.kind
and {{ one }}.period = {{ other }}.period and {{ one }}.starts = {{ other }}.starts
and {{ one }}.scope = {{ other }}.scope
{%- endmacro %}

{# The override of a limit for a subject, while it lasts. #}
{% macro overrides_now(override, limit, subject, at) -%}
{{ same_limit(override, limit) }} and {{ override }}.subject = {{ subject }}
and ({{ override }}.until is null or {{ override }}.until > {{ at }})
{%- endmacro %}

{# A limit's fields in JSON. #}
{% macro fields_of_limit() -%}
kind text, period text, starts text, scope text, mode text, max numeric, counts jsonb
{%- endmacro %}

{# Writes limits, given as a JSON array. Only what differs, so that unchanged limits keep their counters. #}
{% macro upsert_limits(limits) -%}
insert into public.group_limits as l (group_id, kind, period, starts, scope, mode, max, counts)
select p_group_id, n.kind, n.period, n.starts, n.scope, n.mode, n.max::bigint, nullif(n.counts, 'null')
from jsonb_array_elements({{ limits }}) as e
cross join lateral jsonb_to_record(tokenlimits.whole_limit(e.value)) as n ({{ fields_of_limit() }})
on conflict on constraint group_limits_key do update
set max = excluded.max, mode = excluded.mode, counts = excluded.counts
where (l.max, l.mode, l.counts) is distinct from (excluded.max, excluded.mode, excluded.counts);
{%- endmacro %}

{# The limits of p_group_id that are named by a kind, a scope, and perhaps a period and where it starts. #}
{% macro named_limit(limit, scope="p_scope") -%}
{{ limit }}.group_id = p_group_id and {{ limit }}.kind = p_kind and {{ limit }}.scope = {{ scope }}
and (p_period is null or {{ limit }}.period = p_period)
and (p_starts is null or {{ limit }}.starts = p_starts)
{%- endmacro %}

{# In a trigger: reads the rows of a table that have changed, as they are and as they were, into v_changed. #}
{% macro read_changed(table) -%}
{% for action, sources in [('INSERT', ['new']), ('DELETE', ['old']), ('UPDATE', ['new', 'old'])] -%}
{{ 'if' if loop.first else 'elsif' }} tg_op = '{{ action }}' then
  v_changed := array(
    {%- for source in sources %}
    {{- '\n    union all' if not loop.first }}
    select row(r.*)::public.{{ table }} from {{ source }}_rows as r
    {%- endfor %}
  );
{% endfor -%}
end if;
{%- endmacro %}

{# Triggers that run a function once for all rows that a statement has changed; it reads them with read_changed. #}
{% macro after_changes(table, name, function) -%}
{%- for action, tables in [
  ('insert', 'new table as new_rows'), ('update', 'old table as old_rows new table as new_rows'),
  ('delete', 'old table as old_rows'),
] %}
create or replace trigger {{ table }}_{{ name }}_{{ action }}
after {{ action }} on public.{{ table }}
referencing {{ tables }}
for each statement execute function tokenlimits.{{ function }}();
{{- '\n' if not loop.last }}
{%- endfor %}
{%- endmacro %}
