"""Two TypeScript snippets, and the same in Python.

    const result = await trackGeneration(userId, 'image');
    if (!result.allowed) throw new Error(result.error);

    const result = await trackGeneration(userId, 'video');
    if (!result.allowed) throw new Error(result.error);

Run it with a user's id: `python examples/port_of_typescript.py 8a5d…`.
"""

from __future__ import annotations

import asyncio
import sys

from tokenlimits import atrack_generation, track_generation


def make_image(user_id: str) -> str:
    result = track_generation(user_id, "image")
    if not result.allowed:
        raise RuntimeError(result.error)
    return "an image"


async def make_video(user_id: str) -> str:
    result = await atrack_generation(user_id, "video")
    if not result.allowed:
        raise RuntimeError(result.error)
    return "a video"


if __name__ == "__main__":
    try:
        print(make_image(sys.argv[1]))
        print(asyncio.run(make_video(sys.argv[1])))
    except RuntimeError as error:
        sys.exit(f"Error: {error}")
