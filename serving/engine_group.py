"""Several engines as one: each on a card of its own, in a process of its own, behind one server.

A picture goes to the engine with the least unfinished work and stays there: when that engine dies,
it is drawn again by the one that takes its place, and the others go on meanwhile.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from subprocess import Popen
from threading import Lock

from serving.engine_settings import EngineSettings
from serving.events import Event
from serving.order import Order
from serving.supervisor import ProcessEngine

Key = tuple[str, int]
"""A picture: its job and its index."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """An engine, the work of each picture that it has not finished, and what it drew with last."""

    engine: ProcessEngine
    unfinished: dict[Key, float] = field(default_factory=dict)
    model: Hashable = None

    @property
    def work(self) -> float:
        return sum(self.unfinished.values())


class EngineGroup:
    """An `EngineClient` of several engines, with what else a server asks of its engine."""

    def __init__(self, engines: Sequence[ProcessEngine]) -> None:
        self._members = [_Member(engine=engine) for engine in engines]
        self._lock = Lock()
        self._tell: Callable[[Event], None] = lambda event: None

    @property
    def engines(self) -> list[ProcessEngine]:
        """Return them in the order of their cards."""
        return [member.engine for member in self._members]

    @property
    def settings(self) -> EngineSettings:
        """What is drawn with, equal in all of them but for the card."""
        return self._members[0].engine.settings

    @property
    def is_ready(self) -> bool:
        """As `EngineClient` says: one of them is enough."""
        return any(engine.is_ready for engine in self.engines)

    @property
    def memory_bytes(self) -> int | None:
        """As `EngineClient` says, of all together."""
        found = [engine.memory_bytes for engine in self.engines]
        return sum(each for each in found if each is not None) if any(found) else None

    @property
    def has_failed(self) -> bool:
        """Whether one could not start, which another try would not change."""
        return any(engine.has_failed for engine in self.engines)

    def on_death(self, call: Callable[[], None]) -> None:
        """Have something called whenever an engine has died."""
        for engine in self.engines:
            engine.on_death(call)

    def launch(self) -> None:
        """Start all processes."""
        for engine in self.engines:
            engine.launch()

    def start(self, tell: Callable[[Event], None]) -> None:
        """As `EngineClient` says; returns before any is ready."""
        self._tell = tell
        for member in self._members:
            member.engine.start(partial(self._receive, member))

    def submit(self, order: Order) -> None:
        """As `EngineClient` says; pictures of one order may be drawn by several engines."""
        request = order.picture_request
        model = request.model, tuple(request.loras)
        chosen: dict[int, list[int]] = {}
        with self._lock:
            for index in order.indices:
                place = self._place(model)
                member = self._members[place]
                member.unfinished[order.job, index] = request.work / request.count
                member.model = model
                chosen.setdefault(place, []).append(index)
        for place, indices in chosen.items():
            own = replace(order, indices=indices, unfinished_pictures=None)
            self._members[place].engine.submit(own)

    def cancel(self, job: str) -> None:
        """As `EngineClient` says."""
        with self._lock:
            having = [m for m in self._members if any(key[0] == job for key in m.unfinished)]
            for member in having:
                self._forget(member, job)
        for member in having:
            member.engine.cancel(job)

    def stop(self) -> None:
        """As `EngineClient` says; all at the same time."""
        with ThreadPoolExecutor(len(self._members)) as pool:
            list(pool.map(ProcessEngine.stop, self.engines))

    def _place(self, model: Hashable) -> int:
        """Return which engine draws a picture: of the least loaded, one that has the model."""
        places = [at for at, member in enumerate(self._members) if member.engine.is_ready]

        def load(at: int) -> tuple[float, bool]:
            return self._members[at].work, self._members[at].model != model

        return min(places or range(len(self._members)), key=load)

    def _receive(self, member: _Member, event: Event) -> None:
        """Take note of what an engine has finished, and pass on what it tells."""
        if event.kind == "turn":
            event = replace(event, data=self._shared(event.data))
        with self._lock:
            if event.kind == "finished":
                member.unfinished.pop((event.job, event.index), None)
            elif event.kind == "failed":
                self._forget(member, event.job)
        self._tell(event)

    def _shared(self, data: Mapping[str, object]) -> dict[str, object]:
        """Say of a turn how long its work takes all engines that are ready, which work beside it.

        The rate of the server is measured by that.
        """
        ready = sum(engine.is_ready for engine in self.engines)
        elapsed = data["elapsed"]
        assert isinstance(elapsed, float | int)
        return {**data, "elapsed": elapsed / max(ready, 1)}

    @staticmethod
    def _forget(member: _Member, job: str) -> None:
        member.unfinished = {k: work for k, work in member.unfinished.items() if k[0] != job}


def make_engine(
    settings: EngineSettings, cards: Sequence[int], process: "Popen[bytes] | None" = None
) -> ProcessEngine | EngineGroup:
    """Return an engine for each card, or the one that there is without; none is launched yet.

    cards: numbers of NVIDIA GPUs; process: the first engine's, where it was started before
    """
    first, *others = [replace(settings, card=card) for card in cards] or [settings]
    engine = ProcessEngine(first, process=process)
    if not others:
        return engine
    return EngineGroup([engine, *(ProcessEngine(other) for other in others)])
