"""How long does it take to make graphs and engines, and how large are they?

Each part of the model that ships and of a Stable Diffusion 1.5 is traced to ONNX as
`python -m export` does it, and opened on every backend in every precision, with weights (random
ones in Stable Diffusion). Each is done in a process of its own, every round anew, in turn. With
--out the file is written after every measurement, and a second call goes on where the first ended.
"""

import gzip
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.contenders import EMULATED
from benchmarks.machine import memory, summary
from benchmarks.resumable import begin, fill, keep, named
from benchmarks.scenarios import ENGINES, SCENARIOS
from benchmarks.worker import once
from engine.backends.settings import ON_GPU, PRECISIONS, BackendSettings, cpu_count
from engine.graphs.graph import Part, Precision
from engine.model import Model

TRACE_S = 900  # a part's bound
Task = tuple[str, tuple[str, ...], float]  # a function of this module, its arguments, its bound


def measure(
    repeats: int = 3,
    threads: int | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Trace and open until each has its rounds; raises OutputError, RequestError.

    only: texts of which a task's name holds one; the names are those of the report
    """
    threads = threads or cpu_count()
    found = tasks()
    names = named("task", found, only)
    request = {"models": {name: chosen.title for name, chosen in SCENARIOS.items()}}
    report = begin({**request, "threads": threads}, out, lambda: {"tasks": {}})

    def take(name: str) -> dict[str, Any]:
        function, arguments, bound_s = found[name]
        return once(
            "benchmarks.build", function, *arguments, threads, threads=threads, bound_s=bound_s
        )

    fill(report["tasks"], names, repeats, take, lambda: keep(summarised(report), out))
    return summarised(report)


def tasks() -> dict[str, Task]:
    """Return what can be measured, by name: `trace MODEL PART PRECISION` and `open MODEL ...`."""
    found: dict[str, Task] = {}
    for model, scenario in SCENARIOS.items():
        for part in (*ENGINES.values(), "vae_encoder"):
            for precision in get_args(Precision):
                name = f"trace {model} {part} {precision}"
                found[name] = ("traced", (model, part, precision), TRACE_S)
        for backend, offered in PRECISIONS.items():
            for computed in offered:
                if backend in ON_GPU or (backend, computed) in EMULATED:
                    continue
                name = f"open {model} {backend} {computed}"
                found[name] = ("opened", (model, backend, computed), scenario.ready_s)
    return found


def traced(model: str, part: Part, precision: Precision, threads: int) -> dict[str, Any]:
    """Trace a part in this process; returns seconds, bytes and nodes."""
    start = time.perf_counter()
    import torch

    from export.tracing import trace

    torch.set_num_threads(threads)
    imported = time.perf_counter()
    config = Model.open(SCENARIOS[model].model()).config(part)
    begun = time.perf_counter()
    graph = trace(part, config, precision).model
    seconds = time.perf_counter() - begun
    data = graph.SerializeToString()
    return {
        "imports_s": round(imported - start, 3),
        "seconds": round(seconds, 3),
        "peak_bytes": memory()["peak_bytes"],
        "bytes": len(data),
        "compressed_bytes": len(gzip.compress(data, mtime=0)),
        "nodes": len(graph.graph.node),
    }


def opened(model: str, backend: str, precision: str, threads: int) -> dict[str, Any]:
    """Open a model's engines in this process; returns seconds, of each part too, and bytes."""
    from runtime import Pipeline

    begun = time.perf_counter()
    pipeline = Pipeline.load(
        SCENARIOS[model].model(),
        precision=precision,  # type: ignore[arg-type]
        settings=BackendSettings(backend=backend, threads=threads),
    )
    laps = [time.perf_counter()]
    for part in ENGINES.values():
        pipeline.engine(part)
        laps.append(time.perf_counter())
    return {
        "seconds": round(laps[-1] - begun, 4),
        "load_s": round(laps[0] - begun, 4),
        **{
            f"{name}_s": round(after - before, 4)
            for name, before, after in zip(ENGINES, laps, laps[1:], strict=False)
        },
        **memory(),
    }


def summarised(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with the median and the spread of each task's rounds."""
    shown = {}
    for name, taken in report["tasks"].items():
        shown[name] = dict(taken)
        if rounds := taken["rounds"]:
            figures = {key: summary([each[key] for each in rounds]) for key in rounds[0]}
            shown[name]["figures"] = figures
    return {**report, "tasks": shown}
