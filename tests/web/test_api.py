"""What the API answers, and to whom."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI
from tests.web.conftest import served, settings_for

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import WebSettings, create_app, router

Ask = Callable[..., httpx.Response]

PROBLEM = "application/problem+json"


def problem(answer: httpx.Response, status: int, name: str) -> dict[str, object]:
    """Check that an answer is a problem, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    body = answer.json()
    assert body["type"] == f"urn:tokenlimits:problem:{name}"
    assert body["status"] == status
    return body


class TestGroups:
    def test_are_created_read_edited_and_deleted(self, api: Ask, groups: GroupManager) -> None:
        limit = {"kind": "image", "max": 50, "period": "day", "scope": "member"}
        made = api("admin", "POST", "/groups", json={"name": "Pro", "timezone": "Europe/Paris", "limits": [limit]})
        assert made.status_code == 201
        path = f"/groups/{made.json()['id']}"
        assert made.json()["limits"] == [{**limit, "starts": "calendar", "counts": None, "mode": "enforce"}]
        assert api("admin", "GET", path).json() == made.json()
        edited = api("admin", "PATCH", path, json={"description": "…", "limits": {"video": 3, "image": None}})
        assert edited.json()["name"] == "Pro"
        assert [(limit["kind"], limit["max"]) for limit in edited.json()["limits"]] == [("image", None), ("video", 3)]
        assert api("admin", "DELETE", path).json()["id"] == made.json()["id"]
        problem(api("admin", "GET", path), 404, "group-not-found")
        assert groups.list() == []

    def test_creating_one_is_repeatable(self, api: Ask, groups: GroupManager) -> None:
        key = {"Idempotency-Key": "signup-1"}
        body = {"name": "Pro", "limits": {"image": 1}}
        first = api("admin", "POST", "/groups", json=body, headers=key)
        again = api("admin", "POST", "/groups", json=body, headers=key)
        assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
        problem(api("admin", "POST", "/groups", json=body), 409, "group-exists")
        other = {"Idempotency-Key": "signup-2"}
        problem(api("admin", "POST", "/groups", json=body, headers=other), 409, "group-exists")
        assert api("admin", "POST", "/groups", json={"name": "Max"}, headers=key).status_code == 201
        assert len(groups.list()) == 2

    def test_every_path_is_there_with_its_version_too(self, url: str, tokens: dict[str, str]) -> None:
        paths = httpx.get(f"{url}/api/openapi.json").json()["paths"]
        assert not [path for path in paths if path.startswith("/api/v1")]
        for path, operations in paths.items():
            versioned = path.replace("/api/", "/api/v1/", 1).replace("{group_id}", str(uuid4()))
            for method in operations:
                problem(httpx.request(method, f"{url}{versioned}"), 401, "sign-in-required")
        headers = {"Authorization": f"Bearer {tokens['admin']}", "Idempotency-Key": "signup-3"}
        first, again = (
            httpx.post(f"{url}/api{version}/groups", json={"name": "V"}, headers=headers) for version in ("", "/v1")
        )
        assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
        problem(httpx.get(f"{url}/api/v1/groups/{uuid4()}", headers=headers), 404, "group-not-found")
        assert httpx.get(f"{url}/api/v1/nothing").headers["content-type"] == PROBLEM

    def test_what_somebody_else_changed_is_not_overwritten(self, api: Ask, groups: GroupManager) -> None:
        pro = groups.create("Pro", limits={"image": 1})
        path = f"/groups/{pro.id}"
        tag = api("admin", "GET", path).headers["etag"]
        groups.set_limit(pro.id, Limit(kind="image", max=2))
        stale = api("admin", "PATCH", path, json={"limits": {"image": 9}}, headers={"If-Match": tag})
        problem(stale, 412, "group-changed")
        assert groups.get(pro.id).limits[0].max == 2
        now = api("admin", "GET", path).headers["etag"]
        edited = api("admin", "PATCH", path, json={"limits": {"image": 9}}, headers={"If-Match": now})
        assert (edited.status_code, edited.json()["limits"][0]["max"]) == (200, 9)
        assert edited.headers["etag"] not in (tag, now)
        again = api("admin", "PATCH", path, json={"name": "Pro"}, headers={"If-Match": edited.headers["etag"]})
        assert again.status_code == 200
        assert api("admin", "PATCH", path, json={"name": "Pro"}, headers={"If-Match": "*"}).status_code == 200
        assert api("admin", "PATCH", path, json={"name": "Pro"}, headers={"If-Match": '"x"'}).status_code == 412

    def test_an_error_names_the_field_and_changes_nothing(self, api: Ask, groups: GroupManager) -> None:
        pro = groups.create("Pro", limits={"image": 1})
        path = f"/groups/{pro.id}"
        body = {"name": "New", "limits": [{"kind": "image", "max": 2}, {"kind": "image", "max": -1}]}
        found = problem(api("admin", "PATCH", path, json=body), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["limits[1].max"]
        body = {"name": "New", "limits": [{"kind": "image", "max": 2}] * 2}
        found = problem(api("admin", "PATCH", path, json=body), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["limits[1]"]
        body = {"name": "New", "timezone": "Mars/Base"}
        found = problem(api("admin", "PATCH", path, json=body), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["timezone"]
        problem(api("admin", "POST", "/groups", json={"name": "PRO"}), 409, "group-exists")
        assert groups.list() == [pro]

    def test_one_that_no_reader_knows_hides_no_other(self, api: Ask, groups: GroupManager, stack: LocalStack) -> None:
        """It got in past the check, and the others are as they were."""
        pro, bad = groups.create("Pro"), groups.create("Bad")
        check = "user_groups_created_at_check"
        (rule,) = stack.sql(f"select pg_get_constraintdef(oid) as def from pg_constraint where conname = '{check}'")
        stack.sql(f"alter table public.user_groups drop constraint {check}")
        stack.sql(f"update public.user_groups set created_at = 'infinity' where id = '{bad.id}'")
        try:
            page = api("admin", "GET", "/groups", params={"limit": 1}).json()
            assert (page["items"], page["next"] is None) == ([], False)
            page = api("admin", "GET", "/groups", params={"limit": 1, "after": page["next"]}).json()
            assert [group["name"] for group in page["items"]] == ["Pro"]
            assert groups.list() == [pro]
            problem(api("admin", "GET", f"/groups/{bad.id}"), 500, "unreadable-value")
        finally:
            stack.sql("update public.user_groups set created_at = now() where not isfinite(created_at)")
            stack.sql(f"alter table public.user_groups add constraint {check} {rule['def']}")

    def test_are_searched_and_paged(self, api: Ask, groups: GroupManager) -> None:
        for name in ("Team A", "team b", "Team C", "Other"):
            groups.create(name)
        names, after = [], None
        for _ in range(3):
            params = {"search": "EAM", "limit": 2} | ({"after": after} if after else {})
            page = api("admin", "GET", "/groups", params=params).json()
            names.append([group["name"] for group in page["items"]])
            after = page["next"]
            if after is None:
                break
        assert names == [["Team A", "team b"], ["Team C"]]

    def test_a_cursor_is_opaque_and_only_where_more_follows(self, api: Ask, groups: GroupManager) -> None:
        for name in ("Télé \U0001f3ac" * 20, "Team", "Zoo"):
            groups.create(name)
        found, after = [], None
        while len(found) < 4:
            params = {"limit": 1} | ({"after": after} if after else {})
            page = api("admin", "GET", "/groups", params=params).json()
            found.append(page["items"][0]["name"])
            after = page["next"]
            if after is None:
                break
            assert found[-1] not in after
            assert re.fullmatch(r"[\w-]+", after, re.ASCII)
        assert len(found) == 3
        assert api("admin", "GET", "/groups", params={"limit": 3}).json()["next"] is None
        for params in ({"after": "Team!"}, {"after": "_w"}, {"after": "a"}):
            refused = problem(api("admin", "GET", "/groups", params=params), 422, "invalid-request")
            assert [each["field"] for each in refused["errors"]] == ["after"]
            members = {"group_id": str(uuid4())} | params
            problem(api("admin", "GET", "/group-members", params=members), 422, "invalid-request")

    def test_a_name_that_is_misspelt_is_refused(self, api: Ask) -> None:
        found = problem(api("admin", "GET", "/groups?serach=x"), 422, "invalid-request")
        assert found["errors"][0]["field"] == "serach"

    def test_usage_and_history(self, api: Ask, groups: GroupManager, limits: TokenLimits, user: LocalUser) -> None:
        pro = groups.create("Pro", limits={"image": 10})
        groups.add_member(pro.id, user.id)
        limits.track(user.id, "image", 4)
        usage = api("admin", "GET", f"/groups/{pro.id}/usage").json()
        assert usage["member_count"] == 1
        assert [(limit["used"], limit["remaining"], limit["fraction"]) for limit in usage["limits"]] == [(4, 6, 0.4)]
        history = api("admin", "GET", f"/groups/{pro.id}/history", params={"bucket": "hour"}).json()["items"]
        assert [(point["kind"], point["used"], point["generations"]) for point in history] == [("image", 4, 1)]
        problem(api("admin", "GET", f"/groups/{uuid4()}/history"), 404, "group-not-found")

    def test_numbers_are_no_moments(self, api: Ask, groups: GroupManager) -> None:
        path = f"/groups/{groups.create('Pro').id}/history"
        for number in ("1767225600000", "1767225600", "20260131", "-1"):
            found = problem(api("admin", "GET", path, params={"since": number}), 422, "invalid-request")
            assert [each["field"] for each in found["errors"]] == ["since"]


POOL = {
    "kind": "credits",
    "max": 1000,
    "period": "5 hours",
    "scope": "member",
    "starts": "rolling",
    "counts": {"image": 1, "video": 8},
    "mode": "observe",
}


class TestLimits:
    """Pools, where periods begin, and modes."""

    def test_say_what_they_count_where_they_begin_and_whether_they_deny(self, api: Ask, groups: GroupManager) -> None:
        body = {"name": "Pro", "limits": [POOL, {**POOL, "starts": "first_use"}], "anchor_at": "2026-01-31T12:00:00Z"}
        made = api("admin", "POST", "/groups", json=body).json()
        assert sorted(made["limits"], key=lambda limit: limit["starts"]) == body["limits"][::-1]
        assert made["anchor_at"] == "2026-01-31T12:00:00Z"
        path = f"/groups/{made['id']}"
        edited = api("admin", "PATCH", path, json={"anchor_at": "2026-02-01T00:00:00+01:00", "limits": [POOL]}).json()
        assert (edited["anchor_at"], edited["limits"]) == ("2026-01-31T23:00:00Z", [POOL])
        kept = api("admin", "PATCH", path, json={"name": "Pro"}).json()
        assert kept["anchor_at"] == edited["anchor_at"]
        assert api("admin", "PATCH", path, json={"name": "Max"}).json() | {"name": "Pro"} == edited | {
            "updated_at": groups.get(made["id"]).updated_at.isoformat().replace("+00:00", "Z")
        }

    def test_numbers_of_json_are_whole(self, api: Ask, groups: GroupManager) -> None:
        limit = {"kind": "credits", "max": 10.0, "counts": {"image": 2.0}}
        made = api("admin", "POST", "/groups", json={"name": "Pro", "limits": [limit]}).json()
        assert (made["limits"][0]["max"], made["limits"][0]["counts"]) == (10, {"image": 2})

    @pytest.mark.parametrize(
        ("limit", "field"),
        [
            ({"period": "1.5 hours"}, "period"),
            ({"period": "367 days"}, "period"),
            ({"period": "5 years"}, "period"),
            ({"period": "5 hours", "starts": "calendar"}, "starts"),
            ({"period": "month"}, "starts"),
            ({"period": "lifetime", "starts": "first_use"}, "starts"),
            ({"period": "3 months", "starts": "first_use"}, "starts"),
            ({"starts": "monday"}, "starts"),
            ({"mode": "off"}, "mode"),
            ({"counts": {}}, "counts"),
            ({"counts": {"image": 0}}, "counts.image"),
            ({"counts": {"Image": 1}}, "counts.Image"),
            ({"counts": {"image": 1.5}}, "counts.image"),
            ({"counts": {f"kind_{n}": 1 for n in range(51)}}, "counts"),
            ({"weight": 2}, "weight"),
        ],
    )
    def test_that_can_not_be_are_refused_by_their_field(
        self, api: Ask, groups: GroupManager, limit: dict[str, Any], field: str
    ) -> None:
        body = {"name": "Pro", "limits": [{"kind": "image", "max": 1}, {**POOL, **limit}]}
        found = problem(api("admin", "POST", "/groups", json=body), 422, "invalid-request")
        assert [each["field"].removesuffix(".[key]") for each in found["errors"]] == [f"limits[1].{field}"]
        assert groups.list() == []

    def test_two_differ_by_where_they_begin(self, api: Ask, groups: GroupManager) -> None:
        body = {"name": "Pro", "limits": [POOL, {**POOL, "starts": "anchor"}, {**POOL, "max": 5, "mode": "enforce"}]}
        found = problem(api("admin", "POST", "/groups", json=body), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["limits[2]"]

    @pytest.mark.parametrize("moment", ["1969-12-31T23:59:59Z", "9999-01-01T00:00:00Z", "2026-01-01T00:00:00", "0", 0])
    def test_an_anchor_that_can_not_be_is_refused(self, api: Ask, groups: GroupManager, moment: object) -> None:
        pro = groups.create("Pro")
        for method, path, body in (
            ("POST", "/groups", {"name": "New"}),
            ("PATCH", f"/groups/{pro.id}", {}),
            ("POST", "/group-members", {"group_id": str(pro.id), "user_id": str(uuid4())}),
        ):
            found = problem(api("admin", method, path, json={**body, "anchor_at": moment}), 422, "invalid-request")
            assert [each["field"] for each in found["errors"]] == ["anchor_at"], method

    def test_a_members_own_anchor(
        self, api: Ask, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        month = Limit(kind="image", max=9, period="month", scope="member", starts="anchor")
        pro = groups.create("Pro", limits=[month])
        joined = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
        body = {"group_id": str(pro.id), "user_id": str(newcomer.id), "anchor_at": joined.isoformat()}
        assert api("admin", "POST", "/group-members", json=body).json()["added"] == 1
        (status,) = limits.usage(newcomer.id)
        assert status.reset_at is not None
        assert (status.reset_at.hour, status.reset_at.minute) == (0, 0)
        assert status.reset_at - joined <= timedelta(days=31)

    def test_anchors_can_be_removed(self, api: Ask, groups: GroupManager, newcomer: LocalUser) -> None:
        moment = datetime(2026, 1, 31, tzinfo=UTC)
        pro = groups.create("Pro", anchor_at=moment)
        assert api("admin", "PATCH", f"/groups/{pro.id}", json={"anchor_at": None}).json()["anchor_at"] is None
        groups.add_member(pro.id, newcomer.id)
        body = {"group_id": str(pro.id), "user_id": str(newcomer.id)}
        for anchor in ("2026-01-31T00:00:00Z", None):
            assert api("admin", "PATCH", "/group-members", json={**body, "anchor_at": anchor}).json() == {"set": True}
            (member,) = api("admin", "GET", f"/group-members?group_id={pro.id}").json()["items"]
            assert member["anchor_at"] == anchor
        stranger = {**body, "user_id": str(uuid4()), "anchor_at": None}
        assert api("admin", "PATCH", "/group-members", json=stranger).json() == {"set": False}
        # null is an anchor, nothing is not
        problem(api("admin", "PATCH", "/group-members", json=body), 422, "invalid-request")

    def test_answers_are_in_units_of_the_kind(self, api: Ask, groups: GroupManager, user: LocalUser) -> None:
        pool = {**POOL, "mode": "enforce"}
        watched = {"kind": "video", "max": 1, "mode": "observe"}
        made = api("admin", "POST", "/groups", json={"name": "Pro", "limits": [pool, watched]}).json()
        groups.add_member(made["id"], user.id)
        answer = api("service", "POST", "/track-generation", json={"user_id": str(user.id), "kind": "video", "cost": 2})
        result = answer.json()
        assert (result["allowed"], result["remaining"]) == (True, 123)
        assert [(limit["kind"], limit["starts"], limit["mode"]) for limit in result["would_deny"]] == [
            ("video", "calendar", "observe")
        ]
        credits_ = next(limit for limit in result["limits"] if limit["kind"] == "credits")
        assert (credits_["used"], credits_["remaining"], credits_["weight"]) == (16, 123, 8)
        # in units of the kind too, and without the limit that only observes
        assert answer.headers["ratelimit-policy"] == '"credits-5-hours-rolling-member";q=125;w=18000'
        assert answer.headers["ratelimit"].startswith('"credits-5-hours-rolling-member";r=123;t=')
        usage = api("admin", "GET", f"/groups/{made['id']}/usage").json()["limits"]
        assert [(limit["kind"], limit["used"], limit["weight"]) for limit in usage] == [
            ("credits", 16, 1),
            ("video", 2, 1),
        ]


class TestMembers:
    def test_are_added_listed_and_removed(self, api: Ask, groups: GroupManager, stack: LocalStack) -> None:
        pro = groups.create("Pro")
        users, nobody = stack.create_users(5), uuid4()
        one = {"group_id": str(pro.id), "user_id": str(users[0])}
        assert api("admin", "POST", "/group-members", json=one).json()["added"] == 1
        many = {"group_id": str(pro.id), "user_ids": [str(user) for user in [*users, nobody]]}
        added = api("admin", "POST", "/group-members", json=many).json()
        assert (added["added"], added["already"]) == (4, 1)
        assert [refused["user_id"] for refused in added["refused"]] == [str(nobody)]
        listed, after = [], {}
        while True:
            page = api("admin", "GET", "/group-members", params={"group_id": str(pro.id), "limit": 2, **after}).json()
            listed += [member["id"] for member in page["items"]]
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        assert listed == sorted(str(user) for user in users)
        emails = {member.id: str(member.email) for member in groups.members(pro.id)}
        search = {"group_id": str(pro.id), "search": emails[users[0]].upper()}
        assert [member["id"] for member in api("admin", "GET", "/group-members", params=search).json()["items"]] == [
            str(users[0])
        ]
        two = {"group_id": str(pro.id), "user_id": listed[:2]}
        assert api("admin", "DELETE", "/group-members", params=two).json() == {"removed": 2}
        assert groups.usage(pro.id).member_count == 3

    def test_one_way_of_naming_users_at_a_time(self, api: Ask) -> None:
        body = {"group_id": str(uuid4()), "user_id": str(uuid4()), "user_ids": []}
        problem(api("admin", "POST", "/group-members", json=body), 422, "invalid-request")


class TestWhoMay:
    @pytest.mark.parametrize("role", [None, "anon", "garbage", "e30.e30.AA"])
    def test_without_a_valid_token_nothing(self, api: Ask, role: str | None) -> None:
        for path in ("/groups", f"/groups/{uuid4()}", "/usage/me"):
            answer = api(role, "GET", path)
            problem(answer, 401, "sign-in-required")
            assert answer.headers["www-authenticate"] == "Bearer"
        problem(api(role, "POST", "/track-generation", json={"kind": "image"}), 401, "sign-in-required")

    def test_a_user_manages_nothing_and_sees_their_own(
        self, api: Ask, groups: GroupManager, limits: TokenLimits, user: LocalUser
    ) -> None:
        pro = groups.create("Pro", limits={"image": 10})
        groups.add_member(pro.id, user.id)
        limits.track(user.id, "image", 3)
        refused = [
            api("user", "GET", "/groups"),
            api("user", "POST", "/groups", json={"name": "Mine"}),
            api("user", "PATCH", f"/groups/{pro.id}", json={"limits": {"image": 1000}}),
            api("user", "DELETE", f"/groups/{pro.id}"),
            api("user", "GET", f"/groups/{pro.id}/usage"),
            api("user", "GET", "/group-members", params={"group_id": str(pro.id)}),
            api("user", "POST", "/group-members", json={"group_id": str(pro.id), "user_id": str(user.id)}),
        ]
        for answer in refused:
            problem(answer, 403, "access-denied")
            assert "Pro" not in answer.text
        assert groups.list() == [pro]
        (mine,) = api("user", "GET", "/usage/me").json()["items"]
        assert (mine["group"]["name"], mine["used"], mine["remaining"]) == ("Pro", 3, 7)
        assert api("admin", "GET", "/usage/me").json() == {"items": []}

    def test_an_admin_needs_no_service_key_in_the_process(
        self, stack: LocalStack, tokens: dict[str, str], groups: GroupManager
    ) -> None:
        with served(create_app(settings_for(stack, secret_key=None))) as url:
            headers = {"Authorization": f"Bearer {tokens['admin']}"}
            made = httpx.post(f"{url}/api/groups", headers=headers, json={"name": "Pro"}, trust_env=False)
            assert made.status_code == 201
            path = f"{url}/api/track-generation"
            assert httpx.post(path, headers=headers, json={"kind": "image"}, trust_env=False).status_code == 404


class TestTrackGeneration:
    def test_a_worker_names_the_user(self, api: Ask, groups: GroupManager, user: LocalUser) -> None:
        pro = groups.create("Pro", limits=[Limit(kind="image", max=2, period="day")])
        groups.add_member(pro.id, user.id)
        body = {"user_id": str(user.id), "kind": "image", "idempotency_key": "job-1"}
        first = api("service", "POST", "/track-generation", json=body)
        assert first.json()["allowed"]
        assert first.headers["ratelimit-policy"] == '"image-day-group";q=2;w=86400'
        assert first.headers["ratelimit"].startswith('"image-day-group";r=1;t=')
        assert api("service", "POST", "/track-generation", json=body).json()["replayed"]
        assert groups.usage(pro.id).limits[0].used == 1
        found = problem(api("service", "POST", "/track-generation", json={"kind": "image"}), 422, "invalid-request")
        assert found["errors"][0]["field"] == "user_id"

    def test_a_worker_may_send_its_key_as_a_header(self, api: Ask, groups: GroupManager, user: LocalUser) -> None:
        pro = groups.create("Pro", limits={"image": 5})
        groups.add_member(pro.id, user.id)
        body = {"user_id": str(user.id), "kind": "image"}
        key = {"Idempotency-Key": "sent-1"}
        assert not api("service", "POST", "/track-generation", json=body, headers=key).json()["replayed"]
        assert api("service", "POST", "/track-generation", json=body, headers=key).json()["replayed"]
        both = body | {"idempotency_key": "sent-1"}
        assert api("service", "POST", "/track-generation", json=both, headers=key).json()["replayed"]
        other = body | {"idempotency_key": "sent-2"}
        problem(api("service", "POST", "/track-generation", json=other, headers=key), 409, "idempotency-conflict")
        assert groups.usage(pro.id).limits[0].used == 1

    def test_a_user_tracks_nothing(self, api: Ask, groups: GroupManager, user: LocalUser) -> None:
        pro = groups.create("Pro", limits={"image": 2})
        groups.add_member(pro.id, user.id)
        for role in ("user", "admin"):
            body = {"kind": "image", "cost": 1}
            problem(api(role, "POST", "/track-generation", json=body), 403, "access-denied")
        assert groups.usage(pro.id).limits[0].used == 0

    def test_a_user_tracks_for_themself_what_the_server_lets_them(
        self, stack: LocalStack, tokens: dict[str, str], groups: GroupManager, user: LocalUser
    ) -> None:
        pro = groups.create("Pro", limits={"image": 10, "video": 10})
        team = groups.create("Team", limits={"image": 10})
        (other,) = stack.create_users(1)
        groups.add_members(pro.id, [user.id, other])
        groups.add_member(team.id, user.id)
        with served(create_app(settings_for(stack), self_service={"image": 2})) as url:

            def ask(body: dict[str, Any], **headers: str) -> httpx.Response:
                headers |= {"Authorization": f"Bearer {tokens['user']}"}
                return httpx.post(f"{url}/api/track-generation", headers=headers, json=body, trust_env=False)

            assert ask({"kind": "image"}).json()["cost"] == 2
            assert ask({"kind": "image", "user_id": str(user.id)}).json()["cost"] == 2
            problem(ask({"kind": "video"}), 403, "access-denied")
            problem(ask({"kind": "image", "user_id": str(other)}), 403, "access-denied")
            chosen = {"cost": 1, "idempotency_key": "mine", "group_id": str(team.id), "metadata": {"a": 1}}
            for name, value in chosen.items():
                assert ask({"kind": "image", name: value}).status_code == 400, name
            assert ask({"kind": "image"}, **{"Idempotency-Key": "mine"}).status_code == 400
        assert [limit.used for limit in groups.usage(pro.id).limits] == [4, 0]
        assert groups.usage(team.id).limits[0].used == 0

    def test_a_denial_says_why_and_until_when(self, api: Ask, groups: GroupManager, newcomer: LocalUser) -> None:
        body = {"kind": "image", "user_id": str(newcomer.id)}
        problem(api("service", "POST", "/track-generation", json=body), 403, "not-in-group")
        pro = groups.create("Pro", limits=[Limit(kind="image", max=0, period="hour")])
        groups.add_member(pro.id, newcomer.id)
        denied = api("service", "POST", "/track-generation", json=body)
        found = problem(denied, 429, "limit-exceeded")
        assert found["result"]["reason"] == "limit_exceeded"
        assert denied.headers["ratelimit"].startswith('"image-hour-group";r=0;t=')
        video = {"kind": "video", "user_id": str(newcomer.id)}
        problem(api("service", "POST", "/track-generation", json=video), 403, "no-limit-for-kind")
        groups.set_limit(pro.id, Limit(kind="image", max=1, period="hour"))
        assert api("service", "POST", "/track-generation", json=body).status_code == 200
        assert 0 < int(api("service", "POST", "/track-generation", json=body).headers["retry-after"]) <= 3600


class TestTooManyRequests:
    def test_each_caller_has_their_own(self, stack: LocalStack, tokens: dict[str, str]) -> None:
        with served(create_app(settings_for(stack, requests_per_minute=20))) as url:

            def ask(role: str) -> httpx.Response:
                headers = {"Authorization": f"Bearer {tokens.get(role, role)}"}
                return httpx.get(f"{url}/api/usage/me", headers=headers, trust_env=False)

            answers = [ask("user") for _ in range(21)]
            assert [answer.status_code for answer in answers] == [200] * 20 + [429]
            assert answers[0].headers["ratelimit"].startswith('"requests";r=19;t=')
            problem(answers[-1], 429, "too-many-requests")
            assert 0 < int(answers[-1].headers["retry-after"]) <= 60
            assert ask("admin").status_code == 200

    def test_nor_may_tokens_be_guessed(self, stack: LocalStack, tokens: dict[str, str]) -> None:
        with served(create_app(settings_for(stack, requests_per_minute=30))) as url:
            guesses = [
                httpx.get(f"{url}/api/groups", headers={"Authorization": f"Bearer a.b.{n}"}, trust_env=False)
                for n in range(4)
            ]
            assert [answer.status_code for answer in guesses] == [401, 401, 401, 429]


class TestInAnotherApp:
    def test_its_errors_and_descriptions_are_the_same(self, settings: WebSettings, tokens: dict[str, str]) -> None:
        app = FastAPI()
        app.include_router(router(settings), prefix="/limits")
        with served(app) as url:
            answer = httpx.get(f"{url}/limits/api/groups", trust_env=False)
            problem(answer, 401, "sign-in-required")
            headers = {"Authorization": f"Bearer {tokens['admin']}"}
            assert httpx.get(f"{url}/limits/api/groups", headers=headers, trust_env=False).status_code == 200
            described = httpx.get(f"{url}/openapi.json", trust_env=False).json()
        assert described["openapi"].startswith("3.1")
        names = {operation["operationId"] for path in described["paths"].values() for operation in path.values()}
        assert names == {
            "list_groups", "create_group", "read_group", "edit_group", "delete_group", "read_usage", "read_history",
            "list_members", "add_members", "remove_members", "set_anchor", "list_overrides", "set_override",
            "remove_override", "reset_usage", "my_usage", "track_generation",
        }  # fmt: skip
        assert set(described["components"]["schemas"]) >= {"Problem", "Group", "TrackResult"}
        for operations in described["paths"].values():
            for operation in operations.values():
                assert {"401", "403", "422", "429", "503"} <= set(operation["responses"])
                assert PROBLEM in operation["responses"]["422"]["content"]
                assert operation["security"] == [{"token": []}]


class TestWithoutSupabase:
    def test_says_so_and_no_more(self, settings: WebSettings, tokens: dict[str, str]) -> None:
        away = settings.model_copy(update={"url": "http://127.0.0.1:9", "timeout": 0.5})
        with served(create_app(away)) as url:
            headers = {"Authorization": f"Bearer {tokens['admin']}"}
            for path in ("groups", "usage/me"):
                answer = httpx.get(f"{url}/api/{path}", headers=headers, trust_env=False)
                found = problem(answer, 503, "unavailable")
                assert "detail" not in found
                assert "retry-after" in answer.headers


class TestOverrides:
    def test_are_set_listed_and_removed(
        self, api: Ask, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        pro = groups.create(
            "Pro",
            limits=[
                Limit(kind="image", max=5, period="day", scope="member"),
                Limit(kind="image", max=9, period="3 hours", scope="member", starts="rolling"),
                Limit(kind="image", max=50),
            ],
        )
        groups.add_member(pro.id, newcomer.id)
        path = f"/groups/{pro.id}/overrides"
        until = (datetime.now(UTC) + timedelta(days=7)).isoformat()
        body = {"kind": "image", "max": 200, "user_id": str(newcomer.id), "period": "day", "until": until}
        made = api("admin", "PUT", path, json=body)
        assert made.status_code == 200, made.text
        assert (made.json()["max"], made.json()["status"], made.json()["email"]) == (200, "active", newcomer.email)
        assert limits.usage(newcomer.id)[0].max == 200
        assert api("admin", "PUT", path, json={"kind": "image", "max": None}).json()["scope"] == "group"
        assert len(api("admin", "GET", path).json()["items"]) == 2
        assert api("admin", "GET", path, params={"user_id": str(newcomer.id)}).json()["items"] == [made.json()]

        del body["period"]
        found = problem(api("admin", "PUT", path, json=body), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["period"]
        past = {**body, "period": "day", "until": "2026-01-01T00:00:00Z"}
        found = problem(api("admin", "PUT", path, json=past), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["until"]
        problem(api("admin", "PUT", path, json={**body, "user_id": str(uuid4())}), 404, "unknown-user")
        problem(api("user", "GET", path), 403, "access-denied")

        which = {"kind": "image", "user_id": str(newcomer.id)}
        assert api("admin", "DELETE", path, params=which).json() == {"removed": True}
        assert api("admin", "DELETE", path, params=which).json() == {"removed": False}
        assert limits.usage(newcomer.id)[0].max == 5

    def test_one_member_is_reset(
        self, api: Ask, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        each = Limit(kind="image", max=5, period="day", scope="member")
        pro = groups.create("Pro", limits=[each, Limit(kind="image", max=50)])
        groups.add_member(pro.id, newcomer.id)
        limits.track(newcomer.id, "image", 4)
        path = f"/groups/{pro.id}/reset"
        answer = api("admin", "POST", path, json={"kind": "image", "user_id": str(newcomer.id)})
        assert answer.status_code == 200, answer.text
        assert datetime.fromisoformat(answer.json()["reset_at"]).tzinfo is not None
        assert {limit.scope: limit.used for limit in limits.usage(newcomer.id)} == {"group": 4, "member": 0}
        problem(api("admin", "POST", path, json={"user_id": str(uuid4())}), 404, "unknown-user")
        assert api("admin", "POST", path, json={}).status_code == 200
        assert {limit.used for limit in limits.usage(newcomer.id)} == {0}


class TestGroupsBeneathGroups:
    PLAN = Limit(kind="image", max=5, period="month", scope="child")

    def test_are_created_listed_and_moved(self, api: Ask, groups: GroupManager) -> None:
        plan, other = groups.create("Pro", limits=[self.PLAN]), groups.create("Other")
        made = api("admin", "POST", "/groups", json={"name": "Acme", "parent_id": str(plan.id)})
        assert (made.status_code, made.json()["parent_id"]) == (201, str(plan.id))
        beneath = {"params": {"parent_id": str(plan.id)}}
        assert api("admin", "GET", "/groups", **beneath).json()["items"] == [made.json()]
        path = f"/groups/{made.json()['id']}"
        moved = api("admin", "PATCH", path, json={"parent_id": str(other.id)}).json()
        assert moved["parent_id"] == str(other.id)
        assert api("admin", "GET", "/groups", **beneath).json()["items"] == []
        assert api("admin", "PATCH", path, json={"name": "Acme!"}).json()["parent_id"] == str(other.id)
        assert api("admin", "PATCH", path, json={"parent_id": None}).json()["parent_id"] is None
        assert api("admin", "GET", path).json()["parent_id"] is None

    def test_a_spread_group_is_made_so(self, api: Ask, groups: GroupManager) -> None:
        made = api("admin", "POST", "/groups", json={"name": "Free", "is_spread": True})
        assert (made.status_code, made.json()["is_spread"]) == (201, True)
        assert groups.get_by_name("Free").is_spread
        limits = {"limits": [{"kind": "image", "max": 1}]}
        refused = problem(api("admin", "PATCH", f"/groups/{made.json()['id']}", json=limits), 422, "invalid-request")
        assert "must be member in a spread group" in refused["detail"]

    def test_what_can_not_be_beneath_is_refused_by_its_field(self, api: Ask, groups: GroupManager) -> None:
        plan = groups.create("Pro", limits=[self.PLAN])
        acme = groups.create("Acme", parent=plan)
        for parent_id in (acme.id, uuid4(), plan.id):
            asked = {"json": {"parent_id": str(parent_id)}}
            found = problem(api("admin", "PATCH", f"/groups/{plan.id}", **asked), 422, "invalid-request")
            assert [each["field"] for each in found["errors"]] == ["parent_id"]
        found = problem(api("admin", "POST", "/groups", json={"name": "x", "parent_id": "Pro"}), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["parent_id"]
        found = problem(api("admin", "DELETE", f"/groups/{plan.id}"), 422, "invalid-request")
        assert [each["field"] for each in found["errors"]] == ["group_id"]
        assert api("admin", "GET", f"/groups/{plan.id}").status_code == 200

    def test_usage_says_whose_limit_it_is(
        self, api: Ask, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        plan = groups.create("Pro", limits=[self.PLAN])
        acme = groups.create("Acme", parent=plan)
        groups.add_member(acme.id, newcomer.id)
        limits.track(newcomer.id, "image", 2)
        owner = {"id": str(plan.id), "name": "Pro"}
        usage = api("admin", "GET", f"/groups/{acme.id}/usage").json()
        assert (usage["parent_id"], usage["child_count"]) == (str(plan.id), 0)
        assert [(limit["group"], limit["scope"], limit["used"]) for limit in usage["limits"]] == [(owner, "child", 2)]
        assert api("admin", "GET", f"/groups/{plan.id}/usage").json()["child_count"] == 1
        body = {"user_id": str(newcomer.id), "kind": "image", "cost": 3}
        mine = api("service", "POST", "/track-generation", json=body)
        assert mine.json()["group"] == {"id": str(acme.id), "name": "Acme"}
        assert [limit["group"] for limit in mine.json()["limits"]] == [owner]
        denied = api("service", "POST", "/track-generation", json=body)
        assert problem(denied, 429, "limit-exceeded")["result"]["denied_by"]["group"] == owner
        assert "used by this customer" in denied.json()["detail"]

    def test_an_override_of_one_of_them(
        self, api: Ask, groups: GroupManager, limits: TokenLimits, newcomer: LocalUser
    ) -> None:
        plan = groups.create("Pro", limits=[self.PLAN])
        acme, other = groups.create("Acme", parent=plan), groups.create("Other")
        groups.add_member(acme.id, newcomer.id)
        path = f"/groups/{plan.id}/overrides"
        body = {"kind": "image", "max": 7, "child_id": str(acme.id)}
        made = api("admin", "PUT", path, json=body).json()
        assert (made["child_id"], made["child_name"], made["scope"], made["max"]) == (str(acme.id), "Acme", "child", 7)
        assert limits.usage(newcomer.id)[0].max == 7
        which = {"child_id": str(acme.id)}
        assert api("admin", "GET", path, params=which).json()["items"] == [made]
        assert api("admin", "GET", path, params={"child_id": str(other.id)}).json()["items"] == []

        both = {**body, "user_id": str(newcomer.id)}
        elsewhere = {**body, "child_id": str(other.id)}
        for refused in (both, elsewhere):
            found = problem(api("admin", "PUT", path, json=refused), 422, "invalid-request")
            assert [each["field"] for each in found["errors"]] == ["child_id"]
        problem(api("admin", "PUT", path, json={**body, "child_id": str(uuid4())}), 404, "group-not-found")

        which["kind"] = "image"
        assert api("admin", "DELETE", path, params=which).json() == {"removed": True}
        assert api("admin", "DELETE", path, params=which).json() == {"removed": False}
        assert limits.usage(newcomer.id)[0].max == 5
