"""Groups beneath groups: plans, customers, and their limits and overrides."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from tests.cli.conftest import Program

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack
from tokenlimits.models import Group

CREDITS = Limit(kind="credits", max=1000, period="month", scope="child", counts={"image": 1, "video": 8})


@pytest.fixture
def plan(groups: GroupManager, name: str) -> Group:
    opened = Limit(kind="image", max=50, period="day", scope="child", starts="first_use")
    return groups.create(name, limits=[CREDITS, opened])


@pytest.fixture
def acme(groups: GroupManager, plan: Group) -> Group:
    return groups.create(f"{plan.name} Acme", parent=plan)


@pytest.fixture
def ann(stack: LocalStack, groups: GroupManager, acme: Group) -> UUID:
    """Somebody in Acme."""
    ann = stack.create_user(f"{uuid4()}@example.com").id
    groups.add_member(acme.id, ann)
    return ann


def test_a_group_is_made_beneath_another_and_moved(tl: Program, groups: GroupManager, plan: Group, name: str) -> None:
    created = tl("groups", "create", f"{name} B", "--parent", plan.name.upper()).stdout
    assert "This group has no limits of its own; those of the groups above it apply." in created
    beta = groups.get_by_name(f"{name} B")
    assert beta.parent_id == plan.id
    assert f"parent       {plan.name} " in tl("groups", "show", beta.name).stdout
    assert "beneath it   1 group" in tl("groups", "show", plan.name).stdout

    tl("groups", "edit", beta.name, "--priority", "3")
    assert groups.get(beta.id).parent_id == plan.id
    assert tl.json("groups", "edit", beta.name, "--no-parent")["parent_id"] is None
    assert "parent" not in tl("groups", "show", beta.name).stdout
    assert "beneath it" not in tl("groups", "show", plan.name).stdout
    assert tl.json("groups", "edit", beta.name, "--parent", str(plan.id))["parent_id"] == str(plan.id)


def test_what_cannot_be_beneath_what_is_said(tl: Program, plan: Group, acme: Group) -> None:
    assert "would be beneath itself" in tl.fails("groups", "edit", plan.name, "--parent", acme.name)
    both = tl.fails("groups", "edit", acme.name, "--parent", plan.name, "--no-parent", status=2)
    assert "either --parent or --no-parent" in both
    assert "no group named" in tl.fails("groups", "create", "Nobody makes this", "--parent", "Nobody made this")
    assert "has 1 child group" in tl.fails("groups", "delete", plan.name, "--yes")


def test_groups_are_listed_as_a_tree(tl: Program, groups: GroupManager, plan: Group, acme: Group) -> None:
    last = groups.create(f"{plan.name} !", parent=acme)
    beside = groups.create(f"{plan.name} Beta", parent=plan)
    lines = tl("groups", "list", "--search", plan.name).stdout.splitlines()
    in_order = [(0, plan), (1, acme), (2, last), (1, beside)]
    assert len(lines) == 1 + len(in_order)
    for line, (level, group) in zip(lines[1:], in_order, strict=True):
        assert line.startswith(f"{'  ' * level}{group.name}  ")
        assert str(group.id) in line
    beneath = tl("groups", "list", "--parent", plan.name).stdout
    assert beneath.index(acme.name) < beneath.index(beside.name)
    assert str(last.id) not in beneath
    listed = tl.json("groups", "list", "--parent", plan.name)
    assert [each["parent_id"] for each in listed] == [str(plan.id)] * 2
    assert f"no groups beneath {last.name}" in tl("groups", "list", "--parent", last.name).stdout


def test_limits_for_each_customer(tl: Program, groups: GroupManager, name: str) -> None:
    groups.create(name)
    set_ = tl("limits", "set", name, "credits=1000/month/child/image:1+video:8").stdout
    assert "credits/month/child: none → 1,000/image:1+video:8\n" in set_
    assert "1,000 a month for each customer: 1 an image, 8 a video" in set_
    assert (
        "credits/month/child: 1,000/image:1+video:8 → 2,000"
        in tl("limits", "set", name, "credits=2000/month/child").stdout
    )
    assert groups.get_by_name(name).limits == (CREDITS.model_copy(update={"max": 2000}),)
    assert "Remove credits/month/child from" in tl.fails("limits", "remove", name, "credits/child")


def test_usage_shows_what_a_customer_has_of_the_plan(
    tl: Program, limits: TokenLimits, plan: Group, acme: Group, ann: UUID
) -> None:
    assert limits.track(ann, "video", 5)
    of_plan, of_acme = (tl("usage", each.name).stdout for each in (plan, acme))
    assert "1,000 a month for each customer" in of_plan
    assert f"1,000 a month, of {plan.name}" in of_acme
    assert "customer" not in of_acme
    for shown in (of_plan, of_acme):
        (line,) = [line for line in shown.splitlines() if "credits" in line]
        assert " 40  1,000" in line
        assert "960" in line
    (line,) = [line for line in of_plan.splitlines() if "50 a day for each customer, from the first use" in line]
    assert line.rstrip().endswith("varies")
    (line,) = [line for line in of_acme.splitlines() if f"50 a day, from the first use, of {plan.name}" in line]
    assert line.rstrip().endswith("not started")
    (shown,) = tl.json("usage", acme.name)
    assert (shown["parent_id"], shown["child_count"]) == (str(plan.id), 0)
    assert {limit["group"]["name"] for limit in shown["limits"]} == {plan.name}
    assert plan.name in tl("usage", "--user", ann).stdout
    assert "used by this customer this month" in tl("track", ann, "video", "--cost", "121", status=1).stdout


def test_what_only_observes_is_of_its_plan(
    tl: Program, groups: GroupManager, plan: Group, acme: Group, ann: UUID
) -> None:
    groups.set_limits(plan.id, [CREDITS, Limit(kind="video", max=1, period="day", scope="child", mode="observe")])
    shown = tl("track", ann, "video", "--cost", "2").stdout
    assert f"would deny  video, 1 a day, observed, of {plan.name}: 2 used" in shown
    assert f"paid by     {acme.name}" in shown


def test_an_override_of_a_customer(
    tl: Program, groups: GroupManager, limits: TokenLimits, plan: Group, acme: Group, ann: UUID
) -> None:
    done = tl("overrides", "set", plan.name, "credits=8/month", "--child", acme.name, "--until", "30d").stdout
    assert f"{acme.name}, credits/month/child: 8 until " in done
    assert not limits.check(ann, "video", 2)
    assert acme.name in tl("overrides", "list", plan.name).stdout
    (one,) = tl.json("overrides", "list", plan.name, "--child", acme.id)
    assert (one["child_id"], one["child_name"], one["user_id"], one["max"]) == (str(acme.id), acme.name, None, 8)
    groups.update(acme.id, parent=None)
    assert [each["status"] for each in tl.json("overrides", "list", plan.name)] == ["sleeping"]
    groups.update(acme.id, parent=plan)
    removed = tl("overrides", "remove", plan.name, "credits/child", "--child", acme.name, "--yes").stdout
    assert f"the limit's own max applies to {acme.name} again" in removed
    assert limits.check(ann, "video", 2)
    assert f"{acme.name} has no such override" in tl.fails(
        "overrides", "remove", plan.name, "credits", "--child", acme.name, "--yes"
    )


def test_what_is_wrong_with_an_override_of_a_customer_is_said(
    tl: Program, groups: GroupManager, plan: Group, acme: Group, name: str
) -> None:
    child = ("--child", acme.name)
    groups.create(f"{name} elsewhere")
    elsewhere = tl.fails("overrides", "set", plan.name, "credits=1", "--child", f"{name} elsewhere")
    assert "is not directly beneath the group" in elsewhere
    assert "pass --child with a child limit" in tl.fails("overrides", "set", plan.name, "credits=1/child")
    assert "pass --user with a member limit" in tl.fails("overrides", "set", plan.name, "credits=1/member", *child)
    assert "leave out group, or --child" in tl.fails("overrides", "set", plan.name, "credits=1/group", *child)
    for command in (("set", plan.name, "credits=1"), ("remove", plan.name, "credits"), ("list", plan.name)):
        both = tl.fails("overrides", *command, *child, "--user", str(uuid4()), status=2)
        assert "either --user or --child" in both


def test_a_customer_is_reset(tl: Program, limits: TokenLimits, plan: Group, acme: Group, ann: UUID) -> None:
    limits.track(ann, "video", 5)
    tl("groups", "reset", plan.name, "--yes")
    assert limits.usage(ann)[0].used == 40
    tl("groups", "reset", acme.name, "--yes")
    assert limits.usage(ann)[0].used == 0


def test_a_spread_group_has_member_limits_only(tl: Program, groups: GroupManager, name: str) -> None:
    made = tl.json("groups", "create", f"{name} Free", "--spread", "--limit", "image=10/day/member")
    assert made["is_spread"]
    assert groups.get_by_name(f"{name} Free").is_spread
    assert "must be member in a spread group" in tl.fails("limits", "set", f"{name} Free", "image=10/day/group")
