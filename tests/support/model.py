"""A plain model of the contract: what the software must answer, worked out the slow and obvious way.

It keeps a list of usages and adds up those of the current period, whenever somebody asks. There are no counters, so
nothing can drift, and periods are found by looking at what a clock on the wall reads. Its answers have the shape of
the SQL functions' JSON, with `UUID`s and aware datetimes.

    model = Model(now)
    group = model.save_group(name="Pro", limits=[{"kind": "image", "period": "day", "scope": "group", "max": 3}])
    model.add_member(group["id"], user)
    model.track(user, "image")["remaining"]        # 2
    differences(model.track(user, "image"), what_another_implementation_answered)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import count
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

Json = dict[str, Any]
Zones = Callable[[str], ZoneInfo]

PERIODS = ("minute", "hour", "day", "week", "month", "lifetime")
LIVE = ("reserved", "committed")
NEVER = datetime.max.replace(tzinfo=UTC)
BEGINNING = datetime.min.replace(tzinfo=UTC)
TIES = "ties"  # a field of the model's answers alone: where the contract leaves open which of several is named


# Periods


def _reads(instant: datetime, zone: ZoneInfo) -> date:
    """Tell the date on a wall calendar in the zone."""
    return instant.astimezone(zone).date()


@cache
def day_begins(day: date, zone: ZoneInfo) -> datetime:
    """Find the first instant at which the zone reads this date (or a later one, where the date was skipped)."""
    instant = datetime.combine(day, time(), UTC) - timedelta(hours=16)
    while _reads(instant, zone) < day:
        instant += timedelta(minutes=15)
    while _reads(instant - timedelta(minutes=1), zone) >= day:
        instant -= timedelta(minutes=1)
    return instant


def day_of(instant: datetime, zone: ZoneInfo) -> date:
    """Tell which day an instant is part of: the last that has begun."""
    day = _reads(instant, zone) + timedelta(days=1)
    while day_begins(day, zone) > instant:
        day -= timedelta(days=1)
    return day


def _next_month(day: date) -> date:
    return date(day.year + day.month // 12, day.month % 12 + 1, 1)


def period_of(period: str, zone: ZoneInfo, instant: datetime) -> tuple[datetime, datetime]:
    """Tell when the period that an instant lies in begins and ends."""
    if period == "lifetime":
        return BEGINNING, NEVER
    if period == "minute":
        minute = instant.astimezone(UTC).replace(second=0, microsecond=0)
        return minute, minute + timedelta(minutes=1)
    day = day_of(instant, zone)
    if period == "hour":
        midnight = day_begins(day, zone)
        hour = midnight + (instant - midnight) // timedelta(hours=1) * timedelta(hours=1)
        return hour, min(hour + timedelta(hours=1), day_begins(day + timedelta(days=1), zone))
    if period == "day":
        first, following = day, day + timedelta(days=1)
    elif period == "week":
        first = day - timedelta(days=day.weekday())
        following = first + timedelta(days=7)
    else:
        first, following = day.replace(day=1), _next_month(day)
    return day_begins(first, zone), day_begins(following, zone)


# What is kept


@dataclass(frozen=True)
class Rule:
    """A limit, without its max."""

    kind: str
    period: str
    scope: str


@dataclass
class Group:
    """A group and its limits."""

    id: UUID
    name: str
    description: str = ""
    priority: int = 0
    timezone: str = "UTC"
    is_default: bool = False
    limits: dict[Rule, int | None] = field(default_factory=dict)


@dataclass
class Usage:
    """A row of the ledger."""

    id: UUID
    group_id: UUID
    user_id: UUID
    kind: str
    cost: int
    status: str
    created_at: datetime
    key: str | None = None
    request: tuple[Any, ...] = ()
    expires_at: datetime | None = None

    @property
    def reserved_cost(self) -> int | None:
        """What was held, of a hold or of what was one."""
        return self.request[2] if self.expires_at else None

    @property
    def live(self) -> bool:
        """Whether it counts."""
        return self.status in LIVE


@dataclass(frozen=True)
class Verdict:
    """Who pays, or why nobody does; `denied_by` are the limits, equally full, of which the answer names one."""

    reason: str | None
    group: Group | None = None
    denied_by: tuple[Rule, ...] = ()
    room_at: datetime = NEVER


class Refusal(Exception):
    """What the real thing raises, by its SQLSTATE."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code


class Model:
    """All groups, limits, members and usages of a project, and a clock that stands still until it is advanced."""

    def __init__(self, now: datetime, zones: Zones = ZoneInfo) -> None:
        self.now = now
        self.groups: dict[UUID, Group] = {}
        self.usages: list[Usage] = []
        self._zones = zones
        self._joined: dict[tuple[UUID, UUID], int] = {}
        self._joins = count()
        self._resets: dict[tuple[UUID, str], datetime] = {}

    # the clock

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self.advance_to(self.now + by)

    def advance_to(self, instant: datetime) -> None:
        """Let time pass until an instant; holds expire meanwhile."""
        assert instant >= self.now
        self.now = instant
        for usage in self.usages:
            if usage.status == "reserved" and usage.expires_at and usage.expires_at <= instant:
                usage.status = "expired"

    def next_boundary(self, group_id: UUID, period: str) -> datetime:
        """Tell when a group's current period ends."""
        return self._period(self.groups[group_id], period)[1]

    # groups, limits, members

    def save_group(
        self,
        group_id: UUID | None = None,
        *,
        limits: Iterable[Mapping[str, Any]] | None = None,
        new_id: UUID | None = None,
        **fields: Any,
    ) -> Json:
        """Make a group, or change an existing one; `limits` replaces the whole set."""
        if group_id is not None:
            self._require(group_id)
        name = fields.get("name")
        if name is not None and self._taken(name, group_id):
            raise Refusal("TL003", f"a group named {name!r} already exists")
        if group_id is None:
            group_id = new_id or uuid4()
            self.groups[group_id] = Group(group_id, fields["name"])
        group = self.groups[group_id]
        if fields.get("is_default"):
            for other in self.groups.values():
                other.is_default = False
        for key, value in fields.items():
            if value is not None:
                setattr(group, key, value)
        if limits is not None:
            group.limits = {Rule(x["kind"], x["period"], x["scope"]): x["max"] for x in limits}
        return self.group(group_id)

    def group(self, group_id: UUID) -> Json:
        """Show a group with its limits."""
        group = self._require(group_id)
        return {
            "id": group.id,
            "name": group.name,
            "description": group.description,
            "priority": group.priority,
            "timezone": group.timezone,
            "is_default": group.is_default,
            "limits": [
                {"kind": r.kind, "period": r.period, "scope": r.scope, "max": maximum}
                for r, maximum in sorted(
                    group.limits.items(), key=lambda x: (x[0].kind, x[0].scope, PERIODS.index(x[0].period))
                )
            ],
        }

    def set_limit(self, group_id: UUID, kind: str, period: str, scope: str, maximum: int | None) -> None:
        """Add a limit, or change its max."""
        self._require(group_id).limits[Rule(kind, period, scope)] = maximum

    def remove_limit(self, group_id: UUID, kind: str, period: str, scope: str) -> None:
        """Remove a limit; without it, nothing happens."""
        self._require(group_id).limits.pop(Rule(kind, period, scope), None)

    def delete_group(self, group_id: UUID) -> None:
        """Delete a group with its limits and memberships; its usages stay."""
        self._require(group_id)
        del self.groups[group_id]
        self._joined = {pair: joined for pair, joined in self._joined.items() if pair[0] != group_id}

    def delete_user(self, user_id: UUID) -> None:
        """Delete a user; their usages stay."""
        self._joined = {pair: joined for pair, joined in self._joined.items() if pair[1] != user_id}

    def add_member(self, group_id: UUID, user_id: UUID) -> bool:
        """Add a user to a group; false when they are in it already."""
        self._require(group_id)
        if (group_id, user_id) in self._joined:
            return False
        self._joined[group_id, user_id] = next(self._joins)
        return True

    def remove_member(self, group_id: UUID, user_id: UUID) -> bool:
        """Remove a user from a group; false when they are not in it."""
        self._require(group_id)
        return self._joined.pop((group_id, user_id), None) is not None

    def move_member(self, user_id: UUID, from_: UUID, to: UUID) -> bool:
        """Move a user from one group to another; false when they are not in the first."""
        self._require(from_)
        self._require(to)
        if from_ == to or not self.remove_member(from_, user_id):
            return False
        self.add_member(to, user_id)
        return True

    def members(self, group_id: UUID) -> set[UUID]:
        """Tell who is in a group."""
        return {user for group, user in self._joined if group == group_id}

    def reset(self, group_id: UUID, kind: str | None = None) -> None:
        """Give a group a fresh start: what it has used of a kind, or of all, counts no more."""
        self._require(group_id)
        self._resets[group_id, kind or "*"] = self.now

    # what workers ask

    def track(
        self,
        user_id: UUID,
        kind: str,
        cost: int = 1,
        idempotency_key: str | None = None,
        group_id: UUID | None = None,
    ) -> Json:
        """Check every limit that applies and record the usage, if there is room."""
        return self._take(user_id, idempotency_key, ("track", kind, cost, group_id), None)

    def reserve(
        self,
        user_id: UUID,
        kind: str,
        cost: int = 1,
        ttl: int = 3600,
        idempotency_key: str | None = None,
        group_id: UUID | None = None,
    ) -> Json:
        """Check every limit that applies and hold the cost for a while, if there is room."""
        if not 1 <= ttl <= 2_592_000:
            raise Refusal("TL001", "ttl")
        return self._take(user_id, idempotency_key, ("reserve", kind, cost, group_id), timedelta(seconds=ttl))

    def _take(self, user_id: UUID, key: str | None, request: tuple[Any, ...], ttl: timedelta | None) -> Json:
        live = self._live_under(user_id, key, request)
        if live is not None:
            return self._usage_answer(live, replayed=True)
        _, kind, cost, group_id = request
        verdict = self._judge(user_id, kind, cost, group_id)
        if verdict.reason is not None:
            return self._verdict_answer(verdict, user_id, kind, cost)
        assert verdict.group is not None
        usage = self._write(verdict.group.id, user_id, kind, cost, self.now, key=key, request=request)
        if ttl is not None:
            usage.status, usage.expires_at = "reserved", self.now + ttl
        return self._usage_answer(usage, replayed=False)

    def commit(self, usage_id: UUID, cost: int | None = None) -> Json:
        """Settle a hold for its cost or less; an expired one only while it fits."""
        usage = self._usage(usage_id)
        held = usage.reserved_cost
        if held is None:
            raise _settled(usage)
        cost = held if cost is None else cost
        if not 0 <= cost <= held:
            raise Refusal("TL001", "cost")
        if usage.status == "committed" and usage.cost == cost:
            return self._usage_answer(usage, replayed=True)
        if usage.status == "expired":
            self._require_room(usage, cost)
        elif usage.status != "reserved":
            raise _settled(usage)
        usage.status, usage.cost = "committed", cost
        return self._usage_answer(usage, replayed=False)

    def release(self, usage_id: UUID) -> Json:
        """Give a hold back; one that has expired is given back already."""
        usage = self._usage(usage_id)
        if usage.status in ("released", "expired"):
            return self._usage_answer(usage, replayed=True)
        if usage.status != "reserved":
            raise _settled(usage)
        usage.status = "released"
        return self._usage_answer(usage, replayed=False)

    def refund(self, usage_id: UUID) -> Json:
        """Give back what a committed usage cost."""
        usage = self._usage(usage_id)
        if usage.status == "refunded":
            return self._usage_answer(usage, replayed=True)
        if usage.status == "reserved":
            raise Refusal("TL001", "usage_id")
        if usage.status != "committed":
            raise _settled(usage)
        usage.status = "refunded"
        return self._usage_answer(usage, replayed=False)

    def check(self, user_id: UUID, kind: str, cost: int = 1, group_id: UUID | None = None) -> Json:
        """Tell what `track` would answer; record nothing."""
        return self._verdict_answer(self._judge(user_id, kind, cost, group_id), user_id, kind, cost)

    def record(
        self,
        user_id: UUID,
        kind: str,
        cost: int = 1,
        created_at: datetime | None = None,
        idempotency_key: str | None = None,
        group_id: UUID | None = None,
    ) -> Json:
        """Record what has happened elsewhere, whether there is room or not."""
        if created_at is not None and created_at > self.now + timedelta(minutes=1):
            raise Refusal("TL001", "created_at")
        request = ("record", kind, cost, group_id)
        live = self._live_under(user_id, idempotency_key, request)
        if live is not None:
            return self._usage_answer(live, replayed=True)
        usage = self._write(
            self._recording_group(user_id, kind, group_id),
            user_id,
            kind,
            cost,
            min(created_at or self.now, self.now),
            key=idempotency_key,
            request=request,
        )
        return self._usage_answer(usage, replayed=False)

    # what people look at

    def user_usage(self, user_id: UUID) -> list[Json]:
        """Show every limit that binds a user, in the order in which groups pay."""
        return [
            self._limit(group, rule, user_id) | {"group": {"id": group.id, "name": group.name}}
            for group in self._paying(user_id, None)
            for rule in group.limits
        ]

    def group_usage(self, group_id: UUID) -> Json:
        """Show a group's limits; a member limit as what all members used of what all may use."""
        group = self._require(group_id)
        return {
            "group": {"id": group.id, "name": group.name},
            "member_count": len(self.members(group_id)),
            "limits": [self._group_limit(group, rule) for rule in group.limits],
        }

    def history(self, group_id: UUID | None, bucket: str) -> list[Json]:
        """Add up live usages per kind and hour, day, week or month of the group's time zone, from the beginning."""
        zone = self._zones(self._require(group_id).timezone if group_id else "UTC")
        used: Counter[tuple[datetime, str]] = Counter()
        generations: Counter[tuple[datetime, str]] = Counter()
        for usage in self.usages:
            if usage.live and group_id in (None, usage.group_id):
                point = period_of(bucket, zone, usage.created_at)[0], usage.kind
                used[point] += usage.cost
                generations[point] += 1
        return [
            {"bucket": at, "kind": kind, "used": used[at, kind], "generations": generations[at, kind]}
            for at, kind in sorted(generations)
        ]

    # how it is worked out

    def used(self, group: Group, rule: Rule, user_id: UUID | None) -> int:
        """Add up what counts for a limit now; for a member limit without a user, of all members together."""
        since, until = self._counted(group, rule)
        return sum(
            usage.cost
            for usage in self.usages
            if usage.live
            and usage.group_id == group.id
            and usage.kind == rule.kind
            and since <= usage.created_at < until
            and (rule.scope == "group" or user_id in (None, usage.user_id))
        )

    def _counted(self, group: Group, rule: Rule) -> tuple[datetime, datetime]:
        """Tell which moments count for a limit now."""
        since, until = self._period(group, rule.period)
        for kind in (rule.kind, "*"):
            since = max(since, self._resets.get((group.id, kind), BEGINNING))
        return since, until

    def _usage(self, usage_id: UUID) -> Usage:
        for usage in self.usages:
            if usage.id == usage_id:
                return usage
        raise Refusal("TL005", f"there is no usage {usage_id}")

    def _require_room(self, usage: Usage, cost: int) -> None:
        group = self.groups.get(usage.group_id)
        for rule, maximum in group.limits.items() if group else ():
            if rule.kind == usage.kind:
                assert group is not None
                past = usage.created_at < self._counted(group, rule)[0]
                if past or (maximum is not None and self.used(group, rule, usage.user_id) + cost > maximum):
                    raise Refusal("TL007", f"{usage.id} expired")

    def _period(self, group: Group, period: str) -> tuple[datetime, datetime]:
        return period_of(period, self._zones(group.timezone), self.now)

    def _require(self, group_id: UUID) -> Group:
        if group_id not in self.groups:
            raise Refusal("TL002", f"there is no group {group_id}")
        return self.groups[group_id]

    def _taken(self, name: str, by_other_than: UUID | None) -> bool:
        return any(g.name.lower() == name.lower() and g.id != by_other_than for g in self.groups.values())

    def _paying(self, user_id: UUID, pinned: UUID | None) -> list[Group]:
        joined = {group: order for (group, user), order in self._joined.items() if user == user_id}
        mine = [self.groups[g] for g in sorted(joined, key=lambda g: (-self.groups[g].priority, joined[g]))]
        if not mine:
            mine = [g for g in self.groups.values() if g.is_default]
        if pinned is None:
            return mine
        group = self._require(pinned)
        return [group] if group in mine else []

    def _judge(self, user_id: UUID, kind: str, cost: int, pinned: UUID | None) -> Verdict:
        groups = self._paying(user_id, pinned)
        if not groups:
            return Verdict("not_in_group")
        entitling = [g for g in groups if any(rule.kind == kind for rule in g.limits)]
        if not entitling:
            return Verdict("no_limit_for_kind")
        denials = []
        for group in entitling:
            full = {rule: self._room_at(group, rule, cost) for rule in self._full(group, user_id, kind, cost)}
            if not full:
                return Verdict(None, group)
            room_at = max(full.values())
            last = tuple(rule for rule in full if full[rule] == room_at)
            denials.append(Verdict("limit_exceeded", group, last, room_at))
        return min(denials, key=lambda denial: denial.room_at)

    def _full(self, group: Group, user_id: UUID, kind: str, cost: int) -> list[Rule]:
        return [rule for rule in group.limits if rule.kind == kind and not self._fits(group, rule, user_id, cost)]

    def _fits(self, group: Group, rule: Rule, user_id: UUID, cost: int) -> bool:
        maximum = group.limits[rule]
        return maximum is None or self.used(group, rule, user_id) + cost <= maximum

    def _room_at(self, group: Group, rule: Rule, cost: int) -> datetime:
        maximum = group.limits[rule]
        assert maximum is not None
        return NEVER if cost > maximum else self._period(group, rule.period)[1]

    def _recording_group(self, user_id: UUID, kind: str, named: UUID | None) -> UUID:
        if named is not None:
            return self._require(named).id
        groups = self._paying(user_id, None)
        if not groups:
            raise Refusal("TL001", "group_id")
        entitling = [g for g in groups if any(rule.kind == kind for rule in g.limits)]
        return (entitling or groups)[0].id

    def _live_under(self, user_id: UUID, key: str | None, request: tuple[Any, ...]) -> Usage | None:
        for usage in self.usages:
            if key is not None and usage.live and (usage.user_id, usage.key) == (user_id, key):
                if usage.request != request:
                    raise Refusal("TL008", f"{key} was used for another request")
                return usage
        return None

    def _write(
        self,
        group_id: UUID,
        user_id: UUID,
        kind: str,
        cost: int,
        created_at: datetime,
        *,
        key: str | None,
        request: tuple[Any, ...],
    ) -> Usage:
        for dead in self.usages:
            if key is not None and (dead.user_id, dead.key) == (user_id, key):
                dead.key = None
        usage = Usage(uuid4(), group_id, user_id, kind, cost, "committed", created_at, key, request)
        self.usages.append(usage)
        return usage

    # answers

    def _usage_answer(self, usage: Usage, *, replayed: bool) -> Json:
        return {
            **self._allowed(self.groups.get(usage.group_id), usage.kind, usage.cost, usage.user_id),
            "group": self._name(usage.group_id),
            "usage_id": usage.id,
            "status": usage.status,
            "expires_at": usage.expires_at,
            "replayed": replayed,
        }

    def _verdict_answer(self, verdict: Verdict, user_id: UUID, kind: str, cost: int) -> Json:
        answer = self._allowed(verdict.group, kind, cost, user_id)
        if verdict.reason is None:
            return answer
        ties = [self._denial(verdict, rule, user_id, kind, cost) for rule in verdict.denied_by or (None,)]
        return answer | {"allowed": False, "reason": verdict.reason} | ties[0] | {TIES: ties}

    def _allowed(self, group: Group | None, kind: str, cost: int, user_id: UUID) -> Json:
        """Answer that it is allowed: `remaining` and `reset_at` are those of the limit with the least room."""
        limits = [self._limit(group, rule, user_id) for rule in group.limits if rule.kind == kind] if group else []
        ties = [{"remaining": x["remaining"], "reset_at": x["reset_at"]} for x in _tightest(limits)]
        return {
            "allowed": True,
            **dict.fromkeys(("reason", "error", "usage_id", "status", "expires_at", "denied_by", "retry_after")),
            "group": self._name(group.id) if group else None,
            "kind": kind,
            "cost": cost,
            "limits": limits,
            **(ties[0] if ties else {"remaining": None, "reset_at": None}),
            "replayed": False,
            TIES: ties,
        }

    def _denial(self, verdict: Verdict, rule: Rule | None, user_id: UUID, kind: str, cost: int) -> Json:
        error = self._error(verdict, rule, user_id, kind, cost)
        if verdict.group is None or rule is None:
            return {"error": error, "reset_at": None}
        reset_at = None if verdict.room_at == NEVER else verdict.room_at
        return {
            "error": error,
            "denied_by": self._limit(verdict.group, rule, user_id) | {"reset_at": reset_at},
            "reset_at": reset_at,
            "retry_after": math.ceil((reset_at - self.now).total_seconds()) if reset_at else None,
        }

    def _error(self, verdict: Verdict, rule: Rule | None, user_id: UUID, kind: str, cost: int) -> str:
        words = kind.replace("_", " ")
        if verdict.reason == "not_in_group":
            return "The user is in no group that may pay for this"
        if verdict.reason == "no_limit_for_kind":
            return f"None of the user's groups has a limit for {words} generations, so none is allowed"
        group = verdict.group
        assert group is not None
        assert rule is not None
        when = {"day": "today", "lifetime": "in total"}.get(rule.period, f"this {rule.period}")
        text = f"{words[0].upper()}{words[1:]} generation limit exceeded: "
        text += f"{self.used(group, rule, user_id)} of {group.limits[rule]} used "
        text += f"by this user {when}" if rule.scope == "member" else when
        if cost > 1:
            text += f", {cost} more asked for"
        if verdict.room_at != NEVER:
            local = verdict.room_at.astimezone(self._zones(group.timezone))
            text += f", resets {local:%Y-%m-%d %H:%M} {group.timezone}"
        return text

    def _name(self, group_id: UUID) -> Json:
        group = self.groups.get(group_id)
        return {"id": group_id, "name": group.name if group else None}

    def _limit(self, group: Group, rule: Rule, user_id: UUID | None) -> Json:
        maximum = group.limits[rule]
        used = self.used(group, rule, user_id)
        until = self._period(group, rule.period)[1]
        return {
            "kind": rule.kind,
            "period": rule.period,
            "scope": rule.scope,
            "max": maximum,
            "used": used,
            "remaining": None if maximum is None else max(maximum - used, 0),
            "reset_at": None if until == NEVER else until,
        }

    def _group_limit(self, group: Group, rule: Rule) -> Json:
        shown = self._limit(group, rule, None)
        members = len(self.members(group.id)) if rule.scope == "member" else 1
        capacity = None if shown["max"] is None else shown["max"] * members
        fraction = None
        if capacity is not None:
            fraction = round(shown["used"] / capacity, 6) if capacity else 1
            shown["remaining"] = max(capacity - shown["used"], 0)
        return shown | {"capacity": capacity, "fraction": fraction}


def _settled(usage: Usage) -> Refusal:
    return Refusal("TL006", f"{usage.id} is {usage.status} already")


def _tightest(limits: list[Json]) -> list[Json]:
    """Tell which limits have the least room."""
    room = {i: x["max"] - x["used"] for i, x in enumerate(limits) if x["max"] is not None}
    return [limits[i] for i in room if room[i] == min(room.values())]


# Comparing


def differences(expected: Json, actual: Json) -> dict[str, tuple[Any, Any]]:
    """Tell where an answer is not what the model answers: field → (expected, actual).

    Usages have ids of their own, and limits no order. Where several limits are equally full, any of them may be named.
    """
    variants = [_differences(expected | tie, actual) for tie in expected.get(TIES) or [{}]]
    return min(variants, key=len)


def _differences(expected: Json, actual: Json) -> dict[str, tuple[Any, Any]]:
    different = {}
    for name, value in expected.items():
        if name == TIES:
            continue
        if name == "usage_id":
            same = (value is None) == (actual[name] is None)
        elif name == "limits":
            same = by_rule(value) == by_rule(actual[name])
        else:
            same = actual[name] == value
        if not same:
            different[name] = (value, actual[name])
    return different


def by_rule(limits: Iterable[Json]) -> dict[tuple[Any, ...], Json]:
    """Key limits by what tells them apart."""
    return {(x.get("group", {}).get("id"), x["kind"], x["period"], x["scope"]): x for x in limits}
