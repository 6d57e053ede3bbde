"""Calls from many processes at once, each with several threads on one client, through the real Supabase client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing.pool import Pool
from typing import Any, Self

import httpx
from supabase import Client, ClientOptions
from tests.support.forks import CONTEXT

from tokenlimits import TokenLimits, TrackResult

PROCESSES = 8
THREADS = 4


@contextmanager
def supabase_client(url: str, key: str) -> Iterator[Client]:
    """Make a client as tokenlimits does: one without an HTTP client of its own warns, and loses calls over HTTP/2."""
    with httpx.Client(http2=False, timeout=60) as http:
        yield Client(url, key, ClientOptions(httpx_client=http))


@dataclass(frozen=True)
class Orders:
    """What one process does: `track` these users, in this order, on as many threads as it has connections."""

    url: str
    key: str
    user_ids: tuple[str, ...]


class Hammer:
    """Processes that wait for orders: they take longer to start than to work."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key
        self._pool: Pool = CONTEXT.Pool(PROCESSES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def track(self, user_ids: Sequence[str]) -> list[tuple[str, TrackResult]]:
        """Track an image for all these users, shared out among the processes; return who was answered what."""
        orders = [Orders(self._url, self._key, tuple(user_ids[process::PROCESSES])) for process in range(PROCESSES)]
        answers: list[list[Any]] = self._pool.map(_work, orders, chunksize=1)
        return [(user_id, TrackResult.model_validate_json(answer)) for user_id, answer in chain.from_iterable(answers)]


def _work(orders: Orders) -> list[tuple[str, str]]:
    with supabase_client(orders.url, orders.key) as client, ThreadPoolExecutor(THREADS) as threads:
        limits = TokenLimits(client, timeout=60)
        results = threads.map(lambda user_id: limits.track(user_id, "image"), orders.user_ids)
        return [(user_id, result.model_dump_json()) for user_id, result in zip(orders.user_ids, results, strict=True)]
