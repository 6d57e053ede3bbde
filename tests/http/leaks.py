"""Looks for secrets wherever somebody could read them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import tokenlimits

_PACKAGE = str(Path(tokenlimits.__file__).parent)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Walk from an error to what it was raised from, whether a traceback would show it or not."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [next_ for next_ in (each.__cause__, each.__context__) if next_ is not None]


def _frames(error: BaseException) -> Iterator[FrameType]:
    for each in chain(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if frame.f_code.co_filename.startswith(_PACKAGE):
                yield frame


def text_of(error: BaseException) -> str:
    """Collect what an error shows: its chain, tracebacks, fields, and the local variables of our functions."""
    seen = ["".join(traceback.format_exception(error))]
    seen += [f"{each!r} {vars(each)}" for each in chain(error)]
    seen += [f"{name}={value!r}" for frame in _frames(error) for name, value in frame.f_locals.items()]
    return "\n".join(seen)
