"""The SQL against its model, the fake's engine, side by side: random histories of calls, edits and time passing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.sql.semantics.database import Database
from tests.sql.semantics.histories import drawn
from tests.sql.semantics.histories.admins import Tables
from tests.sql.semantics.histories.history import happens
from tests.sql.semantics.histories.reports import Reports
from tests.sql.semantics.histories.workers import Time
from tests.sql.semantics.twins import Twins

from tokenlimits.sql_files import one_paste
from tokenlimits.testing._engine import Engine

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
MANY = 150 if THOROUGH else 10

SETTINGS = settings(
    # as many as are each drawn afresh: later ones would be made of earlier ones, and repeat what happened there
    max_examples=10,
    stateful_step_count=60 if THOROUGH else 40,
    deadline=None,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    report_multiple_bugs=False,
)


class Everything(Time, Tables, Reports):
    """What may happen in a history."""


class Trees(Everything):
    """Mostly what changes a tree of groups, and then shows in windows that a first use has opened."""

    def __init__(self, twins: Twins) -> None:
        super().__init__(twins)
        often = [self.track, self.set_window, self.give_back_what_opened_a_window, self.move_group, self.reset]
        self.steps += [step.__name__ for step in [*often, *often, self.delete_group, self.set_override]] * 8

    @happens()
    def set_window(self) -> None:
        limit = {"kind": "image", "mode": "enforce", "max": 13, "counts": None, "starts": "first_use"}
        where = {"scope": self.draw(drawn.scopes), "period": self.one_of(["5 hours", "day", "week"])}
        self.call("set_group_limit", p_group_id=self.group(), p_limit=limit | where)


def numbers(many: int) -> list[object]:
    """Count the histories, of which the first two are quick enough for every day."""
    return [0, 1, *(pytest.param(number, marks=pytest.mark.slow) for number in range(2, many))]


def compare(database: Database, history: type[Everything], number: int) -> None:
    twins = Twins(database.owner)

    @seed(number)
    def machine() -> Everything:
        return history(twins)

    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize("number", numbers(MANY))
def test_sql_answers_what_the_model_answers(shared_database: Database, time_zones: None, number: int) -> None:
    compare(shared_database, Everything, number)


@pytest.mark.parametrize("number", numbers(MANY // 2))
def test_sql_answers_what_the_model_answers_in_trees(shared_database: Database, time_zones: None, number: int) -> None:
    compare(shared_database, Trees, number)


def test_histories_have_every_function_that_the_fake_has() -> None:
    here = Path(__file__).parent
    called = "".join(path.read_text() for path in [here / "twins.py", *(here / "histories").glob("*.py")])
    functions = re.findall(r"create or replace function public\.(\w+)\(", one_paste())
    assert [name for name in functions if hasattr(Engine, name) and f'"{name}"' not in called] == []
    assert sum(hasattr(Engine, name) for name in functions) >= 29
