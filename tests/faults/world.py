"""Where the runs take place, and what is checked there after each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
from tests.faults import verdict
from tests.faults.journal import Account
from tests.faults.plan import TTL
from tests.faults.worker import Colour, Orders
from tests.support import clock
from tests.support.invariants import drift
from tests.support.postgres import PostgresServer
from tests.support.waiting import eventually

from tokenlimits import GroupManager, TokenLimits
from tokenlimits.local import LocalStack
from tokenlimits.models import Group, User

TIMEOUT = 2.0
"""Of the workers' clients, in seconds; a single try has four fifths of it."""

# transactions that are open, and locks that are ours: advisory ones
LEFT_OPEN = """
select a.state, a.query, l.locktype
from pg_stat_activity as a
left join pg_locks as l on l.pid = a.pid and l.locktype = 'advisory'
where
  a.datname = current_database()
  and a.pid <> pg_backend_pid()
  and a.backend_type = 'client backend'
  and (a.state <> 'idle' or l.pid is not null)
"""


@dataclass(frozen=True)
class Site:
    server: PostgresServer
    stack: LocalStack

    def owner(self) -> psycopg.Connection[tuple[Any, ...]]:
        return self.server.connect("app")


@dataclass(frozen=True)
class World:
    site: Site
    groups: GroupManager
    made: tuple[Group, ...]
    plan: Group
    users: list[str]

    def orders(self, seed: str, worker: str, colour: Colour, jobs: int, lanes: int = 8) -> Orders:
        return Orders(seed, worker, colour, jobs, lanes, self.users, TIMEOUT, "", [])

    def check(self, account: Account, seed: str) -> None:
        """Find nothing wrong with what was done."""
        with self.site.owner() as owner:
            self._nothing_hangs(owner)
            none(drift(owner), seed)
            clock.run_from(owner, clock.read(owner) + timedelta(seconds=TTL + 1))
            none(verdict.problems(account, verdict.ledger(owner, account.begun)), seed)
            for group in self.made:
                for kind in ("image", "video"):
                    none(self._wrong_rooms(owner, group.id, kind), seed)
            for group in (*self.made, self.plan):
                mended = self.groups.reconcile(group.id)
                none([*mended.counters, *mended.rollup], seed)
            none(drift(owner), seed)

    def _nothing_hangs(self, owner: psycopg.Connection[tuple[Any, ...]]) -> None:
        """Whatever the dead had begun is over at last."""
        eventually(lambda: not owner.execute(LEFT_OPEN).fetchall())

    def _wrong_rooms(
        self, owner: psycopg.Connection[tuple[Any, ...]], group_id: UUID, kind: str
    ) -> Iterator[tuple[User, int]]:
        """Let each member take all that the ledger leaves them, to the unit: what the dead held was given back.

        What the dead had asked for may still be done meanwhile, on a busy machine: the ledger afterwards counts.
        """

        def left(user: User) -> int:
            rooms = verdict.rooms(owner, group_id, kind)
            return min((each.left for each in rooms if each.scope != "member" or each.subject == user.id), default=0)

        with TokenLimits.from_env(timeout=60) as limits:
            for user in self.groups.members(group_id):
                room = left(user)
                taken = room <= 0 or limits.track(user.id, kind, room, group_id=group_id).allowed
                if not taken and left(user) >= room:
                    yield user, room
                if limits.track(user.id, kind, group_id=group_id) and left(user) < 0:
                    yield user, left(user)
                if room < 0:
                    yield user, room


def none(found: Iterable[object], seed: str) -> None:
    """Fail with the first of what was found, and how to find it again."""
    lines = [str(each)[:1000] for each in found]
    assert not lines, "\n".join(
        [f"{len(lines)} problems; TOKENLIMITS_FAULTS_SEED={seed.partition('.')[0]}", *lines[:10]]
    )
