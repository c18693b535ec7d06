"""Driving the engine's loop with requests that come at given times, and what is seen of it."""

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Protocol

from benchmarks.serving.contenders import CONTENDERS
from serving.events import Event
from serving.loop import Loop
from serving.model_runner import ModelRunner
from serving.order import Order
from serving.row_limits import RowLimits


class Clock(Protocol):
    """Seconds, which can be waited for."""

    def __call__(self) -> float:
        """Return the time."""
        ...

    def skip_to(self, seconds: float) -> None:
        """Wait until it is later than that."""
        ...


class ProcessorClock:
    """The processor's time of this process, waiting included without waiting: what a machine that
    others use would have taken alone, all work being done in one thread.
    """

    def __init__(self) -> None:
        self._skipped = 0.0

    def __call__(self) -> float:
        """As `Clock` says."""
        return time.process_time() + self._skipped

    def skip_to(self, seconds: float) -> None:
        """As `Clock` says."""
        self._skipped += max(seconds - self(), 0.0)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What is seen from outside: when pictures begin and end, and what they are.

    clock: seconds; arrivals: of the jobs "0", "1", …, after `start`
    """

    clock: Callable[[], float]
    arrivals: Sequence[float]
    start: float = 0.0
    first_steps: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    changed: Condition = field(default_factory=Condition)

    def tell(self, event: Event) -> None:
        """Take an event of the loop's."""
        now = self.clock() - self.start
        with self.changed:
            if event.kind == "turn":
                self.sizes.append(len(event.data["rows"]))
                for job, *_ in event.data["rows"]:
                    self.first_steps.setdefault(job, now)
            elif event.kind == "finished":
                self.ends[event.job] = now
                self.files[event.job] = hashlib.sha256(event.blob).hexdigest()
            elif event.kind == "failed":
                raise AssertionError(f"{event.job} failed: {event.data['message']}")
            self.changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return len(self.ends) == len(self.arrivals)

    def figures(self) -> dict[str, Any]:
        """Return quantiles in seconds of the whole and of the first step, and means."""
        return {
            "whole_s": quantiles(self._since(self.ends)),
            "first_step_s": quantiles(self._since(self.first_steps)),
            "pictures_per_s": len(self.arrivals) / max(self.ends.values()),
            "mean_rows": statistics.mean(self.sizes),
            "steps": len(self.sizes),
        }

    def _since(self, times: Mapping[str, float]) -> list[float]:
        return [times[str(number)] - came for number, came in enumerate(self.arrivals)]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and what 95 of 100 do not exceed."""
    if len(values) == 1:
        return {"p50": values[0], "p95": values[0]}
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18]}


def make_loop(
    contender: str, runner: ModelRunner, seen: Seen, rows: int, clock: Callable[[], float]
) -> Loop:
    """Return the loop of a contender."""
    chosen = CONTENDERS[contender]
    return Loop(
        runner,
        seen.tell,
        limits=RowLimits(rows),
        board=chosen.board,
        scheduler=chosen.scheduler(rows),
        clock=clock,
    )


def by_hand(loop: Loop, seen: Seen, clock: Clock, orders: Sequence[Order]) -> None:
    """Let each stage do a piece of work in turn until all is drawn."""
    seen.start, submitted = clock(), 0
    while not seen.is_over:
        now = clock() - seen.start
        while submitted < len(orders) and seen.arrivals[submitted] <= now:
            loop.submit(orders[submitted])
            submitted += 1
        worked = [loop.prepare(), loop.step(), loop.finish()]
        if not any(worked):
            clock.skip_to(seen.start + seen.arrivals[submitted])


def in_threads(loop: Loop, seen: Seen, orders: Sequence[Order]) -> None:
    """Let each stage work in a thread of its own, as in the server, until all is drawn."""
    threads = loop.start()
    seen.start = seen.clock()
    for order, came in zip(orders, seen.arrivals, strict=True):
        time.sleep(max(seen.start + came - seen.clock(), 0.0))
        loop.submit(order)
    with seen.changed:
        seen.changed.wait_for(lambda: seen.is_over)
    loop.stop()
    for thread in threads:
        thread.join()
