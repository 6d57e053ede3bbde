"""`admin`: serve the panel; grant and revoke the admin role."""

from __future__ import annotations

from typing import Annotated

import httpx
import typer

from tokenlimits.settings import load

from ._database import Connection, connect, find_url
from ._find import find_user, manager
from ._options import DatabaseUrl, UserArgument
from ._terminal import Problem, say

commands = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

_FIND = "select id from auth.users where id::text = lower(%(user)s) or lower(email) = lower(%(user)s)"
_GRANT = """
update auth.users
set raw_app_meta_data = coalesce(raw_app_meta_data, '{}') || '{"role": "admin"}'
where id = %s
"""
# leave any other role alone
_REVOKE = """
update auth.users
set raw_app_meta_data = raw_app_meta_data - 'role'
where id = %s and raw_app_meta_data ->> 'role' = 'admin'
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="admin")


@commands.callback()
def panel(
    context: typer.Context,
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 picks a free one.")] = 8321,
    forwarded_allow_ips: Annotated[
        str | None, typer.Option(help="Proxies whose X-Forwarded-* headers to trust, comma-separated.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="The path that a proxy serves the panel below and removes, like /limits.")
    ] = "",
) -> None:
    """Serve the admin panel; grant or revoke the admin role.

    The panel runs until Ctrl-C. It reads SUPABASE_URL, SUPABASE_PUBLISHABLE_KEY and TOKENLIMITS_WEB_SECRET, and needs
    pip install 'tokenlimits[web]'. By default, it listens on this machine only.
    """
    if context.invoked_subcommand is not None:
        return
    try:
        from tokenlimits.web import serve  # noqa: PLC0415  # it may not be installed
    except ModuleNotFoundError as error:
        raise Problem(str(error)) from error
    serve(host, port, forwarded_allow_ips=forwarded_allow_ips, root_path=root_path)


@commands.command()
def grant(user: UserArgument, *, db_url: DatabaseUrl = None) -> None:
    """Make a user an admin, starting with their next sign-in.

    With a database URL, this changes the table of users; without one, it uses the project's auth API and the secret
    key.
    """
    _change(user, db_url, admin=True)
    say(f"{user} will be an admin after the next sign-in.", style="green")


@commands.command()
def revoke(user: UserArgument, *, db_url: DatabaseUrl = None) -> None:
    """Take the admin role away from a user.

    A session that is already open keeps the role until its token expires, usually within an hour.
    """
    _change(user, db_url, admin=False)
    say(f"{user} will no longer be an admin after the next sign-in.", style="green")


def _change(user: str, db_url: str | None, *, admin: bool) -> None:
    if find_url(db_url) is None:
        _change_by_api(user, admin=admin)
        return
    with connect(db_url) as connection:
        _change_in_table(connection, user, admin=admin)


def _change_in_table(connection: Connection, user: str, *, admin: bool) -> None:
    found = connection.execute(_FIND, {"user": user.strip()}).fetchall()
    if len(found) != 1:
        raise Problem(f"{'More than one user has' if found else 'No user has'} the id or e-mail address {user}.")
    connection.execute(_GRANT if admin else _REVOKE, found[0])


def _change_by_api(user: str, *, admin: bool) -> None:
    settings = load()
    with manager() as groups:
        user_id = find_user(groups, user)
    key = settings.key.get_secret_value()
    url = f"{settings.url.rstrip('/')}/auth/v1/admin/users/{user_id}"
    # null removes the key
    body = {"app_metadata": {"role": "admin" if admin else None}}
    try:
        answer = httpx.put(url, json=body, headers={"apikey": key, "Authorization": f"Bearer {key}"}, timeout=20)
    except httpx.HTTPError as error:
        problem = f"The auth API can't be reached: {type(error).__name__}."
    else:
        if answer.is_success:
            return
        problem = f"The auth API answered with status {answer.status_code}."
    # outside the except block, so that the error's context doesn't hold the key
    raise Problem(f"{problem} Pass --db-url or set DATABASE_URL to change the database directly.")
