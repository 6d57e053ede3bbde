"""A warm client and its forked children: nobody ever reads another's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.integration.conftest import RunPython

from tokenlimits import Limit
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

pytestmark = pytest.mark.slow

CHILDREN = 4
CALLS = 10

# what every script begins with: who works writes down what it did, for the ledger to be compared with
COMMON = """
import asyncio, atexit, json, os, sys, traceback
from functools import partial
import httpx
from supabase import ClientOptions, create_client
from tokenlimits import AsyncTokenLimits, ConfigurationError, TokenLimits, atrack_generation, track_generation

users = json.loads(sys.argv[1])
limits, alimits = TokenLimits.from_env(), AsyncTokenLimits.from_env()

def asked(n, call):
    return (users[n], f"kind_{n}", n + 1), {"metadata": {"by": n, "call": call}}

def checked(n, call, result):
    assert result, result.error
    assert (result.kind, result.cost) == (f"kind_{n}", n + 1), result
    return [str(result.usage_id), users[n], f"kind_{n}", n + 1, {"by": n, "call": call}]

def one(n, call, track):
    args, kwargs = asked(n, call)
    return checked(n, call, track(*args, **kwargs))

async def several(n, calls):
    async def one(call):
        args, kwargs = asked(n, call)
        return checked(n, call, await (alimits.track, atrack_generation)[call % 2](*args, **kwargs))
    return await asyncio.gather(*map(one, calls))

def work(n):
    done = [one(n, call, (limits.track, track_generation)[call % 2]) for call in range(CALLS)]
    return done + asyncio.run(several(n, range(CALLS, 2 * CALLS)))

def fork(function, n):
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.close(read)
    status = 1
    try:
        with os.fdopen(write, "w") as out:
            json.dump(function(n), out)
        status = 0
    except BaseException:
        traceback.print_exc()
    if n % 2 == 0:  # both ways in which a child may end
        atexit._run_exitfuncs()
    os._exit(status)

def harvest(forked):
    child, read = forked
    with os.fdopen(read) as out:
        written = out.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    return json.loads(written)
"""


@pytest.fixture
def users(stack: LocalStack, team: Callable[..., Group]) -> list[str]:
    users = [str(user) for user in stack.create_users(CHILDREN + 1)]
    team(users, *(Limit(kind=f"kind_{n}", max=None) for n in range(CHILDREN + 1)))
    return users


@pytest.fixture
def run(run_python: RunPython, users: list[str]) -> Callable[[str], Any]:
    def run(script: str) -> Any:
        common = COMMON.replace("CALLS", str(CALLS))
        return json.loads(run_python(common + script, json.dumps(users)) or "null")

    return run


def assert_recorded(stack: LocalStack, done: list[list[Any]], calls: int) -> None:
    """Everybody was told the id of the usage that they asked for."""
    assert len(done) == len({usage_id for usage_id, *_ in done}) == calls
    ids = [usage_id for usage_id, *_ in done]
    rows = stack.sql(
        "select id, user_id, kind, cost, metadata from public.generation_usage where id = any($1::uuid[])",
        "{" + ",".join(ids) + "}",
    )
    recorded = {row["id"]: [row["user_id"], row["kind"], int(row["cost"]), row["metadata"]] for row in rows}
    assert recorded == {usage_id: asked for usage_id, *asked in done}


def test_os_fork(stack: LocalStack, run: Callable[[str], Any]) -> None:
    done = run("""
work(0)  # everything is warm, and connections are open
children = [fork(work, n) for n in range(1, 5)]
done = work(0)  # while the children work
for child in children:
    done += harvest(child)
done += work(0)  # and after they have ended
limits.close()
print(json.dumps(done))
""")
    assert_recorded(stack, done, (CHILDREN + 2) * 2 * CALLS)


def test_multiprocessing(stack: LocalStack, run: Callable[[str], Any]) -> None:
    done = run("""
import multiprocessing
work(0)
context = multiprocessing.get_context("fork")
with context.Pool(4) as pool:
    answers = pool.map_async(work, range(1, 5), chunksize=1)
    done = work(0)
    for answer in answers.get():
        done += answer
    pool.close()
    pool.join()
print(json.dumps(done))
""")
    assert_recorded(stack, done, (CHILDREN + 1) * 2 * CALLS)


def test_children_of_children(stack: LocalStack, run: Callable[[str], Any]) -> None:
    done = run("""
def both(n):
    return work(n) + harvest(fork(work, n + 1)) + work(n)

work(0)
print(json.dumps(harvest(fork(both, 1)) + work(0)))
""")
    assert_recorded(stack, done, 4 * 2 * CALLS)


def test_while_another_thread_holds_our_lock(run: Callable[[str], Any]) -> None:
    """Nobody in the child will ever release it."""
    done = run("""
import signal
from tokenlimits._drivers import sessions

def child(n):
    signal.alarm(10)
    return one(n, 0, limits.track), one(n, 0, track_generation)

one(0, 0, limits.track)
with sessions.lock():
    forked = fork(child, 1)
print(json.dumps(harvest(forked)))
""")
    assert [each[2:4] for each in done] == [["kind_1", 2]] * 2


def test_while_other_threads_work(run: Callable[[str], Any]) -> None:
    done = run("""
import threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says that this is dangerous: it is what we test
stop = threading.Event()

def keep_busy(n):
    while not stop.is_set():
        limits.track(users[n], f"kind_{n}")

one(0, 0, limits.track)  # what is imported on first use is imported: Python's own locks don't survive a fork
threads = [threading.Thread(target=keep_busy, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
done = [harvest(fork(lambda n: one(n, 0, limits.track), 3)) for _ in range(20)]
stop.set()
for thread in threads:
    thread.join()
print(json.dumps(done))
""")
    assert len(done) == 20


def test_a_client_of_the_callers_is_refused_in_the_child_and_goes_on_in_the_parent(run: Callable[[str], Any]) -> None:
    refused = run("""
with httpx.Client() as http:
    url, key = os.environ["SUPABASE_URL"], os.environ["SUPABASE_SECRET_KEY"]
    client = create_client(url, key, ClientOptions(httpx_client=http))
    foreign = TokenLimits(client, on_unavailable="allow")
    one(0, 0, foreign.track)

    def child(n):
        refused = []
        for track in (foreign.track, TokenLimits(client).track, partial(track_generation, client=client)):
            try:
                one(n, 0, track)
            except ConfigurationError as error:
                refused.append(str(error))
        one(n, 0, limits.track)
        return refused

    refused = harvest(fork(child, 1))
    one(0, 0, foreign.track)
print(json.dumps(refused))
""")
    assert len(refused) == 3
    assert all("forked" in text and "from_env()" in text for text in refused)


def test_an_async_client_of_the_callers_is_refused_in_the_child(run: Callable[[str], Any]) -> None:
    refused = run("""
from supabase import AsyncClientOptions, create_async_client

async def main():
    async with httpx.AsyncClient() as http:
        url, key = os.environ["SUPABASE_URL"], os.environ["SUPABASE_SECRET_KEY"]
        client = await create_async_client(url, key, AsyncClientOptions(httpx_client=http))
        foreign = AsyncTokenLimits(client)
        await foreign.track(users[0], "kind_0")
        return foreign

foreign = asyncio.run(main())

def child(n):
    try:
        asyncio.run(foreign.track(users[n], "kind_0"))
    except ConfigurationError as error:
        return str(error)

print(json.dumps(harvest(fork(child, 1))))
""")
    assert "forked" in refused


def test_a_client_that_is_made_in_the_child_is_fine(run: Callable[[str], Any]) -> None:
    done = run("""
def child(n):
    with httpx.Client() as http:
        url, key = os.environ["SUPABASE_URL"], os.environ["SUPABASE_SECRET_KEY"]
        return one(n, 0, TokenLimits(create_client(url, key, ClientOptions(httpx_client=http))).track)

print(json.dumps(harvest(fork(child, 2))))
""")
    assert done[2:4] == ["kind_2", 3]
