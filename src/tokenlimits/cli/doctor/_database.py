"""What the doctor makes of tokenlimits_diagnosis: is the database as the SQL left it, and does it add up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from pydantic import AwareDatetime, BaseModel, ValidationError

from tokenlimits import GroupManager, ServiceUnavailable
from tokenlimits.sql_files import SCHEMA_VERSION

from ._expected import COLUMN_BY_COLUMN, POLICIES, REAPPLY, adopt, expected
from ._findings import Finding, Findings, error, listed, ok, warning
from ._storage import Storage, check_storage

_MOST_GROUPS = 50
_SKEW = 5


class Table(BaseModel):
    """Who may do what with a table."""

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
    """Whom tokenlimits.is_admin() would take for an admin (None: it failed)."""

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
        remedy = "It works; upgrade the package to use what is new: pip install --upgrade tokenlimits"
        return warning("version", f"The database has version {installed}, and this package knows {shipped}.", remedy)
    return ok("version", f"The schema is installed, in version {installed}.")


def check_database(facts: Diagnosis, before: datetime, schema: str) -> Findings:
    """Judge the facts; `before` is when they were asked for, `schema` where tokenlimits is."""
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
    yield _history(facts.groups_not_summed)
    yield _clocks(facts.at, before)
    yield from _people(facts)


def _marks(unmarked: Sequence[str], schema: str) -> Finding:
    if unmarked:
        says = f"The comment that says that tokenlimits made it is gone from {listed(unmarked)}, as after a restore "
        return error("marks", f"{says}without comments. Installing again refuses these names.", adopt(schema))
    return ok("marks", "Everything says that tokenlimits made it.")


def _functions(facts: Diagnosis) -> Findings:
    # later versions take no function away, earlier ones don't have all yet
    missing = sorted(expected().functions.keys() - facts.functions.keys())
    if missing and facts.version >= expected().version:
        yield error("functions", f"The database has no {listed(missing)}.", REAPPLY)


def _tables(facts: Diagnosis) -> Finding:
    open_ = [name for name in POLICIES if name in facts.tables and not facts.tables[name].rls]
    missing = [name for name in POLICIES if name not in facts.tables]
    if missing:
        return error("tables", f"There is no table {listed(missing)}.", REAPPLY)
    if open_:
        return error("tables", f"Row-level security is off: anybody may read {listed(open_)}.", REAPPLY)
    return ok("tables", "Row-level security is on for all.")


def _policies(facts: Diagnosis, schema: str) -> Finding:
    ours = {(table, f"admins may {action}") for table, actions in POLICIES.items() for action in actions}
    loose = [f"“{p.name}” on {p.table}" for p in facts.policies if not p.asks_is_admin]
    missing = ours - {(policy.table, policy.name) for policy in facts.policies}
    if loose:
        remedy = f"Drop it (drop policy … on {schema}.…), unless you made it and mean it."
        return error("policies", f"Others than admins get in by {listed(loose)}.", remedy)
    if missing:
        names = [f"“{name}” on {table}" for table, name in sorted(missing)]
        return error("policies", f"Admins are kept out: there is no {listed(names)}.", REAPPLY)
    return ok("policies", "They let admins in, and nobody else.")


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
            "rights", f"They are too wide: {listed([*(f'{x} to anon' for x in to_anon), *too_much])}.", REAPPLY
        )
    if too_little:
        return error("rights", f"They are too narrow: nothing grants {listed(too_little)}.", REAPPLY)
    return ok("rights", "Tables and functions are granted to whom they should be.")


def _admin_rule(rule: AdminRule) -> Finding:
    where = "See tokenlimits.is_admin(), in the SQL editor."
    if rule.user_metadata:
        return error("admins", "Whoever writes role: admin into their own user_metadata is an admin.", where)
    if rule.nobody:
        return error("admins", "Everybody who is signed in is an admin.", where)
    if None in (rule.nobody, rule.user_metadata, rule.app_metadata):
        return error("admins", "tokenlimits.is_admin() fails.", where)
    if not rule.app_metadata:
        return warning("admins", "Your own rule says who is an admin; app_metadata.role does not.", where)
    return ok("admins", "Users whose app_metadata.role is admin, which they can't write themselves.")


def _all_there(check: str, missing: set[str] | frozenset[str], why: str) -> Finding:
    if missing:
        return error(check, f"Missing or disabled: {listed(sorted(missing))}. {why}", REAPPLY)
    return ok(check, "They are all there.")


def _missing_indexes(facts: Diagnosis) -> frozenset[str]:
    """Find those that aren't there at all: one that is there but not valid has a remedy of its own."""
    invalid = [index.name.partition(".")[2] for index in facts.storage.indexes]
    return expected().indexes - {*facts.indexes, *invalid}


def _clocks(at: datetime, before: datetime) -> Finding:
    now = datetime.now(UTC)
    seconds = (before - at).total_seconds() if at < before else max(0.0, (at - now).total_seconds())
    if seconds > _SKEW:
        remedy = "Set this machine's clock (NTP). Limits go by the database's."
        return warning("clocks", f"This machine's clock and the database's are {seconds:.0f} s apart.", remedy)
    return ok("clocks", "This machine's and the database's agree.")


def _history(not_summed: int) -> Finding:
    if not not_summed:
        return ok("history", "It has what the ledger has, from the beginning.")
    groups = "1 group has" if not_summed == 1 else f"{not_summed:,} groups have"
    says = f"{groups} usage in the ledger that was never added up, as after a restore of these tables alone."
    remedy = "GroupManager.reconcile(group_id) adds it up. Until then limits count too little: do it for each group."
    return error("history", says, remedy)


def _people(facts: Diagnosis) -> Findings:
    if facts.groups == 0:
        yield warning(
            "groups", "There are none: everybody is denied.", "tokenlimits groups create Pro --limit image=100/month"
        )
        return
    if facts.groups_without_limits:
        says = f"{facts.groups_without_limits:,} of {facts.groups:,} have no limit, and so allow nothing."
        yield warning("groups", says, "tokenlimits limits set GROUP image=100/month (or image=unlimited)")
    else:
        yield ok("groups", f"{facts.groups:,}, each with limits.")
    yield _users(facts)


def _users(facts: Diagnosis) -> Finding:
    if facts.users_in_no_group is None:
        return ok("users", "Your own tokenlimits.known_users() says who there is.")
    many = f"{facts.users_in_no_group:,}" if facts.users_in_no_group <= 1000 else "more than 1,000"
    if not facts.users_in_no_group:
        return ok("users", "Everybody is in a group.")
    if facts.default_group is not None:
        return ok("users", f"The group {facts.default_group} judges the {many} who are in none.")
    remedy = "tokenlimits members add GROUP, or a group for them: tokenlimits groups edit GROUP --default"
    return warning("users", f"In no group, and so denied everything: {many}.", remedy)


def check_ledger(groups: GroupManager) -> Findings:
    """Compare counters with the ledger, group by group."""
    found = groups.list()
    drifted: list[str] = []
    late: list[str] = []
    for group in found[:_MOST_GROUPS]:
        try:
            if groups.drift(group.id).drifted:
                drifted.append(group.name)
        except ServiceUnavailable:
            late.append(group.name)
    yield _ledger(drifted, late, len(found))


def _ledger(drifted: Sequence[str], late: Sequence[str], count: int) -> Finding:
    if drifted:
        remedy = "GroupManager.reconcile(group_id) counts again. Did somebody write the tables past the functions?"
        return error("counters", f"They differ from the ledger in {listed(drifted)}.", remedy)
    if late:
        remedy = "GroupManager.reconcile(group_id, since=…) counts as much as you choose."
        return warning("counters", f"Too large to be counted here: {listed(late)}.", remedy)
    some = f", in the first {_MOST_GROUPS} of {count:,} groups" if count > _MOST_GROUPS else ""
    return ok("counters", f"They agree with the ledger{some}.")


def unreadable(answer: Any, problem: ValidationError) -> Finding:
    """Judge an answer that `read` refuses: a newer version may have other fields, and nulls are never meant."""
    wrong = problem.errors(include_url=False)
    fields = listed(sorted({".".join(map(str, each["loc"])) or "the whole" for each in wrong}))
    version: Any = cast("dict[str, Any]", answer).get("version") if isinstance(answer, dict) else None
    newer = isinstance(version, int) and version > expected().version
    if newer and all(each["input"] is not None for each in wrong):
        remedy = "Upgrade the package: pip install --upgrade tokenlimits"
        return warning("database", f"It describes itself in a newer way ({fields}).", remedy)
    return error("database", f"It can't be judged by what it says of itself: {fields}.", REAPPLY)


def read(answer: Any) -> Diagnosis:
    """Parse the answer of tokenlimits_diagnosis."""
    return Diagnosis.model_validate(answer)
