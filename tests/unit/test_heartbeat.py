"""What extends holds while their bodies run."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from tokenlimits._core import workers
from tokenlimits._core.call import Call
from tokenlimits._core.hold import RunningHold
from tokenlimits._drivers.heartbeat import AsyncHeartbeat, Heartbeat
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

    heartbeat = AsyncHeartbeat(send, 10)
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


def test_holds_of_one_loop_do_not_wait_for_each_other() -> None:
    """No answer comes before both have been asked for."""

    async def body() -> None:
        both = asyncio.Barrier(2)

        async def send(call: Call[TrackResult]) -> TrackResult:
            await both.wait()
            answered.set()
            return reserved()

        answered = asyncio.Event()
        heartbeat = AsyncHeartbeat(send, 10)
        holds = [running(), running()]
        ends = [heartbeat.begin(hold, 1) for hold in holds]
        await answered.wait()
        for end in ends:
            end()

    asyncio.run(body())


def test_a_slow_answer_is_waited_for_no_longer_than_a_beat_may_take() -> None:
    """Or it would hold up those of other holds."""
    timeouts: list[float] = []
    twice = threading.Event()

    def send(call: Call[TrackResult], timeout: float) -> TrackResult:
        timeouts.append(timeout)
        if len(timeouts) == 2:
            twice.set()
        return reserved()

    heartbeat = Heartbeat(send, 10)
    hold = running()
    end = heartbeat.begin(hold, 1)
    assert twice.wait(60)
    end()
    assert timeouts[:2] == [1 / 3, 1 / 3]


def test_an_async_answer_that_never_comes_is_asked_for_again() -> None:
    async def body() -> None:
        asked, again = asyncio.Event(), asyncio.Event()

        async def send(call: Call[TrackResult]) -> TrackResult:
            if not asked.is_set():
                asked.set()
                await asyncio.Event().wait()
            again.set()
            return reserved()

        hold = running()
        end = AsyncHeartbeat(send, 10).begin(hold, 1)
        await again.wait()
        end()

    asyncio.run(body())
