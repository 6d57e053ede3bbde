"""Exceptions in the panel: another maximum for one member, and the reset of one member."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.web.chromium import axe
from tests.web.conftest import SignIn, Theme
from tests.web.test_browser import QUIET, fits

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalUser
from tokenlimits.models import Group, Scope

pytestmark = pytest.mark.slow

SCOPES: tuple[Scope, ...] = ("group", "member")
NEXT_MONTH = (datetime.now(UTC) + timedelta(days=30)).date().isoformat()


def open_member(page: Page, group: Group, user: LocalUser) -> None:
    if not page.url.endswith(str(group.id)):
        page.goto(f"{page.url}groups/{group.id}")
    page.get_by_role("button", name="Members", exact=True).click()
    page.get_by_role("button", name=f"Exceptions for {user.email}").click()
    expect(page.get_by_role("dialog", name=user.email)).to_be_visible()


class TestExceptions:
    def test_are_set_shown_and_removed(
        self, sign_in: SignIn, groups: GroupManager, group: Group, user: LocalUser
    ) -> None:
        page = sign_in()
        expect(page.get_by_role("article", name="Studio")).to_be_visible()
        page.goto(f"{page.url}groups/{group.id}")
        expect(page.get_by_role("heading", name="Limits")).to_be_visible()
        expect(page.get_by_role("heading", name="Exceptions")).to_have_count(0)
        open_member(page, group, user)
        video = page.get_by_role("group", name="4 video per hour")
        video.get_by_label("Maximum").fill("many")
        page.get_by_role("button", name="Set the exception: video").click()
        expect(page.get_by_text("A maximum is a whole number")).to_be_visible()
        video.get_by_label("Maximum").fill("1,000")
        video.get_by_label("Until").fill(NEXT_MONTH)
        page.get_by_role("button", name="Set the exception: video").click()
        expect(page.get_by_text(f"The exception for {user.email} was saved.")).to_be_visible()
        expect(video.get_by_text("active")).to_be_visible()
        expect(video.get_by_label("Until")).to_have_value(NEXT_MONTH)
        (override,) = groups.overrides(group.id)
        assert (override.max, override.user_id) == (1000, user.id)
        assert override.until is not None
        assert override.until.isoformat() == f"{NEXT_MONTH}T00:00:00+00:00"

        page.get_by_role("button", name="Members", exact=True).last.click()
        row = page.get_by_role("listitem").filter(has_text=user.email)
        expect(row.get_by_text("exception", exact=True)).to_be_visible()
        page.keyboard.press("Escape")
        exceptions = page.get_by_role("region", name="Exceptions").last
        expect(exceptions).to_contain_text("1,000")
        exceptions.get_by_role("button", name="Remove the exception").click()
        page.get_by_role("button", name="Remove", exact=True).click()
        expect(page.get_by_role("heading", name="Exceptions")).to_have_count(0)
        assert list(groups.overrides(group.id)) == []

    def test_anchors_are_set_and_removed(self, sign_in: SignIn, groups: GroupManager, user: LocalUser) -> None:
        limits = [Limit(kind="image", max=5, period="month", starts="anchor", scope=scope) for scope in SCOPES]
        group = groups.create("Agency", limits=limits, timezone="Asia/Tokyo")
        groups.add_member(group.id, user.id)
        page = sign_in()
        expect(page.get_by_role("article", name="Agency")).to_be_visible()
        open_member(page, group, user)
        assert problems(page) == []
        page.get_by_label("Anchored periods are counted from").fill("2026-01-31")
        page.get_by_role("button", name="Set the anchor").click()
        expect(page.get_by_text("Anchor saved.")).to_be_visible()
        (member,) = groups.members(group.id)
        assert member.anchor_at == datetime(2026, 1, 30, 15, tzinfo=UTC)
        page.keyboard.press("Escape")

        page.get_by_role("button", name="Edit", exact=True).click()
        page.get_by_label("Anchored periods are counted from").fill("2026-02-28")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Agency was saved.")).to_be_visible()
        assert groups.get(group.id).anchor_at == datetime(2026, 2, 27, 15, tzinfo=UTC)
        page.get_by_role("button", name="Edit", exact=True).click()
        expect(page.get_by_label("Anchored periods are counted from")).to_have_value("2026-02-28")
        assert problems(page) == []
        page.get_by_label("Anchored periods are counted from").fill("")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("dialog", name="Edit group")).to_be_hidden()
        assert groups.get(group.id).anchor_at is None

    def test_one_member_is_reset(self, sign_in: SignIn, limits: TokenLimits, group: Group, user: LocalUser) -> None:
        page = sign_in()
        expect(page.get_by_role("article", name="Studio")).to_be_visible()
        open_member(page, group, user)
        page.get_by_role("dialog", name=user.email).get_by_role("button", name="Reset usage").click()
        page.get_by_role("dialog", name="Reset the usage of").get_by_role("button", name="Reset usage").click()
        expect(page.get_by_text("Usage reset.")).to_be_visible()
        used = {(limit.kind, limit.scope): limit.used for limit in limits.usage(user.id) if limit.group.id == group.id}
        assert (used["video", "member"], used["image", "group"]) == (0, 80)

    @pytest.mark.parametrize("theme", ["dark", "light"])
    @pytest.mark.parametrize("width", [360, 1280])
    def test_can_be_seen_by_everybody(
        self,
        sign_in: SignIn,
        groups: GroupManager,
        group: Group,
        user: LocalUser,
        theme: Theme,
        width: int,
        tmp_path: Path,
    ) -> None:
        groups.set_override(group.id, "video", 1000, user_id=user.id, until=datetime.now(UTC) + timedelta(days=9))
        groups.set_override(group.id, "image", None)
        page = sign_in(theme=theme, width=width, reduced_motion="reduce")
        expect(page.get_by_role("article", name="Studio")).to_be_visible()
        page.goto(f"{page.url}groups/{group.id}")
        expect(page.get_by_role("heading", name="Exceptions")).to_be_visible()
        expect(page.locator(".chart:not([aria-busy])")).to_be_visible()
        found = [*problems(page)]
        page.locator("#exceptions").screenshot(path=tmp_path / "exceptions.png")
        open_member(page, group, user)
        expect(page.locator(".htmx-request, [aria-busy=true]")).to_have_count(0)
        found += problems(page)
        page.screenshot(path=tmp_path / "member.png")
        page.get_by_role("button", name="Members", exact=True).last.click()
        expect(page.get_by_role("listitem").filter(has_text=user.email)).to_be_visible()
        found += problems(page)
        page.screenshot(path=tmp_path / "members.png")
        assert found == []


def problems(page: Page) -> list[object]:
    fits(page)
    page.evaluate(QUIET)
    page.evaluate(axe())
    violations = page.evaluate("axe.run()")["violations"]
    return [
        (each["id"], node["target"])
        for each in violations
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
