"""Refuse phrases that readers stumble over: `python tools/check_words.py [FILE…]`, by default in all that people read.

When a review finds another one, add it to `INSTEAD`. Spelling is codespell's.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
READ = ("*.md", "Makefile", ".github", "docs", "examples", "benchmarks", "sql/schema", "sql/optional", "src", "tools")
SUFFIXES = {"", ".css", ".html", ".js", ".md", ".mjs", ".py", ".sql", ".svg", ".ts", ".yml"}

# patterns, whatever their case, and what to say instead
INSTEAD = {
    r"answers? the same": "returns the same answer",
    r"counts? from (?!now\b)\S+ on": "counts since …",
    r"else a free one": "otherwise, a free port",
    r"entitles? to": "has a limit for …, includes …",
    r"for (which|whom) holds": "for which … is true",
    r"goes on, whatever": "propagates",
    r"goes round for ever": "loops for ever",
    r"growing pauses": "exponential backoff",
    r"here it was \d": "leave it out, or name what it was",
    r"how it is written": "format",
    r"idempotency key: again": "repeating the call with the same key …",
    r"in the place of": "instead of",
    r"(it is|it's) true when": "truthy when, true if",
    r"judges users": "applies to users",
    r"mend(s|ed|ing)?": "correct, fix, repair",
    r"names the import; else": "otherwise",
    r"nobody is there": "name what is missing: stdin is not a terminal; pass --yes to confirm",
    r"(nobody|somebody) has swept": "unswept",
    r"perhaps another word": "may send other words",
    r"somebody else holds": "locked by another transaction",
    r"(take|takes|taken) back, to be": "rolled back, to be",
    r"tell \w+ in (a different|another) way": "mark … differently",
    r"that (is|are) there already": "that already exists",
    r"usage none was": "usage that was not recorded",
    r"what (is|isn't|is not) ours": "third-party; what tokenlimits created",
    r"which there are": "which exist",
    r"with any, the": "if there are any, the",
}


def pattern_of(phrase: str) -> re.Pattern[str]:
    """Find a phrase as whole words, also where it goes on in the next line, which may be a comment's."""
    return re.compile(rf"(?<!\w)(?:{phrase})(?!\w)".replace(" ", r"\s+(?:(?:--|#|//)\s+)?"), re.IGNORECASE)


PATTERNS = {pattern_of(phrase): say for phrase, say in INSTEAD.items()}


def texts() -> Iterator[Path]:
    """Find the files that people read, but for third-party ones and this list."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *READ]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in SUFFIXES and ".min." not in name and path != Path(__file__):
            yield path


def found_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Find such phrases: the line, the phrase, and what to say instead."""
    for pattern, say in PATTERNS.items():
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), say


def main(names: list[str]) -> int:
    """Check files, and return the exit status: 1 if one has such a phrase."""
    status = 0
    for path in map(Path, names) if names else texts():
        for line, phrase, say in found_in(path.read_text(encoding="utf-8")):
            print(f'{path}:{line}: "{phrase}". Say: {say}')
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
