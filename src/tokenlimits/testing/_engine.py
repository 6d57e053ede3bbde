"""The fake's whole server: it answers calls one at a time, and fails when a test tells it to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from threading import RLock
from typing import Any

from tokenlimits._refusals import refusal
from tokenlimits.sql_files import SCHEMA_VERSION

from ._admin import AdminFunctions
from ._holds import HoldFunctions
from ._ledger import Json
from ._reports import ReportFunctions

GROUP_NAME = "fake"


class Engine(HoldFunctions, AdminFunctions, ReportFunctions):
    """The methods with parameters `p_…` are the SQL functions; `lock` is held while one runs.

    It starts with a default group that has these limits or, without limits, allows every kind.
    """

    def __init__(self, limits: list[Json] | None, users: Mapping[str, str | None] | None) -> None:
        super().__init__(users)
        # Tests call a fake from many threads, and each call must be one transaction, as in the database: without the
        # lock, two calls could both find room for the last unit. The clock and `tracked` take it too.
        self.lock = RLock()
        self.failures: deque[Exception] = deque()
        self.signed_in: str | None = None
        group = self.save_group(p_name=GROUP_NAME, p_is_default=True, p_limits=limits or [])
        self._group(group["id"]).unlimited = limits is None

    def answer(self, function: str, params: Mapping[str, Any]) -> Any:
        """Call a function as PostgREST would."""
        # the failures inside as well, so that `fail(…, times=2)` hits two calls and no more, whatever runs at once
        with self.lock:
            if self.failures:
                raise self.failures.popleft()
            return getattr(self, function)(**params)

    def __repr__(self) -> str:
        return f"{len(self.ledger)} generations in memory"

    def my_generation_usage(self) -> list[Json]:
        """List every limit that binds the user who is signed in."""
        if self.signed_in is None:
            hint = "Send the user's access token."
            raise refusal(403, {"code": "42501", "message": "no user is signed in", "hint": hint})
        return self.user_generation_usage(self.signed_in)

    def tokenlimits_version(self) -> Json:
        """Return the version of the SQL that this behaves like."""
        return {"version": SCHEMA_VERSION}
