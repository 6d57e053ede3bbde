"""The one retry policy, and the deadline over all attempts."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import Retrying

from tokenlimits._core import retry
from tokenlimits._core.retry import Transient, from_answer, give_up, seconds
from tokenlimits._drivers import deadline
from tokenlimits._drivers.deadline import Deadline, extensions


class TestRetryAfter:
    @pytest.mark.parametrize(("header", "expected"), [("3", 3.0), (" 120 ", 120.0), ("0", 0.0), ("007", 7.0)])
    def test_in_seconds(self, header: str, expected: float) -> None:
        assert seconds(header) == expected

    def test_a_date(self) -> None:
        date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
        assert 1800 < (seconds(date) or 0) <= 3600

    @pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S -0000", "%a %b %d %H:%M:%S %Y"])
    def test_a_date_of_an_older_form_is_of_utc_too(self, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
        monkeypatch.setenv("TZ", "America/New_York")
        time.tzset()
        try:
            assert 1800 < (seconds(f"{datetime.now(UTC) + timedelta(hours=1):{form}}") or 0) <= 3600
        finally:
            monkeypatch.undo()
            time.tzset()

    def test_a_date_that_has_passed(self) -> None:
        assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0

    @pytest.mark.parametrize("header", [None, "", "soon", "-3", "3.5", "³", "1e3", "9" * 400, "21 Oct", "∞"])
    def test_garbage(self, header: str | None) -> None:
        assert seconds(header) is None

    @given(
        st.text(alphabet=st.characters(max_codepoint=255))
        | st.from_regex(
            r"\A[A-Z][a-z]{2}, [0-9]{1,25} [A-Z][a-z]{2} [0-9]{1,25} [0-9]{1,3}:[0-9]{1,3}:[0-9]{1,3} GMT\Z"
        )
    )
    def test_whatever_comes(self, header: str) -> None:
        assert (seconds(header) or 0.0) >= 0


class TestFromAnswer:
    @pytest.mark.parametrize("status", [429, 502, 503, 504, 520])
    def test_these_statuses_are_worth_another_try(self, status: int) -> None:
        assert from_answer(status, {}, None) is not None

    @pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 406, 409, 413, 422, 500, 501, 521, 525])
    def test_others_are_not(self, status: int) -> None:
        assert from_answer(status, {}, "TL001") is None

    @pytest.mark.parametrize("code", ["40P01", "40001"])
    @pytest.mark.parametrize("status", [400, 409, 500])
    def test_a_transaction_that_was_rolled_back_is(self, status: int, code: str) -> None:
        transient = from_answer(status, {}, code)
        assert transient is not None
        assert transient.harmless

    @pytest.mark.parametrize(
        ("status", "harmless"), [(429, True), (502, False), (503, False), (504, False), (520, False)]
    )
    def test_only_what_was_turned_away_is_harmless(self, status: int, *, harmless: bool) -> None:
        transient = from_answer(status, {}, None)
        assert transient is not None
        assert transient.harmless is harmless

    @pytest.mark.parametrize("status", [429, 503])
    def test_it_says_when(self, status: int) -> None:
        transient = from_answer(status, {"retry-after": "3"}, None)
        assert transient is not None
        assert transient.retry_after == 3


class Run:
    """Runs the policy on a function that fails as told, with a clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.attempts = 0
        # tenacity's alone: what else runs in this process would wait for hours
        monkeypatch.setattr("tenacity.time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, *errors: Exception, retry_safe: bool = True, timeout: float = 10.0) -> None:
        failing = iter(errors)

        def attempt() -> None:
            self.attempts += 1
            error = next(failing, None)
            if error is not None:
                raise error

        def sleep(wait: float) -> None:
            self.slept.append(wait)
            self.now += wait

        policy: Any = retry.policy("track_generation", retry_safe=retry_safe, timeout=timeout)
        Retrying(**policy, sleep=sleep)(attempt)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


class TestPolicy:
    def test_waits_longer_and_longer_with_jitter(self, run: Run) -> None:
        run(*[Transient("lost") for _ in range(5)])
        assert run.attempts == 6
        for wait, least in zip(run.slept, [0.1, 0.2, 0.4, 0.8, 1.6], strict=True):
            assert least <= wait <= least + 0.1
        assert len(set(run.slept)) == 5
        assert all(a < b for a, b in pairwise(run.slept))

    def test_ends_before_the_deadline(self, run: Run) -> None:
        with pytest.raises(Transient):
            run(*[Transient("lost") for _ in range(1000)])
        assert 1005 < run.now < 1010

    def test_never_waits_longer_than_five_seconds(self, run: Run) -> None:
        with pytest.raises(Transient):
            run(*[Transient("lost") for _ in range(1000)], timeout=100)
        assert max(run.slept) == 5.0

    def test_waits_as_long_as_the_server_asked(self, run: Run) -> None:
        run(Transient("busy", retry_after=3.0), Transient("busy", retry_after=1.0))
        assert run.slept == [3.0, 1.0]

    def test_a_server_that_says_now_is_not_asked_in_a_tight_loop(self, run: Run) -> None:
        run(*[Transient("busy", retry_after=0.0) for _ in range(4)])
        assert min(run.slept) >= 0.1

    def test_gives_up_at_once_when_the_server_asks_for_more_than_there_is(self, run: Run) -> None:
        with pytest.raises(Transient) as caught:
            run(Transient("busy", retry_after=30.0), timeout=10)
        assert caught.value.retry_after == 30
        assert run.slept == []
        assert run.attempts == 1

    def test_what_is_not_safe_is_tried_again_only_where_nothing_was_done(self, run: Run) -> None:
        run(Transient("refused", harmless=True), retry_safe=False)
        assert run.attempts == 2
        with pytest.raises(Transient):
            run(Transient("lost"), retry_safe=False)
        assert run.attempts == 3

    def test_any_other_error_is_final(self, run: Run) -> None:
        with pytest.raises(ZeroDivisionError):
            run(ZeroDivisionError())
        assert run.attempts == 1

    def test_each_wait_is_logged(self, run: Run, caplog: pytest.LogCaptureFixture) -> None:
        run(Transient("the server answered with status 503"))
        [record] = caplog.records
        assert (record.name, record.levelno) == ("tokenlimits", logging.WARNING)
        assert "track_generation: the server answered with status 503; retrying in 0." in record.getMessage()
        assert record.__dict__["function"] == "track_generation"
        assert record.__dict__["attempt"] == 1
        assert record.__dict__["wait"] == run.slept[0]


def test_giving_up_says_what_and_for_how_long(caplog: pytest.LogCaptureFixture) -> None:
    error = give_up("track_generation", Transient("ConnectError refused", retry_after=30), 9.87)
    assert str(error).startswith(
        "Supabase could not be reached for track_generation within 9.9 s: ConnectError refused"
    )
    assert error.retry_after == 30
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


class TestDeadline:
    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(deadline, "monotonic", lambda: self.now)

    def test_what_is_left_is_never_nothing(self) -> None:
        deadline = Deadline(10)
        self.now += 4
        assert (deadline.left(), deadline.elapsed()) == (6, 4)
        self.now += 100
        assert deadline.left() == 0.001

    def test_an_attempt_leaves_time_for_another(self) -> None:
        deadline = Deadline(10)
        assert deadline.attempt(retry_safe=True).left() == 8
        self.now += 8
        assert deadline.attempt(retry_safe=True).left() == pytest.approx(1.6)
        self.now += 1.6
        assert deadline.attempt(retry_safe=True).left() == pytest.approx(0.4)

    def test_what_may_not_be_tried_again_takes_all_there_is(self) -> None:
        assert Deadline(10).attempt(retry_safe=False).left() == 10

    def test_each_step_gets_what_is_left_when_it_begins(self) -> None:
        timeouts = extensions(Deadline(10))["timeout"]
        assert dict(timeouts) == {"connect": 5, "write": 10, "read": 10, "pool": 10}
        self.now += 4
        assert dict(timeouts) == {"connect": 3, "write": 6, "read": 6, "pool": 6}

    def test_each_read_of_a_step_gets_what_is_left(self) -> None:
        waited: list[float | None] = []

        class Stream:
            def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
                waited.append(timeout)
                return b"x" * max_bytes

        made = extensions(Deadline(10))
        stream = Stream()
        made["trace"]("connection.connect_tcp.complete", {"return_value": stream})
        timeout = made["timeout"].get("read")
        for _ in range(3):
            self.now += 3
            assert stream.read(2, timeout=timeout) == b"xx"
        assert stream.read(1, 30.0) == b"x"
        assert stream.read(1) == b"x"
        assert waited == [7, 4, 1, 30.0, None]

    def test_other_events_are_left_alone(self) -> None:
        trace = extensions(Deadline(10))["trace"]
        trace("connection.connect_tcp.started", {})
        trace("http11.receive_response_headers.complete", {"return_value": None})
