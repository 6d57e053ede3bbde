"""`dev`: a local Supabase until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from tokenlimits.local import LocalStack

from ._options import Schema, find_schema
from ._terminal import Problem, err, note

_EMAIL = "admin@example.com"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("dev")(dev)


def dev(
    *,
    port: Annotated[
        int | None, typer.Option("--port", help="The port. Default: a free one.", show_default=False)
    ] = None,
    db_url: Annotated[
        str | None,
        typer.Option("--db-url", help="The PostgreSQL to serve. Default: one in memory.", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Keep the database and the keys in this directory, for the next run. Default: in memory.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option("--user", metavar="EMAIL", help="Also create this user; may be repeated.", show_default=False),
    ] = None,
    schema: Schema = None,
) -> None:
    """Run a local Supabase until Ctrl-C.

    The migrations are applied, and there is an admin who can sign in. The output is a .env file. Needs
    pip install 'tokenlimits[local]'.
    """
    if db_url is not None and data_dir is not None:
        raise Problem("Pass either --db-url or --data-dir.")
    where = find_schema(schema)
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    stack = LocalStack(db_url, port, data_dir=data_dir, schema=where, timeout=120)
    with err.status("Starting a local Supabase (the first start downloads it)"):
        stack.start()
    try:
        _print(stack, user or [])
        note("Ready. Press Ctrl-C to stop.", style="green")
        while not ended.wait(3600):
            pass
    finally:
        stack.stop()
    note("Stopped.")


def _print(stack: LocalStack, emails: Sequence[str]) -> None:
    """Print the .env file; with an admin, if the database had none of that name, and the users that were asked for."""
    taken = stack.sql("select from auth.users where email = $1", _EMAIL)
    lines = dict(stack.environment())
    if not taken:
        admin = stack.create_user(_EMAIL, admin=True)
        lines |= {"TOKENLIMITS_ADMIN_EMAIL": admin.email, "TOKENLIMITS_ADMIN_PASSWORD": admin.password}
    for number, email in enumerate(emails, 1):
        made = stack.create_user(email)
        prefix = f"TOKENLIMITS_USER{'' if len(emails) == 1 else f'_{number}'}"
        lines |= {f"{prefix}_ID": str(made.id), f"{prefix}_EMAIL": made.email, f"{prefix}_PASSWORD": made.password}
    for name, value in lines.items():
        print(f"{name}={value}")  # noqa: T201
    print(end="", flush=True)  # noqa: T201
