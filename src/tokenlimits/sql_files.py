"""The SQL that ships with the package, as files to apply or to read.

A wheel carries it as `tokenlimits/sql`; in a checkout it's the directory `sql` of the repository.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["migrations", "one_paste"]


def migrations() -> tuple[Traversable, ...]:
    """List the migrations, oldest first, named as the Supabase CLI names them (`YYYYMMDDHHMMSS_topic.sql`).

    Copy them into your project's `supabase/migrations/`.

    Example:
        >>> migrations()[0].name.endswith("_tokenlimits.sql")
        True
    """
    found = (file for file in _sql().joinpath("migrations").iterdir() if file.name.endswith(".sql"))
    return tuple(sorted(found, key=lambda file: file.name))


def one_paste() -> str:
    """Return all of the SQL in one text, for Supabase's SQL editor; applying it again does no harm.

    Example:
        >>> "notify pgrst" in one_paste()
        True
    """
    return _sql().joinpath("tokenlimits.sql").read_text(encoding="utf-8")


def _sql() -> Traversable:
    packaged = files("tokenlimits").joinpath("sql")
    return packaged if packaged.is_dir() else Path(__file__).parents[2].joinpath("sql")
