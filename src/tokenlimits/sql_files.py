"""The SQL that ships with the package, as text to apply or to read.

A wheel has it in `tokenlimits/sql`, a checkout in `sql`. It is written for the schema `public`; for another schema, the
names in it are replaced.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["SCHEMA_VERSION", "SqlFile", "checked_schema", "migrations", "one_paste", "uninstall", "without_transaction"]

SCHEMA_VERSION = 1
"""The oldest version of the SQL that this package works with; it works with newer ones too."""

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_TAKEN = re.compile(
    r"pg_.*|_?supabase_.*|_?(analytics|realtime)|information_schema|tokenlimits|auth|cron|dbdev|extensions|graphql"
    r"|graphql_public|net|pgbouncer|pgmq|pgmq_public|pgsodium(_masks)?|pgtle|repack|storage|tiger(_data)?|topology|vault"
)
# a qualified name, a name in a catalog, and the schema itself; but not `public` in a grant, which is everybody
_PUBLIC = re.compile(r"\bpublic(?=\.[\w%])|(?<=')public(?=')|(?<=\bschema )public\b")


class SqlFile(NamedTuple):
    """A migration: its file name, and the SQL in it."""

    name: str
    text: str


def checked_schema(schema: str) -> str:
    """Check the name of a schema for tables and functions of tokenlimits.

    Raises:
        ValueError: It isn't a plain lower-case name, or belongs to Supabase or PostgreSQL.

    Example:
        >>> checked_schema("limits")
        'limits'
    """
    if not _NAME.fullmatch(schema):
        raise ValueError(
            f"{schema[:80]!r} can't be the schema: use lower-case letters, digits and underscores, as in 'limits'."
        )
    if _TAKEN.fullmatch(schema):
        raise ValueError(
            f"{schema!r} can't be the schema: it is reserved. Use 'public', or one of your own, such as 'limits'."
        )
    return schema


def migrations(schema: str = "public") -> tuple[SqlFile, ...]:
    """List the migrations, oldest first, with names as the Supabase CLI expects them (`YYYYMMDDHHMMSS_topic.sql`).

    Copy them into your project's `supabase/migrations/`.

    Raises:
        ValueError: The name of the schema is not allowed.

    Example:
        >>> migrations()[0].name.endswith("_tokenlimits.sql")
        True
    """
    found = (file for file in _sql().joinpath("migrations").iterdir() if file.name.endswith(".sql"))
    return tuple(
        SqlFile(file.name, _in_schema(file.read_text(encoding="utf-8"), schema))
        for file in sorted(found, key=lambda file: file.name)
    )


def one_paste(schema: str = "public") -> str:
    """Return all the SQL as one text for Supabase's SQL editor; applying it again does no harm.

    Raises:
        ValueError: The name of the schema is not allowed.

    Example:
        >>> "notify pgrst" in one_paste()
        True
        >>> 'create table if not exists "limits".user_groups' in one_paste("limits")
        True
    """
    return _in_schema(_sql().joinpath("tokenlimits.sql").read_text(encoding="utf-8"), schema)


def uninstall() -> str:
    """Return the SQL that uninstalls tokenlimits from any schema and keeps the ledger.

    Example:
        >>> "drop_ledger" in uninstall()
        True
    """
    return _sql().joinpath("uninstall.sql").read_text(encoding="utf-8")


def without_transaction(sql: str) -> str:
    """Remove `begin` and `commit` from the SQL, to apply it in your own transaction.

    Example:
        >>> "begin;" in one_paste().splitlines(), "begin;" in without_transaction(one_paste()).splitlines()
        (True, False)
    """
    return re.sub(r"^(begin|commit);$", "", sql, flags=re.MULTILINE)


def _in_schema(sql: str, schema: str) -> str:
    if checked_schema(schema) == "public":
        return sql

    def renamed(found: re.Match[str]) -> str:
        # a literal takes the bare name; elsewhere it is quoted, as it may be one of PostgreSQL's reserved words
        return schema if found.string[found.start() - 1] == "'" and found.string[found.end()] == "'" else f'"{schema}"'

    return _PUBLIC.sub(renamed, sql)


def _sql() -> Traversable:
    packaged = files("tokenlimits").joinpath("sql")
    return packaged if packaged.is_dir() else Path(__file__).parents[2].joinpath("sql")
