"""One request to the database as a value: the SQL function, its parameters, and how to parse its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .arguments import parser

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Call(Generic[T_co]):
    """One request to PostgREST.

    `retry_safe`: sending it again after a lost answer leaves the same state, and the second answer is still useful (it
    may say that there was nothing left to do).
    """

    function: str
    params: Mapping[str, Any]
    parse: Callable[[Any], T_co]
    retry_safe: bool = True


def field_parser(name: str, type_: Any) -> Callable[[Any], Any]:
    """Make a parser for an answer of which only one field matters."""
    parse = parser(type_)
    return lambda answer: parse(answer[name])
