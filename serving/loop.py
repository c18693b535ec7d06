"""The engine's loop: pictures go through three stages, each of which a thread of its own works at.

    prepare   texts, images and noise become a row; a second run's start, too
    step      the next step of rows of one bucket, and nothing else
    finish    latents become files; previews

A stage does one piece of work when it is called and says whether there was any, so a test can call
them in any order, on a clock of its own. What waits is bounded: no more than `board` pictures are
between their preparation and their file, the others wait in the queue as the requests they are.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count
from threading import Condition, Thread

from engine.errors import RequestError
from serving.bucket_scheduler import BucketScheduler, Scheduler
from serving.errors import DRAWING_FAILED, RefusalError
from serving.events import Event
from serving.fair_queue import FairQueue
from serving.model_runner import ModelRunner
from serving.order import Order, Picture
from serving.row_limits import RowLimits

log = logging.getLogger("latentrt.serving")


class Loop:
    """Draws orders with a runner, and tells what happens.

    tell: takes events, on any of the threads; must not wait
    limits: of the pictures in a step; board: pictures at most between preparation and file, twice
        as many where None
    scheduler: chooses the rows of a step, within the limits where None
    clock: seconds, never set back
    """

    def __init__(
        self,
        runner: ModelRunner,
        tell: Callable[[Event], None],
        *,
        limits: RowLimits | None = None,
        board: int | None = None,
        scheduler: Scheduler[Picture] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or RowLimits()
        self._board = board
        self._runner = runner
        self._tell = tell
        self._clock = clock
        self._scheduler = scheduler or BucketScheduler(lambda p: self._limits.limit(p.begun))
        self._changed = Condition()
        self._numbers = count()
        self._orders: dict[str, Order] = {}
        self._queue: FairQueue[Picture] = FairQueue()
        self._entering: deque[Picture] = deque()  # whose second run is to begin
        self._stepping: list[Picture] = []
        self._finishing: deque[Picture] = deque()
        self._previews: dict[Picture, tuple[int, Callable[[], bytes]]] = {}
        self._at_work: dict[str, Sequence[Picture]] = {}  # by stage, what it has in hand
        self._since: float | None = None  # when the last turn ended, if rows were left then
        self._stopped = False

    def submit(self, order: Order) -> None:
        """Let an order's pictures wait."""
        cost = order.picture_request.work / order.picture_request.count
        with self._changed:
            self._orders[order.job] = order
            for index in order.indices:
                self._queue.put(
                    Picture(order=order, index=index, number=next(self._numbers)),
                    caller=order.caller,
                    cost=cost,
                    priority=order.priority,
                )
            self._changed.notify_all()

    def cancel(self, job: str) -> None:
        """Drop a job's pictures wherever they are; one that is in a step leaves after it."""
        with self._changed:
            order = self._orders.pop(job, None)
            if order is None:
                return
            order.cancelled = True
            for picture in [picture for picture in self._queue if picture.order is order]:
                self._queue.remove(picture)
            self._drop_cancelled()
            self._changed.notify_all()

    @property
    def board(self) -> int:
        """How many pictures may be between their preparation and their file."""
        return self._board or 2 * self._limits.largest

    @property
    def on_board(self) -> int:
        """How many pictures are between their preparation and their file."""
        held = chain(self._entering, self._stepping, self._finishing, *self._at_work.values())
        return len({id(picture) for picture in held})

    @property
    def waiting(self) -> int:
        """How many pictures wait in the queue."""
        return len(self._queue)

    def prepare(self) -> bool:
        """Make a picture ready for its next run; a second run goes before a new picture."""
        with self._changed:
            picture = self._entering.popleft() if self._entering else None
            if picture is None and self.on_board < self.board:
                picture = self._queue.take()
            if picture is None:
                return False
            self._at_work["prepare"] = [picture]
        is_new = picture.unfinished is None
        if is_new:
            self._tell(picture.event("taken"))
        try:
            self._enter(picture)
        except Exception as error:
            self._fail(picture, error)
            self._hand_on("prepare", [])
            return True
        if is_new and picture.unfinished is not None and not picture.order.cancelled:
            self._tell(picture.event("started", total=picture.unfinished.total))
        self._hand_on("prepare", [picture])
        return True

    def step(self) -> bool:
        """Make the next step of the rows whose turn it is."""
        with self._changed:
            if not self._stepping:
                return False
            chosen = self._scheduler.choose(self._stepping)
            self._stepping = [p for p in self._stepping if p not in chosen]
            self._at_work["step"] = chosen
        began = self._clock()
        self._call(chosen, chosen[0].begun.form)
        ended = self._clock()
        elapsed = ended - (began if self._since is None else self._since)
        done = [p for p in chosen if not p.order.cancelled and p.unfinished is not None]
        for picture in done:
            picture.batched |= len(chosen) > 1
            self._keep_preview(picture)
        rows = [
            [p.order.job, p.index, p.unfinished.calls, p.unfinished.total]
            for p in done
            if p.unfinished
        ]
        limit = self._limits.largest
        data = {"seconds": ended - began, "elapsed": elapsed, "limit": limit, "rows": rows}
        self._tell(Event(kind="turn", data=data))
        self._hand_on("step", done)
        with self._changed:
            more = self._stepping or self._entering or self._queue or "prepare" in self._at_work
            self._since = ended if more else None
        return True

    def finish(self) -> bool:
        """Make a finished picture's file or, where there is none to make, draw a preview.

        Where there is none either, the times of steps are kept.
        """
        picture = preview = None
        with self._changed:
            if self._finishing:
                picture = self._finishing.popleft()
                self._previews.pop(picture, None)
                self._at_work["finish"] = [picture]
            elif self._previews:
                picture = next(iter(self._previews))
                preview = self._previews.pop(picture)
        if picture is None:
            return self._limits.save()
        try:
            if preview is None:
                self._deliver(picture)
            elif not picture.order.cancelled:
                step, draw = preview
                self._tell(picture.event("preview", draw(), step=step))
        except Exception as error:
            self._fail(picture, error)
        with self._changed:
            self._at_work.pop("finish", None)
            self._changed.notify_all()
        return True

    def start(self) -> list[Thread]:
        """Work at all stages, each in a thread, until `stop`."""
        stages = {"prepare": self.prepare, "step": self.step, "finish": self.finish}
        threads = [
            Thread(target=self._work, args=(stage,), name=name, daemon=True)
            for name, stage in stages.items()
        ]
        for thread in threads:
            thread.start()
        return threads

    def stop(self) -> None:
        """Let the threads end after what they have in hand."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self, stage: Callable[[], bool]) -> None:
        while not self._stopped:
            if not stage():
                with self._changed:
                    self._changed.wait(0.2)

    def _enter(self, picture: Picture) -> None:
        order = picture.order
        if picture.unfinished is None:
            if order.unfinished_pictures is None:
                order.unfinished_pictures = self._runner.unfinished_pictures(order.picture_request)
            picture.unfinished = order.unfinished_pictures[picture.index]
        picture.unfinished.enter()

    def _call(self, chosen: Sequence[Picture], form: str) -> bool:
        """Step together; what fails is tried again in halves, until one alone has failed.

        Returns whether none has. Where both halves of a call can be made, it had too many rows.
        """
        began = self._clock()
        try:
            self._runner.step([p.unfinished for p in chosen])
        except Exception as error:
            if len(chosen) == 1:
                self._fail(chosen[0], error)
                return False
            kind = type(error).__name__
            log.warning("a step of %d rows failed (%s); halving it", len(chosen), kind)
            middle = len(chosen) // 2
            succeeded = [self._call(half, form) for half in (chosen[:middle], chosen[middle:])]
            if all(succeeded):
                self._limits.too_many(form, len(chosen))
            return all(succeeded)
        self._limits.took(form, len(chosen), self._clock() - began)
        return True

    def _keep_preview(self, picture: Picture) -> None:
        """Keep what the newest preview is drawn from, in place of one that still waits."""
        every, unfinished = picture.order.picture_request.preview_every, picture.unfinished
        assert unfinished is not None
        if every and unfinished.calls % every == 0 and not unfinished.is_done:
            preview = unfinished.calls, unfinished.preview()
            with self._changed:
                self._previews[picture] = preview

    def _hand_on(self, stage: str, pictures: Iterable[Picture]) -> None:
        """Put pictures where they go next, unless they were cancelled in the meantime."""
        with self._changed:
            self._at_work.pop(stage, None)
            for picture in pictures:
                assert picture.unfinished is not None
                if picture.unfinished.is_done:
                    self._finishing.append(picture)
                elif picture.unfinished.run_is_over:
                    self._entering.append(picture)
                else:
                    self._stepping.append(picture)
            self._drop_cancelled()
            self._stepping.sort(key=lambda p: p.number)
            self._changed.notify_all()

    def _deliver(self, picture: Picture) -> None:
        assert picture.unfinished is not None
        if picture.order.cancelled:
            return
        order, drawn = picture.order, picture.unfinished.finish()
        with self._changed:
            order.left -= 1
            if not order.left and self._orders.get(order.job) is order:
                del self._orders[order.job]
        self._tell(
            picture.event("finished", drawn.data, settings=drawn.settings, batched=picture.batched)
        )

    def _fail(self, picture: Picture, error: Exception) -> None:
        """Tell that a picture cannot be drawn: ours in our words, others only in the log."""
        job = picture.order.job
        if isinstance(error, RequestError):
            code, message = "invalid_request", str(error)
        elif isinstance(error, RefusalError):
            code, message = error.code, error.message
        else:
            log.error("picture %d of job %s failed", picture.index, job, exc_info=error)
            code, message = "engine_failed", DRAWING_FAILED
        if not picture.order.cancelled:
            self._tell(picture.event("failed", code=code, message=message))
        self.cancel(job)

    def _drop_cancelled(self) -> None:
        self._stepping = [p for p in self._stepping if not p.order.cancelled]
        for waiting in (self._entering, self._finishing):
            kept = [p for p in waiting if not p.order.cancelled]
            waiting.clear()
            waiting.extend(kept)
        for picture in [p for p in self._previews if p.order.cancelled]:
            del self._previews[picture]
