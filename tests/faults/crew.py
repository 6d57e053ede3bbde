"""Worker processes: started, watched by what they write down, killed and replaced."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import environ
from pathlib import Path
from typing import Self

from tests.faults.journal import Account, read
from tests.faults.worker import Orders

ROOT = Path(__file__).resolve().parents[2]

HANGING = 120
"""Seconds without a word after which workers hang."""


@dataclass
class Post:
    """A place in the crew, with whoever holds it now."""

    orders: Orders
    process: subprocess.Popen[bytes]
    journals: list[Path] = field(default_factory=list)


class Crew:
    """Ends with its processes, however it ends."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = {**environ, **environment}
        self._posts: list[Post] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for post in self._posts:
            post.process.kill()
            post.process.wait()

    def hire(self, orders: Orders) -> None:
        """Start a worker; its journal and those before are filled in here."""
        self._posts.append(self._start(orders, []))

    def kill(self, number: int) -> bool:
        """Kill a worker as `kill -9` does, and put another in its place; false when it had ended by itself."""
        post = self._posts[number]
        post.process.kill()
        if post.process.wait() == 0:
            return False
        self._posts[number] = self._start(post.orders, post.journals)
        return True

    @property
    def working(self) -> list[int]:
        return [number for number, post in enumerate(self._posts) if post.process.poll() is None]

    @property
    def written(self) -> int:
        """How many bytes all have written down: the only clock of a run."""
        return sum(path.stat().st_size for post in self._posts for path in post.journals if path.exists())

    def wait_for_more(self, written: int) -> None:
        """Wait until so many more bytes are written down, or all is done."""
        goal = self.written + written
        self.wait_until(lambda: self.written >= goal or not self.working)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for as long as they write anything."""
        written, since = self.written, time.monotonic()
        while not happened():
            if self.written > written:
                written, since = self.written, time.monotonic()
            assert time.monotonic() < since + HANGING, f"workers hang: {self._said()}"
            time.sleep(0.01)

    def finish(self) -> Account:
        """Wait until all have done their jobs; return what they wrote down."""
        self.wait_until(lambda: not self.working)
        assert not self._said(), self._said()
        assert {post.process.returncode for post in self._posts} == {0}
        return read(path for post in self._posts for path in post.journals)

    def _start(self, orders: Orders, before: list[Path]) -> Post:
        name = self._directory / f"{orders.worker}-{len(before)}"
        journals = [*before, name.with_suffix(".journal")]
        orders = replace(orders, journal=str(journals[-1]), journals_before=[str(path) for path in before])
        with name.with_suffix(".err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.faults.worker", orders.write(name.with_suffix(".json"))],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        return Post(orders, process, journals)

    def _said(self) -> str:
        return "".join(path.read_text() for path in sorted(self._directory.glob("*.err")))
