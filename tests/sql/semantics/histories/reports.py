"""What people look at."""

from __future__ import annotations

from hypothesis import strategies as st
from tests.sql.semantics.api import Json
from tests.sql.semantics.histories import drawn
from tests.sql.semantics.histories.history import History, happens
from tests.sql.semantics.twins import email_of


class Reports(History):
    """Usage, history, the ledger, groups and people."""

    @happens(2)
    def look_at_usage(self) -> None:
        self.twins.call("user_generation_usage", p_user_id=self.draw(drawn.users))
        self.twins.call("group_usage", p_group_id=self.pin())

    @happens()
    def look_at_ones_own_usage(self) -> None:
        self.twins.sign_in(self.draw(st.none() | drawn.users | drawn.users))
        self.twins.call("my_generation_usage")
        self.twins.sign_in(None)

    @happens(2)
    def look_at_history(self) -> None:
        params = {**self.part(), "p_bucket": self.one_of(["hour", "day", "week", "month"])}
        self.twins.call("generation_history", **params)
        self.twins.pages("export_history", **params, p_page_size=self.draw(drawn.sizes))

    @happens(2)
    def look_at_the_ledger(self) -> None:
        params, size = self.part(), self.draw(drawn.sizes)
        self.twins.call("limit_pressure", p_group_id=self.group(), p_at_least=self.one_of([1, 60, 100]), p_count=size)
        self.twins.call("top_members", **params | {"p_group_id": self.group()}, p_count=size)
        self.twins.pages("export_usage", **params, p_user_id=self.draw(st.none() | drawn.users), p_page_size=size)
        # in the table, a row is "reserved" until its hold is swept, which the model does when time passes
        self.sweep_all()
        self.twins.compare_tables()

    @happens()
    def look_at_overrides(self) -> None:
        found = self.twins.call("find_limit_overrides", p_group_id=self.group())
        after = [override["id"] for override in found] if isinstance(found, list) else []
        whose = self.draw(st.sampled_from([{}, {"p_user_id": self.draw(drawn.users)}, {"p_child_id": self.group()}]))
        params = {**whose, "p_after": self.one_of([None, *after])}
        self.twins.call("find_limit_overrides", p_group_id=self.group(), **params, p_page_size=self.draw(drawn.sizes))

    @happens()
    def look_for_groups(self) -> None:
        name, size = self.draw(st.none() | drawn.names), self.draw(drawn.sizes)
        self.twins.call("find_groups", p_name=name, p_page_size=size)
        self.twins.call("find_groups", p_parent_id=self.group())
        self.twins.call("find_groups", p_search=self.draw(drawn.parts), p_after=name, p_page_size=size)
        self.twins.call("group_usage", p_after=name, p_page_size=size)
        self.twins.call("usage_drift", p_group_id=self.group())

    @happens()
    def look_for_people(self) -> None:
        part, size = self.draw(drawn.parts), self.draw(drawn.sizes)
        self.twins.call("find_users", p_email=part, p_page_size=size)
        self.twins.call("find_users_by_email", p_emails=[email_of(user).upper() for user in drawn.USERS[size:]])
        params = {"p_search": self.one_of([None, part]), "p_after": self.draw(st.none() | drawn.users)}
        self.twins.call("group_members", p_group_id=self.group(), **params, p_page_size=size)

    def part(self) -> Json:
        """Draw of which group and kind, since and until when."""
        since, until = (self.draw(st.none() | drawn.pasts) for _ in range(2))
        return {
            "p_group_id": self.pin(),
            "p_kind": self.draw(st.none() | drawn.kinds),
            "p_since": since and (self.twins.now - since).isoformat(),
            "p_until": until and (self.twins.now - until).isoformat(),
        }
