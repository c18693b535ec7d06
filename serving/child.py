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

from engine.backends.settings import BackendSettings, ComputePrecision, cpu_count
from engine.errors import LatentrtError
from engine.store.cache import Cache, cache_folder
from runtime.conditioning.wildcards import Wildcards
from runtime.images.files import program_version
from runtime.pipeline import Pipeline
from serving.errors import RefusalError
from serving.events import Event
from serving.frames import of_event, read_frame, to_order, write_frame
from serving.limits import Limits
from serving.loop import Loop
from serving.model_files import Files
from serving.model_runner import ModelRunner, Models
from serving.row_limits import ROWS, Aim, RowLimits

FIRST = "is_first"  # in the frame of the settings: whether no engine was ready before
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
    files: what tells models' and adapters' files from others, by their paths
    rows: in a step, as `serving.row_limits.RowLimits` takes them
    model_bytes: of weights that stay loaded, None for any number
    """

    models: Mapping[str, str]
    loras: Mapping[str, str] = field(default_factory=dict)
    backend: str | None = None
    device: str | None = None
    precision: ComputePrecision | None = None
    threads: int | None = None
    build_missing: bool = False
    graphs: str | None = None
    files: Mapping[str, Files] = field(default_factory=dict)
    wildcard_dir: str | None = None
    rows: int | Aim = ROWS
    model_bytes: int | None = None
    limits: Limits = field(default_factory=Limits)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings that were written."""
        return cls(**{**given, "limits": Limits(**given["limits"])})

    def row_limits(self) -> RowLimits:
        """Return the limits of rows, with the times that were kept of these models here."""
        facts = {
            name: getattr(self, name) for name in ("models", "backend", "precision", "threads")
        }
        key = Cache.key(**facts, version=program_version(), cpu_count=cpu_count())
        return RowLimits(self.rows, cache_folder() / f"step-times-{key[:16]}.json")

    def runner(self) -> Models:
        """Return what draws; nothing is loaded yet."""
        settings = BackendSettings(
            backend=self.backend,
            device=self.device,
            threads=self.threads,
            build_missing=self.build_missing,
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
            files=self.files,
            budget=self.model_bytes,
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
    is_first = first[0].pop(FIRST)
    settings = EngineSettings.from_json(first[0])
    runner = runner_of(settings)
    try:
        runner.warm(next(iter(settings.models)))
    except (LatentrtError, RefusalError) as error:
        print(f"error: {error}", file=sys.stderr)
        if is_first:
            return FAILED  # later, other models may be drawn with
    waiting: Queue[Event] = Queue()
    Thread(target=_write, args=(events, waiting), daemon=True).start()

    def tell(event: Event) -> None:
        waiting.put(event)
        if event.kind == "taken":  # it may kill this process: who is on board is known outside
            waiting.join()

    loop = Loop(runner, tell, limits=settings.row_limits())
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
