"""Reads stored rows one by one, so that one that Python can't represent doesn't hide the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from tokenlimits.errors import UnreadableValue
from tokenlimits.models import Model

from .arguments import parser

logger = logging.getLogger("tokenlimits")

M = TypeVar("M", bound=Model)

# what another function, or no function of ours, would answer; that is no stored value
_ANOTHER_ANSWER = {"missing", "model_type"}


def rows_parser(model: type[M]) -> Callable[[Any], list[M]]:
    """Make a parser of a list that leaves out the rows with values that Python can't represent, and logs each."""
    whole, one = parser(list[model]), row_parser(model)

    def parse(answer: Any) -> list[M]:
        try:
            return whole(answer)
        except ValidationError:
            if not isinstance(answer, list):
                raise
        return [row for each in cast("list[object]", answer) if (row := _logged(one, each)) is not None]

    return parse


def _logged(parse: Callable[[Any], M], row: object) -> M | None:
    try:
        return parse(row)
    except UnreadableValue as error:
        logger.warning("Left out: %s", error, extra={"left_out": error.detail})
        return None


def row_parser(model: type[M]) -> Callable[[Any], M]:
    """Make a parser of one row, which raises `UnreadableValue` for a value that Python can't represent."""
    parse = parser(model)

    def parse_row(row: Any) -> M:
        try:
            return parse(row)
        except ValidationError as error:
            found = error.errors(include_url=False)
            if any(each["type"] in _ANOTHER_ANSWER for each in found):
                raise
        field = ".".join(map(str, found[0]["loc"]))
        raise UnreadableValue(
            f"{model.__name__} {_id_of(row)} can't be read: {field} is {found[0]['input']!r:.100}. Correct it in the "
            "database.",
            detail=field,
        )

    return parse_row


def _id_of(row: Mapping[str, Any]) -> object:
    """Find what names a row: its own id, or whom or what it is about."""
    group = cast("Any", row.get("group"))
    of_group = cast("Mapping[str, Any]", group).get("id") if isinstance(group, dict) else None
    return row.get("id") or row.get("user_id") or of_group or f"of {row.get('kind')}"
