"""Many generations as calls: how they are cut, and who gets which answer."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tokenlimits import GenerationRequest, InvalidRequest, ServiceUnavailable, TrackResult
from tokenlimits._core import workers
from tokenlimits.errors import GroupNotFound, IdempotencyConflict

ANN = UUID("0197f0a0-0000-7000-8000-000000000001")
PRO = "0197f0a0-0000-7000-8000-000000000002"
ALLOWED = {"allowed": True, "reason": None, "kind": "image", "cost": 1}
BUSY = {"allowed": False, "reason": "busy", "kind": "image", "cost": 1}


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"user_id": ANN, "kind": "image"} | fields)


class TestTrackMany:
    def test_a_thousand_travel_together(self) -> None:
        made = workers.track_many(request(cost=n + 1) for n in range(2001))
        assert [[sent["cost"] for sent in call.params["p_requests"]] for call in made] == [
            [*range(1, 1001)],
            [*range(1001, 2001)],
            [2001],
        ]

    def test_nothing_is_nothing(self) -> None:
        assert workers.track_many([]) == []

    def test_what_is_sent(self) -> None:
        given = [
            request(idempotency_key="job", group_id=PRO, metadata={"a": 1}),
            {"user_id": str(ANN), "kind": "video"},
        ]
        [call] = workers.track_many(given)
        assert (call.function, call.retry_safe, list(call.params)) == ("track_generations", True, ["p_requests"])
        first, second = call.params["p_requests"]
        asked = {"user_id": str(ANN), "kind": "image", "cost": 1}
        assert first == asked | {"idempotency_key": "job", "group_id": PRO, "metadata": {"a": 1}}
        assert UUID(second.pop("idempotency_key")).version == 7
        assert second == asked | {"kind": "video"}

    @pytest.mark.parametrize(
        ("given", "field"),
        [
            ([request(), {"user_id": ANN, "kind": "image", "cost": 0}], "requests[1].cost"),
            ([{"kind": "image"}], "requests[0].user_id"),
            ([{"user_id": ANN, "kind": "image", "costs": 5}], "requests[0].costs"),
            ([{"user_id": ANN, "kind": "image", 5: 5}], "requests[0][5]"),
            ([None], "requests[0]"),
            ("image", "requests"),
            (None, "requests"),
        ],
    )
    def test_bad_input_is_refused_with_its_place(self, given: Any, field: str) -> None:
        with pytest.raises(InvalidRequest) as error:
            workers.track_many(given)
        assert error.value.field == field

    def test_answers_are_in_their_places(self) -> None:
        [call] = workers.track_many([request(), request(), request()])
        answers = [ALLOWED | {"remaining": n} for n in range(3)]
        assert [result.remaining for result in call.parse(answers)] == [0, 1, 2]

    @pytest.mark.parametrize("answers", [[], [ALLOWED] * 3])
    def test_as_many_answers_as_requests_or_none(self, answers: Any) -> None:
        [call] = workers.track_many([request(), request()])
        with pytest.raises(ValueError, match="zip"):
            call.parse(answers)

    @pytest.mark.parametrize(
        ("code", "error"),
        [
            ("TL008", IdempotencyConflict),
            ("TL002", GroupNotFound),
            ("TL001", InvalidRequest),
            ("22P02", InvalidRequest),
        ],
    )
    def test_what_is_refused_raises_what_a_single_call_raises(self, code: str, error: type[Exception]) -> None:
        [call] = workers.track_many([request(kind="video", cost=3)])
        refused = {"allowed": False, "reason": "refused", "error": "no", "code": code, "detail": "it"}
        # the server can't say what it could not read
        [result] = call.parse([refused | {"kind": None, "cost": None}])
        assert (bool(result), result.kind, result.cost) == (False, "video", 3)
        with pytest.raises(error, match=r"^no$") as raised:
            result.raise_if_denied()
        assert (raised.value.code, raised.value.detail) == (code, "it")  # type: ignore[attr-defined]


class TestTogether:
    def test_calls_of_track_become_requests(self) -> None:
        made = [workers.track(ANN, "image", n + 1, f"job-{n}", None, None) for n in range(2)]
        call = workers.track_together(made, 250)
        assert call.params == {
            "p_requests": [
                {"user_id": str(ANN), "kind": "image", "cost": 1, "idempotency_key": "job-0"},
                {"user_id": str(ANN), "kind": "image", "cost": 2, "idempotency_key": "job-1"},
            ],
            "p_max_wait": 250,
        }

    def test_busy_groups_are_told_apart(self) -> None:
        made = [workers.track(ANN, "image", 1, None, None, None) for _ in range(3)]
        busy = [BUSY | {"group": group} for group in ({"id": PRO, "name": "Pro"}, None)]
        outcomes = workers.track_together(made, 250).parse([*busy, ALLOWED])
        assert outcomes[:2] == [workers.Busy(PRO), workers.Busy(None)]
        assert isinstance(outcomes[2], TrackResult)

    @pytest.mark.parametrize("group", [[], "x", {"id": []}, {"id": "x"}, {}], ids=str)
    def test_a_busy_group_that_is_none_is_refused(self, group: Any) -> None:
        call = workers.track_together([workers.track(ANN, "image", 1, None, None, None)], 250)
        with pytest.raises(ValueError, match="GroupRef"):
            call.parse([BUSY | {"group": group}])


class TestWithoutService:
    @pytest.mark.parametrize(("policy", "allowed"), [("allow", True), ("deny", False)])
    def test_each_gets_an_answer(self, policy: Any, allowed: bool) -> None:
        [call] = workers.track_many([request(), request(kind="video", cost=2)])
        results = workers.batch_without_service(call, policy, ServiceUnavailable("down"))
        assert [(x.allowed, x.reason, x.kind, x.cost) for x in results] == [
            (allowed, "unavailable", "image", 1),
            (allowed, "unavailable", "video", 2),
        ]

    def test_or_all_an_error(self) -> None:
        [call] = workers.track_many([request()])
        with pytest.raises(ServiceUnavailable, match="down"):
            workers.batch_without_service(call, "raise", ServiceUnavailable("down"))
