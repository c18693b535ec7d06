"""The order in which pictures of several callers are prepared: a fair share for each.

Start-time fair queueing (Goyal, Vin and Chen 1996): every caller has a clock of the work that was
done for it, and the caller whose clock is lowest is next. One that comes back from a pause starts
at the lowest clock of those waiting, so nobody saves up. Of one caller's own pictures the higher
priority goes first, then the earlier.
"""

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Pictures that wait, by caller."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[int, int, float, Item]]] = {}
        self._clocks: dict[str, float] = {}
        self._arrivals = count()

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        """Yield all that wait, in no order."""
        return (item for heap in self._waiting.values() for *_, item in heap)

    def put(self, item: Item, *, caller: str, cost: float, priority: int = 0) -> None:
        """Let an item wait; priority: the higher goes first among this caller's own."""
        if caller not in self._waiting:
            floor = min((self._clocks[other] for other in self._waiting), default=0.0)
            self._clocks[caller] = max(self._clocks.get(caller, 0.0), floor)
            self._waiting[caller] = []
        heapq.heappush(self._waiting[caller], (-priority, next(self._arrivals), cost, item))

    def take(self) -> Item | None:
        """Return the next, None where nothing waits."""
        if not self._waiting:
            self._clocks.clear()  # nobody is compared with anybody: a clock is of no more use
            return None
        caller = min(self._waiting, key=lambda name: self._clocks[name])
        _, _, cost, item = heapq.heappop(self._waiting[caller])
        self._clocks[caller] += cost
        if not self._waiting[caller]:
            del self._waiting[caller]
        return item

    def remove(self, item: Item) -> bool:
        """Take an item out; returns whether it waited."""
        for caller, heap in self._waiting.items():
            kept = [entry for entry in heap if entry[-1] is not item]
            if len(kept) < len(heap):
                heapq.heapify(kept)
                self._waiting[caller] = kept
                if not kept:
                    del self._waiting[caller]
                return True
        return False
