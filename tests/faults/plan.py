"""What workers do, made from a seed: jobs, and the story of each as a generator of steps that any client can take."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from tokenlimits import TrackResult

Story = Literal["track", "repeat", "refund", "commit", "release", "abandon", "ends_well", "fails", "batch"]
STORIES: dict[Story, int] = {
    "track": 30,
    "repeat": 10,
    "refund": 12,
    "commit": 18,
    "release": 12,
    "abandon": 4,
    "ends_well": 7,
    "fails": 7,
    "batch": 3,
}
"""And how often each is drawn. `ends_well` and `fails` are bodies of `with generation(...)`."""

BODIES = ("ends_well", "fails")
BATCH = 20

USERS = 12
TTL = 3600
"""Seconds for which holds hold: longer than a run takes, so that only what is left behind expires."""

SHARED: tuple[Story, ...] = ("track", "repeat")
SHARED_EVERY = 25
"""Each so many jobs comes one that all workers get at the same time, under the same key."""


@dataclass(frozen=True)
class Job:
    key: str
    user: int
    kind: str
    cost: int
    story: Story
    settled: int
    """What `commit` settles for, and what a body that fails declares: from 0 to the cost."""
    named: bool
    """Whether the caller names it by an idempotency key, or leaves that to the client."""
    again: bool
    """Whether somebody asks once more, under the same key, where it is in doubt what was done."""

    def request(self, users: list[str]) -> tuple[tuple[str, str, int], dict[str, Any]]:
        """Make the arguments for `track`, `reserve` and `generation`."""
        key = {"idempotency_key": self.key} if self.named else {}
        return (users[self.user], self.kind, self.cost), {**key, "metadata": {"job": self.key}}

    def fields(self, users: list[str]) -> dict[str, Any]:
        """Make the same for `track_many`."""
        (user_id, kind, cost), options = self.request(users)
        return {"user_id": user_id, "kind": kind, "cost": cost, **options}


def plan(seed: str, worker: str, count: int) -> Iterator[Job]:
    """Make the jobs of a worker."""
    own, shared = Random(f"{seed}/{worker}"), Random(f"{seed}/shared")
    for number in range(count):
        if number % SHARED_EVERY == 0:
            yield _job(shared, f"{seed}/all/{number}", SHARED)
        else:
            yield _job(own, f"{seed}/{worker}/{number}", tuple(STORIES))


def _job(random: Random, key: str, stories: tuple[Story, ...]) -> Job:
    (story,) = random.choices(stories, [STORIES[story] for story in stories])
    cost = random.randint(1, 5)
    named = stories == SHARED or story in ("repeat", "batch") or random.random() < 0.7
    return Job(
        key=key,
        user=random.randrange(USERS),
        kind=random.choice(("image", "image", "video")),
        cost=cost,
        story=story,
        settled=random.choice((cost, random.randint(0, cost), 0)),
        named=named,
        again=named and random.random() < 0.6,
    )


@dataclass(frozen=True)
class Step:
    """One call: its name, the jobs that it is for, the usage that it settles, and how a client makes it."""

    call: str
    jobs: tuple[Job, ...]
    usage_id: str | None
    make: Callable[[Any], Any]


def steps(job: Job, users: list[str]) -> Generator[Step, TrackResult | None]:
    """Tell a job's story; what is sent in is the answer to the last step, None when there was none."""
    request, options = job.request(users)
    if job.story in ("track", "repeat", "refund"):
        track = Step("track", (job,), None, lambda limits: limits.track(*request, **options))
        tracked = yield track
        if job.story == "repeat":
            yield track
        elif job.story == "refund" and tracked:
            yield _settle("refund", job, tracked)
    elif job.story == "batch":
        jobs = tuple(replace(job, key=f"{job.key}/{n}", user=(job.user + n) % USERS, cost=1) for n in range(BATCH))
        requests = [asked.fields(users) for asked in jobs]
        yield Step("track", jobs, None, lambda limits: limits.track_many(requests))
    else:
        held = yield Step("reserve", (job,), None, lambda limits: limits.reserve(*request, ttl=TTL, **options))
        if held and job.story in ("commit", "release"):
            yield _settle(job.story, job, held, *([job.settled] if job.story == "commit" else []))


def _settle(how: str, job: Job, held: TrackResult, *cost: int) -> Step:
    return Step(how, (job,), str(held.usage_id), lambda limits: getattr(limits, how)(held.usage_id, *cost))
