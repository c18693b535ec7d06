"""Admission: how much unfinished work may be taken on, and when to come again.

Work is counted in steps of a guided picture of 512 by 512 pixels. How much of it is done a second
is measured while pictures are drawn; before that, only their number is bounded.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from serving.errors import BadRequestError, BusyError
from serving.limits import Limits

MEMORY = 50  # turns that the rate is a mean of, about
RETRY_AFTER = 1, 60  # seconds
MOST_OVER = 2  # times the jobs, for callers who are below their share


@dataclass(slots=True, kw_only=True)
class Admission:
    """What is unfinished, against what may be.

    limits: jobs and seconds
    rate: work a second, None before the first turn
    """

    limits: Limits
    jobs: int = 0
    work: float = 0.0
    rate: float | None = None
    _turns: int = field(default=0)
    _jobs_of: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """How long the unfinished work takes, 0 while the rate is not known."""
        return self.seconds_of(self.work)

    def seconds_of(self, work: float) -> float:
        """Return how long work takes, 0 while the rate is not known."""
        return work / self.rate if self.rate else 0.0

    def admit(self, work: float, caller: str = "", deadline_seconds: float | None = None) -> None:
        """Take a caller's work on.

        Raises BusyError, and BadRequestError where it would come too late.
        """
        if deadline_seconds is not None:
            if not math.isfinite(deadline_seconds):
                raise BadRequestError(
                    f"deadline_s is {deadline_seconds}; give a number of seconds",
                    param="deadline_s",
                )
            waited = self.seconds + self.seconds_of(work)
            if deadline_seconds <= 0 or waited > deadline_seconds:
                raise BadRequestError(
                    f"the deadline is in {max(deadline_seconds, 0):g} s, and {self.seconds:.1f} s "
                    "of work wait; give a later one",
                    code="deadline_exceeded",
                    param="deadline_s",
                )
        if self._is_full(caller):
            raise BusyError(
                f"{self.jobs} requests wait or are drawn, about {self.seconds:.0f} s of work; try "
                "again later",
                code="queue_full",
                retry_after=self.retry_after,
            )
        self.jobs += 1
        self.work += work
        self._jobs_of[caller] += 1

    def _is_full(self, caller: str) -> bool:
        """Say whether a caller must wait: nobody is kept out by others who have filled the queue.

        Whoever has less than an equal share of the jobs comes in all the same.
        """
        limit = self.limits.jobs
        if self.jobs < limit and self.seconds <= self.limits.queue_seconds:
            return False
        callers = len(self._jobs_of.keys() | {caller})
        below_share = callers > 1 and self._jobs_of[caller] < limit // callers
        return not below_share or self.jobs >= MOST_OVER * limit

    @property
    def retry_after(self) -> int:
        """Seconds after which there should be room: those of half of what waits."""
        shortest, longest = RETRY_AFTER
        return min(max(math.ceil(self.seconds / 2), shortest), longest)

    def turned(self, work: float, seconds: float) -> None:
        """Note work that was done; seconds: since the turn before, or of the step alone."""
        self._turns = min(self._turns + 1, MEMORY)
        rate = self.rate or 0.0
        self.rate = rate + (work / max(seconds, 1e-6) - rate) / self._turns
        self.work = max(self.work - work, 0.0)

    def left(self, work: float, caller: str = "") -> None:
        """Note a caller's job that has ended; work: what of it was not done."""
        self.jobs -= 1
        self._jobs_of[caller] -= 1
        if not self._jobs_of[caller]:
            del self._jobs_of[caller]
        self.work = max(self.work - work, 0.0) if self.jobs else 0.0
