"""How many pictures a second does `latentrt batch` draw, beside the pipeline in a loop?

Unlike requests of the model that ships, all of them with both: a call of the pipeline and a file
each, and a batch with its manifest, from the file of requests to the last record. Loading is in
neither. Both go in turns, so that what else the machine does meets both; the processor's time is
the better clock where others use it.
"""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, summary
from engine.backends.settings import BackendSettings
from runtime import Pipeline
from runtime.batch.drawing import Batch
from runtime.batch.manifest import Manifest, opened_folder
from runtime.batch.progress import Progress
from runtime.batch.requests import Defaults
from runtime.batch.store import FolderStore
from runtime.batch.work import works
from runtime.images.files import write_image

REQUESTS = 24
NOUNS = ("apple", "cat face", "sailboat", "sunflower", "rocket", "snowman")
SAMPLERS = ("ddim", "euler_a", "dpmpp_2m")
STEPS = (6, 8, 10, 12)
SCALES = (3.0, 5.0)


def measure(repeats: int, requests: int = REQUESTS) -> dict[str, Any]:
    """Draw so many requests by turns in both ways; warm-up: one turn of each."""
    pipeline = Pipeline.load(settings=BackendSettings(backend="cpu"))
    fields = [_fields(index) for index in range(requests)]
    turns = [
        (_timed(_in_a_loop, pipeline, fields), _timed(_as_a_batch, pipeline, fields))
        for _ in range(repeats + 1)
    ][1:]
    measured: dict[str, Any] = {
        "machine": describe(),
        "request": {"requests": requests, "steps": STEPS, "samplers": SAMPLERS, "repeats": repeats},
    }
    for index, clock in enumerate(("second", "processor_second")):
        for name, way in (("loop", 0), ("batch", 1)):
            rates = [requests / turn[way][index] for turn in turns]
            measured[f"{name}_pictures_a_{clock}"] = summary(rates)
        ratios = [loop[index] / batch[index] for loop, batch in turns]
        measured[f"batch_beside_loop_by_{clock}s"] = summary(ratios)
    return measured


def _timed(
    draw: Callable[[Pipeline, list[dict[str, Any]], Path], None],
    pipeline: Pipeline,
    fields: list[dict[str, Any]],
) -> tuple[float, float]:
    """Return the seconds that drawing took, and those of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        start, worked = time.perf_counter(), time.process_time()
        draw(pipeline, fields, Path(folder))
        return time.perf_counter() - start, time.process_time() - worked


def _fields(index: int) -> dict[str, Any]:
    return {
        "prompt": f"a {NOUNS[index % len(NOUNS)]}, fluent style",
        "sampler": SAMPLERS[index % len(SAMPLERS)],
        "num_inference_steps": STEPS[index % len(STEPS)],
        "guidance_scale": SCALES[index % len(SCALES)],
        "seed": index,
    }


def _in_a_loop(pipeline: Pipeline, fields: list[dict[str, Any]], folder: Path) -> None:
    for index, given in enumerate(fields):
        result = pipeline(**given)
        (image,), (settings,) = result.images, result.settings
        write_image(image, folder / f"{index}.png", settings)


def _as_a_batch(pipeline: Pipeline, fields: list[dict[str, Any]], folder: Path) -> None:
    path, out = folder / "requests.jsonl", folder / "out"
    path.write_text("".join(json.dumps(given) + "\n" for given in fields))
    defaults = Defaults(fields={}, hires={}, seed=0, folder=folder)
    with ExitStack() as stack:
        stack.enter_context(opened_folder(out))
        manifest = stack.enter_context(Manifest.opened(out))
        progress = Progress(0, sum(len(work.pictures) for work in works(path, defaults, {})))
        Batch(
            pipeline=pipeline,
            defaults=defaults,
            store=FolderStore(folder=out, manifest=manifest, progress=progress),
            made_with={},
            ending=".png",
            mark=True,
            sign=None,
            watermark=None,
            batch_size=None,
        ).draw(works(path, defaults, {}))
    assert progress.drawn == len(fields)
