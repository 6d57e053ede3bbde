"""The clients for the commands; lookups of groups and users by what people call them."""

from __future__ import annotations

import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies
from uuid import UUID

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.errors import GroupNotFound
from tokenlimits.models import Group
from tokenlimits.settings import load

from ._terminal import Problem

# seconds: Supabase ends a statement after 8, and this leaves time for a second one
_TIMEOUT = 20
_PORTS = {"http": 80, "https": 443}


def manager(schema: str | None = None) -> GroupManager:
    """Make the client for groups; without a schema, the environment says which."""
    _check_that_somebody_listens(load().url)
    return GroupManager.from_env(timeout=_TIMEOUT, schema=schema)


def worker() -> TokenLimits:
    """Make the client for generations."""
    _check_that_somebody_listens(load().url)
    return TokenLimits.from_env(timeout=_TIMEOUT)


# once for a command that makes both clients
@cache
def _check_that_somebody_listens(project: str) -> None:
    """Refuse at once where nothing listens: a worker waits for its server to come back, a person needn't.

    Raises:
        Problem: The connection is refused.
    """
    url = urlsplit(project)
    if getproxies().keys() - {"no"}:
        return
    try:
        socket.create_connection((url.hostname or "", url.port or _PORTS[url.scheme]), _TIMEOUT).close()
    except ConnectionRefusedError:
        raise Problem(f"{url.hostname} refuses connections. Check SUPABASE_URL; is the project running?") from None
    except OSError:
        return  # the call itself says what is wrong, and tries again


def as_id(text: str) -> UUID | None:
    """Read an id; None when it is something else."""
    try:
        return UUID(text.strip())
    except ValueError:
        return None


def find_group(groups: GroupManager, text: str) -> Group:
    """Find a group by its id or name.

    Raises:
        GroupNotFound: There is no such group.
    """
    id_ = as_id(text)
    if id_ is None:
        return groups.get_by_name(text)
    try:
        return groups.get(id_)
    except GroupNotFound:
        return groups.get_by_name(text)


def kinds_of(limit: Limit) -> Iterable[str]:
    """List the kinds that a limit counts: a pool's name is none, unless it counts itself."""
    return limit.counts or [limit.kind]


def kind_meant(groups: GroupManager, kind: str | None) -> str:
    """Ask, with a leading space, whether a kind that no group has a limit for was meant as one that some have."""
    if kind is None:
        return ""
    known = {kind for group in groups.list() for limit in group.limits for kind in kinds_of(limit)}
    # so near that it is a slip: image_hd is another kind than image, as audio is than video
    near = [] if kind in known else get_close_matches(kind, known, n=1, cutoff=0.8)
    return f" Did you mean {near[0]}?" if near else ""


def find_user(groups: GroupManager, text: str) -> UUID:
    """Find a user by their id or whole e-mail address.

    Raises:
        Problem: No user has the address, or several do.
    """
    user = resolve(groups, [text])[text]
    if isinstance(user, UUID):
        return user
    raise Problem(f"{text}: {user}. Use the user's id from Supabase's Authentication page.")


def resolve(groups: GroupManager, names: Iterable[str]) -> dict[str, UUID | str]:
    """Find users by id or whole e-mail address: map each to the user's id, or to a text that says why there is none."""
    distinct = list(dict.fromkeys(names))
    by_email: dict[str, list[UUID]] = defaultdict(list)
    emails = [name for name in distinct if _is_address(name)]
    for user in groups.find_users_by_email(emails) if emails else []:
        by_email[(user.email or "").lower()].append(user.id)
    return {name: _user_id(name, by_email[name.strip().lower()]) for name in distinct}


def names_a_user(text: str) -> bool:
    """Whether a text is an id or an e-mail address."""
    return re.fullmatch(r"\S+@\S+", text) is not None or as_id(text) is not None


def _is_address(name: str) -> bool:
    return "@" in name and name.isprintable()


def _user_id(name: str, of_email: Sequence[UUID]) -> UUID | str:
    if not _is_address(name):
        return as_id(name) or "is neither a user's id nor an e-mail address"
    if len(of_email) == 1:
        return of_email[0]
    return "several users have this e-mail address; use the id" if of_email else "no user has this e-mail address"
