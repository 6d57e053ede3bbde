"""What every benchmark gets and returns."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.support.postgres import PostgresServer


@dataclass(frozen=True)
class Sql:
    """A tokenlimits.sql to measure, and its name in the results."""

    name: str
    text: str

    @classmethod
    def of(cls, file: Path) -> Sql:
        """Read it once: a checkout may change while it is measured."""
        return cls(file.stem, file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Run:
    """A server to measure on, and how long."""

    server: PostgresServer
    programs: Path
    ours: Sql
    against: Sql | None
    pgledger: Path | None
    rounds: int
    seconds: float
    rows: int

    @property
    def sides(self) -> dict[str, Sql]:
        """This checkout's SQL, and the SQL that it is compared with, if any."""
        return {"ours": self.ours} | ({"against": self.against} if self.against else {})


@dataclass(frozen=True)
class Row:
    """One line of the results: what was measured, both sides, their ratio, and its target."""

    what: str
    ours: str
    theirs: str
    ratio: float
    bar: str
    met: bool

    @property
    def line(self) -> str:
        """A row of the table."""
        met = "yes" if self.met else "**no**"
        return (
            f"| {self.what} | {self.ours} | {self.theirs} | {self.ratio:.2f} | {self.bar} "
            f"| {met if self.bar != '—' else '—'} |"
        )


def per_second(rates: list[float]) -> str:
    """Format the median of rates."""
    return f"{median(rates):,.0f} /s"


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Compare round by round, and take the median."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def judge(
    what: str,
    ours: str,
    theirs: str,
    ratio: float,
    *,
    least: float | None = None,
    most: float | None = None,
    note: str = "",
) -> Row:
    """Make a row whose ratio must be at least or at most a target; without a target, it is only reported."""
    bar, met = "—", True
    for sign, limit, holds in (("≥", least, operator.ge), ("≤", most, operator.le)):
        if limit is not None:
            bar, met = f"{sign} {limit:g}", holds(ratio, limit)
    return Row(what, ours, theirs, ratio, f"{bar} {note}".strip(), met)
