"""The panel and the API where tokenlimits is in a schema of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from supabase import Client, ClientOptions
from tests.web.conftest import served, settings_for
from tests.web.test_panel import browsing, csrf_of, sign_in

from tokenlimits import ConfigurationError, GroupManager, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import WebSettings, create_app
from tokenlimits.web._settings import load


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[LocalStack]:
    with LocalStack(schema="limits") as stack:
        yield stack


@pytest.fixture(scope="module")
def boss(elsewhere: LocalStack) -> LocalUser:
    return elsewhere.create_user("boss@example.com", admin=True)


@pytest.fixture(scope="module")
def service_elsewhere(elsewhere: LocalStack) -> Iterator[Client]:
    with httpx.Client(trust_env=False, timeout=30) as http:
        yield Client(elsewhere.url, elsewhere.secret_key, ClientOptions(httpx_client=http))


@pytest.fixture(scope="module")
def url(elsewhere: LocalStack) -> Iterator[str]:
    with served(create_app(settings_for(elsewhere, schema_name="limits"), self_service={"image": 2})) as url:
        yield url


class TestInASchemaOfItsOwn:
    @pytest.mark.slow
    def test_the_api_works(self, url: str, elsewhere: LocalStack, boss: LocalUser) -> None:
        token = elsewhere.access_token(boss)
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"{url}/api", headers=headers, trust_env=False, timeout=30) as api:
            made = api.post("/groups", json={"name": "Api", "limits": {"image": 9}})
            assert made.status_code == 201, made.text
            group = made.json()["id"]
            body = {"group_id": group, "user_id": str(boss.id)}
            assert api.post("/group-members", json=body).is_success
            tracked = api.post("/track-generation", json={"kind": "image"})
            assert (tracked.status_code, tracked.json()["remaining"]) == (200, 7)
            assert [limit["used"] for limit in api.get("/usage/me").json()["items"]] == [2]
            assert [limit["used"] for limit in api.get(f"/groups/{group}/usage").json()["limits"]] == [2]
            assert api.delete(f"/groups/{group}").is_success

    def test_the_panel_works(self, url: str, boss: LocalUser, service_elsewhere: Client) -> None:
        groups = GroupManager(service_elsewhere, timeout=30, schema="limits")
        group = groups.create("Panel", limits={"image": 99})
        groups.add_member(group.id, boss.id)
        limits = TokenLimits(service_elsewhere, timeout=30, schema="limits")
        # more than a page of the newest shows: that asks the table itself where to begin
        limits.track_many([{"user_id": boss.id, "kind": "image"} for _ in range(30)])
        with browsing(url) as browser:
            assert "Panel" in sign_in(browser, boss, next="/").text
            page = browser.get(f"/groups/{group.id}")
            assert page.status_code == 200, page.text
            assert page.text.count(boss.email) >= 25
            form = {"csrf": csrf_of(page), "name": "Renamed", "priority": "0", "timezone": "UTC"}
            assert browser.post(f"/groups/{group.id}/edit", data=form).status_code == 204
        assert groups.get(group.id).name == "Renamed"

    def test_that_is_not_exposed_the_log_says_how_to_expose_it(
        self, elsewhere: LocalStack, boss: LocalUser, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = settings_for(elsewhere, schema_name="quotas")
        with served(create_app(settings)) as url, browsing(url) as browser:
            page = sign_in(browser, boss, next="/")
        assert page.status_code == 500
        assert "See the server&#39;s log." in page.text
        assert "quotas" in caplog.text
        assert "Exposed schemas" in caplog.text


GIVEN = {"url": "https://abc.supabase.co", "publishable_key": "sb_publishable_abc"}


class TestSettings:
    def test_read_the_schema_as_everything_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TOKENLIMITS_SCHEMA", raising=False)
        assert WebSettings(**GIVEN).schema_name == "public"
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", " limits ")
        assert WebSettings(**GIVEN).schema_name == "limits"
        assert WebSettings(**GIVEN, schema_name="quotas").schema_name == "quotas"

    def test_refuse_one_that_can_not_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUPABASE_URL", GIVEN["url"])
        monkeypatch.setenv("SUPABASE_PUBLISHABLE_KEY", GIVEN["publishable_key"])
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "auth")
        with pytest.raises(ConfigurationError, match="auth"):
            load()

    def test_leave_other_programs_variables_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("SECRET_KEY", "URL", "TIMEOUT", "WEB_SECRET", "SCHEMA_NAME"):
            monkeypatch.setenv(name, "auth")
        settings = WebSettings(**GIVEN)
        assert (settings.secret_key, settings.web_secret, settings.timeout, settings.url) == (
            None,
            (),
            5,
            GIVEN["url"],
        )
