"""The clients of the commands, and groups and users by what people call them."""

from __future__ import annotations

from uuid import UUID

from tokenlimits import Group, GroupManager, GroupNotFound, TokenLimits

from ._terminal import Problem

# a command may take what Supabase allows a statement, twice
_TIMEOUT = 20


def manager() -> GroupManager:
    """Make the client for groups."""
    return GroupManager.from_env(timeout=_TIMEOUT)


def worker() -> TokenLimits:
    """Make the client for generations."""
    return TokenLimits.from_env(timeout=_TIMEOUT)


def as_id(text: str) -> UUID | None:
    """Read an id; None when it is something else."""
    try:
        return UUID(text.strip())
    except ValueError:
        return None


def find_group(groups: GroupManager, text: str) -> Group:
    """Find a group by its id or name.

    Raises:
        GroupNotFound: There is none.
    """
    id_ = as_id(text)
    if id_ is None:
        return groups.get_by_name(text)
    try:
        return groups.get(id_)
    except GroupNotFound:
        return groups.get_by_name(text)


def find_user(groups: GroupManager, text: str) -> UUID:
    """Find a user by their id or whole e-mail address.

    Raises:
        Problem: Nobody has the address, or several have.
    """
    id_ = as_id(text)
    if id_ is not None:
        return id_
    found = [user for user in groups.find_users(text) if (user.email or "").lower() == text.strip().lower()]
    if len(found) != 1:
        many = "Several users have" if found else "No user has"
        raise Problem(f"{many} the e-mail address {text}. Name the user by id, from Supabase's Authentication page.")
    return found[0].user_id
