"""`doctor`: find problems, and say how to correct them."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import UTC, datetime

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
from ._expected import REAPPLY
from ._findings import Finding, Findings, error, findings_table, ok, warning


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(*, db_url: DatabaseUrl = None, schema: Schema = None, as_json: AsJson = False) -> None:
    """Find problems and say how to correct them.

    Changes nothing. Exits with 1 if there is an error. With a database URL, it also checks for pending migrations. The
    output of --json contains no secrets, so you can attach it to a support ticket.
    """
    configuration = Configuration.load(schema)
    with err.status("Checking"):
        findings = [*_examine(configuration), *_migrations(db_url)]
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


def _examine(configuration: Configuration) -> Findings:
    yield from check_configuration(configuration)
    if not configuration.usable:
        return
    try:
        made = httpx.Client(timeout=20)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as problem:
        yield error("network", str(unusable_network(problem)), "Correct the variable, or unset it.")
        return
    with made as http:
        api = Api(configuration, http)
        try:
            yield from _examine_api(configuration, api)
        except httpx.HTTPError as reason:
            yield unreachable(configuration.host, reason)


def _examine_api(configuration: Configuration, api: Api) -> Findings:
    answer, took = timed_call(api, "tokenlimits_version")
    schema = configuration.text_of_schema
    findings = [*check_answer(answer, took, configuration.host), *check_schema(answer, schema)]
    yield from findings
    if any(finding.level == "error" for finding in findings):
        return
    if answer.code == "42501":
        yield error("api", "The key may not even read the version.", f"{SECRET} If it already is: {REAPPLY}")
        return
    yield check_version(int(answer.json["version"]))
    yield from check_functions(api)
    yield from _examine_database(api, schema)


def _examine_database(api: Api, schema: str) -> Findings:
    before = datetime.now(UTC)
    answer = api.call("tokenlimits_diagnosis")
    if answer.is_missing:
        yield warning("database", "The installed version has no diagnosis; nothing more was checked.", REAPPLY)
    elif answer.status >= 400:
        yield error("database", f"The diagnosis failed: {answer.message or answer.status}", REAPPLY)
    else:
        try:
            facts = read(answer.json)
        except ValidationError as problem:
            yield unreadable(answer.json, problem)
            return
        yield from check_database(facts, before, schema)
        yield from _examine_ledger(manager(schema))


def _examine_ledger(groups: GroupManager) -> Findings:
    with groups:
        try:
            yield from check_ledger(groups)
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
        yield warning("migrations", f"Not in the database's history: {', '.join(names)}.", "Run: tokenlimits migrate")
    else:
        yield ok("migrations", "All migrations are in the database's history.")
