{#
The rules of a call. Each stands here once, and the build puts it in place wherever it is needed: calling a function
costs a tenth of what these lines do. A macro takes expressions, and the names of variables.
#}

{# A moment that every reader can represent: a date of Python's and of JavaScript's, and a UUIDv7's. #}
{% macro is_moment(at) -%}
{{ at }} >= '1970-01-01 00:00:00+00' and {{ at }} < '9999-01-01 00:00:00+00'
{%- endmacro %}

{# A name as it is stored: composed, without blanks at its ends, of which Unicode has many. #}
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
Control characters, invisible ones, and those that turn the direction of text are in no name. Without "between", which a
check nests among "and", and a restored dump has it flat: the two would differ for ever.
#}
{% macro is_name(name) -%}
char_length({{ name }}) >= 1 and char_length({{ name }}) <= 200 and {{ name }} = {{ tidied(name) }}
and {{ name }} !~ '[\u0001-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e]'
and {{ name }} !~ '[\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0]'
{%- endmacro %}

{# The periods, from the shortest to the longest. #}
{% macro periods() -%}
('minute', 'hour', 'day', 'week', 'month', 'lifetime')
{%- endmacro %}

{# 10^15 stays exact in JavaScript's numbers. #}
{% macro most_of_a_limit() -%}
1000000000000000
{%- endmacro %}

{# What room is. #}
{% macro has_room(max, used, cost) -%}
({{ max }} is null or {{ used }} + {{ cost }} <= {{ max }})
{%- endmacro %}

{# What a repeated call must have in common with the first. #}
{% macro fingerprint(operation, kind, cost, group_id) -%}
md5(concat_ws(' ', {{ operation }}, {{ kind }}, {{ cost }}, {{ group_id }}))::uuid
{%- endmacro %}

{# A kind of generation. #}
{% macro is_kind(kind) -%}
{{ kind }} ~ '^[a-z][a-z0-9_]{0,31}$'
{%- endmacro %}

{% macro is_cost(cost) -%}
{{ cost }} between 1 and 1000000000
{%- endmacro %}

{% macro is_key(idempotency_key) -%}
char_length({{ idempotency_key }}) between 1 and 255
{%- endmacro %}

{# What a request may be; refuse_request names the field that isn't. #}
{% macro is_request(user_id, kind, cost, idempotency_key, metadata) -%}
{{ user_id }} is not null and {{ is_kind(kind) }} and {{ is_cost(cost) }}
and ({{ idempotency_key }} is null or {{ is_key(idempotency_key) }})
and ({{ metadata }} is null or tokenlimits.is_metadata({{ metadata }}))
{%- endmacro %}

{# Whether a usage counts no more, so that its key is free. #}
{% macro is_dead(usage, at) -%}
({{ usage }}.status not in ('reserved', 'committed')
or ({{ usage }}.status = 'reserved' and {{ usage }}.expires_at <= {{ at }}))
{%- endmacro %}

{# The stripe of a group, among 256, the last byte of its id: they bound the number of locks that a bulk edit takes. #}
{% macro stripe(group_id) -%}
get_byte(uuid_send({{ group_id }}), 15)
{%- endmacro %}

{#
Where no verdict holds: what is read after waiting for a lock must be as it is then, and a standby lags behind, so that a
denial there may be wrong by now.
#}
{% macro in_wrong_transaction() -%}
current_setting('transaction_isolation') <> 'read committed' or pg_is_in_recovery()
{%- endmacro %}

{#
Advisory locks on stripes: 'tokl' in ASCII, so that they do not meet a project's own. 256: which group is default. 257:
installing and uninstalling.
#}
{% macro stripe_class() -%}
1953459052
{%- endmacro %}

{# Installations and uninstallations wait for each other. #}
{% macro lock_installation() -%}
perform pg_advisory_xact_lock({{ stripe_class() }}, 257);
{%- endmacro %}

{# The beginning of the rollup bucket that a moment lies in. #}
{% macro bucket(at) -%}
date_bin('15 minutes', {{ at }}, '2000-01-01 00:00:00+00')
{%- endmacro %}

{# Whether a period is made of whole buckets of the rollup; a lifetime is. #}
{% macro is_whole(since, until) -%}
{{ since }} = {{ bucket(since) }} and {{ until }} = {{ bucket(until) }}
{%- endmacro %}

{#
The id of a usage: a UUIDv7 (RFC 9562) of its moment, so that new rows land at the right edge of the primary key, which
keeps it in memory. Its last four hex digits are those of its home. date_part, for extract counts in slow numerics.
#}
{% macro usage_id(at, home) -%}
(
  lpad(to_hex((date_part('epoch', date_trunc('milliseconds', {{ at }})) * 1000)::bigint), 12, '0')
  || '7' || substr(gen_random_uuid()::text, 16, 17) || right({{ home }}::text, 4)
)::uuid
{%- endmacro %}

{# The columns of limit_state, where an array of them is unnested with their places. #}
{% macro state_columns() -%}
group_id, counter_id, subject, kind, period, scope, max, since, until, used, expired, is_open,
group_name, timezone
{%- endmacro %}

{# Whether holds of a group and kind (of all where it is null) have expired that nobody has swept yet. #}
{% macro any_expired(group_id, kind, at) -%}
exists (
  select
  from tokenlimits.holds as h
  where h.group_id = {{ group_id }} and ({{ kind }} is null or h.kind = {{ kind }}) and h.expires_at <= {{ at }}
)
{%- endmacro %}

{#
A group's limits of a kind (of all where it is null) in the order in which counters are locked: members' first, then the
group's. `subject` is who a limit i counts for; of several, an expression that answers a row for each: in "from" that would cost more than
all the rest. v_is_plain: every counter is of this moment, and no hold has expired that must be subtracted.
#}
{% macro read_limits(group_id, subject, kind, at) -%}
select
  array_agg(
    row(
      l.group_id, l.counter_id, l.subject, l.kind, l.period, l.scope, l.max,
      c.since, c.until, c.used, null, c.until > {{ at }}, l.name, l.timezone
    )::tokenlimits.limit_state
    order by l.kind, l.scope = 'group', l.subject, l.counter_id
  ),
  bool_and(c.since is not null and c.since <= {{ at }} and c.until > {{ at }}) and not {{ any_expired(group_id, kind, at) | indent(2) }}
into v_states, v_is_plain
from (
  select
    i.group_id, i.counter_id, i.kind, i.period, i.scope, i.max, g.name, g.timezone,
    {{ subject }} as subject
  from public.group_limits as i
  inner join public.user_groups as g on g.id = i.group_id
  where i.group_id = {{ group_id }} and ({{ kind }} is null or i.kind = {{ kind }})
) as l
left join lateral (
  select k.since, k.until, k.used
  from tokenlimits.counters as k
  where k.subject = l.subject and k.counter_id = l.counter_id
  -- a look-up for each, whatever the planner thinks of the size of an array
  offset 0
) as c on true;
{%- endmacro %}

{% macro variables_of_limits() -%}
v_states tokenlimits.limit_state[];
v_is_plain boolean;
{%- endmacro %}

{# The verdict while no group has been looked at. #}
{% macro unjudged(group_ids) -%}
v_verdict := row(
  false, case when {{ group_ids }} = '{}' then 'not_in_group' else 'no_limit_for_kind' end, null, null, null
);
{%- endmacro %}

{#
One group more in the verdict: it pays, or it may have room before those that were looked at. `each` goes through its
limits as v_state; `states` are all of them, for an answer. Uses v_full and v_at.
#}
{% macro weigh(group_id, cost, each, states) -%}
v_full := null;
{{ each }}
  if v_state.since > v_at then
    -- the counter is ahead of a clock that was set back; the usage belongs to its period then
    v_at := v_state.since;
  end if;
  if not {{ has_room('v_state.max', 'v_state.used', cost) }} then
    -- what can never fit, and a lifetime limit, wait for ever
    if {{ cost }} > v_state.max then
      v_state.until := 'infinity';
    end if;
    if v_full is null or v_state.until > v_full.until then
      v_full := v_state;
    end if;
  end if;
end loop;
if v_full is null then
  v_verdict := row(true, null, {{ group_id }}, null, null);
elsif v_verdict.reason <> 'limit_exceeded' or v_full.until < (v_verdict.denied_by).until then
  v_verdict := row(false, 'limit_exceeded', {{ group_id }}, {{ states }}, v_full);
end if;
{%- endmacro %}

{#
Which of v_group_ids pays for a request of a user at v_at, or why none does. Writes nothing and waits for nothing, so a
denial is cheap; it is right at the moment of the one snapshot by which its group's counters and holds were read.
#}
{% macro judge(user_id, kind, cost) -%}
{{ unjudged('v_group_ids') }}
foreach v_group_id in array v_group_ids loop
  {{ read_limits('v_group_id', "case i.scope when 'group' then i.group_id else " ~ user_id ~ " end", kind, 'v_at') | indent(2) }}
  continue when v_states is null;
  if not v_is_plain then
    v_states := tokenlimits.limit_states(v_group_id, array[{{ user_id }}], {{ kind }}, v_at);
  end if;
  {{ weigh('v_group_id', cost, each='foreach v_state in array v_states loop', states='v_states') | indent(2) }}
  exit when v_verdict.allowed;
end loop;
{%- endmacro %}

{% macro variables_of_verdict() -%}
{{ variables_of_limits() }}
v_group_ids uuid[];
v_group_id uuid;
v_state tokenlimits.limit_state;
v_full tokenlimits.limit_state;
v_at timestamptz;
v_verdict tokenlimits.verdict;
{%- endmacro %}

{# A usage, its columns by their names. #}
{% macro usage(id, group_id, user_id, kind, cost, status, idempotency_key, fingerprint, metadata, created_at,
  settled_at='null', reserved_cost='null', expires_at='null') -%}
row(
  {{ id }},
  {{ group_id }}, {{ user_id }}, {{ kind }}, {{ cost }}, {{ reserved_cost }}, {{ status }},
  {{ idempotency_key }}, {{ fingerprint }}, coalesce({{ metadata }}, '{}'),
  {{ created_at }}, {{ settled_at }}, {{ expires_at }}
)
{%- endmacro %}

{# Puts usages into the ledger, each under its key; one whose key is taken is left out. #}
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

{# Notes usages that are reserved, to be found when they expire. #}
{% macro into_holds(usage, source='') -%}
insert into tokenlimits.holds (usage_id, group_id, user_id, kind, cost, created_at, expires_at)
select
  {{ usage }}.id, {{ usage }}.group_id, {{ usage }}.user_id, {{ usage }}.kind, {{ usage }}.cost,
  {{ usage }}.created_at, {{ usage }}.expires_at
{%- if source %}
{{ source }}
{%- endif %};
{%- endmacro %}

{#
Tries to take a slot of the rollup, so that no other open transaction writes it for the group, nor for another one of its
stripe. 'slot' in ASCII is the class of the locks.
#}
{% macro try_slot(slot, group_id) -%}
pg_try_advisory_xact_lock(1936486260, {{ stripe(group_id) }} * 16 + {{ slot }})
{%- endmacro %}

{# The slot that a connection tries first. #}
{% macro own_slot() -%}
pg_backend_pid() % 16
{%- endmacro %}

{# Adds one usage to the rollup. Its row is nearly always there: a plain update costs half of an upsert. #}
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

{# Adds sums to the rollup; `source` has its columns. #}
{% macro merge_into_rollup(source) -%}
insert into tokenlimits.usage_rollup as r (group_id, kind, bucket, slot, cost, generations)
{{ source }}
on conflict on constraint usage_rollup_pkey do update
set cost = r.cost + excluded.cost, generations = r.generations + excluded.generations
{%- endmacro %}

{# The rollup less expired holds that nobody has swept yet. #}
{% macro live_sums(at) -%}
select r.group_id, r.kind, r.bucket, r.cost, r.generations
from tokenlimits.usage_rollup as r
union all
select h.group_id, h.kind, {{ bucket('h.created_at') }}, -h.cost, -1
from tokenlimits.holds as h
where h.expires_at <= {{ at }}
{%- endmacro %}

{#
Moves the counter of a limit by a cost, if it is of the moment `at` and has room, or where `unless` says that room does
not matter; `used` is what counts as used of it. Found is false, and nothing has moved, where it has not.
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
the groups', each class in one order, whatever groups and kinds they are of. The ledger is as it will be: a counter
that is counted afresh has the moves in it already, so it is opened without them. Raises TL099 when a counter has moved
on, or has no room for what must have room; what is only taken back is never too much, even where a limit was lowered
below what is used. v_moved is what was moved, v_moving the group that it has come to.
#}
{% macro move_all(moves, at) -%}
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
  select row(l.*)::tokenlimits.limit_state
  from (
    select m.group_id, m.kind, array_agg(distinct m.user_id) as user_ids
    from unnest({{ moves }}) as m
    group by m.group_id, m.kind
  ) as p
  cross join lateral unnest(tokenlimits.limit_states(p.group_id, p.user_ids, p.kind, {{ at }}, false)) as l
);
for v_move in
  select s.place, sum(m.cost)::bigint as cost, max(m.created_at) as last, bool_or(m.enforced) as enforced,
    bool_or(m.created_at < s.since) as is_over
  from unnest(v_states) with ordinality as s ({{ state_columns() }}, place)
  inner join (
    select g.*, g.group_id as subject, 'group' as scope
    from unnest({{ moves }}) as g
    union all
    select u.*, u.user_id as subject, 'member' as scope
    from unnest({{ moves }}) as u
  ) as m
    on
      m.group_id = s.group_id and m.kind = s.kind and m.subject = s.subject and m.scope = s.scope
      -- what must have room can't be passed over: its period ended after it was judged
      and (m.created_at >= s.since or m.enforced)
  group by s.place, s.scope, s.subject, s.counter_id
  order by s.scope = 'group', s.subject, s.counter_id
loop
  v_state := v_states[v_move.place];
  v_moving := v_state.group_id;
  if v_move.is_over then
    raise sqlstate 'TL099';
  end if;
  if v_state.is_open is null then
    v_state.used := v_state.used - v_move.cost;
  end if;
  if v_state.is_open is not true then
    perform tokenlimits.open_counter(v_state);
  end if;
  {{ move_counter('v_state', 'v_move.cost', 'v_move.last', 'not v_move.enforced') | indent(2) }}
  if not found then
    v_state.used := tokenlimits.squeeze(v_state, v_move.cost, v_move.last, {{ at }});
  end if;
  v_moved := v_moved || v_state;
end loop;
{%- endmacro %}

{% macro variables_of_moves() -%}
v_move record;
v_moving uuid;
v_states tokenlimits.limit_state[];
v_state tokenlimits.limit_state;
v_moved tokenlimits.limit_state[] := '{}';
{%- endmacro %}

{#
Writes v_usage (under the key of v_dead_id, if a dead usage has it) where more may move than itself, or a counter may
have to be opened, and returns its answer.
#}
{% macro write_and_return(may_deny) -%}
perform tokenlimits.move_usage(
  tokenlimits.write_ledger(
    array[v_usage], array[v_dead_id], {{ may_deny }},
    array[v_usage.group_id], array[p_kind], v_at
  ),
  v_at
);
-- as of now: others may have come to a later moment already, and have taken the room of what has expired by then
return tokenlimits.usage_answer(v_usage, greatest(v_at, tokenlimits.clock()), p_replayed => false);
{%- endmacro %}

{# Adds a limit to an answer: to v_limits, and to v_tightest, the one with the least room. #}
{% macro add_limit(state) -%}
v_limits := v_limits || {{ limit_answer(state) }};
if {{ state }}.max - {{ state }}.used < v_tightest.max - v_tightest.used
  or (v_tightest.max is null and {{ state }}.max is not null)
then
  v_tightest := {{ state }};
end if;
{%- endmacro %}

{% macro variables_of_answer() -%}
v_limits tokenlimits.limit_answer[] := '{}';
v_tightest tokenlimits.limit_state;
{%- endmacro %}

{#
What workers get. Of an allowed request, remaining and reset_at are those of the limit with the least room; of a denied
one, reset_at is when the limit that denied it will have room (null: never by itself).
#}
{% macro answer(kind, cost, group_id, group_name, usage_id, status, expires_at, replayed,
  reason='null', error='null', denied_by='null', reset_at='v_tightest.until', retry_after='null') -%}
row_to_json(row(
  {{ 'true' if reason == 'null' else reason ~ ' is null' }}, {{ reason }}, {{ error }},
  {{ usage_id }}, {{ status }}, {{ expires_at }},
  case when {{ group_id }} is not null then row({{ group_id }}, {{ group_name }})::tokenlimits.group_answer end,
  {{ kind }}, {{ cost }}, v_limits, {{ denied_by }},
  -- greatest() passes over nulls, and unlimited is null
  case when v_tightest.max is not null then greatest(v_tightest.max - v_tightest.used, 0) end,
  nullif({{ reset_at }}, 'infinity'), {{ retry_after }}, {{ replayed }}
)::tokenlimits.generation_answer)
{%- endmacro %}

{# A limit as clients see it. #}
{% macro limit_answer(state) -%}
row(
  {{ state }}.kind, {{ state }}.period, {{ state }}.scope, {{ state }}.max, {{ state }}.used,
  case when {{ state }}.max is not null then greatest({{ state }}.max - {{ state }}.used, 0) end,
  nullif({{ state }}.until, 'infinity')
)::tokenlimits.limit_answer
{%- endmacro %}

{# The order in which a user's groups g are tried, by their memberships m. #}
{% macro paying_order() -%}
g.priority desc, m.joined_at, g.id
{%- endmacro %}

{# The default group is for users in none. #}
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

{# Those of them that a request with a group of its own choice leaves. #}
{% macro pinned(group_ids, group_id) -%}
case
  when {{ group_id }} is null then {{ group_ids }}
  when {{ group_id }} = any({{ group_ids }}) then array[{{ group_id }}]
  else '{}'
end
{%- endmacro %}

{# A field of a request in a batch, and whether all of them together are a request. #}
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

{% macro is_item(item) -%}
{{ is_request(item ~ '.user_id', item ~ '.kind', item ~ '.cost', item ~ '.idempotency_key', item ~ '.metadata') }}
{%- endmacro %}

{# The groups and kinds that the open items of a batch are about, and the users of each. #}
{% macro pairs_of(items) -%}
select g.id as group_id, i.kind, array_agg(distinct i.user_id) as user_ids
from unnest({{ items }}) as i
cross join lateral unnest(i.group_ids) as g (id)
where i.answer is null
group by g.id, i.kind
{%- endmacro %}

{% macro variables_of_an_error() -%}
v_message text;
v_detail text;
v_hint text;
{%- endmacro %}

{# In the handler of an error that a single call would raise: answers it. #}
{% macro answer_error(item, answer) -%}
get stacked diagnostics v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
{{ answer }} := tokenlimits.refused({{ item }}, sqlstate, v_message, v_detail, v_hint);
{%- endmacro %}

{#
Where a counter that is opened in a period begins. Never before a past one's end: new rules of a time zone may put that
into this period; nor before a reset.
#}
{% macro new_since(period, past_until, group_id, kind) -%}
greatest(lower({{ period }}), {{ past_until }}, (
  select max(r.reset_at)
  from tokenlimits.usage_resets as r
  where r.group_id = {{ group_id }} and r.kind in ({{ kind }}, '*')
))
{%- endmacro %}
