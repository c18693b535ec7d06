"""How much memory does a request take, and at which stage?

Every contender opens the model, encodes the texts, runs a guided step and decodes, in a process of
its own for each round. After every stage it tells what is resident and the most that ever was, the
interpreter, its libraries and the mapped file of the weights included. With --out the file is
written after every round, and a second call goes on where the first ended.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, contenders
from benchmarks.resumable import begin, fill, keep
from benchmarks.scenarios import ENGINES, WHOLE, Scenario
from benchmarks.worker import Worker
from engine.backends.settings import cpu_count
from engine.model import Model

PARTS = tuple(stage for part in ENGINES for stage in (f"open {part}", part))
STAGES = ("import", "load", *PARTS)  # or the whole request of a contender that shows no parts


def measure(
    model: str,
    repeats: int = 2,
    threads: int | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure until every contender has its rounds; raises OutputError, RequestError."""
    scenario, threads = Scenario.of(model), threads or cpu_count()
    names = [name for name in contenders(scenario, only) if not CONTENDERS[name].saves]
    if scenario.name == "pictogram":
        names = [name for name in names if not CONTENDERS[name].whole_only]
    request = {
        "name": scenario.name,
        "model": scenario.title,
        "size": scenario.size,
        "guidance_scale": scenario.guidance_scale,
        "threads": threads,
    }
    report = begin(request, out, lambda: {"weights": _weights(scenario), "contenders": {}})
    taken = report["contenders"]
    fill(
        taken,
        names,
        repeats,
        lambda name: _stages(name, scenario, threads),
        lambda: keep(report, out),
    )
    for name, found in taken.items():
        if name in CONTENDERS:
            chosen = CONTENDERS[name]
            found |= {"precision": chosen.precision, "settings": chosen.settings}
    keep(report, out)
    return report


def _weights(scenario: Scenario) -> dict[str, int]:
    """Count the numbers of all parts, and the bytes of the files that hold them."""
    model = Model.open(scenario.model())
    scenario.folder()  # for the peers, written before any of them is measured
    files = [model.path] if model.path.is_file() else [*model.path.rglob("*.safetensors")]
    numbers = (
        math.prod(shape)
        for component in model.configs
        for shape in model.find(component).shapes.values()
    )
    return {"numbers": sum(numbers), "file_bytes": sum(file.stat().st_size for file in files)}


def _stages(name: str, scenario: Scenario, threads: int) -> dict[str, dict[str, int]]:
    """Run a contender's stages in order; returns the memory after each; raises ContenderError."""
    start = time.monotonic()
    worker = Worker(name, scenario.name, threads)
    try:
        ready = worker.ready(scenario.ready_s)
        stages = {"import": ready["imported"], "load": ready["opened"]}
        whole_only = CONTENDERS[name].whole_only
        for part in (WHOLE,) if whole_only else PARTS:
            if part in ready["parts"]:
                left = scenario.ready_s + scenario.whole_s - (time.monotonic() - start)
                bound = left if whole_only else min(left, scenario.ready_s)
                stages[part] = worker.run(part, bound)["memory"]
    finally:
        worker.close()
    return stages
