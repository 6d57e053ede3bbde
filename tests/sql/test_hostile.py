"""Whatever is sent, the answer is a value or an error that says what is wrong with it, and nothing else is touched."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest
from tests.sql.api import (
    ACTORS,
    CALLS,
    GROUP_ID,
    OTHER_GROUP_ID,
    OTHER_ID,
    USER_ID,
    argument_types,
    call_sql,
    outcome,
    request_by,
    seed,
)
from tests.sql.test_security import FUNCTIONS, public_functions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Connect
    from tests.sql.api import Connection

TEXTS: Final = [
    "",
    " ",
    "'",
    '"',
    "''; drop table public.user_groups; --",
    "'; drop table public.generation_usage cascade; select '",
    "$$; drop schema tokenlimits cascade; $$",
    "\\",
    "\\'; select pg_sleep(10); --",
    "%s %d %I %L %%",
    "%",
    "_",
    "100%",
    "a\nb\r\nc\td",
    "\u202egnp.exe",
    "مرحبا بالعالم",
    "🙂👩‍👩‍👧‍👦",
    "e\u0301",
    "\ufeff\u200b",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "{{7*7}}${7*7}",
    "null",
    "NaN",
    "true",
    "infinity",
    "-infinity",
    "epoch",
    "0001-01-01 00:00:00 BC",
    "294276-12-31T23:59:59.999999Z",
    "99999-99-99",
    "2026-03-29T02:30:00 Europe/Paris",
    "{}",
    "{NULL}",
    "[1,2)",
    "image",
    "*",
    "00000000-0000-0000-0000-000000000000",
    "x" * 1_000_000,
    "é" * 300,
]
NUMBERS: Final = [0, -1, 1, 2**31, -(2**31) - 1, 2**53, 2**63 - 1, -(2**63), 2**63, 10**40, 0.5, -0.1, 1e300]
LIMIT: Final = {"kind": "image", "period": "day", "scope": "member", "max": 5}
STRUCTURES: Final = [
    None,
    True,
    False,
    [],
    [None],
    [[]],
    [[USER_ID], [OTHER_ID, None]],
    ["'", None, 1],
    [USER_ID, USER_ID, None],
    ["00000000-0000-0000-0000-000000000000"] * 10_000,
    {},
    {"": None},
    {"'; drop table x; --": "$$"},
    {"kind": "'", "period": "''", "scope": [], "max": {}},
    [LIMIT, LIMIT],
    [LIMIT, None],
    *([{**LIMIT, name: value}] for name in LIMIT for value in (None, "'", 0.5, -1, 10**40, "5", [], {})),
    *({**LIMIT, name: value} for name in LIMIT for value in (None, "'", 0.5, -1, 10**40, "5", [], {})),
]
RAW: Final = [
    r'"\u0000"',
    r'"a\u0000b"',
    r'{"a": "\u0000"}',
    r'{"\u0000": 1}',
    r'"\ud800"',
    "1e400",
    "-1e-400",
    "NaN",
    "[" * 500 + "]" * 500,
    '{"a":' * 500 + "1" + "}" * 500,
    json.dumps({f"key{number}": number for number in range(5_000)}),
    json.dumps([LIMIT] * 1_000),
]
HOSTILE: Final = [json.dumps(value) for value in TEXTS + NUMBERS + STRUCTURES] + RAW

# ours; data exceptions and limits that reading the JSON hits before we see it; broken constraints
GOOD_ERRORS: Final = re.compile("TL00[1-9]|22...|54...|23...")

# What nobody in these tests has any business with: all of the other group and the other user.
WITNESSES: Final = f"""
select md5(string_agg(w.row, ' ' order by w.row)) from (
  select g::text as row from public.user_groups as g where g.id = '{OTHER_GROUP_ID}'
  union all
  select l::text from public.group_limits as l where l.group_id = '{OTHER_GROUP_ID}'
  union all
  select m::text from public.group_memberships as m where m.group_id = '{OTHER_GROUP_ID}' and m.user_id = '{OTHER_ID}'
  union all
  select u::text from public.generation_usage as u where u.user_id = '{OTHER_ID}'
  union all
  select r::text from tokenlimits.usage_rollup as r where r.group_id = '{OTHER_GROUP_ID}'
  union all
  select c::text from tokenlimits.counters as c where c.subject in ('{OTHER_GROUP_ID}', '{OTHER_ID}')
  union all
  select a::text from auth.users as a
) as w
"""

NAMES: Final = [text for text in TEXTS if 0 < len(text) <= 200 and text.strip(" ") == text]


@pytest.fixture(scope="module")
def api(new_database: Callable[..., Connect]) -> Iterator[Connection]:
    """A connection that may take any role, and looks at everything in between."""
    with new_database()("supabase_admin") as connection:
        seed(connection)
        connection.execute("set statement_timeout = '8s'")
        yield connection


def value_of(connection: Connection, query: str, parameters: Any = None) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def mischief(connection: Connection, function: str, call: str, body: str, before: str) -> str | None:
    """What a call did that it shouldn't have done, if anything."""
    try:
        with request_by(connection, ACTORS["admin" if "admin" in FUNCTIONS[function] else "service"]):
            connection.execute(call, [body])
            connection.execute("reset role")
            if value_of(connection, WITNESSES) != before:
                return "other data changed"
    except psycopg.Error as error:
        if not GOOD_ERRORS.fullmatch(error.sqlstate or ""):
            return f"{error.sqlstate}: {error}"
    return None


@pytest.mark.parametrize("function", public_functions())
def test_hostile_arguments_do_no_harm(api: Connection, function: str) -> None:
    types, arguments = argument_types(api)[function], CALLS[function]
    assert types.keys() == arguments.keys()
    call, before = call_sql(function, types, arguments), value_of(api, WITNESSES)
    assert mischief(api, function, call, json.dumps(arguments), before) is None
    found = {
        (name, value[:100]): what
        for name in arguments
        for value in HOSTILE
        if (what := mischief(api, function, call, f'{{{rest(arguments, name)}"{name}": {value}}}', before))
    }
    assert not found


def rest(arguments: dict[str, Any], name: str) -> str:
    return "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in arguments.items() if key != name)


def test_every_argument_may_be_null_at_once(api: Connection) -> None:
    before = value_of(api, WITNESSES)
    for function, types in argument_types(api).items():
        call = call_sql(function, types, types)
        assert mischief(api, function, call, json.dumps(dict.fromkeys(types)), before) is None, function


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_as_they_were_given(api: Connection, name: str) -> None:
    with request_by(api, ACTORS["service"]):
        saved = value_of(api, "select public.save_group(p_name => %s, p_description => %s)", [name, name])
        assert (saved["name"], saved["description"]) == (name, name)
        for found in ("p_name => %s", "p_search => %s"):
            assert saved in value_of(api, f"select public.find_groups({found})", [name])
        usage = value_of(api, "select public.group_usage(%s)", [saved["id"]])
        assert usage[0]["group"] == {"id": saved["id"], "name": name}


@pytest.mark.parametrize("text", NAMES)
def test_keys_and_metadata_come_back_as_they_were_given(api: Connection, text: str) -> None:
    with request_by(api, ACTORS["service"]):
        track = "select public.track_generation(%s, 'image', p_idempotency_key => %s, p_metadata => %s)"
        arguments = [USER_ID, text, json.dumps({text: text})]
        usage = value_of(api, track, arguments)
        assert (usage["allowed"], usage["replayed"]) == (True, False)
        row = api.execute(
            "select idempotency_key, metadata from public.generation_usage where id = %s", [usage["usage_id"]]
        ).fetchone()
        assert row == (text, {text: text})
        assert value_of(api, track, arguments)["replayed"]


@pytest.mark.parametrize("text", ["%", "_", "\\", "'", ".*", "PRO%"])
def test_searches_take_text_literally(api: Connection, text: str) -> None:
    with request_by(api, ACTORS["service"]):
        assert value_of(api, "select public.find_groups(p_search => %s)", [text]) == []
        assert value_of(api, "select public.find_users(%s)", [text]) == []
        assert value_of(api, "select public.group_members(%s, p_search => %s)", [GROUP_ID, text]) == []


EDITS: Final = [
    # time zones: PostgreSQL itself would take the first
    ("update public.user_groups set timezone = 'Foo/Bar5' where name = 'Pro'", "TL001"),
    ("update public.user_groups set timezone = '' where name = 'Pro'", "TL001"),
    ("update public.user_groups set timezone = null where name = 'Pro'", "23502"),
    ("insert into public.user_groups (name, timezone) values ('New', 'UTC+3')", "TL001"),
    ("insert into public.user_groups (name, timezone) values ('New', 'posix/Europe/Paris')", "TL001"),
    ("insert into public.user_groups (name, timezone) values ('New', 'CET')", "TL001"),
    # names
    ("insert into public.user_groups (name) values (' pRO ')", "23505"),
    ("update public.user_groups set name = 'team' where name = 'Pro'", "23505"),
    ("insert into public.user_groups (name) values ('   ')", "23514"),
    ("insert into public.user_groups (name) values (repeat('x', 201))", "23514"),
    ("insert into public.user_groups (name) values (null)", "23502"),
    ("insert into public.user_groups (name, description) values ('New', repeat('x', 2001))", "23514"),
    # one default
    ("insert into public.user_groups (name, is_default) values ('A', true), ('B', true)", "23505"),
    # limits
    (f"insert into public.group_limits values ('{GROUP_ID}', 'Image', 'day', 'group', 1)", "23514"),
    (f"insert into public.group_limits values ('{GROUP_ID}', 'audio', 'year', 'group', 1)", "23514"),
    (f"insert into public.group_limits values ('{GROUP_ID}', 'audio', 'day', 'team', 1)", "23514"),
    (f"insert into public.group_limits values ('{GROUP_ID}', 'audio', 'day', 'group', -1)", "23514"),
    (f"insert into public.group_limits values ('{GROUP_ID}', 'audio', 'day', 'group', 1000000000000001)", "23514"),
    (f"insert into public.group_limits values ('{GROUP_ID}', 'image', 'day', 'member', 1)", "23505"),
    (f"insert into public.group_limits values ('{USER_ID}', 'audio', 'day', 'group', 1)", "23503"),
    # what names the counters isn't theirs to choose
    (f"insert into public.group_limits values ('{GROUP_ID}', 'audio', 'day', 'group', 1, 7)", "428C9"),
    (f"update public.group_limits set counter_id = 7 where group_id = '{GROUP_ID}' and period = 'day'", "428C9"),
    # members
    (f"insert into public.group_memberships values ('{GROUP_ID}', '{GROUP_ID}')", "23503"),
    (f"insert into public.group_memberships values ('{GROUP_ID}', '{USER_ID}')", "23505"),
]


@pytest.mark.parametrize(("statement", "error"), EDITS)
def test_bad_edits_by_an_admin_are_refused(api: Connection, statement: str, error: str) -> None:
    assert outcome(api, ACTORS["admin"], statement) == error


@pytest.mark.parametrize(
    ("column", "given", "stored"),
    [
        ("timezone", "europe/paris", "Europe/Paris"),
        ("timezone", "utc", "UTC"),
        ("timezone", "America/Argentina/Buenos_Aires", "America/Argentina/Buenos_Aires"),
        ("name", "  Gold  ", "Gold"),
        ("name", "PRO", "PRO"),
    ],
)
def test_edits_by_an_admin_are_tidied(api: Connection, column: str, given: str, stored: str) -> None:
    with request_by(api, ACTORS["admin"]):
        query = f"update public.user_groups set {column} = %s where id = %s returning {column}"
        assert value_of(api, query, [given, GROUP_ID]) == stored
        query = f"insert into public.user_groups (name, {column}) values ('n', %s) returning {column}"
        if column == "timezone":
            assert value_of(api, query, [given]) == stored


def test_an_admins_edit_shows_when_it_was(api: Connection) -> None:
    with request_by(api, ACTORS["admin"]):
        query = (
            "update public.user_groups set updated_at = '-infinity', priority = 1 where id = %s returning updated_at"
        )
        assert value_of(api, query, [GROUP_ID]).year > 2000


def test_groups_that_an_admin_deletes_leave_their_ledger(api: Connection) -> None:
    with request_by(api, ACTORS["admin"]):
        count = "select count(*) from public.generation_usage"
        before = value_of(api, count)
        api.execute("delete from public.user_groups where true")
        assert value_of(api, "select count(*) from public.group_limits") == 0
        assert value_of(api, "select count(*) from public.group_memberships") == 0
        assert value_of(api, count) == before > 0
