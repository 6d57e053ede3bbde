"""`admin`: serve the panel; grant and revoke the admin role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import httpx
import typer

from tokenlimits.settings import load

from ._database import Connection, connect, find_url
from ._find import as_id, find_user, manager
from ._options import AsJson, DatabaseUrl, UserArgument
from ._terminal import Problem, plain, print_json, say, show, table

commands = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

_FIND = """
select id, email_confirmed_at is not null
from auth.users
where id::text = lower(%(user)s) or lower(email) = lower(%(user)s)
"""
_LIST = "select id, email from auth.users where raw_app_meta_data ->> 'role' = 'admin' order by email, id"
_PAGE = 1000
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


@commands.command("list")
def list_(*, db_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the admins."""
    admins = _admins_in_table(db_url) if find_url(db_url) is not None else _admins_by_api()
    if as_json:
        print_json([{"id": id_, "email": email} for id_, email in admins])
    elif admins:
        show(table("id", "email", rows=[(str(id_), plain(email or "")) for id_, email in admins]))
    else:
        say("Nobody is an admin. Make somebody one with: tokenlimits admin grant USER", style="yellow")


def _admins_in_table(db_url: str | None) -> Sequence[tuple[Any, Any]]:
    with connect(db_url) as connection:
        return [(id_, email) for id_, email in connection.execute(_LIST)]


def _admins_by_api() -> Sequence[tuple[Any, Any]]:
    admins: list[tuple[Any, Any]] = []
    page = 1
    while users := _auth("GET", f"users?page={page}&per_page={_PAGE}").json()["users"]:
        admins += [(user["id"], user["email"]) for user in users if user["app_metadata"].get("role") == "admin"]
        page += 1
    return admins


@commands.command()
def grant(user: UserArgument, *, db_url: DatabaseUrl = None) -> None:
    """Make a user an admin, starting with their next sign-in.

    With a database URL, this changes the table of users; without one, it uses the project's auth API and the secret
    key. An address that its user hasn't confirmed is refused, since it may be somebody else's; an id is taken.
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
    id_, is_confirmed = found[0]
    if admin:
        _check_confirmed(user, is_confirmed=bool(is_confirmed))
    connection.execute(_GRANT if admin else _REVOKE, [id_])


def _check_confirmed(user: str, *, is_confirmed: bool) -> None:
    if not is_confirmed and as_id(user) is None:
        raise Problem(
            f"{user} is not confirmed: whoever signed up with this address may not own it. Pass the user's id if you "
            "are sure."
        )


def _change_by_api(user: str, *, admin: bool) -> None:
    with manager() as groups:
        user_id = find_user(groups, user)
    if admin:
        found = _auth("GET", f"users/{user_id}").json()
        _check_confirmed(user, is_confirmed=found.get("email_confirmed_at") is not None)
    # null removes the key
    _auth("PUT", f"users/{user_id}", {"app_metadata": {"role": "admin" if admin else None}})


def _auth(method: str, path: str, body: object = None) -> httpx.Response:
    settings = load()
    key = settings.key.get_secret_value()
    url = f"{settings.url.rstrip('/')}/auth/v1/admin/{path}"
    headers = {"apikey": key, "Authorization": f"Bearer {key}"}
    try:
        answer = httpx.request(method, url, json=body, headers=headers, timeout=20)
    except httpx.HTTPError as error:
        problem = f"The auth API can't be reached: {type(error).__name__}."
    else:
        if answer.is_success:
            return answer
        problem = f"The auth API answered with status {answer.status_code}."
    # outside the except block, so that the error's context doesn't hold the key
    raise Problem(f"{problem} Pass --db-url or set DATABASE_URL to use the database directly.")
