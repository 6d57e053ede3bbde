"""Checks of tokenlimits_diagnosis: whether the database is as the SQL left it, and whether the counters are right."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, cast

from pydantic import AwareDatetime, BaseModel, ValidationError

from tokenlimits import GroupManager, ServiceUnavailable
from tokenlimits.cli._terminal import counted
from tokenlimits.models import Group
from tokenlimits.sql_files import SCHEMA_VERSION

from ._expected import COLUMN_BY_COLUMN, POLICIES, REAPPLY, adopt, expected
from ._findings import Finding, Findings, error, listed, ok, quoted, warning
from ._storage import Storage, check_storage

_SECONDS = 10
_SKEW = 5


class Table(BaseModel):
    """The rights on a table, by role."""

    rls: bool
    anon: bool
    authenticated: list[str]
    service_role: list[str]


class Policy(BaseModel):
    """A policy of row-level security."""

    table: str
    name: str
    action: str
    asks_is_admin: bool


class AdminRule(BaseModel):
    """Whom tokenlimits.is_admin() takes for an admin (None: it failed)."""

    nobody: bool | None
    user_metadata: bool | None
    app_metadata: bool | None


class Diagnosis(BaseModel):
    """The answer of tokenlimits_diagnosis."""

    version: int
    postgres: str
    at: AwareDatetime
    tables: dict[str, Table]
    policies: list[Policy]
    functions: dict[str, list[str]]
    unmarked: list[str]
    private_schema_open: bool
    triggers: list[str]
    indexes: list[str]
    is_admin: AdminRule
    groups: int
    default_group: str | None
    groups_without_limits: int
    users_in_no_group: int | None
    groups_not_summed: int
    ledger_rows: int
    storage: Storage


def check_version(installed: int) -> Finding:
    """Compare the installed version with the one that this package ships."""
    shipped = expected().version
    if installed < shipped:
        level = "error" if installed < SCHEMA_VERSION else "warning"
        says = f"The database has version {installed} of the schema; {shipped} is current."
        return Finding(check="version", level=level, says=says, remedy=REAPPLY)
    if installed > shipped:
        remedy = "This works. To use what is new, upgrade the package: `pip install --upgrade tokenlimits`"
        return warning("version", f"The database has version {installed}; this package knows {shipped}.", remedy)
    return ok("version", f"Version {installed} of the schema is installed.")


def check_database(facts: Diagnosis, before: datetime, schema: str) -> Findings:
    """Check the facts; `before` is when they were requested, `schema` is where tokenlimits is installed."""
    yield _marks(facts.unmarked, schema)
    yield _tables(facts)
    yield from _functions(facts)
    yield _policies(facts, schema)
    yield _rights(facts)
    yield _admin_rule(facts.is_admin)
    if facts.version == expected().version:
        yield _all_there("triggers", expected().triggers - set(facts.triggers), "Counters go wrong without them.")
        yield _all_there("indexes", _missing_indexes(facts), "Calls get slower with every row.")
    yield from check_storage(facts.storage)
    yield _history(facts.groups_not_summed, schema)
    yield _clocks(facts.at, before)
    yield from _people(facts)


def _marks(unmarked: Sequence[str], schema: str) -> Finding:
    if unmarked:
        says = (
            f"The comment that marks them as tokenlimits' own is missing from {listed(unmarked)}, as after a restore "
        )
        return error("marks", f"{says}without comments. A new installation would refuse them.", adopt(schema))
    return ok("marks", "Everything is marked as tokenlimits' own.")


def _functions(facts: Diagnosis) -> Findings:
    # later versions remove no function; earlier ones don't have them all yet
    missing = sorted(expected().functions.keys() - facts.functions.keys())
    if missing and facts.version >= expected().version:
        yield error("functions", f"The database lacks {listed(missing)}.", REAPPLY)


def _tables(facts: Diagnosis) -> Finding:
    open_ = [name for name in POLICIES if name in facts.tables and not facts.tables[name].rls]
    missing = [name for name in POLICIES if name not in facts.tables]
    if missing:
        return error("tables", f"Missing: {listed(missing)}.", REAPPLY)
    if open_:
        return error("tables", f"Row-level security is off, so anybody may read {listed(open_)}.", REAPPLY)
    return ok("tables", "Row-level security is on for all tables.")


def _policies(facts: Diagnosis, schema: str) -> Finding:
    ours = {(table, f"admins may {action}") for table, actions in POLICIES.items() for action in actions}
    loose = [policy for policy in facts.policies if not policy.asks_is_admin]
    missing = ours - {(policy.table, policy.name) for policy in facts.policies}
    if loose:
        who = listed([f"“{policy.name}” on {policy.table}" for policy in loose])
        drop = ", ".join(f"`drop policy {quoted(policy.name)} on {schema}.{policy.table}`" for policy in loose)
        remedy = f"Unless it is yours and intended, drop it: {drop}"
        return error("policies", f"Users who are not admins get access through {who}.", remedy)
    if missing:
        names = [f"“{name}” on {table}" for table, name in sorted(missing)]
        return error("policies", f"Admins have no access: {listed(names)} missing.", REAPPLY)
    return ok("policies", "They give access to admins only.")


def _rights(facts: Diagnosis) -> Finding:
    to_anon = [f"table {name}" for name, table in facts.tables.items() if table.anon]
    too_much = [
        f"{action} on {name}{to}"
        for name, table in facts.tables.items()
        for actions, to in ((table.authenticated, ""), (table.service_role, " to service_role"))
        for action in actions
        if action not in POLICIES[name] - COLUMN_BY_COLUMN
    ]
    wanted = expected().functions
    for name, roles in facts.functions.items():
        too_much += [f"{name} to {role}" for role in roles if name in wanted and role not in wanted[name]]
    too_little = [
        f"{name} to {role}"
        for name, roles in wanted.items()
        for role in sorted(roles)
        if name in facts.functions and role not in facts.functions[name]
    ]
    if facts.private_schema_open:
        to_anon.append("schema tokenlimits")
    if to_anon or too_much:
        return error(
            "rights", f"Too much is granted: {listed([*(f'{x} to anon' for x in to_anon), *too_much])}.", REAPPLY
        )
    if too_little:
        return error("rights", f"Grants are missing: {listed(too_little)}.", REAPPLY)
    return ok("rights", "Tables and functions are granted to the right roles only.")


def _admin_rule(rule: AdminRule) -> Finding:
    where = (
        "Correct tokenlimits.is_admin() in the SQL editor, or have its default again: "
        f"`drop function tokenlimits.is_admin() cascade`. {REAPPLY}"
    )
    if rule.user_metadata:
        return error("admins", "Users can make themselves admins: role: admin in user_metadata is enough.", where)
    if rule.nobody:
        return error("admins", "Every signed-in user is an admin.", where)
    if None in (rule.nobody, rule.user_metadata, rule.app_metadata):
        return error("admins", "tokenlimits.is_admin() fails.", where)
    if not rule.app_metadata:
        remedy = "If that is not intended, see tokenlimits.is_admin() in the SQL editor."
        return warning("admins", "Your own rule says who is an admin, not app_metadata.role.", remedy)
    return ok("admins", "Users whose app_metadata.role is admin; users can't set it themselves.")


def _all_there(check: str, missing: set[str] | frozenset[str], why: str) -> Finding:
    if missing:
        return error(check, f"Missing or disabled: {listed(sorted(missing))}. {why}", REAPPLY)
    return ok(check, "None is missing.")


def _missing_indexes(facts: Diagnosis) -> frozenset[str]:
    """Find the indexes that don't exist at all: one that is not valid has a remedy of its own."""
    invalid = [index.name.partition(".")[2] for index in facts.storage.indexes]
    return expected().indexes - {*facts.indexes, *invalid}


def _clocks(at: datetime, before: datetime) -> Finding:
    now = datetime.now(UTC)
    seconds = (before - at).total_seconds() if at < before else max(0.0, (at - now).total_seconds())
    if seconds > _SKEW:
        remedy = "Synchronize this machine's clock (NTP). Limits use the database's clock."
        return warning("clocks", f"This machine's clock and the database's are {seconds:.0f} s apart.", remedy)
    return ok("clocks", "This machine's clock and the database's agree.")


def _history(not_summed: int, schema: str) -> Finding:
    if not not_summed:
        return ok("history", "The history covers the whole ledger.")
    groups = "1 group has" if not_summed == 1 else f"{not_summed:,} groups have"
    says = f"{groups} usage in the ledger that was never added up, as after a restore of these tables alone."
    recount = f"select {schema}.reconcile_usage(id) from {schema}.user_groups"  # noqa: S608  # it is printed
    advice = "Until they are, limits count too little. In the SQL editor, or group by group if there are many"
    return error("history", says, f"{advice}: `{recount}`")


def _people(facts: Diagnosis) -> Findings:
    if facts.groups == 0:
        yield warning(
            "groups",
            "There are no groups, so everybody is denied.",
            "Run `tokenlimits groups create Pro --limit image=100/month`",
        )
        return
    if facts.groups_without_limits:
        have = "has" if facts.groups_without_limits == 1 else "have"
        some = f"{facts.groups_without_limits:,} of {counted(facts.groups, 'group')}"
        says = f"{some} {have} no limits, so nothing is allowed there."
        yield warning("groups", says, "Run `tokenlimits limits set GROUP image=100/month` (or image=unlimited)")
    else:
        yield ok("groups", f"{counted(facts.groups, 'group')}, all with limits.")
    yield _users(facts)


def _users(facts: Diagnosis) -> Finding:
    if facts.users_in_no_group is None:
        return ok("users", "Your own tokenlimits.known_users() says which users exist.")
    many = counted(facts.users_in_no_group, "user") if facts.users_in_no_group <= 1000 else "more than 1,000 users"
    if not facts.users_in_no_group:
        return ok("users", "Every user is in a group.")
    if facts.default_group is not None:
        return ok("users", f"The default group {facts.default_group} applies to {many} in no group.")
    remedy = (
        "Run `tokenlimits members add GROUP USER`, or make a group the default: "
        "`tokenlimits groups edit GROUP --default`"
    )
    return warning("users", f"In no group, and so denied everything: {many}.", remedy)


def check_ledger(groups: GroupManager, schema: str, *, every_group: bool) -> Findings:
    """Compare the counters with the ledger, group by group, as long as there is time or, if wanted, to the end."""
    found, until = groups.list(), monotonic() + _SECONDS
    drifted: list[Group] = []
    late: list[Group] = []
    checked = 0
    for group in found:
        if not every_group and monotonic() > until:
            break
        try:
            if groups.drift(group.id).drifted:
                drifted.append(group)
        except ServiceUnavailable:
            late.append(group)
        checked += 1
    some = "" if checked == len(found) else f" in {checked:,} of {counted(len(found), 'group')}; --all checks the rest"
    yield _ledger(drifted, late, some, schema)


def _ledger(drifted: Sequence[Group], late: Sequence[Group], some: str, schema: str) -> Finding:
    if drifted:
        says = f"They differ from the ledger in {listed([group.name for group in drifted])}{some and f', {some}'}."
        recount = ", ".join(f"`select {schema}.reconcile_usage('{group.id}')`" for group in drifted)
        remedy = f"Recount them in the SQL editor: {recount}. Did something write to the tables directly?"
        return error("counters", says, remedy)
    if late:
        remedy = "Call GroupManager.reconcile(group_id, since=…) to recount a part."
        return warning("counters", f"Too large to check here: {listed([group.name for group in late])}.", remedy)
    return ok("counters", f"They agree with the ledger{some}.")


def unreadable(answer: Any, problem: ValidationError) -> Finding:
    """Explain an answer that `read` refuses: a newer version may have other fields, but no version has nulls."""
    wrong = problem.errors(include_url=False)
    fields = listed(sorted({".".join(map(str, each["loc"])) or "all of it" for each in wrong}))
    version: Any = cast("dict[str, Any]", answer).get("version") if isinstance(answer, dict) else None
    newer = isinstance(version, int) and version > expected().version
    if newer and all(each["input"] is not None for each in wrong):
        remedy = "Upgrade the package: `pip install --upgrade tokenlimits`"
        return warning("database", f"The diagnosis has a newer format ({fields}).", remedy)
    return error("database", f"The diagnosis is not valid: {fields}.", REAPPLY)


def read(answer: Any) -> Diagnosis:
    """Parse the answer of tokenlimits_diagnosis."""
    return Diagnosis.model_validate(answer)
