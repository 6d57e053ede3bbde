"""The admin panel with sample data, on a local Supabase: `make admin`.

It prints its URL and an account to sign in with. Generations keep coming in, so that the bars move.
"""

from __future__ import annotations

import argparse
import random
import secrets
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import uvicorn
from supabase import Client, ClientOptions

from tokenlimits import GenerationRequest, GroupManager, Limit, TokenLimits
from tokenlimits.local import LocalStack
from tokenlimits.models import Group
from tokenlimits.web import WebSettings, create_app

# name, description, time zone, members, how much of each limit is used, limits
GROUPS = [
    ("Free", "Everybody begins here", "UTC", 240, 0.42, ["image 10 day member", "video 600 week"]),
    ("Pro", "Paying customers", "Europe/Paris", 64, 0.61, ["image 5000 month", "video 900 month", "audio - month"]),
    ("Studio", "Agencies with shared credits", "America/New_York", 18, 0.81, ["image 2000 day", "video 1200 week"]),
    ("Northwind", "Contract until the end of next year", "Europe/Berlin", 120, 0.35, ["image 50000 month"]),
    ("Beta testers", "May try video before others do", "UTC", 31, 0.97, ["video 400 day"]),
    ("Education", "Schools", "Europe/Madrid", 410, 0.2, ["image 20 day member", "tokens 150000 month"]),
    ("Partners", "Integrations that resell us", "Asia/Tokyo", 9, 0.74, ["image 12000 month", "audio 3000 month"]),
    ("Trial ended", "Until they choose a plan", "UTC", 57, 0, ["image 0 lifetime"]),
    ("Support", "Our own people", "Europe/London", 6, 0, ["image - lifetime"]),
]


def limit(words: str) -> Limit:
    """Read a limit like "image 10 day member"; a dash is unlimited."""
    kind, max_, *more = words.split()
    fields = dict(zip(("period", "scope"), more, strict=False))
    return Limit.model_validate({"kind": kind, "max": None if max_ == "-" else int(max_), **fields})


def make_groups(groups: GroupManager, stack: LocalStack) -> list[tuple[Group, list[UUID], float]]:
    """Create the groups and their members."""
    made = []
    for name, description, timezone, members, share, limits in GROUPS:
        group = groups.create(
            name,
            description=description,
            timezone=timezone,
            limits=[limit(words) for words in limits],
            is_default=name == "Free",
            priority=len(made),
        )
        users = stack.create_users(members, f"{name.lower().replace(' ', '-')}-")
        groups.add_members(group.id, users)
        made.append((group, users, share))
    return made


def make_history(limits: TokenLimits, made: list[tuple[Group, list[UUID], float]], chance: random.Random) -> None:
    """Record two months of generations, then use each limit to its group's share."""
    now = datetime.now(UTC)
    days_of = {"day": 1, "week": 7, "month": now.day}
    for group, users, share in made:
        for limit_ in group.limits if share else ():
            members = len(users) // 2 if limit_.scope == "member" else 1
            # a quarter less, for weekends and chance
            usual = (limit_.max or 900) * share * members / days_of.get(limit_.period, 30) / 0.78
            for day in range(60, 0, -1):
                at = (now - timedelta(days=day)).replace(hour=chance.randrange(8, 20))
                weekend = 0.5 if at.weekday() >= 5 else 1
                cost = round(usual * weekend * chance.uniform(0.7, 1.2) * (1.1 - day / 180))
                limits.record(chance.choice(users[:12]), limit_.kind, max(cost, 1), created_at=at, group_id=group.id)
    for group, users, share in made:
        limits.track_many(up_to(limits, group, users, share, chance) if share else [])


def up_to(
    limits: TokenLimits, group: Group, users: list[UUID], share: float, chance: random.Random
) -> Iterator[GenerationRequest]:
    """Record generations that use up a part of each limit."""
    for status in limits.usage(users[0]):
        wanted = int((status.max or 700) * share)
        if status.scope == "member":
            most = min(max(wanted * 3, 1), status.max or 1)
            payers, costs = users[::2], [chance.randint(1, most) for _ in users[::2]]
        else:
            payers, parts = users[:12], [chance.uniform(0.2, 1) for _ in users[:12]]
            costs = [int((wanted - status.used) * part / sum(parts)) for part in parts]
        for user, cost in zip(payers, costs, strict=True):
            if cost > 0:
                yield GenerationRequest(user_id=user, kind=status.kind, cost=cost, group_id=group.id)


def keep_generating(
    limits: TokenLimits, made: list[tuple[Group, list[UUID], float]], chance: random.Random, ended: threading.Event
) -> None:
    """Record a generation now and then, in all groups."""
    while not ended.wait(chance.uniform(0.2, 1.5)):
        group, users, _ = chance.choice(made)
        limit = chance.choice(group.limits)
        limits.track(chance.choice(users[:12]), limit.kind, chance.randint(1, max((limit.max or 100) // 200, 1)))


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
        made = make_groups(GroupManager(client, timeout=60), stack)
        make_history(limits, made, chance)
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
