"""Ways to choose what is drawn next, each in the place of the loop's own.

All have the loop's stages, so they differ in nothing else. How the others choose is read from
SGLang-Diffusion 0.5.23 (`managers/scheduler.py`) and vLLM-Omni 0.30.0 (`diffusion/sched`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.serving.traffic import settings
from serving.bucket_scheduler import Scheduler
from serving.order import Picture

WHOLE_QUEUE = 10**6


class OneAtATime:
    """Draws the oldest picture to its end."""

    def choose(self, waiting: Sequence[Picture]) -> list[Picture]:
        """As `Scheduler` says."""
        return [waiting[0]]


class EqualRequests:
    """Draws requests that are equal but for prompt and seed together, from their first step to
    their last, as SGLang does: the oldest, and those of the queue that are like it.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._batch: set[Picture] = set()

    def choose(self, waiting: Sequence[Picture]) -> list[Picture]:
        """As `Scheduler` says."""
        batch = [picture for picture in waiting if picture in self._batch]
        if not batch:
            wanted = settings(waiting[0].order)
            alike = (picture for picture in waiting if settings(picture.order) == wanted)
            batch = [picture for picture, _ in zip(alike, range(self._rows), strict=False)]
            self._batch = set(batch)
        return batch


class EqualSettings:
    """Draws requests of equal settings together, each at a step of its own, as vLLM-Omni does: the
    head of the queue joins when it is like those that run, and otherwise keeps all behind it out.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._running: set[Picture] = set()

    def choose(self, waiting: Sequence[Picture]) -> list[Picture]:
        """As `Scheduler` says."""
        running = [picture for picture in waiting if picture in self._running]
        for picture in waiting:
            if picture in self._running:
                continue
            if len(running) == self._rows or (running and _key(picture) != _key(running[0])):
                break
            running.append(picture)
        self._running = set(running)
        return running


def _key(picture: Picture) -> Hashable:
    return tuple(settings(picture.order, "num_inference_steps"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to choose.

    scheduler: made of the rows at most; None for the loop's own
    board: pictures that are prepared before, None for the loop's own number
    """

    scheduler: Callable[[int], Scheduler[Picture] | None]
    board: int | None = None


ROWS, ALONE = "rows, each at its own step", "one at a time"
CONTENDERS: Mapping[str, Contender] = {
    ALONE: Contender(scheduler=lambda rows: OneAtATime()),
    "equal requests (SGLang)": Contender(scheduler=EqualRequests, board=WHOLE_QUEUE),
    "equal settings (vLLM-Omni)": Contender(scheduler=EqualSettings),
    ROWS: Contender(scheduler=lambda rows: None),
}
