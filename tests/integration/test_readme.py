"""The README's code runs, its commands and links exist."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.docs.pages import ROOT, blocks
from tests.support.postgres import PostgresServer, servers

from tokenlimits import GroupManager
from tokenlimits.local import LocalStack

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")

RUNNER = """
import json, sys
from types import SimpleNamespace
from uuid import UUID

given = json.load(sys.stdin)
users = [UUID(user) for user in given["users"]]
names = {
    "__name__": "README",
    "user_id": users[0],
    "user_ids": users,
    "jobs": [SimpleNamespace(id=id, user_id=users[0], prompt="a cat") for id in ("1", "2", "2", "3")],
    "make_image": lambda prompt: f"an image of {prompt}",
}
for line, code in given["blocks"]:
    print(f"README.md:{line}")
    exec(compile("\\n" * line + code, "README.md", "exec"), names)
"""


def python_blocks() -> list[tuple[int, str]]:
    """The README's Python, each with the number of the line of its fence."""
    found = blocks((ROOT / "README.md").read_text())
    return [(block.line, block.code) for block in found if block.language == "python"]


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    with PostgresServer(next(iter(servers().values()))) as server, LocalStack(server.url()) as stack:
        yield stack


@pytest.fixture(scope="module")
def output(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the README's Python prints, run from the top to the bottom."""
    directory = tmp_path_factory.mktemp("readme")
    env = {
        **os.environ,
        **stack.environment(),
        "no_proxy": "127.0.0.1",
        "TOKENLIMITS_WEB_SECRET": secrets.token_urlsafe(32),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        with GroupManager.from_env() as groups:
            groups.create("Newcomers", limits={"image": 2}, is_default=True)
    users = [str(stack.create_user("ann@example.com").id), *map(str, stack.create_users(2))]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps({"users": users, "blocks": python_blocks()}),
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


class TestPython:
    @pytest.mark.slow
    def test_runs(self, output: str) -> None:
        assert output.count("README.md:") == len(python_blocks()) == 3

    def test_of_the_worker_stops_at_the_limit(self, output: str) -> None:
        """Two newcomers' images pass; a job that comes twice is charged once; the last is denied."""
        assert output.splitlines()[1:5] == [
            "an image of a cat 1 left",
            "an image of a cat 0 left",
            "an image of a cat 0 left",
            "Image generation limit exceeded: 2 of 2 used in total",
        ]

    def test_of_the_admin_shows_usage(self, output: str) -> None:
        assert re.search(r"^image 0 150 20\d\d-.*\nimage 0 1000 20\d\d-", output, re.MULTILINE)

    def test_of_somebody_who_tries_it_is_denied_at_last(self, output: str) -> None:
        denied = "allowed=False Image generation limit exceeded: 1 of 1 used in total"
        assert output.endswith(f"allowed=True None\n{denied}\n")
        assert f"`{denied}`" in (ROOT / "README.md").read_text()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
class TestDocument:
    def test_names_make_targets_that_exist(self, document: str) -> None:
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        named = set(re.findall(r"(?:^|`)make (\w+)", (ROOT / document).read_text(), re.MULTILINE))
        assert named <= targets

    def test_links_to_what_exists(self, document: str) -> None:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
                assert target[1:] in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], target
            elif not target.startswith("https://"):
                assert (ROOT / target.partition("#")[0]).exists(), target
