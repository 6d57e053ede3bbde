"""Requests as PostgREST makes them: who may call, and a good call of every public function."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

Connection = psycopg.Connection[tuple[Any, ...]]

USER_ID: Final = "11111111-1111-4111-8111-111111111111"
OTHER_ID: Final = "22222222-2222-4222-8222-222222222222"
ADMIN_ID: Final = "33333333-3333-4333-8333-333333333333"
GROUP_ID: Final = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
OTHER_GROUP_ID: Final = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
HOLD_ID: Final = "00000000-0000-4000-8000-0000000000a1"
USAGE_ID: Final = "00000000-0000-4000-8000-0000000000a2"


@dataclass(frozen=True)
class Actor:
    """Whose request it is: the role that PostgREST takes on, and the claims of their token."""

    role: str
    claims: dict[str, Any] = field(default_factory=dict)


ACTORS: Final = {
    "anon": Actor("anon", {"role": "anon"}),
    "user": Actor("authenticated", {"sub": USER_ID, "app_metadata": {"provider": "email"}}),
    # what users write about themselves
    "pretender": Actor("authenticated", {"sub": USER_ID, "role": "admin", "user_metadata": {"role": "admin"}}),
    "admin": Actor("authenticated", {"sub": ADMIN_ID, "app_metadata": {"role": "admin"}}),
    "service": Actor("service_role", {"role": "service_role"}),
}

CALLS: Final[dict[str, dict[str, Any]]] = {
    "tokenlimits_version": {},
    "track_generation": {
        "p_user_id": USER_ID,
        "p_kind": "image",
        "p_cost": 1,
        "p_idempotency_key": "key",
        "p_group_id": GROUP_ID,
        "p_metadata": {"job": 1},
    },
    "track_generations": {
        "p_requests": [
            {
                "user_id": USER_ID,
                "kind": "image",
                "cost": 1,
                "idempotency_key": "key",
                "group_id": GROUP_ID,
                "metadata": {"job": 1},
            }
        ],
        "p_max_wait": 1000,
    },
    "check_generation": {"p_user_id": USER_ID, "p_kind": "image", "p_cost": 1, "p_group_id": GROUP_ID},
    "record_generation": {
        "p_user_id": USER_ID,
        "p_kind": "image",
        "p_cost": 1,
        "p_created_at": "2026-01-02T03:04:05Z",
        "p_idempotency_key": "key",
        "p_group_id": GROUP_ID,
        "p_metadata": {"job": 1},
    },
    "reserve_generation": {
        "p_user_id": USER_ID,
        "p_kind": "image",
        "p_cost": 1,
        "p_ttl": 60,
        "p_idempotency_key": "key",
        "p_group_id": GROUP_ID,
        "p_metadata": {"job": 1},
    },
    "extend_generation": {"p_usage_id": HOLD_ID, "p_ttl": 7200},
    "commit_generation": {"p_usage_id": HOLD_ID, "p_cost": 1, "p_overage": "charge"},
    "release_generation": {"p_usage_id": HOLD_ID},
    "refund_generation": {"p_usage_id": USAGE_ID},
    "reconcile_usage": {"p_group_id": GROUP_ID, "p_since": "2026-01-01T00:00:00Z"},
    "user_generation_usage": {"p_user_id": USER_ID},
    "my_generation_usage": {},
    "save_group": {
        "p_group_id": GROUP_ID,
        "p_name": "Pro",
        "p_description": "For professionals",
        "p_priority": 1,
        "p_timezone": "UTC",
        "p_is_default": False,
        "p_limits": [{"kind": "image", "period": "day", "scope": "member", "max": 5}],
        "p_id": None,
        "p_updated_at": None,
        "p_anchor_at": "2026-01-01T00:00:00Z",
        "p_no_anchor": False,
        "p_parent_id": None,
        "p_no_parent": False,
        "p_is_spread": None,
    },
    "set_group_limit": {
        "p_group_id": GROUP_ID,
        "p_limit": {"kind": "audio", "period": "week", "scope": "group", "max": None},
    },
    "remove_group_limit": {
        "p_group_id": GROUP_ID,
        "p_kind": "image",
        "p_period": "day",
        "p_scope": "member",
        "p_starts": "calendar",
    },
    "set_limit_override": {
        "p_group_id": GROUP_ID,
        "p_kind": "image",
        "p_max": 20,
        "p_user_id": USER_ID,
        "p_period": "day",
        "p_starts": "calendar",
        "p_until": "2100-01-01T00:00:00Z",
        "p_child_id": None,
    },
    "remove_limit_override": {
        "p_group_id": GROUP_ID,
        "p_kind": "image",
        "p_user_id": USER_ID,
        "p_period": "day",
        "p_starts": "calendar",
        "p_child_id": None,
    },
    "find_limit_overrides": {
        "p_group_id": GROUP_ID,
        "p_user_id": USER_ID,
        "p_after": None,
        "p_page_size": 10,
        "p_child_id": None,
    },
    "delete_group": {"p_group_id": GROUP_ID},
    "find_groups": {
        "p_group_id": GROUP_ID,
        "p_name": "pro",
        "p_search": "p",
        "p_after": "a",
        "p_page_size": 10,
        "p_parent_id": None,
    },
    "add_group_members": {
        "p_group_id": GROUP_ID,
        "p_user_ids": [USER_ID, ADMIN_ID],
        "p_anchor_at": "2026-01-01T00:00:00Z",
    },
    "set_member_anchor": {"p_group_id": GROUP_ID, "p_user_id": USER_ID, "p_anchor_at": "2026-01-31T09:00:00Z"},
    "remove_group_members": {"p_group_id": GROUP_ID, "p_user_ids": [USER_ID]},
    "move_group_member": {"p_user_id": USER_ID, "p_from": GROUP_ID, "p_to": OTHER_GROUP_ID},
    "group_members": {"p_group_id": GROUP_ID, "p_after": None, "p_page_size": 10, "p_search": "user@"},
    "reset_group_usage": {"p_group_id": GROUP_ID, "p_kind": "image", "p_user_id": USER_ID},
    "find_users": {"p_email": "user@", "p_page_size": 10},
    "find_users_by_email": {"p_emails": ["user@example.com"]},
    "export_usage": {
        "p_group_id": GROUP_ID,
        "p_user_id": USER_ID,
        "p_kind": "image",
        "p_since": "2026-01-01T00:00:00Z",
        "p_until": None,
        "p_after": None,
        "p_page_size": 10,
    },
    "export_history": {
        "p_group_id": GROUP_ID,
        "p_kind": "image",
        "p_bucket": "day",
        "p_since": "2026-01-01T00:00:00Z",
        "p_until": None,
        "p_after": None,
        "p_page_size": 10,
    },
    "limit_pressure": {"p_group_id": GROUP_ID, "p_at_least": 90, "p_count": 10},
    "top_members": {
        "p_group_id": GROUP_ID,
        "p_kind": "image",
        "p_since": "2026-01-01T00:00:00Z",
        "p_until": None,
        "p_count": 10,
    },
    "usage_drift": {"p_group_id": GROUP_ID, "p_since": "2026-01-01T00:00:00Z"},
    "tokenlimits_diagnosis": {},
    "tokenlimits_health": {},
    "group_usage": {"p_group_id": GROUP_ID, "p_after": None, "p_page_size": 10},
    "generation_history": {
        "p_group_id": GROUP_ID,
        "p_kind": "image",
        "p_bucket": "day",
        "p_since": "2026-01-01T00:00:00Z",
        "p_until": None,
    },
}
"""Every public function with all its arguments, in a world that `seed` has made."""


def seed(connection: Connection) -> None:
    """Two groups; user and other are members of the first, other of both; each has used something, user holds some."""
    connection.execute(
        """
        insert into auth.users (id, email) values (%(user)s, 'user@example.com'), (%(other)s, 'other@example.com'),
          (%(admin)s, 'admin@example.com');
        insert into public.user_groups (id, name) values (%(group)s, 'Pro'), (%(other_group)s, 'Team');
        insert into public.group_limits (group_id, kind, period, scope, max) values
          (%(group)s, 'image', 'lifetime', 'group', 100), (%(group)s, 'image', 'day', 'member', 10),
          (%(other_group)s, 'image', 'month', 'group', 1000);
        insert into public.group_memberships (group_id, user_id) values
          (%(group)s, %(user)s), (%(group)s, %(other)s), (%(other_group)s, %(other)s);
        insert into public.limit_overrides (group_id, kind, period, scope, subject, max) values
          (%(other_group)s, 'image', 'month', 'group', %(other_group)s, 2000);
        select public.track_generation(%(user)s, 'image', 2, p_group_id => %(group)s);
        select public.track_generation(%(other)s, 'image', 3, p_group_id => %(group)s);
        select public.track_generation(%(other)s, 'image', 4, 'other''s key', %(other_group)s);
        select public.track_generation(%(user)s, 'image', 1, 'used', %(group)s);
        select public.reserve_generation(%(user)s, 'image', 1, 3600, 'held', %(group)s);
        update tokenlimits.holds set usage_id = %(hold)s;
        update public.generation_usage set id = %(hold)s where idempotency_key = 'held';
        update public.generation_usage set id = %(usage)s where idempotency_key = 'used';
        """
        % {
            name: f"'{value}'"
            for name, value in {
                "user": USER_ID,
                "other": OTHER_ID,
                "admin": ADMIN_ID,
                "group": GROUP_ID,
                "other_group": OTHER_GROUP_ID,
                "hold": HOLD_ID,
                "usage": USAGE_ID,
            }.items()
        }
    )


@contextmanager
def request_by(connection: Connection, actor: Actor) -> Iterator[None]:
    """One request's transaction, as PostgREST opens it; nothing of it stays."""
    with connection.transaction(force_rollback=True):
        connection.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            [actor.role, json.dumps(actor.claims)],
        )
        yield


def outcome(connection: Connection, actor: Actor, statement: str, parameters: Any = None) -> int | str | None:
    """How many rows a statement reads or changes for somebody, or the SQLSTATE with which it is refused."""
    try:
        with request_by(connection, actor):
            return connection.execute(statement, parameters).rowcount
    except psycopg.Error as error:
        return error.sqlstate


def argument_types(connection: Connection) -> dict[str, dict[str, str]]:
    """The arguments of every public function and their types."""
    rows = connection.execute(
        """
        select p.proname, coalesce(array_agg(a.name order by a.place) filter (where a.name is not null), '{}'),
          coalesce(array_agg(format_type(a.type, null) order by a.place) filter (where a.name is not null), '{}')
        from pg_proc as p
        left join lateral unnest(p.proargnames, p.proargtypes::oid[]) with ordinality as a (name, type, place) on true
        where p.pronamespace = 'public'::regnamespace and p.prorettype <> 'trigger'::regtype
        group by p.oid
        """
    )
    return {name: dict(zip(names, types, strict=True)) for name, names, types in rows}


def call_sql(function: str, types: dict[str, str], arguments: dict[str, Any]) -> str:
    """The call that PostgREST makes of a JSON body, which is the statement's only parameter."""
    if not arguments:
        return f"select public.{function}() where %s::json is not null"
    passed = ", ".join(f"{name} => body.{name}" for name in arguments)
    columns = ", ".join(f"{name} {types[name]}" for name in arguments)
    return f"select public.{function}({passed}) from json_to_record(%s::json) as body ({columns})"
