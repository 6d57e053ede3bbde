"""The admin panel with sample data, on a local Supabase: `make admin`.

It prints its URL and an account to sign in with. Generations keep coming in, so that the bars move.
"""

from __future__ import annotations

import argparse
import random
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import get_args
from uuid import UUID

import httpx
import uvicorn
from supabase import Client, ClientOptions

from tokenlimits import GenerationRequest, GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack
from tokenlimits.models import Group, GroupUsage, Mode, Scope, Starts
from tokenlimits.web import WebSettings, create_app

# name, the group it is beneath, description, time zone, members, how much of each limit is used, limits
GROUPS: list[tuple[str, str, str, str, int, float, list[str]]] = [
    ("Free", "", "Everybody begins here", "UTC", 240, 0.42, ["image 10 day member", "video 600 week"]),
    ("Pro", "", "Credits for each customer, from its billing date", "Europe/Paris", 0, 0,
     ["credits 1000 month anchor child image:1+video:8", "video 2 in_flight child"]),
    ("Acme", "Pro", "Customer since the first day", "Europe/Paris", 14, 0.61, []),
    ("Blue Harbour", "Pro", "A campaign until the end of the month", "Europe/Paris", 6, 0.38, []),
    ("Cobalt Films", "Pro", "Trailers, mostly", "America/New_York", 9, 0.96, []),
    ("Dune & Daughters", "Pro", "", "Europe/Madrid", 3, 0.77, ["audio 300 day"]),
    ("Studio", "", "An agency that sells what it buys", "America/New_York", 0, 0,
     ["image 9000 month", "image 60 3-hours rolling member"]),
    ("Shop", "Studio", "Pictures of products", "America/New_York", 18, 0.63, ["image 6000 month"]),
    ("Bank", "Studio", "Reports, and a campaign", "America/New_York", 8, 0.52, ["image 4000 month"]),
    ("Campaign", "Bank", "For one summer", "America/New_York", 4, 0.41, ["image 900 month"]),
    ("Northwind", "", "Contract until the end of next year", "Europe/Berlin", 120, 0.35, ["image 500000 year anchor"]),
    ("Beta testers", "", "May try video before others do", "UTC", 31, 0.97, ["video 400 day", "audio 50 day observe"]),
    ("Education", "", "Schools", "Europe/Madrid", 410, 0.2, ["image 20 day member", "tokens 150000 month"]),
    ("Chat", "", "A session begins with the first message", "UTC", 52, 0.3, ["message 50 5-hours first_use member"]),
    ("Partners", "", "Integrations that resell us", "Asia/Tokyo", 9, 0.74, ["image 12000 month", "audio - month"]),
    ("Trial ended", "", "Until they choose a plan", "UTC", 57, 0, ["image 0 lifetime"]),
]  # fmt: skip
WORDS = {
    word: name for name, words in (("scope", Scope), ("starts", Starts), ("mode", Mode)) for word in get_args(words)
}


@dataclass(frozen=True)
class Made:
    """A group with its users, and the limits that count for it and for nothing beside it."""

    group: Group
    users: list[UUID]
    share: float
    limits: list[Limit]


def limit(words: str) -> Limit:
    """Read a limit like "credits 1000 month child image:1+video:8"; a dash is unlimited."""
    name, max_, *more = words.split()
    fields: dict[str, object] = {"kind": name, "max": None if max_ == "-" else int(max_)}
    for word in more:
        if ":" in word:
            fields["counts"] = {kind: int(by) for kind, by in (each.split(":") for each in word.split("+"))}
        else:
            fields[WORDS.get(word, "period")] = word.replace("-", " ")
    return Limit.model_validate(fields)


def make_groups(groups: GroupManager, stack: LocalStack, chance: random.Random) -> list[Made]:
    """Create the groups and their members, and an exception for one customer."""
    made: dict[str, Made] = {}
    for name, above, description, timezone, members, share, limits in GROUPS:
        parent = made[above].group if above else None
        group = groups.create(
            name,
            description=description,
            timezone=timezone,
            limits=[limit(words) for words in limits],
            is_default=name == "Free",
            priority=len(made),
            anchor_at=datetime.now(UTC) - timedelta(days=chance.randint(9, 25)),
            parent=parent,
        )
        users = stack.create_users(members, f"{name.lower().replace(' ', '-').replace('&', 'and')}-")
        if users:
            groups.add_members(group.id, users)
        of_plan = [each for each in parent.limits if each.scope == "child"] if parent else []
        made[name] = Made(group, users, share, [*group.limits, *of_plan])
    until = datetime.now(UTC) + timedelta(days=20)
    groups.set_override(made["Pro"].group.id, "credits", 5000, child_id=made["Blue Harbour"].group.id, until=until)
    return list(made.values())


def make_history(limits: TokenLimits, groups: GroupManager, made: list[Made], chance: random.Random) -> None:
    """Record two months of generations, then use each limit to its group's share."""
    now = datetime.now(UTC)
    days_of = {"day": 1, "week": 7, "month": now.day}
    for each in made:
        for limit_ in each.limits if each.users and each.share else ():
            if limit_.period == "in_flight":
                continue
            members = len(each.users) // 2 if limit_.scope == "member" else 1
            since = (now - (each.group.anchor_at or now)).days
            days = since if limit_.starts == "anchor" else days_of.get(limit_.period, 1)
            # an eighth less, for weekends and chance
            usual = (limit_.max or 900) * each.share * members / days / 0.88
            counted = limit_.counts or {limit_.kind: 1}
            for day, (kind, weight) in product(range(60, 0, -1), counted.items()):
                at = (now - timedelta(days=day)).replace(hour=chance.randrange(8, 20))
                weekend = 0.5 if at.weekday() >= 5 else 1
                cost = round(usual * weekend * chance.uniform(0.7, 1.2) * (1.1 - day / 180) / weight / len(counted))
                payer = chance.choice(each.users[:12])
                limits.record(payer, kind, max(cost, 1), created_at=at, group_id=each.group.id)
    for each in made:
        if each.users and each.share:
            limits.track_many(up_to(groups.usage(each.group.id), each, chance))
            hold_some(limits, each)


def kind_of(limit_: Limit, chance: random.Random) -> tuple[str, int]:
    """Choose a kind that a limit counts, and how much one of it takes."""
    return chance.choice(list((limit_.counts or {limit_.kind: 1}).items()))


def up_to(usage: GroupUsage, each: Made, chance: random.Random) -> Iterator[GenerationRequest]:
    """Record generations that use up a part of each limit."""
    used = {(status.kind, status.period, status.scope): status for status in usage.limits}
    for limit_ in each.limits:
        status = used[limit_.kind, limit_.period, limit_.scope]
        if limit_.period == "in_flight":
            continue
        wanted = int((status.max or 700) * each.share)
        if limit_.scope == "member":
            most = min(max(wanted * 3, 1), status.max or 1)
            payers, costs = each.users[::2], [chance.randint(1, most) for _ in each.users[::2]]
        else:
            payers, parts = each.users[:12], [chance.uniform(0.2, 1) for _ in each.users[:12]]
            costs = [int((wanted - status.used) * part / sum(parts)) for part in parts]
        for user, units in zip(payers, costs, strict=True):
            kind, weight = kind_of(limit_, chance)
            if cost := max(units, 0) // weight:
                yield GenerationRequest(user_id=user, kind=kind, cost=cost, group_id=each.group.id)


def hold_some(limits: TokenLimits, each: Made) -> None:
    """Leave generations in progress, where a limit says how many may be."""
    for limit_ in each.limits:
        if limit_.period == "in_flight":
            for user in each.users[: round((limit_.max or 0) * each.share)]:
                limits.reserve(user, limit_.kind, ttl=86_400, group_id=each.group.id)


def keep_generating(limits: TokenLimits, made: list[Made], chance: random.Random, ended: threading.Event) -> None:
    """Record a generation now and then, in all groups."""
    used = [each for each in made if each.users and each.limits]
    while not ended.wait(chance.uniform(0.2, 1.5)):
        each = chance.choice(used)
        limit_ = chance.choice(each.limits)
        kind, weight = kind_of(limit_, chance)
        cost = chance.randint(1, max((limit_.max or 100) // 200 // weight, 1))
        limits.track(chance.choice(each.users[:12]), kind, cost, group_id=each.group.id)


def main() -> None:
    """Start everything, and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--still", action="store_true", help="no generations while it runs")
    options = parser.parse_args()
    chance = random.Random(7)
    ended = threading.Event()
    with LocalStack() as stack, httpx.Client(timeout=60) as http:
        client = Client(stack.url, stack.secret_key, ClientOptions(httpx_client=http))
        limits = TokenLimits(client, timeout=60)
        groups = GroupManager(client, timeout=60)
        made = make_groups(groups, stack, chance)
        make_history(limits, groups, made, chance)
        admin = stack.create_user("admin@example.com", "demo-password", admin=True)
        settings = WebSettings(
            url=stack.url, publishable_key=stack.publishable_key, web_secret=secrets.token_urlsafe(32)
        )
        print(
            f"\n  http://127.0.0.1:{options.port}\n  {admin.email}, {admin.password}\n\n  Press Ctrl-C to stop.\n",
            flush=True,
        )
        generating = threading.Thread(target=keep_generating, args=(limits, made, chance, ended))
        if not options.still:
            generating.start()
        try:
            uvicorn.run(create_app(settings), host="127.0.0.1", port=options.port, log_level="warning")
        finally:
            ended.set()
            if generating.is_alive():
                generating.join()


if __name__ == "__main__":
    main()
