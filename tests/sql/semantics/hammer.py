"""Many connections that call at once: 8 processes with 4 connections each, all let go by one shot.

with Crowd() as crowd:
    answers = crowd.call(url, [[Call(user, "image")] * 20] * 32)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb
from tests.sql.semantics.elsewhere import at_home
from tests.support.forks import CONTEXT

PROCESSES = 8
CONNECTIONS = 32

_GUN = 42


@dataclass(frozen=True)
class Call:
    """The arguments of `track_generation`, or of another function that takes them."""

    user_id: UUID
    kind: str = "image"
    cost: int = 1
    idempotency_key: str | None = None
    group_id: UUID | None = None
    function: str = "track_generation"
    ttl: int | None = None
    then: str | None = None
    pause: float = 0
    """A ttl makes it `reserve_generation`; `then` is the function that settles an allowed usage, after a pause."""


@dataclass(frozen=True)
class Settle:
    """A usage that somebody settles or extends, by `commit_generation` or another function that takes its id."""

    function: str
    usage_id: UUID
    cost: int | None = None
    ttl: int | None = None
    overage: str | None = None


@dataclass(frozen=True)
class Batch:
    """Calls of `track_generation` that travel together."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Answer:
    """What one call came to; `error` is an SQLSTATE."""

    call: Any
    error: str | None = None
    allowed: bool = False
    replayed: bool = False
    reason: str | None = None
    usage_id: str | None = None
    group_id: str | None = None
    overfull: bool = False
    wrongly_denied: bool = False
    status: str | None = None
    settled: Answer | None = None
    used: int | None = None
    """Of the group's limit, if there is one."""


Script = Sequence[Call | Settle | Batch]


Hammer = Callable[[Sequence[Script]], list[Answer]]
"""Lets every connection go through its script, all at once."""


def assert_right(answers: list[Answer], *expected_errors: str) -> None:
    """No call failed, none passed a max, and none was denied by a limit that has room."""
    assert {a.error for a in answers if a.error} <= set(expected_errors)
    assert [a for a in answers if a.overfull and a.allowed and not a.replayed] == []
    assert [a for a in answers if a.wrongly_denied] == []


def allowed(answers: list[Answer]) -> int:
    return sum(a.allowed and not a.replayed for a in answers)


class Crowd:
    """The processes; they are started once and used by many tests."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(PROCESSES, mp_context=CONTEXT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, url: str, scripts: Sequence[Script]) -> list[Answer]:
        """Let each connection go through its script, all at once."""
        with self.calling(url, scripts, cycles=1) as answers:
            pass
        return answers

    @contextmanager
    def calling(self, url: str, scripts: Sequence[Script], cycles: int | None = None) -> Iterator[list[Answer]]:
        """Let them go through their scripts over and over until the block ends; the answers are there after it."""
        answers: list[Answer] = []
        with TemporaryDirectory() as directory, psycopg.connect(url, autocommit=True) as starter:
            stop = Path(directory) / "stop"
            starter.execute("select pg_advisory_lock(%s)", [_GUN])
            parts = [list(scripts[number::PROCESSES]) for number in range(PROCESSES)]
            runs = [self._pool.submit(_run, url, part, cycles, str(stop)) for part in parts if part]
            _wait_for_all(starter, runs, len(scripts))
            starter.execute("select pg_advisory_unlock(%s)", [_GUN])
            try:
                yield answers
            finally:
                stop.touch()
                for run in runs:
                    answers.extend(run.result())


def _wait_for_all(starter: psycopg.Connection[Any], runs: list[Future[Any]], connections: int) -> None:
    waiting = """
    select count(*)
    from pg_locks
    where
      locktype = 'advisory' and objid = %s and not granted
      and database = (select oid from pg_database where datname = current_database())
    """
    deadline = time.monotonic() + 60
    while starter.execute(waiting, [_GUN]).fetchone() != (connections,):
        assert time.monotonic() < deadline, "they didn't all connect"
        assert not any(run.done() for run in runs), [run.exception() for run in runs if run.done()]
        time.sleep(0.01)


def _run(url: str, scripts: list[Script], cycles: int | None, stop: str) -> list[Answer]:
    """Run a process: a thread and a connection for each script."""
    with ThreadPoolExecutor(len(scripts)) as pool:
        runs = [pool.submit(_connect_and_call, url, script, cycles, stop) for script in scripts]
        return [answer for run in runs for answer in run.result()]


def _connect_and_call(url: str, script: Script, cycles: int | None, stop: str) -> list[Answer]:
    with at_home(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute("set role service_role")
        connection.execute("set statement_timeout = '60s'")
        connection.execute("select pg_advisory_lock_shared(%s)", [_GUN])
        return list(_cycle(connection, script, cycles, Path(stop).exists))


def _cycle(
    connection: psycopg.Connection[Any], script: Script, cycles: int | None, stopped: Callable[[], bool]
) -> Iterator[Answer]:
    if cycles is not None:
        for call in script * cycles:
            yield from _ask_all(connection, call)
        return
    while True:
        for call in script:
            if stopped():
                return
            yield from _ask_all(connection, call)


def _ask_all(connection: psycopg.Connection[Any], call: Call | Settle | Batch) -> list[Answer]:
    if not isinstance(call, Batch):
        return [_ask(connection, call)]
    requests = [{name: value and str(value) for name, value in _request(one)[1].items()} for one in call.calls]
    try:
        row = connection.execute("select public.track_generations(%s)", [Jsonb(requests)]).fetchone()
    except psycopg.Error as error:
        return [Answer(one, error=error.sqlstate or repr(error)) for one in call.calls]
    assert row is not None
    return [_answer(one, answer) for one, answer in zip(call.calls, row[0], strict=True)]


def _ask(connection: psycopg.Connection[Any], call: Call | Settle) -> Answer:
    function, arguments = _request(call)
    query = sql.SQL("select public.{}({})").format(
        sql.Identifier(function),
        sql.SQL(", ").join(sql.SQL("{} => %s").format(sql.Identifier(f"p_{name}")) for name in arguments),
    )
    try:
        row = connection.execute(query, list(arguments.values())).fetchone()
    except psycopg.Error as error:
        return Answer(call, error=error.sqlstate or repr(error))
    assert row is not None
    settled = None
    if isinstance(call, Call) and call.then and row[0]["allowed"]:
        time.sleep(call.pause)
        ttl = call.ttl if call.then == "extend_generation" else None
        settled = _ask(connection, Settle(call.then, row[0]["usage_id"], ttl=ttl))
    return _answer(call, row[0], settled)


def _answer(call: Call | Settle, answer: Any, settled: Answer | None = None) -> Answer:
    denied_by = answer["denied_by"]
    return Answer(
        call,
        error=answer.get("code"),
        allowed=answer["allowed"],
        replayed=answer["replayed"],
        reason=answer["reason"],
        usage_id=answer["usage_id"],
        group_id=answer["group"] and answer["group"]["id"],
        overfull=any(
            x["mode"] == "enforce" and x["max"] is not None and x["used"] > x["max"] for x in answer["limits"]
        ),
        wrongly_denied=denied_by is not None and _would_fit(denied_by, answer["cost"]),
        status=answer["status"],
        settled=settled,
        used=next((x["used"] for x in answer["limits"] if x["scope"] == "group"), None),
    )


def _would_fit(limit: Any, cost: int) -> bool:
    taken = 1 if limit["period"] == "in_flight" else cost * limit["weight"]
    return limit["used"] + taken <= limit["max"]


def _request(call: Call | Settle) -> tuple[str, dict[str, Any]]:
    if isinstance(call, Settle):
        given = {"usage_id": call.usage_id, "cost": call.cost, "ttl": call.ttl, "overage": call.overage}
        return call.function, {name: value for name, value in given.items() if value is not None}
    arguments = {
        "user_id": call.user_id,
        "kind": call.kind,
        "cost": call.cost,
        "idempotency_key": call.idempotency_key,
        "group_id": call.group_id,
    }
    if call.ttl is None:
        return call.function, arguments
    return "reserve_generation", arguments | {"ttl": call.ttl}
