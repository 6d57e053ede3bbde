"""Plans to start a new group from, as apps sell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenlimits import Limit

from ._forms import GroupForm
from ._limit_rows import LimitRow


@dataclass(frozen=True, slots=True)
class Plan:
    """What fills the form of a new group."""

    key: str
    name: str
    words: str
    description: str
    limits: Sequence[Limit]

    def form(self, name: str, parent: str) -> GroupForm:
        """Make the form; a name that was typed stays."""
        rows = [LimitRow.of_limit(limit) for limit in self.limits]
        typed = "" if name in {plan.name for plan in PLANS} else name
        return GroupForm(typed or self.name, self.description, parent=parent, rows=rows)


PLANS: Sequence[Plan] = (
    Plan(
        "free",
        "Free",
        "a few images for each member",
        "Everybody begins here",
        [
            Limit(kind="image", max=25, period="month", scope="member"),
            Limit(kind="image", max=5, period="day", scope="member"),
        ],
    ),
    Plan(
        "trial",
        "Trial",
        "once, and no more",
        "To try it, once",
        [Limit(kind="image", max=50, scope="member"), Limit(kind="video", max=3, scope="member")],
    ),
    Plan(
        "team",
        "Team",
        "one pool, and a part for each seat",
        "Colleagues who share",
        [
            Limit(kind="image", max=1000, period="month"),
            Limit(kind="image", max=200, period="month", scope="member"),
            Limit(kind="video", max=2, period="in_flight", scope="member"),
        ],
    ),
    Plan(
        "pro",
        "Pro",
        "credits for each customer",
        "Each customer has its own credits, from its own billing date",
        [
            Limit(kind="credits", max=1000, period="month", scope="child", starts="anchor",
                  counts={"image": 1, "video": 8}),
            Limit(kind="video", max=2, period="in_flight", scope="child"),
        ],
    ),
    Plan(
        "business",
        "Business",
        "a pool for each customer, with seats",
        "Customers with many members, of whom nobody takes it all",
        [
            Limit(kind="image", max=5000, period="month", scope="child"),
            Limit(kind="image", max=500, period="month", scope="member"),
        ],
    ),
    Plan(
        "api",
        "API",
        "requests by minute and day",
        "For programs",
        [
            Limit(kind="request", max=60, period="minute", scope="child", starts="rolling"),
            Limit(kind="request", max=10_000, period="day", scope="child", starts="rolling"),
        ],
    ),
)  # fmt: skip


def plan_named(key: str) -> Plan | None:
    """Find a plan."""
    return next((plan for plan in PLANS if plan.key == key), None)
