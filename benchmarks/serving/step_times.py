"""What a step of b rows takes, b = 1 to 16, of the model that ships: the cost curve."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.machine import summary
from benchmarks.serving.load import MODEL, Drawing
from engine.backends.settings import ON_GPU
from serving.child import runner as make_runner
from serving.model_runner import Models
from serving.picture_request import PictureRequest
from serving.row_limits import LADDER, gaining_rows
from serving.unfinished_picture import RowPicture

REPEATS = 15


def measure(drawing: Drawing, repeats: int = REPEATS) -> dict[str, Any]:
    """Measure steps of each size in turn, and a decoder's run, after a warm-up of each."""
    clock = time.process_time if drawing.clock == "processor" else time.perf_counter
    if drawing.backend in ON_GPU:
        clock = time.perf_counter  # the processor waits
    runner = make_runner(drawing.settings())
    steps = len(LADDER) * (repeats + 1)
    rows = [_begun(runner, number, steps) for number in range(max(LADDER))]
    latents, pipeline = rows[0].row.latents, rows[0].pipeline
    taken: dict[int, list[float]] = {count: [] for count in LADDER}
    decoded = []
    for _ in range(repeats + 1):
        for count, times in taken.items():
            times.append(_timed(clock, partial(runner.step, rows[:count])))
        decoded.append(_timed(clock, partial(pipeline.decode, latents)))
    summaries = {count: summary(times[1:]) for count, times in taken.items()}
    medians = {count: found["median"] for count, found in summaries.items()}
    return {
        "request": {**asdict(drawing), "repeats": repeats},
        "step_s": summaries,
        "decode_s": summary(decoded[1:]),
        "gaining_rows": gaining_rows(medians),
    }


def _begun(runner: Models, seed: int, steps: int) -> RowPicture:
    fields = {"prompt": "a red apple", "seed": [seed], "num_inference_steps": steps}
    (picture,) = runner.unfinished_pictures(PictureRequest(fields=fields, model=MODEL))
    assert isinstance(picture, RowPicture)
    picture.enter()
    return picture


def _timed(clock: Callable[[], float], call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start
