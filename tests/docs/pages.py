"""The pages of the docs: their code, and the anchors that a link may name."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

# A fence of a list item is indented; a file's name is its title.
_FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?[^\n]*\n(?P<code>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)
_INCLUDE = re.compile(r'^--8<-- "(?P<path>[^"]+)"\n$')


@dataclass(frozen=True)
class Block:
    """Fenced code. `line` is that of its fence, `output` is what the page shows as its output."""

    language: str
    title: str | None
    code: str
    line: int
    output: str | None = None

    @property
    def included(self) -> str | None:
        """The file whose text the page shows here, from the root of the project."""
        match = _INCLUDE.match(self.code)
        return match["path"] if match else None


def generated() -> set[Path]:
    """The pages that tools/build_reference.py makes, whether they are there or not."""
    lines = (DOCS / ".gitignore").read_text().splitlines()
    return {DOCS / line.removeprefix("/") for line in lines if line.endswith(".md")}


def pages() -> list[Path]:
    """Every page that is written by hand, in the order of their paths."""
    return sorted(set(DOCS.rglob("*.md")) - generated())


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def blocks(text: str) -> list[Block]:
    """Find the code of a page. Text right after other code is what that code prints."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        code = textwrap.dedent(match["code"])
        follows = found and not text[end : match.start()].strip()
        if match["language"] == "text" and follows:
            last = found.pop()
            found.append(Block(last.language, last.title, last.code, last.line, code))
        else:
            line = text[: match.start()].count("\n") + 1
            found.append(Block(match["language"], match["title"], code, line))
        end = match.end()
    return found


def without_code(text: str) -> str:
    """Leave out fenced and inline code, where brackets and # mean other things."""
    return re.sub(r"`[^`\n]+`", "``", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The ids of a page's headings, as Python-Markdown makes them, and those that are given."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+?) *$", _FENCE.sub("", text), re.MULTILINE):
        given = re.search(r"\{ *#([\w-]+) *\}$", heading)
        found.add(given[1] if given else slug(heading))
    return found | set(re.findall(r'<\w+ id="([\w-]+)"', text))


def slug(heading: str) -> str:
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.lower()).strip())
