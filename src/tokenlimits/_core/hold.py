"""A hold from reservation to settlement, as a pure state machine: what was declared, and how it is settled."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any
from uuid import UUID

from tokenlimits.errors import AlreadySettled, ServiceUnavailable, TokenLimitsError
from tokenlimits.models import Status, TrackResult

from . import arguments, workers
from .call import Call
from .workers import Settlement

logger = logging.getLogger("tokenlimits")


class Hold:
    """A generation under way, in the body of `TokenLimits.generation`; settled when the body ends.

    A normal end commits the reserved cost, or what `commit` said. An abnormal end (an exception of any kind, a
    cancellation, a generator that is closed early) commits what `used` declared so far, or releases everything if
    nothing was declared.

    Attributes:
        cost: The requested cost.
        result: The answer to `reserve`; after the end, the answer to settling.
        returned: You may set it to what the body has made. If only settling fails, the error has it as
            `error.returned`.

    Example:
        >>> with limits.generation(user_id, "video", cost=8) as hold:
        ...     hold.used(3)
        ...     hold.commit(cost=5)
        >>> hold.status, hold.result.cost
        ('committed', 5)
    """

    def __init__(self, cost: int, result: TrackResult) -> None:
        self.cost = cost
        self.result = result
        self._reserved = result
        self.returned: Any = None
        self._used = 0
        self._committed: int | None = None
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
        """When the hold expires."""
        return self._reserved.expires_at

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
            cost: From 0 to what was reserved; a later call replaces it.

        Raises:
            InvalidRequest: The cost is negative, or more than was reserved.
            AlreadySettled: The body has ended.
        """
        self._used = self._checked(cost)

    def commit(self, cost: int | None = None) -> None:
        """Set the cost to settle for when the body ends, however it ends; nothing is sent until then.

        Args:
            cost: From 0 to what was reserved; all of that when None. A later call replaces it.

        Raises:
            InvalidRequest: The cost is negative, or more than was reserved.
            AlreadySettled: The body has ended.
        """
        self._committed = self._checked(self.cost if cost is None else cost)

    def __repr__(self) -> str:
        return f"<Hold of {self.cost} {self.result.kind}: {self.status or 'not recorded'}, {self.usage_id}>"

    def _checked(self, cost: int) -> int:
        if self._ended:
            raise AlreadySettled(
                "The body of this hold has ended, which settled it. Call `used` and `commit` inside the body; to "
                "settle later, use the client's reserve() and commit()."
            )
        checked = arguments.settled_cost(cost)
        if checked > self.cost:
            raise arguments.refused("cost", f"must be at most {self.cost}, as reserved", cost)
        return checked


class RunningHold(Hold):
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
            return workers.commit(self.usage_id, self._committed)
        if error is None:
            return workers.commit(self.usage_id, self.cost)
        return workers.commit(self.usage_id, self._used) if self._used else workers.release(self.usage_id)

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
