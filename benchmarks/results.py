"""RESULTS.md: the subject, the machine, and the rows."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .exactness import CALLS, THREADS, Verdict
from .run import Row, Sql

RESULTS = Path(__file__).with_name("RESULTS.md")
TABLE = """
| what | ours | theirs | ratio | bar | met |
|---|---|---|---|---|---|
"""
EXACTNESS = f"""
### Who is right

{THREADS} threads, each with a connection of its own, make {CALLS:,} calls at once: first with room for all, then for
half.

| limiter | calls | room | admitted | denied though there was room | admitted though there was none | speed |
|---|---|---|---|---|---|---|
"""


@dataclass
class Section:
    """The results on one PostgreSQL."""

    postgres: str
    rows: list[Row] = field(default_factory=list[Row])
    verdicts: list[Verdict] = field(default_factory=list[Verdict])

    @property
    def text(self) -> str:
        """Return its tables as Markdown."""
        rows = "".join(f"{row.line}\n" for row in self.rows)
        verdicts = "".join(f"{verdict.line}\n" for verdict in self.verdicts)
        exactness = f"{EXACTNESS}{verdicts}" if verdicts else ""
        return f"\n## PostgreSQL {self.postgres}\n{TABLE}{rows}{exactness}"


def head(options: str, settings: tuple[str, ...], rounds: int, seconds: float, against: Sql | None) -> str:
    """Describe the subject before the measurements begin: the checkout may change meanwhile."""
    compared = f" `{against.name}` is the SQL that `--against` named." if against else ""
    return f"""# Results

Commit {_commit()}, measured {datetime.now(UTC):%Y-%m-%d} by
`{options}`
on {_machine()},
with fsync on and {", ".join(settings)}.
Both sides of a line ran in the same run, in turns of {seconds:g} s, {rounds} rounds; the ratio is the median over
rounds of ours to theirs.{compared}
"""


def write(beginning: str, sections: list[Section]) -> None:
    """Write the whole file."""
    RESULTS.write_text(beginning + "".join(section.text for section in sections), encoding="utf-8")


def add(beginning: str, sections: list[Section]) -> None:
    """Add a partial run, with what it was of, below what is there."""
    part = beginning.replace("# Results", "## In part, later", 1)
    part += "".join(section.text.replace("\n## ", "\n### ", 1) for section in sections)
    RESULTS.write_text(f"{RESULTS.read_text(encoding='utf-8').rstrip()}\n\n{part}", encoding="utf-8")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    # these results themselves change nothing
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/RESULTS.md")
    return f"{commit} with uncommitted changes" if changed else commit


def _machine() -> str:
    cpu = "an unnamed processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return (
        f"{os.cpu_count()} cores of {cpu}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
