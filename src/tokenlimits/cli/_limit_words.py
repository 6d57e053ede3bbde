"""How a limit is written: image=100/month, image=40/3h/rolling/member, credits=1000/month/image:1+video:8.

No other module turns words into a limit or back. Nothing in them is expanded by a shell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from tokenlimits import Limit
from tokenlimits.models import Mode, Override, Scope, SinglePeriod, Starts

from ._terminal import Problem

EXAMPLE = "write it like image=100/month, image=40/3h/rolling/member or credits=1000/month/image:1+video:8"
HELP = """LIMIT is KIND=MAX, or KIND=MAX with words after slashes, in any order. MAX is a number or unlimited.

How long: minute, hour, day, week, month, year or lifetime (the default); or, where it starts elsewhere than by the
calendar, a length: 5min, 3h, 30d, 2w, 3months. in_flight: how many holds at once, whatever each costs.

Where it starts: calendar (the default), anchor, first_use or rolling.

Whose usage counts: group (the default), all together with the groups beneath; child, each customer (each group
directly beneath) separately; or member, each user separately.

observe: count, but don't deny. enforce is the default.

image:1+video:8 makes a pool, which counts these kinds, each with its weight; KIND is then the pool's name.

Examples: image=100/month  image=40/3h/rolling/member  video=2/in_flight/member  credits=1000/month/image:1+video:8
image=1000/month/child
"""

_FIELDS: Mapping[str, Sequence[str]] = {
    "period": get_args(SinglePeriod),
    "starts": get_args(Starts),
    "scope": get_args(Scope),
    "mode": get_args(Mode),
}
# the option that says whose override it is
_OPTIONS: Mapping[Scope, str] = {"member": "--user", "child": "--child"}
_FIELD_OF = {word: field for field, words in _FIELDS.items() for word in words}
_ONE = {"period": "period", "starts": "start", "scope": "scope", "mode": "mode", "counts": "set of kinds"}
# "m" is in neither: it would be minutes to some and months to others
_SHORT = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks", "months": "months"}
_UNITS = {f"{units[:-1]}{s}": units for units in _SHORT.values() for s in ("", "s")} | _SHORT
_LENGTHS = "5min, 3h, 30d, 2w or 3months"
_SAID = {
    "kind": "a kind begins with a letter and has at most 32 lower-case letters, digits and _",
    "max": "a max is at most 10^15",
    "counts": "a pool counts 1 to 50 kinds, each with a weight from 1 to 1,000,000, like image:1+video:8",
}
_LIST = TypeAdapter(list[Limit])

Identity = tuple[str, str, str, str]


def identity(limit: Limit) -> Identity:
    """Return what tells a limit from the others of its group."""
    return limit.kind, limit.period, limit.starts, limit.scope


def parse(text: str) -> Limit:
    """Read a limit; only what the words say is in its `model_fields_set`.

    Raises:
        Problem: It can't be read.
    """
    named, equals, rest = text.partition("=")
    maximum, *words = rest.split("/")
    if not equals or "/" in named:
        raise Problem(f"{text}: {EXAMPLE}")
    try:
        return Limit.model_validate({"kind": named, "max": _maximum(text, maximum), **_read(text, words)})
    except ValidationError as error:
        raise Problem(f"{text}: {_said(error)}") from None


def parse_all(texts: Sequence[str]) -> list[Limit]:
    """Read limits; each may occur once.

    Raises:
        Problem: One can't be read, or occurs twice.
    """
    return _distinct([(text, parse(text)) for text in texts])


def parse_json(text: str, source: str) -> list[Limit]:
    """Read the JSON that `limits list --json` prints.

    Raises:
        Problem: It is something else, or a limit occurs twice.
    """
    try:
        return _distinct([(source, limit) for limit in _LIST.validate_json(text)])
    except ValidationError as error:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.errors()[0]["loc"])
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise Problem(f"{source}{place}: {reason}. It must be what `limits list --json` prints.") from None


def _distinct(limits: Sequence[tuple[str, Limit]]) -> list[Limit]:
    found: dict[Identity, Limit] = {}
    for text, limit in limits:
        if found.setdefault(identity(limit), limit) is not limit:
            raise Problem(f"{text}: {name(limit)} occurs twice; give it one max")
    return list(found.values())


def named_by(text: str, limits: Sequence[Limit]) -> Limit:
    """Find the limit that is meant by its kind and as many words as tell it from the others.

    Raises:
        Problem: None fits, or several do.
    """
    wanted = _read_name(text)
    kind = wanted["kind"]
    fitting = [limit for limit in limits if all(getattr(limit, field) == value for field, value in wanted.items())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise Problem(f"{text}: several limits fit: {', '.join(map(full_name, fitting))}. Name one of them.")
    there = ", ".join(map(name, limits)) or "none"
    near = get_close_matches(kind, [limit.kind for limit in limits if limit.kind != kind], n=1)
    raise Problem(f"{text}: there is no such limit. There are: {there}.{f' Did you mean {near[0]}?' if near else ''}")


def _read_name(text: str) -> dict[str, Any]:
    if "=" in text:
        raise Problem(f"{text}: name it without its max, like image/month or image/day/member")
    kind, *words = text.split("/")
    wanted = {"kind": kind, **_read(text, words)}
    if other := wanted.keys() - {"kind", "period", "starts", "scope"}:
        raise Problem(f"{text}: leave out its {_ONE[other.pop()]}; a limit is named by kind, period, start and scope")
    if "period" in wanted:
        wanted["period"] = _single(wanted["period"])
    return wanted


def read_name(text: str, scope: Scope) -> dict[str, Any]:
    """Read which limit of a scope is meant: its kind and, as far as they are said, its period and starts.

    Raises:
        Problem: It can't be read, or it is a limit of another scope.
    """
    named = _read_name(text)
    said: Scope = named.pop("scope", scope)
    if said == scope:
        return named
    if said in _OPTIONS:
        raise Problem(f"{text}: pass {_OPTIONS[said]} with a {said} limit")
    raise Problem(f"{text}: leave out {said}, or {_OPTIONS[scope]}")


def parse_override(text: str, scope: Scope) -> tuple[int | None, dict[str, Any]]:
    """Read another max of a limit, like image=200/month: the max, and which limit is meant.

    Raises:
        Problem: It can't be read, or it is a limit of another scope.
    """
    kind, equals, rest = text.partition("=")
    maximum, *words = rest.split("/")
    if not equals or "/" in kind:
        raise Problem(f"{text}: write it like image=200, image=200/month or image=unlimited/3h/rolling")
    return _maximum(text, maximum), read_name("/".join([kind, *words]), scope)


def write(limit: Limit) -> str:
    """Write a limit as `parse` reads it."""
    maximum = "unlimited" if limit.max is None else limit.max
    return "/".join([f"{limit.kind}={maximum}", *_identity_words(limit), *more_words(limit)])


def name(limit: Limit) -> str:
    """Write which limit it is, as `named_by` reads it."""
    return "/".join([limit.kind, *_identity_words(limit)])


def name_of(override: Override) -> str:
    """Write which limit an override is of, as `read_name` reads it."""
    return "/".join([override.kind, *_identity_words(override)])


def full_name(limit: Limit) -> str:
    """Write which limit it is, with what is usually left out."""
    return "/".join([limit.kind, _length(limit.period), limit.starts, limit.scope])


def more_words(limit: Limit) -> list[str]:
    """Write what doesn't tell a limit from others: its kinds and its mode."""
    pool = [] if limit.counts is None else ["+".join(f"{kind}:{weight}" for kind, weight in limit.counts.items())]
    return pool if limit.mode == "enforce" else [*pool, limit.mode]


def _identity_words(limit: Limit | Override) -> list[str]:
    starts = [] if limit.starts == "calendar" else [limit.starts]
    return [_length(limit.period), *starts, *([] if limit.scope == "group" else [limit.scope])]


def _length(period: str) -> str:
    number, _, units = period.partition(" ")
    return next(f"{number}{short}" for short, long in _SHORT.items() if long == units) if units else period


def _single(period: str) -> str:
    """Write one unit without its number, as limits have it."""
    return period.removeprefix("1 ").removesuffix("s") if period.startswith("1 ") else period


def _whole(text: str) -> int | None:
    return int(text.replace("_", "")) if re.fullmatch(r"[0-9]{1,20}|[0-9]{1,3}(_[0-9]{3}){1,6}", text) else None


def _maximum(text: str, amount: str) -> int | None:
    if amount == "unlimited":
        return None
    maximum = _whole(amount)
    if maximum is None:
        raise Problem(f"{text}: {amount!r} is neither a whole number nor unlimited; {EXAMPLE}")
    return maximum


def _read(text: str, words: Sequence[str]) -> dict[str, Any]:
    """Read the words between slashes into fields."""
    fields: dict[str, Any] = {}
    for word in words:
        field, value = _field(text, word)
        if field in fields:
            raise Problem(f"{text}: at most one {_ONE[field]}; {EXAMPLE}")
        fields[field] = value
    return fields


def _field(text: str, word: str) -> tuple[str, Any]:
    if word in _FIELD_OF:
        return _FIELD_OF[word], word
    if ":" in word or "+" in word:
        return "counts", _counts(text, word)
    length = re.fullmatch(r"([1-9][0-9]{0,8})([a-z]+)", word)
    if length and length[2] in _UNITS:
        return "period", f"{length[1]} {_UNITS[length[2]]}"
    if length and length[2] == "m":
        raise Problem(f"{text}: {word} could be minutes or months; write {length[1]}min or {length[1]}months")
    if word[:1].isdigit():
        raise Problem(f"{text}: {word!r} is not a length like {_LENGTHS}")
    near = get_close_matches(word.lower().replace("-", "_"), _FIELD_OF, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(_FIELD_OF)
    raise Problem(f"{text}: {word!r} is not one of {known}, nor a length like {_LENGTHS}{meant}")


def _counts(text: str, word: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in word.split("+"):
        kind, _, number = part.partition(":")
        weight = _whole(number)
        if weight is None:
            raise Problem(f"{text}: {part!r} is not a kind with its weight; write a pool like image:1+video:8")
        if kind in counts:
            raise Problem(f"{text}: {kind} occurs twice in the pool; give it one weight")
        counts[kind] = weight
    return counts


def _said(error: ValidationError) -> str:
    """Say what is wrong with the fields of a limit, in the words of a command line."""
    first = error.errors()[0]
    field = str(first["loc"][0])
    reason = first["msg"].removeprefix("Value error, ")
    if field == "counts" and "in_flight" in reason:
        return "a pool can't be in_flight, which counts the holds of the limit's own kind"
    return _SAID.get(field) or f"its {_ONE[field]} {reason}"
