"""Settings, from the environment and from `.env` in the working directory."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
from supabase import create_client
from tests.http.leaks import text_of

from tokenlimits import ConfigurationError, GroupManager, ServiceUnavailable, TokenLimits
from tokenlimits.settings import load, load_schema

URL = "https://abc.supabase.co"
ID = "0197f0a0-0000-7000-8000-000000000001"
SECRET = "sb_secret_7Hn9wQz"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith(("SUPABASE_", "TOKENLIMITS_"))]:
        monkeypatch.delenv(name)


def given(monkeypatch: pytest.MonkeyPatch, dotenv: str | bytes | None = None, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"SUPABASE_{name}", value)
    if dotenv is not None:
        Path(".env").write_bytes(dotenv.encode() if isinstance(dotenv, str) else dotenv)


def loaded() -> tuple[str, str]:
    settings = load()
    return settings.url, settings.key.get_secret_value()


@pytest.mark.parametrize("name", ["SECRET_KEY", "SERVICE_ROLE_KEY"])
class TestEitherName:
    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, URL=URL, **{name: SECRET})
        assert loaded() == (URL, SECRET)

    def test_from_a_file(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, f'# ours\nSUPABASE_URL="{URL}"\nexport SUPABASE_{name}={SECRET}\nOTHER=1\n')
        assert loaded() == (URL, SECRET)

    def test_the_environment_wins(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(
            monkeypatch,
            "SUPABASE_URL=https://file.supabase.co\nSUPABASE_SECRET_KEY=one\nSUPABASE_SERVICE_ROLE_KEY=two\n",
            URL=URL,
            **{name: SECRET},
        )
        assert loaded() == (URL, SECRET)

    def test_one_from_each_is_refused(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, f"SUPABASE_{name}={SECRET}\n", URL=URL)
        with pytest.raises(ConfigurationError, match=r"SUPABASE_SECRET_KEY.*SUPABASE_URL is exported, so \.env"):
            load()

    def test_a_file_redirects_no_key(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, f"SUPABASE_URL=https://other.example\nSUPABASE_{name}=theirs\n", **{name: SECRET})
        with pytest.raises(ConfigurationError, match=rf"^SUPABASE_URL is missing.*SUPABASE_{name} is exported"):
            load()

    def test_what_is_empty_is_not_there(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(
            monkeypatch, f"SUPABASE_URL={URL}\nSUPABASE_{name}={SECRET}\n", URL=" ", SECRET_KEY="", SERVICE_ROLE_KEY=""
        )
        monkeypatch.delenv("SUPABASE_URL")
        assert loaded() == (URL, SECRET)

    def test_what_surrounds_them_does_not_matter(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, URL=f" {URL}\n", **{name: f"\t{SECRET} \r\n"})
        assert loaded() == (URL, SECRET)

    def test_nor_in_a_file(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, f'SUPABASE_URL=" {URL} "\r\nSUPABASE_{name}="{SECRET}\\n"\r\n')
        assert loaded() == (URL, SECRET)


def test_the_secret_key_comes_before_the_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, URL=URL, SECRET_KEY=SECRET, SERVICE_ROLE_KEY="older")
    assert loaded() == (URL, SECRET)


def test_a_file_as_windows_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, f"\ufeffSUPABASE_URL={URL}\r\nSUPABASE_SECRET_KEY={SECRET}\r\n")
    assert loaded() == (URL, SECRET)


def test_the_file_is_that_of_the_working_directory_of_the_first_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = TokenLimits.from_env()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
        limits.track(ID, "image")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:54321", "https://abc.supabase.co/", "http://app.localhost:8000", "http://[::1]:8000"]
)
def test_urls_that_may_be_right(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    given(monkeypatch, URL=url, SECRET_KEY=SECRET)
    assert loaded() == (url, SECRET)


class TestUnencrypted:
    @pytest.mark.parametrize(
        "url", ["http://my_host:8000", "http://10.0.0.7", "HTTP://kong:8000", "http://127.0.0.1.nip.io"]
    )
    def test_is_refused(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        given(monkeypatch, URL=url, SECRET_KEY=SECRET)
        with pytest.raises(ConfigurationError, match=r"http://.* unencrypted.*TOKENLIMITS_ALLOW_HTTP=1"):
            load()

    @pytest.mark.parametrize("word", ["1", "true", "yes"])
    def test_is_taken_where_somebody_allows_it(self, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        given(monkeypatch, URL="http://kong:8000", SECRET_KEY=SECRET)
        assert load(allow_http=True).url == "http://kong:8000"
        monkeypatch.setenv("TOKENLIMITS_ALLOW_HTTP", word)
        assert loaded() == ("http://kong:8000", SECRET)

    @pytest.mark.parametrize("word", ["0", "no", "perhaps", ""])
    def test_is_not_taken_otherwise(self, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        given(monkeypatch, URL="http://kong:8000", SECRET_KEY=SECRET)
        monkeypatch.setenv("TOKENLIMITS_ALLOW_HTTP", word)
        with pytest.raises(ConfigurationError, match="unencrypted"):
            load()


@pytest.mark.parametrize("cls", [TokenLimits, GroupManager])
def test_a_client_that_is_passed_sends_no_key_unencrypted(
    monkeypatch: pytest.MonkeyPatch, cls: type[TokenLimits | GroupManager]
) -> None:
    client = create_client("http://kong:8000", SECRET)
    with pytest.raises(ConfigurationError, match="unencrypted"):
        cls(client)
    cls(client, allow_http=True)
    cls(create_client("http://127.0.0.1:1", SECRET))
    monkeypatch.setenv("TOKENLIMITS_ALLOW_HTTP", "1")
    cls(client)


def test_the_environments_client_may_be_allowed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, URL="http://kong.invalid:1", SECRET_KEY=SECRET)
    with pytest.raises(ConfigurationError, match="unencrypted"):
        TokenLimits.from_env(timeout=0.1).usage(ID)
    with pytest.raises(ServiceUnavailable):
        TokenLimits.from_env(timeout=0.1, allow_http=True).usage(ID)


class TestProblems:
    @pytest.mark.parametrize(
        ("variables", "named"),
        [
            ({}, ["SUPABASE_URL", "SUPABASE_SECRET_KEY"]),
            ({"URL": URL}, ["SUPABASE_SECRET_KEY"]),
            ({"SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": "", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": "  ", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": SECRET, "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": "abc.supabase.co", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": "ftp://abc.supabase.co", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": "https://abc.supabase.co:99999", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": f"https://{SECRET} x", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": "https://abc..supabase.co", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": f"https://{'a' * 64}.supabase.co", "SECRET_KEY": SECRET}, ["SUPABASE_URL"]),
            ({"URL": URL, "SECRET_KEY": f"{SECRET}\nX-Other: 1"}, ["SUPABASE_SECRET_KEY"]),
            ({"URL": URL, "SECRET_KEY": f"{SECRET}…"}, ["SUPABASE_SECRET_KEY"]),
            ({"URL": URL, "SECRET_KEY": f"{SECRET} {SECRET}"}, ["SUPABASE_SECRET_KEY"]),
        ],
    )
    def test_name_the_variables_and_no_values(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: list[str]
    ) -> None:
        given(monkeypatch, **variables)
        with pytest.raises(ConfigurationError) as caught:
            load()
        problem = re.split(" (?:is|are) missing or not valid", str(caught.value))[0]
        assert sorted(problem.split(" and ")) == sorted(named)
        assert "SUPABASE_SERVICE_ROLE_KEY" in str(caught.value)
        assert SECRET not in text_of(caught.value)

    def test_in_a_file_of_another_encoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given(monkeypatch, f"SUPABASE_URL={URL}\nSUPABASE_SECRET_KEY={SECRET}\n".encode("utf-16"))
        with pytest.raises(ConfigurationError, match=r"\.env is not UTF-8") as caught:
            load()
        assert "S\\x00E\\x00" not in text_of(caught.value)

    @pytest.mark.parametrize("name", ["SECRET_KEY", "SERVICE_ROLE_KEY"])
    def test_a_publishable_key(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        given(monkeypatch, URL=URL, **{name: "sb_publishable_7Hn9wQz"})
        with pytest.raises(ConfigurationError, match="publishable") as caught:
            load()
        assert "7Hn9wQz" not in text_of(caught.value)


class TestSchema:
    def test_is_public_unless_said_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load_schema() == "public"
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "")
        assert load_schema() == "public"

    def test_of_the_environment_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given(monkeypatch, "TOKENLIMITS_SCHEMA=limits\r\n")
        assert load_schema() == "limits"
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "\tquotas \n")
        assert load_schema() == "quotas"

    def test_needs_no_other_variable_and_no_other_needs_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", "pg_catalog")
        given(monkeypatch, URL=URL, SECRET_KEY=SECRET)
        assert loaded() == (URL, SECRET)
        with pytest.raises(ConfigurationError, match=r"^TOKENLIMITS_SCHEMA: .*pg_catalog"):
            load_schema()

    @pytest.mark.parametrize("name", ["tokenlimits", "auth", "My Limits", "limits;", "1st", "x" * 64])
    def test_that_can_not_be_is_refused(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("TOKENLIMITS_SCHEMA", name)
        with pytest.raises(ConfigurationError, match=r"^TOKENLIMITS_SCHEMA: "):
            load_schema()


def test_no_value_in_a_repr(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    given(monkeypatch, URL=URL, SECRET_KEY=SECRET)
    settings = load()
    limits = TokenLimits.from_env()
    assert SECRET not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()} {limits!r}"
    assert SECRET not in caplog.text


def test_nothing_is_read_before_the_first_use() -> None:
    TokenLimits.from_env().close()


@pytest.mark.parametrize("path", ["", "/rest/v1", "/rest/v1/", "/auth/v1"])
def test_the_url_of_a_service_is_the_projects(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    given(monkeypatch, URL=f"{URL}{path}", SECRET_KEY=SECRET)
    assert loaded() == (URL, SECRET)
