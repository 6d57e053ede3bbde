"""An admin's script: a group, its limits, its members, its usage.

    export SUPABASE_URL=https://abc.supabase.co SUPABASE_SECRET_KEY=sb_secret_…
    python examples/manage_groups.py Pro members.txt

The file has one user id per line. Run it as often as you like: it sets the group up as described here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenlimits import GroupManager, Limit
from tokenlimits.errors import GroupNotFound
from tokenlimits.models import Group

LIMITS = [
    Limit(kind="image", max=1_000, period="month"),  # shared by all members
    Limit(kind="image", max=50, period="day", scope="member"),  # and a limit for each of them
    Limit(kind="video", max=20, period="month"),
    Limit(kind="audio", max=None),  # unlimited, but counted
]


def create_or_update(groups: GroupManager, name: str) -> Group:
    try:
        group = groups.get_by_name(name)
    except GroupNotFound:
        return groups.create(name, timezone="Europe/Paris", limits=LIMITS)
    return groups.set_limits(group.id, LIMITS)  # keeps usage


def show_progress(done: int, total: int) -> None:
    print(f"\r{done} of {total} users", end="" if done < total else "\n", flush=True)


def add_members(groups: GroupManager, group: Group, file: Path) -> None:
    result = groups.add_members(group.id, file.read_text().split(), on_progress=show_progress)
    print(f"{result.added} added, {result.already} were members already")
    for refused in result.refused:
        print(f"not added: {refused.user_id}, {refused.reason}")


def show(groups: GroupManager, group: Group) -> None:
    usage = groups.usage(group.id)
    print(f"{group.name}: {usage.member_count} members")
    for limit in usage.limits:
        most = "unlimited" if limit.capacity is None else f"{limit.capacity} ({limit.fraction or 0:.0%})"
        print(f"  {limit.kind} per {limit.period}, {limit.scope}: {limit.used} of {most}, resets {limit.reset_at}")
    for point in groups.history(group.id, bucket="day"):
        print(f"  {point.bucket:%Y-%m-%d}: {point.used} units of {point.kind} in {point.generations} generations")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("members", type=Path)
    parser.add_argument("--reset", metavar="KIND", help="let everybody start afresh with this kind")
    options = parser.parse_args()
    with GroupManager.from_env() as groups:
        group = create_or_update(groups, options.name)
        add_members(groups, group, options.members)
        if options.reset:
            print(f"{options.reset} counts from {groups.reset_usage(group.id, kind=options.reset)} on")
        show(groups, group)


if __name__ == "__main__":
    main()
