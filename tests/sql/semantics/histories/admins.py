"""What admins change, by functions and in a table editor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from tests.sql.semantics.api import Json
from tests.sql.semantics.histories import drawn
from tests.sql.semantics.histories.history import History, happens

from tokenlimits.errors import InvalidRequest


class Admins(History):
    """By functions."""

    @happens()
    def add_group(self) -> None:
        if len(self.groups()) < 7:
            taken = [*self.deleted, *(group["id"] for group in self.groups())]
            id_ = self.one_of([None, None, str(uuid4()), *taken[:1]])
            priority, limits = self.draw(drawn.priorities), self.draw(drawn.limits)
            anchor = self.draw(st.none() | drawn.anchors)
            fields = {"p_priority": priority, "p_limits": limits, "p_anchor_at": anchor}
            names = {group["name"].lower() for group in self.groups()}
            name = self.one_of([each for each in drawn.NAMES if each.lower() not in names] * 3 + drawn.NAMES)
            fields |= {"p_parent_id": self.place(), "p_is_spread": self.draw(drawn.rarely)}
            self.call("save_group", p_id=id_, p_name=name, **fields)

    @happens()
    def edit_group(self) -> None:
        fields = {
            "p_name": self.draw(st.none() | drawn.names),
            "p_priority": self.draw(st.none() | drawn.priorities),
            "p_limits": self.draw(st.none() | drawn.limits),
            "p_is_spread": self.one_of([None] * 9 + [False, True]),
            **self.draw(
                st.just({"p_no_anchor": True}) | st.fixed_dictionaries({"p_anchor_at": st.none() | drawn.anchors})
            ),
        }
        self.call("save_group", p_group_id=self.group(), **fields)
        if fields.get("p_anchor_at") or "p_no_anchor" in fields:
            self.twins.take_order()

    @happens(5)
    def move_group(self) -> None:
        group = self.one_of(self.groups())["id"]
        parent = self.place(group)
        is_top = self.one_of([parent is None] * 20 + [True])
        self.call("save_group", p_group_id=group, p_parent_id=parent, p_no_parent=is_top)
        self.twins.take_order()

    @happens(2)
    def set_default(self) -> None:
        self.call("save_group", p_group_id=self.group(), p_is_default=self.one_of([True, True, False]))

    @happens()
    def set_timezone(self) -> None:
        self.call("save_group", p_group_id=self.group(), p_timezone=self.draw(drawn.zones).upper())
        self.twins.take_order()

    @happens(2)
    def delete_group(self) -> None:
        """Mostly one that has none beneath it, since others are refused; often one with holds."""
        parents = {group["parent_id"] for group in self.groups()}
        leaves = [group["id"] for group in self.groups() if group["id"] not in parents]
        held = [hold.group_id for hold in self.holds("reserved", "expired") if hold.group_id in leaves]
        group = self.one_of([*held, *leaves, *leaves, self.group()])
        if len(self.groups()) > 1:
            self.call("delete_group", p_group_id=group)
            if group in leaves:
                self.deleted.append(group)

    @happens()
    def set_limit(self) -> None:
        self.call("set_group_limit", p_group_id=self.group(), p_limit=self.draw(drawn.limit))

    @happens()
    def change_max(self) -> None:
        for group, limit in self.any_limit():
            self.call("set_group_limit", p_group_id=group, p_limit=limit | {"max": self.draw(drawn.maxima)})

    @happens()
    def change_what_a_limit_counts(self) -> None:
        for group, limit in self.any_limit():
            change = {"counts": self.draw(drawn.counts), "mode": self.draw(drawn.modes)}
            self.call("set_group_limit", p_group_id=group, p_limit=drawn.valid(limit | change))

    @happens()
    def remove_limit(self) -> None:
        for group, limit in self.any_limit():
            unsaid = self.one_of([(), (), ("p_period",), ("p_starts",), ("p_period", "p_starts")])
            self.call("remove_group_limit", p_group_id=group, **_name_of(limit) | dict.fromkeys(unsaid))

    @happens(3)
    def set_override(self) -> None:
        for group, limit in self.any_limit():
            until = self.draw(drawn.untils)
            self.call(
                "set_limit_override",
                **self.overridden(group, limit),
                p_max=self.draw(drawn.maxima),
                p_until=None if until is None else (self.twins.now + until).isoformat(),
            )

    @happens()
    def remove_override(self) -> None:
        overrides = [each for group in self.groups() for each in self.twins.model.find_limit_overrides(group["id"])]
        if overrides and self.one_of([True, True, False]):
            override = self.one_of(overrides)
            whose = {"p_user_id": override["user_id"], "p_child_id": override["child_id"]}
            self.call("remove_limit_override", p_group_id=override["group_id"], **_named(override) | whose)
            return
        for group, limit in self.any_limit():
            self.call("remove_limit_override", **self.overridden(group, limit))

    def overridden(self, group: str, limit: Json) -> Json:
        """Name a limit and whose it is, perhaps less than enough; rarely, nobody's."""
        child = self.one_of([each["id"] for each in self.groups() if each["parent_id"] == group] * 6 + [self.group()])
        user = self.one_of([self.draw(drawn.users)] * 6 + [drawn.NOBODY])
        theirs = {
            "member": {"p_user_id": user},
            "child": {"p_child_id": child},
            "group": {},
            "both": {"p_user_id": user, "p_child_id": child},
        }
        scope = self.one_of([limit["scope"]] * 8 + list(theirs))
        unsaid = self.one_of([(), (), (), ("p_period",), ("p_starts",), ("p_period", "p_starts")])
        return {"p_group_id": group} | theirs[scope] | _named(limit) | dict.fromkeys(unsaid)

    @happens(2)
    def add_members(self) -> None:
        members = self.draw(st.lists(drawn.users | st.just(drawn.NOBODY), min_size=1, max_size=3))
        anchor = self.draw(st.none() | drawn.anchors)
        self.call("add_group_members", p_group_id=self.group(), p_user_ids=members, p_anchor_at=anchor)

    @happens()
    def set_member_anchor(self) -> None:
        anchor = self.draw(st.none() | drawn.anchors)
        self.call("set_member_anchor", p_group_id=self.group(), p_user_id=self.draw(drawn.users), p_anchor_at=anchor)

    @happens()
    def remove_member(self) -> None:
        self.call("remove_group_members", p_group_id=self.group(), p_user_ids=[self.draw(drawn.users)])

    @happens()
    def move_member(self) -> None:
        self.call("move_group_member", p_user_id=self.draw(drawn.users), p_from=self.group(), p_to=self.group())

    @happens()
    def delete_user_and_sign_up_again(self) -> None:
        user = self.draw(drawn.users)
        self.twins.delete_user(user)
        self.twins.sign_up(user)

    @happens(2)
    def reset(self) -> None:
        kind = self.draw(st.none() | drawn.kinds)
        if self.draw(st.booleans()):
            # at the very moment of the reset, and before it
            self.twins.call("track_generation", p_user_id=self.draw(drawn.users), p_kind=kind or "image")
        user = self.draw(st.none() | drawn.users)
        self.call("reset_group_usage", p_group_id=self.group(), p_kind=kind, p_user_id=user)
        self.twins.take_order()

    @happens()
    def reconcile(self) -> None:
        self.call("reconcile_usage", p_group_id=self.group())

    def any_limit(self) -> list[tuple[str, Json]]:
        """Draw one of all groups' limits, if there is any."""
        limits = [(group["id"], limit) for group in self.groups() for limit in group["limits"]]
        return [self.one_of(limits)] if limits else []


class Tables(Admins):
    """In a table editor; the model does the same by functions."""

    @happens()
    def edit_max_in_the_table(self) -> None:
        for group, limit in self.any_limit():
            maximum, mode = self.draw(drawn.maxima), self.draw(drawn.modes)
            with self.without_the_group():
                self.twins.model.set_group_limit(group, limit | {"max": maximum, "mode": mode})
            self.update_limit(group, limit, "max = %s, mode = %s", maximum, mode)

    @happens()
    def make_a_limit_another_in_the_table(self) -> None:
        for group, limit in self.any_limit():
            target, scope, counts = self.one_of(self.groups()), self.draw(drawn.scopes), self.draw(drawn.counts)
            start = drawn.started(self.draw(drawn.starts))
            other = drawn.valid(limit | start | {"scope": scope, "counts": counts})
            columns = "group_id = %s, period = %s, starts = %s, scope = %s, counts = %s"
            counts = other["counts"]
            values = [target["id"], *start.values(), scope, Jsonb(counts) if counts else None]
            if target["is_spread"] and scope != "member":
                with pytest.raises(psycopg.Error, match="scope: must be member in a spread group"):
                    self.update_limit(group, limit, columns, *values)
            elif _name_of(other) not in map(_name_of, target["limits"]):
                with self.without_the_group():
                    self.twins.model.remove_group_limit(group, **_name_of(limit))
                    self.twins.model.set_group_limit(target["id"], other)
                self.update_limit(group, limit, columns, *values)

    @happens()
    def raise_all_limits_of_a_group_in_the_table(self) -> None:
        group, by = self.one_of(self.groups()), self.draw(st.integers(0, 3))
        for limit in group["limits"]:
            if limit["max"] is not None:
                with self.without_the_group():
                    self.twins.model.set_group_limit(group["id"], limit | {"max": limit["max"] + by})
        self.execute("update public.group_limits set max = max + %s where group_id = %s", by, group["id"])

    @happens()
    def delete_limits_of_a_kind_in_the_table(self) -> None:
        group, kind = self.one_of(self.groups()), self.draw(drawn.kinds)
        for limit in group["limits"]:
            if limit["kind"] == kind:
                with self.without_the_group():
                    self.twins.model.remove_group_limit(group["id"], **_name_of(limit))
        self.execute("delete from public.group_limits where group_id = %s and kind = %s", group["id"], kind)

    @happens()
    def edit_an_override_in_the_table(self) -> None:
        overrides = self.twins.model._overrides
        if overrides:
            key = self.one_of(list(overrides))
            if self.draw(st.booleans()):
                overrides[key] = replace(overrides[key], max=self.draw(drawn.maxima))
                query = "update public.limit_overrides set max = %s where id = %s"
                assert self.execute(query, overrides[key].max, overrides[key].id) == 1
            else:
                assert self.execute("delete from public.limit_overrides where id = %s", overrides.pop(key).id) == 1

    @happens()
    def edit_a_group_in_the_table(self) -> None:
        group, zone, priority = self.one_of(self.groups())["id"], self.draw(drawn.zones), self.draw(drawn.priorities)
        anchor = self.draw(drawn.anchors)
        self.twins.model.save_group(group, p_timezone=zone, p_priority=priority, p_anchor_at=anchor)
        columns = "timezone = %s, priority = %s, anchor_at = %s"
        self.execute(f"update public.user_groups set {columns} where id = %s", zone.lower(), priority, anchor, group)
        self.twins.take_order()

    @happens()
    def move_a_group_in_the_table(self) -> None:
        group = self.one_of(self.groups())["id"]
        parent_id = self.place(group)
        try:
            self.twins.model.save_group(group, p_parent_id=parent_id, p_no_parent=parent_id is None)
        except InvalidRequest:
            with pytest.raises(psycopg.Error, match="parent_id"):
                self.execute("update public.user_groups set parent_id = %s where id = %s", parent_id, group)
            return
        self.execute("update public.user_groups set parent_id = %s where id = %s", parent_id, group)
        self.twins.take_order()

    @happens()
    def leave_and_rejoin_in_the_table(self) -> None:
        group, user = self.one_of(self.groups())["id"], self.draw(drawn.users)
        self.twins.model.remove_group_members(group, [user])
        self.twins.model.add_group_members(group, [user])
        self.execute("delete from public.group_memberships where group_id = %s and user_id = %s", group, user)
        # PostgreSQL's own clock, by which a table editor lets users join, can't be turned
        row = "(group_id, user_id, joined_at) values (%s, %s, tokenlimits.clock())"
        self.execute(f"insert into public.group_memberships {row}", group, user)
        self.twins.take_moments()
        self.twins.wait(timedelta(milliseconds=1))

    @contextmanager
    def without_the_group(self) -> Iterator[None]:
        """Edit limits as their table does: the group's own row, and when it was changed, stay."""
        groups = self.twins.model._groups
        before = {id_: group.updated_at for id_, group in groups.items()}
        yield
        for id_, updated_at in before.items():
            groups[id_].updated_at = updated_at

    def update_limit(self, group: str, limit: Json, columns: str, *values: Any) -> None:
        where = "group_id = %s and kind = %s and period = %s and scope = %s and starts = %s"
        query = f"update public.group_limits set {columns} where {where}"
        assert self.execute(query, *values, group, *_name_of(limit).values()) == 1

    def execute(self, query: str, *values: Any) -> int:
        """Run a statement; tell how many rows it touched."""
        return self.twins.connection.execute(query, values).rowcount


def _name_of(limit: Json) -> Json:
    """Tell which of a group's limits it is."""
    return {f"p_{name}": limit[name] for name in ("kind", "period", "scope", "starts")}


def _named(limit: Json) -> Json:
    """Tell which limit of a subject it is."""
    return {f"p_{name}": limit[name] for name in ("kind", "period", "starts")}
