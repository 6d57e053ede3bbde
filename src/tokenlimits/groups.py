# Generated from async_groups.py by `make sync`; edit it there.
"""For backend scripts and admins: groups, limits, members, usage."""

from __future__ import annotations

import builtins  # for annotations after the method `list`
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Self, overload
from uuid import UUID

from supabase import Client

from ._core import admins, flows, reports, workers
from ._core.arguments import Limits
from ._core.flows import OnProgress
from ._drivers.base import DEFAULT_TIMEOUT, Base
from .models import (
    UNCHANGED,
    Bucket,
    BulkResult,
    Group,
    GroupUsage,
    HistoryPoint,
    Limit,
    LimitPressure,
    Member,
    Override,
    Page,
    Period,
    Reconciliation,
    Scope,
    Starts,
    TopMember,
    TrackResult,
    Unchanged,
    UsageRecord,
    UsageSum,
    User,
)
from .senders import Sender
from .telemetry import OnResult

__all__ = ["GroupManager"]


class GroupManager(Base):
    """Manages groups of users, their limits and members.

    Every method raises `AccessDenied` if the key or the session isn't an admin's, `ServiceUnavailable` if Supabase
    can't be reached in time, and `InvalidRequest`, with the field's name, if an argument is not valid. Methods that
    take a group's id raise `GroupNotFound` if there is no such group.

    Args:
        client: A `supabase.Client` with the secret key, or with the session of an admin. It stays yours.
            Without one, see `from_env`. Or a `Sender`, which answers calls in a way of its own.
        timeout: Seconds for one call, including its retries.
        schema: The schema that tokenlimits is installed in; by default `TOKENLIMITS_SCHEMA` from the environment or
            `.env`, read on first use, or public. The client's own schema doesn't matter.
        allow_http: Send the key unencrypted (`http://`) to another machine, as in a private network;
            `TOKENLIMITS_ALLOW_HTTP=1` allows it too. This machine is always allowed.
        on_result: Called after each call with a `CallResult`: its attempts, how long it took, how it ended. It
            must be quick; an error in it is logged, and changes nothing.

    Example:
        >>> with GroupManager.from_env() as groups:
        ...     pro = groups.create("Pro", limits={"image": 100, "video": 20})
        >>> [(limit.kind, limit.max, limit.period) for limit in pro.limits]
        [('image', 100, 'lifetime'), ('video', 20, 'lifetime')]
    """

    def __init__(
        self,
        client: Client | Sender | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        schema: str | None = None,
        allow_http: bool = False,
        on_result: OnResult | None = None,
    ) -> None:
        super().__init__(client, timeout, schema, allow_http=allow_http, on_result=on_result)

    @classmethod
    def from_env(
        cls,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        schema: str | None = None,
        allow_http: bool = False,
        on_result: OnResult | None = None,
    ) -> Self:
        """Make one for `SUPABASE_URL` and `SUPABASE_SECRET_KEY` (or `SUPABASE_SERVICE_ROLE_KEY`), read on first use.

        Args:
            timeout: Seconds for one call, including its retries.
            schema: See the class.
            allow_http: See the class.
            on_result: See the class.

        Raises:
            ConfigurationError: On first use, when a variable is missing.

        Example:
            >>> groups = GroupManager.from_env(timeout=30)
        """
        return cls(timeout=timeout, schema=schema, allow_http=allow_http, on_result=on_result)

    def create(
        self,
        name: str,
        *,
        description: str = "",
        limits: Limits = (),
        priority: int = 0,
        timezone: str = "UTC",
        is_default: bool = False,
        anchor_at: datetime | None = None,
        parent: UUID | str | Group | None = None,
        is_spread: bool = False,
        id: UUID | str | None = None,  # noqa: A002  # as the field of what it answers
    ) -> Group:
        """Create a group with its limits, in one step: an error leaves nothing behind.

        Args:
            name: 1 to 200 characters; unique, ignoring case.
            description: For people, at most 2,000 characters.
            limits: A list of `Limit`, or the shorthand `{"image": 100}` for lifetime limits.
            priority: A user's groups are tried from high to low.
            timezone: An IANA name, in which the calendar periods begin.
            is_default: Users who are in no group have this group's limits. It replaces the previous default.
            anchor_at: From when the periods of its group limits with `starts="anchor"` are counted, and those of its
                allowance under `child` limits; by default, from the group's creation.
            parent: The group that it is beneath, whose limits count its usage too; none by default. Groups nest at most
                5 deep.
            is_spread: Choose this for a group with more users than one database is to hold. It takes member limits
                only, and is beneath spread groups only. It can't be changed later.
            id: An id of your choice that no group has ever had; by default, one is generated.

        Raises:
            GroupExists: Another group has the name.
            InvalidRequest: An argument is not valid; its field is `id` when a group has, or had, that id, and
                `parent_id` when there is no such group, or it is too deep.

        Example:
            >>> limit = Limit(kind="image", max=50, period="day", scope="member")
            >>> groups.create("Studio", limits=[limit]).limits[0].max
            50
            >>> pro = groups.create("Pro", limits=[Limit(kind="image", max=1000, period="month", scope="child")])
            >>> groups.create("Acme", parent=pro).parent_id == pro.id
            True
        """
        return self._transport.send(
            admins.create_group(
                id,
                parent,
                is_spread=is_spread,
                name=name,
                description=description,
                priority=priority,
                timezone=timezone,
                is_default=is_default,
                anchor_at=anchor_at,
                limits=limits,
            )
        )

    def update(
        self,
        group_id: UUID | str,
        *,
        name: str | None = None,
        description: str | None = None,
        priority: int | None = None,
        timezone: str | None = None,
        is_default: bool | None = None,
        anchor_at: datetime | Unchanged | None = UNCHANGED,
        parent: UUID | str | Group | Unchanged | None = UNCHANGED,
        limits: Limits | None = None,
        unchanged_since: datetime | None = None,
    ) -> Group:
        """Change a group in one step: an error changes nothing, and what isn't given stays.

        None leaves a field alone, except `anchor_at` and `parent`, for which it is a value.
        A new time zone moves the beginning of every period, and `anchor_at` that of anchored ones, so usage is
        recounted from the ledger. So it is in the limits above when a group moves: it takes its usage along, with all
        groups beneath it.

        Args:
            group_id: Which group.
            name: 1 to 200 characters; unique, ignoring case.
            description: For people, at most 2,000 characters.
            priority: A user's groups are tried from high to low.
            timezone: An IANA name, in which the calendar periods begin.
            is_default: Users who are in no group have this group's limits. It replaces the previous default.
            anchor_at: From when the periods of its group limits with `starts="anchor"` are counted, and those of its
                allowance under `child` limits; None: from the group's creation, as where it was never set.
            parent: The group that it moves beneath; None: beneath none.
            limits: The whole set of limits, as `set_limits` takes it.
            unchanged_since: The `updated_at` of the group that you decided by: what somebody else has changed since is
                not overwritten.

        Raises:
            GroupExists: Another group has the name.
            GroupChanged: Somebody has changed the group since.
            InvalidRequest: An argument is not valid; its field is `parent_id` when there is no such group, when the
                group would be beneath itself, or when groups would nest more than 5 deep.

        Example:
            >>> changed = groups.update(team.id, timezone="Europe/Paris", limits={"image": 20})
            >>> changed.timezone, changed.limits[0].max
            ('Europe/Paris', 20)
            >>> agency = groups.create("Agency")
            >>> groups.update(team.id, parent=agency).parent_id == agency.id
            True
            >>> groups.update(team.id, parent=None).parent_id is None
            True
        """
        return self._transport.send(
            admins.update_group(
                group_id,
                name=name,
                description=description,
                priority=priority,
                timezone=timezone,
                is_default=is_default,
                anchor_at=anchor_at,
                parent=parent,
                limits=limits,
                unchanged_since=unchanged_since,
            )
        )

    def set_limits(self, group_id: UUID | str, limits: Limits) -> Group:
        """Replace a group's whole set of limits, in one step; those that stay keep their usage.

        Args:
            group_id: Which group.
            limits: A list of `Limit`, or the shorthand `{"image": 100}` for lifetime limits.

        Example:
            >>> len(groups.set_limits(team.id, [Limit(kind="image", max=1000, period="month")]).limits)
            1
        """
        return self._transport.send(admins.set_limits(group_id, limits))

    def set_limit(self, group_id: UUID | str, limit: Limit) -> Group:
        """Add one limit, or change the max, counts and mode of the one with its kind, period, starts and scope.

        Args:
            group_id: Which group.
            limit: The limit; a new one counts what was already used in its current period.

        Example:
            >>> groups.set_limit(team.id, Limit(kind="video", max=None)).limits[-1].max is None
            True
        """
        return self._transport.send(admins.set_limit(group_id, limit))

    def remove_limit(
        self,
        group_id: UUID | str,
        kind: str,
        *,
        period: Period | None = None,
        scope: Scope = "group",
        starts: Starts | None = None,
    ) -> Group:
        """Remove one limit; no error when there is none.

        Args:
            group_id: Which group.
            kind: The limit's kind.
            period: The limit's period; it may be left out if that names only one limit.
            scope: The limit's scope.
            starts: Where the limit's periods begin; it may be left out likewise.

        Raises:
            InvalidRequest: Several limits fit; the error lists them.

        Example:
            >>> groups.remove_limit(team.id, "image").limits
            ()
        """
        return self._transport.send(admins.remove_limit(group_id, kind, period, scope, starts))

    def set_override(
        self,
        group_id: UUID | str,
        kind: str,
        max: int | None,  # noqa: A002  # as the field of a limit
        *,
        user_id: UUID | str | None = None,
        child_id: UUID | str | None = None,
        period: Period | None = None,
        starts: Starts | None = None,
        until: datetime | None = None,
    ) -> Override:
        """Replace the max of one limit for one user, for one group beneath or, if neither is named, of a group limit.

        What is used stays. It replaces an earlier override of the same limit, and the limit's own max may change
        meanwhile.

        Args:
            group_id: The group that the limit belongs to.
            kind: The limit's kind; a pool's own name.
            max: What applies instead of the limit's max; None is unlimited, and 0 blocks the kind.
            user_id: For whom a member limit is overridden.
            child_id: For which group directly beneath a `child` limit is overridden. If neither is given, it is the
                group limit.
            period: The limit's period; it may be left out if that names only one limit.
            starts: Where the limit's periods begin; it may be left out likewise.
            until: From then on, the limit's own max applies again; a moment with a time zone, or None: for good.

        Raises:
            InvalidRequest: There is no such limit, or several fit, which the error lists; or `until` is not in the
                future; or `child_id` is not directly beneath the group.
            GroupNotFound: There is no such group, or no such child.
            UnknownUser: `auth.users` has no such user.

        Example:
            >>> from datetime import timedelta, timezone
            >>> _ = groups.set_limit(team.id, Limit(kind="image", max=5, period="day", scope="member"))
            >>> in_a_week = datetime.now(timezone.utc) + timedelta(days=7)
            >>> override = groups.set_override(team.id, "image", 50, user_id=user_id, until=in_a_week)
            >>> override.max, override.period, override.status
            (50, 'day', 'active')
        """
        return self._transport.send(admins.set_override(group_id, kind, max, user_id, child_id, period, starts, until))

    def remove_override(
        self,
        group_id: UUID | str,
        kind: str,
        *,
        user_id: UUID | str | None = None,
        child_id: UUID | str | None = None,
        period: Period | None = None,
        starts: Starts | None = None,
    ) -> bool:
        """End an override, so that the limit's own max applies again.

        Args:
            group_id: The group that the limit belongs to.
            kind: The limit's kind.
            user_id: Whose override of a member limit.
            child_id: Which group's override of a `child` limit. If neither is given, it is that of the group limit.
            period: The limit's period; it may be left out if that names only one override.
            starts: Where the limit's periods begin; it may be left out likewise.

        Returns:
            False if there was none.

        Raises:
            InvalidRequest: Several overrides fit; the error lists them.

        Example:
            >>> groups.remove_override(team.id, "image", user_id=user_id)
            False
        """
        return self._transport.send(admins.remove_override(group_id, kind, user_id, child_id, period, starts))

    def overrides(
        self, group_id: UUID | str, *, user_id: UUID | str | None = None, child_id: UUID | str | None = None
    ) -> Iterator[Override]:
        """Iterate over the overrides of a group's limits, page by page; including those that have ended or sleep.

        Args:
            group_id: The group that the limits belong to.
            user_id: Only those of this user.
            child_id: Only those of this group directly beneath. If neither is given: all, with those of group limits.

        Example:
            >>> _ = groups.set_override(team.id, "image", None)
            >>> [(each.kind, each.max, each.user_id) for each in groups.overrides(team.id)]
            [('image', None, None)]
            >>> _ = groups.set_limit(team.id, Limit(kind="image", max=5, period="day", scope="child"))
            >>> acme = groups.create("Acme", parent=team)
            >>> _ = groups.set_override(team.id, "image", 50, child_id=acme.id)
            >>> [(each.max, each.child_name) for each in groups.overrides(team.id, child_id=acme.id)]
            [(50, 'Acme')]
        """
        return self._iterate(flows.all_overrides(group_id, user_id, child_id))

    def get(self, group_id: UUID | str) -> Group:
        """Read one group with its limits.

        Args:
            group_id: Which group.

        Example:
            >>> groups.get(team.id).name
            'Team'
        """
        return self._transport.send(admins.get_group(group_id))

    def get_by_name(self, name: str) -> Group:
        """Read one group by its name, ignoring case.

        Args:
            name: The whole name.

        Raises:
            GroupNotFound: No group has the name.

        Example:
            >>> groups.get_by_name("team").name
            'Team'
        """
        return self._transport.send(admins.get_group_by_name(name))

    def list(self, *, search: str | None = None, parent: UUID | str | Group | None = None) -> builtins.list[Group]:
        """Read all groups in order of name, or those whose name contains a text, ignoring case.

        Args:
            search: The text; all groups when None.
            parent: Only the groups directly beneath this one.

        Example:
            >>> [group.name for group in groups.list(search="tea")]
            ['Team']
            >>> _ = groups.create("Acme", parent=team)
            >>> [group.name for group in groups.list(parent=team)]
            ['Acme']
        """
        return self._run(flows.all_groups(search, parent))

    def page(
        self,
        *,
        search: str | None = None,
        parent: UUID | str | Group | None = None,
        after: str | None = None,
        size: int = 100,
    ) -> Page[Group]:
        """Read one page of what `list` reads, for an app that shows groups page by page.

        Args:
            search: A part of the name, whatever its case; all groups when None.
            parent: Only the groups directly beneath this one.
            after: The `next` of the page before; None for the first page.
            size: The most groups of the page, up to 200.

        Returns:
            The groups, and as `next` how the page after it is asked for.

        Example:
            >>> page = groups.page(size=1)
            >>> [group.name for group in page], page.next is None
            (['Everyone'], False)
            >>> [group.name for group in groups.page(after=page.next)]
            ['Team']
        """
        return self._transport.send(admins.groups_page(search, parent, after, size))

    def delete(self, group_id: UUID | str) -> Group:
        """Delete a group with its limits and memberships, and return it as it was; the ledger stays.

        Its usage goes on counting for the limits of the groups above it.

        Args:
            group_id: Which group.

        Raises:
            InvalidRequest: There are groups beneath it. Delete or move them first.

        Example:
            >>> groups.delete(team.id).name
            'Team'
        """
        return self._transport.send(admins.delete_group(group_id))

    def add_member(self, group_id: UUID | str, user_id: UUID | str, *, anchor_at: datetime | None = None) -> bool:
        """Add a user to a group.

        Args:
            group_id: Which group.
            user_id: Which user.
            anchor_at: From when the periods of their limits with `starts="anchor"` are counted; by default, from when
                they joined. That of somebody who already is a member stays: `set_member_anchor` changes it.

        Returns:
            False if the user already was a member.

        Raises:
            UnknownUser: `auth.users` has no such user.

        Example:
            >>> groups.add_member(team.id, user_id), groups.add_member(team.id, user_id)
            (True, False)
        """
        return self._transport.send(admins.add_member(group_id, user_id, anchor_at))

    def set_member_anchor(self, group_id: UUID | str, user_id: UUID | str, anchor_at: datetime | None) -> bool:
        """Set from when a member's limits with `starts="anchor"` are counted, such as a new billing date.

        What they have used stays: it is recounted from the ledger, in their new periods.

        Args:
            group_id: Which group.
            user_id: Which member.
            anchor_at: The moment; None: when they joined, as where it was never set.

        Returns:
            False, with nothing changed, if the user isn't a member.

        Example:
            >>> from datetime import UTC, datetime
            >>> groups.set_member_anchor(team.id, user_id, datetime(2026, 1, 31, 9, tzinfo=UTC))
            False
        """
        return self._transport.send(admins.set_member_anchor(group_id, user_id, anchor_at))

    def remove_member(self, group_id: UUID | str, user_id: UUID | str) -> bool:
        """Remove a user from a group; their usage stays, and counts again if they return.

        Args:
            group_id: Which group.
            user_id: Which user.

        Returns:
            False if the user wasn't a member.

        Example:
            >>> groups.remove_member(team.id, user_id)
            False
        """
        return self._transport.send(admins.remove_member(group_id, user_id))

    def move_member(self, user_id: UUID | str, *, from_: UUID | str, to: UUID | str) -> bool:
        """Move a user from one group to another, in one step.

        Args:
            user_id: Which user.
            from_: The group that they leave.
            to: The group that they join, if they are not in it yet.

        Returns:
            False, with nothing changed, if the user wasn't in `from_`.

        Example:
            >>> groups.move_member(user_id, from_=team.id, to=team.id)
            False
        """
        return self._transport.send(admins.move_member(user_id, from_, to))

    def add_members(
        self,
        group_id: UUID | str,
        user_ids: Iterable[UUID | str],
        *,
        anchor_at: datetime | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Add any number of users to a group, in batches of 5,000; unknown users don't stop the others.

        Args:
            group_id: Which group.
            user_ids: The users; repeated ids count once.
            anchor_at: As for `add_member`.
            on_progress: Called after each batch with the number done and the total.

        Returns:
            How many were added, how many already were members, and who was refused and why.

        Example:
            >>> from uuid import uuid4
            >>> result = groups.add_members(team.id, [user_id, uuid4()])
            >>> result.added, len(result.refused), result.refused[0].reason
            (1, 1, 'there is no such user')
        """
        return self._run(flows.add_members(group_id, user_ids, anchor_at, on_progress))

    def remove_members(
        self, group_id: UUID | str, user_ids: Iterable[UUID | str], *, on_progress: OnProgress | None = None
    ) -> int:
        """Remove any number of users from a group, in batches of 5,000; their usage stays.

        Args:
            group_id: Which group.
            user_ids: The users.
            on_progress: Called after each batch with the number done and the total.

        Returns:
            How many were members.

        Example:
            >>> groups.remove_members(team.id, [user_id])
            0
        """
        return self._run(flows.remove_members(group_id, user_ids, on_progress))

    def members(self, group_id: UUID | str, *, search: str | None = None) -> Iterator[Member]:
        """Iterate over a group's members in order of id, reading page by page.

        Args:
            group_id: Which group.
            search: A part of their e-mail address, ignoring case; all members when None.

        Example:
            >>> [member.email for member in groups.members(team.id)]
            []
            >>> [member.email for member in groups.members(team.id, search="@example.com")]
            []
        """
        return self._iterate(flows.all_members(group_id, search))

    def members_page(
        self, group_id: UUID | str, *, search: str | None = None, after: str | None = None, size: int = 100
    ) -> Page[Member]:
        """Read one page of what `members` iterates over, for an app that shows members page by page.

        Args:
            group_id: Which group.
            search: A part of their e-mail address, ignoring case; all members when None.
            after: The `next` of the page before; None for the first page.
            size: The most members of the page, up to 500.

        Returns:
            The members, and as `next` how the page after it is asked for.

        Example:
            >>> groups.add_member(team.id, user_id)
            True
            >>> page = groups.members_page(team.id, size=20)
            >>> [member.id == user_id for member in page], page.next
            ([True], None)
        """
        return self._transport.send(admins.members_page(group_id, search, after, size))

    def find_users(self, email: str) -> builtins.list[User]:
        """Find up to 20 users by a part of their e-mail address, ignoring case.

        Args:
            email: The part.

        Example:
            >>> groups.find_users("nobody@nowhere")
            []
        """
        return self._transport.send(admins.find_users(email))

    def find_users_by_email(self, emails: Iterable[str]) -> builtins.list[User]:
        """Find the users with any number of whole e-mail addresses, ignoring case, in batches of 5,000.

        Args:
            emails: The addresses; those that nobody has are left out.

        Example:
            >>> groups.find_users_by_email(["nobody@nowhere.example"])
            []
        """
        return self._run(flows.users_by_email(emails))

    def usage(self, group_id: UUID | str) -> GroupUsage:
        """Read a group's place and member count, and used, remaining, fraction and reset_at of each limit.

        It includes the group's allowance under the `child` limits of the group above it.

        Args:
            group_id: Which group.

        Example:
            >>> groups.usage(team.id).limits[0].fraction
            0.0
        """
        return self._transport.send(reports.group_usage(group_id))

    def usage_all(self) -> builtins.list[GroupUsage]:
        """Read the usage of all groups, in order of name.

        Example:
            >>> "Team" in [usage.group.name for usage in groups.usage_all()]
            True
        """
        return self._run(flows.all_usage())

    def history(
        self,
        group_id: UUID | str | None = None,
        *,
        kind: str | None = None,
        bucket: Bucket = "day",
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> builtins.list[HistoryPoint]:
        """Read what was used per kind and hour, day, week or month, oldest first; empty ones are left out.

        Args:
            group_id: Which group; buckets begin in its time zone. All groups, in UTC, when None.
            kind: Only this kind.
            bucket: The step.
            since: From the bucket of this moment on, with a time zone; 30 days ago when None.
            until: Before this moment, to the quarter of an hour; up to now when None.

        Example:
            >>> groups.history(team.id, kind="image", bucket="day")
            []
        """
        return self._transport.send(reports.history(group_id, kind, bucket, since, until))

    @overload
    def export_usage(
        self,
        group_id: UUID | str | None = None,
        *,
        user_id: UUID | str | None = None,
        kind: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        bucket: None = None,
    ) -> Iterator[UsageRecord]: ...

    @overload
    def export_usage(
        self,
        group_id: UUID | str | None = None,
        *,
        kind: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        bucket: Bucket,
    ) -> Iterator[UsageSum]: ...

    def export_usage(
        self,
        group_id: UUID | str | None = None,
        *,
        user_id: UUID | str | None = None,
        kind: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        bucket: Bucket | None = None,
    ) -> Iterator[UsageRecord] | Iterator[UsageSum]:
        """Iterate over the ledger or, with a bucket, over its sums, reading page by page, so that memory use stays low.

        Rows come in order of group and `created_at`, or only of `created_at` if a user is named; sums in order of
        group, kind and bucket, without empty ones. Everything recorded before you began comes exactly once, whatever
        is recorded meanwhile. A deleted group has no name.

        Args:
            group_id: Only this group; all groups, including deleted ones, when None.
            user_id: Only this user; not with a bucket, as there are no sums per user.
            kind: Only this kind.
            since: From this moment on, with a time zone; from the beginning when None. Sums begin with its bucket.
            until: Before this moment; up to now when None. Sums end to the quarter of an hour.
            bucket: Instead of single rows, what each group used per kind and hour, day, week or month in its time zone
                (UTC for a deleted group).

        Example:
            >>> paid_by = limits.track(user_id, "image").group
            >>> [(usage.kind, usage.cost, usage.status) for usage in groups.export_usage(user_id=user_id)]
            [('image', 1, 'committed')]
            >>> [(total.kind, total.used) for total in groups.export_usage(paid_by.id, bucket="month")]
            [('image', 1)]
        """
        return self._iterate(flows.exported(reports.export(group_id, user_id, kind, since, until, bucket)))

    def export_page(
        self,
        group_id: UUID | str | None = None,
        *,
        user_id: UUID | str | None = None,
        kind: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: str | None = None,
        size: int = 100,
    ) -> Page[UsageRecord]:
        """Read one page of the rows that `export_usage` iterates over, for an app that shows them page by page.

        Args:
            group_id: Only this group; all groups, including deleted ones, when None.
            user_id: Only this user.
            kind: Only this kind.
            since: From this moment on, with a time zone; from the beginning when None.
            until: Before this moment; up to the moment of the first page when None.
            after: The `next` of the page before; None for the first page. The other arguments must stay as they were.
            size: The most rows of the page, up to 2,000; it may have fewer before the last one, even none.

        Returns:
            The rows, and as `next` how the page after it is asked for.

        Example:
            >>> tracked = [limits.track(user_id, "image", cost) for cost in (1, 2)]
            >>> page = groups.export_page(user_id=user_id, size=1)
            >>> [(usage.kind, usage.cost) for usage in page]
            [('image', 1)]
            >>> [usage.cost for usage in groups.export_page(user_id=user_id, after=page.next)]
            [2]
        """
        ledger = reports.ledger(group_id, user_id, kind, since, until)
        return self._transport.send(ledger.page(after, size))

    def top_members(
        self,
        group_id: UUID | str,
        *,
        kind: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        count: int = 10,
    ) -> builtins.list[TopMember]:
        """Read who used the most in a group, including those who have left it, but not in the groups beneath it.

        It reads the ledger of that time, so it takes longer the more usage there is.

        Args:
            group_id: Which group.
            kind: Only this kind; all kinds together when None.
            since: From this moment on, with a time zone; 30 days ago when None.
            until: Before this moment; up to now when None.
            count: How many users, at most 1,000.

        Example:
            >>> groups.top_members(team.id, count=3)
            []
        """
        return self._transport.send(reports.top_members(group_id, kind, since, until, count))

    def limit_pressure(
        self, group_id: UUID | str, *, at_least: int = 90, count: int = 100
    ) -> builtins.list[LimitPressure]:
        """Read how many members are at the member limits of a group, or close to them, and who they are.

        Members of the groups beneath it count too. `usage` adds up what all members have used of a member limit, which
        says nothing about any one of them. This reads the counter of each member, so it takes longer the more members
        there are. Limits that are unlimited or 0 are left out.

        Args:
            group_id: Which group.
            at_least: From which percentage of a limit on a member is close to it, from 1 to 100.
            count: How many members to name for each limit, at most 1,000.

        Example:
            >>> _ = groups.set_limit(team.id, Limit(kind="image", max=5, period="day", scope="member"))
            >>> [(each.kind, each.full, each.near) for each in groups.limit_pressure(team.id)]
            [('image', 0, 0)]
        """
        return self._transport.send(reports.limit_pressure(group_id, at_least, count))

    def reset_usage(
        self, group_id: UUID | str, *, kind: str | None = None, user_id: UUID | str | None = None
    ) -> datetime:
        """Reset usage in the current periods of a group's limits, or of one member's; the ledger keeps everything.

        That is usage under the group's own group and member limits, and under the `child` limits of the group above it;
        not under other limits above, nor that of groups beneath under its `child` limits. It ends windows that a first
        use has opened. Holds that are open still count in flight.

        Args:
            group_id: Which group.
            kind: Only limits on this kind (a pool has a name of its own); all when None.
            user_id: Only what counts under the member limits of this user; all of the group's limits when None.

        Returns:
            The moment from which usage counts.

        Raises:
            UnknownUser: `auth.users` has no such user.

        Example:
            >>> groups.reset_usage(team.id, kind="image", user_id=user_id).tzinfo is not None
            True
        """
        return self._transport.send(reports.reset_usage(group_id, kind, user_id))

    def refund(self, usage_id: UUID | str) -> TrackResult:
        """Give back what a committed usage cost; repeating it changes nothing.

        Args:
            usage_id: The usage's.

        Returns:
            The usage, and what remains of the limits now.

        Raises:
            InvalidRequest: It is a hold that isn't committed yet.
            UsageNotFound: There is no such usage.
            AlreadySettled: It was released, or has expired.

        Example:
            >>> tracked = limits.track(user_id, "image")
            >>> groups.refund(tracked.usage_id).status
            'refunded'
        """
        return self._transport.send(workers.refund(usage_id))

    def reconcile(self, group_id: UUID | str, *, since: datetime | None = None) -> Reconciliation:
        """Recount a group's usage from the ledger, and correct what differs.

        Calls for the group wait meanwhile, as this reads the group's whole ledger: pass `since` if that is long.

        Args:
            group_id: Which group.
            since: History before it is ignored; None recounts all of it.

        Returns:
            What differed, as it was and as it is now.

        Example:
            >>> groups.reconcile(team.id).drifted
            False
        """
        return self._transport.send(reports.reconcile(group_id, since))

    def drift(self, group_id: UUID | str, *, since: datetime | None = None) -> Reconciliation:
        """Find where a group's counters and history differ from the ledger; changes and blocks nothing.

        `reconcile` corrects what it finds. In a very large group, it checks only some of the members.

        Args:
            group_id: Which group.
            since: Compare history from this moment on; of the last day when None.

        Returns:
            What differs, as it is and as it should be.

        Example:
            >>> groups.drift(team.id).drifted
            False
        """
        return self._transport.send(reports.drift(group_id, since))
