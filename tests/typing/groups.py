"""What an editor infers for who manages groups; pyright reads this, nothing runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import assert_type
from uuid import UUID

from supabase import AsyncClient, Client

from tokenlimits import AsyncGroupManager, GroupManager, Limit
from tokenlimits.models import (
    BulkResult,
    Group,
    GroupLimitUsage,
    GroupRef,
    GroupUsage,
    HistoryPoint,
    LimitPressure,
    Member,
    Override,
    Reconciliation,
    Refused,
    TopMember,
    UsageRecord,
    UsageSum,
    User,
)


def manager(client: Client, aclient: AsyncClient, id_: UUID, ids: list[UUID], texts: set[str], now: datetime) -> None:  # noqa: PLR0915
    assert_type(GroupManager.from_env(), GroupManager)
    GroupManager(aclient)  # pyright: ignore[reportArgumentType]
    assert_type(GroupManager.from_env(schema="limits"), GroupManager)
    with GroupManager(client, timeout=30, schema="limits") as groups:
        assert_type(groups.create("Pro", limits={"image": 100, "video": None}), Group)
        assert_type(groups.create("Pro", limits=[Limit(kind="image", max=1, period="day", scope="member")]), Group)
        assert_type(groups.create("Pro", id=id_), Group)
        assert_type(groups.create("Pro", id=str(id_), anchor_at=now), Group)
        assert_type(groups.update(id_, anchor_at=now), Group)
        assert_type(groups.update(id_, anchor_at=None), Group)
        assert_type(groups.update(id_, name="Pro", timezone="Europe/Paris", is_default=True), Group)
        above = assert_type(groups.create("Acme", parent=id_), Group)
        assert_type(groups.update(id_, parent=above), Group)
        assert_type(groups.update(id_, parent=None), Group)
        assert_type(groups.list(parent=str(id_)), list[Group])
        assert_type(groups.set_override(id_, "image", 5, child_id=above.id), Override)
        assert_type(groups.usage(id_).limits[0].group, GroupRef | None)
        assert_type(groups.set_limits(str(id_), {"image": 1}).limits, tuple[Limit, ...])
        assert_type(groups.set_limit(id_, Limit(kind="image", max=1)), Group)
        assert_type(groups.remove_limit(id_, "image", period="day", scope="member"), Group)
        assert_type(groups.get(id_), Group)
        assert_type(groups.get_by_name("pro"), Group)
        assert_type(groups.list(search="pr"), list[Group])
        assert_type(groups.delete(id_), Group)
        assert_type(groups.add_member(id_, id_, anchor_at=now), bool)
        assert_type(groups.set_member_anchor(id_, id_, None), bool)
        assert_type(groups.remove_member(id_, id_), bool)
        assert_type(groups.move_member(id_, from_=id_, to=id_), bool)
        assert_type(groups.add_members(id_, ids, anchor_at=now, on_progress=print), BulkResult)
        assert_type(groups.add_members(id_, texts).refused, tuple[Refused, ...])
        assert_type(groups.remove_members(id_, ids, on_progress=lambda done, total: done / total), int)
        assert_type(groups.members(id_, search="ann@"), Iterator[Member])
        assert_type([member.email for member in groups.members(id_)], list[str | None])
        assert_type(groups.find_users("ann@"), list[User])
        assert_type(groups.find_users_by_email(["ann@example.com"]), list[User])
        assert_type(groups.export_usage(id_, kind="image", since=now), Iterator[UsageRecord])
        assert_type(groups.export_usage(id_, kind="image", bucket="day"), Iterator[UsageSum])
        assert_type([total.group.name for total in groups.export_usage(bucket="month")], list[str | None])
        assert_type(groups.limit_pressure(id_, at_least=80, count=3), list[LimitPressure])
        assert_type(groups.top_members(id_, count=3), list[TopMember])
        assert_type(groups.drift(id_), Reconciliation)
        assert_type(groups.usage(id_), GroupUsage)
        assert_type(groups.usage(id_).limits, tuple[GroupLimitUsage, ...])
        assert_type(groups.usage_all(), list[GroupUsage])
        assert_type(groups.history(id_, kind="image", bucket="day", since=now, until=now), list[HistoryPoint])
        assert_type(groups.reset_usage(id_, kind="image"), datetime)

        groups.create("Pro", limits={"image": "many"})  # pyright: ignore[reportArgumentType]
        groups.create("Pro", limits=[{"kind": "image", "max": 1}])  # pyright: ignore[reportArgumentType]
        groups.create("Pro", "for teams")  # pyright: ignore[reportCallIssue]
        groups.create("Pro", id=7)  # pyright: ignore[reportArgumentType]
        groups.create("Pro", parent=7)  # pyright: ignore[reportArgumentType]
        groups.create(None)  # pyright: ignore[reportArgumentType]
        groups.set_limits(id_, None)  # pyright: ignore[reportArgumentType]
        groups.remove_limit(id_, "image", period=5)  # pyright: ignore[reportArgumentType]
        groups.remove_limit(id_, "image", starts="soon")  # pyright: ignore[reportArgumentType]
        groups.history(id_, bucket="minute")  # pyright: ignore[reportArgumentType]
        groups.export_usage(id_, user_id=id_, bucket="day")  # pyright: ignore[reportArgumentType]
        groups.export_usage(bucket="minute")  # pyright: ignore[reportCallIssue, reportArgumentType]
        groups.move_member(id_, id_, id_)  # pyright: ignore[reportCallIssue]
        groups.add_members(id_, [1, 2])  # pyright: ignore[reportArgumentType]
        groups.add_members(id_, ids, on_progress=lambda: None)  # pyright: ignore[reportArgumentType]
        groups.update(None, name="Pro")  # pyright: ignore[reportArgumentType]


async def async_manager(client: Client, aclient: AsyncClient, id_: UUID, ids: list[UUID], now: datetime) -> None:
    AsyncGroupManager(client)  # pyright: ignore[reportArgumentType]
    async with AsyncGroupManager(aclient, timeout=30, schema="limits") as groups:
        assert_type(await groups.create("Pro", limits={"image": 100}, id=id_), Group)
        assert_type(await groups.update(id_, name="Pro"), Group)
        assert_type(await groups.set_limits(id_, {"image": 1}), Group)
        assert_type(await groups.set_limit(id_, Limit(kind="image", max=1)), Group)
        assert_type(await groups.remove_limit(id_, "image"), Group)
        assert_type(await groups.get(id_), Group)
        assert_type(await groups.get_by_name("pro"), Group)
        assert_type(await groups.list(), list[Group])
        assert_type(await groups.delete(id_), Group)
        assert_type(await groups.add_member(id_, id_), bool)
        assert_type(await groups.remove_member(id_, id_), bool)
        assert_type(await groups.move_member(id_, from_=id_, to=id_), bool)
        assert_type(await groups.add_members(id_, ids), BulkResult)
        assert_type(await groups.remove_members(id_, ids), int)
        assert_type(groups.members(id_, search="ann@"), AsyncIterator[Member])
        assert_type([member.joined_at async for member in groups.members(id_)], list[datetime])
        assert_type(await groups.find_users("ann@"), list[User])
        assert_type(groups.export_usage(user_id=id_), AsyncIterator[UsageRecord])
        assert_type(groups.export_usage(bucket="hour"), AsyncIterator[UsageSum])
        assert_type(await groups.limit_pressure(id_, at_least=80, count=3), list[LimitPressure])
        assert_type(await groups.top_members(id_, count=3), list[TopMember])
        assert_type(await groups.usage(id_), GroupUsage)
        assert_type(await groups.usage_all(), list[GroupUsage])
        assert_type(await groups.history(since=now), list[HistoryPoint])
        assert_type(await groups.reset_usage(id_), datetime)

        list(groups.members(id_))  # pyright: ignore[reportArgumentType]
        await groups.members(id_)  # pyright: ignore[reportGeneralTypeIssues]
        assert_type(groups.get(id_), Group)  # pyright: ignore[reportAssertTypeFailure, reportUnusedCoroutine]
