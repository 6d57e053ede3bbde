"""The board and the alerts of the docs fit what the app exports; a real Prometheus loads them, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.docs.pages import blocks
from tests.support.prometheus import Prometheus, program, prometheus
from tests.support.waiting import eventually
from tests.web.conftest import served, settings_for

from tokenlimits import GroupManager, Limit, telemetry
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.web import create_app

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations"
ALERTS = OPERATIONS / "prometheus-alerts.yml"
BOARD: dict[str, Any] = json.loads((OPERATIONS / "grafana-board.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
NOWHERE = "http://127.0.0.1:9"
# a selector: the name of a metric, and the labels within braces
_SELECTOR = re.compile(r"\b(tokenlimits_\w+|process_\w+|up)\b(?:\{([^}]*)\})?")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in BOARD["panels"] for target in panel["targets"])
    yield from (rule["expr"] for rule in RULES)


def exported() -> dict[str, set[str]]:
    """The labels of each metric, by its name in Prometheus; those that the app has beside the calls, by hand."""
    found = {
        f"{metric.name.replace('.', '_')}_total": set(metric.labels)
        for metric in (telemetry.GENERATIONS, telemetry.RETRIES, telemetry.UNAVAILABLE)
    }
    histograms = {
        "tokenlimits_call_duration_seconds": set(telemetry.DURATION.labels),
        "tokenlimits_web_request_duration_seconds": {"method", "route", "status"},
    }
    for name, labels in histograms.items():
        found |= {f"{name}_count": labels, f"{name}_bucket": labels | {"le"}}
    of_process = ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "up")
    return found | {name: set() for name in of_process}


class TestExpressions:
    def test_name_only_what_is_exported(self) -> None:
        known = exported()
        for expression in expressions():
            selectors = _SELECTOR.findall(expression)
            assert selectors, expression
            allowed = {"job", "instance"}.union(*(known[name] for name, _ in selectors))
            for labels in (labels for _, labels in selectors if labels):
                assert set(re.findall(r"(\w+)(?:=|!|=~)", labels)) <= allowed, expression
            for grouped in _GROUPED.findall(expression):
                assert set(re.split(r",\s*", grouped)) <= allowed, expression

    def test_show_every_metric_of_calls(self) -> None:
        shown = {name for expression in expressions() for name, _ in _SELECTOR.findall(expression)}
        assert {name for name in exported() if not name.endswith("_total")} <= shown | {"process_open_fds"}
        assert {name for name in exported() if name.startswith("tokenlimits_")} <= shown


class TestAlerts:
    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
    def test_has_what_whoever_is_woken_needs(self, rule: dict[str, Any]) -> None:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[1-9]\d*m", rule["for"])
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert "{{ $labels.job }}" in rule["annotations"]["summary"]
        assert (ROOT / rule["annotations"]["runbook"]).is_file()

    def test_each_is_tested(self) -> None:
        tests = yaml.safe_load((Path(__file__).parent / "alerts.yml").read_text(encoding="utf-8"))["tests"]
        for test in tests:
            assert {each["alertname"] for each in test["alert_rule_test"]} == {rule["alert"] for rule in RULES}

    def test_the_page_explains_each(self) -> None:
        page = (OPERATIONS / "monitoring.md").read_text(encoding="utf-8")
        assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in page] == []


class TestBoard:
    def test_can_be_imported_anywhere(self) -> None:
        assert BOARD.get("id") is None
        assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "job"}
        sources = [panel["datasource"] for panel in BOARD["panels"]]
        sources += [target["datasource"] for panel in BOARD["panels"] for target in panel["targets"]]
        assert {source["uid"] for source in sources} == {"${datasource}"}

    def test_panels_have_ids_and_places_of_their_own(self) -> None:
        ids = [panel["id"] for panel in BOARD["panels"]]
        assert len(ids) == len(set(ids))
        taken: set[tuple[int, int]] = set()
        for panel in BOARD["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken, panel["title"]
            taken |= cells
            refs = [target["refId"] for target in panel["targets"]]
            assert len(refs) == len(set(refs)) > 0

    def test_everything_follows_the_chosen_job(self) -> None:
        for panel in BOARD["panels"]:
            for target in panel["targets"]:
                for name, labels in _SELECTOR.findall(target["expr"]):
                    assert 'job=~"$job"' in labels, (panel["title"], name)


# Debian has it, PyPI doesn't: where it is missing, what is above checks the files by themselves
if program("prometheus") and program("promtool"):

    class TestPrometheus:
        def test_the_alerts_fire_when_they_should(self, tmp_path: Path) -> None:
            shutil.copy(ALERTS, tmp_path)
            shutil.copy(Path(__file__).parent / "alerts.yml", tmp_path)
            promtool = str(program("promtool"))
            for arguments in (["check", "rules", ALERTS.name], ["test", "rules", "alerts.yml"]):
                done = subprocess.run([promtool, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr

        def test_the_page_shows_how_it_is_configured(self, tmp_path: Path) -> None:
            shutil.copy(ALERTS, tmp_path)
            (shown,) = [each for each in blocks((OPERATIONS / "monitoring.md").read_text()) if each.language == "yaml"]
            (tmp_path / "prometheus.yml").write_text(shown.code)
            command = [str(program("promtool")), "check", "config", "prometheus.yml"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

        @pytest.mark.slow
        def test_every_expression_shows_something(
            self, stack: LocalStack, groups: GroupManager, user: LocalUser, tmp_path: Path
        ) -> None:
            group = groups.create("Studio", limits=[Limit(kind="image", max=3)])
            groups.add_member(group.id, user.id)
            with (
                served(create_app(settings_for(stack))) as app,
                served(create_app(settings_for(stack, url=NOWHERE, timeout=0.5))) as cut_off,
                prometheus(tmp_path, ALERTS, [app, cut_off]) as server,
            ):
                rules = server.ask("rules")["groups"][0]["rules"]
                assert [rule["name"] for rule in rules] == [rule["alert"] for rule in RULES]
                use(stack, user, [app, cut_off])
                for panel in BOARD["panels"]:
                    for target in panel["targets"]:
                        expression = target["expr"].replace("$__rate_interval", "1m").replace("$job", ".*")
                        assert eventually(lambda query=expression: server.query(query)), panel["title"]
                rules = eventually(lambda: all_evaluated(server))
                assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}


def use(stack: LocalStack, user: LocalUser, apps: list[str]) -> None:
    """Ask for more than there is room for, of a Supabase that answers and of one that doesn't."""
    worker = {"Authorization": f"Bearer {stack.secret_key}"}
    for app in apps:
        with httpx.Client(base_url=app, headers=worker, trust_env=False, timeout=30) as client:
            for _ in range(5):
                client.post("/api/track-generation", json={"user_id": str(user.id), "kind": "image"})


def all_evaluated(server: Prometheus) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = server.ask("rules")["groups"][0]["rules"]
    return [] if any(rule["health"] == "unknown" for rule in rules) else rules
