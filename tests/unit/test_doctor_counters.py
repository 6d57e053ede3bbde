"""How many groups' counters the doctor compares: as many as there is time for, or all."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tokenlimits import GroupManager
from tokenlimits.cli.doctor import _database
from tokenlimits.cli.doctor._database import check_ledger
from tokenlimits.models import CounterDrift, Group, Reconciliation
from tokenlimits.testing import FakeTokenLimits

_GROUPS = 70


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> GroupManager:
    """So many groups that each takes a second of the ten."""
    fake = FakeTokenLimits()
    for n in range(_GROUPS - 1):
        fake.groups.create(f"group {n:02}")
    seconds = iter(range(10_000))
    monkeypatch.setattr(_database, "monotonic", lambda: next(seconds))
    return fake.groups


def test_as_many_as_there_is_time_for(groups: GroupManager) -> None:
    (found,) = check_ledger(groups, "public", every_group=False)
    assert (found.level, found.says) == (
        "ok", "They agree with the ledger in 10 of 70 groups; --all checks the rest.",
    )  # fmt: skip


def test_all_that_there_are(groups: GroupManager) -> None:
    (found,) = check_ledger(groups, "public", every_group=True)
    assert (found.level, found.says) == ("ok", "They agree with the ledger.")


def test_what_differs_is_recounted_by_its_id(groups: GroupManager, monkeypatch: pytest.MonkeyPatch) -> None:
    last: Group = groups.list()[-1]
    drift = CounterDrift(kind="image", period="day", starts="calendar", scope="group", subject=uuid4(), was=1, used=2)

    def drifted(group_id: object) -> Reconciliation:
        return Reconciliation(counters=(drift,) if group_id == last.id else (), rollup=())

    monkeypatch.setattr(groups, "drift", drifted)
    (found,) = check_ledger(groups, "limits", every_group=True)
    assert (found.level, found.says) == ("error", f"They differ from the ledger in {last.name}.")
    assert f"`select limits.reconcile_usage('{last.id}')`" in found.remedy
    (found,) = check_ledger(groups, "limits", every_group=False)
    assert found.level == "ok"
