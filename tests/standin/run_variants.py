"""Draw pictures of the model that ships with more than plain steps on the stand-in; prints JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_variants.py
"""

import json
from typing import Any

from engine.backends.settings import BackendSettings
from runtime import Pipeline
from tests.standin.call_log import CallLog
from tests.standin.run_pictures import drawn, on_the_stand_in

RUNS = 4  # call by call, recorded, proven, launched
ASKED: dict[str, dict[str, Any]] = {
    "seamless": {"seamless": "both"},
    "perturbed": {"pag_scale": 3.0},
    "projected": {"apg": (0.0, 15.0, -0.5)},
    "CFG++": {"sampler": "ddim_cfg_pp", "cache_interval": 3},
    "shrunk": {"deep_shrink": 0.5},
}
IN_FLOAT32 = ("shrunk",)  # that graph ships in no other precision


def main() -> None:
    """Print what pictures of each take, one after the other."""
    device, log = on_the_stand_in(), CallLog()
    settings = BackendSettings(backend="cuda")
    facts = {}
    for name, asked in ASKED.items():
        precision: Any = "float32" if name in IN_FLOAT32 else "float16"
        pipeline = Pipeline.load("pictogram", precision=precision, settings=settings)
        options = {"sampler": "ddim", "num_inference_steps": 6, **asked}
        facts[name] = [drawn(pipeline, device, log, options, seed) for seed in range(RUNS)]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
