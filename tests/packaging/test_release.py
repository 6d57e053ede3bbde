"""What the release workflow asks before anything is published."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tokenlimits

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "release_notes.py"
TOOL = runpy.run_path(str(SCRIPT))
notes, NotReady = TOOL["notes"], TOOL["NotReady"]
PYPROJECT = '[project]\nversion = "1.2.0"\n'
CHANGELOG = "# Changelog\n\n## [1.2.0] - {}\n\n{}\n\n## [1.1.0] - 2026-01-31\n\nOlder.\n"


class TestNotes:
    def test_are_those_of_the_version_alone(self) -> None:
        changelog = CHANGELOG.format("2026-02-28", "### Added\n\n- News.")
        assert notes("v1.2.0", PYPROJECT, changelog) == "### Added\n\n- News."

    def test_the_last_section_has_no_other_after_it(self) -> None:
        assert notes("v1.2.0", PYPROJECT, "## [1.2.0] - 2026-02-28\n\nNews.\n") == "News."

    @pytest.mark.parametrize(
        ("tag", "when", "text", "says"),
        [
            ("v1.3.0", "2026-02-28", "News.", "Tag v1.2.0, or set the version"),
            ("1.2.0", "2026-02-28", "News.", "Tag v1.2.0, or set the version"),
            ("v1.2.0", "unreleased", "News.", "'unreleased'. Replace it by the day"),
            ("v1.2.0", "2026-02-30", "News.", "Replace it by the day"),
            ("v1.2.0", "20260228", "News.", "Replace it by the day"),
            ("v1.2.0", "2026-02-28", "", "Write what is new"),
        ],
    )
    def test_what_is_not_prepared_is_refused(self, tag: str, when: str, text: str, says: str) -> None:
        with pytest.raises(NotReady, match=re.escape(says)):
            notes(tag, PYPROJECT, CHANGELOG.format(when, text))

    def test_a_version_without_a_section_is_refused(self) -> None:
        with pytest.raises(NotReady, match=re.escape("has no section [1.2.0]")):
            notes("v1.2.0", PYPROJECT, "# Changelog\n\n## [1.1.0] - 2026-01-31\n\nOlder.\n")


def test_this_version_has_its_section() -> None:
    """Once it has a date, it can be tagged."""
    dated = re.sub(r"(?m)^(## \[[\d.]+\]) - .+$", r"\1 - 2026-02-28", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    text = notes(f"v{tokenlimits.__version__}", (ROOT / "pyproject.toml").read_text("utf-8"), dated)
    assert "### Added" in text
    assert "### Upgrading" in text


def test_a_tag_of_another_version_stops_the_release() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "v0.0.0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "The tag is v0.0.0" in done.stderr


def test_the_version_stands_in_one_place() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert tokenlimits.__version__ == version
    sources = [path for top in ("src", "tools") for path in (ROOT / top).rglob("*.py")]
    assert [path for path in sources if f'"{version}"' in path.read_text("utf-8")] == []


class TestUrls:
    urls = staticmethod(runpy.run_path(str(ROOT / "tools" / "project_urls.py"))["urls"])

    def test_are_those_of_the_repository_that_builds(self) -> None:
        environment = {
            "GITHUB_SERVER_URL": "https://git.example",
            "GITHUB_REPOSITORY": "ann/tokenlimits",
            "GITHUB_REF_NAME": "v1.2.0",
        }
        urls = self.urls(environment)
        assert urls["Source"] == "https://git.example/ann/tokenlimits"
        assert urls["Changelog"] == "https://git.example/ann/tokenlimits/blob/v1.2.0/CHANGELOG.md"

    def test_a_build_elsewhere_claims_none(self) -> None:
        assert self.urls({}) == {}
