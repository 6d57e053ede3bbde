"""Findings, each with its remedy, as a table for people and as JSON for a support ticket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from tokenlimits.cli._terminal import plain

Level = Literal["ok", "warning", "error"]

_MARKS: dict[Level, tuple[str, str]] = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


class Finding(BaseModel):
    """What was checked, what was found, and what to do about it."""

    check: str
    level: Level
    says: str
    remedy: str = ""


Findings = Iterator[Finding]


def ok(check: str, says: str) -> Finding:
    """Make a finding that a check has passed."""
    return Finding(check=check, level="ok", says=says)


def warning(check: str, says: str, remedy: str) -> Finding:
    """Make a finding of something that may be intended."""
    return Finding(check=check, level="warning", says=says, remedy=remedy)


def error(check: str, says: str, remedy: str) -> Finding:
    """Make a finding of something that is wrong."""
    return Finding(check=check, level="error", says=says, remedy=remedy)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Draw findings in green, yellow and red."""
    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.level]
        says = Text(plain(finding.says), style="" if finding.level == "ok" else style)
        if finding.remedy:
            says.append(f"\n→ {plain(finding.remedy)}", style="default")
        made.add_row(Text(mark, style=style), finding.check, says)
    return made


def listed(names: Sequence[str]) -> str:
    """List the first names, and how many more there are."""
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def quoted(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'
