"""A clock that tests can turn, in the place of `tokenlimits.clock()`, the one function that reads the time.

install(owner)                      # once per database, as the role that applied the SQL
freeze(owner, instant)              # from now on it is this instant, in all connections
shift(owner, timedelta(hours=3))    # it runs, three hours ahead
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]

_INSTALL = """
create table tokenlimits.test_clock (frozen timestamptz, ahead interval not null);
insert into tokenlimits.test_clock (frozen, ahead) values (null, '0');

create or replace function tokenlimits.clock()
returns timestamptz
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select coalesce(t.frozen, clock_timestamp() + t.ahead) from tokenlimits.test_clock as t);
end
$$;
"""


def install(owner: Connection) -> None:
    """Replace the clock of a database; until it is turned, it tells the real time."""
    owner.execute(_INSTALL)


def freeze(owner: Connection, instant: datetime) -> None:
    """Stop it at an instant, for every call that reads it from now on."""
    assert instant.tzinfo is not None
    _set(owner, instant, timedelta(0))


def shift(owner: Connection, ahead: timedelta) -> None:
    """Let it run, this much ahead of the real time."""
    _set(owner, None, ahead)


def run_from(owner: Connection, instant: datetime) -> None:
    """Let it run, beginning with this instant."""
    shift(owner, instant - real_time(owner))


def read(connection: Connection) -> datetime:
    """Tell its time."""
    return _one(connection, "select tokenlimits.clock()")


def real_time(connection: Connection) -> datetime:
    """Tell the server's time, however the clock was turned."""
    return _one(connection, "select clock_timestamp()")


def _set(owner: Connection, frozen: datetime | None, ahead: timedelta) -> None:
    owner.execute("update tokenlimits.test_clock set frozen = %s, ahead = %s", [frozen, ahead])


def _one(connection: Connection, query: str) -> datetime:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
