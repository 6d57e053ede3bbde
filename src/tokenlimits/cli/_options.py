"""Options and arguments that several commands share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="A group's name or id.", show_default=False)]
UserArgument = Annotated[str, typer.Argument(metavar="USER", help="A user's id or e-mail address.", show_default=False)]
KindArgument = Annotated[str, typer.Argument(metavar="KIND", help="Like image or video.", show_default=False)]
KindOption = Annotated[str | None, typer.Option("--kind", help="Of this kind alone.", show_default=False)]
GroupOption = Annotated[str | None, typer.Option("--group", help="A group's name or id.", show_default=False)]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--db-url",
        help="The database, like postgresql://postgres@db.abc.supabase.co:5432/postgres. "
        "Without it, DATABASE_URL or SUPABASE_DB_URL of the environment or .env, which hides the password.",
        show_default=False,
    ),
]


def moment(text: str) -> datetime:
    """Read a date or a moment; without a time zone it is UTC."""
    try:
        read = datetime.fromisoformat(text.strip())
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no date or time like 2026-01-31 or 2026-01-31T12:00:00Z") from None
    return read if read.tzinfo is not None else read.replace(tzinfo=UTC)


Since = Annotated[
    datetime | None,
    typer.Option("--since", parser=moment, metavar="TIME", help="From then on (UTC).", show_default=False),
]
Until = Annotated[
    datetime | None,
    typer.Option("--until", parser=moment, metavar="TIME", help="Before then (UTC).", show_default=False),
]
