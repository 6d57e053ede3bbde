"""The recipes do what they say: real requests and real tokens, on the local stack."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import django
import django.test
import httpx
import pytest
from tests.docs.conftest import Docs
from tests.docs.pages import DOCS, ROOT, blocks
from tests.support.node import kept, wheel_node
from tests.support.waiting import eventually

from tokenlimits import GroupManager, Limit, LimitExceeded, TokenLimits
from tokenlimits.local import LocalUser
from tokenlimits.local._node import Node

FRONTEND = ROOT / "examples" / "frontend"
HANDLE = Path(__file__).with_name("handle.mjs")
# as a recipe in Deno sees it
DENO = """
declare namespace Deno {
  const env: { get(name: string): string | undefined }
  function serve(handler: (request: Request) => Promise<Response>): void
}
declare module 'npm:@supabase/supabase-js@2' {
  export * from '@supabase/supabase-js'
}
"""


class Recipe:
    """A page's files in a directory, and who tries it."""

    def __init__(self, docs: Docs, directory: Path, page: str) -> None:
        self.docs = docs
        self.directory = directory
        for block in blocks((DOCS / "recipes" / page).read_text()):
            if block.title is not None and block.included is None:
                path = directory / block.title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.code)

    def user(self, *limits: Limit) -> LocalUser:
        """Sign somebody up, in a group with limits."""
        user = self.docs.stack.create_user(f"{uuid4()}@example.com")
        with GroupManager.from_env() as groups:
            groups.add_member(groups.create(str(uuid4()), limits=limits).id, user.id)
        return user

    def bearer(self, user: LocalUser) -> dict[str, str]:
        return {"authorization": f"Bearer {self.docs.stack.access_token(user)}"}

    def ledger(self, user: LocalUser) -> list[tuple[str, int]]:
        rows = self.docs.stack.sql(
            "select status, cost from public.generation_usage where user_id = $1 order by created_at, id", str(user.id)
        )
        return [(row["status"], row["cost"]) for row in rows]


@pytest.fixture
def recipe(docs: Docs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Recipe]]:
    for name, value in docs.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield lambda page: Recipe(docs, tmp_path, page)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def image(maximum: int) -> Limit:
    return Limit(kind="image", max=maximum, period="month")


@asynccontextmanager
async def served(module: ModuleType) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to a recipe's app; its client is closed afterwards."""
    transport = httpx.ASGITransport(module.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http
    await module.limits.aclose()


class TestFastApi:
    def test_charges_what_succeeds_and_tells_when_there_is_room(self, recipe: Callable[[str], Recipe]) -> None:
        made = recipe("fastapi.md")
        user = made.user(image(1), Limit(kind="video", max=60))
        app = importlib.import_module("app").app
        headers = made.bearer(user)

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
                return [await http.post(path, params={"prompt": "a cat"}) for path in ("/images", "/images", "/videos")]

        first, second, third = asyncio.run(ask())
        assert (first.status_code, second.status_code, third.status_code) == (200, 429, 200)
        assert int(second.headers["retry-after"]) > 0
        assert made.ledger(user) == [("committed", 1), ("committed", 12)]


class TestDjango:
    def test_holds_while_it_generates(self, recipe: Callable[[str], Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
        made = recipe("django.md")
        user, stranger = made.user(image(2)), made.user(Limit(kind="video", max=1))
        monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "settings")
        django.setup()
        views = importlib.import_module("views")
        with importlib.import_module("generations").limits:
            client = django.test.Client(raise_request_exception=False)

            def ask(of: LocalUser, prompt: str) -> Any:
                return client.post("/images", {"prompt": prompt}, headers=made.bearer(of))

            assert ask(user, "a cat").json() == {"image": "an image of a cat"}
            assert ask(stranger, "a cat").status_code == 403
            assert client.post("/images", headers={"authorization": "Bearer no"}).status_code == 403

            def fail(_: str) -> str:
                raise ValueError("no paint left")

            monkeypatch.setattr(views, "make_image", fail)
            assert ask(user, "a dog").status_code == 500
            monkeypatch.undo()
            assert made.ledger(user) == [("committed", 1), ("released", 1)]


class TestGpuWebhook:
    SECRET = "a shared secret"

    def call_back(self, http: httpx.AsyncClient, at: float | None = None, **event: object) -> Any:
        body = json.dumps(event).encode()
        stamp = str(int(at or time.time()))
        signature = hmac.new(self.SECRET.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
        return http.post("/webhooks/gpu", content=body, headers={"x-timestamp": stamp, "x-signature": signature})

    def test_settles_when_the_host_calls_back(
        self, recipe: Callable[[str], Recipe], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = recipe("gpu-webhook.md")
        user = made.user(Limit(kind="video", max=150))
        monkeypatch.setenv("GPU_WEBHOOK_SECRET", self.SECRET)
        app = importlib.import_module("app")
        submitted: list[dict[str, str]] = []

        async def submit(_: str, reference: dict[str, str]) -> None:
            submitted.append(reference)

        async def refuse(_: str, reference: dict[str, str]) -> None:
            submitted.append(reference)
            httpx.Response(422, request=httpx.Request("POST", "http://gpu.example")).raise_for_status()

        async def play() -> None:
            async with served(app) as http:
                monkeypatch.setattr(app, "submit", submit)
                good = await app.start_video(user.id, "a cat", "job-1")
                assert await app.start_video(user.id, "a cat", "job-1") == good  # the job was delivered twice
                bad = await app.start_video(user.id, "a dog", "job-2")
                with pytest.raises(LimitExceeded):
                    await app.start_video(user.id, "a cow", "job-3")
                done = {"usage_id": str(good), "user_id": str(user.id), "status": "succeeded", "seconds": 71.5}
                for _ in range(2):
                    answer = await self.call_back(http, **done)
                    assert (answer.status_code, answer.json()) == (200, {"status": "committed"})
                failed = await self.call_back(http, usage_id=str(bad), user_id=str(user.id), status="failed")
                assert failed.json() == {"status": "released"}
                late = await self.call_back(http, usage_id=str(good), user_id=str(user.id), status="failed")
                assert late.json() == {"status": "settled before"}
                assert (await self.call_back(http, at=time.time() - 600, **done)).status_code == 401
                assert (await http.post("/webhooks/gpu", json=done)).status_code == 401
                monkeypatch.setattr(app, "submit", refuse)
                with pytest.raises(httpx.HTTPStatusError):
                    await app.start_video(user.id, "a hen", "job-4")

        asyncio.run(play())
        assert submitted[0]["user_id"] == str(user.id)
        assert sorted(made.ledger(user)) == [("committed", 12), ("committed", 60), ("released", 60), ("released", 60)]


class TestLlmStreaming:
    def test_charges_what_was_streamed(self, recipe: Callable[[str], Recipe]) -> None:
        made = recipe("llm-streaming.md")
        user = made.user(Limit(kind="tokens", max=1010))
        app = importlib.import_module("app")
        headers = made.bearer(user)

        async def play() -> None:
            async with served(app) as http:
                whole = await http.post("/chat", params={"prompt": "two words"}, headers=headers)
                assert whole.text == "You said: two words "
                leaver = app.answer("three more words", user.id)
                assert [await anext(leaver), await anext(leaver)] == ["You ", "said: "]
                await leaver.aclose()
                denied = await http.post("/chat", params={"prompt": "no"}, headers=headers)
                assert (denied.status_code, denied.json()["detail"].split(":")[0]) == (
                    429,
                    "Tokens generation limit exceeded",
                )
                assert (await http.post("/chat", params={"prompt": "hi"})).status_code == 401

        asyncio.run(play())
        assert made.ledger(user) == [("committed", 6), ("committed", 5)]


@pytest.fixture(scope="module")
def runtime() -> Node:
    return wheel_node()


@pytest.fixture(scope="module")
def packages() -> Path:
    return kept("frontend", FRONTEND) / "node_modules"


def handled(made: Recipe, runtime: Node, packages: Path, file: str, *asked: tuple[dict[str, str], str]) -> list[Any]:
    """Send requests, each with its headers and its prompt, to the handler in a file; return the answers."""
    (made.directory / "node_modules").symlink_to(packages)
    (made.directory / "package.json").write_text('{"type": "module"}')
    requests = [{"headers": headers, "body": {"prompt": prompt}} for headers, prompt in asked]
    environment = made.docs.environment
    done = subprocess.run(
        [str(runtime.executable), "--no-warnings", HANDLE, made.directory / file],
        input=json.dumps(requests),
        env={**environment, "SUPABASE_SERVICE_ROLE_KEY": environment["SUPABASE_SECRET_KEY"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_types(made: Recipe, runtime: Node, file: str) -> None:
    (made.directory / "deno.d.ts").write_text(DENO)
    (made.directory / "lib").mkdir(exist_ok=True)
    (made.directory / "lib" / "tokenlimits.d.ts").write_text((FRONTEND / "tokenlimits.d.ts").read_text())
    options = ["--strict", "--noEmit", "--skipLibCheck", "--allowImportingTsExtensions", "--types", "node"]
    options += ["--module", "nodenext", "--target", "es2024"]
    done = subprocess.run(
        [str(runtime.executable), "node_modules/typescript/bin/tsc", *options, "deno.d.ts", file],
        cwd=made.directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout


class TestEdgeFunction:
    FILE = "supabase/functions/generate/index.ts"

    def test_answers_and_has_the_right_types(
        self, recipe: Callable[[str], Recipe], runtime: Node, packages: Path
    ) -> None:
        made = recipe("edge-function.md")
        user, stranger = made.user(image(1)), made.user(Limit(kind="video", max=1))
        mine, theirs = made.bearer(user), made.bearer(stranger)
        asked = [(mine, "a cat"), (mine, "a dog"), (theirs, "a cat"), ({"authorization": "Bearer no"}, "a cat")]
        first, second, third, fourth = handled(made, runtime, packages, self.FILE, *asked)
        assert (first["status"], first["body"]) == (200, {"image": "an image of a cat", "remaining": 0})
        assert second["status"] == 429
        assert int(second["headers"]["retry-after"]) > 0
        assert second["body"]["error"].startswith("Image generation limit exceeded: 1 of 1 used this month")
        assert (third["status"], fourth["status"]) == (403, 401)
        assert made.ledger(user) == [("committed", 1)]
        check_types(made, runtime, self.FILE)


class TestNextjs:
    FILE = "app/api/images/route.ts"

    def test_charges_what_succeeds_and_has_the_right_types(
        self, recipe: Callable[[str], Recipe], runtime: Node, packages: Path
    ) -> None:
        made = recipe("nextjs.md")
        user = made.user(image(1))
        mine = made.bearer(user)
        asked = [(mine, ""), (mine, "a cat"), (mine, "a dog"), ({}, "a cat")]
        first, second, third, fourth = handled(made, runtime, packages, self.FILE, *asked)
        assert first["status"] == 500
        assert (second["status"], second["body"]["image"]) == (200, "an image of a cat")
        assert (third["status"], fourth["status"]) == (429, 401)
        assert made.ledger(user) == [("released", 1), ("committed", 1)]
        check_types(made, runtime, self.FILE)


def test_late_callbacks_are_booked_all_the_same(
    recipe: Callable[[str], Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hold has expired, and somebody else has its room."""
    made = recipe("gpu-webhook.md")
    user = made.user(Limit(kind="video", max=60))
    monkeypatch.setenv("GPU_WEBHOOK_SECRET", "s")
    app = importlib.import_module("app")
    with TokenLimits.from_env() as limits:
        usage_id = limits.reserve(user.id, "video", 60, ttl=1).usage_id
        eventually(lambda: limits.track(user.id, "video", 60))

    async def play() -> str:
        event = {"usage_id": usage_id, "user_id": user.id, "status": "succeeded", "seconds": 7}
        async with served(app):
            return (await app.settle(app.Finished.model_validate(event))).status

    assert asyncio.run(play()) == "committed"
    assert made.ledger(user)[1:] == [("committed", 60), ("committed", 7)]
    assert isinstance(usage_id, UUID)
