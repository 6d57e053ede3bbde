"""The site builds, strictly, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.docs.pages import ROOT, pages
from tests.web.chromium import chromium
from tools import build_reference

# what a browser fetches by itself
FETCHED = {
    ("script", "src"),
    ("img", "src"),
    ("source", "src"),
    ("iframe", "src"),
    ("video", "src"),
    ("object", "data"),
}
LINK_TYPES = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "prefetch", "dns-prefetch", "manifest"}


class Html(HTMLParser):
    """A page's ids, its links, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.fetched += [value for name, value in values.items() if (tag, name) in FETCHED]
        if tag == "link" and LINK_TYPES & set(values.get("rel", "").split()):
            self.fetched.append(values["href"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a copy, as `make docs` does: other tests read docs/ at the same time."""
    project = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", project / "docs")
    shutil.copy(ROOT / "zensical.toml", project)  # the site is made beside the real one
    for name in ("src", "examples", "tools"):
        (project / name).symlink_to(ROOT / name)
    for path, text in build_reference.pages().items():
        (project / path.relative_to(ROOT)).write_text(text)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "build" / "site"


@pytest.fixture(scope="module")
def html(site: Path) -> dict[Path, Html]:
    found = {path: Html(path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > len(pages())
    return found


@pytest.mark.slow
def test_fetches_nothing_from_elsewhere(site: Path, html: dict[Path, Html]) -> None:
    for path, page in html.items():
        assert page.fetched, path
        for address in page.fetched:
            assert not urlsplit(address).netloc, f"{path.relative_to(site)} fetches {address}"
    for style in site.rglob("*.css"):
        outside = re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)'\"]+", style.read_text())
        assert outside == [], style


def test_links_lead_to_pages_and_headings(site: Path, html: dict[Path, Html]) -> None:
    broken: list[str] = []
    for path, page in html.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                address.fragment and target in html and unquote(address.fragment) not in html[target].ids
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_shows_methods_errors_and_functions(html: dict[Path, Html], site: Path) -> None:
    assert {"tokenlimits.TokenLimits.track", "tokenlimits.TokenLimits.reserve"} <= html[
        site / "reference/python/clients.html"
    ].ids
    assert "tokenlimits.errors.HoldExpired" in html[site / "reference/python/errors.html"].ids
    assert "track_generation" in html[site / "reference/sql.html"].ids


@pytest.mark.slow
def test_a_browser_asks_nobody_else(site: Path) -> None:
    """The theme's scripts know addresses elsewhere, for features that no page uses."""
    asked: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index.html", "concepts/who-pays.html", "guides/panel.html", "reference/python/clients.html"):
            page.goto((site / name).as_uri())
            page.wait_for_load_state("networkidle")
            assert page.locator("h1").count() == 1
    assert len(asked) > 8
    assert {urlsplit(address).scheme for address in asked} <= {"file", "data", "blob"}
