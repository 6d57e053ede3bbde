"""How many requests a caller may send, and how often somebody may be wrong when they sign in."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from starlette.requests import Request
from tests.web.conftest import served, settings_for
from tests.web.test_api import problem
from tests.web.test_panel import browsing, csrf_of, sign_in

from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import _limiter, create_app
from tokenlimits.web._limiter import Limiter, address, caller
from tokenlimits.web._problems import TooManyRequests
from tokenlimits.web.panel import _attempts
from tokenlimits.web.panel._attempts import Attempts

TOKEN = "e30.e30.AA"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def requested(authorization: str | None = None, host: str = "192.0.2.1") -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return Request({"type": "http", "headers": headers, "client": (host, 1)})


def refused(ask: Callable[[], object]) -> float | None:
    """For how many seconds a request is refused; None: it isn't."""
    try:
        ask()
    except TooManyRequests as error:
        return error.retry_after
    return None


class TestWhoCalls:
    def test_is_one_however_the_header_is_spelt(self) -> None:
        spelt = ("Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", " Bearer {} ", "bEaReR \t{}")
        assert len({caller(requested(each.format(TOKEN))) for each in spelt}) == 1
        assert caller(requested(f"Bearer {TOKEN}")) != caller(requested(f"Bearer {TOKEN}A"))
        assert TOKEN not in caller(requested(f"Bearer {TOKEN}"))

    def test_is_an_address_where_the_token_can_be_none(self) -> None:
        for header in (None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN} x", f"Bearer {TOKEN}\x00"):
            assert caller(requested(header)) == "192.0.2.1"

    def test_is_a_network_where_a_host_has_all_of_it(self) -> None:
        hosts = ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:3::1")
        assert [address(requested(host=host)) for host in hosts] == [
            "2001:db8:1:2::/64",
            "2001:db8:1:2::/64",
            "2001:db8:1:3::/64",
        ]
        assert address(requested(host="::ffff:192.0.2.1")) == "192.0.2.1"
        assert address(requested(host="testclient")) == "testclient"
        assert address(Request({"type": "http", "headers": [], "client": None})) == "unknown"


class TestLimiter:
    def test_counts_in_minutes_that_begin_with_a_request(self, clock: Clock) -> None:
        limiter = Limiter(2, "requests", clock=clock)
        assert limiter.hit("a") == {"RateLimit-Policy": '"requests";q=2;w=60', "RateLimit": '"requests";r=1;t=60'}
        clock.now += 20
        assert limiter.hit("a")["RateLimit"] == '"requests";r=0;t=40'
        assert refused(lambda: limiter.hit("a")) == 40
        assert refused(lambda: limiter.hit("b")) is None
        clock.now += 40
        assert refused(lambda: limiter.hit("a")) is None

    def test_keeps_nobody_for_longer_than_a_minute(self, clock: Clock) -> None:
        limiter = Limiter(2, "requests", clock=clock)
        for n in range(100):
            limiter.hit(str(n))
            clock.now += 1
        assert len(limiter._minutes) <= 61

    def test_nor_more_than_so_many(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_limiter, "_MOST_CALLERS", 10)
        limiter = Limiter(1, "requests", clock=clock)
        for n in range(100):
            limiter.hit(str(n))
        assert len(limiter._minutes) <= 11
        assert refused(lambda: limiter.hit("99")) == 60


class TestAttempts:
    def test_pauses_grow_for_an_account_from_an_address(self, clock: Clock) -> None:
        attempts = Attempts(1000, clock=clock)
        waits = []
        for _ in range(17):
            attempts.begin("ada@example.com", "192.0.2.1")
            wait = refused(lambda: attempts.begin(" ADA@example.com", "192.0.2.1")) if _ >= 5 else None
            waits.append(wait)
            clock.now += wait or 0
        assert waits == [None] * 5 + [2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900]

    def test_others_lock_nobody_out(self, clock: Clock) -> None:
        attempts = Attempts(10, clock=clock)
        for n in range(10):
            attempts.begin("ada@example.com", f"198.51.100.{n}")
        for _ in range(20):
            refused(lambda: attempts.begin("ada@example.com", "203.0.113.9"))
        assert refused(lambda: attempts.begin("ada@example.com", "192.0.2.1")) is None

    def test_whoever_was_right_has_only_their_own_against_them(self, clock: Clock) -> None:
        attempts = Attempts(2, clock=clock)
        attempts.succeeded(attempts.begin("ada@example.com", "192.0.2.1"))
        for n in range(100):
            refused(lambda n=n: attempts.begin(f"{n}@example.com", f"198.51.100.{n}"))
            refused(lambda n=n: attempts.begin(f"{n}@example.com", "192.0.2.1"))
        assert refused(lambda: attempts.begin("bob@example.com", "192.0.2.1"))
        for _ in range(6):
            attempts.begin("ada@example.com", "192.0.2.1")
        assert refused(lambda: attempts.begin("ada@example.com", "192.0.2.1")) == 2

    def test_many_accounts_from_one_address_are_too_many(self, clock: Clock) -> None:
        attempts = Attempts(10, clock=clock)
        waits = [refused(lambda n=n: attempts.begin(f"{n}@example.com", "192.0.2.1")) for n in range(40)]
        assert waits == [None] * 10 + [60] * 30

    def test_so_are_many_accounts_from_many_addresses(self, clock: Clock) -> None:
        attempts = Attempts(10, clock=clock)
        waits = [refused(lambda n=n: attempts.begin(f"{n}@example.com", f"192.0.2.{n}")) for n in range(40)]
        assert waits == [None] * 30 + [60] * 10

    def test_what_succeeds_and_what_nobody_could_judge_is_not_counted(self, clock: Clock) -> None:
        attempts = Attempts(2, clock=clock)
        for _ in range(20):
            attempts.take_back(attempts.begin("bob@example.com", "192.0.2.1"))
        for n in range(20):
            attempts.succeeded(attempts.begin(f"{n}@example.com", "192.0.2.1"))

    def test_a_quarter_of_an_hour_later_all_is_forgotten(self, clock: Clock) -> None:
        attempts = Attempts(1000, clock=clock)
        for _ in range(6):
            attempts.begin("ada@example.com", "192.0.2.1")
        clock.now += 903
        for _ in range(6):
            attempts.begin("ada@example.com", "192.0.2.1")

    def test_few_are_kept(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_attempts, "_MOST", 10)
        attempts = Attempts(1000, clock=clock)
        for n in range(100):
            attempts.succeeded(attempts.begin(f"{n}@example.com", "192.0.2.1"))
            attempts.begin(f"{n}@example.com", "192.0.2.2")
        assert (len(attempts._wrong), len(attempts._known)) == (10, 10)


class TestThePanel:
    def test_ten_wrong_passwords_from_elsewhere_lock_nobody_out(self, stack: LocalStack, admin: LocalUser) -> None:
        app = create_app(settings_for(stack, sign_ins_per_minute=10))
        with served(Elsewhere(app)) as url, browsing(url) as browser:
            csrf = csrf_of(browser.get("/sign-in"))
            wrong = {"csrf": csrf, "email": admin.email, "password": "x"}
            there = {"X-From": "198.51.100.7"}
            answers = [browser.post("/sign-in", data=wrong, headers=there) for _ in range(10)]
            assert [answer.status_code for answer in answers] == [401] * 6 + [429] * 4
            assert "in a minute" in answers[-1].text
            assert 0 < int(answers[-1].headers["retry-after"]) <= 2
            assert sign_in(browser, admin).status_code == 200

    def test_pages_are_limited(self, stack: LocalStack, admin: LocalUser) -> None:
        app = create_app(settings_for(stack, requests_per_minute=10))
        with served(Elsewhere(app)) as url, browsing(url) as browser:
            sign_in(browser, admin)
            answers = [browser.get("/sign-in", headers={"Cookie": ""}) for _ in range(9)]
            assert answers[-1].status_code == 429
            assert "Too many requests" in answers[-1].text
            assert int(answers[-1].headers["retry-after"]) > 0
            browser.cookies.clear()
            for path in ("/nowhere", "/sign-in"):
                assert browser.get(path, headers={"Accept": "text/html"}).status_code == 429
            there = {"X-From": "198.51.100.7"}
            assert browser.get("/sign-in", headers=there).status_code == 200

    def test_each_person_has_their_own(self, stack: LocalStack, admin: LocalUser) -> None:
        with served(create_app(settings_for(stack, requests_per_minute=10))) as url, browsing(url) as browser:
            sign_in(browser, admin)
            for _ in range(20):
                httpx.get(f"{url}/sign-in", trust_env=False)
            assert browser.get("/live").status_code == 200
            answers = [browser.get("/live") for _ in range(10)]
            assert answers[-1].status_code == 429


def test_the_api_counts_a_token_however_it_is_spelt(stack: LocalStack, tokens: dict[str, str]) -> None:
    with served(create_app(settings_for(stack, requests_per_minute=10))) as url:
        spelt = ("Bearer {}", "bearer {}", "BEARER {}", "Bearer    {}")
        answers = [
            httpx.get(f"{url}/api/usage/me", headers={"Authorization": each.format(tokens["user"])}, trust_env=False)
            for each in spelt * 3
        ]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429] * 2
    problem(answers[-1], 429, "too-many-requests")


class Elsewhere:
    """Lets a request say from where it comes."""

    def __init__(self, app: object) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"x-from":
                scope["client"] = (value.decode(), 1)
        await self._app(scope, receive, send)
