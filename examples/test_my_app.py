"""How an app tests its use of limits: with the fixture `fake_limits`, in memory, without Supabase.

python -m pytest examples/test_my_app.py
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from tokenlimits import Limit, ServiceUnavailable, track_generation

if TYPE_CHECKING:
    from tokenlimits.testing import FakeTokenLimits

# The app. Yours is in its own files, and doesn't know the fake.


def answer(user_id: UUID, prompt: str) -> tuple[int, str]:
    """Answer a request with a status and a text."""
    try:
        result = track_generation(user_id, "image", metadata={"prompt": prompt})
    except ServiceUnavailable:
        return 503, "Please try again soon."
    if not result:
        return 429, f"{result.error}"
    return 200, f"Here is {prompt}. {result.remaining} left."


# Its tests.


@pytest.mark.fake_limits({"image": 2})
def test_the_third_image_is_denied(fake_limits: FakeTokenLimits) -> None:
    user = uuid4()
    assert answer(user, "a cat") == (200, "Here is a cat. 1 left.")
    assert answer(user, "a dog") == (200, "Here is a dog. 0 left.")
    assert answer(user, "a cow") == (429, "Image generation limit exceeded: 2 of 2 used in total")
    assert [usage.metadata["prompt"] for usage in fake_limits.tracked] == ["a cat", "a dog"]


@pytest.mark.fake_limits([Limit(kind="image", max=1, period="day", scope="member")])
def test_tomorrow_there_is_room_again(fake_limits: FakeTokenLimits) -> None:
    user = uuid4()
    assert answer(user, "a cat")[0] == 200
    assert answer(user, "a dog")[0] == 429
    fake_limits.advance(timedelta(days=1))
    assert answer(user, "a dog")[0] == 200


def test_supabase_is_away(fake_limits: FakeTokenLimits) -> None:
    fake_limits.fail(ServiceUnavailable("away"))
    assert answer(uuid4(), "a cat") == (503, "Please try again soon.")
    assert fake_limits.tracked == ()
