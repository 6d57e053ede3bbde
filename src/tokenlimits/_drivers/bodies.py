"""Reads the body of an answer, but never more of it than any answer of ours can have."""

from __future__ import annotations

from typing import Final

import httpx

from tokenlimits._core.retry import Transient

MOST: Final = 64 * 1024 * 1024
"""A page of an export, the longest answer, has some 10 MB at most."""


def read(response: httpx.Response) -> bytes:
    """Read the body, decompressed."""
    content = bytearray()
    for part in response.iter_bytes():
        _add(content, part)
    return bytes(content)


async def aread(response: httpx.Response) -> bytes:
    """Read the body, decompressed."""
    content = bytearray()
    async for part in response.aiter_bytes():
        _add(content, part)
    return bytes(content)


def _add(content: bytearray, part: bytes) -> None:
    content += part
    if len(content) > MOST:
        # as any answer that makes no sense: the call may have been carried out, so it is repeated with its key
        raise Transient(f"the answer is longer than {MOST // 1024 // 1024} MB, which none of Supabase's is")
