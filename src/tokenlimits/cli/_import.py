"""`import`: past usage from CSV, through record_generation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import MAXYEAR, UTC, timedelta
from pathlib import Path
from typing import Annotated, Any, cast
from uuid import UUID

import typer

from tokenlimits import GenerationDenied, GroupManager, InvalidRequest, TokenLimits
from tokenlimits.errors import GroupNotFound, IdempotencyConflict, UnknownUser
from tokenlimits.ledger_csv import unguarded

from ._bulk import Outcome, Report, StartLine, at_once, in_parts, report
from ._find import find_group, manager, resolve, worker
from ._lines import EMAILS, Line, Source, source
from ._options import AsJson, moment
from ._terminal import Problem

_USER = ("user_id", *EMAILS)
_COLUMNS = (
    *_USER, "kind", "cost", "created_at", "group_id", "group", "idempotency_key", "metadata", "id", "status"
)  # fmt: skip
_NEEDED = ("kind", "created_at")
_PART = 200
# by the status of an exported line: why it is not recorded
_UNCHARGED = {"released": "given back", "refunded": "given back", "expired": "given back", "reserved": "not settled"}
# errors of one line: the next one may still be good
_OF_LINE = (GenerationDenied, GroupNotFound, IdempotencyConflict, InvalidRequest, Problem, UnknownUser)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("import")(import_)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV file; - is stdin.", show_default=False)],
    *,
    group: Annotated[
        str | None,
        typer.Option("--group", help="The group for lines that name none.", show_default=False),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="The import's name. Default: the file's name.", show_default=False)
    ] = None,
    start_line: StartLine = 1,
    report_to: Report = None,
    as_json: AsJson = False,
) -> None:
    """Record past usage from CSV.

    The usage counts towards the limits and is never denied. The first line names the columns: kind, created_at, and
    user_id or email; cost, group (a name) or group_id, idempotency_key and metadata (JSON) are optional. Importing a
    file again records nothing twice, even after you have deleted lines or added columns: a line without a key gets one
    made from the import's name, its user, kind, cost, time and group, and the number of identical lines before it. You
    can import the output of `tokenlimits export`: usage that exists is skipped, as is usage that was given back or is
    not settled.
    """
    if batch is None and str(file) == "-":
        raise Problem("An import from stdin needs a name, so that it is never counted twice; pass --batch NAME.")
    outcome = Outcome()
    with manager() as groups, worker() as limits, source([], file, _COLUMNS) as found:
        lines = Source(_from(start_line, _numbered(found.lines)), max(0, found.total - start_line + 1))
        importer = _Importer(groups, limits, batch or file.name, group)
        in_parts(lines, "Importing", _PART, lambda part: importer.record(part, outcome))
    report(outcome, report_to, as_json=as_json)


def _numbered(lines: Iterable[Line]) -> Iterator[Line]:
    """Number identical lines, each of which was a generation of its own."""
    said: Counter[str] = Counter()
    for line in lines:
        digest = _digest(_said(line))
        said[digest] += 1
        yield replace(line, nth=said[digest])


def _from(start: int, lines: Iterable[Line]) -> Iterator[Line]:
    return (line for line in lines if line.number >= start)


def _said(line: Line) -> list[object]:
    """Return who used what, when and where, in one form for all spellings of the same."""
    cells = line.cells
    try:
        created_at = moment(cells.get("created_at", "")).astimezone(UTC).isoformat()
    except (typer.BadParameter, OverflowError):
        created_at = cells.get("created_at", "")
    group = cells.get("group_id") or cells.get("group") or ""
    return [line.user(_USER).lower(), cells.get("kind"), cells.get("cost") or "1", created_at, group.lower()]


def _digest(said: object) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str


class _Importer:
    """Records lines, several at a time."""

    def __init__(self, groups: GroupManager, limits: TokenLimits, batch: str, group: str | None) -> None:
        self._groups = groups
        self._limits = limits
        self._batch = batch
        self._default = find_group(groups, group).id if group is not None else None
        self._by_name = {each.name.lower(): each.id for each in groups.list()}

    def record(self, part: Sequence[Line], outcome: Outcome) -> None:
        users = resolve(self._groups, [line.user(_USER) for line in part])
        for line, came_to in zip(
            part, at_once(lambda line: self._try(line, users[line.user(_USER)]), part), strict=True
        ):
            if isinstance(came_to, _Refusal):
                outcome.refuse(line, came_to.reason)
            else:
                outcome.counts[came_to] += 1

    def _try(self, line: Line, user: UUID | str) -> str | _Refusal:
        """Record one line; return its outcome."""
        if isinstance(user, str):
            return _Refusal(user)
        try:
            cells = _checked(line.cells)
            return _uncharged(cells) or self._found_or_recorded(cells, line, user)
        except _OF_LINE as error:
            return _Refusal(str(error))

    def _found_or_recorded(self, cells: Mapping[str, str], line: Line, user_id: UUID) -> str:
        if cells.get("id") and self._is_there(cells, user_id):
            return "already there"
        try:
            return "already there" if self._record(cells, line, user_id) else "recorded"
        except IdempotencyConflict:
            # the key belongs to a generation that was tracked, and recording is another operation
            if self._is_there(cells, user_id):
                return "already there"
            raise

    def _is_there(self, cells: Mapping[str, str], user_id: UUID) -> bool:
        """Look for a line's usage in the ledger, by its id or its key."""
        created_at = _moment(cells["created_at"])
        found = self._groups.export_usage(
            user_id=user_id, kind=cells["kind"], since=created_at, until=created_at + timedelta(microseconds=1)
        )
        key, cost = cells.get("idempotency_key"), _number(cells.get("cost") or "1")
        return any(
            str(usage.id) == cells.get("id", "").lower()
            or (key and usage.idempotency_key == key and usage.cost == cost)
            for usage in found
        )

    def _record(self, cells: Mapping[str, str], line: Line, user_id: UUID) -> bool:
        result = self._limits.record(
            user_id,
            cells["kind"],
            _number(cells.get("cost") or "1"),
            created_at=_moment(cells["created_at"]),
            idempotency_key=cells.get("idempotency_key") or f"import-{_digest([self._batch, *_said(line), line.nth])}",
            group_id=self._group(cells),
            metadata=_metadata(cells.get("metadata", "")),
        )
        return result.raise_if_denied().replayed

    def _group(self, cells: Mapping[str, str]) -> UUID | str | None:
        if id_ := cells.get("group_id"):
            return id_
        name = cells.get("group")
        if not name:
            return self._default
        found = self._by_name.get(name.lower())
        if found is None:
            raise Problem(f"there is no group named {name}")
        return found


def _checked(cells: Mapping[str, str]) -> Mapping[str, str]:
    missing = [name for name in _NEEDED if not cells.get(name)]
    if missing:
        raise Problem(f"{' and '.join(missing)} missing: does the first line of the file name the columns?")
    return {name: cell if name == "metadata" else unguarded(cell) for name, cell in cells.items()}


def _uncharged(cells: Mapping[str, str]) -> str | None:
    status = cells.get("status") or "committed"
    if status not in _UNCHARGED and status != "committed":
        known = ", ".join(["committed", *_UNCHARGED])
        raise Problem(f"status: {status!r} is none of {known}. Leave the column out where all lines are to be charged.")
    return _UNCHARGED.get(status)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Problem(f"cost: {text!r} is not a whole number") from None


def _moment(text: str) -> Any:
    try:
        read = moment(text)
    except typer.BadParameter as error:
        raise Problem(f"created_at: {error.message}") from None
    if read.year == MAXYEAR:  # nothing could be added to it
        raise Problem("created_at: must not be in the future")
    return read


def _metadata(text: str) -> dict[str, Any] | None:
    try:
        read: Any = json.loads(text) if text else None
    except ValueError:
        raise Problem("metadata: must be JSON") from None
    if read is not None and not isinstance(read, dict):
        raise Problem("metadata: must be a JSON object")
    return cast("dict[str, Any] | None", read)
