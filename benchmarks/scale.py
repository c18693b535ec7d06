"""How does a picture's time grow with the batch, the picture's size, the steps and the threads?

One setting of the engines, of the model that ships: whole requests in a warm process. Of Stable
Diffusion 1.5's size: one guided step. One axis changes at a time, the others stay as `BASE` says.
Every point is a process of its own with a warm-up, every round anew, in turn. With --out the file
is written after every measurement, and a second call goes on where the first ended.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import memory, summary
from benchmarks.resumable import begin, fill, keep
from benchmarks.scenarios import SEED, Scenario, engine_inputs
from benchmarks.worker import once, timed
from engine.backends.settings import BackendSettings, cpu_count, graph_precision
from engine.graphs.graph import signature

BATCHES, STEPS = (1, 2, 4), (5, 10, 20, 40)
SIZES: Mapping[str, tuple[int, ...]] = {
    "pictogram": (64, 128, 192, 256),
    "sd15": (256, 384, 512, 768),
}
AXES: Mapping[str, str] = {
    "batch": "pictures at once",
    "size": "pixels along one side",
    "steps": "steps",
    "threads": "threads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is drawn: so many pictures of so many pixels along one side, and how."""

    batch: int = 1
    size: int
    steps: int
    threads: int

    def name(self) -> str:
        """Return the point's name in a report."""
        return ", ".join(f"{axis} {value}" for axis, value in asdict(self).items())


def measure(
    model: str,
    backend: str = "cpu",
    precision: str = "float32",
    repeats: int = 3,
    threads: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure until every point has its rounds; raises OutputError, RequestError, BackendError.

    threads: the most that are tried; None takes one for each processor core
    """
    scenario, most = Scenario.of(model), threads or cpu_count()
    graph_precision(BackendSettings(backend=backend, threads=most), precision)  # type: ignore[arg-type]
    points = chosen_points(scenario, most)
    request = {
        "name": scenario.name,
        "model": scenario.title,
        "backend": backend,
        "precision": precision,
        "guidance_scale": scenario.guidance_scale,
        "timed": "a guided step" if scenario.is_made() else "a whole request",
        "base": asdict(base(scenario, most)),
    }
    report = begin(request, out, lambda: {"points": {}})

    def take(name: str) -> dict[str, Any]:
        point, bound_s = points[name], scenario.ready_s + scenario.whole_s
        arguments = (model, backend, precision, asdict(point))
        return once("benchmarks.scale", "drawn", *arguments, threads=point.threads, bound_s=bound_s)

    fill(report["points"], list(points), repeats, take, lambda: keep(_shown(report, points), out))
    return _shown(report, points)


def base(scenario: Scenario, threads: int) -> Point:
    """Return the point from which one axis at a time departs."""
    return Point(
        size=scenario.size, steps=1 if scenario.is_made() else scenario.steps, threads=threads
    )


def chosen_points(scenario: Scenario, threads: int) -> dict[str, Point]:
    """Return the points by name; that of the base, which is on every axis, comes once."""
    middle = base(scenario, threads)
    points = [
        *(replace(middle, batch=batch) for batch in BATCHES),
        *(replace(middle, size=size) for size in SIZES[scenario.name]),
        *(replace(middle, steps=steps) for steps in STEPS if not scenario.is_made()),
        *(replace(middle, threads=number) for number in range(1, threads + 1)),
    ]
    return {point.name(): point for point in points}


def along(report: Mapping[str, Any], axis: str) -> dict[int, Mapping[str, Any]]:
    """Return a report's measured points that differ from its base along one axis alone."""
    base = report["request"]["base"]
    found = {
        taken["point"][axis]: taken
        for taken in report["points"].values()
        if taken["rounds"] and {**taken["point"], axis: base[axis]} == base
    }
    return dict(sorted(found.items()))


def drawn(model: str, backend: str, precision: str, point: Mapping[str, int]) -> dict[str, Any]:
    """Draw a point's pictures in this process, or take one step of them; returns seconds."""
    from runtime import Pipeline

    chosen = Point(**point)
    scenario = replace(Scenario.of(model), size=chosen.size, steps=chosen.steps)
    pipeline = Pipeline.load(
        scenario.model(),
        precision=precision,  # type: ignore[arg-type]
        settings=BackendSettings(backend=backend, threads=chosen.threads),
    )

    def request() -> NDArray[Any]:
        pipeline.encoder = pipeline.encoder.without_cache()  # the text is encoded each time
        options = {**scenario.options(), "num_images_per_prompt": chosen.batch, "seed": SEED}
        return np.asarray(pipeline(scenario.prompt, sampler="ddim", **options).images[0])

    def step() -> NDArray[Any]:
        return pipeline.engine("step").run(inputs)["next_registers"]

    inputs = _repeated(scenario, pipeline, chosen.batch)
    run = step if scenario.is_made() else request
    run()
    seconds = timed(run)[1]
    return {"seconds": round(seconds, 5), "peak_bytes": memory()["peak_bytes"]}


def _repeated(scenario: Scenario, pipeline: Any, batch: int) -> dict[str, NDArray[Any]]:
    """Return a step's inputs with so many pictures of the same."""
    model = pipeline.model
    described = signature("step", model.config("step")).inputs
    given = engine_inputs(scenario, model)["step"]
    return {
        name: array.repeat(batch, described[name].shape.index("B")) for name, array in given.items()
    }


def _shown(report: Mapping[str, Any], points: Mapping[str, Point]) -> dict[str, Any]:
    """Return a report with what each point is, and the median and the spread of its rounds."""
    shown = {}
    for name, taken in report["points"].items():
        shown[name] = {**taken, "point": asdict(points[name])}
        for key in taken["rounds"][0] if taken["rounds"] else ():
            shown[name][key] = summary([each[key] for each in taken["rounds"]])
    return {**report, "points": shown}
