"""What does the loop itself cost a step, engines excluded?

On the model that ships: the time of a run less the time spent in the step's engine. At Stable
Diffusion 1.5's sizes: a run whose engine does nothing, beside the least that its step could take on
this machine, which is its floating-point operations at the measured peak.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.flops import count
from benchmarks.machine import describe, summary
from benchmarks.prompt import Timed
from engine.backends.settings import BackendSettings
from engine.checkpoints.families.sd import SD1, SD1_FAMILY
from engine.configs.diffusion import AutoencoderConfig
from engine.engines import Engines
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime import Pipeline, Plan, Request

STEPS = 20
SAMPLERS = ("ddim", "euler_a", "unipc")  # one register; fresh noise at every step; four registers
SIDE, TOKENS = 64, 77


def measure(repeats: int) -> dict[str, Any]:
    """Time the loop of each sampler at both sizes; warm-up: one run."""
    machine = describe()
    pipeline = Pipeline.load(fast_start=True)
    floor = _step_flops(pipeline) / (machine["peak_gflops"] * 1e9)
    report: dict[str, Any] = {
        "machine": machine,
        "request": {"steps": STEPS, "repeats": repeats, "step_floor_s": round(floor, 3)},
    }
    for sampler in SAMPLERS:
        plan = _plan(pipeline, sampler)
        shipped = [_beside_the_engine(pipeline, plan) for _ in range(repeats + 1)][1:]
        large = [_of_a_large_model(plan, Idle()) for _ in range(repeats + 1)][1:]
        report[f"{sampler}_ms"] = summary([1e3 * seconds for seconds in shipped])
        report[f"{sampler}_large_ms"] = summary([1e3 * seconds for seconds in large])
        report[f"{sampler}_large_percent"] = summary([100 * seconds / floor for seconds in large])
    return report


class Idle:
    """An engine that does nothing, and remembers the shapes of what it was given."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Return the registers as they came."""
        self.shapes = {name: array.shape for name, array in inputs.items()}
        return {"next_registers": inputs["registers"]}


def _plan(pipeline: Pipeline, sampler: str) -> Plan:
    return pipeline.plan(Request(prompt="a", sampler=sampler, seed=7, num_inference_steps=STEPS))


def _step_flops(pipeline: Pipeline) -> int:
    """Count the operations of a guided step at Stable Diffusion 1.5's sizes."""
    engine = Idle()
    _of_a_large_model(_plan(pipeline, SAMPLERS[0]), engine)
    graph = find_graph("step", SD1, "float32", graph_folders(), Path("Stable Diffusion 1.5"))
    return count(graph.data(), engine.shapes)


def _beside_the_engine(pipeline: Pipeline, plan: Plan) -> float:
    """Return seconds a step of the model that ships, less those in the engine."""
    before = pipeline.engine("step")
    engine = Timed(pipeline, "step")
    start = time.perf_counter()
    for _ in pipeline.denoise(plan):
        pass
    seconds = time.perf_counter() - start - engine.seconds
    pipeline.engines.opened["step"] = before
    return seconds / STEPS


def _of_a_large_model(plan: Plan, engine: Idle) -> float:
    """Return seconds a step at Stable Diffusion 1.5's sizes, with an engine that does nothing."""

    context = np.zeros((2, 1, TOKENS, SD1.cross_attention_dim), np.float32)
    model = replace(
        Model.open(find_model("pictogram")),
        family=SD1_FAMILY,
        configs=MappingProxyType({"unet": SD1, "vae": AutoencoderConfig()}),
    )
    large = replace(
        plan,
        height=8 * SIDE,
        width=8 * SIDE,
        conditioning=[{**inputs, "context": context} for inputs in plan.conditioning],
    )
    engines = Engines(model, BackendSettings(backend="cpu"), "float32")
    engines.opened.update({"step": engine, "vae_decoder": engine})  # type: ignore[dict-item]
    pipeline = Pipeline(engines, {})
    start = time.perf_counter()
    for _ in pipeline.denoise(large):
        pass
    return (time.perf_counter() - start) / STEPS
