"""The one retry policy: what is worth another try, how long to wait, and when to give up."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from time import time

from tenacity import RetryCallState, retry_if_exception, stop_before_delay, wait_exponential_jitter

from tokenlimits.errors import ServiceUnavailable

logger = logging.getLogger("tokenlimits")

RETRIED_STATUSES = frozenset({429, 502, 503, 504, 520})
# the transaction was rolled back: deadlock_detected, serialization_failure
ROLLED_BACK = frozenset({"40P01", "40001"})

_backoff = wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.1)


class Transient(Exception):  # never leaves the package
    """A failure that another try may mend.

    `harmless`: nothing was done on the server, so that another try is safe whatever the call does.
    """

    def __init__(
        self,
        reason: str,
        *,
        harmless: bool = False,
        retry_after: float | None = None,
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(reason)
        self.harmless = harmless
        self.retry_after = retry_after
        self.__cause__ = cause


def from_answer(status: int, headers: Mapping[str, str], code: object) -> Transient | None:
    """Say whether an HTTP answer is a transient failure; `code` is that of its JSON body, if it has one."""
    if status in RETRIED_STATUSES or code in ROLLED_BACK:
        return Transient(
            f"the server answered with status {status}" + (f" ({code})" if code else ""),
            harmless=status == 429 or code in ROLLED_BACK,
            retry_after=seconds(headers.get("retry-after")),
        )
    return None


def seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After header, which holds seconds or a date (always of UTC, if it says so or not).

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
    return asked or _backoff(state)  # a server that says 0 must not be asked in a tight loop


def policy(function: str, *, retry_safe: bool, timeout: float) -> dict[str, object]:
    """Make the arguments for tenacity's `Retrying` and `AsyncRetrying`, for one call with its deadline in seconds."""

    def worth_it(error: BaseException) -> bool:
        return isinstance(error, Transient) and (retry_safe or error.harmless)

    def log(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "%s: %s; trying again in %.2f s",
            function,
            error,
            state.upcoming_sleep,
            extra={"function": function, "attempt": state.attempt_number, "wait": state.upcoming_sleep},
        )

    return {
        "retry": retry_if_exception(worth_it),
        "wait": _wait,
        "stop": stop_before_delay(timeout),
        "before_sleep": log,
        "reraise": True,
    }


def give_up(function: str, error: Transient, elapsed: float) -> ServiceUnavailable:
    """Make the error for the caller when no try is left."""
    logger.error(
        "%s: gave up after %.1f s: %s",
        function,
        elapsed,
        error,
        extra={"function": function, "elapsed": elapsed},
    )
    return ServiceUnavailable(
        f"Supabase could not be reached for {function} within {elapsed:.1f} s: {error}. Check SUPABASE_URL and the "
        "project's status; on_unavailable says what workers get meanwhile.",
        retry_after=error.retry_after,
    )
