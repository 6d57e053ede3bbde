"""What watches over the app: `/healthz`, `/readyz`, `/metrics`, the ids of requests, and the log."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from tests.support.waiting import eventually
from tests.web.conftest import SECRET, served, settings_for

from tokenlimits import GroupManager, Limit
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.sql_files import SCHEMA_VERSION
from tokenlimits.web import WebSettings, _backend, _shared, create_app, router

ROOT = Path(__file__).parents[2]
Ask = Callable[..., httpx.Response]
GENERATED = re.compile("[0-9a-f]{32}")


def get(url: str, **more: Any) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=30, **more)


def samples(url: str) -> dict[tuple[str, ...], float]:
    """What `/metrics` shows, by the name and the values of the labels, in the order of their names."""
    answer = get(f"{url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@contextmanager
def app_of(stack: LocalStack, **more: object) -> Iterator[str]:
    """An app of its own, so that nobody else is counted."""
    with served(create_app(settings_for(stack, **more))) as url:
        yield url


NOWHERE = "http://127.0.0.1:9"
"""Where nothing listens."""


class TestHealthz:
    def test_answers_without_a_token(self, url: str) -> None:
        answer = get(f"{url}/healthz")
        assert (answer.status_code, answer.text) == (200, "ok\n")
        assert answer.headers["cache-control"] == "no-store"
        assert httpx.head(f"{url}/healthz", trust_env=False).status_code == 200

    def test_asks_nobody(self, stack: LocalStack) -> None:
        with app_of(stack, url=NOWHERE) as url:
            assert get(f"{url}/healthz").status_code == 200


class TestReadyz:
    @pytest.mark.parametrize("key", ["secret", "publishable"])
    def test_is_ready_with_either_key(self, stack: LocalStack, key: str) -> None:
        with app_of(stack, **({} if key == "secret" else {"secret_key": None})) as url:
            answer = get(f"{url}/readyz")
            assert (answer.status_code, answer.text) == (200, "ready\n")
            assert answer.headers["cache-control"] == "no-store"

    def test_is_not_while_supabase_is_unavailable(self, stack: LocalStack) -> None:
        with app_of(stack, url=NOWHERE) as url:
            answer = get(f"{url}/readyz")
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:tokenlimits:problem:unavailable"
        assert (answer.headers["retry-after"], answer.headers["cache-control"]) == ("5", "no-store")

    def test_is_not_where_the_sql_is_not_installed(self, stack: LocalStack) -> None:
        with app_of(stack, schema_name="elsewhere") as url:
            answer = get(f"{url}/readyz")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:tokenlimits:problem:not-installed")

    def test_is_not_where_the_sql_is_too_old(self, stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        with app_of(stack) as url:
            answer = get(f"{url}/readyz")
        assert answer.status_code == 503
        assert "older version" in answer.json()["title"]

    def test_is_not_with_a_key_that_supabase_refuses(self, stack: LocalStack) -> None:
        with app_of(stack, secret_key="sb_secret_of_another_project") as url:
            answer = get(f"{url}/readyz")
        assert (answer.status_code, answer.json()["type"]) == (500, "urn:tokenlimits:problem:internal")

    @pytest.mark.parametrize("there", [True, False])
    def test_asks_seldom_however_often_it_is_asked(
        self, stack: LocalStack, monkeypatch: pytest.MonkeyPatch, there: bool
    ) -> None:
        asked: list[str] = []
        get_, now = httpx.AsyncClient.get, 0.0

        async def counted(self: httpx.AsyncClient, url: str, **more: Any) -> httpx.Response:
            asked.append(url)
            return await get_(self, url, **more)

        monkeypatch.setattr(httpx.AsyncClient, "get", counted)
        monkeypatch.setattr(_shared, "time", SimpleNamespace(monotonic=lambda: now))
        with app_of(stack, **({} if there else {"url": NOWHERE})) as url:
            assert {get(f"{url}/readyz").status_code for _ in range(3)} == {200 if there else 503}
            assert len(asked) == 1
            now = 5.0
            get(f"{url}/readyz")
        assert len(asked) == 2


class TestMetrics:
    def test_count_generations_and_calls(self, stack: LocalStack, groups: GroupManager, user: LocalUser) -> None:
        group = groups.create("Studio", limits=[Limit(kind="image", max=1)])
        groups.add_member(group.id, user.id)
        worker = {"Authorization": f"Bearer {stack.secret_key}"}
        with app_of(stack) as url, httpx.Client(base_url=url, headers=worker, trust_env=False, timeout=30) as client:
            for kind in ("image", "image", "something"):
                client.post("/api/track-generation", json={"user_id": str(user.id), "kind": kind})
            client.get("/api/groups")
            found = samples(url)
        # labels in the order of their names: kind, outcome, reason
        assert found["tokenlimits_generations_total", "image", "allowed", ""] == 1
        assert found["tokenlimits_generations_total", "image", "denied", "limit_exceeded"] == 1
        assert found["tokenlimits_generations_total", "", "denied", "no_limit_for_kind"] == 1
        assert found["tokenlimits_call_duration_seconds_count", "track_generation", "denied"] == 2
        assert found["tokenlimits_call_duration_seconds_count", "find_groups", "ok"] > 0

    def test_count_requests_by_route_and_never_by_path(self, stack: LocalStack, tokens: dict[str, str]) -> None:
        admin = {"Authorization": f"Bearer {tokens['admin']}"}
        with app_of(stack) as url, httpx.Client(base_url=url, headers=admin, trust_env=False, timeout=30) as client:
            for _ in range(2):
                client.get(f"/api/groups/{uuid4()}")
            client.get(f"/api/v1/groups/{uuid4()}/usage")
            client.get(f"/groups/{uuid4()}")
            client.get(f"/{uuid4()}")
            client.request("BREW", "/sign-in")
            found = {
                key[1:]: value
                for key, value in samples(url).items()
                if key[0].endswith("web_request_duration_seconds_count")
            }
            text = get(f"{url}/metrics").text
        assert found["GET", "/api/groups/{group_id}", "404"] == 2
        assert found["GET", "/api/v1/groups/{group_id}/usage", "404"] == 1
        assert found["GET", "/groups/{group_id}", "303"] == 1
        assert found["GET", "none", "404"] == 1
        assert [method for method, _, _ in found if method not in ("GET", "HEAD", "POST")] == ["other"]
        assert re.search("[0-9a-f]{8}-[0-9a-f]{4}-", text) is None
        assert "BREW" not in text

    def test_count_what_supabase_did_not_answer(self, stack: LocalStack, tokens: dict[str, str]) -> None:
        admin = {"Authorization": f"Bearer {tokens['admin']}"}
        with app_of(stack, url=NOWHERE, timeout=0.5) as url:
            assert get(f"{url}/api/groups", headers=admin).status_code == 503
            found = samples(url)
        assert found["tokenlimits_unavailable_total", "find_groups"] == 1
        assert found["tokenlimits_retries_total", "find_groups"] >= 1

    def test_are_of_one_app(self, stack: LocalStack) -> None:
        with app_of(stack) as one, app_of(stack) as other:
            get(f"{one}/healthz")
            count = "tokenlimits_web_request_duration_seconds_count", "GET", "/healthz", "200"
            assert samples(one)[count] == 1
            assert count not in samples(other)


class TestRequestId:
    @pytest.mark.parametrize("path", ["/healthz", "/sign-in", "/static/panel.css", "/api/groups", "/nowhere"])
    def test_is_on_every_answer(self, url: str, path: str) -> None:
        first, again = (get(f"{url}{path}").headers["x-request-id"] for _ in range(2))
        assert GENERATED.fullmatch(first)
        assert first != again

    @pytest.mark.parametrize("sent", ["job-1", "Root=1-67891233-abcdef012345678912345678", "a" * 128])
    def test_is_the_callers_own(self, url: str, sent: str) -> None:
        answer = get(f"{url}/api/groups", headers={"X-Request-Id": sent})
        assert answer.headers["x-request-id"] == answer.json()["request_id"] == sent

    @pytest.mark.parametrize("sent", ["a b", "a" * 129, "", 'x" status=200', "é"])
    def test_is_never_what_could_forge_a_log(self, url: str, sent: str) -> None:
        answer = get(f"{url}/api/groups", headers={"X-Request-Id": sent.encode()})
        assert GENERATED.fullmatch(answer.headers["x-request-id"])

    @pytest.mark.parametrize(
        ("role", "method", "path", "status"),
        [
            (None, "GET", "/groups", 401),
            ("user", "POST", "/groups", 422),
            ("admin", "GET", "/nothing", 404),
            ("admin", "GET", "/groups/x", 422),
            ("admin", "GET", f"/groups/{UUID(int=1)}", 404),
        ],
    )
    def test_is_in_every_problem(self, api: Ask, role: str | None, method: str, path: str, status: int) -> None:
        answer = api(role, method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]

    def test_is_there_in_an_app_of_somebody_else(self, settings: WebSettings) -> None:
        app = FastAPI()
        app.include_router(router(settings))
        with served(app) as url:
            answer = get(f"{url}/api/groups", headers={"X-Request-Id": "theirs"})
        assert answer.headers["x-request-id"] == answer.json()["request_id"] == "theirs"

    def test_is_on_the_page_of_a_problem(self, stack: LocalStack) -> None:
        with app_of(stack) as url:
            answer = get(f"{url}/nowhere", headers={"Accept": "text/html", "X-Request-Id": "job-2"})
        assert answer.status_code == 404
        assert "<code>job-2</code>" in answer.text

    @pytest.mark.parametrize(("path", "kind"), [("/api/broken", "application/problem+json"), ("/broken", "text/plain")])
    def test_is_there_where_nobody_foresaw_the_error(
        self, settings: WebSettings, caplog: pytest.LogCaptureFixture, path: str, kind: str
    ) -> None:
        app = create_app(settings)

        def broken() -> None:
            raise RuntimeError("a bug")

        app.router.add_api_route(path, broken)
        with served(app) as url:
            answer = get(f"{url}{path}", headers={"X-Request-Id": "job-3"})
            found = samples(url)
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "job-3")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-frame-options"] == "DENY"
        assert found["tokenlimits_web_request_duration_seconds_count", "GET", path, "500"] == 1
        assert "a bug" not in answer.text

    def test_is_in_each_record_of_the_log(
        self, stack: LocalStack, tokens: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        headers = {"Authorization": f"Bearer {tokens['admin']}", "X-Request-Id": "job-4"}
        with caplog.at_level(logging.DEBUG, "tokenlimits"), app_of(stack, url=NOWHERE, timeout=0.5) as url:
            get(f"{url}/api/groups", headers=headers)
        ours = [record for record in caplog.records if record.name == "tokenlimits"]
        assert {record.levelno for record in ours} >= {logging.WARNING, logging.ERROR}
        assert {record.request_id for record in ours} == {"job-4"}  # type: ignore[attr-defined]


class Log:
    """A server's process, and the lines that it has written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, of: str) -> list[str]:
        return [line for line in self._path.read_text().splitlines() if of in line]


@pytest.fixture
def process(stack: LocalStack, tmp_path: Path) -> Iterator[Callable[..., tuple[str, Log]]]:
    """Serve as `python -m tokenlimits.web` does."""
    running: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> tuple[str, Log]:
        path = tmp_path / "log"
        given = {
            **stack.environment(),
            "TOKENLIMITS_WEB_SECRET": SECRET,
            "PYTHONPATH": str(ROOT / "src"),
            **environment,
        }
        with path.open("wb") as log:
            command = [sys.executable, "-m", "tokenlimits.web", "--port", "0"]
            running.append(subprocess.Popen(command, env=given, stdout=log, stderr=log, cwd=tmp_path))
        found = eventually(lambda: re.search(r"running on (http://127\.0\.0\.1:\d+)", path.read_text()))
        return found[1], Log(path)

    yield start
    for each in running:
        each.send_signal(signal.SIGTERM)
        each.wait(30)


class TestLog:
    @pytest.mark.slow
    def test_names_requests_and_leaves_out_monitors(self, process: Callable[..., tuple[str, Log]]) -> None:
        url, log = process()
        for path in ("/healthz", "/readyz", "/metrics"):
            assert get(f"{url}{path}").status_code == 200
        get(f"{url}/api/groups?search=ada%40example.com", headers={"X-Request-Id": "job-5"})
        (line,) = eventually(lambda: log.lines("/api/groups"))
        assert line.endswith('"GET /api/groups HTTP/1.1" 401 Unauthorized request_id=job-5')
        assert [log.lines(path) for path in ("/healthz", "/readyz", "/metrics", "ada")] == [[], [], [], []]
        assert "request_id" not in log.lines("running on")[0]

    @pytest.mark.slow
    def test_has_our_own_lines_and_failed_checks(
        self, process: Callable[..., tuple[str, Log]], tokens: dict[str, str]
    ) -> None:
        url, log = process(SUPABASE_URL=NOWHERE)
        assert get(f"{url}/readyz", headers={"X-Request-Id": "probe-1"}).status_code == 503
        (line,) = eventually(lambda: log.lines("/readyz"))
        assert line.endswith("request_id=probe-1")
        headers = {"Authorization": f"Bearer {tokens['admin']}", "X-Request-Id": "job-6"}
        assert get(f"{url}/api/groups", headers=headers).status_code == 503
        (line,) = eventually(lambda: log.lines("gave up"))
        assert line.startswith("ERROR: ")
        assert line.endswith("request_id=job-6")
