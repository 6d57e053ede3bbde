"""One limit, as typed into the limits editor."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from pydantic import ValidationError
from starlette.datastructures import FormData, QueryParams

from tokenlimits import InvalidRequest, Limit
from tokenlimits.models import number_and_unit

from . import _words

# what separates thousands, one and the same throughout: 10,00 is 10 for half of the world, and 1000 for nobody
_WHOLE = re.compile(r"[0-9]+|[0-9]{1,3}(?P<between>[, _'\u00a0\u2009\u202f])[0-9]{3}(?:(?P=between)[0-9]{3})*")
_COUNTED = re.compile(r"([^\s=:]+)(?:\s*[=:]?\s*([0-9]{1,9}))?")

_WRONG = {
    "kind": "A kind has at most 32 of a-z, 0-9 and _, and begins with a letter.",
    "max": "A maximum is a whole number like 10,000 (commas between thousands only); 0 blocks.",
    "period": "A period has 1 to 366 minutes, hours, days or weeks, 1 to 24 months, or 1 year.",
    "counts": "A pool counts 1 to 50 kinds, each with a whole number from 1 to 1,000,000, like: image 1, video 8.",
}


@dataclass(frozen=True, slots=True)
class LimitRow:
    """One limit, as typed: every field of a limit is here, so that saving loses none."""

    kind: str = ""
    max: str = ""
    number: str = "1"
    unit: str = "month"
    scope: str = "group"
    starts: str = "calendar"
    mode: str = "enforce"
    counts: str = ""
    """The kinds of a pool with their weights; empty: no pool."""
    unlimited: str = "no"
    error: str = ""
    wrong: str = ""
    """The field that the error is about; empty: the whole limit."""

    @classmethod
    def of_limit(cls, limit: Limit) -> LimitRow:
        """Write a limit as it is typed."""
        number, unit = number_and_unit(limit.period)
        counts = ", ".join(f"{kind} {weight}" for kind, weight in (limit.counts or {}).items())
        max_, unlimited = ("", "yes") if limit.max is None else (str(limit.max), "no")
        return cls(limit.kind, max_, str(number), unit, limit.scope, limit.starts, limit.mode, counts, unlimited)

    @classmethod
    def of_typed(cls, form: FormData | QueryParams) -> list[LimitRow]:
        """Read the rows of a submitted form.

        Raises:
            InvalidRequest: A row lacks a field, as on a page of an older panel: what it doesn't show would be lost.
        """
        columns = [[str(value).strip() for value in form.getlist(name)] for name in TYPED]
        if len({len(column) for column in columns}) > 1:
            raise InvalidRequest("limits: this page is out of date; reload it, nothing was changed", detail="limits")
        return [cls(*row) for row in zip(*columns, strict=True)]

    @property
    def is_special(self) -> bool:
        """Whether it is a pool, or only observes: what few limits are."""
        return bool(self.counts) or self.mode != "enforce" or self.wrong == "counts"

    @property
    def sentence(self) -> str:
        """What it will do, or why it can't be; empty while it is not complete."""
        row, limit = self.checked()
        return _words.sentence(limit) if limit else "" if row.wrong in ("kind", "max") else row.error

    def checked(self) -> tuple[LimitRow, Limit | None]:
        """Return it with its error, or the limit that it is."""
        given = {
            "kind": self.kind,
            "max": self._max(),
            "period": self._period(),
            "scope": self.scope,
            "starts": self.starts,
            "mode": self.mode,
            "counts": self._pool(),
        }
        try:
            return self, Limit.model_validate(given)
        except ValidationError as error:
            wrong = {str(each["loc"][0]) for each in error.errors()}
        return self.refused(next(field for field in given if field in wrong)), None

    def refused(self, field: str) -> LimitRow:
        """Return it with what is wrong with a field, or with the whole limit."""
        words = _WRONG.get(field, "This limit is not valid.")
        if field == "counts" and self.unit == "in_flight":
            words = "“At once” counts the holds of its own kind: leave this empty."
        if field == "starts" and (possible := self._possible_starts()):
            words = f"With this period, select {' or '.join(possible)}."
        return replace(self, error=words, wrong=field)

    def _max(self) -> object:
        if self.unlimited == "yes":
            return None
        found = whole(self.max)
        return self.max if found is None else found

    def _period(self) -> str:
        return self.unit if self.number == "1" else f"{self.number} {self.unit}s"

    def _pool(self) -> object:
        if not self.counts:
            return None
        found = [_COUNTED.fullmatch(each.strip()) for each in re.split(r"[,;]", self.counts)]
        counts = {each[1]: int(each[2] or 1) for each in found if each}
        # fewer where a kind occurs twice, or where something is no kind with a number
        return counts if len(counts) == len(found) else {}

    def _possible_starts(self) -> list[str]:
        return [f"“{words}”" for starts, words in _words.STARTS.items() if _can_start(starts, self._period())]


def whole(text: str) -> int | None:
    """Read a whole number as people type it; None if it is something else."""
    return int(re.sub(r"[^0-9]", "", text)) if _WHOLE.fullmatch(text) else None


def _can_start(starts: str, period: str) -> bool:
    try:
        Limit.model_validate({"kind": "image", "max": 0, "period": period, "starts": starts})
    except ValidationError:
        return False
    return True


TYPED = tuple(each.name for each in fields(LimitRow) if each.name not in ("error", "wrong"))
"""What a form has of each row, in the order of the fields."""
