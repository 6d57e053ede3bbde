"""Plans and customers in the panel: the tree of groups, new customers, moves, and what is said of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.web.conftest import SignIn, Theme, open_group
from tests.web.test_browser import fits
from tests.web.test_exceptions import problems
from tests.web.test_looks import CUT_OFF

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.models import Group

pytestmark = pytest.mark.slow

THEN = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"


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
        groups.create("Zeta", parent=groups.create("Alpha"))
        half = groups.create("Half", limits={"speech": 10})
        groups.add_member(half.id, user.id)
        limits.track(user.id, "speech", 8)
        page = sign_in()
        expect(page.locator("article h2")).to_have_text(["Alpha", "Zeta", "Pro", "Acme", "Beta", "Half"])
        page.get_by_label("Sort by").select_option("usage")
        expect(page.locator("article h2")).to_have_text(["Pro", "Acme", "Beta", "Half", "Alpha", "Zeta"])

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
