"""A replica that draws: an engine's process on the machine where the replica is.

A picture may kill the process, which the supervisor starts again, as on one machine; so what ends
a replica is never what it draws, and a gateway may ask another replica for it.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import BackendError
from serving.engine_process import COMMAND
from serving.engine_settings import EngineSettings
from serving.event_inbox import EventInbox
from serving.events import Event
from serving.model_files import list_files
from serving.order import Order
from serving.ray.routing import WARM, model_set
from serving.supervisor import ProcessEngine

LATE = 120.0  # seconds without an engine, after which another replica is to take the place
SETS_KEPT = 8  # models with adapters, of which a replica says that it has them


class EngineReplica:
    """Draws orders of one picture each, and tells each order's events to whoever gave it.

    settings: of the engine; its models' files are those that this machine has under their paths
    command: what starts the engine's process
    Raises BackendError where a model cannot be loaded. Returns when the engine is ready.
    """

    def __init__(self, settings: EngineSettings, command: tuple[str, ...] = COMMAND) -> None:
        files = {path: list_files(Path(path)) for path in settings.files}
        self._engine = ProcessEngine(replace(settings, files=files), command=command)
        self._inbox: EventInbox | None = None
        self._streams: dict[str, tuple[str, asyncio.Queue[Event]]] = {}
        self._warm: OrderedDict[str, None] = OrderedDict({next(iter(settings.models)): None})
        self._engine.start(self._tell)
        while not self._engine.is_ready:
            if self._engine.has_failed:
                raise BackendError("the engine could not start; what it said stands in the log")
            time.sleep(0.02)
        self._was_ready = time.monotonic()

    async def draw(self, gateway: str, order: Order) -> AsyncIterator[Event]:
        """Draw an order's picture; yields what happens, until it is finished or has failed.

        gateway: by which steps are told once to each, with the rows of all its pictures
        Whoever no longer listens has it dropped.
        """
        if self._inbox is None:
            call = asyncio.get_running_loop().call_soon_threadsafe
            self._inbox = EventInbox(call, self._receive)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._streams[order.job] = gateway, events
        self._remember(model_set(order.picture_request))
        self._engine.submit(order)
        try:
            while True:
                event = await events.get()
                yield event
                if event.kind in ("finished", "failed"):
                    return
        finally:
            del self._streams[order.job]
            self._engine.cancel(order.job)

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what the router is to know, which Ray Serve asks for: models that are loaded."""
        return {WARM: list(self._warm)}

    def check_health(self) -> None:
        """Raise BackendError where there is no engine for long, so that Ray Serve ends this."""
        now = time.monotonic()
        if self._engine.is_ready:
            self._was_ready = now
        elif now - self._was_ready > LATE:
            raise BackendError(f"there is no engine since {LATE:.0f} s; its log says why")

    def __del__(self) -> None:
        """End the engine, which Ray Serve has called when nothing is drawn any more."""
        self._engine.stop()

    def _tell(self, event: Event) -> None:
        if self._inbox is not None:
            self._inbox.put(event)

    def _receive(self, event: Event) -> None:
        """Hand an event to its order's stream; a step to one stream of each gateway in it."""
        if event.kind != "turn":
            if event.job in self._streams:
                self._streams[event.job][1].put_nowait(event)
            return
        told = dict(self._streams[job] for job, *_ in event.data["rows"] if job in self._streams)
        for events in told.values():
            events.put_nowait(event)

    def _remember(self, models: str) -> None:
        """Keep what was drawn with last; what the engine lets go of to make room is not known."""
        self._warm[models] = None
        self._warm.move_to_end(models)
        while len(self._warm) > SETS_KEPT:
            self._warm.popitem(last=False)
