"""Which tests a process of pytest-xdist takes together, and in which order.

Marks can't say it: with pytest 9.2, `--dist loadgroup` of pytest-xdist 3.8 ignores its groups without a word.
"""

from __future__ import annotations

import re

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LONGEST_FIRST = ("tests/sql/", "tests/integration/", "tests/cli/", "tests/web/", "tests/docs/", "tests/typing/")
"""So that what is quick is left for whichever process is done first."""


class Groups(LoadScopeScheduling):
    """What shares a PostgreSQL and a schema is a group; else what is in a file, and shares what is started for it."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        server = re.search(r"\[.*?(postgres-\d+(-in-limits)?)", name)
        return server[1] if server else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups | None:
    return Groups(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((n for n, path in enumerate(LONGEST_FIRST) if item.nodeid.startswith(path)), len(LONGEST_FIRST))

    items.sort(key=place)
