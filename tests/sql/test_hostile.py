"""Whatever is sent, the answer is a value or an error that says what is wrong with it, and nothing else is touched."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
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
GOOD_ERRORS: Final = re.compile("TL00[1-9]|TL011|22...|54...|23...")

# What nobody in these tests has any business with: all of the other group and the other user.
WITNESSES: Final = f"""
select md5(string_agg(w.row, ' ' order by w.row)) from (
  select g::text as row from public.user_groups as g where g.id = '{OTHER_GROUP_ID}'
  union all
  select l::text from public.group_limits as l where l.group_id = '{OTHER_GROUP_ID}'
  union all
  select o::text from public.limit_overrides as o where o.group_id = '{OTHER_GROUP_ID}'
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

KEYS: Final = [text for text in TEXTS if 0 < len(text) <= 200 and text.strip(" ") == text]
# Who reads a name must see all of it: what is invisible, or turns the direction of what follows, is in none.
INVISIBLE: Final = {
    "a line break": "a\nb",
    "a tab": "a\tb",
    "a bell": "a\x07b",
    "delete": "a\x7fb",
    "a C1 control": "a\x85b",
    "a soft hyphen": "a\u00adb",
    "a zero-width space": "a\u200bb",
    "a zero-width non-joiner": "a\u200cb",
    "a zero-width joiner": "a\u200db",
    "a byte order mark": "\ufeffab",
    "a word joiner": "a\u2060b",
    "a right-to-left mark": "a\u200fb",
    "an Arabic letter mark": "a\u061cb",
    "a line separator": "a\u2028b",
    "a right-to-left override": "\u202egnp.exe",
    "a filler": "Pro\u3164",
    "nothing but blanks": "\u00a0\u3000",
    "a left-to-right isolate": "a\u2066b",
    "an end of an isolate": "ab\u2069",
}
NAMES: Final = [
    text
    for text in KEYS
    if unicodedata.is_normalized("NFC", text)
    and not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", text)
]


@pytest.fixture(scope="module")
def api(new_database: Callable[..., Connect]) -> Iterator[Connection]:
    """A connection that may take any role, and looks at everything in between."""
    with new_database()("supabase_admin") as connection:
        seed(connection)
        connection.execute("set statement_timeout = '60s'")
        yield connection


def value_of(connection: Connection, query: str, parameters: Any = None) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def refusal(connection: Connection, actor: str, statement: str, parameters: Any = None) -> tuple[str | None, ...]:
    """The SQLSTATE and the detail of the error that a statement raises."""
    with pytest.raises(psycopg.Error) as caught, request_by(connection, ACTORS[actor]):
        connection.execute(statement, parameters)
    return caught.value.sqlstate, caught.value.diag.message_detail


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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", INVISIBLE.values(), ids=INVISIBLE)
@pytest.mark.parametrize("actor", ["admin", "service"])
def test_names_that_do_not_read_as_they_are_are_refused(api: Connection, actor: str, name: str) -> None:
    for statement in (
        "select public.save_group(p_name => %s)",
        f"select public.save_group('{GROUP_ID}', %s)",
        "insert into public.user_groups (name) values (%s)",
        f"update public.user_groups set name = %s where id = '{GROUP_ID}'",
    ):
        assert refusal(api, actor, statement, [name]) == ("TL001", "name"), statement


def test_names_are_stored_composed(api: Connection) -> None:
    for statement in (
        "select public.save_group(p_name => %s) ->> 'name'",
        f"select public.save_group('{GROUP_ID}', %s) ->> 'name'",
        "insert into public.user_groups (name) values (%s) returning name",
        f"update public.user_groups set name = %s where id = '{GROUP_ID}' returning name",
    ):
        with request_by(api, ACTORS["admin"]):
            assert value_of(api, statement, ["Cafe\u0301"]) == "Caf\u00e9", statement


@pytest.mark.parametrize("blank", ["\u00a0", "\u2003", "\u3000", " "], ids=["no-break", "em", "ideographic", "plain"])
def test_names_have_no_blanks_at_their_ends(api: Connection, blank: str) -> None:
    with request_by(api, ACTORS["admin"]):
        stored = value_of(
            api, "insert into public.user_groups (name) values (%s) returning name", [f"{blank}New{blank}"]
        )
        assert stored == "New"
        assert value_of(api, "select public.find_groups(p_name => %s)", [f"new{blank}"])[0]["name"] == "New"


def test_a_limit_is_the_groups_for_ever_where_nothing_else_is_said(api: Connection) -> None:
    insert = f"insert into public.group_limits (group_id, kind, max) values ('{GROUP_ID}', 'audio', 1)"
    with request_by(api, ACTORS["admin"]):
        assert api.execute(f"{insert} returning period, scope").fetchone() == ("lifetime", "group")


def test_names_are_the_same_however_they_are_composed(api: Connection) -> None:
    with request_by(api, ACTORS["admin"]):
        api.execute("insert into public.user_groups (name) values ('Caf\u00e9')")
        assert refusal(api, "admin", "select public.save_group(p_name => %s)", ["CAFE\u0301"])[0] == "TL003"


@pytest.mark.parametrize("text", KEYS)
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


LIMIT_COLUMNS: Final = "(group_id, kind, period, scope, max)"
EDITS: Final = [
    # time zones: PostgreSQL itself would take the first
    ("update public.user_groups set timezone = 'Foo/Bar5' where name = 'Pro'", "TL001"),
    ("update public.user_groups set timezone = '' where name = 'Pro'", "TL001"),
    ("update public.user_groups set timezone = null where name = 'Pro'", "23502"),
    ("insert into public.user_groups (name, timezone) values ('New', 'UTC+3')", "TL001"),
    ("insert into public.user_groups (name, timezone) values ('New', 'posix/Europe/Paris')", "TL001"),
    # names
    ("insert into public.user_groups (name) values (' pRO ')", "23505"),
    ("update public.user_groups set name = 'team' where name = 'Pro'", "23505"),
    ("insert into public.user_groups (name) values ('   ')", "TL001"),
    ("insert into public.user_groups (name) values (repeat('x', 201))", "TL001"),
    ("insert into public.user_groups (name) values (null)", "TL001"),
    ("insert into public.user_groups (name, description) values ('New', repeat('x', 2001))", "TL001"),
    # one default
    ("insert into public.user_groups (name, is_default) values ('A', true), ('B', true)", "23505"),
    # limits
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{GROUP_ID}', 'Image', 'day', 'group', 1)", "23514"),
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{GROUP_ID}', 'audio', 'decade', 'group', 1)", "23514"),
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{GROUP_ID}', 'audio', 'day', 'team', 1)", "23514"),
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{GROUP_ID}', 'audio', 'day', 'group', -1)", "23514"),
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{GROUP_ID}', 'audio', 'day', 'group', 2e15)", "23514"),
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{GROUP_ID}', 'image', 'day', 'member', 1)", "23505"),
    (f"insert into public.group_limits {LIMIT_COLUMNS} values ('{USER_ID}', 'audio', 'day', 'group', 1)", "23503"),
    # what names the counters isn't theirs to choose
    (f"update public.group_limits set counter_id = default where group_id = '{GROUP_ID}'", "42501"),
    # members
    (f"insert into public.group_memberships (group_id, user_id) values ('{GROUP_ID}', '{GROUP_ID}')", "23503"),
    (f"insert into public.group_memberships (group_id, user_id) values ('{GROUP_ID}', '{USER_ID}')", "23505"),
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
        query = "update public.user_groups set priority = 1 where id = %s returning updated_at > created_at"
        assert value_of(api, query, [GROUP_ID])


# Abbreviations, which know no daylight saving, and names that are no places.
NO_PLACES: Final = ["CET", "EET", "MET", "WET", "cet", "localtime", "LOCALTIME", "Factory", "posixrules", "posix/UTC"]


@pytest.mark.parametrize("timezone", NO_PLACES)
def test_time_zones_that_are_no_places_are_refused(api: Connection, timezone: str) -> None:
    for statement in (
        "select public.save_group(p_name => 'New', p_timezone => %s)",
        f"select public.save_group('{GROUP_ID}', p_timezone => %s)",
        "insert into public.user_groups (name, timezone) values ('New', %s)",
        f"update public.user_groups set timezone = %s where id = '{GROUP_ID}'",
    ):
        assert refusal(api, "admin", statement, [timezone]) == ("TL001", "timezone"), statement


BAD_MOMENTS: Final = ["infinity", "-infinity", "0001-01-01", "1969-12-31", "9999-12-31", "10000-01-01"]


@pytest.mark.parametrize("moment", BAD_MOMENTS)
@pytest.mark.parametrize(
    ("table", "column"),
    [("user_groups", "created_at"), ("user_groups", "updated_at"), ("group_memberships", "joined_at")],
)
def test_moments_that_no_reader_knows_are_not_stored(api: Connection, table: str, column: str, moment: str) -> None:
    with api.transaction(force_rollback=True):
        # it would set updated_at right
        api.execute("alter table public.user_groups disable trigger user")
        for statement in (
            f"update public.{table} set {column} = %s where true",
            {
                "user_groups": f"insert into public.user_groups (name, {column}) values ('New', %s)",
                "group_memberships": "insert into public.group_memberships"
                f" values ('{OTHER_GROUP_ID}', '{USER_ID}', %s)",
            }[table],
        ):
            with pytest.raises(psycopg.errors.CheckViolation) as caught, api.transaction():
                api.execute(statement, [f"{moment} UTC" if moment[0].isdigit() else moment])
            assert caught.value.diag.constraint_name == f"{table}_{column}_check"


@pytest.mark.parametrize("moment", BAD_MOMENTS)
def test_usage_of_moments_that_no_reader_knows_is_not_recorded(api: Connection, moment: str) -> None:
    statement = "select public.record_generation(%s, 'image', p_created_at => %s)"
    assert refusal(api, "service", statement, [USER_ID, moment]) == ("TL001", "created_at")


METADATA_CALLS: Final = [
    "select public.track_generation(%s, 'image', p_metadata => %s)",
    "select public.reserve_generation(%s, 'image', p_metadata => %s)",
    "select public.record_generation(%s, 'image', p_metadata => %s)",
]
HUGE_NUMBERS: Final = {
    "too large for JavaScript": '{"a": 1e309}',
    "too small for JavaScript": '{"a": -1e309}',
    "deep inside": '{"a": [0, {"b": [[1e400]]}]}',
    "as long as numbers get": '{"a": 1e131071}',
    **{
        f"many of {number}": json.dumps({"a": "*"}).replace('"*"', f"[{', '.join([number] * count)}]")
        for number, count in {"1e131071": 2_000, "-1e131071": 2_000, "1e-16383": 2_000, "0e-16383": 2_600}.items()
    },
}
MOST_GROWTH: Final = 20_000
"""In kB. What these numbers are when they are written out is 260 MB, and 33 to 43 MB of the small ones."""


def memory_peak(connection: Connection) -> int:
    """The most memory that the server's process has ever had, in kB; always 0 where there is no /proc."""
    status = Path(f"/proc/{connection.info.backend_pid}/status")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) if status.exists() else 0


@pytest.mark.parametrize("metadata", HUGE_NUMBERS.values(), ids=HUGE_NUMBERS)
def test_numbers_that_grow_when_they_are_written_out_are_refused_before(api: Connection, metadata: str) -> None:
    for statement in METADATA_CALLS:
        with request_by(api, ACTORS["service"]):
            api.execute(statement, [USER_ID, "{}"])
        before = memory_peak(api)
        assert refusal(api, "service", statement, [USER_ID, metadata]) == ("TL001", "metadata")
        assert memory_peak(api) - before < MOST_GROWTH, statement


def test_a_batch_refuses_them_too(api: Connection) -> None:
    requests = [f'{{"user_id": "{USER_ID}", "kind": "image", "metadata": {data}}}' for data in HUGE_NUMBERS.values()]
    with request_by(api, ACTORS["service"]):
        answers = value_of(api, "select public.track_generations(%s)", [f"[{', '.join(requests)}]"])
    assert {(answer["reason"], answer["detail"]) for answer in answers} == {("refused", "metadata")}


def test_metadata_has_at_most_8192_bytes_of_text(api: Connection) -> None:
    around = len(json.dumps({"a": ""}))
    for statement in METADATA_CALLS:
        for text in ("x", "\u00e9", "\U0001f642"):
            fits = {"a": text * ((8192 - around) // len(text.encode()))}
            with request_by(api, ACTORS["service"]):
                assert value_of(api, statement, [USER_ID, json.dumps(fits)])["allowed"]
            too_long = {"a": fits["a"] + "x" * (8193 - around - len(fits["a"].encode()))}
            assert refusal(api, "service", statement, [USER_ID, json.dumps(too_long)]) == ("TL001", "metadata")


def test_metadata_may_have_any_number_of_javascripts(api: Connection) -> None:
    numbers = {"most": 1.7976931348623157e308, "least": -1.7976931348623157e308, "tiny": 5e-324, "whole": 2**63}
    with request_by(api, ACTORS["service"]):
        usage = value_of(api, METADATA_CALLS[0], [USER_ID, json.dumps(numbers)])
        stored = value_of(api, "select metadata from public.generation_usage where id = %s", [usage["usage_id"]])
    assert {name: float(number) for name, number in stored.items()} == {n: float(v) for n, v in numbers.items()}


def test_groups_that_an_admin_deletes_leave_their_ledger(api: Connection) -> None:
    with request_by(api, ACTORS["admin"]):
        count = "select count(*) from public.generation_usage"
        before = value_of(api, count)
        api.execute("delete from public.user_groups where true")
        assert value_of(api, "select count(*) from public.group_limits") == 0
        assert value_of(api, "select count(*) from public.group_memberships") == 0
        assert value_of(api, count) == before > 0
