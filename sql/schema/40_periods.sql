-- Calendar periods in a time zone.
--
-- Invariants
--   * Periods of one length in one zone follow each other without gap or overlap, on daylight-saving days too.
--   * A day begins at the first moment with its date, even where midnight happens twice or not at all.
--   * Hours are counted from the beginning of the day, so that a repeated hour is a separate period.

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
  if p_period = 'lifetime' then
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
