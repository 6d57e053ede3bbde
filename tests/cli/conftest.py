"""One PostgreSQL and one stack on it for all commands, each of which runs as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from os import environ
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from supabase import Client, ClientOptions, create_client
from tests.cli import processes
from tests.cli.terminal import Terminal
from tests.conftest import ROOT
from tests.support.postgres import PostgresServer, create_hosted_database, servers

from tokenlimits import GroupManager, TokenLimits
from tokenlimits.local import LocalStack

_OURS = ("SUPABASE_", "TOKENLIMITS_", "DATABASE_URL", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PG")
NUMBERS = count(1)

Done = subprocess.CompletedProcess[str]


class Program:
    """Runs `tokenlimits` with an environment; warnings are errors in it."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = {k: v for k, v in environ.items() if not k.startswith(_OURS)} | environment

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-W", "error", "-m", "tokenlimits", *map(str, arguments)]

    def __call__(self, *arguments: object, stdin: str | bytes = "", status: int | None = 0, **environment: str) -> Done:
        with TemporaryDirectory() as streams:
            paths = [Path(streams, name) for name in ("stdin", "stdout", "stderr")]
            for path, content in zip(paths, (stdin, b"", b""), strict=True):
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            words = [str(argument) for argument in arguments]
            status_ = processes.run(words, self.directory, self.environment | environment, paths)
            done = Done(words, status_, *(path.read_text(encoding="utf-8") for path in paths[1:]))
        assert "Traceback" not in done.stderr or "--debug" in arguments, done.stderr
        assert status in (None, done.returncode), done.stdout + done.stderr
        return done

    def on_terminal(self, *arguments: object, **environment: str) -> Terminal:
        return Terminal(self.command(*arguments), self.directory, self.environment | environment)

    def json(self, *arguments: object, stdin: str = "", status: int | None = 0, **environment: str) -> Any:
        return json.loads(self(*arguments, "--json", stdin=stdin, status=status, **environment).stdout)

    def fails(self, *arguments: object, stdin: str = "", status: int = 1, **environment: str) -> str:
        """Run a command that goes wrong; return its error, which is one line."""
        done = self(*arguments, stdin=stdin, status=status, **environment)
        assert done.stderr.startswith("Error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.removeprefix("Error: ").strip()


class Newer(Program):
    """A later version of the package, which has one migration more."""

    MIGRATION = "29991231000000_later.sql"

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        super().__init__(directory, environment)
        package = directory / "newer" / "tokenlimits"
        copytree(ROOT / "src" / "tokenlimits", package, ignore=ignore_patterns("__pycache__"))
        copytree(ROOT / "sql", package / "sql")  # where a wheel has it
        (package / "sql" / "migrations" / self.MIGRATION).write_text("create table public.later (id bigint);\n")
        self.environment["PYTHONPATH"] = str(package.parent)

    def __call__(self, *arguments: object, stdin: str = "", status: int | None = 0, **environment: str) -> Done:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment | environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert status in (None, done.returncode), done.stdout + done.stderr
        return done


@pytest.fixture(scope="session", autouse=True)
def _nothing_above(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A project is looked for upwards, as far as a repository goes."""
    tmp_path_factory.getbasetemp().joinpath(".git").mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(servers()["18"]) as server:
        yield server


@pytest.fixture(scope="session")
def stack(server: PostgresServer) -> Iterator[LocalStack]:
    server.create_database("cli")
    with LocalStack(server.url("cli")) as stack:
        yield stack


@pytest.fixture
def new_hosted(server: PostgresServer) -> Iterator[Callable[[], str]]:
    """Make databases of hosted projects without tokenlimits; it returns a URL of each."""
    names: list[str] = []

    def make() -> str:
        names.append(f"hosted_{next(NUMBERS)}")
        create_hosted_database(server, names[-1])
        return server.url(names[-1], "postgres")

    yield make
    for name in names:
        server.drop_database(name)


@pytest.fixture
def hosted(new_hosted: Callable[[], str]) -> str:
    """The URL of a hosted project's database without tokenlimits."""
    return new_hosted()


@pytest.fixture
def nowhere(tmp_path: Path) -> Program:
    """The program where nothing is configured."""
    return Program(tmp_path, {})


@pytest.fixture
def newer(tmp_path: Path) -> Newer:
    """The program of a later version, where nothing is configured."""
    return Newer(tmp_path, {})


@pytest.fixture
def tl(tmp_path: Path, stack: LocalStack) -> Program:
    """The program with the stack's URL and secret key."""
    return Program(tmp_path, {**stack.environment(), "no_proxy": "127.0.0.1"})


@pytest.fixture(scope="session")
def service(stack: LocalStack) -> Iterator[Client]:
    with httpx.Client(trust_env=False) as http:
        yield create_client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))


@pytest.fixture(scope="session")
def groups(service: Client) -> GroupManager:
    return GroupManager(service, timeout=60)


@pytest.fixture
def name() -> str:
    """A name for a group that no other test has; part of it looks like markup."""
    return f"Té[red]am {next(NUMBERS)}"


@pytest.fixture(scope="session")
def limits(service: Client) -> TokenLimits:
    return TokenLimits(service, timeout=60)
