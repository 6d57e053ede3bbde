"""Whatever goes wrong on the way, nothing is charged twice, nothing is lost, and no limit is passed.

At least 10,000 operations in all. Each run prints its seed, and TOKENLIMITS_FAULTS_SEED runs the same plan again.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
from tests.faults.crew import Crew
from tests.faults.journal import Account
from tests.faults.proxy import Fault, FaultyProxy
from tests.faults.verdict import spread
from tests.faults.world import TIMEOUT, Site, World

pytestmark = pytest.mark.slow

A_BACKEND_AT_WORK = """
select pid
from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
order by state = 'active' desc
limit 1
"""

# jobs of each worker, and the operations that they make at least
THROUGH_FAULTS, FAULTY_OPERATIONS = 1500, 7000
MORTAL, MORTAL_OPERATIONS = 350, 1800
ACROSS_CRASHES, CRASHED_OPERATIONS = 350, 1200

WHAT_CLIENTS_NOTICE = (
    "ConnectError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "no answer in time",
    "status 200",
    "status 502",
)


def test_ten_thousand_operations_in_all() -> None:
    assert FAULTY_OPERATIONS + MORTAL_OPERATIONS + CRASHED_OPERATIONS >= 10_000


@pytest.mark.parametrize("world", [40], indirect=True)
def test_faults_between_client_and_server(world: World, seed: str, tmp_path: Path) -> None:
    with (
        FaultyProxy(world.site.stack.url, seed, late=TIMEOUT) as proxy,
        Crew(tmp_path, {**world.site.stack.environment(), "SUPABASE_URL": proxy.url}) as crew,
    ):
        crew.hire(world.orders(seed, "threads-1", "sync", THROUGH_FAULTS))
        crew.hire(world.orders(seed, "threads-2", "sync", THROUGH_FAULTS))
        crew.hire(world.orders(seed, "tasks", "async", THROUGH_FAULTS, lanes=16))
        account = crew.finish()

    world.check(account, seed)
    assert all(proxy.counts[fault] for fault in Fault), proxy.counts
    noticed = "\n".join(account.logged)
    assert [sign for sign in WHAT_CLIENTS_NOTICE if sign not in noticed] == []
    assert_all_kinds_of_ends(account, FAULTY_OPERATIONS)


@pytest.mark.parametrize("world", [10], indirect=True)
def test_workers_that_are_killed(world: World, seed: str, tmp_path: Path) -> None:
    random = Random(f"{seed}/kills")
    killed = 0
    with Crew(tmp_path, world.site.stack.environment()) as crew:
        crew.hire(world.orders(seed, "threads", "sync", MORTAL))
        crew.hire(world.orders(seed, "tasks-1", "async", MORTAL))
        crew.hire(world.orders(seed, "tasks-2", "async", MORTAL))
        while killed < 12 and crew.working:
            crew.wait_for_more(random.randint(10_000, 60_000))
            if crew.working:
                killed += crew.kill(random.choice(crew.working))
        account = crew.finish()

    world.check(account, seed)
    assert killed >= 6
    assert any(called.answer is None and called.error is None for called in account.calls), "nobody died in a call"
    assert len(account.calls) >= MORTAL_OPERATIONS


@pytest.mark.parametrize("world", [6], indirect=True)
def test_a_postgres_that_is_killed(world: World, seed: str, tmp_path: Path) -> None:
    """Its first process three times, once for longer than calls wait; one that serves a connection twice; and one
    connection ends in good order.
    """
    random = Random(f"{seed}/crashes")
    blows = ["server", "backend", "connection", "outage", "backend", "server"]
    with Crew(tmp_path, world.site.stack.environment()) as crew:
        crew.hire(world.orders(seed, "threads", "sync", ACROSS_CRASHES))
        crew.hire(world.orders(seed, "tasks", "async", ACROSS_CRASHES))
        for blow in blows:
            crew.wait_for_more(random.randint(40_000, 80_000))
            assert crew.working, "they were done before"
            strike(world.site, blow)
        account = crew.finish()

    world.check(account, seed)
    assert_all_kinds_of_ends(account, CRASHED_OPERATIONS)


def strike(site: Site, blow: str) -> None:
    if blow in {"server", "outage"}:
        site.server.kill()
        if blow == "outage":
            time.sleep(1.5 * TIMEOUT)
        site.server.restart()
        return
    with site.owner() as owner:
        row = owner.execute(A_BACKEND_AT_WORK).fetchone()
        assert row is not None
        if blow == "connection":
            owner.execute("select pg_terminate_backend(%s)", row)
        else:
            os.kill(row[0], signal.SIGKILL)


def assert_all_kinds_of_ends(account: Account, operations: int) -> None:
    ends = spread(account)
    assert all(ends[end] for end in ("allowed", "denied", "in doubt")), ends
    assert sum(ends.values()) >= operations, ends
