"""What an installation must have, read from the SQL that this package ships, so that there is no copy to drift."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from tokenlimits.cli._options import schema_option
from tokenlimits.sql_files import one_paste

REAPPLY = (
    "Apply the SQL again, which keeps all data: run `tokenlimits migrate --reapply`, or paste the output of "
    "`tokenlimits sql` into the SQL editor."
)


def in_schema(remedy: str, schema: str) -> str:
    """Add the option to the commands that need it, or they would be about public."""
    return re.sub(r"`(tokenlimits (?:migrate --reapply|sql))`", rf"`\1{schema_option(schema)}`", remedy)


def adopt(schema: str) -> str:
    """Say how to mark objects as tokenlimits' own again."""
    paste = f'(echo "set tokenlimits.adopt = \'yes\';"; tokenlimits sql{schema_option(schema)}) | psql "$DATABASE_URL"'
    return f"If they belong to tokenlimits, apply the SQL and let it adopt them: `{paste}`"


class Expected(NamedTuple):
    """The installation that this package's SQL makes."""

    version: int
    functions: Mapping[str, frozenset[str]]
    triggers: frozenset[str]
    indexes: frozenset[str]


@cache
def expected() -> Expected:
    """Read the shipped SQL."""
    sql = one_paste()
    version = re.search(r"jsonb_build_object\('version', (\d+)\)", sql)
    grants = re.findall(r"^grant execute on function public\.(\w+)\([^)]*\)\s*to ([\w, ]+);", sql, re.MULTILINE)
    indexes = re.findall(r"^create (?:unique )?index if not exists (\w+)", sql, re.MULTILINE)
    keys = re.findall(r"^  constraint (\w+) (?:primary key|unique)", sql, re.MULTILINE)
    return Expected(
        version=int(version[1]) if version else 0,
        functions={name: frozenset(roles.split(", ")) for name, roles in grants},
        # the diagnosis is about the tables that others may change
        triggers=frozenset(re.findall(r"^create or replace trigger (\w+)\s[^;]*? on public\.", sql, re.MULTILINE)),
        indexes=frozenset([*indexes, *keys]),
    )


POLICIES: Mapping[str, frozenset[str]] = {
    "user_groups": frozenset({"select", "insert", "update", "delete"}),
    "group_limits": frozenset({"select", "insert", "update", "delete"}),
    "group_memberships": frozenset({"select", "insert", "delete"}),
    "limit_overrides": frozenset({"select", "insert", "update", "delete"}),
    "generation_usage": frozenset({"select"}),
}
"""What policies allow admins to do with each table."""

COLUMN_BY_COLUMN = frozenset({"insert", "update"})
"""What is granted for some columns only: nobody may set ids, counters or timestamps."""
