"""`import`: usage that happened before or elsewhere, from CSV through record_generation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast
from uuid import UUID

import typer

from tokenlimits import GenerationDenied, GroupManager, InvalidRequest, TokenLimits
from tokenlimits._csv import unguarded
from tokenlimits.errors import GroupNotFound, IdempotencyConflict, UnknownUser

from ._bulk import Line, Outcome, Report, StartLine, at_once, in_parts, report, source
from ._find import find_group, manager, resolve, worker
from ._options import AsJson, moment
from ._terminal import Problem

_COLUMNS = ("user_id", "email", "kind", "cost", "created_at", "group_id", "group", "idempotency_key", "metadata")
_NEEDED = ("kind", "created_at")
_PART = 200
# what is wrong with one line, and says nothing about the next one
_OF_LINE = (GenerationDenied, GroupNotFound, IdempotencyConflict, InvalidRequest, Problem, UnknownUser)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("import")(import_)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV file; - is stdin.", show_default=False)],
    *,
    group: Annotated[
        str | None, typer.Option("--group", help="Where a line names none: its name or id.", show_default=False)
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Names the import; else the file's name does.", show_default=False)
    ] = None,
    start_line: StartLine = 1,
    report_to: Report = None,
    as_json: AsJson = False,
) -> None:
    """Record past usage from CSV.

    It moves counters, and is never denied. The first line names the columns: kind, created_at, and user_id or email;
    if you like cost, group (its name) or group_id, idempotency_key, metadata (JSON). Importing the same file again
    records nothing twice: a line without a key gets one of the batch, its number and what it says.
    """
    if batch is None and str(file) == "-":
        raise Problem("What comes from stdin has no name: give it one with --batch, so that it is never counted twice.")
    outcome = Outcome()
    with manager() as groups, worker() as limits, source([], file, _COLUMNS, start_line) as lines:
        importer = _Importer(groups, limits, batch or file.name, group)
        in_parts(lines, "Importing", _PART, lambda part: importer.record(part, outcome))
    report(outcome, report_to, as_json=as_json)


class _Importer:
    """Records lines, several at once."""

    def __init__(self, groups: GroupManager, limits: TokenLimits, batch: str, group: str | None) -> None:
        self._groups = groups
        self._limits = limits
        self._batch = batch
        self._default = find_group(groups, group).id if group is not None else None
        self._by_name = {each.name.lower(): each.id for each in groups.list()}

    def record(self, part: Sequence[Line], outcome: Outcome) -> None:
        users = resolve(self._groups, [_user(line) for line in part])
        for line, problem in zip(part, at_once(lambda line: self._try(line, users[_user(line)]), part), strict=True):
            if isinstance(problem, str):
                outcome.refuse(line, problem)
            else:
                outcome.counts.update({"recorded": not problem, "there already": problem})

    def _try(self, line: Line, user: UUID | str) -> bool | str:
        """Record one line; answers whether it was there already, or what is wrong with it."""
        try:
            return user if isinstance(user, str) else self._record(_checked(line.cells), line, user)
        except _OF_LINE as error:
            return str(error)

    def _record(self, cells: Mapping[str, str], line: Line, user_id: UUID) -> bool:
        result = self._limits.record(
            user_id,
            cells["kind"],
            _number(cells.get("cost") or "1"),
            created_at=_moment(cells["created_at"]),
            idempotency_key=cells.get("idempotency_key") or self._key(line),
            group_id=self._group(cells),
            metadata=_metadata(cells.get("metadata", "")),
        )
        return result.raise_if_denied().replayed

    def _key(self, line: Line) -> str:
        said = json.dumps([self._batch, line.number, sorted(line.cells.items())])
        return f"import-{hashlib.sha256(said.encode()).hexdigest()[:40]}"

    def _group(self, cells: Mapping[str, str]) -> UUID | str | None:
        if id_ := cells.get("group_id"):
            return id_
        name = cells.get("group")
        if not name:
            return self._default
        found = self._by_name.get(name.lower())
        if found is None:
            raise Problem(f"there is no group {name}")
        return found


def _user(line: Line) -> str:
    return line.cells.get("user_id") or line.cells.get("email") or ""


def _checked(cells: Mapping[str, str]) -> Mapping[str, str]:
    missing = [name for name in _NEEDED if not cells.get(name)]
    if missing:
        raise Problem(f"has no {' and no '.join(missing)}: does the first line of the file name the columns?")
    return {name: unguarded(cell) for name, cell in cells.items()}


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Problem(f"cost: {text!r} is no whole number") from None


def _moment(text: str) -> Any:
    try:
        return moment(text)
    except typer.BadParameter as error:
        raise Problem(f"created_at: {error.message}") from None


def _metadata(text: str) -> dict[str, Any] | None:
    try:
        read: Any = json.loads(text) if text else None
    except ValueError:
        raise Problem("metadata: is no JSON") from None
    if read is not None and not isinstance(read, dict):
        raise Problem("metadata: is no JSON object")
    return cast("dict[str, Any] | None", read)
