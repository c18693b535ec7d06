"""Draw pictures on the stand-in; prints what each queued, recorded and copied, as JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_pictures.py
"""

import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from engine.backends.onnxruntime import cuda as backend
from engine.backends.settings import BackendSettings
from engine.devices import cuda as devices
from runtime import Pipeline
from tests.standin.call_log import CallLog, copied
from tests.standin.device import CountingDevice

REPEATS = 5  # of one form: call by call, recorded, proven, launched twice
FORMS = [  # a side, how many pictures, how many steps
    {"height": side, "width": side, "num_images_per_prompt": count, "num_inference_steps": steps}
    for side, count, steps in ((128, 1, 20), (192, 1, 20), (128, 2, 20), (128, 1, 30))
]
PROVEN, ROUNDS = 3, 2  # rounds of all forms until all are believed, and afterwards


def on_the_stand_in() -> CountingDevice:
    """Have the backend find the stand-in where it looks for a GPU."""
    device = CountingDevice()
    backend.find_device = devices.find_device = cache(lambda index=0: device)
    return device


def drawn(
    pipeline: Pipeline, device: CountingDevice, log: CallLog, options: Mapping[str, Any], seed: int
) -> dict[str, int]:
    """Draw a picture; return what it queued, recorded, waited for and copied."""
    recorded = device.recorded
    log.take()
    pipeline("a hat", seed=seed, **options)
    return {"recorded": device.recorded - recorded, **counted(log.take())}


def counted(calls: list[list[str]]) -> dict[str, int]:
    """Count what calls queued, waited for and copied."""
    launched = Counter(function for kind, function, *_ in calls if kind == "launch")
    kinds = Counter(kind for kind, *_ in calls)
    return {
        "graphs": launched["graph"],
        "kernels": launched["kernel"],
        "waits": kinds["wait"],
        "refused": kinds["refused"],
        "up": sum(copied(calls, "HtoD")),
        "down": sum(copied(calls, "DtoH")),
    }


def main() -> None:
    """Print what pictures of one form take, one after the other, and of several forms in turn."""
    device, log = on_the_stand_in(), CallLog()
    settings = BackendSettings(backend="cuda")
    pipeline = Pipeline.load("pictogram", precision="float16", settings=settings)

    def form(options: Mapping[str, int], seed: int) -> dict[str, int]:
        return drawn(pipeline, device, log, {"sampler": "ddim", **options}, seed)

    repeated = [form(FORMS[0], seed) for seed in range(REPEATS)]
    rounds = [[form(each, seed) for each in FORMS] for seed in range(PROVEN + ROUNDS)]
    print(json.dumps({"repeated": repeated, "rounds": rounds}))


if __name__ == "__main__":
    main()
