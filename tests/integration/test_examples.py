"""Every example runs as its reader would run it, as a process on a real stack, and in which any warning is an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import httpx
import pytest
from tests.support.node import kept, wheel_node
from tests.support.postgres import PostgresServer, servers

from tokenlimits import GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack
from tokenlimits.local._node import Node
from tokenlimits.models import Group

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import ModuleType


EXAMPLES = Path(__file__).parents[2] / "examples"
ESCAPE = "\x1b["


def environment(stack: LocalStack | None = None, **more: str) -> dict[str, str]:
    """Ours without what would change an example's output, and with the stack's variables."""
    ours = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**ours, "no_proxy": "127.0.0.1", **(stack.environment() if stack else {}), **more}


def run(
    *command: str | Path, env: dict[str, str], given: str | None = None, status: int = 0, silent: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run an example with Python, and insist on its exit status and, when that is 0, on silence on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env=env,
        input=given,
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    if silent and status == 0:
        assert done.stderr == ""
    return done


@pytest.fixture(scope="module")
def groups(stack: LocalStack) -> Iterator[GroupManager]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(stack).items():
            patch.setenv(name, value)
        with GroupManager.from_env() as manager:
            manager.list()  # reads the environment
            yield manager


def new_group(groups: GroupManager, limits: Sequence[Limit] | dict[str, int | None], users: Sequence[UUID]) -> Group:
    group = groups.create(f"Example {uuid4()}", limits=limits)
    groups.add_members(group.id, users)
    return group


def used(groups: GroupManager, group: Group, kind: str = "image") -> int:
    return next(limit.used for limit in groups.usage(group.id).limits if limit.kind == kind)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(next(iter(servers().values()))) as server:
        yield server


@pytest.fixture(scope="module")
def stack(server: PostgresServer) -> Iterator[LocalStack]:
    server.create_database("examples")
    with LocalStack(server.url("examples")) as stack:
        yield stack


@pytest.fixture(scope="module")
def database_url(server: PostgresServer) -> str:
    server.create_database("quickstart")
    return server.url("quickstart")


# quickstart.py


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def output(stack: LocalStack) -> str:
    """What it prints into a pipe; the stack has fetched the packages from npm, if they weren't there."""
    return run(EXAMPLES / "quickstart.py", env=environment()).stdout


def without_moments(output: str) -> list[str]:
    """The lines without what another moment changes: dates, times, how long it took, spaces."""
    text = re.sub(r"\d{4}-\d\d-\d\d|\w{3} \d\d(?= \d\d:\d\d)|\d\d:\d\d(:\d\d)?|\d+\.\d|in \d+\w \d+\w", "…", output)
    text = re.sub(r"(Retry-After:) \d+", r"\1 …", text)
    return [" ".join(line.split()) for line in text.splitlines()]


class TestQuickstart:
    @pytest.mark.slow
    def test_counts_exactly(self, output: str) -> None:
        counts = re.findall(r"(\w+) +(\w+): +(\d+) fit, +(\d+) passed, +(\d+) recorded", output)
        assert counts == [
            ("Studio", "image", "100", "100", "100"),
            ("Studio", "video", "12", "12", "12"),
            ("Free", "image", "20", "20", "20"),
            ("Free", "video", "6", "6", "6"),
        ]
        assert output.endswith("Exact, in every group and kind.\n")

    def test_shows_usage_remaining_and_reset(self, output: str) -> None:
        assert re.search(r"image  40 a day each +[━╸]+ +100/120 +20  \w{3} \d\d \d\d:\d\d +in ", output)
        assert re.search(r"image  50 in total +[━╸]+ +20/50 +30 +never", output)
        assert re.search(r"video  60 a month +[━╸]+ +60/60 +0 ", output)

    def test_shows_what_a_blocked_worker_sees(self, output: str) -> None:
        assert "Image generation limit exceeded: 10 of 10 used by this user" in output
        assert re.search(r"result.reason +limit_exceeded", output)
        assert re.search(r"result.reset_at +\d{4}-\d\d-\d\d 0[45]:00:00\+00:00", output)
        seconds = re.search(r"result.retry_after +(\d+).0", output)
        assert seconds is not None
        assert re.search(r"raise_if_denied\(\) +raises LimitExceeded", output)
        assert f"429 Too Many Requests, Retry-After: {seconds[1]}" in output

    def test_has_no_colours_in_a_pipe_and_fits_80_columns(self, output: str) -> None:
        assert ESCAPE not in output
        assert max(map(len, output.splitlines())) == 80

    def test_prints_what_the_readme_shows(self, output: str) -> None:
        readme = (EXAMPLES.parent / "README.md").read_text()
        [shown] = re.findall(r"^```text\n(16 threads.*?)^```$", readme, re.MULTILINE | re.DOTALL)
        assert without_moments(shown) == without_moments(output)

    @pytest.mark.slow
    def test_runs_on_a_postgresql_and_twice(self, database_url: str) -> None:
        for _ in range(2):
            done = run(
                EXAMPLES / "quickstart.py",
                "--database-url",
                database_url,
                env=environment(COLUMNS="120", FORCE_COLOR="1"),
            )
            assert "Exact, in every group and kind." in done.stdout
            plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout)
            assert max(map(len, plain.splitlines())) == 120

    @pytest.mark.slow
    def test_fails_when_the_count_is_off(self, database_url: str) -> None:
        """Somebody's usage that was recorded elsewhere takes one place of the pool."""
        script = f"""
import runpy, sys
from tokenlimits import TokenLimits
sys.argv = ["quickstart.py", "--database-url", {database_url!r}]
sys.path.insert(0, {str(EXAMPLES)!r})
import quickstart
run_threads = quickstart.run_threads
def after_another(users):
    TokenLimits.from_env().record(users[0], "image")
    return run_threads(users)
quickstart.run_threads = after_another
sys.exit(quickstart.main())
"""
        done = run("-c", script, env=environment(), status=1)
        assert "Wrong! Studio image: 100 fit, but 99 passed and 100 were recorded" in " ".join(done.stdout.split())
        assert "Exact" not in done.stdout

    def test_fails_without_a_database(self) -> None:
        url = "postgresql://me:s3cret@127.0.0.1:1/none"
        done = run(EXAMPLES / "quickstart.py", env=environment(DEMO_DATABASE_URL=url), status=1)
        assert "Supabase Lite did not start" in done.stderr
        assert "s3cret" not in done.stderr

    @pytest.mark.parametrize(("passed", "recorded"), [(99, 100), (101, 100), (100, 101), (99, 99), (101, 101)])
    def test_verifies(self, quickstart: ModuleType, passed: int, recorded: int) -> None:
        right = quickstart.Count("Free", "image", 20, 20, 20)
        wrong = quickstart.Count("Studio", "image", 100, passed, recorded)
        assert quickstart.verify([right]) == []
        assert quickstart.verify([right, wrong]) == [
            f"Studio image: 100 fit, but {passed} passed and {recorded} were recorded"
        ]

    @pytest.mark.parametrize(
        ("fraction", "colour"), [(0, "green"), (0.699, "green"), (0.7, "yellow"), (0.9, "red"), (1.5, "red")]
    )
    def test_colours_by_how_full_it_is(self, quickstart: ModuleType, fraction: float, colour: str) -> None:
        assert quickstart.colour(fraction) == colour


# worker.py and the like


class TestWorker:
    def test_charges_once_and_says_what_to_do_with_each_job(self, stack: LocalStack, groups: GroupManager) -> None:
        [user, stranger] = stack.create_users(2)
        pro = new_group(groups, [Limit(kind="image", max=3, period="month"), Limit(kind="video", max=4)], [user])
        jobs: list[dict[str, Any]] = [
            {"id": "1", "user_id": str(user), "kind": "image"},
            {"id": "1", "user_id": str(user), "kind": "image"},  # delivered twice
            {"id": "2", "user_id": str(user), "kind": "image", "cost": 3},
            {"id": "3", "user_id": str(user), "kind": "video", "cost": 5},
            {"id": "4", "user_id": str(stranger), "kind": "image"},
            {"id": "5", "user_id": str(user), "kind": "No!"},
        ]
        done = run(EXAMPLES / "worker.py", env=environment(stack), given="\n".join(map(json.dumps, jobs)))
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert answers[:2] == [{"job": "1", "do": "ack", "made": "image-1", "remaining": 2}] * 2
        assert answers[2]["in"] > 0
        assert answers[2]["why"].startswith("Image generation limit exceeded: 1 of 3 used this month, 3 more asked for")
        assert answers[3]["why"] == "Video generation limit exceeded: 0 of 4 used in total, 5 more asked for"
        assert answers[4]["why"] == "The user is in no group that may pay for this"
        assert answers[5]["why"].startswith("kind: ")
        assert [answer["do"] for answer in answers] == ["ack", "ack", "retry", "drop", "drop", "drop"]
        assert used(groups, pro) == 1

    @pytest.mark.slow
    def test_keeps_the_job_when_supabase_is_away(self) -> None:
        env = environment(SUPABASE_URL="http://127.0.0.1:1", SUPABASE_SECRET_KEY="sb_secret_x")
        job = json.dumps({"id": "1", "user_id": str(uuid4()), "kind": "image"})
        done = run(EXAMPLES / "worker.py", env=env, given=job, silent=False)  # its retries are logged
        assert json.loads(done.stdout) == {"job": "1", "do": "retry", "in": 30}


class TestAsyncWorkerPool:
    def test_does_what_fits_and_puts_off_the_rest(self, stack: LocalStack, groups: GroupManager) -> None:
        users = stack.create_users(2)
        pro = new_group(groups, [Limit(kind="image", max=15), Limit(kind="image", max=10, scope="member")], users)
        done = run(EXAMPLES / "async_worker_pool.py", "--jobs", "12", *map(str, users), env=environment(stack))
        assert "15 of 24 jobs done\n" in done.stdout
        assert sum(map(int, re.findall(r": (\d+) put off for good", done.stdout))) == 9
        assert used(groups, pro) == 15


class TestManageGroups:
    @pytest.mark.slow
    def test_makes_a_group_shows_and_resets_it(self, stack: LocalStack, groups: GroupManager, tmp_path: Path) -> None:
        users = stack.create_users(5_001)
        name, nobody = f"Pro {uuid4()}", uuid4()
        file = tmp_path / "members.txt"
        file.write_text("\n".join(map(str, [*users, nobody])))
        first = run(EXAMPLES / "manage_groups.py", name, file, env=environment(stack))
        assert "5000 of 5002 users\n5002 of 5002 users\n" in first.stdout  # on a terminal, one line
        assert "5001 added, 0 were members already" in first.stdout
        assert f"not added: {nobody}, there is no such user" in first.stdout
        assert "5001 members" in first.stdout

        with TokenLimits.from_env() as limits:
            assert limits.track(users[0], "image", 40)
        again = run(EXAMPLES / "manage_groups.py", name, file, env=environment(stack))
        assert "0 added, 5001 were members already" in again.stdout
        assert "image per month, group: 40 of 1000 (4%), resets 2" in again.stdout
        assert re.search(r"\d{4}-\d\d-\d\d: 40 units of image in 1 generations", again.stdout)

        reset = run(EXAMPLES / "manage_groups.py", name, file, "--reset", "image", env=environment(stack))
        assert "image per month, group: 0 of 1000 (0%)" in reset.stdout
        assert "40 units of image" in reset.stdout  # the history stays


class TestPortOfTypescript:
    @pytest.mark.slow
    def test_generates_until_it_raises(self, stack: LocalStack, groups: GroupManager) -> None:
        [user] = stack.create_users(1)
        new_group(groups, {"image": 2, "video": 1}, [user])
        script = EXAMPLES / "port_of_typescript.py"
        assert run(script, str(user), env=environment(stack)).stdout == "an image\na video\n"
        second = run(script, str(user), env=environment(stack), status=1)
        assert second.stdout == "an image\n"
        assert second.stderr == "Error: Video generation limit exceeded: 1 of 1 used in total\n"


class TestTestMyApp:
    @pytest.mark.slow
    def test_passes(self) -> None:
        done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "test_my_app.py", env=environment())
        assert "3 passed" in done.stdout


# frontend/


@pytest.fixture(scope="module")
def node() -> Node:
    return wheel_node()


@pytest.fixture(scope="module")
def node_modules() -> Path:
    return kept("frontend", EXAMPLES / "frontend") / "node_modules"


@pytest.fixture
def project(node_modules: Path, tmp_path: Path) -> Path:
    """The front end's files, with their packages beside them."""
    project = tmp_path / "frontend"
    shutil.copytree(EXAMPLES / "frontend", project, ignore=shutil.ignore_patterns("node_modules"))
    (project / "node_modules").symlink_to(node_modules)
    return project


def tsc(node: Node, project: Path, *arguments: str) -> None:
    command = [str(node.executable), "node_modules/typescript/bin/tsc", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


class TestFrontend:
    def test_shows_what_is_left_of_a_users_own_limits(
        self, stack: LocalStack, groups: GroupManager, node: Node, project: Path
    ) -> None:
        user = stack.create_user(f"{uuid4()}@example.com")
        [other] = stack.create_users(1)
        limits = [Limit(kind="image", max=9), Limit(kind="image", max=4, period="day", scope="member")]
        pro = new_group(groups, [*limits, Limit(kind="video", max=None)], [user.id, other])
        new_group(groups, {"image": 7}, [user.id])
        new_group(groups, {"audio": 5}, [other])
        with TokenLimits.from_env() as client:
            client.track(user.id, "image")
            client.track(other, "image", 3, group_id=pro.id)
        env = {**environment(stack), "EMAIL": user.email, "PASSWORD": user.password}
        del env["SUPABASE_SECRET_KEY"]
        command = [str(node.executable), "remaining.mjs"]
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert f"{pro.name}: 4 of 9 image used, never resets" in lines
        assert f"{pro.name}: 0 of any number of video used, never resets" in lines
        assert any(line.startswith(f"{pro.name}: 1 of 4 image used, resets 2") for line in lines)
        assert lines[-2:] == ["image: 10 left", "video: Infinity left"]  # 3 of the day's, and 7 of the other group

    def test_types_hold(self, stack: LocalStack, groups: GroupManager, node: Node, project: Path) -> None:
        """TypeScript checks the example, and the types against the catalogue and against real answers."""
        (project / "catalogue.ts").write_text(catalogue(stack))
        (project / "answers.ts").write_text(answers(stack, groups))
        tsc(node, project)
        tsc(node, project, "--ignoreConfig", "--strict", "--noEmit", "tokenlimits.d.ts")

    def test_types_are_checked_at_all(self, node: Node, project: Path) -> None:
        (project / "wrong.ts").write_text(
            "import type { Functions } from './tokenlimits.d.ts'\n"
            "export const answer: Functions['tokenlimits_version']['Returns'] = { version: 1, more: 2 }\n"
        )
        with pytest.raises(AssertionError, match="'more' does not exist"):
            tsc(node, project)


def catalogue(stack: LocalStack) -> str:
    """TypeScript that is valid only if the types name exactly these functions, arguments and defaults."""
    functions = stack.sql(
        "select proname as name, coalesce(proargnames, '{}') as arguments, pronargdefaults as defaults"
        " from pg_proc where pronamespace = 'public'::regnamespace and prorettype <> 'trigger'::regtype"
        " order by proname"
    )
    lines = [
        "import type { Functions } from './tokenlimits.d.ts'",
        "type Exactly<Names extends PropertyKey> = Record<Names, true>",
        "type Optional<T> = { [K in keyof T]-?: {} extends Pick<T, K> ? K : never }[keyof T]",
        f"export const functions: Exactly<keyof Functions> = {true_of(row['name'] for row in functions)}",
    ]
    for row in functions:
        required = row["arguments"][: len(row["arguments"]) - row["defaults"]]
        optional = row["arguments"][len(required) :]
        of = f"Functions['{row['name']}']['Args']"
        if not row["arguments"]:
            lines.append(f"export const {row['name']}: [{of}] extends [never] ? true : false = true")
            continue
        lines.append(f"export const {row['name']}: Exactly<keyof {of}> = {true_of(row['arguments'])}")
        lines.append(f"export const {row['name']}_optional: Exactly<Optional<{of}>> = {true_of(optional)}")
    return "\n".join(lines)


def true_of(names: Iterable[str]) -> str:
    return json.dumps(dict.fromkeys(names, True))


def answers(stack: LocalStack, groups: GroupManager) -> str:
    """TypeScript that is valid only if each answer has exactly the fields that the types say."""
    user = stack.create_user(f"{uuid4()}@example.com")
    limits = [Limit(kind="image", max=2), Limit(kind="video", max=None, period="day", scope="member")]
    limits.append(Limit(kind="text", max=1, scope="member"))
    group, empty = (new_group(groups, limits, []) for _ in range(2))
    plan = new_group(groups, [Limit(kind="image", max=9, scope="child")], [])
    groups.update(group.id, parent=plan)
    one, above = {"p_group_id": str(group.id)}, {"p_group_id": str(plan.id)}
    child = {"p_kind": "image", "p_child_id": str(group.id)}
    mine = {"p_user_id": str(user.id)}
    image = {**mine, "p_kind": "image"}
    token = stack.access_token(user)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("tokenlimits_version", {}),
        ("track_generation", image),  # in no group
        ("add_group_members", {**one, "p_user_ids": [str(user.id), str(uuid4())]}),
        ("track_generation", image),
        ("track_generation", {**image, "p_cost": 2}),  # denied
        ("track_generations", {"p_requests": [{"user_id": str(user.id), "kind": "video"}, {"kind": "image"}, {}]}),
        ("check_generation", {**mine, "p_kind": "audio"}),  # no limit
        ("record_generation", {**mine, "p_kind": "video", "p_metadata": {"job": 1}}),
        ("reserve_generation", {**mine, "p_kind": "video", "p_ttl": 60}),
        ("user_generation_usage", mine),
        ("my_generation_usage", {}),
        ("group_usage", one),
        ("group_usage", above),
        ("generation_history", one),
        ("group_members", one),
        ("find_users", {"p_email": user.email}),
        ("find_users_by_email", {"p_emails": [user.email]}),
        ("export_usage", one),
        ("export_usage", {**one, "p_page_size": 1}),  # more follow
        ("export_history", one),
        ("export_history", {"p_bucket": "hour", "p_page_size": 1}),  # more follow
        ("track_generation", {**mine, "p_kind": "text"}),
        ("limit_pressure", one),
        ("top_members", one),
        ("usage_drift", one),
        ("tokenlimits_diagnosis", {}),
        ("tokenlimits_health", {}),
        ("find_groups", {"p_name": group.name}),
        ("save_group", {**one, "p_description": "…"}),
        ("set_group_limit", {**one, "p_limit": {"kind": "image", "period": "day", "scope": "group", "max": 1}}),
        ("remove_group_limit", {**one, "p_kind": "image", "p_period": "day", "p_scope": "group"}),
        ("set_limit_override", {**one, "p_kind": "image", "p_max": None, "p_until": "2100-01-01T00:00:00Z"}),
        ("set_limit_override", {**one, **mine, "p_kind": "text", "p_max": 5}),
        ("set_limit_override", {**above, **child, "p_max": 5}),
        ("find_groups", {"p_parent_id": str(plan.id)}),
        ("find_limit_overrides", one),
        ("find_limit_overrides", {**above, "p_child_id": str(group.id)}),
        ("remove_limit_override", {**above, **child}),
        ("remove_limit_override", {**one, **mine, "p_kind": "text"}),
        ("set_member_anchor", {**one, **mine, "p_anchor_at": "2026-01-31T00:00:00Z"}),
        ("move_group_member", {**mine, "p_from": str(group.id), "p_to": str(empty.id)}),
        ("reset_group_usage", one),
        ("remove_group_members", {"p_group_id": str(empty.id), "p_user_ids": [str(user.id)]}),
        ("delete_group", {"p_group_id": str(empty.id)}),
    ]
    (holder,) = stack.create_users(1)
    groups.add_member(group.id, holder)
    reserve = "select public.reserve_generation($1, 'video') ->> 'usage_id' as id"
    [(first,), (second,)] = [stack.sql(reserve, str(holder)) for _ in range(2)]
    calls[-1:-1] = [
        ("extend_generation", {"p_usage_id": first["id"], "p_ttl": 7200}),
        ("commit_generation", {"p_usage_id": first["id"], "p_cost": 1}),
        ("refund_generation", {"p_usage_id": first["id"]}),
        ("release_generation", {"p_usage_id": second["id"]}),
        ("reconcile_usage", one),
    ]
    lines = ["import type { Functions } from './tokenlimits.d.ts'"]
    for number, (function, arguments) in enumerate(calls):
        headers = {"apikey": stack.secret_key}
        if function == "my_generation_usage":
            headers = {"apikey": stack.publishable_key, "authorization": f"Bearer {token}"}
        answer = httpx.post(f"{stack.url}/rest/v1/rpc/{function}", headers=headers, json=arguments, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json() not in ([], None)
        lines.append(f"export const answer{number}: Functions['{function}']['Returns'] = {answer.text}")
    asked = {function for function, _ in calls}
    lines.append(f"export const asked: Record<keyof Functions, true> = {true_of(asked)}")
    return "\n".join(lines)
