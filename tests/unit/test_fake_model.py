"""The fake's engine against the plain model, side by side, by the machine that drives the SQL."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from tests.sql.semantics.api import Api, parse
from tests.sql.semantics.test_model import SETTINGS, THOROUGH, HoldsMachine, Machine
from tests.support.model import Refusal

from tokenlimits import TokenLimitsError
from tokenlimits.testing._engine import GROUP_NAME, Engine


class FakeApi(Api):
    """The same calls, answered by the engine."""

    def __init__(self) -> None:
        self.engine = empty_engine()

    def call(self, function: str, **arguments: Any) -> Any:
        params = {f"p_{name}": _json(value) for name, value in arguments.items() if value is not None}
        try:
            return parse("", self.engine.answer(function, params))
        except TokenLimitsError as error:
            raise Refusal(error.code or "", str(error)) from error

    def execute(self, query: Any, arguments: Any = None) -> int:
        assert "delete from public.user_groups" in query, "only to forget everything"
        self.engine = empty_engine()
        return 0

    def one(self, query: Any, arguments: Any = None) -> Any:
        assert query == "select count(*) from public.generation_usage"
        return len(self.engine.ledger)

    def add_user(self, user_id: UUID) -> None:
        """Anybody is a user already."""

    def delete_user(self, user_id: UUID) -> None:
        for group in self.engine.find_groups():
            self.engine.remove_group_members(group["id"], [str(user_id)])


class FakeMachine(HoldsMachine):
    """Without what only a database has: tables to edit, counters that might drift, and checks of the shells' own."""

    api: FakeApi
    nothing_drifts = tidy = reserve_for_too_long_or_short = None

    def __init__(self) -> None:
        super().__init__(FakeApi(), ZoneInfo)

    def show_time(self) -> None:
        self.api.engine.move_clock(max(self.model.now, self.api.engine.now))

    def teardown(self) -> None:
        Machine.teardown(self)
        if hasattr(self, "model"):
            statuses = {UUID(usage.id): (usage.status, usage.cost) for usage in self.api.engine.ledger}
            assert statuses == {self.usage_ids[usage.id]: (usage.status, usage.cost) for usage in self.model.usages}


for name in dir(Machine):
    if name.endswith("_in_the_table"):
        setattr(FakeMachine, name, None)


def empty_engine() -> Engine:
    engine = Engine(limits=None, users=None)
    (group,) = engine.find_groups(p_name=GROUP_NAME)
    engine.delete_group(group["id"])
    engine.move_clock(datetime.fromisoformat("2000-01-01T00:00:00Z"))
    return engine


def _json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else str(value) if isinstance(value, UUID) else value


def test_the_fake_answers_what_the_model_answers() -> None:
    run_state_machine_as_test(FakeMachine, settings=settings(SETTINGS, max_examples=5_000 if THOROUGH else 250))
