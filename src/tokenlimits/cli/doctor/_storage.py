"""What the doctor makes of the database's own statistics: what makes calls slower that nobody sees."""

from __future__ import annotations

import re

from pydantic import BaseModel

from ._findings import Finding, Findings, error, listed, ok, warning

# Random keys leave an index at most twice as large as its rows need; what is wasted must also be worth a command: 32 MB
# are an eighth of what the smallest instance of Supabase keeps in memory.
_BLOATED = 3
_WORTH_MENDING = 32 * 2**20
# Autovacuum begins at a fifth of the rows: more dead than live ones stay only where it can't clear them away.
_MANY_DEAD = 100_000
_OPEN_FOR_LONG = (
    "What has been open for long, and so keeps them? select pid, xact_start, query from pg_stat_activity "
    "where xact_start is not null order by xact_start. Without it they go by themselves, or at once:"
)


class TableStorage(BaseModel):
    """A table's rows, and those that were deleted or overwritten and not yet cleared away."""

    name: str
    live: int
    dead: int


class IndexStorage(BaseModel):
    """An index's size, and the size that it would have if it were built now (None: not known)."""

    name: str
    valid: bool
    bytes: int
    needed: int | None

    @property
    def is_bloated(self) -> bool:
        """Whether it's worth while to build it again."""
        if self.needed is None:
            return False
        return self.bytes > _BLOATED * self.needed and self.bytes - self.needed > _WORTH_MENDING


class Storage(BaseModel):
    """What tokenlimits_diagnosis says of storage."""

    tables: list[TableStorage]
    indexes: list[IndexStorage]


def check_storage(storage: Storage) -> Findings:
    """Judge indexes and dead rows."""
    invalid = [index.name for index in storage.indexes if not index.valid]
    if invalid:
        remedy = _each([_mend(name) for name in invalid])
        yield error("indexes", f"Not valid: {listed(invalid)}. Writes keep them up, and no call can use them.", remedy)
    yield _bloat([index for index in storage.indexes if index.is_bloated])
    yield _dead_rows([table for table in storage.tables if table.dead > max(table.live, _MANY_DEAD)])


def _mend(name: str) -> str:
    """What `reindex concurrently` left behind when it was interrupted is dropped; others are built again."""
    left_behind = re.search(r"_cc(new|old)\d*$", name) is not None
    return f"{'drop' if left_behind else 'reindex'} index concurrently {name}"


def _bloat(bloated: list[IndexStorage]) -> Finding:
    if not bloated:
        return ok("bloat", "No index is much larger than its rows need.")
    sizes = [f"{index.name} ({_megabytes(index.bytes)}, needs {_megabytes(index.needed or 0)})" for index in bloated]
    remedy = _each([f"reindex index concurrently {index.name}" for index in bloated])
    return warning("bloat", f"Calls read more than they need to: {listed(sizes)}.", remedy)


def _dead_rows(tables: list[TableStorage]) -> Finding:
    if not tables:
        return ok("dead rows", "They are cleared away.")
    counts = [f"{table.name} ({table.dead:,}, and {table.live:,} live)" for table in tables]
    vacuum = _each([f"vacuum {table.name}" for table in tables])
    return warning("dead rows", f"Calls read past many: {listed(counts)}.", f"{_OPEN_FOR_LONG} {vacuum}")


def _each(statements: list[str]) -> str:
    # neither reindex concurrently nor vacuum may share a transaction
    return "; ".join(statements) + (" (one at a time, in the SQL editor)" if len(statements) > 1 else "")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"
