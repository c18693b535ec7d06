"""The engine in a process of its own, started again when it dies; what was unfinished is redrawn.

A picture is a function of its request and seed, so drawing it again gives the same. But one that
makes the engine die would take all others with it again and again. So those that were on board at
two deaths are drawn one by one, with nothing beside them, before anything else; and one that was
alone in the engine at two deaths fails.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from subprocess import Popen, TimeoutExpired
from threading import Lock, Thread
from typing import IO, Any

from serving.engine_process import COMMAND, start_process
from serving.engine_settings import FAILED, FIRST, EngineSettings
from serving.errors import DRAWING_FAILED
from serving.events import Event
from serving.frames import of_order, read_frame, to_event, write_frame
from serving.memory import resident_bytes
from serving.order import Order

log = logging.getLogger("latentrt.serving")

LONGEST_PAUSE = 60.0  # seconds between two starts
DEATHS = 2  # on board so often, a picture is drawn alone; alone so often, it fails

Key = tuple[str, int]
"""A picture: its job and its index."""
Frame = tuple[Mapping[str, Any], Sequence[bytes]]


@dataclass(slots=True, kw_only=True, eq=False)
class Unfinished:
    """What the engine owes: orders less what is finished, and what happened to their pictures.

    orders: in the order in which they came; left: indices of each that are not finished
    aboard: pictures that the engine has taken from its queue
    deaths, deaths_alone: of the engine, with a picture on board, and with it alone there
    """

    orders: dict[str, Order] = field(default_factory=dict)
    left: dict[str, list[int]] = field(default_factory=dict)
    aboard: set[Key] = field(default_factory=set)
    deaths: Counter[Key] = field(default_factory=Counter)
    deaths_alone: Counter[Key] = field(default_factory=Counter)

    def add(self, order: Order) -> None:
        """Owe an order's pictures."""
        self.orders[order.job] = order
        self.left[order.job] = list(order.indices)

    def done(self, job: str, index: int) -> None:
        """Owe a picture no longer."""
        if job in self.left and index in self.left[job]:
            self.left[job].remove(index)
            self._forget((job, index))
            if not self.left[job]:
                self.drop(job)

    def drop(self, job: str) -> bool:
        """Owe a job no longer; returns whether it was owed."""
        for index in self.left.pop(job, []):
            self._forget((job, index))
        return self.orders.pop(job, None) is not None

    def _forget(self, key: Key) -> None:
        self.aboard.discard(key)
        del self.deaths[key]
        del self.deaths_alone[key]

    def died(self) -> list[Key]:
        """Count a death; return the pictures that are to fail by it."""
        self.deaths.update(self.aboard)
        if len(self.aboard) == 1:
            self.deaths_alone.update(self.aboard)
        self.aboard.clear()
        return [key for key, deaths in self.deaths_alone.items() if deaths >= DEATHS]

    @property
    def suspect(self) -> Key | None:
        """The first picture that must be drawn alone, if there is one."""
        return next((key for key, deaths in self.deaths.items() if deaths >= DEATHS), None)

    def rest(self, job: str) -> Order:
        """Return an order for what is left of a job."""
        return replace(self.orders[job], indices=list(self.left[job]), unfinished_pictures=None)

    def only(self, key: Key) -> Order:
        """Return an order for one picture of a job."""
        return replace(self.orders[key[0]], indices=[key[1]], unfinished_pictures=None)


class ProcessEngine:
    """An `EngineClient` whose engine is a child of this process.

    settings: of the engine; command: what starts it
    process: the first, where it was started before, so that it imports what it needs meanwhile
    pause: seconds before the second start, doubled until a picture is finished
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        command: tuple[str, ...] = COMMAND,
        process: "Popen[bytes] | None" = None,
        pause: float = 1.0,
    ) -> None:
        self.settings = settings
        self._died: Callable[[], None] = lambda: None
        self._command = command
        self._started = process
        self._first_pause = self._pause = pause
        self._lock = Lock()
        self._unfinished = Unfinished()
        self._alone: Key | None = None  # the suspect that is being drawn
        self._process: Popen[bytes] | None = None
        self._outbox: SimpleQueue[Frame | None] = SimpleQueue()
        self._ready = self._was_ready = False
        self._stopped = False
        self._tell: Callable[[Event], None] = lambda event: None
        self.exit_status: int | None = None

    @property
    def is_ready(self) -> bool:
        """As `EngineClient` says: not while it starts, at first or again."""
        return self._ready

    @property
    def pid(self) -> int | None:
        """The engine's process, None where there is none."""
        return None if self._process is None else self._process.pid

    @property
    def memory_bytes(self) -> int | None:
        """As `EngineClient` says."""
        return None if self.pid is None else resident_bytes(self.pid)

    @property
    def has_failed(self) -> bool:
        """Whether the engine could not start, which another try would not change."""
        return self.exit_status == FAILED and not self._was_ready

    def on_death(self, call: Callable[[], None]) -> None:
        """Have something called whenever the engine has died."""
        self._died = call

    def launch(self) -> None:
        """Start a child; done before `start`, its model is loaded while the server is."""
        started, self._started = self._started, None
        self._process = started or start_process(self._command)
        self._outbox = SimpleQueue()
        Thread(target=_write, args=(self._process.stdin, self._outbox), daemon=True).start()
        self._send({**self.settings.as_json(), FIRST: not self._was_ready})

    def start(self, tell: Callable[[Event], None]) -> None:
        """As `EngineClient` says; returns before it is ready."""
        self._tell = tell
        if self._process is None:
            self.launch()
        Thread(target=self._watch, name="engine", daemon=True).start()

    def submit(self, order: Order) -> None:
        """As `EngineClient` says; while a suspect is drawn alone, it waits."""
        with self._lock:
            self._unfinished.add(order)
            if self._ready and self._alone is None:
                self._send(*of_order(order))

    def cancel(self, job: str) -> None:
        """As `EngineClient` says."""
        with self._lock:
            if self._unfinished.drop(job) and self._ready:
                self._send({"do": "cancel", "job": job})
                if self._alone is not None and self._alone[0] == job:
                    self._send_next()

    def stop(self) -> None:
        """As `EngineClient` says; the child ends by itself, or is ended."""
        self._stopped = True
        process = self._process
        if process is None:
            return
        self._outbox.put(None)
        try:
            process.wait(5)
        except TimeoutExpired:
            process.kill()
            process.wait()

    def _send(self, head: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Let a frame be written to the child; whether that lives is found where it is read."""
        self._outbox.put((head, blobs))

    def _watch(self) -> None:
        """Read what the child tells until it dies, then start another, until `stop`."""
        while True:
            process = self._process
            assert process is not None
            assert process.stdout is not None
            while (frame := read_frame(process.stdout)) is not None:
                self._receive(to_event(*frame))
            self.exit_status = process.wait()
            self._outbox.put(None)
            process.stdout.close()
            if self._stopped or self.has_failed:
                self._ready = False
                return
            self._bury()
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            if self._stopped:
                return
            self.launch()

    def _receive(self, event: Event) -> None:
        key = event.job, event.index
        with self._lock:
            if event.kind == "ready":
                self._ready = self._was_ready = True
                self._send_next()
                return
            if event.kind == "taken":
                if event.job in self._unfinished.left:
                    self._unfinished.aboard.add(key)
                return
            if event.kind in ("finished", "failed"):
                self._pause = self._first_pause
                if event.kind == "finished":
                    self._unfinished.done(*key)
                else:
                    self._unfinished.drop(event.job)
                if key == self._alone:
                    self._send_next()
        self._tell(event)

    def _send_next(self) -> None:
        """Give an idle engine the next suspect, or everything where there is none."""
        self._alone = self._unfinished.suspect
        if self._alone is not None:
            self._send(*of_order(self._unfinished.only(self._alone)))
            return
        for job in self._unfinished.orders:
            self._send(*of_order(self._unfinished.rest(job)))

    def _bury(self) -> None:
        """Take note of a death, and fail whoever has caused two."""
        with self._lock:
            self._ready, self._alone = False, None
            status, culprits = self.exit_status, self._unfinished.died()
            for job, _ in culprits:
                self._unfinished.drop(job)
        log.error("the engine has died (status %s); starting another", status)
        self._died()
        for job, index in culprits:
            error = {"code": "engine_failed", "message": DRAWING_FAILED}
            self._tell(Event(kind="failed", job=job, index=index, data=error))


def _write(stream: IO[bytes], outbox: "SimpleQueue[Frame | None]") -> None:
    """Write frames to a child until it is gone or None comes; whoever sends waits for nothing."""
    while (frame := outbox.get()) is not None:
        try:
            write_frame(stream, *frame)
        except OSError:
            break
    with suppress(OSError):
        stream.close()
