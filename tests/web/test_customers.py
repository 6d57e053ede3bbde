"""A plan's page and its customers in the panel: the way up and down, new customers, moves, exceptions."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import expect
from tests.web.conftest import CREDITS, SignIn, open_group

from tokenlimits import GroupManager
from tokenlimits.models import Group

pytestmark = pytest.mark.slow

NEXT_MONTH = (datetime.now(UTC) + timedelta(days=30)).date().isoformat()


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
