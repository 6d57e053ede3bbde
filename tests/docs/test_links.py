"""What the docs link to exists: pages, headings, files. Addresses elsewhere are well formed; nobody asks for them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import pytest
from tests.docs.pages import DOCS, ROOT, anchors, generated, name_of, pages, without_code

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def links(page: Path) -> list[str]:
    return LINK.findall(without_code(page.read_text()))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https", link
            assert "." in (address.hostname or ""), link
            continue
        target = (page.parent / address.path).resolve() if address.path else page
        if target in generated():  # its headings are looked at when it's made
            continue
        assert target.is_file(), link
        assert target.is_relative_to(DOCS), f"{link} isn't on the site"
        if address.fragment:
            assert address.fragment in anchors(target.read_text()), link


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]

    def found(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in found(each)]

    named = found(navigation)
    assert sorted(named) == sorted(name_of(page) for page in {*pages(), *generated()})


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_page_has_one_title_and_lines_that_fit(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall(r"^# ", without_code(text), re.MULTILINE)) == 1
    too_long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "![", "    if"))]
    assert too_long == []


@pytest.mark.parametrize("drawing", sorted(DOCS.rglob("*.svg")), ids=lambda path: path.name)
class TestDrawing:
    def test_is_described_and_shown(self, drawing: Path) -> None:
        """A drawing says what it shows to those who can't see it, and some page shows it."""
        root = ET.fromstring(drawing.read_text())
        for name in ("title", "desc"):
            text = root.find(f"{{http://www.w3.org/2000/svg}}{name}")
            assert text is not None
            assert text.text
        shown = [page for page in pages() if any((page.parent / link).resolve() == drawing for link in links(page))]
        assert shown

    def test_takes_nothing_from_elsewhere(self, drawing: Path) -> None:
        addresses = set(re.findall(r"https?://[^\"' )]+", drawing.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}
