"""Runs SQL scripts under load with pgbench, alternatives in turns."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Load:
    """The load on a database: a script, a number of concurrent clients, and a number of seconds."""

    url: str
    script: str
    clients: int = 16
    seconds: float = 2


def rate(programs: Path, load: Load) -> float:
    """Measure transactions per second."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(load.script)
        script.flush()
        done = subprocess.run(
            [
                programs / "pgbench",
                "--no-vacuum",
                "--protocol=prepared",
                f"--client={load.clients}",
                "--jobs=1",
                f"--time={max(1, round(load.seconds))}",
                f"--file={script.name}",
                load.url,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    failed = re.search(r"number of failed transactions: (\d+)", done.stdout)
    if done.returncode != 0 or found is None or (failed and failed[1] != "0"):
        raise RuntimeError(done.stdout + done.stderr)
    return float(found[1])


def in_turns(programs: Path, loads: Mapping[str, Load], rounds: int) -> dict[str, list[float]]:
    """Measure all in turns, several times, so that disturbances affect all of them equally."""
    rates: dict[str, list[float]] = {name: [] for name in loads}
    for _ in range(rounds):
        for name, load in loads.items():
            rates[name].append(rate(programs, load))
    return rates
