"""How long does one prompt take as a whole process, and how much of it is not the engines?

The process is what a user starts: `python -m runtime PROMPT`, 20 guided steps with the model that
ships, from the interpreter's start to the picture on disk. Inside one process the same request
is taken apart: imports, opening engines, running engines, and everything else (tokenising, noise,
samplers, the loop, writing the PNG).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, summary

PROMPT = "a red apple"
STEPS = 20


def measure(repeats: int) -> dict[str, Any]:
    """Time whole processes and the parts of one; warm-ups: one process, one picture."""
    whole = [_whole_process() for _ in range(repeats + 1)][1:]
    parts = [_inside_a_process() for _ in range(repeats + 1)][1:]
    warm = [run["warm"] for run in parts]
    return {
        "machine": describe(),
        "request": {"prompt": PROMPT, "steps": STEPS, "guidance_scale": 5.0, "repeats": repeats},
        "whole_process_s": summary(whole),
        "imports_s": summary([run["imports"] for run in parts]),
        "open_engines_s": summary([run["open_engines"] for run in parts]),
        "first_picture_s": summary([run["first"]["total"] for run in parts]),
        "first_outside_engines_share": summary([run["first"]["outside"] for run in parts]),
        "warm_picture_s": summary([run["total"] for run in warm]),
        "warm_outside_engines_share": summary([run["outside"] for run in warm]),
    }


def _whole_process() -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "runtime", PROMPT, "--steps", str(STEPS), "--seed", "7"]
        start = time.perf_counter()
        subprocess.run(
            [*command, "--out", str(Path(folder) / "apple.png")], check=True, capture_output=True
        )
        return time.perf_counter() - start


def _inside_a_process() -> dict[str, Any]:
    """Take one request apart, in a fresh interpreter."""
    code = f"""
import json
from benchmarks.prompt import _take_apart
print(json.dumps(_take_apart({STEPS})))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    taken: dict[str, Any] = json.loads(done.stdout)
    return taken


def _take_apart(steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    from runtime import Pipeline
    from runtime.images.files import write_image

    imported = time.perf_counter()
    pipeline = Pipeline.load(fast_start=True)
    engines = [Timed(pipeline, part) for part in ("text_encoder", "step", "vae_decoder")]
    opened = time.perf_counter()

    def draw() -> dict[str, float]:
        for engine in engines:
            engine.seconds = 0.0
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = pipeline(PROMPT, num_inference_steps=steps, seed=7)
            write_image(result.images[0], Path(folder) / "apple.png", {"prompt": PROMPT})
        total = time.perf_counter() - begin
        return {"total": total, "outside": 1 - sum(e.seconds for e in engines) / total}

    return {
        "imports": imported - start,
        "open_engines": opened - imported,
        "first": draw(),
        "warm": draw(),
    }


class Timed:
    """An engine that counts the seconds spent in it; it takes the original's place."""

    def __init__(self, pipeline: Any, part: str) -> None:
        self.seconds = 0.0
        self.engine = pipeline.engine(part)
        pipeline.engines.opened[part] = self

    def run(self, inputs: Any) -> Any:
        """Run the engine, and count."""
        start = time.perf_counter()
        outputs = self.engine.run(inputs)
        self.seconds += time.perf_counter() - start
        return outputs
