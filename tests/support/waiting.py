"""Waiting for what will happen, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds after which something will never happen."""


def eventually(look: Callable[[], T]) -> T:
    """Look again and again until there is something to see."""
    deadline = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert time.monotonic() < deadline, "it didn't happen"
        time.sleep(0.01)
    return seen
