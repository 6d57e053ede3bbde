"""The SQL functions as Python methods, with the `UUID`s and datetimes of their JSON."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from psycopg import sql
from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg

Json = dict[str, Any]

_UUIDS = {"id", "usage_id", "group_id", "user_id"}
_INSTANTS = {"reset_at", "expires_at", "bucket", "joined_at", "created_at", "updated_at"}


def parse(name: str, value: Any) -> Any:
    """Make `UUID`s and datetimes of what JSON has as text."""
    if isinstance(value, dict):
        return {key: parse(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [parse(name, item) for item in value]
    if value is None or not (isinstance(value, str) and name in _UUIDS | _INSTANTS):
        return value
    return UUID(value) if name in _UUIDS else datetime.fromisoformat(value)


class Api:
    """All that the tests call, on one connection in autocommit mode."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function in `public`; what is None is left to its default."""
        given = {key: _adapt(value) for key, value in arguments.items() if value is not None}
        query = sql.SQL("select public.{}({})").format(
            sql.Identifier(function),
            sql.SQL(", ").join(
                sql.SQL("{} => {}").format(sql.Identifier(f"p_{key}"), sql.Placeholder(key)) for key in given
            ),
        )
        return parse("", self.one(query, given))

    def execute(self, query: Any, arguments: Any = None) -> int:
        """Run a statement, as somebody at the SQL editor does; tell how many rows it touched."""
        return self.connection.execute(query, arguments).rowcount

    def one(self, query: Any, arguments: Any = None) -> Any:
        """Run a query that answers one value."""
        row = self.connection.execute(query, arguments).fetchone()
        assert row is not None
        return row[0]

    # for workers

    def track(
        self,
        user_id: UUID,
        kind: str,
        cost: int = 1,
        idempotency_key: str | None = None,
        group_id: UUID | None = None,
    ) -> Json:
        return self.call(
            "track_generation",
            user_id=user_id,
            kind=kind,
            cost=cost,
            idempotency_key=idempotency_key,
            group_id=group_id,
        )

    def track_many(self, requests: Sequence[Sequence[Any]], max_wait: int | None = None) -> list[Json]:
        """Track what are arguments of `track`, all in one call."""
        names = ("user_id", "kind", "cost", "idempotency_key", "group_id")
        given = [
            {
                name: str(value) if isinstance(value, UUID) else value
                for name, value in zip(names, request, strict=False)
            }
            for request in requests
        ]
        return self.call("track_generations", requests=given, max_wait=max_wait)

    def check(self, user_id: UUID, kind: str, cost: int = 1, group_id: UUID | None = None) -> Json:
        return self.call("check_generation", user_id=user_id, kind=kind, cost=cost, group_id=group_id)

    def record(
        self,
        user_id: UUID,
        kind: str,
        cost: int = 1,
        created_at: datetime | None = None,
        idempotency_key: str | None = None,
        group_id: UUID | None = None,
    ) -> Json:
        return self.call(
            "record_generation",
            user_id=user_id,
            kind=kind,
            cost=cost,
            created_at=created_at,
            idempotency_key=idempotency_key,
            group_id=group_id,
        )

    def reserve(
        self,
        user_id: UUID,
        kind: str,
        cost: int = 1,
        ttl: int = 3600,
        idempotency_key: str | None = None,
        group_id: UUID | None = None,
    ) -> Json:
        return self.call(
            "reserve_generation",
            user_id=user_id,
            kind=kind,
            cost=cost,
            ttl=ttl,
            idempotency_key=idempotency_key,
            group_id=group_id,
        )

    def commit(self, usage_id: UUID, cost: int | None = None, overage: str | None = None) -> Json:
        return self.call("commit_generation", usage_id=usage_id, cost=cost, overage=overage)

    def extend(self, usage_id: UUID, ttl: int) -> Json:
        return self.call("extend_generation", usage_id=usage_id, ttl=ttl)

    def release(self, usage_id: UUID) -> Json:
        return self.call("release_generation", usage_id=usage_id)

    def refund(self, usage_id: UUID) -> Json:
        return self.call("refund_generation", usage_id=usage_id)

    # for admins

    def save_group(self, group_id: UUID | None = None, **fields: Any) -> Json:
        return self.call("save_group", group_id=group_id, **fields)

    def group(self, group_id: UUID) -> Json:
        found = self.call("find_groups", group_id=group_id)
        return found[0]

    def set_limit(self, group_id: UUID, kind: str, period: str, scope: str, maximum: int | None, **more: Any) -> None:
        limit = {"kind": kind, "period": period, "scope": scope, "max": maximum, **more}
        self.call("set_group_limit", group_id=group_id, limit=limit)

    def remove_limit(self, group_id: UUID, kind: str, period: str, scope: str) -> None:
        self.call("remove_group_limit", group_id=group_id, kind=kind, period=period, scope=scope)

    def delete_group(self, group_id: UUID) -> None:
        self.call("delete_group", group_id=group_id)

    def add_member(self, group_id: UUID, user_id: UUID) -> bool:
        return self.call("add_group_members", group_id=group_id, user_ids=(user_id,))["added"] == 1

    def remove_member(self, group_id: UUID, user_id: UUID) -> bool:
        return self.call("remove_group_members", group_id=group_id, user_ids=(user_id,))["removed"] == 1

    def move_member(self, user_id: UUID, from_: UUID, to: UUID) -> bool:
        return self.call("move_group_member", user_id=user_id, **{"from": from_}, to=to)["moved"]

    def reset(self, group_id: UUID, kind: str | None = None, user_id: UUID | None = None) -> None:
        self.call("reset_group_usage", group_id=group_id, kind=kind, user_id=user_id)

    def reconcile(self, group_id: UUID, since: datetime | None = None) -> Json:
        return self.call("reconcile_usage", group_id=group_id, since=since)

    def tidy(self) -> int:
        """Sweep, as a job does, which runs as the owner."""
        return self.one("select tokenlimits.tidy()")

    # what people look at

    def user_usage(self, user_id: UUID) -> list[Json]:
        return self.call("user_generation_usage", user_id=user_id)

    def group_usage(self, group_id: UUID) -> Json:
        return self.call("group_usage", group_id=group_id)[0]

    def history(self, group_id: UUID | None, bucket: str) -> list[Json]:
        since = datetime.fromisoformat("2000-01-01T00:00:00+00:00")
        return self.call("generation_history", group_id=group_id, bucket=bucket, since=since)

    # auth.users is the project's

    def add_user(self, user_id: UUID) -> None:
        self.execute("insert into auth.users (id, email) values (%s, %s)", [user_id, f"{user_id}@example.com"])

    def delete_user(self, user_id: UUID) -> None:
        self.execute("delete from auth.users where id = %s", [user_id])


def _adapt(value: Any) -> Any:
    """Send tuples as arrays, lists and dicts as JSON."""
    if isinstance(value, tuple):
        return list(value)
    return Jsonb(value) if isinstance(value, dict | list) else value
