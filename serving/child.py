"""The engine's process: reads orders from its input, writes events to its output, and may die.

What a library prints goes to the error output, and the process ends when its input does.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, BinaryIO, Protocol, Self

from engine.backends.settings import BackendSettings, ComputePrecision
from engine.errors import LatentrtError
from runtime.conditioning.wildcards import Wildcards
from runtime.pipeline import Pipeline
from serving.bucket_scheduler import ROWS
from serving.events import Event
from serving.frames import of_event, read_frame, to_order, write_frame
from serving.limits import Limits
from serving.loop import Loop
from serving.model_runner import ModelRunner, Models

FAILED = 3  # exit status: a model cannot be loaded, which another try would not change


class WarmModelRunner(ModelRunner, Protocol):
    """What draws, once it is warm."""

    def warm(self, model: str) -> None:
        """Load a model, so that the first request does not wait for it. Raises LatentrtError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine's process draws with; all of it can be written as JSON.

    models, loras: paths, or names of models that ship, by the names that requests use
    keep: models with their adapters that stay loaded
    """

    models: Mapping[str, str]
    loras: Mapping[str, str] = field(default_factory=dict)
    backend: str | None = None
    precision: ComputePrecision | None = None
    threads: int | None = None
    build_missing: bool = False
    graphs: str | None = None
    wildcard_dir: str | None = None
    rows: int = ROWS
    keep: int = 3
    limits: Limits = field(default_factory=Limits)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings that were written."""
        return cls(**{**given, "limits": Limits(**given["limits"])})

    def runner(self) -> Models:
        """Return what draws; nothing is loaded yet."""
        settings = BackendSettings(
            backend=self.backend, threads=self.threads, build_missing=self.build_missing
        )

        def load(model: str | Path) -> Pipeline:
            return Pipeline.load(
                model,
                graphs=Path(self.graphs) if self.graphs else None,
                precision=self.precision,
                settings=settings,
                fast_start=True,
            )

        return Models(
            models=self.models,
            loras={name: Path(path) for name, path in self.loras.items()},
            load=load,
            wildcards=None if self.wildcard_dir is None else Wildcards(Path(self.wildcard_dir)),
            limits=self.limits,
            keep=self.keep,
        )


def main(runner_of: Callable[[EngineSettings], WarmModelRunner] = EngineSettings.runner) -> int:
    """Draw until the input ends; return the exit status. runner_of: makes what draws."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the process that speaks HTTP is asked to end
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(message)s")
    orders, events = sys.stdin.buffer, _own_output()
    first = read_frame(orders)
    if first is None:
        return 0
    settings = EngineSettings.from_json(first[0])
    runner = runner_of(settings)
    try:
        runner.warm(next(iter(settings.models)))
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    waiting: Queue[Event] = Queue()
    Thread(target=_write, args=(events, waiting), daemon=True).start()

    def tell(event: Event) -> None:
        waiting.put(event)
        if event.kind == "taken":  # it may kill this process: who is on board is known outside
            waiting.join()

    loop = Loop(runner, tell, rows=settings.rows)
    waiting.put(Event(kind="ready"))
    loop.start()
    while (frame := read_frame(orders)) is not None:
        head, blobs = frame
        if head["do"] == "submit":
            loop.submit(to_order(head, blobs))
        else:
            loop.cancel(head["job"])
    return 0


def _own_output() -> BinaryIO:
    """Take the output for frames alone: what others print goes where errors do."""
    kept = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return os.fdopen(kept, "wb")


def _write(stream: BinaryIO, waiting: Queue[Event]) -> None:
    """Write events as they come, until nobody reads them."""
    while True:
        try:
            write_frame(stream, *of_event(waiting.get()))
        except OSError:
            os._exit(0)  # nobody waits for pictures any more
        waiting.task_done()


if __name__ == "__main__":
    sys.exit(main())
