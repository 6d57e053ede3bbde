"""What people type into the dialogs, checked field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData

from tokenlimits import InvalidRequest, Limit, TokenLimitsError
from tokenlimits.errors import GroupExists
from tokenlimits.models import Group, Name, TimeZone

from . import _words
from ._days import beginning, day_of
from ._limit_rows import LimitRow

_NAME = TypeAdapter[Any](Name)
_TIMEZONE = TypeAdapter[Any](TimeZone)
_ANCHOR = "anchored periods are counted from"
_TWICE = "Another limit has this kind, period and start, for the same members."
_GONE = "Nothing can be beneath this group: it is gone, or too deep."
_REFUSED = {"timezone": "This time zone doesn't exist.", "parent": _GONE, "parent_id": _GONE}
_FIELDS = {name: name for name in ("name", "description", "priority", "timezone", "parent")} | {"parent_id": "parent"}
"""Where the form says what is refused of a field: by its name in the library, or in the database."""
_LIMIT_FIELD = re.compile(r"limits\[(\d+)\](?:\.(\w+))?")


@dataclass(frozen=True, slots=True)
class GroupForm:
    """A group, as typed."""

    name: str = ""
    description: str = ""
    priority: str = "0"
    timezone: str = "UTC"
    anchor: str = ""
    """The day from which the periods of its anchored limits are counted; empty: when it was created."""
    is_default: bool = False
    rows: Sequence[LimitRow] = ()
    errors: dict[str, str] = field(default_factory=dict[str, str])
    updated_at: str = ""
    parent: str = ""
    """The id of the group that a new one is beneath; empty: none."""
    is_spread: bool = False
    """Whether a new one is spread: with member limits only, for more users than one database is to hold."""
    before: str = ""
    """What the group was when the form was opened, as JSON: what others change meanwhile is told from it."""

    @classmethod
    def of_group(cls, group: Group, above: Sequence[Group] = ()) -> GroupForm:
        """Make the form of an existing group, beneath others."""
        rows = [LimitRow.of_limit(limit) for limit in group.limits]
        anchor = day_of(group.anchor_at, group.timezone)
        form = cls(group.name, group.description, str(group.priority), group.timezone, anchor, group.is_default, rows)
        return replace(form, updated_at=group.updated_at.isoformat(), before=json.dumps(_facts(group, above)))

    @classmethod
    def of_typed(cls, form: FormData) -> GroupForm:
        """Read a submitted form."""
        name, description, priority, timezone, anchor = (
            str(form.get(name, "")).strip() for name in ("name", "description", "priority", "timezone", "anchor")
        )
        before, updated_at, parent = (str(form.get(name, "")) for name in ("before", "updated_at", "parent"))
        typed = cls(name, description, priority, timezone, anchor, "is_default" in form, LimitRow.of_typed(form))
        return replace(typed, before=before, updated_at=updated_at, parent=parent, is_spread="is_spread" in form)

    def checked(self) -> tuple[GroupForm, dict[str, Any]]:
        """Return it with its errors, and its fields as the library takes them."""
        errors = dict(self._wrong())
        checked = [row.checked() for row in self.rows]
        form = replace(self, errors=errors, rows=[row for row, _ in checked])
        if not form.is_good():
            return form, {}
        fields: dict[str, Any] = {"name": self.name, "description": self.description, "priority": int(self.priority)}
        limits = [limit for _, limit in checked]
        fields |= {"timezone": self.timezone, "is_default": self.is_default, "limits": limits}
        if self.anchor != self._was().get(_ANCHOR, ""):  # it may have a time of day, which stays unless it is changed
            fields["anchor_at"] = beginning(self.anchor, self.timezone) if self.anchor else None
        if self.parent:
            fields["parent"] = self.parent
        if self.is_spread:
            fields["is_spread"] = True
        if self.updated_at:
            fields["unchanged_since"] = _moment(self.updated_at)
        return form, fields

    def changed_meanwhile(self, group: Group, above: Sequence[Group] = ()) -> list[str]:
        """Say what is different from when the form was opened."""
        before, now = self._was(), _facts(group, above)
        if not before:
            return []
        names = [name for name in [*before, *now] if before.get(name) != now.get(name)]
        return [f"{name}: {before.get(name, 'none')} → {now.get(name, 'none')}" for name in dict.fromkeys(names)]

    @property
    def is_anchored(self) -> bool:
        """Whether one of its limits starts at the group's anchor."""
        return any(row.starts == "anchor" and row.scope == "group" for row in self.rows)

    def is_good(self) -> bool:
        """Whether it has no errors."""
        return not self.errors and not any(row.error for row in self.rows)

    def refused(self, error: TokenLimitsError) -> GroupForm:
        """Return it with the error from the database."""
        if isinstance(error, GroupExists):
            return replace(self, errors={"name": "Another group has this name."})
        place = error.field or "" if isinstance(error, InvalidRequest) else ""
        if (found := _LIMIT_FIELD.match(place)) and int(found[1]) < len(self.rows):
            rows = [*self.rows]
            row = rows[int(found[1])]
            rows[int(found[1])] = row.refused(found[2]) if found[2] else replace(row, error=_TWICE)
            return replace(self, rows=rows)
        words = _REFUSED.get(place, str(error))
        return replace(self, errors={_FIELDS.get(place, ""): words})

    def _was(self) -> dict[str, str]:
        try:
            return TypeAdapter(dict[str, str]).validate_json(self.before)
        except ValidationError:
            return {}

    def _wrong(self) -> Iterable[tuple[str, str]]:
        if not _passes(_NAME, self.name):
            yield "name", "A name has 1 to 200 visible characters."
        if len(self.description) > 2000 or "\0" in self.description:
            yield "description", "A description has at most 2,000 characters."
        if not re.fullmatch(r"-?[0-9]{1,9}", self.priority):
            yield "priority", "A priority is a whole number."
        if not _passes(_TIMEZONE, self.timezone):
            yield "timezone", "A time zone is a name such as Europe/Paris."
        try:
            _ = self.anchor and beginning(self.anchor, self.timezone)
        except ValueError as error:
            yield "anchor", str(error)


def _facts(group: Group, above: Sequence[Group]) -> dict[str, str]:
    """Write a group down, line by line, as an admin knows it."""
    facts = {
        "name": group.name,
        "description": group.description,
        "priority": str(group.priority),
        "time zone": group.timezone,
        "default group": "yes" if group.is_default else "no",
    }
    if above:
        facts["beneath"] = above[-1].name
    if group.anchor_at is not None:
        facts[_ANCHOR] = day_of(group.anchor_at, group.timezone)
    for limit in group.limits:
        facts[f"{limit.kind} {_words.when(limit)}{_words.FOR_EACH[limit.scope]}"] = _allowed(limit)
    return facts


def _allowed(limit: Limit) -> str:
    allowed = "unlimited" if limit.max is None else f"{limit.max:,}"
    counts = "".join(f", {kind} by {weight:,}" for kind, weight in (limit.counts or {}).items())
    return allowed + counts + (", only observed" if limit.mode == "observe" else "")


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest("updated_at: is no moment", detail="updated_at") from None


def _passes(type_: TypeAdapter[Any], value: str) -> bool:
    try:
        type_.validate_python(value)
    except ValidationError:
        return False
    return True


def _texts(form: FormData, name: str) -> list[str]:
    return [str(value).strip() for value in form.getlist(name)]


@dataclass(frozen=True, slots=True)
class Pasted:
    """A pasted list of users: ids, addresses, and anything else."""

    ids: list[UUID]
    emails: list[str]
    unknown: list[str]


def pasted(text: str) -> Pasted:
    """Read a list of ids and e-mail addresses, as mail programs and spreadsheets write them.

    Example:
        >>> pasted("Ann Lee <ann@example.com>, o'x@example.com; 0b5e1f6c-7a39-4d52-9c0e-2f6a1b3c4d5e").emails
        ['ann@example.com', "o'x@example.com"]
    """
    found = Pasted([], [], [])
    for word in dict.fromkeys(_entries(text)):
        if "@" in word:
            found.emails.append(word)
        elif re.fullmatch(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}", word):
            found.ids.append(UUID(word))
        else:
            found.unknown.append(word)
    return found


def _entries(text: str) -> Iterable[str]:
    # a separator between quotes belongs to a name: "Lee, Ann" <ann@example.com>
    for entry in re.findall(r"""(?:"[^"\n]*"|[^",;\n\r])+""", text):
        for word in re.findall(r"<([^<>]+)>", entry) or re.split(r'[\s"]+', entry):
            # an apostrophe inside is part of the address
            if stripped := word.strip("' ").removeprefix("mailto:"):
                yield stripped


def ids(form: FormData, name: str) -> list[UUID]:
    """Read the ids of ticked boxes.

    Raises:
        InvalidRequest: One is not an id.
    """
    try:
        return [UUID(value) for value in _texts(form, name)]
    except ValueError:
        raise InvalidRequest(f"{name}: is not an id", detail=name) from None
