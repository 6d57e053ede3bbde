"""The operations of admins on groups, limits and members, as pure calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from tokenlimits.errors import GroupNotFound, UnknownUser
from tokenlimits.models import (
    UNCHANGED,
    Group,
    Limit,
    Member,
    Model,
    Override,
    Page,
    Period,
    Scope,
    Starts,
    Unchanged,
    User,
)

from . import arguments
from .arguments import Id, Limits, parser
from .call import Call, field_parser
from .rows import row_parser, rows_parser

T = TypeVar("T")

GROUPS_PAGE = 200
"""The most groups of a page."""
MEMBERS_PAGE = 500
"""The most members of a page."""
OVERRIDES_PAGE = 500
"""The most overrides of a page."""


class AddedPage(Model):
    """What the server answers to one part of a bulk operation."""

    added: int
    already: int
    unknown: tuple[UUID, ...]


_GROUP = row_parser(Group)
_GROUPS = rows_parser(Group)
_MEMBERS = rows_parser(Member)
_ADDED = parser(AddedPage)
_MOVED = field_parser("moved", bool)
_REMOVED = field_parser("removed", int)
_SET = field_parser("set", bool)
_USERS = rows_parser(User)
_OVERRIDE = row_parser(Override)
_OVERRIDES = rows_parser(Override)
_WAS_REMOVED = field_parser("removed", bool)


def create_group(
    id_: Id | None = None, parent: Id | Group | None = None, *, is_spread: bool = False, **fields: Any
) -> Call[Group]:
    """Create a group, with an id of the caller's choice if there is one, and beneath another group if one is named."""
    params = {"p_group_id": None, **arguments.group(fields)}
    if parent is not None:  # older SQL has no such parameter
        params["p_parent_id"] = arguments.parent(parent)
    if arguments.flag(is_spread, "is_spread"):
        params["p_is_spread"] = True
    if id_ is not None:
        params["p_id"] = arguments.id_(id_, "id")
    # after a lost answer, creating it again would fail on the name of the group that it has created itself
    return Call("save_group", params, _GROUP, retry_safe=False)


def update_group(
    group_id: Id,
    unchanged_since: datetime | None = None,
    anchor_at: datetime | Unchanged | None = UNCHANGED,
    parent: Id | Group | Unchanged | None = UNCHANGED,
    **fields: Any,
) -> Call[Group]:
    """Change what is not None of a group, its anchor and its parent, perhaps only if nobody has changed it since."""
    changes = {name: value for name, value in fields.items() if value is not None}
    params = {**arguments.of_group(group_id), **arguments.group(changes)}
    # in SQL, null leaves them alone
    if anchor_at is None:
        params["p_no_anchor"] = True
    elif anchor_at is not UNCHANGED:
        params["p_anchor_at"] = arguments.anchor(anchor_at)
    if parent is None:
        params["p_no_parent"] = True
    elif parent is not UNCHANGED:
        params["p_parent_id"] = arguments.parent(parent)
    if unchanged_since is None:
        return Call("save_group", params, _GROUP)
    params["p_updated_at"] = arguments.moment(unchanged_since, "unchanged_since")
    # after a lost answer, the change itself would be somebody else's
    return Call("save_group", params, _GROUP, retry_safe=False)


def set_limits(group_id: Id, limits: Limits) -> Call[Group]:
    """Replace a group's set of limits."""
    return Call("save_group", {**arguments.of_group(group_id), "p_limits": arguments.limits(limits)}, _GROUP)


def set_limit(group_id: Id, limit: Limit) -> Call[Group]:
    """Add one limit, or change its max."""
    params = {**arguments.of_group(group_id), "p_limit": arguments.limit(limit)}
    return Call("set_group_limit", params, _GROUP)


def remove_limit(group_id: Id, kind: str, period: Period | None, scope: Scope, starts: Starts | None) -> Call[Group]:
    """Remove one limit; only the database knows whether a kind and a scope name just one."""
    params = {
        **arguments.of_group(group_id),
        "p_kind": arguments.kind(kind),
        "p_period": arguments.optional_period(period),
        "p_scope": arguments.scope(scope),
        "p_starts": arguments.optional_starts(starts),
    }
    return Call("remove_group_limit", params, _GROUP)


def set_override(
    group_id: Id,
    kind: str,
    max_: int | None,
    user_id: Id | None,
    child_id: Id | None,
    period: Period | None,
    starts: Starts | None,
    until: datetime | None,
) -> Call[Override]:
    """Replace the max of one limit for a user, for a group beneath or, without either, of a group limit."""
    params = {
        **_overridden(group_id, kind, user_id, child_id, period, starts),
        "p_max": arguments.max_(max_),
        "p_until": arguments.until(until),
    }
    return Call("set_limit_override", params, _OVERRIDE)


def remove_override(
    group_id: Id,
    kind: str,
    user_id: Id | None,
    child_id: Id | None,
    period: Period | None,
    starts: Starts | None,
) -> Call[bool]:
    """Let a limit's own max hold again."""
    return Call("remove_limit_override", _overridden(group_id, kind, user_id, child_id, period, starts), _WAS_REMOVED)


def _overridden(
    group_id: Id,
    kind: str,
    user_id: Id | None,
    child_id: Id | None,
    period: Period | None,
    starts: Starts | None,
) -> dict[str, Any]:
    return {
        **arguments.of_group(group_id),
        "p_kind": arguments.kind(kind),
        **arguments.subject(user_id, child_id),
        "p_period": arguments.optional_period(period),
        "p_starts": arguments.optional_starts(starts),
    }


def overrides_after(group_id: str, subject: Mapping[str, str | None], after: str | None) -> Call[Page[Override]]:
    """Read the overrides after an id; `next` is None only if there are none."""
    params = {"p_group_id": group_id, **subject, "p_after": after, "p_page_size": OVERRIDES_PAGE}
    return _paged("find_limit_overrides", params, _OVERRIDES, "id")


def get_group(group_id: Id) -> Call[Group]:
    """Read one group by its id."""
    return Call("find_groups", arguments.of_group(group_id), lambda answer: _only(answer, f"with the id {group_id}"))


def get_group_by_name(name: str) -> Call[Group]:
    """Read one group by its name, whatever its case."""
    params = {"p_name": arguments.name(name)}
    return Call("find_groups", params, lambda answer: _only(answer, f"named {name!r}"))


def _only(answer: Any, what: str) -> Group:
    if not answer:
        raise GroupNotFound(f"There is no group {what}. List the groups to see which exist.", code="TL002")
    return _GROUP(answer[0])


def groups_after(search: str | None, parent: Id | Group | None, after: str | None, size: int) -> Call[Page[Group]]:
    """Read the groups after a name, perhaps only those beneath another; `next` is None only if there are none."""
    params = {"p_search": arguments.group_search(search), "p_after": after, "p_page_size": size}
    if parent is not None:  # older SQL has no such parameter
        params["p_parent_id"] = arguments.parent(parent)
    return _paged("find_groups", params, _GROUPS, "name")


def _paged(function: str, params: dict[str, Any], parse: Callable[[Any], list[T]], cursor: str) -> Call[Page[T]]:
    """Make a call of which the next page begins after the last row, whether that can be read or not."""
    return Call(function, params, lambda answer: Page(parse(answer), str(answer[-1][cursor]) if answer else None))


def groups_page(search: str | None, parent: Id | Group | None, after: str | None, size: int) -> Call[Page[Group]]:
    """Read a page of groups, and say whether there are more."""
    size = arguments.size(size, GROUPS_PAGE)
    return _with_one_more(groups_after(search, parent, arguments.after(after), size + 1), size)


def _with_one_more(call: Call[Page[T]], size: int) -> Call[Page[T]]:
    """Make a page of what a call asks for; one more row than that says whether there is another page."""

    def parse(answer: Any) -> Page[T]:
        page = call.parse(answer[:size])
        return Page(page, page.next if len(answer) > size else None)

    return Call(call.function, call.params, parse)


def delete_group(group_id: Id) -> Call[Group]:
    """Delete a group."""
    # after a lost answer, deleting it again would fail with GroupNotFound
    return Call("delete_group", arguments.of_group(group_id), _GROUP, retry_safe=False)


def add_members(group_id: Id, user_ids: list[str], anchor_at: datetime | None) -> Call[AddedPage]:
    """Add up to a few thousand users to a group."""
    params = {
        **arguments.of_group(group_id),
        "p_user_ids": user_ids,
        "p_anchor_at": arguments.anchor(anchor_at),
    }
    return Call("add_group_members", params, _ADDED)


def add_member(group_id: Id, user_id: Id, anchor_at: datetime | None) -> Call[bool]:
    """Add one user to a group."""
    id_ = arguments.id_(user_id, "user_id")

    def parse(answer: Any) -> bool:
        page: AddedPage = _ADDED(answer)
        if page.unknown:
            raise UnknownUser(
                f"There is no user {id_} in auth.users. Users sign up through Supabase Auth.", code="TL004"
            )
        return page.added == 1

    call = add_members(group_id, [id_], anchor_at)
    return Call(call.function, call.params, parse)


def set_member_anchor(group_id: Id, user_id: Id, anchor_at: datetime | None) -> Call[bool]:
    """Set from when a member's anchored periods are counted; None: from when they joined."""
    params = {
        **arguments.of_group(group_id),
        "p_user_id": arguments.id_(user_id, "user_id"),
        "p_anchor_at": arguments.anchor(anchor_at),
    }
    return Call("set_member_anchor", params, _SET)


def remove_members(group_id: Id, user_ids: list[str]) -> Call[int]:
    """Remove up to a few thousand users from a group."""
    params = {**arguments.of_group(group_id), "p_user_ids": user_ids}
    return Call("remove_group_members", params, _REMOVED)


def remove_member(group_id: Id, user_id: Id) -> Call[bool]:
    """Remove one user from a group."""
    params = {**arguments.of_group(group_id), "p_user_ids": [arguments.id_(user_id, "user_id")]}
    return Call("remove_group_members", params, lambda answer: _REMOVED(answer) == 1)


def move_member(user_id: Id, from_: Id, to: Id) -> Call[bool]:
    """Move a user from one group to another."""
    params = {
        "p_user_id": arguments.id_(user_id, "user_id"),
        "p_from": arguments.id_(from_, "from_"),
        "p_to": arguments.id_(to, "to"),
    }
    return Call("move_group_member", params, _MOVED, retry_safe=False)


def members_page(group_id: Id, search: str | None, after: str | None, size: int) -> Call[Page[Member]]:
    """Read a page of members, and say whether there are more."""
    size = arguments.size(size, MEMBERS_PAGE)
    return _with_one_more(members_after(group_id, search, arguments.optional_id(after, "after"), size + 1), size)


def members_after(group_id: Id, search: str | None, after: Id | None, size: int) -> Call[Page[Member]]:
    """Read the members after a user id; `next` is None only if there are none."""
    params = {
        **arguments.of_group(group_id),
        "p_after": None if after is None else str(after),
        "p_page_size": size,
    }
    if search is not None:  # older SQL has no such parameter
        params["p_search"] = arguments.search(search)
    return _paged("group_members", params, _MEMBERS, "user_id")


def find_users(email: str) -> Call[list[User]]:
    """Find users by a part of their e-mail address."""
    return Call("find_users", {"p_email": arguments.email(email)}, _USERS)


def emails(values: Iterable[str]) -> list[str]:
    """Check e-mail addresses; repeated ones count once."""
    return list(dict.fromkeys(arguments.emails(values)))


def users_by_email(addresses: list[str]) -> Call[list[User]]:
    """Find the users of up to a few thousand addresses."""
    return Call("find_users_by_email", {"p_emails": addresses}, _USERS)
