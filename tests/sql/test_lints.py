"""What linters say about the installed SQL.  Each is shown a planted fault too, so that silence means something."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

import psycopg
import pytest
from tests.conftest import ROOT
from tests.sql.api import ACTORS, CALLS, GROUP_ID, USER_ID, argument_types, call_sql, request_by, seed
from tests.sql.test_security import FUNCTIONS
from tests.support.node import supabase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Connect, DefaultGrants
    from tests.sql.api import Connection

ADVISORS: Final = ("--level=info", "--fail-on=none", "--output-format=json")
SOURCES: Final = sorted((ROOT / "sql" / "schema").glob("*.sql"))
MACROS: Final = sorted((ROOT / "sql" / "schema" / "macros").glob("*.sql"))
BUILT: Final = (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8")

# plpgsql_check knows of transition tables only what it is told.
PLPGSQL_CHECK: Final = """
select p.oid::regproc::text, f.level, f.sqlstate, f.message, f.detail, f.lineno
from pg_proc as p
inner join pg_language as l on l.oid = p.prolang and l.lanname = 'plpgsql'
left join (
  select tgfoid, min(tgrelid::oid) as relid, min(tgoldtable) as old_rows, min(tgnewtable) as new_rows
  from pg_trigger
  where not tgisinternal
  group by tgfoid
) as t on t.tgfoid = p.oid
cross join lateral extensions.plpgsql_check_function_tb(
  p.oid, coalesce(t.relid, 0), fatal_errors => false, all_warnings => true,
  oldtable => t.old_rows, newtable => t.new_rows
) as f
where p.pronamespace::regnamespace::text in ('public', 'tokenlimits')
"""
# What it says that is no fault: (function, SQLSTATE, what the message or its detail contain)
NO_FAULT: Final = [
    # a variable that begins as '{}' or '[]': the literal is text, and read as what it should be
    (".*", "42804", 'cast "text" value to'),
    # sum() of bigint is numeric, and a slot is a smallint
    (".*", "42804", 'cast "(numeric|integer)" value to'),
    # nulls in a row that becomes a composite
    (".*", "42804", 'cast "unknown" value to'),
    # it has another one besides, which tells them apart
    (r"tokenlimits\.usage_under_key", "00000", 'composite OUT variable "live"'),
    # they go round until they return
    (r"tokenlimits\.((track|reserve|record|extend)_generation|settle|sweep)", "2F005", "without RETURN"),
    # it locks
    (r"tokenlimits\.lock_expired", "00000", "should be STABLE"),
    # a batch reads them, and has the same lines
    (r"tokenlimits\.move_usage", "00000", 'never read variable "v_mov(ed|ing)"'),
]
# Splinter's 0028 and 0029, for every role that a request may come as but the server's own.
CALLABLE_DEFINERS: Final = """
select r.rolname, p.oid::regproc::text
from pg_proc as p
inner join pg_roles as r on pg_has_role('authenticator', r.oid, 'member')
  and r.rolname not in ('authenticator', 'service_role')
where p.prosecdef and p.pronamespace::regnamespace::text in ('public', 'graphql_public')
  and has_function_privilege(r.oid, p.oid, 'execute')
order by 1, 2
"""
PLANTED_TABLE: Final = "create table public.planted (id bigint primary key); grant select on public.planted to anon"
PLANTED_FUNCTION: Final = """
create function public.planted(p_id bigint) returns bigint language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
  v_id bigint := p_id;
begin
  for v_id in select id from public.nowhere loop
    return v_id;
  end loop;
end
$$;
grant execute on function public.planted(bigint) to anon, authenticated
"""
PLANTED_SHADOW: Final = """
create function public.shadowed(p_id bigint) returns bigint language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
  p_id bigint := 1;
begin
  return p_id;
end
$$
"""


@pytest.fixture(scope="module")
def database(new_database: Callable[..., Connect]) -> Connect:
    return new_database()


@pytest.fixture
def connection(database: Connect) -> Iterator[Connection]:
    """The superuser; what a test does is rolled back."""
    with database("supabase_admin") as connection, connection.transaction(force_rollback=True):
        yield connection


def has_plpgsql_check(connection: Connection) -> bool:
    query = "select from pg_available_extensions where name = 'plpgsql_check'"
    return connection.execute(query).rowcount == 1


def checked(connection: Connection) -> dict[str, list[str]]:
    """What plpgsql_check finds, by function."""
    connection.execute("create extension plpgsql_check schema extensions")
    found: dict[str, list[str]] = {}
    for function, level, state, message, detail, line in connection.execute(PLPGSQL_CHECK):
        text = f"{message}: {detail}" if detail else message
        if not any(re.fullmatch(f, function) and s == state and re.search(m, text) for f, s, m in NO_FAULT):
            found.setdefault(function, []).append(f"line {line}: {level} {state} {text}")
    return found


def compiled(connection: Connection) -> dict[str, list[str]]:
    """What PostgreSQL's own compiler finds with all its extra checks, by function."""
    connection.execute("set local plpgsql.extra_errors = 'all'")
    functions = connection.execute(
        "select oid::regproc::text, pg_get_functiondef(oid) from pg_proc"
        " where pronamespace::regnamespace::text in ('public', 'tokenlimits')"
    ).fetchall()
    found: dict[str, list[str]] = {}
    for function, definition in functions:
        try:
            with connection.transaction():
                connection.execute(definition)
        except psycopg.Error as error:
            found[function] = [str(error)]
    return found


def test_function_bodies_have_no_faults(connection: Connection) -> None:
    assert compiled(connection) == {}
    if has_plpgsql_check(connection):
        assert checked(connection) == {}


def test_faults_in_function_bodies_are_found(connection: Connection) -> None:
    connection.execute(PLANTED_SHADOW)
    assert compiled(connection).keys() == {"shadowed"}
    connection.execute("drop function public.shadowed")
    connection.execute(PLANTED_FUNCTION)
    if has_plpgsql_check(connection):
        assert any("public.nowhere" in fault for fault in checked(connection)["planted"])


@pytest.mark.parametrize("function", CALLS)
def test_functions_run_with_every_extra_check(database: Connect, function: str) -> None:
    actor = ACTORS["service" if "service" in FUNCTIONS[function] else "user"]
    with database("supabase_admin") as connection, connection.transaction(force_rollback=True):
        seed(connection)
        connection.execute("set local plpgsql.extra_errors = 'all'")
        with request_by(connection, actor):
            call = call_sql(function, argument_types(connection)[function], CALLS[function])
            assert connection.execute(call, [json.dumps(CALLS[function])]).rowcount == 1


def test_nobody_may_call_what_runs_as_its_owner(connection: Connection) -> None:
    assert connection.execute(CALLABLE_DEFINERS).fetchall() == []
    connection.execute(PLANTED_FUNCTION)
    assert connection.execute(CALLABLE_DEFINERS).fetchall() == [("anon", "planted"), ("authenticated", "planted")]


@pytest.mark.slow
def test_supabases_advisors_have_no_complaint(
    new_database: Callable[..., Connect], default_grants: DefaultGrants, tmp_path: Path
) -> None:
    with new_database(default_grants)("postgres") as connection:
        connection.execute(PLANTED_TABLE)
        url = f"postgresql://postgres@{connection.info.host}:{connection.info.port}/{connection.info.dbname}"
    done = supabase(tmp_path, "db", "advisors", *ADVISORS, f"--remote={url}?sslmode=disable")
    findings = {(found["name"], found["metadata"]["name"]) for found in json.loads(done.stdout)["results"]}
    # nothing has used an index yet
    assert {found for found in findings if found[0] != "unused_index"} == {("rls_disabled_in_public", "planted")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_open_with_their_purpose_and_invariants(path: Path) -> None:
    head = re.match(r"(-- .+\n)+--\n-- Invariants\n(--   \* .+\n(--     .+\n)*)+", path.read_text(encoding="utf-8"))
    assert head is not None


@pytest.mark.parametrize("path", MACROS, ids=lambda path: path.name)
def test_macros_open_with_what_they_are_for(path: Path) -> None:
    assert re.match(r"\{#\n[A-Z][^{}]+\.\n#\}\n\n", path.read_text(encoding="utf-8"))


def test_code_is_in_lower_case_also_in_function_bodies() -> None:
    code = re.sub(r"--[^\n]*|'(?:[^']|'')*'|collate \"C\"", "", BUILT)
    assert re.findall(r"\w*[A-Z]\w*", code) == []


def test_nothing_of_the_templates_is_left_in_what_is_built() -> None:
    assert re.findall(r"\{\{|\{%|\{#|#\}|%\}", BUILT) == []
    assert [line for line in BUILT.splitlines() if line != line.rstrip()] == []


def test_every_sqlstate_of_ours_is_documented_once() -> None:
    documented = re.findall(r"^--   (TL\d{3})  ", BUILT, flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert {"TL001"} < set(re.findall(r"'(TL\d{3})'", BUILT)) <= set(documented)


# What a rule is known by, and in how many places of the templates it may stand. Elsewhere it is taken from there.
RULES: Final = {
    "a row of the ledger is written": (r"insert into public\.generation_usage", 1),
    "a counter is moved; repaired; loses old parts; gets an override": (r"update tokenlimits\.counters", 4),
    "a counter is opened, by a call and by an edit": (r"insert into tokenlimits\.counters", 2),
    "the rollup moves by one": (r"update tokenlimits\.usage_rollup", 1),
    "the rollup moves by many; is repaired; comes back": (r"insert into tokenlimits\.usage_rollup", 3),
    "a hold is noted; comes back": (r"insert into tokenlimits\.holds", 2),
    "a hold is forgotten, settled and swept": (r"delete from tokenlimits\.holds", 2),
    "a hold expires": (r"set status = 'expired'", 1),
    "a kind": (r"\[a-z0-9_\]\{0,31\}", 1),
    "a name": (r"\\u202e", 1),
    "a cost": (r"\b1000000000\b", 1),
    "a key": (r"between 1 and 255", 1),
    "a moment": (r"9999-01-01", 1),
    "the size of metadata, and what is said about it": (r"\b8192\b", 2),
    "the most of a limit": (r"1000000000000000", 1),
    "the periods": (r"'minute', 'hour'", 1),
    "room": (r" <= \{\{ max \}\}", 1),
    "a fingerprint": (r"\bmd5\(", 1),
    "the id of a usage": (r"to_hex\(", 1),
    "the beginning of a bucket": (r"date_bin\('15 minutes'", 1),
    "the locks on groups": (r"\b1953459052\b", 1),
    "the locks on slots": (r"\b1936486260\b", 1),
    "the order in which groups pay": (r"priority desc", 1),
    "a verdict": (r"v_verdict\.reason <> 'limit_exceeded'", 1),
    "an answer": (r"\)::tokenlimits\.generation_answer", 1),
    "a limit of an answer": (r"\)::tokenlimits\.limit_answer", 1),
    "where names are looked up": (r"set search_path", 1),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_stands_once(rule: str) -> None:
    pattern, most = RULES[rule]
    places = [
        f"{path.name}:{number}"
        for path in SOURCES + MACROS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert 1 <= len(places) <= most, places


@pytest.fixture
def counted(database: Connect) -> Iterator[Connection]:
    """A worker's transaction in which the functions that run are counted."""
    with database("supabase_admin") as connection, connection.transaction(force_rollback=True):
        seed(connection)
        connection.execute("set local track_functions = 'all'")
        with request_by(connection, ACTORS["service"]):
            yield connection


def functions_run(connection: Connection, call: str) -> tuple[bool, set[str]]:
    """Whether a call is allowed, and which functions it runs."""
    count = "select schemaname || '.' || funcname, calls from pg_stat_xact_user_functions"
    before = dict(connection.execute(count).fetchall())
    answer = connection.execute(f"select (public.{call} ->> 'allowed')::boolean").fetchone()
    assert answer is not None
    after = connection.execute(count).fetchall()
    return answer[0], {name for name, calls in after if calls > before.get(name, 0)}


@pytest.mark.parametrize(
    ("call", "allowed", "most"),
    [
        ("track_generation(%s, 'image', 1)", True, 7),
        ("track_generation(%s, 'image', 1, gen_random_uuid()::text, %s, '{\"job\": 1}')", True, 7),
        ("track_generation(%s, 'image', 99)", False, 6),
        ("track_generation(%s, 'image', 99, gen_random_uuid()::text)", False, 6),
        ("track_generation(%s, 'video', 1)", False, 6),
        ("reserve_generation(%s, 'image', 1)", True, 7),
        ("reserve_generation(%s, 'image', 99)", False, 6),
        ("check_generation(%s, 'image', 1)", True, 6),
        ("record_generation(%s, 'image', 1)", True, 14),
    ],
)
def test_a_call_runs_few_functions(counted: Connection, call: str, allowed: bool, most: int) -> None:
    call = call.replace("%s", f"'{USER_ID}'", 1).replace("%s", f"'{GROUP_ID}'")
    seen, run = functions_run(counted, call)
    assert seen is allowed
    assert f"public.{call.partition('(')[0]}" in run
    assert len(run) <= most, run
