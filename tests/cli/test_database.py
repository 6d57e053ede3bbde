"""URLs of databases, as people paste them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from tokenlimits.cli._database import connection_of, find_url
from tokenlimits.cli._terminal import Problem

HOST = "aws-0-eu-west-1.pooler.supabase.com"
DIRECT = {"user": "postgres", "password": "p", "host": HOST, "port": "5432", "dbname": "postgres", "sslmode": "require"}


def parts(url: str) -> dict[str, object]:
    return dict(conninfo_to_dict(connection_of(url)))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+asyncpg"])
def test_schemes_of_other_libraries(scheme: str) -> None:
    assert parts(f"{scheme}://postgres:p@{HOST}:5432/postgres") == DIRECT


def test_what_prisma_adds_is_left_out() -> None:
    url = f"postgresql://postgres:p@{HOST}:5432/postgres?pgbouncer=true&connection_limit=1&application_name=x"
    assert parts(url) == DIRECT | {"application_name": "x"}


@pytest.mark.parametrize("password", ["p@ss", "p#ss", "p%ss", "p?ss", "p/ss", "p:ss", "p ss", "100%", "@", "a@b@c"])
def test_a_password_that_was_not_encoded(password: str) -> None:
    assert parts(f"postgresql://postgres:{password}@{HOST}/postgres")["password"] == password


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_password_that_was_encoded(password: str) -> None:
    assert parts(f"postgresql://postgres:{quote(password, safe='')}@{HOST}/postgres")["password"] == password


@pytest.mark.parametrize(
    "url",
    ["postgresql://u@127.0.0.1/x", "postgresql://u@localhost/x", "postgresql://u@[::1]:5/x", "dbname=x", "host=/tmp"],
)
def test_this_machine_needs_no_tls(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGHOST", raising=False)
    assert "sslmode" not in parts(url)


@pytest.mark.parametrize("url", [f"postgresql://u@{HOST}/x", f"host={HOST} dbname=x", "postgresql://u@10.0.0.7/x"])
def test_elsewhere_it_is_required(url: str) -> None:
    assert parts(url)["sslmode"] == "require"


@pytest.mark.parametrize("mode", ["disable", "prefer", "verify-full"])
def test_unless_the_url_says_otherwise(mode: str) -> None:
    assert parts(f"postgresql://u@{HOST}/x?sslmode={mode}")["sslmode"] == mode


def test_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-ca")
    assert "sslmode" not in parts(f"postgresql://u@{HOST}/x")


@pytest.mark.parametrize("url", ["", "abc", "https://abc.supabase.co"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(Problem, match="can't be read"):
        connection_of(url)


def test_a_file_that_holds_the_url(tmp_path: Path) -> None:
    """What stands in a command line, all users of the machine can see."""
    path = tmp_path / "url"
    path.write_text("postgresql://u:hush@127.0.0.1/x\n")
    assert find_url(f"@{path}") == "postgresql://u:hush@127.0.0.1/x"
    with pytest.raises(FileNotFoundError):
        find_url(f"@{path}s")
    path.write_bytes(b"\xff")
    with pytest.raises(Problem, match="is not UTF-8 text"):
        find_url(f"@{path}")
