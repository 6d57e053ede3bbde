"""The attack: whoever calls us brings types, functions, operators and tables of their own, named like built-in ones.

They lie in the caller's temporary schema, which PostgreSQL searches before all others for types and tables wherever it
isn't named. A function that runs as its owner would run the caller's code as its owner.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest
from tests.conftest import ROOT
from tests.sql.api import ACTORS, CALLS, request_by, seed
from tests.sql.test_security import FUNCTIONS, INSERTS, TABLES, UPDATES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Connect
    from tests.sql.api import Connection

    Sessions = dict[str, Connection]

WORDS: Final = set(re.findall(r"\w+", (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8")))
CLAUSE: Final = "pg_catalog, pg_temp"

# Not caught by "when others", so that nobody swallows it.
PWN: Final = """
create function pg_temp.pwn() returns pg_catalog.bool language plpgsql as $$
begin
  raise assert_failure using message = 'pwned by ' || current_user;
end
$$
"""
# Each query makes statements; a word is one that stands in our SQL.
TYPES: Final = """
select distinct format('create domain pg_temp.%%I as pg_catalog.%%I check (pg_temp.pwn())', n.name, t.typname)
from pg_type as t
cross join lateral (values (t.typname::text), (format_type(t.oid, null))) as n (name)
where t.typnamespace = 'pg_catalog'::regnamespace and t.typtype in ('b', 'r', 'm') and n.name = any(%(words)s)
"""
ARGUMENTS: Final = """
(
  select coalesce(string_agg(format('%%s.%%I', y.typnamespace::regnamespace, y.typname), ', ' order by a.place), '')
  from unnest(p.proargtypes::oid[]) with ordinality as a (type, place)
  inner join pg_type as y on y.oid = a.type
)
"""
BUILT_IN: Final = f"""
select format(
  'create function pg_temp.%%I(%%s) returns %%s pg_catalog.%%I language plpgsql as '
  '$$ begin perform pg_temp.pwn(); return%%s; end $$',
  p.proname, {ARGUMENTS}, case when p.proretset then 'setof' end, r.typname, case when not p.proretset then ' null' end
)
from pg_proc as p
inner join pg_type as r on r.oid = p.prorettype
where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f' and p.proname = any(%(words)s)
"""
OPERATORS: Final = """
select format('create function pg_temp.%%I(pg_catalog.%%I, pg_catalog.%%I) returns pg_catalog.%%I language plpgsql as '
  '$$ begin perform pg_temp.pwn(); return null; end $$;'
  'create operator pg_temp.%%s (function = pg_temp.%%I, leftarg = pg_catalog.%%I, rightarg = pg_catalog.%%I)',
  'operator_' || o.oid, l.typname, r.typname, a.typname, o.oprname, 'operator_' || o.oid, l.typname, r.typname)
from pg_operator as o
inner join pg_type as l on l.oid = o.oprleft
inner join pg_type as r on r.oid = o.oprright
inner join pg_type as a on a.oid = o.oprresult
where o.oprnamespace = 'pg_catalog'::regnamespace and l.typname = any(%(words)s) and r.typname = any(%(words)s)
"""
TABLES_AND_VIEWS: Final = """
select format('create temporary view %%I as select pg_temp.pwn() as pwned', c.relname)
from pg_class as c
where c.relkind in ('r', 'v', 'p') and c.relname = any(%(words)s)
  and c.relnamespace::regnamespace::text in ('public', 'tokenlimits', 'auth', 'pg_catalog')
group by c.relname
"""


@pytest.fixture(scope="module")
def database(new_database: Callable[..., Connect]) -> Connect:
    database = new_database()
    with database("postgres") as postgres:
        seed(postgres)
    return database


@pytest.fixture(scope="module")
def sessions(database: Connect) -> Iterator[Sessions]:
    """Connections of PostgREST's, by the role that has left its traps in them."""
    with database("authenticator") as by_users, database("authenticator") as by_workers:
        yield {"authenticated": trapped(database, by_users, "authenticated"),
               "service_role": trapped(database, by_workers, "service_role")}  # fmt: skip


def trapped(database: Connect, connection: Connection, role: str) -> Connection:
    """Leave everything in a connection's temporary schema that its role may make there."""
    with database("supabase_admin") as catalog:
        made = {
            what: [statement for (statement,) in catalog.execute(query, {"words": [*WORDS]})]
            for what, query in {
                "functions": BUILT_IN,
                "operators": OPERATORS,
                "views": TABLES_AND_VIEWS,
                "types": TYPES,
            }.items()
        }
    connection.execute(f"set role {role}")
    connection.execute(PWN)
    left = {what: sum(is_made(connection, statement) for statement in statements) for what, statements in made.items()}
    connection.execute("reset role")
    assert left["types"] == len(made["types"]) > 20
    assert left["views"] == len(made["views"]) > 10
    # not those of pseudo-types
    assert left["functions"] > 100
    assert left["operators"] > 100
    return connection


def is_made(connection: Connection, statement: str) -> bool:
    try:
        connection.execute(statement)
    except psycopg.Error:
        return False
    return True


def call_of(catalog: Connection, function: str) -> str:
    """A call of a public function whose parameter is a JSON object; it names no type that could be the caller's."""
    types = catalog.execute(
        f"""
        select a.name, format('%%s.%%I', y.typnamespace::regnamespace, y.typname)
        from pg_proc as p
        cross join lateral unnest(p.proargnames, p.proargtypes::oid[]) as a (name, type)
        inner join pg_type as y on y.oid = a.type
        where p.oid = 'public.{function}'::regproc
        """,
        [],
    ).fetchall()
    if not types:
        return f"select public.{function}() where %s::pg_catalog.json is not null"
    passed = ", ".join(f"{name} => body.{name}" for name, _ in types)
    columns = ", ".join(f"{name} {kind}" for name, kind in types)
    return f"select public.{function}({passed}) from json_to_record(%s::pg_catalog.json) as body ({columns})"


def attack(sessions: Sessions, actor: str, statement: str, parameters: Any = None) -> str | None:
    """The error that a statement ends with in a session that is full of traps."""
    connection = sessions[ACTORS[actor].role]
    try:
        with request_by(connection, ACTORS[actor]):
            connection.execute(statement, parameters)
    except psycopg.Error as error:
        return str(error).partition("\n")[0]
    return None


@pytest.mark.parametrize("function", CALLS)
def test_public_functions_run_nothing_of_their_callers(database: Connect, sessions: Sessions, function: str) -> None:
    with database("supabase_admin") as catalog:
        call = call_of(catalog, function)
    for actor in FUNCTIONS[function]:
        assert attack(sessions, actor, call, [json.dumps(CALLS[function])]) is None, actor


@pytest.mark.parametrize("actor", ["user", "pretender", "admin", "service"])
def test_private_functions_run_nothing_of_their_callers(database: Connect, sessions: Sessions, actor: str) -> None:
    with database("supabase_admin") as catalog:
        calls = catalog.execute(
            """
            select format('select tokenlimits.%%I(%%s)', p.proname, (
              select string_agg(format('null::%%s.%%I', y.typnamespace::regnamespace, y.typname), ', ' order by a.place)
              from unnest(p.proargtypes::oid[]) with ordinality as a (type, place)
              inner join pg_type as y on y.oid = a.type
            ))
            from pg_proc as p
            where p.pronamespace = 'tokenlimits'::regnamespace and has_function_privilege(%s, p.oid, 'execute')
            """,
            [ACTORS[actor].role],
        ).fetchall()
    assert len(calls) > 20
    for (call,) in calls:
        assert "pwned" not in (attack(sessions, actor, call) or ""), call


@pytest.mark.parametrize("table", TABLES)
def test_policies_and_triggers_run_nothing_of_their_callers(sessions: Sessions, table: str) -> None:
    for actor in ("user", "admin", "service"):
        for statement in (
            f"select from public.{table}",
            f"insert into public.{table} {INSERTS[table]}",
            f"update public.{table} set {UPDATES[table]} where true",
            f"delete from public.{table} where true",
        ):
            assert "pwned" not in (attack(sessions, actor, statement) or ""), (actor, statement)


@pytest.mark.parametrize("clause", ["''", "pg_catalog", "pg_catalog, public"])
@pytest.mark.parametrize(
    ("function", "actor"),
    [("my_generation_usage", "user"), ("group_usage", "admin"), ("track_generation", "service")],
)
def test_a_function_without_the_clause_is_found(
    database: Connect, sessions: Sessions, function: str, actor: str, clause: str
) -> None:
    with database("postgres") as postgres:
        row = postgres.execute("select pg_get_functiondef(%s::regproc)", [f"tokenlimits.{function}"]).fetchone()
        assert row is not None
        (definition,) = row
        ours = "SET search_path TO 'pg_catalog', 'pg_temp'"
        assert definition.count(ours) == 1
        call = call_of(postgres, function)
        try:
            postgres.execute(definition.replace(ours, f"set search_path = {clause}"))
            assert attack(sessions, actor, call, [json.dumps(CALLS[function])]) == "pwned by postgres"
        finally:
            postgres.execute(definition)


def test_every_function_has_the_clause(database: Connect) -> None:
    with database("supabase_admin") as catalog:
        found = catalog.execute(
            """
            select p.oid::regprocedure::text, p.proconfig
            from pg_proc as p
            where p.pronamespace::regnamespace::text in ('public', 'tokenlimits')
              and (p.proconfig @> array['search_path=' || %s]) is not true
            """,
            [CLAUSE],
        ).fetchall()
    assert found == []
