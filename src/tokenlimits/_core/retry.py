"""The retry policy: what is worth another attempt, how long to wait, and when to give up."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from time import time
from typing import NamedTuple

from tenacity import RetryCallState, retry_if_exception, stop_before_delay, wait_exponential_jitter

from tokenlimits.errors import ServiceUnavailable

logger = logging.getLogger("tokenlimits")

# those of gateways, when Supabase behind them can't answer; 520 is Cloudflare's
RETRIED_STATUSES = frozenset({429, 502, 503, 504, 520})


class Trouble(NamedTuple):
    """What a code says about the service, whatever the call was; `harmless`: nothing was written."""

    words: str
    harmless: bool = True


# By SQLSTATE or its class; the longest match counts. A statement that PostgreSQL refuses is rolled back, so it is
# harmless. If the connection was lost, it may have been lost after the commit.
TROUBLES: Mapping[str, Trouble] = {
    # what PostgREST answers, with 400, when its database goes away around a commit
    "": Trouble("its database went away", harmless=False),
    "08": Trouble("the connection to the database failed", harmless=False),
    "25006": Trouble("the database is read-only: a standby, or its disk is full"),
    "40001": Trouble("the transaction was rolled back"),
    "40P01": Trouble("the transaction was rolled back"),
    "53": Trouble("the database is out of resources"),
    "53100": Trouble("the database's disk is full"),
    "53300": Trouble("the database has no free connection"),
    "55P03": Trouble("something holds a lock"),
    "57": Trouble("the database shuts down", harmless=False),
    "57014": Trouble("the statement took longer than the database allows"),
    "57P03": Trouble("the database is starting up or shutting down"),
    "58": Trouble("the database's machine has a problem"),
    "PGRST000": Trouble("its database is not there"),
    "PGRST002": Trouble("its database is not there"),
    "PGRST003": Trouble("it waited too long for a connection to its database"),
}


def trouble_of(code: str | None) -> Trouble | None:
    """Return what a code says about the service.

    Example:
        >>> trouble_of("53100").words, trouble_of("TL001"), trouble_of(None)
        ("the database's disk is full", None, None)
    """
    if not code:
        return None if code is None else TROUBLES[""]
    return TROUBLES.get(code) or TROUBLES.get(code[:2])


# jitter, so that workers who lost the service together don't all come back together
_backoff = wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.1)


class Transient(Exception):  # never leaves the package
    """A failure that another attempt may overcome.

    `harmless`: nothing was done on the server, so another attempt is safe whatever the call does.
    """

    def __init__(
        self,
        reason: str,
        *,
        harmless: bool = False,
        code: str | None = None,
        retry_after: float | None = None,
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(reason)
        self.harmless = harmless
        self.code = code
        self.retry_after = retry_after
        self.__cause__ = cause


def from_answer(status: int, headers: Mapping[str, str], code: str | None) -> Transient | None:
    """Return the transient failure that an HTTP answer means, if any; `code` comes from its JSON body."""
    # a gateway that refuses the key may send any code along
    trouble = None if status < 400 or status in (401, 403) else trouble_of(code)
    if trouble is None and status not in RETRIED_STATUSES:
        return None
    words = f"the server answered with status {status}" + (f" ({code})" if code else "")
    return Transient(
        f"{words}: {trouble.words}" if trouble else words,
        # a 502 or 504 may have lost the answer of a call that went through; only a 429 never reached the database
        harmless=trouble.harmless if trouble else status == 429,
        code=code,
        retry_after=seconds(headers.get("retry-after")),
    )


def seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After header, which holds seconds or a date (in UTC, whether it says so or not).

    Example:
        >>> seconds("3"), seconds(None), seconds("soon")
        (3.0, None, None)
    """
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time())
    except (ValueError, OverflowError):
        return None


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return asked or _backoff(state)  # also for a Retry-After of 0, which would make a tight loop


def policy(function: str, *, retry_safe: bool, timeout: float) -> dict[str, object]:
    """Make the arguments for tenacity's `Retrying` and `AsyncRetrying`, for one call with its deadline in seconds."""

    def worth_it(error: BaseException) -> bool:
        # anything else is an answer, and would be the same the next time
        return isinstance(error, Transient) and (retry_safe or error.harmless)

    def log(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "%s: %s; retrying in %.2f s",
            function,
            error,
            state.upcoming_sleep,
            extra={"function": function, "attempt": state.attempt_number, "wait": state.upcoming_sleep},
        )

    return {
        "retry": retry_if_exception(worth_it),
        "wait": _wait,
        # before: a wait that would end after the deadline is not begun, so the caller knows sooner
        "stop": stop_before_delay(timeout),
        "before_sleep": log,
        "reraise": True,
    }


def give_up(function: str, error: Transient, elapsed: float) -> ServiceUnavailable:
    """Make the error for the caller when no attempt is left."""
    logger.error(
        "%s: gave up after %.1f s: %s",
        function,
        elapsed,
        error,
        extra={"function": function, "elapsed": elapsed},
    )
    check = "SUPABASE_URL and the project's status" if error.code is None else "the project's status and its logs"
    return ServiceUnavailable(
        f"Supabase could not be reached for {function} within {elapsed:.1f} s: {error}. Check {check}; "
        "on_unavailable says what workers get meanwhile.",
        code=error.code,
        retry_after=error.retry_after,
    )
