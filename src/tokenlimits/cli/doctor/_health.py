"""Checks of tokenlimits_health: whether a generation can be tracked now, who is in the way, and how full it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from ._expected import REAPPLY
from ._findings import Finding, Findings, error, listed, ok, quoted, warning

# a lock that nobody waits for is a worry only when a batch or an import would have ended
_LONG = 60
_LONG_FOR_OTHERS = 5
_NEARLY_FULL = 0.8
_WAITED = ("55P03", "57014")
READ_ONLY = "25006"
_END_ALL = (
    "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() "
    "and pid <> pg_backend_pid()"
)


class Trial(BaseModel):
    """What came of a generation that was tracked and rolled back."""

    outcome: Literal["allowed", "denied", "failed", "untried"]
    reason: str | None
    code: str | None = None

    @property
    def waited(self) -> bool:
        """Whether it waited for a lock in vain."""
        return self.code in _WAITED


class Holder(BaseModel):
    """A session that has a lock that calls need; of other roles' sessions, no more may be known than who they are."""

    pid: int
    role: str | None
    state: str | None
    seconds: int | None
    query: str | None
    blocks: int

    def is_long(self) -> bool:
        """Whether it has had its locks for too long."""
        return (self.seconds or 0) >= (_LONG_FOR_OTHERS if self.blocks else _LONG)

    def __str__(self) -> str:
        """Describe it."""
        who = ", ".join(part for part in (self.role, self.state) if part)
        age = "" if self.seconds is None else f" for {self.seconds:,} s"
        query = "" if self.query is None else f": {self.query}"
        return f"session {self.pid} ({who}){age}{query}"


class Health(BaseModel):
    """The answer of tokenlimits_health."""

    trial: Trial
    standby: bool
    read_only: bool
    read_only_by_default: bool
    database: str
    holders: list[Holder]
    connections: int
    most_connections: int
    bytes: int


def check_health(health: Health) -> Findings:
    """Check the facts."""
    yield _writes(health)
    yield _locks(health)
    yield _connections(health.connections, health.most_connections)
    yield ok("size", f"The database takes {health.bytes / 2**20:,.0f} MB.")


def _writes(health: Health) -> Finding:
    trial = health.trial
    if health.standby:
        return error("writes", "This is a standby, such as a read replica.", "Set SUPABASE_URL to the primary's URL.")
    if health.read_only or health.read_only_by_default:
        return read_only(health.database)
    if trial.waited:
        says = "A generation could not be tracked: it waited too long for a lock."
        return error("writes", says, "End the sessions that hold locks, below, then run `tokenlimits doctor` again.")
    if trial.outcome == "failed":
        return error("writes", f"A generation could not be tracked: {trial.reason} ({trial.code}).", REAPPLY)
    words = {
        "allowed": "A generation was tracked, and rolled back.",
        "denied": f"The latest callers are denied ({trial.reason}), so nothing was written.",
        "untried": "The database takes writes. Nobody may generate anything yet, so nothing was tried.",
    }
    return ok("writes", words[trial.outcome])


def read_only(database: str | None) -> Finding:
    """Say that the database takes no writes, and what to do about it."""
    name = quoted(database) if database else "postgres"
    reset = f"begin read write; alter database {name} reset default_transaction_read_only; commit"
    remedy = (
        "If its disk is full, enlarge it; Supabase then lifts this by itself. A setting of the database is lifted by "
        f"`{reset}`. Then end the sessions that still have it, which connect again: `{_END_ALL}`"
    )
    return error("writes", "The database is read-only, as when its disk is full.", remedy)


def _locks(health: Health) -> Finding:
    holders = [holder for holder in health.holders if health.trial.waited or holder.is_long()]
    if not holders and health.trial.waited:
        remedy = "Look for prepared transactions, which hold locks for ever: `select * from pg_prepared_xacts`"
        return error("locks", "Something holds a lock that calls need, and no session of it is to be seen.", remedy)
    if not holders:
        return ok("locks", "No session has held locks for long that calls need.")
    says = f"Calls need locks that are held by {listed([str(holder) for holder in holders])}."
    make = error if health.trial.waited or any(holder.blocks for holder in holders) else warning
    return make("locks", says, _end(holders))


def _end(holders: Sequence[Holder]) -> str:
    statements = ", ".join(f"`select pg_terminate_backend({holder.pid})`" for holder in holders)
    return f"If they need not go on, end them, which rolls back what they did: {statements}"


def _connections(used: int, most: int) -> Finding:
    says = f"{used:,} of {most:,} connections are in use."
    if used < _NEARLY_FULL * most:
        return ok("connections", says)
    remedy = (
        "Connect through the pooler, or close what is idle: `select usename, application_name, state, count(*) from "
        "pg_stat_activity group by 1, 2, 3 order by 4 desc`"
    )
    return warning("connections", says, remedy)
