"""A pool of asyncio workers for many jobs: those within the limits are done, the others are postponed.

Set SUPABASE_URL and SUPABASE_SECRET_KEY, and pass the ids of users; --jobs is the number of jobs per user:

    python examples/async_worker_pool.py --kind image --jobs 20 --workers 8 8a5d… 91c0…
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from tokenlimits import AsyncTokenLimits


@dataclass(frozen=True)
class Job:
    user_id: UUID
    kind: str
    id: UUID = field(default_factory=uuid4)  # your jobs have ids from a table or a queue


@dataclass(frozen=True)
class PutOff:
    job: Job
    seconds: float | None  # None: waiting won't help


@dataclass
class Outcome:
    done: list[Job] = field(default_factory=list[Job])
    put_off: list[PutOff] = field(default_factory=list[PutOff])


async def generate(job: Job) -> None:
    """Spend the money. Replace it with a call to your model."""
    await asyncio.sleep(len(job.kind) / 1000)


async def work(limits: AsyncTokenLimits, jobs: asyncio.Queue[Job], outcome: Outcome) -> None:
    while not jobs.empty():
        job = jobs.get_nowait()
        result = await limits.track(job.user_id, job.kind, idempotency_key=job.id)
        if result.allowed:
            await generate(job)
            outcome.done.append(job)
        else:
            outcome.put_off.append(PutOff(job, result.retry_after))


async def run(todo: list[Job], workers: int) -> Outcome:
    jobs: asyncio.Queue[Job] = asyncio.Queue()
    for job in todo:
        jobs.put_nowait(job)
    outcome = Outcome()
    async with AsyncTokenLimits.from_env() as limits, asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work(limits, jobs, outcome))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description="Run jobs in a pool of asyncio workers.")
    parser.add_argument("users", type=UUID, nargs="+")
    parser.add_argument("--kind", default="image")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    todo = [Job(user_id, options.kind) for user_id in options.users for _ in range(options.jobs)]
    outcome = asyncio.run(run(todo, options.workers))
    print(f"{len(outcome.done)} of {len(todo)} jobs done")
    for user_id in options.users:
        waits = [late.seconds for late in outcome.put_off if late.job.user_id == user_id]
        if waits:
            until = "for good" if waits[-1] is None else f"for {waits[-1]:.0f} seconds"
            print(f"{user_id}: {len(waits)} put off {until}")


if __name__ == "__main__":
    main()
