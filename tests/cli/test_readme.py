"""The commands that the README shows, one after another, on a fresh database."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import ROOT

from tokenlimits.local import LocalStack

from .conftest import Program

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer


@pytest.mark.slow
def test_the_commands_of_the_readme(server: PostgresServer, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## On the command line")[2]
    commands = re.findall(r"^tokenlimits .*", section.partition("\n## ")[0], re.MULTILINE)
    assert len(commands) >= 18
    server.create_database("readme")
    url = server.url("readme")
    with LocalStack(url) as stack:
        run = Program(tmp_path, {**stack.environment(), "DATABASE_URL": url, "no_proxy": "127.0.0.1"})
        ann = stack.create_user("ann@example.com")
        (tmp_path / "users.csv").write_text("user_id\n" + "\n".join(map(str, stack.create_users(10))))
        (tmp_path / "past.csv").write_text(f"user_id,kind,created_at\n{ann.id},image,2026-01-02\n")
        for command in commands:
            words = shlex.split(command, comments=True)[1:]
            if words == ["admin"]:
                # as people do it: with the installed program, from the beginning
                program = str(Path(sys.executable).with_name("tokenlimits"))
                serve_and_interrupt([program, *words, "--port", "0"], tmp_path, run.environment)
            else:
                run(*words)
        assert (tmp_path / "usage.csv").read_text().count("\n") == 3


def serve_and_interrupt(command: list[str], directory: Path, environment: dict[str, str]) -> None:
    """Run what serves until Ctrl-C, until it does, and end it."""
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "http://127.0.0.1:" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, lines
