"""The process that builds one engine, which `engine.backends.tensorrt.build` starts.

`python -m engine.backends.tensorrt.build_worker` takes a request as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from engine.adapters.adapter import adapt_model
from engine.backends.base import Arrays
from engine.backends.binding import bind
from engine.backends.tensorrt.build_request import TERMINATION_GRACE_S, BuildRequest
from engine.backends.tensorrt.library import library
from engine.backends.tensorrt.network import build_engine
from engine.backends.tensorrt.profiles import input_shapes
from engine.errors import LatentrtError, OutputError
from engine.graphs.graph import Graph
from engine.model import COMPONENTS, Model

Tell = Callable[..., None]
Phases = dict[str, tuple[str | None, int, int]]
"""Of a builder that are not over, by name: the phase around it, its steps, those done."""


def main() -> None:
    """Read a request, build, and say how it went."""
    pipe = os.dup(1)
    os.dup2(2, 1)  # the library's own words go where they are kept for an crash message
    asked = json.loads(sys.stdin.buffer.readline())
    cancelled = Event()
    Thread(target=_watch, args=(cancelled,), daemon=True).start()

    def tell(**line: object) -> None:
        os.write(pipe, (json.dumps(line) + "\n").encode())

    try:
        build_part(BuildRequest.from_dict(asked["request"]), Path(asked["to"]), tell, cancelled)
        tell(peak_bytes=_peak_bytes())
    except LatentrtError as error:
        tell(error=type(error).__name__, message=str(error))


def build_part(request: BuildRequest, to: Path, tell: Tell, cancelled: Event) -> None:
    """Build the part of a model that is asked for.

    Raises LatentrtError: OutputError where the engine cannot be written.
    """
    module = library(request.library)
    graph = Graph.read(request.graph)
    model = Model.open(
        request.model,
        prediction_type=request.prediction_type,
        vae=request.vae,
        preview_decoder=request.preview_decoder,
        unet=request.unet,
        text_encoder=request.text_encoder,
        text_encoder_2=request.text_encoder_2,
    )
    config, compression = model.config(request.part), model.vae.compression
    shapes = [
        input_shapes(request.part, config, profile, compression=compression)
        for profile in request.settings.profiles
    ]
    monitor = _monitor(module, tell, cancelled)

    name = COMPONENTS[request.part]
    adapted = adapt_model(model, request.loras) if request.loras else {}
    weights: Arrays = adapted.get(name) or model.component(name)
    # What is bound must stay until the engine is built: the parser copies nothing.
    bound = list(bind(graph, weights))
    plan = build_engine(module, graph.data(), bound, shapes, request, monitor)
    try:
        with to.open("wb") as file:
            file.write(plan)
    except OSError as error:
        raise OutputError(
            f"the engine cannot be written to {to.parent} ({error.strerror}); check the "
            "permissions and the disk's space, or set LATENTRT_CACHE"
        ) from error


def _monitor(module: Any, tell: Tell, cancelled: Event) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Tells how far the build is, and stops it; the library calls from several threads."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases: Phases = {}
            self.reached = 0.0  # a phase that begins late takes nothing back
            self.lock = Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self.lock:
                self.phases[name] = (parent or None, steps, 0)

        def step_complete(self, name: str, step: int) -> bool:
            with self.lock:
                if name in self.phases:
                    parent, steps, _ = self.phases[name]
                    self.phases[name] = (parent, steps, step + 1)
                self.reached = max(self.reached, fraction(self.phases))
                tell(phase=name, fraction=self.reached)
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            with self.lock:
                self.phases.pop(name, None)

    return Monitor()


def fraction(phases: Phases) -> float:
    """Return what is done of the outermost phase, with what is done of those within."""
    within: dict[str | None, float] = {}
    for name, (parent, steps, done) in reversed(phases.items()):  # the outer ones began before
        share = min(1.0, (done + within.get(name, 0.0)) / max(steps, 1))
        within[parent] = max(within.get(parent, 0.0), share)
    return within.get(None, 0.0)


def _watch(cancelled: Event) -> None:
    """Stop when the parent closes the pipe, or dies: first as the library would have it."""
    os.read(0, 1)
    cancelled.set()
    time.sleep(TERMINATION_GRACE_S)
    os._exit(1)


def _peak_bytes() -> int | None:
    """Return the largest resident memory of this process so far, where Linux tells it.

    Not `getrusage`'s, which begins with that of the process that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()
