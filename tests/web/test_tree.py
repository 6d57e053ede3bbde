"""Plans and customers in the panel: the tree of groups, new customers, moves, and what is said of each."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.web.conftest import SignIn, Theme
from tests.web.test_browser import fits
from tests.web.test_exceptions import problems
from tests.web.test_looks import CUT_OFF

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.models import Group

pytestmark = pytest.mark.slow

CREDITS = Limit(kind="credits", max=1000, period="month", scope="child", counts={"image": 1, "video": 8})
THEN = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
NEXT_MONTH = (datetime.now(UTC) + timedelta(days=30)).date().isoformat()


@pytest.fixture
def plan(groups: GroupManager) -> Group:
    return groups.create("Pro", limits=[CREDITS], priority=7, timezone="Asia/Tokyo")


@pytest.fixture
def acme(groups: GroupManager, limits: TokenLimits, plan: Group, user: LocalUser) -> Group:
    """A customer that has used 960 of its 1,000 credits."""
    acme = groups.create("Acme", parent=plan, limits=[Limit(kind="audio", max=5)])
    groups.add_member(acme.id, user.id)
    limits.track(user.id, "video", 120)
    return acme


def open_group(page: Page, group: Group) -> None:
    page.goto(f"{page.evaluate('location.origin')}/groups/{group.id}")
    expect(page.get_by_role("heading", level=1, name=group.name)).to_be_visible()
    page.wait_for_load_state()


class TestTokens:
    def test_customers_are_beneath_their_plan(
        self, sign_in: SignIn, groups: GroupManager, limits: TokenLimits, plan: Group, acme: Group, user: LocalUser
    ) -> None:
        groups.create("Beta", parent=plan)
        groups.create("Aardvark")
        page = sign_in()
        beneath = page.locator(f"#beneath-{plan.id}")
        expect(beneath.get_by_role("article")).to_have_count(2)
        expect(page.get_by_role("article")).to_have_count(4)
        # the sum for the plan, its own for the customer
        expect(page.get_by_role("article", name="Pro")).to_contain_text(
            re.compile(r"1,000 per customer\s*960 of 2,000 used by all customers")
        )
        card = beneath.get_by_role("article", name="Acme")
        expect(card).to_contain_text(re.compile(r"of Pro, per month\s*40 left\s*960 of 1,000 used"))
        expect(card).to_have_class(re.compile("is-full"))
        summary = beneath.locator("summary")
        expect(summary).to_contain_text("2 customers, 1 at 90 % or more")
        assert beneath.evaluate("place => place.getBoundingClientRect().left") > (
            page.get_by_role("article", name="Pro").evaluate("place => place.getBoundingClientRect().left")
        )
        # all of it is live
        held = next(iter(groups.export_usage(acme.id)))
        groups.refund(held.id)
        expect(summary).to_have_text(re.compile(r"^2 customers of Pro$"))
        expect(page.get_by_role("article", name="Pro")).to_contain_text("0 of 2,000 used by all customers")
        limits.track(user.id, "image", 3)
        expect(card).to_contain_text("997 left")

    def test_what_is_closed_stays_closed(self, sign_in: SignIn, groups: GroupManager, plan: Group, acme: Group) -> None:
        page = sign_in()
        beneath = page.locator(f"#beneath-{plan.id}")
        summary = beneath.locator("summary")
        expect(page.get_by_role("article", name="Acme")).to_be_visible()
        summary.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("article", name="Acme")).to_be_hidden()
        groups.create("Beta", parent=plan)
        expect(summary).to_contain_text("2 customers")
        expect(page.get_by_role("article", name="Acme")).to_be_hidden()
        summary.click()
        expect(page.get_by_role("article", name="Beta")).to_be_visible()

    def test_a_search_says_where_it_is(self, sign_in: SignIn, groups: GroupManager, acme: Group) -> None:
        groups.create("Branch", parent=acme, description="Of Acme")
        page = sign_in()
        page.get_by_placeholder("Search groups").fill("branch")
        expect(page.get_by_role("article")).to_have_count(1)
        expect(page.get_by_role("article", name="Branch")).to_contain_text(f"Pro {THEN} Acme {THEN}")

    def test_the_fullest_customer_brings_its_plan_to_the_top(
        self, sign_in: SignIn, groups: GroupManager, acme: Group, user: LocalUser, limits: TokenLimits
    ) -> None:
        groups.create("Beta", parent=acme.parent_id)
        half = groups.create("Half", limits={"speech": 10})
        groups.add_member(half.id, user.id)
        limits.track(user.id, "speech", 8)
        page = sign_in()
        page.get_by_label("Sort by").select_option("usage")
        expect(page.locator("article h2")).to_have_text(["Pro", "Acme", "Beta", "Half"])
        page.get_by_label("Sort by").select_option("name")
        expect(page.locator("article h2")).to_have_text(["Pro", "Acme", "Beta", "Half"])

    def test_five_hundred_customers_are_folded(
        self, sign_in: SignIn, stack: LocalStack, groups: GroupManager, plan: Group
    ) -> None:
        stack.sql(
            f"insert into public.user_groups (name, parent_id) select 'Customer ' || n, '{plan.id}'"
            " from generate_series(1, 500) as n returning id"
        )
        try:
            page = sign_in()
            summary = page.locator(f"#beneath-{plan.id} summary")
            expect(summary).to_contain_text("500 customers")
            expect(page.get_by_role("article", name="Customer 77", exact=True)).to_be_hidden()
            summary.click()
            expect(page.get_by_role("article")).to_have_count(501)
            page.get_by_placeholder("Search groups").fill("customer 77")
            expect(page.get_by_role("article")).to_have_count(1)
            open_group(page, plan)
            expect(page.locator(".child")).to_have_count(100)
            expect(page.get_by_text("And 400 more")).to_be_visible()
        finally:
            stack.sql("delete from public.user_groups where name like 'Customer %' returning id")


class TestGroupPage:
    def test_leads_up_and_down(self, sign_in: SignIn, groups: GroupManager, plan: Group, acme: Group) -> None:
        branch = groups.create("Branch", parent=acme)
        page = sign_in()
        open_group(page, branch)
        where = page.get_by_role("navigation", name="Where this group is")
        expect(where.get_by_role("listitem")).to_have_text(["All groups", "Pro", "Acme", "Branch"])
        expect(page.get_by_role("region", name="Limits")).to_contain_text("From Acme: All members together may use")
        expect(page.get_by_role("region", name="Limits")).to_contain_text(
            "From Pro: Each customer may use 1,000 credits each month, shared by all its members."
        )
        where.get_by_role("link", name="Acme").click()
        expect(page.get_by_role("heading", level=1, name="Acme")).to_be_visible()
        shown = page.get_by_role("region", name="Limits")
        expect(shown).to_contain_text("of Pro, per month")
        expect(shown).to_contain_text("Counts image by 1, video by 8")
        expect(shown).not_to_contain_text("From Pro")  # its bar says it
        expect(page.get_by_role("region", name="Groups beneath")).to_contain_text("Branch")
        page.get_by_role("navigation", name="Where this group is").get_by_role("link", name="Pro").click()
        customers = page.get_by_role("region", name="Customers")
        expect(customers).to_contain_text(re.compile(r"credits per month: 960 of 1,000 used\s*40 left"))
        expect(customers.get_by_role("progressbar", name="Acme, credits per month")).to_be_visible()
        customers.get_by_role("link", name="Acme").click()
        expect(page.get_by_role("heading", level=1, name="Acme")).to_be_visible()

    def test_a_new_customer_needs_only_a_name(self, sign_in: SignIn, groups: GroupManager, plan: Group) -> None:
        page = sign_in()
        open_group(page, plan)
        expect(page.get_by_text("No customers yet.")).to_be_visible()
        page.get_by_role("button", name="New customer").click()
        dialog = page.get_by_role("dialog", name="New customer")
        dialog.get_by_role("button", name="Create customer").click()
        expect(dialog.get_by_text("A name has 1 to 200 visible characters.")).to_be_visible()
        name = dialog.get_by_label("Name")
        name.fill("pro")
        page.keyboard.press("Enter")
        expect(dialog.get_by_text("Another group has this name.")).to_be_visible()
        expect(name).to_be_focused()
        name.fill("Beta")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Beta was created. It has the limits of Pro.")).to_be_visible()
        expect(page.get_by_role("region", name="Customers")).to_contain_text("0 of 1,000 used")
        beta = groups.get_by_name("Beta")
        assert (beta.parent_id, beta.priority, beta.timezone, beta.limits) == (plan.id, 7, "Asia/Tokyo", ())

    def test_moves(self, sign_in: SignIn, groups: GroupManager, plan: Group, acme: Group) -> None:
        business = groups.create("Business", limits=[CREDITS.model_copy(update={"max": 9000})])
        groups.create("Branch", parent=acme)
        page = sign_in()
        open_group(page, acme)
        page.get_by_role("button", name="Move", exact=True).click()
        dialog = page.get_by_role("dialog", name="Move Acme")
        to = dialog.get_by_label("Beneath")
        # not beneath itself
        expect(to.get_by_role("option")).to_have_text(["no group", "Business", "Pro"])
        expect(dialog).to_contain_text("with all that they have used")
        expect(dialog).to_contain_text("Exceptions that it has from limits of Pro sleep until it comes back.")
        to.select_option("Business")
        dialog.get_by_role("button", name="Move").click()
        expect(page.get_by_text("Acme is beneath Business now. Its usage came along.")).to_be_visible()
        expect(page.get_by_role("region", name="Limits")).to_contain_text("960 of 9,000 used")
        expect(page.get_by_role("navigation", name="Where this group is")).to_contain_text("Business")
        assert groups.get(acme.id).parent_id == business.id
        page.reload()
        page.get_by_role("button", name="Move", exact=True).click()
        dialog.get_by_label("Beneath").select_option("no group")
        dialog.get_by_role("button", name="Move").click()
        expect(page.get_by_text("Acme is beneath no group now.")).to_be_visible()
        assert groups.get(acme.id).parent_id is None

    def test_a_place_that_is_too_deep_meanwhile_is_refused(
        self, sign_in: SignIn, groups: GroupManager, acme: Group
    ) -> None:
        other = groups.create("Other")
        page = sign_in()
        open_group(page, acme)
        page.get_by_role("button", name="Move", exact=True).click()
        dialog = page.get_by_role("dialog", name="Move Acme")
        dialog.get_by_label("Beneath").select_option("Other")
        groups.update(other.id, parent=acme)
        dialog.get_by_role("button", name="Move").click()
        expect(dialog.get_by_role("alert")).to_contain_text("would be beneath itself")
        assert groups.get(acme.id).parent_id is not None

    def test_deleting_is_refused_with_the_reason(
        self, sign_in: SignIn, groups: GroupManager, plan: Group, acme: Group
    ) -> None:
        page = sign_in()
        page.get_by_role("button", name="Delete Pro").click()
        dialog = page.get_by_role("dialog", name="Delete Pro?")
        expect(dialog).to_contain_text("Pro can't be deleted: it has 1 customer. Delete or move it first.")
        expect(dialog.get_by_role("button", name="Delete the group")).to_have_count(0)
        dialog.get_by_role("link", name="Show it").click()
        expect(page.get_by_role("region", name="Customers")).to_contain_text("Acme")
        # somebody puts a group beneath it while the question is open
        open_group(page, acme)
        page.get_by_role("button", name="Delete Acme").click()
        delete = page.get_by_role("button", name="Delete the group")
        expect(delete).to_be_visible()
        groups.create("Branch", parent=acme)
        delete.click()
        expect(page.get_by_text("Acme can't be deleted: it has 1 group beneath.")).to_be_visible()
        assert groups.get(acme.id).name == "Acme"


class TestEditor:
    def test_plans_fill_it(self, sign_in: SignIn, groups: GroupManager, acme: Group) -> None:
        page = sign_in()
        page.get_by_role("button", name="New group").first.click()
        dialog = page.get_by_role("dialog", name="New group")
        dialog.get_by_role("button", name="Trial").click()
        expect(dialog.get_by_role("button", name="Trial")).to_have_attribute("aria-pressed", "true")
        expect(dialog.get_by_label("Name")).to_have_value("Trial")
        dialog.get_by_label("Name").fill("Gold")
        # what was typed is not replaced without a question
        dialog.get_by_role("button", name="Business").click()
        question = page.get_by_role("dialog", name="Start from Business?")
        question.get_by_role("button", name="Cancel").click()
        expect(dialog.get_by_label("Maximum").first).to_have_value("50")
        dialog.get_by_role("button", name="Business").click()
        question.get_by_role("button", name="Start from it").click()
        expect(dialog.get_by_label("Name")).to_have_value("Gold")
        row = dialog.get_by_role("group", name="Limit", exact=True).first
        expect(row.get_by_label("Who")).to_have_value("child")
        expect(row).to_contain_text("Each customer may use 5,000 images each month, shared by all its members.")
        row.get_by_label("Maximum").fill("6000")
        expect(row).to_contain_text("Each customer may use 6,000 images")
        dialog.get_by_label("Beneath").select_option(f"Pro {THEN} Acme")
        dialog.get_by_role("button", name="Create group").click()
        expect(page.get_by_text("Gold was created.")).to_be_visible()
        made = groups.get_by_name("Gold")
        assert made.parent_id == acme.id
        assert made.limits[0] == Limit(kind="image", max=6000, period="month", scope="child")

    def test_limits_from_above_are_said(self, sign_in: SignIn, groups: GroupManager, acme: Group) -> None:
        page = sign_in()
        page.get_by_role("button", name="Edit Acme").click()
        dialog = page.get_by_role("dialog", name="Edit group")
        above = dialog.get_by_role("list", name="Limits of the groups above")
        expect(above).to_contain_text(
            "From Pro: Each customer may use 1,000 credits each month, shared by all its members. "
            "An image takes 1 credit, a video 8."
        )
        expect(dialog.get_by_label("Maximum")).to_have_count(1)
        dialog.get_by_label("Description").fill("typed")
        groups.update(acme.id, parent=None)
        dialog.get_by_role("button", name="Save").click()
        expect(dialog.get_by_role("alert")).to_contain_text("beneath: Pro → none")
        dialog.get_by_role("button", name="reload").click()
        expect(above).to_have_count(0)


class TestExceptions:
    def test_of_a_customer_from_both_sides(
        self, sign_in: SignIn, groups: GroupManager, plan: Group, acme: Group
    ) -> None:
        page = sign_in()
        open_group(page, plan)
        customers = page.get_by_role("region", name="Customers")
        customers.get_by_role("button", name="Exceptions for Acme").click()
        dialog = page.get_by_role("dialog", name="Acme")
        allowance = dialog.get_by_role("group", name="Pro: 1,000 credits per month")
        allowance.get_by_label("Maximum").fill("lots")
        allowance.get_by_role("button", name="Set the exception").click()
        expect(allowance.get_by_text("A maximum is a whole number")).to_be_visible()
        allowance.get_by_label("Maximum").fill("5,000")
        allowance.get_by_label("Until").fill(NEXT_MONTH)
        allowance.get_by_role("button", name="Set the exception").click()
        expect(page.get_by_text("The exception for Acme was saved.")).to_be_visible()
        page.keyboard.press("Escape")
        expect(customers).to_contain_text("960 of 5,000 used")
        expect(customers.get_by_text("exception", exact=True)).to_be_visible()
        expect(page.get_by_role("region", name="Exceptions").last).to_contain_text("Acme")
        (override,) = groups.overrides(plan.id)
        assert (override.max, override.child_id) == (5000, acme.id)
        assert override.until is not None
        # a day of the plan's time zone
        assert override.until.astimezone(UTC).hour == 15

        open_group(page, acme)
        expect(page.get_by_role("region", name="Exceptions").last).to_contain_text("credits per month, from Pro")
        page.get_by_role("button", name="Exceptions", exact=True).click()
        expect(allowance.get_by_label("Maximum")).to_have_value("5000")
        allowance.get_by_role("button", name="Remove the exception").click()
        expect(page.get_by_text("Exception removed")).to_be_visible()
        assert list(groups.overrides(plan.id)) == []

    def test_of_a_whole_group(self, sign_in: SignIn, groups: GroupManager, acme: Group) -> None:
        page = sign_in()
        open_group(page, acme)
        page.get_by_role("button", name="Exceptions", exact=True).click()
        audio = page.get_by_role("dialog", name="Acme").get_by_role("group", name="5 audio in total")
        audio.get_by_label("unlimited").check()
        audio.get_by_role("button", name="Set the exception").click()
        expect(page.get_by_text("The exception for Acme was saved.")).to_be_visible()
        (override,) = groups.overrides(acme.id)
        assert (override.max, override.scope) == (None, "group")
        page.keyboard.press("Escape")
        exceptions = page.get_by_role("region", name="Exceptions").last
        expect(exceptions).to_contain_text("All together")
        exceptions.get_by_role("button", name="Remove the exception").click()
        page.get_by_role("button", name="Remove", exact=True).click()
        expect(page.get_by_role("heading", name="Exceptions")).to_have_count(0)
        assert list(groups.overrides(acme.id)) == []


class TestForEverybody:
    def test_the_focus_is_seen(self, sign_in: SignIn, plan: Group, acme: Group) -> None:
        page = sign_in()
        expect(page.get_by_role("article", name="Acme")).to_be_visible()
        page.keyboard.press("Tab")
        assert page.evaluate(CUT_OFF) == []
        for group in (plan, acme):
            open_group(page, group)
            expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
            page.keyboard.press("Tab")
            assert page.evaluate(CUT_OFF) == []
        page.get_by_role("button", name="Move", exact=True).click()
        expect(page.get_by_label("Beneath")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Move", exact=True)).to_be_focused()

    @pytest.mark.parametrize("theme", ["dark", "light"])
    @pytest.mark.parametrize("width", [360, 1280])
    def test_can_be_seen(
        self, sign_in: SignIn, groups: GroupManager, plan: Group, acme: Group, theme: Theme, width: int, tmp_path: Path
    ) -> None:
        groups.set_override(plan.id, "credits", 5000, child_id=acme.id)
        deep = acme
        for n in range(3):
            deep = groups.create(f"A name that is long, of level {n + 3}", parent=deep, limits={"image": 10**12})
        page = sign_in(theme=theme, width=width, reduced_motion="reduce")
        expect(page.get_by_role("article", name=deep.name)).to_be_visible()
        found: dict[str, list[object]] = {"tokens": problems(page)}
        dialogs = [
            (plan, ["New customer", "Delete Pro", "Exceptions for Acme"]),
            (acme, ["Edit", "Move", "New group beneath", "Exceptions"]),
            (deep, ["Edit"]),
        ]
        for group, names in dialogs:
            open_group(page, group)
            expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
            found[group.name] = problems(page)
            page.screenshot(path=tmp_path / f"{group.name[-1]}.png", full_page=True)
            for name in names:
                page.get_by_role("button", name=name, exact=True).click()
                expect(page.locator("#dialog-title")).to_be_visible()
                expect(page.locator(".htmx-request, [aria-busy=true]")).to_have_count(0)
                found[f"{group.name}, {name}"] = problems(page)
                page.keyboard.press("Escape")
                expect(page.locator("#dialog-title")).to_have_count(0)
        assert {place: each for place, each in found.items() if each} == {}
        fits(page)
