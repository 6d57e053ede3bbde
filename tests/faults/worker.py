"""A worker process: `python -m tests.faults.worker orders.json`. It does its jobs, and writes down what it is told.

One that takes the place of a dead worker goes on where that one stopped. Jobs that were begun it does again from their
start, as a queue delivers them again, or leaves them as they are, as each job says.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.faults.journal import Journal, read
from tests.faults.plan import BODIES, TTL, Job, Step, plan, steps

from tokenlimits import AsyncTokenLimits, Hold, ServiceUnavailable, TokenLimits, TokenLimitsError, TrackResult

Colour = Literal["sync", "async"]


@dataclass(frozen=True)
class Orders:
    seed: str
    worker: str
    colour: Colour
    jobs: int
    lanes: int
    """How many threads or tasks it works with."""
    users: list[str]
    timeout: float
    journal: str
    """A file that isn't there yet."""
    journals_before: list[str]
    """Of those in whose place it works."""

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    def open_jobs(self) -> Iterator[Job]:
        before = read(map(Path, self.journals_before))
        for job in plan(self.seed, self.worker, self.jobs):
            if job.key not in before.done and (job.again or job.key not in before.begun):
                yield job


class BodyFailed(Exception):
    pass


Telling = Generator[Callable[[Any], Any], TrackResult | list[TrackResult]]
"""Yields what a client is to do; takes its answer, or its error."""


class Work:
    """What both colours have in common: all but the calls themselves."""

    def __init__(self, orders: Orders, journal: Journal) -> None:
        self.orders, self.journal = orders, journal

    def telling(self, job: Job) -> Telling:
        """Tell a job's story, and write down each call and its end."""
        story = steps(job, self.orders.users)
        step = next(story, None)
        while step is not None:
            answer = yield from self.asking(job, step)
            try:
                step = story.send(answer)
            except StopIteration:
                return

    def asking(self, job: Job, step: Step) -> Generator[Callable[[Any], Any], Any, TrackResult | None]:
        for _ in range(1 + job.again):
            numbers = [self.begin(asked, step.call, step.usage_id) for asked in step.jobs]
            try:
                answer = yield step.make
            except TokenLimitsError as error:
                for number in numbers:
                    self.journal.end(number, error)
                if not isinstance(error, ServiceUnavailable):
                    return None
            else:
                answers: list[TrackResult] = answer if isinstance(answer, list) else [answer]
                for number, each in zip(numbers, answers, strict=True):
                    self.journal.end(number, each)
                return answers[0]
        return None

    def body(self, job: Job, hold: Hold) -> None:
        """Run the body of a generation."""
        if job.story == "fails":
            hold.used(job.settled)
            raise BodyFailed
        hold.commit(job.settled)

    def settling(self, job: Job, hold: Hold) -> int:
        call = "release" if job.story == "fails" and not job.settled else "commit"
        return self.begin(job, call, str(hold.usage_id))

    def begin(self, job: Job, call: str, usage_id: str | None) -> int:
        return self.journal.begin(job.key, call, usage_id, (self.orders.users[job.user], job.kind, job.cost))

    def settled(self, number: int, hold: Hold | None, error: BaseException | None) -> None:
        """Write down how a generation ended; when it is the body that failed, only the hold knows the rest."""
        if error is not None and (hold is None or isinstance(error, TokenLimitsError)):
            self.journal.end(number, error)
        elif hold is not None and hold.status == "reserved":
            self.journal.end(number, ServiceUnavailable("; ".join(getattr(error, "__notes__", ()))))
        elif hold is not None:
            self.journal.end(number, hold.result)


class Threads(Work):
    def run(self) -> None:
        with (
            TokenLimits.from_env(timeout=self.orders.timeout) as self.limits,
            ThreadPoolExecutor(self.orders.lanes) as pool,
        ):
            for done in [pool.submit(self.do, job) for job in self.orders.open_jobs()]:
                done.result()

    def do(self, job: Job) -> None:
        if job.story in BODIES:
            self.generate(job)
        else:
            self.drive(self.telling(job))
        self.journal.done(job.key)

    def drive(self, telling: Telling) -> None:
        with suppress(StopIteration):
            make = next(telling)
            while True:
                try:
                    answer = make(self.limits)
                except TokenLimitsError as error:
                    make = telling.throw(error)
                else:
                    make = telling.send(answer)

    def generate(self, job: Job) -> None:
        request, options = job.request(self.orders.users)
        hold, error = None, None
        number = self.begin(job, "reserve", None)
        try:
            with self.limits.generation(*request, ttl=TTL, **options) as hold:
                self.journal.end(number, hold.result)
                number = self.settling(job, hold)
                self.body(job, hold)
        except (BodyFailed, TokenLimitsError) as failure:
            error = failure
        self.settled(number, hold, error)


class Tasks(Work):
    def run(self) -> None:
        asyncio.run(self.work())

    async def work(self) -> None:
        jobs = self.orders.open_jobs()

        async def lane() -> None:
            for job in jobs:
                await self.do(job)

        async with AsyncTokenLimits.from_env(timeout=self.orders.timeout) as self.limits, asyncio.TaskGroup() as tasks:
            for _ in range(self.orders.lanes):
                tasks.create_task(lane())

    async def do(self, job: Job) -> None:
        if job.story in BODIES:
            await self.generate(job)
        else:
            await self.drive(self.telling(job))
        self.journal.done(job.key)

    async def drive(self, telling: Telling) -> None:
        with suppress(StopIteration):
            make = next(telling)
            while True:
                try:
                    answer = await make(self.limits)
                except TokenLimitsError as error:
                    make = telling.throw(error)
                else:
                    make = telling.send(answer)

    async def generate(self, job: Job) -> None:
        request, options = job.request(self.orders.users)
        hold, error = None, None
        number = self.begin(job, "reserve", None)
        try:
            async with self.limits.generation(*request, ttl=TTL, **options) as hold:
                self.journal.end(number, hold.result)
                number = self.settling(job, hold)
                self.body(job, hold)
        except (BodyFailed, TokenLimitsError) as failure:
            error = failure
        self.settled(number, hold, error)


class _Log(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.log(record.getMessage())


def main(path: str) -> None:
    orders = Orders(**json.loads(Path(path).read_text()))
    journal = Journal(Path(orders.journal))
    logger = logging.getLogger("tokenlimits")
    logger.addHandler(_Log(journal))
    logger.propagate = False
    {"sync": Threads, "async": Tasks}[orders.colour](orders, journal).run()
    journal.close()


if __name__ == "__main__":
    main(sys.argv[1])
