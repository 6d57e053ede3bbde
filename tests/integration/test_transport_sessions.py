"""Whose session a call has: the service key, an admin who signed in, somebody else, somebody who just left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from supabase import AsyncClientOptions, Client, ClientOptions, create_async_client, create_client

from tokenlimits import AsyncGroupManager, GroupManager, InvalidRequest, Limit, TokenLimits
from tokenlimits._core.admins import AddedPage
from tokenlimits._core.call import Call
from tokenlimits.errors import AccessDenied, GroupNotFound
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.models import Group, Refused


@pytest.fixture(scope="module")
def admin(stack: LocalStack) -> LocalUser:
    return stack.create_user(f"{uuid4()}@example.com", admin=True)


@pytest.fixture(scope="module")
def nobody(stack: LocalStack) -> LocalUser:
    return stack.create_user(f"{uuid4()}@example.com")


@pytest.fixture
def browser(stack: LocalStack) -> Iterator[Client]:
    """A client with the publishable key, as an admin's app has it."""
    with httpx.Client(trust_env=False) as http:
        yield create_client(
            stack.url, stack.publishable_key, ClientOptions(httpx_client=http, auto_refresh_token=False)
        )


def sign_in(client: Client, user: LocalUser) -> None:
    client.auth.sign_in_with_password({"email": user.email, "password": user.password})


class TestWhoMay:
    def test_an_admin_manages_groups(self, browser: Client, admin: LocalUser) -> None:
        sign_in(browser, admin)
        groups = GroupManager(browser)
        group = groups.create(str(uuid4()), limits={"image": 3})
        assert groups.add_member(group.id, admin.id)
        assert [member.email for member in groups.members(group.id)] == [admin.email]
        assert groups.update(group.id, priority=7).priority == 7
        assert groups.usage(group.id).member_count == 1
        assert groups.history(group.id) == []
        assert groups.find_users(admin.email)[0].id == admin.id
        assert groups.delete(group.id).id == group.id

    def test_an_admin_in_asyncio_too(self, stack: LocalStack, admin: LocalUser) -> None:
        async def run() -> Group:
            async with httpx.AsyncClient(trust_env=False) as http:
                client = await create_async_client(
                    stack.url,
                    stack.publishable_key,
                    AsyncClientOptions(httpx_client=http, auto_refresh_token=False),
                )
                await client.auth.sign_in_with_password({"email": admin.email, "password": admin.password})
                groups = AsyncGroupManager(client)
                group = await groups.create(str(uuid4()))
                return await groups.delete(group.id)

        assert asyncio.run(run()).limits == ()

    def test_an_admin_does_not_track(self, browser: Client, admin: LocalUser) -> None:
        sign_in(browser, admin)
        with pytest.raises(AccessDenied, match="secret"):
            TokenLimits(browser, on_unavailable="allow").track(admin.id, "image")

    def test_a_signed_in_user_is_denied(self, browser: Client, nobody: LocalUser) -> None:
        sign_in(browser, nobody)
        groups = GroupManager(browser)
        for call in (groups.list, groups.usage_all, lambda: groups.create("x"), lambda: groups.find_users("a")):
            with pytest.raises(AccessDenied, match="admin"):
                call()

    def test_nobody_is_denied(self, browser: Client) -> None:
        with pytest.raises(AccessDenied):
            GroupManager(browser).list()
        with pytest.raises(AccessDenied):
            TokenLimits(browser, on_unavailable="allow").track(uuid4(), "image")

    @pytest.mark.parametrize("key", ["sb_secret_wrong", "eyJhbGciOiJIUzI1NiJ9.e30.wrong"])
    def test_a_wrong_key_is_denied_at_once(self, stack: LocalStack, key: str) -> None:
        with httpx.Client(trust_env=False) as http:
            client = create_client(stack.url, key, ClientOptions(httpx_client=http))
            with pytest.raises(AccessDenied) as caught:
                TokenLimits(client, on_unavailable="deny").track(uuid4(), "image")
        assert key not in repr(caught.value)

    def test_another_schema_of_the_client_does_not_matter(self, stack: LocalStack) -> None:
        with httpx.Client(trust_env=False) as http:
            options = ClientOptions(schema="tokenlimits", httpx_client=http)
            client = create_client(stack.url, stack.secret_key, options)
            assert GroupManager(client).list(search=str(uuid4())) == []


class TestAChangeOfSession:
    def test_is_seen_by_the_next_call(self, browser: Client, admin: LocalUser, nobody: LocalUser) -> None:
        groups = GroupManager(browser)
        for _ in range(2):
            with pytest.raises(AccessDenied):
                groups.list()
            sign_in(browser, admin)
            groups.list()
            sign_in(browser, nobody)
            with pytest.raises(AccessDenied):
                groups.list()
            sign_in(browser, admin)
            browser.auth.sign_out()

    @pytest.mark.slow
    def test_while_other_threads_call(self, browser: Client, admin: LocalUser, nobody: LocalUser) -> None:
        groups = GroupManager(browser)
        stop = threading.Event()

        def look(_: int) -> set[str]:
            seen: set[str] = set()
            while not stop.is_set():
                try:
                    groups.list(search="none")
                    seen.add("admin")
                except AccessDenied:
                    seen.add("denied")
            return seen

        with ThreadPoolExecutor(4) as threads:
            looking = [threads.submit(look, n) for n in range(4)]
            for _ in range(8):
                sign_in(browser, admin)
                groups.list()
                sign_in(browser, nobody)
                with pytest.raises(AccessDenied):
                    groups.list()
            sign_in(browser, admin)
            stop.set()
            assert set().union(*(each.result() for each in looking)) == {"admin", "denied"}
        groups.list()


class TestManyMembers:
    @pytest.mark.slow
    def test_fifty_thousand_of_which_three_are_unknown(
        self, stack: LocalStack, browser: Client, admin: LocalUser, team: Callable[..., Group]
    ) -> None:
        sign_in(browser, admin)
        groups = GroupManager(browser, timeout=30)
        group = team([])
        users = stack.create_users(49_997)
        unknown = [uuid4() for _ in range(3)]
        ids = [unknown[0], *users[:30_000], unknown[1], *users[30_000:], unknown[2]]
        progress: list[tuple[int, int]] = []

        result = groups.add_members(group.id, ids, on_progress=lambda done, total: progress.append((done, total)))

        assert (result.added, result.already) == (49_997, 0)
        assert set(result.refused) == {Refused(user_id=id_, reason="there is no such user") for id_ in unknown}
        assert progress == [(done, 50_000) for done in range(5_000, 50_001, 5_000)]
        again = groups.add_members(group.id, ids[:5_001])
        assert (again.added, again.already, len(again.refused)) == (0, 5_000, 1)

        some = [member.id for _, member in zip(range(1_200), groups.members(group.id), strict=False)]
        assert some == sorted(users)[:1_200]
        assert groups.remove_members(group.id, ids) == 49_997
        assert groups.usage(group.id).member_count == 0


class TestAllOrNothing:
    BAD = ({"kind": "image", "max": -1}, {"kind": "Image", "max": 1}, {"kind": "image", "max": 1, "period": "decade"})

    @pytest.mark.parametrize("bad", BAD)
    def test_one_bad_limit_and_there_is_no_group(self, groups: GroupManager, bad: dict[str, Any]) -> None:
        name = str(uuid4())
        with pytest.raises(InvalidRequest) as caught:
            groups.create(name, limits=[Limit(kind="video", max=1), bad])  # pyright: ignore[reportArgumentType]
        assert (caught.value.field or "").startswith("limits[1].")
        with pytest.raises(GroupNotFound):
            groups.get_by_name(name)

    @pytest.mark.parametrize("bad", BAD)
    def test_nor_past_the_clients_own_checks(self, groups: GroupManager, bad: dict[str, Any]) -> None:
        name = str(uuid4())
        limits = [{"period": "day", "scope": "group"} | limit for limit in ({"kind": "video", "max": 1}, bad)]
        call = Call("save_group", {"p_name": name, "p_limits": limits}, Group.model_validate)
        with pytest.raises(InvalidRequest) as caught:
            groups._transport.send(call)
        assert (caught.value.field or "").startswith("limits[1].")
        with pytest.raises(GroupNotFound):
            groups.get_by_name(name)

    def test_a_set_of_limits_is_replaced_whole_or_not_at_all(self, groups: GroupManager, team: Any) -> None:
        group = team([], Limit(kind="image", max=1))
        twice = [{"kind": "video", "period": "day", "scope": "group", "max": n} for n in (1, 2)]
        call = Call("save_group", {"p_group_id": str(group.id), "p_limits": twice}, Group.model_validate)
        with pytest.raises(InvalidRequest):
            groups._transport.send(call)
        assert groups.get(group.id).limits == group.limits

    def test_members_are_not_added_to_a_group_that_is_not_there(self, groups: GroupManager, admin: LocalUser) -> None:
        with pytest.raises(GroupNotFound):
            groups.add_members(uuid4(), [admin.id])
        call = Call("add_group_members", {"p_group_id": str(uuid4()), "p_user_ids": []}, AddedPage.model_validate)
        with pytest.raises(GroupNotFound):
            groups._transport.send(call)

    def test_ids_arrive_as_uuids(self, groups: GroupManager, team: Any, admin: LocalUser) -> None:
        group = team([str(admin.id)])
        assert isinstance(group.id, UUID)
        assert groups.remove_member(str(group.id), str(admin.id))
