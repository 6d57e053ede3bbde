"""The code of every page runs, and prints what the page says."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.docs import processes
from tests.docs.conftest import Docs
from tests.docs.pages import ROOT, Block, blocks, name_of, pages
from tests.docs.run_page import matches

# what is shown, and what another test runs
SHOWN = {"csv", "env", "ini", "javascript", "js", "json", "nginx", "text", "toml", "ts", "typescript", "yaml"}
RUN = {"python", "sh", "sql"}


def runnable(page: Path) -> list[Block]:
    """The code of a page; the text of an example is run by the example's own tests."""
    found = [block for block in blocks(page.read_text()) if block.language in RUN or block.title is not None]
    return [block for block in found if block.included is None]


# they start many programs, or a stack of their own
SLOW = {
    "guides/another-schema.md",
    "guides/choosing-limits.md",
    "guides/command-line.md",
    "guides/count-then-insert.md",
    "guides/local.md",
    "guides/panel.md",
    "guides/plans.md",
    "operations/restores.md",
    "operations/upgrade.md",
    "operations/user-denied.md",
    "start/first-limit.md",
    "start/setup.md",
}
WITH_CODE = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
    for page in pages()
    if runnable(page)
]


@pytest.mark.parametrize("page", WITH_CODE)
def test_runs(page: Path, docs: Docs, tmp_path: Path) -> None:
    rules = docs.rules()
    (tmp_path / "sql").symlink_to(ROOT / "sql")
    asked = {"page": name_of(page), "users": docs.begin(), "blocks": [asdict(block) for block in runnable(page)]}
    done = processes.run(asked, tmp_path, docs.environment)
    docs.restore(rules)
    assert (done.status, done.stderr) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_names_a_language(page: Path) -> None:
    """Code of no language, or of one that nothing here runs, would be passed over in silence."""
    text = page.read_text()
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
    assert len(fences) % 2 == 0
    assert {fence.split(" ")[0] for fence in fences[::2]} <= RUN | SHOWN


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_includes_examples_that_are_tested(page: Path) -> None:
    tested = "".join(path.read_text() for path in (ROOT / "tests" / "integration").glob("test_*.py"))
    for block in blocks(page.read_text()):
        if block.included is not None:
            path = ROOT / block.included
            assert path.is_file(), block.included
            assert path.name in tested or path.stem in tested, f"nothing runs {block.included}"


class TestRunner:
    def test_finds_code_files_and_output(self) -> None:
        text = '# A\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n- b\n\n    ```sh title="c"\n    d\n    ```\n'
        assert blocks(text) == [Block("python", None, "print(1)\n", 2, "1\n"), Block("sh", "c", "d\n", 12)]

    @pytest.mark.parametrize(
        ("told", "output", "same"),
        [("a … c\n", "a b c \n", True), ("a\n", "a\nb\n", False), ("1.0", "1x0", False), ("…", "a\nb", False)],
    )
    def test_compares_output(self, told: str, output: str, same: bool) -> None:
        assert matches(told, output) is same

    @pytest.mark.parametrize(
        ("language", "code", "problem"),
        [
            ("python", "print(1)  # 2", "line 2 printed"),
            ("python", "1 / 0", "ZeroDivisionError"),
            ("python", "for n in []:\n    print(n)  # 1", "line 3"),
            ("python", "import warnings; warnings.warn('old')", "UserWarning: old"),
            ("python", "print('other')", "should print:\nthis"),
            ("sh", "echo this\nfalse", "exit status 1"),
            ("sh", "echo other", "should print:\nthis"),
            ("sh", "pip install 'tokenlimits[no_such_extra]'", "exit status 1"),
            ("sh", "tokenlimits no-such-command", "exit status 2"),
            ("sql", "select no_such_column", "no_such_column"),
        ],
    )
    def test_fails_where_a_page_is_wrong(
        self, docs: Docs, tmp_path: Path, language: str, code: str, problem: str
    ) -> None:
        block = Block(language, None, f"{code}\n", 1, "this\n" if "this" in problem else None)
        asked = {"page": "wrong.md", "users": docs.begin(), "blocks": [asdict(block)]}
        done = processes.run(asked, tmp_path, docs.environment)
        assert done.status == 1
        assert "docs/wrong.md:1" in done.stderr
        assert problem in done.stderr
