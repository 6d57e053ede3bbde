"""Who may do what: every cell of the table, on projects whose default privileges grant everything and nothing."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.conftest import ROOT
from tests.sql.api import (
    ACTORS,
    CALLS,
    GROUP_ID,
    OTHER_GROUP_ID,
    OTHER_ID,
    USAGE_ID,
    USER_ID,
    argument_types,
    call_sql,
    outcome,
    request_by,
    seed,
)
from tests.support.cells import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Connect, DefaultGrants
    from tests.sql.api import Connection

DENIED: Final = "42501"

# What reading, inserting, updating, deleting and truncating come to, in a world that `seed` made: how many rows, or the
# SQLSTATE.  Row-level security shows a user nothing to read or change, and refuses what they insert.
NOTHING: Final = (0, DENIED, 0, 0, DENIED)
CLOSED: Final = (DENIED, DENIED, DENIED, DENIED, DENIED)
ACTIONS: Final = ("select", "insert", "update", "delete", "truncate")
TABLES: Final = {
    "user_groups": {
        "anon": CLOSED,
        "user": NOTHING,
        "pretender": NOTHING,
        "admin": (2, 1, 2, 2, DENIED),
        "service": (2, 1, 2, 2, DENIED),
    },
    "group_limits": {
        "anon": CLOSED,
        "user": NOTHING,
        "pretender": NOTHING,
        "admin": (3, 1, 3, 3, DENIED),
        "service": (3, 1, 3, 3, DENIED),
    },
    # a membership is moved by making another
    "group_memberships": {
        "anon": CLOSED,
        "user": (0, DENIED, DENIED, 0, DENIED),
        "pretender": (0, DENIED, DENIED, 0, DENIED),
        "admin": (3, 1, DENIED, 3, DENIED),
        "service": (3, 1, DENIED, 3, DENIED),
    },
    "limit_overrides": {
        "anon": CLOSED,
        "user": NOTHING,
        "pretender": NOTHING,
        "admin": (1, 1, 1, 1, DENIED),
        "service": (1, 1, 1, 1, DENIED),
    },
    "generation_usage": {
        "anon": CLOSED,
        "user": (0, DENIED, DENIED, DENIED, DENIED),
        "pretender": (0, DENIED, DENIED, DENIED, DENIED),
        "admin": (5, DENIED, DENIED, DENIED, DENIED),
        "service": (5, DENIED, DENIED, DENIED, DENIED),
    },
}
INSERTS: Final = {
    "user_groups": "(name) values ('Another')",
    "group_limits": f"(group_id, kind, period, scope, max) values ('{GROUP_ID}', 'audio', 'day', 'group', 1)",
    "group_memberships": f"(group_id, user_id) values ('{OTHER_GROUP_ID}', '{USER_ID}')",
    "limit_overrides": "(group_id, kind, period, scope, subject, max)"
    f" values ('{GROUP_ID}', 'image', 'day', 'member', '{USER_ID}', 20)",
    "generation_usage": f"(id, group_id, user_id, kind, cost, status, created_at) values ('{USER_ID}', '{GROUP_ID}',"
    f" '{USER_ID}', 'image', 0, 'released', now())",
}
UPDATES: Final = {
    "user_groups": "description = 'changed'",
    "group_limits": "max = 7",
    "group_memberships": "user_id = user_id",
    "limit_overrides": "max = 7",
    "generation_usage": "cost = 0",
}

# Which columns those who may write a table may set. Ids, counters and moments are ours.
ABOUT_A_GROUP: Final = {"name", "description", "priority", "timezone", "is_default", "anchor_at", "parent_id"}
ABOUT_A_LIMIT: Final = {"kind", "period", "starts", "scope", "mode", "max", "counts"}
SETTABLE: Final[dict[str, dict[str, set[str]]]] = {
    # what is at home with its users stays there
    "user_groups": {"insert": ABOUT_A_GROUP | {"is_spread"}, "update": ABOUT_A_GROUP},
    "group_limits": {"insert": ABOUT_A_LIMIT | {"group_id"}, "update": ABOUT_A_LIMIT},
    "group_memberships": {"insert": {"group_id", "user_id"}, "update": set()},
    # an override is of one limit and one subject: another one is another override
    "limit_overrides": {
        "insert": {"group_id", "kind", "period", "starts", "scope", "subject", "max", "until"},
        "update": {"max", "until"},
    },
    "generation_usage": {"insert": set(), "update": set()},
}
# A row that may be inserted, as far as it must be given.
ROWS: Final = {
    "user_groups": {"name": "'Another'"},
    "group_limits": {
        "group_id": f"'{GROUP_ID}'",
        "kind": "'audio'",
        "period": "'day'",
        "scope": "'group'",
        "max": "1",
    },
    "group_memberships": {"group_id": f"'{OTHER_GROUP_ID}'", "user_id": f"'{USER_ID}'"},
    "limit_overrides": {
        "group_id": f"'{GROUP_ID}'",
        "kind": "'image'",
        "period": "'day'",
        "scope": "'member'",
        "subject": f"'{USER_ID}'",
    },
    "generation_usage": {},
}

WORKERS: Final = {"service"}
ADMINS: Final = {"admin", "service"}
SIGNED_IN: Final = {"user", "pretender", "admin"}
FUNCTIONS: Final = {
    "tokenlimits_version": SIGNED_IN | WORKERS,
    "my_generation_usage": SIGNED_IN,
    **dict.fromkeys(
        (
            "track_generation",
            "track_generations",
            "check_generation",
            "record_generation",
            "reserve_generation",
            "extend_generation",
            "commit_generation",
            "release_generation",
            "user_generation_usage",
            "tokenlimits_health",
        ),
        WORKERS,
    ),
    **dict.fromkeys(
        (
            "save_group",
            "set_group_limit",
            "remove_group_limit",
            "set_limit_override",
            "remove_limit_override",
            "find_limit_overrides",
            "delete_group",
            "find_groups",
            "add_group_members",
            "set_member_anchor",
            "remove_group_members",
            "move_group_member",
            "group_members",
            "reset_group_usage",
            "find_users",
            "find_users_by_email",
            "export_usage",
            "export_history",
            "limit_pressure",
            "top_members",
            "usage_drift",
            "tokenlimits_diagnosis",
            "group_usage",
            "generation_history",
            "refund_generation",
            "reconcile_usage",
        ),
        ADMINS,
    ),
}

# Private functions that a role needs, because what it may call runs as it.  Nobody has more, anon and public nothing.
PUBLIC_AS_CALLERS: Final = {
    "tokenlimits_version",
    "save_group",
    "set_group_limit",
    "remove_group_limit",
    "remove_limit_override",
    "delete_group",
    "find_groups",
    "remove_group_members",
    "move_group_member",
}
"""They do all they do as whoever calls them; the others have a private half of their own name."""
HELPERS: Final = {
    "is_admin",
    "require_admin",
    "refuse",
    "refuse_transaction",
    "require_group",
    "group_json",
    "check_limits",
    "insert_group",
    "replace_limits",
    "whole_limit",
    "refuse_several",
    "require_one_subject",
    "refuse_parent",
    "quiet_members",
}


def private_to(*actors: str) -> set[str]:
    return HELPERS | {name for name, who in FUNCTIONS.items() if who & {*actors}} - PUBLIC_AS_CALLERS


PRIVATE: Final = {"authenticated": private_to("user", "admin"), "service_role": private_to("service")}
HARMLESS: Final = {"is_admin", "my_generation_usage"}
"""Definer or not, what a signed-in user may call and be answered: about nobody but themselves."""


@pytest.fixture(scope="module")
def api(new_database: Callable[..., Connect], default_grants: DefaultGrants) -> Iterator[Connection]:
    """PostgREST's own connection."""
    database = new_database(default_grants)
    with database("postgres") as postgres:
        seed(postgres)
    with database("authenticator") as connection:
        yield connection


@pytest.fixture(scope="module")
def catalog(new_database: Callable[..., Connect], default_grants: DefaultGrants) -> Iterator[Connection]:
    with new_database(default_grants)("supabase_admin") as connection:
        yield connection


def rows(connection: Connection, query: str) -> list[tuple[Any, ...]]:
    return connection.execute(query).fetchall()


def public_functions() -> list[str]:
    """What can be called: a trigger can't."""
    source = (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8")
    found = re.findall(
        r"^create or replace function public\.(\w+)\([^)]*\)\s*returns (\w+)", source, flags=re.MULTILINE
    )
    return [name for name, returned in found if returned != "trigger"]


def test_tables_are_open_to_whom_they_should_be(api: Connection) -> None:
    found = {
        (table, actor, action): outcome(api, ACTORS[actor], statement)
        for table in TABLES
        for action, statement in {
            "select": f"select from public.{table}",
            "insert": f"insert into public.{table} {INSERTS[table]}",
            "update": f"update public.{table} set {UPDATES[table]} where true",
            "delete": f"delete from public.{table} where true",
            "truncate": f"truncate public.{table} cascade",
        }.items()
        for actor in ACTORS
    }
    expected = {
        (table, actor, action): cell
        for table, by_actor in TABLES.items()
        for actor, cells in by_actor.items()
        for action, cell in zip(ACTIONS, cells, strict=True)
    }
    assert_same(found, expected)


def columns_of(catalog: Connection, table: str) -> set[str]:
    query = "select attname from pg_attribute where attrelid = 'public.{}'::regclass and attnum > 0"
    return {name for (name,) in rows(catalog, query.format(table))}


def test_catalog_knows_who_may_set_which_column(catalog: Connection) -> None:
    found = {
        (table, action, role): {
            name
            for (name,) in rows(
                catalog,
                f"""
                select attname from pg_attribute
                where attrelid = 'public.{table}'::regclass and attnum > 0
                  and has_column_privilege('{role}', attrelid, attnum, '{action}')
                """,
            )
        }
        for table in TABLES
        for action in ("insert", "update")
        for role in ("anon", "authenticated", "service_role")
    }
    expected = {
        (table, action, role): set[str]() if role == "anon" else settable
        for table, actions in SETTABLE.items()
        for action, settable in actions.items()
        for role in ("anon", "authenticated", "service_role")
    }
    assert_same(found, expected)


def test_nobody_sets_what_is_ours_to_set(api: Connection, catalog: Connection) -> None:
    found, expected = dict[tuple[str, ...], object](), dict[tuple[str, ...], object]()
    for table, settable in SETTABLE.items():
        for column in columns_of(catalog, table):
            row = {column: "default", **ROWS[table]}
            insert = f"insert into public.{table} ({', '.join(row)}) values ({', '.join(row.values())})"
            # a value of the column's own changes nothing, but needs the right to
            value = "default" if column in ("counter_id", "is_plain") else column
            update = f"update public.{table} set {column} = {value} where true"
            for actor in ACTORS:
                for action, statement in {"insert": insert, "update": update}.items():
                    seen = outcome(api, ACTORS[actor], statement)
                    found[table, column, actor, action] = "allowed" if isinstance(seen, int) else seen
                # updates by users find no row
                for action, may in {"insert": actor in ADMINS, "update": actor != "anon"}.items():
                    allowed = may and column in settable[action]
                    expected[table, column, actor, action] = "allowed" if allowed else DENIED
    assert_same(found, expected)


REFUSED_ROWS: Final = (
    "(name, timezone) values ('New', 'Foo/Bar5')",
    "(name, timezone) values ('New', 'Europe/Paris')",
    "(name, timezone) values ('New', repeat('x', 1000000))",
    "(name) values ('')",
    "(name) values (null)",
    "(name) values (U&'\\202E')",
    "(name, description) values ('New', repeat('x', 2001))",
    "(name) values ('Pro') on conflict (lower(name)) do update set name = 'New'",
)


def test_inserts_by_users_are_refused_before_anything_else(api: Connection) -> None:
    found = {
        (row, actor): outcome(api, ACTORS[actor], f"insert into public.user_groups {row}")
        for row in REFUSED_ROWS
        for actor in ("user", "pretender")
    }
    assert_same(found, dict.fromkeys(found, DENIED))


# What reads it now fails: "select" from it divides by zero.
TRAPPED_ZONES: Final = """
create or replace view pg_catalog.pg_timezone_names as
select z.name, z.abbrev, z.utc_offset, z.is_dst
from pg_catalog.pg_timezone_names() as z
where 1 / (random() < 0)::integer = 1
"""


def test_inserts_by_users_cost_no_look_at_the_time_zones(catalog: Connection) -> None:
    insert = "insert into public.user_groups (name, timezone) values ('New', 'Europe/Paris')"
    with catalog.transaction(force_rollback=True):
        catalog.execute("set local allow_system_table_mods = on")
        catalog.execute(TRAPPED_ZONES)
        seen = {name: outcome(catalog, actor, insert) for name, actor in ACTORS.items()}
    assert seen == {"anon": DENIED, "user": DENIED, "pretender": DENIED, "admin": "22012", "service": "22012"}


def test_functions_are_open_to_whom_they_should_be(api: Connection) -> None:
    found, types = dict[tuple[str, ...], object](), argument_types(api)
    for function in public_functions():
        call = call_sql(function, types[function], CALLS[function])
        for actor in ACTORS:
            found[function, actor] = outcome(api, ACTORS[actor], call, [json.dumps(CALLS[function])])
    expected = {
        (function, actor): 1 if actor in actors else DENIED
        for function, actors in FUNCTIONS.items()
        for actor in ACTORS
    }
    assert_same(found, expected)


def test_private_tables_are_open_to_nobody(api: Connection, catalog: Connection) -> None:
    tables = rows(catalog, "select oid::regclass::text from pg_class where relnamespace = 'tokenlimits'::regnamespace"
                           " and relkind in ('r', 'p', 'v', 'm', 'S')")  # fmt: skip
    assert tables
    found = {
        (statement, actor): outcome(api, ACTORS[actor], statement)
        for (table,) in tables
        for statement in (f"select from {table}", f"insert into {table} default values", f"delete from {table}")
        for actor in ACTORS
    }
    assert_same(found, dict.fromkeys(found, DENIED))


def test_my_generation_usage_is_about_me_alone(api: Connection) -> None:
    def mine(claims: dict[str, Any]) -> Any:
        with request_by(api, type(ACTORS["user"])("authenticated", claims)):
            row = api.execute("select public.my_generation_usage()").fetchone()
        assert row is not None
        return {(entry["group"]["name"], entry["period"]): entry["used"] for entry in row[0]}

    assert mine({"sub": USER_ID}) == {("Pro", "lifetime"): 7, ("Pro", "day"): 4}
    assert mine({"sub": OTHER_ID}) == {("Pro", "lifetime"): 7, ("Pro", "day"): 3, ("Team", "month"): 4}
    assert mine({"sub": "44444444-4444-4444-8444-444444444444"}) == {}
    # an admin sees their own here too, and nobody's without a user in the token
    assert mine(ACTORS["admin"].claims) == {}
    nobody = type(ACTORS["user"])("authenticated", {"app_metadata": {"role": "admin"}})
    assert outcome(api, nobody, "select public.my_generation_usage()") == DENIED


def test_private_functions_refuse_users_themselves(api: Connection, catalog: Connection) -> None:
    functions = rows(
        catalog,
        """
        select p.proname, format('select %s(%s)', p.oid::regproc, (
          select string_agg(format('null::%s', format_type(a.type, null)), ', ' order by a.place)
          from unnest(p.proargtypes::oid[]) with ordinality as a (type, place)
        ))
        from pg_proc as p
        where p.pronamespace = 'tokenlimits'::regnamespace and p.prosecdef
          and has_function_privilege('authenticated', p.oid, 'execute')
        """,
    )
    assert {name for name, _ in functions} >= {"my_generation_usage", "add_group_members"}
    calls = [(name, call, actor) for name, call in functions for actor in ("user", "pretender")]
    assert_same(
        {(call, actor): outcome(api, ACTORS[actor], call) for _, call, actor in calls},
        {(call, actor): 1 if name in HARMLESS else DENIED for name, call, actor in calls},
    )


ABSENT: Final = "99999999-9999-4999-8999-999999999999"

# What somebody may try in order to learn whether a thing is there: %s is its id or its name.
PROBES: Final = {
    "insert into public.user_groups (name) values (%s)": ("Pro", "Absent"),
    "insert into public.user_groups (name) values (%s) on conflict do nothing": ("Pro", "Absent"),
    "insert into public.user_groups (id, name) values (%s, 'New')": (GROUP_ID, ABSENT),
    "insert into public.user_groups (id, name) values (%s, 'N') on conflict (id) do update set name = 'N'": (
        GROUP_ID,
        ABSENT,
    ),
    "insert into public.group_limits (group_id, kind, period, scope) values (%s, 'image', 'day', 'member')": (
        GROUP_ID,
        ABSENT,
    ),
    f"insert into public.group_memberships (group_id, user_id) values ('{GROUP_ID}', %s)": (OTHER_ID, ABSENT),
    f"insert into public.group_memberships (group_id, user_id) values (%s, '{USER_ID}') on conflict do nothing": (
        GROUP_ID,
        ABSENT,
    ),
    "update public.user_groups set name = 'x' where id = %s": (GROUP_ID, ABSENT),
    "delete from public.group_memberships where user_id = %s": (OTHER_ID, ABSENT),
    "select from public.generation_usage where idempotency_key = %s": ("other's key", "absent"),
    "select 1 / (cost - cost) from public.generation_usage where user_id = %s": (OTHER_ID, ABSENT),
    "select tokenlimits.require_group(%s)": (GROUP_ID, ABSENT),
    "select public.refund_generation(%s)": (USAGE_ID, ABSENT),
    "select public.group_usage(%s)": (GROUP_ID, ABSENT),
    "select public.delete_group(%s)": (GROUP_ID, ABSENT),
    "select public.find_users(%s)": ("other@example.com", "absent@example.com"),
}


def test_nobody_learns_what_is_there(api: Connection) -> None:
    there, absent = (
        {
            (probe, actor): outcome(api, ACTORS[actor], probe, [values[which]])
            for probe, values in PROBES.items()
            for actor in ("anon", "user", "pretender")
        }
        for which in (0, 1)
    )
    assert_same(there, absent)
    assert {*there.values()} <= {0, DENIED, "TL002"}


def test_privileges_are_exactly_those_that_are_granted(catalog: Connection) -> None:
    granted = rows(
        catalog,
        """
        select o.name, coalesce(r.rolname, 'public'), array_agg(distinct lower(a.privilege_type))
        from (
          select 'public.' || relname as name, relacl as acl, relowner as owner, relnamespace as namespace,
            case relkind when 'S' then 's'::"char" else 'r'::"char" end as type
          from pg_class
          where relkind in ('r', 'p', 'v', 'm', 'S')
          union all
          select oid::regproc::text, proacl, proowner, pronamespace, 'f'::"char" from pg_proc
          union all
          select 'public.' || c.relname || '.' || a.attname, a.attacl, c.relowner, c.relnamespace, 'c'::"char"
          from pg_attribute as a
          inner join pg_class as c on c.oid = a.attrelid
          where a.attnum > 0
          union all
          select nspname, nspacl, nspowner, oid, 'n'::"char" from pg_namespace where nspname = 'tokenlimits'
        ) as o
        cross join lateral aclexplode(coalesce(o.acl, acldefault(o.type, o.owner))) as a
        left join pg_roles as r on r.oid = a.grantee
        where o.namespace::regnamespace::text in ('public', 'tokenlimits') and a.grantee <> o.owner
        group by 1, 2
        """,
    )
    roles = {"user": "authenticated", "pretender": "authenticated", "admin": "authenticated", "service": "service_role"}
    editing = ("delete", "select")
    expected = {("tokenlimits", role, "usage") for role in PRIVATE}
    for role, names in PRIVATE.items():
        expected |= {(f"tokenlimits.{name}", role, "execute") for name in names}
        expected |= {(f"public.{table}", role, *editing) for table in TABLES if table != "generation_usage"}
        expected |= {("public.generation_usage", role, "select")}
        for table, actions in SETTABLE.items():
            for column in actions["insert"] | actions["update"]:
                settable = sorted(action for action in actions if column in actions[action])
                expected |= {(f"public.{table}.{column}", role, *settable)}
    for function, actors in FUNCTIONS.items():
        expected |= {(function, roles[actor], "execute") for actor in actors}
    assert {(name, role, *sorted(privileges)) for name, role, privileges in granted} == expected


def test_one_permissive_policy_per_table_action_and_role(catalog: Connection) -> None:
    found = rows(catalog, "select tablename, lower(cmd), roles::text[], permissive from pg_policies"
                          " where schemaname = 'public'")  # fmt: skip
    expected = [
        (table, action, ["authenticated"], "PERMISSIVE")
        for table in TABLES
        for action in ("select", "insert", "update", "delete")
        if table != "generation_usage" or action == "select"
        if table != "group_memberships" or action != "update"
    ]
    assert sorted(found) == sorted(expected)


OURS: Final = "pronamespace::regnamespace::text in ('public', 'tokenlimits')"

# Each query finds what should not be there.
FAULTS: Final = {
    "row-level security is on for every public table": """
        select oid::regclass from pg_class
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relrowsecurity
    """,
    "no public function runs as its owner": """
        select oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace and prosecdef
    """,
    "no public view": """
        select oid::regclass from pg_class where relnamespace = 'public'::regnamespace and relkind in ('v', 'm')
    """,
    "no overloads": f"select proname from pg_proc where {OURS} group by pronamespace, proname having count(*) > 1",
    "public arguments are called p_ something": """
        select oid::regprocedure from pg_proc
        where pronamespace = 'public'::regnamespace
          and exists (select from unnest(proargnames) as a (name) where a.name not like 'p\\_%')
    """,
    "public functions answer JSON": """
        select oid::regprocedure from pg_proc
        where pronamespace = 'public'::regnamespace and prorettype <> 'trigger'::regtype
          and (prorettype not in ('json'::regtype, 'jsonb'::regtype) or proretset)
    """,
    "every function has a comment, with our mark": f"""
        select oid::regprocedure from pg_proc
        where {OURS} and (obj_description(oid, 'pg_proc') like 'tokenlimits: %') is not true
    """,
    "every table has a comment, with our mark": """
        select oid::regclass from pg_class
        where relnamespace::regnamespace::text in ('public', 'tokenlimits') and relkind in ('r', 'p', 'v', 'm')
          and (obj_description(oid, 'pg_class') like 'tokenlimits: %') is not true
    """,
    "every foreign key has an index that begins with it": """
        select conname from pg_constraint as c
        where c.contype = 'f' and c.connamespace::regnamespace::text in ('public', 'tokenlimits') and not exists (
          select from pg_index as i
          where i.indrelid = c.conrelid and (i.indkey::int2[])[0:cardinality(c.conkey) - 1] @> c.conkey
        )
    """,
    "times know their zone, and counts are bigint": """
        select attrelid::regclass, attname, format_type(atttypid, atttypmod) from pg_attribute
        where attrelid in (
          select oid from pg_class
          where relnamespace::regnamespace::text in ('public', 'tokenlimits') and relkind in ('r', 'p')
        ) and attnum > 0 and (atttypid in ('timestamp'::regtype, 'timetz'::regtype, 'real'::regtype, 'float8'::regtype)
          or atttypid in ('int4'::regtype, 'int2'::regtype)
          and attname not in ('priority', 'slot', 'distance', 'level'))
    """,
    "what Auth says is read once per statement": rf"""
        select oid::regprocedure from pg_proc
        where {OURS} and regexp_replace(prosrc, '\(select auth\.\w+\(\)\)', '', 'g') ~ 'auth\.\w+\('
    """,
    "policies ask who it is once per statement": r"""
        select tablename, policyname from pg_policies
        where schemaname = 'public' and regexp_replace(
          coalesce(qual, '') || coalesce(with_check, ''), '\( SELECT [\w.]+\(\) AS \w+\)', '', 'g'
        ) ~ '\w\('
    """,
}


def test_catalog(catalog: Connection) -> None:
    assert_same({(promise,): rows(catalog, query) for promise, query in FAULTS.items()}, {(p,): [] for p in FAULTS})


def test_constraints_have_names_of_their_own(catalog: Connection) -> None:
    source = (ROOT / "sql" / "tokenlimits.sql").read_text(encoding="utf-8")
    named = set(re.findall(r"\bconstraint (\w+)\s+(?:primary key|foreign key|unique|check|exclude)", source))
    found = rows(
        catalog,
        """
        select conname from pg_constraint
        where connamespace::regnamespace::text in ('public', 'tokenlimits') and contype in ('p', 'f', 'u', 'c', 'x')
        """,
    )
    assert {name for (name,) in found} == named
