"""`doctor`: find problems, and say how to correct them."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

import httpx
import typer
from pydantic import ValidationError

import tokenlimits
from tokenlimits import GroupManager, TokenLimitsError
from tokenlimits.cli._database import connect, find_url
from tokenlimits.cli._find import manager
from tokenlimits.cli._migrate import pending
from tokenlimits.cli._options import AsJson, DatabaseUrl, Schema
from tokenlimits.cli._terminal import Problem, counted, err, print_json, say, show
from tokenlimits.settings import unusable_network

from ._api import (
    SECRET,
    Answer,
    Api,
    Configuration,
    check_answer,
    check_configuration,
    check_functions,
    check_schema,
    timed_call,
    unreachable,
)
from ._database import check_database, check_ledger, check_version, read, unreadable
from ._expected import REAPPLY, in_schema
from ._findings import Finding, Findings, error, findings_table, ok, warning
from ._health import READ_ONLY, Health, check_health, read_only

All = Annotated[bool, typer.Option("--all", help="Compare every group's counters with the ledger, however long.")]
_TIMEOUT = 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    *, db_url: DatabaseUrl = None, schema: Schema = None, every_group: All = False, as_json: AsJson = False
) -> None:
    """Find problems and say how to correct them.

    Changes nothing: it tracks a generation of the latest caller, and rolls it back. Without --all, it compares the
    counters of as many groups with the ledger as 10 seconds allow. Exits with 1 if there is an error. With a database
    URL, it also checks for pending migrations. The output of --json contains no secrets, so you can attach it to a
    support ticket.
    """
    configuration = Configuration.load(schema)
    with err.status("Checking"):
        findings = [*_examine(configuration, every_group=every_group), *_migrations(db_url)]
    for finding in findings:
        finding.remedy = in_schema(finding.remedy, configuration.text_of_schema)
    bad = [finding for finding in findings if finding.level == "error"]
    if as_json:
        _print_json(configuration, findings)
    else:
        show(findings_table(findings))
        say("")
        _conclude(findings, len(bad))
    if bad:
        raise typer.Exit(1)


def _print_json(configuration: Configuration, findings: Iterable[Finding]) -> None:
    print_json(
        {
            "tokenlimits": tokenlimits.__version__,
            "python": platform.python_version(),
            "system": platform.system(),
            "host": configuration.host,
            "schema": configuration.text_of_schema,
            "at": datetime.now(UTC),
            "findings": list(findings),
        }
    )


def _conclude(findings: Iterable[Finding], bad: int) -> None:
    warnings = sum(finding.level == "warning" for finding in findings)
    hints = counted(warnings, "warning")
    if bad:
        say(f"{counted(bad, 'problem')} to correct" + (f", {hints}." if warnings else "."), style="red")
    elif warnings:
        say(f"No problems, {hints}.", style="yellow")
    else:
        say("No problems.", style="green")


def _examine(configuration: Configuration, *, every_group: bool) -> Findings:
    yield from check_configuration(configuration)
    if not configuration.usable:
        return
    try:
        made = httpx.Client(timeout=_TIMEOUT)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as problem:
        yield error("network", str(unusable_network(problem)), "Correct the variable, or unset it.")
        return
    with made as http:
        api = Api(configuration, http)
        try:
            answer, took = timed_call(api, "tokenlimits_version")
        except httpx.HTTPError as reason:
            yield unreachable(configuration.host, reason)
            return
        try:
            yield from _examine_api(configuration, api, answer, took)
            yield from _examine_installed(api, configuration.text_of_schema, every_group=every_group)
        except _Ended:
            return
        except httpx.TimeoutException:
            yield _late()
        except httpx.HTTPError as reason:
            yield unreachable(configuration.host, reason)


class _Ended(Exception):
    """Nothing more can be checked."""


def _examine_api(configuration: Configuration, api: Api, answer: Answer, took: float) -> Findings:
    schema = configuration.text_of_schema
    findings = [*check_answer(answer, took, configuration.host), *check_schema(answer, schema)]
    yield from findings
    if any(finding.level == "error" for finding in findings):
        raise _Ended
    if answer.code == "42501":
        yield error("api", "The key may not even read the version.", f"{SECRET} If it already is: {REAPPLY}")
        raise _Ended
    yield check_version(int(answer.json["version"]))
    yield from _examine_health(api.call("tokenlimits_health"))


def _examine_health(answer: Answer) -> Findings:
    """Check first whether calls go through: the other checks would wait for the same locks."""
    if answer.is_missing:
        yield warning("writes", "The installed version has no health check, so no generation was tried.", REAPPLY)
    elif answer.code == READ_ONLY:
        yield read_only(None)
    elif answer.status >= 400:
        yield error("writes", f"The health check failed: {answer.message or answer.status}", REAPPLY)
    else:
        try:
            health = Health.model_validate(answer.json)
        except ValidationError as problem:
            yield unreadable(answer.json, problem)
            return
        yield from check_health(health)
        if health.trial.waited:
            raise _Ended


def _late() -> Finding:
    remedy = (
        "Look for what keeps it: `select pid, state, xact_start, pg_blocking_pids(pid), query from pg_stat_activity "
        "where xact_start is not null order by xact_start`"
    )
    return error("database", f"The API answers, but the database did not answer a call within {_TIMEOUT} s.", remedy)


def _examine_installed(api: Api, schema: str, *, every_group: bool) -> Findings:
    yield from check_functions(api)
    before = datetime.now(UTC)
    answer = api.call("tokenlimits_diagnosis")
    if answer.is_missing:
        yield warning("database", "The installed version has no diagnosis; nothing more was checked.", REAPPLY)
    elif answer.code == "55P03":
        yield _late()
    elif answer.status >= 400:
        yield error("database", f"The diagnosis failed: {answer.message or answer.status}", REAPPLY)
    else:
        try:
            facts = read(answer.json)
        except ValidationError as problem:
            yield unreadable(answer.json, problem)
            return
        yield from check_database(facts, before, schema)
        yield from _examine_ledger(manager(schema), schema, every_group=every_group)


def _examine_ledger(groups: GroupManager, schema: str, *, every_group: bool) -> Findings:
    with groups:
        try:
            yield from check_ledger(groups, schema, every_group=every_group)
        except TokenLimitsError as problem:
            yield error("counters", f"The counters could not be compared with the ledger: {problem}", REAPPLY)


def _migrations(db_url: str | None) -> Findings:
    if find_url(db_url) is None:
        return
    try:
        with connect(db_url) as connection:
            names = [migration.name for migration in pending(connection)]
    except Problem as problem:
        yield error("migrations", str(problem), "To skip this check, leave out --db-url and unset DATABASE_URL.")
        return
    if names:
        yield warning("migrations", f"Not in the database's history: {', '.join(names)}.", "Run `tokenlimits migrate`")
    else:
        yield ok("migrations", "All migrations are in the database's history.")
