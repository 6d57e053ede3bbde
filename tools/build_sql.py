"""Build sql/tokenlimits.sql and the first migration from sql/schema/; with --check, fail when they are stale."""

from __future__ import annotations

import sys
from pathlib import Path

SQL = Path(__file__).resolve().parent.parent / "sql"
TARGETS = (SQL / "tokenlimits.sql", SQL / "migrations" / "20261123000000_tokenlimits.sql")
HEADER = """\
-- tokenlimits: exact limits on generations. Apply it in Supabase's SQL editor, or as a migration.
-- It can be applied again without harm: data, and your own tokenlimits.is_admin(), stay.
-- Generated from sql/schema/ by `make sql`; edit it there.

"""


def main() -> int:
    """Write the generated files, or say which are stale."""
    content = HEADER + "\n".join(path.read_text() for path in sorted((SQL / "schema").glob("*.sql")))
    stale = [path for path in TARGETS if not path.exists() or path.read_text() != content]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(SQL.parent)} is stale: run `make sql`", file=sys.stderr)
        return bool(stale)
    for path in stale:
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
