"""What is shipped: built from the sdist, installed where there is no checkout, and used from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from venv import EnvBuilder

import pytest

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
NAME = f"tokenlimits-{VERSION}"
# as if GitHub's release workflow did it
REPOSITORY = {"GITHUB_SERVER_URL": "https://git.example", "GITHUB_REPOSITORY": "ann/limits", "GITHUB_REF_NAME": "v1"}
# what nothing else would miss until somebody installs the package
MUST_HAVE = {
    "tokenlimits/py.typed",
    "tokenlimits/local/package-lock.json",
    "tokenlimits/local/package.json",
    "tokenlimits/local/server.mjs",
    "tokenlimits/sql/tokenlimits.sql",
    "tokenlimits/sql/uninstall.sql",
    "tokenlimits/web/panel/static/LICENSES.txt",
    "tokenlimits/web/panel/static/VENDORED.md",
    "tokenlimits/web/panel/static/htmx.min.js",
    "tokenlimits/web/panel/templates/base.html",
}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT, cwd=directory, **REPOSITORY)
    assert {file.name for file in directory.iterdir()} == {f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl"}
    return directory / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def files(directory: Path, as_: str) -> Iterator[str]:
    for file in directory.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            yield f"{as_}/{file.relative_to(directory).as_posix()}"


class TestTheWheel:
    def test_holds_the_modules_the_sql_and_the_licence_and_nothing_else(self, names: list[str]) -> None:
        shipped = {*files(ROOT / "src" / "tokenlimits", "tokenlimits"), *files(ROOT / "sql", "tokenlimits/sql")}
        shipped.add("_tokenlimits_pytest.py")
        about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
        optional = {f"{NAME}.dist-info/entry_points.txt"}
        assert len(names) == len(set(names))
        assert set(names) - optional == shipped | about

    def test_holds_what_is_no_module(self, names: list[str]) -> None:
        assert set(names) >= MUST_HAVE
        assert any(name.startswith("tokenlimits/sql/migrations/") for name in names)
        assert any(name.startswith("tokenlimits/sql/schema/") for name in names)

    def test_says_what_it_needs(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            about: Message = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
        assert about["Name"] == "tokenlimits"
        assert about["Requires-Python"] == ">=3.11"
        assert about["License-Expression"] == "Apache-2.0"
        assert "Typing :: Typed" in about.get_all("Classifier", [])
        needed = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
        names = sorted(re.split(r"[<>=]", line)[0] for line in needed)
        assert names == [
            "httpcore",
            "httpx",
            "postgrest",
            "pydantic",
            "pydantic-settings",
            "supabase",
            "tenacity",
            "tzdata",
        ]
        assert str(about.get_payload()).strip().startswith("# tokenlimits")

    def test_says_where_it_comes_from(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            about: Message = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
        urls = dict(line.split(", ") for line in about.get_all("Project-URL", []))
        assert urls["Source"] == "https://git.example/ann/limits"
        assert urls["Changelog"] == "https://git.example/ann/limits/blob/v1/CHANGELOG.md"


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel, and with what it needs from ours: but not with our checkout."""
    directory = tmp_path_factory.mktemp("venv")
    EnvBuilder(symlinks=True).create(directory)
    python = directory / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=directory)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip()
    # a line of a .pth file is one more directory to look in; the .pth files in there (our checkout's) don't count
    Path(site, "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_it_works_where_it_is_installed(python: Path, tmp_path: Path) -> None:
    script = """
        from importlib.metadata import version
        from pathlib import Path
        import sys
        import tokenlimits
        from tokenlimits import GroupManager, TokenLimits, track_generation
        from tokenlimits.local import LocalStack
        from tokenlimits.sql_files import migrations, one_paste
        import os

        site = Path(sys.prefix).resolve()
        assert Path(tokenlimits.__file__).resolve().is_relative_to(site), tokenlimits.__file__
        assert version("tokenlimits") == tokenlimits.__version__
        shipped = Path(tokenlimits.__file__).parent / "sql"
        assert one_paste() == (shipped / "tokenlimits.sql").read_text(encoding="utf-8")
        assert [file.name for file in migrations()] == sorted(path.name for path in (shipped / "migrations").iterdir())
        assert "create or replace function public.track_generation" in one_paste()

        with LocalStack() as stack:
            os.environ.update(stack.environment())
            with GroupManager.from_env() as groups, TokenLimits.from_env() as limits:
                (user,) = stack.create_users(1)
                pro = groups.create("Pro", limits={"image": 1})
                groups.add_member(pro.id, user)
                assert limits.track(user, "image").remaining == 0
                assert not track_generation(user, "image")
        print("works")
    """
    assert run(python, "-W", "error", "-c", textwrap.dedent(script), cwd=tmp_path) == "works\n"


def test_every_module_can_be_imported_there(python: Path, tmp_path: Path) -> None:
    script = """
        import importlib, pkgutil, tokenlimits
        for module in pkgutil.walk_packages(tokenlimits.__path__, "tokenlimits."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        print("imported")
    """
    assert run(python, "-W", "error", "-c", textwrap.dedent(script), cwd=tmp_path) == "imported\n"
