"""How the panel looks where screens, colours and paper differ."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect
from tests.web.conftest import SignIn, Theme

from tokenlimits.models import Group

# the outline of what has the focus, and whether an element around it cuts the outline off
CUT_OFF = """() => {
  const cut = []
  for (const element of document.querySelectorAll("a, button, input, select, textarea, summary, [tabindex='0']")) {
    element.focus()
    const style = getComputedStyle(element)
    if (document.activeElement !== element || style.outlineStyle === "none" || !element.checkVisibility()) continue
    const reach = parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset) - 0.5
    const inner = element.getClientRects()[0]
    for (let around = element.parentElement; around && around !== document.body; around = around.parentElement) {
      const { overflowX, overflowY } = getComputedStyle(around)
      if (overflowX === "visible" && overflowY === "visible") continue
      const outer = around.getBoundingClientRect()
      const isBeside = inner.left - reach < outer.left || inner.right + reach > outer.right
      const isPast = overflowY === "hidden" && (inner.top - reach < outer.top || inner.bottom + reach > outer.bottom)
      if (isBeside || isPast) cut.push(`${element.outerHTML.slice(0, 80)} in ${around.outerHTML.slice(0, 60)}`)
    }
  }
  return cut
}"""


IS_ON_TOP = """element => {
  const { left, top, width, height } = element.getBoundingClientRect()
  return [0.05, 0.5, 0.95].every(
    place => element.contains(document.elementFromPoint(left + place * width, top + height / 2)))
}"""


class TestFocus:
    def test_is_seen_wherever_it_is(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        expect(page.get_by_role("article", name="Studio")).to_be_visible()
        page.keyboard.press("Tab")
        assert page.evaluate(CUT_OFF) == []
        title = page.get_by_role("link", name="Studio")
        title.focus()
        assert title.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
        page.get_by_role("button", name="member of Studio").click()
        page.get_by_role("searchbox", name="Search users").fill("bob@")
        expect(page.get_by_role("checkbox", name="bob@").first).to_be_visible()
        assert page.evaluate(CUT_OFF) == []
        base = page.url
        for path in (f"groups/{group.id}", "overview"):
            page.goto(f"{base}{path}")
            expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
            page.keyboard.press("Tab")
            assert page.evaluate(CUT_OFF) == []


def pixels(page: Page, selector: str) -> set[tuple[int, ...]]:
    """Return the colours that an element has along its middle line."""
    box = page.locator(selector).first
    box.scroll_into_view_if_needed()
    picture = box.screenshot()
    return {
        tuple(each)
        for each in page.evaluate(
            """async bytes => {
              const picture = await createImageBitmap(new Blob([new Uint8Array(bytes)]))
              const canvas = new OffscreenCanvas(picture.width, picture.height).getContext("2d")
              canvas.drawImage(picture, 0, 0)
              const { data } = canvas.getImageData(2, picture.height >> 1, picture.width - 4, 1)
              return Array.from({ length: data.length / 4 }, (_, n) => [...data.slice(4 * n, 4 * n + 3)])
            }""",
            list(picture),
        )
    }


class TestForcedColours:
    @pytest.mark.parametrize("theme", ["dark", "light"])
    def test_a_bar_shows_how_full_it_is(self, sign_in: SignIn, group: Group, theme: Theme) -> None:
        page = sign_in(theme=theme, forced_colors="active", reduced_motion="reduce")
        studio = "article:has-text('Studio') progress[aria-label^='image']"
        expect(page.locator(studio)).to_be_visible()
        assert len(pixels(page, studio)) >= 2


class TestNarrow:
    def test_all_of_a_usage_is_in_sight(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in(width=360, height=740)
        page.goto(f"{page.url}groups/{group.id}")
        recent = page.get_by_role("region", name="Recent usage").first
        row = recent.get_by_role("row", name="image").filter(has_text="80")
        row.scroll_into_view_if_needed()
        for part in (
            row.get_by_text("bob@example.com"),
            row.get_by_text("image", exact=True),
            row.get_by_text("80", exact=True),
            row.get_by_text("committed"),
            row.get_by_role("button", name="Refund 80 images"),
        ):
            box = part.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert part.evaluate(IS_ON_TOP)


class TestTheme:
    @pytest.mark.parametrize("theme", ["dark", "light"])
    def test_is_the_systems_until_one_is_chosen(self, sign_in: SignIn, group: Group, theme: Theme) -> None:
        page = sign_in(theme=theme)
        html = page.locator("html")
        expect(html).to_have_attribute("data-theme", theme)
        other: Theme = "light" if theme == "dark" else "dark"
        page.emulate_media(color_scheme=other)
        expect(html).to_have_attribute("data-theme", other)
        page.get_by_role("button", name="Switch between dark and light").click()
        expect(html).to_have_attribute("data-theme", theme)
        page.reload()
        expect(html).to_have_attribute("data-theme", theme)


class TestPaper:
    def test_has_dark_words_and_no_controls(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        base = page.url
        for path in ("", f"groups/{group.id}", "overview"):
            page.goto(f"{base}{path}")
            expect(page.locator(".stats, .facts")).to_be_visible()
            page.emulate_media(media="print")
            expect(page.locator("html")).to_have_attribute("data-theme", "light")
            expect(page.get_by_role("banner")).to_be_hidden()
            expect(page.get_by_role("link", name="Export")).to_be_hidden()
            expect(page.get_by_role("button", name="Edit").first).to_be_hidden()
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            page.emulate_media(media="screen")
            expect(page.locator("html")).to_have_attribute("data-theme", "dark")
