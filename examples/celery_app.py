"""Generations as Celery tasks: charged when they succeed, and once, however often a task is delivered.

    export SUPABASE_URL=https://abc.supabase.co SUPABASE_SECRET_KEY=sb_secret_…
    export CELERY_BROKER_URL=redis://localhost CELERY_RESULT_BACKEND=redis://localhost
    celery --workdir examples --app celery_app worker --concurrency 8

Then, in your app:

    celery_app.generate.delay(str(user_id), "a cat")

The task's own id is the idempotency key. It stays the same when a task is redelivered, because its process died or
the broker wasn't sure, and when Celery retries it: the same hold continues and is charged once. Its body may run twice.
"""

from __future__ import annotations

from celery import Celery, Task
from celery.signals import worker_process_shutdown

from tokenlimits import GenerationDenied, ServiceUnavailable, TokenLimits

app = Celery("examples")
limits = TokenLimits.from_env()  # shared by all processes of the pool: it detects the fork


@worker_process_shutdown.connect
def close(**_: object) -> None:
    limits.close()


def make_image(prompt: str) -> str:
    """Spend the money. Replace it with your GPU."""
    return f"an image of {prompt}"


def task_id(task: Task, *_: object, **__: object) -> str:
    return task.request.id


@app.task(
    bind=True,  # passes the task, whose id is the key
    acks_late=True,
    reject_on_worker_lost=True,  # redeliver it if its process is killed
    autoretry_for=(ServiceUnavailable,),  # the outcome is unknown: retry later
    retry_backoff=True,
    max_retries=8,
    throws=(GenerationDenied,),  # a denial, which no retry changes: the task fails without a traceback in the log
)
@limits.limited("image", user="user_id", ttl=600, idempotency_key=task_id)  # below the framework's decorator
def generate(self: Task, user_id: str, prompt: str) -> str:
    return make_image(prompt)
