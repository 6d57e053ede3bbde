"""The panel as people use it, in a browser."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pytest
from playwright.sync_api import Page, Route, expect
from tests.integration.servers import Handler, raw_server
from tests.web.chromium import axe
from tests.web.conftest import SignIn, served, settings_for

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.models import Group
from tokenlimits.web import create_app
from tokenlimits.web.panel import _charts

pytestmark = pytest.mark.slow


def generate(stack: LocalStack, user: LocalUser, kind: str, times: int) -> str:
    """Generate in another process, as a worker does; returns how often it was allowed."""
    script = (
        "import sys\nfrom tokenlimits import track_generation\nuser, kind, times = sys.argv[1:]\n"
        "print(sum(track_generation(user, kind).allowed for _ in range(int(times))))"
    )
    command = [sys.executable, "-c", script, str(user.id), kind, str(times)]
    return subprocess.run(
        command, env=stack.environment(), capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


class TestAnAdminsDay:
    def test_create_add_watch_block_raise_delete(
        self, sign_in: SignIn, stack: LocalStack, groups: GroupManager, newcomer: LocalUser
    ) -> None:
        page = sign_in()
        expect(page.get_by_role("heading", name="No groups yet")).to_be_visible()

        page.get_by_role("button", name="New group").first.click()
        dialog = page.get_by_role("dialog", name="New group")
        dialog.get_by_label("Name").fill("Pro")
        dialog.get_by_label("Kind").fill("image")
        dialog.get_by_role("button", name="Create group").click()
        expect(dialog.get_by_text("A maximum is a whole number")).to_be_visible()
        dialog.get_by_label("Maximum").fill("10")
        dialog.get_by_role("button", name="Create group").click()
        expect(page.get_by_text("Pro was created.")).to_be_visible()
        expect(page.get_by_text("Groups, their limits and how much of them is used")).to_be_visible()
        expect(page.locator(".stats")).to_contain_text(re.compile(r"^\s*1group\s*0members"))
        pro = page.get_by_role("article", name="Pro")
        expect(pro).to_contain_text("10 left")
        assert groups.get_by_name("Pro").limits == (Limit(kind="image", max=10, period="month"),)

        pro.get_by_role("button", name="0 members of Pro").click()
        dialog = page.get_by_role("dialog", name="Members of Pro")
        dialog.get_by_placeholder("Search users").fill(newcomer.email[:8])
        dialog.get_by_role("checkbox", name=newcomer.email).check()
        dialog.get_by_role("button", name="Add selected users").click()
        expect(page.get_by_text("1 member added.")).to_be_visible()
        page.keyboard.press("Escape")
        expect(pro).to_contain_text("1 member of Pro")
        expect(page.locator(".stats")).to_contain_text(re.compile(r"^\s*1group\s*1member\s"))

        meter = pro.get_by_role("progressbar")
        assert generate(stack, newcomer, "image", 5) == "5"
        expect(meter).to_have_js_property("value", 5)
        expect(pro).to_have_class(re.compile("is-ok"))
        assert generate(stack, newcomer, "image", 4) == "4"
        expect(pro).to_have_class(re.compile("is-full"))
        expect(pro).to_contain_text("1 left")
        assert generate(stack, newcomer, "image", 5) == "1"
        expect(pro).to_contain_text("0 left")

        pro.get_by_role("button", name="Edit Pro").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        dialog.get_by_label("Maximum").fill("1,000")
        dialog.get_by_role("button", name="Save").click()
        expect(pro).to_contain_text("990 left")
        expect(pro).to_have_class(re.compile("is-ok"))
        assert generate(stack, newcomer, "image", 2) == "2"
        expect(pro).to_contain_text("988 left")

        pro.get_by_role("button", name="Delete Pro").click()
        dialog = page.get_by_role("dialog", name="Delete Pro?")
        expect(dialog).to_contain_text("the ledger keeps each generation")
        dialog.get_by_role("button", name="Delete the group").click()
        expect(pro).to_have_count(0)
        assert groups.list() == []

    def test_a_stale_dialog_says_what_somebody_else_changed(
        self, sign_in: SignIn, groups: GroupManager, group: Group
    ) -> None:
        page = sign_in()
        page.get_by_role("button", name=f"Edit {group.name}").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        dialog.get_by_label("Description").fill("typed")
        groups.set_limit(group.id, Limit(kind="audio", max=12_000, period="day"))
        dialog.get_by_role("button", name="Save").click()
        expect(dialog.get_by_role("alert")).to_contain_text("Somebody else changed this group just now")
        expect(dialog.get_by_role("alert")).to_contain_text("audio per day: none → 12,000")
        assert groups.get(group.id).description == group.description
        dialog.get_by_role("button", name="reload").click()
        expect(dialog.get_by_label("Description")).to_have_value(group.description)
        expect(dialog.get_by_role("textbox", name="Maximum").first).to_have_value("12000")

        dialog.get_by_label("Description").fill("mine")
        groups.update(group.id, priority=7)
        dialog.get_by_role("button", name="Save").click()
        expect(dialog.get_by_role("alert")).to_contain_text("priority: 0 → 7")
        dialog.get_by_role("button", name="Save").click()
        expect(page.get_by_text(f"{group.name} was saved.")).to_be_visible()
        assert (groups.get(group.id).description, groups.get(group.id).priority) == ("mine", 0)

    def test_closing_an_edited_form_asks(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        page.get_by_role("button", name=f"Edit {group.name}").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        dialog.get_by_label("Description").fill("typed")
        question = page.get_by_role("dialog", name="Discard your changes?")
        page.keyboard.press("Escape")
        question.get_by_role("button", name="Cancel").click()
        expect(dialog.get_by_label("Description")).to_have_value("typed")
        dialog.get_by_role("button", name="Close").click()
        question.get_by_role("button", name="Discard").click()
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name=f"Edit {group.name}").click()
        expect(dialog.get_by_label("Description")).to_have_value(group.description)
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()

    @pytest.mark.parametrize("notices", ["the form", "the page"])
    def test_what_was_typed_outlives_the_session(
        self, sign_in: SignIn, groups: GroupManager, group: Group, admin: LocalUser, notices: str
    ) -> None:
        page = sign_in()
        page.get_by_role("button", name=f"Edit {group.name}").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        dialog.get_by_label("Description").fill("typed for an hour")
        dialog.get_by_role("button", name="Add a limit").click()
        dialog.get_by_label("Kind").last.fill("speech")
        # the page would notice the end of the session first, if it asked for the limit's sentence after it
        with page.expect_response("**/limit-sentence?*max=1%2C5*"):
            dialog.get_by_label("Maximum").last.fill("1,5")
        if notices == "the form":
            page.route("**/live?*", lambda route: route.fulfill(status=204))
            page.context.clear_cookies()
            dialog.get_by_role("button", name="Save").click()
        else:
            page.context.clear_cookies()
        page.get_by_label("E-mail").fill(admin.email)
        page.get_by_label("Password").fill(admin.password)
        page.get_by_role("button", name="Sign in").click()
        expect(dialog.get_by_label("Description")).to_have_value("typed for an hour")
        expect(dialog.get_by_label("Kind").last).to_have_value("speech")
        expect(dialog.get_by_label("Maximum").last).to_have_value("1,5")
        dialog.get_by_label("Maximum").last.fill("15")
        dialog.get_by_role("button", name="Save").click()
        expect(page.get_by_text(f"{group.name} was saved.")).to_be_visible()
        assert groups.get(group.id).description == "typed for an hour"

    def test_a_generation_is_shown_within_two_seconds_of_the_pages_time(
        self, sign_in: SignIn, stack: LocalStack, group: Group, limits: TokenLimits, user: LocalUser
    ) -> None:
        page = sign_in()
        studio = page.get_by_role("article", name="Studio")
        expect(studio).to_contain_text("20 left")
        page.clock.install(time="2026-01-01T12:00:00Z")
        page.clock.pause_at("2026-01-01T12:00:01Z")

        def generate_first(route: Route) -> None:
            limits.track(user.id, "image", 1)
            route.continue_()

        # the page asks when it is loaded: when it shows that answer, its next question waits for the clock
        page.route("**/live*", generate_first, times=1)
        page.reload()
        expect(studio).to_contain_text("19 left")
        page.evaluate("window.isStillThisPage = true")
        assert generate(stack, user, "image", 2) == "2"
        expect(studio).to_contain_text("19 left")
        page.clock.run_for(2000)
        expect(studio).to_contain_text("17 left")
        assert page.evaluate("window.isStillThisPage")

    def test_of_five_hundred_groups_each_is_live(
        self, sign_in: SignIn, stack: LocalStack, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        stack.sql(
            "insert into public.user_groups (name) select 'Group ' || lpad(n::text, 3, '0')"
            " from generate_series(1, 500) as n returning id"
        )
        last = groups.get_by_name("Group 500")
        groups.set_limits(last.id, {"image": 10})
        groups.add_member(last.id, newcomer.id)
        page = sign_in()
        expect(page.get_by_role("article")).to_have_count(500)
        limits.track(newcomer.id, "image", 9)
        expect(page.get_by_role("article", name="Group 500")).to_contain_text("1 left")
        page.get_by_placeholder("Search groups").fill("499")
        expect(page.get_by_role("article")).to_have_count(1)
        stack.sql("delete from public.user_groups where name like 'Group %' returning id")

    def test_a_hidden_tab_asks_nothing(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        asked: list[str] = []
        hide = (
            "value => { Object.defineProperty(document, 'hidden', { value, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')) }"
        )
        expect(page.locator("#live-text")).to_have_text("Live")
        on_its_way: list[Route] = []

        def keep(route: Route) -> None:
            on_its_way.append(route)

        page.route("**/live*", keep)
        with page.expect_request("**/live*"):
            pass
        page.evaluate(hide, True)
        expect(page.locator("#live-text")).to_have_text("Paused")
        with page.expect_response("**/live*"):
            on_its_way.pop().continue_()
        page.unroute("**/live*", keep)
        page.on("request", lambda request: asked.append(request.url))
        page.evaluate("new Promise(done => setTimeout(done, 2500))")
        assert asked == []
        expect(page.locator("#live-text")).to_have_text("Paused")
        with page.expect_request("**/live*"):
            page.evaluate(hide, False)


class TestLimitsEditor:
    def test_says_what_a_limit_will_do_while_it_is_typed(self, sign_in: SignIn, groups: GroupManager) -> None:
        page = sign_in()
        page.get_by_role("button", name="New group").first.click()
        dialog = page.get_by_role("dialog", name="New group")
        dialog.get_by_label("Name").fill("Pro")
        dialog.get_by_role("button", name="Add a limit").click()
        row = dialog.get_by_role("group", name="Limit", exact=True).last
        row.get_by_label("Kind").fill("image")
        maximum = row.get_by_label("Maximum")
        maximum.fill("40")
        expect(row).to_contain_text("All members together may use 40 images each month.")
        expect(maximum).to_be_focused()
        row.get_by_label("Who").select_option("Each member")
        row.get_by_label("How many periods").fill("3")
        row.get_by_label("Period", exact=True).select_option("hour")
        expect(row).to_contain_text("With this period, select “Rolling” or “From first use” or “From an anchor”.")
        row.get_by_label("Starts").select_option("Rolling")
        expect(row).to_contain_text("Each member may use 40 images in any 3 hours.")
        row.get_by_text("Pool, only observe").click()
        row.get_by_label("Counts").fill("image 1, video 8")
        row.get_by_label("Kind").fill("credits")
        row.get_by_label("Only observe").check()
        expect(row).to_contain_text(
            "Each member should use 40 credits in any 3 hours. An image takes 1 credit, a video 8. "
            "More is only observed: it is not denied."
        )
        first = dialog.get_by_role("group", name="Limit", exact=True).first
        first.get_by_role("button", name="Remove this limit").click()
        dialog.get_by_role("button", name="Create group").click()
        expect(page.get_by_text("Pro was created.")).to_be_visible()
        counts = {"image": 1, "video": 8}
        given = Limit(
            kind="credits", max=40, period="3 hours", scope="member", starts="rolling", counts=counts, mode="observe"
        )
        assert groups.get_by_name("Pro").limits == (given,)

    def test_saving_something_else_loses_nothing(self, sign_in: SignIn, groups: GroupManager) -> None:
        given = groups.create(
            "Pro",
            limits=[
                Limit(kind="credits", max=9, period="year", starts="anchor", counts={"image": 1, "video": 8}),
                Limit(kind="image", max=None, period="5 hours", scope="member", starts="first_use"),
                Limit(kind="image", max=2, period="30 days", starts="rolling", mode="observe"),
            ],
        )
        page = sign_in()
        page.get_by_role("button", name="Edit Pro").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        dialog.get_by_label("Description").fill("typed")
        dialog.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Pro was saved.")).to_be_visible()
        saved = groups.get(given.id)
        assert (saved.description, saved.limits) == ("typed", given.limits)

    def test_what_can_not_be_is_said_below_the_limit(self, sign_in: SignIn, groups: GroupManager) -> None:
        pro = groups.create("Pro", limits=[Limit(kind="image", max=1, period="month")])
        page = sign_in(width=360)
        page.get_by_role("button", name="Edit Pro").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        dialog.get_by_label("Starts").select_option("Rolling")
        dialog.get_by_role("button", name="Save").click()
        expect(dialog.get_by_label("Starts")).to_be_focused()
        expect(dialog.get_by_label("Starts")).to_have_attribute("aria-invalid", "true")
        fits(page)
        dialog.get_by_label("Period", exact=True).select_option("in total")
        expect(dialog.get_by_label("How many periods")).to_be_hidden()
        dialog.get_by_label("Starts").select_option("By the calendar")
        dialog.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Pro was saved.")).to_be_visible()
        assert groups.get(pro.id).limits == (Limit(kind="image", max=1),)


class TestWindows:
    def test_are_said_and_live(
        self, sign_in: SignIn, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        pro = groups.create(
            "Pro",
            limits=[
                Limit(kind="credits", max=90, period="3 hours", starts="rolling", counts={"image": 1, "video": 8}),
                Limit(kind="image", max=50, period="5 hours", starts="first_use"),
                Limit(kind="video", max=1, period="day", mode="observe"),
            ],
        )
        groups.add_member(pro.id, newcomer.id)
        page = sign_in()
        shown = page.get_by_role("article", name="Pro").locator(".limit")
        expect(shown).to_contain_text(["nothing used", "starts with the first use", "observed"])
        limits.track(newcomer.id, "image", 10)
        limits.track(newcomer.id, "video", 10)
        # without loading the page again
        expect(shown.nth(0)).to_contain_text(re.compile(r"90 of 90 used in the last 3 hours\s*room in [23]h"))
        expect(shown.nth(1)).to_contain_text(re.compile(r"10 of 50 used\s*resets in [45]h"))
        expect(shown.nth(2)).to_contain_text("would deny")
        expect(shown.nth(2)).to_have_class(re.compile("is-none"))
        page.get_by_role("link", name="Pro").click()
        expect(page.get_by_role("region", name="Limits")).to_contain_text("Counts image by 1, video by 8")

    def test_who_is_at_a_limit_of_two_with_the_same_period(
        self, sign_in: SignIn, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        at = [Limit(kind="image", max=max_, period="day", scope="member") for max_ in (10, 99)]
        pro = groups.create("Pro", limits=[at[0].model_copy(update={"starts": "rolling"}), at[1]])
        groups.add_member(pro.id, newcomer.id)
        limits.track(newcomer.id, "image", 10)
        page = sign_in()
        page.goto(f"{page.url}groups/{pro.id}")
        page.get_by_role("button", name="1 member at their limit, 1 at 90 % or more").click()
        dialog = page.get_by_role("dialog", name="Members at their limit")
        expect(dialog).to_contain_text("10 images in any day, each member")
        expect(dialog.get_by_role("row").nth(1)).to_contain_text("10 of 10")


class TestGroupPage:
    def test_shows_history_members_and_usage_and_refunds(
        self, sign_in: SignIn, group: Group, groups: GroupManager, user: LocalUser
    ) -> None:
        page = sign_in()
        page.get_by_role("link", name="Studio").click()
        page.get_by_text("As a table").click()
        expect(page.get_by_role("region", name="Usage over time, as a table")).to_contain_text("12,345")
        expect(page.get_by_role("region", name="Top members")).to_contain_text(user.email)
        expect(page.get_by_role("region", name="Limits")).to_contain_text("20 left")
        page.get_by_role("button", name=f"Refund 80 images of {user.email}").click()
        page.get_by_role("dialog", name="Refund 80 images?").get_by_role("button", name="Refund").click()
        expect(page.get_by_text("Refunded 80 images.")).to_be_visible()
        expect(page.get_by_role("region", name="Limits")).to_contain_text("100 left")
        expect(page.get_by_role("row", name=re.compile("refunded"))).to_have_count(1)
        assert {limit.kind: limit.used for limit in groups.usage(group.id).limits}["image"] == 0
        with page.expect_download() as download:
            page.get_by_role("link", name="Export").click()
        lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
        assert download.value.suggested_filename == "Studio-usage.csv"
        assert len(lines) == 4
        assert lines[0].startswith("id,created_at,group_id,group,user_id,email,kind,cost,status")

    def test_says_if_the_chart_cannot_be_in_the_groups_time_zone(
        self, sign_in: SignIn, groups: GroupManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(name: str) -> ZoneInfo:
            raise ZoneInfoNotFoundError(name)

        groups.create("Atelier", timezone="Europe/Paris")
        page = sign_in()
        page.get_by_role("link", name="Atelier").click()
        note = page.get_by_text("no data for the time zone Europe/Paris")
        expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
        expect(note).to_be_hidden()
        monkeypatch.setattr(_charts, "ZoneInfo", unknown)
        page.get_by_role("button", name="Hours").click()
        expect(note).to_be_visible()
        monkeypatch.undo()
        page.get_by_role("button", name="Days").click()
        expect(note).to_be_hidden()

    def test_overview_counts_everything(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        page.get_by_role("link", name="Overview").click()
        expect(page.get_by_role("region", name="Fullest groups")).to_contain_text("Studio")
        expect(page.get_by_role("region", name="Kinds")).to_contain_text("audio")


class TestMembers:
    def test_are_searched_moved_and_removed(
        self, sign_in: SignIn, stack: LocalStack, groups: GroupManager, newcomer: LocalUser
    ) -> None:
        pro, free = groups.create("Pro"), groups.create("Free")
        groups.add_members(pro.id, [*stack.create_users(120, "many-"), newcomer.id])
        page = sign_in()
        page.get_by_role("button", name="121 members of Pro").click()
        dialog = page.get_by_role("dialog", name="Members of Pro")
        rows = dialog.locator(".members-list").get_by_role("checkbox")
        search = dialog.get_by_role("searchbox", name="Search members")
        expect(rows).to_have_count(50)
        search.fill("MANY-")
        # the newcomer's row may have been among the first
        expect(dialog.locator(".members-list")).not_to_contain_text(newcomer.email)
        dialog.get_by_role("button", name="Show more").click()
        expect(rows).to_have_count(100)
        dialog.get_by_role("button", name="Show more").click()
        expect(rows).to_have_count(120)
        search.fill("no%body")
        expect(dialog.get_by_text("No member's address contains this.")).to_be_visible()
        search.fill(newcomer.email[3:20].upper())
        expect(rows).to_have_count(1)
        expect(dialog.get_by_role("button", name="Remove")).to_be_disabled()
        dialog.get_by_role("checkbox", name=newcomer.email).check()
        expect(dialog.get_by_role("button", name="Remove")).to_be_enabled()
        expect(dialog.get_by_role("button", name="Move", exact=True)).to_be_disabled()
        dialog.get_by_role("combobox", name="Move to group").select_option(label="Free")
        dialog.get_by_role("button", name="Move", exact=True).click()
        expect(page.get_by_text("1 member moved.")).to_be_visible()
        expect(search).to_have_value(newcomer.email[3:20].upper())
        expect(dialog.get_by_text("No member's address contains this.")).to_be_visible()
        assert [member.id for member in groups.members(free.id)] == [newcomer.id]
        search.fill("")
        expect(rows).to_have_count(50)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="1 member of Free").click()
        dialog = page.get_by_role("dialog", name="Members of Free")
        with page.expect_response("**/rows?search=*"):
            dialog.get_by_role("searchbox", name="Search members").fill(newcomer.email)
            # before the answer, which takes no tick away
            dialog.get_by_role("checkbox", name=newcomer.email).check()
        page.evaluate("new Promise(requestAnimationFrame)")
        dialog.get_by_role("button", name="Remove").click()
        page.get_by_role("dialog", name="Remove from Free?").get_by_role("button", name="Remove").click()
        expect(page.get_by_text("1 member removed. Their usage stays.")).to_be_visible()
        expect(dialog.get_by_text("This group has no members yet.")).to_be_visible()
        assert list(groups.members(free.id)) == []


class TestToasts:
    @pytest.fixture
    def page(self, sign_in: SignIn, group: Group) -> Page:
        page = sign_in()
        page.clock.install()
        page.reload()
        expect(page.get_by_role("article", name="Studio")).to_be_visible()
        return page

    def test_what_was_done_is_said_and_goes_away_by_itself(self, page: Page) -> None:
        page.get_by_role("button", name="Edit Studio").click()
        page.get_by_role("dialog").get_by_role("button", name="Save").click()
        toast = page.get_by_role("status").get_by_text("Studio was saved.")
        expect(toast).to_be_visible()
        page.clock.run_for(5000)
        expect(toast).to_have_count(0)

    def test_what_failed_is_an_alert_over_the_dialog_and_stays_longer(self, page: Page) -> None:
        page.get_by_role("button", name="member of Studio").click()
        dialog = page.get_by_role("dialog", name="Members of Studio")
        page.route("**/members/rows?*", lambda route: route.fulfill(status=503, body="Supabase can't be reached."))
        dialog.get_by_role("searchbox", name="Search members").fill("bob")
        page.clock.run_for(250)
        alert = page.get_by_role("alert")
        expect(alert).to_have_text("Supabase can't be reached.")
        expect(dialog).to_be_visible()
        # what is inert under a dialog can't be hit, and screen readers don't say it
        assert alert.evaluate(IS_ON_TOP)
        dialog.get_by_role("button", name="Close").click()
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name="Delete Studio").click()
        expect(page.get_by_role("dialog", name="Delete Studio?")).to_be_visible()
        assert alert.evaluate(IS_ON_TOP)
        page.clock.run_for(5000)
        expect(alert).to_be_visible()
        page.clock.run_for(5000)
        expect(alert).to_have_count(0)


IS_ON_TOP = """element => {
  const { left, top, width, height } = element.getBoundingClientRect()
  return element.contains(document.elementFromPoint(left + width / 2, top + height / 2))
}"""


class TestSomebodyElse:
    def test_a_user_gets_a_clear_page_and_no_more(self, sign_in: SignIn, group: Group, user: LocalUser) -> None:
        page = sign_in(user)
        expect(page.get_by_role("heading", name="You are not an admin")).to_be_visible()
        assert "Studio" not in page.content()
        page.goto(f"{page.url}groups/{group.id}")
        expect(page.get_by_role("heading", name="You are not an admin")).to_be_visible()
        page.get_by_role("button", name="Sign out").last.click()
        expect(page.get_by_role("heading", name="Sign in to tokenlimits")).to_be_visible()


QUIET = """async () => {
  const frame = () => new Promise(requestAnimationFrame);
  do await frame(); while (await frame(), document.getAnimations().some(each => each.playState === 'running'));
}"""
HOSTILE = ["<script>document.title = 'owned'</script>", "x" * 200, "\"'><img src=x onerror=alert(1)>"]


class TestHostileNames:
    def test_are_shown_as_they_are(self, sign_in: SignIn, groups: GroupManager) -> None:
        made = [groups.create(name, description=name, limits={"image": 1}) for name in HOSTILE]
        page = sign_in(width=360)
        for group in made:
            expect(page.get_by_role("article", name=group.name, exact=True)).to_be_visible()
            page.get_by_role("button", name=f"Delete {group.name}", exact=True).click()
            expect(page.locator("#dialog-title")).to_have_text(f"Delete {group.name}?")
            page.keyboard.press("Escape")
            expect(page.locator("#dialog")).to_be_hidden()
        fits(page)
        page.get_by_role("link", name=made[0].name).click()
        expect(page.get_by_role("heading", level=1)).to_have_text(made[0].name)
        page.wait_for_load_state()  # its buttons do nothing before
        page.get_by_role("button", name="Members").click()
        expect(page.locator("#dialog-title")).to_have_text(f"Members of {made[0].name}")
        assert "owned" not in page.title() or page.title().startswith("<script>")


def fits(page: Page) -> None:
    """Check that nothing reaches out of the window, or out of an open dialog."""
    places = "[document.documentElement, ...document.querySelectorAll('dialog[open], dialog[open] .dialog-body')]"
    assert page.evaluate(f"{places}.every(place => place.scrollWidth <= place.clientWidth)")


def fill_in_nothing(page: Page) -> None:
    page.get_by_role("button", name="Add a limit").click()
    page.get_by_role("button", name="Create group").click()
    expect(page.get_by_text("A name has 1 to 200 visible characters.")).to_be_visible()


def paste_strangers(page: Page) -> None:
    page.get_by_text("Paste a list").click()
    page.get_by_label("E-mail addresses or ids").fill("\n".join(f"nobody{n}@example.com" for n in range(201)))
    page.get_by_role("button", name="Add these users").click()
    expect(page.get_by_text("201 users not found")).to_be_visible()
    expect(page.get_by_text("and 1 more")).to_be_visible()
    # everybody is listed already, and would be pale while the search, a moment later, is under way
    with page.expect_response("**/members/search?*"):
        page.get_by_role("searchbox", name="Search users").fill("bob@")
    page.get_by_role("checkbox", name="bob@").first.check()


MISTAKES: dict[str, Callable[[Page], None]] = {"New group": fill_in_nothing, "member of Studio": paste_strangers}


def visit_all(page: Page, group: Group) -> Iterator[str]:
    """Go to each page, and open each dialog."""
    base = page.url
    expect(page.get_by_role("article", name="Studio")).to_be_visible()
    yield "tokens"
    for name in ("New group", "Edit Studio", "member of Studio", "Delete Studio"):
        page.get_by_role("button", name=name).first.click()
        expect(page.locator("#dialog-title")).to_be_visible()
        yield name
        if make_mistakes := MISTAKES.get(name):
            make_mistakes(page)
            yield f"{name}, with mistakes"
        page.keyboard.press("Escape")
        if name == "New group":
            yield "what was typed is discarded"
            page.get_by_role("button", name="Discard").click()
        expect(page.locator("#dialog")).to_be_hidden()
    page.get_by_role("searchbox", name="Search groups").fill("no such group")
    expect(page.get_by_role("heading", name="No group matches")).to_be_visible()
    yield "no match"
    for path in (f"groups/{group.id}", "overview"):
        page.goto(f"{base}{path}")
        expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
        yield path
    page.go_back()
    page.get_by_role("button", name="Reset usage").click()
    expect(page.get_by_role("dialog", name="Reset the usage of Studio?")).to_be_visible()
    yield "a question"
    page.keyboard.press("Escape")
    page.goto(f"{base}nowhere")
    yield "nowhere"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in to tokenlimits")).to_be_visible()
    yield "sign-in"


class TestForEverybody:
    @pytest.mark.parametrize("theme", ["dark", "light"])
    def test_axe_finds_nothing_serious(self, sign_in: SignIn, group: Group, theme: str) -> None:
        page = sign_in(theme=theme)
        page.emulate_media(reduced_motion="reduce")
        script, found = axe(), {}
        for place in visit_all(page, group):
            # what is being fetched is pale meanwhile
            expect(page.locator(".htmx-request, [aria-busy=true]")).to_have_count(0)
            # a transition may begin only after the class is gone, so wait until a whole frame has none
            page.evaluate(QUIET)
            page.evaluate(script)
            result = page.evaluate("axe.run()")
            found[place] = [
                (each["id"], node["target"], node["any"][:1] and node["any"][0]["message"])
                for each in result["violations"]
                if each["impact"] in ("serious", "critical")
                for node in each["nodes"]
            ]
        assert {place: problems for place, problems in found.items() if problems} == {}

    @pytest.mark.parametrize("width", [360, 1600])
    def test_fits_any_window(self, sign_in: SignIn, group: Group, width: int) -> None:
        page = sign_in(width=width, height=740)
        for _ in visit_all(page, group):
            fits(page)

    def test_by_keyboard(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        expect(page.get_by_role("article", name="Studio")).to_be_visible()
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        edit = page.get_by_role("button", name="Edit Studio")
        edit.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name="Edit group")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#dialog")).to_be_hidden()
        expect(edit).to_be_focused()

    def test_the_theme_is_remembered(self, sign_in: SignIn, group: Group) -> None:
        page = sign_in()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        page.get_by_role("button", name="Switch between dark and light").click()
        page.reload()
        expect(page.locator("html")).to_have_attribute("data-theme", "light")


def relay_unless(away: threading.Event, url: str) -> Handler:
    """Pass everything on to a server, and nothing any more, either way, from the moment that it is away."""
    host, _, port = url.removeprefix("http://").rpartition(":")

    def relay(connection: socket.socket, over: threading.Event) -> None:
        if away.is_set():
            return
        with closing(socket.create_connection((host, int(port)))) as real:
            while not (away.is_set() or over.is_set()):
                for source in select.select([connection, real], [], [], 0.05)[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    (real if source is connection else connection).sendall(data)

    return relay


class TestWithoutSupabase:
    def test_says_so_tries_again_and_goes_on(
        self, sign_in: SignIn, stack: LocalStack, group: Group, limits: TokenLimits, user: LocalUser
    ) -> None:
        away = threading.Event()
        with raw_server(relay_unless(away, stack.url)) as between:
            settings = settings_for(stack, url=between.url.replace("localhost", "127.0.0.1"), timeout=3)
            with served(create_app(settings)) as url:
                page = sign_in(at=url)
                studio = page.get_by_role("article", name="Studio")
                expect(studio).to_contain_text("20 left")
                away.set()
                expect(page.get_by_text("Supabase can't be reached. This page may be out of date")).to_be_visible()
                page.get_by_role("button", name="Edit Studio").click()
                expect(page.get_by_text("Please try again soon.")).to_be_visible()
                expect(studio).to_contain_text("20 left")
                limits.track(user.id, "image", 1)
                away.clear()
                expect(studio).to_contain_text("19 left")
                expect(page.get_by_text("This page may be out of date")).to_be_hidden()
                away.set()
                page.reload()
                expect(page.get_by_role("heading", name="Supabase can't be reached")).to_be_visible()
                assert "Traceback" not in page.content()
                away.clear()
                expect(page.get_by_role("heading", name="Tokens")).to_be_visible()
                page.context.close()
