"""Step rows of two buckets in turn on the stand-in; prints what was recorded and queued, as JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_rows.py
"""

import json

import numpy as np

from engine.backends.onnxruntime.cuda import OnnxRuntimeCudaEngine
from engine.backends.settings import BackendSettings
from runtime import Pipeline, Request
from runtime.denoising.rows import Row, rows_of
from tests.standin.call_log import CallLog
from tests.standin.device import CountingDevice
from tests.standin.models import cases

SIDES, COUNTS = (128, 192), (1, 2, 4)
PROVEN = 3  # calls of a form until its recording is believed
ROUNDS = 4
STEPS = 60


def begun(pipeline: Pipeline, seed: int, side: int) -> Row:
    """Return a row before its first step."""
    request = Request(prompt="a hat", seed=seed, num_inference_steps=STEPS, height=side, width=side)
    (row,) = rows_of(pipeline.plan(request))
    row.enter(pipeline.start)
    return row


def main() -> None:
    """Print the counts until all forms are recorded, and of the rounds after that."""
    device, log = CountingDevice(), CallLog()
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))
    graph = cases()["pictogram"].graph("step")
    weights = {name: np.zeros(shape, graph.precision) for name, shape in graph.weights.items()}
    engine = OnnxRuntimeCudaEngine(graph, weights, device)
    pipeline.engines.opened["step"] = engine
    buckets = [[begun(pipeline, seed, side) for seed in range(max(COUNTS))] for side in SIDES]
    forms = [rows[:count] for count in COUNTS for rows in buckets]

    def counted(rounds: int) -> dict[str, int]:
        recorded = device.recorded
        log.take()
        for _ in range(rounds):
            for rows in forms:
                pipeline.step_rows(rows)
        calls = log.take()
        launched = [function for kind, function, *_ in calls if kind == "launch"]
        return {
            "recorded": device.recorded - recorded,
            "calls": rounds * len(forms),
            "graphs": launched.count("graph"),
            "kernels": len(launched) - launched.count("graph"),
            "refused": sum(kind == "refused" for kind, *_ in calls),
        }

    facts = {"first": counted(PROVEN), "then": counted(ROUNDS)}
    print(json.dumps({**facts, "forms": len(forms), "opened": len(engine._forms.opened())}))


if __name__ == "__main__":
    main()
