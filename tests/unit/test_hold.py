"""What was declared of a hold, what its end does, and which functions a decorator takes: all without any I/O."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from tokenlimits import (
    ConfigurationError,
    GenerationDenied,
    InvalidRequest,
    LimitExceeded,
    ServiceUnavailable,
    TrackResult,
)
from tokenlimits._core import workers
from tokenlimits._core.call import Call
from tokenlimits._core.hold import RunningHold
from tokenlimits._drivers import limited
from tokenlimits.errors import AlreadySettled, HoldExpired

ANN = "0197f0a0-0000-7000-8000-000000000001"
USAGE = UUID("0197f0a0-0000-7000-8000-000000000009")
WHEN = datetime(2026, 3, 1, 12, tzinfo=UTC)
RESERVE = workers.reserve(ANN, "video", 8, 600, "job-1", None, None)
RESERVED = TrackResult(allowed=True, usage_id=USAGE, status="reserved", expires_at=WHEN, kind="video", cost=8)
UNRECORDED = TrackResult(allowed=True, reason="unavailable", kind="video", cost=8)

ABNORMAL = [ValueError("no"), KeyboardInterrupt(), SystemExit(1), asyncio.CancelledError(), GeneratorExit()]
abnormal = pytest.mark.parametrize("error", ABNORMAL, ids=lambda error: type(error).__name__)


def held(answer: TrackResult = RESERVED) -> RunningHold:
    return RunningHold(RESERVE, answer)


def sent(hold: RunningHold, error: BaseException | None = None) -> tuple[str, int | None]:
    settlement = hold.settlement(error)
    assert isinstance(settlement, Call)
    assert settlement.params["p_usage_id"] == str(USAGE)
    assert settlement.retry_safe
    return settlement.function, settlement.params.get("p_cost")


class TestNormalEnd:
    def test_commits_what_was_reserved(self) -> None:
        assert sent(held()) == ("commit_generation", 8)

    def test_whatever_was_used(self) -> None:
        hold = held()
        hold.used(3)
        assert sent(hold) == ("commit_generation", 8)

    @pytest.mark.parametrize("cost", [0, 1, 8])
    def test_commits_what_the_body_said(self, cost: int) -> None:
        hold = held()
        hold.commit(cost=cost)
        assert sent(hold) == ("commit_generation", cost)

    def test_commits_what_was_said_last(self) -> None:
        hold = held()
        hold.commit(cost=3)
        hold.commit()
        assert sent(hold) == ("commit_generation", 8)


class TestAbnormalEnd:
    @abnormal
    def test_releases(self, error: BaseException) -> None:
        assert sent(held(), error) == ("release_generation", None)

    @abnormal
    def test_commits_what_was_used(self, error: BaseException) -> None:
        hold = held()
        hold.used(2)
        hold.used(5)
        assert sent(hold, error) == ("commit_generation", 5)

    @abnormal
    def test_commits_what_the_body_had_committed(self, error: BaseException) -> None:
        hold = held()
        hold.used(5)
        hold.commit(cost=6)
        assert sent(hold, error) == ("commit_generation", 6)

    def test_of_which_nothing_was_used_releases(self) -> None:
        hold = held()
        hold.used(0)
        assert sent(hold, ValueError()) == ("release_generation", None)


class TestMoreThanWasReserved:
    @pytest.mark.parametrize(("cost", "overage"), [(8, None), (9, "charge"), (10**9, "charge")])
    @abnormal
    def test_is_charged_if_it_was_used(self, error: BaseException, cost: int, overage: str | None) -> None:
        hold = held()
        hold.used(cost)
        settlement = hold.settlement(error)
        assert isinstance(settlement, Call)
        assert (settlement.params["p_cost"], settlement.params.get("p_overage")) == (cost, overage)

    @pytest.mark.parametrize("error", [None, *ABNORMAL])
    @pytest.mark.parametrize("cost", [0, 8, 9, None])
    def test_is_charged_if_the_body_said_so(self, error: BaseException | None, cost: int | None) -> None:
        hold = held()
        hold.used(3)
        hold.commit(cost, overage="charge")
        settlement = hold.settlement(error)
        assert isinstance(settlement, Call)
        assert settlement.params["p_cost"] == (8 if cost is None else cost)
        assert settlement.params["p_overage"] == "charge"

    def test_and_only_declared_is_not_charged_at_a_normal_end(self) -> None:
        hold = held()
        hold.used(11)
        assert sent(hold) == ("commit_generation", 8)

    def test_is_refused_with_what_to_do_about_it(self) -> None:
        with pytest.raises(InvalidRequest, match='at most 8, as reserved, unless overage="charge"'):
            held().commit(9)


@pytest.mark.parametrize(
    ("declare", "cost"),
    [(how, cost) for how in ("used", "commit") for cost in (-1, 2.0, "3", True, 10**12)] + [("commit", 9)],
)
def test_what_cannot_be_declared(declare: str, cost: Any) -> None:
    hold = held()
    with pytest.raises(InvalidRequest) as caught:
        getattr(hold, declare)(cost)
    assert caught.value.field == "cost"
    assert sent(hold, ValueError()) == ("release_generation", None)
    assert sent(hold) == ("commit_generation", 8)


@pytest.mark.parametrize("declare", [lambda hold: hold.used(3), lambda hold: hold.commit(3), RunningHold.commit])
@pytest.mark.parametrize("error", [None, ValueError()])
@pytest.mark.parametrize("answer", [RESERVED, UNRECORDED])
def test_what_is_declared_after_the_end_is_not_lost_in_silence(
    declare: Callable[[RunningHold], None], error: BaseException | None, answer: TrackResult
) -> None:
    hold = held(answer)
    hold.settlement(error)
    with pytest.raises(AlreadySettled, match="inside the body"):
        declare(hold)


def test_a_job_that_was_done_before_is_not_settled_again() -> None:
    hold = held(RESERVED.model_copy(update={"status": "committed", "cost": 5, "replayed": True}))
    assert (hold.replayed, hold.status, hold.cost, hold.result.cost) == (True, "committed", 8, 5)
    hold.used(8)
    hold.commit(cost=7)
    assert hold.settlement(None) is None
    assert hold.settlement(ValueError()) is None


def test_a_hold_of_a_job_that_died_is_carried_on() -> None:
    hold = held(RESERVED.model_copy(update={"replayed": True}))
    assert sent(hold) == ("commit_generation", 8)


@pytest.mark.parametrize("error", [None, ValueError()])
def test_what_was_not_recorded_is_not_settled(error: BaseException | None) -> None:
    hold = held(UNRECORDED)
    hold.used(3)
    answer = hold.settlement(error)
    assert isinstance(answer, TrackResult)
    hold.settled(answer)
    assert hold.result == UNRECORDED.model_copy(update={"cost": 3 if error else 8})
    assert (hold.usage_id, hold.status, hold.expires_at) == (None, None, None)


def test_a_denial_is_raised() -> None:
    denied = TrackResult(allowed=False, reason="limit_exceeded", error="8 of 8 used", kind="video", cost=8)
    with pytest.raises(LimitExceeded, match="8 of 8 used") as caught:
        held(denied)
    assert caught.value.result is denied
    with pytest.raises(GenerationDenied):
        held(TrackResult(allowed=False, reason="unavailable", kind="video", cost=8))


def test_shows_itself() -> None:
    assert repr(held()) == f"<Hold of 8 video: reserved, {USAGE}>"
    assert repr(held(UNRECORDED)) == "<Hold of 8 video: not recorded, None>"


class TestFailure:
    def test_after_a_good_body_is_raised_with_what_was_made(self) -> None:
        hold = held()
        hold.returned = "a film"
        failure = HoldExpired("too late")
        with pytest.raises(HoldExpired) as caught:
            hold.failed(failure, None)
        assert caught.value is failure
        assert caught.value.returned == "a film"
        assert pickle.loads(pickle.dumps(failure)).returned == "a film"

    def test_of_the_service_after_a_good_body_says_what_to_do(self) -> None:
        with pytest.raises(ServiceUnavailable) as caught:
            held().failed(ServiceUnavailable("down"), None)
        (note,) = caught.value.__notes__
        assert "commit the usage again" in note
        assert str(USAGE) in note
        assert str(WHEN) in note

    def test_of_another_kind_is_raised_as_it_is(self) -> None:
        with pytest.raises(RuntimeError, match="odd"):
            held().failed(RuntimeError("odd"), None)

    @abnormal
    def test_beside_the_bodys_own_is_noted_and_logged(
        self, error: BaseException, caplog: pytest.LogCaptureFixture
    ) -> None:
        error = type(error)(*error.args)
        with caplog.at_level(logging.ERROR, "tokenlimits"):
            held().failed(AlreadySettled("released before"), error)
        (note,) = error.__notes__
        assert "released before" in note
        assert str(USAGE) in note
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("tokenlimits", "ERROR")
        assert type(error).__name__ in record.getMessage()

    def test_has_nothing_returned_otherwise(self) -> None:
        assert HoldExpired("too late").returned is None


class TestNothingRecorded:
    @pytest.mark.parametrize(
        "settle",
        [
            lambda: workers.commit(None, None),
            lambda: workers.release(None),
            lambda: workers.refund_if_recorded(None),
        ],
    )
    def test_is_no_call(self, settle: Callable[[], Any]) -> None:
        assert settle() == TrackResult(allowed=True, reason="unavailable", kind="", cost=0)

    def test_keeps_the_cost(self) -> None:
        answer = workers.commit(None, 5)
        assert isinstance(answer, TrackResult)
        assert answer.cost == 5

    def test_still_checks_the_cost(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            workers.commit(None, -1)
        assert caught.value.field == "cost"


class TestWithoutService:
    ERROR = ServiceUnavailable("down")

    @pytest.mark.parametrize("policy", ["raise", "deny"])
    def test_is_raised(self, policy: Any) -> None:
        call = workers.commit(USAGE, 5)
        assert isinstance(call, Call)
        with pytest.raises(ServiceUnavailable):
            workers.settlement_without_service(call, policy, self.ERROR)

    def test_is_allowed(self) -> None:
        call = workers.commit(USAGE, 5)
        assert isinstance(call, Call)
        answer = workers.settlement_without_service(call, "allow", self.ERROR)
        assert answer == TrackResult(allowed=True, reason="unavailable", usage_id=USAGE, kind="", cost=5)

    def test_never_loses_a_refund(self) -> None:
        with pytest.raises(ServiceUnavailable):
            workers.settlement_without_service(workers.refund(USAGE), "allow", self.ERROR)


@pytest.mark.parametrize("ttl", [0, -1, 30 * 86_400 + 1, 1.5, "600", None, True])
def test_a_ttl_that_cannot_be(ttl: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        workers.reserve(ANN, "video", 8, ttl, None, None, None)
    assert caught.value.field == "ttl"


# Decorators


def plain(prompt: str, user_id: str = ANN, *rest: str, job: str | None = None, **more: str) -> str:
    """Make a picture."""
    return f"{prompt} for {user_id}"


async def coroutine(user_id: str) -> None: ...


def generator(user_id: str) -> Any:
    yield user_id


async def async_generator(user_id: str) -> Any:
    yield user_id


class CallsAsync:
    async def __call__(self, user_id: str) -> None: ...


def reservation(function: Any = plain, **options: Any) -> limited.Reserve:
    settings: dict[str, Any] = {
        "kind": "image", "user": "user_id", "cost": 1, "ttl": 60,
        "idempotency_key": None, "group_id": None, "metadata": None,
    }  # fmt: skip
    return limited.reservation(function, **settings | options)


class TestArguments:
    @pytest.mark.parametrize(
        ("args", "kwargs"), [(("p",), {}), (("p", ANN), {}), (("p",), {"user_id": ANN}), (("p", ANN, "x"), {"y": "z"})]
    )
    def test_the_user_by_name(self, args: Any, kwargs: Any) -> None:
        call = reservation()(*args, **kwargs)
        assert (call.function, call.params["p_user_id"]) == ("reserve_generation", ANN)
        assert UUID(call.params["p_idempotency_key"]).version == 7

    def test_the_rest(self) -> None:
        call = reservation(group_id=USAGE, metadata={"a": 1}, cost=3)("p")
        sent = {name: value for name, value in call.params.items() if name != "p_idempotency_key"}
        assert sent == {
            "p_user_id": ANN,
            "p_kind": "image",
            "p_cost": 3,
            "p_ttl": 60,
            "p_group_id": str(USAGE),
            "p_metadata": {"a": 1},
        }

    def test_by_functions_of_the_same_arguments(self) -> None:
        reserve = reservation(
            user=lambda prompt, **_: prompt,
            cost=lambda prompt, **more: len(more),
            idempotency_key=lambda prompt, **more: more["job"],
        )
        call = reserve(ANN, job="7", x="y")
        assert (call.params["p_user_id"], call.params["p_cost"], call.params["p_idempotency_key"]) == (ANN, 2, "7")

    def test_a_key_by_name(self) -> None:
        reserve = reservation(idempotency_key="job")
        assert reserve("p", job="7").params["p_idempotency_key"] == "7"
        assert UUID(reserve("p").params["p_idempotency_key"]).version == 7

    def test_each_call_has_its_own_key(self) -> None:
        reserve = reservation()
        assert reserve("p").params["p_idempotency_key"] != reserve("p").params["p_idempotency_key"]

    def test_arguments_that_the_function_does_not_take(self) -> None:
        with pytest.raises(TypeError, match="prompt"):
            reservation()()

    @pytest.mark.parametrize(("name", "error"), [("user_id", "not-a-uuid"), ("cost", 0)])
    def test_a_value_that_is_not_valid(self, name: str, error: Any) -> None:
        options = {"cost": lambda prompt, user_id: error} if name == "cost" else {}
        with pytest.raises(InvalidRequest) as caught:
            reservation(**options)("p", ANN if name == "cost" else error)
        assert caught.value.field == name


class TestRefusedWhenDecorated:
    @pytest.mark.parametrize("option", ["user", "idempotency_key"])
    @pytest.mark.parametrize("name", ["user", "rest", "more", ""])
    def test_a_name_of_no_parameter(self, option: str, name: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"{option}: plain\(\) has no parameter '{name}' \(it has prompt"):
            reservation(**{option: name})

    @pytest.mark.parametrize("option", ["user", "idempotency_key"])
    def test_neither_name_nor_function(self, option: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"{option}: must be the name .*got 7"):
            reservation(**{option: 7})

    def test_no_user(self) -> None:
        with pytest.raises(ConfigurationError, match="user: "):
            reservation(user=None)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("kind", "An image"), ("cost", 0), ("cost", "cost"), ("ttl", 0), ("group_id", "x"), ("metadata", [1])],
    )
    def test_what_is_never_valid(self, field: str, value: Any) -> None:
        with pytest.raises(InvalidRequest) as caught:
            reservation(**{field: value})
        assert caught.value.field == field

    @pytest.mark.parametrize("wrapper", [classmethod, staticmethod])
    def test_what_wraps_a_method(self, wrapper: Any) -> None:
        with pytest.raises(ConfigurationError, match="below @classmethod and @staticmethod"):
            reservation(wrapper(plain))

    @pytest.mark.parametrize("function", [coroutine, async_generator, CallsAsync(), functools.partial(coroutine, ANN)])
    def test_an_async_one_by_the_sync_client(self, function: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"\(\) is async, so that it needs an AsyncTokenLimits"):
            limited.decorated(function, reservation(user=lambda: ANN), unused)

    @pytest.mark.parametrize("function", [plain, generator, functools.partial(plain, "p")])
    def test_a_plain_one_by_the_async_client(self, function: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"\(\) is not async, so that it needs a TokenLimits"):
            limited.async_decorated(function, reservation(user=lambda: ANN), unused)


def unused(call: Call[TrackResult]) -> Any:
    raise AssertionError(call)


class TestDecorated:
    def test_keeps_what_the_function_is(self) -> None:
        decorated = limited.decorated(plain, reservation(), unused)
        assert inspect.signature(decorated) == inspect.signature(plain)
        assert (decorated.__name__, decorated.__doc__, decorated.__module__) == ("plain", "Make a picture.", __name__)

    def test_keeps_its_sort(self) -> None:
        assert inspect.isgeneratorfunction(limited.decorated(generator, reservation(generator), unused))
        made = [limited.async_decorated(f, reservation(f), unused) for f in (coroutine, async_generator)]
        assert inspect.iscoroutinefunction(made[0])
        assert inspect.isasyncgenfunction(made[1])

    def test_a_function_that_turns_out_to_be_async(self) -> None:
        def disguised(user_id: str) -> Any:
            return coroutine(user_id)

        decorated = limited.decorated(disguised, reservation(disguised), lambda _: nullcontext(held()))
        with pytest.raises(ConfigurationError, match=r"disguised.* is async"):
            decorated(ANN)
