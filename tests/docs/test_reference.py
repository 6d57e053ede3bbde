"""The generated pages have what the SQL, the command line and the errors have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from tests.docs.conftest import Docs
from tests.docs.pages import DOCS, anchors, generated
from tests.unit.test_public import MODULES
from tools import build_reference

import tokenlimits
from tokenlimits import errors
from tokenlimits.cli._app import app
from tokenlimits.sql_files import one_paste


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return build_reference.pages()


def test_are_those_that_git_ignores(made: dict[Path, str]) -> None:
    assert set(made) == generated()


def test_every_public_function_has_its_comment_and_its_section(made: dict[Path, str]) -> None:
    page = made[DOCS / "reference" / "sql.md"]
    heads = re.findall(r"^create or replace function public\.(\w+)\([^)]*\)\nreturns (\w+)", one_paste(), re.MULTILINE)
    names = {name for name, returns in heads if returns != "trigger"}
    assert len(names) > 30
    assert names <= anchors(page)
    for function in build_reference.functions(one_paste()):
        assert function.comment in page
        assert function.roles, function.name


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("track_generation", "workers"),
        ("user_generation_usage", "workers"),
        ("save_group", "admins"),
        ("group_usage", "admins"),
        ("my_generation_usage", "users"),
        ("tokenlimits_version", "users"),
    ],
)
def test_tells_who_may_call_it(name: str, who: str) -> None:
    [found] = [function for function in build_reference.functions(one_paste()) if function.name == name]
    assert found.who == who


def test_tells_whom_the_database_lets(docs: Docs) -> None:
    granted = docs.stack.sql(
        "select proname as name, array(select role from unnest(array['authenticated', 'service_role']) as role"
        " where has_function_privilege(role, oid, 'execute')) as roles,"
        " has_function_privilege('anon', oid, 'execute') as anon"
        " from pg_proc where pronamespace = 'public'::regnamespace and prorettype <> 'trigger'::regtype"
    )
    told = {function.name: function.roles for function in build_reference.functions(one_paste())}
    assert told == {row["name"]: set(row["roles"]) for row in granted}
    assert [row["name"] for row in granted if row["anon"]] == []


def test_shows_arguments_with_their_defaults(made: dict[Path, str]) -> None:
    section = made[DOCS / "reference" / "sql.md"].partition("### track_generation\n")[2].partition("### ")[0]
    assert "  p_user_id uuid,\n  p_kind text,\n  p_cost bigint default 1,\n" in section
    assert re.search(r"^\) returns jsonb?$", section, re.MULTILINE)


def test_shows_the_columns_of_the_ledger(made: dict[Path, str]) -> None:
    section = made[DOCS / "reference" / "sql.md"].partition("### generation_usage\n")[2]
    assert "| `created_at` | timestamptz | Determines the period that it belongs to" in section


def test_every_command_has_its_section(made: dict[Path, str]) -> None:
    page = made[DOCS / "reference" / "command-line.md"]

    def commands(command: object, name: str) -> list[str]:
        beneath = getattr(command, "commands", {})
        return [name, *(each for sub, of in beneath.items() for each in commands(of, f"{name} {sub}"))]

    named = commands(typer.main.get_command(app), "tokenlimits")
    assert len(named) > 20
    for name in named[1:]:
        assert f" `{name}`\n" in page, name


def test_every_error_has_its_line(made: dict[Path, str]) -> None:
    page = made[DOCS / "reference" / "errors.md"]
    classes = set(errors.__all__) - {"HOW_TO_EXPOSE"}
    assert {name for name in classes if f"| [`{name}`]" not in page} == set()
    assert set(re.findall(r"^--   (TL\d{3})", one_paste(), re.MULTILINE)) - set(re.findall(r"TL\d{3}", page)) == {
        "TL099"
    }


@pytest.mark.parametrize("module", [module for module in MODULES if module is not tokenlimits.cli], ids=str)
def test_every_public_name_is_on_a_page(module: ModuleType) -> None:
    assert set(getattr(module, "__all__", ())) - {"__version__"} <= set(shown())


def shown() -> Iterator[str]:
    """Name what the pages of the Python reference show: an object, or the members of a module."""
    for page in (DOCS / "reference" / "python").glob("*.md"):
        for path, members in re.findall(r"^::: ([\w.]+)\n((?: +.*\n)*)", page.read_text(), re.MULTILINE):
            named = re.findall(r"^ +- (\w+)", members, re.MULTILINE)
            name = path.rpartition(".")[2]
            yield from named or getattr(getattr(tokenlimits, name, None), "__all__", [name])
