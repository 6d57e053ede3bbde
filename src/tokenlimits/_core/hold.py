"""A hold from reservation to settlement, as a pure state machine: what was declared, and what an end does."""

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

    A normal end commits the cost that was reserved, or what `commit` said. An abnormal one (an exception of any kind,
    a cancellation, a generator that is closed early) commits what `used` declared so far, and releases all when nothing
    was declared.

    Attributes:
        cost: What was asked for.
        result: What `reserve` answered; after the end, what settling answered.
        returned: Yours to set: what the body made. An error of settling after a good body carries it on, as
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
        """The usage in the ledger; None when Supabase couldn't be reached and `on_unavailable` allowed it."""
        return self.result.usage_id

    @property
    def status(self) -> Status | None:
        """Of the usage, as far as it is known here."""
        return self.result.status

    @property
    def expires_at(self) -> datetime | None:
        """When the hold ends by itself."""
        return self._reserved.expires_at

    @property
    def replayed(self) -> bool:
        """Whether an earlier call with the same idempotency key reserved it.

        Its `status` tells what became of that: `reserved`, and this body carries on with the same hold; or
        `committed`, the job was done and charged before, and the end of this body changes nothing.
        """
        return self._reserved.replayed

    def used(self, cost: int) -> None:
        """Declare how much is used up by now, in all: what an abnormal end will be charged.

        Args:
            cost: From 0 to what was reserved; a later call replaces it.

        Raises:
            InvalidRequest: It is not from 0 to what was reserved.
            AlreadySettled: The body has ended.
        """
        self._used = self._checked(cost)

    def commit(self, cost: int | None = None) -> None:
        """Say what the end of the body settles for, however it ends; nothing is sent before.

        Args:
            cost: From 0 to what was reserved, which is meant when None; a later call replaces it.

        Raises:
            InvalidRequest: It is not from 0 to what was reserved.
            AlreadySettled: The body has ended.
        """
        self._committed = self._checked(self.cost if cost is None else cost)

    def __repr__(self) -> str:
        return f"<Hold of {self.cost} {self.result.kind}: {self.status or 'not recorded'}, {self.usage_id}>"

    def _checked(self, cost: int) -> int:
        if self._ended:
            raise AlreadySettled(
                "The body of this hold has ended, which settled it. Call `used` and `commit` inside of the body; to "
                "settle later, use reserve() and then commit() of the client."
            )
        checked = arguments.settled_cost(cost)
        if checked > self.cost:
            raise arguments.refused("cost", f"must be at most the {self.cost} that were reserved", cost)
        return checked


class RunningHold(Hold):
    """A hold as those see it who run the body."""

    def __init__(self, call: Call[TrackResult], answer: TrackResult) -> None:
        super().__init__(call.params["p_cost"], answer.raise_if_denied())

    def settlement(self, error: BaseException | None) -> Settlement | None:
        """End the hold, and say how a body that ends so is settled; None when it was settled before."""
        self._ended = True
        if self.status == "committed":
            return None
        if self._committed is not None:
            return workers.commit(self.usage_id, self._committed)
        if error is None:
            return workers.commit(self.usage_id, self.cost)
        return workers.commit(self.usage_id, self._used) if self._used else workers.release(self.usage_id)

    def settled(self, answer: TrackResult) -> None:
        """Take the answer; one that was not recorded knows less than `reserve` did."""
        known = {"kind": self.result.kind, "group": self.result.group} if not answer.kind else {}
        self.result = answer.model_copy(update=known)

    def failed(self, failure: BaseException, error: BaseException | None) -> None:
        """Raise that settling failed after a good body; tell it beside the body's own error, which goes first."""
        ends = f"the hold of usage {self.usage_id} ends by itself at {self.expires_at}"
        if error is None:
            if isinstance(failure, TokenLimitsError):
                failure.returned = self.returned
            if isinstance(failure, ServiceUnavailable):
                failure.add_note(f"The body had ended well, and was not charged: commit it again, or {ends}.")
            raise failure
        error.add_note(f"tokenlimits could not settle what this ended, and {ends}: {failure}")
        logger.error(
            "could not settle usage %s after %s: %s",
            self.usage_id,
            type(error).__name__,
            failure,
            extra={"usage_id": str(self.usage_id), "ended_by": type(error).__name__},
        )
