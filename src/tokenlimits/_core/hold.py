"""A hold from reservation to settlement, as a pure state machine: what was declared, and how it is settled."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any
from uuid import UUID

from tokenlimits.errors import AlreadySettled, ServiceUnavailable, TokenLimitsError
from tokenlimits.models import Overage, Status, TrackResult

from . import arguments, workers
from .call import Call
from .workers import Settlement

logger = logging.getLogger("tokenlimits")


class BaseHold:
    """What a hold is in both colours; see `Hold`."""

    def __init__(self, cost: int, result: TrackResult) -> None:
        self.cost = cost
        self.result = result
        self._reserved = result
        self._expires_at = result.expires_at
        self.returned: Any = None
        self._used = 0
        self._committed: tuple[int, Overage] | None = None
        self._ended = False

    @property
    def usage_id(self) -> UUID | None:
        """The usage in the ledger; None if Supabase couldn't be reached and `on_unavailable` allowed the generation."""
        return self.result.usage_id

    @property
    def status(self) -> Status | None:
        """The status of the usage, as far as it is known here."""
        return self.result.status

    @property
    def expires_at(self) -> datetime | None:
        """When the hold expires, as far as it is known here: extending it makes that later."""
        return self._expires_at

    @property
    def replayed(self) -> bool:
        """Whether an earlier call with the same idempotency key reserved it.

        If `status` is `reserved`, this body continues with the same hold. If it is `committed`, the job is already done
        and charged, and the end of this body changes nothing.
        """
        return self._reserved.replayed

    def used(self, cost: int) -> None:
        """Declare the total cost used up so far, which an abnormal end will charge.

        Args:
            cost: 0 or more; a later call replaces it. More than was reserved is charged as with `overage="charge"`.

        Raises:
            InvalidRequest: The cost is negative, or not a whole number.
            AlreadySettled: The body has ended.
        """
        self._check_running()
        self._used = arguments.settled_cost(cost)

    def commit(self, cost: int | None = None, overage: Overage = "reject") -> None:
        """Set the cost to settle for when the body ends, however it ends; nothing is sent until then.

        Args:
            cost: 0 or more; what was reserved when None. A later call replaces it.
            overage: `"charge"`: the cost may be more than was reserved, and is charged even if the hold has expired or
                a limit has no room for it.

        Raises:
            InvalidRequest: The cost is negative, or more than was reserved without `overage="charge"`.
            AlreadySettled: The body has ended.
        """
        self._check_running()
        checked = arguments.settled_cost(self.cost if cost is None else cost)
        if arguments.overage(overage) == "reject" and checked > self.cost:
            rule = f'must be at most {self.cost}, as reserved, unless overage="charge"'
            raise arguments.refused("cost", rule, cost)
        self._committed = checked, overage

    def __repr__(self) -> str:
        return f"<Hold of {self.cost} {self.result.kind}: {self.status or 'not recorded'}, {self.usage_id}>"

    def _check_running(self) -> None:
        if self._ended:
            raise AlreadySettled(
                "The body of this hold has ended, which settled it. Call `used`, `commit` and `extend` inside the "
                "body; to settle later, use the client's reserve() and commit()."
            )

    def _extension(self, ttl: int) -> Settlement:
        self._check_running()
        return workers.extend_if_recorded(self.usage_id, ttl)

    def _extended(self, answer: TrackResult) -> None:
        # an answer may overtake an earlier one, and no extension makes a hold expire earlier
        if answer.expires_at is not None and (self._expires_at is None or answer.expires_at > self._expires_at):
            self._expires_at = answer.expires_at


class RunningHold(BaseHold):
    """A hold with what its context manager needs."""

    def __init__(self, call: Call[TrackResult], answer: TrackResult) -> None:
        super().__init__(call.params["p_cost"], answer.raise_if_denied())

    def settlement(self, error: BaseException | None) -> Settlement | None:
        """End the hold and return how to settle it; None if it was already settled."""
        # before anything is sent: a body that goes on in another thread must not believe that it is still heard
        self._ended = True
        if self.status == "committed":  # a replay of a job that was done; committing again for less would be an error
            return None
        # an explicit commit wins over the way the body ended, as the work may have been done before it failed
        if self._committed is not None:
            return workers.commit(self.usage_id, *self._committed)
        if error is None:
            return workers.commit(self.usage_id, self.cost)
        if not self._used:
            return workers.release(self.usage_id)
        return workers.commit(self.usage_id, self._used, "charge" if self._used > self.cost else "reject")

    def extended(self, answer: TrackResult) -> None:
        """Take the answer to a heartbeat."""
        self._extended(answer)

    def settled(self, answer: TrackResult) -> None:
        """Take the answer to settling; if nothing was settled, it lacks the kind and group that `reserve` returned."""
        known = {"kind": self.result.kind, "group": self.result.group} if not answer.kind else {}
        self.result = answer.model_copy(update=known)

    def failed(self, failure: BaseException, error: BaseException | None) -> None:
        """Raise the failure to settle; or note it on the body's own error, which takes precedence."""
        ends = f"the hold of usage {self.usage_id} expires at {self.expires_at}"
        if error is None:
            if isinstance(failure, TokenLimitsError):
                failure.returned = self.returned  # the work is done, and may have cost money: don't lose its result
            if isinstance(failure, ServiceUnavailable):
                failure.add_note(f"The body succeeded but may not be charged: commit the usage again, or {ends}.")
            raise failure
        # a note and no exception of its own: the caller's `except` clauses are for the body's error
        error.add_note(f"tokenlimits could not settle the hold after this error, and {ends}: {failure}")
        logger.error(
            "could not settle usage %s after %s: %s",
            self.usage_id,
            type(error).__name__,
            failure,
            extra={"usage_id": str(self.usage_id), "ended_by": type(error).__name__},
        )
