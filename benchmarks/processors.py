"""Which backend is the fastest on a processor with fewer instructions?

For each instruction set every backend that is installed runs the step and the decoder in a process
of its own, in which both libraries see those instructions alone. What `engine.engines` chooses in
such a process must be the fastest within 5 %. With --out a second call goes on where the first
ended.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import load_pipeline
from benchmarks.distances import relative_error
from benchmarks.instruction_sets import HIDDEN, environment
from benchmarks.machine import summary
from benchmarks.race import ALLOWED_ERROR
from benchmarks.resumable import begin, keep, named
from benchmarks.scenarios import ENGINES, Scenario, engine_inputs
from benchmarks.worker import ContenderError, once, timed
from engine.backends.settings import BackendSettings, cpu_count
from engine.engines import Engines
from engine.model import Model

SLACK = 1.05  # times the fastest, that what is chosen may take
WAYS = ("cpu float32", "openvino float32", "openvino bfloat16")
PARTS = {"step": "next_registers", "decode": "pixels"}
MODULE = "benchmarks.processors"


def measure(
    model: str = "pictogram",
    repeats: int = 2,
    threads: int | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure what a file lacks; raises OutputError, RequestError.

    only: texts of which an instruction set's name holds one, none means all
    `exceeded` of the report names the sets whose choice is not the fastest.
    """
    scenario, threads = Scenario.of(model), threads or cpu_count()
    names = named("set", HIDDEN, only)
    asked = {"name": "processors", "model": scenario.title, "size": scenario.size}
    asked |= {"threads": threads, "repeats": repeats, "steps": scenario.steps}
    report = begin(asked, out, lambda: {"sets": {}})
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = report["sets"].setdefault(name, {"ways": {}})
            for way in WAYS:
                if "seconds" not in found["ways"].get(way, {}):
                    place = (scenario, threads, repeats, Path(folder))
                    found["ways"][way] = _measured(name, way, *place)
                    keep(summarised(report), out)
            if "chosen" not in found:
                found["chosen"] = _chosen(name, scenario, threads, folder)
            keep(summarised(report), out)
    return summarised(report)


def _measured(
    name: str, way: str, scenario: Scenario, threads: int, repeats: int, folder: Path
) -> dict[str, Any]:
    file, first = folder / "found.npy", folder / "expected.npy"
    given = (scenario.name, *way.split(), threads, repeats, str(file))
    try:
        limited = environment(name)
        taken = once(
            MODULE,
            "run_parts",
            *given,
            threads=threads,
            bound_s=scenario.ready_s,
            variables=limited,
        )
    except ContenderError as failure:
        return {"skipped": str(failure).rpartition(": ")[2]}  # without the file and its place
    if not first.is_file():
        file.rename(first)
        return {"seconds": taken, "agrees": True}
    error = relative_error(np.load(file), np.load(first))
    return {"seconds": taken, "agrees": error <= ALLOWED_ERROR[way.split()[1]]}


def _chosen(name: str, scenario: Scenario, threads: int, folder: str) -> str:
    """Ask what is chosen, of a model that nobody has calibrated."""
    try:
        found = once(
            MODULE,
            "choose",
            str(scenario.model()),
            threads=threads,
            bound_s=scenario.ready_s,
            variables={**environment(name), "LATENTRT_CACHE": folder},
        )
    except ContenderError as failure:
        return f"none ({failure})"
    return str(found["chosen"])


def run_parts(
    model: str, backend: str, precision: str, threads: int, repeats: int, file: str
) -> dict[str, Any]:
    """Open a model and run its step and its decoder; returns seconds, and saves the step's output.

    Raises what the backend raises.
    """
    scenario = Scenario.of(model)
    settings = BackendSettings(backend=backend, threads=threads)
    pipeline = load_pipeline(scenario, precision, settings)
    inputs, seconds = engine_inputs(scenario, pipeline.model), {}
    for part, output in PARTS.items():
        engine, given = pipeline.engine(ENGINES[part]), inputs[ENGINES[part]]
        first = engine.run(given)[output]  # the libraries arrange their memory in it
        if part == "step":
            np.save(file, first)
        laps = [timed(lambda e=engine, g=given, o=output: e.run(g)[o])[1] for _ in range(repeats)]  # type: ignore[misc]
        seconds[part] = summary(laps)
    return seconds


def choose(model: str) -> dict[str, str]:
    """Say what is chosen by itself for the model at a path; raises what choosing raises."""
    engines = Engines.choose(Model.open(Path(model)))
    return {"chosen": f"{engines.settings.backend} {engines.precision}"}


def summarised(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with each request's time, the fastest, and the sets that are `exceeded`."""
    steps, sets, exceeded = report["request"]["steps"], {}, []
    for name, found in report["sets"].items():
        ways = {
            way: taken | {"request_s": _request(taken["seconds"], steps)}
            if "seconds" in taken
            else taken
            for way, taken in found["ways"].items()
        }
        times = {way: taken["request_s"] for way, taken in ways.items() if taken.get("agrees")}
        sets[name] = {**found, "ways": ways}
        if times and "chosen" in found:
            fastest = min(times.values())
            sets[name]["fastest"] = min(times, key=lambda way: times[way])
            if times.get(found["chosen"], float("inf")) > SLACK * fastest:
                exceeded.append(name)
    return {**report, "sets": sets, "exceeded": exceeded}


def _request(seconds: Mapping[str, Any], steps: int) -> float:
    """Add up a request but its text, which takes a thousandth."""
    return round(float(steps * seconds["step"]["median"] + seconds["decode"]["median"]), 4)
