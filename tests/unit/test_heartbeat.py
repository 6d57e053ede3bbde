"""What extends holds while their bodies run."""

from __future__ import annotations

import asyncio
import gc
import weakref
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from tokenlimits._core import workers
from tokenlimits._core.call import Call
from tokenlimits._core.hold import RunningHold
from tokenlimits._drivers.heartbeat import AsyncHeartbeat
from tokenlimits.models import TrackResult


def reserved() -> TrackResult:
    return TrackResult.model_validate(
        {
            "allowed": True, "reason": None, "error": None, "usage_id": uuid4(), "status": "reserved",
            "expires_at": datetime.now(UTC) + timedelta(hours=1), "group": None, "kind": "image", "cost": 1,
            "limits": [], "denied_by": None, "would_deny": [], "remaining": None, "reset_at": None,
            "retry_after": None, "replayed": False,
        }
    )  # fmt: skip


def running() -> RunningHold:
    call = workers.reserve(uuid4(), "image", 1, 3600, None, None, None)
    return RunningHold(call, reserved())


def test_a_loop_that_has_ended_is_collected() -> None:
    async def send(call: Call[TrackResult]) -> TrackResult:
        return reserved()

    heartbeat = AsyncHeartbeat(send)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def body() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        hold = running()
        end = heartbeat.begin(hold, 3600)
        await asyncio.sleep(0.01)
        end()

    asyncio.run(body())
    gc.collect()
    assert [loop() for loop in loops] == [None]
