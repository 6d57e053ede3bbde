"""Checks of the database's own statistics: bloat and dead rows, which slow calls down unnoticed."""

from __future__ import annotations

import re

from pydantic import BaseModel

from ._findings import Finding, Findings, error, listed, ok, warning

# Random keys leave an index at most twice as large as its rows need. 32 MB, the least waste worth a command, are an
# eighth of what Supabase's smallest instance keeps in memory.
_BLOATED = 3
_WORTH_REBUILDING = 32 * 2**20
# Autovacuum starts at a fifth of the rows, so more dead than live rows remain only where it can't remove them.
_MANY_DEAD = 100_000
_OPEN_FOR_LONG = (
    "A transaction that has been open for long keeps them; find it with `select pid, xact_start, query from "
    "pg_stat_activity where xact_start is not null order by xact_start`. Once it has ended, run:"
)


class TableStorage(BaseModel):
    """A table's live rows, and its dead ones: deleted or overwritten, and not yet vacuumed."""

    name: str
    live: int
    dead: int


class IndexStorage(BaseModel):
    """An index's size, and the size that it would have if it were rebuilt now (None: unknown)."""

    name: str
    valid: bool
    bytes: int
    needed: int | None

    @property
    def is_bloated(self) -> bool:
        """Whether it is worth rebuilding."""
        if self.needed is None:
            return False
        return self.bytes > _BLOATED * self.needed and self.bytes - self.needed > _WORTH_REBUILDING


class Storage(BaseModel):
    """What tokenlimits_diagnosis says about storage."""

    tables: list[TableStorage]
    indexes: list[IndexStorage]


def check_storage(storage: Storage) -> Findings:
    """Check indexes and dead rows."""
    invalid = [index.name for index in storage.indexes if not index.valid]
    if invalid:
        remedy = _each([_repair(name) for name in invalid])
        yield error("indexes", f"Not valid: {listed(invalid)}. Writes update them, but no call can use them.", remedy)
    yield _bloat([index for index in storage.indexes if index.is_bloated])
    yield _dead_rows([table for table in storage.tables if table.dead > max(table.live, _MANY_DEAD)])


def _repair(name: str) -> str:
    """Drop what an interrupted `reindex concurrently` has left behind; rebuild any other index."""
    left_behind = re.search(r"_cc(new|old)\d*$", name) is not None
    return f"{'drop' if left_behind else 'reindex'} index concurrently {name}"


def _bloat(bloated: list[IndexStorage]) -> Finding:
    if not bloated:
        return ok("bloat", "No index is much larger than it needs to be.")
    sizes = [f"{index.name} ({_megabytes(index.bytes)}, needs {_megabytes(index.needed or 0)})" for index in bloated]
    remedy = _each([f"reindex index concurrently {index.name}" for index in bloated])
    return warning("bloat", f"Calls read more than they need to: {listed(sizes)}.", remedy)


def _dead_rows(tables: list[TableStorage]) -> Finding:
    if not tables:
        return ok("dead rows", "Autovacuum keeps up.")
    counts = [f"{table.name} ({table.dead:,}, and {table.live:,} live)" for table in tables]
    vacuum = _each([f"vacuum {table.name}" for table in tables])
    return warning("dead rows", f"Calls have to skip many: {listed(counts)}.", f"{_OPEN_FOR_LONG} {vacuum}")


def _each(statements: list[str]) -> str:
    # neither `reindex concurrently` nor `vacuum` can run in a transaction, so the editor can't run several at once
    one_by_one = " (one at a time, in the SQL editor)" if len(statements) > 1 else ""
    return ", ".join(f"`{statement}`" for statement in statements) + one_by_one


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"
