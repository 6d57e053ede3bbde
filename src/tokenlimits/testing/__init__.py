"""Fakes for your own tests: the whole contract in memory, without Supabase.

They are the real clients, with their checks, errors and answers, over a server inside the process.

Example:
    >>> from tokenlimits import track_generation
    >>> from tokenlimits.testing import FakeTokenLimits, override
    >>> def app(user_id):
    ...     result = track_generation(user_id, "image")
    ...     return "here you are" if result else result.error
    >>> with override(FakeTokenLimits(limits={"image": 1})) as fake:
    ...     app("a5f40000-0000-4000-8000-000000000001")
    ...     app("a5f40000-0000-4000-8000-000000000001")
    'here you are'
    'Image generation limit exceeded: 1 of 1 used in total'

    You control the clock, and so when holds expire:

    >>> from datetime import timedelta
    >>> fake = FakeTokenLimits(limits={"video": 8})
    >>> hold = fake.reserve("a5f40000-0000-4000-8000-000000000001", "video", cost=8, ttl=600)
    >>> fake.advance(timedelta(minutes=10))
    >>> fake.check("a5f40000-0000-4000-8000-000000000001", "video").remaining
    8
    >>> [(usage.cost, usage.status) for usage in fake.tracked]
    [(8, 'expired')]
"""

from ._clients import (
    FakeAsyncGroupManager,
    FakeAsyncTokenLimits,
    FakeGroupManager,
    FakeTokenLimits,
    TrackedUsage,
    override,
)

__all__ = [
    "FakeAsyncGroupManager",
    "FakeAsyncTokenLimits",
    "FakeGroupManager",
    "FakeTokenLimits",
    "TrackedUsage",
    "override",
]
