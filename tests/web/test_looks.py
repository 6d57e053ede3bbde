"""How the panel looks where screens, colours and paper differ."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect
from tests.web.conftest import SignIn, Theme

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalUser
from tokenlimits.models import Group

pytestmark = pytest.mark.slow

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


class TestNumbers:
    def test_a_limit_of_any_size_is_written_in_few_characters(self, sign_in: SignIn, groups: GroupManager) -> None:
        groups.create("Vast", limits={"tokens": 10**15, "image": 999_999_999_999})
        page = sign_in(width=360)
        vast = page.get_by_role("article", name="Vast")
        expect(vast).to_contain_text("0 of 1\N{MULTIPLICATION SIGN}10¹⁵ used")
        expect(vast).to_contain_text("999.9B left")

    def test_kinds_are_never_added_together(
        self, sign_in: SignIn, group: Group, limits: TokenLimits, newcomer: LocalUser, groups: GroupManager
    ) -> None:
        groups.add_member(group.id, newcomer.id)
        limits.track(newcomer.id, "image", 3)
        page = sign_in()
        page.goto(f"{page.url}groups/{group.id}")
        top = page.get_by_role("region", name="Top members")
        kind = top.get_by_role("combobox", name="Kind")
        expect(kind).to_have_value("image")
        expect(top.get_by_role("row")).to_have_count(3)
        expect(top.get_by_role("row").nth(1)).to_contain_text(re.compile(r"bob@example.com\s*1\s*80$"))
        kind.select_option("audio")
        expect(top.get_by_role("row")).to_have_count(2)
        expect(top.get_by_role("row").nth(1)).to_contain_text(re.compile(r"bob@example.com\s*1\s*12,345$"))
        chart = page.get_by_role("region", name="Usage over time").first
        chart.get_by_role("combobox", name="Kind").select_option("video")
        drawn = "Object.values(Chart.instances).map(chart => chart.data.datasets.map(({ label }) => label))"
        assert page.evaluate(drawn) == [["video"]]
        chart.get_by_role("button", name="Hours").click()
        expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
        assert page.evaluate(drawn) == [["video"]]

    def test_blocked_groups_are_not_full(self, sign_in: SignIn, groups: GroupManager) -> None:
        groups.create("Ended", limits={"image": 0})
        groups.create("Empty", limits=[Limit(kind="image", max=5, scope="member")])
        page = sign_in()
        expect(page.get_by_role("article", name="Ended")).to_contain_text("blocked")
        expect(page.get_by_role("article", name="Ended")).to_have_class(re.compile("is-none"))
        expect(page.locator("[data-stat=full]")).to_have_text("0")
        page.get_by_role("link", name="Overview").click()
        expect(page.get_by_role("region", name="Fullest groups")).not_to_contain_text("Ended")

    def test_a_member_limit_is_no_pool(
        self, sign_in: SignIn, groups: GroupManager, limits: TokenLimits, user: LocalUser, newcomer: LocalUser
    ) -> None:
        free = groups.create("Free", limits=[Limit(kind="image", max=5, scope="member")])
        for each in (user, newcomer):
            groups.add_member(free.id, each.id)
        page = sign_in()
        card = page.get_by_role("article", name="Free")
        expect(card).to_contain_text("5 per member")
        limits.track(user.id, "image", 5)
        expect(card).to_contain_text("5 used by all members")
        expect(card.locator(".limit")).not_to_have_class(re.compile("is-ok"))
        expect(card).not_to_contain_text("left")

    def test_who_is_at_a_member_limit_is_named(
        self, sign_in: SignIn, groups: GroupManager, limits: TokenLimits, user: LocalUser, newcomer: LocalUser
    ) -> None:
        free = groups.create("Free", limits=[Limit(kind="image", max=10, scope="member")])
        groups.add_members(free.id, [user.id, newcomer.id])
        page = sign_in()
        base = page.url
        page.goto(f"{base}groups/{free.id}")
        shown = page.get_by_role("region", name="Limits")
        expect(shown).to_contain_text("No member is at 90 % or more.")
        limits.track(user.id, "image", 10)
        limits.track(newcomer.id, "image", 9)
        page.reload()
        shown.get_by_role("button", name="1 member at their limit, 2 at 90 % or more").click()
        dialog = page.get_by_role("dialog", name="Members at their limit")
        rows = dialog.get_by_role("row")
        expect(rows).to_have_count(3)
        expect(rows.nth(1)).to_contain_text(re.compile(rf"{user.email}\s*10 of 10"))
        expect(rows.nth(2)).to_contain_text(re.compile(rf"{newcomer.email}\s*9 of 10"))


class TestTimes:
    def test_are_in_one_zone_that_the_page_names(self, sign_in: SignIn, groups: GroupManager) -> None:
        there = groups.create("There", timezone="America/New_York", limits=[Limit(kind="image", max=1, period="day")])
        page = sign_in(timezone_id="Asia/Tokyo")
        for path, zone, hour in (
            ("", "Asia/Tokyo", "[12]:00 PM"),
            (f"groups/{there.id}", "America/New_York", "12:00 AM"),
        ):
            page.goto(f"{page.url}{path}")
            expect(page.get_by_text(f"Times in {zone}")).to_be_visible()
            reset = page.locator("time[data-countdown]")
            expect(reset).to_have_text(re.compile(rf"^resets in \S.* · \w+ \d+, (?:\d{{4}}, )?{hour}$"))
            expect(reset).to_have_attribute("title", re.compile(rf"^\w+day, .*\({zone}\)$"))
