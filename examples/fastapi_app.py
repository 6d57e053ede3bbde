"""Generations in a FastAPI app: 429 with Retry-After at the limit, and nothing charged for what fails.

    export SUPABASE_URL=https://abc.supabase.co SUPABASE_SECRET_KEY=sb_secret_…
    uvicorn --app-dir examples fastapi_app:app
    curl -H "Authorization: Bearer $ACCESS_TOKEN" -X POST 'http://127.0.0.1:8000/images?prompt=a+cat'

There is no idempotency key: whoever sends a request could choose it, and get many generations for one charge.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated
from uuid import UUID

import httpx
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tokenlimits import AsyncTokenLimits, GenerationDenied, LimitExceeded, ServiceUnavailable

limits = AsyncTokenLimits.from_env()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with limits:
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(GenerationDenied)
async def denied(_: Request, error: GenerationDenied) -> JSONResponse:
    wait = error.result.retry_after
    headers = {} if wait is None else {"Retry-After": f"{wait:.0f}"}
    status = 429 if isinstance(error, LimitExceeded) else 403  # no group of the user includes this kind
    return JSONResponse({"detail": str(error)}, status, headers)


@app.exception_handler(ServiceUnavailable)
async def away(_: Request, error: ServiceUnavailable) -> JSONResponse:
    return JSONResponse({"detail": "Please try again soon"}, 503, {"Retry-After": f"{error.retry_after or 30:.0f}"})


async def signed_in(authorization: Annotated[str, Header()] = "") -> UUID:
    """Let Supabase say whose access token it is: a user's id in a request proves nothing."""
    headers = {"apikey": os.environ["SUPABASE_SECRET_KEY"], "authorization": authorization}
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{os.environ['SUPABASE_URL']}/auth/v1/user", headers=headers)
    if answer.is_error:
        raise HTTPException(401, "Please sign in")
    return UUID(answer.json()["id"])


@app.post("/images")
@limits.limited("image", user="user_id", ttl=600)  # below the framework's decorator
async def image(prompt: str, user_id: Annotated[UUID, Depends(signed_in)]) -> str:
    await asyncio.sleep(0.1)  # replace it with a call to your model
    return f"an image of {prompt}"


@limits.limited("text", user="user_id", ttl=600)  # charged after the last word; not if the client disconnects
async def words(prompt: str, user_id: UUID) -> AsyncIterator[str]:
    for word in prompt.split():  # replace it with what your model streams
        yield f"{word} "
        await asyncio.sleep(0.1)


@app.post("/texts")
async def text(prompt: str, user_id: Annotated[UUID, Depends(signed_in)]) -> StreamingResponse:
    async def response() -> AsyncIterator[str]:
        async with aclosing(rest):
            yield first
            async for word in rest:
                yield word

    rest = words(prompt, user_id)
    first = await anext(rest, "")  # reserves before the response begins, so that it can still be a 429
    return StreamingResponse(response(), media_type="text/plain")
