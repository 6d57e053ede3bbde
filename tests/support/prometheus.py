"""Prometheus, where it can be had: on the PATH, or unpacked by `make prometheus`."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
_UNPACKED = str(ROOT / "build" / "prometheus" / "usr" / "bin")


def program(name: str) -> str | None:
    """Find `prometheus` or `promtool`."""
    return shutil.which(name) or shutil.which(name, path=_UNPACKED)


class Prometheus:
    """A server that scrapes some apps each second."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=parameters, trust_env=False, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.ask("query", query=expression)["result"]


@contextmanager
def prometheus(directory: Path, rules: Path, apps: list[str]) -> Iterator[Prometheus]:
    """Run one on loopback, with some rules, until all apps have been scraped."""
    executable = program("prometheus")
    assert executable is not None
    targets = [app.removeprefix("http://") for app in apps]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "tokenlimits", "static_configs": [{"targets": targets}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        executable,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")

        def is_there() -> bool:
            assert server.poll() is None, (directory / "log").read_text()
            try:
                return len(found.query("up == 1")) == len(apps)
            except (httpx.HTTPError, AssertionError):
                return False

        eventually(is_there)
        yield found
    finally:
        server.terminate()
        server.wait(60)
