"""Operations of several calls, as pure generators that yield calls and are sent the answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from datetime import datetime
from typing import Any, TypeVar, cast
from uuid import UUID

from tokenlimits.models import BulkResult, Group, GroupUsage, Member, Override, Page, Refused, User

from . import admins, arguments, reports
from .admins import AddedPage
from .arguments import Id
from .call import Call
from .reports import Export

T = TypeVar("T")

Flow = Generator[Call[Any], Any, T]
"""Yields calls, is sent the answer to each, and returns the overall result."""

Pages = Generator[Call[list[T]], list[T], None]
"""Yields calls, is sent the page of each, and ends after the last page."""

OnProgress = Callable[[int, int], object]
"""Called with the number done and the total."""

# 5,000 ids are 200 kB of JSON and well under a second of SQL; Supabase ends a statement after 8 s
CHUNK = 5_000
USAGE_PAGE = 1_000


def all_groups(search: str | None, parent: Id | Group | None) -> Flow[list[Group]]:
    """Read all groups whose name contains a text, or those directly beneath another."""
    groups: list[Group] = []
    after = None
    while True:
        page = cast("Page[Group]", (yield admins.groups_after(search, parent, after, admins.GROUPS_PAGE)))
        groups += page
        # a short page needn't be the last, as servers may limit the size of an answer
        after = page.next
        if after is None:
            return groups


def all_usage() -> Flow[list[GroupUsage]]:
    """Read the usage of all groups."""
    usages: dict[UUID, GroupUsage] = {}
    after = None
    while True:
        page = cast("Page[GroupUsage]", (yield reports.usage_page(after, USAGE_PAGE)))
        fresh = {usage.group.id: usage for usage in page if usage.group.id not in usages}
        usages |= fresh
        # a group that is renamed meanwhile may come twice; stop when nothing is new, or renaming could keep this going
        after = page.next
        if after is None or (page and not fresh):
            return list(usages.values())


def all_members(group_id: Id, search: str | None) -> Pages[Member]:
    """Read the members of a group whose e-mail address contains a text, page by page."""
    return _member_pages(arguments.id_(group_id, "group_id"), search)  # checked now, not when the first page is read


def _member_pages(group_id: str, search: str | None) -> Pages[Member]:
    # a short page needn't be the last, nor one of which no row can be read
    return _pages(lambda after: admins.members_after(group_id, search, after, admins.MEMBERS_PAGE))


def all_overrides(group_id: Id, user_id: Id | None, child_id: Id | None) -> Pages[Override]:
    """Read the overrides in a group, or those of one user or of one group beneath, page by page."""
    group, subject = arguments.id_(group_id, "group_id"), arguments.subject(user_id, child_id)
    return _pages(lambda after: admins.overrides_after(group, subject, after))


def exported(export: Export[T]) -> Pages[T]:
    """Read an export, page by page."""
    # an empty page needn't be the last: perhaps none of its rows matched
    return _pages(lambda after: export.page(after, reports.EXPORT_PAGE))


def _pages(call: Callable[[str | None], Call[Page[T]]]) -> Pages[T]:
    after = None
    while True:
        page = cast("Page[T]", (yield call(after)))
        after = page.next
        if after is None:
            return


def users_by_email(emails: Iterable[str]) -> Flow[list[User]]:
    """Find the users of any number of addresses."""
    users: list[User] = []
    for chunk in _chunks(admins.emails(emails)):
        users += yield admins.users_by_email(chunk)
    return users


def _distinct(user_ids: Iterable[Id]) -> list[str]:
    return list(dict.fromkeys(arguments.ids(user_ids, "user_ids")))


def _chunks(ids: list[str]) -> list[list[str]]:
    return [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]


def add_members(
    group_id: Id, user_ids: Iterable[Id], anchor_at: datetime | None, on_progress: OnProgress | None
) -> Flow[BulkResult]:
    """Add any number of users to a group."""
    arguments.callback(on_progress, "on_progress")
    ids = _distinct(user_ids)
    added = already = done = 0
    refused: list[Refused] = []
    for chunk in _chunks(ids):
        page: AddedPage = yield admins.add_members(group_id, chunk, anchor_at)
        added += page.added
        already += page.already
        refused += [Refused(user_id=user_id, reason="there is no such user") for user_id in page.unknown]
        done += len(chunk)
        if on_progress is not None:
            on_progress(done, len(ids))
    return BulkResult(added=added, already=already, refused=tuple(refused))


def remove_members(group_id: Id, user_ids: Iterable[Id], on_progress: OnProgress | None) -> Flow[int]:
    """Remove any number of users from a group."""
    arguments.callback(on_progress, "on_progress")
    ids = _distinct(user_ids)
    removed = done = 0
    for chunk in _chunks(ids):
        removed += yield admins.remove_members(group_id, chunk)
        done += len(chunk)
        if on_progress is not None:
            on_progress(done, len(ids))
    return removed
