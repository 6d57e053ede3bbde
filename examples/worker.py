"""A generation worker. Each line of input is a job; each line of output is its outcome.

    export SUPABASE_URL=https://abc.supabase.co SUPABASE_SECRET_KEY=sb_secret_…
    echo '{"id": "job-1", "user_id": "8a5d…", "kind": "image"}' | python examples/worker.py

Replace the lines with your queue. A job that is delivered twice, as every queue does now and then, is charged once,
because its id is the idempotency key.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from uuid import UUID

from tokenlimits import InvalidRequest, ServiceUnavailable, track_generation


@dataclass(frozen=True)
class Job:
    id: str
    user_id: UUID
    kind: str
    cost: int = 1


def generate(job: Job) -> str:
    """Spend the money. Replace it with your GPU."""
    return f"{job.kind}-{job.id}"


def handle(job: Job) -> dict[str, object]:
    """Ask first, then generate; in any case, say what the queue should do with the job."""
    try:
        result = track_generation(job.user_id, job.kind, job.cost, idempotency_key=job.id)
    except ServiceUnavailable as error:  # the outcome is unknown: retry with the same key
        return {"job": job.id, "do": "retry", "in": error.retry_after or 30}
    except InvalidRequest as error:  # the job can never succeed: don't retry it
        return {"job": job.id, "do": "drop", "why": str(error)}
    if result.allowed:
        return {"job": job.id, "do": "ack", "made": generate(job), "remaining": result.remaining}
    if result.retry_after is not None:  # there will be room at result.reset_at
        return {"job": job.id, "do": "retry", "in": result.retry_after, "why": result.error}
    return {"job": job.id, "do": "drop", "why": result.error}


def main() -> None:
    for line in sys.stdin:
        fields = json.loads(line)
        job = Job(**fields | {"user_id": UUID(fields["user_id"])})
        print(json.dumps(handle(job)), flush=True)


if __name__ == "__main__":
    main()
