"""Which rows the next call of the step engine draws.

A call takes rows of one bucket. The bucket of the oldest row is next, unless another would then
wait more turns than it may: `MAX_TURNS_WAITED` at most, which can be kept as long as there are no
more buckets than that.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

MAX_TURNS_WAITED = 16  # turns that a bucket may be passed over, one after the other


class Waiting(Protocol):
    """A row that waits for its next call; bucket: what it has in common with others of a call."""

    @property
    def bucket(self) -> Hashable:
        """Rows with an equal one may share a call."""
        ...


AnyWaiting = TypeVar("AnyWaiting", bound=Waiting)


class Scheduler(Protocol[AnyWaiting]):
    """Chooses what is drawn next."""

    def choose(self, waiting: Sequence[AnyWaiting]) -> list[AnyWaiting]:
        """Return the rows of the next call; waiting: at least one, the oldest first."""
        ...


class BucketScheduler(Generic[AnyWaiting]):
    """Chooses rows turn by turn, and counts how long every bucket has waited.

    limit: returns how many rows a call of this one's bucket may have
    """

    def __init__(
        self, limit: Callable[[AnyWaiting], int], max_turns_waited: int = MAX_TURNS_WAITED
    ) -> None:
        self._limit = limit
        self.max_turns_waited = max_turns_waited
        self._waited: dict[Hashable, int] = {}

    def choose(self, waiting: Sequence[AnyWaiting]) -> list[AnyWaiting]:
        """As `Scheduler` says."""
        buckets: dict[Hashable, list[AnyWaiting]] = {}
        for row in waiting:
            buckets.setdefault(row.bucket, []).append(row)
        waited = {bucket: self._waited.get(bucket, 0) for bucket in buckets}
        chosen = self._next(list(buckets), waited)
        self._waited = {b: 0 if b == chosen else turns + 1 for b, turns in waited.items()}
        rows = buckets[chosen]
        return rows[: self._limit(rows[0])]

    def _next(self, buckets: Sequence[Hashable], waited: dict[Hashable, int]) -> Hashable:
        """Return the oldest row's bucket, or the most pressing where that could come too late.

        After this turn every other bucket has one turn less, and one bucket is drawn a turn: in
        the order of what is left to them, the i-th must have i turns left.
        """
        oldest, *others = buckets
        pressing = sorted(others, key=lambda bucket: waited[bucket], reverse=True)
        left = (self.max_turns_waited - waited[bucket] for bucket in pressing)
        if any(turns <= place for place, turns in enumerate(left)):
            return pressing[0]
        return oldest
