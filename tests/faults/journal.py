"""What workers were told, and what was in doubt when they died: JSON lines, one before a call and one after it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tokenlimits import TokenLimitsError, TrackResult


class Journal:
    """Appends lines, from any thread; what is written survives a `kill -9`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._numbers = count()

    def begin(self, job: str, call: str, usage_id: str | None, asked: tuple[str, str, int]) -> int:
        number = next(self._numbers)
        self._write({"begun": number, "job": job, "call": call, "usage": usage_id, "asked": asked})
        return number

    def end(self, number: int, outcome: TrackResult | BaseException) -> None:
        if isinstance(outcome, TrackResult):
            self._write({"ended": number, "answer": outcome.model_dump(mode="json")})
        else:
            text = f"{type(outcome).__name__}: {outcome}" if isinstance(outcome, TokenLimitsError) else repr(outcome)
            self._write({"ended": number, "error": text})

    def done(self, job: str) -> None:
        self._write({"done": job})

    def log(self, message: str) -> None:
        self._write({"log": message})

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


@dataclass
class Called:
    """One call: in doubt, unless it has an answer or was refused for good."""

    job: str
    call: str
    usage_id: str | None
    asked: tuple[str, str, int]
    """User, kind and cost."""
    answer: TrackResult | None = None
    error: str | None = None

    @property
    def in_doubt(self) -> bool:
        return self.answer is None and (self.error is None or self.error.startswith("ServiceUnavailable"))


@dataclass
class Account:
    """What all workers of a run wrote down."""

    calls: list[Called] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    logged: list[str] = field(default_factory=list)

    @property
    def begun(self) -> set[str]:
        return {called.job for called in self.calls}


def read(paths: Iterable[Path]) -> Account:
    account = Account()
    for path in paths:
        open_: dict[int, Called] = {}
        for line in lines(path):
            if "begun" in line:
                called = open_[line["begun"]] = Called(line["job"], line["call"], line["usage"], tuple(line["asked"]))
                account.calls.append(called)
            elif "ended" in line:
                called = open_[line["ended"]]
                called.error = line.get("error")
                called.answer = TrackResult.model_validate(line["answer"]) if "answer" in line else None
            elif "done" in line:
                account.done.add(line["done"])
            else:
                account.logged.append(line["log"])
    return account


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines that were finished: a worker may have died in the middle of its last."""
    *finished, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in finished]
