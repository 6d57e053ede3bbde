"""Groups, users and a clock, each made in one line."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from tests.sql.semantics.api import Api, Json
from tests.support import clock


def limit(
    maximum: int | None, kind: str = "image", period: str = "lifetime", scope: str = "group", **more: Any
) -> Json:
    return {"kind": kind, "period": period, "scope": scope, "max": maximum, **more}


class World:
    """What a test is about: `owner` at the SQL editor, and `api` with the service key."""

    def __init__(self, owner: Api, api: Api) -> None:
        self.owner = owner
        self.api = api
        self._groups = 0

    def user(self, *groups: UUID) -> UUID:
        user_id = uuid4()
        self.owner.add_user(user_id)
        for group_id in groups:
            assert self.api.add_member(group_id, user_id)
        return user_id

    def group(self, *limits: Json, **fields: Any) -> UUID:
        self._groups += 1
        return self.api.save_group(**{"name": f"Group {self._groups}", "limits": list(limits)} | fields)["id"]

    def at(self, instant: str) -> datetime:
        """Stop the clock."""
        at = datetime.fromisoformat(instant)
        clock.freeze(self.owner.connection, at)
        return at

    def recorded(self) -> list[tuple[Any, ...]]:
        return self.owner.connection.execute(
            "select user_id, kind, cost, status from public.generation_usage order by created_at, ctid"
        ).fetchall()

    def used(self, user: UUID, period: str = "lifetime", scope: str = "group") -> int:
        [found] = [
            x for x in self.api.user_usage(user) if (x["kind"], x["period"], x["scope"]) == ("image", period, scope)
        ]
        return found["used"]
