"""Nothing that runs at once makes a limit inexact: not through the whole stack, not while an admin edits."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from uuid import uuid4

import psycopg
import pytest
from tests.support.hammer import Hammer, supabase_client
from tests.support.invariants import drift
from tests.support.postgres import PostgresServer, servers

from tokenlimits import GroupManager, Limit
from tokenlimits.local import LocalStack
from tokenlimits.models import Group


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(servers()["18"]) as server:
        server.create_database("app")
        yield server


@pytest.fixture(scope="module")
def stack(server: PostgresServer) -> Iterator[LocalStack]:
    with LocalStack(database_url=server.url("app")) as stack:
        yield stack


@pytest.fixture(scope="module")
def hammer(stack: LocalStack) -> Iterator[Hammer]:
    with Hammer(stack.url, stack.secret_key) as hammer:
        yield hammer


@pytest.fixture
def groups(stack: LocalStack, server: PostgresServer) -> Iterator[GroupManager]:
    with supabase_client(stack.url, stack.secret_key) as client:
        yield GroupManager(client, timeout=60)
    with psycopg.connect(server.url("app"), autocommit=True) as connection:
        assert drift(connection) == []


def group_with(groups: GroupManager, users: list[str], *limits: Limit, priority: int = 0) -> Group:
    group = groups.create(str(uuid4()), limits=limits, priority=priority)
    groups.add_members(group.id, users)
    return group


def calls(users: list[str], count: int) -> list[str]:
    return [user for user, _ in zip(cycle(users), range(count), strict=False)]


def test_a_hot_group_admits_its_limit_to_the_unit(stack: LocalStack, groups: GroupManager, hammer: Hammer) -> None:
    users = [str(user) for user in stack.create_users(20)]
    group = group_with(groups, users, Limit(kind="image", max=200, period="month"))

    answers = hammer.track(calls(users, 400))

    assert sum(result.allowed for _, result in answers) == 200
    assert {result.reason for _, result in answers if not result} == {"limit_exceeded"}
    assert sorted(result.remaining or 0 for _, result in answers if result) == list(range(200))
    assert groups.usage(group.id).limits[0].used == 200


@pytest.mark.slow
def test_a_hundred_groups_at_once_each_admit_their_limit(
    stack: LocalStack, groups: GroupManager, hammer: Hammer
) -> None:
    users = [str(user) for user in stack.create_users(100)]
    for user in users:
        group_with(groups, [user], Limit(kind="image", max=3, period="day"))

    answers = hammer.track(calls(users, 500))

    assert Counter(user for user, result in answers if result) == dict.fromkeys(users, 3)


def test_users_in_two_groups_use_up_both_and_no_more(stack: LocalStack, groups: GroupManager, hammer: Hammer) -> None:
    users = [str(user) for user in stack.create_users(10)]
    first = group_with(groups, users, Limit(kind="image", max=120), priority=2)
    second = group_with(groups, users, Limit(kind="image", max=80), priority=1)

    answers = hammer.track(calls(users, 320))

    paid = Counter(result.group.id for _, result in answers if result and result.group)
    assert paid == {first.id: 120, second.id: 80}


def test_each_member_gets_their_own_limit(stack: LocalStack, groups: GroupManager, hammer: Hammer) -> None:
    users = [str(user) for user in stack.create_users(10)]
    group_with(
        groups,
        users,
        Limit(kind="image", max=12, period="day", scope="member"),
        Limit(kind="image", max=1000, period="month"),
    )

    answers = hammer.track(calls(users, 240))

    assert Counter(user for user, result in answers if result) == dict.fromkeys(users, 12)


@pytest.mark.slow
def test_limits_stay_exact_while_an_admin_edits_them(stack: LocalStack, groups: GroupManager, hammer: Hammer) -> None:
    users = [str(user) for user in stack.create_users(10)]
    total = Limit(kind="image", max=150)
    group = group_with(groups, users, total)
    done = threading.Event()

    def edit() -> None:
        while not done.is_set():
            for max_ in (40, 400, 90):
                groups.set_limit(group.id, Limit(kind="image", max=max_, period="day"))
                groups.set_limit(group.id, Limit(kind="image", max=max_, period="hour", scope="member"))
            groups.set_limits(group.id, [total])

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        during = hammer.track(calls(users, 300))
    finally:
        done.set()
        editor.join()
    after = hammer.track(calls(users, 160))

    assert sum(result.allowed for _, result in (*during, *after)) == 150
    assert groups.usage(group.id).limits[0].used == 150
