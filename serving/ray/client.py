"""The engines of a cluster as one: every picture is asked of a replica, and again where that dies.

Ray Serve hands a replica's death to whoever asked. A picture is a function of its request and seed,
so another replica draws the same, and nobody sees anything but a delay.
"""

import asyncio
import contextvars
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from serving.errors import DRAWING_FAILED
from serving.events import Event
from serving.order import Order

log = logging.getLogger("latentrt.serving")

TRIES = 6  # replicas that may die of a picture, or beside it
PAUSE = 0.2  # seconds before the second try, doubled from there on
EVERY = 1.0  # seconds between two looks at how many engines there are


class ClusterEngine:
    """An `EngineClient` of all replicas that a handle leads to; to be used on one event loop.

    handle: of a deployment of `EngineReplica`, which streams
    gateway: this process' name, among those that ask the same replicas
    count: says how many replicas draw now; called on another thread, for it may take its time
    """

    def __init__(self, handle: Any, gateway: str, count: Callable[[], int]) -> None:
        self._handle = handle
        self._gateway = gateway
        self._count = count
        self._died: Callable[[], None] = lambda: None
        self._running = 0
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._tell: Callable[[Event], None] = lambda event: None

    @property
    def is_ready(self) -> bool:
        """As `EngineClient` says: one replica is enough."""
        return self._running > 0

    @property
    def memory_bytes(self) -> int | None:
        """As `EngineClient` says: nobody asks the replicas."""
        return None

    def on_death(self, call: Callable[[], None]) -> None:
        """Have something called whenever a replica has died under a picture."""
        self._died = call

    def start(self, tell: Callable[[Event], None]) -> None:
        """As `EngineClient` says; on the event loop."""
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        # What is asked for a client is not ended with the client's request by Ray Serve.
        self._context = contextvars.copy_context()
        self._running = self._count()
        self._watching = self._begin(self._watch())

    def submit(self, order: Order) -> None:
        """As `EngineClient` says; every picture is asked for by itself."""
        tasks = {self._begin(self._draw(order, index)) for index in order.indices}
        self._tasks[order.job] = tasks
        for task in tasks:
            task.add_done_callback(lambda task: self._forget(order.job, task))

    def cancel(self, job: str) -> None:
        """As `EngineClient` says."""
        for task in self._tasks.pop(job, set()):
            task.cancel()

    def stop(self) -> None:
        """As `EngineClient` says; on any thread."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._running = 0
        self._watching.cancel()
        for job in list(self._tasks):
            self.cancel(job)

    def _begin(self, work: Any) -> "asyncio.Task[None]":
        return self._loop.create_task(work, context=self._context.copy())

    def _forget(self, job: str, task: "asyncio.Task[None]") -> None:
        tasks = self._tasks.get(job, set())
        tasks.discard(task)
        if not tasks:
            self._tasks.pop(job, None)

    async def _watch(self) -> None:
        """Keep count of the replicas; what cannot be told now is what it was."""
        while True:
            await asyncio.sleep(EVERY)
            try:
                self._running = await asyncio.to_thread(self._count)
            except Exception as error:
                log.warning("how many engines there are is not known now (%s)", error)

    async def _draw(self, order: Order, index: int) -> None:
        """Have one picture drawn, by whichever replica lives long enough."""
        own = replace(order, job=f"{order.job}-{index}", indices=[index], unfinished_pictures=None)
        for attempt in range(TRIES):
            stream = self._handle.draw.remote(self._gateway, own)
            try:
                async for event in stream:
                    self._receive(order.job, event)
                    if event.kind in ("finished", "failed"):
                        return
            except asyncio.CancelledError:
                with suppress(Exception):
                    stream.cancel()
                raise
            except Exception as error:  # Ray's and Ray Serve's, of many kinds
                log.warning("a replica has died under a picture (%s)", type(error).__name__)
            self._died()
            await asyncio.sleep(PAUSE * 2**attempt)
        failed = {"code": "engine_failed", "message": DRAWING_FAILED}
        self._tell(Event(kind="failed", job=order.job, index=index, data=failed))

    def _receive(self, job: str, event: Event) -> None:
        """Pass on what a replica tells, under the job's own name.

        A step's time is shared by all replicas, which work beside each other: the rate of the
        cluster is measured by it.
        """
        if event.kind != "turn":
            self._tell(replace(event, job=job))
            return
        rows = [[row[0].rpartition("-")[0], *row[1:]] for row in event.data["rows"]]
        elapsed = event.data["elapsed"] / max(self._running, 1)
        self._tell(replace(event, data={**event.data, "rows": rows, "elapsed": elapsed}))
