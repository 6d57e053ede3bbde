"""What is the fakes' own: limits for everybody, `tracked`, the clock, failures, and `override`."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo, available_timezones

import pytest
from pydantic import ValidationError

from tokenlimits import (
    AsyncGroupManager,
    AsyncTokenLimits,
    ConfigurationError,
    GroupManager,
    InvalidRequest,
    Limit,
    LimitExceeded,
    ServiceUnavailable,
    TokenLimits,
    atrack_generation,
    track_generation,
)
from tokenlimits.async_client import _AsyncDefault
from tokenlimits.client import _Default
from tokenlimits.errors import AccessDenied, HoldExpired, UnknownUser
from tokenlimits.senders import Sender
from tokenlimits.sql_files import one_paste
from tokenlimits.testing import (
    FakeAsyncGroupManager,
    FakeAsyncTokenLimits,
    FakeGroupManager,
    FakeTokenLimits,
    override,
)
from tokenlimits.testing._engine import Engine
from tokenlimits.testing._periods import period_of

ROOT = Path(__file__).parents[2]
ANN, BOB = UUID(int=1), UUID(int=2)
DOWN = ServiceUnavailable("Supabase is down", retry_after=3)

AnyFake = FakeTokenLimits | FakeAsyncTokenLimits


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing here may reach for a real Supabase."""
    for name in ("SUPABASE_URL", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = _Default.current, _AsyncDefault.current
    _Default.current = _AsyncDefault.current = None
    yield
    _Default.current, _AsyncDefault.current = before


class TestGroupIds:
    def test_may_be_chosen_and_are_never_used_again(self) -> None:
        groups = FakeTokenLimits().groups
        id_ = uuid4()
        assert groups.create("Pro", id=id_).id == id_
        for again in (id_, str(id_).upper()):
            with pytest.raises(InvalidRequest) as raised:
                groups.create("Other", id=again)
            assert (raised.value.field, raised.value.code) == ("id", "TL001")
        groups.delete(id_)
        with pytest.raises(InvalidRequest, match="is or was the id of another group") as raised:
            groups.create("Pro", id=id_)
        assert raised.value.field == "id"
        assert groups.create("Pro").id != id_

    def test_are_checked_before_anything_is_asked(self) -> None:
        fake = FakeTokenLimits()
        fake.fail(AssertionError("it was asked"))
        with pytest.raises(InvalidRequest) as raised:
            fake.groups.create("Pro", id="pro")
        assert raised.value.field == "id"


def test_a_schema_is_checked_and_makes_no_difference() -> None:
    assert FakeTokenLimits({"image": 1}, schema="limits").track(ANN, "image")
    assert FakeTokenLimits.from_env(schema="limits").track(ANN, "image")
    for fake in (FakeTokenLimits, FakeAsyncTokenLimits):
        with pytest.raises(ConfigurationError, match=r"^schema: "):
            fake(schema="auth")


class TestLimits:
    def test_everybody_shares_the_pools(self) -> None:
        fake = FakeTokenLimits(limits={"image": 2})
        assert fake.track(ANN, "image").remaining == 1
        assert fake.track(BOB, "image").remaining == 0
        denied = fake.track(uuid4(), "image")
        assert denied.error == "Image generation limit exceeded: 2 of 2 used in total"
        assert fake.track(ANN, "video").reason == "no_limit_for_kind"

    def test_may_be_any(self) -> None:
        fake = FakeTokenLimits([Limit(kind="image", max=1, period="day", scope="member")])
        assert fake.track(ANN, "image")
        assert fake.track(BOB, "image")
        assert not fake.track(ANN, "image")

    def test_none_allow_everything(self) -> None:
        fake = FakeTokenLimits()
        result = fake.track(ANN, "image", 1_000_000)
        assert (result.allowed, result.remaining, result.reset_at) == (True, None, None)
        assert result.group is not None
        assert result.group.name == "fake"
        assert [(limit.max, limit.used) for limit in result.limits] == [(None, 1_000_000)]
        assert fake.check(BOB, "anything")
        assert fake.record(ANN, "video", 3).limits[0].used == 3
        assert fake.usage(ANN) == ()

    def test_an_empty_set_allows_nothing(self) -> None:
        assert FakeTokenLimits({}).track(ANN, "image").reason == "no_limit_for_kind"

    def test_set_later_end_that_everything_is_allowed(self) -> None:
        fake = FakeTokenLimits()
        group = fake.groups.get_by_name("fake")
        fake.groups.set_limit(group.id, Limit(kind="image", max=1))
        assert [bool(fake.track(ANN, "image")) for _ in range(2)] == [True, False]
        assert fake.track(ANN, "video")
        fake.groups.set_limits(group.id, {"image": 5})
        assert not fake.track(ANN, "video")

    def test_are_checked(self) -> None:
        with pytest.raises(InvalidRequest) as raised:
            FakeTokenLimits({"image": 1, "Video": 2})
        assert raised.value.field == "limits[1].kind"
        with pytest.raises(InvalidRequest) as raised:
            FakeAsyncTokenLimits(users={"ann": None})
        assert raised.value.field == "users[0]"

    def test_of_another_group_are_for_its_members(self) -> None:
        fake = FakeTokenLimits({"image": 0})
        pro = fake.groups.create("Pro", limits={"image": 9})
        fake.groups.add_member(pro.id, ANN)
        assert fake.track(ANN, "image").remaining == 8
        assert not fake.track(BOB, "image")

    def test_hold_with_many_threads(self) -> None:
        fake = FakeTokenLimits([Limit(kind="image", max=300), Limit(kind="image", max=40, scope="member")])
        users = [uuid4() for _ in range(10)]
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda number: fake.track(users[number % 10], "image").allowed, range(600)))
        assert sum(results) == len(fake.tracked) == 300


class TestUsers:
    def test_are_all_ids(self) -> None:
        fake = FakeTokenLimits()
        assert fake.groups.add_member(fake.groups.get_by_name("fake").id, uuid4())
        assert fake.groups.find_users("a") == []

    def test_are_those_that_were_given(self) -> None:
        fake = FakeTokenLimits(users={str(ANN): "ann@example.com", BOB: None})
        group = fake.groups.create("Team").id
        assert fake.groups.add_members(group, [ANN, BOB]).added == 2
        assert [member.email for member in fake.groups.members(group)] == ["ann@example.com", None]
        assert [user.id for user in fake.groups.find_users("ANN")] == [ANN]
        for groups in (fake.groups, FakeTokenLimits(users={}).groups):
            group = groups.get_by_name("fake").id
            with pytest.raises(UnknownUser):
                groups.add_member(group, uuid4())


class TestTracked:
    def test_says_what_was_recorded(self) -> None:
        fake = FakeTokenLimits({"image": 3})
        first = fake.track(ANN, "image", 2, idempotency_key="job-1", metadata={"prompt": "a cat"})
        fake.track(ANN, "image", 2, idempotency_key="job-1")
        fake.track(BOB, "image", 2)
        fake.check(BOB, "image")
        yesterday = fake.now - timedelta(days=1)
        fake.record(BOB, "image", created_at=yesterday)
        one, two = fake.tracked
        assert first.group is not None
        assert one.model_dump() == {
            "usage_id": first.usage_id,
            "user_id": ANN,
            "kind": "image",
            "cost": 2,
            "status": "committed",
            "group": first.group.model_dump(),
            "metadata": {"prompt": "a cat"},
            "idempotency_key": "job-1",
            "created_at": fake.now,
            "expires_at": None,
        }
        assert (two.user_id, two.metadata, two.created_at) == (BOB, {}, yesterday)

    def test_says_which_usage_has_a_key_now(self) -> None:
        fake = FakeTokenLimits()
        first = fake.reserve(ANN, "image", idempotency_key="job")
        fake.release(first.usage_id)
        fake.advance(timedelta(seconds=1))
        assert [usage.idempotency_key for usage in fake.tracked] == ["job"]
        fake.track(ANN, "image", idempotency_key="job")
        assert [usage.idempotency_key for usage in fake.tracked] == [None, "job"]
        exported = fake.groups.export_usage(user_id=ANN)
        assert [usage.idempotency_key for usage in exported] == [None, "job"]

    def test_is_frozen(self) -> None:
        fake = FakeTokenLimits()
        fake.track(ANN, "image", metadata={"prompts": ["a cat"]})
        (usage,) = fake.tracked
        with pytest.raises(ValidationError, match="frozen"):
            usage.cost = 0  # type: ignore[misc]
        usage.metadata.clear()
        assert fake.tracked[0].metadata == {"prompts": ["a cat"]}

    def test_names_the_group_as_it_is_named_now(self) -> None:
        fake = FakeTokenLimits()
        group = fake.groups.get_by_name("fake")
        fake.track(ANN, "image")
        fake.groups.update(group.id, name="Free")
        assert fake.tracked[0].group.name == "Free"
        fake.groups.delete(group.id)
        assert fake.tracked[0].group.model_dump() == {"id": group.id, "name": None}


class TestHolds:
    def test_are_shown_as_they_are_now(self) -> None:
        fake = FakeTokenLimits()
        for _ in range(4):
            fake.reserve(ANN, "video", 8, ttl=60)
        one, two, three, four = fake.tracked
        assert {(usage.status, usage.cost, usage.expires_at) for usage in fake.tracked} == {
            ("reserved", 8, fake.now + timedelta(minutes=1))
        }
        fake.commit(one.usage_id, 5)
        fake.release(two.usage_id)
        fake.refund(fake.commit(three.usage_id, 7).usage_id)
        fake.advance(timedelta(minutes=1))
        assert [(usage.status, usage.cost) for usage in fake.tracked] == [
            ("committed", 5), ("released", 8), ("refunded", 7), ("expired", 8)
        ]  # fmt: skip
        assert {usage.expires_at for usage in fake.tracked} == {one.expires_at}
        assert fake.commit(four.usage_id).status == "committed"

    @pytest.mark.parametrize("make", [FakeTokenLimits, FakeAsyncTokenLimits])
    def test_expire_when_the_clock_says_so(self, make: Any) -> None:
        fake = make({"video": 8})
        answer(fake.reserve(ANN, "video", 8, ttl=60))
        fake.advance(timedelta(seconds=60) - timedelta(microseconds=1))
        assert not answer(fake.check(ANN, "video"))
        fake.advance(timedelta(microseconds=1))
        assert answer(fake.check(ANN, "video", 8))
        with pytest.raises(InvalidRequest, match="must not be before anything"):
            fake.advance(-timedelta(microseconds=1))

    def test_expire_also_when_they_are_not_looked_at(self) -> None:
        fake = FakeTokenLimits({"video": 8})
        hold = fake.reserve(ANN, "video", 8, ttl=1)
        fake.now += timedelta(days=1)
        assert fake.track(ANN, "video", 8)
        with pytest.raises(HoldExpired, match="no longer fits"):
            fake.commit(hold.usage_id)

    def test_keep_the_clock_from_going_back_behind_their_end(self) -> None:
        fake = FakeTokenLimits()
        hold = fake.reserve(ANN, "video")
        fake.advance(timedelta(minutes=1))
        fake.release(hold.usage_id)
        with pytest.raises(InvalidRequest):
            fake.advance(-timedelta(microseconds=1))

    def test_are_generations(self) -> None:
        fake = FakeTokenLimits({"video": 8})
        with fake.generation(ANN, "video", 8) as hold:
            assert [usage.status for usage in fake.tracked] == ["reserved"]
            hold.commit(3)
        with pytest.raises(ZeroDivisionError), fake.generation(ANN, "video", 5) as hold:
            raise ZeroDivisionError
        assert [(usage.status, usage.cost) for usage in fake.tracked] == [("committed", 3), ("released", 5)]

    def test_are_made_by_decorated_functions(self) -> None:
        fake, async_fake = FakeTokenLimits({"video": 1}), FakeAsyncTokenLimits({"video": 1})

        @fake.limited("video", user="user")
        def make(user: UUID) -> str:
            return fake.tracked[-1].status

        @async_fake.limited("video", user="user")
        async def amake(user: UUID) -> str:
            return async_fake.tracked[-1].status

        assert (make(ANN), asyncio.run(amake(ANN))) == ("reserved", "reserved")
        for call in (lambda: make(ANN), lambda: asyncio.run(amake(ANN))):
            with pytest.raises(LimitExceeded):
                call()
        assert [fake.tracked[0].status, async_fake.tracked[0].status] == ["committed", "committed"]

    @pytest.mark.parametrize("make", [FakeTokenLimits, FakeAsyncTokenLimits])
    def test_last_when_settling_fails(self, make: Any) -> None:
        fake = make({"video": 8})
        hold = answer(fake.reserve(ANN, "video", 8, ttl=60))
        fake.fail(DOWN)
        with pytest.raises(ServiceUnavailable):
            answer(fake.commit(hold.usage_id))
        assert fake.tracked[0].status == "reserved"
        assert answer(fake.commit(hold.usage_id)).remaining == 0

    def test_are_kept_apart_by_threads(self) -> None:
        fake = FakeTokenLimits({"video": 40})

        def work(number: int) -> bool:
            hold = fake.reserve(ANN, "video", 4)
            if hold and number % 2:
                fake.commit(hold.usage_id, 1)
            elif hold:
                fake.release(hold.usage_id)
            return bool(hold)

        with ThreadPoolExecutor(8) as threads:
            done = sum(threads.map(work, range(200)))
        (limit,) = fake.usage(ANN)
        assert len(fake.tracked) == done
        assert limit.used == sum(usage.cost for usage in fake.tracked if usage.status == "committed")

    def test_find_nothing_to_reconcile(self) -> None:
        fake = FakeTokenLimits()
        fake.reserve(ANN, "video")
        assert not fake.groups.reconcile(fake.groups.get_by_name("fake").id).drifted


class TestClock:
    def test_stands_still(self) -> None:
        before = datetime.now(UTC)
        fake = FakeTokenLimits()
        assert before <= fake.now <= datetime.now(UTC)
        assert fake.now.utcoffset() == timedelta(0)
        assert fake.now is fake.now

    def test_is_set_and_advanced(self) -> None:
        fake = FakeTokenLimits([Limit(kind="image", max=1, period="day")])
        fake.now = datetime(2026, 2, 1, 0, 30, tzinfo=ZoneInfo("Europe/Paris"))
        assert str(fake.now) == "2026-01-31 23:30:00+00:00"
        assert fake.track(ANN, "image").reset_at == datetime(2026, 2, 1, tzinfo=UTC)
        assert fake.track(ANN, "image").retry_after == 1800
        fake.advance(timedelta(minutes=30))
        assert fake.track(ANN, "image")

    def test_does_not_go_back_behind_what_has_happened(self) -> None:
        fake = FakeTokenLimits({"image": 5})
        fake.advance(-timedelta(days=1))
        fake.track(ANN, "image")
        fake.advance(timedelta(hours=1))
        fake.advance(-timedelta(hours=1))
        with pytest.raises(InvalidRequest, match="Set the clock before you track") as raised:
            fake.advance(-timedelta(microseconds=1))
        assert raised.value.field == "now"
        fake.groups.reset_usage(fake.groups.get_by_name("fake").id)
        with pytest.raises(InvalidRequest):
            fake.advance(-timedelta(microseconds=1))

    def test_needs_a_time_zone(self) -> None:
        with pytest.raises(InvalidRequest, match="time zone"):
            FakeTokenLimits().now = datetime(2026, 1, 1)  # noqa: DTZ001

    def test_is_shared_with_the_groups(self) -> None:
        fake = FakeTokenLimits()
        fake.advance(timedelta(days=3))
        assert fake.groups.create("Pro").created_at == fake.now


class TestFailures:
    def test_come_in_order_and_end(self) -> None:
        fake = FakeTokenLimits()
        fake.fail(DOWN, times=2)
        fake.fail(AccessDenied("The key was revoked"))
        for _ in range(2):
            with pytest.raises(ServiceUnavailable) as raised:
                fake.track(ANN, "image")
            assert raised.value is DOWN
        with pytest.raises(AccessDenied):
            fake.groups.list()
        assert fake.track(ANN, "image")
        assert len(fake.tracked) == 1

    @pytest.mark.parametrize("make", [FakeTokenLimits, FakeAsyncTokenLimits])
    @pytest.mark.parametrize("policy", ["allow", "deny"])
    def test_are_met_by_on_unavailable(self, make: Any, policy: Any) -> None:
        fake = make(on_unavailable=policy)
        for name in ("track", "check"):
            fake.fail(DOWN)
            result = answer(getattr(fake, name)(ANN, "image"))
            assert (result.allowed, result.reason, result.usage_id) == (policy == "allow", "unavailable", None)
            assert (result.error, result.retry_after) == (None if policy == "allow" else "Supabase is down", 3)
        assert fake.tracked == ()

    def test_that_are_no_outage_are_always_raised(self) -> None:
        fake = FakeTokenLimits(on_unavailable="allow")
        fake.fail(AccessDenied("The key was revoked"))
        with pytest.raises(AccessDenied):
            fake.track(ANN, "image")
        fake.fail(DOWN)
        with pytest.raises(ServiceUnavailable):
            fake.usage(ANN)


class TestClients:
    def test_are_the_real_ones(self) -> None:
        fake, async_fake = FakeTokenLimits(), FakeAsyncTokenLimits()
        assert isinstance(fake, TokenLimits)
        assert isinstance(async_fake, AsyncTokenLimits)
        assert isinstance(fake.groups, GroupManager)
        assert isinstance(async_fake.groups, AsyncGroupManager)

    def test_are_made_like_the_real_ones(self) -> None:
        assert FakeTokenLimits.from_env(timeout=3, on_unavailable="deny").track(ANN, "image")
        with pytest.raises(InvalidRequest, match="on_unavailable"):
            FakeTokenLimits(on_unavailable="perhaps")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="timeout"):
            FakeAsyncTokenLimits(timeout=0)

    @pytest.mark.parametrize("cls", [FakeTokenLimits, FakeAsyncTokenLimits])
    def test_tell_of_their_calls_in_either_colour(self, cls: Any) -> None:
        told: list[Any] = []
        sync, asynchronous = cls({"image": 1}, on_result=told.append).in_both_colours()
        assert sync.track(ANN, "image")
        assert not asyncio.run(asynchronous.track(ANN, "image"))
        assert [(each.function, each.outcome, each.attempts) for each in told] == [
            ("track_generation", "ok", 1),
            ("track_generation", "denied", 1),
        ]

    def test_of_groups_are_of_either_colour(self) -> None:
        for fake in (FakeTokenLimits({"image": 1}), FakeAsyncTokenLimits({"image": 1})):
            assert [group.name for group in FakeGroupManager(fake).list()] == ["fake"]
            assert [group.name for group in asyncio.run(FakeAsyncGroupManager(fake).list())] == ["fake"]

    def test_close_without_an_end(self) -> None:
        with FakeTokenLimits({"image": 2}) as fake:
            fake.track(ANN, "image")
        assert fake.track(ANN, "image").remaining == 0

        async def enter() -> Any:
            async with FakeAsyncTokenLimits({"image": 2}) as async_fake:
                return await async_fake.track(ANN, "image")

        assert asyncio.run(enter()).remaining == 1

    def test_let_calls_travel_together(self) -> None:
        fake = FakeAsyncTokenLimits({"image": 2}, coalesce=True)

        async def several() -> list[Any]:
            calls = (fake.track(ANN, "image"), fake.track(BOB, "image"), fake.track(ANN, "image"))
            return await asyncio.gather(*calls, return_exceptions=True)

        assert [bool(result) for result in asyncio.run(several())] == [True, True, False]
        fake.fail(DOWN)
        errors = asyncio.run(several())
        assert [(type(error), str(error)) for error in errors] == [(ServiceUnavailable, "Supabase is down")] * 3

    def test_let_threads_travel_together(self) -> None:
        fake = FakeTokenLimits({"image": 25}, coalesce=True)
        with fake, ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(lambda _: fake.track(ANN, "image").allowed, range(40))) == 25

    def test_wait_a_turn_when_async(self) -> None:
        """As with a real call, others get on meanwhile."""
        turns: list[str] = []

        async def work(name: str, fake: FakeAsyncTokenLimits) -> None:
            turns.append(f"{name} begins")
            await fake.track(ANN, "image")
            turns.append(f"{name} ends")

        async def both() -> None:
            fake = FakeAsyncTokenLimits()
            await asyncio.gather(work("one", fake), work("two", fake))

        asyncio.run(both())
        assert turns == ["one begins", "two begins", "one ends", "two ends"]

    def test_list_more_groups_than_a_page_has(self) -> None:
        fake = FakeTokenLimits()
        for number in range(450):
            fake.groups.create(f"Group {number:03}")
        assert [group.name for group in fake.groups.list()] == ["fake", *(f"Group {n:03}" for n in range(450))]

    def test_list_more_members_than_a_page_has(self) -> None:
        fake = FakeTokenLimits()
        group = fake.groups.get_by_name("fake").id
        ids = [UUID(int=number) for number in range(1201)]
        fake.groups.add_members(group, reversed(ids))
        assert [member.id for member in fake.groups.members(group)] == ids

    def test_show_how_much_was_tracked(self) -> None:
        fake = FakeTokenLimits()
        fake.track(ANN, "image")
        assert repr(fake) == "<FakeTokenLimits of 1 generations in memory, timeout 10 s>"
        assert repr(FakeAsyncTokenLimits()) == "<FakeAsyncTokenLimits of 0 generations in memory, timeout 10 s>"


class TestOverride:
    @pytest.mark.parametrize("make", [FakeTokenLimits, FakeAsyncTokenLimits])
    def test_serves_both_colours(self, make: Any) -> None:
        with override(make({"image": 2})) as fake:
            assert track_generation(ANN, "image").remaining == 1
            assert asyncio.run(atrack_generation(ANN, "image")).remaining == 0
            assert not track_generation(ANN, "image")
        assert len(fake.tracked) == 2

    def test_ends(self) -> None:
        with pytest.raises(KeyError), override(FakeTokenLimits()):
            raise KeyError
        assert _Default.current is None
        assert _AsyncDefault.current is None
        with pytest.raises(ConfigurationError):
            track_generation(ANN, "image")

    def test_nests(self) -> None:
        with override(FakeTokenLimits()) as outer:
            with override(FakeTokenLimits()) as inner:
                track_generation(ANN, "image")
            track_generation(BOB, "image")
        assert [usage.user_id for usage in inner.tracked] == [ANN]
        assert [usage.user_id for usage in outer.tracked] == [BOB]

    def test_reaches_threads_and_loops(self) -> None:
        def track(number: int) -> bool:
            if number % 2:
                return bool(track_generation(ANN, "image"))
            return bool(asyncio.run(atrack_generation(ANN, "image")))

        with override(FakeTokenLimits({"image": 25})), ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(track, range(40))) == 25

    def test_lets_calls_travel_together_if_the_fake_does(self) -> None:
        async def several() -> list[Any]:
            return await asyncio.gather(*(atrack_generation(ANN, "image") for _ in range(3)), return_exceptions=True)

        for coalesce in (False, True):
            with override(FakeTokenLimits(coalesce=coalesce)) as fake:
                fake.fail(DOWN)
                failed = [isinstance(each, ServiceUnavailable) for each in asyncio.run(several())]
            assert sum(failed) == (3 if coalesce else 1)

    def test_decorates(self) -> None:
        fake = FakeTokenLimits()

        @override(fake)
        def work() -> bool:
            return track_generation(ANN, "image").allowed

        assert (work(), work()) == (True, True)
        assert len(fake.tracked) == 2
        assert _Default.current is None

    def test_does_as_the_fake_when_supabase_is_away(self) -> None:
        with override(FakeTokenLimits(on_unavailable="deny")) as fake:
            fake.fail(DOWN, times=2)
            assert track_generation(ANN, "image").reason == "unavailable"
            assert asyncio.run(atrack_generation(ANN, "image")).reason == "unavailable"

    def test_leaves_alone_what_is_passed_in(self) -> None:
        mine = FakeTokenLimits()
        with override(FakeTokenLimits()) as fake:
            track_generation(ANN, "image", client=mine)
        assert (len(mine.tracked), len(fake.tracked)) == (1, 0)


class TestSenders:
    def test_any_client_can_be_one_of_a_fake(self) -> None:
        fake = FakeAsyncTokenLimits({"image": 3})
        clients = [
            TokenLimits(fake.sender),
            AsyncTokenLimits(fake.async_sender),
            TokenLimits(fake.sender, coalesce=True),
        ]
        assert [answer(client.track(ANN, "image")).remaining for client in clients] == [2, 1, 0]
        assert len(fake.tracked) == 3
        assert [group.name for group in GroupManager(fake.sender).list()] == ["fake"]
        assert [group.name for group in answer(AsyncGroupManager(fake.async_sender).list())] == ["fake"]

    @pytest.mark.parametrize("cls", [TokenLimits, GroupManager])
    def test_colours_are_not_mixed(self, cls: type) -> None:
        with pytest.raises(ConfigurationError, match="client"):
            cls(FakeTokenLimits().async_sender)

    @pytest.mark.parametrize("cls", [AsyncTokenLimits, AsyncGroupManager])
    def test_colours_are_not_mixed_in_asyncio(self, cls: type) -> None:
        with pytest.raises(ConfigurationError, match="client"):
            cls(FakeTokenLimits().sender)

    def test_closing_a_client_closes_its_sender(self) -> None:
        class Counting:
            closed = 0

            def __init__(self, sender: Sender) -> None:
                self.send = sender.send

            def close(self) -> None:
                self.closed += 1

        sender = Counting(FakeTokenLimits().sender)
        with TokenLimits(sender) as limits:
            assert limits.track(ANN, "image")
        assert sender.closed == 1

    @pytest.mark.parametrize("make", [FakeTokenLimits, FakeAsyncTokenLimits])
    @pytest.mark.parametrize("coalesce", [False, True])
    def test_both_colours_behave_as_the_fake(self, make: type[AnyFake], coalesce: bool) -> None:
        fake = make({"image": 9}, on_unavailable="deny", coalesce=coalesce)
        both = fake.in_both_colours()
        assert fake in both
        assert [answer(client.track(ANN, "image")).remaining for client in both] == [8, 7]
        fake.fail(DOWN, times=2)
        assert [answer(client.track(ANN, "image")).reason for client in both] == ["unavailable"] * 2


class TestSession:
    @pytest.mark.parametrize("make", [FakeTokenLimits, FakeAsyncTokenLimits])
    def test_is_of_the_user_who_is_signed_in(self, make: type[AnyFake]) -> None:
        fake = make([Limit(kind="image", max=2, scope="member")])
        for user in (BOB, str(ANN)):
            answer(fake.track(ANN, "image"))
            fake.sign_in(user)
            assert answer(fake.my_usage()) == answer(fake.usage(user))
        assert [limit.used for limit in answer(fake.my_usage())] == [2]

    def test_is_nobodys_without_one(self) -> None:
        fake = FakeTokenLimits({"image": 2})
        for user in (None, ANN, None):
            fake.sign_in(user)
            if user is None:
                with pytest.raises(AccessDenied, match="no user is signed in") as raised:
                    fake.my_usage()
                assert raised.value.code == "42501"
        with pytest.raises(InvalidRequest, match="user_id"):
            fake.sign_in("ann")


class TestServer:
    def test_has_the_functions_that_the_sql_has(self) -> None:
        sql = one_paste()
        found = re.findall(r"create or replace function public\.(\w+)\((.*?)\)\s*returns", sql, re.DOTALL)
        in_sql = {name: re.findall(r"\b(p_\w+)", arguments) for name, arguments in found}
        calls = "".join(path.read_text() for path in (ROOT / "src" / "tokenlimits" / "_core").glob("*.py"))
        called = set(re.findall(r'(?:Call|Export)\(\s*"(\w+)"', calls))
        assert len(called) >= 29
        in_fake = {
            name: list(inspect.signature(getattr(Engine, name)).parameters)[1:]
            for name in called
            if hasattr(Engine, name)
        }
        assert in_fake == {name: in_sql[name] for name in called}

    def test_begins_days_when_the_date_is_first_read(self) -> None:
        """Around every change of every time zone."""
        days = [datetime(2025, 6, 1, 12, tzinfo=UTC) + timedelta(days=number) for number in range(3 * 366)]
        changes = 0
        for name in sorted(available_timezones()):
            zone = ZoneInfo(name)
            offsets = [day.astimezone(zone).utcoffset() for day in days]
            for index, day in enumerate(days[1:], 1):
                if offsets[index] != offsets[index - 1]:
                    changes += 1
                    today = day.astimezone(zone).date()
                    since, until = period_of("day", name, day)
                    assert first_read(today, zone, since)
                    assert first_read(today + timedelta(days=1), zone, until)
        assert changes > 500


def first_read(day: date, zone: ZoneInfo, at: datetime) -> bool:
    """Whether a calendar on the wall first reads this date at that moment (or a later one, where it is skipped)."""
    # no clock goes back by more than three hours
    before = (at - timedelta(microseconds=1) - timedelta(minutes=15) * quarter for quarter in range(12))
    return at.astimezone(zone).date() >= day > max(moment.astimezone(zone).date() for moment in before)


def answer(result: Any) -> Any:
    """Wait for the answer of either colour."""
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def test_without_time_zones_it_says_so() -> None:
    script = """
import sys
sys.modules["tzdata"] = None
from tokenlimits.errors import ConfigurationError
from tokenlimits.testing import FakeTokenLimits
groups = FakeTokenLimits().groups
assert groups.create("Pro", timezone="utc").timezone == "UTC"
try:
    groups.create("Paris", timezone="Europe/Paris")
except ConfigurationError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONTZPATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "This system has no time zone data, so not Europe/Paris either. Run: pip install tzdata\n"
