"""One stack for all runs, on a PostgreSQL that writes to the disk, and a world of groups for each."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from tests.faults.plan import USERS
from tests.faults.world import Site, World
from tests.support import clock
from tests.support.postgres import PostgresServer, servers

from tokenlimits import GroupManager, Limit
from tokenlimits.local import LocalStack

# far from any midnight: no period ends in a run
BEGINNING = datetime(2026, 6, 17, 10, tzinfo=UTC)


def plan(size: int) -> list[Limit]:
    """Of the group above: what fits real plans, each in a window that doesn't end in a run."""
    weights = {"image": 1, "video": 3}
    return [
        Limit(kind="credits", max=95 * size, period="5 days", starts="rolling", scope="child", counts=weights),
        Limit(kind="credits", max=180 * size, period="30 days", starts="first_use", counts=weights),
        Limit(kind="image", max=14 * size, period="month", starts="anchor", scope="member"),
        Limit(kind="image", max=15 * size, period="in_flight", scope="child"),
        Limit(kind="video", max=1, period="day", mode="observe"),
    ]


def limits(size: int) -> tuple[list[Limit], ...]:
    """Of a hot group that seven share, one with limits for each member, and one that only counts."""
    return (
        [
            Limit(kind="image", max=60 * size),
            Limit(kind="image", max=50 * size, period="day"),
            Limit(kind="video", max=25 * size),
        ],
        [
            Limit(kind="image", max=10 * size, period="day", scope="member"),
            Limit(kind="image", max=5000),
            Limit(kind="video", max=8 * size, scope="member"),
            Limit(kind="video", max=20 * size, period="month"),
        ],
        [Limit(kind="image", max=None), Limit(kind="video", max=None)],
    )


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """What everything that is drawn depends on; with the test's name, since keys begin with it and share a ledger."""
    chosen = os.environ.get("TOKENLIMITS_FAULTS_SEED") or secrets.token_hex(4)
    print(f"to run it with the same plan: TOKENLIMITS_FAULTS_SEED={chosen}")  # noqa: T201  # shown when a test fails
    return f"{chosen}.{request.node.originalname}"


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with PostgresServer(servers()["18"], durable=True) as server:
        server.create_database("app")
        with LocalStack(server.url("app"), pool_size=24) as stack:
            with server.connect("app") as owner:
                clock.install(owner)
                clock.run_from(owner, BEGINNING)
            yield Site(server, stack)


@pytest.fixture
def world(request: pytest.FixtureRequest, site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Groups and users of its own, two of the groups beneath a plan; the parameter says how much room they have."""
    for name, value in site.stack.environment().items():
        monkeypatch.setenv(name, value)
    users = [str(user) for user in site.stack.create_users(USERS)]
    name = secrets.token_hex(4)
    with GroupManager.from_env(timeout=60) as groups:
        above = groups.create(f"{name} plan", limits=plan(request.param))
        made = [
            groups.create(f"{name} {number}", limits=its, parent=above.id if number < 2 else None)
            for number, its in enumerate(limits(request.param))
        ]
        groups.set_override(above.id, "credits", 85 * request.param, child_id=made[1].id)
        for group, members in zip(made, (users[:7], users[6:10], users[10:]), strict=True):
            groups.add_members(group.id, members)
        yield World(site, groups, tuple(made), above, users)
        for group in (*made, above):
            groups.delete(group.id)
