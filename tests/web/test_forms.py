"""What is typed, what a chart shows, and what is exported: pure functions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pytest
from starlette.datastructures import FormData, UploadFile

from tokenlimits import InvalidRequest, Limit
from tokenlimits.errors import GroupExists
from tokenlimits.models import Group, GroupUsage, HistoryPoint
from tokenlimits.web.panel import _charts
from tokenlimits.web.panel._forms import _TWICE, GroupForm, ids, pasted
from tokenlimits.web.panel._limit_rows import TYPED, LimitRow
from tokenlimits.web.panel._plans import PLANS, Plan
from tokenlimits.web.panel._tree import Tree
from tokenlimits.web.panel._views import branches, cards


def group_with(limit: Limit) -> Group:
    now = datetime.now(UTC)
    given = {"id": uuid4(), "name": "Pro", "description": "", "priority": 0, "timezone": "UTC", "is_default": False}
    return Group.model_validate({**given, "created_at": now, "updated_at": now, "limits": [limit.model_dump()]})


def typed(**fields: str) -> FormData:
    given = {"name": "Pro", "description": "", "priority": "0", "timezone": "UTC"}
    limit = {"kind": "image", "max": "10", "number": "1", "unit": "day", "scope": "group", "starts": "calendar"}
    limit |= {"mode": "enforce", "counts": "", "unlimited": "no"}
    return FormData(list((given | limit | fields).items()))


class TestGroupForm:
    def test_is_read_as_the_library_takes_it(self) -> None:
        form, fields = GroupForm.of_typed(typed(max="1,000", is_default="on", priority="-3")).checked()
        assert form.is_good()
        assert fields == {
            "name": "Pro",
            "description": "",
            "priority": -3,
            "timezone": "UTC",
            "is_default": True,
            "limits": [Limit(kind="image", max=1000, period="day")],
        }

    def test_a_new_group_may_be_spread(self) -> None:
        form, fields = GroupForm.of_typed(typed(is_spread="on", scope="member")).checked()
        assert (form.is_spread, fields["is_spread"]) == (True, True)
        assert "is_spread" not in GroupForm.of_typed(typed()).checked()[1]

    @pytest.mark.parametrize(
        ("text", "max_"),
        [("1,000", 1000), ("12,000,000", 12_000_000), ("1 000", 1000), ("1\u202f000", 1000), ("1_000", 1000), ("0", 0)],
    )
    def test_thousands_are_separated(self, text: str, max_: int) -> None:
        _, fields = GroupForm.of_typed(typed(max=text)).checked()
        assert fields["limits"][0].max == max_

    def test_an_anchor_is_sent_only_if_it_was_changed(self) -> None:
        """It may have a time of day, which a day would lose."""
        at = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
        group = group_with(Limit(kind="image", max=1, period="month", starts="anchor")).model_copy(
            update={"anchor_at": at, "timezone": "Asia/Tokyo"}
        )
        shown = GroupForm.of_group(group)
        assert (shown.anchor, shown.is_anchored) == ("2026-01-31", True)
        sent = {"before": shown.before, "timezone": "Asia/Tokyo"}
        _, kept = GroupForm.of_typed(typed(**sent, anchor=shown.anchor)).checked()
        _, moved = GroupForm.of_typed(typed(**sent, anchor="2026-02-01")).checked()
        _, removed = GroupForm.of_typed(typed(**sent, anchor="")).checked()
        assert "anchor_at" not in kept
        assert moved["anchor_at"] == datetime(2026, 1, 31, 15, tzinfo=UTC)
        assert removed["anchor_at"] is None
        assert "anchor_at" not in GroupForm.of_typed(typed(anchor="")).checked()[1]

    @pytest.mark.parametrize("text", ["31.1.2026", "2026-02-30", "tomorrow"])
    def test_an_anchor_is_a_day(self, text: str) -> None:
        form, fields = GroupForm.of_typed(typed(anchor=text)).checked()
        assert (list(form.errors), fields) == (["anchor"], {})

    @pytest.mark.parametrize("text", ["10,00", "1,5", "1,0000", "1000,000", ",100", "1,", "1.000", "1,000 000"])
    def test_a_decimal_is_not_made_whole(self, text: str) -> None:
        form, fields = GroupForm.of_typed(typed(max=text)).checked()
        assert (form.rows[0].wrong, fields) == ("max", {})

    def test_unlimited_needs_no_maximum(self) -> None:
        _, fields = GroupForm.of_typed(typed(max="", unlimited="yes")).checked()
        assert fields["limits"][0].max is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("name", ""),
            ("name", "x" * 201),
            ("name", "Pro\u200b"),
            ("name", "\u202eorP"),
            ("description", "x" * 2001),
            ("priority", "high"),
            ("timezone", ""),
            ("timezone", "CET"),
        ],
    )
    def test_says_what_is_wrong_beside_the_field(self, field: str, value: str) -> None:
        form, fields = GroupForm.of_typed(typed(**{field: value})).checked()
        assert list(form.errors) == [field]
        assert fields == {}

    @pytest.mark.parametrize(
        ("typed_", "wrong", "words"),
        [
            ({"kind": "Image"}, "kind", "32"),
            ({"kind": ""}, "kind", "32"),
            ({"max": ""}, "max", "whole number"),
            ({"max": "-1"}, "max", "whole number"),
            ({"max": "1.5"}, "max", "whole number"),
            ({"max": "²"}, "max", "whole number"),
            ({"max": "1" + 15 * "0" + "1"}, "max", "whole number"),
            ({"number": "0"}, "period", "366"),
            ({"number": "367", "starts": "rolling"}, "period", "366"),
            ({"number": "2", "unit": "year"}, "period", "1 year"),
            ({"unit": "fortnight"}, "period", "366"),
            ({"number": "3"}, "starts", "select “Rolling” or “From first use” or “From an anchor”."),
            ({"unit": "month", "starts": "rolling"}, "starts", "select “By the calendar” or “From first use” or"),
            ({"number": "3", "unit": "month", "starts": "first_use"}, "starts", "select “From an anchor”."),
            ({"unit": "lifetime", "starts": "anchor"}, "starts", "select “By the calendar”."),
            ({"unit": "in_flight", "starts": "rolling"}, "starts", "select “By the calendar”."),
            ({"unit": "in_flight", "counts": "image 1"}, "counts", "leave this empty"),
            ({"scope": "team"}, "scope", "not valid"),
            ({"mode": "off"}, "mode", "not valid"),
            ({"counts": "image 0"}, "counts", "1 to 50 kinds"),
            ({"counts": "image 1, image 2"}, "counts", "1 to 50 kinds"),
            ({"counts": "Image 1"}, "counts", "1 to 50 kinds"),
            ({"counts": "image 1.5"}, "counts", "1 to 50 kinds"),
            ({"counts": ","}, "counts", "1 to 50 kinds"),
            ({"counts": ",".join(f"kind_{n}" for n in range(51))}, "counts", "1 to 50 kinds"),
        ],
    )
    def test_says_what_is_wrong_below_the_limit(self, typed_: dict[str, str], wrong: str, words: str) -> None:
        form, fields = GroupForm.of_typed(typed(**typed_)).checked()
        (row,) = form.rows
        assert words in row.error
        assert (row.wrong, fields) == (wrong, {})
        # while it is typed, what is not there yet is no mistake
        assert LimitRow.of_typed(typed(**typed_))[0].sentence == ("" if wrong in ("kind", "max") else row.error)

    @pytest.mark.parametrize("text", ["image 1, video 8", "image, video=8", "image:1;video: 8", " image  1 ,video 8"])
    def test_a_pool_is_kinds_with_their_weights(self, text: str) -> None:
        _, fields = GroupForm.of_typed(typed(counts=text)).checked()
        assert fields["limits"][0].counts == {"image": 1, "video": 8}

    @pytest.mark.parametrize(
        "limit",
        [
            Limit(kind="image", max=None),
            Limit(kind="image", max=0, period="year", scope="member"),
            Limit(kind="image", max=7, period="month", scope="child", starts="anchor"),
            Limit(kind="video", max=2, period="in_flight", scope="member"),
            Limit(kind="image", max=10**15, period="24 months", starts="anchor", mode="observe"),
            Limit(kind="credits", max=9, period="5 hours", starts="first_use", counts={"image": 1, "video": 1_000_000}),
            Limit(kind="a", max=9, period="week", starts="rolling", counts={f"kind_{n}": n + 1 for n in range(50)}),
        ],
    )
    def test_saving_what_is_shown_loses_nothing(self, limit: Limit) -> None:
        """Of any limit, each field comes back as it was; a new field of limits must get a place in the form."""
        shown = GroupForm.of_group(group_with(limit))
        sent: list[tuple[str, str | UploadFile]] = [(name, getattr(shown, name)) for name in ("name", "timezone")]
        sent += [("priority", "0"), *((name, getattr(row, name)) for row in shown.rows for name in TYPED)]
        _, fields = GroupForm.of_typed(FormData(sent)).checked()
        assert fields["limits"] == [limit]
        assert {"kind", "max", "period", "scope", "starts", "mode", "counts"} == set(Limit.model_fields)

    @pytest.mark.parametrize("missing", ["starts", "mode", "counts", "number"])
    def test_a_page_of_an_older_panel_loses_nothing(self, missing: str) -> None:
        sent = FormData([(name, value) for name, value in typed().multi_items() if name != missing])
        with pytest.raises(InvalidRequest, match="reload"):
            GroupForm.of_typed(sent)

    def test_says_what_others_changed_of_a_limit(self) -> None:
        pool = Limit(kind="credits", max=1000, period="5 hours", starts="rolling", counts={"image": 1, "video": 8})
        form = GroupForm.of_group(group_with(pool))
        now = group_with(pool.model_copy(update={"mode": "observe", "counts": {"image": 2}}))
        assert form.changed_meanwhile(now) == [
            "credits in any 5 hours: 1,000, image by 1, video by 8 → 1,000, image by 2, only observed"
        ]

    def test_says_what_the_database_said(self) -> None:
        form = GroupForm(rows=[LimitRow("a"), LimitRow("a")])
        assert form.refused(GroupExists("…")).errors == {"name": "Another group has this name."}
        assert form.refused(InvalidRequest("…", detail="timezone")).errors == {
            "timezone": "This time zone doesn't exist."
        }
        for place in ("parent", "parent_id"):
            assert list(form.refused(InvalidRequest("…", detail=place)).errors) == ["parent"]
        twice = form.refused(InvalidRequest("…", detail="limits[1]"))
        assert [row.error for row in twice.rows] == ["", _TWICE]
        assert form.refused(InvalidRequest("something else")).errors == {"": "something else"}


class TestPlans:
    @pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.key)
    def test_each_is_a_group_that_can_be_created(self, plan: Plan) -> None:
        form, fields = plan.form("", "").checked()
        assert form.is_good()
        assert (fields["name"], fields["limits"]) == (plan.name, list(plan.limits))
        assert all(row.sentence for row in form.rows)

    def test_a_name_that_was_typed_stays(self) -> None:
        assert PLANS[0].form("Gold", "").name == "Gold"
        # it was another plan's
        assert PLANS[0].form(PLANS[1].name, "").name == PLANS[0].name

    def test_what_is_beneath_stays(self) -> None:
        parent = str(uuid4())
        assert PLANS[0].form("", parent).checked()[1]["parent"] == parent
        assert "parent" not in PLANS[0].form("", "").checked()[1]


class TestTree:
    def chain(self, length: int) -> list[Group]:
        """Groups, each beneath the one before."""
        found: list[Group] = []
        for n in range(length):
            group = group_with(Limit(kind="image", max=1))
            parent = found[-1].id if found else None
            found.append(group.model_copy(update={"name": f"Level {n + 1}", "parent_id": parent}))
        return found

    def test_names_the_way(self) -> None:
        chain = self.chain(3)
        tree = Tree(chain)
        assert [group.name for group in tree.above(chain[2].id)] == ["Level 1", "Level 2"]
        assert tree.path(chain[1].id).split(" \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} ") == [
            "Level 1",
            "Level 2",
        ]

    def test_a_group_fits_where_it_is_not_too_deep(self) -> None:
        deep, moved = self.chain(5), self.chain(2)
        tree = Tree([*deep, *moved])
        places = {place.id for place in tree.places(moved[0].id)}
        assert places == {group.id for group in deep[:3]}
        # a new one, with nothing beneath it
        assert {place.id for place in tree.places()} == {group.id for group in [*deep[:4], *moved]}

    def test_what_is_moved_while_it_is_read_ends(self) -> None:
        one, two = self.chain(2)
        circle = [one.model_copy(update={"parent_id": two.id}), two]
        assert [group.id for group in Tree(circle).above(two.id)] == [one.id]
        usages = [
            GroupUsage.model_validate({"group": {"id": each.id}, "member_count": 0, "limits": []}) for each in circle
        ]
        assert branches(cards(circle, usages), "name") == []
        assert len(branches(cards(circle, usages), "name", flat=True)) == 2

    def test_a_group_whose_parent_is_not_listed_is_at_the_top(self) -> None:
        _, two = self.chain(2)
        usage = GroupUsage.model_validate({"group": {"id": two.id}, "member_count": 0, "limits": []})
        assert [branch.card.group.id for branch in branches(cards([two], [usage]), "name")] == [two.id]


class TestPasted:
    def test_is_taken_apart(self) -> None:
        one, two = uuid4(), uuid4()
        found = pasted(f'id,email\n"{one}","ann@example.com"\n{two}; {two}\tBOB@example.com')
        assert found.ids == [one, two]
        assert found.emails == ["ann@example.com", "BOB@example.com"]
        assert found.unknown == ["id", "email"]

    @pytest.mark.parametrize(
        ("text", "emails"),
        [
            ("o'x@example.com", ["o'x@example.com"]),
            ("'ann@example.com', 'bob@example.com'", ["ann@example.com", "bob@example.com"]),
            ("First Last <a@example.com>, Other <b@example.com>;", ["a@example.com", "b@example.com"]),
            ('"Last, First" <a@example.com>; b@example.com', ["a@example.com", "b@example.com"]),
            ("\"O'Neil, Ann\" <o'neil@example.com>", ["o'neil@example.com"]),
            ("Ann <mailto:a@example.com>", ["a@example.com"]),
            ("<a@example.com> <b@example.com>", ["a@example.com", "b@example.com"]),
            ('"a@example.com","Ann"', ["a@example.com"]),
            ("a@example.com\r\nb@example.com\rc@example.com", ["a@example.com", "b@example.com", "c@example.com"]),
        ],
    )
    def test_nobody_else_is_read_from_an_address(self, text: str, emails: list[str]) -> None:
        assert pasted(text).emails == emails

    def test_nothing_is_nothing(self) -> None:
        assert pasted(" \n,") == pasted("")

    def test_what_was_ticked_must_be_ids(self) -> None:
        with pytest.raises(InvalidRequest, match="member"):
            ids(FormData([("member", "x")]), "member")


class TestCharts:
    NOW = datetime(2026, 3, 29, 12, 34, 56, tzinfo=UTC)

    @pytest.mark.parametrize(("step", "count"), [("hour", 48), ("day", 30), ("month", 12)])
    @pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "Asia/Kolkata", "America/Havana", "Nowhere/Land"])
    def test_has_no_gaps(self, step: _charts.Step, count: int, zone: str) -> None:
        found = _charts.buckets(step, zone, self.NOW)
        assert len(found) == count
        assert found == sorted(set(found))
        assert found[-1] <= self.NOW

    def test_days_are_of_the_groups_time_zone(self) -> None:
        # the night in which Paris set its clocks forward
        midnight = datetime(2026, 3, 28, 23, tzinfo=UTC)
        point = HistoryPoint(bucket=midnight, kind="image", used=5, generations=1)
        shown = _charts.chart([point], "day", "Europe/Paris", self.NOW)
        assert (shown["labels"][1], shown["labels"][-1]) == ("Mar 1", "Mar 29")
        assert shown["kinds"] == [{"kind": "image", "used": [0] * 29 + [5]}]

    def test_an_hour_that_is_repeated_is_two(self) -> None:
        # clocks in Paris went back from 03:00 to 02:00
        first = datetime(2026, 10, 25, 0, tzinfo=UTC)
        points = [
            HistoryPoint(bucket=first + timedelta(hours=n), kind="image", used=n + 1, generations=1) for n in range(3)
        ]
        shown = _charts.chart(points, "hour", "Europe/Paris", first + timedelta(hours=2, minutes=5))
        assert shown["labels"][-4:] == ["Oct 25, 01:00", "Oct 25, 02:00 (CEST)", "Oct 25, 02:00 (CET)", "Oct 25, 03:00"]
        assert shown["kinds"][0]["used"][-4:] == [0, 1, 2, 3]

    def test_no_label_is_repeated_where_clocks_go_forward(self) -> None:
        now = datetime(2026, 3, 29, 3, 5, tzinfo=UTC)
        assert _charts.chart([], "hour", "Europe/Paris", now)["labels"][-3:] == [
            "Mar 29, 03:00",
            "Mar 29, 04:00",
            "Mar 29, 05:00",
        ]

    def test_says_where_it_does_not_know_the_time_zone(self) -> None:
        assert _charts.chart([], "day", "Europe/Paris", self.NOW)["note"] is None
        assert "no data for the time zone Nowhere/Land" in _charts.chart([], "day", "Nowhere/Land", self.NOW)["note"]

    def test_without_time_zone_data_utc_needs_no_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(name: str) -> ZoneInfo:
            raise ZoneInfoNotFoundError(name)

        monkeypatch.setattr(_charts, "ZoneInfo", unknown)
        assert _charts.chart([], "hour", "UTC", self.NOW)["note"] is None
        assert "tzdata" in _charts.chart([], "hour", "Europe/Paris", self.NOW)["note"]

    def test_trends_compare_with_the_month_before(self) -> None:
        points = [
            HistoryPoint(bucket=self.NOW - timedelta(days=days), kind=kind, used=used, generations=1)
            for days, kind, used in [(40, "image", 10), (3, "image", 15), (2, "video", 1)]
        ]
        found = {trend.kind: (trend.used, trend.change) for trend in _charts.trends(points, self.NOW)}
        assert found == {"image": (15, 50), "video": (1, None)}
