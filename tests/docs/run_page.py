"""Run one page's code from the top to the bottom, as a reader does.

Python shares one namespace, shell commands and files one directory, SQL one connection. What a page says is printed
must be printed: by a comment after `print(…)`, or by text right after the code. In both, … stands for anything.
"""
# ruff: noqa: T201  # what a page prints, and where it goes wrong

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg

# what runs until Ctrl-C, and what it says when it is ready
SERVING = {
    "tokenlimits dev": r"Ready\.",
    "tokenlimits admin\n": r"http://127\.0\.0\.1:\d+",
    "python -m tokenlimits.web": r"http://127\.0\.0\.1:\d+",
    "uvicorn ": r"running on http",
}
_PRINTS = re.compile(r"^\s*print\(.*\)  # (?P<output>.+)$")


class Page:
    """The state that a page's code shares."""

    def __init__(self, name: str, users: list[str]) -> None:
        self.name = name
        self.printed: dict[int, list[str]] = defaultdict(list)
        self.names: dict[str, Any] = {"__name__": "page", "print": self._print, **given(users)}

    def run(self, block: dict[str, Any]) -> None:
        if block["title"] is not None:
            self._write(Path(block["title"]), block["code"])
            return
        run = {"python": self._python, "sh": self._shell, "sql": self._sql}[block["language"]]
        output = run(block["code"], block["line"])
        if block["output"] is not None and not matches(block["output"], output):
            raise AssertionError(f"it printed:\n{output}\nand should print:\n{block['output']}")

    def _write(self, path: Path, code: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)

    def _python(self, code: str, line: int) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, self.name, "exec"), self.names)
        for number, text in enumerate(code.splitlines(), line + 1):
            told = _PRINTS.match(text)
            if told and not any(matches(told["output"], each) for each in self.printed[number]):
                raise AssertionError(f"line {number} printed {self.printed[number]}, not {told['output']!r}")
        return printed.getvalue()

    def _print(self, *values: object, **options: Any) -> None:
        text = io.StringIO()
        print(*values, **{**options, "file": text})
        self.printed[sys._getframe(1).f_lineno].append(text.getvalue().rstrip("\n"))
        print(*values, **options)

    def _shell(self, code: str, _line: int) -> str:
        *before, last = code.rstrip("\n").splitlines()
        for command, ready in SERVING.items():
            if f"{last.partition('  #')[0].rstrip()}\n".startswith(command):
                return serve("\n".join(before), last.partition("  #")[0].rstrip(), ready)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def _sql(self, code: str, _line: int) -> str:
        with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
            cursor = connection.execute(code.encode())
            while cursor.nextset():
                pass
            return "\n".join(map(str, cursor.fetchall())) if cursor.description else ""


def given(users: list[str]) -> dict[str, Any]:
    """What a reader has: users, jobs of a queue, something that generates."""
    user_id, *_ = user_ids = [UUID(user) for user in users]
    jobs = [SimpleNamespace(id=f"job-{n}", user_id=user_id, prompt="a cat") for n in (1, 2, 2, 3)]
    return {
        "user_id": user_id,
        "user_ids": user_ids,
        "jobs": jobs,
        "job": jobs[0],
        "make_image": lambda prompt: f"an image of {prompt}",
        "render": lambda: [SimpleNamespace(seconds=2.4), SimpleNamespace(seconds=4.6)],
    }


def serve(before: str, command: str, ready: str) -> str:
    """Run what serves until it is ready, and end it as Ctrl-C does."""
    port = "" if "dev" in command else " --port 0"
    script = f"{before}\nexec {command}{port}"
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if re.search(ready, line):
                process.send_signal(signal.SIGINT)
        if process.wait(60) not in (0, 130, -signal.SIGINT) or not re.search(ready, "".join(lines)):
            raise AssertionError(f"{command} did not serve:\n{''.join(lines)}")
    return ""


def matches(told: str, output: str) -> bool:
    """Whether it is what was told; … is anything within a line, and ends of lines don't count."""
    pattern = r"\n".join(
        r".*".join(re.escape(part) for part in line.rstrip().split("…")) for line in told.rstrip("\n").splitlines()
    )
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in output.rstrip("\n").splitlines())) is not None


def main(asked: dict[str, Any]) -> int:
    """Run a page: its name, the users whom its code knows, its blocks. It is said where it goes wrong."""
    page = Page(asked["page"], asked["users"])
    for block in asked["blocks"]:
        try:
            page.run(block)
        except BaseException:
            print(f"docs/{asked['page']}:{block['line']}", file=sys.stderr)
            raise
    return 0
