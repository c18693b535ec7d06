"""The engine's process: reads orders from its input, writes events to its output, and may die.

What a library prints goes to the error output, and the process ends when its input does.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import BinaryIO, Protocol

from engine.backends.settings import ON_GPU, BackendSettings, cpu_count
from engine.errors import LatentrtError, OutputError
from engine.store.cache import Cache, cache_folder
from runtime.conditioning.wildcards import Wildcards
from runtime.denoising.device_rows import SLOTS
from runtime.images.files import program_version
from runtime.pipeline import Pipeline
from serving.engine_settings import FAILED, FIRST, EngineSettings
from serving.errors import RefusalError
from serving.events import Event
from serving.frames import of_event, read_frame, to_order, write_frame
from serving.loop import Loop
from serving.model_runner import ModelRunner, Models
from serving.row_limits import LADDER, RowLimits

BY_BUS = "PCI_BUS_ID"  # as nvidia-smi numbers GPUs


class WarmModelRunner(ModelRunner, Protocol):
    """What draws, once it is warm."""

    def warm(self, model: str) -> None:
        """Load a model, so that the first request does not wait for it. Raises LatentrtError."""
        ...


def row_limits(settings: EngineSettings) -> RowLimits:
    """Return the limits of rows, with the times that were kept of these models here."""
    facts = {
        name: getattr(settings, name)
        for name in ("models", "backend", "card", "precision", "threads")
    }
    key = Cache.key(**facts, version=program_version(), cpu_count=cpu_count())
    ladder = SLOTS if settings.backend in ON_GPU else LADDER
    path = None
    with suppress(OutputError):  # a home that is not there, or closed, keeps nothing
        path = cache_folder() / f"step-times-{key[:16]}.json"
    return RowLimits(settings.rows, path, ladder)


def runner(settings: EngineSettings) -> Models:
    """Return what draws; nothing is loaded yet."""
    chosen = BackendSettings(
        backend=settings.backend,
        device=settings.device,
        threads=settings.threads,
        build_missing=settings.build_missing,
    )

    def load(model: str | Path) -> Pipeline:
        return Pipeline.load(
            model,
            graphs=settings.graphs,
            precision=settings.precision,
            settings=chosen,
            fast_start=True,
        )

    folder = settings.wildcard_dir
    sign = None
    if settings.c2pa_cert and settings.c2pa_key:
        from runtime.images.credentials import Credentials

        sign = Credentials.read(settings.c2pa_cert, settings.c2pa_key).sign
    return Models(
        models=settings.models,
        loras={name: Path(path) for name, path in settings.loras.items()},
        controls={name: Path(path) for name, path in settings.controls.items()},
        ip_adapters={name: Path(path) for name, path in settings.ip_adapters.items()},
        image_encoders={name: Path(path) for name, path in settings.image_encoders.items()},
        upscalers={name: Path(path) for name, path in settings.upscalers.items()},
        threads=settings.threads,
        load=load,
        wildcards=None if folder is None else Wildcards(Path(folder)),
        limits=settings.limits,
        files=settings.files,
        budget=settings.model_bytes,
        sign=sign,
        watermark=settings.watermark,
    )


def main(runner_of: Callable[[EngineSettings], WarmModelRunner] = runner) -> int:
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
    if settings.card is not None:  # of which the libraries see nothing else
        os.environ.update(CUDA_DEVICE_ORDER=BY_BUS, CUDA_VISIBLE_DEVICES=str(settings.card))
    drawing = runner_of(settings)
    try:
        drawing.warm(next(iter(settings.models)))
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

    loop = Loop(drawing, tell, limits=row_limits(settings))
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
