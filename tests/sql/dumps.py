"""A project in use, what is seen of it, and the programs that dump and restore it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.sql.api import GROUP_ID, OTHER_GROUP_ID, OTHER_ID, USER_ID
from tests.support import invariants
from tests.support.postgres import servers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Connect
    from tests.sql.api import Connection

USERS: Final = f"""
insert into auth.users (id, email) values ('{USER_ID}', 'user@example.com'), ('{OTHER_ID}', 'other@example.com');
"""
# No period ends while the tests run.
GROUPS: Final = f"""
insert into public.user_groups (id, name, priority) values ('{GROUP_ID}', 'Pro', 1), ('{OTHER_GROUP_ID}', 'Team', 0);
insert into public.group_limits (group_id, kind, period, scope, max) values
  ('{GROUP_ID}', 'image', 'lifetime', 'group', 16), ('{GROUP_ID}', 'image', 'lifetime', 'member', 12),
  ('{OTHER_GROUP_ID}', 'image', 'lifetime', 'group', 100);
insert into public.group_memberships (group_id, user_id) values
  ('{GROUP_ID}', '{USER_ID}'), ('{GROUP_ID}', '{OTHER_ID}'), ('{OTHER_GROUP_ID}', '{OTHER_ID}');
"""
# What is recorded for long ago is in no 15 minutes that anything else is in.
USAGE: Final = f"""
select public.record_generation('{USER_ID}', 'image', 1, '2020-02-29 12:00Z', null, '{GROUP_ID}');
select public.record_generation('{OTHER_ID}', 'image', 5, '2020-02-29 12:00Z', null, '{OTHER_GROUP_ID}');
select public.track_generation('{USER_ID}', 'image', 2, 'mine', '{GROUP_ID}');
select public.track_generation('{OTHER_ID}', 'image', 3, 'other''s key', '{GROUP_ID}', '{{"job": "a\\tb"}}');
select public.track_generation('{OTHER_ID}', 'image', 4, null, '{OTHER_GROUP_ID}');
select public.reserve_generation('{USER_ID}', 'image', 1, 3600, 'held', '{GROUP_ID}');
select public.refund_generation((
  public.track_generation('{USER_ID}', 'image', 1, 'refunded', '{GROUP_ID}') ->> 'usage_id'
)::uuid);
"""
RESET: Final = f"select public.reset_group_usage('{OTHER_GROUP_ID}')"

# updated_at is the moment of the restoration where triggers saw the rows come.
PICTURE: Final = """
select jsonb_build_object(
  'groups', (select jsonb_agg(g - 'updated_at') from jsonb_array_elements(public.find_groups()) as g),
  'members', (select jsonb_agg(public.group_members(g.id) order by g.id) from public.user_groups as g),
  'usage', public.group_usage(),
  'users', (select jsonb_agg(public.user_generation_usage(u.id) order by u.id) from auth.users as u),
  'history', public.generation_history(p_bucket => 'month', p_since => '2000-01-01'),
  'ledger', (select jsonb_agg(to_jsonb(u) order by u.id) from public.generation_usage as u)
)
"""

# What `supabase db dump` passes to pg_dump, and what it changes in the text.
AS_SUPABASE: Final = ("--quote-all-identifier", "--role=postgres")
IN_THE_SCHEMA: Final = {
    '^CREATE (SCHEMA|TABLE|SEQUENCE) "': r'CREATE \1 IF NOT EXISTS "',
    '^CREATE (VIEW|FUNCTION|TRIGGER) "': r'CREATE OR REPLACE \1 "',
    r"^SET transaction_timeout = 0;": r"-- \g<0>",
    r"^--.*\n": "",
}
IN_BOTH: Final = {r"^\\(un)?restrict .*$": r"-- \g<0>"}
NOT_THEIR_SCHEMA: Final = (
    "--exclude-schema=information_schema|pg_*|auth|extensions|realtime|storage|supabase_migrations"
)
NOT_THEIR_DATA: Final = "--exclude-schema=information_schema|pg_*|extensions|realtime|supabase_migrations"


def dump(connection: Connection, *options: str) -> list[str]:
    """What pg_dump says, line by line, without what differs from run to run."""
    info = connection.info
    program = servers()[str(info.server_version // 10000)] / "pg_dump"
    address = f"postgresql://supabase_admin@{info.host}:{info.port}/{info.dbname}"
    done = subprocess.run([program, *options, address], check=True, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if not re.match(r"--|\\|SET |$", line)]


def dump_of_ours(connection: Connection, *options: str) -> str:
    """The same of our schemas, as one text."""
    lines = dump(connection, "--schema=public", "--schema=tokenlimits", *options)
    # privileges last and in order: revoking and granting again puts them in another one
    return "\n".join(sorted(lines, key=lambda line: line if line.startswith("GRANT ") else ""))


@dataclass(frozen=True)
class Programs:
    """pg_dump, pg_restore and psql of one version."""

    directory: Path

    def run(self, name: str, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.directory / name, *map(str, arguments)], check=False, capture_output=True, text=True, input=stdin
        )
        assert done.returncode == 0, done.stderr
        return done

    def supabase_schema(self, database: Connect, *options: str) -> str:
        """What `supabase db dump` writes."""
        text = self.run("pg_dump", "--schema-only", *AS_SUPABASE, *options, url(database)).stdout
        return f"{_changed(text, IN_BOTH | IN_THE_SCHEMA)}\nRESET ALL;\n"

    def supabase_data(self, database: Connect, *options: str) -> str:
        """What `supabase db dump --data-only` writes."""
        text = self.run("pg_dump", "--data-only", *AS_SUPABASE, *options, url(database)).stdout
        return f"SET session_replication_role = replica;\n{_changed(text, IN_BOTH)}\nRESET ALL;\n"

    def restore(self, database: Connect, *texts: str) -> None:
        """All or nothing, as Supabase's guide says."""
        options = ("--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1")
        self.run("psql", *options, url(database), stdin="".join(texts))

    def restore_what_can_be(self, database: Connect, *texts: str) -> set[str]:
        """Go on after errors, and tell them."""
        done = self.run("psql", "--no-psqlrc", "--quiet", url(database), stdin="".join(texts))
        return set(re.findall(r"ERROR:  (.*)", done.stderr))


def restore_project(programs: Programs, source: Connect, target: Connect) -> None:
    """Restore the two dumps that Supabase's guide makes, of all that isn't Supabase's."""
    programs.restore(
        target,
        programs.supabase_schema(source, NOT_THEIR_SCHEMA),
        programs.supabase_data(source, NOT_THEIR_DATA, "--schema=*"),
    )


def restore_public(programs: Programs, source: Connect, target: Connect) -> None:
    """Restore what is in public, where the users are already: all but what needs the private schema."""
    apply(target, USERS)
    errors = programs.restore_what_can_be(
        target,
        programs.supabase_schema(source, "--schema=public"),
        programs.supabase_data(source, "--schema=public"),
    )
    assert errors == {
        'schema "tokenlimits" does not exist',
        'trigger "user_groups_move_in_tree_insert" for table "user_groups" does not exist',
    }


def as_hosted(database: Connect) -> Connect:
    """Let the role postgres own the database, and load data past triggers."""
    with database("supabase_admin") as admin:
        admin.execute(f"alter database {admin.info.dbname} owner to postgres")
        admin.execute("grant set on parameter session_replication_role to postgres")
    return database


def name_of(database: Connect) -> str:
    with database("postgres") as connection:
        return connection.info.dbname


def url(database: Connect, user: str = "postgres") -> str:
    with database(user) as connection:
        info = connection.info
        return f"postgresql://{user}@{info.host}:{info.port}/{info.dbname}"


def apply(database: Connect, script: str) -> None:
    with database("postgres") as connection:
        connection.execute(script)  # pyright: ignore[reportArgumentType, reportCallIssue]


def picture(database: Connect) -> Any:
    """All that people and workers see."""
    with database("postgres") as connection:
        return one(connection, PICTURE)


def used(database: Connect) -> dict[str, int]:
    """What each group's pool has used."""
    return {
        usage["group"]["name"]: limit["used"]
        for usage in picture(database)["usage"]
        for limit in usage["limits"]
        if limit["scope"] == "group"
    }


def assert_goes_on(database: Connect) -> None:
    """Keys bind, holds settle, each limit holds exactly, and limits can be added."""
    with database("postgres") as connection:
        found = dict(connection.execute("select idempotency_key, id::text from public.generation_usage").fetchall())
        again = track(connection, USER_ID, 2, key="mine")
        assert (again["replayed"], again["usage_id"]) == (True, found["mine"])
        connection.execute("select public.commit_generation(%s)", [found["held"]])
        # the user has used 4 of 12, the other one 3, the group 7 of 16
        denied = track(connection, USER_ID, 9)["denied_by"]
        assert (denied["scope"], denied["used"]) == ("member", 4)
        assert track(connection, USER_ID, 6)["allowed"]
        denied = track(connection, OTHER_ID, 4)["denied_by"]
        assert (denied["scope"], denied["used"]) == ("group", 13)
        assert track(connection, OTHER_ID, 3)["remaining"] == 0
        limit = '{"kind": "video", "period": "day", "scope": "member", "max": 1}'
        connection.execute("select public.set_group_limit(%s, %s)", [GROUP_ID, limit])
        assert track(connection, USER_ID, 1, "video")["allowed"]
        assert invariants.drift(connection) == []


def track(connection: Connection, user: str, cost: int, kind: str = "image", key: str | None = None) -> Any:
    query = "select public.track_generation(%s, %s, %s, %s, %s)"
    return one(connection, query, [user, kind, cost, key, GROUP_ID])


def one(connection: Connection, query: str, arguments: Any = None) -> Any:
    row = connection.execute(query, arguments).fetchone()  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert row is not None
    return row[0]


def _changed(text: str, changes: dict[str, str]) -> str:
    for pattern, replacement in changes.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text
