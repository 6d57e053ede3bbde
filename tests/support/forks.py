"""Processes that begin with the libraries imported already, which takes longer than most of what they do.

They are forked from a server that has no threads, so they copy no locks. There is one server in a process of tests, and
it imports what the first asks for: all of them need the same list.
"""

from __future__ import annotations

import multiprocessing
from typing import Final

CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "psycopg",
        "psycopg.types.json",
        "pytest",
        "rich.live",
        "rich.progress",
        "supabase",
        "tests.docs.run_page",
        "tests.sql.semantics.hammer",
        "tests.support.hammer",
        "tokenlimits",
        "typer",
    ]
)
