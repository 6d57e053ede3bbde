"""Generations as jobs of RQ: charged when they succeed, and once, however often a job is retried.

    export SUPABASE_URL=https://abc.supabase.co SUPABASE_SECRET_KEY=sb_secret_…
    export REDIS_URL=redis://localhost
    rq worker --path examples --url $REDIS_URL images

Then, in your app:

    rq_app.generate.enqueue(str(user_id), "a cat")

A job fails if it is denied, raises an error, or loses its process; its result has the reason. Requeue it when there is
room, or when the error is fixed:

    rq requeue --url $REDIS_URL --queue images 4f0c…

The job's own id is the idempotency key, and stays the same: what was charged isn't charged again, and the hold of a
killed process continues.
"""

from __future__ import annotations

import os

from redis import Redis
from rq import Queue, get_current_job
from rq.decorators import job

from tokenlimits import TokenLimits

queue = Queue("images", connection=Redis.from_url(os.environ.get("REDIS_URL", "redis://localhost")))
limits = TokenLimits.from_env()  # detects that the worker forks for each job


def make_image(prompt: str) -> str:
    """Spend the money. Replace it with your GPU."""
    return f"an image of {prompt}"


def job_id(*_: object, **__: object) -> str | None:
    """Return the id of the running job; None if the function is called without RQ."""
    current = get_current_job()
    return current.id if current else None


@job(queue, connection=queue.connection, timeout=300)
@limits.limited("image", user="user_id", ttl=600, idempotency_key=job_id)  # below the framework's decorator
def generate(user_id: str, prompt: str) -> str:
    return make_image(prompt)
