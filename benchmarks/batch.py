"""How many pictures a second does `latentrt batch` draw, beside the pipeline in a loop?

Unlike requests of the model that ships, all of them with both: a call of the pipeline and a file
each, and a batch with its manifest, from the file of requests to the last record. Loading is in
neither. Both go in turns, so that what else the machine does meets both.
"""

import json
import tempfile
import time
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
    loop, batch = list[float](), list[float]()
    for _ in range(repeats + 1):
        loop.append(requests / _in_a_loop(pipeline, fields))
        batch.append(requests / _as_a_batch(pipeline, fields))
    ratios = [b / a for a, b in zip(loop[1:], batch[1:], strict=True)]
    return {
        "machine": describe(),
        "request": {"requests": requests, "steps": STEPS, "samplers": SAMPLERS, "repeats": repeats},
        "loop_pictures_a_second": summary(loop[1:]),
        "batch_pictures_a_second": summary(batch[1:]),
        "batch_beside_loop": summary(ratios),
    }


def _fields(index: int) -> dict[str, Any]:
    return {
        "prompt": f"a {NOUNS[index % len(NOUNS)]}, fluent style",
        "sampler": SAMPLERS[index % len(SAMPLERS)],
        "num_inference_steps": STEPS[index % len(STEPS)],
        "guidance_scale": SCALES[index % len(SCALES)],
        "seed": index,
    }


def _in_a_loop(pipeline: Pipeline, fields: list[dict[str, Any]]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for index, given in enumerate(fields):
            result = pipeline(**given)
            (image,), (settings,) = result.images, result.settings
            write_image(image, Path(folder) / f"{index}.png", settings)
        return time.perf_counter() - start


def _as_a_batch(pipeline: Pipeline, fields: list[dict[str, Any]]) -> float:
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name) / "requests.jsonl", Path(name) / "out"
        path.write_text("".join(json.dumps(given) + "\n" for given in fields))
        defaults = Defaults(fields={}, hires={}, seed=0, folder=path.parent)
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(opened_folder(folder))
            manifest = stack.enter_context(Manifest.opened(folder))
            progress = Progress(0, sum(len(work.pictures) for work in works(path, defaults, {})))
            Batch(
                pipeline=pipeline,
                defaults=defaults,
                manifest=manifest,
                folder=folder,
                made_with={},
                ending=".png",
                mark=True,
                batch_size=None,
                progress=progress,
            ).draw(works(path, defaults, {}))
        assert progress.drawn == len(fields)
        return time.perf_counter() - start
