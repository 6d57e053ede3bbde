"""The SQL and its model, the fake's engine: asked the same at the same moment, both must answer the same.

twins = Twins(connection)
twins.begin(moment, users)
twins.call("track_generation", p_user_id=user, p_kind="image")   # what both answered, or refused
twins.pages("export_usage")                                      # all rows of all pages
twins.compare_tables()                                           # ledger and counters against the engine's state
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from tests.sql.semantics.api import Json
from tests.sql.semantics.database import FORGET_EVERYTHING
from tests.support import clock

from tokenlimits import TokenLimitsError
from tokenlimits._refusals import refusal
from tokenlimits.testing._engine import GROUP_NAME, Engine
from tokenlimits.testing._groups import Bound
from tokenlimits.testing._limits import Rule
from tokenlimits.testing._periods import BEGINNING, NEVER

_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?[+-]\d\d(:\d\d)?")

_PARAMETERS = """
select p.proname, a.name, a.type::regtype::text
from pg_catalog.pg_proc as p
cross join lateral unnest(p.proargnames, p.proargtypes::oid[]) as a (name, type)
where p.pronamespace = 'public'::regnamespace and a.type is not null
"""

# what nobody has swept yet is expired all the same
_LEDGER = """
select
  u.id::text, u.group_id::text, u.user_id::text, u.kind, u.cost, u.reserved_cost, u.idempotency_key, u.metadata,
  case when h.unswept then 'expired' else u.status end as status,
  u.created_at, u.expires_at,
  case when h.unswept then u.expires_at else u.settled_at end as settled_at
from public.generation_usage as u
cross join lateral (
  select u.status = 'reserved' and u.expires_at <= tokenlimits.clock() as unswept
) as h
"""

_COUNTERS = """
select
  l.group_id::text, l.kind, l.period, l.starts, l.scope, c.subject::text,
  nullif(c.since, '-infinity') as since, nullif(c.until, 'infinity') as until,
  c.used - coalesce((
    select sum(case l.period
      when 'in_flight' then 1
      else u.cost * coalesce((l.counts ->> u.kind)::bigint, 1)
    end)::bigint
    from public.generation_usage as u
    inner join tokenlimits.group_tree as t on t.group_id = u.group_id
    where
      t.above_id = case l.scope when 'child' then c.subject else l.group_id end
      and (l.counts is null and u.kind = l.kind or l.counts ? u.kind)
      and (l.scope <> 'member' or u.user_id = c.subject)
      and u.created_at >= c.since and u.status = 'reserved' and u.expires_at <= tokenlimits.clock()
  ), 0) as used
from tokenlimits.counters as c
inner join public.group_limits as l using (counter_id)
where c.until > tokenlimits.clock()
"""


# parameters of which null says something: unlimited, no anchor
_NULLS = {("set_limit_override", "p_max"), ("set_member_anchor", "p_anchor_at")}

# what may begin anchored periods
_ANCHORING = {"save_group", "add_group_members", "set_member_anchor", "move_group_member"}


@dataclass(frozen=True)
class Refused:
    """What was answered with an error; it says all that a client makes of it."""

    code: str | None
    error: str
    text: str
    detail: str | None


class Model(Engine):
    """The fake's engine without its group; it names usages and overrides as the SQL has named them."""

    def __init__(self, now: datetime, users: Sequence[str]) -> None:
        super().__init__(limits=None, users={user: email_of(user) for user in users})
        [group] = self.find_groups(p_name=GROUP_NAME)
        self.delete_group(group["id"])
        self.move_clock(now)
        self.usage_ids: deque[str] = deque()
        self.override_id: str | None = None

    def _usage_id(self, at: datetime, home: str) -> str:
        own = super()._usage_id(at, home)
        if not self.usage_ids:
            return own  # the SQL has denied it, and the answers will differ
        given = self.usage_ids.popleft()
        milliseconds, version = slice(0, 13), 14
        expected, actual = (own[milliseconds], "7", own[-4:]), (given[milliseconds], given[version], given[-4:])
        same(f"id of a usage of {at} in {home}", expected, actual)
        return given

    def _override_id(self) -> str:
        # none: the SQL has refused it, and the answers will differ
        return self.override_id or super()._override_id()


class Twins:
    """Both, on one clock: the engine's, which the database's is set to."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self._types = {(function, name): kind for function, name, kind in connection.execute(_PARAMETERS)}
        self._shown: datetime | None = None

    def begin(self, now: datetime, users: Sequence[str]) -> None:
        """Forget everything; these users are all that there are."""
        self.connection.execute(FORGET_EVERYTHING)
        self.model = Model(now, users)
        for user in users:
            self.sign_up(user)
        self._show_time()

    @property
    def now(self) -> datetime:
        """The moment that it is for both."""
        return self.model.now

    def wait(self, by: timedelta) -> None:
        """Let time pass."""
        self.wait_until(self.now + by)

    def wait_until(self, moment: datetime) -> None:
        """Let time pass until a moment; not back."""
        self.model.move_clock(max(moment, self.now))
        self._show_time()

    def call(self, function: str, **params: Any) -> Any:
        """Call a function of both, without what is None: answers what both answered, or how both refused.

        Null is said where it means something.
        """
        params = {name: value for name, value in params.items() if value is not None or (function, name) in _NULLS}
        actual = self._sql(function, params)
        self._tell_ids(function, params, actual)
        expected = self._engine(function, params)
        same(f"{function} {params}", expected, actual)
        self._show_time()  # a reset may have moved it
        if function in _ANCHORING:
            self.take_moments()
        return actual

    def track_many(self, requests: list[Json]) -> list[Json]:
        """Track as `call` does; what is used at a repeated request is of some moment during the call."""
        actual = self._sql("track_generations", {"p_requests": requests})
        self.model.usage_ids = deque(_new_usages(actual))
        expected = self._engine("track_generations", {"p_requests": requests})
        sides = ([_at_some_moment(answer) for answer in side] for side in (expected, actual))
        same(f"track_generations {requests}", *sides)
        return actual

    def pages(self, function: str, **params: Any) -> list[Json]:
        """Read page after page from both, until the end; pages may be cut elsewhere, their rows are the same."""
        params = {name: value for name, value in params.items() if value is not None}
        expected, actual = _rows(self._engine, function, params), _rows(self._sql, function, params)
        same(f"{function} {params}", expected, actual)
        return actual

    def sign_up(self, user: str) -> None:
        """Make a user; the engine knows them already."""
        self.connection.execute("insert into auth.users (id, email) values (%s, %s)", [user, email_of(user)])

    def sign_in(self, user: str | None) -> None:
        """Whose access token it is from now on; None: nobody's."""
        self.model.signed_in = user
        claims = json.dumps({"sub": user}) if user else ""
        self.connection.execute("select set_config('request.jwt.claims', %s, false)", [claims])

    def delete_user(self, user: str) -> None:
        """Delete a user; their usage stays."""
        for group in self.model.find_groups():
            self.model.remove_group_members(group["id"], [user])
        self.connection.execute("delete from auth.users where id = %s", [user])

    def count(self, query: str) -> int:
        """Ask the database alone how many there are of something."""
        [(number,)] = self.connection.execute(query).fetchall()
        return number

    def take_order(self) -> None:
        """Order the model's limits as the SQL lists them, where it numbers some anew in any order."""
        query = "select group_id::text, counter_id, kind, period, scope, starts from public.group_limits"
        places = {(group, Rule(*rule)): place for group, place, *rule in self.connection.execute(query)}
        groups = [self.model._group(group["id"]) for group in self.model.find_groups()]
        same("limits", {(group.id, rule) for group in groups for rule in group.limits}, places.keys())
        for group in groups:
            group.limits = {rule: replace(terms, place=places[group.id, rule]) for rule, terms in group.limits.items()}
        self.model._ages = count(max(places.values(), default=0) + 1)

    def take_moments(self) -> None:
        """Take over since when groups and memberships are there, which PostgreSQL's own clock tells."""
        for id_, created_at in self.connection.execute("select id::text, created_at from public.user_groups"):
            self.model._group(id_).created_at = created_at
        query = "select group_id::text, user_id::text, joined_at from public.group_memberships"
        for id_, user, joined_at in self.connection.execute(query):
            members = self.model._group(id_).members
            members[user] = replace(members[user], joined_at=joined_at)

    def compare_tables(self) -> None:
        """Compare the ledger and each open counter with what the engine knows."""
        ledger = [{name: getattr(usage, name) for name in _COLUMNS} for usage in self.model.ledger]
        rows = self.connection.cursor(row_factory=dict_row).execute(_LEDGER).fetchall()
        same("ledger", *(sorted(side, key=lambda row: row["id"]) for side in (ledger, rows)))
        for row in self.connection.cursor(row_factory=dict_row).execute(_COUNTERS):
            same("counter", self._counter(row), row)

    def _counter(self, row: Json) -> Json:
        whose = None if row["scope"] == "group" else row["subject"]
        group, rule = self.model._group(row["group_id"]), Rule(row["kind"], row["period"], row["scope"], row["starts"])
        state = self.model._state(Bound(group, rule, group.limits[rule], whose))
        since, until = (None if at in (BEGINNING, NEVER) else at for at in (state.since, state.until))
        subject = row["group_id"] if whose is None else whose
        return row | {"subject": subject, "since": since, "until": until, "used": state.used}

    def _show_time(self) -> None:
        if self._shown != self.now:
            clock.freeze(self.connection, self.now)
            self._shown = self.now

    def _tell_ids(self, function: str, params: Json, answer: Any) -> None:
        """Let the engine choose the ids that the SQL has chosen."""
        is_usage = isinstance(answer, dict) and "usage_id" in answer
        self.model.usage_ids = deque(_new_usages([answer]) if is_usage else [])
        if function == "save_group" and isinstance(answer, dict) and params.get("p_group_id") is None:
            params["p_id"] = answer["id"]
        if function == "set_limit_override" and isinstance(answer, dict):
            self.model.override_id = answer["id"]

    def _sql(self, function: str, params: Json) -> Any:
        given = {
            name: Jsonb(value) if self._types[function, name] == "jsonb" else value for name, value in params.items()
        }
        arguments = [
            sql.SQL("{} => {}::{}").format(
                sql.Identifier(name), sql.Placeholder(name), sql.SQL(self._types[function, name])
            )
            for name in given
        ]
        query = sql.SQL("select public.{}({})").format(sql.Identifier(function), sql.SQL(", ").join(arguments))
        try:
            [(answer,)] = self.connection.execute(query, given).fetchall()
        except psycopg.Error as error:
            told = error.diag
            return _refused(
                refusal(
                    400,
                    {
                        "code": told.sqlstate,
                        "message": told.message_primary,
                        "details": told.message_detail,
                        "hint": told.message_hint,
                    },
                )
            )
        return plain(answer)

    def _engine(self, function: str, params: Json) -> Any:
        try:
            return plain(self.model.answer(function, params))
        except TokenLimitsError as error:
            return _refused(error)


_COLUMNS = (
    "id", "group_id", "user_id", "kind", "cost", "reserved_cost", "idempotency_key", "metadata",
    "status", "created_at", "expires_at", "settled_at",
)  # fmt: skip


def email_of(user: str) -> str:
    return f"{UUID(user).int}@example.com"


def plain(answer: Any) -> Any:
    """Write moments in one way, and leave out those that PostgreSQL's own clock tells, which no test can turn."""
    return json.loads(_MOMENT.sub(_in_utc, json.dumps(answer)), object_hook=_without_own_moments)


def same(what: str, expected: Any, actual: Any) -> None:
    assert actual == expected, f"{what}\n  the model: {expected}\n  the SQL:   {actual}"


def _in_utc(found: re.Match[str]) -> str:
    return datetime.fromisoformat(found[0]).astimezone(UTC).isoformat()


def _without_own_moments(item: Json) -> Json:
    own = {"joined_at"} | ({"created_at"} if "is_default" in item else set())
    return {name: value for name, value in item.items() if name not in own}


def _refused(error: TokenLimitsError) -> Refused:
    return Refused(error.code, type(error).__name__, _MOMENT.sub(_in_utc, str(error)), error.detail)


def _new_usages(answers: Sequence[Json]) -> list[str]:
    return [answer["usage_id"] for answer in answers if answer["usage_id"] and not answer["replayed"]]


def _at_some_moment(answer: Json) -> Json:
    if not answer["replayed"]:
        return answer
    limits = [{**limit, "used": None, "remaining": None, "reset_at": None} for limit in answer["limits"]]
    return answer | {"limits": limits, "remaining": None, "reset_at": None}


def _rows(ask: Callable[[str, Json], Any], function: str, params: Json) -> list[Json]:
    page = ask(function, params)
    rows: list[Json] = page["rows"]
    while page["next"]:
        page = ask(function, params | {"p_after": page["next"], "p_until": page["until"]})
        rows += page["rows"]
    return rows
