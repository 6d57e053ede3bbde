"""A history of the SQL and its model: something happens, then something else, and time passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from tests.sql.semantics.api import Json
from tests.sql.semantics.histories import drawn
from tests.sql.semantics.twins import Twins
from tests.support import invariants

from tokenlimits.testing._ledger import Usage

Step = TypeVar("Step", bound=Callable[..., None])
T = TypeVar("T")


def happens(weight: int = 1) -> Callable[[Step], Step]:
    """Make a method something that happens, by its weight more often than the rest."""

    def add(step: Step) -> Step:
        step.weight = weight  # type: ignore[attr-defined]
        return step

    return add


class History(RuleBasedStateMachine):
    """Begins with three or five groups; afterwards nothing has drifted, and all that both know is the same.

    It has one rule, for of many hypothesis leaves some out: there would be no holds in most histories.
    """

    def __init__(self, twins: Twins) -> None:
        super().__init__()
        self.twins = twins
        self.deleted: list[str] = []
        self.has_failed = False
        self.steps = [name for name in dir(self) for _ in range(getattr(getattr(self, name), "weight", 0))]

    @initialize(
        beginning=st.sampled_from(drawn.BEGINNINGS),
        zone=drawn.zones,
        anchor=st.none() | drawn.anchors,
        limits=st.tuples(*[drawn.some_limits] * 5),
        tree=st.sampled_from(drawn.TREES),
        is_spread=drawn.rarely,
    )
    def begin(
        self,
        beginning: str,
        zone: str,
        anchor: str | None,
        limits: tuple[list[Json], ...],
        tree: tuple[int | None, ...],
        is_spread: bool,
    ) -> None:
        self.twins.begin(datetime.fromisoformat(beginning), drawn.USERS)
        fields: tuple[Json, ...] = ({"p_timezone": zone}, {"p_priority": 1, "p_anchor_at": anchor}, {}, {}, {})
        groups: list[str] = []
        for number, above in enumerate(tree):
            parent = None if above is None else groups[above]
            allowed = [limit for limit in limits[number] if limit["scope"] == "member" or not is_spread]
            params = {"p_limits": allowed, "p_parent_id": parent, "p_is_spread": is_spread, **fields[number]}
            groups.append(self.call("save_group", p_name=f"Group {number}", **params)["id"])
            self.call("add_group_members", p_group_id=groups[-1], p_user_ids=drawn.USERS[number % 3 :][:2])

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        self.data = data
        self.has_failed = True
        getattr(self, self.one_of(self.steps))()
        self.nothing_drifts()
        self.has_failed = False

    def teardown(self) -> None:
        """Compare everything, if nothing has differed yet."""
        if self.has_failed:
            return
        assert self.twins.call("tokenlimits_version")
        for user in drawn.USERS:
            self.twins.call("user_generation_usage", p_user_id=user)
        self.twins.call("find_groups")
        self.twins.call("group_usage")
        for group in self.groups():
            self.twins.call("find_limit_overrides", p_group_id=group["id"])
        self.twins.pages("export_history", p_bucket="hour")
        self.twins.compare_tables()
        self.twins.pages("export_usage")
        self.sweep_all()
        self.nothing_drifts()
        self.twins.compare_tables()
        self.twins.pages("export_usage")

    def nothing_drifts(self) -> None:
        assert invariants.drift(self.twins.connection) == []

    def sweep_all(self) -> None:
        while self.twins.count("select tokenlimits.tidy()"):
            pass

    def call(self, function: str, **params: Any) -> Any:
        """Call a function of both, and compare what they answer; a moment passes."""
        answer = self.twins.call(function, **params)
        self.twins.wait(timedelta(milliseconds=1))
        return answer

    # what there is, and what is drawn of it

    def draw(self, strategy: st.SearchStrategy[T]) -> T:
        return self.data.draw(strategy)

    def one_of(self, options: Sequence[T]) -> T:
        return self.data.draw(st.sampled_from(options))

    def groups(self) -> list[Json]:
        return self.twins.model.find_groups()

    def group(self) -> str:
        """Draw any group, rarely one that is gone."""
        return self.one_of([group["id"] for group in self.groups()] * 4 + self.deleted[-1:])

    def place(self, group: str | None = None) -> str | None:
        """Draw beneath what a group, or a new one, is to be: mostly where it can be; None: at the top."""
        there = [each["id"] for each in self.groups()]
        beneath = set(self.twins.model._beneath(group)) if group else set[str]()
        return self.one_of(
            [None, None, *[each for each in there if each not in beneath] * 5, *there, *self.deleted[-1:]]
        )

    def pin(self) -> str | None:
        """Draw a group to pin: mostly none, any that there is, rarely one that is gone."""
        there = [group["id"] for group in self.groups()]
        return self.one_of([None] * (2 * len(there) + 2) + there + self.deleted[-1:])

    def holds(self, *statuses: str) -> list[Usage]:
        return [usage for usage in self.twins.model.ledger if usage.expires_at and usage.status in statuses]
