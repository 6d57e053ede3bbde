"""Limits as the command line reads and writes them."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenlimits import Limit
from tokenlimits.cli._limit_words import full_name, identity, name, named_by, parse, parse_all, parse_json, write
from tokenlimits.cli._terminal import Problem

KINDS = st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True)
# kinds that are words of the language too
NAMES = KINDS | st.sampled_from(["month", "group", "rolling", "observe", "unlimited", "h", "min"])
PERIODS = st.sampled_from(["minute", "hour", "day", "week", "month", "year", "lifetime", "in_flight"]) | st.builds(
    "{} {}".format, st.integers(2, 366), st.sampled_from(["minutes", "hours", "days", "weeks", "months"])
)


@st.composite
def drawn_limits(draw: st.DrawFn) -> Limit:
    while True:
        period, starts = draw(PERIODS), draw(st.sampled_from(["calendar", "anchor", "first_use", "rolling"]))
        try:
            return Limit.model_validate(
                {
                    "kind": draw(NAMES),
                    "max": draw(st.none() | st.integers(0, 10**15)),
                    "period": period,
                    "starts": starts,
                    "scope": draw(st.sampled_from(["group", "child", "member"])),
                    "counts": draw(st.none() | st.dictionaries(NAMES, st.integers(1, 10**6), min_size=1, max_size=50)),
                    "mode": draw(st.sampled_from(["enforce", "observe"])),
                }
            )
        except ValidationError:
            continue


@given(drawn_limits(), st.randoms(use_true_random=False))
def test_what_is_written_is_read_again(limit: Limit, random: Random) -> None:
    text = write(limit)
    assert parse(text) == limit
    assert not set(text) & set(" *?[]{}()<>|&;$~!#'\"`\\")  # nothing that a shell expands
    first, *words = text.split("/")
    random.shuffle(words)
    assert parse("/".join([first, *words])) == limit


@given(st.lists(drawn_limits(), min_size=1, max_size=5, unique_by=identity))
def test_a_full_name_names_one_limit(limits: list[Limit]) -> None:
    for limit in limits:
        assert named_by(full_name(limit), limits) == limit
    assert parse_json(json.dumps([limit.model_dump(mode="json") for limit in limits]), "stdin") == limits


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("image=1_000", Limit(kind="image", max=1000)),
        ("image=unlimited/year", Limit(kind="image", max=None, period="year")),
        ("image=40/member/rolling/3h", Limit(kind="image", max=40, period="3 hours", scope="member", starts="rolling")),
        ("image=40/1h/rolling", Limit(kind="image", max=40, period="hour", starts="rolling")),
        ("image=40/1month", Limit(kind="image", max=40, period="month")),
        ("a=4/90minutes/first_use", Limit(kind="a", max=4, period="90 minutes", starts="first_use")),
        ("a=4/3months/anchor", Limit(kind="a", max=4, period="3 months", starts="anchor")),
        ("a=4/day/observe/group/calendar", Limit(kind="a", max=4, period="day", mode="observe")),
        ("image=9/month/child", Limit(kind="image", max=9, period="month", scope="child")),
        ("video=2/member/in_flight", Limit(kind="video", max=2, period="in_flight", scope="member")),
        ("c=9/image:1+video:8", Limit(kind="c", max=9, counts={"image": 1, "video": 8})),
    ],
)
def test_reads(text: str, limit: Limit) -> None:
    assert parse(text) == limit


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image", "write it like image=100/month"),
        ("image/month=3", "write it like"),
        ("image=", "'' is neither a whole number nor unlimited"),
        ("image=-1", "'-1' is neither"),
        ("image=" + "9" * 5000, "is neither"),
        ("image=9999999999999999", "at most 10^15"),
        ("Image=1", "a kind begins with a letter"),
        ("=1", "a kind begins with a letter"),
        ("image=1/", "'' is not one of in_flight, minute"),
        ("image=1/moth", "did you mean month?"),
        ("image=1/first-use/day", "did you mean first_use?"),
        ("image=1/Member", "did you mean member?"),
        ("image=1/5m/rolling", "5m could be minutes or months; write 5min or 5months"),
        ("image=1/0h/rolling", "'0h' is not a length like 5min, 3h"),
        ("image=1/3y/anchor", "'3y' is not a length"),
        ("image=1/400d/rolling", "2 to 366 minutes"),
        ("image=1/3h", "its start must be anchor, first_use or rolling where the period is 3 hours"),
        ("image=1/3months/rolling", "its start must be anchor"),
        ("image=1/month/rolling", 'use "30 days"'),
        ("image=1/rolling", "its start must be calendar where the period is lifetime"),
        ("video=2/in_flight/rolling", "its start must be calendar where the period is in_flight"),
        ("video=2/in_flight/video:1", "a pool can't be in_flight"),
        ("video=2/in-flight", "did you mean in_flight?"),
        ("image=1/day/week", "at most one period"),
        ("image=1/day/2w", "at most one period"),
        ("image=1/day/anchor/rolling", "at most one start"),
        ("image=1/member/group", "at most one scope"),
        ("image=1/observe/enforce", "at most one mode"),
        ("c=1/image:1/video:8", "at most one set of kinds"),
        ("c=1/image+video:8", "'image' is not a kind with its weight"),
        ("c=1/image:x", "'image:x' is not a kind with its weight"),
        ("c=1/image:1+image:1", "image occurs twice in the pool"),
        ("c=1/image:0", "a weight from 1 to 1,000,000"),
        ("c=1/:1", "a weight from 1 to 1,000,000"),
    ],
)
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(Problem) as refused:
        parse(text)
    assert str(refused.value).startswith(f"{text}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_limit_may_occur_once() -> None:
    assert len(parse_all(["a=1/day", "a=1/day/anchor", "a=1/day/member", "a=1/week"])) == 4
    with pytest.raises(Problem, match=r"a=2/1d: a/day occurs twice; give it one max"):
        parse_all(["a=1/day", "a=2/1d"])


LIMITS = parse_all(["image=1/day", "image=1/day/member", "image=1/3h/rolling", "credits=1/week/image:1", "audio=1"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("audio", "audio/lifetime"),
        ("credits", "credits/week"),
        ("credits/1w", "credits/week"),
        ("image/rolling", "image/3h/rolling"),
        ("image/3h", "image/3h/rolling"),
        ("image/member", "image/day/member"),
        ("image/group/day", "image/day"),
    ],
)
def test_names(text: str, named: str) -> None:
    assert name(named_by(text, LIMITS)) == named


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image/day", "several limits fit: image/day/calendar/group, image/day/calendar/member. Name one of them."),
        ("audio/day", "there is no such limit. There are: image/day, image/day/member, image/3h/rolling, credits/week"),
        ("images", "Did you mean image?"),
        ("image=1/day", "name it without its max, like image/month"),
        ("credits/image:1", "leave out its set of kinds"),
        ("image/day/enforce", "leave out its mode"),
        ("image/dya", "did you mean day?"),
    ],
)
def test_names_none(text: str, says: str) -> None:
    with pytest.raises(Problem) as refused:
        named_by(text, LIMITS)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "limits.json: Input should be a valid array"),
        ('[{"kind": "a", "max": 1, "starts": "rolling"}]', "limits.json[0].starts: must be calendar"),
        ('[{"kind": "a", "max": 1, "mod": "observe"}]', "limits.json[0].mod: Extra inputs"),
        ("nothing", "limits.json: Invalid JSON"),
        ('[{"kind": "a", "max": 1}, {"kind": "a", "max": 2}]', "limits.json: a/lifetime occurs twice"),
    ],
)
def test_refuses_other_json(text: str, says: str) -> None:
    with pytest.raises(Problem) as refused:
        parse_json(text, "limits.json")
    assert says in str(refused.value)
