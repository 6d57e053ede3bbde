"""A group, and a limit as it binds one user, one child or the whole group."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from ._limits import Rule, Terms


@dataclass(frozen=True, slots=True)
class Membership:
    """A user's membership of a group; `place` orders members who joined while the clock stood still."""

    joined_at: datetime
    place: int
    anchor_at: datetime | None

    @property
    def anchor(self) -> datetime:
        """From when the member's anchored periods are counted."""
        return self.anchor_at or self.joined_at


@dataclass(eq=False, slots=True)
class Group:
    """A group with its limits and members; `unlimited` allows any kind that has no limit.

    What is used in a spread group is at home with its users.
    """

    id: str
    name: str
    is_spread: bool
    created_at: datetime
    updated_at: datetime
    description: str = ""
    priority: int = 0
    timezone: str = "UTC"
    is_default: bool = False
    anchor_at: datetime | None = None
    unlimited: bool = False
    limits: dict[Rule, Terms] = field(default_factory=dict[Rule, Terms])
    members: dict[str, Membership] = field(default_factory=dict[str, Membership])

    @property
    def anchor(self) -> datetime:
        """From when anchored periods of the group's pools are counted."""
        return self.anchor_at or self.created_at

    def rules_of(self, *scopes: str) -> list[Rule]:
        """List the limits of some scopes."""
        return [rule for rule in self.limits if rule.scope in scopes]

    def rules(self, kind: str | None = None, *, beneath: bool = True, in_flight: bool = True) -> dict[Rule, Terms]:
        """List the limits that count a kind, or all; `beneath`: also those that count only what is beneath."""
        rules = {
            rule: terms
            for rule, terms in self.limits.items()
            if (kind is None or kind in terms.weights(rule))
            and (beneath or rule.scope != "child")
            and (in_flight or not rule.in_flight)
        }
        if not rules and self.unlimited and kind is not None:
            return {Rule(kind, "lifetime", "group"): Terms(None)}
        return rules


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit as it binds one subject: `whose` is the user of a member limit, or the child of a child limit.

    None is the owner of a group limit. Of the others, it is all their subjects together, as reports show them.
    """

    owner: Group
    rule: Rule
    terms: Terms = field(compare=False)
    whose: str | None

    @property
    def key(self) -> tuple[str, Rule, str | None]:
        """What identifies a limit of a subject."""
        return self.owner.id, self.rule, self.whose

    @property
    def top(self) -> str:
        """The group whose usage it counts, with all beneath."""
        return self.whose if self.rule.scope == "child" and self.whose is not None else self.owner.id

    @property
    def user_id(self) -> str | None:
        """The user whose usage it counts; None: everybody's."""
        return self.whose if self.rule.scope == "member" else None
