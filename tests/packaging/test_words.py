"""`make check` refuses phrases that readers stumble over, and misspellings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.packaging.makefile import ROOT, commands

REFUSED = (
    "Here it was 0 and 0.",
    "Do you tell admins in another way?",
    "of a newer database perhaps another word",
    "Your own exception goes on, whatever happens to the settling",
    "names what is not ours",
    "It is true when allowed",
    "Names the import; else the file's name does",
    "Judges users who are in no group",
    "An idempotency key: again, it charges nothing",
    "with any, the exit status is 1",
    "Nobody is there to be asked",
    "How it is written.",
    "A port. Else a free one.",
    "1 to mend, mend the call",
    "this group entitles to nothing",
    "usage none was recorded",
    "counts from 2026-11-27T16:44:29.418000+00:00 on",
    "put it in the place of\n-- the other",
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def check_words(*paths: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "tools/check_words.py", *paths)


@pytest.mark.parametrize("phrase", REFUSED)
def test_a_phrase_is_refused(tmp_path: Path, phrase: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A title\n\n{phrase}\n")
    done = check_words(page)
    assert done.returncode == 1
    assert f"{page}:3:" in done.stdout


def test_other_words_pass(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Truthy when allowed. Recommend an amendment; a lifetime limit counts from now on.\n")
    assert check_words(page).returncode == 0


def test_the_tree_has_none() -> None:
    done = check_words()
    assert (done.returncode, done.stdout) == (0, "")


def test_a_misspelling_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Workers recieve an answer.\n")
    done = run(Path(sys.executable).with_name("codespell"), page)
    assert (done.returncode, "recieve ==> receive" in done.stdout) == (65, True)


def test_make_check_runs_both() -> None:
    lines = commands("check")
    assert ".venv/bin/python tools/check_words.py" in lines
    (spelling,) = (line for line in lines if line.startswith(".venv/bin/codespell "))
    done = run(ROOT / ".venv/bin/codespell", *(arg for word in spelling.split()[1:] for arg in ROOT.glob(word)))
    assert (done.returncode, done.stdout) == (0, "")
