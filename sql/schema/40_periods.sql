-- Periods: of the calendar in a time zone, and those that begin elsewhere.
--
-- Invariants
--   * Periods of one length in one zone follow each other without gap or overlap, on daylight-saving days too.
--   * A day begins at the first moment with its date, even where midnight happens twice or not at all.
--   * Hours are counted from the beginning of the day, so that a repeated hour is a separate period.
--   * An anchored period begins a whole number of periods after the anchor: by the local calendar if it has days or
--     months, each counted from the anchor itself (31 January, 28 February, 31 March).
--   * A rolling window of 60 parts counts 61, the one that has just begun and 60 before it. So within any window of
--     that length, never more than the max is used, and room returns at most a sixtieth late.

-- PostgreSQL reads a time that happens twice as the later one, and a time that doesn't happen with the offset before
-- the gap, which is the gap's beginning for a midnight. So only the first case needs care: try the offset of the day
-- before, and use that moment if it has the same local time.
create or replace function tokenlimits.first_moment(p_local timestamp, p_timezone text)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_late timestamptz := p_local at time zone p_timezone;
  v_day_before timestamptz := v_late - interval '24 hours';
  v_early timestamptz := (
    p_local - ((v_day_before at time zone p_timezone) - (v_day_before at time zone 'UTC'))
  ) at time zone 'UTC';
begin
  if v_early < v_late and v_early at time zone p_timezone = p_local then
    return v_early;
  end if;
  return v_late;
end
$$;
{{ private(
  'first_moment(timestamp, text)',
  "The first moment with this local time in the zone."
) }}

create or replace function tokenlimits.period_of(p_period text, p_timezone text, p_at timestamptz)
returns tstzrange
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_local timestamp;
  v_day tstzrange;
  v_since timestamptz;
begin
  if p_period in ('lifetime', 'in_flight') then
    return tstzrange('-infinity', 'infinity');
  elsif p_period = 'minute' then
    v_since := date_bin('1 minute', p_at, '2000-01-01 00:00:00+00');
    return tstzrange(v_since, v_since + interval '1 minute');
  elsif p_period = 'hour' then
    v_day := tokenlimits.period_of('day', p_timezone, p_at);
    v_since := date_bin('1 hour', p_at, lower(v_day));
    return tstzrange(v_since, least(v_since + interval '1 hour', upper(v_day)));
  end if;
  v_local := date_trunc(p_period, p_at at time zone p_timezone);
  return tstzrange(
    tokenlimits.first_moment(v_local, p_timezone),
    tokenlimits.first_moment(v_local + ('1 ' || p_period)::interval, p_timezone)
  );
end
$$;
{{ private(
  'period_of(text, text, timestamptz)',
  "The calendar period in a zone that contains a moment."
) }}

create or replace function tokenlimits.length_of(p_period text)
returns interval
language plpgsql
immutable
{{ search_path() }}
as $$
begin
  -- "hour" is one, "5 hours" says how many
  return case when p_period ~ '^[0-9]' then p_period::interval else ('1 ' || p_period)::interval end;
end
$$;
{{ private('length_of(text)', "How long a period is.") }}

-- Of a window that begins at a moment. A day is 24 hours here; a month ends on the same day of the next one.
create or replace function tokenlimits.end_of(p_period text, p_timezone text, p_since timestamptz)
returns timestamptz
language plpgsql
stable
{{ search_path() }}
as $$
begin
  if p_period in ('month', 'year') then
    return tokenlimits.first_moment(
      (p_since at time zone p_timezone) + tokenlimits.length_of(p_period), p_timezone
    );
  end if;
  return p_since + make_interval(secs => extract(epoch from tokenlimits.length_of(p_period))::float8);
end
$$;
{{ private('end_of(text, text, timestamptz)', "When a window that begins at a moment ends.") }}

create or replace function tokenlimits.anchored_period(
  p_period text,
  p_timezone text,
  p_anchor timestamptz,
  p_at timestamptz
)
returns tstzrange
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_length interval := tokenlimits.length_of(p_period);
  v_anchor timestamp := p_anchor at time zone p_timezone;
  v_local timestamp := p_at at time zone p_timezone;
  v_since timestamptz;
  v_until timestamptz;
  -- how many periods after the anchor; days and months are first estimated, since they differ in length
  v_number integer;
begin
  if p_period ~ '(minute|hour)' then
    v_since := date_bin(v_length, p_at, p_anchor);
    return tstzrange(v_since, v_since + v_length);
  elsif p_period ~ '(month|year)' then
    v_number := 12 * (extract(year from v_local) - extract(year from v_anchor))
      + extract(month from v_local) - extract(month from v_anchor);
    v_number := v_number / (12 * extract(year from v_length) + extract(month from v_length))::integer;
  else
    v_number := (v_local::date - v_anchor::date) / extract(day from v_length)::integer;
  end if;
  -- one too many, so that only the way back is left
  v_number := v_number + 2;
  loop
    v_until := v_since;
    v_since := tokenlimits.first_moment(v_anchor + v_number * v_length, p_timezone);
    exit when v_since <= p_at and v_until is not null;
    v_number := v_number - 1;
  end loop;
  return tstzrange(v_since, v_until);
end
$$;
{{ private(
  'anchored_period(text, text, timestamptz, timestamptz)',
  "The period that contains a moment, where periods are counted from an anchor."
) }}

create or replace function tokenlimits.part_of(p_period text)
returns interval
language plpgsql
immutable
{{ search_path() }}
as $$
begin
  return make_interval(secs => extract(epoch from tokenlimits.length_of(p_period))::float8 / 60);
end
$$;
{{ private('part_of(text)', "How long a part of a rolling window is.") }}

-- For rolling: from the oldest part that counts to the end of the part that has just begun, when the oldest leaves.
create or replace function tokenlimits.window_of(
  p_period text,
  p_starts text,
  p_timezone text,
  p_anchor timestamptz,
  p_at timestamptz
)
returns tstzrange
language plpgsql
stable
{{ search_path() }}
as $$
declare
  v_part interval;
  v_since timestamptz;
begin
  if p_starts = 'calendar' then
    return tokenlimits.period_of(p_period, p_timezone, p_at);
  elsif p_starts = 'anchor' then
    return tokenlimits.anchored_period(p_period, p_timezone, p_anchor, p_at);
  elsif p_starts = 'first_use' then
    return tstzrange(p_at, tokenlimits.end_of(p_period, p_timezone, p_at));
  end if;
  v_part := tokenlimits.part_of(p_period);
  v_since := {{ part_at('v_part', 'p_at') }};
  return tstzrange(v_since - 60 * v_part, v_since + v_part);
end
$$;
{{ private(
  'window_of(text, text, text, timestamptz, timestamptz)',
  "The period of a limit that contains a moment; for first_use, one that begins then."
) }}
