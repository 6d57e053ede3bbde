"""Tokenlimits in a schema of its own, over HTTP: every operation works there; one that isn't exposed is said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from supabase import Client, ClientOptions
from tests.sql.semantics.elsewhere import at_home
from tests.support import clock
from tests.support.conformance import ANN, BOB, CYD, World, real_world
from tests.support.postgres import PostgresServer, servers

from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    ConfigurationError,
    GenerationRequest,
    GroupManager,
    Limit,
    TokenLimits,
    atrack_generation,
    track_generation,
)
from tokenlimits.async_client import _AsyncDefault
from tokenlimits.client import _Default
from tokenlimits.errors import AccessDenied, SchemaNotInstalled
from tokenlimits.local import LocalStack

# neither asks the server anything
_NO_OPERATIONS = {"close", "aclose", "from_env"}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(next(iter(servers().values()))) as server:
        yield server


@pytest.fixture(scope="module")
def stack(server: PostgresServer) -> Iterator[LocalStack]:
    server.create_database("limits")
    with LocalStack(server.url("limits"), schema="limits") as stack:
        yield stack


@pytest.fixture(scope="module")
def owner(server: PostgresServer, stack: LocalStack) -> Iterator[psycopg.Connection[Any]]:
    with at_home(server.connect("limits")) as connection:
        clock.install(connection)
        yield connection


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    with httpx.Client(trust_env=False) as http:
        yield Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))


def operations(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")} - _NO_OPERATIONS


def manage(world: World) -> None:
    """Call each operation of a group manager."""
    groups = world.groups
    team, other = groups.create("Team", id=uuid4(), limits={"image": 9}).id, groups.create("Other").id
    groups.update(team, description="ours")
    groups.set_limits(team, {"image": 8})
    groups.set_limit(team, Limit(kind="video", max=3, period="day", scope="member"))
    groups.remove_limit(team, "video", period="day", scope="member")
    assert groups.get(team) == groups.get_by_name("team")
    assert [group.id for group in groups.list()] == [other, team]
    assert groups.add_member(team, ANN)
    assert groups.add_members(team, [BOB, CYD]).added == 2
    assert groups.move_member(CYD, from_=team, to=other)
    assert [member.id for member in groups.members(team)] == [ANN, BOB]
    assert [member.id for member in groups.members_page(team, size=1)] == [ANN]
    assert [group.id for group in groups.page(size=1)] == [other]
    assert [user.id for user in groups.find_users("ann@")] == [ANN]
    assert [user.id for user in groups.find_users_by_email(["bob@example.com"])] == [BOB]
    usage = world.limits.track(ANN, "image", 2)
    assert groups.usage(team).limits[0].used == 2
    assert [each.group.id for each in groups.usage_all()] == [other, team]
    assert [point.used for point in groups.history(team)] == [2]
    assert [row.id for row in groups.export_usage(team)] == [usage.usage_id]
    assert [row.id for row in groups.export_page(team)] == [usage.usage_id]
    assert [total.used for total in groups.export_usage(team, bucket="day")] == [2]
    groups.set_limit(team, Limit(kind="image", max=2, scope="member"))
    assert [(limit.kind, limit.full) for limit in groups.limit_pressure(team)] == [("image", 1)]
    assert [each.id for each in groups.top_members(team)] == [ANN]
    assert not groups.drift(team).drifted
    assert not groups.reconcile(team).drifted
    assert groups.refund(usage.usage_id).status == "refunded"
    assert groups.set_override(team, "image", 5, user_id=ANN, period="lifetime").status == "active"
    assert [override.max for override in groups.overrides(team)] == [5]
    assert groups.remove_override(team, "image", user_id=ANN)
    assert groups.set_member_anchor(team, ANN, world.now)
    assert groups.reset_usage(team, user_id=ANN) >= world.now
    assert groups.remove_member(team, ANN)
    assert groups.remove_members(team, [BOB]) == 1
    assert groups.delete(team).id == team


def work(world: World) -> None:
    """Call each operation of a worker's client."""
    limits = world.limits
    world.groups.add_member(world.groups.create("Team", limits={"image": 100}).id, ANN)
    assert limits.track(ANN, "image").remaining == 99
    with pytest.raises(AccessDenied):
        limits.my_usage()
    assert [result.remaining for result in limits.track_many([GenerationRequest(user_id=ANN, kind="image")])] == [98]
    assert limits.check(ANN, "image", 99).denied_by.used == 2
    assert limits.record(ANN, "image", created_at=world.now - timedelta(days=40)).status == "committed"
    first, second = (limits.reserve(ANN, "image", 5).usage_id for _ in range(2))
    assert limits.extend(first, 7200).status == "reserved"
    assert limits.commit(first, 4).status == "committed"
    assert limits.release(second).status == "released"
    assert limits.refund(first).status == "refunded"
    world.generation(lambda hold: hold.commit(2), ANN, "image", 3)

    async def draw(user_id: object) -> str:
        return "a picture"

    def draw_now(user_id: object) -> str:
        return "a picture"

    asynchronous = isinstance(world.client, AsyncTokenLimits)
    world.call(limits.limited("image", user="user_id")(draw if asynchronous else draw_now), ANN)
    assert [limit.used for limit in limits.usage(ANN)] == [1 + 1 + 1 + 2 + 1]


@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize(("cls", "play"), [(GroupManager, manage), (TokenLimits, work)], ids=["groups", "limits"])
def test_every_operation_works(cls: type, play: Any, colour: Any, stack: LocalStack, owner: Any) -> None:
    with real_world(colour, stack, owner) as world:
        play(world)
    assert operations(cls) - {name for name, _ in world.transcript} == set()


class TestByTheEnvironment:
    @pytest.fixture(autouse=True)
    def _environment(self, stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name, value in {**stack.environment(), "no_proxy": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(_Default, "current", None)
        monkeypatch.setattr(_AsyncDefault, "current", None)
        yield
        if _Default.current is not None:
            _Default.current.close()

    def test_everything_finds_it(self, client: Client) -> None:
        assert track_generation(uuid4(), "image").reason == "not_in_group"
        assert track_generation(uuid4(), "image", client=client).reason == "not_in_group"
        with GroupManager.from_env() as groups, TokenLimits.from_env() as limits:
            assert groups.list(search=str(uuid4())) == []
            assert limits.usage(uuid4()) == ()

        async def find_it_too() -> None:
            assert (await atrack_generation(uuid4(), "image")).reason == "not_in_group"
            async with AsyncGroupManager.from_env() as groups:
                assert await groups.list(search=str(uuid4())) == []

        asyncio.run(find_it_too())

    def test_an_argument_goes_before_it(self, client: Client) -> None:
        with pytest.raises(SchemaNotInstalled, match="TOKENLIMITS_SCHEMA"):
            TokenLimits(client, schema="public").track(uuid4(), "image")


@pytest.mark.parametrize("name", ["elsewhere", "quotas"])
def test_a_schema_that_is_not_exposed_is_said(client: Client, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}.*Exposed schemas") as caught:
        TokenLimits(client, schema=name, on_unavailable="allow").track(uuid4(), "image")
    assert caught.value.code == "PGRST106"
    with pytest.raises(ConfigurationError, match="Exposed schemas"):
        GroupManager(client, schema=name).list()


def test_a_users_own_schema_of_the_client_does_not_matter(stack: LocalStack) -> None:
    with httpx.Client(trust_env=False) as http:
        options = ClientOptions(schema="elsewhere", httpx_client=http)
        theirs = Client(stack.url, stack.secret_key, options)
        assert GroupManager(theirs, schema="limits").list(search=str(uuid4())) == []
        assert theirs.options.schema == "elsewhere"
