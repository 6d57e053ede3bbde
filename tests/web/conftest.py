"""A stack, people on it, and the app served on it by uvicorn."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from uuid import uuid4

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, ViewportSize, expect
from starlette.types import ASGIApp
from supabase import Client, ClientOptions
from tests.web.chromium import chromium

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.models import Group
from tokenlimits.web import WebSettings, create_app

Serve = Callable[[ASGIApp], str]
SignIn = Callable[..., Page]
Theme = Literal["dark", "light"]
# what is expected comes as soon as it can; on a busy machine that may be later
expect.set_options(timeout=60_000)

SECRET = secrets.token_urlsafe(32)
CREDITS = Limit(kind="credits", max=1000, period="month", scope="child", counts={"image": 1, "video": 8})


@pytest.fixture(scope="session")
def stack() -> Iterator[LocalStack]:
    with LocalStack() as stack:
        yield stack


def settings_for(stack: LocalStack, **more: object) -> WebSettings:
    """Settings of which no limit on requests gets into a test's way, unless it says so."""
    given = {
        "url": stack.url,
        "publishable_key": stack.publishable_key,
        "secret_key": stack.secret_key,
        "web_secret": SECRET,
        "requests_per_minute": 1_000_000,
        "sign_ins_per_minute": 1_000,
    }
    return WebSettings.model_validate(given | more)


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Serve an app on a free port, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    started = threading.Event()
    startup = server.startup

    async def started_up(*arguments: object, **more: object) -> None:
        try:
            await startup(*arguments, **more)
        finally:
            started.set()

    server.startup = started_up
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60)
        assert server.started
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def settings(stack: LocalStack) -> WebSettings:
    return settings_for(stack)


@pytest.fixture(scope="session")
def url(settings: WebSettings) -> Iterator[str]:
    """The whole app."""
    with served(create_app(settings)) as url:
        yield url


@pytest.fixture(scope="session")
def service(stack: LocalStack) -> Iterator[Client]:
    with httpx.Client(trust_env=False, timeout=30) as http:
        yield Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))


@pytest.fixture
def groups(service: Client) -> Iterator[GroupManager]:
    """A manager with the secret key; what groups there are in the end, go: first those that nothing is beneath."""
    groups = GroupManager(service, timeout=30)
    yield groups
    while left := groups.list():
        parents = {group.parent_id for group in left}
        for group in left:
            if group.id not in parents:
                groups.delete(group.id)


@pytest.fixture(scope="session")
def limits(service: Client) -> TokenLimits:
    return TokenLimits(service, timeout=30)


@pytest.fixture(scope="session")
def admin(stack: LocalStack) -> LocalUser:
    return stack.create_user("ada@example.com", admin=True)


@pytest.fixture(scope="session")
def user(stack: LocalStack) -> LocalUser:
    return stack.create_user("bob@example.com")


@pytest.fixture
def newcomer(stack: LocalStack) -> LocalUser:
    return stack.create_user(f"{uuid4()}@example.com")


@pytest.fixture(scope="session")
def tokens(stack: LocalStack, admin: LocalUser, user: LocalUser) -> dict[str, str]:
    """A token of each role; what a worker has is the secret key."""
    return {
        "anon": stack.publishable_key,
        "user": stack.access_token(user),
        "admin": stack.access_token(admin),
        "service": stack.secret_key,
    }


@pytest.fixture
def api(url: str, tokens: dict[str, str]) -> Iterator[Callable[..., httpx.Response]]:
    """Ask the API with the token of a role."""
    with httpx.Client(base_url=f"{url}/api", trust_env=False, timeout=30) as client:

        def ask(
            role: str | None, method: str, path: str, headers: dict[str, str] | None = None, **more: object
        ) -> httpx.Response:
            known = {} if role is None else {"Authorization": f"Bearer {tokens.get(role, role)}"}
            return client.request(method, path, headers={**known, **(headers or {})}, **more)

        yield ask


# of a module: it runs an event loop in this thread, and what comes after it has its own
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def sign_in(browser: Browser, url: str, admin: LocalUser) -> Iterator[SignIn]:
    """Sign in, in a browser of one's own; nothing may fail or be refused by the policy meanwhile."""
    pages: list[Page] = []
    problems: list[str] = []

    def listen(page: Page) -> None:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)

    def do(
        user: LocalUser = admin,
        *,
        width: int = 1280,
        height: int = 900,
        theme: Theme = "dark",
        at: str = url,
        **more: Any,
    ) -> Page:
        viewport: ViewportSize = {"width": width, "height": height}
        page = browser.new_context(viewport=viewport, locale="en-US", color_scheme=theme, **more).new_page()
        pages.append(page)
        listen(page)
        page.goto(f"{at}/")
        page.get_by_label("E-mail").fill(user.email)
        page.get_by_label("Password").fill(user.password)
        page.get_by_role("button", name="Sign in").click()
        return page

    yield do
    for page in pages:
        page.context.close()
    # the browser and htmx say so too when an answer is no 200
    expected = re.compile("the server responded with a status of|^Response Status Error Code")
    assert [problem for problem in problems if not expected.search(problem)] == []


@pytest.fixture
def group(groups: GroupManager, limits: TokenLimits, user: LocalUser) -> Group:
    """One with everything that a page can show."""
    group = groups.create(
        "Studio",
        description="Agencies",
        limits=[
            Limit(kind="image", max=100, period="day"),
            Limit(kind="video", max=4, period="hour", scope="member"),
            Limit(kind="audio", max=None),
            Limit(kind="text", max=0),
            Limit(kind="credits", max=90, period="24 hours", starts="rolling", counts={"speech": 1, "tokens": 8}),
            Limit(kind="speech", max=1, period="5 hours", starts="first_use", mode="observe"),
        ],
    )
    groups.add_member(group.id, user.id)
    for kind, cost in (("image", 80), ("video", 4), ("audio", 12_345)):
        limits.track(user.id, kind, cost)
    return group


@pytest.fixture
def plan(groups: GroupManager) -> Group:
    return groups.create("Pro", limits=[CREDITS], priority=7, timezone="Asia/Tokyo")


@pytest.fixture
def acme(groups: GroupManager, limits: TokenLimits, plan: Group, user: LocalUser) -> Group:
    """A customer that has used 960 of its 1,000 credits."""
    acme = groups.create("Acme", parent=plan, limits=[Limit(kind="audio", max=5)])
    groups.add_member(acme.id, user.id)
    limits.track(user.id, "video", 120)
    return acme


def open_group(page: Page, group: Group) -> None:
    page.goto(f"{page.evaluate('location.origin')}/groups/{group.id}")
    expect(page.get_by_role("heading", level=1, name=group.name)).to_be_visible()
    page.wait_for_load_state()
