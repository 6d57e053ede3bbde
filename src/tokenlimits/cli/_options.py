"""Options and arguments that several commands share."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import typer

from tokenlimits.errors import ConfigurationError
from tokenlimits.settings import load_schema
from tokenlimits.sql_files import checked_schema

from ._terminal import Misunderstood

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")]
GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="A group's name or id.", show_default=False)]
UserArgument = Annotated[str, typer.Argument(metavar="USER", help="A user's id or e-mail address.", show_default=False)]
KindArgument = Annotated[
    str, typer.Argument(metavar="KIND", help="What is generated, such as image or video.", show_default=False)
]
KindOption = Annotated[str | None, typer.Option("--kind", help="Only this kind.", show_default=False)]
GroupOption = Annotated[str | None, typer.Option("--group", help="A group's name or id.", show_default=False)]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--db-url",
        help="The database's URL, such as postgresql://postgres@db.abc.supabase.co:5432/postgres, or @FILE to read it "
        "from a file. Default: DATABASE_URL or SUPABASE_DB_URL from the environment or .env. Other users of this "
        "machine can see what stands in a command line, also a password.",
        show_default=False,
    ),
]


def schema_name(text: str) -> str:
    """Read the name of a schema."""
    try:
        return checked_schema(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Schema = Annotated[
    str | None,
    typer.Option(
        "--schema",
        parser=schema_name,
        metavar="NAME",
        help="The schema of the tables and functions. "
        "Default: TOKENLIMITS_SCHEMA from the environment or .env, or public.",
        show_default=False,
    ),
]


def schema_option(schema: str) -> str:
    """Write the option, with a leading space, for a command that a message suggests; nothing for public."""
    return "" if schema == "public" else f" --schema {schema}"


def find_schema(given: str | None) -> str:
    """Choose the schema: from the option, the environment or `.env`, or public.

    Raises:
        Misunderstood: The environment names one that is not allowed.
    """
    try:
        return given or load_schema()
    except ConfigurationError as error:
        raise Misunderstood(str(error)) from None


def _no_number(text: str) -> str:
    # milliseconds since 1970 look like a year with month, day, hour and minutes: 1712010112345
    if text.isdecimal() and len(text) != len("20260131"):
        raise ValueError
    return text


def moment(text: str) -> datetime:
    """Read a date or a time; without a time zone, it is UTC."""
    try:
        read = datetime.fromisoformat(_no_number(text.strip()))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a date or time like 2026-01-31 or 2026-01-31T12:00:00Z") from None
    return read if read.tzinfo is not None else read.replace(tzinfo=UTC)


_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def moment_or_in(text: str) -> datetime:
    """Read a date or a time, or in how long it will be: 12h, 7d, 2w."""
    return _moment_or_length(text, 1, "in 7 days")


def _moment_or_length(text: str, direction: int, example: str) -> datetime:
    if found := re.fullmatch(r"([0-9]{1,4})([hdw])", text.strip().lower()):
        return datetime.now(UTC) + direction * int(found[1]) * _UNITS[found[2]]
    try:
        return moment(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message.replace(" like ", f" like 7d ({example}; h, d or w), ")) from None


def moment_or_none(text: str) -> datetime | Literal["none"]:
    """Read a date or a time, or the word none."""
    return "none" if text.strip().lower() == "none" else moment(text)


def chosen_anchor(given: datetime | Literal["none"]) -> datetime | None:
    """Return the anchor that was typed; Typer takes a parser's None for an option that wasn't given."""
    return None if given == "none" else given


def moment_or_ago(text: str) -> datetime:
    """Read a date or a time, or how long ago it was: 12h, 7d, 2w."""
    return _moment_or_length(text, -1, "7 days ago")


Since = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        parser=moment_or_ago,
        metavar="TIME",
        help="From this date or time on, in UTC by default; 7d is 7 days ago.",
        show_default=False,
    ),
]
_ANCHOR = "From when anchored periods are counted, such as 2026-01-31 or 2026-01-31T09:00+01:00; in UTC by default."
AnchorAt = Annotated[
    datetime | None,
    typer.Option(
        "--anchor-at",
        parser=moment,
        metavar="TIME",
        help=_ANCHOR,
        show_default=False,
    ),
]
NewAnchorAt = Annotated[
    Any,  # datetime | Literal["none"] | None, which Typer can't read
    typer.Option(
        "--anchor-at",
        parser=moment_or_none,
        metavar="TIME",
        help=f"{_ANCHOR} none: from the creation.",
        show_default=False,
    ),
]
Anchor = Annotated[
    Any,
    typer.Argument(
        parser=moment_or_none,
        metavar="TIME",
        help="Such as 2026-01-31 or 2026-01-31T09:00+01:00, in UTC by default; none: from when they joined.",
        show_default=False,
    ),
]
Until = Annotated[
    datetime | None,
    typer.Option(
        "--until",
        parser=moment_or_ago,
        metavar="TIME",
        help="Before this date or time, in UTC by default; 12h is 12 hours ago.",
        show_default=False,
    ),
]
