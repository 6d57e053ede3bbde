"""Print what CHANGELOG.md says about a release, for its page: `python tools/release_notes.py v0.1.0`.

Fails when the tag, the version in pyproject.toml and the changelog don't agree, so that nothing half-prepared is
published.
"""

from __future__ import annotations

import re
import sys
import tomllib
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class NotReady(Exception):
    """The release is not prepared; the message says what to do."""


def notes(tag: str, pyproject: str, changelog: str) -> str:
    """Return the notes of the release that a tag names.

    Raises:
        NotReady: The tag, the version and the changelog don't agree.
    """
    version: str = tomllib.loads(pyproject)["project"]["version"]
    if tag != f"v{version}":
        raise NotReady(f"The tag is {tag}, but pyproject.toml says {version}. Tag v{version}, or set the version.")
    section = re.search(rf"(?ms)^## \[{re.escape(version)}\] - ([^\n]+)\n(.*?)(?=^## |\Z)", changelog)
    if section is None:
        raise NotReady(f"CHANGELOG.md has no section [{version}]. Add one with what is new.")
    when, text = section[1].strip(), section[2].strip()
    if not _is_date(when):
        raise NotReady(f"CHANGELOG.md dates {version} {when!r}. Replace it by the day of the release, as YYYY-MM-DD.")
    if not text:
        raise NotReady(f"CHANGELOG.md says nothing about {version}. Write what is new.")
    return text


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def main(arguments: list[str]) -> int:
    """Print the notes; returns the exit status."""
    if len(arguments) != 1:
        print("Usage: python tools/release_notes.py vX.Y.Z", file=sys.stderr)
        return 2
    try:
        print(notes(arguments[0], *((ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))))
    except NotReady as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
