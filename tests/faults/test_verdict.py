"""The checks find what they are there to find, and nothing in what is right."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from tests.faults.journal import Account, Called, Journal, read
from tests.faults.verdict import Usage, problems

from tokenlimits import ServiceUnavailable, TrackResult
from tokenlimits.models import LimitStatus

ANN, GROUP = UUID(int=1), UUID(int=2)
ASKED = (str(ANN), "image", 3)
FULL = LimitStatus(
    kind="image", period="day", starts="calendar", scope="group", mode="enforce", max=5, used=6, remaining=0,
    reset_at=None, weight=1,
)  # fmt: skip


def told(call: str, status: str | None = "committed", usage: int = 7, cost: int = 3, **more: object) -> Called:
    answer = {"allowed": True, "usage_id": UUID(int=usage), "status": status, "kind": "image", "cost": cost, **more}
    settles = None if call in ("track", "reserve") else str(UUID(int=usage))
    return Called("job", call, settles, ASKED, TrackResult.model_validate(answer))


def doubtful(call: str, error: str | None = "ServiceUnavailable: …") -> Called:
    return Called("job", call, None if call in ("track", "reserve") else str(UUID(int=7)), ASKED, error=error)


def row(status: str = "committed", usage: int = 7, cost: int = 3, kind: str = "image", job: str = "job") -> Usage:
    return Usage(UUID(int=usage), GROUP, ANN, kind, cost, status, job, live=status == "committed")


DENIED = told("track", None, usage_id=None, allowed=False, reason="limit_exceeded")

Cases = dict[str, tuple[list[Called], list[Usage]]]

RIGHT: Cases = {
    "told, and there": ([told("track")], [row()]),
    "told twice of the same": ([told("track"), told("track", replayed=True)], [row()]),
    "denied": ([DENIED], []),
    "in doubt, and done": ([doubtful("track")], [row()]),
    "in doubt, and not done": ([doubtful("track", None)], []),
    "held, and left behind": ([told("reserve", "reserved")], [row("expired")]),
    "settled for less": ([told("reserve", "reserved"), told("commit", cost=1)], [row(cost=1)]),
    "a release in doubt": ([told("reserve", "reserved"), doubtful("release")], [row("released")]),
    "a refund in doubt": ([told("track"), doubtful("refund")], [row()]),
}
WRONG: Cases = {
    "which isn't there": ([told("track")], []),
    "charged 2 times": ([told("track"), doubtful("track")], [row(), row(usage=8)]),
    "0 calls were in doubt": ([DENIED], [row()]),
    "('released', 3), not one of": ([told("reserve", "reserved")], [row("released")]),
    "('committed', 3), not one of": ([told("reserve", "reserved"), told("commit", cost=1)], [row()]),
    "('committed', 2), not one of": ([told("track")], [row(cost=2)]),
    "('reserved', 3), not one of": ([told("reserve", "reserved"), told("commit")], [row("reserved")]),
    "asked for": ([told("track")], [row(kind="video")]),
    "nobody asked for it": ([], [row()]),
    "a limit was passed": ([told("track", limits=(FULL,))], [row()]),
    "denied:": ([told("track", None, usage_id=None, allowed=False, reason="not_in_group")], []),
    "track failed: AlreadySettled": ([doubtful("track", "AlreadySettled: …")], []),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_passes(case: str) -> None:
    calls, rows = RIGHT[case]
    assert problems(Account(calls), rows) == []


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case: str) -> None:
    calls, rows = WRONG[case]
    assert any(case in problem for problem in problems(Account(calls), rows))


def test_a_journal_tells_what_was_answered_and_what_was_in_doubt(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    numbers = [journal.begin("job", "track", None, ASKED) for _ in range(3)]
    journal.end(numbers[1], told("track").answer or ServiceUnavailable(""))
    journal.end(numbers[2], ServiceUnavailable("gone"))
    journal.done("job")
    journal.close()
    with path.open("ab") as torn:
        torn.write(b'{"begun": 3, "jo')

    account = read([path])

    assert [called.in_doubt for called in account.calls] == [True, False, True]
    assert account.calls[1].answer == told("track").answer
    assert (account.begun, account.done) == ({"job"}, {"job"})
